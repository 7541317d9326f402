"""When a resource is left alone, and how it is tried again. Pure: no clock, no store, no waiting.

**The machine.** Closed: every call goes. Open: none does, for a while. Half open: a counted number of probes go, and
their outcomes decide. `TRANSITIONS` is all of it; what is not there is refused.

**What is shared and what is not.** Transitions are: each is one compare-and-swap on the breaker's key in etcd, and
every daemon hears of it through its watch. Counts are not: each daemon counts the calls that are reported to it. A
write for each call would make the breaker dearer than what it guards, and one hot resource would be one hot key. The
price: with N daemons up to ``N * (failure_threshold - 1)`` failures can lie within one window and none of them opens
it; the next one does. And a daemon that has not heard yet admits for a moment more (the watch is a few milliseconds
behind), as do the calls that were under way.

**The generation** counts transitions and stands in every permit. A call that was admitted before a transition says
nothing about what came after it: its report is accepted and changes nothing. So a burst that fails together opens the
breaker once, not once for each, and a success from before the trip closes nothing.

**How long it is open**: ``min(reset_timeout * 2^(trips - 1), reset_timeout_max)``, or longer when a failure brought
a `Retry-After` that asks for more: one that is still in the window at the trip, the probe's own, or one that was under
way when it opened and comes in late. `trips` counts openings without a lasting recovery between them: `LASTING` times
the reset timeout closed, and it starts again at one.

**Probes.** Each permit is written into the record before it is given out, so all daemons together admit no more than
`half_open_probes`: as many as are under way and as have succeeded. That many successes close it, one failure opens it
again. A probe whose caller has died frees its permit at `probe_timeout`; its late report is of an unknown permit,
for another probe has its place. No breaker can hang half open for want of a report.

**Clocks.** `until` and the ends of permits are wall time, judged by each daemon's own clock: one that is ahead tries
earlier by as much, and gives a probe's place away earlier by as much. Windows are measured on the monotonic clock.

**Without etcd** nothing opens, closes or probes. What is closed stays closed, and calls go on.

**Limits.** A daemon keeps windows for `breakers_max` names, those that were last reported to; a name that it counts
nothing for is closed. Records are only of breakers that opened once or that an operator touched. They are kept, for
the memory of trips; their number is not limited, for refusing to open a breaker would be worse than a few hundred
bytes of etcd. Whoever may call a resource may say that it failed: a permit proves an admission, not an outcome.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from ifabric.errors import BreakerOpen, UnknownPermit
from ifabric.wire.governor import BreakerState, Verdict

Event = Literal["trip", "probe", "recover", "fail_probe", "force_open", "force_close"]

#: The whole life of a breaker. What is not here is refused.
TRANSITIONS: Mapping[BreakerState, Mapping[Event, BreakerState]] = {
    "closed": {"trip": "open", "force_open": "open", "force_close": "closed"},
    "open": {"probe": "half_open", "force_open": "open", "force_close": "closed"},
    "half_open": {"recover": "closed", "fail_probe": "open", "force_open": "open", "force_close": "closed"},
}
#: a recovery is lasting after so many reset timeouts
LASTING = 10
#: a window forgets in steps of this share: what it counts is never older than the window, and never younger than 95 %
BUCKETS = 20
#: a late `Retry-After` is written only when it asks for so much more: a burst of them would else be a burst of writes
LENGTHEN_MIN_MS = 1_000


class Terms(NamedTuple):
    """What the configuration says. Times in seconds."""

    failure_threshold: int = 5
    minimum_calls: int = 5
    window_s: float = 60.0
    reset_timeout_s: float = 60.0
    reset_timeout_max_s: float = 3600.0
    half_open_probes: int = 3
    probe_timeout_s: float = 30.0
    #: None: no success is too slow
    slow_call_s: float | None = None


class Circuit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A breaker as stored. The default is one that nothing is known of. Times in ms since the epoch."""

    state: BreakerState = "closed"
    #: transitions so far
    generation: int = 0
    opened_at: int = 0
    #: when the next probe may go; 0 while open: an operator holds it, until one closes it
    until: int = 0
    trips: int = 0
    last_open_s: float = 0.0
    closed_at: int = 0
    #: (permit, when it frees itself)
    probes: tuple[tuple[str, int], ...] = ()
    successes: int = 0
    #: the operator who made the last transition, why, and by which request
    by: str = ""
    why: str = ""
    request: str = ""
    #: of the last transition
    at: int = 0
    #: the transition that this write made; "" when it made none
    event: Event | Literal[""] = ""
    #: tells this write from all others: how a lost reply is recognised
    write: str = ""


