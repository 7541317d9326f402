"""Events for the page, as they come.

**They are a sample when there are many.** The subscription is given up for the rest of a second in which `EVENTS_MAX`
came, so a fabric that tells of tens of thousands a second does not tell this daemon of them for the sake of a page. The
stream's own numbers say how many were left out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ifabric.bus.base import Bus, Incoming, Journal, Subscription
from ifabric.cancellation import cancel_and_wait
from ifabric.errors import BadRequest, FabricError, Unavailable
from ifabric.wire.envelope import loads
from ifabric.wire.subjects import EVENT_STREAM, EVERY_EVENT

#: in one second, and of refusals as well
EVENTS_MAX = 50
#: an event that is larger is told by its subject alone
EVENT_BYTES_MAX = 4096


class Events:
    """Events as they come, at most `EVENTS_MAX` between two `take`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._subscription: Subscription | None = None
        #: the connection that it was made on: a subscription is gone with it
        self._on: asyncio.Future[str] | None = None
        self._seen: list[dict[str, Any]] = []
        self._more = 0
        self._pausing: asyncio.Task[None] | None = None
        self._journal: Journal | None = None
        #: the stream's last entry when the subscription was given up
        self._cut_at: int | None = None

    async def open(self) -> None:
        """Listens, unless it does. Raises `Unavailable` and `Forbidden`."""
        if self._pausing is not None:
            pausing, self._pausing = self._pausing, None
            await pausing
        if not self._bus.connected:
            raise Unavailable("not connected to NATS", what="nats")
        if self._subscription is not None and self._on is self._bus.lost:
            return
        self._subscription = None
        cut_at, self._cut_at = self._cut_at, None
        if cut_at is not None and (position := await self._position()) is not None:
            self._more += max(0, position - cut_at)
        self._on = self._bus.lost
        self._subscription = await self._bus.subscribe(EVERY_EVENT, self._hear)

    async def close(self) -> None:
        """Listens no more, and forgets what came."""
        if self._pausing is not None:
            pausing, self._pausing = self._pausing, None
            await cancel_and_wait(pausing)
        await self._end()
        self._seen, self._more, self._cut_at = [], 0, None

    def take(self) -> list[dict[str, Any]]:
        """What has come since; when more came, a last item says how many were left out."""
        seen, more = self._seen, self._more
        self._seen, self._more = [], 0
        return [*seen, {"dropped": more}] if more else seen

    def _hear(self, incoming: Incoming) -> None:
        if len(self._seen) >= EVENTS_MAX:
            self._more += 1
            if self._pausing is None:
                self._pausing = asyncio.create_task(self._pause(), name="page events")
            return
        about: dict[str, Any] = {}
        if len(incoming.data) <= EVENT_BYTES_MAX:
            try:
                decoded = loads(incoming.data)
                about = decoded if isinstance(decoded, dict) else {}
            except BadRequest:
                about = {}  # it is told by its subject
        self._seen.append({**about, "subject": incoming.subject})

    async def _pause(self) -> None:
        """Listens no more until it is opened again."""
        try:
            await self._end()
        except FabricError:
            return  # the subscription has gone with the connection
        self._cut_at = await self._position()

    async def _end(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._on is self._bus.lost:
            await subscription.unsubscribe()

    async def _position(self) -> int | None:
        """The number of the stream's last entry; None when it cannot be told."""
        try:
            if self._journal is None or self._on is not self._bus.lost:
                self._journal = await self._bus.journal(EVENT_STREAM)
            last = await self._journal.last()
        except FabricError:
            return None
        return last.seq if last is not None else 0
