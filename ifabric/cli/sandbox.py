"""`ifabric sandbox put|list|inspect|ps|kill`: modules, what runs, and how well. `sandbox run` is in `ifabric.cli.guest`."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import complain, err, out, plain, print_json, print_table
from ifabric.errors import (
    ConfigError,
    FabricError,
    ModuleRefused,
    NotWasm,
    TooLarge,
    UnknownModule,
    UnknownRun,
)
from ifabric.wire import chassis as wire
from ifabric.wire.envelope import Reply

if TYPE_CHECKING:
    from ifabric.client import Client
    from ifabric.sandboxing import Progress

T = TypeVar("T")

#: characters of a module's digest that are shown where a row has to be short
SHORT = 12
#: cells of a bar
BAR = 16
#: refusals of one file that say nothing about the next
OF_ONE_FILE = (ConfigError, ModuleRefused, NotWasm, TooLarge)


def put(
    *files: Annotated[Path, Parameter(help="The .wasm file.")], json: Json = False, where: Where | None = None
) -> int:
    """Keep modules, and say their ids. A module is known by its digest: putting it
    twice changes nothing. Exit 1 when one was refused; the others are kept.

    For example:

        ifabric sandbox put tool.wasm
        ifabric sandbox put build/*.wasm --json | jq -r '.[].module'
    """
    if not files:
        raise ConfigError("say which files: ifabric sandbox put TOOL.wasm")

    async def each(c: Client) -> list[tuple[Path, wire.PutReply | FabricError]]:
        done: list[tuple[Path, wire.PutReply | FabricError]] = []
        for file in files:
            try:
                with _bar(file) as come:
                    done.append((file, await readable(file, lambda: c.keep_module(file, progress=come))))  # noqa: B023  awaited here
            except OF_ONE_FILE as refused:
                done.append((file, refused))
        return done

    done = with_client(where, None, each)
    kept = [(file, reply) for file, reply in done if not isinstance(reply, FabricError)]
    refused = [(file, error) for file, error in done if isinstance(error, FabricError)]
    if json:
        print_json([{"file": str(f), **(r.to_body() if isinstance(r, FabricError) else _plain(r))} for f, r in done])
    elif kept:
        rows = [
            (file.name, r.module, Text(size(r.size), justify="right"), _sources(r.imports), "there already" * r.again)
            for file, r in kept
        ]
        print_table(("FILE", "MODULE", "SIZE", "IMPORTS", ""), rows)
    for file, error in refused:
        named = error.message if str(file) in error.message else f"{file}: {error.message}"
        complain(type(error)(named, **{name: fact for name, fact in error.facts.items() if name != "why"}))
        if isinstance(error, ModuleRefused):
            err.print(f"[dim]  all of what is in it: ifabric sandbox inspect {plain(file)}[/]")
    unreadable = any(isinstance(error, ConfigError) for _, error in refused)
    return 2 if unreadable else 1 if refused else 0


def list_(
    *,
    limit: Annotated[int, Parameter(help="How many at most.", validator=Number(gte=1, lte=wire.PAGE_MAX))] = 100,
    after: Annotated[str | None, Parameter(help="Only modules whose id comes after this one.")] = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """List the modules that are kept, in the order of their ids.

    For example:

        ifabric sandbox list
        ifabric sandbox list --json | jq -r .modules[].module
    """
    last = None if after is None else module_of(after)
    found = with_client(where, None, lambda c: c.modules(limit=limit, after=last))
    if json:
        print_json({"modules": found.modules, "after": found.after})
        return 0
    print_table(
        ("MODULE", "SIZE", "SINCE"), [(m.module, Text(size(m.size), justify="right"), m.at) for m in found.modules]
    )
    if not found.modules:
        out.print("[dim]no module is kept yet: ifabric sandbox put TOOL.wasm[/]")
    if found.after:
        out.print(f"[dim]there are more: ifabric sandbox list --limit {limit} --after {plain(found.after)}[/]")
    return 0


def inspect(
    module: Annotated[str, Parameter(help="A .wasm file, or the id of a module that is kept.")],
    /,
    *,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Show what is in a module, and why it would be refused. Nothing is kept. Exit 1
    when it would be refused.

    For example:

        ifabric sandbox inspect tool.wasm
        ifabric sandbox inspect tool.wasm --json | jq .imports
    """
    asked = named(module)
    found = with_client(where, None, lambda c: readable(asked, lambda: c.inspect_module(asked)))
    if json:
        print_json(_plain(found))
    else:
        _show(module, found)
    return 0 if found.accepted else 1


def ps(*, json: Json = False, where: Where | None = None) -> int:
    """Show the runs that have lasted longer than a second, on all daemons; and of the
    daemon that answers its workers and its service level.

    For example:

        ifabric sandbox ps
        ifabric sandbox ps --json | jq -r '.runs[] | select(.age_s > 60).run'
    """
    found = with_client(where, None, lambda c: c.runs())
    if json:
        print_json({"runs": found.runs, "pool": found.pool, "slo": found.slo})
        return 0
    rows = [
        (
            run.run,
            run.session,
            short(run.module),
            Text(_time(run.age_s), justify="right"),
            Text(_time(run.wall_left_s), justify="right"),
            run.task or "",
            run.daemon,
        )
        for run in found.runs
    ]
    if rows:
        print_table(("RUN", "SESSION", "MODULE", "AGE", "LEFT", "TASK", "DAEMON"), rows)
    else:
        out.print("[dim]nothing has run for longer than a second[/]")
    pool = found.pool
    waiting = f"[yellow]{pool.queued} waiting[/]" if pool.queued else "0 waiting"
    out.print(f"workers  {pool.busy} busy, {pool.idle} idle, {waiting}; {pool.workers} of at most {pool.max}")
    _service_level(found.slo)
    return 0


def kill(
    run: Annotated[str, Parameter(help="The run's id, as `sandbox ps` shows it.", allow_leading_hyphen=True)],
    /,
    *,
    why: Annotated[str, Parameter(help="Why, in words; its caller is told.")] = "",
    json: Json = False,
    where: Where | None = None,
) -> int:
    """End a run, on whichever daemon it is. Its caller is told that it was killed.

    For example:

        ifabric sandbox kill r-7Yk2 --why "it has looped for an hour"
    """
    try:
        reply = with_client(where, None, lambda c: c.kill_run(run, why=why))
    except UnknownRun as unknown:
        raise UnknownRun(f"{unknown.message} What runs: ifabric sandbox ps", **unknown.facts) from None
    if json:
        print_json(_plain(reply))
    else:
        out.print(f"[green]✔[/] {plain(reply.run)}, which {plain(reply.session)} had asked for, is ended")
    return 0


# -- what other verbs need, too ----------------------------------------------------------------------------------------


def short(module: str) -> str:
    """A module's id for a row of a table, as git shortens its own."""
    kind, colon, digest = module.partition(":")
    return f"{kind}{colon}{digest[:SHORT]}"


def size(count: int) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return f"{count} B"
    amount, units = count / 1024, ["KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.1f} {units[0]}"


def named(module: str) -> str | Path:
    """A module as it is written on a command line: an id, or else a file. `ConfigError` for what is almost an id."""
    return module_of(module) if module.startswith("sha256:") and not Path(module).exists() else Path(module)


def module_of(text: str) -> str:
    """An id. `ConfigError` when it is none."""
    from ifabric.sandboxing.modules import id_of

    try:
        return id_of(text)
    except ValueError:
        raise ConfigError(
            f"{text[:80]!r} is no module's id: sha256: and 64 hexadecimal digits, as `ifabric sandbox list` shows them"
        ) from None


async def readable(module: str | Path, act: Callable[[], Awaitable[T]]) -> T:
    """What `act` does with a module. `ConfigError` when its file cannot be read; `UnknownModule` says what to do."""
    try:
        return await act()
    except OSError as error:
        raise ConfigError(f"{module}: cannot be read: {error.strerror or error}") from None
    except UnknownModule as unknown:
        raise UnknownModule(
            f"no module {module!s} is kept; put it first: ifabric sandbox put TOOL.wasm", **unknown.facts
        ) from None


# -- inside ------------------------------------------------------------------------------------------------------------


def _plain(reply: Reply) -> dict[str, Any]:
    """A reply with the fields that say nothing, too: for machines."""
    return {name: getattr(reply, name) for name in reply.__struct_fields__}


@contextlib.contextmanager
def _bar(file: Path) -> Iterator[Progress]:
    """On a terminal, how far a file has come; it is told to what this gives."""
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(binary_units=True))
    with rich.Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        name, weight = plain(file.name), _weight(file)
        task = shown.add_task(f"sending {name}", total=weight or None)

        def come(there: int, of: int) -> None:
            what = "examining" if there >= of else "sending"
            shown.update(task, completed=there, total=of, description=f"{what} {name}")

        yield come


def _weight(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # reading it will say why


def _sources(imports: tuple[str, ...]) -> str:
    """Where a module imports from, and how much."""
    counted: dict[str, int] = {}
    for name in imports:
        source = name.partition(".")[0]
        counted[source] = counted.get(source, 0) + 1
    return ", ".join(f"{source} ({count})" for source, count in counted.items())


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _show(module: str, found: wire.InspectReply) -> None:
    mark = "[green]✔[/] accepted" if found.accepted else "[red]✘[/] refused"
    out.print(f"{mark}  [bold]{plain(module)}[/]  {size(found.size)}")
    if found.module != module:
        out.print(f"  {plain(found.module)}")
    for why in found.why:
        out.print(f"  [red]✘[/] {plain(why)}")
    if found.memories:
        most = "no maximum" if found.memory_max_bytes is None else f"at most {size(found.memory_max_bytes)}"
        out.print(f"  memory   {size(found.memory_min_bytes)}, {most}")
    out.print(f"  defines  {found.functions} function(s), {found.tables} table(s), {found.memories} memory(s)")
    for what, names in (("imports", found.imports), ("exports", found.exports)):
        for number, name in enumerate(names):
            out.print(f"  {'' if number else what:<7}  {plain(name)}")
    if found.sections:
        most_bytes = sum(found.sections.values()) or 1
        print_table(
            ("SECTION", "SIZE", ""),
            [
                (name, Text(size(count), justify="right"), "█" * round(BAR * count / most_bytes))
                for name, count in found.sections.items()
            ],
        )


def _service_level(slo: wire.Slo) -> None:
    window = _time(slo.window_s)
    if not slo.runs:
        out.print(f"service  no run within {window}")
        return
    slow = "red" if slo.latency_p95_ms > slo.target_latency_p95_ms else "green"
    short_ = "red" if slo.availability_percent < slo.target_availability_percent else "green"
    out.print(
        f"service  overhead p95 [{slow}]{slo.latency_p95_ms:.2f} ms[/] (target {slo.target_latency_p95_ms:g}), "
        f"available [{short_}]{slo.availability_percent:.3f} %[/] (target {slo.target_availability_percent:g}); "
        f"{slo.runs} run(s) within {window}"
    )
    left = slo.error_budget_left
    filled = round(BAR * min(1.0, max(0.0, left)))
    style = "red" if left <= 0 else "yellow" if left < 0.25 else "green"
    said = f"overdrawn, {left:.0%}" if left < 0 else f"{left:.0%} left"
    out.print(f"  error budget [{style}]{'█' * filled}[/][dim]{'·' * (BAR - filled)}[/] [{style}]{said}[/]")
