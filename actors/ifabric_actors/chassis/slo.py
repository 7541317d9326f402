"""Whether the chassis keeps its promises, over a rolling window. Pure: `now_s` is whoever's monotonic clock.

**Availability** is the share of runs that did not fail by the chassis's fault. **Latency** is the time that the chassis
itself took, of the runs that did not fail (a run that is refused at once would flatter it): its 95th percentile by
nearest rank, the least time that 95 % of the runs did not exceed.

**The error budget** (Google's SRE workbook, "Implementing SLOs") is what may fail while the target is still met:

    availability   (1 - target) * runs   may fail       left = 1 - failed / ((1 - target) * runs)
    latency                0.05 * runs   may be slower  left = 1 - slower / (0.05 * runs)

1 is untouched, 0 is used up, below 0 is overdrawn: exactly then the target is missed. `error_budget_left` is the
smaller of the two, for one promise that is broken is not made good by the other. Over a rolling window what may fail
grows with the runs: after a quiet night one failure weighs more than at noon, and leaves with the window. Without runs
all promises are kept.

**What is exact.** The counts, and so whether a target is met: slower runs are counted against the target itself, and
shares are compared in integers. The percentile is from a histogram whose steps grow by a constant ratio, so it is off
by at most `ERROR` of itself between `LEAST_S` and `MOST_S` (Masson et al., DDSketch, 2019), and never on the wrong side
of the target. What is counted is never older than the window, and never younger than 59/60 of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from typing import Literal, NamedTuple

from ifabric.wire.chassis import Slo

#: the window forgets in steps of this share
BUCKETS = 60
#: relative, of the percentile
ERROR = 0.03
#: seconds; what is outside of them is reported as the nearer one
LEAST_S, MOST_S = 1e-6, 1e3
#: Below so many runs no violation is told: of 19 runs none may be slower, for 95 % of them is all of them, and a
#: percentile that is the slowest run says more about that run than about the chassis.
RUNS_MIN = 20

_RATIO = (1 + ERROR) / (1 - ERROR)
#: upper ends of the histogram's steps; the last one is open
_ENDS = tuple(LEAST_S * _RATIO**step for step in range(math.ceil(math.log(MOST_S / LEAST_S) / math.log(_RATIO)) + 1))
_STEPS = len(_ENDS) + 1

Which = Literal["latency", "availability"]


class Change(NamedTuple):
    """A target that is missed, or met again."""

    which: Which
    met: bool
    #: milliseconds, or percent
    value: float
    target: float


class _Bucket:
    __slots__ = ("failed", "number", "runs", "slower", "steps")

    def __init__(self, number: int) -> None:
        self.number = number
        self.runs = self.failed = self.slower = 0
        #: of the runs that did not fail
        self.steps = [0] * _STEPS


class ServiceLevel:
    """Counts runs, and says how they stand against their targets. Its memory does not grow."""

    def __init__(self, target_latency_p95_ms: float, target_availability_percent: float, window_s: float) -> None:
        self._latency_ms, self._availability, self._window_s = (
            target_latency_p95_ms,
            target_availability_percent,
            window_s,
        )
        self._latency_s = target_latency_p95_ms / 1000
        #: exact: 99.9 % as a float is less, and the thousandth run would not be allowed to fail
        self._may_fail = 1 - Fraction(str(target_availability_percent)) / 100
        assert 0 < self._may_fail < 1, "a target of 100 % has no budget"
        self._width_s = window_s / BUCKETS
        #: the oldest first; the last one is counted in
        self._buckets: list[_Bucket] = []
        self._bucket = _Bucket(0)
        #: when the last one is full
        self._ends_s = -math.inf
        #: over the whole window
        self._all = _Bucket(0)
        self._missed: dict[Which, bool] = {"latency": False, "availability": False}

    def add(self, now_s: float, overhead_s: float, ok: bool) -> None:
        """One run: what the chassis took of its time, and whether it ended without a fault of the chassis. O(1)."""
        if now_s >= self._ends_s:
            self._roll(now_s)
        bucket, total = self._bucket, self._all
        bucket.runs += 1
        total.runs += 1
        if not ok:
            bucket.failed += 1
            total.failed += 1
            return
        if overhead_s > self._latency_s:
            bucket.slower += 1
            total.slower += 1
        step = bisect_left(_ENDS, overhead_s)
        bucket.steps[step] += 1
        total.steps[step] += 1

    def view(self, now_s: float) -> Slo:
        """How it stands."""
        self._roll(now_s)
        return Slo(
            window_s=self._window_s,
            runs=self._all.runs,
            latency_p95_ms=self._p95_ms(),
            target_latency_p95_ms=self._latency_ms,
            availability_percent=self._percent(),
            target_availability_percent=self._availability,
            error_budget_left=float(min(self._left("latency"), self._left("availability"))),
        )

    def changes(self, now_s: float) -> list[Change]:
        """The targets that were crossed since this was asked last.

        A target is missed once `RUNS_MIN` runs say so, and met again when it is met, by however few runs: between the
        two, too few runs change nothing, or a daemon with little to do would tell the same violation over and over.
        """
        self._roll(now_s)
        crossed = []
        for which in self._missed:
            met = self._left(which) >= 0
            if met != self._missed[which] or not (met or self._count(which) >= RUNS_MIN):
                continue
            self._missed[which] = not met
            latency = which == "latency"
            value, target = (self._p95_ms(), self._latency_ms) if latency else (self._percent(), self._availability)
            crossed.append(Change(which, met, value, target))
        return crossed

    # -- inside -------------------------------------------------------------------------------------------------------

    def _count(self, which: Which) -> int:
        return self._all.runs - (self._all.failed if which == "latency" else 0)

    def _left(self, which: Which) -> Fraction:
        """Of the budget."""
        count, may = self._count(which), (Fraction(1, 20) if which == "latency" else self._may_fail)
        gone = self._all.slower if which == "latency" else self._all.failed
        return 1 - Fraction(gone) / (may * count) if count else Fraction(1)

    def _percent(self) -> float:
        total = self._all
        return 100 * (total.runs - total.failed) / total.runs if total.runs else 100.0

    def _p95_ms(self) -> float:
        count = self._count("latency")
        if not count:
            return 0.0
        rank = count - count // 20  # 95 % of them, rounded up
        step = 0
        while (rank := rank - self._all.steps[step]) > 0:
            step += 1
        # between the two ends of a step, what is off by the same share from both
        found_s = LEAST_S if step == 0 else MOST_S if step == _STEPS - 1 else 2 * _ENDS[step] / (1 + _RATIO)
        beyond = math.nextafter(self._latency_ms, math.inf)
        met = self._all.slower <= count // 20
        return min(found_s * 1000, self._latency_ms) if met else max(found_s * 1000, beyond)

    def _roll(self, now_s: float) -> None:
        """Begins another bucket when it is time, and forgets those that have left the window."""
        number = int(now_s // self._width_s)
        if now_s < self._ends_s:
            return
        self._ends_s = (number + 1) * self._width_s
        kept = [bucket for bucket in self._buckets if bucket.number > number - BUCKETS]
        for gone in self._buckets[: len(self._buckets) - len(kept)]:
            self._forget(gone)
        self._bucket = _Bucket(number)
        self._buckets = [*kept, self._bucket]

    def _forget(self, gone: _Bucket) -> None:
        total = self._all
        total.runs -= gone.runs
        total.failed -= gone.failed
        total.slower -= gone.slower
        for step, count in enumerate(gone.steps):
            if count:
                total.steps[step] -= count
