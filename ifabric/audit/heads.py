"""Heads: how far each chain is in the stream, told to etcd, so that an end that was cut off is missed."""

from __future__ import annotations

import msgspec

from ifabric.audit.spool import Mark
from ifabric.clock import Clock, rfc3339
from ifabric.store.base import Delete, Put, Store, Txn, prefix_end, unchanged
from ifabric.wire.audit import Head, heads
from ifabric.wire.envelope import encode

PREFIX = b"audit/"
PAGE = 500


class Heads:
    """One daemon's part in them."""

    def __init__(self, store: Store, clock: Clock, daemon: str) -> None:
        self._store, self._clock, self._daemon = store, clock, daemon

    async def tell(self, chain: str, mark: Mark, *, ended: bool = False) -> None:
        """Says how far the stream has the chain, and with `ended` that nothing more of it comes. Raises `Unavailable`."""
        at = rfc3339(self._clock.wall_ms())
        head = Head(chain=chain, n=mark.n, hash=mark.hash, at=at, daemon=mark.daemon or self._daemon, ended=ended)
        await self._store.txn(Txn((), (Put(PREFIX + chain.encode(), encode(head)),)))

    async def forget(self, older_than_s: float) -> int:
        """Deletes those that were told so long ago: the stream has forgotten their records by then. How many."""
        before = rfc3339(self._clock.wall_ms() - round(older_than_s * 1000))
        start, end, forgotten = PREFIX, prefix_end(PREFIX), 0
        while True:
            found, _ = await self._store.range(start, end, limit=PAGE)
            for kv in found.kvs:
                try:
                    at = heads.decode(kv.value).at
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    continue  # not ours to judge: `ifabric audit verify` tells of it
                if at < before:
                    done = await self._store.txn(Txn((unchanged(kv.key, kv.mod_revision),), (Delete(kv.key),)))
                    forgotten += done.succeeded
            if len(found.kvs) < PAGE:
                return forgotten
            start = found.kvs[-1].key + b"\0"
