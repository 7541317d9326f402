"""The cache of compiled modules: what it writes is all that it loads, and nobody changes what was checked."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from ifabric.clock import seeded
from ifabric.config_chassis import Chassis, ModuleStore
from ifabric.errors import ModuleRefused, StartupError, Unavailable
from ifabric.metrics import Metrics
from ifabric_actors.chassis import cache as caches
from ifabric_actors.chassis.cache import TAG_BYTES, Cache, Sealed
from ifabric_actors.chassis.wasm import module_id

WASM = bytes(wasmtime.wat2wasm('(module (func (export "_start")))'))
ID = module_id(WASM)
ENGINE, OTHER_ENGINE = "ab" * 16, "cd" * 16


class Log:
    """What was logged: (level, event, facts)."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, **facts: Any) -> None:
        self.said.append(("info", event, facts))

    def warning(self, event: str, **facts: Any) -> None:
        self.said.append(("warning", event, facts))

    def error(self, event: str, **facts: Any) -> None:
        self.said.append(("error", event, facts))


@pytest.fixture(scope="module")
def engine() -> Iterator[wasmtime.Engine]:
    with wasmtime.Engine() as made:
        yield made


class World:
    """A cache in a folder, and a compiler that is counted."""

    def __init__(self, folder: Path, engine: wasmtime.Engine, *, cache_max_mb: int = 64) -> None:
        self.folder, self.engine = folder, engine
        self.metrics, self.log = Metrics(), Log()
        self.compiled = 0
        config = Chassis(modules=ModuleStore(cache_max_mb=cache_max_mb))
        self.cache = Cache(folder, config, self.metrics, self.log, compile=self.compile)

    async def compile(self, data: bytes) -> bytes:
        self.compiled += 1
        return bytes(wasmtime.Module(self.engine, data).serialize())

    def count(self, outcome: str) -> int:
        return int(self.metrics.counter("if_chassis_cache_total", outcome=outcome).value)

    def entry(self, module: str = ID, engine: str = ENGINE) -> Path:
        return self.folder / f"engine-{engine}" / f"{module.removeprefix('sha256:')}.cwasm"

    def runs(self, sealed: Sealed | None) -> bool:
        """Whether it is a module that wasmtime loads and runs."""
        assert sealed is not None
        module = wasmtime.Module.deserialize_file(self.engine, f"/proc/self/fd/{sealed.fd}")
        with wasmtime.Store(self.engine) as store:
            start: Any = wasmtime.Instance(store, module, []).exports(store)["_start"]
            start(store)
        return True


@pytest.fixture
async def world(tmp_path: Path, engine: wasmtime.Engine) -> World:
    made = World(tmp_path / "state" / "compiled", engine)
    await made.cache.start(ENGINE)
    return made


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def restarted(world: World, fingerprint: str = ENGINE, **options: Any) -> World:
    made = World(world.folder, world.engine, **options)
    await made.cache.start(fingerprint)
    return made


# -- what is kept ---------------------------------------------------------------------------------------------------------


async def test_what_was_compiled_is_loaded_by_the_next_start(world: World) -> None:
    assert await world.cache.load(ID) is None
    assert world.runs(await world.cache.compile(ID, WASM))
    assert world.runs(await world.cache.load(ID))
    later = await restarted(world)
    assert later.runs(await later.cache.load(ID))
    assert (world.count("compiled"), world.count("disk"), later.count("disk")) == (1, 1, 1)
    assert (world.count("refused"), later.count("refused"), later.compiled) == (0, 0, 0)


async def test_only_this_user_can_read_what_is_kept(world: World) -> None:
    before = os.umask(0)
    try:
        await world.cache.compile(ID, WASM)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [world.folder, *world.folder.rglob("*")]}
    assert modes == {"compiled": 0o700, "key": 0o600, f"engine-{ENGINE}": 0o700, world.entry().name: 0o600}


async def test_what_is_in_memory_can_be_changed_by_nobody(world: World) -> None:
    """What is checked is what is mapped."""
    for sealed in (await world.cache.compile(ID, WASM), await world.cache.load(ID)):
        assert sealed is not None
        assert fcntl.fcntl(sealed.fd, fcntl.F_GET_SEALS) == caches.SEALS
        again = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDWR)
        for fd in (sealed.fd, again):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 1)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, sealed.size + 1)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, sealed.size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
        os.close(again)
        assert os.get_inheritable(sealed.fd) is False
        assert world.runs(sealed)


