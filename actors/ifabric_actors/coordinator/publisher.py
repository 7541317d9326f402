"""Publishes what was committed: task events, made from the watch, into the journal.

One daemon at a time does it, elected on a key; another takes over when it dies. The journal itself remembers how far
it is: its newest events say their revision, so a successor goes on from there. One revision is a whole group commit
and may have been appended in part, so the successor appends that one again: a message id is key, revision and place,
and within the stream's duplicate window the same id is stored once. If etcd has compacted the revisions in between, a
`resync` event says so: a follower then lists the board.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ifabric.bus.base import Journal, JournalSpec
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock, rfc3339
from ifabric.errors import FabricError, Unavailable
from ifabric.metrics import Metrics
from ifabric.store.base import Batch
from ifabric.store.session import Session, elect
from ifabric.wire import subjects
from ifabric.wire.coordinator import EVENTS, FURTHER_EVENTS, TaskEvent
from ifabric.wire.envelope import encode
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.office import Office
from ifabric_actors.coordinator.records import Task

LEASE_S = 5
#: the events that stand for a revision (`renew_lost` is an answer that somebody got, and was never committed)
COMMITTED = tuple(what for what in (*EVENTS, *FURTHER_EVENTS) if what != "renew_lost")
APPEND_MAX = 256
#: events that come this close together are appended together: acknowledging each would cost more than committing it
GATHER_S = 0.005
#: events that may wait for the journal; more are read again from etcd
BACKLOG_MAX = 100_000
#: (subject, body, message id)
Entry = tuple[str, bytes, str]


class _Revision(msgspec.Struct, frozen=True):
    revision: int


_revisions = msgspec.json.Decoder(_Revision)


class Publisher:
    """Runs for an office as publisher, and holds it."""

    def __init__(self, office: Office, spec: JournalSpec, metrics: Metrics, *, name: str) -> None:
        self._store, self._bus, self._clock, self._feed = office.store, office.bus, office.clock, office.feed
        self._spec = spec
        self._name = name
        self._published = metrics.counter("if_coordinator_events_published_total")
        self._lag = metrics.gauge("if_coordinator_event_lag_seconds")
        self._entries: deque[Entry] = deque()
        self._more = asyncio.Event()
        self._overflowed = False

    async def run(self, log: Any) -> None:
        """Never returns. A fault costs the office, not the actor: somebody takes over, maybe we again."""
        while True:
            try:
                async with Session.open(self._store, self._clock, LEASE_S) as session:
                    await elect(self._store, session, records.PUBLISHER_KEY, self._name.encode())
                    await self._lead(session)
            except FabricError as error:
                log.warning("event publisher stopped", why=str(error))
            finally:
                self._feed.tap = self._feed.on_resync = None
                self._entries.clear()
            await self._clock.sleep(self._clock.jitter(0.2, 1.0))

    async def _lead(self, session: Session) -> None:
        journal = await self._bus.journal(self._spec)
        self._overflowed = False
        self._feed.tap, self._feed.on_resync = self._take, self._take_resync
        joined = self._feed.task_revision  # from here on the tap has everything
        newest = max(0, await _newest(journal) - 1)
        publishing = asyncio.create_task(self._publish(journal, newest, joined), name="publish events")
        try:
            either: list[asyncio.Future[Any]] = [publishing, session.lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():
                publishing.result()
        finally:
            await cancel_and_wait(publishing)

    def _take(self, task_id: str, task: Task | None, revision: int) -> None:
        if len(self._entries) >= BACKLOG_MAX:
            self._overflowed = True
            return
        self._entries.extend(_events(task_id, task, revision, self._clock))
        self._more.set()

    def _take_resync(self, revision: int) -> None:
        self._entries.append(_resync(revision, self._clock.wall_ms()))
        self._more.set()

    async def _publish(self, journal: Journal, newest: int, joined: int) -> None:
        """What happened before we joined is read again from etcd; from then on the tap is followed."""
        if newest < joined:
            await self._catch_up(journal, newest, joined)
        while not self._overflowed:
            await self._more.wait()
            await self._clock.sleep(GATHER_S)
            self._more.clear()
            while self._entries:
                began = self._clock.monotonic()
                batch = [self._entries.popleft() for _ in range(min(APPEND_MAX, len(self._entries)))]
                await journal.append(batch)
                self._published.inc(len(batch))
                self._lag.set(self._clock.monotonic() - began)
        raise Unavailable("the journal is too slow; events are read again from etcd", what="jetstream")

    async def _catch_up(self, journal: Journal, after: int, until: int) -> None:
        watch: AsyncIterator[Batch] = self._store.watch((records.TASKS,), after_revision=after)
        async for batch in watch:
            entries: list[Entry] = []
            if batch.resync:
                entries.append(_resync(batch.revision, self._clock.wall_ms()))
            else:
                for event in batch.events:
                    kv = event.kv
                    if kv.mod_revision <= until:
                        task_id = kv.key[len(records.TASKS) :].decode()
                        task = None if event.deleted else records.stored(kv).task
                        entries += _events(task_id, task, kv.mod_revision, self._clock)
            for at in range(0, len(entries), APPEND_MAX):
                await journal.append(entries[at : at + APPEND_MAX])
            self._published.inc(len(entries))
            if batch.revision >= until:
                return


async def _newest(journal: Journal) -> int:
    """The newest revision that has an event in the journal; 0 when it is empty."""
    newest = 0
    for what in COMMITTED:
        last = await journal.last(subjects.event("task", what))
        if last is not None:
            newest = max(newest, _revision(last.data))
    return newest


def _revision(data: bytes) -> int:
    """The revision of an event; 0 for what is none: whoever may publish there could else crash every daemon."""
    try:
        return _revisions.decode(data).revision
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


def _resync(revision: int, now: int) -> Entry:
    body = {"event": "resync", "at": rfc3339(now), "revision": revision}
    return subjects.event("task", "resync"), encode(body), f"resync@{revision}"


def _events(task_id: str, task: Task | None, revision: int, clock: Clock) -> list[Entry]:
    """An entry for each transition that one write made."""
    if task is None:
        body = {"event": "purged", "at": rfc3339(clock.wall_ms()), "revision": revision, "task": task_id}
        return [(subjects.event("task", "purged"), encode(body), f"tasks/{task_id}@{revision}")]
    return [
        (
            subjects.event("task", entry.event),
            encode(
                TaskEvent(
                    event=entry.event,
                    at=rfc3339(entry.at),
                    revision=revision,
                    task=task_id,
                    state=task.state,
                    session=entry.session or None,
                    fence=entry.fence,
                    attempt=task.attempt,
                    note=entry.note,
                )
            ),
            f"tasks/{task_id}@{revision}.{place}",
        )
        for place, entry in enumerate(task.history[-task.fresh :] if task.fresh else ())
    ]
