"""Keeps the board up to date with etcd: one listing at a revision, then the watch from there on.

The watch of a daemon is read once, for everybody: the event publisher taps it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from ifabric.errors import Unavailable
from ifabric.store.base import KV, Batch, Event, Store, prefix_end
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.records import Stored, Task

PREFIXES = (records.TASKS, records.SESSIONS, records.DEADLINES)
PAGE = 2_000
ASK_AGAIN_S = 0.05


class Feed:
    """Reads etcd into the board."""

    def __init__(self, store: Store, board: Board, deadlines: dict[str, int]) -> None:
        self._store = store
        self._board = board
        #: task -> lease of the claim's own deadline, while that lives
        self._deadlines = deadlines
        self._moved = asyncio.Event()
        #: the newest revision of a task's key that was handed on
        self.task_revision = 0
        #: told of every change of a task's key after `task_revision`: (task, record or None when deleted, revision)
        self.tap: Callable[[str, Task | None, int], None] | None = None
        #: told of the task of a claim whose own deadline has passed, or is no longer needed
        self.on_deadline: Callable[[str], None] | None = None
        #: told when the past was compacted away
        self.on_resync: Callable[[int], None] | None = None

    async def load(self) -> None:
        """Lists everything as of one revision."""
        revision = 0
        for prefix in PREFIXES:
            start, end = prefix, prefix_end(prefix)
            while True:
                got, at = await self._store.range(start, end, limit=PAGE, revision=revision)
                revision = revision or at
                for kv in got.kvs:
                    self._present(kv)
                if len(got.kvs) >= got.total:
                    break
                start = got.kvs[-1].key + b"\x00"
                await asyncio.sleep(0)
        self._board.revision = self.task_revision = revision

    async def follow(self) -> None:
        """Never returns while the store lives."""
        batches: AsyncIterator[Batch] = self._store.watch(PREFIXES, after_revision=self._board.revision)
        async for batch in batches:
            if batch.resync:
                self._resync(batch)
            else:
                for event in batch.events:
                    self._take(event)
            self._board.revision = max(self._board.revision, batch.revision)
            self._moved.set()
            self._moved = asyncio.Event()

    async def catch_up(self, within_s: float) -> None:
        """Returns when the board knows all that was committed before the call. Raises `Unavailable`."""
        _, revision = await self._store.range(records.PUBLISHER_KEY, records.PUBLISHER_KEY + b"\x00", limit=1)
        try:
            async with asyncio.timeout(within_s):
                while self._board.revision < revision:
                    moved = self._moved
                    await self._store.progress()
                    # etcd leaves the question unanswered while one of the stream's watchers is behind the others
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ASK_AGAIN_S):
                            await moved.wait()
        except TimeoutError:
            raise Unavailable("etcd's watch is behind; nothing was decided.", what="etcd watch") from None

    def _take(self, event: Event) -> None:
        if not event.deleted:
            task = self._present(event.kv)
            if task is not None:
                self.task_revision = event.kv.mod_revision
                if self.tap is not None:
                    self.tap(task.spec.id, task, event.kv.mod_revision)
            return
        key, revision = event.kv.key, event.kv.mod_revision
        if key.startswith(records.TASKS):
            task_id = key[len(records.TASKS) :].decode()
            self._board.forget(task_id, revision)
            self.task_revision = revision
            if self.tap is not None:
                self.tap(task_id, None, revision)
        elif key.startswith(records.SESSIONS):
            self._board.unseat(key[len(records.SESSIONS) :].decode(), revision)
        else:
            task_id = key[len(records.DEADLINES) :].decode()
            self._deadlines.pop(task_id, None)
            if self.on_deadline is not None:
                self.on_deadline(task_id)

    def _present(self, kv: KV) -> Task | None:
        """Takes a key in; the task when it is one's."""
        key = kv.key
        if key.startswith(records.TASKS):
            task_id = key[len(records.TASKS) :].decode()
            known = self._board.tasks.get(task_id)
            if known is not None and known.mod_revision == kv.mod_revision:
                mine: Task = known.task
                return mine  # our own commit, which is known already
            expected = self._board.expected.get(task_id)
            if expected is not None and expected[0] == kv.value:
                stored = Stored(expected[1], kv.mod_revision, kv.create_revision)
            else:
                stored = records.stored(kv)
            self._board.put(task_id, stored)
            return stored.task
        if key.startswith(records.SESSIONS):
            self._board.seat(key[len(records.SESSIONS) :].decode(), records.seat(kv))
        else:
            self._deadlines[key[len(records.DEADLINES) :].decode()] = kv.lease
        return None

    def _resync(self, batch: Batch) -> None:
        """The past was compacted away: what is not in the present is gone."""
        there = {event.kv.key for event in batch.events}
        for task_id in [t for t in self._board.tasks if records.task_key(t) not in there]:
            self._board.forget(task_id, batch.revision)
        for session in [s for s in self._board.sessions if records.session_key(s) not in there]:
            self._board.unseat(session, batch.revision)
        for task_id in [t for t in self._deadlines if records.deadline_key(t) not in there]:
            del self._deadlines[task_id]
        for event in batch.events:
            self._present(event.kv)
        self.task_revision = batch.revision
        if self.on_resync is not None:
            self.on_resync(batch.revision)