async def test_a_descriptor_is_closed_with_the_last_who_holds_it(world: World) -> None:
    sealed = await world.cache.compile(ID, WASM)
    fd = sealed.fd
    os.fstat(fd)
    del sealed
    async with asyncio.timeout(5):
        while is_open(fd):  # the thread that has made it lets go of it, too
            gc.collect()
            await asyncio.sleep(0.001)
    twice = await world.cache.load(ID)
    assert twice is not None
    twice.close()
    twice.close()


async def test_a_cancelled_load_leaves_no_descriptor(world: World) -> None:
    await world.cache.compile(ID, WASM)
    gc.collect()
    before = descriptors()
    for _ in range(20):
        loading = asyncio.ensure_future(world.cache.load(ID))
        await asyncio.sleep(0)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    async with asyncio.timeout(5):
        while descriptors() > before:
            await asyncio.sleep(0.01)


async def test_a_module_that_cannot_be_compiled_leaves_nothing(world: World) -> None:
    async def refuse(data: bytes) -> bytes:
        raise ModuleRefused(why=["it is so"])

    world.cache._compile = refuse
    with pytest.raises(ModuleRefused):
        await world.cache.compile(ID, WASM)
    assert not world.entry().exists()
    assert world.count("compiled") == 0


# -- what is refused -------------------------------------------------------------------------------------------------------


async def test_of_a_thousand_tampered_entries_none_is_loaded(world: World) -> None:
    chance = seeded(7)
    await world.cache.compile(ID, WASM)
    path = world.entry()
    good = path.read_bytes()
    path.unlink()
    for n in range(1000):
        bad = bytearray(good)
        match n % 5:
            case 0:
                bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
            case 1:
                bad = bad[: chance.randrange(len(bad))]
            case 2:
                bad += chance.randbytes(chance.randrange(1, 100))
            case 3:
                at = chance.randrange(len(bad))
                bad[at : at + 16] = chance.randbytes(16)
            case 4:
                bad[:TAG_BYTES] = chance.randbytes(TAG_BYTES)
        assert bytes(bad) != good
        path.write_bytes(bad)
        assert await world.cache.load(ID) is None
        assert not path.exists()
    assert (world.count("refused"), world.count("disk")) == (1000, 0)
    assert sum(level == "error" for level, _, _ in world.log.said) == 1000
    path.write_bytes(good)
    assert world.runs(await world.cache.load(ID))


