"""How fast is a claim? The fabric beside the same etcd asked directly, in one run.

Three shapes of load: alone (one caller), closed loop (64 callers), open loop (a steady rate, latency from the due
time; the *knee* is the highest rate whose p95 stays below 10 ms). Two direct opponents, both through aetcd on the
same etcd: `plain` is the claim that a user would write (create a key under a lease, or read who has it); `same`
writes what ours writes, record and receipt with the same compares.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

import aetcd
import nats
from aetcd import rpc

from bench.stand import Stand, closed_loop, open_loop, percentile, stand

CALLERS = 64
ROUNDS = 3
CLOSED = 12_000
ALONE = 1_000
RATES = (1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 7_000, 8_000, 10_000, 12_000)
OPEN_S = 2.0
KNEE_S = 0.010
BATCH = 100

Act = Callable[[int], Awaitable[None]]


class Fabric:
    """Claims by NATS request, each of a task of its own."""

    def __init__(self, where: Stand) -> None:
        self._where = where
        self._tasks = 0
        self._ids = itertools.count()

    async def connect(self) -> None:
        self._nc = await nats.connect(self._where.nats)
        for caller in range(CALLERS):
            await self._ask("hello", f"c{caller}", {"ttl_s": 600})

    async def _ask(self, verb: str, session: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._nc.request(f"if.v1.coordinator.{verb}.{session}", json.dumps(body).encode(), timeout=30)
        found: dict[str, Any] = json.loads(answer.data)
        if "error" in found:
            raise SystemExit(f"{verb}: {found['error']}")
        return found

    async def supply(self, count: int) -> None:
        """Makes sure that there are that many tasks more to claim."""
        first, self._tasks = self._tasks, self._tasks + count
        for at in range(first, self._tasks, BATCH):
            await self._ask(
                "submit", "bench", {"tasks": [{"id": f"T{n}"} for n in range(at, min(at + BATCH, self._tasks))]}
            )

    async def act(self, number: int) -> None:
        body = b'{"task":"T%d","request_id":"r%d"}' % (number, number)
        answer = await self._nc.request(f"if.v1.coordinator.claim.c{number % CALLERS}", body, timeout=30)
        if answer.headers is not None:
            raise SystemExit(f"claim of T{number}: {answer.headers}")

    async def close(self) -> None:
        await self._nc.close()


class Direct:
    """The same etcd, asked through aetcd."""

    def __init__(self, where: Stand, *, same: bool) -> None:
        host, port = where.etcd.removeprefix("http://").split(":")
        self._client = aetcd.Client(host=host, port=int(port))
        self._same = same
        self._prefix = b"bench/same/" if same else b"bench/plain/"

    async def connect(self) -> None:
        await self._client.connect()
        self._lease = (await self._client.lease(600)).id
        await self._client.put(self._prefix + b"session", b"{}", lease=self._lease)

    async def supply(self, count: int) -> None:
        """Nothing to prepare: an absent key is free."""

    async def act(self, number: int) -> None:
        key = self._prefix + b"task/%d" % number
        compare = [rpc.Compare(key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)]
        puts = [rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=b'{"session":"c1"}', lease=self._lease))]
        if self._same:
            receipt = self._prefix + b"receipt/%d" % number
            session = self._prefix + b"session"
            compare.append(
                rpc.Compare(key=receipt, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)
            )
            compare.append(
                rpc.Compare(key=session, target=rpc.Compare.LEASE, result=rpc.Compare.EQUAL, lease=self._lease)
            )
            record = (
                b'{"spec":{"id":"T1"},"state":"claimed","body":"0123456789abcdef0123456789abcdef",'
                b'"history":' + b'"x"' * 60
            )
            puts = [
                rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=record)),
                rpc.RequestOp(request_put=rpc.PutRequest(key=receipt, value=record[:120], lease=self._lease)),
            ]
        read = [rpc.RequestOp(request_range=rpc.RangeRequest(key=key))]
        answer = await self._client.kvstub.Txn(rpc.TxnRequest(compare=compare, success=puts, failure=read))
        assert answer.succeeded

    async def close(self) -> None:
        await self._client.close()


async def knee(side: Fabric | Direct, numbers: Any) -> tuple[int, list[str]]:
    """The highest rate with p95 below 10 ms, and a line for each rate tried."""
    best, lines = 0, []
    for rate in RATES:
        await side.supply(int(rate * OPEN_S))
        taken = await open_loop(side.act, numbers, rate, OPEN_S)
        p50, p95, p99 = (percentile(taken, share) * 1e3 for share in (0.5, 0.95, 0.99))
        lines.append(f"    {rate:>6}/s  p50 {p50:7.2f}  p95 {p95:7.2f}  p99 {p99:7.2f} ms")
        if p95 < KNEE_S * 1e3:
            best = rate
        elif rate > 2 * max(best, 1):
            break
    return best, lines


async def main() -> None:
    """Prints every figure, and the ratios that count."""
    async with stand() as where:
        sides: dict[str, Fabric | Direct] = {
            "plain": Direct(where, same=False),
            "same": Direct(where, same=True),
            "fabric": Fabric(where),
        }
        counters = {name: itertools.count() for name in sides}
        closed: dict[str, list[float]] = {name: [] for name in sides}
        alone: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            await side.connect()
        for _ in range(ROUNDS):
            for name, side in sides.items():
                await side.supply(ALONE + CLOSED)
                await asyncio.sleep(0.5)
                taken = await closed_loop(side.act, itertools.islice(counters[name], ALONE), 1)
                alone[name].append(percentile(taken, 0.5) * 1e3)
                began = asyncio.get_running_loop().time()
                await closed_loop(side.act, itertools.islice(counters[name], CLOSED), CALLERS)
                closed[name].append(CLOSED / (asyncio.get_running_loop().time() - began))
        print(f"ready after {where.ready_s:.2f} s")
        for name in sides:
            print(
                f"{name:>7}: alone p50 {statistics.median(alone[name]):.3f} ms, closed loop {statistics.median(closed[name]):,.0f} /s"
            )
        knees = {}
        for name, side in sides.items():
            knees[name], lines = await knee(side, counters[name])
            print(f"{name:>7}: open loop, knee {knees[name]:,}/s", *lines, sep="\n")
        for opponent in ("plain", "same"):
            pairs = zip(alone["fabric"], alone[opponent], strict=True)
            print(
                f"fabric / {opponent}: alone {statistics.median(a / b for a, b in pairs):.2f}, closed loop "
                f"{statistics.median(a / b for a, b in zip(closed['fabric'], closed[opponent], strict=True)):.2f}, "
                f"knee {knees['fabric'] / max(1, knees[opponent]):.2f}"
            )
        for side in sides.values():
            await side.close()
