"""Who is there, what they hold and what is pending, as the governor needs to know it: two takers.

They see every write of every task, so a record is decoded in part only, and what tasks ask for is kept by demand and
not by task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from ifabric.errors import Internal
from ifabric.store.base import KV
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.records import Seat
from ifabric_actors.governor import matching
from ifabric_actors.governor.matching import Demand, Offer


class Held(NamedTuple):
    """A live claim: whose, under which fence and session lease, and at which modification of the task's record."""

    session: str
    fence: int
    lease: int
    mod_revision: int


class Group(NamedTuple):
    """Sessions that offer the same, and a number that grows with every group."""

    number: int
    sessions: dict[str, None]


class Sessions:
    """Live sessions. `on_gone` is told (session, its lease) when one ends or comes back with another lease."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        #: those that can do the same; the offer that is there for the shortest time comes last
        self.offers: dict[Offer, Group] = {}
        #: another one whenever an offer comes or goes
        self.version = 0
        self._numbers = 0
        self.on_gone: Callable[[str, int], None] = lambda _session, _lease: None

    def take(self, kv: KV) -> Seat:
        session, seat = kv.key[len(records.SESSIONS) :].decode(), records.seat(kv)
        before = self.seats.get(session)
        self.seats[session] = seat
        offer = seat.offer
        if before is None or before.offer != offer:
            if before is not None:
                self._leave(session, before.offer)
            group = self.offers.get(offer)
            if group is None:
                self._numbers += 1
                self.version += 1
                group = self.offers[offer] = Group(self._numbers, {})
            group.sessions[session] = None
        if before is not None and before.lease != seat.lease:
            self.on_gone(session, before.lease)
        return seat

    def gone(self, key: bytes, revision: int) -> None:
        session = key[len(records.SESSIONS) :].decode()
        before = self.seats.pop(session, None)
        if before is not None:
            self._leave(session, before.offer)
            self.on_gone(session, before.lease)

    def _leave(self, session: str, offer: Offer) -> None:
        sessions = self.offers[offer].sessions
        del sessions[session]
        if not sessions:
            del self.offers[offer]
            self.version += 1

    def known(self) -> Iterable[bytes]:
        return map(records.session_key, self.seats)


class _Spec(msgspec.Struct, frozen=True, gc=False):
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


class _Task(msgspec.Struct, frozen=True, gc=False):
    """What is read of a task's record."""

    state: str
    spec: _Spec
    session: str = ""
    fence: int = 0
    lease: int = 0


_tasks = msgspec.json.Decoder(_Task)


class Tasks:
    """Claims and pending tasks. `on_ended` is told (task, fence) when a claim has ended."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        #: the pending tasks of each demand, oldest news first
        self.pending: dict[Demand, dict[str, None]] = {}
        self._demands: dict[str, Demand] = {}
        self._claims: dict[str, int] = {}
        self.on_ended: Callable[[str, int], None] = lambda _task, _fence: None

    def claims_of(self, session: str) -> int:
        """How many claims it holds."""
        return self._claims.get(session, 0)

    def take(self, kv: KV) -> Any:
        try:
            task = _tasks.decode(kv.value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Internal(f"the record {kv.key.decode(errors='replace')} is damaged: {error}") from error
        self._now(kv.key[len(records.TASKS) :].decode(), task, kv.mod_revision)
        return task

    def gone(self, key: bytes, revision: int) -> None:
        self._now(key[len(records.TASKS) :].decode(), None, revision)

    def known(self) -> Iterable[bytes]:
        return map(records.task_key, (*self.held, *self._demands))

    def _now(self, task_id: str, task: _Task | None, mod_revision: int) -> None:
        """The task is this now (None: there is none)."""
        before = self._demands.pop(task_id, None)
        if before is not None:
            group = self.pending[before]
            del group[task_id]
            if not group:
                del self.pending[before]
        held = self.held.pop(task_id, None)
        if task is not None and task.state == "claimed":
            self.held[task_id] = Held(task.session, task.fence, task.lease, mod_revision)
            self._claims[task.session] = self._claims.get(task.session, 0) + 1
        elif task is not None and task.state == "pending":
            demand = matching.demand(task.spec.needs, task.spec.wants, task.spec.labels)
            self._demands[task_id] = demand
            self.pending.setdefault(demand, {})[task_id] = None
        if held is not None:
            left = self._claims[held.session] - 1
            if left:
                self._claims[held.session] = left
            else:
                del self._claims[held.session]
            if task is None or task.state != "claimed" or task.fence != held.fence:
                self.on_ended(task_id, held.fence)
