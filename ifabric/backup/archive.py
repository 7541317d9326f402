"""The archive: tar in zstd in age, written and read as a stream.

Neither the snapshot nor its ciphertext is ever in memory: a thread feeds a pipe at one end, and this one empties it at
the other. What is written appears whole or not at all, under a name that nothing had before.

**What reading proves.** age authenticates every 64 KiB and the end of the file, so a flipped bit and a missing tail are
found, but only where they are: a reader that stops after the last member would not see them. So everything is read to
its end, and each member is held against the manifest's size and digest besides.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import msgspec
import pyrage
import zstandard

from ifabric.backup.manifest import MANIFEST, MANIFEST_MAX_BYTES, BackupFailed, BackupRefused, Manifest, decode_manifest

LEVEL = 3
CHUNK = 1 << 18
#: told how many bytes were gone through
Progress = Callable[[int], None]


class Sink(Protocol):
    """Takes a member's bytes."""

    def write(self, data: bytes, /) -> object: ...


class Nowhere:
    """Takes a member that only has to be checked."""

    def write(self, data: bytes, /) -> object:
        return len(data)


class Source(NamedTuple):
    """A member to be: what is in a file that is open for reading."""

    name: str
    file: IO[bytes]


class Written(NamedTuple):
    """What became of a file: its size in bytes and its digest."""

    size: int
    sha256: str


def spool(folder: Path) -> IO[bytes]:
    """A file without a name in `folder`: it is gone when it is closed, however the process ends."""
    return tempfile.TemporaryFile(dir=folder)


def nothing(_: int) -> None:
    """Progress that nobody watches."""


def measure(file: IO[bytes]) -> Written:
    """The size and digest of all that is in a file."""
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while data := file.read(CHUNK):
        digest.update(data)
        size += len(data)
    return Written(size, digest.hexdigest())


# -- writing -------------------------------------------------------------------------------------------------------


def write_archive(
    path: Path, manifest: Manifest, sources: Sequence[Source], recipients: Sequence[Any], progress: Progress = nothing
) -> Written:
    """Writes a backup to `path`, whole or not at all, for its owner's eyes. Blocks.

    `BackupFailed` when there is no room, or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _fresh(partial) as file:
            written = _encrypt(file, manifest, sources, recipients, progress)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)  # unlike a rename it never takes another backup's place
    except FileExistsError:
        raise BackupFailed(f"{path} is there already; no backup was made") from None
    except OSError as error:
        raise BackupFailed(f"cannot write {path}: {error.strerror or error}; no backup was made") from None
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return written


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[IO[bytes]]:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file


def sync_folder(folder: Path) -> None:
    """Makes the names in it last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encrypt(
    file: IO[bytes], manifest: Manifest, sources: Sequence[Source], recipients: Sequence[Any], progress: Progress
) -> Written:
    out = _Counting(file)

    def feed(pipe: IO[bytes]) -> None:
        with zstandard.ZstdCompressor(level=LEVEL).stream_writer(pipe, closefd=False) as packed:
            _tar(packed, manifest, sources, progress)

    with _pipe(feed) as (end, fed):
        try:
            pyrage.encrypt_io(end, out, list(recipients))
        except (pyrage.EncryptError, OSError) as error:
            raise _cause(error, out.error or fed()) from None
        if (failed := fed()) is not None:
            raise failed
    return Written(out.size, out.digest.hexdigest())


def _tar(packed: Any, manifest: Manifest, sources: Sequence[Source], progress: Progress) -> None:
    with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        said = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
        tar.addfile(_info(MANIFEST, len(said), manifest), io.BytesIO(said))
        for name, source in sources:
            member = manifest.member(name)
            assert member is not None, f"{name} is in the manifest"
            source.seek(0)
            tar.addfile(_info(name, member.size, manifest), _Watched(source, progress))


def _info(name: str, size: int, manifest: Manifest) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(manifest.at.timestamp())
    return info


class _Counting:
    """Counts and digests what is written through it, and remembers why it could not be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise


class _Watched:
    """Reads through, and tells how much."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data


def _cause(error: Exception, deeper: BaseException | None) -> BaseException:
    """An error of ours comes out of pyrage as a text: the error itself says more."""
    return deeper if deeper is not None else BackupFailed(f"age: {error}; no backup was made")


# -- reading -------------------------------------------------------------------------------------------------------


