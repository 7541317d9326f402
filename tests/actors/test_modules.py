"""Modules over the twin and over real NATS: what is accepted, kept, read back, and at hand."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from ifabric.bus.base import Bus, ObjectSpec
from ifabric.clock import SystemClock
from ifabric.config_chassis import Chassis, ModuleStore, Runtime
from ifabric.errors import (
    BadRequest,
    ModuleRefused,
    NotWasm,
    StoreFull,
    TooLarge,
    Unavailable,
    UnknownModule,
)
from ifabric.metrics import Metrics
from ifabric.testing.clock import VirtualClock
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryStore
from ifabric.wire.chassis import MODULES_BUCKET, UPLOADS, Inspect, Put
from ifabric.wire.chassis import Modules as Page
from ifabric_actors.chassis import modules as source
from ifabric_actors.chassis import shelf as shelves
from ifabric_actors.chassis.cache import MIB, Cache
from ifabric_actors.chassis.modules import Modules
from ifabric_actors.chassis.shelf import Shelf
from ifabric_actors.chassis.uploads import Uploads
from ifabric_actors.chassis.wasm import module_id
from tests.actors.test_cache import Log, is_open
from tests.conformance.test_objects import damage, interrupted

FINGERPRINT = "ab" * 16
HOUR_MS = 3_600_000


def wat(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def numbered(n: int) -> bytes:
    return wat(f'(module (func (export "_start")) (global i32 (i32.const {n})))')


COMMAND = wat(
    '(module (import "ifabric" "http" (func (param i32))) (memory (export "memory") 1) (func (export "_start")))'
)
REFUSED = wat('(module (import "env" "printf" (func)) (memory 300))')
LARGE = COMMAND + b"\0\x84\x80\x80\x01\x01n" + bytes((1 << 21) + 2)
UPLOAD = f"{UPLOADS}s-1"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Shifted(SystemClock):
    """The machine's clock, and some time more."""

    more_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.more_ms


@pytest.fixture(scope="module")
def engine() -> Iterator[wasmtime.Engine]:
    with wasmtime.Engine() as made:
        yield made


class Daemon:
    """The modules of one daemon, with a compiler that a test can hold up or make fail."""

    def __init__(self, bus: Any, folder: Path, engine: wasmtime.Engine, *, store: Any = None, **modules: Any) -> None:
        self.bus, self.engine = bus, engine
        self.metrics, self.log, self.clock = Metrics(), Log(), Shifted()
        self.compiled: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails: Exception | None = None
        kept = ModuleStore(**{"store_max_bytes": 64 * MIB, "max_bytes": 8 * MIB, **modules})
        config = Chassis(modules=kept, runtime=Runtime(max_memory_mb=16))
        self.cache = Cache(folder, config, self.metrics, self.log, compile=self.compile)
        self.uploads = Uploads(bus, store or MemoryStore(self.clock), self.clock, config, self.log)
        self.modules = Modules(bus, self.clock, config, self.cache, self.uploads, self.log)

    async def start(self) -> Daemon:
        await self.cache.start(FINGERPRINT)
        await self.modules.start()
        return self

    async def compile(self, data: bytes) -> bytes:
        self.compiled.append(module_id(data))
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return bytes(wasmtime.Module(self.engine, data).serialize())

    async def objects(self) -> Any:
        return await self.bus.objects(MODULES_BUCKET)

    async def put(self, data: bytes) -> Any:
        return await self.modules.put(Put(wasm=b64(data)), "s")

    async def upload(self, data: bytes, name: str = UPLOAD) -> str:
        await (await self.objects()).put(name, data)
        return name

    async def names(self) -> list[str]:
        return [info.name for info in await (await self.objects()).page()]

    def found(self) -> dict[str, int]:
        """Where compiled modules were found, so far."""
        outcomes = ("memory", "disk", "compiled", "refused")
        return {o: int(n) for o in outcomes if (n := self.metrics.counter("if_chassis_cache_total", outcome=o).value)}

    def errors(self) -> list[str]:
        return [event for level, event, _ in self.log.said if level == "error"]


