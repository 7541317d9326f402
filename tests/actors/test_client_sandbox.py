"""Sandboxes as an agent's program meets them: what is sent, what is waited for, what comes back."""

# ruff: noqa: PT012  the blocks are what is tested

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import wasmtime

from ifabric import Limits, errors, output_of
from ifabric.blocking import SyncClient
from ifabric.bus.base import Answer, Headers
from ifabric.client import Client
from ifabric.errors import (
    BadRequest,
    ClaimLost,
    FabricError,
    ModuleRefused,
    NotWasm,
    Overloaded,
    SandboxDied,
    StoreFull,
    TooLarge,
    Trap,
    Unavailable,
    UnknownModule,
    Unreachable,
)
from ifabric.sandboxing import AROUND_S, LOOK_S, ExitStatus, Sandboxed
from ifabric.sandboxing.uploading import PART_S, in_parts, part_bytes
from ifabric.testing.clock import VirtualClock
from ifabric.wire import chassis as wire
from ifabric.wire import coordinator as wire_of_tasks
from ifabric.wire import subjects
from ifabric.wire.envelope import ERROR_CODE_HEADER, encode
from ifabric_actors.coordinator.actor import Coordinator

from .conftest import World
from .fake_chassis import LINE, SLO, USAGE, WASM, FakeChassis, named
from .sdk import client, submitted, tap

OTHER = WASM + b"\0\x04\x03odd"


async def faked(world: World) -> FakeChassis:
    """A daemon with a chassis that has no sandboxes, and keeps WASM."""
    daemon = await world.daemon(actors=(FakeChassis, Coordinator))
    fake = daemon.actor
    assert isinstance(fake, FakeChassis)
    fake.kept[named(WASM)] = WASM
    return fake


@contextlib.asynccontextmanager
async def nothing_asked() -> AsyncIterator[None]:
    """Fails when the block leaves a task of the client's, or of a claim's, that still waits for something."""
    yield
    coroutines = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    assert not [name for name in coroutines if name.startswith(("Sandboxed.", "Line.", "Event.wait"))]


# -- modules ------------------------------------------------------------------------------------------------------------


async def test_a_module_is_known_by_its_own_digest_from_a_file_or_from_memory(world: World, tmp_path: Path) -> None:
    fake = await faked(world)
    file = tmp_path / "odd.wasm"
    file.write_bytes(OTHER)
    line = tap(world)
    async with client(world, over=line) as c:
        assert await c.put_module(file) == f"sha256:{hashlib.sha256(OTHER).hexdigest()}"
        assert await c.put_module(OTHER) == named(OTHER)
        assert (await c.keep_module(bytearray(OTHER))).again  # type: ignore[arg-type]
    assert fake.kept[named(OTHER)] == OTHER
    assert [set(body) for body in line.bodies("put")] == [{"wasm", "request_id"}] * 3


async def test_a_module_that_is_too_large_for_a_message_is_uploaded_in_parts_and_nothing_of_it_is_left(
    world: World,
) -> None:
    fake = await faked(world)
    large = WASM + os.urandom(3 * wire.INLINE_MAX_BYTES - len(WASM) + 1)
    line, seen = tap(world), []
    async with client(world, over=line) as c:
        line.lose["upload"] = 2
        module = await c.put_module(large, progress=lambda come, of: seen.append((come, of)))
        assert (await c.inspect_module(large)).module == module
    assert fake.kept[module] == large
    assert [come for come, _ in seen] == sorted({come for come, _ in seen}), "it only grows"
    assert (seen[0], seen[-1], len(seen)) == ((0, len(large)), (len(large), len(large)), 5)
    (put,), (inspect,) = line.bodies("put"), line.bodies("inspect")
    for body, sent in ((put, 6), (inspect, 4)):
        assert "wasm" not in body and msgspec.convert(body["upload"], wire.UploadName)
        parts = [one for one in line.bodies("upload") if one["upload"] == body["upload"]]
        assert len(parts) == sent and len({one["request_id"] for one in parts}) == 4, "a retry is the same request"
    assert put["upload"] != inspect["upload"]
    assert fake.uploads == {}


async def test_two_modules_are_uploaded_one_after_the_other(world: World) -> None:
    """A session has room for one of the largest size that is on its way."""
    await faked(world)
    line = tap(world)
    large = [WASM + bytes([n]) * wire.INLINE_MAX_BYTES for n in range(3)]
    async with client(world, over=line) as c:
        assert await asyncio.gather(*map(c.put_module, large)) == [named(one) for one in large]
    assert [verb for verb, _ in line.sent] == ["upload", "upload", "put"] * 3


