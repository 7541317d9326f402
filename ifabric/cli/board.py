"""`ifabric board load`: put a whole board there."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from ifabric.board import Format, format_of, read_board
from ifabric.cli.connect import Where, with_client
from ifabric.cli.output import err, out, print_json
from ifabric.client import Client
from ifabric.errors import BadRequest, ConfigError
from ifabric.wire.coordinator import SUBMIT_MAX_TASKS, TaskSpec

BYTES_MAX = 64 * 1024 * 1024
#: what one submission may weigh: well below NATS's default limit for a message
CHUNK_BYTES = 512 * 1024


def load(
    file: Path, *, format: Format | None = None, dry_run: bool = False, json: bool = False, where: Where | None = None
) -> int:
    """Load a task board: Markdown task lists and tables, YAML or JSON.

    Everything is read and checked first; a bad row is named by its line and nothing is sent. A checked item arrives
    done. Loading twice changes nothing. Up to 100 tasks go in one transaction; a larger board goes in several,
    dependencies first, and if it is interrupted, loading it again completes it.

    Examples:
        ifabric board load docs/TASK-BOARD.md
        ifabric board load board.yaml --dry-run
    """
    kind = format or format_of(file)
    if kind is None:
        raise ConfigError(f"{file}: say --format md, yaml or json; the name does not")
    try:
        if file.stat().st_size > BYTES_MAX:
            raise ConfigError(f"{file}: larger than {BYTES_MAX} bytes; nothing was loaded")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start}); nothing was loaded") from None
    try:
        board = read_board(text, format=kind, filename=str(file))
    except BadRequest as refusal:
        problems = refusal.message.split("\n")
        if json:
            print_json({"ok": False, "errors": problems})
        for problem in () if json else problems:
            err.print(f"[red]✘[/] {escape(problem)}")
        if not json:
            err.print("nothing was loaded")
        return 2
    if dry_run:
        return _report(len(board.tasks), 0, len(board.done), json=json, verb="would be loaded")

    async def send(c: Client) -> tuple[int, int]:
        created = existing = 0
        done = set(board.done)
        with Progress(console=err, transient=True, disable=json) as progress:
            bar = progress.add_task("loading", total=len(board.tasks))
            for chunk in chunks_of(board.tasks):
                reply = await c.submit(chunk, done=[task.id for task in chunk if task.id in done])
                created += len(reply.created)
                existing += len(reply.existing)
                progress.advance(bar, len(chunk))
        return created, existing

    created, existing = with_client(where, None, send)
    return _report(created, existing, len(board.done), json=json)


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


def _report(created: int, existing: int, done: int, *, json: bool, verb: str = "loaded") -> int:
    if json:
        print_json({"ok": True, "created": created, "existing": existing, "done": done})
    else:
        out.print(
            f"[green]✔[/] {created} task(s) {verb}, {existing} there already, {done} of the board checked as done"
        )
    return 0
