"""What the SDK's tests put around a client: a connection that can be tapped and cut, over the twin and over real NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from ifabric.bus.base import Answer, Bus, Headers
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.client import Client
from ifabric.clock import Clock, SystemClock
from ifabric.errors import Unavailable
from ifabric.testing.memory_bus import MemoryBus
from ifabric.wire import subjects

from .conftest import World

CLOCK = SystemClock()


class Tap:
    """A client's connection. `sent` is every request; faults are on demand."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        #: (verb, body), in the order in which they were sent
        self.sent: list[tuple[str, dict[str, Any]]] = []
        #: answered requests of a verb, to wait for
        self.answered = asyncio.Condition()
        #: verbs whose next answers are lost, how often; and those that are not answered at all
        self.lose: dict[str, int] = {}
        self.silent: Callable[[str], bool] = lambda _: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bus, name)

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        address = subjects.parse(subject)
        assert address is not None
        verb = address.verb
        self.sent.append((verb, msgspec.json.decode(data)))
        if self.silent(verb):
            await asyncio.sleep(timeout_s)
            raise Unavailable("no answer in time", what="nats", reason="timeout")
        answer: Answer = await self.bus.request(subject, data, timeout_s=timeout_s, headers=headers)
        if self.lose.get(verb, 0):
            self.lose[verb] -= 1
            raise Unavailable("the answer was lost", what="nats", reason="timeout")
        async with self.answered:
            self.answered.notify_all()
        return answer

    def bodies(self, verb: str) -> list[dict[str, Any]]:
        """Of the requests of one verb."""
        return [body for sent, body in self.sent if sent == verb]

    async def until_sent(self, verb: str, count: int) -> None:
        """Returns when that many more requests of the verb have been answered."""
        wanted = len(self.bodies(verb)) + count
        async with asyncio.timeout(20), self.answered:
            await self.answered.wait_for(lambda: len(self.bodies(verb)) >= wanted)


def tap(world: World) -> Tap:
    """A connection that is still to be made; its client makes and closes it."""
    urls = (world._nats_url or "",)
    return Tap(Nats(NatsSettings(servers=urls), CLOCK) if world.real else MemoryBus(world.hub))


def client(
    world: World, session: str = "me", *, over: Tap | None = None, clock: Clock = CLOCK, **options: Any
) -> Client:
    """A client of that cluster."""
    bus: Any = over or tap(world)
    return Client(bus, clock, session=session, where="the test", **options)


async def state(world: World, task: str) -> str:
    return str((await world.ask("get", "op", task=task))["state"])


async def until_state(world: World, task: str, wanted: str) -> dict[str, Any]:
    """The task, once it is in that state."""
    async with asyncio.timeout(15):
        while True:
            found = await world.ask("get", "op", task=task)
            if found["state"] == wanted:
                return found
            await asyncio.sleep(0.02)


async def submitted(world: World, *specs: dict[str, Any] | str) -> None:
    await world.ask("submit", "op", tasks=[{"id": s} if isinstance(s, str) else s for s in specs])


def events_of(found: dict[str, Any]) -> list[str]:
    """The history of a task, as words."""
    return [line["event"] for line in found["history"]]