@pytest.mark.parametrize(("server", "part"), [(1 << 20, 512 * 1024), (8 << 20, 512 * 1024), (64 * 1024, 46_080)])
async def test_a_part_fits_into_what_the_server_carries(server: int, part: int) -> None:
    data = WASM + os.urandom(600_000)
    sent: list[wire.Upload] = []

    async def send(message: wire.Upload) -> None:
        sent.append(message)

    most = part_bytes(server)
    await in_parts(send, "u", data, most, None)
    assert most == part and len(sent) == -(-len(data) // part)
    assert max(len(encode(msgspec.structs.replace(one, request_id="x" * 64))) for one in sent) < server - 2000
    with pytest.raises(TooLarge, match="parts are allowed; nothing was sent"):
        await in_parts(send, "u", bytes(part * wire.PARTS_MAX + 1), part, None)


async def test_the_largest_that_goes_in_a_message_fits_into_one(world: World) -> None:
    await faked(world)
    line = tap(world)
    async with client(world, over=line) as c:
        await c.put_module(WASM + b"\0" * (wire.INLINE_MAX_BYTES - len(WASM)))
    assert "wasm" in line.bodies("put")[0]


async def test_a_module_that_arrives_as_another_is_an_error(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        with pytest.raises(FabricError, match="what arrived is another module: sha256:.*put it again"):
            await c.put_module(WASM + b"damaged on its way")


async def test_a_refused_module_says_why(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        with pytest.raises(ModuleRefused, match="imports evil.open") as refused:
            await c.put_module(WASM + b"bad")
        assert refused.value.facts["why"] == "import"
        found = await c.inspect_module(WASM + b"bad")
        assert (found.accepted, found.why) == (False, ("it imports evil.open, which no sandbox has",))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "this is empty"),
        (b"\x7fELF\x02\x01", "compiled for one kind of machine"),
        (b"(module)", "wat2wasm"),
        (b" ;; a comment\n(; and\n;) (; ; another ;)\n( module $m)", "wat2wasm"),
        (b"(component)", "wat2wasm"),
        (b"(modules)", "begins with b'\\(modules'"),
        (b"#!/bin/sh\n", "begins with b'#!/bin/s'"),
        (b"\0as", "not WebAssembly"),
        (b"(;;)" * 4000 + b"x", "not WebAssembly"),  # and that in no time
    ],
)
async def test_what_is_no_module_is_named_and_never_sent(world: World, tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "thing"
    file.write_bytes(data)
    line = tap(world)
    async with client(world, over=line) as c, asyncio.timeout(5):
        acts: list[Callable[[Any], Any]] = [c.put_module, c.inspect_module, c.run_module]
        for act in acts:
            with pytest.raises(NotWasm, match=says):
                await act(data)
            with pytest.raises(NotWasm, match=f"{file}|nothing was sent"):
                await act(file)
    assert line.sent == []


async def test_what_no_chassis_can_accept_is_not_sent_and_no_more_than_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ifabric.sandboxing.modules.MODULE_MAX_BYTES", 1000)
    file = tmp_path / "large.wasm"
    file.write_bytes(WASM + b"\0" * 1000)
    line, script, _ = scripted((0.0, DONE))
    for large in (file, file.read_bytes()):
        with pytest.raises(TooLarge, match=r"larger than any module may be \(1000 bytes\); nothing was sent"):
            await line.put_module(large)
    with pytest.raises(TooLarge):  # which has no end
        await line.put_module(Path("/dev/zero"))
    assert script.asked == []


async def test_a_directory_a_missing_file_and_a_word_are_told_apart(world: World, tmp_path: Path) -> None:
    line = tap(world)
    async with client(world, over=line) as c:
        with pytest.raises(NotWasm, match="is a directory"):
            await c.put_module(tmp_path)
        with pytest.raises(FileNotFoundError):
            await c.run_module(tmp_path / "none.wasm")
        with pytest.raises(TypeError, match=r"Path\('tool.wasm'\)"):
            await c.put_module("tool.wasm")  # type: ignore[arg-type]
        for word in ("tool.wasm", "sha256:9f86", named(WASM).upper(), named(WASM) + "\n"):
            with pytest.raises(ValueError, match=r"no module's id .*Path\("):
                await c.run_module(word)
            with pytest.raises(ValueError, match="no module's id"):
                await c.inspect_module(word)
    assert line.sent == []


async def test_modules_are_listed_by_pages_and_looked_at_by_their_ids(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        for n in range(3):
            await c.put_module(WASM + bytes([n]))
        first = await c.modules(limit=3)
        assert [line.module for line in first.modules] == sorted(line.module for line in first.modules)
        rest = await c.modules(limit=3, after=first.after)
        assert (len(first.modules), len(rest.modules), rest.after) == (3, 1, None)
        assert (await c.inspect_module(named(WASM))).sections["code"] == 3000
        with pytest.raises(UnknownModule):
            await c.inspect_module(named(b"none"))


# -- what a run is given and gives ---------------------------------------------------------------------------------------


async def test_a_run_gives_what_it_wrote_and_took(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        result = await c.run_module(named(WASM), "say", "hello")
        assert (result.run, result.exit_code, result.stdout, result.stderr) == ("r-2", 0, b"hello", b"to stderr")
        assert (result.text, result.truncated, result.usage) == ("hello", False, USAGE)


@pytest.mark.parametrize(
    "data", [b"", b"text", "grüße\n".encode(), b"\xff\xfe", bytes(range(256)), b"\0" * 100, b"\r\n\t" * 9, b'"\\' * 9]
)
async def test_every_byte_of_a_stream_arrives_as_it_was(world: World, data: bytes) -> None:
    fake = await faked(world)
    async with client(world) as c:
        assert (await c.run_module(named(WASM), stdin=data)).stdout == data
    assert len(encode(fake.asked[0])) < 250 + 1.4 * len(data)


async def test_text_goes_as_utf_8_and_comes_as_text_whatever_it_is(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        assert (await c.run_module(named(WASM), stdin="grüße")).text == "grüße"
        assert (await c.run_module(named(WASM), stdin=b"a\xffb")).text == "a�b"


async def test_what_a_run_is_asked_with_is_what_is_sent(world: World) -> None:
    fake = await faked(world)
    async with client(world) as c:
        await c.run_module(
            named(WASM),
            "say",
            "--n",
            "",
            env={"LANG": "C"},
            entry="main",
            limits=Limits(fuel=10, wall_s=3, memory_bytes=1 << 20),
            wall_s=2,
            cpu_percent=12.5,
            output_bytes=0,
            endpoints="openai",
            task="T",
            fence=7,
            hold="h",
        )
    (asked,) = fake.asked
    assert msgspec.structs.replace(asked, request_id=None) == wire.Run(
        module=named(WASM),
        entry="main",
        args=("say", "--n", ""),
        env={"LANG": "C"},
        limits=Limits(wall_s=2, cpu_percent=12.5, memory_bytes=1 << 20, fuel=10, output_bytes=0),
        endpoints=("openai",),
        task="T",
        fence=7,
        hold="h",
    )
    assert asked.request_id


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"args": (b"bytes",)}, r"`\$.args\[0\]`"),
        ({"args": ("a", 3)}, r"`\$.args\[1\]`"),
        ({"env": {"N": 3}}, r"`\$.env\[...\]`"),
        ({"env": {"N": b"x"}}, r"`\$.env\[...\]`"),
        ({"wall_s": -1}, r"`\$.limits.wall_s`"),
        ({"limits": Limits(memory_bytes=1)}, r"`\$.limits.memory_bytes`"),
        ({"endpoints": ["no way"]}, r"`\$.endpoints\[0\]`"),
        ({"entry": ""}, r"`\$.entry`"),
        ({"task": "T", "fence": -1}, r"`\$.fence`"),
    ],
)
async def test_what_the_daemon_would_refuse_never_leaves_the_process(
    world: World, options: dict[str, Any], where: str
) -> None:
    line = tap(world)
    args = options.get("args", ())
    options = {name: value for name, value in options.items() if name != "args"}
    async with client(world, over=line) as c:
        with pytest.raises(BadRequest, match=where):
            await c.run_module(named(WASM), *args, **options)
    assert line.sent == []


