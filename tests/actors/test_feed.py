"""The feed's catching up, when etcd does not answer its question."""

from __future__ import annotations

import asyncio

from ifabric.actor.feed import Feed
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import SystemClock
from ifabric.store.base import Put, Txn
from ifabric.testing.memory_store import MemoryStore


class Deaf(MemoryStore):
    """A store that leaves the first questions for progress unanswered, as etcd does while a watcher is behind."""

    unanswered = 3

    async def progress(self) -> None:
        self.unanswered -= 1
        if self.unanswered < 0:
            await super().progress()


async def test_a_question_that_etcd_leaves_unanswered_is_asked_again() -> None:
    store = Deaf(SystemClock())
    await store.connect()
    feed = Feed(store, (b"tasks/", b"sessions/"), {})
    await feed.load()
    following = asyncio.create_task(feed.follow())
    committed = await store.txn(Txn((), (Put(b"receipts/unwatched", b"{}"),)))
    await feed.catch_up(within_s=2.0)
    assert feed.revision >= committed.revision
    assert store.unanswered < 0
    await cancel_and_wait(following)
    await store.close()
