"""The story of a session: what it holds, what it lost and why, what it was refused."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from ifabric.explaining.happenings import of_budgets, of_tasks
from ifabric.explaining.merging import merged, refusals
from ifabric.explaining.story import LINES_MAX, Sources, Story, ago, many, some, span, told, usd
from ifabric.wire.audit import AuditRecord
from ifabric.wire.coordinator import TaskEvent
from ifabric.wire.governor import BalanceReply, account_of
from ifabric.wire.overview import SessionLine

#: how a claim ends without its holder wanting it
LOST = ("expired", "renew_lost", "cancelled")


class SessionFacts(Struct, frozen=True, kw_only=True):
    """What was found of a session. `line` None: it is not there (or sessions could not be read: `sessions_read`)."""

    session: str
    now: str
    line: SessionLine | None = None
    sessions_read: bool = True
    sources: Sources = Sources()
    #: its own account, with its open holds
    balance: BalanceReply | None = None
    #: tasks that it could take just now, as far as that was asked
    pending: int | None = None


def session_story(facts: SessionFacts, *, most: int = LINES_MAX) -> Story:
    """The story."""
    sources = facts.sources
    # each call through a breaker is two commands: they are counted below
    calls = [entry for entry in sources.audit if _is_call(entry)]
    others = (entry for entry in sources.audit if not _is_call(entry))
    happened = (one._replace(what=f"{one.task}: {one.what}") for one in of_tasks(sources.tasks))
    lines = merged((*happened, *of_budgets(sources.budgets)), others)
    now = [*_is(facts), *_lost(facts), *_refused(facts), *_money(facts)]
    admitted = Counter(entry.breaker for entry in calls if entry.verb == "admit")
    if admitted:
        said = ", ".join(f"{breaker} {times}x" for breaker, times in admitted.most_common(5))
        now.append(f"It called through breakers: {said}.")
    title = f"capabilities {some(facts.line.capabilities, 10)}" if facts.line and facts.line.capabilities else ""
    return told("session", facts.session, lines, title=title, now=now, do=_do(facts), unread=sources.unread, most=most)


def _is_call(entry: AuditRecord) -> bool:
    return entry.verb in ("admit", "report") and entry.outcome == "ok"


def _is(facts: SessionFacts) -> list[str]:
    line = facts.line
    if line is None:
        if not facts.sessions_read:
            return ["Whether it is there could not be read."]
        sources = facts.sources
        heard = [*(one.at for one in sources.tasks), *(one.at for one in sources.audit)]
        last = f" The last that is known of it is {ago(max(heard), facts.now)}." if heard else ""
        return [f"It is not there: it said bye, or did not renew in time; it holds nothing.{last}"]
    account = f", spends from {line.account}" if line.account else ""
    said = [f"It is there, with a TTL of {span(line.ttl_s)}{account}."]
    held = max(line.held, len(line.claims))
    said.append(f"It holds {many(held, 'task')}: {some(line.claims, 10)}." if held else "It holds no task.")
    return said


def lost(events: tuple[TaskEvent, ...], session: str) -> list[TaskEvent]:
    """The claims that it lost, and did not end."""
    return [one for one in events if one.session == session and one.event in LOST and one.event != "cancelled"]


def _lost(facts: SessionFacts) -> list[str]:
    ended = lost(facts.sources.tasks, facts.session)
    if not ended:
        return []
    last = ended[-1]
    why = f", {last.note}" if last.note else ""
    return [f"It lost {many(len(ended), 'claim')}, the last one {ago(last.at, facts.now)}: {last.task}{why}."]


def _refused(facts: SessionFacts) -> list[str]:
    codes = Counter(entry.code for entry in refusals(facts.sources.audit))
    if not codes:
        return []
    said = ", ".join(f"{code} {times}x" for code, times in codes.most_common(5))
    return [f"It was refused {many(sum(codes.values()), 'time')}: {said}."]


def _money(facts: SessionFacts) -> list[str]:
    if facts.balance is None or not facts.balance.path:
        return []
    own = facts.balance.path[-1]
    limit = "without a limit" if own.limit is None else f"of {usd(own.limit)}"
    said = [f"Its account {own.account}: {usd(own.spent)} spent and {usd(own.held)} held {limit}."]
    said += [
        f"{line.account} has nothing left."
        for line in facts.balance.path
        if line.available is not None and line.available <= 0
    ]
    mine = [hold for hold in facts.balance.holds if hold.session == facts.session]
    if mine:
        said.append(f"It has {many(len(mine), 'hold')} open: {some(hold.hold for hold in mine)}.")
    return said


def _do(facts: SessionFacts) -> list[str]:
    do: list[str] = []
    codes = Counter(entry.code for entry in refusals(facts.sources.audit))
    if lost(facts.sources.tasks, facts.session):
        do.append(
            "see why it did not renew: its log around the times above; an agent that stalls for long needs a longer ttl_s"
        )
    short = (
        next((line for line in facts.balance.path if line.available is not None and line.available <= 0), None)
        if facts.balance
        else None
    )
    if codes.get("budget_short") or short is not None:
        where = short.account if short else _account(facts)
        do.append(f"ifabric explain {where} --account")
    if codes.get("breaker_open"):
        do.append("ifabric breaker list")
    if codes.get("no_task_matches") or codes.get("capability_missing"):
        do.append("ifabric task list --state pending, and for one of them: ifabric match explain TASK")
    if codes.get("forbidden"):
        do.append("it asks for what it may not: ifabric agent list; if that is no mistake: ifabric playbook security")
    return do


def _account(facts: SessionFacts) -> str:
    if facts.balance is not None and facts.balance.path:
        return facts.balance.path[-1].account
    return account_of(facts.line.account if facts.line else None, facts.session)
