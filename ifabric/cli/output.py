"""What the CLI prints: tables and colours for people, JSON for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ifabric.errors import FabricError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

STATE_STYLE = {
    "pending": "cyan",
    "claimed": "yellow",
    "done": "green",
    "dead": "red",
    "blocked": "dim",
    "cancelled": "magenta",
}


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)) + b"\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One JSON document on a line of its own, at once: for streams."""
    sys.stdout.buffer.write(msgspec.json.encode(value, enc_hook=str) + b"\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; cells are text, not markup, unless they are rich objects."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if not isinstance(cell, str | int | float) else escape(str(cell)) for cell in row))
    return made


def state(name: str) -> str:
    """A state in its colour, as markup."""
    return f"[{STATE_STYLE.get(name, 'white')}]{name}[/]"


def complain(error: FabricError) -> None:
    """An error for a person: the sentence, and the facts that are not in it."""
    err.print(f"[red]error:[/] {escape(error.message)}")
    for key, value in error.facts.items():
        if key not in ("what", "reason", "maybe_done", "code") and str(value) not in error.message:
            err.print(f"  {escape(key)}: {escape(str(value))}")