UNKNOWN = Circuit()


def _move(circuit: Circuit, event: Event, now: int, **changes: Any) -> Circuit:
    state = TRANSITIONS[circuit.state].get(event)
    assert state is not None, f"a breaker that is {circuit.state} cannot {event}"
    said = {"by": "", "why": "", "request": "", "probes": (), "successes": 0, **changes}
    return replace(circuit, state=state, generation=circuit.generation + 1, event=event, at=now, **said)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_for_s(terms: Terms, trips: int, retry_after_s: float = 0.0) -> float:
    """How long it is open after so many trips (the essay's formula)."""
    assert trips >= 1, "an open breaker has tripped"
    doubled = terms.reset_timeout_s * 2.0 ** min(trips - 1, 100)
    return max(min(doubled, terms.reset_timeout_max_s), retry_after_s)


def tripped(circuit: Circuit, terms: Terms, now: int, *, retry_after_s: float = 0.0, why: str = "") -> Circuit:
    """Closed, and failed too often: open."""
    lasting = now - circuit.closed_at >= LASTING * terms.reset_timeout_s * 1000
    return _opened(circuit, "trip", terms, now, 1 if lasting else circuit.trips + 1, retry_after_s, why)


def _opened(
    circuit: Circuit, event: Event, terms: Terms, now: int, trips: int, retry_after_s: float, why: str
) -> Circuit:
    open_s = open_for_s(terms, trips, retry_after_s)
    until = now + math.ceil(open_s * 1000)
    return _move(circuit, event, now, opened_at=now, until=until, trips=trips, last_open_s=open_s, why=why)


def lengthened(circuit: Circuit, now: int, generation: int, retry_after_s: float) -> Circuit | None:
    """Open for longer, since a call from just before it opened was told to stay away. None: it changes nothing."""
    until = now + math.ceil(retry_after_s * 1000)
    just_before = circuit.state == "open" and not held(circuit) and generation == circuit.generation - 1
    if not just_before or until < circuit.until + LENGTHEN_MIN_MS:
        return None
    return replace(circuit, event="", until=until, last_open_s=(until - circuit.opened_at) / 1000)


def forced(
    circuit: Circuit, to: Literal["open", "closed"], now: int, *, by: str, why: str = "", request: str = ""
) -> Circuit:
    """As an operator wants it: open until one closes it, or closed and everything forgotten, the trips too."""
    if to == "open":
        return _move(
            circuit, "force_open", now, opened_at=now, until=0, last_open_s=0.0, by=by, why=why, request=request
        )
    return _move(circuit, "force_close", now, closed_at=now, until=0, trips=0, by=by, why=why, request=request)


# -- probing ----------------------------------------------------------------------------------------------------------


def held(circuit: Circuit) -> bool:
    """Whether an operator holds it open."""
    return circuit.state == "open" and circuit.until == 0


def live(circuit: Circuit, now: int) -> tuple[tuple[str, int], ...]:
    """The probes whose outcome is still awaited."""
    return tuple(probe for probe in circuit.probes if probe[1] > now)


def probe_in_s(circuit: Circuit, terms: Terms, now: int) -> float | None:
    """When a probe may go: 0.0 is now. None: not before an operator says so, or it is closed and nobody has to probe."""
    if circuit.state == "closed" or held(circuit):
        return None
    if circuit.state == "open":
        return max(0, circuit.until - now) / 1000
    under_way = live(circuit, now)
    if len(under_way) < _places(circuit, terms):
        return 0.0
    return (min(end for _, end in under_way) - now) / 1000


def _places(circuit: Circuit, terms: Terms) -> int:
    """How many probes may be under way: each success has had one's place. One at least, should the number of probes
    have been lowered since.
    """
    return max(1, terms.half_open_probes - circuit.successes)