async def test_every_byte_of_an_entry_counts(world: World) -> None:
    await world.cache.compile(ID, WASM)
    good = world.entry().read_bytes()
    step = max(1, len(good) // 300)
    for at in (*range(TAG_BYTES + 8), *range(0, len(good), step), len(good) - 1):
        world.entry().write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert await world.cache.load(ID) is None


async def test_an_entry_of_another_module_or_engine_is_refused(world: World) -> None:
    await world.cache.compile(ID, WASM)
    other = "sha256:" + "0" * 64
    world.entry(other).write_bytes(world.entry().read_bytes())
    assert await world.cache.load(other) is None
    kept = world.entry().read_bytes()
    upgraded = await restarted(world, OTHER_ENGINE)
    upgraded.entry(engine=OTHER_ENGINE).write_bytes(kept)
    assert await upgraded.cache.load(ID) is None
    assert (world.count("refused"), upgraded.count("refused")) == (1, 1)


async def test_an_entry_with_another_key_is_refused(world: World, tmp_path: Path, engine: wasmtime.Engine) -> None:
    elsewhere = World(tmp_path / "elsewhere", engine)
    await elsewhere.cache.start(ENGINE)
    await elsewhere.cache.compile(ID, WASM)
    world.entry().write_bytes(elsewhere.entry().read_bytes())
    assert await world.cache.load(ID) is None
    assert world.count("refused") == 1


async def test_what_is_no_file_is_refused(world: World, tmp_path: Path) -> None:
    await world.cache.compile(ID, WASM)
    path, elsewhere = world.entry(), tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert await world.cache.load(ID) is None
    os.mkfifo(path)
    async with asyncio.timeout(5):
        assert await world.cache.load(ID) is None
    path.write_bytes(bytes(TAG_BYTES))  # nothing but a tag
    assert await world.cache.load(ID) is None
    assert world.count("refused") == 3
    assert elsewhere.exists()
    assert not path.exists()


async def test_an_entry_that_cannot_be_opened_is_not_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors left, nothing can be said about it."""
    await world.cache.compile(ID, WASM)

    def open_none(*args: Any, **options: Any) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(caches.os, "open", open_none)
        assert await world.cache.load(ID) is None
    assert world.count("refused") == 0
    assert world.runs(await world.cache.load(ID))


# -- the key ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["short", "long", "gone", "open", "link", "directory"])
async def test_a_key_that_is_none_is_made_anew_and_all_entries_go(world: World, tmp_path: Path, how: str) -> None:
    await world.cache.compile(ID, WASM)
    key = world.folder / "key"
    old = key.read_bytes()
    assert len(old) == 32
    if how == "short":
        key.write_bytes(old[:-1])
    elif how == "long":
        key.write_bytes(old + b"x")
    elif how == "gone":
        key.unlink()
    elif how == "open":
        key.chmod(0o640)
    elif how == "link":
        key.rename(tmp_path / "key")
        key.symlink_to(tmp_path / "key")
    else:
        key.unlink()
        key.mkdir()
        with pytest.raises(StartupError, match="chassis.modules.cache_dir"):
            await restarted(world)
        return
    later = await restarted(world)
    assert not later.entry().exists()
    assert await later.cache.load(ID) is None
    assert not key.is_symlink()
    assert len(key.read_bytes()) == 32
    assert key.read_bytes() != old
    await later.cache.compile(ID, WASM)
    assert await (await restarted(world)).cache.load(ID) is not None


async def test_daemons_that_start_together_agree_on_the_key(tmp_path: Path, engine: wasmtime.Engine) -> None:
    for n in range(5):
        worlds = [World(tmp_path / f"{n}", engine) for _ in range(8)]
        await asyncio.gather(*(one.cache.start(ENGINE) for one in worlds))
        await worlds[0].cache.compile(ID, WASM)
        for one in worlds:
            assert await one.cache.load(ID) is not None


async def test_a_folder_that_another_process_holds_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "LOCK_S", 0.1)
    held = os.open(world.folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(StartupError, match="another process has held"):
            await restarted(world)
    finally:
        os.close(held)
    await restarted(world)


# -- the folder -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o704])
async def test_a_folder_that_is_open_to_others_is_not_used(tmp_path: Path, engine: wasmtime.Engine, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StartupError, match="chmod 700"):
        await World(folder, engine).cache.start(ENGINE)
    assert list(folder.iterdir()) == []


async def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, engine: wasmtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StartupError, match="belongs to user"):
        await World(tmp_path / "theirs", engine).cache.start(ENGINE)
    assert list((tmp_path / "theirs").iterdir()) == []


async def test_an_engines_folder_that_is_open_to_others_is_not_used(world: World) -> None:
    world.entry().parent.chmod(0o755)
    with pytest.raises(StartupError, match="chmod 700"):
        await restarted(world)


async def test_an_engines_folder_that_is_elsewhere_is_not_used(world: World, tmp_path: Path) -> None:
    kept = tmp_path / "victim" / f".{ID.removeprefix('sha256:')}.{'0' * 16}"
    kept.parent.mkdir(mode=0o700)
    kept.write_text("")
    world.entry().parent.rmdir()
    world.entry().parent.symlink_to(kept.parent)
    with pytest.raises(StartupError, match="no directory"):
        await restarted(world)
    assert kept.exists()


async def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, engine: wasmtime.Engine) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError):
            await World(folder, engine).cache.start(ENGINE)


async def test_an_upgrade_throws_away_what_the_engine_before_has_left_and_nothing_else(world: World) -> None:
    await world.cache.compile(ID, WASM)
    (world.folder / "notes.txt").write_text("mine")
    (world.folder / "engine-ZZ").mkdir()
    later = await restarted(world, OTHER_ENGINE)
    assert {path.name for path in world.folder.iterdir()} == {"key", f"engine-{OTHER_ENGINE}", "notes.txt", "engine-ZZ"}
    assert any("another engine" in event for _, event, _ in later.log.said)
    (later.entry(engine=OTHER_ENGINE).parent / "notes.txt").write_text("mine")
    await restarted(later, ENGINE)
    assert (later.entry(engine=OTHER_ENGINE).parent / "notes.txt").exists()


async def test_a_link_among_the_engines_is_not_followed(world: World, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    kept = victim / world.entry().name
    kept.write_text("")
    (world.folder / f"engine-{'ef' * 16}").symlink_to(victim)
    await restarted(world)
    assert kept.exists()


async def test_what_died_half_written_is_deleted_at_the_next_start(world: World) -> None:
    await world.cache.compile(ID, WASM)
    left = world.entry().with_name(f".{ID.removeprefix('sha256:')}.{'0' * 16}")
    for path in (left, world.folder / f".key.{'0' * 16}"):
        path.write_text("half")
    await restarted(world)
    assert {path.name for path in world.folder.rglob("*")} == {"key", f"engine-{ENGINE}", world.entry().name}


# -- its size, and the disk ---------------------------------------------------------------------------------------------------


async def test_what_was_used_longest_ago_makes_room(world: World) -> None:
    async def megabyte(data: bytes) -> bytes:
        return bytes(1 << 20)

    small = await restarted(world, cache_max_mb=4)
    small.cache._compile = megabyte
    ids = [f"sha256:{n:064}" for n in range(5)]
    for n, one in enumerate(ids[:3]):
        await small.cache.compile(one, b"")
        os.utime(small.entry(one), (n, n))
    assert await small.cache.load(ids[0]) is not None  # used now
    await small.cache.compile(ids[3], b"")
    assert [small.entry(one).exists() for one in ids] == [True, False, True, True, False]
    await small.cache.compile(ids[3], b"")  # in its own place
    assert [small.entry(one).exists() for one in ids] == [True, False, True, True, False]
    await small.cache.compile(ids[4], b"")
    assert [small.entry(one).exists() for one in ids] == [True, False, False, True, True]


async def test_what_is_larger_than_the_cache_is_not_kept_and_is_run(world: World) -> None:
    async def huge(data: bytes) -> bytes:
        return bytes(1 << 20)

    small = await restarted(world, cache_max_mb=1)
    await small.cache.compile(ID, WASM)
    small.cache._compile = huge
    other = "sha256:" + "0" * 64
    assert (await small.cache.compile(other, b"")).size == 1 << 20
    assert not small.entry(other).exists()
    assert small.entry().exists()


async def test_what_is_larger_than_the_cache_may_be_by_now_is_not_read(world: World) -> None:
    async def huge(data: bytes) -> bytes:
        return bytes(2 << 20)

    world.cache._compile = huge
    await world.cache.compile(ID, b"")
    smaller = await restarted(world, cache_max_mb=1)
    assert await smaller.cache.load(ID) is None
    assert not world.entry().exists()


async def test_a_full_disk_is_said_and_runs_go_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(caches.os, "fsync", full)
        assert world.runs(await world.cache.compile(ID, WASM))
    assert caches.os.fsync is real
    assert list(world.entry().parent.iterdir()) == []
    assert any(level == "warning" and "could not be kept" in event for level, event, _ in world.log.said)
    assert await world.cache.load(ID) is None


async def test_a_disk_that_cannot_be_written_to_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.cache.compile(ID, WASM)

    def read_only(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(caches.os, "utime", read_only)
    assert world.runs(await world.cache.load(ID))


async def test_without_memory_the_error_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> int:
        raise OSError(errno.ENOMEM, "cannot allocate memory")

    monkeypatch.setattr(caches.os, "memfd_create", none)
    with pytest.raises(Unavailable, match="no memory"):
        await world.cache.compile(ID, WASM)


async def test_an_engines_folder_that_another_daemon_has_deleted_is_made_again(world: World) -> None:
    """A daemon of another version has started in the same folder."""
    await restarted(world, OTHER_ENGINE)
    assert not world.entry().parent.exists()
    assert await world.cache.load(ID) is None
    await world.cache.compile(ID, WASM)
    assert world.runs(await world.cache.load(ID))


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "sha256:xyz", "sha256:" + "A" * 64, "sha256:" + "0" * 64 + "/"]
)
async def test_a_name_that_is_none_never_becomes_a_path(world: World, name: str) -> None:
    with pytest.raises(AssertionError):
        await world.cache.load(name)
    with pytest.raises(AssertionError):
        await world.cache.compile(name, WASM)
