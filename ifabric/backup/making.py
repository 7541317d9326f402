"""Making a backup, and telling whether one is good: `make_backup` and `verify`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from ifabric import __version__
from ifabric.backup import snapshot, streams
from ifabric.backup.archive import Nowhere, Sink, Source, Written, measure, read_archive, spool, write_archive
from ifabric.backup.bucket import Bucket
from ifabric.backup.etcdutl import Tool, find_etcdutl, status
from ifabric.backup.keys import recipients_of
from ifabric.backup.manifest import (
    ETCD,
    BackupFailed,
    BackupRefused,
    Manifest,
    Member,
    Name,
    Sidecar,
    StreamFacts,
    check_etcd,
)
from ifabric.backup.places import Folder, check_file, read_facts
from ifabric.backup.scratch import scratch
from ifabric.backup.streams import Courier
from ifabric.clock import Clock
from ifabric.config_ops import Backup
from ifabric.errors import FabricError, StartupError
from ifabric.programs import find_etcd
from ifabric.store.channel import EtcdSettings

#: told what is going on, and how far it is: bytes done, and in all (0: unknown)
Tell = Callable[[str, int, int], None]


def quiet(_: str, __: int, ___: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A backup that was made. `complaints`: what of it did not work, a sentence each; the backup is there all the same."""

    path: Path
    facts: Sidecar
    endpoint: str
    warnings: tuple[str, ...] = ()
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    complaints: tuple[FabricError, ...] = field(default=(), compare=False)


class Verified(NamedTuple):
    """A backup that was read to its end. `keys`, of a deep look: what a scratch etcd counted, by prefix."""

    manifest: Manifest
    warnings: tuple[str, ...]
    keys: dict[str, int] | None


async def make_backup(
    settings: Backup,
    etcd: EtcdSettings,
    bus: Courier | None,
    clock: Clock,
    *,
    directory: Path,
    without_streams: str = "",
    wants_streams: bool = True,
    bucket: Bucket | None = None,
    tell: Tell = quiet,
) -> Made:
    """One backup into `directory`: etcd, then the streams; then what is missing in the bucket, and retention.

    Without a bus the streams are missing in it, and `without_streams` says why; that is a complaint when they were
    wanted. Raises `ConfigError` (no recipients),
    `Unreachable` (no etcd), `Forbidden`, `BackupFailed` (nothing was made), `StartupError` (the directory).
    """
    keys = recipients_of(settings.recipients)
    folder = Folder(directory)
    folder.make()
    try:
        tool = await find_etcdutl()
    except StartupError:
        tool = None
    with folder.alone():
        with contextlib.ExitStack() as files:
            db = files.enter_context(_spooled(directory))
            # not a moment later: what is written while the snapshot is taken may be missing in it
            began = datetime.fromtimestamp(clock.wall_ms() // 1000, UTC)
            taken = await snapshot.take(etcd, db, tool, lambda done, of: tell("etcd", done, of))
            members = [(ETCD, db, Written(taken.size, taken.sha256))]
            saved, missing = await _streams(bus, without_streams, directory, files, members, tell)
            manifest = _manifest(taken, began, saved, missing, members)
            path = directory / str(Name(began, taken.revision))
            written = await asyncio.to_thread(
                write_archive,
                path,
                manifest,
                [Source(name, file) for name, file, _ in members],
                keys,
                _counted(tell, "encrypting", sum(member.size for member in manifest.members)),
            )
        facts = _facts(path, manifest, written, len(keys))
        folder.write_facts(facts)
        uploaded, deleted, complaints = await _keep(settings, folder, bucket, clock, tell)
    if missing and wants_streams:
        complaints.insert(0, BackupFailed(f"the backup {path.name} is there, without a part: {'; '.join(missing)}"))
    return Made(
        path=path,
        facts=facts,
        endpoint=taken.endpoint,
        warnings=taken.warnings,
        uploaded=tuple(uploaded),
        deleted=tuple(deleted),
        complaints=tuple(complaints),
    )


@contextlib.contextmanager
def _spooled(directory: Path) -> Iterator[IO[bytes]]:
    try:
        file = spool(directory)
    except OSError as error:
        raise BackupFailed(f"cannot write to {directory}: {error.strerror}; no backup was made") from None
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # what a full disk did not take, and nobody needs any more
            file.close()


async def _streams(
    bus: Courier | None,
    why_not: str,
    directory: Path,
    files: contextlib.ExitStack,
    members: list[tuple[str, IO[bytes], Written]],
    tell: Tell,
) -> tuple[list[StreamFacts], list[str]]:
    """Adds the streams' members; their facts, and what is missing."""
    if bus is None:
        return [], [f"the streams: {why_not or 'NATS was not asked'}"]
    try:
        names = await streams.there(bus)
    except FabricError as error:
        return [], [f"the streams: {error.message}"]
    saved: list[StreamFacts] = []
    missing: list[str] = []
    for name in names:
        data, about = files.enter_context(_spooled(directory)), files.enter_context(_spooled(directory))
        try:
            found = await streams.save(bus, name, data, _counted(tell, name, 0))
        except FabricError as error:
            missing.append(f"{name}: {error.message}")
            continue
        about.write(found.about)
        saved.append(found.facts)
        members.append((f"streams/{name}.json", about, await asyncio.to_thread(measure, about)))
        members.append((f"streams/{name}.snapshot", data, await asyncio.to_thread(measure, data)))
    return saved, missing


def _counted(tell: Tell, what: str, of: int) -> Callable[[int], None]:
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        tell(what, done, of)

    return more


def _manifest(
    taken: snapshot.Taken,
    at: datetime,
    saved: Sequence[StreamFacts],
    missing: Sequence[str],
    members: Sequence[tuple[str, IO[bytes], Written]],
) -> Manifest:
    return Manifest(
        ifabric=__version__,
        etcd=taken.etcd,
        cluster_id=taken.cluster_id,
        revision=taken.revision,
        incarnation=taken.incarnation,
        at=at,
        keys=taken.keys,
        streams=tuple(saved),
        members=tuple(Member(name=name, size=found.size, sha256=found.sha256) for name, _, found in members),
        missing=tuple(missing),
    )


def _facts(path: Path, manifest: Manifest, written: Written, recipients: int) -> Sidecar:
    return Sidecar(
        file=path.name,
        size=written.size,
        sha256=written.sha256,
        at=manifest.at,
        revision=manifest.revision,
        incarnation=manifest.incarnation,
        etcd=manifest.etcd,
        recipients=recipients,
        streams=tuple(one.name for one in manifest.streams),
        missing=manifest.missing,
    )


async def _keep(
    settings: Backup, folder: Folder, bucket: Bucket | None, clock: Clock, tell: Tell
) -> tuple[list[str], list[str], list[FabricError]]:
    """Brings to the bucket what is missing there, newest first, and lets go what is too old, in both places."""
    now = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC)
    rule = {"retention_days": settings.retention_days, "keep_min": settings.keep_min}
    uploaded: list[str] = []
    complaints: list[FabricError] = []
    if bucket is not None:
        try:
            known = {facts.file for facts in await asyncio.to_thread(bucket.backups)}
            for found in reversed(folder.backups()):
                if found.facts is None or not found.whole or found.path.name in known:
                    continue
                progress = _counted(tell, f"uploading {found.path.name}", found.size)
                await asyncio.to_thread(bucket.upload, found.path, found.facts, progress)
                uploaded.append(found.path.name)
            await asyncio.to_thread(lambda: bucket.delete_expired(now, **rule))
        except FabricError as error:
            complaints.append(error)
    deleted: list[str] = []
    try:
        deleted = folder.delete_expired(now, **rule)
    except OSError as error:
        complaints.append(BackupFailed(f"old backups in {folder.path} were not deleted: {error.strerror}"))
    return uploaded, deleted, complaints


