"""Pending tasks on their shelves: one for each demand, and the way to the best of them for a session. Pure.

A shelf is sorted: higher priority first, then older; its head is what it has to offer. A session is given the best of
the heads of the shelves that it can take: of the highest priority, then the one that it suits best, then the oldest.
With few demands, which is the rule, that is a handful of comparisons however many tasks are pending.

With thousands of demands it is thousands of comparisons for every `next`, and that is what the cache is for. It keeps
the best heads for an offer, up to `BEST_MAX` of them, and the *floor*: nothing that is not among them ranks before it.
What others take from the board makes heads worse or empties shelves, so it never brings anything new above a floor: a
remembered head that is gone is found out when its turn comes. What does bring something new, a new shelf or a better
head, is noted in the order in which it happened, and each offer reads on from where it was. When the remembered heads
are used up, and there was more below the floor, all shelves are looked through again: once for so many tasks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from heapq import nsmallest
from typing import Any, NamedTuple

from sortedcontainers import SortedKeyList

from ifabric.clock import Clock
from ifabric.metrics import Metrics
from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator.records import Stored
from ifabric_actors.governor import matching
from ifabric_actors.governor.matching import CLEAR, Cache, Demand, Obstacles, Offer, Terms, Weather

#: so few shelves are looked through each time: remembering would cost more
SHELVES_FEW = 32
#: heads that are remembered for an offer
BEST_MAX = 32
#: (minus the priority, the record's create revision, its place in the submission, task id)
Place = tuple[int, int, int, str]


class Pick(NamedTuple):
    """The task to offer, and how well it suits."""

    task_id: str
    score: float


class Shelf:
    """The pending tasks of one demand."""

    __slots__ = ("blocked", "demand", "entries", "head", "labels", "needs", "number", "plain")

    def __init__(self, number: int, demand: Demand) -> None:
        self.number, self.demand = number, demand
        self.needs, self.labels = demand.needs, demand.labels
        self.entries: SortedKeyList[Place] = SortedKeyList(key=_order)
        self.head: Place | None = None
        #: a need of it is blocked by a breaker; everybody who can take it has score 1
        self.blocked = self.plain = False


#: a shelf's head among others, for one offer: minus the priority, minus the score, the head's create revision, its place
#: in the submission, the shelf's number (so that no two are alike), the shelf
Rank = tuple[int, float, int, int, int, Shelf]


class _Best:
    """The best heads for an offer, in order, up to a floor; what was noted up to `seen` is among them."""

    __slots__ = ("floor", "ranks", "seen")

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.ranks: list[Rank] = []
        #: None: there is nothing below
        self.floor: Rank | None = None


def _order(place: Place) -> tuple[int, int, int]:
    return place[:3]


class Shelves:
    """All pending tasks that are to be given out."""

    def __init__(self, terms: Terms, cache: Cache[Offer, _Best], why: Cache[Offer, Obstacles]) -> None:
        self.terms = terms
        self.weather: Weather = CLEAR
        self._cache, self._why = cache, why
        self._shelves: dict[Demand, Shelf] = {}
        #: shelves that are new or have a better head since, the last one last
        self._improved: dict[Shelf, int] = {}
        self._improvements = self._numbers = self._weathers = 0

    def __len__(self) -> int:
        return len(self._shelves)

    def put(self, task_id: str, stored: Stored) -> None:
        """A task is to be given out."""
        demand, place = demand_of(stored.task.spec), _place(task_id, stored)
        shelf = self._shelves.get(demand)
        if shelf is None:
            self._numbers += 1
            shelf = self._shelves[demand] = Shelf(self._numbers, demand)
            self._expose(shelf)
        shelf.entries.add(place)
        if shelf.head is None or place < shelf.head:
            shelf.head = place
            self._improved.pop(shelf, None)
            self._improvements += 1
            self._improved[shelf] = self._improvements

    def take(self, task_id: str, stored: Stored) -> None:
        """A task that was put is not to be given out any more."""
        demand, place = demand_of(stored.task.spec), _place(task_id, stored)
        shelf = self._shelves[demand]
        shelf.entries.remove(place)
        if not shelf.entries:
            shelf.head = None
            del self._shelves[demand], self._improved[shelf]
        elif place == shelf.head:
            shelf.head = shelf.entries[0]

    def in_weather(self, weather: Weather) -> list[Demand]:
        """The breakers are these now. The demands that may have become possible."""
        before, self.weather = self.weather, weather
        self._weathers += 1
        opened = []
        for shelf in self._shelves.values():
            self._expose(shelf)
            if not shelf.blocked and not before.unwell.isdisjoint(shelf.needs | shelf.demand.wants):
                opened.append(shelf.demand)
        return opened

    def _expose(self, shelf: Shelf) -> None:
        """Brings what the weather means for it up to date."""
        shelf.blocked = not self.weather.blocked.isdisjoint(shelf.needs)
        quiet = not shelf.demand.wants and self.weather.unwell.isdisjoint(shelf.needs)
        shelf.plain = quiet or not self.terms.enabled

    def waiting(self, demand: Demand) -> int:
        """How many tasks of it there are."""
        shelf = self._shelves.get(demand)
        return len(shelf.entries) if shelf is not None else 0

    # -- questions ----------------------------------------------------------------------------------------------------

    def best(self, offer: Offer, spread: int, pick: Callable[[int], int] | None) -> Pick | None:
        """The task to offer: of the highest priority, then with the highest score, then the oldest."""
        if len(self._shelves) > SHELVES_FEW and self._cache.enabled:
            rank = self._remembered(offer)
        else:
            rank = self._looked_through(offer)
        if rank is None:
            return None
        entries = rank[5].entries
        if spread > 1 and pick is not None:
            peers = entries.bisect_key_right((rank[0], 2**63, 0))
            return Pick(str(entries[pick(min(spread, peers))][3]), -rank[1])
        return Pick(str(entries[0][3]), -rank[1])

    def _rank(self, shelf: Shelf, offer: Offer) -> Rank | None:
        """The shelf's head for this offer; None when it cannot be offered."""
        if (
            shelf.blocked
            or not shelf.needs <= offer[0]
            or (offer[1] and offer[1].isdisjoint(shelf.labels))
            or shelf.head is None
        ):
            return None
        score = 1.0 if shelf.plain else matching.score(shelf.demand, offer, self.weather, self.terms)
        if score < self.terms.min_score:
            return None
        low_priority, created, order, _ = shelf.head
        return low_priority, -score, created, order, shelf.number, shelf

    def _looked_through(self, offer: Offer) -> Rank | None:
        """The best of all."""
        capabilities = offer.capabilities
        best: Rank | None = None
        for shelf in self._shelves.values():
            if not shelf.needs <= capabilities:  # most of them: the rest is not worth a call
                continue
            if best is not None and shelf.head is not None and shelf.head[0] > best[0]:
                continue
            rank = self._rank(shelf, offer)
            if rank is not None and (best is None or rank < best):
                best = rank
        return best

    def _remembered(self, offer: Offer) -> Rank | None:
        """The best of all, by what is known of this offer."""
        known = self._cache.get(offer, self._weathers)
        if known is None:
            known = _Best(0)
            self._look_through(known, offer)
            self._cache.put(offer, self._weathers, known)
        elif known.seen < self._improvements:
            for shelf, number in reversed(self._improved.items()):
                if number <= known.seen:
                    break
                _insert(known, self._rank(shelf, offer))
            known.seen = self._improvements
        while True:
            while known.ranks:
                first = known.ranks[0]
                head = first[5].head
                if head is not None and (head[0], head[1], head[2]) == (first[0], first[2], first[3]):
                    return first
                del known.ranks[0]
                _insert(known, self._rank(first[5], offer))
            if known.floor is None:
                return None
            self._look_through(known, offer)

    def _look_through(self, known: _Best, offer: Offer) -> None:
        """Finds the best heads for an offer anew."""
        capabilities = offer.capabilities
        reached = [shelf for shelf in self._shelves.values() if shelf.needs <= capabilities]
        ranks = (rank for shelf in reached if (rank := self._rank(shelf, offer)) is not None)
        known.ranks, known.floor, known.seen = nsmallest(BEST_MAX + 1, ranks), None, self._improvements
        if len(known.ranks) > BEST_MAX:
            known.floor = known.ranks.pop()

    def obstacles(self, offer: Offer) -> Obstacles | None:
        """Why there is nothing; None when nothing is pending."""
        version = (self._weathers, self._numbers, len(self._shelves))
        found = self._why.get(offer, version)
        if found is None:
            found = matching.obstacles(((demand, offer) for demand in self._shelves), self.weather, self.terms)
            if found is not None:
                self._why.put(offer, version, found)
        return found