async def make_world(bus: Bus, folder: Path, engine: wasmtime.Engine, **modules: Any) -> Daemon:
    if not isinstance(bus, MemoryBus):  # other tests share the server
        await bus.objects(ObjectSpec(MODULES_BUCKET, 64 * MIB))
        await bus._client.jetstream().delete_stream(f"OBJ_{MODULES_BUCKET}")  # type: ignore[attr-defined]
    return await Daemon(bus, folder, engine, **modules).start()


@pytest.fixture
async def daemon(buses: tuple[Bus, Bus], tmp_path: Path, engine: wasmtime.Engine) -> AsyncIterator[Daemon]:
    made = await make_world(buses[0], tmp_path / "one", engine)
    yield made
    await made.modules.stop()


@pytest.fixture
async def other(
    daemon: Daemon, buses: tuple[Bus, Bus], tmp_path: Path, engine: wasmtime.Engine
) -> AsyncIterator[Daemon]:
    """Another daemon on the same bus, with a cache of its own."""
    made = await Daemon(buses[1], tmp_path / "two", engine).start()
    yield made
    await made.modules.stop()


@pytest.fixture
async def alone(tmp_path: Path, engine: wasmtime.Engine) -> AsyncIterator[Daemon]:
    """A daemon on the twin."""
    bus = MemoryBus(MemoryHub())
    await bus.connect()
    made = await Daemon(bus, tmp_path / "alone", engine).start()
    yield made
    await made.modules.stop()
    await bus.close()


# -- put ------------------------------------------------------------------------------------------------------------------


async def test_a_module_that_was_put_is_kept_under_its_digest_and_runs_everywhere(
    daemon: Daemon, other: Daemon
) -> None:
    reply = await daemon.put(COMMAND)
    assert (reply.module, reply.size, reply.again) == (module_id(COMMAND), len(COMMAND), False)
    assert (reply.imports, reply.exports) == (("ifabric.http",), ("memory", "_start"))
    assert await daemon.names() == [reply.module]
    for one in (daemon, other):
        async with one.modules.open(reply.module) as code:
            assert code.module == reply.module
            assert os.fstat(code.fd).st_size == code.size
            loaded = wasmtime.Module.deserialize_file(one.engine, f"/proc/self/fd/{code.fd}")
            assert [export.name for export in loaded.exports] == ["memory", "_start"]
        assert await one.modules.get(reply.module) == COMMAND


async def test_putting_it_again_compiles_and_keeps_nothing(daemon: Daemon, other: Daemon) -> None:
    await daemon.put(COMMAND)
    objects = await daemon.objects()
    before = await objects.info(module_id(COMMAND))
    for one in (daemon, other):
        reply = await one.put(COMMAND)
        assert (reply.again, reply.exports) == (True, ("memory", "_start"))
    assert await objects.info(module_id(COMMAND)) == before
    assert (daemon.compiled, other.compiled) == ([module_id(COMMAND)], [])


async def test_what_is_not_run_here_is_refused_with_every_reason_and_never_compiled(daemon: Daemon) -> None:
    with pytest.raises(ModuleRefused, match=r"memory begins.*, and 1 more reasons") as refused:
        await daemon.put(REFUSED)
    assert len(refused.value.facts["why"]) == 2
    assert any("env.printf" in reason for reason in refused.value.facts["why"])
    with pytest.raises(NotWasm):
        await daemon.put(b"\0asm\1\0\0\0\1")
    with pytest.raises(NotWasm):
        await daemon.put(b"")
    assert (daemon.compiled, await daemon.names()) == ([], [])


async def test_what_cannot_be_compiled_is_not_kept(daemon: Daemon) -> None:
    daemon.fails = ModuleRefused("compiling it took too long", why=["it took too long"])
    with pytest.raises(ModuleRefused):
        await daemon.put(COMMAND)
    assert await daemon.names() == []
    with pytest.raises(UnknownModule):
        await daemon.modules.get(module_id(COMMAND))