async def test_another_exit_code_is_a_result_and_with_check_an_exception_that_has_it(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        result = await c.run_module(named(WASM), "exit", "3")
        assert result.exit_code == 3
        with pytest.raises(ExitStatus, match="exit code 3: what went wrong$") as caught:
            await c.run_module(named(WASM), "exit", "3", check=True)
        assert caught.value.result == result == output_of(caught.value)
        assert (caught.value.facts, caught.value.retryable) == ({"run": "r-2", "exit_code": 3}, False)
        assert (await c.run_module(named(WASM), "exit", "0", check=True)).exit_code == 0


async def test_a_guest_that_was_ended_leaves_what_it_wrote_with_the_error(world: World) -> None:
    await faked(world)
    async with client(world) as c:
        with pytest.raises(Trap, match="unreachable") as caught:
            await c.run_module(named(WASM), "trap")
    found = output_of(caught.value)
    assert found is not None
    assert (found.run, found.stdout, found.text, found.stderr) == ("r-9", b"until ", "until ", b"\xff\xff")
    assert found.usage == USAGE and not found.truncated


def test_an_error_without_a_run_has_no_output() -> None:
    assert output_of(UnknownModule(module="m")) is None
    assert output_of(Overloaded(run="r")) is None
    odd = output_of(Trap(run="r", usage={"wall_s": "soon"}, stdout="x"))
    assert odd is not None and (odd.usage, odd.stdout) == (None, b"x")
    with pytest.raises(FabricError, match="not base64"):
        output_of(Trap(run="r", usage={}, stdout_b64="?"))


# -- a module that is not there yet --------------------------------------------------------------------------------------


async def test_a_file_is_put_when_it_is_not_known_and_only_then(world: World, tmp_path: Path) -> None:
    fake = await faked(world)
    file = tmp_path / "odd.wasm"
    file.write_bytes(OTHER)
    line = tap(world)
    async with client(world, over=line) as c:
        assert (await c.run_module(file, "say", "once")).text == "once"
        assert [verb for verb, _ in line.sent] == ["run", "put", "run"]
        assert (await c.run_module(file, "say", "twice")).text == "twice"
        assert (await c.run_module(OTHER, "say", "thrice")).text == "thrice"
        assert [verb for verb, _ in line.sent[3:]] == ["run", "run"]
    ids = [asked.request_id for asked in fake.asked]
    assert len(set(ids)) == len(ids) == 4, "a refusal may be remembered under the first id"


async def test_an_id_that_is_not_known_is_the_callers_to_put(world: World) -> None:
    await faked(world)
    line = tap(world)
    async with client(world, over=line) as c:
        with pytest.raises(UnknownModule, match="put it first"):
            await c.run_module(named(OTHER))
    assert [verb for verb, _ in line.sent] == ["run"]


# -- waiting --------------------------------------------------------------------------------------------------------------


def mine(**other: Any) -> wire.RunLine:
    """The line of the run that the tests below ask for, or of one that differs."""
    return msgspec.structs.replace(LINE, **{"session": "me", "module": named(WASM), "task": None, **other})


class Script:
    """A connection that answers as it is told: each entry takes so many seconds and is an error, a reply or silence."""

    max_payload_bytes = 1 << 20

    def __init__(self, clock: VirtualClock, *entries: tuple[float, Exception | msgspec.Struct | None]) -> None:
        self._clock = clock
        self._entries = list(entries)
        #: (seconds since the beginning, the verb, the request id, the patience)
        self.asked: list[tuple[float, str, str | None, float]] = []
        self._began = clock.monotonic()
        #: what is answered to those who ask what runs, one after the other; the last one from then on
        self.listed: list[tuple[wire.RunLine, ...] | FabricError] = [(mine(),)]

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        address = subjects.parse(subject)
        assert address is not None and headers is not None
        assert int(headers["If-Deadline-Ms"]) == int(timeout_s * 1000)
        at = self._clock.monotonic() - self._began
        if address.verb == "runs":
            found = self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]
            if isinstance(found, FabricError):
                raise found
            pool = wire.Pool(workers=0, idle=0, busy=0, queued=0, max=1)
            return Answer(encode(wire.RunsReply(runs=found, pool=pool, slo=SLO)), {})
        self.asked.append((at, address.verb, msgspec.json.decode(data).get("request_id"), timeout_s))
        takes_s, answer = self._entries.pop(0) if len(self._entries) > 1 else self._entries[0]
        if answer is None:
            await self._clock.sleep(timeout_s)
            raise Unavailable("no answer in time", what="nats", reason="timeout")
        await self._clock.sleep(takes_s)
        if isinstance(answer, FabricError):
            if answer.facts.get("what") == "nats":
                raise answer
            return Answer(encode(answer.to_body()), {ERROR_CODE_HEADER: str(answer.status)})
        assert isinstance(answer, msgspec.Struct)
        return Answer(encode(answer), {})

    async def objects(self, spec: object) -> object:
        raise AssertionError("an agent cannot reach the object store")


