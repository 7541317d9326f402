"""Keeps an actor's knowledge up to date with etcd: one listing at a revision, then the watch from there on.

What is known of a prefix is kept by its *taker*. The watch of an actor is read once, for everybody: the event
publisher taps it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Protocol

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import Unavailable
from ifabric.store.base import KV, Batch, Event, Store, prefix_end

PAGE = 2_000
ASK_AGAIN_S = 0.05
CATCH_UP_S = 2.0
#: a key that only marks the present: reading it tells the newest revision
NOWHERE = b"fabric/nowhere"


class Taker(Protocol):
    """Keeps what is known of the keys under one prefix."""

    def take(self, kv: KV) -> Any:
        """A key is this now. What it returns is handed to the tap: the decoded record."""

    def gone(self, key: bytes, revision: int) -> None:
        """The key was deleted at that revision."""

    def known(self) -> Iterable[bytes]:
        """The keys that are believed to exist."""


class Feed:
    """Reads etcd into takers, by prefix. `watched` are the prefixes of the watch: within each of them changes come in
    order; the takers' prefixes stand within these.
    """

    def __init__(self, store: Store, watched: tuple[bytes, ...], takers: Mapping[bytes, Taker]) -> None:
        self._store = store
        self._watched = watched
        self._takers = dict(takers)
        self._moved = asyncio.Event()
        self._catching_up: asyncio.Task[None] | None = None
        #: everything at or below this revision is known
        self.revision = 0
        #: of each watched prefix, the newest revision that was handed on
        self.newest: dict[bytes, int] = dict.fromkeys(watched, 0)
        #: told of every change after `newest`: (key and value, what its taker made of it; None when it was deleted)
        self.tap: Callable[[KV, Any], None] | None = None
        #: told when the past was compacted away
        self.on_resync: Callable[[int], None] | None = None

    async def load(self) -> None:
        """Lists everything as of one revision."""
        revision = 0
        for prefix in self._watched:
            start, end = prefix, prefix_end(prefix)
            while True:
                got, at = await self._store.range(start, end, limit=PAGE, revision=revision)
                revision = revision or at
                for kv in got.kvs:
                    self._take(kv)
                if len(got.kvs) >= got.total:
                    break
                start = got.kvs[-1].key + b"\x00"
                await asyncio.sleep(0)
        self.revision = revision
        self.newest = dict.fromkeys(self._watched, revision)

    async def follow(self) -> None:
        """Never returns while the store lives."""
        batches: AsyncIterator[Batch] = self._store.watch(self._watched, after_revision=self.revision)
        async for batch in batches:
            if batch.resync:
                self._resync(batch)
            else:
                for event in batch.events:
                    self._hand_on(event)
            self.revision = max(self.revision, batch.revision)
            self._moved.set()
            self._moved = asyncio.Event()

    async def catch_up(self, within_s: float) -> None:
        """Returns when all that was committed before the call is known. Raises `Unavailable`."""
        _, revision = await self._store.range(NOWHERE, NOWHERE + b"\x00", limit=1)
        try:
            async with asyncio.timeout(within_s):
                while self.revision < revision:
                    moved = self._moved
                    await self._store.progress()
                    # etcd leaves the question unanswered while one of the stream's watchers is behind the others
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ASK_AGAIN_S):
                            await moved.wait()
        except TimeoutError:
            raise Unavailable("etcd's watch is behind; nothing was decided.", what="etcd watch") from None

    async def settle(self) -> None:
        """`catch_up`, but calls that overlap share the work."""
        if self._catching_up is not None:
            await asyncio.wait({self._catching_up})  # it may have begun before us: the next one has not
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.create_task(self.catch_up(CATCH_UP_S), name="catch up")
        await asyncio.shield(self._catching_up)

    async def stop(self) -> None:
        """Ends a `settle` under way."""
        if self._catching_up is not None:
            await cancel_and_wait(self._catching_up)

    def _taker(self, key: bytes) -> Taker | None:
        for prefix, taker in self._takers.items():
            if key.startswith(prefix):
                return taker
        return None

    def _take(self, kv: KV) -> Any:
        taker = self._taker(kv.key)
        return taker.take(kv) if taker is not None else None

    def _hand_on(self, event: Event) -> None:
        kv, made = event.kv, None
        taker = self._taker(kv.key)
        if taker is not None:
            if event.deleted:
                taker.gone(kv.key, kv.mod_revision)
            else:
                made = taker.take(kv)
        for prefix in self._watched:
            if kv.key.startswith(prefix):
                self.newest[prefix] = kv.mod_revision
        if self.tap is not None and taker is not None:
            self.tap(kv, made)

    def _resync(self, batch: Batch) -> None:
        """The past was compacted away: what is not in the present is gone."""
        there = {event.kv.key for event in batch.events}
        for taker in self._takers.values():
            for key in [key for key in taker.known() if key not in there]:
                taker.gone(key, batch.revision)
        for event in batch.events:
            self._take(event.kv)
        self.newest = dict.fromkeys(self._watched, batch.revision)
        if self.on_resync is not None:
            self.on_resync(batch.revision)
