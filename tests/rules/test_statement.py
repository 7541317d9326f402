"""A statement has each charge once, as the ledger knows it."""

from __future__ import annotations

from ifabric.cli.statement import once
from ifabric.wire.governor import BudgetEvent
from ifabric.wire.replay import REPLAYED


def charge(revision: int, hold: str, note: str = "", session: str = "alice") -> BudgetEvent:
    return BudgetEvent(
        event="commit", at="", revision=revision, session=session, hold=hold, charged=revision, note=note
    )


def test_what_was_charged_again_after_a_restore_is_there_as_it_was_charged_again() -> None:
    before, other, again = charge(5, "h"), charge(6, "i"), charge(900, "h", REPLAYED)
    assert once([before, other, again]) == [other, again]


def test_a_replay_of_one_session_hides_no_charge_of_another() -> None:
    hers, his = charge(5, "h", session="alice"), charge(900, "h", REPLAYED, session="bob")
    assert once([hers, his]) == [hers, his]


def test_what_was_replayed_twice_is_there_as_it_was_the_last_time() -> None:
    charges = [charge(5, "h"), charge(900, "h", REPLAYED), charge(2_000, "h", REPLAYED)]
    assert once(charges) == charges[-1:]
    assert once([]) == []
