"""Where backups are kept on this machine: what is there, what is whole, what goes.

A backup is there when its file is: it was linked whole, its facts (`FILE.json`) come a moment later. A name that is not
one of ours, and a file without facts, is somebody else's and never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from ifabric.backup.archive import sync_folder
from ifabric.backup.manifest import BackupFailed, BackupRefused, Kept, Sidecar, expired, parse_name
from ifabric.errors import StartupError

LOCK = ".lock"
_PARTIAL = (".partial", ".json.new", ".download")


class Found(NamedTuple):
    """A backup in a folder. Without facts, they could not be read."""

    path: Path
    at: datetime
    revision: int
    size: int
    facts: Sidecar | None

    @property
    def whole(self) -> bool:
        """Whether it has the size that was written."""
        return self.facts is not None and self.facts.size == self.size


class Folder:
    """A folder with backups."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Sees that it is there, for its owner's eyes. `StartupError` when it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StartupError(
                f"cannot make the backup directory {self.path}: {error.strerror}; no backup was made"
            ) from None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One run at a time. `BackupFailed` while another is at it. What an interrupted one has left is cleared away."""
        try:
            fd = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"cannot write to {self.path}: {error.strerror}; no backup was made") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BackupFailed(
                    f"another backup is being made in {self.path}; this one was not begun", reason="busy"
                ) from None
            for left in self.path.iterdir():
                if left.name.startswith(".") and left.name.endswith(_PARTIAL):
                    left.unlink(missing_ok=True)
            yield
        finally:
            os.close(fd)

    def backups(self) -> list[Found]:
        """All of them, oldest first; nothing half-written is among them."""
        found = []
        try:
            entries = list(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BackupRefused(f"cannot read {self.path}: {error.strerror}", reason="unreadable") from None
        for entry in entries:
            name = parse_name(entry.name)
            if name is not None and not name.prepared and entry.is_file():
                facts = read_facts(entry)
                at = facts.at if facts is not None else name.at
                found.append(Found(entry, at, name.revision, entry.stat().st_size, facts))
        return sorted(found, key=lambda one: (one.at, one.revision))

    def write_facts(self, facts: Sidecar) -> None:
        """Beside the backup, whole or not at all."""
        path = facts_path(self.path / facts.file)
        fresh = path.with_name(f".{path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(encode_facts(facts))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            sync_folder(self.path)
        except OSError as error:
            raise BackupFailed(f"cannot write {path}: {error.strerror}; the backup itself is there") from None

    def delete_expired(self, now: datetime, *, retention_days: int, keep_min: int) -> list[str]:
        """Deletes what retention lets go; the names."""
        kept = [Kept(one.path.name, one.at, good=one.whole, ours=one.facts is not None) for one in self.backups()]
        gone = expired(kept, now, retention_days=retention_days, keep_min=keep_min)
        for name in gone:
            (self.path / name).unlink(missing_ok=True)  # the facts last: without them it would not be ours
            facts_path(self.path / name).unlink(missing_ok=True)
        return gone


def facts_path(backup: Path) -> Path:
    """Where the public facts of a backup are."""
    return backup.with_name(f"{backup.name}.json")


def encode_facts(facts: Sidecar) -> bytes:
    """As they are written."""
    return msgspec.json.format(msgspec.json.encode(facts)) + b"\n"


def read_facts(backup: Path) -> Sidecar | None:
    """The facts beside a backup; None when there are none that can be read, or they are of another file."""
    try:
        found = msgspec.json.decode(facts_path(backup).read_bytes(), type=Sidecar)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if found.file == backup.name else None


def check_file(backup: Path, facts: Sidecar) -> None:
    """Holds a file against its facts, without a key. `BackupRefused` when it is another, or cut short. Blocks."""
    with backup.open("rb") as file:
        size = file.seek(0, 2)
        if size != facts.size:
            raise BackupRefused(
                f"{backup.name} has {size} bytes and should have {facts.size}; nothing was touched. Take another backup.",
                reason="corrupt",
            )
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
            raise BackupRefused(
                f"{backup.name} is damaged: its digest is not the one that was written; nothing was touched. Take another backup.",
                reason="corrupt",
            )
