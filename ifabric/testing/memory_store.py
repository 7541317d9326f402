"""The store's twin: etcd's semantics in memory, on an injected clock, with faults on demand.

Several `MemoryStore` connections may share one `MemoryEtcd`. `tests/conformance/test_store.py` holds it to what etcd does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence

from ifabric.clock import Clock
from ifabric.errors import StoreFull, Unavailable
from ifabric.store.base import (
    KV,
    Batch,
    Delete,
    Deleted,
    Done,
    Event,
    Get,
    Got,
    Health,
    Put,
    Txn,
    TxnRefused,
    TxnResult,
    fulfilled,
    prefix_end,
)

OPS_MAX = 128
REQUEST_MAX_BYTES = 1_572_864
SWEEP_S = 0.05


class _Lease:
    def __init__(self, ttl_s: int, ends: float) -> None:
        self.ttl_s = ttl_s
        self.ends = ends
        self.keys: set[bytes] = set()


class MemoryEtcd:
    """The cluster: keys, leases and history."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.revision = 1
        self.keys: dict[bytes, KV] = {}
        self.leases: dict[int, _Lease] = {}
        self.history: list[tuple[int, tuple[Event, ...]]] = []
        self.compacted = 0
        self.full = False
        self.changed = asyncio.Event()
        self._lease_ids = itertools.count(7_000_000_000_000_000_001)

    # -- transactions ---------------------------------------------------------------------------------------------------

    def txn(self, txn: Txn) -> TxnResult:
        self.expire_due()
        written = _written(txn)
        if self.full and written is not None:  # etcd looks at both branches, whichever would run
            raise StoreFull(what="etcd")
        if written is not None and written > REQUEST_MAX_BYTES:
            raise TxnRefused("etcd refused the request: request is too large")
        _check_size(txn, OPS_MAX)
        _check_keys(txn)
        path = self._path(txn)
        self._check_puts(txn, path)
        events: dict[bytes, Event] = {}
        answers = self._apply(txn, path, events)
        if events:
            self._commit(tuple(events.values()))
        return _stamp(answers, self.revision)

    def _path(self, txn: Txn) -> dict[int, bool]:
        """Which branch runs, for each transaction inside: decided before anything is applied."""
        path = {id(txn): all(fulfilled(compare, self.keys.get(compare.key)) for compare in txn.compares)}
        for op in txn.then if path[id(txn)] else txn.otherwise:
            if isinstance(op, Txn):
                path |= self._path(op)
        return path

    def _check_puts(self, txn: Txn, path: dict[int, bool]) -> None:
        for op in txn.then if path[id(txn)] else txn.otherwise:
            if isinstance(op, Put):
                if op.lease and op.lease not in self.leases:
                    raise TxnRefused("etcd refused the request: requested lease not found")
            elif isinstance(op, Txn):
                self._check_puts(op, path)

    def _apply(self, txn: Txn, path: dict[int, bool], events: dict[bytes, Event]) -> TxnResult:
        succeeded = path[id(txn)]
        answers: list[Got | Deleted | Done | TxnResult] = []
        for op in txn.then if succeeded else txn.otherwise:
            if isinstance(op, Put):
                self._put(op, events)
                answers.append(Done())
            elif isinstance(op, Get):
                answers.append(self.read(op.key, op.end, op.limit))
            elif isinstance(op, Delete):
                gone = [key for key in sorted(self.keys) if _within(key, op.key, op.end)]
                for key in gone:
                    self._delete(key, events)
                answers.append(Deleted(len(gone)))
            else:
                answers.append(self._apply(op, path, events))
        return TxnResult(succeeded, 0, tuple(answers))

    def _put(self, op: Put, events: dict[bytes, Event]) -> None:
        old = self.keys.get(op.key)
        revision = self.revision + 1
        if old is not None and old.lease:
            self.leases[old.lease].keys.discard(op.key)
        if op.lease:
            self.leases[op.lease].keys.add(op.key)
        created = revision if old is None else old.create_revision
        kv = KV(op.key, op.value, created, revision, old.version + 1 if old else 1, op.lease)
        self.keys[op.key] = kv
        events[op.key] = Event(kv, deleted=False, created=old is None)

    def _delete(self, key: bytes, events: dict[bytes, Event]) -> None:
        old = self.keys.pop(key)
        if old.lease and old.lease in self.leases:
            self.leases[old.lease].keys.discard(key)
        events[key] = Event(KV(key, b"", 0, self.revision + 1, 0, 0), deleted=True, created=False)

    def _commit(self, events: tuple[Event, ...]) -> None:
        self.revision += 1
        self.history.append((self.revision, events))
        self.wake()

    def wake(self) -> None:
        """Lets the watches look."""
        self.changed.set()
        self.changed = asyncio.Event()

    def read(self, start: bytes, end: bytes, limit: int = 0, revision: int = 0) -> Got:
        keys = self.keys if not revision or revision == self.revision else self._as_of(revision)
        found = [keys[key] for key in sorted(keys) if _within(key, start, end)]
        return Got(tuple(found[:limit] if limit else found), len(found))

    def _as_of(self, revision: int) -> dict[bytes, KV]:
        keys: dict[bytes, KV] = {}
        for at, events in self.history:
            if at > revision:
                break
            for event in events:
                if event.deleted:
                    keys.pop(event.kv.key, None)
                else:
                    keys[event.kv.key] = event.kv
        return keys

    # -- leases ---------------------------------------------------------------------------------------------------------

    def grant(self, ttl_s: int) -> int:
        if self.full:
            raise StoreFull(what="etcd")
        lease = next(self._lease_ids)
        self.leases[lease] = _Lease(ttl_s, self.clock.monotonic() + ttl_s)
        return lease

    def revoke(self, lease: int) -> None:
        gone = self.leases.pop(lease, None)
        if gone is not None and gone.keys:
            events: dict[bytes, Event] = {}
            for key in sorted(gone.keys):
                self._delete(key, events)
            self._commit(tuple(events.values()))

    def keep_alive(self, lease: int) -> float:
        self.expire_due()
        found = self.leases.get(lease)
        if found is None:
            return 0.0
        found.ends = self.clock.monotonic() + found.ttl_s
        return float(found.ttl_s)

    def left(self, lease: int) -> float:
        self.expire_due()
        found = self.leases.get(lease)
        return 0.0 if found is None else max(0.0, found.ends - self.clock.monotonic())

    def expire_due(self) -> None:
        """Ends the leases whose time is up."""
        now = self.clock.monotonic()
        for lease in [lease for lease, about in self.leases.items() if about.ends <= now]:
            self.revoke(lease)

    def compact(self, revision: int) -> None:
        """Forgets what happened before that revision."""
        self.compacted = revision