async def test_it_is_kept_only_after_it_was_compiled(daemon: Daemon) -> None:
    daemon.gate.clear()
    putting = asyncio.ensure_future(daemon.put(COMMAND))
    async with asyncio.timeout(5):
        while not daemon.compiled:
            await asyncio.sleep(0.001)
    assert await daemon.names() == []
    daemon.gate.set()
    await putting
    assert await daemon.names() == [module_id(COMMAND)]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Put(), "one of wasm, upload, and not none"),
        (Put(wasm="", upload=UPLOAD), "not wasm and upload"),
        (Put(wasm="AGFzbQ"), "not base64"),
        (Put(wasm="AGFz\nbQE="), "not base64"),
        (Put(wasm="é" * 4), "not base64"),
        (Put(upload=f"{UPLOADS}none"), "nothing was put there"),
    ],
)
async def test_what_is_no_request_is_said(daemon: Daemon, message: Put, says: str) -> None:
    with pytest.raises(BadRequest, match=".") as refused:
        await daemon.modules.put(message, "s")
    assert says in refused.value.message


async def test_a_module_over_the_limit_is_refused_before_it_is_read(daemon: Daemon) -> None:
    data = COMMAND + bytes(8 * MIB)
    for text in (b64(data), "!" * (16 * MIB), b64(bytes(8 * MIB + 1))):
        with pytest.raises(TooLarge) as refused:
            await daemon.modules.put(Put(wasm=text), "s")
        assert refused.value.facts["max"] == 8 * MIB
    await daemon.upload(data)
    for _ in range(2):
        with pytest.raises(TooLarge if await daemon.names() else BadRequest):
            await daemon.modules.put(Put(upload=UPLOAD), "s")
    assert await daemon.names() == []
    exactly = COMMAND + b"\0" + _leb(8 * MIB - len(COMMAND) - 5) + b"\x01n"
    exactly += bytes(8 * MIB - len(exactly))
    assert (await daemon.modules.put(Put(upload=await daemon.upload(exactly)), "s")).size == 8 * MIB


def _leb(number: int) -> bytes:
    """In four bytes."""
    return bytes(number >> 7 * n & 0x7F | (0x80 if n < 3 else 0) for n in range(4))


async def test_a_store_without_room_says_so(buses: tuple[Bus, Bus], tmp_path: Path, engine: wasmtime.Engine) -> None:
    daemon = await make_world(buses[0], tmp_path, engine, store_max_bytes=MIB)
    with pytest.raises(StoreFull, match=MODULES_BUCKET):
        await daemon.put(LARGE)
    assert await daemon.names() == []
    assert not (await daemon.put(COMMAND)).again
    await daemon.modules.stop()