def scripted(*entries: tuple[float, Exception | msgspec.Struct | None]) -> tuple[Sandboxed, Script, VirtualClock]:
    clock = VirtualClock()
    script = Script(clock, *entries)
    bus: Any = script
    return Sandboxed(bus, clock, session="me", timeout_s=5.0, where="the test"), script, clock


DONE = wire.RunReply(run="r", exit_code=0, usage=USAGE)
NOBODY = Unavailable("nobody", what="nats", reason="no_responders")


async def test_an_answer_is_waited_for_as_long_as_the_run_may_last() -> None:
    line, script, clock = scripted((299.0, DONE))
    assert (await clock.run(line.run_module(named(WASM)))).run == "r"
    line, script, clock = scripted((1.0, DONE))
    await clock.run(line.run_module(named(WASM), wall_s=2.5))
    await clock.run(line.run_module(named(WASM), limits=Limits(wall_s=1000)))
    assert [patience for *_, patience in script.asked] == [2.5 + AROUND_S, 1000 + AROUND_S]


@pytest.mark.parametrize(
    ("refusal", "becomes"),
    [
        (NOBODY, Unreachable),
        (Overloaded(), Overloaded),
        (StoreFull(), StoreFull),
        (Unavailable(what="draining"), Unavailable),
    ],
)
async def test_what_was_not_started_is_tried_again_for_the_clients_time_and_not_for_the_runs(
    refusal: FabricError, becomes: type[FabricError]
) -> None:
    line, script, clock = scripted((0.0, refusal))
    began = clock.monotonic()
    with pytest.raises(becomes):
        await clock.run(line.run_module(named(WASM)))
    assert 5.0 <= clock.monotonic() - began < 6.0
    assert len(script.asked) > 10 and len({request_id for _, _, request_id, _ in script.asked}) == 1
    line, script, clock = scripted((0.0, refusal), (0.0, refusal), (0.0, DONE))
    assert (await clock.run(line.run_module(named(WASM)))).run == "r"


