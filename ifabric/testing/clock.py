"""A clock that a test moves by hand.

Patching a loop's own clock does not work on uvloop; being handed a clock does. Time stands still until the test moves
it: `advance` wakes whoever sleeps, in the order in which their sleeps end, and lets each run as far as it gets before
the next one is woken. `freeze` moves time while nobody runs, as a process that stands still sees it.

Chance is drawn from a seed (splitmix64), so a run can be repeated to the letter.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: turns of the loop that whoever was woken gets before time moves on; who waits for a socket may need more
SETTLE_TURNS = 25
#: 2026-01-01T00:00:00Z
EPOCH_MS = 1_767_225_600_000
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"


class VirtualClock:
    """A `Clock` for tests and simulations. All times are in seconds."""

    def __init__(self, seed: int = 1, *, now_s: float = 1_000.0) -> None:
        self._began_s = now_s
        self._now_s = now_s
        self._chance = seed
        self._count = 0
        #: (when, number, woken); the number keeps those who wake at the same moment in order
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __repr__(self) -> str:
        due = ", ".join(f"{when - self._now_s:g}" for when, _, _ in sorted(self._waiting()))
        return f"<VirtualClock at {self._now_s:g} s; sleepers wake in ({due}) s>"

    # -- what the fabric sees -----------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self._now_s

    def wall_ms(self) -> int:
        return EPOCH_MS + round((self._now_s - self._began_s) * 1000)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self._now_s + seconds, self._count, woken))
        await woken

    def jitter(self, low_s: float, high_s: float) -> float:
        return low_s + (high_s - low_s) * (self._next() >> 11) / 2**53

    def pick(self, among: Sequence[T]) -> T:
        return among[self._next() % len(among)]

    def token(self) -> str:
        number = self._next() << 64 | self._next()
        return "".join(_LETTERS[number >> 6 * place & 63] for place in range(22))

    # -- what the test does -------------------------------------------------------------------------------------------

    @property
    def sleepers(self) -> int:
        """How many sleep now."""
        return len(self._waiting())

    async def settle(self) -> None:
        """Lets everybody who can run, run, without moving time."""
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Moves time by so much, waking each sleeper at its moment. Returns when the last one woken has settled."""
        until = self._now_s + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            self._wake_next()
            await self.settle()
        self._now_s = max(self._now_s, until)
        await self.settle()

    def freeze(self, seconds: float) -> None:
        """Time passes and nobody wakes: those who are due wake at the next `advance`, all late."""
        self._now_s += seconds

    async def run(self, awaitable: Awaitable[T], *, within_s: float = 3_600.0) -> T:
        """What the awaitable returns, moving time from one sleeper's end to the next until it does.

        `AssertionError` when it needs more than `within_s`, or waits for something that time does not bring.
        """
        until = self._now_s + within_s
        task = asyncio.ensure_future(awaitable)
        try:
            await self.settle()
            while not task.done():
                assert self._sleepers, f"nobody sleeps, and yet {task} does not end"
                assert self._sleepers[0][0] <= until, f"not done within {within_s:g} s: {task}"
                self._wake_next()
                await self.settle()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _wake_next(self) -> None:
        when, _, woken = heapq.heappop(self._sleepers)
        if not woken.done():
            self._now_s = max(self._now_s, when)
            woken.set_result(None)

    def _waiting(self) -> list[tuple[float, int, asyncio.Future[None]]]:
        return [sleeper for sleeper in self._sleepers if not sleeper[2].done()]

    def _next(self) -> int:
        """The next 64 random bits (splitmix64, Steele et al. 2014)."""
        mask = 2**64 - 1
        self._chance = (self._chance + 0x9E3779B97F4A7C15) & mask
        mixed = self._chance
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        return mixed ^ mixed >> 31