async def test_a_large_module_is_looked_at_on_a_thread(alone: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    real, threads = source.wasm.examine, []

    def examine(data: bytes) -> Any:
        threads.append(threading.get_ident())
        return real(data)

    monkeypatch.setattr(source.wasm, "examine", examine)
    await alone.put(LARGE)
    await alone.put(COMMAND)
    assert threads[0] != threading.get_ident()
    assert threads[1] == threading.get_ident()


# -- uploads as a whole, from clients of an earlier version; in parts: test_upload.py ---------------------------------------


async def test_an_upload_is_kept_and_its_bytes_are_gone_afterwards(daemon: Daemon) -> None:
    await daemon.upload(LARGE)
    reply = await daemon.modules.put(Put(upload=UPLOAD), "s")
    assert (reply.module, reply.again) == (module_id(LARGE), False)
    left = await (await daemon.objects()).info(UPLOAD)
    assert (left.size, left.description) == (0, reply.module)


async def test_a_put_of_an_upload_that_is_repeated_is_answered_by_any_daemon(daemon: Daemon, other: Daemon) -> None:
    """Its first answer was lost, and the upload is gone."""
    await daemon.upload(COMMAND)
    first = await daemon.modules.put(Put(upload=UPLOAD), "s")
    for one in (daemon, other):
        again = await one.modules.put(Put(upload=UPLOAD), "s")
        assert (again.module, again.size, again.imports, again.again) == (first.module, first.size, first.imports, True)
    assert other.compiled == []


async def test_an_upload_stays_when_its_put_may_be_tried_again(daemon: Daemon) -> None:
    await daemon.upload(COMMAND)
    daemon.fails = Unavailable("no worker could be started", what="chassis")
    with pytest.raises(Unavailable):
        await daemon.modules.put(Put(upload=UPLOAD), "s")
    daemon.fails = None
    assert (await daemon.modules.put(Put(upload=UPLOAD), "s")).module == module_id(COMMAND)


@pytest.mark.parametrize("data", [REFUSED, b"no module"])
async def test_an_upload_that_is_refused_is_deleted(daemon: Daemon, data: bytes) -> None:
    await daemon.upload(data)
    with pytest.raises((ModuleRefused, NotWasm)):
        await daemon.modules.put(Put(upload=UPLOAD), "s")
    assert await daemon.names() == []


async def test_an_upload_that_is_damaged_is_said_to_be(daemon: Daemon) -> None:
    await daemon.upload(COMMAND)
    await damage(daemon.bus, MODULES_BUCKET, UPLOAD)
    with pytest.raises(BadRequest, match="arrived whole"):
        await daemon.modules.put(Put(upload=UPLOAD), "s")


async def test_an_empty_upload_that_names_no_module_is_no_module(daemon: Daemon) -> None:
    objects = await daemon.objects()
    for description in ("", "sha256:no", "x" * 71):
        await objects.put(UPLOAD, b"", description)
        with pytest.raises(NotWasm):
            await daemon.modules.put(Put(upload=UPLOAD), "s")
    await objects.put(UPLOAD, COMMAND, module_id(numbered(1)))  # and one that is not empty is what it is
    assert (await daemon.modules.put(Put(upload=UPLOAD), "s")).module == module_id(COMMAND)
    await objects.put(UPLOAD, b"", "sha256:" + "0" * 64)
    with pytest.raises(UnknownModule):
        await daemon.modules.put(Put(upload=UPLOAD), "s")


async def test_what_nobody_came_back_for_is_deleted_after_an_hour(daemon: Daemon) -> None:
    await daemon.put(COMMAND)
    await daemon.upload(b"old")
    await daemon.modules.put(Put(upload=await daemon.upload(numbered(1), f"{UPLOADS}kept")), "s")
    await interrupted(daemon.bus, MODULES_BUCKET, f"{UPLOADS}half", bytes(3 * MIB))
    kept = sorted([module_id(COMMAND), module_id(numbered(1))])
    assert await daemon.modules.sweep_once() == 0
    assert await daemon.names() == sorted([*kept, UPLOAD, f"{UPLOADS}kept"])
    daemon.clock.more_ms = HOUR_MS + 60_000
    assert await daemon.modules.sweep_once() == 3
    assert await daemon.names() == kept
    assert await daemon.modules.get(module_id(COMMAND)) == COMMAND


async def test_sweeping_goes_on_whatever_happens(alone: Daemon) -> None:
    clock = VirtualClock()
    alone.modules._clock = clock
    alone.bus.hub.buckets[MODULES_BUCKET].clock = clock
    await alone.upload(b"old")
    sweeping = asyncio.ensure_future(alone.modules.sweep())
    await clock.advance(source.SWEEP_S / 2 - 1)
    alone.bus.disconnect()
    await clock.advance(source.SWEEP_S)
    assert any("another time" in event for _, event, _ in alone.log.said)
    alone.bus.disconnect(connected=True)
    assert await alone.names() == [UPLOAD]
    await clock.advance(source.SWEEP_S)
    assert await alone.names() == []
    assert not sweeping.done()
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)


# -- inspect --------------------------------------------------------------------------------------------------------------


