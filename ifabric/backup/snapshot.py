"""A snapshot of etcd: which endpoint is asked, and what is checked of what it gave.

One healthy endpoint, never several: etcd refuses that, and a snapshot is one member's file. A follower first, since
a snapshot costs its member disk and network. What the member is behind of the cluster would be missing in the backup, so
a read that needs the quorum comes before, through the same member: it is answered when the member has caught up.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import grpc
from aetcd import rpc

from ifabric.backup.etcdutl import Facts, status
from ifabric.backup.etcdutl import Tool as Etcdutl
from ifabric.backup.manifest import BackupFailed
from ifabric.errors import Forbidden, Unreachable
from ifabric.store.base import prefix_end
from ifabric.store.channel import EtcdSettings, forbidden, open_line, user_of
from ifabric.store.commit import INCARNATION_KEY

#: a member without a word for so long is given up, and another is asked
STALL_S = 15.0
STATUS_S = 3.0
#: a follower this many revisions behind is preferred to the leader all the same; the quorum read decides
BEHIND_MAX = 1000
_TRAILER = hashlib.sha256().digest_size
_PAGE = 512
_FORBIDDEN = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}


class Status(NamedTuple):
    """What an endpoint says of itself; `error` when it does not answer."""

    endpoint: str
    error: str = ""
    #: etcd knows us, and does not let us
    forbidden: bool = False
    version: str = ""
    revision: int = 0
    db_bytes: int = 0
    leader: bool = False
    has_leader: bool = True
    learner: bool = False
    alarms: tuple[str, ...] = ()


class Taken(NamedTuple):
    """A snapshot that was taken, and what is known of it."""

    endpoint: str
    etcd: str
    cluster_id: str
    revision: int
    incarnation: int
    keys: dict[str, int]
    size: int
    sha256: str
    #: a sentence each, for whoever reads the report
    warnings: tuple[str, ...] = ()


def order(statuses: Sequence[Status]) -> tuple[list[Status], list[str]]:
    """The endpoints to ask, best first; and of the others, why not."""
    refused, fit = [], []
    for one in statuses:
        why = one.error or (
            "it has the alarm CORRUPT"
            if "CORRUPT" in one.alarms
            else "it knows no leader"
            if not one.has_leader
            else "it is a learner"
            if one.learner
            else ""
        )
        if why:
            refused.append(f"{one.endpoint}: {why}")
        else:
            fit.append(one)
    newest = max((one.revision for one in fit), default=0)
    fit.sort(key=lambda one: (one.leader or newest - one.revision > BEHIND_MAX, -one.revision))
    return fit, refused


async def take(
    settings: EtcdSettings, file: IO[bytes], tool: Etcdutl | None, progress: Callable[[int, int], None]
) -> Taken:
    """Writes a snapshot into `file` and checks it; `progress` is told bytes done and in all.

    `Unreachable` when no endpoint is fit, `Forbidden` when etcd does not let us, `BackupFailed` when none gave a whole one.
    """
    lines = {endpoint: open_line(endpoint, settings) for endpoint in settings.endpoints}
    try:
        statuses = await asyncio.gather(*(_status(endpoint, line) for endpoint, line in lines.items()))
        fit, refused = order(statuses)
        if not fit and any(one.forbidden for one in statuses):
            raise _forbidden(settings, "; ".join(refused))
        if not fit:
            raise Unreachable(f"no etcd to take a snapshot of ({'; '.join(refused)}); no backup was made")
        for one in fit:
            file.seek(0)
            file.truncate()
            try:
                found = await _take(one, lines[one.endpoint], file, tool, progress)
            except (grpc.aio.AioRpcError, TimeoutError, BackupFailed) as error:
                if isinstance(error, grpc.aio.AioRpcError) and _is_forbidden(error):
                    raise _forbidden(settings, error.details() or "") from None
                refused.append(f"{one.endpoint}: {_said(error)}")
                continue
            return found._replace(warnings=(*refused, *found.warnings))
        raise BackupFailed(f"no etcd gave a whole snapshot ({'; '.join(refused)}); no backup was made")
    finally:
        await asyncio.gather(*(line.close() for line in lines.values()))


def _is_forbidden(error: grpc.aio.AioRpcError) -> bool:
    return error.code() in _FORBIDDEN or "user name" in (error.details() or "")  # not found, or empty


def _forbidden(settings: EtcdSettings, details: str) -> Forbidden:
    found = forbidden(user_of(settings), details)
    return Forbidden(
        f"{found.message}. A snapshot is everything that etcd has, so its user needs the role root; no backup was made",
        **found.facts,
    )


def _said(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}, {(error.details() or '')[:300]}"
    return f"no word from it for {STALL_S:.0f} s" if isinstance(error, TimeoutError) else str(error)


async def _status(endpoint: str, line: grpc.aio.Channel) -> Status:
    try:
        said: Any = await rpc.MaintenanceStub(line).Status(rpc.StatusRequest(), timeout=STATUS_S)
    except grpc.aio.AioRpcError as error:
        return Status(endpoint, error=_said(error), forbidden=_is_forbidden(error))
    alarms = tuple(name for name in ("CORRUPT", "NOSPACE") if any(name in text for text in said.errors))
    return Status(
        endpoint,
        version=said.version,
        revision=said.header.revision,
        db_bytes=said.dbSize,
        leader=said.leader == said.header.member_id,
        has_leader=said.leader != 0,
        learner=said.isLearner,
        alarms=alarms,
    )


async def _take(
    one: Status, line: grpc.aio.Channel, file: IO[bytes], tool: Etcdutl | None, progress: Callable[[int, int], None]
) -> Taken:
    kv = rpc.KVStub(line)
    guard: Any = await kv.Range(rpc.RangeRequest(key=INCARNATION_KEY), timeout=STATUS_S)
    at_least = guard.header.revision
    sha256, size = await _stream(rpc.MaintenanceStub(line), file, progress)
    check_trailer(file, one.endpoint)
    warnings: list[str] = []
    revision = at_least
    if tool is None:
        warnings.append("there is no etcdutl here: the snapshot's digest was checked, and its pages were not")
    else:
        facts: Facts = await status(tool, file.fileno())
        revision = max(
            at_least, facts.revision
        )  # it sees keys: where the last that happened was a deletion, it sees less
    return Taken(
        endpoint=one.endpoint,
        etcd=one.version,
        cluster_id=f"{guard.header.cluster_id:x}",
        revision=revision,
        incarnation=int(guard.kvs[0].value) if guard.kvs else 0,
        keys=await count_keys(line, revision),
        size=size,
        sha256=sha256,
        warnings=tuple(warnings),
    )


async def _stream(maintenance: Any, file: IO[bytes], progress: Callable[[int, int], None]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    call = maintenance.Snapshot(rpc.SnapshotRequest())
    try:
        while True:
            async with asyncio.timeout(STALL_S):
                part = await call.read()
            if part is grpc.aio.EOF:
                break
            try:
                file.write(part.blob)
            except OSError as error:
                raise _no_room(error) from None
            digest.update(part.blob)
            size += len(part.blob)
            progress(size, size + part.remaining_bytes)
    finally:
        call.cancel()
    try:
        file.flush()
    except OSError as error:
        raise _no_room(error) from None
    return digest.hexdigest(), size


class NoRoom(BackupFailed):
    """There is no room for the snapshot; no backup was made."""


def _no_room(error: OSError) -> NoRoom:
    return NoRoom(f"the snapshot cannot be written: {error.strerror}; no backup was made")


def check_trailer(file: IO[bytes], source: str) -> None:
    """Whether the snapshot ends with the digest of what comes before, as etcd ends it. `BackupFailed` otherwise."""
    size = file.seek(0, 2)
    if size <= _TRAILER or (size - _TRAILER) % _PAGE:
        raise BackupFailed(f"{source}: the snapshot has {size} bytes and no digest at its end: it is cut short")
    file.seek(0)
    digest, left = hashlib.sha256(), size - _TRAILER
    while left:
        data = file.read(min(left, 1 << 20))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    if left or digest.digest() != file.read(_TRAILER):
        raise BackupFailed(f"{source}: the digest that etcd put at the snapshot's end is not that of its bytes")


async def count_keys(line: grpc.aio.Channel, revision: int = 0) -> dict[str, int]:
    """How many keys there are below each prefix (to the first slash), as of a revision; a few reads, whatever there is."""
    kv = rpc.KVStub(line)
    found: dict[str, int] = {}
    start = b"\x00"
    while True:
        first: Any = await kv.Range(
            rpc.RangeRequest(key=start, range_end=b"\x00", limit=1, keys_only=True, revision=revision), timeout=STATUS_S
        )
        if not first.kvs:
            return found
        key = bytes(first.kvs[0].key)
        head, slash, _ = key.partition(b"/")
        prefix = head + slash
        end = prefix_end(prefix) if slash else key + b"\x00"
        counted: Any = await kv.Range(
            rpc.RangeRequest(key=prefix, range_end=end, count_only=True, revision=revision), timeout=60.0
        )
        name = prefix.decode(errors="backslashreplace")
        found[name] = found.get(name, 0) + counted.count
        start = end
