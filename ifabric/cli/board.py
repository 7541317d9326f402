"""`ifabric board load`: put a whole board there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import err, out, plain, print_json
from ifabric.errors import BadRequest, ConfigError, Conflict, FabricError
from ifabric.wire.coordinator import SUBMIT_MAX_TASKS, TaskSpec

if TYPE_CHECKING:
    from ifabric.board import Board
    from ifabric.client import Client

BYTES_MAX = 64 * 1024 * 1024
#: what one submission may weigh: well below NATS's default limit for a message
CHUNK_BYTES = 512 * 1024
NOTES_MAX = 20


def load(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True, help="The board; - reads standard input.")],
    *,
    format: Annotated[Literal["md", "yaml", "json"] | None, Parameter(help="Default: as the file's name says.")] = None,
    dry_run: Annotated[bool, Parameter(help="Read and check, and send nothing.")] = False,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Load a task board: Markdown task lists and tables, YAML or JSON.

    Everything is read and checked first: what is wrong is named by its line, and
    nothing is sent. A checked item arrives done. Loading twice changes nothing.
    Up to 100 tasks are one transaction, all or none; a larger board goes in
    several, dependencies first, and if that is interrupted, loading it again
    completes it.

    For example:

        ifabric board load docs/TASK-BOARD.md
        ifabric board load board.yaml --dry-run

    An item: - [ ] P0.1.1 Build it {needs: rust; wants: gpu; depends: P0.1.0;
    priority: 5; attempts: 2; deadline: 600; budget: 1.50}. A table has an ID or
    Task column, and of Title, Status, Depends, Priority, Needs, Wants what it
    has.
    """
    from ifabric.board import format_of, read_board

    kind = format or format_of(file)
    if kind is None:
        raise ConfigError(f"{file}: say --format md, yaml or json; the name does not")
    try:
        board = read_board(_text(file), format=kind, filename=str(file))
    except BadRequest as refusal:
        problems = refusal.message.split("\n")
        if json:
            print_json({"ok": False, "errors": problems})
        for problem in problems:
            err.print(f"[red]✘[/] {plain(problem)}")
        err.print("nothing was loaded")
        return 2
    if not json:
        _say_notes(board.notes)
    loaded = {"created": 0, "existing": 0} if dry_run else with_client(where, None, lambda c: _send(c, board, json))
    if json:
        print_json({"ok": True, "tasks": len(board.tasks), **loaded, "done": len(board.done), "notes": board.notes})
    elif dry_run:
        out.print(f"[green]✔[/] {len(board.tasks)} task(s) would be loaded, {len(board.done)} of them done")
    else:
        out.print(
            f"[green]✔[/] {loaded['created']} task(s) loaded, {loaded['existing']} there already; "
            f"{len(board.done)} on the board are checked as done"
        )
    return 0


def _text(file: Path) -> str:
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(BYTES_MAX + 1)
        else:
            with file.open("rb") as opened:
                data = opened.read(BYTES_MAX + 1)
        if len(data) > BYTES_MAX:
            raise ConfigError(f"{file}: larger than {BYTES_MAX} bytes; nothing was loaded")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start}); nothing was loaded") from None


def _say_notes(notes: tuple[str, ...]) -> None:
    for note in notes[:NOTES_MAX]:
        err.print(f"[dim]{plain(note)}[/]")
    if len(notes) > NOTES_MAX:
        err.print(f"[dim]and {len(notes) - NOTES_MAX} more of these (--json has them all)[/]")


async def _send(c: Client, board: Board, json: bool) -> dict[str, int]:
    """Submits the board, chunk after chunk; how many tasks were created and how many were there."""
    from rich.progress import Progress

    created = existing = 0
    done = set(board.done)
    try:
        with Progress(console=err, transient=True, disable=json or not err.is_terminal) as progress:
            bar = progress.add_task("loading", total=len(board.tasks))
            for chunk in chunks_of(board.tasks):
                reply = await c.submit(chunk, done=[task.id for task in chunk if task.id in done])
                created += len(reply.created)
                existing += len(reply.existing)
                progress.advance(bar, len(chunk))
    except FabricError as error:
        if isinstance(error, Conflict):
            error = await _explained(c, board, error)
        if created:
            error.facts["so_far"] = f"{created} tasks were created before; load the board again to complete it"
        raise error from None
    return {"created": created, "existing": existing}


async def _explained(c: Client, board: Board, conflict: Conflict) -> Conflict:
    """The conflict, with what differs between the board's task and the one that is there."""
    mine = next((task for task in board.tasks if task.id == conflict.facts.get("task")), None)
    if mine is None:
        return conflict
    theirs = (await c.get(mine.id)).spec
    differ = [
        f"{field} is {_short(getattr(theirs, field))} there, {_short(getattr(mine, field))} on the board"
        for field in TaskSpec.__struct_fields__
        if getattr(theirs, field) != getattr(mine, field)
    ]
    if not differ:
        return conflict
    return Conflict(f"task {mine.id} exists and is another: {'; '.join(differ)}", **conflict.facts)


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def chunks_of(tasks: tuple[TaskSpec, ...]) -> list[list[TaskSpec]]:
    """The tasks in submissions: as many as one may have, and no heavier than a message may be."""
    from ifabric.wire.envelope import encode

    chunks: list[list[TaskSpec]] = [[]]
    weight = 0
    for task in tasks:
        size = len(encode(task))
        if len(chunks[-1]) == SUBMIT_MAX_TASKS or (chunks[-1] and weight + size > CHUNK_BYTES):
            chunks.append([])
            weight = 0
        chunks[-1].append(task)
        weight += size
    return chunks
