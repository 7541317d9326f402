"""`ifabric audit tail|search|export`: who did what, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from ifabric import __version__
from ifabric.audit import reading
from ifabric.audit.exporting import cef_line, json_line
from ifabric.audit.stored import Stored
from ifabric.cli.auditing import CLOCK, AfterSeq, Filters, Since, Until, cells, line, moment, progress, said
from ifabric.cli.options import Json, Where
from ifabric.cli.output import err, out, plain, print_json, print_json_line, print_table
from ifabric.errors import ConfigError

COLUMNS = ("TIME", "WHO", "VERB", "ON", "OUTCOME", "CODE", "REQUEST")
#: how wide who, verb and on what are at least in a line
WIDTHS = (23, 12, 20, 24, 7, 0, 0)
ANY = Filters()


def tail(
    *,
    number: Annotated[
        int, Parameter(name=["--number", "-n"], help="How many.", validator=Number(gte=0, lte=100_000))
    ] = 20,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], help="Then new ones, as they come, until Ctrl-C.")
    ] = False,
    filters: Filters = ANY,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Show the newest records of the audit, a line each: when, who, what, on what, and
    what became of it.

    It needs the role auditor (`ifabric agent create NAME --role auditor`), where
    there are identities.

    For example:

        ifabric audit tail
        ifabric audit tail --follow --outcome refused
        ifabric audit tail -n 100 --session alice --json | jq -r .verb
    """
    wanted = filters.wanted()

    async def act() -> None:
        async with line(where) as bus:
            stream = await reading.facts(bus)
            last = stream.last_seq
            for stored in await reading.newest(bus, CLOCK, wanted, number, last, stream.first_seq):
                _show(stored, json=json)
            if follow:
                async with contextlib.aclosing(reading.messages(bus, CLOCK, after_seq=last, wanted=wanted)) as coming:
                    async for stored in coming:
                        if wanted.has(stored):
                            _show(stored, json=json)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(act())
    return 0


def _show(stored: Stored, *, json: bool) -> None:
    if json:
        print_json_line(said(stored))
        return
    shown = (Text.from_markup(cell) for cell in cells(stored))
    padded = []
    for width, cell in zip(WIDTHS, shown, strict=True):
        cell.pad_right(max(0, width - cell.cell_len))
        padded.append(cell)
    full = Text("  ").join(padded)
    full.rstrip()
    out.print(full)


