"""Publishes what was committed: task events, made from the watch, into the journal.

One daemon at a time does it, elected on a key; another takes over when it dies. The journal itself remembers how far it is: its newest
events say their revision, so a successor goes on from there. One revision is a whole group commit and may have been appended in part, so
the successor appends that one again: a message id is key, revision and place, and within the stream's duplicate window the same id is
stored once. If etcd has compacted the revisions in between, a `resync` event says so: a follower then lists the board.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from ifabric.metrics import Metrics
from ifabric.store.session import Session, elect

from ifabric.bus.base import Bus, Journal, JournalSpec
from ifabric.clock import Clock, rfc3339
from ifabric.errors import FabricError
from ifabric.store.base import Batch, Event, Store
from ifabric.wire import subjects
from ifabric.wire.coordinator import EVENTS, TaskEvent
from ifabric.wire.envelope import encode
from ifabric_actors.coordinator import records

LEASE_S = 5
#: the events that stand for a revision (`renew_lost` is an answer that somebody got, and was never committed)
COMMITTED = (*(what for what in EVENTS if what != "renew_lost"), "requeued", "purged", "resync")
APPEND_MAX = 256


class _Revision(msgspec.Struct, frozen=True):
    revision: int


_revisions = msgspec.json.Decoder(_Revision)


class Publisher:
    """Runs for an office as publisher, and holds it."""

    def __init__(self, store: Store, bus: Bus, spec: JournalSpec, clock: Clock, metrics: Metrics, *, name: str) -> None:
        self._store = store
        self._bus = bus
        self._spec = spec
        self._clock = clock
        self._name = name
        self._published = metrics.counter("if_coordinator_events_published_total")
        self._lag = metrics.gauge("if_coordinator_event_lag_seconds")
        self.leading = False
        #: the newest revision whose events are in the journal
        self.revision = 0

    async def run(self, log: object) -> None:
        """Never returns. A fault costs the office, not the actor: somebody takes over, maybe we again."""
        while True:
            try:
                async with Session.open(self._store, self._clock, LEASE_S) as session:
                    await elect(self._store, session, records.PUBLISHER_KEY, self._name.encode())
                    await self._lead(session)
            except FabricError as error:
                log.warning("event publisher stopped", error=str(error), **error.facts)  # type: ignore[attr-defined]
            finally:
                self.leading = False
            await self._clock.sleep(self._clock.jitter(0.2, 1.0))

    async def _lead(self, session: Session) -> None:
        journal = await self._bus.journal(self._spec)
        self.revision = max(0, await _newest(journal) - 1)
        self.leading = True
        publishing = asyncio.create_task(self._publish(journal), name="publish events")
        try:
            await asyncio.wait({publishing, session.lost}, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():
                publishing.result()
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    async def _publish(self, journal: Journal) -> None:
        batches: AsyncIterator[Batch] = self._store.watch((records.TASKS,), after_revision=self.revision)
        async for batch in batches:
            entries: list[tuple[str, bytes, str]] = []
            if batch.resync:
                entries.append(_resync(batch.revision, self._clock.wall_ms()))
            else:
                for event in batch.events:
                    entries += _entries(event, self._clock.wall_ms())
            for at in range(0, len(entries), APPEND_MAX):
                await journal.append(entries[at : at + APPEND_MAX])
            if entries:
                self._published.inc(len(entries))
            self.revision = batch.revision


async def _newest(journal: Journal) -> int:
    """The newest revision that has an event in the journal; 0 when it is empty."""
    newest = 0
    for what in COMMITTED:
        last = await journal.last(subjects.event("task", what))
        if last is not None:
            newest = max(newest, _revisions.decode(last.data).revision)
    return newest


def _resync(revision: int, now: int) -> tuple[str, bytes, str]:
    body = {"event": "resync", "at": rfc3339(now), "revision": revision}
    return subjects.event("task", "resync"), encode(body), f"resync@{revision}"


def _entries(event: Event, now: int) -> list[tuple[str, bytes, str]]:
    """(subject, body, message id) of each transition that one write made."""
    kv = event.kv
    name = kv.key.decode()
    if event.deleted:
        task_id = name[len(records.TASKS) :]
        body = {"event": "purged", "at": rfc3339(now), "revision": kv.mod_revision, "task": task_id}
        return [(subjects.event("task", "purged"), encode(body), f"{name}@{kv.mod_revision}")]
    task = records.stored(kv).task
    entries = []
    for place, entry in enumerate(task.history[-task.fresh :] if task.fresh else ()):
        message = TaskEvent(
            event=entry.event,
            at=rfc3339(entry.at),
            revision=kv.mod_revision,
            task=task.spec.id,
            state=task.state,
            session=entry.session or None,
            fence=entry.fence,
            attempt=task.attempt,
            note=entry.note,
        )
        entries.append((subjects.event("task", entry.event), encode(message), f"{name}@{kv.mod_revision}.{place}"))
    return entries
