"""Which session may take which task, and how well it suits. Pure: no clock, no store, no waiting.

**First what must be, in both directions.** The task: every one of its `needs` is among the session's capabilities.
The session: when it said what it `accepts`, one of those is among the task's `labels`. And the world: no need is the
name of a breaker that lets no call through now. One of these missing, and no score helps: a threshold over a sum, as
one reads it elsewhere, lets somebody do a task who cannot, as long as he is idle and wants the rest of it.

**Then a score** from 0 to 1, for what is left to choose among:

    0.8 * capability + 0.1 * (1 - load) + 0.1 * breakers

`capability` is the share of what is needed and wanted that is there (1 when nothing is asked; a name that is needed
and wanted is asked once). `load` is ``claims / (claims + 1)``: 0 for an idle session, 1/2 with one claim, never quite
1, for nobody says how many claims are many; it tells sessions apart and cannot outweigh a wish, unless a task
asks for more than eight things. `breakers` is the share of the names asked for that are not those of a breaker that is open or half
open. Who fails what must be has 0.

**The threshold.** What scores below `min_match_score` is not offered. With 0.7 and a quiet world that is a
capability of 5/8: a task that needs two things and wants two goes to who has one of those two, and one that
needs nothing and wants one thing waits for who has it. That is the point of it (a wish that anybody may ignore
is no wish), and the reason for the report of tasks that nobody can take. An operator who wants wishes only to order
says 0.2 or less.

**Load does not count in `next`.** One session asks there, and its load is the same for every task: it orders nothing,
and at the threshold it would keep a busy session from tasks that no idle one can take. So `next` weighs with load 0,
as does the question whether a pending task can be taken at all. `match` ranks sessions and counts it, but a session
that is below the threshold for its load alone matches all the same: it would be given the task if it asked.
`claim` names its task; there only what must be is checked.

**A breaker blocks a need only while no probe may go.** Open, it does until its time has come, or for good when an
operator holds it; half open, it does while a probe is under way. Were a need blocked for as long as a breaker is not
closed, those who would probe it would never be given the task that makes them call, and it would not close again. A
breaker's state is taken from the watch, a moment late, in both directions: whoever gets a task on old news is told
`breaker_open` where it counts, at `admit`.

**Caching.** A score is cheaper than a look-up of it: two set comparisons and a division, against the hash of two
sets of sets. What is worth keeping is an answer that took many scores: the best of thousands of demands for a session
(`coordinator.shelves`), why there is none, and what `match` says of a demand and an offer, with all the names. `Cache` keeps such
answers by what the session offers, so changed capabilities are another key; with the version of all else that they
depend on, so a breaker that trips or a new demand makes them old; for `cache_ttl_seconds`; the least recently used
goes first. Nothing may differ when it is switched off, and a property test says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from ifabric.metrics import Counter

CAPABILITY, IDLENESS, BREAKERS = 0.8, 0.1, 0.1
#: names of a kind that a refusal lists
NAMED_MAX = 16
Names = frozenset[str]
NONE: Names = frozenset()


class Demand(NamedTuple):
    """What a group of tasks asks of a session. Make it with `demand`."""

    needs: Names = NONE
    wants: Names = NONE
    labels: Names = NONE


class Offer(NamedTuple):
    """What a group of sessions can do, and which labels they accept (none: any task)."""

    capabilities: Names = NONE
    accepts: Names = NONE


class Weather(NamedTuple):
    """The breakers that matter: those that let no call through now, and with them those that are not closed."""

    blocked: Names = NONE
    unwell: Names = NONE


class Terms(NamedTuple):
    """What the configuration says. Not enabled: only what must be counts, and every score is 1."""

    enabled: bool = True
    min_score: float = 0.7


class Weighed(NamedTuple):
    """A demand and an offer, compared. The first three are what must be, and is not."""

    missing: tuple[str, ...]
    #: what the session accepts, when the task is none of it
    accepts: tuple[str, ...]
    blocked: tuple[str, ...]
    #: wished for and not there; asked for and its breaker is not closed
    unmet: tuple[str, ...]
    unwell: tuple[str, ...]
    #: with the load that was given, and with none
    score: float
    idle_score: float

    @property
    def able(self) -> bool:
        """All that must be, is."""
        return not (self.missing or self.accepts or self.blocked)


CLEAR = Weather()


@lru_cache(maxsize=20_000)
def demand(needs: tuple[str, ...], wants: tuple[str, ...], labels: tuple[str, ...]) -> Demand:
    """What is needed is not wished for besides. Remembered: it is asked for with every change of every task."""
    needed = frozenset(needs)
    return Demand(needed, frozenset(wants) - needed, frozenset(labels))


def is_able(asked: Demand, offer: Offer, weather: Weather) -> bool:
    """Whether all that must be, is."""
    return (
        asked.needs <= offer.capabilities
        and (not offer.accepts or not offer.accepts.isdisjoint(asked.labels))
        and (not weather.blocked or weather.blocked.isdisjoint(asked.needs))
    )


def score(asked: Demand, offer: Offer, weather: Weather, terms: Terms, claims: int = 0) -> float:
    """From 0 to 1 (the essay's formula); 0 when something is missing that must be."""
    if not is_able(asked, offer, weather):
        return 0.0
    return _score(asked, offer, weather, terms, claims)


def _score(asked: Demand, offer: Offer, weather: Weather, terms: Terms, claims: int) -> float:
    if not terms.enabled:
        return 1.0
    capability = breakers = 1.0
    names = len(asked.needs) + len(asked.wants)
    if asked.wants:
        capability = (len(asked.needs) + len(asked.wants & offer.capabilities)) / names
    if weather.unwell and names:
        breakers = 1 - (len(weather.unwell & asked.needs) + len(weather.unwell & asked.wants)) / names
    # rounded: what is 0.7 on paper is not to miss a threshold of 0.7 by the last bit
    return round(CAPABILITY * capability + IDLENESS / (claims + 1) + BREAKERS * breakers, 6)


def takes(asked: Demand, offer: Offer, weather: Weather, terms: Terms) -> bool:
    """Whether `next` would offer it."""
    return is_able(asked, offer, weather) and _score(asked, offer, weather, terms, 0) >= terms.min_score


def weigh(asked: Demand, offer: Offer, weather: Weather, terms: Terms, claims: int = 0) -> Weighed:
    """The whole comparison, with what is missing by name."""
    missing = asked.needs - offer.capabilities
    accepts = offer.accepts if offer.accepts.isdisjoint(asked.labels) else NONE
    blocked = weather.blocked & asked.needs
    unwell = weather.unwell & (asked.needs | asked.wants)
    able = not (missing or accepts or blocked)
    idle = _score(asked, offer, weather, terms, 0) if able else 0.0
    loaded = _score(asked, offer, weather, terms, claims) if able and claims else idle
    return Weighed(
        _named(missing), _named(accepts), _named(blocked), _named(asked.wants - offer.capabilities), _named(unwell),
        loaded, idle,
    )  # fmt: skip


def _named(names: Names) -> tuple[str, ...]:
    return tuple(sorted(names)) if names else ()


def reason(weighed: Weighed, terms: Terms, claims: int = 0) -> str:
    """Why a session would be offered the task, or would not: a sentence that names every cause."""
    causes = []
    if weighed.missing:
        causes.append(f"it lacks {_list(weighed.missing)}")
    if weighed.accepts:
        causes.append(f"it accepts only {_list(weighed.accepts)}")
    if weighed.blocked:
        causes.append(f"{_breakers(weighed.blocked)}")
    if causes:
        return f"Cannot take it: {'; '.join(causes)}."
    lowered = []
    if weighed.unmet:
        lowered.append(f"without {_list(weighed.unmet)}, which it wants")
    if weighed.unwell:
        lowered.append(_breakers(weighed.unwell))
    if claims:
        lowered.append(f"holds {claims} {'claim' if claims == 1 else 'claims'}")
    besides = f" ({'; '.join(lowered)})" if lowered and terms.enabled else ""
    if not terms.enabled:
        return "Can take it."
    if weighed.idle_score < terms.min_score:
        return f"Would not be offered it: {weighed.score:.3g} is below {terms.min_score:g}{besides}."
    if weighed.score < terms.min_score:
        return f"Can take it, {weighed.score:.3g}: its load, which `next` leaves out, is what is below {terms.min_score:g}{besides}."
    return f"Can take it, {weighed.score:.3g}{besides}."


def _breakers(names: tuple[str, ...]) -> str:
    return (
        f"the breaker{'s' if len(names) > 1 else ''} of {_list(names)} {'are' if len(names) > 1 else 'is'} not closed"
    )


def _list(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return f"{shown} and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else shown


# -- why nothing matched ----------------------------------------------------------------------------------------------


class Obstacles(NamedTuple):
    """What stands between an offer and the demands that come nearest to it, each kind where it is the reason."""

    #: the fewest capabilities that would open one
    missing: tuple[str, ...] = ()
    #: labels to accept, breakers to wait for
    labels: tuple[str, ...] = ()
    breakers: tuple[str, ...] = ()
    #: the session accepts some labels, and the tasks have none
    unlabelled: bool = False
    #: of what is only not liked enough: the best score, and the wishes that are unmet there
    best_score: float | None = None
    wishes: tuple[str, ...] = ()

    def sentence(self, pending: int, min_score: float) -> str:
        """Which it is, for people to read."""
        causes = []
        if self.missing:
            causes.append(f"missing: {_list(self.missing)}")
        if self.labels:
            causes.append(f"labels that the session does not accept: {_list(self.labels)}")
        elif self.unlabelled:
            causes.append("no labels, and the session accepts only some")
        if self.breakers:
            causes.append(f"not now, for {_breakers(self.breakers)}")
        if self.best_score is not None:
            wishes = f" without {_list(self.wishes)}" if self.wishes else ""
            causes.append(f"the best scores {self.best_score:.3g}{wishes}, and {min_score:g} is asked for")
        return f"none of {pending} pending tasks can be taken; {'; '.join(causes)}"

    def kinds(self) -> tuple[str, ...]:
        """As `if_governor_capability_match_failures_total` counts them."""
        found = (self.missing, "capability"), (self.labels or self.unlabelled, "label"), (self.breakers, "breaker")
        kinds = tuple(kind for there, kind in found if there)
        return kinds if self.best_score is None else (*kinds, "score")


def obstacles(pairs: Iterable[tuple[Demand, Offer]], weather: Weather, terms: Terms) -> Obstacles | None:
    """What is in the way of the pairs that come nearest; None when one matches, or there is none.

    Nearest are those with one kind of obstacle, if there are any: a capability that would still leave the label wrong
    opens nothing.
    """
    missing: Names | None = None
    labels: set[str] = set()
    breakers: set[str] = set()
    best: tuple[float, Demand, Offer] | None = None
    unlabelled = False
    nearest: tuple[int, int, Names, Names | None, Names] | None = None
    for asked, offer in pairs:
        lack = asked.needs - offer.capabilities
        unlike = asked.labels if offer.accepts and offer.accepts.isdisjoint(asked.labels) else None
        blocked = weather.blocked & asked.needs if weather.blocked else NONE
        kinds = bool(lack) + (unlike is not None) + bool(blocked)
        if kinds == 0:
            points = _score(asked, offer, weather, terms, 0)
            if points >= terms.min_score:
                return None
            if best is None or points > best[0]:
                best = points, asked, offer
        elif kinds > 1:
            if nearest is None or (kinds, len(lack)) < nearest[:2]:
                nearest = kinds, len(lack), lack, unlike, blocked
        elif lack:
            if missing is None or (len(lack), sorted(lack)) < (len(missing), sorted(missing)):
                missing = lack
        elif blocked:
            breakers |= blocked
        elif unlike is not None:
            labels |= unlike
            unlabelled = unlabelled or not unlike
    if missing is None and not labels and not unlabelled and not breakers and best is None:
        if nearest is None:
            return None
        _, _, lack, unlike, blocked = nearest
        return Obstacles(_named(lack), _named(unlike or NONE), _named(blocked), unlike is not None and not unlike)
    found = Obstacles(
        _named(missing or NONE), tuple(sorted(labels))[:NAMED_MAX], tuple(sorted(breakers))[:NAMED_MAX], unlabelled
    )
    if best is not None:
        found = found._replace(best_score=best[0], wishes=_named(best[1].wants - best[2].capabilities))
    return found


# -- keeping answers --------------------------------------------------------------------------------------------------

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Answers by key, as long as they are of the version asked for. `now` is on a monotonic scale."""

    def __init__(
        self,
        now: Callable[[], float],
        *,
        enabled: bool = True,
        ttl_s: float = 300.0,
        entries_max: int = 10_000,
        hits: Counter | None = None,
        misses: Counter | None = None,
    ) -> None:
        self.enabled = enabled and entries_max > 0
        self._now, self._ttl_s, self._entries_max = now, ttl_s, entries_max
        self._kept: OrderedDict[K, tuple[V, Hashable, float]] = OrderedDict()
        self.hits, self.misses = hits or Counter(), misses or Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, version: Hashable) -> V | None:
        """The answer, when there is one of this version that is not too old."""
        if not self.enabled:
            return None
        found = self._kept.get(key)
        if found is not None:
            value, of, until = found
            if of == version and self._now() < until:
                self._kept.move_to_end(key)
                self.hits.inc()
                return value
            del self._kept[key]
        self.misses.inc()
        return None

    def put(self, key: K, version: Hashable, value: V) -> None:
        """Keeps it; the one that was not used for longest gives way."""
        if not self.enabled:
            return
        self._kept[key] = (value, version, self._now() + self._ttl_s)
        self._kept.move_to_end(key)
        if len(self._kept) > self._entries_max:
            self._kept.popitem(last=False)

    def drop(self, key: K) -> None:
        """Forgets it."""
        self._kept.pop(key, None)
