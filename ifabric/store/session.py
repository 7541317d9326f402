"""A lease of the daemon's own, with a death notice.

**A lease is believed for a shorter time here than in etcd.** etcd counts the TTL from when it *handled* the last
keep-alive; the holder cannot know that moment, only when it *sent* the one that was answered, which is earlier.
Counting from there, and ending a little before, the holder stops before anybody else can begin, unless its process
stands still, and against that only a compare in the transaction helps (the fence). So `lost` is for ending work early
and politely, never for safety.

**Orphaning is not closing.** `close` revokes the lease: whoever waits for it goes on at once. `orphan` only stops
renewing, for when etcd cannot be reached, or when the keys shall outlive this process for what is left of the TTL.

After etcd's `concurrency.Session` and the trust window of River's leader election.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError, Unavailable
from ifabric.store.base import Get, Got, Put, Store, Txn, absent

#: the share of the TTL after which the lease is renewed, and that after which it is no longer believed
RENEW_AT = 1 / 3
TRUST = 5 / 6


class Session:
    """A lease kept alive while the block runs.

    async with Session.open(store, clock, ttl_s=5) as session:
        ...                       # session.lease is good until session.lost
    """

    def __init__(self, store: Store, clock: Clock, ttl_s: int) -> None:
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._task: asyncio.Task[None] | None = None
        self._trusted_until = 0.0
        self.lease = 0
        #: done, with the reason, when the lease may be gone
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    def open(cls, store: Store, clock: Clock, ttl_s: int) -> Session:
        """A session to be entered with `async with`."""
        return cls(store, clock, ttl_s)

    async def __aenter__(self) -> Self:
        sent = self._clock.monotonic()
        self.lease = await self._store.grant(self._ttl_s)
        self._trusted_until = sent + self._ttl_s * TRUST
        self._task = asyncio.create_task(self._keep(), name="session keep-alive")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the lease. When etcd cannot be reached, it ends by itself."""
        await self.orphan()
        if self.lease:
            lease, self.lease = self.lease, 0
            try:
                await self._store.revoke(lease)
            except Unavailable:
                return

    async def orphan(self) -> None:
        """Stops renewing, and leaves the lease what it has."""
        self._end("the session was closed")
        if self._task is not None:
            await cancel_and_wait(self._task)

    def _end(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)

    async def _keep(self) -> None:
        while not self.lost.done():
            await self._clock.sleep(self._ttl_s * RENEW_AT)
            while True:
                sent = self._clock.monotonic()
                if sent >= self._trusted_until:
                    self._end("etcd could not be reached in time to keep the lease")
                    return
                try:
                    async with asyncio.timeout(self._trusted_until - sent):
                        left_s = await self._store.keep_alive(self.lease)
                except (FabricError, TimeoutError):
                    await self._clock.sleep(self._clock.jitter(0.05, 0.2))
                    continue
                if left_s <= 0:
                    self._end("the lease has gone")
                    return
                self._trusted_until = sent + left_s * TRUST
                break


async def elect(store: Store, session: Session, key: bytes, value: bytes) -> None:
    """Returns when `session` owns `key`: one of the candidates does at a time, and the next when it is gone.

    Raises `Unavailable`, also when the session is lost meanwhile.
    """
    while True:
        result = await store.txn(Txn((absent(key),), (Put(key, value, session.lease),), (Get(key),)))
        if result.succeeded:
            return
        got = result.answers[0]
        assert isinstance(got, Got)
        if not got.kvs:
            continue
        if got.kvs[0].lease == session.lease:  # a transaction whose reply was lost
            return
        gone = asyncio.ensure_future(_until_deleted(store, key, result.revision))
        either: list[asyncio.Future[Any]] = [gone, session.lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                raise Unavailable(f"the candidate's session ended: {session.lost.result()}", what="etcd")
            gone.result()
        finally:
            await cancel_and_wait(gone)


async def _until_deleted(store: Store, key: bytes, after_revision: int) -> None:
    async for batch in store.watch((key,), after_revision=after_revision):
        for event in batch.events:
            if event.kv.key == key and event.deleted:
                return
        if batch.resync and not any(event.kv.key == key for event in batch.events):
            return
    raise Unavailable("the store was closed", what="etcd")
