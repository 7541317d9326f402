"""Time and chance, as parameters.

The only module that imports `time` and `random`: everything else is handed a `Clock`, so that a test can move time by
hand (patching the loop's clock does not work on uvloop). Durations are measured on the monotonic clock. Wall time is for
people to read, and for the few moments that daemons have to share (the end of a hold, a breaker's next probe, the day
that a budget is for): there, clocks that differ cost patience, and neither money nor a claim.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol, TypeVar

T = TypeVar("T")

#: seconds on the monotonic clock, for code that only ever measures (benchmarks, the CLI)
monotonic: Callable[[], float] = time.monotonic
#: for a process that runs a guest, and nothing else: the processor time of this thread, time since the epoch in ns, and
#: a sleep that blocks it
thread_cpu: Callable[[], float] = time.thread_time
wall_ns: Callable[[], int] = time.time_ns
block: Callable[[float], None] = time.sleep


class Clock(Protocol):
    """What the fabric may know of time and chance."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC; for people to read, and for moments that daemons share."""

    async def sleep(self, seconds: float) -> None:
        """Returns after that many seconds of this clock."""

    def jitter(self, low_s: float, high_s: float) -> float:
        """A random duration in [low_s, high_s], in seconds."""

    def pick(self, among: Sequence[T]) -> T:
        """A random element of a non-empty sequence."""

    def token(self) -> str:
        """22 random characters of `[A-Za-z0-9_-]`, unguessable and unique."""


class SystemClock:
    """The machine's own clock and randomness."""

    monotonic = staticmethod(time.monotonic)
    jitter = staticmethod(random.uniform)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def pick(self, among: Sequence[T]) -> T:
        return random.choice(among)

    def token(self) -> str:
        return secrets.token_urlsafe(16)


def seeded(seed: int | str) -> random.Random:
    """Chance that is the same every time: for demonstrations."""
    return random.Random(seed)


@lru_cache(maxsize=256)
def rfc3339(wall_ms: int) -> str:
    """Milliseconds since the epoch as ``2026-11-24T09:30:00.123Z``."""
    return datetime.fromtimestamp(wall_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
