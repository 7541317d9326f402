"""Compiled modules: on disk from one start to the next, and in memory that nobody can write to.

**A compiled module is native code**, and wasmtime runs what it is given: it takes a file with a flipped bit without a
word. So nothing is loaded that this cache has not written itself. An entry carries a tag, keyed with a secret beside
it, over its bytes, the module's digest and the engine's fingerprint; and what is checked is what is run: the bytes are
copied into a sealed memfd first, checked there, and mapped from there. Between the two nobody can change them, not
even who owns the file.

**Who can read the key can forge**: that is whoever is this user. The folder is for this user's eyes only, and one that
is not, or belongs to somebody else, is refused at start. Guests run in processes that have no files.

    <folder>/key                        32 random bytes
    <folder>/engine-<fingerprint>/<sha256 of the module>.cwasm

An engine of another fingerprint (another version, other settings, another processor) finds nothing here that it could
use, and throws it away when it starts. Several daemons may share a folder; what one of them deletes is compiled again
by the others, no more.

**The cache is a convenience.** When the disk is full, slow or read-only, runs go on, and modules are compiled when
they are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import hmac
import mmap
import os
import re
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from ifabric.clock import block
from ifabric.errors import StartupError, Unavailable
from ifabric.metrics import Metrics

MIB = 1 << 20
KEY_BYTES = 32
TAG_BYTES = 32
#: goes into each tag: another layout is another format
FORMAT = b"ifabric compiled module 1\n"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: how long another process may hold the folder while it starts
LOCK_S, LOOK_S = 10.0, 0.02
_ENGINE = re.compile(r"engine-[0-9a-f]{1,64}")
_FINGERPRINT = re.compile(r"[0-9a-f]{1,64}")
_MODULE = re.compile(r"sha256:[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.cwasm")
#: half written: what a process that died has left
_FRESH = re.compile(r"\.([0-9a-f]{64}|key)\.[0-9a-f]{16}")


class Sealed:
    """Bytes that nobody can change any more, in memory, behind a descriptor. Closed with `close`, or with the object."""

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size

    def close(self) -> None:
        """Twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        # one that a thread has made for a task that was cancelled meanwhile belongs to nobody
        self.close()