class MemoryStore:
    """One connection to a `MemoryEtcd`."""

    def __init__(self, clock: Clock, etcd: MemoryEtcd | None = None) -> None:
        self.etcd = etcd or MemoryEtcd(clock)
        self._clock = clock
        self._open = False
        self._sweeper: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        #: faults: everything fails; the next transaction is lost on the way there; the next answer on the way back
        self.down = False
        self.lose_next_request = False
        self.lose_next_reply = False

    async def connect(self) -> None:
        self._open = True
        self._sweeper = asyncio.create_task(self._sweep(), name="memory store leases")

    async def close(self) -> None:
        self._open = False
        self.etcd.wake()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None

    @property
    def connected(self) -> bool:
        return self._open and not self.down

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S)
            self.etcd.expire_due()

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if not self.connected:
            raise Unavailable("etcd does not answer", what="etcd", maybe_done=False)

    async def get(self, key: bytes) -> KV | None:
        await self._reach()
        self.etcd.expire_due()
        return self.etcd.keys.get(key)

    async def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int = 0) -> tuple[Got, int]:
        await self._reach()
        self.etcd.expire_due()
        if revision and revision < self.etcd.compacted:
            raise TxnRefused("etcd refused the request: required revision has been compacted")
        return self.etcd.read(start, end, limit, revision), self.etcd.revision

    async def txn(self, txn: Txn) -> TxnResult:
        await self._reach()
        if self.lose_next_request:
            self.lose_next_request = False
            raise Unavailable("the request was lost", what="etcd", maybe_done=True)
        result = self.etcd.txn(txn)
        await asyncio.sleep(0)
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise Unavailable("the reply was lost", what="etcd", maybe_done=True)
        return result

    async def grant(self, ttl_s: int) -> int:
        await self._reach()
        return self.etcd.grant(ttl_s)

    async def revoke(self, lease: int) -> None:
        await self._reach()
        self.etcd.revoke(lease)

    async def keep_alive(self, lease: int) -> float:
        await self._reach()
        return self.etcd.keep_alive(lease)

    async def left(self, lease: int) -> float:
        await self._reach()
        return self.etcd.left(lease)

    async def watch(self, prefixes: Sequence[bytes], *, after_revision: int) -> AsyncIterator[Batch]:
        etcd, seen = self.etcd, after_revision
        while self._open:
            if seen + 1 < etcd.compacted:
                present = (
                    Event(kv, deleted=False, created=kv.version == 1)
                    for p in prefixes
                    for kv in etcd.read(p, prefix_end(p)).kvs
                )
                seen = etcd.revision
                yield Batch(seen, tuple(present), resync=True)
                continue
            changed, asked = etcd.changed, self._asked
            for revision, events in [entry for entry in etcd.history if entry[0] > seen]:
                wanted = tuple(e for e in events if any(e.kv.key.startswith(p) for p in prefixes))
                seen = revision
                if wanted:
                    yield Batch(seen, wanted)
            if asked.is_set():
                self._asked = asyncio.Event()
                yield Batch(etcd.revision, ())
            if etcd.changed is changed and not self._asked.is_set():
                await changed.wait()

    async def progress(self) -> None:
        self._asked.set()
        self.etcd.wake()

    async def health(self) -> Health:
        await self._reach()
        return Health("3.5.30", self.etcd.revision, 1, 0, ("NOSPACE",) if self.etcd.full else ())