async def test_a_place_that_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    line, script, clock = scripted((10.0, Overloaded()))
    with pytest.raises(Overloaded):
        await clock.run(line.run_module(named(WASM)))
    assert len(script.asked) == 1


async def test_an_answer_that_does_not_come_is_asked_for_once_more_under_the_same_id() -> None:
    line, script, clock = scripted((0.0, None), (0.0, DONE))
    assert (await clock.run(line.run_module(named(WASM), wall_s=2, hold="h"))).run == "r"
    (_, _, first, _), (at, _, second, _) = script.asked
    assert first == second and first is not None
    assert 2 + AROUND_S <= at < 2 + AROUND_S + 1
    line, script, clock = scripted((0.0, None))
    with pytest.raises(Unavailable, match="no answer in time"):
        await clock.run(line.run_module(named(WASM), wall_s=2))
    assert len(script.asked) == 2


async def test_a_daemon_that_stops_under_a_run_is_asked_once_more_after_however_long() -> None:
    line, script, clock = scripted((100.0, Unavailable(what="draining")), (0.0, NOBODY), (0.0, NOBODY), (50.0, DONE))
    assert (await clock.run(line.run_module(named(WASM)))).run == "r"
    assert len({request_id for _, _, request_id, _ in script.asked}) == 1
    line, script, clock = scripted((100.0, Unavailable(what="draining")))
    with pytest.raises(Unavailable):
        await clock.run(line.run_module(named(WASM)))
    assert len(script.asked) == 2


ELSEWHERE = (mine(session="you"), mine(module=named(OTHER)), mine(task="T"))


async def test_a_run_whose_daemon_has_died_is_asked_for_again_when_nobody_lists_it_any_more() -> None:
    line, script, clock = scripted((0.0, None), (0.0, DONE))
    script.listed = [(mine(),), ELSEWHERE, (mine(),), (), errors.Internal(), ELSEWHERE]
    began = clock.monotonic()
    assert (await clock.run(line.run_module(named(WASM)))).run == "r"
    assert 7 * LOOK_S <= clock.monotonic() - began < 7 * LOOK_S + 6, "missed once it may be late, twice it is gone"
    assert len(script.asked) == 2 and len({request_id for _, _, request_id, _ in script.asked}) == 1


async def test_a_run_that_is_listed_or_of_which_nobody_knows_is_waited_for() -> None:
    unknown: list[tuple[wire.RunLine, ...] | FabricError] = [(mine(),), NOBODY, (mine(session="you"),) * wire.PAGE_MAX]
    for known in unknown:
        line, script, clock = scripted((299.0, DONE))
        script.listed = [known]
        assert (await clock.run(line.run_module(named(WASM)))).run == "r"
        assert len(script.asked) == 1


async def test_it_is_asked_for_again_once_and_then_waited_for() -> None:
    line, script, clock = scripted((0.0, None), (200.0, DONE))
    script.listed = [()]
    assert (await clock.run(line.run_module(named(WASM)))).run == "r"
    assert len(script.asked) == 2


@pytest.mark.parametrize(
    "answer", [SandboxDied(), Trap(), errors.LimitReached(), errors.Killed(), errors.BreakerOpen()]
)
async def test_an_answer_is_an_answer_and_asked_for_once(answer: FabricError) -> None:
    line, script, clock = scripted((0.0, answer))
    with pytest.raises(type(answer)):
        await clock.run(line.run_module(named(WASM)))
    assert len(script.asked) == 1


