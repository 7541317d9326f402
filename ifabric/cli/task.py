"""`ifabric task ...`: look at tasks, take them, end them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, get_args

import msgspec
from cyclopts import Parameter
from rich.markup import escape

from ifabric.claims import Claim
from ifabric.cli.connect import Where, client, with_client
from ifabric.cli.output import out, print_json, state, table
from ifabric.client import Client
from ifabric.errors import BadRequest
from ifabric.wire import coordinator as wire

Session = Annotated[str, Parameter(name=["--session", "-s"], help="Whose claim it is.")]
FenceOption = Annotated[
    int | None, Parameter(help="The fence of the claim. Default: the one that the session holds now.")
]
#: what a claim by the CLI gets: nobody renews it
CLI_TTL_S = 300


def list_(
    *,
    state: wire.State | None = None,
    limit: int = 100,
    after: str | None = None,
    json: bool = False,
    where: Where | None = None,
) -> int:
    """List tasks in the order of their ids.

    Examples:
        ifabric task list --state pending
        ifabric task list --limit 1000 --json
    """
    page = with_client(where, None, lambda c: c.list(state=state, limit=limit, after=after))
    if json:
        print_json(page)
        return 0
    rows = [
        (
            line.task,
            _state(line.state),
            line.priority,
            line.session or "",
            f"{line.attempt}/{line.max_attempts}",
            ", ".join(line.needs),
            line.title,
        )
        for line in page.tasks
    ]
    out.print(table(("TASK", "STATE", "PRIO", "SESSION", "TRY", "NEEDS", "TITLE"), rows))
    out.print(_counts(page.counts))
    if page.after:
        out.print(f"[dim]more: ifabric task list --after {escape(page.after)}[/]")
    return 0


def show(task: str, *, json: bool = False, where: Where | None = None) -> int:
    """Show one task: its state, who holds it, its result, and the last of its history."""
    found = with_client(where, None, lambda c: c.get(task))
    if json:
        print_json(found)
        return 0
    out.print(f"[bold]{escape(found.task)}[/] {state(found.state)}  {escape(found.spec.title)}")
    spec = found.spec
    facts: list[tuple[str, Any]] = [
        ("holder", f"{found.session} under fence {found.fence}" if found.session else ""),
        ("attempts", f"{found.attempt} of {spec.max_attempts}"),
        ("waits for", ", ".join(found.waiting_for)),
        ("needs", ", ".join(spec.needs)),
        ("wants", ", ".join(spec.wants)),
        ("depends on", ", ".join(spec.depends_on)),
        ("priority", spec.priority or ""),
        ("error", found.error),
        ("payload", _short(spec.payload)),
        ("result", _short(found.result)),
    ]
    for name, value in facts:
        if value:
            out.print(f"  {name:<11}{escape(str(value))}")
    rows = [(line.at, line.event, line.session, line.fence or "", line.note) for line in found.history]
    out.print(table(("AT", "EVENT", "SESSION", "FENCE", "NOTE"), rows))
    return 0


def claim(
    task: str,
    *,
    session: Session,
    ttl: int = CLI_TTL_S,
    capabilities: tuple[str, ...] = (),
    json: bool = False,
    where: Where | None = None,
) -> int:
    """Take a task by its id. The claim outlives this command, by the session's TTL.

    Examples:
        ifabric task claim P0.1.5 --session alice
        ifabric task complete P0.1.5 --session alice --result '{"answer": 42}'
    """
    return _take(where, session, ttl, capabilities, json, lambda c: c.claim(task))


def next_(
    *,
    session: Session,
    wait: float = 0.0,
    ttl: int = CLI_TTL_S,
    capabilities: tuple[str, ...] = (),
    json: bool = False,
    where: Where | None = None,
) -> int:
    """Take the best task that the session can do; with --wait, wait that many seconds for one.

    Examples:
        ifabric task next --session alice --capabilities rust --capabilities wasm --wait 30
    """
    return _take(where, session, ttl, capabilities, json, lambda c: c.next(wait_s=wait))


def renew(*, session: Session, json: bool = False, where: Where | None = None) -> int:
    """Keep what the session holds, and say what that is."""

    async def act(c: Client) -> wire.RenewReply:
        reply: wire.RenewReply = await c.call(wire.Renew())
        return reply

    reply = with_client(where, session, act)
    if json:
        print_json({"ttl_s": reply.ttl_s, "held": reply.unnamed})
        return 0
    out.print(f"{escape(session)} lives for {reply.ttl_s:g} s and holds {len(reply.unnamed)} task(s)")
    for one in reply.unnamed:
        out.print(f"  {escape(one.task)} under fence {one.fence}")
    return 0


def complete(
    task: str,
    *,
    session: Session,
    fence: FenceOption = None,
    result: str | None = None,
    json: bool = False,
    where: Where | None = None,
) -> int:
    """The work is done. --result is JSON; what is not JSON is taken as text."""

    async def act(c: Client) -> wire.CompleteReply:
        return await c.complete(task, await _fence(c, task, fence), _value(result))

    reply = with_client(where, session, act)
    if json:
        print_json(reply)
    else:
        opened = f"; unblocked {', '.join(reply.unblocked)}" if reply.unblocked else ""
        out.print(f"[green]✔[/] {escape(task)} is done{escape(opened)}")
    return 0


def fail(
    task: str,
    error: str,
    *,
    session: Session,
    fence: FenceOption = None,
    retry: bool = True,
    json: bool = False,
    where: Where | None = None,
) -> int:
    """The attempt failed, for the reason given. --no-retry lets the task die at once."""

    async def act(c: Client) -> wire.FailReply:
        return await c.fail(task, await _fence(c, task, fence), error, retry=retry)

    return _say(with_client(where, session, act), task, json)


def release(
    task: str,
    *,
    session: Session,
    fence: FenceOption = None,
    reason: str = "",
    json: bool = False,
    where: Where | None = None,
) -> int:
    """Give a task back. It costs no attempt."""

    async def act(c: Client) -> wire.StateReply:
        return await c.release(task, await _fence(c, task, fence), reason)

    return _say(with_client(where, session, act), task, json)


def cancel(task: str, *, json: bool = False, where: Where | None = None) -> int:
    """Take a task off the board. Its holder is told at its next renewal."""
    return _say(with_client(where, None, lambda c: c.operate(wire.Cancel, task)), task, json)


def requeue(task: str, *, json: bool = False, where: Where | None = None) -> int:
    """Put a dead or cancelled task back, with all its attempts."""
    return _say(with_client(where, None, lambda c: c.operate(wire.Requeue, task)), task, json)


def purge(task: str, *, json: bool = False, where: Where | None = None) -> int:
    """Delete a task that is done, dead or cancelled, with its payload and result."""
    return _say(
        with_client(where, None, lambda c: c.operate(wire.Purge, task)), f"{task} is purged; it was", json, bare=True
    )


# -- inside ----------------------------------------------------------------------------------------------------------


def _take(where: Where | None, session: str, ttl: int, capabilities: tuple[str, ...], json: bool, act: Any) -> int:
    async def run() -> Claim:
        async with client(where, session, ttl_s=ttl, capabilities=capabilities) as connected:
            connected.leave_on_exit = False  # the claim outlives this process
            taken: Claim = await act(connected)
            return taken

    taken = asyncio.run(run())
    if json:
        print_json(
            {
                "task": taken.task,
                "fence": taken.fence,
                "attempt": taken.attempt,
                "ttl_s": taken.ttl_s,
                "spec": taken.spec,
            }
        )
        return 0
    who, what = escape(session), escape(taken.task)
    out.print(f"[green]✔[/] {who} holds [bold]{what}[/] under fence {taken.fence} for {taken.ttl_s:g} s")
    if taken.spec.title:
        out.print(f"  {escape(taken.spec.title)}")
    out.print(f"[dim]  keep it: ifabric task renew -s {who}[/]")
    out.print(f"[dim]  end it:  ifabric task complete {what} -s {who}[/]")
    return 0


async def _fence(c: Client, task: str, fence: int | None) -> int:
    """The fence given, or the one that the task has now: the server checks who holds it."""
    return fence if fence is not None else (await c.get(task)).fence


def _value(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        if text.lstrip().startswith(("{", "[")):
            raise BadRequest(f"--result looks like JSON and is not: {text[:80]}") from None
        return text


def _say(reply: Any, task: str, json: bool, *, bare: bool = False) -> int:
    if json:
        print_json(reply)
    else:
        out.print(f"[green]✔[/] {escape(task)}{'' if bare else ' is'} {state(reply.state)}")
    return 0


def _state(name: str) -> Any:
    from rich.text import Text

    from ifabric.cli.output import STATE_STYLE

    return Text(name, style=STATE_STYLE.get(name, ""))


def _counts(counts: dict[str, int]) -> str:
    return "  ".join(f"{state(name)} {counts.get(name, 0)}" for name in get_args(wire.State))


def _short(value: Any) -> str:
    if value is None:
        return ""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 300 else text[:297] + "..."
