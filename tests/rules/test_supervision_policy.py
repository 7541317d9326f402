"""What is done when a child has ended, as a table; and what a tree may look like."""

from __future__ import annotations

from typing import Any

import pytest

from ifabric.supervision.policy import DELAY_MAX_S, Again, Escalate, Forget, after_exit, within
from ifabric.supervision.spec import Branch, Budget, Child, Part, Restart, Strategy


async def _nothing() -> None:
    return None


PART = Part(_nothing, _nothing)
THREE = Budget(3, 10.0)


def branch(strategy: Strategy, budget: Budget = THREE, **restart: Restart) -> Branch:
    children = tuple(Child(name, PART, restart.get(name, Restart.PERMANENT)) for name in "abc")
    return Branch("tree", strategy, budget, children)


@pytest.mark.parametrize(
    ("strategy", "ended", "again"),
    [
        (Strategy.ONE_FOR_ONE, "a", ("a",)),
        (Strategy.ONE_FOR_ONE, "c", ("c",)),
        (Strategy.REST_FOR_ONE, "a", ("a", "b", "c")),
        (Strategy.REST_FOR_ONE, "b", ("b", "c")),
        (Strategy.REST_FOR_ONE, "c", ("c",)),
        (Strategy.ONE_FOR_ALL, "a", ("a", "b", "c")),
        (Strategy.ONE_FOR_ALL, "c", ("a", "b", "c")),
    ],
)
def test_the_strategy_says_who_starts_again(strategy: Strategy, ended: str, again: tuple[str, ...]) -> None:
    assert after_exit(branch(strategy), ended, "why", [], 100.0) == Again(again, 0.0)


@pytest.mark.parametrize(
    ("history", "delay_s"),
    [
        ([], 0.0),
        ([99.0], 0.1),
        ([98.0, 99.0], 0.2),
        ([80.0, 89.9, 99.0], 0.1),  # only what lies within the window counts
    ],
)
def test_the_first_restart_is_at_once_and_each_further_one_waits_twice_as_long(
    history: list[float], delay_s: float
) -> None:
    assert after_exit(branch(Strategy.ONE_FOR_ONE), "a", "why", history, 100.0) == Again(("a",), delay_s)


def test_the_delay_is_bounded() -> None:
    patient = branch(Strategy.ONE_FOR_ONE, Budget(100, 1000.0))
    decision = after_exit(patient, "a", "why", [100.0] * 50, 100.0)
    assert decision == Again(("a",), DELAY_MAX_S)


@pytest.mark.parametrize(
    ("history", "kind"),
    [
        ([97.0, 98.0], Again),
        ([97.0, 98.0, 99.0], Escalate),
        ([90.0, 98.0, 99.0], Again),  # the first is ten seconds ago, and forgiven
        ([90.1, 98.0, 99.0], Escalate),
    ],
)
def test_one_restart_more_than_the_budget_fails_the_branch(history: list[float], kind: type[Any]) -> None:
    assert isinstance(after_exit(branch(Strategy.ONE_FOR_ONE), "a", "why", history, 100.0), kind)


def test_a_budget_of_nothing_escalates_the_first_end() -> None:
    strict = branch(Strategy.ONE_FOR_ALL, Budget(0, 10.0))
    assert isinstance(after_exit(strict, "b", "why", [], 100.0), Escalate)


def test_an_escalation_names_the_branch_the_child_and_why() -> None:
    decision = after_exit(branch(Strategy.ONE_FOR_ONE), "b", "the disk is full", [99.0] * 3, 100.0)
    assert isinstance(decision, Escalate)
    for word in ("tree", "b ended", "the disk is full", "3 restarts within 10 s"):
        assert word in decision.reason


def test_a_temporary_child_is_forgotten_even_when_the_budget_is_spent() -> None:
    spec = branch(Strategy.ONE_FOR_ALL, b=Restart.TEMPORARY)
    assert after_exit(spec, "b", "why", [99.0] * 3, 100.0) == Forget()


def test_a_branch_within_a_branch_is_restarted_like_a_child() -> None:
    inner = Branch("inner", Strategy.ONE_FOR_ONE, Budget(1, 1.0), (Child("x", PART),))
    outer = Branch("outer", Strategy.REST_FOR_ONE, Budget(1, 1.0), (inner, Child("after", PART)))
    assert after_exit(outer, "inner", "why", [], 5.0) == Again(("inner", "after"), 0.0)


def test_the_window_is_open_at_its_far_end() -> None:
    assert within(branch(Strategy.ONE_FOR_ONE), [89.9, 90.0, 90.1], 100.0) == [90.1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Budget(-1, 1.0),
        lambda: Budget(1, 0.0),
        lambda: Child("", PART),
        lambda: Child("a", PART, shutdown_s=0),
        lambda: Branch("", Strategy.ONE_FOR_ONE, Budget(1, 1.0)),
        lambda: Branch("x", Strategy.ONE_FOR_ONE, Budget(1, 1.0), (Child("a", PART), Child("a", PART))),
    ],
)
def test_a_tree_that_makes_no_sense_cannot_be_built(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a "):
        wrong()


def test_a_branch_has_as_long_to_stop_as_its_children_one_after_another() -> None:
    inner = Branch("inner", Strategy.ONE_FOR_ONE, Budget(1, 1.0), tuple(Child(n, PART, shutdown_s=20) for n in "xyz"))
    assert inner.shutdown_s > 60
    outer = Branch("outer", Strategy.ONE_FOR_ONE, Budget(1, 1.0), (inner, Child("a", PART, shutdown_s=5)))
    assert outer.shutdown_s > inner.shutdown_s + 5
