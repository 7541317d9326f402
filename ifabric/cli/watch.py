"""`ifabric watch`: what happens, as it happens."""

from __future__ import annotations

import asyncio
import contextlib

from rich.markup import escape

from ifabric.cli.connect import Where, client
from ifabric.cli.output import out, print_json_line
from ifabric.wire.coordinator import TaskEvent

STYLE = {
    "submitted": "cyan", "claimed": "yellow", "completed": "green", "failed": "red", "dead": "bold red", "expired": "red",
    "released": "magenta", "unblocked": "cyan", "cancelled": "magenta", "renew_lost": "red", "requeued": "cyan",
}  # fmt: skip


def watch(*, task: str | None = None, since_start: bool = False, json: bool = False, where: Where | None = None) -> int:
    """Show task events, a line each, until Ctrl-C. --since-start begins with what the journal keeps.

    Examples:
        ifabric watch
        ifabric watch --task P0.1.5 --since-start
        ifabric watch --json | jq .task
    """

    async def follow() -> None:
        async with client(where) as connected:
            async for event in connected.events(after_seq=0 if since_start else None):
                if task is None or event.task == task:
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
    out.print(
        f"[dim]{event.at}[/] [{style}]{event.event:<10}[/] [bold]{escape(event.task)}[/]{escape(who + fence + note)}"
    )