def _insert(known: _Best, rank: Rank | None) -> None:
    """Remembers a head that ranks before the floor. When there are many, the last of them is the floor."""
    if rank is None or (known.floor is not None and not rank < known.floor):
        return
    ranks = known.ranks
    at = bisect_left(ranks, rank)
    if at == len(ranks) or ranks[at] != rank:
        ranks.insert(at, rank)
        if len(ranks) > 2 * BEST_MAX:
            known.floor = ranks[BEST_MAX]
            del ranks[BEST_MAX:]


def shelves_of(settings: Any, clock: Clock, metrics: Metrics) -> Shelves:
    """Shelves as the section `governor.capabilities` of the configuration has it."""

    def cache() -> Cache[Offer, Any]:
        return Cache(
            clock.monotonic,
            enabled=settings.cache_enabled,
            ttl_s=settings.cache_ttl_seconds,
            entries_max=settings.cache_max_entries,
            hits=metrics.counter("if_governor_match_cache_total", outcome="hit"),
            misses=metrics.counter("if_governor_match_cache_total", outcome="miss"),
        )

    return Shelves(Terms(settings.enabled, settings.min_match_score), cache(), cache())


def bare_shelves() -> Shelves:
    """Shelves as configured by default, without a cache."""
    return Shelves(Terms(), Cache(float, enabled=False), Cache(float, enabled=False))


def demand_of(spec: TaskSpec) -> Demand:
    """What a task asks of a session."""
    return matching.demand(spec.needs, spec.wants, spec.labels)


def _place(task_id: str, stored: Stored) -> Place:
    return -stored.task.spec.priority, stored.create_revision, stored.task.order, task_id