def refuse(name: str, circuit: Circuit, terms: Terms, now: int) -> None:
    """Raises `BreakerOpen` unless a call, or a probe, may go now."""
    if circuit.state == "closed":
        return
    wait_s = probe_in_s(circuit, terms, now)
    if wait_s is None:
        why = f": {circuit.why}" if circuit.why else ""
        raise BreakerOpen(
            f"{name} is held open by {circuit.by}{why}; nothing was admitted",
            breaker=name,
            probe_in_s=None,
            state=circuit.state,
            by=circuit.by,
            why=circuit.why,
        )
    if wait_s > 0:
        raise BreakerOpen(breaker=name, probe_in_s=wait_s, state=circuit.state)


def admitted(name: str, circuit: Circuit, terms: Terms, now: int, permit: str) -> Circuit:
    """A probe goes under this permit; the first one makes it half open. Raises `BreakerOpen`."""
    refuse(name, circuit, terms, now)
    probe = (permit, now + math.ceil(terms.probe_timeout_s * 1000))
    if circuit.state == "open":
        return _move(circuit, "probe", now, probes=(probe,))
    return replace(circuit, event="", probes=(*live(circuit, now), probe))


def judged(
    name: str, circuit: Circuit, terms: Terms, now: int, permit: str, verdict: Verdict, retry_after_s: float = 0.0
) -> Circuit:
    """What becomes of it when a probe has reported. `UnknownPermit` when that probe is not awaited (any more)."""
    under_way = live(circuit, now)
    rest = tuple(probe for probe in under_way if probe[0] != permit)
    if circuit.state != "half_open" or len(rest) == len(under_way):
        raise UnknownPermit(breaker=name)
    if verdict == "failure":
        return _opened(circuit, "fail_probe", terms, now, circuit.trips + 1, retry_after_s, "a probe failed")
    successes = circuit.successes + (verdict == "success")
    if successes >= terms.half_open_probes:
        return _move(circuit, "recover", now, closed_at=now, until=0)
    return replace(circuit, event="", probes=rest, successes=successes)


# -- counting ---------------------------------------------------------------------------------------------------------


def weighed(terms: Terms, verdict: Verdict, latency_s: float | None) -> Verdict:
    """The verdict that counts: a success that took too long is a failure."""
    slow = terms.slow_call_s is not None and latency_s is not None and latency_s >= terms.slow_call_s
    return "failure" if slow and verdict == "success" else verdict


class _Bucket:
    """A slice of a window."""

    __slots__ = ("calls", "failures", "number", "retry_at")

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = self.failures = 0
        self.retry_at = 0.0


class Window:
    """The calls and failures of the last `window_s` seconds. `now` is on a monotonic scale."""

    __slots__ = ("_buckets", "_width_s", "calls", "failures")

    def __init__(self, window_s: float) -> None:
        self._width_s = window_s / BUCKETS
        self._buckets: deque[_Bucket] = deque()
        self.calls = self.failures = 0

    def roll(self, now: float) -> None:
        """Forgets what has left the window."""
        oldest = int(now / self._width_s) - BUCKETS + 1
        while self._buckets and self._buckets[0].number < oldest:
            gone = self._buckets.popleft()
            self.calls -= gone.calls
            self.failures -= gone.failures

    def count(self, now: float, *, failed: bool, retry_after_s: float = 0.0) -> None:
        """One more call."""
        self.roll(now)
        number = int(now / self._width_s)
        if not self._buckets or self._buckets[-1].number != number:
            self._buckets.append(_Bucket(number))
        bucket = self._buckets[-1]
        bucket.calls += 1
        self.calls += 1
        if failed:
            bucket.failures += 1
            self.failures += 1
            if retry_after_s:
                bucket.retry_at = max(bucket.retry_at, now + retry_after_s)

    def retry_after_s(self, now: float) -> float:
        """What the failures in it have asked for, as far as it is still to come."""
        return max(0.0, max((bucket.retry_at for bucket in self._buckets), default=0.0) - now)

    def is_enough(self, terms: Terms) -> bool:
        """Whether it opens the breaker."""
        return self.failures >= terms.failure_threshold and self.calls >= terms.minimum_calls
