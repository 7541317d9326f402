"""What does it cost to be seen? Claims with everything on, beside claims with less and less of it.

Five stands in one run, each an etcd, a nats-server and a daemon of their own, all up at once and asked in turn, in an
order that moves on with each round: as shipped (metrics, audit, events); without the audit; with none of the three
(`bench.unseen` takes the counting out of the code as it is loaded); as shipped and with traces, of 1 % and of all
requests. The collector is a process of its own that reads and says yes.

Two measures: claims a second of 64 callers in a closed loop; and the processor time that a claim takes, of the daemon
and of its nats-server and etcd, until all that a claim leaves to be done later (events, audit, spans) was done as well.
The second is the one that another process's load does not move.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from bench.claims import Fabric
from bench.stand import Stand, children, closed_loop, cpu_s, percentile, stand
from ifabric.clock import monotonic

CALLERS = 64
ROUNDS = 7
CLOSED = 8_000
#: processor time that a stand takes in `QUIET_S` when it has nothing to do
QUIET_S, QUIET_CPU_S = 0.5, 0.05
QUIET_WITHIN_S = 60.0

SINK = """
import asyncio
async def one(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = next(int(l.split(b":")[1]) for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length"))
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: application/x-protobuf\\r\\nContent-Length: 0\\r\\n\\r\\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(one, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@dataclass
class Side:
    """One stand, and what was measured of it, a figure a round."""

    where: Stand
    claims: Fabric
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    rate: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)
    #: processor time of a claim, in microseconds, by process
    cpu_us: dict[str, list[float]] = field(default_factory=dict)

    def used(self) -> dict[str, float]:
        """Seconds of processor time, by process."""
        found = {"daemon": cpu_s(self.where.pid)}
        for name, pid in children(self.where.pid).items():
            for known in ("etcd", "nats-server"):
                if name.startswith(known):
                    found[known] = cpu_s(pid)
        return found

    async def quiet(self) -> None:
        """Returns when what was left to be done is done."""
        until = monotonic() + QUIET_WITHIN_S
        while True:
            before = sum(self.used().values())
            await asyncio.sleep(QUIET_S)
            if sum(self.used().values()) - before <= QUIET_CPU_S:
                return
            if monotonic() > until:
                raise SystemExit("a stand does not come to rest")

    async def round(self) -> None:
        """One round."""
        await self.claims.supply(CLOSED)
        await self.quiet()
        before, began = self.used(), monotonic()
        taken = await closed_loop(self.claims.act, itertools.islice(self.numbers, CLOSED), CALLERS)
        self.rate.append(CLOSED / (monotonic() - began))
        self.p95_ms.append(percentile(taken, 0.95) * 1e3)
        await self.quiet()
        for name, used_s in self.used().items():
            self.cpu_us.setdefault(name, []).append((used_s - before[name]) / CLOSED * 1e6)

    def total_us(self) -> list[float]:
        """Processor time of a claim in all processes, in microseconds."""
        return [sum(each) for each in zip(*self.cpu_us.values(), strict=True)]


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[str]:
    """Where spans can be sent."""
    sink = await asyncio.create_subprocess_exec(sys.executable, "-c", SINK, stdout=asyncio.subprocess.PIPE)
    assert sink.stdout is not None
    try:
        yield f"http://127.0.0.1:{(await sink.stdout.readline()).decode().strip()}/v1/traces"
    finally:
        sink.kill()
        await sink.wait()


@contextlib.asynccontextmanager
async def stands() -> AsyncIterator[dict[str, Side]]:
    """All of them, by what is on."""
    off = "audit: {enabled: false}\n"
    async with contextlib.AsyncExitStack() as closing:
        url = await closing.enter_async_context(collector())
        traced = f"tracing: {{enabled: true, endpoint: {url}, sample_ratio: %s}}\n"
        sides = {}
        for name, settings, program in (
            ("as shipped", "", "ifabric"),
            ("no audit", off, "ifabric"),
            ("nothing", off, "bench.unseen"),
            ("traces of 1 %", traced % 0.01, "ifabric"),
            ("traces of all", traced % 1.0, "ifabric"),
        ):
            where = await closing.enter_async_context(stand(settings=settings, program=program))
            sides[name] = Side(where, Fabric(where))
            await sides[name].claims.connect()
            closing.push_async_callback(sides[name].claims.close)
        yield sides


def over(one: list[float], other: list[float]) -> str:
    """The ratio of two figures, round by round: the median, and between what."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


async def main() -> None:
    """Prints every figure, and the ratios that count."""
    async with stands() as sides:
        names = list(sides)
        for number in range(ROUNDS):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                await sides[name].round()
        for name, side in sides.items():
            cpu = ", ".join(f"{part} {statistics.median(us):.0f}" for part, us in side.cpu_us.items())
            print(
                f"{name:>14}: {statistics.median(side.rate):6,.0f} claims/s, p95 {statistics.median(side.p95_ms):5.1f} ms, "
                f"{statistics.median(side.total_us()):4.0f} us of processor a claim ({cpu})"
            )
        for name, base in (
            ("as shipped", "nothing"),
            ("no audit", "nothing"),
            ("as shipped", "no audit"),
            ("traces of 1 %", "as shipped"),
            ("traces of all", "as shipped"),
        ):
            print(
                f"{name} / {base}: claims/s {over(sides[name].rate, sides[base].rate)}, processor a claim "
                f"{over(sides[name].total_us(), sides[base].total_us())}, of the daemon alone "
                f"{over(sides[name].cpu_us['daemon'], sides[base].cpu_us['daemon'])}"
            )
