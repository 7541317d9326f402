"""What a backup says of itself: its name, the manifest inside it, the public facts beside it, and which ones go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, NamedTuple

import msgspec

from ifabric.errors import FabricError

FORMAT = 1
MANIFEST = "manifest.json"
ETCD = "etcd.db"
#: the manifest is read into memory
MANIFEST_MAX_BYTES = 1 << 20
#: etcd's snapshots of these versions are taken; newer ones when the programs here are as new
ETCD_OLDEST = (3, 5)

_NAME = re.compile(r"(prepared|ifabric)-(\d{8}T\d{6}Z)-rev([0-9]{1,19})(?:-inc([0-9]{1,4}))?\.tar\.zst\.age")
_MEMBER = re.compile(r"etcd\.db|streams/[A-Za-z0-9_-]{1,128}\.(?:snapshot|json)")
_STAMP = "%Y%m%dT%H%M%SZ"

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class BackupRefused(FabricError):
    """The backup cannot be used; nothing was touched."""


class BackupFailed(FabricError):
    """The backup was not made."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the archive."""

    name: str
    size: Natural
    sha256: Sha256


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as it was when it was saved."""

    name: str
    messages: Natural
    bytes: Natural
    first_seq: Natural
    last_seq: Natural


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore has made of a backup: the same state in a new incarnation, ready to be given to members."""

    at: datetime
    #: for `--initial-cluster-token`: every member of the restored cluster has the same
    token: str
    #: the file that it was made of
    backup: str
    #: how far the revisions were moved on; 0 when this etcd cannot
    bumped: Natural


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a backup. `keys` counts the keys below each prefix; `at` is when the snapshot was taken, in UTC."""

    format: Literal[1] = 1
    ifabric: str
    etcd: str
    cluster_id: str
    revision: Natural
    incarnation: Natural
    at: datetime
    keys: dict[str, int]
    streams: tuple[StreamFacts, ...] = ()
    members: tuple[Member, ...]
    #: what should be in it and is not, a sentence each
    missing: tuple[str, ...] = ()
    prepared: Prepared | None = None

    def member(self, name: str) -> Member | None:
        """The member of that name."""
        return next((member for member in self.members if member.name == name), None)


class Sidecar(msgspec.Struct, frozen=True, kw_only=True):
    """The public facts of a backup, in a file beside it."""

    format: Literal[1] = 1
    file: str
    size: Natural
    sha256: Sha256
    at: datetime
    revision: Natural
    incarnation: Natural
    etcd: str
    recipients: Natural
    streams: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class Name(NamedTuple):
    """What the name of a backup says."""

    at: datetime
    revision: int
    prepared: bool = False
    incarnation: int = 0

    def __str__(self) -> str:
        kind = "prepared" if self.prepared else "ifabric"
        inc = f"-inc{self.incarnation}" if self.prepared else ""
        return f"{kind}-{self.at.astimezone(UTC).strftime(_STAMP)}-rev{self.revision}{inc}.tar.zst.age"


def parse_name(name: str) -> Name | None:
    """None for a file that is not called like a backup."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    try:
        at = datetime.strptime(found[2], _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    return Name(at, int(found[3]), found[1] == "prepared", int(found[4] or 0))


def decode_manifest(data: bytes) -> Manifest:
    """`BackupRefused` says which part of it is not what this version reads."""
    try:
        version = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format")
        if version is not None and bytes(version) != str(FORMAT).encode():
            raise BackupRefused(
                f"the backup has format {bytes(version).decode()[:20]} and this ifabric reads format {FORMAT}; nothing was "
                "touched. Use the ifabric that made it.",
                reason="format",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackupRefused(
            f"the backup's manifest is not one: {error}; nothing was touched", reason="manifest"
        ) from None
    names = [member.name for member in manifest.members]
    if ETCD not in names or len(set(names)) < len(names) or not all(map(_MEMBER.fullmatch, names)):
        raise BackupRefused(
            f"the backup's manifest names other members than a backup has: {', '.join(names)[:200]}; nothing was touched",
            reason="manifest",
        )
    return manifest


def check_etcd(version: str, here: tuple[int, int, int]) -> None:
    """`BackupRefused` unless the etcd `here` can be given a snapshot of the etcd of `version`.

    etcd takes its own minor version and the one before; what was written by a newer one, it may read wrongly.
    """
    found = re.match(r"(\d+)\.(\d+)\.", version)
    theirs = (int(found[1]), int(found[2])) if found else (0, 0)
    ours = here[:2]
    shown = ".".join(map(str, here))
    if theirs < ETCD_OLDEST:
        raise BackupRefused(
            f"the snapshot was taken of etcd {version}, which is older than {'.'.join(map(str, ETCD_OLDEST))}; nothing was "
            "touched. Restore it with that etcd's own tools, upgrade etcd, and make a backup again.",
            reason="etcd_version",
        )
    if theirs > ours:
        raise BackupRefused(
            f"the snapshot was taken of etcd {version} and the etcd here is {shown}; nothing was touched. "
            "Bring an etcd and etcdutl as new as that.",
            reason="etcd_version",
        )
    if theirs[0] < ours[0] or ours[1] - theirs[1] > 1:
        raise BackupRefused(
            f"the snapshot was taken of etcd {version} and the etcd here is {shown}, more than one minor version newer; "
            "nothing was touched. Restore with the version between and upgrade from there.",
            reason="etcd_version",
        )


class Kept(NamedTuple):
    """A backup as retention sees it: `good` when the file is there whole, `ours` when its facts lie beside it."""

    name: str
    at: datetime
    good: bool
    ours: bool = True


def expired(backups: Iterable[Kept], now: datetime, *, retention_days: int, keep_min: int) -> list[str]:
    """The names of those to delete, oldest first.

    Only what we wrote goes, and only what is older than `retention_days`. The newest `keep_min` good ones stay whatever
    their age, and so does everything while there is no good one: the last that there is may still be worth a try. A
    clock that went back deletes nothing, and one that is ahead leaves the newest good ones.
    """
    known = sorted((b for b in backups if b.ours), key=lambda b: (b.at, b.name))
    stay = {b.name for b in [b for b in known if b.good][-max(1, keep_min) :]}
    if not stay:
        return []
    before = now - timedelta(days=retention_days)
    return [b.name for b in known if b.at < before and b.name not in stay]


def newest(sidecars: Sequence[Sidecar]) -> Sidecar | None:
    """The backup to restore when none is named."""
    real = [s for s in sidecars if not s.file.startswith("prepared-")]
    return max(real, key=lambda s: (s.at, s.revision), default=None)


def by_prefix(keys: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Both counts side by side, for every prefix that one of them has."""
    return [(prefix, keys.get(prefix, 0), other.get(prefix, 0)) for prefix in sorted({*keys, *other})]