async def test_a_put_may_take_as_long_as_compiling_takes_and_is_refused_as_soon_as_a_run() -> None:
    kept = wire.PutReply(module=named(WASM), size=8, imports=(), exports=())
    line, _, clock = scripted((40.0, kept))
    assert await clock.run(line.put_module(WASM)) == named(WASM)
    line, _, clock = scripted((0.0, NOBODY))
    began = clock.monotonic()
    with pytest.raises(Unreachable):
        await clock.run(line.put_module(WASM))
    assert clock.monotonic() - began < 6.0


LARGE = WASM + b"\0" * wire.INLINE_MAX_BYTES
COME = wire.UploadReply(upload="u", part=0, parts=1, size=1)


async def test_an_upload_is_tried_again_for_the_clients_time_and_then_says_what_failed() -> None:
    away = Unavailable("JetStream does not answer", what="jetstream")
    kept = wire.PutReply(module=named(LARGE), size=1, imports=(), exports=())
    line, script, clock = scripted((0.0, away), (0.0, away), (0.0, Overloaded()), (0.0, COME), (0.0, COME), (0.0, kept))
    assert await clock.run(line.put_module(LARGE)) == named(LARGE)
    assert [verb for _, verb, _, _ in script.asked] == ["upload"] * 5 + ["put"]
    assert {patience for _, verb, _, patience in script.asked if verb == "upload"} == {PART_S}
    line, script, clock = scripted((0.0, away))
    began = clock.monotonic()
    with pytest.raises(Unavailable, match="the module could not be uploaded: JetStream does not answer") as caught:
        await clock.run(line.put_module(LARGE))
    assert clock.monotonic() - began < 6.0
    assert caught.value.facts == {"what": "jetstream"}


async def test_a_part_that_is_not_answered_is_sent_once_more_as_the_same_request() -> None:
    kept = wire.PutReply(module=named(LARGE), size=1, imports=(), exports=())
    line, script, clock = scripted((0.0, None), (1.0, COME), (0.0, COME), (0.0, kept))
    assert await clock.run(line.put_module(LARGE)) == named(LARGE)
    ids = [request_id for _, verb, request_id, _ in script.asked if verb == "upload"]
    assert len(ids) == 3 and len(set(ids)) == 2


async def test_a_part_that_is_refused_ends_the_upload_and_the_parts_beside_it() -> None:
    line, script, clock = scripted((1.0, TooLarge("it is too large", size=5)), (60.0, COME))
    large = WASM + b"\0" * (20 * wire.INLINE_MAX_BYTES)
    async with nothing_asked():
        with pytest.raises(TooLarge, match="could not be uploaded: it is too large"):
            await clock.run(line.put_module(large))
    assert len(script.asked) == 4


async def test_a_caller_that_is_cancelled_leaves_nothing_running(world: World) -> None:
    fake = await faked(world)
    async with client(world) as c, nothing_asked():
        running = asyncio.create_task(c.run_module(named(WASM), "wait"))
        async with asyncio.timeout(5):
            await fake.waiting.wait()
            running.cancel()
            await asyncio.wait((running,))
        assert running.cancelled()
    fake.gate.set()


# -- under a claim ------------------------------------------------------------------------------------------------------


async def test_a_run_for_a_claim_says_which_and_its_cost_is_told_with_the_claims_end(world: World) -> None:
    fake = await faked(world)
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line) as c:
        async with await c.claim("T") as claim:
            assert (await claim.run(named(WASM), "say", "hello", env={"A": "b"})).text == "hello"
            with pytest.raises(ExitStatus):
                await claim.run(named(WASM), "exit", "1", check=True)
            with pytest.raises(Trap):
                await claim.run(named(WASM), "trap")
            await claim.run(named(WASM), "say", hold="h")  # which is charged with it
            with pytest.raises(UnknownModule):
                await claim.run(named(OTHER))
            assert claim.cost_micro_usd == 3 * USAGE.cost_micro_usd
        assert [(asked.task, asked.fence) for asked in fake.asked] == [("T", claim.fence)] * 5
        assert fake.asked[0].env == {"A": "b"}
        assert line.bodies("complete")[0]["cost_micro_usd"] == 21


async def test_a_run_ends_with_its_claim(world: World) -> None:
    fake = await faked(world)
    await submitted(world, "T", "U")
    async with client(world) as c:
        claim = await c.claim("T")
        async with nothing_asked(), asyncio.timeout(5):
            running = asyncio.create_task(claim.run(named(WASM), "wait"))
            await fake.waiting.wait()
            claim.set_lost("another has it")
            with pytest.raises(ClaimLost, match="lost during the run: another has it"):
                await running
        with pytest.raises(ClaimLost, match="lost before the run: another has it"):
            await claim.run(named(WASM))
        assert len(fake.asked) == 1
        fake.waiting.clear()

        async def lose(held: Any) -> None:
            await fake.waiting.wait()
            held.set_lost("the session is gone")

        async with nothing_asked(), asyncio.timeout(5):
            with pytest.raises(ClaimLost, match="lost during the work: the session is gone"):
                async with await c.claim("U") as held:
                    losing = asyncio.create_task(lose(held))
                    await held.run(named(WASM), "wait")
            await losing
        fake.gate.set()


