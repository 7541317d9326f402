"""Publishes what was committed: events, made from an actor's feed, into the journal.

One daemon at a time does it, elected on a key; another takes over when it dies. The journal itself remembers how far
it is: its newest events say their revision, so a successor goes on from there. One revision is a whole group commit
and may have been appended in part, so the successor appends that one again: a message id is key, revision and place,
and within the stream's duplicate window the same id is stored once. If etcd has compacted the revisions in between, a
`resync` event says so: a follower then lists what there is.

Everything that is published together stands under one prefix: within it etcd tells changes in order, and only then
does the newest event say that all before it were told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import msgspec

from ifabric.actor.feed import Feed
from ifabric.bus.base import Bus, Journal, JournalSpec
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock, rfc3339
from ifabric.errors import FabricError, Internal, Unavailable
from ifabric.metrics import Counter, Gauge
from ifabric.store.base import KV, Batch, Event, Store
from ifabric.store.session import Session, elect
from ifabric.wire.envelope import encode

LEASE_S = 5
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


class Source(NamedTuple):
    """What is published: the changes under `prefix`, as `tell` puts them."""

    #: the office that candidates run for
    key: bytes
    prefix: bytes
    #: a record as the feed's taker gives it, for what is read from etcd again
    read: Callable[[KV], Any]
    #: the events of one change; the record is None when the key was deleted
    tell: Callable[[KV, Any], list[Entry]]
    #: the subjects of the events that stand for a revision
    subjects: tuple[str, ...]
    #: where to say that events were lost
    resync_subject: str


class Publisher:
    """Runs for the office of publisher, and holds it."""

    def __init__(
        self,
        source: Source,
        store: Store,
        bus: Bus,
        clock: Clock,
        feed: Feed,
        spec: JournalSpec,
        *,
        published: Counter,
        lag: Gauge,
    ) -> None:
        self._source = source
        self._store, self._bus, self._clock, self._feed = store, bus, clock, feed
        self._spec = spec
        self._name = clock.token()
        self._published, self._lag = published, lag
        self._entries: deque[Entry] = deque()
        self._more = asyncio.Event()
        self._overflowed = False
        self._log: Any = None

    async def run(self, log: Any) -> None:
        """Never returns. A fault costs the office, not the actor: somebody takes over, maybe we again."""
        self._log = log
        while True:
            try:
                async with Session.open(self._store, self._clock, LEASE_S) as session:
                    await elect(self._store, session, self._source.key, self._name.encode())
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
        joined = self._feed.newest[self._source.prefix]  # from here on the tap has everything
        newest = max(0, await newest_told(journal, self._source) - 1)
        publishing = asyncio.create_task(self._publish(journal, newest, joined), name="publish events")
        try:
            either: list[asyncio.Future[Any]] = [publishing, session.lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():
                publishing.result()
        finally:
            await cancel_and_wait(publishing)

    def _take(self, kv: KV, record: Any) -> None:
        if not kv.key.startswith(self._source.prefix):
            return
        if len(self._entries) >= BACKLOG_MAX:
            self._overflowed = True
            return
        entries = self._source.tell(kv, record)
        if entries:
            self._entries.extend(entries)
            self._more.set()

    def _take_resync(self, revision: int) -> None:
        self._entries.append(self._resync(revision))
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
        source = self._source
        watch: AsyncIterator[Batch] = self._store.watch((source.prefix,), after_revision=after)
        async for batch in watch:
            entries: list[Entry] = []
            if batch.resync:
                entries.append(self._resync(batch.revision))
            else:
                for event in batch.events:
                    if event.kv.mod_revision <= until:
                        entries += self._read_again(event)
            for at in range(0, len(entries), APPEND_MAX):
                await journal.append(entries[at : at + APPEND_MAX])
            self._published.inc(len(entries))
            if batch.revision >= until:
                return

    def _read_again(self, event: Event) -> list[Entry]:
        """The events of a change; none when its record is damaged: what comes after it is to be told all the same."""
        source = self._source
        try:
            return source.tell(event.kv, None if event.deleted else source.read(event.kv))
        except Internal as damage:
            self._log.warning("a change is not told", why=damage.message, revision=event.kv.mod_revision)
            return []

    def _resync(self, revision: int) -> Entry:
        body = {"event": "resync", "at": rfc3339(self._clock.wall_ms()), "revision": revision}
        return self._source.resync_subject, encode(body), f"resync@{revision}"


async def newest_told(journal: Journal, source: Source) -> int:
    """The newest revision that has an event in the journal; 0 when it is empty."""
    newest = 0
    for subject in source.subjects:
        last = await journal.last(subject)
        if last is not None:
            newest = max(newest, _revision(last.data))
    return newest


def _revision(data: bytes) -> int:
    """The revision of an event; 0 for what is none: whoever may publish there could else crash every daemon."""
    try:
        return _revisions.decode(data).revision
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
