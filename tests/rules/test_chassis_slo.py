"""The service level: exact where it decides, near where it reports, and never with a memory longer than its window."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric_actors.chassis.slo import BUCKETS, ERROR, LEAST_S, MOST_S, RUNS_MIN, Change, ServiceLevel

WINDOW_S = 600.0
WIDTH_S = WINDOW_S / BUCKETS
TARGET_MS, TARGET_PERCENT = 10.0, 99.9
FAST_S, SLOW_S = 0.001, 0.1


def level(latency_ms: float = TARGET_MS, availability: float = TARGET_PERCENT) -> ServiceLevel:
    return ServiceLevel(latency_ms, availability, WINDOW_S)


def filled(
    good: int = 0, slow: int = 0, failed: int = 0, now_s: float = 0.0, into: ServiceLevel | None = None
) -> ServiceLevel:
    made = into or level()
    for count, overhead_s, ok in ((good, FAST_S, True), (slow, SLOW_S, True), (failed, FAST_S, False)):
        for _ in range(count):
            made.add(now_s, overhead_s, ok)
    return made


# -- against one that remembers everything ------------------------------------------------------------------------------


class Run(NamedTuple):
    at_s: float
    overhead_s: float
    ok: bool


def counted(runs: list[Run], now_s: float) -> list[Run]:
    """Those in the buckets that the window still has."""
    return [run for run in runs if run.at_s // WIDTH_S > now_s // WIDTH_S - BUCKETS]


def naive_p95_s(runs: list[Run]) -> float:
    took = sorted(run.overhead_s for run in runs if run.ok)
    return took[math.ceil(Fraction(95, 100) * len(took)) - 1] if took else 0.0


def naive_left(runs: list[Run], latency_s: float, availability: str) -> Fraction:
    ok = [run for run in runs if run.ok]
    lefts = [Fraction(1)]
    if runs:
        lefts.append(1 - (len(runs) - len(ok)) / ((1 - Fraction(availability) / 100) * len(runs)))
    if ok:
        lefts.append(1 - sum(run.overhead_s > latency_s for run in ok) / (Fraction(5, 100) * len(ok)))
    return min(lefts)


STEPS_S = st.one_of(st.just(0.0), st.floats(0, 3 * WIDTH_S), st.floats(0, 2 * WINDOW_S))
OVERHEADS_S = st.one_of(st.floats(LEAST_S, MOST_S), st.floats(LEAST_S, 0.05), st.sampled_from([0.01, FAST_S, SLOW_S]))
RUNS = st.lists(
    st.tuples(STEPS_S, OVERHEADS_S, st.sampled_from([True, True, True, False]), st.integers(1, 30)), max_size=40
)


@given(RUNS, st.sampled_from([0.5, TARGET_MS, 123.456]), st.sampled_from(["99.9", "95", "66.6"]), STEPS_S)
def test_it_says_what_one_that_remembers_every_run_says(
    given_runs: list[tuple[float, float, bool, int]], latency_ms: float, availability: str, later_s: float
) -> None:
    made, runs, now_s = level(latency_ms, float(availability)), [], 1000.0
    for step_s, overhead_s, ok, times in given_runs:
        now_s += step_s
        for _ in range(times):
            made.add(now_s, overhead_s, ok)
            runs.append(Run(now_s, overhead_s, ok))
    now_s += later_s
    view, kept = made.view(now_s), counted(runs, now_s)
    assert view.runs == len(kept)
    assert view.availability_percent == (100 * sum(run.ok for run in kept) / len(kept) if kept else 100.0)
    assert view.error_budget_left == float(naive_left(kept, latency_ms / 1000, availability))
    exact_ms = naive_p95_s(kept) * 1000
    assert view.latency_p95_ms == pytest.approx(exact_ms, rel=ERROR + 1e-9)
    assert (view.latency_p95_ms > latency_ms) == (exact_ms / 1000 > latency_ms / 1000)


@given(RUNS)
def test_what_is_told_is_what_would_be_told_by_one_that_remembers(
    given_runs: list[tuple[float, float, bool, int]],
) -> None:
    made, now_s, missed = level(), 1000.0, {"latency": False, "availability": False}
    runs: list[Run] = []
    for step_s, overhead_s, ok, times in given_runs:
        now_s += step_s
        for _ in range(times):
            made.add(now_s, overhead_s, ok)
            runs.append(Run(now_s, overhead_s, ok))
        kept = counted(runs, now_s)
        fine = [run for run in kept if run.ok]
        met = {
            "latency": naive_p95_s(kept) <= TARGET_MS / 1000,
            "availability": len(kept) - len(fine) <= Fraction("0.001") * len(kept),
        }
        enough = {"latency": len(fine) >= RUNS_MIN, "availability": len(kept) >= RUNS_MIN}
        wanted = [(w, met[w]) for w in missed if missed[w] == met[w] and (met[w] or enough[w])]
        missed |= {which: not is_met for which, is_met in wanted}
        assert [(change.which, change.met) for change in made.changes(now_s)] == wanted
        assert made.changes(now_s) == []


@given(st.lists(st.floats(0, 3 * WINDOW_S), min_size=1, max_size=60), st.floats(0, 2 * WINDOW_S))
def test_what_is_counted_is_never_older_than_the_window_and_never_younger_than_nearly_all_of_it(
    moments: list[float], later_s: float
) -> None:
    made = level()
    for moment in sorted(moments):
        made.add(moment, FAST_S, True)
    now_s = max(moments) + later_s
    runs = made.view(now_s).runs
    assert sum(now_s - at < WINDOW_S - WIDTH_S - 1e-6 for at in moments) <= runs
    assert runs <= sum(now_s - at <= WINDOW_S + 1e-6 for at in moments)


@pytest.mark.parametrize(("overhead_s", "p95_ms"), [(0.0, LEAST_S * 1e3), (-1.0, LEAST_S * 1e3), (1e9, MOST_S * 1e3)])
def test_what_is_out_of_reach_is_reported_as_the_nearest_that_is_not(overhead_s: float, p95_ms: float) -> None:
    made = level()
    made.add(0.0, overhead_s, ok=True)
    assert made.view(0.0).latency_p95_ms == p95_ms


# -- the error budget -----------------------------------------------------------------------------------------------------


def test_without_runs_every_promise_is_kept() -> None:
    view = level().view(5.0)
    assert (view.runs, view.latency_p95_ms, view.availability_percent, view.error_budget_left) == (0, 0.0, 100.0, 1.0)
    assert (view.window_s, view.target_latency_p95_ms, view.target_availability_percent) == (
        WINDOW_S,
        TARGET_MS,
        TARGET_PERCENT,
    )
    assert level().changes(5.0) == []


@pytest.mark.parametrize(
    ("good", "slow", "failed", "left"),
    [
        (1000, 0, 0, 1.0),
        (999, 0, 1, 0.0),  # of 1000 at 99.9 %, one may fail: no more and no less
        (1999, 0, 1, 0.5),
        (998, 0, 2, -1.0),
        (95, 5, 0, 0.0),
        (99, 1, 0, 0.8),
        (90, 10, 0, -1.0),
        (1949, 50, 1, 0.4997498749374687),  # the smaller: 50 slower of 1999 that did not fail, 1 failure of 2000
        (0, 0, 3, -999.0),
    ],
)
def test_the_budget_is_what_may_fail_less_what_has(good: int, slow: int, failed: int, left: float) -> None:
    assert filled(good, slow, failed).view(0.0).error_budget_left == pytest.approx(left, abs=1e-12)


def test_runs_that_failed_do_not_flatter_the_latency() -> None:
    assert filled(slow=10, failed=1000).view(0.0).latency_p95_ms == pytest.approx(SLOW_S * 1000, rel=ERROR)


# -- telling --------------------------------------------------------------------------------------------------------------


def test_a_target_is_told_once_when_it_is_missed_and_once_when_it_is_met_again() -> None:
    made = filled(good=100, slow=6)
    (change,) = made.changes(0.0)
    assert change == Change("latency", met=False, value=pytest.approx(100.0, rel=ERROR), target=TARGET_MS)
    assert made.changes(1.0) == []
    made.view(1.0)
    filled(slow=1, now_s=1.0, into=made)
    assert made.changes(1.0) == []
    filled(good=100, now_s=2.0, into=made)
    (change,) = made.changes(2.0)
    assert change.met and change.which == "latency" and change.value <= TARGET_MS


def test_both_targets_are_told_of_each_for_itself() -> None:
    made = filled(good=10, slow=20, failed=10)
    assert [(change.which, change.met) for change in made.changes(0.0)] == [("latency", False), ("availability", False)]
    (change,) = (change for change in made.changes(2 * WINDOW_S) if change.which == "availability")
    assert change == Change("availability", met=True, value=100.0, target=TARGET_PERCENT)


def test_a_violation_is_not_told_of_few_runs() -> None:
    made = filled(failed=RUNS_MIN - 1)
    assert made.changes(0.0) == []
    assert made.view(0.0).error_budget_left < 0
    filled(good=1, into=made)
    assert [change.which for change in made.changes(0.0)] == ["availability"]


def test_few_runs_do_not_end_a_violation_either_unless_they_meet_the_target() -> None:
    made = filled(failed=RUNS_MIN)
    assert len(made.changes(0.0)) == 1
    filled(failed=1, now_s=WINDOW_S - 1, into=made)
    assert made.changes(WINDOW_S + 1) == []
    assert made.view(WINDOW_S + 1).runs == 1
    (change,) = made.changes(3 * WINDOW_S)
    assert change.met


def test_its_memory_does_not_grow() -> None:
    made = level()
    for now_s in range(5000):
        made.add(float(now_s), FAST_S, ok=True)
    assert len(made._buckets) == BUCKETS
    assert made.view(4999.0).runs == int(WINDOW_S)
