"""What does the live page cost the daemon that shows it? Processor time with 50 viewers, less that without, in turn.

Once on an idle fabric and once while agents work: then there are claims to chart and more events than are shown. The
viewers are plain connections of this process, which read all that they are sent. What etcd and NATS spend on the page's
questions is told as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
from typing import Self
from urllib.parse import urlsplit

from bench.stand import Stand, children, cpu_s, stand
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import SystemClock, monotonic
from ifabric.wire.envelope import encode

VIEWERS = 50
ROUNDS = 5
SECONDS = 10.0
#: tasks submitted, claimed and completed, a second
RATE = 100
CLOCK = SystemClock()


class Viewers:
    """Connections that look."""

    def __init__(self, http: str, number: int) -> None:
        self._http, self._number = urlsplit(http), number
        self._tasks: list[asyncio.Task[None]] = []
        self.received = 0

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._look()) for _ in range(self._number)]
        await asyncio.sleep(2.5)  # what a new viewer is told at first is not what looking costs
        self.received = 0
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(*self._tasks)
        await asyncio.sleep(1.5)

    async def _look(self) -> None:
        reader, writer = await asyncio.open_connection(self._http.hostname, self._http.port)
        try:
            writer.write(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while data := await reader.read(1 << 16):
                self.received += len(data)
            raise SystemExit("a stream ended")
        finally:
            writer.close()


class Load:
    """Tasks that come and go at a steady rate."""

    def __init__(self, where: Stand) -> None:
        self._bus = Nats(NatsSettings(servers=(where.nats,)), CLOCK)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._bus.connect()
        await self._ask("hello", {"ttl_s": 300})
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)
        await self._bus.close()

    async def _run(self) -> None:
        began = monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, began + number / RATE - monotonic()))
            await self._ask("submit", {"tasks": [{"id": f"t{number}"}]})
            answer = await self._ask("claim", {"task": f"t{number}"})
            fence = int(answer.partition(b'"fence":')[2].partition(b",")[0])
            await self._ask("complete", {"task": f"t{number}", "fence": fence})

    async def _ask(self, verb: str, body: object) -> bytes:
        answer = await self._bus.request(f"if.v1.coordinator.{verb}.bench", encode(body), timeout_s=30)
        if b'"error"' in answer.data[:10]:
            raise SystemExit(f"{verb}: {answer.data.decode()}")
        return answer.data


async def spent(processes: dict[str, int]) -> dict[str, float]:
    """What each used, in percent of a core."""
    before = {name: cpu_s(pid) for name, pid in processes.items()}
    began = monotonic()
    await asyncio.sleep(SECONDS)
    took = monotonic() - began
    return {name: (cpu_s(pid) - before[name]) / took * 100 for name, pid in processes.items()}


async def compare(where: Stand, title: str) -> None:
    """Rounds without and with viewers, one after the other."""
    processes = {"daemon": where.pid, **children(where.pid)}
    more: dict[str, list[float]] = {name: [] for name in processes}
    alone, rates = [], []
    for _ in range(ROUNDS):
        without = await spent(processes)
        async with Viewers(where.http, VIEWERS) as viewers:
            looked = await spent(processes)
            rates.append(viewers.received / VIEWERS / SECONDS)
        alone.append(without["daemon"])
        for name in processes:
            more[name].append(looked[name] - without[name])
    print(
        f"{title}: the daemon takes {statistics.median(alone):.1f} % of a core; with {VIEWERS} viewers, besides that:"
    )
    for name, values in more.items():
        if name in ("daemon", "etcd", "nats-server"):
            print(
                f"  {name:>12}: {statistics.median(values):5.2f} % of a core (median of {ROUNDS}; "
                f"{min(values):.2f} to {max(values):.2f})"
            )
    print(f"  each viewer is sent {statistics.median(rates) / 1000:.1f} kB a second")


async def main() -> None:
    """Idle, then at work."""
    async with stand() as where:
        await asyncio.sleep(3)
        await compare(where, "idle")
        async with contextlib.AsyncExitStack() as working:
            await working.enter_async_context(Load(where))
            await asyncio.sleep(3)
            await compare(where, f"{RATE} tasks a second")