def search(
    *,
    since: Since = None,
    until: Until = None,
    text: Annotated[str, Parameter(help="Anywhere in the record, whatever its case.")] = "",
    request_id: Annotated[str, Parameter(help="Of this request.")] = "",
    trace: Annotated[str, Parameter(help="Of this trace: its id, or a part of the traceparent.")] = "",
    limit: Annotated[int, Parameter(help="At most so many, the oldest first; 0: all.", validator=Number(gte=0))] = 1000,
    after_seq: AfterSeq = 0,
    filters: Filters = ANY,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Find records of the audit. By component, verb and beginning the server chooses;
    for all else the records are read.

    For example:

        ifabric audit search --since 2h --session alice
        ifabric audit search --since 2026-11-28T10:00Z --until 2026-11-28T11:00Z --outcome refused
        ifabric audit search --component identity --verb create --json
        ifabric audit search --request-id r-4711
    """
    wanted = filters.wanted(
        text=text,
        request_id=request_id,
        trace=trace,
        since_ms=moment(since, "since"),
        until_ms=moment(until, "until"),
    )
    found: list[Stored] = []

    async def act() -> bool:
        """Whether there are more."""
        async with line(where) as bus:
            stream = await reading.facts(bus)
            with progress("reading", quiet=json) as told:
                read = reading.messages(
                    bus, CLOCK, after_seq=after_seq, until_seq=stream.last_seq, wanted=wanted, progress=told
                )
                async with contextlib.aclosing(read):
                    async for stored in read:
                        if wanted.has(stored):
                            if limit and len(found) >= limit:
                                return True
                            found.append(stored)
        return False

    more = asyncio.run(act())
    if json:
        print_json({"records": [said(stored) for stored in found], "more": more})
        return 0
    print_table(COLUMNS, (tuple(Text.from_markup(cell) for cell in cells(stored)) for stored in found))
    if not found:
        out.print("[dim]nothing of that kind is in the audit[/]")
    if more:
        err.print(f"[yellow]there are more:[/] --after-seq {found[-1].seq} goes on, --limit 0 shows all")
    return 0


# -- export --------------------------------------------------------------------------------------------------------------


class Exported(NamedTuple):
    """How far an export came."""

    records: int
    #: the last sequence number that was looked at: where the next one begins
    last_seq: int


def export(
    *,
    format_: Annotated[
        Literal["jsonl", "cef"],
        Parameter(name="--format", help="JSON lines with the stored bytes, or ArcSight's CEF:0 for a SIEM."),
    ],
    since: Since = None,
    until: Until = None,
    after_seq: AfterSeq = 0,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Into a new file, whole or not at all.")
    ] = None,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], help="Then new ones, as they come, until Ctrl-C.")
    ] = False,
    filters: Filters = ANY,
    json: Annotated[
        bool, Parameter(help="Say in JSON how far it came: on stdout with --output, else on stderr.")
    ] = False,
    where: Where | None = None,
) -> int:
    """Hand the audit to something else: a SIEM, a forwarder, a file that is kept
    elsewhere. At the end it says the last sequence number, from which the next
    export goes on (--after-seq). Keep exports where nobody can reach them who can
    reach NATS: they are what a changed audit is held against.

    For example:

        ifabric audit export --format jsonl --output audit-2026-11-28.jsonl
        ifabric audit export --format jsonl --after-seq 48211 --output audit-2026-11-29.jsonl
        ifabric audit export --format cef --follow | logger -n siem -P 514 -T
        ifabric audit export --format cef --since 24h --outcome refused
    """
    if follow and output is not None:
        raise ConfigError("--follow has no end, and --output is written at the end: leave one of them out")
    wanted = filters.wanted(since_ms=moment(since, "since"), until_ms=moment(until, "until"))
    came = Exported(0, after_seq)

    def as_line(stored: Stored) -> bytes:
        return json_line(stored) if format_ == "jsonl" else cef_line(stored, __version__)

    async def act(write: Callable[[bytes], object]) -> None:
        nonlocal came
        async with line(where) as bus:
            stream = await reading.facts(bus)
            with progress("exporting", quiet=json or output is None) as told:
                until_seq = None if follow else stream.last_seq
                read = reading.messages(
                    bus, CLOCK, after_seq=after_seq, until_seq=until_seq, wanted=wanted, progress=told
                )
                async for stored in _of(read):
                    meant = wanted.has(stored)
                    if meant:
                        write(as_line(stored) + b"\n")
                    came = Exported(came.records + meant, stored.seq)
                if not follow:
                    came = Exported(came.records, max(came.last_seq, stream.last_seq))

    with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
        if output is None:
            asyncio.run(act(_to_stdout(flush=follow)))
        else:
            with _new_file(output) as file:
                asyncio.run(act(file.write))
    sys.stdout.flush()
    _say(came, output, json=json)
    return 0


async def _of(read: AsyncGenerator[Stored]) -> AsyncGenerator[Stored]:
    async with contextlib.aclosing(read) as closing:
        async for stored in closing:
            yield stored


def _to_stdout(*, flush: bool) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        if flush:
            sys.stdout.buffer.flush()

    return write


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there, whole and on disk, when this ends well, and not at all when it does not. `ConfigError`."""
    part = path.with_name(f".{path.name}.{CLOCK.token()[:8]}.part")
    taken = f"{path} is there already; nothing was written. Name another."
    if path.exists():
        raise ConfigError(taken)
    try:
        file = os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # and not over one that has come meanwhile
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except FileExistsError:
        raise ConfigError(taken) from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _say(came: Exported, output: Path | None, *, json: bool) -> None:
    if json and output is not None:
        print_json({"file": str(output), "records": came.records, "last_seq": came.last_seq})
    elif json:
        print(f'{{"records": {came.records}, "last_seq": {came.last_seq}}}', file=sys.stderr)
    else:
        place = f" in {plain(output)}" if output is not None else ""
        err.print(f"{came.records} record(s){place}; the next export goes on with --after-seq {came.last_seq}")