async def test_inspecting_keeps_and_compiles_nothing(daemon: Daemon) -> None:
    found = await daemon.modules.inspect(Inspect(wasm=b64(REFUSED)), "s")
    assert (found.accepted, len(found.why), found.module) == (False, 2, module_id(REFUSED))
    found = await daemon.modules.inspect(Inspect(upload=await daemon.upload(COMMAND)), "s")
    assert (found.accepted, found.why, found.memories) == (True, (), 1)
    assert (await daemon.names(), daemon.compiled) == ([], [])
    await daemon.put(COMMAND)
    assert (await daemon.modules.inspect(Inspect(module=module_id(COMMAND)), "s")).accepted
    with pytest.raises(UnknownModule):
        await daemon.modules.inspect(Inspect(module=module_id(REFUSED)), "s")
    with pytest.raises(BadRequest, match="wasm, upload, module"):
        await daemon.modules.inspect(Inspect(), "s")


# -- what is in the store is believed as far as its digest -----------------------------------------------------------------


async def test_a_damaged_module_is_not_used_is_said_and_can_be_put_again(daemon: Daemon, other: Daemon) -> None:
    ident = (await daemon.put(COMMAND)).module
    await damage(daemon.bus, MODULES_BUCKET, ident)
    for call in (other.modules.get(ident), enter(other.modules.open(ident))):
        with pytest.raises(UnknownModule, match="damaged"):
            await call
    assert len(other.errors()) == 2
    reply = await other.put(COMMAND)
    assert not reply.again
    assert await daemon.modules.get(ident) == COMMAND
    assert (await daemon.put(COMMAND)).again


async def test_a_module_that_is_another_than_its_name_says_is_not_used(daemon: Daemon) -> None:
    """Whoever may publish on the bus may put this there."""
    objects, ident = await daemon.objects(), module_id(COMMAND)
    for planted in (numbered(1), LARGE, b""):
        await objects.put(ident, planted)
        with pytest.raises(UnknownModule, match="damaged"):
            await daemon.modules.get(ident)
        with pytest.raises(UnknownModule, match="damaged"):
            await enter(daemon.modules.open(ident))
    assert not (await daemon.put(COMMAND)).again
    assert await daemon.modules.get(ident) == COMMAND


async def test_a_module_that_was_put_past_the_rules_is_examined_before_it_is_compiled(daemon: Daemon) -> None:
    objects = await daemon.objects()
    await objects.put(module_id(REFUSED), REFUSED)
    with pytest.raises(ModuleRefused):
        await enter(daemon.modules.open(module_id(REFUSED)))
    await objects.put(module_id(b"text"), b"text")
    with pytest.raises(NotWasm):
        await enter(daemon.modules.open(module_id(b"text")))
    large = bytes(9 * MIB)
    await objects.put(module_id(large), large)
    with pytest.raises(TooLarge):
        await enter(daemon.modules.open(module_id(large)))
    assert daemon.compiled == []


async def test_modules_are_listed_in_pages_and_uploads_are_not(daemon: Daemon) -> None:
    ids = sorted([(await daemon.put(numbered(n))).module for n in range(5)])
    await daemon.upload(b"x")
    page = await daemon.modules.page(Page(limit=2))
    assert ([line.module for line in page.modules], page.after) == (ids[:2], ids[1])
    assert {line.size for line in page.modules} <= {len(numbered(n)) for n in range(5)}
    assert all(line.at.startswith("20") and line.at.endswith("Z") for line in page.modules)
    page = await daemon.modules.page(Page(limit=2, after=page.after))
    assert ([line.module for line in page.modules], page.after) == (ids[2:4], ids[3])
    page = await daemon.modules.page(Page(limit=2, after=page.after))
    assert ([line.module for line in page.modules], page.after) == (ids[4:], None)
    assert (await daemon.modules.page(Page(limit=5))).after is None


# -- at hand --------------------------------------------------------------------------------------------------------------


async def enter(block: Any) -> Any:
    async with block as code:
        return code


async def settled(closed: int) -> None:
    """Returns when the descriptor is closed."""
    async with asyncio.timeout(5):
        while is_open(closed):
            gc.collect()
            await asyncio.sleep(0.001)