# -- looking at one --------------------------------------------------------------------------------------------------


async def verify(
    path: Path, identities: Sequence[Any], clock: Clock, *, deep: bool = False, tell: Tell = quiet
) -> Verified:
    """Reads a backup to its end and checks all of it; with `deep`, an etcd on loopback has to start on it.

    `BackupRefused` tells what is wrong.
    """
    tool = await find_etcdutl()
    facts = read_facts(path)
    warnings = [] if facts is not None else [f"{path.name}.json is not there: the file's own digest was not checked"]
    if facts is not None:
        await asyncio.to_thread(check_file, path, facts)
    with tempfile.TemporaryDirectory(prefix=".ifabric-verify-", dir=_room_for(path)) as made:
        folder = Path(made)
        manifest = await asyncio.to_thread(
            unpack, path, identities, folder, _counted(tell, "reading", _size(path)), only=ETCD
        )
        await check_snapshot(folder / ETCD, manifest, tool)
        keys = None
        if deep:
            tell("an etcd on loopback", 0, 0)
            async with scratch(find_etcd(), tool, folder / ETCD, folder, clock) as etcd:
                keys = await snapshot.count_keys(etcd.line)
            if keys != manifest.keys:
                raise BackupRefused(
                    f"{path.name} restores to other keys ({keys}) than it was made of ({manifest.keys})",
                    reason="corrupt",
                )
    return Verified(manifest, (*warnings, *manifest.missing), keys)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _room_for(path: Path) -> Path | None:
    """Beside the backup, whose owner may read it anyway; None: where temporary files go."""
    return path.parent if os.access(path.parent, os.W_OK) else None


def unpack(
    path: Path, identities: Sequence[Any], folder: Path, progress: Callable[[int], None], *, only: str | None = None
) -> Manifest:
    """Decrypts a backup's members into a folder of one's own, and checks all of them. Blocks. `BackupRefused`.

    With `only`, one member is kept; the others are checked too.
    """

    @contextlib.contextmanager
    def sink(manifest: Manifest, name: str) -> Iterator[Sink]:
        if name == ETCD:  # the first
            needed, free = sum(member.size for member in manifest.members), shutil.disk_usage(folder).free
            if needed > free:
                raise BackupRefused(
                    f"{path.name} needs {needed >> 20} MB in {folder.parent} and {free >> 20} MB are free; nothing was touched",
                    reason="room",
                )
        if only is not None and name != only:
            yield Nowhere()
            return
        target = folder / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            yield file

    return read_archive(path, identities, sink, progress)


async def check_snapshot(db: Path, manifest: Manifest, tool: Tool) -> None:
    """Whether an unpacked snapshot is one that can be restored here. `BackupRefused`."""
    check_etcd(manifest.etcd, tool.version)
    with db.open("rb") as file:
        try:
            await asyncio.to_thread(snapshot.check_trailer, file, "the backup")
        except BackupFailed as error:
            raise BackupRefused(f"{error.message}; nothing was touched", reason="corrupt") from None
        facts = await status(tool, file.fileno())
    if facts.revision > manifest.revision and manifest.prepared is None:
        raise BackupRefused(
            f"the snapshot ends at revision {facts.revision} and the manifest says {manifest.revision}; nothing was touched",
            reason="corrupt",
        )
