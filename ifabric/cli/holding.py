"""`ifabric task claim|next|renew|complete|fail|release`: hold tasks by hand.

A claim made here outlives the command, for as long as the session's TTL: nobody renews it, and nothing is given back
when the process ends. What is printed are the commands that keep it and end it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.connect import whose, with_client
from ifabric.cli.options import Json, Session, Task, Where, amount
from ifabric.cli.output import out, plain, print_json, say_state, usd
from ifabric.errors import BadRequest
from ifabric.wire import coordinator as wire

if TYPE_CHECKING:
    from ifabric.claims import Claim
    from ifabric.client import Client

#: what a new session of the command line gets, in seconds: nobody renews it
CLI_TTL_S = 300
Ttl = Annotated[
    int,
    Parameter(
        help="Seconds that a new session lives without `task renew`.",
        validator=Number(gte=wire.TTL_MIN_S, lte=wire.TTL_MAX_S),
    ),
]
Capabilities = Annotated[
    tuple[str, ...], Parameter(help="What the session can do, from now on; several, or separated by commas.")
]
Fence = Annotated[
    int | None, Parameter(help="The claim's fence. Default: the last one of the task, if the session holds it.")
]
Hold = Annotated[str | None, Parameter(help="Set so many USD aside for it, as 0.25, or do not take it.")]
Cost = Annotated[str | None, Parameter(help="What it cost in USD, as 0.25: charged in the same step.")]


def claim(
    task: Task,
    *,
    session: Session = None,
    ttl: Ttl = CLI_TTL_S,
    capabilities: Capabilities = (),
    hold: Hold = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Take a task by its id. The claim outlives this command, by the session's TTL.

    For example:

        ifabric task claim P0.1.5 --session alice --ttl 600 --hold 0.25
        ifabric task complete P0.1.5 --session alice --result '{"answer": 42}'
    """
    micro_usd = amount(hold, "--hold")
    return _take(
        where, whose(session, where), ttl, capabilities, json, lambda c: c.claim(task, hold_micro_usd=micro_usd)
    )


def next_(
    *,
    session: Session = None,
    wait: Annotated[
        float, Parameter(help="Seconds to wait for a task.", validator=Number(gte=0, lte=wire.WAIT_MAX_S))
    ] = 0.0,
    ttl: Ttl = CLI_TTL_S,
    capabilities: Capabilities = (),
    hold: Hold = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Take the best task that the session can do. The claim outlives this command,
    by the session's TTL.

    For example:

        ifabric task next --session alice --capabilities rust,wasm --wait 30
    """
    micro_usd = amount(hold, "--hold")
    return _take(
        where, whose(session, where), ttl, capabilities, json, lambda c: c.next(wait_s=wait, hold_micro_usd=micro_usd)
    )


def renew(*, session: Session = None, json: Json = False, where: Where | None = None) -> int:
    """Keep what the session holds for another TTL, and say what that is."""

    async def act(c: Client) -> wire.RenewReply:
        reply: wire.RenewReply = await c.call(wire.Renew())
        return reply

    session = whose(session, where)
    reply = with_client(where, session, act)
    if json:
        print_json({"session": session, "ttl_s": reply.ttl_s, "held": reply.unnamed})
        return 0
    out.print(f"{plain(session)} lives for {reply.ttl_s:g} s and holds {len(reply.unnamed)} task(s)")
    for one in reply.unnamed:
        out.print(f"  {plain(one.task)} under fence {one.fence}")
    return 0


def complete(
    task: Task,
    *,
    session: Session = None,
    fence: Fence = None,
    result: Annotated[str | None, Parameter(help="JSON; what is not JSON is taken as text.")] = None,
    cost: Cost = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """The work is done. Tasks that waited for it alone become pending.

    For example:

        ifabric task complete P0.1.5 --session alice --result '{"answer": 42}' --cost 0.12
    """
    value, micro_usd = _value(result), amount(cost, "--cost")

    async def act(c: Client) -> wire.CompleteReply:
        return await c.complete(task, await _fence(c, task, fence), value, cost_micro_usd=micro_usd)

    reply = with_client(where, whose(session, where), act)
    if json:
        print_json(reply)
    else:
        opened = f"; unblocked {', '.join(reply.unblocked)}" if reply.unblocked else ""
        out.print(f"[green]✔[/] {plain(task)} is done{plain(opened)}{_charged(reply)}")
    return 0


def fail(
    task: Task,
    error: Annotated[str, Parameter(help="Why, in words.")],
    *,
    session: Session = None,
    fence: Fence = None,
    retry: Annotated[bool, Parameter(negative="--no-retry", help="Let the task die at once with --no-retry.")] = True,
    cost: Cost = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """The attempt failed. With attempts left the task is pending again.

    For example:

        ifabric task fail P0.1.5 "the tests do not pass" --session alice
    """
    micro_usd = amount(cost, "--cost")

    async def act(c: Client) -> wire.FailReply:
        return await c.fail(task, await _fence(c, task, fence), error, retry=retry, cost_micro_usd=micro_usd)

    return say_state(with_client(where, whose(session, where), act), task, json=json)


def release(
    task: Task,
    *,
    session: Session = None,
    fence: Fence = None,
    reason: Annotated[str, Parameter(help="Why, in words.")] = "",
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Give a task back. It costs no attempt."""

    async def act(c: Client) -> wire.StateReply:
        return await c.release(task, await _fence(c, task, fence), reason)

    return say_state(with_client(where, whose(session, where), act), task, json=json)


# -- inside ----------------------------------------------------------------------------------------------------------


def _take(
    where: Where | None,
    session: str,
    ttl: int,
    capabilities: tuple[str, ...],
    json: bool,
    act: Callable[[Client], Awaitable[Claim]],
) -> int:
    able = tuple(word.strip() for given in capabilities for word in given.split(",") if word.strip())

    taken = with_client(where, session, act, ttl_s=ttl, capabilities=able)
    if json:
        facts = ("task", "fence", "attempt", "ttl_s", "spec", "again", "hold_id")
        print_json({"session": session, **{name: getattr(taken, name) for name in facts}})
        return 0
    again = "still holds" if taken.again else "holds"
    out.print(
        f"[green]✔[/] {plain(session)} {again} [bold]{plain(taken.task)}[/] under fence {taken.fence} "
        f"for {taken.ttl_s:g} s, attempt {taken.attempt}"
    )
    if taken.spec.title:
        out.print(f"  {plain(taken.spec.title)}")
    if taken.hold_id:
        out.print(f"  money is held for it: {plain(taken.hold_id)}; say --cost when it ends")
    where_again = (where or Where()).words()
    out.print(f"[dim]  keep it: ifabric task renew --session {plain(session + where_again)}[/]")
    out.print(
        f"[dim]  end it:  ifabric task complete {plain(taken.task)} --session {plain(session)} "
        f"--fence {taken.fence}{plain(where_again)}[/]"
    )
    return 0


def _charged(reply: wire.CompleteReply) -> str:
    """What was charged, as markup."""
    if reply.charged is None:
        return ""
    over = f", [red]{usd(reply.overdraft)} of it were not available[/]" if reply.overdraft else ""
    return f"; charged {usd(reply.charged)}{over}"


async def _fence(c: Client, task: str, fence: int | None) -> int:
    """The fence given, or the one that the task has now: the server checks who holds it."""
    return fence if fence is not None else (await c.get(task)).fence


def _value(text: str | None) -> Any:
    """What `--result` means: JSON, or else text."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        if text.lstrip().startswith(("{", "[")):
            raise BadRequest(f"--result looks like JSON and is not: {text[:80]}") from None
        return text