async def test_a_module_is_found_in_memory_then_on_disk_then_compiled(
    alone: Daemon, tmp_path: Path, engine: wasmtime.Engine
) -> None:
    ident = (await alone.put(COMMAND)).module
    assert alone.found() == {"compiled": 1}
    await enter(alone.modules.open(ident))
    assert alone.found() == {"compiled": 1, "memory": 1}
    later = await Daemon(alone.bus, tmp_path / "alone", engine).start()
    for _ in range(3):
        await enter(later.modules.open(ident))
    assert later.found() == {"disk": 1, "memory": 2}
    elsewhere = await Daemon(alone.bus, tmp_path / "elsewhere", engine).start()
    await enter(elsewhere.modules.open(ident))
    assert elsewhere.found() == {"compiled": 1}
    with pytest.raises(UnknownModule):
        await enter(elsewhere.modules.open("sha256:" + "0" * 64))
    for one in (later, elsewhere):
        await one.modules.stop()


async def test_what_many_ask_for_is_compiled_once(daemon: Daemon, other: Daemon) -> None:
    ident = (await daemon.put(COMMAND)).module
    other.gate.clear()
    opening = [asyncio.ensure_future(enter(other.modules.open(ident))) for _ in range(20)]
    async with asyncio.timeout(5):
        while not other.compiled:
            await asyncio.sleep(0.001)
    opening += [asyncio.ensure_future(enter(other.modules.open(ident))) for _ in range(20)]
    await asyncio.sleep(0)
    opening[0].cancel()  # who asked first has gone
    await asyncio.gather(opening[0], return_exceptions=True)
    other.gate.set()
    codes = await asyncio.gather(*opening[1:])
    assert len({code.number for code in codes}) == 1
    assert other.compiled == [ident]


async def test_a_failure_is_told_to_all_who_asked_and_not_remembered(daemon: Daemon, other: Daemon) -> None:
    ident = (await daemon.put(COMMAND)).module
    other.gate.clear()
    other.fails = Unavailable("no worker could be started", what="chassis")
    opening = [asyncio.ensure_future(enter(other.modules.open(ident))) for _ in range(3)]
    async with asyncio.timeout(5):
        while not other.compiled:
            await asyncio.sleep(0.001)
    other.gate.set()
    assert [type(e) for e in await asyncio.gather(*opening, return_exceptions=True)] == [Unavailable] * 3
    other.fails = None
    await enter(other.modules.open(ident))


async def test_a_failure_that_nobody_waits_for_any_more_is_no_noise(alone: Daemon) -> None:
    noise: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
    alone.gate.clear()
    alone.fails = ModuleRefused(why=["it is so"])
    putting = asyncio.ensure_future(alone.put(COMMAND))
    async with asyncio.timeout(5):
        while not alone.compiled:
            await asyncio.sleep(0.001)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    alone.gate.set()
    async with asyncio.timeout(5):
        while alone.modules._shelf._loading:
            await asyncio.sleep(0.001)
    del putting
    alone.fails = None
    gc.collect()  # a task whose exception was not looked at says so when it goes
    await asyncio.sleep(0)
    asyncio.get_running_loop().set_exception_handler(None)
    assert noise == []


async def test_a_put_beside_a_run_of_an_unknown_module_is_not_told_that_it_is_unknown(alone: Daemon) -> None:
    """The run began to look for it first, and both wait for the same search."""
    looked, go = asyncio.Event(), asyncio.Event()

    async def fetch(module: str) -> bytes:
        looked.set()
        await go.wait()
        raise UnknownModule(module=module)

    shelf, ident = Shelf(alone.cache, fetch, 2), module_id(COMMAND)
    running = asyncio.ensure_future(shelf.code(ident))
    await looked.wait()
    putting = asyncio.ensure_future(shelf.code(ident, COMMAND))
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(UnknownModule):
        await running
    async with asyncio.timeout(5):
        assert (await putting).module == ident
    await shelf.stop()