class Cache:
    """The compiled modules of one engine."""

    def __init__(
        self, folder: Path, config: Any, metrics: Metrics, log: Any, *, compile: Callable[[bytes], Awaitable[bytes]]
    ) -> None:
        self._folder, self._engine = folder, folder
        self._max_bytes = config.modules.cache_max_mb * MIB
        self._log = log
        self._compile = compile
        self._key, self._fingerprint = b"", b""
        self._counts = {
            outcome: metrics.counter("if_chassis_cache_total", outcome=outcome)
            for outcome in ("memory", "disk", "compiled", "refused")
        }

    async def start(self, fingerprint: str) -> None:
        """Makes the folder ready for the engine of this fingerprint. Raises `StartupError` when it cannot be trusted."""
        assert _FINGERPRINT.fullmatch(fingerprint), f"{fingerprint!r} is to be hexadecimal"
        self._engine = self._folder / f"engine-{fingerprint}"
        self._fingerprint = hashlib.sha256(fingerprint.encode()).digest()
        self._key = await asyncio.to_thread(self._open_folder)

    def count(self, outcome: str) -> None:
        """Counts where a compiled module was found: "memory", "disk", "compiled", or "refused" and not found."""
        self._counts[outcome].inc()

    async def load(self, module: str) -> Sealed | None:
        """The compiled form of a module, from the disk. None: it is not there, or not as this cache has written it."""
        return await asyncio.to_thread(self._load, _digest(module))

    async def compile(self, module: str, wasm: bytes) -> Sealed:
        """Compiles a module and keeps its compiled form. Raises what `compile` does."""
        code = await self._compile(wasm)
        self.count("compiled")
        return await asyncio.to_thread(self._store, _digest(module), code)

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _open_folder(self) -> bytes:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = self._folder.resolve(strict=True)
            self._engine = self._folder / self._engine.name
            _check(self._folder)
            with _locked(self._folder):
                self._make_engine()
                key = _read_key(self._folder / "key")
                if key is None:
                    key = self._new_key()
                self._purge_others()
        except OSError as error:
            raise StartupError(
                f"compiled modules cannot be kept in {self._folder}: {error.strerror or error}; make it writable for"
                " this user, or name another folder in chassis.modules.cache_dir"
            ) from None
        return key

    def _new_key(self) -> bytes:
        """Whatever was written with another key is worth nothing."""
        key = os.urandom(KEY_BYTES)
        self._write(self._folder / "key", key)
        for engine in self._engines():
            _purge(engine, _ENTRY, _FRESH)
        return key

    def _purge_others(self) -> None:
        for engine in self._engines():
            if engine != self._engine:
                self._log.info("compiled modules of another engine are thrown away", engine=engine.name)
                _purge(engine, _ENTRY, _FRESH)
                with contextlib.suppress(OSError):  # something else is in it, and stays
                    engine.rmdir()
        for folder in (self._folder, self._engine):
            _purge(folder, _FRESH)

    def _engines(self) -> list[Path]:
        names = [name for name in _names(self._folder) if _ENGINE.fullmatch(name)]
        return [self._folder / name for name in names if not (self._folder / name).is_symlink()]

    def _make_engine(self) -> None:
        self._engine.mkdir(mode=0o700, exist_ok=True)
        _check(self._engine)

    # -- entries, on a thread -----------------------------------------------------------------------------------------

    def _load(self, digest: str) -> Sealed | None:
        path = self._engine / f"{digest}.cwasm"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._refuse(path, "it is a symbolic link")
            else:
                self._log.warning("a compiled module could not be read", path=str(path), why=str(error))
            return None
        try:
            found = os.fstat(fd)
            size = found.st_size - TAG_BYTES
            if not stat.S_ISREG(found.st_mode) or not 0 < size <= self._max_bytes:
                self._refuse(path, "it is no file of a size that is written here")
                return None
            tag = os.read(fd, TAG_BYTES)
            sealed = _sealed(digest, lambda memory: _copy(fd, memory, size), size)
            if sealed is None or not hmac.compare_digest(tag, self._tag(digest, sealed)):
                self._refuse(path, "its tag is not of these bytes, this module and this engine")
                return None
            with contextlib.suppress(OSError):  # on a disk that cannot be written to, nothing grows old either
                os.utime(fd)
        except OSError as error:
            self._log.warning("a compiled module could not be read", path=str(path), why=str(error))
            return None
        finally:
            os.close(fd)
        self.count("disk")
        return sealed

    def _refuse(self, path: Path, why: str) -> None:
        self.count("refused")
        self._log.error("a compiled module was refused, and is compiled again", path=str(path), why=why)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._log.warning("a refused compiled module could not be deleted", path=str(path), why=str(error))

    def _store(self, digest: str, code: bytes) -> Sealed:
        """In memory in any case; on disk if that is possible."""
        try:
            sealed = _sealed(digest, lambda memory: _write_all(memory, code), len(code))
        except OSError as error:
            raise Unavailable(f"there is no memory for the compiled module ({error})", what="memory") from None
        assert sealed is not None, "all of it was written"
        path = self._engine / f"{digest}.cwasm"
        if len(code) > self._max_bytes - TAG_BYTES:
            self._log.warning("a compiled module is larger than the cache", module=digest, size=len(code))
            return sealed
        try:
            self._make_engine()
            self._make_room(len(code) + TAG_BYTES, path.name)
            self._write(path, self._tag(digest, sealed), code)
        except (OSError, StartupError) as error:
            self._log.warning("a compiled module could not be kept on disk", path=str(path), why=str(error))
        return sealed

    def _make_room(self, size: int, name: str) -> None:
        """Deletes what was used longest ago, until so much more fits."""
        entries = []
        for entry in os.scandir(self._engine):
            if _ENTRY.fullmatch(entry.name) and entry.name != name:
                with contextlib.suppress(FileNotFoundError):  # another daemon has deleted it
                    found = entry.stat(follow_symlinks=False)
                    entries.append((found.st_mtime_ns, entry.path, found.st_size))
        total = sum(entry[2] for entry in entries)
        for _, path, freed in sorted(entries):
            if total + size <= self._max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= freed

    def _write(self, path: Path, *parts: bytes) -> None:
        """All of it, or nothing."""
        fresh = path.with_name(f".{path.name.removesuffix('.cwasm')}.{os.urandom(8).hex()}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                for part in parts:
                    _write_all(fd, part)
                os.fsync(fd)
            finally:
                os.close(fd)
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise

    def _tag(self, digest: str, sealed: Sealed) -> bytes:
        """Over the sealed bytes, and over all that says what they are. Every part before them has one length."""
        tag = hmac.new(self._key, FORMAT + self._fingerprint + bytes.fromhex(digest), "sha256")
        with mmap.mmap(sealed.fd, sealed.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as code:
            tag.update(code)
        return tag.digest()


def _digest(module: str) -> str:
    """The hexadecimal part of a module's name: it becomes the name of a file."""
    assert _MODULE.fullmatch(module), f"{module!r} names no module"
    return module.removeprefix("sha256:")


def _check(folder: Path) -> None:
    """Raises `StartupError` unless only this user can read and write there."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise StartupError(f"{folder} is no directory; compiled modules are kept in one")
    if found.st_uid != os.geteuid():
        raise StartupError(
            f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}: whoever owns it could have his"
            " own code run; name another folder in chassis.modules.cache_dir"
        )
    if found.st_mode & 0o077:
        raise StartupError(
            f"{folder} is open to others ({stat.filemode(found.st_mode)}): compiled modules are native code, and are"
            f" kept where only this user can write; chmod 700 {folder}"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While one process looks for the key and makes one, no other does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(int(LOCK_S / LOOK_S)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                block(LOOK_S)
        else:
            raise StartupError(f"another process has held {folder} for {LOCK_S:g} s, while it starts or hangs")
        yield
    finally:
        os.close(fd)


def _read_key(path: Path) -> bytes | None:
    """The key. None: there is none that others could not have read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        key = os.read(fd, KEY_BYTES + 1) if own else b""
    except OSError:
        return None
    finally:
        os.close(fd)
    return key if len(key) == KEY_BYTES else None


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def _purge(folder: Path, *kinds: re.Pattern[str]) -> None:
    """Deletes what this module has written there, and nothing else."""
    for name in _names(folder):
        if any(kind.fullmatch(name) for kind in kinds):
            (folder / name).unlink(missing_ok=True)


def _sealed(name: str, fill: Callable[[int], int], size: int) -> Sealed | None:
    """A memfd that `fill` has written, sealed. None: it wrote another number of bytes."""
    sealed = Sealed(os.memfd_create(name[:16], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), size)
    if fill(sealed.fd) != size:
        return None
    fcntl.fcntl(sealed.fd, fcntl.F_ADD_SEALS, SEALS)
    return sealed


def _copy(source: int, target: int, size: int) -> int:
    """So many bytes from where `source` stands; how many there were."""
    copied = 0
    while copied < size:
        sent = os.sendfile(target, source, None, size - copied)
        if not sent:
            break
        copied += sent
    return copied


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
