"""The board: what this daemon knows of tasks and sessions, arranged for the questions it is asked.

A mirror of etcd, fed by the watch and by the daemon's own commits; it can be thrown away at any time. It may be a
moment behind, so nothing is granted on its word alone (the commit compares) and nothing refused on it without a look
at etcd. Pure bookkeeping: no waiting.

Pending tasks are kept on `shelves`, one for each *demand*: what they need and want, and which labels they have. A
session is offered the best of those that it can take (`governor.matching` says which): highest priority first, then
the one it suits best, then oldest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict

from ifabric.errors import BreakerOpen, CapabilityMissing
from ifabric.wire.coordinator import STATES, State, TaskSpec
from ifabric_actors.coordinator.records import Seat, Stored, Task
from ifabric_actors.coordinator.shelves import Pick, Shelves, bare_shelves, demand_of
from ifabric_actors.governor import matching
from ifabric_actors.governor.matching import Demand, Obstacles, Offer
from ifabric_actors.governor.outages import Outages

#: deletions remembered, so that a late read cannot bring a key back
GRAVES_MAX = 10_000


class Change(NamedTuple):
    """A task was put (or, with `after` None, forgotten)."""

    task_id: str
    before: Stored | None
    after: Stored | None


class Board:
    """Tasks, sessions and the indexes between them. `on_change` and `on_gone` are told what changed."""

    def __init__(
        self,
        on_change: Callable[[Change], None],
        on_gone: Callable[[str, int], None],
        shelves: Shelves | None = None,
        outages: Outages | None = None,
    ) -> None:
        self._on_change = on_change
        self._on_gone = on_gone
        #: told what may have become possible to take, and how many tasks of it there are
        self.on_offer: Callable[[Demand, int], None] = lambda _demand, _tasks: None
        self.shelves = bare_shelves() if shelves is None else shelves
        self._outages = Outages() if outages is None else outages
        #: what this daemon is committing right now, as bytes and as a record: its echo from the watch need not be read
        self.expected: dict[str, tuple[bytes, Task]] = {}
        self.tasks: SortedDict[str, Stored] = SortedDict()
        self.sessions: dict[str, Seat] = {}
        self.counts: dict[State, int] = dict.fromkeys(STATES, 0)
        self.held: defaultdict[str, set[str]] = defaultdict(set)
        self.dependents: defaultdict[str, set[str]] = defaultdict(set)
        self._reserved: set[str] = set()
        self._graves: dict[str, int] = {}

    # -- feeding ----------------------------------------------------------------------------------------------------

    def put(self, task_id: str, stored: Stored) -> bool:
        """Takes in a newer record; False when it is not news."""
        before = self.tasks.get(task_id)
        if before is not None:
            if before.mod_revision >= stored.mod_revision:
                return False
            self._unlink(task_id, before)
        elif self._graves.get(task_id, 0) >= stored.mod_revision:
            return False
        self.tasks[task_id] = stored
        self._link(task_id, stored)
        self._on_change(Change(task_id, before, stored))
        if stored.task.state == "pending":
            self.on_offer(demand_of(stored.task.spec), 1)
        return True

    def forget(self, task_id: str, revision: int) -> None:
        """The task's key was deleted at that revision."""
        before = self.tasks.get(task_id)
        if before is None or before.mod_revision > revision:
            return
        self._unlink(task_id, before)
        del self.tasks[task_id]
        self._bury(task_id, revision)
        self._on_change(Change(task_id, before, None))

    def seat(self, session: str, seat: Seat) -> None:
        known = self.sessions.get(session)
        if known is not None and known.mod_revision >= seat.mod_revision:
            return
        if known is None and self._graves.get("session " + session, 0) >= seat.mod_revision:
            return
        self.sessions[session] = seat
        if known is not None and known.lease != seat.lease:
            self._on_gone(session, known.lease)

    def unseat(self, session: str, revision: int) -> None:
        """The session's key is gone since that revision: its lease lapsed, or it said bye."""
        known = self.sessions.get(session)
        if known is None or known.mod_revision > revision:
            return
        del self.sessions[session]
        self._bury("session " + session, revision)
        self._on_gone(session, known.lease)

    def breaker(self, name: str, record: bytes | None) -> None:
        """A breaker's record is this now, or gone."""
        changed = self._outages.forget(name) if record is None else self._outages.record(name, record)
        if changed:
            self._weather_changed()

    @property
    def breakers(self) -> frozenset[str]:
        """Those that are not closed."""
        return self._outages.weather.unwell

    def at(self, now_ms: int) -> None:
        """It is that late: a breaker's time may have come."""
        if self._outages.at(now_ms):
            self._weather_changed()

    @property
    def probe_due_in_s(self) -> float | None:
        """When a breaker will let a probe through, and tasks that need it may be taken."""
        return self._outages.due_in_s

    def _weather_changed(self) -> None:
        for demand in self.shelves.in_weather(self._outages.weather):
            self.on_offer(demand, self.shelves.waiting(demand))

    def _bury(self, name: str, revision: int) -> None:
        self._graves[name] = revision
        if len(self._graves) > GRAVES_MAX:
            del self._graves[next(iter(self._graves))]

    # -- questions ----------------------------------------------------------------------------------------------------

    def best(self, offer: Offer, *, spread: int = 1, pick: Callable[[int], int] | None = None) -> Pick | None:
        """The pending task to offer a session that can do this; None when there is none.

        `spread` > 1 takes one at random (`pick(n)` gives an index below n) of that many of the same priority, where
        daemons collide.
        """
        return self.shelves.best(offer, spread, pick)

    def obstacles(self, offer: Offer) -> Obstacles | None:
        """Why no pending task can be offered to such a session; None when none is pending (or one can be)."""
        return self.shelves.obstacles(offer)

    def takes(self, offer: Offer, demand: Demand) -> bool:
        """Whether a task of that demand would be offered to such a session."""
        return matching.takes(demand, offer, self._outages.weather, self.shelves.terms)

    def refuse(self, spec: TaskSpec, session: str, offer: Offer) -> None:
        """Raises `CapabilityMissing` or `BreakerOpen` unless all that must be, is."""
        weighed = matching.weigh(demand_of(spec), offer, self._outages.weather, self.shelves.terms)
        if weighed.missing or weighed.accepts:
            causes = []
            if weighed.missing:
                causes.append(f"it needs {', '.join(weighed.missing)}, which session {session} does not have")
            if weighed.accepts:
                causes.append(f"session {session} accepts only {', '.join(weighed.accepts)}")
            facts = {"labels": list(weighed.accepts)} if weighed.accepts else {}
            raise CapabilityMissing(
                f"task {spec.id} cannot be taken: {'; '.join(causes)}",
                task=spec.id,
                missing=list(weighed.missing),
                **facts,
            )
        if weighed.blocked:
            name = weighed.blocked[0]
            raise BreakerOpen(
                f"task {spec.id} needs {name}, whose breaker lets no call through now; nothing was claimed",
                breaker=name,
                probe_in_s=self._outages.probe_in_s(name),
                task=spec.id,
            )

    @property
    def pending(self) -> int:
        return self.counts["pending"]

    def all_done(self, tasks: Iterable[str]) -> bool:
        return all((known := self.tasks.get(task)) is not None and known.task.state == "done" for task in tasks)

    def waiting_for(self, tasks: Iterable[str]) -> tuple[str, ...]:
        return tuple(task for task in tasks if not self.all_done((task,)))

    def released_by(self, task_id: str) -> list[str]:
        """The blocked tasks for which this one is the last that is not done."""
        opened = []
        for dependent in sorted(self.dependents.get(task_id, ())):
            known = self.tasks[dependent]
            others = (d for d in known.task.spec.depends_on if d != task_id)
            if known.task.state == "blocked" and self.all_done(others):
                opened.append(dependent)
        return opened

    def orphans(self, session: str, incarnation_floor: int) -> Iterator[tuple[str, str]]:
        """The session's claims that it has lost, having gone or come back with another lease, or that are from before
        a restore; and why.
        """
        seat = self.sessions.get(session)
        for task_id in self.held.get(session, ()):
            task = self.tasks[task_id].task
            if seat is None or seat.lease != task.lease:
                yield task_id, "session ended"
            elif task.fence < incarnation_floor:
                yield task_id, "restored from a backup"

    # -- reserving: a task for which this daemon has a claim in flight is offered to nobody else -----------------------

    def reserve(self, task_id: str) -> bool:
        """Takes the task off its shelf; False when it is reserved already."""
        if task_id in self._reserved:
            return False
        known = self.tasks.get(task_id)
        if known is not None and known.task.state == "pending":
            self.shelves.take(task_id, known)
        self._reserved.add(task_id)
        return True

    def unreserve(self, task_id: str) -> None:
        if task_id not in self._reserved:
            return
        self._reserved.remove(task_id)
        known = self.tasks.get(task_id)
        if known is not None and known.task.state == "pending":
            self.shelves.put(task_id, known)
            self.on_offer(demand_of(known.task.spec), 1)

    # -- the indexes -------------------------------------------------------------------------------------------------

    def _link(self, task_id: str, stored: Stored) -> None:
        task = stored.task
        self.counts[task.state] += 1
        if task.state == "claimed":
            self.held[task.session].add(task_id)
        elif task.state == "pending" and task_id not in self._reserved:
            self.shelves.put(task_id, stored)
        for other in task.spec.depends_on:
            self.dependents[other].add(task_id)

    def _unlink(self, task_id: str, stored: Stored) -> None:
        task = stored.task
        self.counts[task.state] -= 1
        if task.state == "claimed":
            _discard(self.held, task.session, task_id)
        elif task.state == "pending" and task_id not in self._reserved:
            self.shelves.take(task_id, stored)
        for other in task.spec.depends_on:
            _discard(self.dependents, other, task_id)


def _discard(index: defaultdict[str, set[str]], key: str, member: str) -> None:
    members = index[key]
    members.discard(member)
    if not members:
        del index[key]
