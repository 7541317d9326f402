"""Untrusted WebAssembly, as an agent's program runs it: a module goes in, what it wrote comes out.

    result = await client.run_module(Path("tool.wasm"), "--count", "3", stdin=b"...", wall_s=10, check=True)
    print(result.text)

**A module is known by its digest.** Given as a file or as bytes it is run by its digest first, and sent only when the
fabric does not know it: one round trip for what was run before, on whichever daemon. One that is larger than a message
is sent in parts (`uploading`), one module after the other: a session has room for one that is on its way.

**An answer takes as long as the run, a refusal does not.** So the two are waited for apart: what was not started (no
daemon, no free place) is tried again for the client's `timeout_s`, and an answer is waited for as long as the run may
last. When it does not come, or the daemon stops under the run, the same request is sent once more: a run with
`endpoints` or a `hold` is carried out at most once all the same, since its id is the same; any other one is repeated.
A daemon that dies says nothing, so that during a long run it is looked now and then whether the run is listed still.
A caller that is cancelled does not end the run: its limits do, an operator, or the loss of its claim.

**How a run ended** is a `Result`, whatever the exit code, as with `subprocess.run`; with `check` another code than 0
raises `ExitStatus`. A guest that was ended raises what ended it (`Trap`, `LimitReached`, `EgressDenied`, `Killed`,
`SandboxDied`), and `output_of(error)` has what it wrote until then.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import msgspec

from ifabric.calling import BACKOFF_S, Line
from ifabric.cancellation import cancel_and_wait
from ifabric.errors import (
    BadRequest,
    BreakerOpen,
    ClaimLost,
    FabricError,
    TooLarge,
    Unavailable,
    UnknownModule,
    Unreachable,
)
from ifabric.sandboxing.modules import Module, digest, id_of, read
from ifabric.sandboxing.outcome import ExitStatus, Output, Result, output_of, written
from ifabric.sandboxing.uploading import PART_S, Progress, in_parts, part_bytes
from ifabric.spending import Hold
from ifabric.wire import chassis as wire
from ifabric.wire.chassis import Limits
from ifabric.wire.envelope import Mutation

if TYPE_CHECKING:
    from ifabric.claims import Claim

__all__ = ["ExitStatus", "Module", "Output", "Progress", "Result", "RunOptions", "Sandboxed", "output_of"]

T = TypeVar("T")

#: how long a run may last that names no limit of its own: the default of `max_execution_time_seconds`
WALL_S = 300.0
#: what comes on top of a run: the queue, and reading or compiling the module
AROUND_S = 15.0
#: how often it is looked whether a run is still there, from twice that on, and how often in a row it has to be missed:
#: it may wait for its place or its module first, and what is listed is told late
LOOK_S, MISSED_MAX = 15.0, 2
#: how long a module may take to be examined and compiled
PUT_S = 45.0


class RunOptions(TypedDict, total=False):
    """What `run_module` takes by name, beside the claim and the hold."""

    stdin: str | bytes
    env: Mapping[str, str] | None
    entry: str
    limits: Limits | None
    wall_s: float | None
    cpu_percent: float | None
    memory_bytes: int | None
    fuel: int | None
    output_bytes: int | None
    endpoints: Iterable[str]
    check: bool


class Sandboxed(Line):
    """Keeps modules, and runs them."""

    #: who uploads a module waits here for who does already
    _uploading: asyncio.Lock | None = None

    # -- modules -----------------------------------------------------------------------------------------------------

    async def put_module(self, wasm: bytes | Path, *, progress: Progress | None = None) -> str:
        """Keeps a module (a `.wasm` file, or what is in one) and returns its id, "sha256:...", which is its digest.

        progress: is called with how many bytes have come and how many there are, when the module is sent in parts.

        Raises `NotWasm`, `ModuleRefused{why}`, `TooLarge`; `OSError` when the file cannot be read.
        """
        return (await self.keep_module(wasm, progress=progress)).module

    async def keep_module(self, wasm: bytes | Path, *, progress: Progress | None = None) -> wire.PutReply:
        """The same, and says what is in the module."""
        return await self._put(await read(wasm), progress)

    async def inspect_module(self, module: Module) -> wire.InspectReply:
        """What is in a module, and why `put_module` would refuse it. Raises `NotWasm`, `UnknownModule`."""
        if isinstance(module, str):
            return await self._inspect(wire.Inspect(module=id_of(module)))
        async with self._sent(await read(module)) as fields:
            return await self._inspect(wire.Inspect(**fields))

    async def modules(self, *, limit: int = 100, after: str | None = None) -> wire.ModulesReply:
        """A page of the modules that are kept, in the order of their ids."""
        reply: wire.ModulesReply = await self.call(wire.Modules(limit=limit, after=after))
        return reply

    async def _inspect(self, message: wire.Inspect) -> wire.InspectReply:
        reply: wire.InspectReply = await self._patiently(message, PUT_S)
        return reply

    async def _put(self, data: bytes, progress: Progress | None = None) -> wire.PutReply:
        async with self._sent(data, progress) as fields:
            reply: wire.PutReply = await self._patiently(wire.Put(**fields), PUT_S)
        if reply.module != digest(data):
            raise FabricError(f"what arrived is another module: {reply.module}, and not {digest(data)}; put it again")
        return reply

    @contextlib.asynccontextmanager
    async def _sent(self, data: bytes, progress: Progress | None = None) -> AsyncIterator[dict[str, str]]:
        """The fields of a message that bring a module: itself, or the name under which it was uploaded."""
        most = part_bytes(self._bus.max_payload_bytes)
        if len(data) <= most:
            yield {"wasm": base64.b64encode(data).decode()}
            return
        if self._uploading is None:
            self._uploading = asyncio.Lock()
        async with self._uploading:
            name = self._clock.token()
            await in_parts(lambda part: self._patiently(part, PART_S), name, data, most, progress)
            yield {"upload": name}

    # -- runs --------------------------------------------------------------------------------------------------------

    async def run_module(
        self,
        module: Module,
        *args: str,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        entry: str = "_start",
        limits: Limits | None = None,
        wall_s: float | None = None,
        cpu_percent: float | None = None,
        memory_bytes: int | None = None,
        fuel: int | None = None,
        output_bytes: int | None = None,
        endpoints: Iterable[str] = (),
        claim: Claim | None = None,
        task: str | None = None,
        fence: int | None = None,
        hold: Hold | str | None = None,
        check: bool = False,
    ) -> Result:
        """Runs a module in a sandbox, to its end, and returns what it wrote and took.

        module: its id, or the module itself (bytes, or a file), which is put first when it is not known.
        args: what follows the program's own name. entry: the exported function to call.
        limits: what is given by name beside it (`wall_s`, ...) goes over it; more than is configured is refused. An
            answer is waited for as long as `wall_s`, or 300 seconds: give it to a run that may last longer.
        endpoints: names from the configuration that the guest may call.
        claim: whose work it is: the run ends, and `ClaimLost` is raised, when that is lost; see `Claim.run`. For a
            claim that another process holds, `task` and `fence`.
        hold: is committed with what the run cost, however it ends.
        check: raise `ExitStatus` for another exit code than 0.

        Raises `Trap`, `LimitReached`, `EgressDenied`, `Killed`, `SandboxDied` (`output_of` has what was written until
        then), `UnknownModule`, `ClaimLost`, `Overloaded`, `Unavailable` when whether it ran is unknown, and what
        `put_module` raises.
        """
        given = _tightened(limits, wall_s, cpu_percent, memory_bytes, fuel, output_bytes)
        fed = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        data = None if isinstance(module, str) else await read(module)
        message = _message(
            module=id_of(module) if isinstance(module, str) else digest(data or b""),
            entry=entry,
            args=args,
            env=dict(env or {}),
            limits=given,
            endpoints=(endpoints,) if isinstance(endpoints, str) else tuple(endpoints),
            task=claim.task if claim is not None else task,
            fence=claim.fence if claim is not None else fence,
            hold=hold.name if isinstance(hold, Hold) else hold,
            **_stdin(fed),
        )
        running = self._carried_out(message, data)
        try:
            reply = await (running if claim is None else _while_held(claim, running))
        except FabricError as ended:
            if isinstance(ended, TooLarge) and len(fed) > wire.INLINE_MAX_BYTES:
                raise TooLarge(f"{ended.message} (stdin alone has {len(fed)} bytes)", **ended.facts) from None
            if isinstance(hold, Hold) and output_of(ended) is not None:
                hold.ended = True  # it was committed with what the run cost
            raise
        if isinstance(hold, Hold):
            hold.ended = True
        result = Result(
            run=reply.run,
            exit_code=reply.exit_code,
            stdout=written(reply.stdout, reply.stdout_b64),
            stderr=written(reply.stderr, reply.stderr_b64),
            truncated=reply.truncated,
            usage=reply.usage,
        )
        if check:
            result.check()
        return result

    async def runs(self) -> wire.RunsReply:
        """The runs that have lasted longer than a second, on all daemons; and how the one that answers is."""
        reply: wire.RunsReply = await self.call(wire.Runs())
        return reply

    async def kill_run(self, run: str, *, why: str = "") -> wire.KillReply:
        """Ends a run: its caller is told `Killed`. For operators. Raises `UnknownRun`."""
        reply: wire.KillReply = await self.call(wire.Kill(run=run, why=why))
        return reply

    async def _carried_out(self, message: wire.Run, data: bytes | None) -> wire.RunReply:
        wait_s = (message.limits.wall_s or WALL_S) + AROUND_S
        reply: wire.RunReply
        try:
            reply = await self._patiently(message, wait_s)
        except UnknownModule:
            if data is None:
                raise
            await self._put(data)
            reply = await self._patiently(message, wait_s)  # under another id: the refusal may be remembered
        return reply

    async def _patiently(self, message: wire.Run | wire.Put | wire.Inspect | wire.Upload, wait_s: float) -> Any:
        """One request whose answer may take `wait_s`, while what was not started is tried again for `timeout_s` only.

        When the answer does not come at all, or the daemon stops under it, it is sent once more, as the same request.
        """
        if isinstance(message, Mutation) and message.request_id is None:
            message = msgspec.structs.replace(message, request_id=self._clock.token())
        until = self._clock.monotonic() + self._timeout_s
        left = 1
        while True:
            began = self._clock.monotonic()
            try:
                asking = self.call(message, attempt_s=wait_s, again=False)
                if isinstance(message, wire.Run) and left:
                    return await _unless(self._gone(message), asking, _daemon_gone)
                return await asking
            except FabricError as error:
                now = self._clock.monotonic()
                under_way = isinstance(error, Unavailable) and now - began > self._timeout_s
                if isinstance(error, BreakerOpen) or not (error.retryable or isinstance(error, Unreachable)):
                    raise
                if under_way and left:
                    left, until = left - 1, now + self._timeout_s
                elif now >= until:
                    raise
            await self._clock.sleep(self._clock.jitter(*BACKOFF_S))

    async def _gone(self, message: wire.Run) -> None:
        """Returns when nobody lists the run any more, as far as it can be told from another of the same kind."""
        mine = (self.session, message.module, message.task)
        missed = 0
        await self._clock.sleep(LOOK_S)
        while missed < MISSED_MAX:
            await self._clock.sleep(LOOK_S)
            try:
                lines = (await self.runs()).runs
            except FabricError:
                continue  # nobody can say
            listed = len(lines) >= wire.PAGE_MAX or any((one.session, one.module, one.task) == mine for one in lines)
            missed = 0 if listed else missed + 1


# -- what a run is asked for with, and answered with ------------------------------------------------------------------


def _message(**fields: Any) -> wire.Run:
    """The request, checked as the daemon would check it. `BadRequest` names the field."""
    try:
        return msgspec.convert({name: value for name, value in fields.items() if value is not None}, wire.Run)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the run cannot be asked for: {error}") from None


def _tightened(limits: Limits | None, *given: float | None) -> dict[str, float]:
    """The limits as fields, with those that are given one by one, in their order, over them."""
    named = zip(Limits.__struct_fields__, given, strict=True)
    made = msgspec.structs.asdict(limits or Limits()) | {name: value for name, value in named if value is not None}
    return {name: value for name, value in made.items() if value is not None}


def _stdin(data: bytes) -> dict[str, str]:
    """As text where that is shorter: a control character takes six bytes in JSON."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    else:
        if len(msgspec.json.encode(text)) - 2 <= -(-len(data) // 3) * 4:
            return {"stdin": text} if text else {}
    return {"stdin_b64": base64.b64encode(data).decode()}


def _daemon_gone() -> Unavailable:
    return Unavailable("the daemon that had the run is gone; how far it came is unknown", what="chassis")


async def _while_held(claim: Claim, running: Coroutine[Any, Any, T]) -> T:
    """Runs it as long as the claim is held. `ClaimLost` when it is lost before the answer is there."""
    during = "the claim was lost during the run"
    if claim.lost.is_set():
        running.close()
        raise ClaimLost(f"the claim was lost before the run: {claim.lost_reason}", task=claim.task)
    lost = claim.lost.wait()
    return await _unless(lost, running, lambda: ClaimLost(f"{during}: {claim.lost_reason}", task=claim.task))


async def _unless(ends: Coroutine[Any, Any, Any], running: Coroutine[Any, Any, T], error: Callable[[], Exception]) -> T:
    """What `running` comes to, unless `ends` does first: then it is cancelled, and the error raised."""
    asking, ending = asyncio.ensure_future(running), asyncio.ensure_future(ends)
    either: set[asyncio.Future[Any]] = {asking, ending}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise error()
        return asking.result()
    finally:
        await cancel_and_wait(asking, ending)
