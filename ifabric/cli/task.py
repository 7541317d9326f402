"""`ifabric task list|show|cancel|requeue|purge`: look at tasks, and operate on them."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Task, Where
from ifabric.cli.output import STATE_STYLE, out, plain, print_json, print_table, say_state, state, usd
from ifabric.wire import coordinator as wire

SHOWN_MAX = 300


def list_(
    *,
    state: Annotated[wire.State | None, Parameter(help="Only tasks in this state.")] = None,
    limit: Annotated[int, Parameter(help="Tasks to show.", validator=Number(gte=1, lte=wire.LIST_MAX_TASKS))] = 100,
    after: Annotated[str | None, Parameter(help="Only tasks whose id comes after this one.")] = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """List tasks in the order of their ids.

    For example:

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
            Text(line.state, style=STATE_STYLE.get(line.state, "")),
            line.priority,
            line.session or "",
            f"{line.attempt}/{line.max_attempts}",
            ", ".join(line.needs),
            line.title,
        )
        for line in page.tasks
    ]
    print_table(("TASK", "STATE", "PRIO", "SESSION", "TRY", "NEEDS", "TITLE"), rows)
    out.print(counts(page.counts))
    if page.after:
        only = f" --state {state}" if state else ""
        again = (where or Where()).words()
        out.print(f"[dim]more: ifabric task list{only} --limit {limit} --after {plain(page.after + again)}[/]")
    return 0


def show(task: Task, *, json: Json = False, where: Where | None = None) -> int:
    """Show one task: its state, who holds it, its result, and the last of its history."""
    found = with_client(where, None, lambda c: c.get(task))
    if json:
        print_json(found)
        return 0
    out.print(f"[bold]{plain(found.task)}[/] {state(found.state)}  {plain(found.spec.title)}")
    spec = found.spec
    facts: list[tuple[str, Any]] = [
        ("holder", f"{found.session} under fence {found.fence}" if found.session else ""),
        ("attempts", f"{found.attempt} of {spec.max_attempts}"),
        ("waits for", ", ".join(found.waiting_for)),
        ("needs", ", ".join(spec.needs)),
        ("wants", ", ".join(spec.wants)),
        ("depends on", ", ".join(spec.depends_on)),
        ("priority", spec.priority or ""),
        ("deadline", f"{spec.deadline_s} s a claim" if spec.deadline_s else ""),
        ("budget", usd(spec.budget_micro_usd) if spec.budget_micro_usd is not None else ""),
        ("error", found.error),
        ("payload", _short(spec.payload)),
        ("result", _short(found.result)),
    ]
    for name, value in facts:
        if value:
            out.print(f"  {name:<11}{plain(str(value))}")
    rows = [(line.at, line.event, line.session, line.fence or "", line.note) for line in found.history]
    print_table(("AT", "EVENT", "SESSION", "FENCE", "NOTE"), rows)
    return 0


def cancel(task: Task, *, json: Json = False, where: Where | None = None) -> int:
    """Take a task off the board. Its holder is told at its next renewal."""
    return say_state(with_client(where, None, lambda c: c.operate(wire.Cancel, task)), task, json=json)


def requeue(task: Task, *, json: Json = False, where: Where | None = None) -> int:
    """Put a dead or cancelled task back, with all its attempts."""
    return say_state(with_client(where, None, lambda c: c.operate(wire.Requeue, task)), task, json=json)


def purge(task: Task, *, json: Json = False, where: Where | None = None) -> int:
    """Delete a task that is done, dead or cancelled, with its payload and result."""
    reply = with_client(where, None, lambda c: c.operate(wire.Purge, task))
    if json:
        print_json(reply)
    else:
        out.print(f"[green]✔[/] {plain(task)} is deleted; it was {state(reply.state)}")
    return 0


def counts(of: dict[str, int]) -> str:
    """How many tasks are in each state, as markup."""
    return "  ".join(f"{state(name)} {of.get(name, 0)}" for name in get_args(wire.State))


def _short(value: Any) -> str:
    if value is None:
        return ""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "..."
