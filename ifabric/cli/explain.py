"""`ifabric explain`: the story of one thing, how it is now, and what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json
from ifabric.errors import ConfigError, FabricError
from ifabric.explaining.story import LINES_MAX, Kind, Line, Story

if TYPE_CHECKING:
    from ifabric.cli.gathering import Found, Reader
    from ifabric.explaining import Sources
    from ifabric.explaining.tasks import Dependency
    from ifabric.wire.governor import HoldLine

KINDS: tuple[Kind, ...] = ("task", "session", "account", "breaker")
#: dependencies whose state is looked up
DEPENDENCIES_MAX = 20
LAST = 100_000
TONES = {"good": "green", "bad": "red", "plain": "default"}


def explain(
    name: Annotated[str, Parameter(help="A task, a session, an account or a breaker.")],
    *,
    task: Annotated[bool, Parameter(help="It is a task.")] = False,
    session: Annotated[bool, Parameter(help="It is a session.")] = False,
    account: Annotated[bool, Parameter(help="It is an account.")] = False,
    breaker: Annotated[bool, Parameter(help="It is a breaker.")] = False,
    lines: Annotated[int, Parameter(help="The last lines of the story.", validator=Number(gte=1))] = LINES_MAX,
    last: Annotated[int, Parameter(help="How much of each stream is read.", validator=Number(gte=1))] = LAST,
    audit_credentials: Annotated[
        Path | None, Parameter(env_var="IFABRIC_AUDIT_CREDENTIALS", help="An auditor's credential, for the audit.")
    ] = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Tell the story of one thing in the order of time, from its record, the events
    and the audit; then how it is now, and what to do.

    It finds out what the name is. Events are for operators and the audit is for
    auditors: what may not be read is named, and the rest is told. Exit 1 when
    nothing has that name.

    For example:

        ifabric explain P0.1.5
        ifabric explain acme/research
        ifabric explain openai/gpt-x --breaker
        ifabric explain alice --session --json | jq .do
    """
    flags = {"task": task, "session": session, "account": account, "breaker": breaker}
    kinds = tuple(kind for kind in KINDS if flags[kind]) or KINDS
    if not name or len(name) > 1024:
        raise ConfigError("give the name of a task, a session, an account or a breaker")
    story = asyncio.run(_story(name, kinds, lines, last, audit_credentials, where))
    if json:
        print_json(story)
    else:
        _show(story)
    return 0


async def _story(
    name: str, kinds: tuple[Kind, ...], most: int, last: int, audit_credentials: Path | None, where: Where | None
) -> Story:
    from ifabric.cli.gathering import about, mentioned, reader

    async with reader(where, audit_credentials) as read:
        found, sources = await asyncio.gather(read.look(name, kinds), read.sources(name, last))
        known = found.kinds or tuple(kind for kind in kinds if mentioned(sources, kind, name))
        if not known:
            what = kinds[0] if len(kinds) == 1 else "task, session, account or breaker"
            facts = {"near": near} if (near := await read.near(name, kinds)) else {}
            unread = f"; but {'; '.join(found.unread)}" if found.unread else ""
            raise FabricError(f"there is no {what} {name}{unread}", **facts)
        if len(known) > 1:
            again = ", or ".join(f"ifabric explain {name} --{kind}" for kind in known)
            raise ConfigError(f"{name} is {' and '.join(f'{_a(kind)}' for kind in known)}: say which: {again}")
        return await _TELL[known[0]](read, name, found, about(sources, known[0], name), most)


def _now() -> str:
    from ifabric.clock import SystemClock, rfc3339

    return rfc3339(SystemClock().wall_ms())


async def _task(read: Reader, name: str, found: Found, sources: Sources, most: int) -> Story:
    from ifabric.cli.gathering import quietly
    from ifabric.cli.match import advise
    from ifabric.explaining import TaskFacts, task_story

    record, client = found.task, read.client
    if record is None:
        return task_story(TaskFacts(task=name, now=_now(), sources=sources), most=most)
    spec, matched, holder, sessions_read = record.spec, None, None, True
    if record.state == "pending":
        matched = await quietly(client.match(spec.needs, spec.wants, spec.labels), None)
    breakers = await quietly(client.breakers(), ()) if record.state == "pending" and spec.needs else ()
    if record.session:
        try:
            holder = await read.session(record.session)
        except FabricError:
            sessions_read = False
    facts = TaskFacts(
        task=name,
        now=_now(),
        record=record,
        sources=sources,
        dependencies=tuple(
            await asyncio.gather(*(_dependency(read, one) for one in record.waiting_for[:DEPENDENCIES_MAX]))
        ),
        matched=matched,
        advice=advise(record, matched) if matched is not None else "",
        open_breakers=tuple(line.breaker for line in breakers if line.state != "closed"),
        holder=holder,
        sessions_read=sessions_read,
        holds=await _holds(read, name, record.session, holder.account if holder else None),
    )
    return task_story(facts, most=most)


