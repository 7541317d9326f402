"""Reads task boards: Markdown (task lists and tables), YAML and JSON.

Pure: text in, tasks out, or one error that names every bad row by its line. Nothing is sent before everything is
understood.

    - [ ] P0.1.1 Build the parser {needs: rust, wasm; depends: P0.1.0; priority: 5; budget: 1.50}
    - [x] P0.1.0 Choose a parser

    | ID     | Title            | Status | Depends | Priority | Needs      |
    |--------|------------------|--------|---------|----------|------------|
    | P0.1.1 | Build the parser | todo   | P0.1.0  | 5        | rust, wasm |

A checked item arrives done. The first word of an item is its id when there is a digit in it; an item without one gets
an id made from its title, and `notes` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from ifabric.board.documents import read_json, read_yaml
from ifabric.board.markdown import read_markdown
from ifabric.board.rows import Errors
from ifabric.board.tasks import in_order, specs_of
from ifabric.errors import BadRequest
from ifabric.wire.coordinator import TaskSpec

Format = Literal["md", "yaml", "json"]
ERRORS_MAX = 50
TASKS_MAX = 100_000
_NOTHING = {
    "md": "there are no tasks here; a task list (`- [ ] ID Title`) or a table of tasks with an ID column is a board",
    "yaml": "there are no tasks here; a list of tasks with ids, or a map with `tasks`, is a board",
    "json": "there are no tasks here; a list of tasks with ids, or a map with `tasks`, is a board",
}


class Board(NamedTuple):
    """The tasks in an order in which every dependency comes first, and those that arrive done."""

    tasks: tuple[TaskSpec, ...]
    done: tuple[str, ...]
    #: what was decided for the writer, as ``file:line: what``
    notes: tuple[str, ...] = ()


def read_board(text: str, *, format: Format, filename: str = "board") -> Board:
    """The board in `text`. `BadRequest`, with a line ``file:line: what`` for each bad row, when it is not one."""
    errors: Errors = []
    read = {"md": read_markdown, "yaml": read_yaml, "json": read_json}[format]
    rows = list(read(text.removeprefix("\ufeff"), errors))
    if not rows and not errors:
        errors.append((1, _NOTHING[format]))
    if len(rows) > TASKS_MAX:
        raise BadRequest(f"{filename}:1: {len(rows)} tasks; {TASKS_MAX} are allowed on one board")
    specs, lines = specs_of(rows, errors)
    order = in_order(specs, lines, errors)
    if errors:
        shown = [f"{filename}:{line}: {what}" for line, what in sorted(errors)[:ERRORS_MAX]]
        more = [f"{filename}: and {len(errors) - ERRORS_MAX} more"] if len(errors) > ERRORS_MAX else []
        raise BadRequest("\n".join(shown + more))
    done = tuple(str(row.fields["id"]) for row in rows if row.done)
    notes = tuple(f"{filename}:{row.line}: {row.fields['id']} {note}" for row in rows for note in row.notes)
    return Board(tuple(order), done, notes)


def format_of(path: Path) -> Format | None:
    """The format that a file's name says."""
    formats: dict[str, Format] = {".md": "md", ".markdown": "md", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
    return formats.get(path.suffix.lower())
