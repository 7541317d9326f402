"""Carries out `match`, and reports tasks that nobody can take.

Both weigh demands against *offers*, not against sessions: a thousand sessions that can do the same are weighed once.

Every daemon with a governor looks for unmatched tasks and would tell the same event: its message id is made from the
demand and the minute, so the journal keeps one of them. (Daemons on either side of a minute's turn are told twice.)
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import NamedTuple

from ifabric.actor.base import Caller, Context
from ifabric.clock import rfc3339
from ifabric.errors import FabricError
from ifabric.wire import governor as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import MSG_ID_HEADER, encode
from ifabric_actors.governor import matching
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.matching import Cache, Demand, Offer, Terms, Weighed
from ifabric_actors.governor.outages import Outages
from ifabric_actors.governor.roster import Sessions, Tasks

#: a task that was submitted just now, or whose agent has just gone, is no news yet
GRACE_S = 2.0
#: how often it is looked
LOOK_S = 1.0
#: comparisons before requests are let through, and for how long
SLICE, SLICE_PAUSE_S = 4_000, 0.001
#: sessions that are weighed before requests are let through, while somebody waits for the answer
MATCH_SLICE = 500
#: events in one look; the others are told in the next
TELL_MAX = 100
MINUTE_MS = 60_000


class _Ranked(NamedTuple):
    """A session, weighed; in the order of the answer."""

    low_score: float
    lacking: float
    session: str
    weighed: Weighed | None
    claims: int


class _Unmatched:
    """A demand that no live session can take."""

    __slots__ = ("since", "told", "until")

    def __init__(self, since: float, until: int) -> None:
        self.since, self.told = since, False
        #: of the groups of sessions up to this number nobody can take it, in this weather
        self.until = until


class Matcher:
    """Weighs sessions against what a task asks for. `outages` is a taker of the breakers' records."""

    def __init__(self, context: Context, sessions: Sessions, tasks: Tasks, breakers: Breakers) -> None:
        self._context, self._sessions, self._tasks, self._breakers = context, sessions, tasks, breakers
        settings, metrics = context.settings.governor.capabilities, context.metrics
        self.outages = Outages(enabled=context.settings.governor.circuit_breaker.enabled)
        self._terms = Terms(settings.enabled, settings.min_match_score)
        self._cache: Cache[tuple[Demand, Offer], Weighed] = Cache(
            context.clock.monotonic,
            enabled=settings.cache_enabled,
            ttl_s=settings.cache_ttl_seconds,
            entries_max=settings.cache_max_entries,
            hits=metrics.counter("if_governor_match_cache_total", outcome="hit"),
            misses=metrics.counter("if_governor_match_cache_total", outcome="miss"),
        )
        self._scores = metrics.histogram("if_governor_capability_match_score")
        self._gauge = metrics.gauge("if_governor_unmatched_tasks")
        self._unmatched: dict[Demand, _Unmatched] = {}
        #: an offer that could take it when it was last looked
        self._takers: dict[Demand, Offer] = {}
        #: what the last look depended on: the offers, and the breakers
        self._seen: tuple[int, int] = (-1, -1)

    # -- match --------------------------------------------------------------------------------------------------------

    async def match(self, message: wire.Match, caller: Caller) -> wire.MatchReply:
        """Every session (or those that were named), weighed, the best first."""
        self.outages.at(self._context.clock.wall_ms())
        asked = matching.demand(message.needs, message.wants, message.labels)
        ranked: list[_Ranked] = []
        count = 0
        for one in self._named(asked, message.sessions) if message.sessions else self._all(asked):
            ranked.append(one)
            count += 1
            if count % MATCH_SLICE == 0:
                if len(ranked) > 2 * wire.RANKED_MAX:
                    ranked = heapq.nsmallest(wire.RANKED_MAX, ranked)
                await self._context.clock.sleep(0)
        best = heapq.nsmallest(wire.RANKED_MAX, ranked)
        await self._context.clock.sleep(0)
        if best and best[0].weighed is not None and best[0].weighed.able:
            self._scores.observe(best[0].weighed.score)
        return wire.MatchReply(
            ranked=tuple(self._candidate(one) for one in best), min_score=self._terms.min_score, sessions=count
        )

    def _all(self, asked: Demand) -> Iterator[_Ranked]:
        for offer, group in list(self._sessions.offers.items()):
            for session in list(group.sessions):
                yield self._ranked(asked, offer, session)

    def _named(self, asked: Demand, sessions: tuple[str, ...]) -> Iterator[_Ranked]:
        for session in dict.fromkeys(sessions):
            seat = self._sessions.seats.get(session)
            if seat is None:
                yield _Ranked(0.0, 4, session, None, 0)
            else:
                yield self._ranked(asked, seat.offer, session)

    def _ranked(self, asked: Demand, offer: Offer, session: str) -> _Ranked:
        claims = self._tasks.claims_of(session)
        weighed = self._weigh(asked, offer)
        if claims and weighed.able:
            loaded = matching.score(asked, offer, self.outages.weather, self._terms, claims)
            weighed = weighed._replace(score=loaded)
        obstacles = bool(weighed.missing) + bool(weighed.accepts) + bool(weighed.blocked)
        # of those who cannot, the one who lacks least comes first
        lacking = obstacles + len(weighed.missing) / 100
        return _Ranked(-weighed.score, lacking, session, weighed, claims)

    def _weigh(self, asked: Demand, offer: Offer) -> Weighed:
        """With no load."""
        key = asked, offer
        known = self._cache.get(key, self.outages.version)
        if known is None:
            known = matching.weigh(asked, offer, self.outages.weather, self._terms)
            self._cache.put(key, self.outages.version, known)
        return known

    def _candidate(self, one: _Ranked) -> wire.Candidate:
        weighed = one.weighed
        if weighed is None:
            return wire.Candidate(session=one.session, score=0.0, missing=(), reason="There is no such session.")
        return wire.Candidate(
            session=one.session,
            score=weighed.score,
            missing=weighed.missing,
            reason=matching.reason(weighed, self._terms, one.claims),
            matches=weighed.able and weighed.idle_score >= self._terms.min_score,
        )

    # -- tasks that nobody can take ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Brings the gauge up to date."""
        ripe = self._context.clock.monotonic() - GRACE_S
        pending = self._tasks.pending
        self._gauge.set(
            sum(len(pending.get(demand, ())) for demand, found in self._unmatched.items() if found.since <= ripe)
        )

    async def watch(self) -> None:
        """Never returns: looks for pending tasks that no live session can take, and tells of them once."""
        clock = self._context.clock
        while True:
            await self._look()
            await self._tell()
            await clock.sleep(LOOK_S)

    async def _look(self) -> None:
        """One pass over the demands. What was found stands while nobody new has come and the breakers are the same: a
        demand that somebody could take is asked of him first, one that nobody could take of those who came since.
        """
        clock, sessions, pending = self._context.clock, self._sessions, self._tasks.pending
        self.outages.at(clock.wall_ms())
        now = sessions.version, self.outages.version
        same, fair = now == self._seen, now[1] == self._seen[1]
        self._seen = now
        offers = [(group.number, offer) for offer, group in reversed(sessions.offers.items())]
        newest = offers[0][0] if offers else 0
        steps = 0
        for demand in list(pending):
            if steps >= SLICE:
                steps = 0
                await clock.sleep(SLICE_PAUSE_S)
            steps += 1
            known = self._unmatched.get(demand)
            last = self._takers.get(demand)
            if demand not in pending or (same and (known is not None or last is not None)):
                continue
            if last is not None and last in sessions.offers and (fair or self._takes(demand, last)):
                continue
            until = known.until if known is not None and fair else 0
            taker = None
            for number, offer in offers:
                if number <= until:
                    break
                if self._takes(demand, offer):
                    taker = offer
                    break
                steps += 1
                if steps >= SLICE:
                    steps = 0
                    await clock.sleep(SLICE_PAUSE_S)
            self._found(demand, taker, newest)
        for known_of in (self._takers, self._unmatched):
            for gone in known_of.keys() - pending.keys():
                del known_of[gone]

    def _takes(self, demand: Demand, offer: Offer) -> bool:
        return matching.takes(demand, offer, self.outages.weather, self._terms)

    def _found(self, demand: Demand, taker: Offer | None, until: int) -> None:
        if taker is not None:
            self._takers[demand] = taker
            self._unmatched.pop(demand, None)
            return
        self._takers.pop(demand, None)
        known = self._unmatched.get(demand)
        if known is None:
            self._unmatched[demand] = _Unmatched(self._context.clock.monotonic(), until)
        else:
            known.until = until

    async def _tell(self) -> None:
        """An event for each demand that has been unmatched for a while. What cannot be published now is tried again."""
        clock, ripe = self._context.clock, self._context.clock.monotonic() - GRACE_S
        due = [demand for demand, found in self._unmatched.items() if not found.told and found.since <= ripe]
        for demand in due[:TELL_MAX]:
            found, tasks = self._unmatched.get(demand), self._tasks.pending.get(demand)
            if found is None or not tasks:
                continue
            event, message_id = self._event(demand, tasks, clock.wall_ms())
            try:
                await self._context.bus.publish(
                    subjects.event("match", event.event), encode(event), {MSG_ID_HEADER: message_id}
                )
            except FabricError as error:
                self._context.log.warning("unmatched tasks could not be told", why=str(error))
                return
            found.told = True
            await clock.sleep(SLICE_PAUSE_S)

    def _event(self, demand: Demand, tasks: dict[str, None], now_ms: int) -> tuple[wire.MatchEvent, str]:
        offers = list(self._sessions.offers) or [Offer()]
        found = matching.obstacles(((demand, offer) for offer in offers), self.outages.weather, self._terms)
        needs, wants, labels = (tuple(sorted(names)) for names in demand)
        digest = hashlib.sha256(repr((needs, wants, labels)).encode()).hexdigest()[:32]
        event = wire.MatchEvent(
            event="unmatched",
            at=rfc3339(now_ms),
            needs=needs,
            labels=labels,
            missing=found.missing if found is not None else (),
            tasks=len(tasks),
            example=next(iter(tasks)),
        )
        return event, f"unmatched/{digest}@{now_ms // MINUTE_MS}"
