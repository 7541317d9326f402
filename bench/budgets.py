"""How fast is money? Pairs of reserve and commit, beside the same in Redis, in Postgres and in etcd by hand, in one run.

64 callers in a closed loop, each reserving on a path of four accounts, all limited, and committing what it reserved.
Three shapes: all callers on *one path* (one session, four hot accounts); *one agent*, each caller a session of its own
below it (three hot accounts and one of its own); and *1,000 paths* that have nothing in common. What `reserve` means in
each of the opponents is in `bench/baselines.py`; all of them answer when it is on disk, and may be asked twice.

`fabric` sends what the SDK sends: every request has an id of its own, and so a receipt. `by hold` leaves it out, and
is as safe to repeat as the opponents are, by the hold's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nats

from bench.baselines import CALLERS, COST, ESTIMATE, LIMIT, Path4, beside
from bench.stand import Stand, children, closed_loop, cpu_s, percentile, stand

ROUNDS = 3
SECONDS = 4.0
WARM_S = 1.0
PATHS = 1_000

#: of each shape, the path of a caller's nth pair
Shape = tuple[Sequence[Path4], Callable[[int], int]]


def path(account: str, session: str) -> Path4:
    root, team, _ = account.split("/")
    return root, f"{root}/{team}", account, f"{account}/@{session}"


SHAPES: dict[str, Shape] = {
    "one path": ([path("acme/hot/agent", "one")], lambda _: 0),
    "one agent": ([path("acme/team/agent", f"c{n}") for n in range(CALLERS)], lambda number: number % CALLERS),
    "1,000 paths": ([path(f"org{n}/team/agent", f"p{n}") for n in range(PATHS)], lambda number: number % PATHS),
}


class Fabric:
    """By NATS request."""

    def __init__(self, where: Stand, *, receipts: bool) -> None:
        self.name = "fabric" if receipts else "by hold"
        self._where = where
        self._receipts = receipts
        self.pids = {"daemon": where.pid, **children(where.pid)}
        self.version = "with receipts" if receipts else "repeated by the hold's id only"

    async def connect(self) -> None:
        self._nc = await nats.connect(self._where.nats)

    async def _ask(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._nc.request(f"if.v1.{subject}", json.dumps(body).encode(), timeout=30)
        found: dict[str, Any] = json.loads(answer.data)
        if "error" in found:
            raise SystemExit(f"{subject}: {found['error']}")
        return found

    async def found(self, paths: Sequence[Path4]) -> None:
        """Sessions, and a limit on every account."""
        gate = asyncio.Semaphore(CALLERS)

        async def one(accounts: Path4) -> None:
            async with gate:
                session = accounts[-1].rpartition("@")[2]
                await self._ask(f"coordinator.hello.{session}", {"account": accounts[2], "ttl_s": 3600})
                for account in accounts:
                    body = {"account": account, "limit_micro_usd": LIMIT}
                    await self._ask("admin.governor.account.bench", body)

        await asyncio.gather(*(one(accounts) for accounts in paths))

    async def pair(self, path: Path4, hold: str) -> None:
        session = path[-1].rpartition("@")[2].encode()
        name = f"{self.name[:2]}{hold}".encode()
        first, second = (b',"request_id":"r%b"' % name, b',"request_id":"c%b"' % name) if self._receipts else (b"", b"")
        for verb, amount, more in ((b"reserve", ESTIMATE, first), (b"commit", COST, second)):
            body = b'{"hold":"%b","amount_micro_usd":%d%b}' % (name, amount, more)
            answer = await self._nc.request((b"if.v1.governor.%b.%b" % (verb, session)).decode(), body, timeout=30)
            if answer.headers is not None:
                raise SystemExit(f"{verb!r}: {answer.headers}")

    async def totals(self, account: str) -> tuple[int, int]:
        lines = (await self._ask("governor.balance.operator", {"account": account}))["path"]
        return lines[-1]["spent"], lines[-1]["held"]

    async def close(self) -> None:
        await self._nc.close()


class Result:
    """One side in one shape, round after round."""

    def __init__(self) -> None:
        self.rate: list[float] = []
        self.p50: list[float] = []
        self.p95: list[float] = []
        #: microseconds of processor a pair, by process
        self.processor: dict[str, list[float]] = {}
        self.pairs = 0


def until(numbers: Iterator[int], end_s: float) -> Iterator[int]:
    """Numbers until then."""
    while time.monotonic() < end_s:
        yield next(numbers)


def used_s(pids: dict[str, int]) -> dict[str, float]:
    """Seconds of processor that processes have used; Postgres has one for each connection."""
    found = {name: cpu_s(pid) for name, pid in pids.items()}
    if (postmaster := pids.get("postgres")) is not None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == postmaster:
                    found["postgres"] += cpu_s(int(stat.parent.name))
    return found


async def measure(side: Any, shape: Shape, numbers: Iterator[int], result: Result) -> None:
    """One round."""
    paths, which = shape

    async def act(number: int) -> None:
        await side.pair(paths[which(number)], f"h{number}")

    warm = await closed_loop(act, until(numbers, time.monotonic() + WARM_S), CALLERS)
    pids = {**side.pids, "loader": os.getpid()}
    before = used_s(pids)
    began = time.monotonic()
    taken = await closed_loop(act, until(numbers, began + SECONDS), CALLERS)
    seconds = time.monotonic() - began
    result.rate.append(len(taken) / seconds)
    result.p50.append(percentile(taken, 0.5) * 1e3)
    result.p95.append(percentile(taken, 0.95) * 1e3)
    for name, used in used_s(pids).items():
        result.processor.setdefault(name, []).append((used - before[name]) / len(taken) * 1e6)
    result.pairs += len(warm) + len(taken)


def row(name: str, result: Result) -> str:
    rate, p50, p95 = (statistics.median(values) for values in (result.rate, result.p50, result.p95))
    used = ", ".join(f"{process} {statistics.median(us):.0f}" for process, us in result.processor.items())
    return f"    {name:>9}: {rate:>7,.0f} pairs/s   p50 {p50:>7.2f}  p95 {p95:>7.2f} ms   processor us a pair: {used}"


async def main() -> None:
    """Prints every figure, and the ratios that count."""
    async with stand() as where:
        etcd_pid = next(pid for name, pid in children(where.pid).items() if "etcd" in name)
        async with beside(Path(where.folder), where.etcd, etcd_pid) as (others, missing):
            sides: list[Any] = [Fabric(where, receipts=True), Fabric(where, receipts=False), *others]
            for side in sides[:2]:
                await side.connect()
            print("\n".join(f"  {side.name:>9}: {side.version}" for side in sides), *missing, sep="\n    ")
            for name, shape in SHAPES.items():
                await rounds(name, sides, shape)
            for side in sides[:2]:
                await side.close()


async def rounds(name: str, sides: list[Any], shape: Shape) -> None:
    """All sides in turn, three times; and whether the sums are right in the end."""
    results = {side.name: Result() for side in sides}
    numbers = {side.name: itertools.count() for side in sides}
    for side in sides:
        if side.name != "by hold":  # it has the accounts of the fabric
            await side.found(shape[0])
    for _ in range(ROUNDS):
        for side in sides:
            await asyncio.sleep(0.5)
            await measure(side, shape, numbers[side.name], results[side.name])
    print(f"  {name}")
    for side in sides:
        print(row(side.name, results[side.name]))
    for side in sides:
        root = shape[0][0][2]
        mine = ("fabric", "by hold") if side.name in ("fabric", "by hold") else (side.name,)
        pairs = sum(results[other].pairs for other in mine)
        spent, held = await side.totals(root)
        if len({accounts[2] for accounts in shape[0]}) == 1 and (spent, held) != (pairs * COST, 0):
            print(f"    WRONG SUMS in {side.name}: {pairs} pairs, {spent} spent, {held} held")
    ours = results["fabric"].rate
    for side in sides[1:]:
        ratio = statistics.median(a / b for a, b in zip(ours, results[side.name].rate, strict=True))
        print(f"    fabric / {side.name}: {ratio:.2f}")
