"""Money that was acknowledged, told to the journal when etcd is gone: its watch will not tell it any more.

The journal is made from etcd's watch (`ifabric.actor.publisher`). What is acknowledged in the last moments of an etcd that
loses its data is in no watch and in no backup; but the daemon that acknowledged it has only just written it. The teller
remembers the holds that it wrote last, and when etcd has been gone for a moment, or is gone when the daemon stops, those
that the journal has not been told of are appended to it: also those that the watch did tell, for the publisher ends with
its lease and may not have got to them. `ifabric reconcile` reads them beside the others.

They stand on a subject of their own. Were they among the events, a publisher that takes over would believe that all
before them was told; and when etcd comes back with its data, as it mostly does, every follower would count them twice.

What still is lost: the last words of a daemon that dies in the same moment as etcd, or cannot reach JetStream either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

from ifabric.actor.base import Context
from ifabric.actor.publisher import APPEND_MAX, Entry, Source, newest_told
from ifabric.cancellation import cancel_and_wait
from ifabric.errors import FabricError
from ifabric.store.base import KV
from ifabric.wire import subjects
from ifabric.wire.replay import ACKNOWLEDGED
from ifabric_actors.governor import records

LOOK_S = 0.5
#: how long a daemon that stops waits for etcd, and then tries to say it
ASK_S, LEAVE_S = 1.0, 5.0


class LastWords:
    """Says them for one daemon. `written` are the records of holds that it wrote, in their order."""

    def __init__(self, context: Context, source: Source, written: deque[KV]) -> None:
        self._store = context.store
        self._committer, self._clock, self._bus, self._log = context.committer, context.clock, context.bus, context.log
        self._source, self._written = source, written
        #: the newest revision that was said
        self._said = 0

    async def watch(self) -> None:
        """Never returns."""
        while True:
            await self._clock.sleep(LOOK_S)
            if self._committer.down is not None and self._unsaid():
                await self._try()

    async def at_the_end(self) -> None:
        """The daemon stops: says it if etcd is gone. While that lives, whoever publishes next reads it there."""
        if not self._unsaid() or (self._committer.down is None and await self._within(ASK_S, self._etcd_lives())):
            return
        if not await self._within(LEAVE_S, self._until_told()):
            self._log.warning("what was acknowledged last could not be told", why="JetStream does not answer in time")

    async def _etcd_lives(self) -> bool:
        try:
            await self._store.get(records.PUBLISHER_KEY)
        except FabricError:
            return False
        return True

    async def _until_told(self) -> bool:
        while not await self._try():
            await self._clock.sleep(LOOK_S)
        return True

    async def _within(self, seconds: float, doing: Coroutine[Any, Any, bool]) -> bool:
        """What it says; False when it has not said it in that time of our clock."""
        task = asyncio.create_task(doing, name="last words")
        limit = asyncio.create_task(self._clock.sleep(seconds), name="last words: limit")
        try:
            await asyncio.wait((task, limit), return_when=asyncio.FIRST_COMPLETED)
            return task.done() and task.result()
        finally:
            await cancel_and_wait(task, limit)

    def _unsaid(self) -> list[KV]:
        return [kv for kv in self._written if kv.mod_revision > self._said]

    async def _try(self) -> bool:
        unsaid = self._unsaid()
        try:
            # not made anew: a stream that was lost too is to be put back from a backup, which needs its place
            journal = await self._bus.journal(subjects.EVENT_STREAM)
            told = await newest_told(journal, self._source)
            # the newest revision is a whole group commit, and may have been told in part
            entries = [entry for kv in unsaid if kv.mod_revision >= told for entry in self._entries(kv)]
            for at in range(0, len(entries), APPEND_MAX):
                await journal.append(entries[at : at + APPEND_MAX])
        except FabricError as error:
            self._log.warning("what was acknowledged last could not be told", why=str(error))
            return False
        self._said = max(kv.mod_revision for kv in unsaid)
        if entries:
            self._log.warning("etcd is gone: the journal was told what had been acknowledged last", events=len(entries))
        return True

    def _entries(self, kv: KV) -> list[Entry]:
        (_, body, message_id), *_ = self._source.tell(kv, records.hold(kv))
        return [(subjects.event(*ACKNOWLEDGED), body, f"acknowledged/{message_id}")]
