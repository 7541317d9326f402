"""The way back: everything is checked, then a prepared snapshot is made, then members of it.

`check` and `prepare` touch nothing but a folder of their own. `prepare` gives the state a new incarnation and leaves a
note in it (`fabric/restored`), in a scratch etcd; so every member begins in the new incarnation, and a daemon that is
started too early never meets the old one. The prepared snapshot can be written to a file, for clusters whose members
are on several hosts: etcdutl makes the same cluster wherever it is given the same snapshot, names, URLs and token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aetcd import rpc

from ifabric.backup import snapshot, streams
from ifabric.backup.archive import Source, Written, write_archive
from ifabric.backup.etcdutl import BUMP, Peer, Tool, find_etcdutl, make_member
from ifabric.backup.keys import public_of, recipients_of
from ifabric.backup.making import Tell, check_snapshot, quiet, unpack
from ifabric.backup.manifest import ETCD, BackupRefused, Manifest, Member, Name, Prepared
from ifabric.backup.scratch import CALL_S, Scratch, scratch
from ifabric.backup.streams import Courier
from ifabric.clock import Clock, rfc3339
from ifabric.programs import find_etcd
from ifabric.store.commit import INCARNATION_KEY
from ifabric.wire.replay import Restore

RESTORED_KEY = b"fabric/restored"
PREPARED = "prepared.db"
#: a prepared snapshot is made to be used now: the cluster that is made of it a second time would have the fences of the first
PREPARED_FOR = timedelta(hours=24)


class Target(NamedTuple):
    """A member to make on this machine."""

    name: str
    url: str
    data_dir: Path


@dataclass(frozen=True)
class Opened:
    """A backup, decrypted into a folder and checked."""

    path: Path
    folder: Path
    manifest: Manifest
    tool: Tool

    def file(self, name: str) -> Path:
        """Where a member is."""
        return self.folder / name


@dataclass(frozen=True)
class Ready:
    """A prepared snapshot: what every member is made of."""

    db: Path
    manifest: Manifest
    keys: dict[str, int]
    warnings: tuple[str, ...] = ()


async def check(path: Path, identities: Sequence[Any], folder: Path, clock: Clock, *, tell: Tell = quiet) -> Opened:
    """Decrypts a backup into `folder` and checks everything of it. `BackupRefused` before anything else is touched."""
    tool = await find_etcdutl()
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        tell("reading", done, 0)

    manifest = await asyncio.to_thread(unpack, path, identities, folder, progress)
    await check_snapshot(folder / ETCD, manifest, tool)
    if manifest.prepared is not None:
        age = datetime.fromtimestamp(clock.wall_ms() / 1000, UTC) - manifest.prepared.at
        if age > PREPARED_FOR:
            raise BackupRefused(
                f"{path.name} was prepared {age.total_seconds() / 3600:.0f} hours ago, and a cluster may have lived of it since: "
                f"another would give out its fences again. Nothing was touched; prepare {manifest.prepared.backup} once more.",
                reason="prepared",
            )
    return Opened(path, folder, manifest, tool)


def check_targets(targets: Sequence[Target], cluster: Sequence[Peer]) -> None:
    """Whether these members can be made here. `BackupRefused` names the one that cannot; nothing was touched."""
    names = [peer.name for peer in cluster]
    folders = [str(target.data_dir.absolute()) for target in targets]
    if len(set(names)) < len(names) or len({peer.url for peer in cluster}) < len(cluster):
        raise BackupRefused("two members have the same name or the same URL; nothing was touched", reason="members")
    if len(set(folders)) < len(folders):
        raise BackupRefused("two members have the same data directory; nothing was touched", reason="members")
    for target in targets:
        if Peer(target.name, target.url) not in cluster:
            raise BackupRefused(
                f"{target.name}={target.url} is not among the members of the cluster "
                f"({', '.join(f'{peer.name}={peer.url}' for peer in cluster)}); nothing was touched",
                reason="members",
            )
        try:
            there = target.data_dir.exists() and (not target.data_dir.is_dir() or any(target.data_dir.iterdir()))
        except OSError as error:
            raise BackupRefused(
                f"cannot look into {target.data_dir}: {error.strerror}; nothing was touched", reason="data_dir"
            ) from None
        if there:
            raise BackupRefused(
                f"{target.data_dir} is not empty; nothing was touched. Stop that etcd and move its data away, "
                "or name another directory.",
                reason="data_dir",
            )
        near = next(parent for parent in target.data_dir.absolute().parents if parent.exists())
        if not os.access(near, os.W_OK | os.X_OK):
            raise BackupRefused(
                f"cannot write to {near}, where {target.data_dir.name} is to be; nothing was touched", reason="data_dir"
            )


async def prepare(opened: Opened, incarnation: int, clock: Clock, *, tell: Tell = quiet) -> Ready:
    """A prepared snapshot of a backup, in a new incarnation. `BackupRefused` when the backup is not what it says."""
    manifest = opened.manifest
    if manifest.prepared is not None:
        return Ready(opened.file(ETCD), manifest, manifest.keys)
    assert incarnation > manifest.incarnation, "the incarnation was taken above the backup's"
    warnings: list[str] = []
    bump = BUMP * (incarnation - manifest.incarnation) if opened.tool.bumps else 0
    if not bump:
        warnings.append(
            f"etcdutl {'.'.join(map(str, opened.tool.version))} cannot move revisions on (3.5.10 and newer can): whoever "
            "watched the lost cluster may wait for revisions that are long past. Restart all daemons."
        )
    tell("a new incarnation", 0, 0)
    db = opened.folder / PREPARED
    note = Restore(
        revision=manifest.revision,
        at=rfc3339(int(manifest.at.timestamp() * 1000)),
        restored_at=rfc3339(clock.wall_ms()),
        incarnation=incarnation,
        backup=opened.path.name,
    )
    async with scratch(find_etcd(), opened.tool, opened.file(ETCD), opened.folder, clock, bump=bump) as etcd:
        counted = await snapshot.count_keys(etcd.line)
        if counted != manifest.keys:
            raise BackupRefused(
                f"{opened.path.name} restores to other keys ({counted}) than it was made of ({manifest.keys}); nothing was touched",
                reason="corrupt",
            )
        await _enter(etcd, manifest.incarnation, incarnation, note)
        with os.fdopen(os.open(db, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "w+b") as file:
            taken = await snapshot.take(etcd.settings, file, opened.tool, lambda done, of: tell("prepared", done, of))
            file.flush()
            os.fsync(file.fileno())
    ready = msgspec.structs.replace(
        manifest,
        incarnation=incarnation,
        keys=taken.keys,
        streams=(),
        members=(Member(name=ETCD, size=taken.size, sha256=taken.sha256),),
        prepared=Prepared(
            at=datetime.fromtimestamp(clock.wall_ms() / 1000, UTC),
            token=f"ifabric-{incarnation:04}-{clock.token()}",
            backup=opened.path.name,
            bumped=bump,
        ),
    )
    return Ready(db, ready, taken.keys, (*warnings, *taken.warnings))


async def _enter(etcd: Scratch, before: int, after: int, note: Restore) -> None:
    """Writes the new incarnation and the note, if the old one is the manifest's."""
    held = rpc.Compare(
        key=INCARNATION_KEY, target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=str(before).encode()
    )
    if before == 0:  # no daemon had been there yet
        held = rpc.Compare(key=INCARNATION_KEY, target=rpc.Compare.VERSION, result=rpc.Compare.EQUAL, version=0)
    puts = [
        rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))
        for key, value in ((INCARNATION_KEY, str(after).encode()), (RESTORED_KEY, msgspec.json.encode(note)))
    ]
    done: Any = await rpc.KVStub(etcd.line).Txn(rpc.TxnRequest(compare=[held], success=puts), timeout=CALL_S)
    if not done.succeeded:
        raise BackupRefused(
            f"the snapshot is not of incarnation {before}, as its manifest says; nothing was touched", reason="corrupt"
        )