async def _dependency(read: Reader, task: str) -> Dependency:
    from ifabric.cli.gathering import quietly
    from ifabric.explaining.tasks import Dependency

    record = await quietly(read.client.get(task), None)
    return Dependency(task=task, state=record.state if record else "")


async def _holds(read: Reader, task: str, session: str | None, account: str | None) -> tuple[HoldLine, ...]:
    """What is held for a claim: it stands on its session's own account."""
    from ifabric.cli.gathering import quietly
    from ifabric.wire.governor import account_of

    if not session:
        return ()
    balance = await quietly(read.client.balance(account_of(account, session)), None)
    return tuple(hold for hold in balance.holds if hold.task == task) if balance else ()


async def _session(read: Reader, name: str, found: Found, sources: Sources, most: int) -> Story:
    from ifabric.cli.gathering import quietly
    from ifabric.explaining import SessionFacts, session_story
    from ifabric.wire.governor import account_of

    own = account_of(found.session.account if found.session else None, name)
    if found.session is None and sources.budgets:
        own = sources.budgets[-1].account
    facts = SessionFacts(
        session=name,
        now=_now(),
        line=found.session,
        sessions_read=found.sessions_read,
        sources=sources,
        balance=await quietly(read.client.balance(own), None),
    )
    return session_story(facts, most=most)


async def _account(_: Reader, name: str, found: Found, sources: Sources, most: int) -> Story:
    from ifabric.explaining import AccountFacts, account_story

    facts = AccountFacts(account=name, now=_now(), balance=found.account, sources=sources)
    return account_story(facts, most=most)


async def _breaker(read: Reader, name: str, found: Found, sources: Sources, most: int) -> Story:
    from ifabric.cli.gathering import quietly
    from ifabric.explaining import BreakerFacts, breaker_story
    from ifabric.wire.coordinator import LIST_MAX_TASKS

    page = await quietly(read.client.list(state="pending", limit=LIST_MAX_TASKS), None)
    waiting = sum(name in line.needs for line in page.tasks) if page else 0
    facts = BreakerFacts(breaker=name, now=_now(), line=found.breaker, sources=sources, waiting=waiting)
    return breaker_story(facts, most=most)


_TELL = {"task": _task, "session": _session, "account": _account, "breaker": _breaker}


# -- for people ------------------------------------------------------------------------------------------------------


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _show(story: Story) -> None:
    title = f"  {plain(story.title)}" if story.title else ""
    out.print(f"[bold]{story.kind} {plain(story.name)}[/]{title}")
    if story.left_out:
        out.print(f"[dim]  {story.left_out} earlier line(s): --lines shows more[/]")
    wide = max((len(line.who) for line in story.lines), default=0)
    for line in story.lines:
        out.print(f"  {_line(line, wide)}")
    for sentence in story.unread:
        out.print(f"  [yellow]![/] {plain(sentence)}")
    out.print("[bold]Now[/]")
    for sentence in story.now:
        out.print(f"  {plain(sentence)}")
    out.print("[bold]What to do[/]")
    for sentence in story.do:
        out.print(f"  → {plain(sentence)}")


def _line(line: Line, wide: int) -> str:
    who = plain(line.who) + " " * (wide - len(line.who))
    times = f" [dim]({line.times} times, until {plain(line.until)})[/]" if line.times > 1 else ""
    took = f", {line.took_ms:.1f} ms" if line.took_ms is not None else ""
    request = f", request {plain(line.request_id)}" if line.request_id else ""
    told = f"[dim]({'+'.join(line.sources)}{took}{request})[/]"
    return f"[dim]{plain(line.at)}[/] [bold]{who}[/] [{TONES[line.tone]}]{plain(line.what)}[/]{times} {told}"