async def test_a_claim_that_the_chassis_finds_lost_is_lost(world: World) -> None:
    fake = await faked(world)
    await submitted(world, "T")
    async with client(world) as c:
        claim = await c.claim("T")
        fake.refusals.append(ClaimLost("somebody else holds it", by="b"))
        with pytest.raises(ClaimLost, match="somebody else holds it"):
            await claim.run(named(WASM))
        assert claim.lost.is_set() and "T" not in c.claims


async def test_a_hold_that_a_run_was_charged_to_has_ended_and_one_that_paid_nothing_is_freed(world: World) -> None:
    await world.daemon(governor={})
    fake = await faked(world)
    line = tap(world)
    async with client(world, over=line) as c:
        async with c.hold(500) as hold:
            await c.run_module(named(WASM), "say", hold=hold)
            assert hold.ended
        async with c.hold(500) as trapped:
            with pytest.raises(Trap):
                await c.run_module(named(WASM), "trap", hold=trapped)
        assert line.bodies("void") == []
        async with c.hold(500) as unused:
            with pytest.raises(UnknownModule):
                await c.run_module(named(OTHER), hold=unused)
        assert [body["hold"] for body in line.bodies("void")] == [unused.name]
    assert [asked.hold for asked in fake.asked] == [hold.name, trapped.name, unused.name]


# -- with a chassis that has sandboxes --------------------------------------------------------------------------------------

WASI = '(import "wasi_snapshot_preview1" "{}" (func ${} (param {}) (result i32)))'
#: repeats what it reads, then does as `end` says
ECHO = f"""(module
  {WASI.format("fd_read", "read", "i32 i32 i32 i32")} {WASI.format("fd_write", "write", "i32 i32 i32 i32")}
  (memory (export "memory") 1) (data (i32.const 0) "\\10\\00\\00\\00\\00\\80\\00\\00")
  (func (export "_start")
    (loop $more
      (i32.store (i32.const 4) (i32.const 32768))
      (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
      (if (i32.load (i32.const 8)) (then
        (i32.store (i32.const 4) (i32.load (i32.const 8)))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
        (br $more))))
    {{end}}))"""
ECHOES = bytes(wasmtime.wat2wasm(ECHO.format(end="")))
TRAPS = bytes(wasmtime.wat2wasm(ECHO.format(end="unreachable")))
LOOPS = bytes(wasmtime.wat2wasm('(module (func (export "_start") (loop (br 0))))'))


def padded(wasm: bytes, size: int) -> bytes:
    """The same module with a section of that many bytes that says nothing."""
    content = b"\x03pad" + os.urandom(size)
    length, left = b"", len(content)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    return wasm + b"\0" + length + bytes([left]) + content


async def until_listed(c: Client) -> wire.RunLine:
    async with asyncio.timeout(10):
        while not (found := (await c.runs()).runs):
            await asyncio.sleep(0.05)
    return found[0]


async def test_a_real_guest_is_put_run_looked_at_and_ended(world: World, tmp_path: Path) -> None:
    await world.daemon(chassis={})
    file = tmp_path / "echo.wasm"
    file.write_bytes(padded(ECHOES, wire.INLINE_MAX_BYTES))
    line = tap(world)
    every = bytes(range(256)) * 300
    async with client(world, over=line) as c:
        line.lose["put"] = 1
        assert (await c.run_module(file, stdin=every, check=True)).stdout == every
        assert (await c.run_module(file, stdin="grüße")).text == "grüße"
        assert [verb for verb, _ in line.sent] == ["run", "upload", "upload", "put", "put", "run", "run"]
        assert "upload" in line.bodies("put")[0]
        assert list(await (await world.bus.objects(wire.UPLOADS_BUCKET)).page()) == []
        found = await c.inspect_module(file)
        assert found.accepted and found.sections["custom:pad"] > wire.INLINE_MAX_BYTES
        assert found.module in {kept.module for kept in (await c.modules(limit=1000)).modules}
        with pytest.raises(Trap, match="unreachable") as trapped:
            await c.run_module(TRAPS, stdin="until then")
        written = output_of(trapped.value)
        assert written is not None and written.usage is not None
        assert (written.text, written.usage.stdout_bytes) == ("until then", 10)
        with pytest.raises(errors.LimitReached, match="fuel") as ended:
            await c.run_module(LOOPS, fuel=1000)
        assert ended.value.facts["which"] == "fuel"
        with pytest.raises(TooLarge, match="stdin alone has 2000000 bytes"):
            await c.run_module(file, stdin=b"x" * 2_000_000)
        running = asyncio.create_task(c.run_module(LOOPS, wall_s=20))
        listed = await until_listed(c)
        assert (listed.session, listed.module) == ("me", named(LOOPS))
        assert (await c.kill_run(listed.run, why="it loops")).session == "me"
        with pytest.raises(errors.Killed, match="it loops"):
            await running


