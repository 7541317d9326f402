"""The board: what this daemon knows of tasks and sessions, arranged for the questions it is asked.

A mirror of etcd, fed by the watch and by the daemon's own commits; it can be thrown away at any time. It may be a
moment behind, so nothing is granted on its word alone (the commit compares) and nothing refused on it without a look
at etcd. Pure bookkeeping: no waiting.

Pending tasks are kept in one sorted list for each *demand* (what they need and want). A session is offered the best
head among the demands it can meet: highest priority first, then most wishes met, then oldest. With few demands, which
is the rule, that is a handful of comparisons however many tasks are pending.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict, SortedKeyList

from ifabric.wire.coordinator import STATES, State
from ifabric_actors.coordinator.records import Seat, Stored, Task

#: deletions remembered, so that a late read cannot bring a key back
GRAVES_MAX = 10_000


class Demand(NamedTuple):
    """What a group of pending tasks asks of a session."""

    needs: frozenset[str]
    wants: frozenset[str]


class Change(NamedTuple):
    """A task was put (or, with `after` None, forgotten)."""

    task_id: str
    before: Stored | None
    after: Stored | None


def _rank(entry: tuple[int, int, int, str]) -> tuple[int, int, int]:
    return entry[:3]


class Board:
    """Tasks, sessions and the indexes between them. `on_change` and `on_gone` are told what changed."""

    def __init__(self, on_change: Callable[[Change], None], on_gone: Callable[[str, int], None]) -> None:
        self._on_change = on_change
        self._on_gone = on_gone
        #: what this daemon is committing right now, as bytes and as a record: its echo from the watch need not be read
        self.expected: dict[str, tuple[bytes, Task]] = {}
        self.tasks: SortedDict[str, Stored] = SortedDict()
        self.sessions: dict[str, Seat] = {}
        self.counts: dict[State, int] = dict.fromkeys(STATES, 0)
        self.held: defaultdict[str, set[str]] = defaultdict(set)
        self.dependents: defaultdict[str, set[str]] = defaultdict(set)
        self._pending: dict[Demand, SortedKeyList[tuple[int, int, int, str]]] = {}
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

    def _bury(self, name: str, revision: int) -> None:
        self._graves[name] = revision
        if len(self._graves) > GRAVES_MAX:
            del self._graves[next(iter(self._graves))]

    # -- questions ----------------------------------------------------------------------------------------------------

    def best(
        self, capabilities: frozenset[str], *, spread: int = 1, pick: Callable[[int], int] | None = None
    ) -> str | None:
        """The pending task to offer a session with these capabilities; None when there is none.

        `spread` > 1 takes one at random (`pick(n)` gives an index below n) of that many of the same priority, where
        daemons collide.
        """
        best: tuple[int, float, int, int] | None = None
        best_list: SortedKeyList[tuple[int, int, int, str]] | None = None
        for demand, entries in self._pending.items():
            if demand.needs <= capabilities:
                low_priority, created, order, _ = entries[0]
                met = -len(demand.wants & capabilities) / len(demand.wants) if demand.wants else 0.0
                rank = (low_priority, met, created, order)
                if best is None or rank < best:
                    best, best_list = rank, entries
        if best_list is None:
            return None
        if spread > 1 and pick is not None:
            peers = best_list.bisect_key_right((best_list[0][0], 2**63, 0))
            return str(best_list[pick(min(spread, peers))][3])
        return str(best_list[0][3])

    def missing(self, capabilities: frozenset[str]) -> list[str]:
        """The fewest capabilities that would open a pending task to the session; [] when nothing is pending."""
        lacks = [demand.needs - capabilities for demand in self._pending]
        return min((sorted(lack) for lack in lacks), key=len, default=[])

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

    def page(self, state: State | None, after: str | None, limit: int) -> tuple[list[tuple[str, Stored]], bool]:
        """Up to `limit` tasks in the order of their ids, and whether there are more."""
        found: list[tuple[str, Stored]] = []
        for task_id in self.tasks.irange(minimum=after, inclusive=(False, True)):
            stored = self.tasks[task_id]
            if state is None or stored.task.state == state:
                if len(found) == limit:
                    return found, True
                found.append((task_id, stored))
        return found, False

    # -- reserving: a task for which this daemon has a claim in flight is offered to nobody else -----------------------

    def reserve(self, task_id: str) -> bool:
        """Takes the task off its shelf; False when it is reserved already."""
        if task_id in self._reserved:
            return False
        known = self.tasks.get(task_id)
        if known is not None and known.task.state == "pending":
            self._shelve(task_id, known, put=False)
        self._reserved.add(task_id)
        return True

    def unreserve(self, task_id: str) -> None:
        if task_id not in self._reserved:
            return
        self._reserved.remove(task_id)
        known = self.tasks.get(task_id)
        if known is not None and known.task.state == "pending":
            self._shelve(task_id, known, put=True)

    # -- the indexes -------------------------------------------------------------------------------------------------

    def _link(self, task_id: str, stored: Stored) -> None:
        task = stored.task
        self.counts[task.state] += 1
        if task.state == "claimed":
            self.held[task.session].add(task_id)
        elif task.state == "pending" and task_id not in self._reserved:
            self._shelve(task_id, stored, put=True)
        for other in task.spec.depends_on:
            self.dependents[other].add(task_id)

    def _unlink(self, task_id: str, stored: Stored) -> None:
        task = stored.task
        self.counts[task.state] -= 1
        if task.state == "claimed":
            _discard(self.held, task.session, task_id)
        elif task.state == "pending" and task_id not in self._reserved:
            self._shelve(task_id, stored, put=False)
        for other in task.spec.depends_on:
            _discard(self.dependents, other, task_id)

    def _shelve(self, task_id: str, stored: Stored, *, put: bool) -> None:
        spec = stored.task.spec
        demand = Demand(frozenset(spec.needs), frozenset(spec.wants))
        entry = (-spec.priority, stored.create_revision, stored.task.order, task_id)
        entries = self._pending.get(demand)
        if put:
            if entries is None:
                entries = self._pending[demand] = SortedKeyList(key=_rank)
            entries.add(entry)
        else:
            assert entries is not None, "a pending task is on its shelf"
            entries.remove(entry)
            if not entries:
                del self._pending[demand]


def _discard(index: defaultdict[str, set[str]], key: str, member: str) -> None:
    members = index[key]
    members.discard(member)
    if not members:
        del index[key]
