"""The story of one thing: what the three sources tell is one line each, and every state has its words and its advice."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from msgspec.structs import replace

from ifabric.cli.app import build
from ifabric.cli.match import advise
from ifabric.explaining import (
    AccountFacts,
    BreakerFacts,
    Dependency,
    SessionFacts,
    Sources,
    Story,
    TaskFacts,
    account_story,
    breaker_story,
    session_story,
    task_story,
)  # fmt: skip
from ifabric.explaining.happenings import _BREAKER, _TASK, of_budgets, of_history, of_tasks
from ifabric.explaining.merging import CAUSES, is_look, merged
from ifabric.explaining.story import Line as StoryLine
from ifabric.explaining.story import ago, many, seconds, some, span, told, usd
from ifabric.wire.audit import AuditRecord
from ifabric.wire.coordinator import EVENTS, FURTHER_EVENTS, GetReply, State, TaskEvent, TaskSpec, Transition
from ifabric.wire.governor import (
    BREAKER_EVENTS,
    BUDGET_EVENTS,
    BalanceReply,
    BreakerEvent,
    BreakerLine,
    BudgetEvent,
    Candidate,
    HoldLine,
    Line,
    MatchEvent,
    MatchReply,
)  # fmt: skip
from ifabric.wire.overview import SessionLine
from ifabric.wire.protocol import REQUESTS

NUMBERS = itertools.count(1)


def at(second: float) -> str:
    """So many seconds after 10:00."""
    minutes, rest = divmod(second, 60)
    return f"2026-11-28T10:{int(minutes):02}:{rest:06.3f}Z"


NOW = at(600)


def audit(verb: str, second: float, *, component: str = "coordinator", **changes: Any) -> AuditRecord:
    made = AuditRecord(
        at=at(second), chain="c", n=next(NUMBERS), prev="", component=component, verb=verb, session="alice", took_ms=2.0,
        request_id=f"r{next(NUMBERS)}",
    )  # fmt: skip
    return replace(made, **changes)


def refused(verb: str, second: float, code: str, why: str = "because", **changes: Any) -> AuditRecord:
    return audit(verb, second, outcome="refused", code=code, why=why, **changes)


def event(what: str, second: float, **changes: Any) -> TaskEvent:
    return replace(TaskEvent(event=what, at=at(second), revision=1, task="T", session="alice"), **changes)


def line(what: str, second: float, session: str = "alice", fence: int = 0, note: str = "") -> Transition:
    return Transition(at=at(second), event=what, session=session, fence=fence, note=note)


def money(what: str, second: float, **changes: Any) -> BudgetEvent:
    made = BudgetEvent(
        event=what, at=at(second), revision=1, account="acme/@alice", hold="h", session="alice", task="T", fence=7
    )
    return replace(made, **changes)


def record(state: State, *history: Transition, **changes: Any) -> GetReply:
    spec = TaskSpec(id="T", title="build", needs=("rust",), max_attempts=3)
    made = GetReply(task="T", state=state, attempt=1, spec=spec, history=history or (line("submitted", 0),), revision=1)
    return replace(made, **changes)


def matched(*ranked: Candidate) -> MatchReply:
    return MatchReply(ranked=ranked, min_score=0.7, sessions=len(ranked))


def pending(*ranked: Candidate, open_breakers: tuple[str, ...] = (), **changes: Any) -> TaskFacts:
    found, reply = record("pending", **changes), matched(*ranked)
    return TaskFacts(
        task="T", now=NOW, record=found, matched=reply, advice=advise(found, reply), open_breakers=open_breakers
    )


def facts(state: State, *history: Transition, sources: Sources | None = None, **changes: Any) -> TaskFacts:
    named = {key: changes.pop(key) for key in ("dependencies", "holder", "sessions_read", "holds") if key in changes}
    return TaskFacts(
        task="T", now=NOW, record=record(state, *history, **changes), sources=sources or Sources(), **named
    )


def words(story: Story) -> str:
    return "\n".join((*story.now, "DO", *story.do))


# -- one line for one thing ------------------------------------------------------------------------------------------


def test_record_event_and_audit_of_one_claim_are_one_line() -> None:
    lines = merged(
        (*of_history("T", [line("claimed", 1, fence=7)]), *of_tasks([event("claimed", 1, fence=7)])),
        [audit("next", 1.002, task="T", fence=7, request_id="r1", took_ms=3.5)],
    )
    assert len(lines) == 1
    [only] = lines
    assert (only.who, only.took_ms, only.request_id, only.sources) == ("alice", 3.5, "r1", ("record", "event", "audit"))


@pytest.mark.parametrize(
    "other",
    [
        {"fence": 8},
        {"session": "bob"},
        {"task": "U"},
        {"at": at(30)},
        {"verb": "complete"},
        {"outcome": "refused", "code": "claim_taken"},
        {"outcome": "error"},
    ],
)
def test_a_command_that_is_another_one_stays_a_line_of_its_own(other: dict[str, Any]) -> None:
    command = replace(audit("claim", 1.002, task="T", fence=7), **other)
    lines = merged(of_tasks([event("claimed", 1, fence=7)]), [command])
    assert len(lines) == 2
    assert [one.sources for one in lines] == [("event",), ("audit",)]


def test_a_slow_command_is_known_by_how_long_it_took() -> None:
    lines = merged(
        of_tasks([event("completed", 1, fence=7)]), [audit("complete", 9, task="T", fence=7, took_ms=8500.0)]
    )
    assert [one.sources for one in lines] == [("event", "audit")]


def test_two_of_a_kind_without_a_fence_go_to_the_nearer_commands() -> None:
    events = [
        event("cancelled", 1.0, session="ann"),
        event("requeued", 1.5, session="ann"),
        event("cancelled", 2.0, session="ann"),
    ]
    lines = merged(
        of_tasks(events),
        [
            audit("cancel", 1.01, task="T", session="ann", request_id="a"),
            audit("cancel", 2.01, task="T", session="ann", request_id="b"),
        ],
    )
    assert [one.request_id for one in lines] == ["a", "", "b"]


def test_one_command_may_have_caused_several_things() -> None:
    happened = (*of_tasks([event("failed", 1, fence=7), event("dead", 1, fence=7)]), *of_budgets([money("commit", 1)]))
    lines = merged(happened, [audit("fail", 1.01, task="T", fence=7)])
    assert [one.sources for one in lines] == [("event", "audit")] * 3


def test_a_retry_that_got_the_first_answer_is_not_told_again() -> None:
    lines = merged(
        of_tasks([event("completed", 1, fence=7)]),
        [audit("complete", t, task="T", fence=7, request_id="same") for t in (1.01, 90.0)],
    )
    assert len(lines) == 1


def test_a_refusal_again_and_again_is_one_line_with_a_count() -> None:
    many_times = [
        refused("claim", second, "claim_taken", f"bob has it for {9 - second} s", task="T") for second in (1, 2, 3)
    ]
    other = refused("claim", 4, "budget_short", task="T")
    again = refused("claim", 5, "claim_taken", task="T")
    lines = merged((), [*many_times, other, again])
    assert [(one.times, one.until) for one in lines] == [(3, at(3)), (1, ""), (1, "")]
    assert "bob has it for 8 s" in lines[0].what


def test_looking_leaves_no_trace_and_what_is_refused_for_cause_does() -> None:
    looks = [
        audit("get", 1, task="T"),
        refused("get", 2, "unknown_task", task="T"),
        audit("renew", 3),
        audit("sessions", 4, admin=True),
    ]
    assert merged((), looks) == []
    told_of = [refused("renew", 5, "session_lost"), refused("list", 6, "forbidden")]
    assert len(merged((), told_of)) == 2


def test_an_error_of_ours_is_told_as_one() -> None:
    [only] = merged((), [audit("claim", 1, task="T", outcome="error", code="internal", why="a bug")])
    assert (only.tone, "the daemon failed: a bug" in only.what) == ("bad", True)


@pytest.mark.parametrize("apart_s", [0.001, 0.1])
def test_a_long_story_takes_no_longer_for_each_of_its_lines(apart_s: float) -> None:
    """A session of a day has tens of thousands of claims; each command is looked for near its time alone."""
    number = 4000
    events = [event("claimed", n * apart_s, task=f"T{n}", fence=n + 1) for n in range(number)]
    commands = [audit("next", n * apart_s, task=f"T{n}", fence=n + 1) for n in range(number)]
    calls = [audit("report", n * apart_s, component="governor", breaker="b") for n in range(number)]
    begun = time.process_time()
    facts = SessionFacts(session="alice", now=NOW, sources=Sources(tasks=tuple(events), audit=(*commands, *calls)))
    story = session_story(facts, most=number)
    assert time.process_time() - begun < 3
    assert {one.sources for one in story.lines} == {("event", "audit")}
    assert len(story.lines) == number


def test_the_lines_are_in_the_order_of_time_whoever_tells() -> None:
    lines = merged(
        of_tasks([event("claimed", 5, fence=7), event("submitted", 1)]), [refused("claim", 3, "breaker_open", task="T")]
    )
    assert [one.at for one in lines] == [at(1), at(3), at(5)]


def test_every_event_has_its_words_and_every_cause_is_a_verb_and_an_event() -> None:
    assert set(_TASK) | {"resync"} == {*EVENTS, *FURTHER_EVENTS}
    assert set(_BREAKER) == set(BREAKER_EVENTS)
    verbs = {(request.component, request.verb) for request in REQUESTS}
    events = {
        *(("task", e) for e in _TASK),
        *(("budget", e) for e in BUDGET_EVENTS),
        *(("breaker", e) for e in BREAKER_EVENTS),
    }
    assert set(CAUSES) <= verbs
    assert {one for causes in CAUSES.values() for one in causes} <= events
    assert not any(is_look(audit(verb, 1, component=component)) for component, verb in CAUSES)


@pytest.mark.parametrize("what", BUDGET_EVENTS)
def test_every_event_of_money_says_how_much(what: str) -> None:
    told_of = list(of_budgets([money(what, 1, amount=250_000, charged=250_000, limit=250_000, overdraft=1, late=True)]))
    assert what == "overdraft" or "0.25 USD" in told_of[0].what


# -- tasks -----------------------------------------------------------------------------------------------------------

ALICE = SessionLine(session="alice", capabilities=("rust",), ttl_s=60.0, claims=("T",), held=1, account="acme")
ABLE = Candidate(session="bob", score=0.9, missing=(), reason="has all", matches=True)
LACKS = Candidate(session="bob", score=0.0, missing=("rust",), reason="lacks rust")
TRIES = (line("submitted", 0), line("claimed", 1, fence=7), line("expired", 61, fence=7), line("claimed", 70, fence=8))
#: facts, and what "now" and "do" must have in them
TASKS: list[tuple[str, TaskFacts, tuple[str, ...], tuple[str, ...]]] = [
    ("pending, somebody can", pending(ABLE), ("pending for 10 min: attempt 2 of 3", "1 of 1 session can take it"), ("nothing",)),
    ("pending, nobody can", pending(LACKS), ("Nobody can take it", "lacks rust"), ("start an agent with the capabilities rust", "ifabric match explain T")),
    ("pending, nobody there", pending(), ("No session is there",), ("start an agent",)),
    ("pending, a breaker in the way", pending(LACKS, open_breakers=("rust",)), ("The breaker rust is not closed",), ("ifabric explain rust --breaker",)),
    ("pending, another breaker", pending(LACKS, open_breakers=("x",)), ("Nobody can take it",), ("match explain T",)),
    ("pending, governor away", facts("pending"), ("It is pending",), ("ifabric match explain T",)),
    ("pending after expiries", replace(pending(ABLE), record=record("pending", *TRIES[:3])), ("ended 1 time without a word",), ("nothing",)),
    ("pending after failures", replace(pending(ABLE), record=record("pending", line("failed", 5, note="boom"))), ("failed 1 time, at last with: boom",), ()),
    ("blocked", facts("blocked", waiting_for=("A", "B"), dependencies=(Dependency(task="A", state="dead"), Dependency(task="B", state="claimed"))),
     ("waits for 2 tasks", "A is dead", "B is claimed"), ("ifabric task requeue A",)),
    ("blocked by the pending", facts("blocked", waiting_for=("A",), dependencies=(Dependency(task="A", state="pending"),)), ("A is pending",), ("ifabric explain A --task",)),
    ("blocked by the cancelled", facts("blocked", waiting_for=("A",), dependencies=(Dependency(task="A", state="cancelled"),)), ("A is cancelled",), ("ifabric task requeue A",)),
    ("blocked by the unreadable", facts("blocked", waiting_for=("A",), dependencies=(Dependency(task="A"),)), ("A is not readable",), ()),
    ("blocked by many", facts("blocked", waiting_for=tuple("ABCDE"), dependencies=(Dependency(task="A", state="claimed"),)), ("waits for 4 more",), ("nothing",)),
    ("claimed", facts("claimed", *TRIES, session="alice", fence=8, holder=ALICE, attempt=2),
     ("alice holds it, under fence 8, for 9 min now (attempt 2 of 3)", "within every 60 s", "ended 1 time without a word"), ("ifabric explain alice --session",)),
    ("claimed with a deadline", facts("claimed", line("claimed", 540, fence=8), session="alice", fence=8, holder=ALICE, spec=TaskSpec(id="T", deadline_s=100)),
     ("ends in 40 s, at its deadline of 100 s",), ()),
    ("claimed by the dead", facts("claimed", *TRIES, session="alice", fence=8, holder=None), ("alice is not there any more",), ("nothing",)),
    ("claimed by who knows", facts("claimed", *TRIES, session="alice", fence=8, holder=None, sessions_read=False), ("alice holds it",), ("nothing, while its holder works",)),
    ("done", facts("done", line("completed", 300), attempt=2, sources=Sources(budgets=(money("commit", 300, charged=1_500_000),))),
     ("It is done, by alice 5 min ago, with attempt 2 of 3", "It has cost 1.50 USD"), ("nothing",)),
    ("done for nothing", facts("done", line("completed", 300)), ("No cost was told",), ("nothing",)),
    ("done, events unread", facts("done", line("completed", 300), sources=Sources(events_read=False)), ("It is done",), ("nothing",)),
    ("dead", facts("dead", line("failed", 1, note="boom"), line("failed", 2, note="bang"), line("dead", 2), error="bang", attempt=3),
     ("all of its 3 attempts are spent", "It failed with: boom", "It failed with: bang"), ("ifabric task requeue T",)),
    ("dead of expiries", facts("dead", *TRIES, line("expired", 130, fence=8), line("dead", 130), error="expired"),
     ("ended 2 times without a word",), ("ttl_s", "ifabric task requeue T")),
    ("cancelled", facts("cancelled", line("cancelled", 480, session="ann")), ("taken off the board by ann 2 min ago",), ("ifabric task requeue T", "ifabric task purge T")),
    ("purged", TaskFacts(task="T", now=NOW, sources=Sources(tasks=(event("purged", 480),))), ("not on the board any more", "`purged`, 2 min ago"), ("nothing",)),
    ("held money", facts("claimed", *TRIES, session="alice", fence=8, holder=ALICE, holds=(HoldLine(hold="h", session="alice", account="acme/@alice", amount=200_000, at=at(70), task="T"),)),
     ("0.20 USD of acme/@alice are held for it, as long as its claim (h)",), ()),
]  # fmt: skip


@pytest.mark.parametrize(("of", "now", "do"), [row[1:] for row in TASKS], ids=[row[0] for row in TASKS])
def test_a_task_is_told_as_it_stands_with_what_to_do(of: TaskFacts, now: tuple[str, ...], do: tuple[str, ...]) -> None:
    story = task_story(of)
    said, advice = "\n".join(story.now), "\n".join(story.do)
    assert [one for one in now if one not in said] == [], said
    assert [one for one in do if one not in advice] == [], advice
    assert story.do, "there is always a word of advice, if only that there is nothing to do"


def test_a_cost_is_only_claimed_to_be_nothing_when_events_were_read() -> None:
    assert "No cost" not in words(task_story(facts("done", line("completed", 300), sources=Sources(events_read=False))))


def test_a_charge_that_was_told_twice_is_counted_once() -> None:
    twice = (money("commit", 300, charged=500_000), money("commit", 300, charged=500_000))
    assert "It has cost 0.50 USD" in words(
        task_story(facts("done", line("completed", 300), sources=Sources(budgets=twice)))
    )


def test_the_story_of_a_task_nobody_could_take_says_so_where_it_happened() -> None:
    found = MatchEvent(event="unmatched", at=at(9), needs=("gpu",), missing=("gpu",), tasks=3, example="T")
    story = task_story(replace(pending(LACKS), sources=Sources(matches=(found,))))
    assert "nobody can take it and 2 like it: gpu would do" in story.lines[-1].what


# -- sessions --------------------------------------------------------------------------------------------------------


def balance(*path: Line, holds: tuple[HoldLine, ...] = (), below: tuple[Line, ...] = ()) -> BalanceReply:
    return BalanceReply(path=path, holds=holds, below=below)


def account(name: str, limit: int | None, spent: int, held: int = 0) -> Line:
    return Line(
        account=name, limit=limit, spent=spent, held=held, available=None if limit is None else limit - spent - held
    )


OWN = balance(account("acme", 10_000_000, 10_000_000), account("acme/@alice", 40_000_000, 1_000_000))
SESSIONS: list[tuple[str, SessionFacts, tuple[str, ...], tuple[str, ...]]] = [
    ("there", SessionFacts(session="alice", now=NOW, line=ALICE), ("TTL of 60 s, spends from acme", "It holds 1 task: T"), ("nothing",)),
    ("idle", SessionFacts(session="alice", now=NOW, line=replace(ALICE, claims=(), held=0)), ("It holds no task",), ("nothing",)),
    ("gone", SessionFacts(session="alice", now=NOW, sources=Sources(tasks=(event("claimed", 480),))), ("It is not there", "2 min ago"), ("nothing",)),
    ("unreadable", SessionFacts(session="alice", now=NOW, sessions_read=False), ("could not be read",), ()),
    ("lost a claim", SessionFacts(session="alice", now=NOW, line=ALICE, sources=Sources(tasks=(event("expired", 300, note="its session ended"),))),
     ("It lost 1 claim, the last one 5 min ago: T, its session ended",), ("see why it did not renew",)),
    ("refused", SessionFacts(session="alice", now=NOW, line=ALICE, sources=Sources(audit=(
        refused("next", 1, "no_task_matches"), refused("next", 2, "no_task_matches"), refused("admit", 3, "breaker_open", component="governor")))),
     ("It was refused 3 times: no_task_matches 2x, breaker_open 1x",), ("ifabric breaker list", "ifabric task list --state pending")),
    ("short", SessionFacts(session="alice", now=NOW, line=ALICE, balance=OWN),
     ("acme/@alice: 1.00 USD spent and 0.00 USD held of 40.00 USD", "acme has nothing left"), ("ifabric explain acme --account",)),
    ("short by the audit", SessionFacts(session="alice", now=NOW, line=ALICE, sources=Sources(audit=(refused("spend", 1, "budget_short", component="governor"),))),
     ("budget_short 1x",), ("ifabric explain acme/@alice --account",)),
    ("forbidden", SessionFacts(session="alice", now=NOW, line=ALICE, sources=Sources(audit=(refused("cancel", 1, "forbidden"),))), ("forbidden 1x",), ("ifabric playbook security",)),
    ("calls", SessionFacts(session="alice", now=NOW, line=ALICE, sources=Sources(audit=tuple(
        audit(verb, second, component="governor", breaker="gpt") for second in range(3) for verb in ("admit", "report")))), ("called through breakers: gpt 3x",), ("nothing",)),
    ("holds", SessionFacts(session="alice", now=NOW, line=ALICE, balance=balance(account("@alice", None, 0), holds=(HoldLine(hold="h", session="alice", account="@alice", amount=1, at=at(1)),))),
     ("without a limit", "It has 1 hold open: h"), ()),
]  # fmt: skip


@pytest.mark.parametrize(("of", "now", "do"), [row[1:] for row in SESSIONS], ids=[row[0] for row in SESSIONS])
def test_a_session_is_told_as_it_stands_with_what_to_do(
    of: SessionFacts, now: tuple[str, ...], do: tuple[str, ...]
) -> None:
    story = session_story(of)
    said, advice = "\n".join(story.now), "\n".join(story.do)
    assert [one for one in now if one not in said] == [], said
    assert [one for one in do if one not in advice] == [], advice


def test_a_session_s_lines_name_the_task_and_leave_its_calls_to_a_count() -> None:
    calls = tuple(audit("admit", second, component="governor", breaker="gpt") for second in range(50))
    story = session_story(
        SessionFacts(session="alice", now=NOW, sources=Sources(tasks=(event("claimed", 1, fence=7),), audit=calls))
    )
    assert [one.what for one in story.lines] == ["T: claimed under fence 7"]


# -- accounts --------------------------------------------------------------------------------------------------------

HOLD = HoldLine(
    hold="h1", session="bob", account="acme/@bob", amount=4_000_000, at=at(300), task="T", expires_in_s=90.0
)
ACCOUNTS: list[tuple[str, AccountFacts, tuple[str, ...], tuple[str, ...]]] = [
    ("well", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", 10_000_000, 1_000_000))), ("1.00 USD spent, 0.00 USD held, of 10.00 USD: 9.00 USD available", "No hold is open"), ("nothing",)),
    ("no limit", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", None, 5))), ("without a limit of its own",), ("nothing",)),
    ("nearly", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", 10, 8))), ("available",), ("ifabric budget statement acme",)),
    ("used up", AccountFacts(account="acme/a", now=NOW, balance=balance(account("acme", 5_000_000, 1_000_000, 4_000_000), account("acme/a", None, 0), holds=(HOLD,))),
     ("acme, above it, has 0.00 USD available of 5.00 USD", "1 hold", "h1 of bob for T, was placed 5 min ago, ends in 90 s"),
     ("ifabric budget set acme AMOUNT", "4.00 USD are held", "ifabric budget holds acme/a")),
    ("a window", AccountFacts(account="acme", now=NOW, balance=balance(replace(account("acme", 5, 5), window="day"))), ("spent today",), ("--window day",)),
    ("overdraft", AccountFacts(account="acme", now=NOW, balance=balance(replace(account("acme", 5, 7), overdraft=2))), ("charged that were not available",), ("budget set",)),
    ("spenders below", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", None, 9), below=(account("acme/a", None, 1), account("acme/b", None, 8), account("acme/b/c", None, 8)))),
     ("Spent the most below it: acme/b 0.000008 USD, acme/a",), ()),
    ("spenders by the journal", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", None, 9)), sources=Sources(budgets=(money("commit", 1, charged=9), money("hold", 1, charged=0)))),
     ("as far as the journal tells: alice 0.000009 USD",), ()),
    ("refusals", AccountFacts(account="acme", now=NOW, balance=balance(account("acme", 5, 5)), sources=Sources(audit=(refused("spend", 1, "budget_short", component="governor"),))),
     ("Refused for want of money: 1 request of alice",), ()),
    ("gone", AccountFacts(account="acme", now=NOW), ("There is no such account",), ("nothing",)),
]  # fmt: skip


@pytest.mark.parametrize(("of", "now", "do"), [row[1:] for row in ACCOUNTS], ids=[row[0] for row in ACCOUNTS])
def test_an_account_is_told_as_it_stands_with_what_to_do(
    of: AccountFacts, now: tuple[str, ...], do: tuple[str, ...]
) -> None:
    story = account_story(of)
    said, advice = "\n".join(story.now), "\n".join(story.do)
    assert [one for one in now if one not in said] == [], said
    assert [one for one in do if one not in advice] == [], advice


# -- breakers --------------------------------------------------------------------------------------------------------

OPENED = BreakerEvent(
    event="opened",
    at=at(570),
    revision=1,
    breaker="gpt",
    state="open",
    trips=1,
    probe_in_s=60.0,
    why="5 of 5 calls failed",
)
OPEN = BreakerLine(
    breaker="gpt",
    state="open",
    failures=5,
    calls=5,
    opened_ago_s=30.0,
    probe_in_s=30.0,
    trips=1,
    why="5 of 5 calls failed",
)
REPORTS = tuple(audit("report", second, component="governor", breaker="gpt") for second in (560, 565, 570.01, 590))
BREAKERS: list[tuple[str, BreakerFacts, tuple[str, ...], tuple[str, ...]]] = [
    ("open", BreakerFacts(breaker="gpt", now=NOW, line=OPEN, sources=Sources(breakers=(OPENED,), audit=REPORTS)),
     ("open for 30 s: 5 of 5 calls failed. The next probe goes in 30 s", "reported calls before it opened", "alice 3x"), ("nothing, if the provider comes back", "ifabric breaker close gpt")),
    ("probing", BreakerFacts(breaker="gpt", now=NOW, line=replace(OPEN, probe_in_s=-2.0)), ("The next probe may go now",), ()),
    ("half open", BreakerFacts(breaker="gpt", now=NOW, line=replace(OPEN, state="half_open")), ("half open for 30 s",), ()),
    ("by hand", BreakerFacts(breaker="gpt", now=NOW, line=replace(OPEN, by="ann", why="invoice", probe_in_s=None)), ("ann holds it open for 30 s: invoice. It stays open",), ("ask ann",)),
    ("flapping", BreakerFacts(breaker="gpt", now=NOW, line=replace(OPEN, trips=3)), ("tripped 3 times",), ("ifabric playbook breaker-flapping",)),
    ("refusing", BreakerFacts(breaker="gpt", now=NOW, line=OPEN, sources=Sources(audit=(refused("admit", 590, "breaker_open", component="governor", breaker="gpt"),)), waiting=2),
     ("Refused because of it: alice 1x", "2 pending tasks need it by name"), ()),
    ("closed", BreakerFacts(breaker="gpt", now=NOW, line=replace(OPEN, state="closed", failures=1, calls=9)), ("It is closed", "1 of 9 calls failed lately"), ("nothing",)),
    ("quiet", BreakerFacts(breaker="gpt", now=NOW), ("nothing was called through it lately",), ("nothing",)),
]  # fmt: skip


@pytest.mark.parametrize(("of", "now", "do"), [row[1:] for row in BREAKERS], ids=[row[0] for row in BREAKERS])
def test_a_breaker_is_told_as_it_stands_with_what_to_do(
    of: BreakerFacts, now: tuple[str, ...], do: tuple[str, ...]
) -> None:
    story = breaker_story(of)
    said, advice = "\n".join(story.now), "\n".join(story.do)
    assert [one for one in now if one not in said] == [], said
    assert [one for one in do if one not in advice] == [], advice


# -- all of them -----------------------------------------------------------------------------------------------------


def stories() -> list[Story]:
    return [
        *(task_story(row[1]) for row in TASKS),
        *(session_story(row[1]) for row in SESSIONS),
        *(account_story(row[1]) for row in ACCOUNTS),
        *(breaker_story(row[1]) for row in BREAKERS),
    ]


def test_every_command_of_every_advice_exists() -> None:
    import re
    import shlex

    commands = {
        found.rstrip(".,;: ")
        for story in stories()
        for sentence in story.do
        for found in re.findall(r"ifabric (?:[a-z]+ )*[^;,:(]*", sentence.replace("AMOUNT", "100"))
    }
    assert len(commands) > 15
    for command in commands:
        words_of = shlex.split(command)[1:]
        build(words_of).parse_args(words_of, exit_on_error=False, print_error=False)


def test_a_long_story_tells_its_end_and_how_much_it_leaves_out() -> None:
    every = [StoryLine(at=at(second), what=str(second)) for second in range(100)]
    story = told("task", "T", reversed(every), now=["x"], most=10)
    assert (story.left_out, [one.what for one in story.lines]) == (90, [str(n) for n in range(90, 100)])
    assert story.do == ("nothing",)


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (usd(-1), "-0.000001 USD"), (usd(1_000_000), "1.00 USD"), (span(0.4), "0 s"), (span(-3), "0 s"), (span(119), "119 s"),
        (span(120), "2 min"), (span(7200), "2 h"), (span(200_000), "2 d"), (ago(at(0), at(60)), "60 s ago"), (many(1, "task"), "1 task"),
        (some("abcdefg", 2), "a, b and 5 more"), (some([]), ""), (seconds("nonsense"), 0.0),
    ],
)  # fmt: skip
def test_times_and_amounts_are_said_in_units_that_fit(made: str, want: str) -> None:
    assert made == want
