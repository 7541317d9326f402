"""The incarnation of a restored cluster: one that no cluster ever had.

A fence is `incarnation * 2^40 + generation`. If two restores of one backup both became incarnation 2, the grants of the
first restored cluster and those of the second would have the same fences, and an agent of the first could end the work of
one of the second. "The backup's plus one" is therefore not enough, and 13 bits hold no clock that is fine enough to
mix in. So the number is *taken*: a restore creates `incarnations/0002.json` beside the backups, in the folder and in
S3, where creating is exclusive, before it makes anything; what was created by another is skipped. A number that was
taken for a restore which then failed stays taken: there are 8191.

What is asked besides, for the case that a restore was made elsewhere: the facts of all backups that can be seen (the
restored cluster made some of its own), the events that NATS still has (their fences), and an etcd that still answers. A
restore that shares no place, no NATS and no etcd with another cannot know of it; there, `--incarnation` says a number
that is higher than any that daemons had.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import grpc
import msgspec
from aetcd import rpc

from ifabric.backup.bucket import Bucket
from ifabric.backup.manifest import BackupRefused, Sidecar
from ifabric.bus.base import Bus
from ifabric.errors import FabricError
from ifabric.store.channel import EtcdSettings, open_line
from ifabric.store.commit import INCARNATION_KEY
from ifabric.wire import subjects

INCARNATION_MAX = (1 << 13) - 1
FENCE_BITS = 40
FOLDER = "incarnations"
ASK_S = 2.0


def highest(manifest: int, seen: Iterable[Sidecar], *others: int) -> int:
    """The highest incarnation that there is a sign of."""
    return max([manifest, *others, *(facts.incarnation for facts in seen)])


def take(above: int, folder: Path | None, bucket: Bucket | None, why: str, *, exactly: int | None = None) -> int:
    """Takes the next free one above `above`, in every place that is given; or `exactly` that one. Blocks.

    `BackupRefused` when there is none, when the one that was asked for is not above, or when it cannot be written down.
    """
    if exactly is not None and not above < exactly <= INCARNATION_MAX:
        raise BackupRefused(
            f"--incarnation {exactly} is not between {above + 1} and {INCARNATION_MAX}: a cluster had {above} already; nothing was touched",
            reason="incarnation",
        )
    said = msgspec.json.encode({"taken_for": why})
    at = exactly if exactly is not None else above + 1
    while at <= INCARNATION_MAX:
        name = f"{FOLDER}/{at:04}.json"
        free = bucket is None or bucket.create(name, said)
        if folder is not None:
            free = _create(folder / name, said) and free
        if free:
            return at
        if exactly is not None:
            raise BackupRefused(
                f"incarnation {at} was taken by another restore; nothing was touched. Leave --incarnation away.",
                reason="incarnation",
            )
        at += 1
    raise BackupRefused(
        f"there is no incarnation left below {INCARNATION_MAX}; nothing was touched", reason="incarnation"
    )


def taken(folder: Path) -> int:
    """The highest that was taken in a folder; 0 when none was."""
    numbers = [int(path.stem) for path in (folder / FOLDER).glob("*.json") if path.stem.isdigit()]
    return max(numbers, default=0)


def _create(path: Path, data: bytes) -> bool:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        if path.exists():
            return False
        raise _not_written(path, "a file is where the folder has to be") from None
    except OSError as error:
        raise _not_written(path, error.strerror or "") from None
    return True


def _not_written(path: Path, why: str) -> BackupRefused:
    return BackupRefused(
        f"the new incarnation cannot be written down at {path}: {why}; nothing was touched. Give a --directory "
        "that is kept, or two restores may get the same.",
        reason="incarnation",
    )


async def of_events(bus: Bus) -> int:
    """The incarnation of the last grant that NATS knows of; 0 when it knows of none."""
    try:
        last = await (await bus.journal(subjects.EVENT_STREAM)).last(subjects.event("task", "claimed"))
    except FabricError:
        return 0  # no such stream: there is nothing to know from it
    if last is None:
        return 0
    try:
        fence = msgspec.json.decode(last.data).get("fence", 0)
    except (msgspec.MsgspecError, AttributeError):
        return 0
    found = fence >> FENCE_BITS if isinstance(fence, int) else 0
    return found if 0 < found <= INCARNATION_MAX else 0


async def of_etcd(settings: EtcdSettings) -> int:
    """The incarnation of a cluster that still answers; 0 when none does."""
    for endpoint in settings.endpoints:
        line = open_line(endpoint, settings)
        try:
            got = await rpc.KVStub(line).Range(rpc.RangeRequest(key=INCARNATION_KEY, serializable=True), timeout=ASK_S)
        except grpc.aio.AioRpcError:
            continue
        finally:
            await line.close()
        return int(got.kvs[0].value) if got.kvs else 0
    return 0
