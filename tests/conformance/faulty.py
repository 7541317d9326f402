"""A store that hurts on demand, around the twin and around the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from ifabric.errors import StoreFull, Unavailable
from ifabric.store.base import Delete, Put, Store, Txn, TxnResult


def ops(txn: Txn) -> Iterator[Any]:
    """What a transaction would do when everything succeeds, nested ones included."""
    for op in txn.then:
        if isinstance(op, Txn):
            yield from ops(op)
        else:
            yield op


def written(txn: Txn) -> list[bytes]:
    """The keys that a transaction would write."""
    return [op.key for op in ops(txn) if isinstance(op, Put | Delete)]


class Faulty:
    """Passes everything on to a store, but for the transactions that a test holds, loses or refuses."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: every transaction that was sent, in order
        self.sent: list[Txn] = []
        #: what becomes of the next ones: "ok", "lose request", "lose reply" or "bug"
        self.next: list[str] = []
        self.down = self.full = self.hanging = False
        #: called between the commit and the loss of its reply
        self.after_loss: Callable[[], None] = lambda: None
        self._held: Callable[[Txn], bool] = lambda txn: False
        self._let_go = asyncio.Event()
        self._sent_one = asyncio.Event()
        self._in_flight: list[bytes] = []
        #: keys that two transactions wrote at the same time
        self.overlapping: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def hold(self, which: Callable[[Txn], bool] = lambda txn: True) -> None:
        """These transactions wait, and only these, until told otherwise."""
        self._held = which
        self._let_go.set()
        self._let_go = asyncio.Event()

    def let_go(self) -> None:
        """Nothing waits any more."""
        self.hanging = False
        self.hold(lambda txn: False)

    async def has_sent(self, count: int) -> None:
        """Returns when that many transactions were sent."""
        async with asyncio.timeout(10):
            while len(self.sent) < count:
                await self._sent_one.wait()

    async def get(self, key: bytes) -> Any:
        await self._reach()
        return await self._store.get(key)

    async def txn(self, txn: Txn) -> TxnResult:
        self.sent.append(txn)
        self._sent_one.set()
        self._sent_one = asyncio.Event()
        keys = written(txn)
        self.overlapping += [key for key in set(keys) if key in self._in_flight]
        self._in_flight += keys
        try:
            while self._held(txn):
                await self._let_go.wait()
            return await self._carry_out(txn)
        finally:
            for key in keys:
                self._in_flight.remove(key)

    async def _carry_out(self, txn: Txn) -> TxnResult:
        await self._reach()
        if self.full and any(isinstance(op, Put) for op in ops(txn)):
            raise StoreFull(what="etcd")
        fault = self.next.pop(0) if self.next else "ok"
        if fault == "lose request":
            raise Unavailable("the request was lost", what="etcd", maybe_done=True)
        if fault == "bug":
            raise RuntimeError("a bug")
        result = await self._store.txn(txn)
        if fault == "lose reply":
            self.after_loss()
            raise Unavailable("the reply was lost", what="etcd", maybe_done=True)
        return result

    async def _reach(self) -> None:
        if self.down:
            raise Unavailable("etcd does not answer", what="etcd", maybe_done=False)
        while self.hanging:
            await self._let_go.wait()
