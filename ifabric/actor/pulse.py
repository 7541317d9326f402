"""Notices that this process stood still.

A process that was stopped, swapped out or starved for seconds wakes up with a socket full of requests whose senders
have long given up and asked somebody else. Answering them does no harm to what is true (the store compares), but it
costs others the time. So: a beat every `BEAT_S`; when a message arrives and the next beat is late by `FROZEN_S`,
the process was frozen. It drops its backlog unanswered, and `lost` makes the supervisor join again with a new
connection and rebuild the actors from the store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock

BEAT_S = 0.25
FROZEN_S = 2.0
#: how far back the worst lag is known
WORST_WITHIN_S = 60.0


class Pulse:
    """The loop's heartbeat. `lag_s` is how late the last beat was, in seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._beat_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self.lag_s = 0.0
        #: (when, lag), each the worst since then: the first is the worst of all
        self._worst: deque[tuple[float, float]] = deque()
        #: called at each beat
        self.each_beat: Callable[[], None] = lambda: None

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
            self._note(late - BEAT_S)
            self._lost.set_result(f"the process stood still for {late:.1f} s")
        return self._lost.done()

    def worst_s(self, within_s: float = WORST_WITHIN_S) -> float:
        """The worst lag of the last so many seconds, which are at most `WORST_WITHIN_S`."""
        since = self._clock.monotonic() - within_s
        return next((lag for at, lag in self._worst if at >= since), 0.0)

    def _note(self, lag_s: float) -> None:
        now, worst = self._clock.monotonic(), self._worst
        self.lag_s = lag_s
        while worst and worst[-1][1] <= lag_s:
            worst.pop()
        worst.append((now, lag_s))
        while worst[0][0] < now - WORST_WITHIN_S:
            worst.popleft()

    async def _run(self) -> None:
        while not self.frozen():
            now = self._clock.monotonic()
            self._note(max(0.0, now - self._beat_at - BEAT_S))
            self._beat_at = now
            self.each_beat()
            await self._clock.sleep(BEAT_S)
