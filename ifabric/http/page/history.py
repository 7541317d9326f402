"""The last minutes of this daemon as points of a chart, taken from its metrics. Pure bookkeeping: no waiting.

A point is what happened since the point before it. Percentiles are read from the histogram's buckets, as Prometheus
does: within a bucket, evenly spread. What a component that does not run here would count is null, and not zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from msgspec import Struct

from ifabric.clock import Clock, rfc3339
from ifabric.metrics import LATENCY_S, Child, Counter, Histogram, Labels, Metrics

#: seconds between two points
STEP_S = 2


class Point(Struct, frozen=True, kw_only=True):
    """One step. Rates are per second; a percentile is null when nothing was claimed."""

    #: RFC 3339
    at: str
    claims_per_s: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    handled_per_s: float
    refused_per_s: float
    runs_per_s: float | None
    lag_ms: float


class _Seen(Struct):
    """The totals at the last step."""

    at: float
    claims: float
    latencies: list[int]
    handled: float
    refused: float
    runs: float


class History:
    """Points, the newest last; `keep_s` seconds of them."""

    def __init__(
        self, metrics: Metrics, clock: Clock, hosted: Collection[str], keep_s: int, lag_s: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._claims = metrics.counter("if_coordinator_claims_total", outcome="granted")
        self._latencies = metrics.histogram("if_coordinator_claim_latency_seconds")
        self._messages = metrics.children("if_actor_messages_total")
        self._runs = metrics.children("if_chassis_runs_total")
        self._lag_s = lag_s
        self._has_claims, self._has_runs = "coordinator" in hosted, "chassis" in hosted
        self.points: deque[Point] = deque(maxlen=max(1, keep_s // STEP_S))
        self._last = self._look()

    def step(self) -> Point:
        """The point of what happened since the last one; it is kept."""
        before, now = self._last, self._look()
        self._last = now
        took_s = max(now.at - before.at, 0.001)
        counts = [new - old for new, old in zip(now.latencies, before.latencies, strict=True)]
        p50, p95, p99 = (_ms(quantile(LATENCY_S, counts, share)) for share in (0.50, 0.95, 0.99))

        def rate(new: float, old: float) -> float:
            return round(max(0.0, new - old) / took_s, 2)

        point = Point(
            at=rfc3339(self._clock.wall_ms()),
            claims_per_s=rate(now.claims, before.claims) if self._has_claims else None,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            handled_per_s=rate(now.handled, before.handled),
            refused_per_s=rate(now.refused, before.refused),
            runs_per_s=rate(now.runs, before.runs) if self._has_runs else None,
            lag_ms=round(self._lag_s() * 1000, 2),
        )
        self.points.append(point)
        return point

    def _look(self) -> _Seen:
        return _Seen(
            self._clock.monotonic(),
            self._claims.value,
            list(self._latencies.counts),
            *handled(self._messages),
            _sum(self._runs),
        )


def handled(messages: Mapping[Labels, Child]) -> tuple[float, float]:
    """All messages, and those of them that were refused."""
    every = refused = 0.0
    for labels, child in messages.items():
        if isinstance(child, Counter):
            every += child.value
            if ("outcome", "refused") in labels:
                refused += child.value
    return every, refused


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that `share` of the observations do not exceed; the greatest bound when it is beyond. None: no
    observations. `counts` has one more than `bounds`: those beyond all of them.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    below, so_far = 0.0, 0
    for bound, count in zip(bounds, counts, strict=False):
        if count and so_far + count >= wanted:
            return below + (bound - below) * (wanted - so_far) / count
        below, so_far = bound, so_far + count
    return bounds[-1]


def _sum(children: Mapping[Labels, Child]) -> float:
    return sum(child.value for child in children.values() if not isinstance(child, Histogram))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
