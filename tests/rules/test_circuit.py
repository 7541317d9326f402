"""The circuit: its table, how long it is open, who may probe, and what a window counts."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from ifabric.errors import BreakerOpen, UnknownPermit
from ifabric_actors.governor import circuit as circuits
from ifabric_actors.governor.circuit import BUCKETS, LASTING, TRANSITIONS, UNKNOWN, Circuit, Terms, Window

TERMS = Terms(reset_timeout_s=10.0, reset_timeout_max_s=60.0, half_open_probes=2, probe_timeout_s=5.0)
T0 = 1_000_000_000


def opened(terms: Terms = TERMS, now: int = T0, **how: Any) -> Circuit:
    return circuits.tripped(UNKNOWN, terms, now, **how)


def probing(*permits: str, terms: Terms = TERMS, now: int = T0) -> Circuit:
    """Half open, with these probes under way since `now`."""
    made = replace(opened(terms, now), until=now)
    for permit in permits:
        made = circuits.admitted("b", made, terms, now, permit)
    return made


# -- the table ----------------------------------------------------------------------------------------------------------


def test_every_state_can_be_left_by_an_operator_and_only_a_recovery_closes_besides() -> None:
    assert all(moves["force_open"] == "open" and moves["force_close"] == "closed" for moves in TRANSITIONS.values())
    closing = {event for moves in TRANSITIONS.values() for event, to in moves.items() if to == "closed"}
    assert closing == {"recover", "force_close"}


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (state, event)
        for state, moves in TRANSITIONS.items()
        for event in ("trip", "probe", "recover", "fail_probe", "force_open", "force_close")
        if event not in moves
    ],
)
def test_what_is_not_in_the_table_is_refused(state: Any, event: Any) -> None:
    with pytest.raises(AssertionError, match=f"is {state} cannot {event}"):
        circuits._move(Circuit(state=state), event, T0)


def test_a_breaker_that_is_open_cannot_trip() -> None:
    with pytest.raises(AssertionError):
        circuits.tripped(opened(), TERMS, T0)


# -- how long it is open ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trips", "retry_after_s", "open_s"),
    [
        (1, 0.0, 10.0),
        (2, 0.0, 20.0),
        (3, 0.0, 40.0),
        (4, 0.0, 60.0),
        (5_000, 0.0, 60.0),  # not an overflow
        (1, 30.0, 30.0),
        (1, 300.0, 300.0),  # what the resource asks for is no timeout of ours, and our ceiling is not for it
        (4, 30.0, 60.0),
    ],
)
def test_open_times_double_up_to_the_ceiling_and_retry_after_is_honoured(
    trips: int, retry_after_s: float, open_s: float
) -> None:
    assert circuits.open_for_s(TERMS, trips, retry_after_s) == open_s


def test_a_trip_after_a_short_recovery_doubles_the_time_and_after_a_lasting_one_begins_anew() -> None:
    recovered = replace(opened(), state="closed", closed_at=T0)
    lasting_ms = LASTING * 10_000
    again = circuits.tripped(recovered, TERMS, T0 + lasting_ms - 1)
    assert (again.trips, again.until - again.at) == (2, 20_000)
    anew = circuits.tripped(recovered, TERMS, T0 + lasting_ms)
    assert (anew.trips, anew.until - anew.at) == (1, 10_000)


def test_a_failed_probe_opens_it_for_twice_as_long_and_its_own_retry_after_counts() -> None:
    again = circuits.judged("b", probing("p1", "p2"), TERMS, T0, "p1", "failure")
    assert (again.state, again.trips, again.until - T0, again.probes) == ("open", 2, 20_000, ())
    asked = circuits.judged("b", probing("p1"), TERMS, T0, "p1", "failure", 120.0)
    assert asked.until - T0 == 120_000


def test_a_late_retry_after_lengthens_what_it_was_under_way_for_and_nothing_else() -> None:
    made = opened()
    longer = circuits.lengthened(made, T0 + 1_000, generation=0, retry_after_s=30.0)
    assert longer is not None
    assert (longer.until, longer.generation, longer.event, longer.last_open_s) == (T0 + 31_000, 1, "", 31.0)
    assert circuits.lengthened(made, T0, generation=0, retry_after_s=10.5) is None  # hardly more
    assert circuits.lengthened(made, T0, generation=-1, retry_after_s=30.0) is None
    assert circuits.lengthened(made, T0, generation=1, retry_after_s=30.0) is None
    held = circuits.forced(UNKNOWN, "open", T0, by="op")
    assert circuits.lengthened(held, T0, generation=0, retry_after_s=30.0) is None
    assert circuits.lengthened(probing("p1"), T0, generation=1, retry_after_s=30.0) is None


# -- probing --------------------------------------------------------------------------------------------------------------


def refusal(circuit: Circuit, now: int, terms: Terms = TERMS) -> dict[str, Any]:
    with pytest.raises(BreakerOpen) as refused:
        circuits.admitted("b", circuit, terms, now, "another")
    return refused.value.facts


def test_nobody_probes_before_the_time_has_come_and_the_refusal_says_when() -> None:
    assert refusal(opened(), T0 + 4_000) == {"breaker": "b", "probe_in_s": 6.0, "state": "open"}
    first = circuits.admitted("b", opened(), TERMS, T0 + 10_000, "p1")
    assert (first.state, first.generation, first.probes) == ("half_open", 2, (("p1", T0 + 15_000),))


def test_no_more_probes_than_there_are_places_and_the_refusal_says_when_one_is_given_away() -> None:
    full = circuits.admitted("b", probing("p1"), TERMS, T0 + 2_000, "p2")
    assert refusal(full, T0 + 3_000) == {"breaker": "b", "probe_in_s": 2.0, "state": "half_open"}
    freed = circuits.admitted("b", full, TERMS, T0 + 5_000, "p3")
    assert [permit for permit, _ in freed.probes] == ["p2", "p3"]


def test_a_success_keeps_its_place_so_that_no_more_calls_go_than_are_needed() -> None:
    one = circuits.judged("b", probing("p1", "p2"), TERMS, T0, "p1", "success")
    assert (one.state, one.successes, one.event) == ("half_open", 1, "")
    refusal(one, T0 + 1_000)
    closed = circuits.judged("b", one, TERMS, T0 + 1_000, "p2", "success")
    assert (closed.state, closed.closed_at, closed.probes, closed.event) == ("closed", T0 + 1_000, (), "recover")


def test_an_ignored_probe_frees_its_place_without_a_verdict() -> None:
    freed = circuits.judged("b", probing("p1", "p2"), TERMS, T0, "p1", "ignored")
    assert (freed.state, freed.successes, len(freed.probes)) == ("half_open", 0, 1)
    assert circuits.probe_in_s(freed, TERMS, T0) == 0.0


@pytest.mark.parametrize(("permit", "later_ms"), [("p9", 0), ("p1", 5_000)])
def test_a_probe_that_is_not_awaited_has_no_say(permit: str, later_ms: int) -> None:
    with pytest.raises(UnknownPermit):
        circuits.judged("b", probing("p1"), TERMS, T0 + later_ms, permit, "failure")


def test_fewer_probes_in_a_new_configuration_leave_no_breaker_without_a_place() -> None:
    one = circuits.judged("b", probing("p1", "p2"), TERMS, T0, "p1", "success")
    fewer = TERMS._replace(half_open_probes=1)
    assert circuits.probe_in_s(one, fewer, T0 + 5_000) == 0.0
    again = circuits.admitted("b", one, fewer, T0 + 5_000, "p3")
    assert circuits.judged("b", again, fewer, T0 + 5_000, "p3", "success").state == "closed"


# -- operators --------------------------------------------------------------------------------------------------------------


def test_an_operator_holds_it_open_until_one_closes_it_and_closing_forgets_the_trips() -> None:
    held = circuits.forced(opened(), "open", T0, by="olga", why="bills", request="r1")
    facts = refusal(held, T0 + 10**9)
    assert facts == {"breaker": "b", "probe_in_s": None, "state": "open", "by": "olga", "why": "bills"}
    closed = circuits.forced(held, "closed", T0 + 5, by="otto")
    assert (closed.state, closed.trips, closed.generation, closed.by, closed.why) == ("closed", 0, 3, "otto", "")
    tripped = circuits.tripped(closed, TERMS, T0 + 6)
    assert (tripped.trips, tripped.by) == (1, "")


# -- windows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "minimum", "calls", "trips"),
    [
        (3, 1, "fff", True),
        (3, 1, "ff", False),
        (3, 1, "fsfsf", True),  # not only in a row
        (2, 5, "ffss", False),
        (2, 5, "ffsss", True),  # a success may be the call that was missing
        (1, 1, "s", False),
    ],
)
def test_it_takes_so_many_failures_among_so_many_calls(threshold: int, minimum: int, calls: str, trips: bool) -> None:
    window = Window(60.0)
    for call in calls:
        window.count(0.0, failed=call == "f")
    assert window.is_enough(Terms(failure_threshold=threshold, minimum_calls=minimum)) is trips


def test_a_call_is_judged_with_what_is_in_the_window_then() -> None:
    window = Window(10.0)
    window.count(0.0, failed=True)
    window.count(100.0, failed=True)
    assert (window.calls, window.failures) == (1, 1)


def test_what_failures_asked_for_is_known_as_long_as_they_are() -> None:
    window = Window(10.0)
    window.count(0.0, failed=True, retry_after_s=100.0)
    window.count(1.0, failed=True)
    window.count(1.0, failed=False, retry_after_s=900.0)
    assert window.retry_after_s(2.0) == 98.0
    window.roll(10.2)
    assert window.retry_after_s(10.2) == 0.0
    assert (window.calls, window.failures) == (2, 1)


@given(
    st.floats(0.5, 3_600),
    st.lists(st.tuples(st.floats(0, 500), st.booleans()), max_size=60),
    st.floats(0, 500),
)
def test_a_window_counts_nothing_that_is_too_old_and_nearly_all_that_is_not(
    window_s: float, steps: list[tuple[float, bool]], pause_s: float
) -> None:
    window, now, calls = Window(window_s), 1_000.0, []
    for step_s, failed in steps:
        now += step_s
        window.count(now, failed=failed)
        calls.append((now, failed))
    now += pause_s
    window.roll(now)
    slack_s = 1e-6 * now
    youngest = window_s * (BUCKETS - 1) / BUCKETS - slack_s
    for counted, kinds in ((window.calls, (True, False)), (window.failures, (True,))):
        surely = sum(now - at < youngest and failed in kinds for at, failed in calls)
        perhaps = sum(now - at < window_s + slack_s and failed in kinds for at, failed in calls)
        assert surely <= counted <= perhaps


@pytest.mark.parametrize(
    ("limit_s", "verdict", "latency_s", "counts_as"),
    [
        (None, "success", 900.0, "success"),
        (2.0, "success", 1.999, "success"),
        (2.0, "success", 2.0, "failure"),
        (2.0, "success", None, "success"),
        (2.0, "ignored", 9.0, "ignored"),
        (2.0, "failure", 0.1, "failure"),
    ],
)
def test_a_success_that_took_too_long_is_a_failure(
    limit_s: float | None, verdict: Any, latency_s: float | None, counts_as: str
) -> None:
    assert circuits.weighed(Terms(slow_call_s=limit_s), verdict, latency_s) == counts_as


# -- anything, in any order -------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """One breaker, whatever is asked of it; beside it a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit, self.now, self.count = UNKNOWN, T0, 0
        #: permit -> (generation, when it ends), of those that were given out and not reported
        self.awaited: dict[str, tuple[int, int]] = {}
        self.given: list[str] = []
        self.trips, self.closed_at = 0, 0

    @initialize(
        probes=st.integers(1, 4), reset_s=st.sampled_from([0.0004, 1.0, 7.5]), top_s=st.sampled_from([1.0, 20.0])
    )
    def configure(self, probes: int, reset_s: float, top_s: float) -> None:
        self.terms = Terms(
            half_open_probes=probes, reset_timeout_s=reset_s, reset_timeout_max_s=top_s, probe_timeout_s=3.0
        )

    def become(self, after: Circuit, *allowed: str) -> None:
        """Every write: within the table, and nothing else moves."""
        before = self.circuit
        if after.event:
            assert after.event in allowed
            assert TRANSITIONS[before.state][after.event] == after.state
            assert (after.generation, after.at) == (before.generation + 1, self.now)
        else:
            assert (after.state, after.generation, after.at) == (before.state, before.generation, before.at)
        if before.state != "closed" and after.state == "closed":
            assert after.event in ("recover", "force_close")
        if after.state == "closed" and after.event:
            self.closed_at = self.now
        self.circuit = msgspec.json.decode(msgspec.json.encode(after), type=Circuit)
        assert self.circuit == after

    def opened(self, retry_after_s: float) -> None:
        doubled = min(self.terms.reset_timeout_s * 2 ** (self.trips - 1), self.terms.reset_timeout_max_s)
        assert self.circuit.trips == self.trips
        assert self.circuit.until == self.now + math.ceil(max(doubled, retry_after_s) * 1000)

    @rule(ms=st.sampled_from([1, 400, 1_000, 2_999, 3_000, 20_000, 10**6]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @rule()
    def wait_until_a_probe_may_go(self) -> None:
        wait_s = circuits.probe_in_s(self.circuit, self.terms, self.now)
        self.now += math.ceil((wait_s or 0.0) * 1000)

    @precondition(lambda self: self.circuit.state == "closed")
    @rule(retry_after_s=st.sampled_from([0.0, 0.5, 60.0]))
    def trip(self, retry_after_s: float) -> None:
        lasting = self.now - self.closed_at >= LASTING * self.terms.reset_timeout_s * 1000
        self.trips = 1 if lasting else self.trips + 1
        self.become(circuits.tripped(self.circuit, self.terms, self.now, retry_after_s=retry_after_s), "trip")
        self.opened(retry_after_s)

    @precondition(lambda self: self.circuit.state != "closed")
    @rule()
    def ask_for_a_probe(self) -> None:
        before, permit = self.circuit, f"p{self.count}"
        self.count += 1
        try:
            after = circuits.admitted("b", before, self.terms, self.now, permit)
        except BreakerOpen as refused:
            wait_s = refused.facts["probe_in_s"]
            assert wait_s is None or wait_s > 0
            if before.state == "open":
                assert before.until == 0 or self.now < before.until
                assert (wait_s is None) == (before.until == 0)
            else:
                assert len(self.under_way()) + before.successes == self.terms.half_open_probes
            return
        assert before.state == "half_open" or 0 < before.until <= self.now
        self.become(after, "probe")
        self.awaited[permit] = (after.generation, self.now + 3_000)
        self.given.append(permit)

    @precondition(lambda self: self.given and self.circuit.state == "half_open")
    @rule(
        data=st.data(),
        verdict=st.sampled_from(["success", "success", "failure", "ignored"]),
        retry_after_s=st.sampled_from([0.0, 0.0, 60.0]),
    )
    def report_a_probe(self, data: st.DataObject, verdict: Any, retry_after_s: float) -> None:
        permit = data.draw(st.sampled_from(self.given[-8:]))
        before = self.circuit
        if permit not in self.under_way():
            with pytest.raises(UnknownPermit):
                circuits.judged("b", before, self.terms, self.now, permit, verdict, retry_after_s)
            return
        after = circuits.judged("b", before, self.terms, self.now, permit, verdict, retry_after_s)
        del self.awaited[permit]
        self.become(after, "recover", "fail_probe")
        assert (after.state == "open") == (verdict == "failure")
        if verdict == "failure":
            self.trips += 1
            self.opened(retry_after_s)
        recovers = verdict == "success" and before.successes + 1 == self.terms.half_open_probes
        assert (after.state == "closed") == recovers

    @rule(back=st.integers(0, 3), retry_after_s=st.sampled_from([0.0, 60.0, 86_400.0]))
    def report_late(self, back: int, retry_after_s: float) -> None:
        before = self.circuit
        after = circuits.lengthened(before, self.now, before.generation - back, retry_after_s)
        if after is not None:
            assert (before.state, back) == ("open", 1)
            assert before.until < after.until == self.now + math.ceil(retry_after_s * 1000)
            self.become(after)

    @rule(to=st.sampled_from(["open", "closed"]))
    def force(self, to: Any) -> None:
        after = circuits.forced(self.circuit, to, self.now, by="op", why="because", request="r")
        self.become(after, "force_open", "force_close")
        assert (after.state, after.by, after.why, after.request) == (to, "op", "because", "r")
        if to == "closed":
            self.trips = 0

    def under_way(self) -> set[str]:
        """The probes that the model awaits."""
        generation = self.circuit.generation
        return {permit for permit, (of, end) in self.awaited.items() if of == generation and end > self.now}

    @invariant()
    def the_probes_are_those_that_the_model_awaits_and_never_too_many(self) -> None:
        alive = {permit for permit, _ in circuits.live(self.circuit, self.now)}
        assert alive == self.under_way()
        if hasattr(self, "terms"):
            assert len(alive) + self.circuit.successes <= self.terms.half_open_probes
        if self.circuit.state != "half_open":
            assert not self.circuit.probes
            assert not self.circuit.successes


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
