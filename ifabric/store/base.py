"""The seam to the authority: what the fabric asks of etcd, in etcd's words.

Strictly serializable transactions over a flat space of byte keys, revisions that only grow, leases, and a watch without
gaps. `ifabric.store.etcd` is the real one, `ifabric.testing.memory_store` its twin; `tests/conformance/test_store.py`
holds both to this text.

**What an error says.** `Unavailable`: whether a write happened is *unknown* (a lost reply and a lost request look the
same). `StoreFull`: it did not happen. `TxnRefused`: etcd will never accept this transaction, and it did not happen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from ifabric.errors import Internal


class TxnRefused(Internal):
    """The store refuses this transaction (a duplicate key, too many operations, a lease that is gone)."""


class KV(NamedTuple):
    """A key as stored."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    #: 0 when none
    lease: int


class Target(StrEnum):
    """What a `Compare` looks at. A key that does not exist has 0 in all of them, and the value b""."""

    VALUE = "value"
    CREATE = "create"
    MOD = "mod"
    VERSION = "version"
    LEASE = "lease"


class Op(StrEnum):
    """How a `Compare` compares."""

    EQUAL = "="
    NOT_EQUAL = "!="
    GREATER = ">"
    LESS = "<"


class Compare(NamedTuple):
    """A condition on one key."""

    key: bytes
    target: Target
    op: Op
    #: bytes for `Target.VALUE`, else an integer
    value: bytes | int


class Put(NamedTuple):
    """Writes one key; it lives as long as the lease, if there is one."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Deletes one key, or with `end` the range [key, end)."""

    key: bytes
    end: bytes = b""


class Get(NamedTuple):
    """Reads one key, or with `end` the range [key, end), at most `limit` keys (0: all)."""

    key: bytes
    end: bytes = b""
    limit: int = 0


class Txn(NamedTuple):
    """If every compare holds, `then`, else `otherwise`; may stand inside another one's branches.

    As in etcd: no key may be put twice in one transaction (nested ones included), and at most 128 operations or
    compares, counting one for each nested transaction plus the largest one inside.
    """

    compares: tuple[Compare, ...]
    then: tuple[Put | Delete | Get | Txn, ...]
    otherwise: tuple[Put | Delete | Get | Txn, ...] = ()


class Got(NamedTuple):
    """The answer to a `Get`."""

    kvs: tuple[KV, ...]
    #: keys in the range, beyond `limit` too
    total: int


class Deleted(NamedTuple):
    """The answer to a `Delete`: how many keys it deleted."""

    deleted: int


class Done(NamedTuple):
    """The answer to a `Put`."""


class TxnResult(NamedTuple):
    """Which branch ran, at which revision, and the answers of its operations in order."""

    succeeded: bool
    revision: int
    answers: tuple[Got | Deleted | Done | TxnResult, ...]


class Event(NamedTuple):
    """One change. A deletion has `value` b"" and `version` 0; `mod_revision` is that of the deletion."""

    kv: KV
    deleted: bool
    #: it was created by this change
    created: bool


class Batch(NamedTuple):
    """Changes of one prefix, whole revisions, in order.

    `revision` is how far the watch has come over all its prefixes: nothing at or below it is still to come. `resync`
    true: the past was compacted away and `events` is the present state of the range instead (keys that are not in it
    are gone). A batch without events only moves `revision` (progress).
    """

    revision: int
    events: tuple[Event, ...]
    resync: bool = False


class Health(NamedTuple):
    """The answering member's own view. To who is not root, an etcd with access control tells less: version "" and the
    numbers 0 are not known then.
    """

    version: str
    revision: int
    leader: int
    db_size_bytes: int
    #: names such as "NOSPACE"
    alarms: tuple[str, ...]


class Store(Protocol):
    """A connection to the authority. All keys and values are bytes; keys are ASCII."""

    async def connect(self) -> None:
        """Connects, or raises `Unreachable` naming each endpoint and why."""

    async def close(self) -> None:
        """Closes; watches end. Twice is harmless."""

    @property
    def connected(self) -> bool:
        """Whether the last attempt was answered."""

    async def get(self, key: bytes) -> KV | None:
        """The key now (a linearizable read), or None."""

    async def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int = 0) -> tuple[Got, int]:
        """Keys in [start, end) in order, and the revision of the answer. `revision`: as of then (else now)."""

    async def txn(self, txn: Txn) -> TxnResult:
        """Carries out one transaction. It is *not* retried once it may have been sent: `Unavailable` means unknown."""

    async def grant(self, ttl_s: int) -> int:
        """A new lease's id."""

    async def revoke(self, lease: int) -> None:
        """Ends a lease and deletes its keys. One that is gone already is not an error."""

    async def keep_alive(self, lease: int) -> float:
        """Starts the lease's time again; the seconds it now has, or 0.0 when it is gone."""

    async def left(self, lease: int) -> float:
        """The seconds that a lease still has, without renewing it; 0.0 when it is gone."""

    def watch(self, prefixes: Sequence[bytes], *, after_revision: int) -> AsyncIterator[Batch]:
        """What happened to the prefixes' keys after that revision, for each prefix in order, without a gap.

        Resumes by itself after a lost connection. After a compaction it lists anew and says `resync`. Ends when the
        store closes. Emits a progress batch after `progress()` and now and then when nothing happens.
        """

    async def progress(self) -> None:
        """Asks the open watches to say how far they are; what was committed before the call will be at or below it."""

    async def health(self) -> Health:
        """The member that answers. Raises `Unavailable`."""


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that start with `prefix` (ASCII, not empty)."""
    assert prefix and prefix[-1] < 0x7F, "keys are ASCII"
    return prefix[:-1] + bytes((prefix[-1] + 1,))


T = TypeVar("T")


def record(decoder: msgspec.json.Decoder[T], kv: KV) -> T:
    """The record at a key. `Internal`, naming the key, when it is not one of ours."""
    try:
        return decoder.decode(kv.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Internal(f"the record {kv.key.decode(errors='replace')} is damaged: {error}") from error


# -- the compares that the fabric uses ------------------------------------------------------------------------------


def absent(key: bytes) -> Compare:
    return Compare(key, Target.CREATE, Op.EQUAL, 0)


def present(key: bytes) -> Compare:
    return Compare(key, Target.CREATE, Op.GREATER, 0)


def unchanged(key: bytes, mod_revision: int) -> Compare:
    """The key is as it was at this modification (0: absent)."""
    return Compare(key, Target.MOD, Op.EQUAL, mod_revision)


def leased(key: bytes, lease: int) -> Compare:
    """The key exists and hangs on this lease."""
    return Compare(key, Target.LEASE, Op.EQUAL, lease)


def fulfilled(compare: Compare, kv: KV | None) -> bool:
    """What etcd says of a compare when this is what stands at its key."""
    if kv is None:
        if compare.target is Target.VALUE:
            return False
        kv = _NOTHING
    fields: dict[Target, bytes | int] = {
        Target.VALUE: kv.value,
        Target.CREATE: kv.create_revision,
        Target.MOD: kv.mod_revision,
        Target.VERSION: kv.version,
        Target.LEASE: kv.lease,
    }
    have = fields[compare.target]
    want = compare.value
    assert type(have) is type(want)
    match compare.op:
        case Op.EQUAL:
            return have == want
        case Op.NOT_EQUAL:
            return have != want
        case Op.GREATER:
            return have > want  # type: ignore[operator]
        case Op.LESS:
            return have < want  # type: ignore[operator]


_NOTHING = KV(b"", b"", 0, 0, 0, 0)