async def test_what_was_used_longest_ago_leaves_the_shelf_and_its_descriptor_is_closed(
    buses: tuple[Bus, Bus], tmp_path: Path, engine: wasmtime.Engine
) -> None:
    daemon = await make_world(buses[0], tmp_path, engine, loaded_max=2)
    ids = [(await daemon.put(numbered(n))).module for n in range(2)]
    first, second = [(await enter(daemon.modules.open(ident))).fd for ident in ids]
    await enter(daemon.modules.open(ids[0]))
    await daemon.put(numbered(2))
    await settled(second)
    assert is_open(first)
    await enter(daemon.modules.open(ids[0]))
    assert daemon.found() == {"compiled": 3, "memory": 4}
    await daemon.modules.stop()
    await settled(first)


async def test_a_descriptor_that_a_run_holds_is_not_closed_under_it(
    buses: tuple[Bus, Bus], tmp_path: Path, engine: wasmtime.Engine
) -> None:
    daemon = await make_world(buses[0], tmp_path, engine, loaded_max=1)
    ident = (await daemon.put(numbered(0))).module
    async with daemon.modules.open(ident) as code:
        fd, number = code.fd, code.number
        for n in range(1, 5):
            await daemon.put(numbered(n))
        await daemon.modules.stop()
        gc.collect()
        wasmtime.Module.deserialize_file(engine, f"/proc/self/fd/{fd}")
        assert os.fstat(fd).st_size == code.size
    del code
    await settled(fd)
    again = await Daemon(buses[0], tmp_path, engine).start()
    async with again.modules.open(ident) as code:
        assert code.number == 1
    async with again.modules.open(module_id(numbered(1))) as code:
        assert code.number == 2
    assert number == 1
    await again.modules.stop()


async def test_large_ones_leave_the_shelf_sooner(alone: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "AT_HAND_MAX_BYTES", 1)
    ids = [(await alone.put(numbered(n))).module for n in range(3)]
    assert list(alone.modules._shelf._at_hand) == ids[2:]


async def test_stopping_ends_what_is_loaded_and_says_so_to_who_waits(daemon: Daemon, other: Daemon) -> None:
    await other.modules.stop()
    await other.modules.stop()
    ident = (await daemon.put(COMMAND)).module
    with pytest.raises(Unavailable, match="stops"):
        await enter(other.modules.open(ident))
    daemon.gate.clear()
    putting = asyncio.ensure_future(daemon.put(numbered(1)))
    async with asyncio.timeout(5):
        while len(daemon.compiled) < 2:
            await asyncio.sleep(0.001)
    await daemon.modules.stop()
    with pytest.raises(Unavailable, match="stops"):
        await putting


# -- without JetStream ------------------------------------------------------------------------------------------------------


async def test_without_jetstream_what_is_compiled_still_runs_and_the_rest_comes_back(
    alone: Daemon, tmp_path: Path, engine: wasmtime.Engine
) -> None:
    ident = (await alone.put(COMMAND)).module
    alone.bus.disconnect()
    later = await Daemon(alone.bus, tmp_path / "alone", engine).start()
    assert [level for level, _, _ in later.log.said] == ["warning"]
    await enter(later.modules.open(ident))
    for call in (later.put(numbered(1)), later.modules.get(ident), later.modules.page(Page())):
        with pytest.raises(Unavailable):
            await call
    alone.bus.disconnect(connected=True)
    await later.put(numbered(1))
    assert len((await later.modules.page(Page())).modules) == 2
    await later.modules.stop()


async def test_a_bucket_that_has_gone_is_made_again(daemon: Daemon) -> None:
    await daemon.put(COMMAND)
    if isinstance(daemon.bus, MemoryBus):
        daemon.bus.hub.buckets.clear()
    else:
        await daemon.bus._client.jetstream().delete_stream(f"OBJ_{MODULES_BUCKET}")
        with pytest.raises(Unavailable):
            await daemon.put(COMMAND)
    reply = await daemon.put(COMMAND)
    assert reply.module == module_id(COMMAND)
    assert await daemon.modules.get(reply.module) == COMMAND