async def test_a_real_run_ends_with_its_claim_and_one_for_a_hold_is_charged_once(world: World) -> None:
    await world.daemon(governor={}, chassis={"price": {"per_billion_fuel_usd": 1000}})
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line) as c:
        module = await c.put_module(ECHOES)
        line.lose["run"] = 1
        async with c.hold(1_000_000) as hold:
            result = await c.run_module(module, stdin="paid", hold=hold)
        assert hold.ended and line.bodies("void") == [] and len(line.bodies("run")) == 2
        account = (await c.balance()).path[-1]
        assert result.usage.cost_micro_usd > 0
        assert (account.spent, account.held) == (result.usage.cost_micro_usd, 0)
        claim = await c.claim("T")
        assert (await claim.run(module, stdin="for T")).text == "for T"
        assert claim.cost_micro_usd > 0
        running = asyncio.create_task(claim.run(LOOPS, wall_s=20))
        await until_listed(c)
        await world.ask("cancel", "op", admin=True, task="T")
        with pytest.raises(ClaimLost):
            await running
        assert claim.lost.is_set()


# -- operators, events, and no await ---------------------------------------------------------------------------------------


async def test_what_runs_is_seen_and_ended_by_operators(world: World) -> None:
    fake = await faked(world)
    async with client(world, session="op") as c:
        found = await c.runs()
        assert (found.runs, found.slo, found.pool.queued) == ((LINE,), SLO, 4)
        assert (await c.kill_run("r-1", why="it loops")).session == "alice"
        with pytest.raises(errors.UnknownRun):
            await c.kill_run("r-2")
    assert fake.killed == [("op", "r-1", "it loops")]


async def test_both_kinds_of_chassis_events_are_heard_and_nothing_else(world: World) -> None:
    violation = wire.ViolationEvent(
        event="violation", at="now", run="r", session="s", module="m", kind="limit", message="x"
    )
    slo = wire.SloEvent(event="slo", at="now", which="latency", met=False, value=12.5, target=10)
    async with client(world) as c, c.subscribe("chassis") as events, c.subscribe("all") as everything:
        for what, data in (
            ("violation", encode(slo)),
            ("violation", b"{"),
            ("weather", encode(slo)),
            ("violation", encode(violation)),
            ("slo", encode(slo)),
        ):
            await world.bus.publish(subjects.event("chassis", what), data)
        async with asyncio.timeout(5):
            for heard in (events, everything):
                assert [await anext(heard), await anext(heard)] == [violation, slo]
            newer = wire_of_tasks.TaskEvent(event="paused", at="now", revision=1, task="T")
            await world.bus.publish(subjects.event("task", "paused"), encode(newer))
            assert await anext(everything) == newer, "of which all are of one kind"


@pytest.mark.parametrize("world", ["real"], indirect=True)  # a blocking client has a connection of its own
async def test_sandboxes_without_await(world: World, tmp_path: Path) -> None:
    fake = await faked(world)
    await world.daemon(actors=(), governor={})
    await submitted(world, "T")
    file = tmp_path / "odd.wasm"
    file.write_bytes(OTHER)

    def work() -> None:
        with SyncClient(world._nats_url, session="plain") as c:
            assert c.put_module(WASM) == named(WASM)
            assert c.run_module(file, "say", "hi", wall_s=5, check=True).text == "hi"
            with pytest.raises(ExitStatus):
                c.run_module(OTHER, "exit", "1", check=True)
            assert c.inspect_module(file).accepted
            assert len(c.modules().modules) == 2
            with c.hold(500) as hold:
                c.run_module(named(WASM), "say", hold=hold)
                assert hold.ended
            with c.claim("T") as claim:
                assert claim.run(named(WASM), "say", "done", stdin=b"").text == "done"
                assert claim.cost_micro_usd == 7
            assert c.runs().runs == (LINE,)
            assert c.kill_run("r-1").run == "r-1"

    async with asyncio.timeout(30):
        await asyncio.to_thread(work)
    assert (fake.asked[-1].task, fake.asked[-2].hold is not None) == ("T", True)
