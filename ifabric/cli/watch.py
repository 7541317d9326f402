"""`ifabric watch`: what happens, as it happens."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

from cyclopts import Parameter

from ifabric.cli.connect import client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json_line
from ifabric.wire.coordinator import TaskEvent

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
}


def watch(
    *,
    task: Annotated[str | None, Parameter(help="Only this task's events.")] = None,
    since_start: Annotated[bool, Parameter(help="Begin with what the journal keeps.")] = False,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Show task events, a line each, until Ctrl-C.

    For example:

        ifabric watch
        ifabric watch --task P0.1.5 --since-start
        ifabric watch --json | jq .task
    """

    async def follow() -> None:
        async with client(where) as connected:
            async for event in connected.events(after_seq=0 if since_start else None):
                if task is None or event.task in (task, ""):  # "" is for all: events were lost
                    _show(event, json=json)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow())
    return 0


def _show(event: TaskEvent, *, json: bool) -> None:
    if json:
        print_json_line(event)
        return
    style = STYLE.get(event.event, "white")
    who = f" by {event.session}" if event.session else ""
    fence = f" fence {event.fence}" if event.fence else ""
    note = f"  ({event.note})" if event.note else ""
    happened = f"[{style}]{plain(event.event):<10}[/] [bold]{plain(event.task)}[/]{plain(who + fence + note)}"
    out.print(f"[dim]{plain(event.at)}[/] {happened}")
