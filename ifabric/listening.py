"""What happens, for who wants to know: the events of tasks, budgets, breakers, matches and the chassis.

An event is told after it was committed. `subscribe` has what happens from now on; `events(after_seq=...)` begins with
what the journal keeps, and so misses nothing while NATS was away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, overload

import msgspec

from ifabric.bus.base import Incoming, Journal
from ifabric.calling import Line
from ifabric.errors import Unavailable
from ifabric.wire import protocol, subjects
from ifabric.wire.chassis import ChassisEvent
from ifabric.wire.coordinator import TaskEvent
from ifabric.wire.governor import BreakerEvent, BudgetEvent, MatchEvent

EVENTS_MAX = 10_000
About = Literal["task", "budget", "breaker", "match", "chassis", "all"]
Event = TaskEvent | BudgetEvent | BreakerEvent | MatchEvent | ChassisEvent
_DECODERS: dict[tuple[str, str], msgspec.json.Decoder[Any]] = {
    event: msgspec.json.Decoder(kind) for event, kind in protocol.EVENTS.items()
}
#: where all events about something are of one kind, a newer daemon's further ones are, too
_FURTHER = {
    about: _DECODERS[about, what]
    for about, what in protocol.EVENTS
    if len({kind for (other, _), kind in protocol.EVENTS.items() if other == about}) == 1
}


class Listening(Line):
    """Hears events."""

    @overload
    def events(
        self, about: Literal["task"] = "task", *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[TaskEvent]: ...
    @overload
    def events(
        self, about: Literal["budget"], *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[BudgetEvent]: ...
    @overload
    def events(
        self, about: Literal["breaker"], *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[BreakerEvent]: ...
    @overload
    def events(
        self, about: Literal["chassis"], *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[ChassisEvent]: ...
    @overload
    def events(
        self, about: About, *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[Event]: ...

    async def events(
        self, about: About = "task", *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[Any]:
        """Events as they come, those about tasks unless others are asked for; with `after_seq`, those that the
        journal keeps after that position first.

        `until_seq` ends it with the event at that position, whatever that is about.
        """
        if after_seq is None:
            async with self.subscribe(about) as events:
                async for event in events:
                    yield event
        else:
            mine = _subject(about).removesuffix(">")
            # with an end, all are read: the one at the end may be about something else
            subject = _subject(about) if until_seq is None else None
            async for entry in (await self.journal()).read(after_seq=after_seq, subject=subject):
                for found in _read(entry.subject, entry.data) if entry.subject.startswith(mine) else ():
                    yield found
                if until_seq is not None and entry.seq >= until_seq:
                    return

    async def journal(self) -> Journal:
        """The stream that keeps the events. Raises `Unavailable`."""
        return await self._bus.journal(subjects.EVENT_STREAM)

    @overload
    def subscribe(self, about: Literal["task"] = "task") -> AbstractAsyncContextManager[AsyncIterator[TaskEvent]]: ...
    @overload
    def subscribe(self, about: Literal["budget"]) -> AbstractAsyncContextManager[AsyncIterator[BudgetEvent]]: ...
    @overload
    def subscribe(self, about: Literal["breaker"]) -> AbstractAsyncContextManager[AsyncIterator[BreakerEvent]]: ...
    @overload
    def subscribe(self, about: Literal["chassis"]) -> AbstractAsyncContextManager[AsyncIterator[ChassisEvent]]: ...
    @overload
    def subscribe(self, about: About) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...

    @contextlib.asynccontextmanager
    async def subscribe(self, about: About = "task") -> AsyncIterator[AsyncIterator[Any]]:
        """Events from now on: what happens inside the block, even at its very start, is not missed.

        What happens while NATS is away is; `events(after_seq=...)` has it. Raises `Unavailable` when the connection
        has closed for good.
        """
        queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(EVENTS_MAX)
        closed = self._bus.lost

        async def take(incoming: Incoming) -> None:
            await queue.put((incoming.subject, incoming.data))

        async def each() -> AsyncIterator[Any]:
            while True:
                coming = asyncio.ensure_future(queue.get())
                ends: set[asyncio.Future[Any]] = {coming, closed}
                try:
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise Unavailable(f"no more events: {closed.result()}", what="nats", reason="closed")
                finally:
                    coming.cancel()
                for found in _read(*coming.result()):
                    yield found

        subscription = await self._bus.subscribe(_subject(about), take)
        try:
            yield each()
        finally:
            await subscription.unsubscribe()


def _subject(about: About) -> str:
    return subjects.EVENTS if about == "all" else subjects.event(about, ">")


def _read(subject: str, data: bytes) -> tuple[Any, ...]:
    """The event in a message; none when it is not one: whoever may publish there could else end every subscriber."""
    about, _, what = subject.removeprefix(subjects.EVENTS.removesuffix(">")).partition(".")
    decoder = (_DECODERS.get((about, what)) or _FURTHER.get(about)) if what else None
    try:
        return (decoder.decode(data),) if decoder else ()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
