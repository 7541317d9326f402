"""The replay alone: a table of its moves, and histories of which a part is lost and told again, in any order."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric.cli.lost import Lost, Span, Told
from ifabric.cli.reconcile import Mark, _gaps, span_of
from ifabric.clock import rfc3339
from ifabric.errors import BudgetShort, ConfigError, Conflict
from ifabric.store.base import KV
from ifabric.wire import replay as wire
from ifabric.wire.envelope import Usage
from ifabric.wire.governor import BudgetEvent, Window, path_of
from ifabric_actors.governor import ledger, records, replay
from ifabric_actors.governor.books import TASK, Place, kind_of
from ifabric_actors.governor.events import source
from ifabric_actors.governor.ledger import Line, Path, window_of
from ifabric_actors.governor.records import Account, Hold, Tally

#: ten minutes before midnight, and before the end of the month
NOW = int(datetime(2026, 11, 30, 23, 50, tzinfo=UTC).timestamp() * 1000)
ON: tuple[Place, ...] = (("acme", "total"),)


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def line(limit: int | None = 100, **tally: int) -> Line:
    return Line("acme", "total", limit, Tally(**tally))


def hold(state: Any = "open", amount: int = 10, **fields: Any) -> Hold:
    return Hold(state=state, session="s", account="acme", amount=amount, on=ON, at=NOW, **fields)


def entry(fate: wire.Fate, charged: int = 0, **fields: Any) -> wire.ReplayEntry:
    given = {"session": "s", "hold": "h", "account": "acme", "at": moment(NOW), "ended_at": moment(NOW + 1000)}
    return wire.ReplayEntry(fate=fate, charged_micro_usd=charged, amount_micro_usd=10, **{**given, **fields})


# -- the table --------------------------------------------------------------------------------------------------------


def test_what_the_backup_did_not_know_is_charged_as_it_was_also_over_the_limit() -> None:
    done = replay.replayed(entry("committed", 30, usage=Usage(tokens_in=3)), None, ON, (line(spent=95),))
    assert (done.done, done.charged, done.overdraft) == ("charged", 30, 25)
    assert done.path[0].tally == Tally(spent=125, overdraft=25)
    assert (done.hold.state, done.hold.charged, done.hold.amount, done.hold.on) == ("committed", 30, 10, ON)
    assert (done.hold.at, done.hold.ended_at, done.hold.usage) == (NOW, NOW + 1000, Usage(tokens_in=3))
    with pytest.raises(BudgetShort):
        ledger.spent((line(spent=95),), 30)


def test_a_hold_that_is_open_in_the_restored_ledger_is_charged_and_frees_what_it_held() -> None:
    done = replay.replayed(entry("committed", 4), hold(lease=7, body="b"), ON, (line(held=10),))
    assert (done.done, done.charged, done.path[0].tally) == ("charged", 4, Tally(spent=4))
    assert (done.hold.state, done.hold.lease, done.hold.body) == ("committed", 7, "b")
    assert replay.replayed(entry("late", 4), hold(), ON, (line(held=10),)).hold.state == "late"


@pytest.mark.parametrize("state", ["committed", "late"])
def test_the_same_charge_is_known_already(state: Any) -> None:
    known, path = hold(state, charged=4), (line(spent=4),)
    assert replay.replayed(entry("committed", 4), known, ON, path) == ("again", known, path, 0, 0)


@pytest.mark.parametrize(("state", "before", "more"), [("voided", 0, 9), ("expired", 0, 9), ("committed", 4, 5)])
def test_of_what_ended_in_another_way_only_the_difference_is_charged_and_late(
    state: Any, before: int, more: int
) -> None:
    known = hold(state, charged=before)
    done = replay.replayed(entry("committed", 9), known, ON, (line(spent=before),))
    assert (done.done, done.charged, done.hold.state, done.hold.charged) == ("added", more, "late", 9)
    assert done.path[0].tally == Tally(spent=9)
    again = replay.replayed(entry("committed", 9), done.hold, ON, done.path)
    assert (again.done, again.path) == ("again", done.path)


def test_what_was_charged_more_in_the_restored_cluster_stays_so() -> None:
    known = hold("committed", charged=12)
    assert replay.replayed(entry("committed", 9), known, ON, (line(spent=12),)).done == "again"


@pytest.mark.parametrize("fate", ["voided", "expired"])
def test_a_hold_that_the_journal_saw_end_is_freed_but_not_another_life_of_its_name(fate: Any) -> None:
    done = replay.replayed(entry(fate), hold(), ON, (line(held=10),))
    assert (done.done, done.hold.state, done.path[0].tally) == ("freed", fate, Tally())
    younger = Hold(state="open", session="s", account="acme", amount=10, on=ON, at=NOW + 2000)
    assert replay.replayed(entry(fate), younger, ON, (line(held=10),)).done == "again"


@pytest.mark.parametrize(("fate", "state"), [("open", "expired"), ("expired", "expired"), ("voided", "voided")])
def test_a_hold_that_nobody_remembers_is_kept_as_ended_and_holds_nothing(fate: Any, state: str) -> None:
    path = (line(spent=100),)
    done = replay.replayed(entry(fate, ended_at=None), None, ON, path)
    assert (done.done, done.hold.state, done.path, done.charged) == ("kept", state, path, 0)
    assert replay.replayed(entry(fate), done.hold, ON, path).done == "again"


def test_the_owner_of_a_hold_that_was_lost_is_charged_late_when_it_comes() -> None:
    kept = replay.replayed(entry("open", ended_at=None), None, ON, (line(),)).hold
    late = ledger.committed(kept, (line(),), 7, usage=None, now=NOW)
    assert (late.hold.state, late.path[0].tally.spent) == ("late", 7)


def test_an_open_hold_of_the_restored_ledger_stays_open_when_the_journal_knows_no_end() -> None:
    assert replay.act_of(entry("open", ended_at=None), hold()) == "again"


def test_where_a_hold_stood_is_as_the_journal_says_or_as_the_time_says() -> None:
    kinds: dict[str, Window] = {"acme": "day", "acme/r": "month"}
    told = entry("committed", 1, account="acme/r", windows=("2026-11-30", "total", "total"), task="T")
    assert replay.places_of(told, kinds) == (("acme", "2026-11-30"), ("acme/r", "total"), (TASK + "T", "total"))
    untold = entry("committed", 1, account="acme/r", at=moment(NOW), ended_at=moment(NOW + 3_600_000))
    assert replay.places_of(untold, kinds) == (("acme", "2026-11-30"), ("acme/r", "2026-11"))
    assert replay.fits(told) and replay.fits(untold)
    assert not replay.fits(entry("committed", 1, account="acme/r", windows=("total",)))
    assert not replay.fits(entry("committed", 1, windows=("total", "total")))


def test_a_limit_is_set_again_only_over_an_older_one_or_over_nobodys() -> None:
    given = wire.ReplayLimit(account="acme", limit_micro_usd=5, by="op", at=moment(NOW))
    assert replay.is_newer(given, Account())
    assert replay.is_newer(given, Account(limit=4, at=NOW + 1)), "made on first use"
    assert replay.is_newer(given, Account(limit=4, by="op", at=NOW - 1))
    assert not replay.is_newer(given, Account(limit=5, by="op", at=NOW))
    assert not replay.is_newer(given, Account(limit=4, by="op", at=NOW + 1))


# -- which events were lost -------------------------------------------------------------------------------------------


def event(what: str = "commit", revision: int = 11, at: int = NOW, **fields: Any) -> BudgetEvent:
    given = {"account": "acme", "hold": "h", "session": "s", "charged": 3 if what == "commit" else 0}
    return BudgetEvent(event=what, revision=revision, at=rfc3339(at), **{**given, **fields})


def told(*events: BudgetEvent, span: Span | None = None) -> Told:
    lost = Lost(span or Span(10, 1000, moment(NOW + 5000), moment(NOW - 1000)))
    for one in events:
        lost.add(one)
    return lost.told()


def test_what_is_older_than_the_backup_or_of_the_restored_cluster_was_not_lost() -> None:
    assert told(event(revision=10)).entries == ()
    assert len(told(event(revision=11)).entries) == 1
    assert told(event(revision=1000, at=NOW + 6000)).entries == ()
    assert len(told(event(revision=999, at=NOW + 6000)).entries) == 1, (
        "before its first revision, whatever a clock says"
    )
    not_bumped = Span(10, 11, moment(NOW + 5000))
    assert len(told(event(revision=500), span=not_bumped).entries) == 1, "restored without a bump, the time decides"
    assert told(event(revision=500, at=NOW + 5000), span=not_bumped).entries == ()


def test_a_hold_is_one_entry_whatever_became_of_it() -> None:
    (one,) = told(
        event("hold", 11, NOW - 9, amount=10, windows=("2026-11-30",)),
        event("expired", 12, NOW + 1, amount=10, windows=("2026-11-30",)),
        event("commit", 13, NOW + 2, amount=10, charged=8, late=True, windows=("2026-11-30",), task="T", fence=5),
        event("commit", 13, NOW + 2, amount=10, charged=8, late=True, windows=("2026-11-30",), task="T", fence=5),
        event("overdraft", 13, NOW + 2, overdraft=8),
    ).entries
    assert (one.fate, one.charged_micro_usd, one.amount_micro_usd, one.windows) == ("late", 8, 10, ("2026-11-30",))
    assert (one.at, one.ended_at, one.task, one.fence) == (moment(NOW - 9), moment(NOW + 2), "T", 5)
    (still,) = told(event("hold", amount=10)).entries
    assert (still.fate, still.ended_at, still.windows) == ("open", None, ("total",))
    assert [e.fate for e in told(event("hold"), event("void", 12)).entries] == ["voided"]


def test_the_last_limit_of_an_operator_counts_and_one_made_on_first_use_does_not() -> None:
    found = told(
        event("account", 11, limit=5, window="day", note="set by op"),
        event("account", 12, NOW + 1, limit=None, window="total", note="set by op-2"),
        event("account", 13, account="acme/@s", limit=40, note="made on first use"),
    )
    assert [(one.account, one.limit_micro_usd, one.window, one.by) for one in found.limits] == [
        ("acme", None, "total", "op-2")
    ]


def test_what_no_daemon_can_have_told_is_left_out_and_counted() -> None:
    found = told(event(at=NOW, session="no session!"), event(account=""), event(charged=-1, hold="i"), event(hold="j"))
    assert ([one.hold for one in found.entries], found.unreadable) == (["j"], 3)
    lost = Lost(Span(10, 1000, moment(NOW)))
    lost.add(BudgetEvent(event="commit", at="yesterday", revision=11))
    assert lost.told().unreadable == 1


def test_a_journal_that_does_not_reach_back_or_has_a_gap_is_called_so() -> None:
    span = Span(10, 1000, moment(NOW + 5000), moment(NOW - 1000))
    assert _gaps(Mark(rfc3339(NOW - 62_000), 400), span, told()) == []
    assert _gaps(Mark(rfc3339(NOW - 62_000)), span, told()) == []
    assert _gaps(Mark(rfc3339(NOW), 10), span, told()) == []
    assert _gaps(Mark(rfc3339(NOW - 1001), 11), span, told()), "the revision is exact, the time is not"
    assert "begins at" in _gaps(Mark(rfc3339(NOW), 11), span, told())[0]
    assert "does not say" in _gaps(Mark(), span, told())[0]
    assert "empty" in _gaps(None, span, told())[0]
    there = Mark(rfc3339(NOW - 2000), 10)
    assert "has lost events" in _gaps(there, span, told(event("resync", 50)))[0]
    assert _gaps(there, span, told(event("resync", 1001, NOW + 6000))) == [], "the restored cluster's own is no gap"


def test_without_a_restore_that_is_known_both_ends_are_to_be_said() -> None:
    unknown = wire.RestoredReply(restored=None)
    for since, at in ((None, None), (5, None), (None, "2026-11-25")):
        with pytest.raises(ConfigError, match="does not know of a restore"):
            span_of(unknown, since, at)
    assert span_of(unknown, 5, "2026-11-25T09:30:00") == (5, 0, datetime(2026, 11, 25, 9, 30, tzinfo=UTC), None)
    with pytest.raises(ConfigError, match="is no date"):
        span_of(unknown, 5, "yesterday")
    restored = wire.Restore(revision=7, at=rfc3339(NOW), restored_at=rfc3339(NOW + 9), incarnation=2)
    known = wire.RestoredReply(restored=restored, began_revision=1000)
    assert span_of(known, None, None) == (7, 1000, moment(NOW + 9), moment(NOW))


# -- any history, any loss, any replay --------------------------------------------------------------------------------


class World:
    """A ledger in memory: records and tallies, and the events that tell of them."""

    def __init__(self, kinds: dict[str, Window], limits: dict[str, int | None]) -> None:
        self.kinds, self.limits = kinds, limits
        self.holds: dict[str, Hold] = {}
        self.tallies: dict[Place, Tally] = {}
        self.events: list[BudgetEvent] = []
        self.revision = 0

    def copy(self) -> World:
        made = World(self.kinds, self.limits)
        made.holds, made.tallies, made.revision = dict(self.holds), dict(self.tallies), self.revision
        return made

    def at(self, on: tuple[Place, ...]) -> Path:
        found = []
        for account, window in on:
            kind = kind_of(window)
            limit = self.limits.get(account) if self.kinds.get(account) == kind else None
            found.append(Line(account, window, limit, self.tallies.get((account, window), Tally()), kind))
        return tuple(found)

    def write(self, name: str, after: Hold, path: Path) -> None:
        self.holds[name] = after
        self.tallies |= {(one.account, one.window): one.tally for one in path}
        self.revision += 1
        kv = KV(records.hold_key("s", name), b"", 1, self.revision, 1, 0)
        for _, body, _ in TELL.tell(kv, after):
            self.events.append(DECODE(body))

    def reserve(self, name: str, account: str, amount: int, now: int, *, spend: bool, task: bool) -> None:
        on = tuple((one, window_of(self.kinds[one], now)) for one in path_of(account))
        if task:
            on += ((TASK + "T", "total"),)
        new = Hold(
            state="open", session="s", account=account, amount=amount, on=on, at=now, task="T" if task else "", body="b"
        )
        try:
            made = ledger.entered(new, self.at(on), usage=None, now=now) if spend else ledger.reserved(new, self.at(on))
        except BudgetShort:
            return
        self.write(name, made.hold, made.path)

    def end(self, name: str, how: str, cost: int, now: int) -> None:
        known = self.holds[name]
        try:
            if how == "commit":
                made = ledger.committed(known, self.at(known.on), cost, usage=None, now=now)
            elif how == "void":
                made = ledger.voided(known, self.at(known.on), now=now)
            else:
                made = ledger.expired(known, self.at(known.on), why="", now=now)
        except Conflict:
            return
        if not made.again:
            self.write(name, made.hold, made.path)

    def replay(self, one: wire.ReplayEntry) -> replay.Replayed:
        known = self.holds.get(one.hold)
        on = known.on if known is not None else replay.places_of(one, self.kinds)
        done = replay.replayed(one, known, on, self.at(on))
        if done.done != "again":
            self.write(one.hold, done.hold, done.path)
        return done

    def sums(self) -> dict[Place, int]:
        return {place: tally.spent for place, tally in self.tallies.items() if tally.spent}

    def held(self) -> dict[Place, int]:
        return {place: tally.held for place, tally in self.tallies.items() if tally.held}


TELL = source(lambda kv: None, lambda kv, record: [])
DECODE = msgspec.json.Decoder(BudgetEvent).decode

ACCOUNTS = ("a", "a/b", "a/b/@s", "c")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("reserve", "spend", "commit", "commit", "void", "expire")),
        st.integers(0, 7),
        st.sampled_from(ACCOUNTS),
        st.integers(0, 40),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)
KINDS = st.fixed_dictionaries({name: st.sampled_from(("total", "day", "month")) for name in ACCOUNTS})
LIMITS = st.fixed_dictionaries({name: st.sampled_from((None, 50, 200)) for name in ACCOUNTS})


@settings(max_examples=400, deadline=None)
@given(STEPS, KINDS, LIMITS, st.floats(0, 1), st.randoms(use_true_random=False))
def test_a_replay_in_any_order_with_repetitions_is_the_ledger_without_the_loss(
    steps: list[tuple[str, int, str, int, bool]],
    kinds: dict[str, Window],
    limits: dict[str, int | None],
    cut: float,
    chance: random.Random,
) -> None:
    world = World(kinds, limits)
    snapshot: World | None = None
    for number, (what, which, account, amount, task) in enumerate(steps):
        if snapshot is None and number >= cut * len(steps):
            snapshot = world.copy()
        now, name = NOW + number * 60_000, f"h{which}"
        if what in ("reserve", "spend"):
            if name not in world.holds:
                world.reserve(name, account, amount, now, spend=what == "spend", task=task)
        elif name in world.holds:
            world.end(name, what, amount, now)
    backup = snapshot or world.copy()

    lost = Lost(Span(backup.revision, 2**62, moment(NOW * 2), None))
    for one in world.events:
        lost.add(one)
    entries = list(lost.told().entries)
    restored = backup.copy()
    first = chance.sample(entries, chance.randint(0, len(entries)))  # a run that was interrupted
    told_again = [*first, *chance.choices(entries, k=len(entries) // 2)] if entries else []
    chance.shuffle(entries)
    charged = sum(restored.replay(one).charged for one in (*told_again, *entries))

    assert restored.sums() == world.sums()
    still = {name for name, one in backup.holds.items() if one.state == "open" and world.holds[name].state == "open"}
    expected: dict[Place, int] = {}
    for one in (backup.holds[name] for name in still):
        for place in one.on:
            expected[place] = expected.get(place, 0) + one.amount
    assert restored.held() == {place: amount for place, amount in expected.items() if amount}
    assert charged == sum(one.charged for one in world.holds.values()) - sum(
        one.charged for one in backup.holds.values()
    )
    assert {restored.replay(one).done for one in entries} <= {"again"}
    assert set(restored.holds) == set(world.holds), "every name is known: a commit that comes later is charged"


@settings(max_examples=100, deadline=None)
@given(st.permutations([("committed", 5), ("committed", 3), ("voided", 0), ("expired", 0), ("late", 7), ("open", 0)]))
def test_whatever_the_journal_tells_of_one_name_the_dearest_is_charged_once(tale: list[tuple[wire.Fate, int]]) -> None:
    for known in (None, hold(), hold("voided"), hold("expired"), hold("committed", charged=4)):
        path = (line(None, held=10 if known and known.state == "open" else 0, spent=known.charged if known else 0),)
        now = known
        for fate, charged in tale:
            done = replay.replayed(entry(fate, charged), now, ON, path)
            now, path = done.hold, done.path
        assert path[0].tally == Tally(spent=7)
        assert now is not None and now.charged == 7
