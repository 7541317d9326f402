"""`ifabric sandbox run`: a guest, as if it were a program of this machine.

Its standard output, its standard error and its exit code are its own, byte for byte. What the fabric has to say goes to
standard error.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import complain, err, print_json, usd
from ifabric.cli.sandbox import named, readable, size
from ifabric.errors import ConfigError, FabricError
from ifabric.wire.chassis import Limits, RunUsage

if TYPE_CHECKING:
    from ifabric.client import Client
    from ifabric.sandboxing import Output, Result, RunOptions

#: the highest exit code that a process can have
CODE_MAX = 255
#: what is read of a standard input; a run takes less, and says how much
STDIN_MAX_BYTES = 16 << 20
MIB = 1 << 20
#: units of the command line, in those of the wire
LIMITS = (*Limits.__struct_fields__, "memory_mb")
#: facts that were written to the streams instead
_WRITTEN = ("run", "stdout", "stdout_b64", "stderr", "stderr_b64", "truncated", "usage")


@Parameter(name="*")
@dataclass(frozen=True)
class Given:
    """What the guest is given, and how much it may take."""

    stdin: Annotated[
        str | None,
        Parameter(
            help="Text, @FILE, or - for this command's own. Default: what is piped in.", allow_leading_hyphen=True
        ),
    ] = None
    env: Annotated[tuple[str, ...], Parameter(help="NAME=VALUE, for the guest to see; again for more.")] = ()
    limit: Annotated[
        tuple[str, ...], Parameter(help=f"Tighten one, as memory_mb=64; again for more: {', '.join(LIMITS)}.")
    ] = ()
    endpoint: Annotated[
        tuple[str, ...], Parameter(help="A name from the configuration that it may call; again for more.")
    ] = ()
    entry: Annotated[str, Parameter(help="The exported function to call.")] = "_start"

    def options(self) -> RunOptions:
        """The same for the SDK. `ConfigError` names what is wrong."""
        environ = _environ(self.env)
        _utf8(*environ, *environ.values())
        return {
            "limits": _limits(self.limit),
            "env": environ,
            "endpoints": self.endpoint,
            "entry": self.entry,
            "stdin": _stdin(self.stdin),
        }


@Parameter(name="*")
@dataclass(frozen=True)
class Whose:
    """Whose run it is, and what it is for."""

    task: Annotated[str | None, Parameter(help="The claim that it is for: it ends when that is lost.")] = None
    fence: Annotated[int | None, Parameter(help="The claim's fence. Default: the last one of the task.")] = None
    hold: Annotated[str | None, Parameter(help="The session's open hold that pays for it.")] = None
    session: Annotated[
        str | None,
        Parameter(name=["--session", "-s"], env_var="IFABRIC_SESSION", help="Whose it is. A claim or hold needs one."),
    ] = None

    def check(self) -> None:
        """`ConfigError` when something is missing."""
        if (self.task is not None or self.hold is not None) and self.session is None:
            raise ConfigError(
                f"--{'task' if self.task is not None else 'hold'} is a session's: say whose, with --session"
            )
        if self.fence is not None and self.task is None:
            raise ConfigError("--fence is a claim's: say of which task, with --task")


def run(
    module: Annotated[str, Parameter(help="A .wasm file, or the id of a module that is kept.")],
    /,
    *arguments: Annotated[str, Parameter(help="The guest's own, after -- if one begins with a hyphen.")],
    given: Given | None = None,
    whose: Whose | None = None,
    usage: Annotated[bool, Parameter(help="Say on stderr what it took.")] = False,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Run WebAssembly in a sandbox, and be it to your shell: its output, its errors
    and its exit code are the guest's own.

    A file is sent only when the fabric does not know it. A guest that was ended
    (trap, limit, killed) or not started is an error, and exit 1 (3 when nothing
    answers, 2 for what is written wrong); --json tells that apart from a guest
    that ended with 1: it prints either {"exit_code": ...} or {"error": ...}.

    For example:

        ifabric sandbox run tool.wasm -- --count 3
        sort -u words | ifabric sandbox run wc.wasm --limit memory_mb=64
        ifabric sandbox run sha256:9f86... --env LANG=C --endpoint openai --usage
        ifabric sandbox run tool.wasm --task P0.1.5 --session alice
    """
    asked, by = named(module), whose or Whose()
    by.check()
    _utf8(*arguments)
    options = (given or Given()).options()

    async def act(c: Client) -> Result:
        fence = by.fence if by.fence is not None or by.task is None else (await c.get(by.task)).fence
        return await readable(
            asked, lambda: c.run_module(asked, *arguments, task=by.task, fence=fence, hold=by.hold, **options)
        )

    try:
        result = with_client(where, by.session, act)
    except KeyboardInterrupt:
        err.print("[dim]the guest runs on until its limits end it: ifabric sandbox ps, ifabric sandbox kill[/]")
        raise
    except FabricError as error:
        return _ended(error, json=json, usage=usage)
    return _done(result, json=json, usage=usage)


# -- what it is given -------------------------------------------------------------------------------------------------


