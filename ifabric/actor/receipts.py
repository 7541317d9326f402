"""Receipts: the first answer to a request, written in the transaction that carried the request out.

    receipts/<session>/<request_id>  hangs on a lease of the daemon that gave the answer

A retry finds it, on any daemon, and is told the same. A receipt is kept for a while, then etcd forgets it by itself.
One lease serves many receipts, but not too many: a lease that ends deletes all its keys in one step of etcd's, so a
lease is retired after `KEYS_MAX` receipts or a minute. A receipt lives at least `keep_s` seconds, at most twice
that.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from typing import Any

import msgspec

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import Conflict
from ifabric.store.base import KV, Put, Store, record
from ifabric.wire.envelope import Mutation, Request, encode

RECEIPTS = b"receipts/"

KEYS_MAX = 2_000
RETIRE_S = 60.0


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The first answer to a request: what was asked (a digest), what was said, and by which attempt.

    Another daemon that carries the same request out would say the same in the same words; only `by` tells whose it is.
    """

    by: str = ""
    verb: str
    digest: str
    reply: msgspec.Raw


_receipts = msgspec.json.Decoder(Receipt)


def receipt_key(session: str, request_id: str) -> bytes:
    return b"%s%s/%s" % (RECEIPTS, session.encode(), request_id.encode())


def digest(message: Request) -> str:
    """Tells a request's body from another's: the id of the request is the same in both anyway."""
    return hashlib.blake2b(encode(message), digest_size=8).hexdigest()


def replayed(kv: KV, message: Request) -> msgspec.Raw:
    """The first answer to this request. `Conflict` when the same id asked for something else."""
    first = record(_receipts, kv)
    if first.verb != message.verb or first.digest != digest(message):
        raise Conflict(f"request id was used before, for another {first.verb}", verb=first.verb)
    return first.reply


class Leases:
    """Leases to hang keys on that are to be forgotten some day; `current` costs nothing but once in `KEYS_MAX` calls."""

    def __init__(self, store: Store, clock: Clock, *, keep_s: int) -> None:
        self._store = store
        self._clock = clock
        self._keep_s = keep_s
        self._lease = 0
        self._granted_at = 0.0
        self._left = 0
        self._granting: asyncio.Task[int] | None = None

    async def current(self) -> int:
        """A lease with at least `keep_s` seconds to live. Raises `Unavailable`."""
        age = self._clock.monotonic() - self._granted_at
        if self._left <= 0 or age > min(RETIRE_S, self._keep_s):
            if self._granting is None:
                self._granting = asyncio.create_task(self._grant(), name="receipt lease")
            granting = self._granting
            try:
                await asyncio.shield(granting)
            finally:
                if granting.done() and self._granting is granting:
                    self._granting = None
        self._left -= 1
        return self._lease

    async def _grant(self) -> int:
        asked = self._clock.monotonic()
        self._lease = await self._store.grant(2 * self._keep_s)
        self._granted_at, self._left = asked, KEYS_MAX
        return self._lease

    async def stop(self) -> None:
        if self._granting is not None:
            await cancel_and_wait(self._granting)

    def retire(self) -> None:
        """The current lease is not to be used any more."""
        self._left = 0


class Receipts(Leases):
    """Writes one daemon's receipts."""

    def __init__(self, store: Store, clock: Clock, *, keep_s: int) -> None:
        super().__init__(store, clock, keep_s=keep_s)
        self._name, self._attempts = clock.token(), itertools.count(1)

    def put(self, session: str, message: Mutation, kept: Any, lease: int) -> Put:
        """A receipt, unlike any other: it tells whose attempt went through. `kept` is what it keeps of the answer."""
        assert message.request_id is not None, "only a request with an id has a receipt"
        value = b'{"by":"%b.%d","verb":"%b","digest":"%b","reply":%b}' % (
            self._name.encode(),
            next(self._attempts),
            message.verb.encode(),
            digest(message).encode(),
            encode(kept),
        )
        return Put(receipt_key(session, message.request_id), value, lease)
