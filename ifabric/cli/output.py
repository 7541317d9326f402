"""What the CLI prints: tables and colours for people, JSON for machines.

Off a terminal nothing is wrapped: a task is a line, whatever its length, for `grep` and for logs. Titles, errors and
results come from agents: what would be a control sequence of the terminal, or rich's markup, is shown and not obeyed
(`plain`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ifabric.errors import FabricError
from ifabric.wire import coordinator as wire

#: columns of what is no terminal
WIDE = 10_000
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = Console(highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE, stderr=True)

STATE_STYLE = {
    "pending": "cyan",
    "claimed": "yellow",
    "done": "green",
    "dead": "red",
    "blocked": "dim",
    "cancelled": "magenta",
}
#: what commands a terminal, or turns around the letters that come after it
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: facts of an error that its sentence has said in words
_SAID = ("what", "reason", "maybe_done", "code")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    _write(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)))


def print_json_line(value: Any) -> None:
    """One JSON document on a line of its own, at once: for streams."""
    _write(msgspec.json.encode(value, enc_hook=str))


def _write(document: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(document + b"\n")
    sys.stdout.buffer.flush()


def plain(text: object) -> str:
    """Somebody else's text, on one line, as markup that shows it as it is."""
    spaced = re.sub(r"[\t\n\r]+", " ", str(text))
    return escape(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", spaced))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A plain table; cells are text, not markup, unless they are rich objects."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(plain(cell) if isinstance(cell, str | int | float) else cell for cell in row))
    out.print(made, soft_wrap=False)


def state(name: str) -> str:
    """A state in its colour, as markup."""
    return f"[{STATE_STYLE.get(name, 'white')}]{name}[/]"


def usd(micro_usd: int) -> str:
    """An amount in US dollars, exact, with cents at least."""
    whole, rest = divmod(abs(micro_usd), 1_000_000)
    return f"{'-' if micro_usd < 0 else ''}{whole}.{f'{rest:06}'.rstrip('0').ljust(2, '0')} USD"


def money(micro_usd: int, style: str = "") -> Text:
    """The same as a cell, on the right of its column."""
    return Text(usd(micro_usd), style=style, justify="right")


def say_state(reply: wire.StateReply | wire.FailReply, task: str, *, json: bool) -> int:
    """What has become of a task; the exit code."""
    if json:
        print_json(reply)
    else:
        tries = f", after attempt {reply.attempt} of {reply.max_attempts}" if isinstance(reply, wire.FailReply) else ""
        out.print(f"[green]✔[/] {plain(task)} is {state(reply.state)}{tries}")
    return 0


def check(passed: bool, what: str) -> None:
    """A line that begins with ✔ or ✘."""
    out.print(f"{'[green]✔[/]' if passed else '[red]✘[/]'} {what}")


def complain(error: FabricError) -> None:
    """An error for a person: the sentence, and the facts that are not in it."""
    first, *more = error.message.splitlines() or [error.message]
    err.print(f"[red]error:[/] {plain(first)}")
    for line in more:
        err.print(f"  {plain(line)}")
    for key, value in error.facts.items():
        if key not in _SAID and str(value) not in error.message:
            said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            err.print(f"  {plain(key)}: {plain(said)}")
