"""What the chassis tells the world: guests that tried what they may not, and its service level.

These events come from no commit: containment that held changes nothing in etcd. They are told once, by the daemon
that saw them; when the journal cannot be reached for long, the oldest are dropped, and the metrics have counted them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec

from ifabric.actor.base import Context
from ifabric.bus.base import Journal, JournalSpec
from ifabric.errors import FabricError
from ifabric.wire import subjects
from ifabric.wire.envelope import encode

WAITING_MAX = 1000
BATCH_MAX = 100


class Announcer:
    """Appends events to the journal, behind the back of what happens."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting: deque[tuple[str, bytes, str]] = deque(maxlen=WAITING_MAX)
        self._some = asyncio.Event()

    def tell(self, what: str, event: msgspec.Struct) -> None:
        """Has an event told. Costs no wait."""
        self._waiting.append((subjects.event("chassis", what), encode(event), self._context.clock.token()))
        self._some.set()

    async def run(self) -> None:
        """Never returns: tells them."""
        clock, journal = self._context.clock, None
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
                try:
                    journal = journal or await self._open()
                    await journal.append(batch)
                except FabricError as error:
                    self._context.log.info("events of the chassis wait for the journal", why=str(error))
                    self._waiting.extendleft(reversed(batch[: WAITING_MAX - len(self._waiting)]))
                    await clock.sleep(clock.jitter(0.5, 1.5))

    async def _open(self) -> Journal:
        events: Any = self._context.settings.events
        return await self._context.bus.journal(
            JournalSpec(
                subjects.EVENT_STREAM,
                (subjects.EVENTS,),
                max_age_s=events.max_age_seconds,
                max_bytes=events.max_bytes,
                replicas=events.replicas,
            )
        )