def _within(key: bytes, start: bytes, end: bytes) -> bool:
    return start <= key < end if end else key == start


def _stamp(result: TxnResult, revision: int) -> TxnResult:
    answers = tuple(_stamp(one, revision) if isinstance(one, TxnResult) else one for one in result.answers)
    return TxnResult(result.succeeded, revision, answers)


def _written(txn: Txn) -> int | None:
    """How many bytes the puts of both branches bring, nested ones included; None when there is none."""
    sizes = [
        _written(op) if isinstance(op, Txn) else len(op.key) + len(op.value)
        for op in (*txn.then, *txn.otherwise)
        if isinstance(op, Txn | Put)
    ]
    puts = [size for size in sizes if size is not None]
    return sum(puts) if puts else None


def _check_size(txn: Txn, limit: int) -> None:
    count = max(len(txn.compares), len(txn.then), len(txn.otherwise))
    if count > limit:
        raise TxnRefused("etcd refused the request: too many operations in txn request")
    for op in (*txn.then, *txn.otherwise):
        if isinstance(op, Txn):
            _check_size(op, limit - count)


def _check_keys(txn: Txn) -> None:
    """No key may be put twice in what may run together, nor put and deleted. After etcd's `checkIntervals`."""
    for branch in (txn.then, txn.otherwise):
        _check_branch(branch)


def _check_branch(branch: Sequence[Put | Delete | Get | Txn]) -> tuple[set[bytes], list[Delete]]:
    """The keys that a branch may put, and what it may delete, nested transactions included."""
    deletes = [op for op in branch if isinstance(op, Delete)]
    puts: set[bytes] = set()

    def add(key: bytes, *, exclusive_with: set[bytes]) -> None:
        if (key in puts and key not in exclusive_with) or any(_within(key, d.key, d.end) for d in deletes):
            raise TxnRefused("etcd refused the request: duplicate key given in txn request")

    for op in branch:
        if isinstance(op, Txn):
            then_puts, then_deletes = _check_branch(op.then)
            else_puts, else_deletes = _check_branch(op.otherwise)
            for key in then_puts:
                add(key, exclusive_with=set())
            puts |= then_puts
            for key in else_puts:  # only one of the two branches runs
                add(key, exclusive_with=then_puts)
            puts |= else_puts
            deletes += then_deletes + else_deletes
    for op in branch:
        if isinstance(op, Put):
            add(op.key, exclusive_with=set())
            puts.add(op.key)
    return puts, deletes