def read_archive(
    path: Path,
    identities: Sequence[Any],
    sink: Callable[[Manifest, str], contextlib.AbstractContextManager[Sink]],
    progress: Progress = nothing,
) -> Manifest:
    """Reads a backup to its end and checks all of it; each member goes where `sink` says. Blocks.

    `BackupRefused` tells what is wrong with it, by `reason`: `key`, `corrupt`, `format`, `manifest`, `unreadable`.
    What was written to sinks is to be believed only when this returns.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise BackupRefused(f"cannot read {path}: {error.strerror}; nothing was touched", reason="unreadable") from None

    def feed(pipe: IO[bytes]) -> None:
        pyrage.decrypt_io(_Watched(file, progress), pipe, list(identities))

    with file, _pipe(feed) as (end, fed):
        try:
            found = _untar(end, sink)
        except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
            end.close()
            raise _unreadable(path, fed() or error) from None
        except OSError as error:
            end.close()
            deeper = fed()
            if deeper is not None and not isinstance(deeper, BrokenPipeError):
                raise _unreadable(path, deeper) from None
            raise BackupRefused(
                f"cannot unpack {path}: {error.strerror or error}; nothing was touched", reason="room"
            ) from None
        except BackupRefused:
            end.close()
            deeper = fed()  # a torn file looks like an odd one, until age says that it is torn
            if deeper is not None and not isinstance(deeper, BrokenPipeError):
                raise _unreadable(path, deeper) from None
            raise
        end.close()  # a feeder that is not done by now was not read to its end, and fails
        if (failed := fed()) is not None:
            raise _unreadable(path, failed) from None
    return found


def read_manifest(path: Path, identities: Sequence[Any]) -> Manifest:
    """Reads a backup to its end, keeps nothing but its manifest."""
    return read_archive(path, identities, lambda _, __: contextlib.nullcontext(Nowhere()))


def _untar(end: IO[bytes], sink: Callable[[Manifest, str], contextlib.AbstractContextManager[Sink]]) -> Manifest:
    unpacked = zstandard.ZstdDecompressor().stream_reader(end, closefd=False)
    with tarfile.open(fileobj=unpacked, mode="r|", bufsize=CHUNK) as tar:
        first = tar.next()
        if first is None or first.name != MANIFEST or not 0 < first.size <= MANIFEST_MAX_BYTES:
            raise BackupRefused(
                "this is not a backup: it does not begin with a manifest; nothing was touched", reason="manifest"
            )
        manifest = decode_manifest(_content(tar, first).read())
        left = {member.name: member for member in manifest.members}
        while (info := tar.next()) is not None:
            member = left.pop(info.name, None)
            if member is None or not info.isreg() or info.size != member.size:
                raise BackupRefused(
                    f"{info.name[:100]!r} in the backup is not what its manifest says; nothing was touched",
                    reason="corrupt",
                )
            digest = hashlib.sha256()
            content = _content(tar, info)
            with sink(manifest, info.name) as target:
                while data := content.read(CHUNK):
                    digest.update(data)
                    target.write(data)
            if digest.hexdigest() != member.sha256:
                raise BackupRefused(
                    f"{info.name} in the backup is damaged: its digest is another; nothing was touched",
                    reason="corrupt",
                )
        if left:
            raise BackupRefused(f"{', '.join(left)} is missing in the backup; nothing was touched", reason="corrupt")
    while unpacked.read(CHUNK):  # what is behind the tar, so that age comes to its end
        continue
    while end.read(CHUNK):
        continue
    return manifest


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(info)
    assert found is not None, "it is a regular file"
    return found


def _unreadable(path: Path, error: BaseException) -> BackupRefused:
    said = str(error)
    if isinstance(error, pyrage.DecryptError) and "matching keys" in said:
        return BackupRefused(
            f"{path.name} was not encrypted for this key; nothing was touched. Give the private key of one of the recipients.",
            reason="key",
        )
    return BackupRefused(
        f"{path.name} is damaged or cut short ({said}); nothing was touched. Take another backup.", reason="corrupt"
    )


# -- both ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pipe(feed: Callable[[IO[bytes]], None]) -> Iterator[tuple[IO[bytes], Callable[[], BaseException | None]]]:
    """A thread that feeds a pipe; its other end, and a function that waits for the thread and tells its error."""
    read_fd, write_fd = os.pipe()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(write_fd, "wb", CHUNK) as pipe:
                feed(pipe)
        except BaseException as error:  # whoever asks for it is told
            failed.append(error)

    thread = threading.Thread(target=run, name="backup pipe", daemon=True)
    thread.start()

    def fed() -> BaseException | None:
        thread.join()
        return failed[0] if failed else None

    end = os.fdopen(read_fd, "rb", CHUNK)
    try:
        yield end, fed
    finally:
        end.close()  # a thread that still feeds ends with a broken pipe
        thread.join()
