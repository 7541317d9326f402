"""A chassis without sandboxes: it keeps what it is given and answers a run as the run's first argument says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

from ifabric.actor.base import Actor, Caller, handles
from ifabric.errors import FabricError, ModuleRefused, Trap, UnknownModule, UnknownRun
from ifabric.wire import chassis as wire
from ifabric.wire.envelope import encode, loads

WASM = b"\0asm\1\0\0\0"
USAGE = wire.RunUsage(
    wall_s=0.012,
    cpu_s=0.01,
    fuel=1_234_567,
    memory_peak_bytes=1_114_112,
    stdout_bytes=5,
    egress_bytes=0,
    egress_calls=0,
    cost_micro_usd=7,
)
SLO = wire.Slo(
    window_s=3600,
    runs=120,
    latency_p95_ms=1.25,
    target_latency_p95_ms=10,
    availability_percent=99.95,
    target_availability_percent=99.9,
    error_budget_left=0.5,
)
LINE = wire.RunLine(
    run="r-1",
    session="alice",
    module="sha256:" + "9f" * 32,
    since="2026-11-24T09:30:00.000Z",
    age_s=75.25,
    wall_left_s=12.5,
    task="P0.1.5",
    daemon="d-1",
)


def named(wasm: bytes) -> str:
    return f"sha256:{hashlib.sha256(wasm).hexdigest()}"


class FakeChassis(Actor):
    """`refusals` are raised, one a run; a run of "wait" ends when `gate` is set."""

    component = "chassis"
    description = "Answers as it is told."

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.kept: dict[str, bytes] = {}
        #: (session, upload) -> its parts
        self.uploads: dict[tuple[str, str], dict[int, wire.Upload]] = {}
        self.asked: list[wire.Run] = []
        self.killed: list[tuple[str, str, str]] = []
        self.refusals: list[FabricError] = []
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()

    def draining(self) -> None:
        self.gate.set()

    def _bytes(self, message: wire.Put | wire.Inspect, caller: Caller) -> bytes:
        if message.upload is None:
            return base64.b64decode(message.wasm or "")
        parts = self.uploads.pop((caller.session, message.upload))
        assert sorted(parts) == list(range(len(parts))), "all were uploaded first"
        assert [number for number, part in parts.items() if part.last] == [len(parts) - 1]
        data = b"".join(base64.b64decode(parts[number].data) for number in sorted(parts))
        assert {part.sha256 for part in parts.values()} == {hashlib.sha256(data).hexdigest()}
        return data

    @handles
    async def upload(self, message: wire.Upload, caller: Caller) -> wire.UploadReply:
        parts = self.uploads.setdefault((caller.session, message.upload), {})
        again, parts[message.part] = message.part in parts, message
        size = sum(len(base64.b64decode(part.data)) for part in parts.values())
        return wire.UploadReply(upload=message.upload, part=message.part, parts=len(parts), size=size, again=again)

    @handles
    async def put(self, message: wire.Put, caller: Caller) -> wire.PutReply:
        data = self._bytes(message, caller)
        if data.endswith(b"bad"):
            raise ModuleRefused("the module imports evil.open, which no sandbox has", why="import")
        if data.endswith(b"damaged on its way"):
            data += b"!"
        module = named(data)
        again, self.kept[module] = module in self.kept, data
        imports = ("wasi_snapshot_preview1.fd_write", "wasi_snapshot_preview1.proc_exit", "ifabric.http")
        return wire.PutReply(module=module, size=len(data), imports=imports, exports=("_start", "memory"), again=again)

    @handles
    async def inspect(self, message: wire.Inspect, caller: Caller) -> wire.InspectReply:
        if message.module is not None and message.module not in self.kept:
            raise UnknownModule(module=message.module)
        data = self.kept[message.module] if message.module is not None else self._bytes(message, caller)
        bad = data.endswith(b"bad")
        return wire.InspectReply(
            module=named(data),
            size=len(data),
            imports=("evil.open",) if bad else ("wasi_snapshot_preview1.fd_write",),
            exports=("_start", "memory"),
            accepted=not bad,
            why=("it imports evil.open, which no sandbox has",) if bad else (),
            functions=2,
            memories=1,
            memory_min_bytes=65_536,
            sections={"type": 12, "code": 3000, "custom:name": 40},
        )

    @handles
    async def run(self, message: wire.Run, caller: Caller) -> wire.RunReply:
        self.asked.append(message)
        if self.refusals:
            raise self.refusals.pop(0)
        if message.module not in self.kept:
            raise UnknownModule(module=message.module)
        code, stdout, stderr = 0, "", ""
        match message.args:
            case ["exit", number]:
                code, stderr = int(number), "first\nwhat went wrong\n"
            case ["say", *words]:
                stdout, stderr = " ".join(words), "to stderr"
            case ["seen"]:
                stdout = encode(message).decode()
            case ["too much"]:
                return wire.RunReply(run="r-2", exit_code=0, stdout="as far as", truncated=True, usage=USAGE)
            case ["trap"]:
                told: dict[str, Any] = {"run": "r-9", "stdout": "until ", "stderr_b64": "//8=", "usage": USAGE}
                raise Trap("the guest reached unreachable", kind="unreachable", **told)
            case ["wait"]:
                print("a run waits", flush=True)  # for who reads the daemon's log
                self.waiting.set()
                await self.gate.wait()
            case _:
                return wire.RunReply(
                    run="r-2", exit_code=0, stdout=message.stdin or "", stdout_b64=message.stdin_b64, usage=USAGE
                )
        return wire.RunReply(run="r-2", exit_code=code, stdout=stdout, stderr=stderr, usage=USAGE)

    @handles
    async def modules(self, message: wire.Modules, caller: Caller) -> wire.ModulesReply:
        found = [name for name in sorted(self.kept) if name > (message.after or "")]
        lines = [
            wire.ModuleLine(module=name, size=len(self.kept[name]), at="2026-11-24T09:30:00.000Z") for name in found
        ][: message.limit]
        return wire.ModulesReply(modules=tuple(lines), after=lines[-1].module if len(found) > len(lines) else None)

    @handles
    async def runs(self, message: wire.Runs, caller: Caller) -> wire.RunsReply:
        pool = wire.Pool(workers=3, idle=1, busy=2, queued=4, max=8)
        return wire.RunsReply(runs=() if self.killed else (LINE,), pool=pool, slo=SLO)

    @handles
    async def kill(self, message: wire.Kill, caller: Caller) -> wire.KillReply:
        if message.run != LINE.run:
            raise UnknownRun(f"no run {message.run} has lasted longer than a second", run=message.run)
        self.killed.append((caller.session, message.run, message.why))
        return wire.KillReply(run=message.run, session=LINE.session)


def body(message: Any) -> dict[str, Any]:
    """A message as it goes over the wire."""
    found: dict[str, Any] = loads(encode(message))
    return found
