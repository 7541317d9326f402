"""Open holds, and their end with whoever they belong to.

Every daemon mirrors all open holds. One whose claim, session or time has ended is expired by whichever daemon gets
there first: each waits a little, at random, and the compare on the hold lets one of them do it. What the watch's moment
missed (the daemon that saw it died) is found by a slow pass over all of them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ifabric.actor.receipts import Leases
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.metrics import Metrics
from ifabric.store.base import KV, Put, TxnRefused, unchanged
from ifabric.store.commit import Request
from ifabric_actors.governor import ledger, records
from ifabric_actors.governor.books import Books
from ifabric_actors.governor.records import Hold
from ifabric_actors.governor.roster import Sessions, Tasks
from ifabric_actors.governor.teller import Draft, Posting, Teller, standing

STAGGER_S = 0.1
AT_ONCE_MAX = 64
#: a claim or a session that a fresh hold names may be known to the daemon that placed it and not to this one yet
GRACE_MS = 2_000
#: how often the ends of holds by time are looked at
TICK_S = 0.25
OWNER = " holds"
#: own commits whose echo is still awaited
ECHOES_MAX = 10_000


class Open(NamedTuple):
    """An open hold, and at which modification."""

    hold: Hold
    mod_revision: int


class Holds:
    """The taker of holds. `on_ended` is told of each record of a hold that has ended."""

    def __init__(self) -> None:
        self.open: dict[bytes, Open] = {}
        self.of_session: defaultdict[str, set[bytes]] = defaultdict(set)
        self.of_claim: defaultdict[str, set[bytes]] = defaultdict(set)
        self.ends: list[tuple[int, bytes]] = []
        self.on_ended: Callable[[Hold], None] | None = None
        self._mine: dict[bytes, Open] = {}

    def take(self, kv: KV) -> Hold:
        mine = self._mine.pop(kv.key, None)
        if mine is not None and mine.mod_revision == kv.mod_revision:
            hold = mine.hold  # our own commit, which is known already
        else:
            hold = records.hold(kv)
            self.put(kv.key, hold, kv.mod_revision)
        if hold.state != "open" and self.on_ended is not None:
            self.on_ended(hold)
        return hold

    def committed(self, key: bytes, hold: Hold, mod_revision: int) -> None:
        """A record that this daemon has committed: its echo from the watch need not be read."""
        self.put(key, hold, mod_revision)
        self._mine[key] = Open(hold, mod_revision)
        if len(self._mine) > ECHOES_MAX:
            del self._mine[next(iter(self._mine))]

    def put(self, key: bytes, hold: Hold, mod_revision: int) -> None:
        """A newer record of a hold."""
        known = self.open.get(key)
        if known is not None and known.mod_revision >= mod_revision:
            return
        if hold.state != "open":
            self._drop(key)
            return
        if known is None:
            self.of_session[hold.session].add(key)
            if hold.task:
                self.of_claim[hold.task].add(key)
            if hold.expires_at:
                heapq.heappush(self.ends, (hold.expires_at, key))
        self.open[key] = Open(hold, mod_revision)

    def gone(self, key: bytes, revision: int) -> None:
        known = self.open.get(key)
        if known is not None and known.mod_revision <= revision:
            self._drop(key)

    def known(self) -> Iterable[bytes]:
        return self.open

    def _drop(self, key: bytes) -> None:
        known = self.open.pop(key, None)
        if known is None:
            return
        hold = known.hold
        for index, name in ((self.of_session, hold.session), (self.of_claim, hold.task)):
            keys = index.get(name)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    del index[name]

    def due(self, now_ms: int) -> list[bytes]:
        """Open holds whose own end has come."""
        found = []
        while self.ends and self.ends[0][0] <= now_ms:
            _, key = heapq.heappop(self.ends)
            known = self.open.get(key)
            if known is not None and 0 < known.hold.expires_at <= now_ms:
                found.append(key)
        return found


class Sweeper:
    """Expires holds, on the word of the watch and every `reconcile_s`."""

    def __init__(
        self,
        holds: Holds,
        sessions: Sessions,
        tasks: Tasks,
        teller: Teller,
        ended: Leases,
        clock: Clock,
        metrics: Metrics,
        *,
        reconcile_s: float,
    ) -> None:
        self._holds, self._sessions, self._tasks = holds, sessions, tasks
        self._teller, self._ended, self._clock = teller, ended, clock
        self._reconcile_s = reconcile_s
        self._work: dict[bytes, None] = {}
        self._there_is_work = asyncio.Event()
        self._expired = metrics.counter("if_governor_holds_expired_total")
        self._open = metrics.gauge("if_governor_holds_open")
        self._overdue = metrics.gauge("if_governor_holds_overdue")

    # -- told by the roster (must not wait) ---------------------------------------------------------------------------

    def session_gone(self, session: str, lease: int) -> None:
        """A session has ended, or came back with another lease."""
        self._add(key for key in self._holds.of_session.get(session, ()) if self._holds.open[key].hold.lease == lease)

    def claim_ended(self, task: str, fence: int) -> None:
        """A claim has ended. Its own hold ended in the same transaction; those placed for it did not."""
        self._add(key for key in self._holds.of_claim.get(task, ()) if self._holds.open[key].hold.fence == fence)

    def _add(self, keys: Iterable[bytes]) -> None:
        self._work |= dict.fromkeys(keys)
        if self._work:
            self._there_is_work.set()

    # -- the tasks of the actor ---------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Never returns."""
        while True:
            await self._there_is_work.wait()
            self._there_is_work.clear()
            await self._clock.sleep(self._clock.jitter(0.0, STAGGER_S))
            work, self._work = list(self._work), {}
            for at in range(0, len(work), AT_ONCE_MAX):
                await asyncio.gather(*(self._expire(key) for key in work[at : at + AT_ONCE_MAX]))

    async def tick(self) -> None:
        """Never returns: finds what has come to its own end."""
        while True:
            self._open.set(len(self._holds.open))
            self._add(self._holds.due(self._clock.wall_ms()))
            await self._clock.sleep(TICK_S)

    async def reconcile(self) -> None:
        """Never returns: looks at every hold now and then, whatever the watch said."""
        before: set[bytes] = set()
        while True:
            now_ms = self._clock.wall_ms()
            overdue = [key for key, known in self._holds.open.items() if self._why(known.hold, now_ms) is not None]
            self._overdue.set(len(before.intersection(overdue)))  # one that has just come due is being ended
            before = set(overdue)
            self._add(overdue)
            await self._clock.sleep(self._reconcile_s)

    def _why(self, hold: Hold, now_ms: int) -> str | None:
        """Why a hold has ended; None while it has not."""
        if 0 < hold.expires_at <= now_ms:
            return "its time was up"
        if now_ms - hold.at < GRACE_MS:
            return None
        seat = self._sessions.seats.get(hold.session)
        if seat is None or seat.lease != hold.lease:
            return "its session ended"
        if hold.task:
            held = self._tasks.held.get(hold.task)
            if held is None or held.fence != hold.fence:
                return "its claim ended"
        return None

    async def _expire(self, key: bytes) -> None:
        known = self._holds.open.get(key)
        if known is None:
            return
        hold = known.hold
        why = self._why(hold, self._clock.wall_ms())
        if why is None:
            return  # too fresh to judge: the next pass looks again
        try:
            lease = await self._ended.current()

            def make(books: Books) -> Draft:
                settled = ledger.expired(hold, books.at(hold.on), why=why, now=books.now_ms)
                books.put(settled.path)
                put = Put(key, records.encode(settled.hold), lease)
                return Draft(Request((unchanged(key, known.mod_revision),), (put,)), settled.hold)

            posted = await self._teller.post(Posting(standing(hold), hold.on, (key,), make, OWNER))
        except TxnRefused:
            self._ended.retire()
            return
        except FabricError:
            return  # the next pass tries again
        if posted.outcome.succeeded:
            self._expired.inc()
            self._holds.committed(key, posted.answer, posted.outcome.revision)
