"""The judge of a drill: each promise that is broken is found, and nothing else is called broken."""

from __future__ import annotations

from typing import Any

import pytest

from ifabric.drill.verdict import (
    Account,
    Charges,
    Facts,
    Fate,
    Grant,
    Limit,
    Reconciled,
    Stale,
    judge,
    lost_micro_usd,
    regranted,
)

OLD, NEW = 1 << 40, 2 << 40
GOOD = Facts(
    everything=False,
    rto_s=12.0,
    phases=(("restored", 5.0),),
    backup_age_s=20.0,
    backup_s=3.0,
    submitted=Fate(100, (), 20, ("new/7",), ()),
    completed=Fate(40, (), 30, ("load/9", "load/10"), ()),
    charges=Charges(80, 8_000, 30, 3_000, 0, 0, 0, 0),
    accounts=(Account("drill", 8_000, 100, 8_050), Account("drill/@a", 8_000, 100, 8_000)),
    limits=(Limit("drill", 1_000_000, 1_000_000),),
    incarnations=(1, 2),
    grants=(Grant("a", OLD + 1), Grant("b", OLD + 1), Grant("a", OLD + 2), Grant("a", NEW + 3)),
    stale=(Stale("complete a", "claim_lost"), Stale("complete b", "claim_lost")),
    reconciled=Reconciled(complete=True, entries=30, charged_micro_usd=3_000),
)
LOST_ALL = GOOD._replace(
    everything=True,
    reconciled=Reconciled(complete=False, entries=0, charged_micro_usd=0, gaps=("the journal begins later",)),
    accounts=(Account("drill", 8_000, 0, 5_000),),
    charges=Charges(80, 8_000, 30, 3_000, 30, 3_000, 30, 3_000),
)


def broken(facts: Facts) -> list[str]:
    return [promise.what for promise in judge(facts).promises if promise.held is False]


def test_a_drill_in_which_everything_held_is_called_that() -> None:
    assert broken(GOOD) == []
    assert judge(GOOD).held


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rto_s": None}, "RTO"),
        ({"rto_s": 60.0}, "RTO"),
        ({"backup_age_s": 300.0}, "RPO"),
        ({"incarnations": (1, 1)}, "incarnation"),
        ({"incarnations": (2, 1)}, "incarnation"),
        ({"grants": (Grant("a", OLD + 1), Grant("a", OLD + 1))}, "given out twice"),
        ({"grants": (Grant("a", NEW + 1), Grant("b", 1), Grant("a", OLD + 9))}, "given out twice"),
        ({"stale": (Stale("complete a", "claim_lost"), Stale("complete b", ""))}, "old holders"),
        ({"stale": (Stale("complete a", "unavailable"),)}, "old holders"),
        ({"stale": ()}, "old holders"),
        ({"submitted": Fate(100, ("load/1",), 20, (), ())}, "submitted before the backup"),
        ({"completed": Fate(40, ("load/1",), 30, (), ())}, "completed before the backup"),
        ({"accounts": (Account("drill", 8_000, 500, 7_999),)}, "spend lost"),
        ({"accounts": (Account("drill", 8_000, 0, 8_000), Account("drill/@a", 10, 0, 9))}, "spend lost"),
        ({"charges": GOOD.charges._replace(lost=1, lost_micro_usd=1)}, "spend lost"),
        ({"accounts": (Account("drill", 8_000, 100, 8_101),)}, "charged twice"),
        ({"limits": (Limit("drill", 1_000_000, None),)}, "limits"),
        ({"limits": (Limit("drill", 1_000_000, 1),)}, "limits"),
        ({"limits": ()}, "limits"),
        ({"reconciled": None}, "whole time"),
        ({"reconciled": Reconciled(complete=False, entries=1, charged_micro_usd=1, gaps=("x",))}, "whole time"),
    ],
)
def test_each_broken_promise_is_found_and_only_that_one(change: dict[str, Any], named: str) -> None:
    (found,) = broken(GOOD._replace(**change))
    assert named in found
    assert not judge(GOOD._replace(**change)).held


def test_what_was_lost_of_tasks_is_told_and_no_promise() -> None:
    said = {promise.what: promise.measured for promise in judge(GOOD).promises if promise.held is None}
    assert said["tasks submitted since the backup that are gone"] == "1 of 20"
    assert said["tasks completed since the backup that are pending again"] == "2 of 30"


def test_a_charge_that_hides_behind_an_unanswered_one_is_counted_all_the_same() -> None:
    """By account nothing is missing, since a request without an answer was carried out; by charge one is."""
    facts = GOOD._replace(
        accounts=(Account("drill", 8_000, 50, 8_000),), charges=GOOD.charges._replace(lost=1, lost_micro_usd=50)
    )
    assert lost_micro_usd(facts) == 50


def test_with_the_journal_lost_too_what_was_spent_since_the_backup_is_told_and_no_more_than_that_is_forgiven() -> None:
    assert broken(LOST_ALL) == []
    worse = LOST_ALL._replace(accounts=(Account("drill", 8_000, 0, 4_999),))
    assert broken(worse) == ["spend lost: there is no journal of it"]


def test_fences_of_different_tasks_are_not_compared() -> None:
    assert regranted((Grant("a", 9), Grant("b", 1), Grant("a", 10))) == ()
    assert regranted((Grant("a", 9), Grant("b", 1), Grant("a", 8), Grant("a", 9))) == ("a",)
