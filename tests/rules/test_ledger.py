"""The ledger alone: a table of its moves, and a machine that makes any of them in any order and counts the money."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
from msgspec.structs import replace

from ifabric.errors import BudgetShort, Conflict
from ifabric.wire.envelope import Usage
from ifabric_actors.governor import ledger
from ifabric_actors.governor.books import kind_of
from ifabric_actors.governor.ledger import TRANSITIONS, BehindError, Line
from ifabric_actors.governor.records import Hold, Tally

NOW = 1_795_000_000_000


def line(account: str = "acme", limit: int | None = 100, **tally: int) -> Line:
    return Line(account, "total", limit, Tally(**tally))


def hold(amount: int, state: Any = "open", **fields: Any) -> Hold:
    return Hold(state=state, session="s", account="acme", amount=amount, on=(("acme", "total"),), at=NOW, **fields)


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["open", "committed", "voided", "expired", "late"])
@pytest.mark.parametrize("event", ["commit", "void", "expire"])
def test_a_hold_moves_as_the_table_says_and_in_no_other_way(state: Any, event: str) -> None:
    held = hold(10, state, charged=7 if state in ("committed", "late") else 0)
    path = (line(held=10 if state == "open" else 0),)
    moves: dict[str, Any] = {
        "commit": lambda: ledger.committed(held, path, 3, usage=None, now=NOW),
        "void": lambda: ledger.voided(held, path, now=NOW),
        "expire": lambda: ledger.expired(held, path, why="", now=NOW),
    }
    target = TRANSITIONS[held.state].get(event)  # type: ignore[call-overload]
    if target is not None:
        settled = moves[event]()
        assert (settled.hold.state, settled.again) == (target, False)
        assert settled.hold.ended_at == NOW
    elif event == "void" and state in ("voided", "expired"):
        assert moves[event]() == (held, path, True)
    else:
        with pytest.raises(Conflict):
            moves[event]()


def test_a_hold_is_placed_on_the_whole_path_or_refused_naming_the_account_with_the_least() -> None:
    path = (line("a", 1000), line("a/b", 50, spent=20, held=10), line("a/b/@s", None))
    after = ledger.placed(path, 20)
    assert [one.tally.held for one in after] == [20, 30, 20]
    assert [one.available for one in after] == [980, 0, None]
    with pytest.raises(BudgetShort) as caught:
        ledger.placed(path, 21)
    assert caught.value.facts == {"account": "a/b", "have": 20, "need": 21, "held": 10, "spent": 20, "limit": 50}
    with pytest.raises(BudgetShort) as caught:
        ledger.placed(path, 1001)
    assert caught.value.facts["account"] == "a/b"


def test_the_last_micro_dollar_can_be_held_and_nothing_after_it() -> None:
    (full,) = ledger.placed((line(limit=1),), 1)
    assert full.available == 0
    assert ledger.placed((full,), 0) == (full,)
    with pytest.raises(BudgetShort):
        ledger.placed((full,), 1)


def test_a_limit_of_nothing_lets_nothing_through_and_no_limit_lets_everything_through() -> None:
    with pytest.raises(BudgetShort):
        ledger.spent((line(limit=0),), 1)
    (after,) = ledger.spent((line(limit=None),), 2**53)
    assert (after.tally.spent, after.available) == (2**53, None)


def test_a_commit_under_the_estimate_frees_the_rest() -> None:
    settled = ledger.committed(hold(10), (line(held=10),), 4, usage=None, now=NOW)
    assert (settled.hold.charged, settled.hold.overdraft) == (4, 0)
    assert settled.path[0].tally == Tally(spent=4)


def test_a_commit_over_the_estimate_takes_what_is_available_and_records_what_is_not() -> None:
    path = (line("a", 100, spent=80, held=10), line("a/@s", 1000, held=10))
    settled = ledger.committed(hold(10), path, 25, usage=None, now=NOW)
    assert settled.hold.overdraft == 5
    assert [one.tally for one in settled.path] == [Tally(spent=105, overdraft=5), Tally(spent=25)]
    assert settled.path[0].available == -5
    again = ledger.committed(hold(0), settled.path, 7, usage=None, now=NOW)
    assert again.hold.overdraft == 7, "what was over before is not counted again"


def test_a_commit_after_the_end_is_late_and_charged_without_being_freed_twice() -> None:
    expired = ledger.expired(hold(10), (line(held=10, spent=95),), why="its session ended", now=NOW)
    assert expired.path[0].tally == Tally(spent=95)
    late = ledger.committed(expired.hold, expired.path, 8, usage=None, now=NOW)
    assert (late.hold.state, late.hold.charged, late.hold.overdraft) == ("late", 8, 3)
    assert late.path[0].tally == Tally(spent=103, overdraft=3)
    assert late.hold.note == "its session ended"


def test_the_same_commit_again_is_the_same_answer_and_another_one_is_a_conflict() -> None:
    done = hold(10, "committed", charged=4)
    path = (line(spent=4),)
    assert ledger.committed(done, path, 4, usage=None, now=NOW) == (done, path, True)
    with pytest.raises(Conflict) as caught:
        ledger.committed(done, path, 5, usage=None, now=NOW)
    assert caught.value.facts == {"state": "committed", "charged": 4}
    with pytest.raises(Conflict):
        ledger.committed(done, path, 4, usage=Usage(tokens_in=1), now=NOW)


def test_a_hold_that_is_not_on_its_tally_any_more_is_behind_and_not_a_bug() -> None:
    with pytest.raises(BehindError):
        ledger.expired(hold(10), (line(held=9),), why="", now=NOW)


def test_a_cost_without_a_hold_is_charged_whatever_the_limit_says() -> None:
    settled = ledger.costed(hold(0), (line(limit=5),), 7, usage=None, now=NOW)
    assert (settled.hold.state, settled.hold.charged, settled.hold.overdraft) == ("committed", 7, 2)


@pytest.mark.parametrize(
    ("kind", "moment", "window"),
    [
        ("total", "2026-11-25T10:00:00", "total"),
        ("day", "2026-11-25T23:59:59.999", "2026-11-25"),
        ("day", "2026-11-26T00:00:00", "2026-11-26"),
        ("month", "2026-11-30T23:59:59.999", "2026-11"),
        ("month", "2026-12-01T00:00:00", "2026-12"),
        ("month", "2028-02-29T12:00:00", "2028-02"),
    ],
)
def test_a_window_has_its_name_from_the_moment_in_utc(kind: Any, moment: str, window: str) -> None:
    from datetime import UTC, datetime

    ms = round(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() * 1000)
    assert ledger.window_of(kind, ms) == window
    assert kind_of(window) == kind


# -- the machine ------------------------------------------------------------------------------------------------------

ACCOUNTS = ("org", "org/a", "org/a/@1", "org/a/@2", "org/b", "org/b/@3")
AMOUNTS = st.one_of(st.integers(0, 60), st.integers(0, 2**53 - 1))


class Books(RuleBasedStateMachine):
    """Any order of moves on a tree of accounts, beside the simplest model there is: lists of amounts."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.lines = {name: line(name, limit=None) for name in ACCOUNTS}
        self.held: dict[int, Hold] = {}
        #: hold -> what it was told to have charged, once
        self.charges: dict[int, int] = {}
        self.loose = dict.fromkeys(ACCOUNTS, 0)
        #: what was let through although it was not available
        self.excess = dict.fromkeys(ACCOUNTS, 0)
        self.ends: dict[int, int] = {}

    def path(self, account: str) -> tuple[Line, ...]:
        names = account.split("/")
        return tuple(self.lines["/".join(names[: depth + 1])] for depth in range(len(names)))

    def put(self, path: Sequence[Line]) -> None:
        self.lines |= {one.account: one for one in path}

    def over(self) -> dict[str, int]:
        return {name: one.over for name, one in self.lines.items()}

    @rule(account=st.sampled_from(ACCOUNTS), limit=st.none() | st.integers(0, 200))
    def set_limit(self, account: str, limit: int | None) -> None:
        before = self.lines[account]
        self.lines[account] = before._replace(limit=limit)
        used = before.tally.spent + before.tally.held
        self.excess[account] = 0 if limit is None else max(0, used - limit)

    @rule(target=holds, account=st.sampled_from(ACCOUNTS), amount=AMOUNTS)
    def reserve(self, account: str, amount: int) -> Any:
        path = self.path(account)
        fits = all(one.available is None or one.available >= amount for one in path)
        on = tuple((one.account, one.window) for one in path)
        new = Hold(state="open", session="s", account=account, amount=amount, on=on, at=NOW)
        if not fits:
            with pytest.raises(BudgetShort) as caught:
                ledger.reserved(new, path)
            short = self.lines[caught.value.facts["account"]]
            assert short.available is not None and short.available < amount
            return multiple()
        settled = ledger.reserved(new, path)
        self.put(settled.path)
        number = len(self.held)
        self.held[number] = settled.hold
        return number

    @rule(account=st.sampled_from(ACCOUNTS), amount=AMOUNTS)
    def spend(self, account: str, amount: int) -> None:
        path = self.path(account)
        try:
            settled = ledger.entered(hold(amount), path, usage=None, now=NOW)
        except BudgetShort:
            assert any(one.available is not None and one.available < amount for one in path)
            return
        self.put(settled.path)
        for one in path:
            self.loose[one.account] += amount

    @rule(account=st.sampled_from(ACCOUNTS), cost=st.integers(0, 80))
    def cost(self, account: str, cost: int) -> None:
        before = self.over()
        settled = ledger.costed(hold(0), self.path(account), cost, usage=None, now=NOW)
        self.put(settled.path)
        for one in settled.path:
            self.loose[one.account] += cost
        self.note_excess(before, settled.hold.overdraft)

    @rule(number=holds, cost=st.integers(0, 80))
    def commit(self, number: int, cost: int) -> None:
        held, before = self.held[number], self.over()
        try:
            settled = ledger.committed(held, self.path(held.account), cost, usage=None, now=NOW)
        except Conflict:
            assert held.state in ("voided", "committed", "late")
            assert held.state == "voided" or held.charged != cost
            return
        if settled.again:
            assert held.charged == cost
            return
        self.end(number, settled)
        assert number not in self.charges, "a hold is charged once"
        self.charges[number] = cost
        self.note_excess(before, settled.hold.overdraft)

    @rule(number=holds)
    def void(self, number: int) -> None:
        held = self.held[number]
        try:
            settled = ledger.voided(held, self.path(held.account), now=NOW)
        except Conflict:
            assert held.state in ("committed", "late")
            return
        if not settled.again:
            self.end(number, settled)

    @rule(number=holds)
    def expire(self, number: int) -> None:
        held = self.held[number]
        try:
            settled = ledger.expired(held, self.path(held.account), why="", now=NOW)
        except Conflict:
            assert held.state != "open"
            return
        self.end(number, settled)

    def end(self, number: int, settled: ledger.Settled) -> None:
        if self.held[number].state == "open":
            self.ends[number] = self.ends.get(number, 0) + 1
        self.held[number] = settled.hold
        self.put(settled.path)

    def note_excess(self, before: dict[str, int], overdraft: int) -> None:
        grown = {name: one.over - before[name] for name, one in self.lines.items()}
        assert overdraft == max(0, *grown.values())
        for name, more in grown.items():
            self.excess[name] += max(0, more)

    @invariant()
    def every_account_is_what_its_holds_and_charges_add_up_to(self) -> None:
        for name, one in self.lines.items():
            standing = [n for n, held in self.held.items() if any(name == account for account, _ in held.on)]
            assert one.tally.held == sum(self.held[n].amount for n in standing if self.held[n].state == "open")
            assert one.tally.spent == self.loose[name] + sum(self.charges.get(n, 0) for n in standing)

    @invariant()
    def spent_and_held_and_available_are_the_limit(self) -> None:
        for name, one in self.lines.items():
            if one.limit is not None and one.available is not None:
                assert one.tally.spent + one.tally.held + one.available == one.limit
                assert one.over <= self.excess[name], "only an overdraft or a lowered limit goes over"

    @invariant()
    def each_hold_ends_once_and_is_in_a_state_of_the_table(self) -> None:
        assert all(times == 1 for times in self.ends.values())
        assert all(held.state in TRANSITIONS for held in self.held.values())
        assert set(self.ends) == {n for n, held in self.held.items() if held.state != "open"}


Books.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBooks = Books.TestCase


def test_a_hold_keeps_everything_else_that_it_says_when_it_ends() -> None:
    held = hold(10, task="T", fence=5, body="b", lease=9)
    done = ledger.committed(held, (line(held=10),), 10, usage=Usage(tokens_out=3), now=NOW, request="r").hold
    assert done == replace(held, state="committed", charged=10, usage=Usage(tokens_out=3), ended_at=NOW, request="r")
