"""Notices that this process stood still.

A process that was stopped, swapped out or starved for seconds wakes up with a socket full of requests whose senders
have long given up and asked somebody else. Answering them does no harm to what is true (the store compares), but it
costs others the time. So: a beat every `BEAT_S`; when a message arrives and the next beat is late by `FROZEN_S`,
the process was frozen. It drops its backlog unanswered, and `lost` makes the supervisor join again with a new
connection and rebuild the actors from the store.
"""

from __future__ import annotations

import asyncio

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock

BEAT_S = 0.25
FROZEN_S = 2.0


class Pulse:
    """The loop's heartbeat. `lag_s` is how late the last beat was, in seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._beat_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self.lag_s = 0.0

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the process stood still."""
        return self._lost

    async def start(self) -> None:
        """Begins to beat."""
        self._lost = asyncio.get_running_loop().create_future()
        self._beat_at = self._clock.monotonic()
        self.lag_s = 0.0
        self._task = asyncio.create_task(self._run(), name="pulse")

    async def stop(self) -> None:
        """Stops beating."""
        task, self._task = self._task, None
        if task is not None:
            await cancel_and_wait(task)
        self._lost = None

    def frozen(self) -> bool:
        """Whether the process stood still, just now or since it was last started."""
        if self._lost is None:
            return False
        late = self._clock.monotonic() - self._beat_at
        if late > FROZEN_S + BEAT_S and not self._lost.done():
            self._lost.set_result(f"the process stood still for {late:.1f} s")
        return self._lost.done()

    async def _run(self) -> None:
        while not self.frozen():
            now = self._clock.monotonic()
            self.lag_s = max(0.0, now - self._beat_at - BEAT_S)
            self._beat_at = now
            await self._clock.sleep(BEAT_S)
