"""`ifabric watch`: what happens, as it happens."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

from cyclopts import Parameter

from ifabric.cli.connect import client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json_line, usd
from ifabric.cli.sandbox import short
from ifabric.listening import About, Event
from ifabric.wire.chassis import SloEvent, ViolationEvent
from ifabric.wire.coordinator import TaskEvent
from ifabric.wire.governor import BreakerEvent, BudgetEvent

STYLE = {
    "submitted": "cyan",
    "claimed": "yellow",
    "completed": "green",
    "failed": "red",
    "dead": "bold red",
    "expired": "red",
    "renew_lost": "red",
    "released": "magenta",
    "cancelled": "magenta",
    "unblocked": "cyan",
    "requeued": "cyan",
    "hold": "cyan",
    "commit": "green",
    "void": "magenta",
    "overdraft": "bold red",
    "opened": "bold red",
    "half_open": "yellow",
    "closed": "green",
    "unmatched": "red",
    "violation": "bold red",
    "slo": "yellow",
}


def watch(
    *,
    task: Annotated[str | None, Parameter(help="Only this task's events.")] = None,
    about: Annotated[About, Parameter(help="Of what.")] = "task",
    since_start: Annotated[bool, Parameter(help="Begin with what the journal keeps.")] = False,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Show events, a line each, until Ctrl-C: of tasks, unless it is about something
    else.

    For example:

        ifabric watch
        ifabric watch --task P0.1.5 --since-start
        ifabric watch --about all
        ifabric watch --json | jq .task
    """

    async def follow() -> None:
        async with client(where) as connected:
            async for event in connected.events(about, after_seq=0 if since_start else None):
                if task is None or getattr(event, "task", None) == task or event.event == "resync":
                    _show(event, json=json)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow())
    return 0


def _show(event: Event, *, json: bool) -> None:
    if json:
        print_json_line(event)
        return
    what, details = _said(event)
    style = STYLE.get(event.event, "white")
    out.print(f"[dim]{plain(event.at)}[/] [{style}]{plain(event.event):<10}[/] [bold]{plain(what)}[/]{plain(details)}")


def _said(event: Event) -> tuple[str, str]:
    """What it happened to, and the rest."""
    if isinstance(event, TaskEvent):
        who = f" by {event.session}" if event.session else ""
        fence = f" fence {event.fence}" if event.fence else ""
        return event.task, who + fence + _note(event.note)
    if isinstance(event, BudgetEvent):
        return event.account, _money(event)
    if isinstance(event, BreakerEvent):
        probe = f", next probe in {event.probe_in_s:.0f} s" if event.probe_in_s is not None else ""
        trips = f", trip {event.trips}" if event.trips else ""
        who = f" by {event.by}" if event.by else ""
        return event.breaker, who + trips + probe + _note(event.why)
    if isinstance(event, ViolationEvent):
        task = f" for {event.task}" if event.task else ""
        return event.run, f" {event.kind} by {event.session}, {short(event.module)}{task}{_note(event.message)}"
    if isinstance(event, SloEvent):
        unit = "ms" if event.which == "latency" else "%"
        how = "is met again" if event.met else "is missed"
        at = f" on {event.daemon}" if event.daemon else ""
        return event.which, f" {how}{at}: {event.value:.4g} {unit}, and the target is {event.target:g} {unit}"
    missing = f"; {', '.join(event.missing)} would do" if event.missing else ""
    needs = f" with {', '.join(event.needs)}" if event.needs else ""
    return f"{event.tasks} task(s)", f"{needs}, as {event.example}, can be taken by nobody{missing}"


def _money(event: BudgetEvent) -> str:
    if event.event == "account":
        per = "" if event.window in (None, "total") else f" a {event.window}"
        return (" no limit" if event.limit is None else f" limit {usd(event.limit)}{per}") + _note(event.note)
    charged = f" {usd(event.charged)} of" if event.event in ("commit", "overdraft") else ""
    held = f" {usd(event.amount)} held" if event.hold else ""
    who = f" by {event.session}, {event.hold}" if event.session else ""
    task = f" for {event.task} fence {event.fence}" if event.task else ""
    over = f", {usd(event.overdraft)} not available" if event.overdraft else ""
    return charged + held + who + task + over + (", late" if event.late else "") + _note(event.note)


def _note(text: str) -> str:
    return f"  ({text})" if text else ""