async def write_prepared(ready: Ready, out: Path, identities: Sequence[Any]) -> Path:
    """Writes a prepared snapshot to a file, encrypted for the key that opened the backup. Where it is."""
    assert ready.manifest.prepared is not None, "it is prepared"
    name = Name(ready.manifest.at, ready.manifest.revision, prepared=True, incarnation=ready.manifest.incarnation)
    path = _within(out, str(name))
    with ready.db.open("rb") as file:
        sources = [Source(ETCD, file)]
        keys = recipients_of(public_of(identities))
        _: Written = await asyncio.to_thread(write_archive, path, ready.manifest, sources, keys)
    return path


def _within(out: Path, name: str) -> Path:
    return out / name if out.is_dir() else out


async def make_members(
    opened: Opened,
    ready: Ready,
    targets: Sequence[Target],
    cluster: Sequence[Peer],
    token: str | None,
    tell: Tell = quiet,
) -> str:
    """Makes the data directories; the cluster's token. `BackupRefused`: those made before stay, and say so."""
    assert ready.manifest.prepared is not None, "members are made of a prepared snapshot only"
    used = token or ready.manifest.prepared.token
    made: list[Path] = []
    for target in targets:
        tell(f"member {target.name}", len(made), len(targets))
        target.data_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            await make_member(opened.tool, ready.db, target.data_dir, Peer(target.name, target.url), cluster, used)
        except BackupRefused as error:
            also = f"; {', '.join(map(str, made))} was made before it: delete that" if made else ""
            raise BackupRefused(f"{error.message}{also}", **error.facts) from None
        made.append(target.data_dir)
    return used


async def restore_streams(
    bus: Courier, opened: Opened, *, replicas: int | None = None, tell: Tell = quiet
) -> list[streams.Put]:
    """Puts the backup's streams back where there are none. What became of each; nothing that is there is touched."""
    found = []
    for facts in opened.manifest.streams:
        with opened.file(f"streams/{facts.name}.snapshot").open("rb") as file:
            about = opened.file(f"streams/{facts.name}.json").read_bytes()
            progress: Callable[[int], None] = lambda _, name=facts.name: tell(name, 0, 0)  # type: ignore[misc] # noqa: E731
            found.append(await streams.put_back(bus, facts.name, about, file, replicas=replicas, progress=progress))
    return found
