"""What lies between agents, daemons and etcd in a simulation, and how it fails: chance drawn from one seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ifabric.bus.base import Headers
from ifabric.errors import Unavailable
from ifabric.store.base import Batch, Txn, TxnRefused, TxnResult
from ifabric.testing.clock import VirtualClock
from ifabric.testing.memory_bus import MemoryHub
from ifabric.testing.memory_store import MemoryEtcd, MemoryStore
from ifabric.wire import subjects


@dataclass
class Weather:
    """Chance, time, and whether anything may fail."""

    seed: int
    clock: VirtualClock
    faulty: bool = True
    late: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def strikes(self, probability: float) -> bool:
        return self.faulty and self.chance.random() < probability

    def later(self, within_s: float, happens: object) -> None:
        """Calls it after a while, when whoever asked for it may have given up."""

        async def wait() -> None:
            await self.clock.sleep(self.chance.uniform(0.01, within_s))
            happens()  # type: ignore[operator]

        task = asyncio.ensure_future(wait())
        self.late.add(task)
        task.add_done_callback(self.late.discard)


class SimulatedHub(MemoryHub):
    """NATS that loses, delays and doubles requests and answers."""

    def __init__(self, weather: Weather) -> None:
        super().__init__(weather.seed)
        self._weather = weather

    def deliver(self, subject: str, data: bytes, headers: Headers, reply: str) -> int:
        answer = subject.startswith(subjects.INBOX)
        if not answer and not reply:
            return super().deliver(subject, data, headers, reply)
        deliver = super().deliver
        if self._weather.strikes(0.03):
            return 1  # lost
        if self._weather.strikes(0.03):
            self._weather.later(8.0, lambda: deliver(subject, data, headers, reply))
            return 1
        if not answer and self._weather.strikes(0.06):
            self._weather.later(8.0, lambda: deliver(subject, data, headers, reply))
        return deliver(subject, data, headers, reply)


class SimulatedStore(MemoryStore):
    """A daemon's connection to etcd. `down`: nothing goes through; `behind_s`: how late its watch is."""

    def __init__(self, weather: Weather, etcd: MemoryEtcd) -> None:
        super().__init__(weather.clock, etcd)
        self._weather = weather
        self.behind_s = 0.0

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(0.5)
            self.etcd.expire_due()

    async def txn(self, txn: Txn) -> TxnResult:
        weather = self._weather
        if weather.strikes(0.1):
            await self._clock.sleep(weather.chance.uniform(0.001, 0.5))
        if weather.strikes(0.02):
            self.lose_next_request = True
        elif weather.strikes(0.03):
            self.lose_next_reply = True
        elif weather.strikes(0.02):  # the daemon gives up, and etcd gets it after all
            weather.later(1.0, lambda: self._arrive(txn))
            raise Unavailable("no answer in time", what="etcd", maybe_done=True)
        return await super().txn(txn)

    def _arrive(self, txn: Txn) -> None:
        with contextlib.suppress(TxnRefused):
            self.etcd.txn(txn)

    async def watch(self, prefixes: Sequence[bytes], *, after_revision: int) -> AsyncIterator[Batch]:
        async for batch in super().watch(prefixes, after_revision=after_revision):
            while self.down:
                await self._clock.sleep(0.1)
            if self.behind_s:
                await self._clock.sleep(self.behind_s)
            yield batch