def _limits(words: tuple[str, ...]) -> Limits:
    """`memory_mb=64` and the like. `ConfigError` names what is wrong."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--limit {word}: write it as NAME=VALUE, for example memory_mb=64")
        if name not in LIMITS:
            close = difflib.get_close_matches(name, LIMITS, 1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(LIMITS)}"
            raise ConfigError(f"--limit {word}: there is no limit {name}; {hint}")
        key = "memory_bytes" if name == "memory_mb" else name
        if key in found:
            raise ConfigError(f"--limit {word}: {key} is limited already")
        try:
            found[key] = _number(text, scale=MIB) if name == "memory_mb" else _number(text)
            msgspec.convert({key: found[key]}, Limits)
        except (ValueError, msgspec.ValidationError) as error:
            said = str(error).removesuffix(f" - at `$.{key}`").replace(" | null", "").replace("`", "")
            raise ConfigError(f"--limit {word}: {said}") from None
    return msgspec.convert(found, Limits)


def _number(text: str, *, scale: int | None = None) -> int | float:
    """A number that was written, whole if it can be. With a scale it becomes whole."""
    try:
        value = float(text.replace("_", ""))
        if not abs(value) < 1e18:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if scale is not None:
        return int(value * scale)
    return int(value) if value.is_integer() else value


def _environ(words: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env {word}: write it as NAME=VALUE; nothing of this shell's is passed on by itself")
        found[name] = value
    return found


def _utf8(*words: str) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{word!r} is not UTF-8, and a guest is given text") from None


def _stdin(word: str | None) -> bytes:
    """What the guest reads: the text, @FILE, -, or what is piped in."""
    if word is None:
        return _read("standard input", sys.stdin.buffer) if _piped() else b""
    if word == "-":
        return _read("standard input", sys.stdin.buffer)
    if not word.startswith("@"):
        return os.fsencode(word)
    try:
        with Path(word[1:]).open("rb") as file:
            return _read(word[1:], file)
    except OSError as error:
        raise ConfigError(f"{word[1:]}: cannot be read: {error.strerror}") from None


def _read(name: str, file: Any) -> bytes:
    data: bytes = file.read(STDIN_MAX_BYTES + 1)
    if len(data) > STDIN_MAX_BYTES:
        raise ConfigError(f"{name} is larger than any run takes ({size(STDIN_MAX_BYTES)})")
    return data


def _piped() -> bool:
    """Whether somebody feeds this command: a pipe, a file or a socket, and not a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, or it is not the system's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


# -- what has become of it ----------------------------------------------------------------------------------------------


def _done(result: Result, *, json: bool, usage: bool) -> int:
    """A guest that came to its own end: what it wrote, and the exit code."""
    code = result.exit_code if 0 <= result.exit_code <= CODE_MAX else CODE_MAX
    notes = []
    if result.truncated:
        notes.append("[yellow]![/] it wrote more than output_bytes allows; the rest is not here")
    if code != result.exit_code:
        notes.append(
            f"[yellow]![/] it ended with exit code {result.exit_code}, and a process can with {CODE_MAX} at most"
        )
    if usage:
        notes.append(_took(result.usage))
    if json:
        print_json(_reply(result))
    else:
        _write(result, more=bool(notes))
    for note in notes:
        err.print(note)
    return code


def _ended(error: FabricError, *, json: bool, usage: bool) -> int:
    """A guest that was ended: what it wrote until then, and one sentence. Raises any other error."""
    from ifabric.sandboxing import output_of

    written = output_of(error)
    if written is None:
        raise error
    if json:
        print_json(error.to_body())
    else:
        _write(written, more=True)
    complain(type(error)(error.message, **{k: v for k, v in error.facts.items() if k not in _WRITTEN}))
    if usage and written.usage is not None:
        err.print(_took(written.usage))
    return 1


def _write(output: Output, *, more: bool) -> None:
    """Both streams, exactly as the guest wrote them; with `more` to follow, on a line of its own."""
    stderr = output.stderr
    if more and stderr and not stderr.endswith(b"\n"):
        stderr += b"\n"
    for stream, data in ((sys.stdout, output.stdout), (sys.stderr, stderr)):
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()


def _reply(result: Result) -> dict[str, Any]:
    """As on the wire, with every field."""
    return {
        "run": result.run,
        "exit_code": result.exit_code,
        **_stream("stdout", result.stdout),
        **_stream("stderr", result.stderr),
        "truncated": result.truncated,
        "usage": result.usage,
    }


def _stream(name: str, data: bytes) -> dict[str, Any]:
    """Text where it is text, else base64."""
    with contextlib.suppress(UnicodeDecodeError):
        return {name: data.decode()}
    return {f"{name}_b64": data}


def _took(took: RunUsage) -> str:
    egress = f", {took.egress_calls} call(s) of {size(took.egress_bytes)}" if took.egress_calls else ""
    cost = f", {usd(took.cost_micro_usd)}" if took.cost_micro_usd else ""
    return (
        f"usage: {took.wall_s:.3f} s, {took.cpu_s:.3f} s of CPU, {took.fuel:,} fuel, "
        f"{size(took.memory_peak_bytes)} of memory, {size(took.stdout_bytes)} written{egress}{cost}"
    )
