"""What happens without anybody asking: claims expire, tasks are unblocked.

The watch says at once that a session's key has gone; a slow pass over the claims finds whatever the watch's moment
missed (the daemon that saw it died, a restart, a restore). Several daemons see the same: each waits a little, at
random, looks again, and the compare lets one of them win. An expiry compares in etcd that the lease is really gone,
so a board that is behind cannot rob a live holder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from ifabric.errors import FabricError
from ifabric.metrics import Metrics
from ifabric.store.base import Compare, Op, Target
from ifabric_actors.coordinator import records, rules
from ifabric_actors.coordinator.board import Change
from ifabric_actors.coordinator.desk import Write
from ifabric_actors.coordinator.office import Office

#: daemons that see the same expiry wait up to this long, so that one of them usually does it alone
STAGGER_S = 0.1
AT_ONCE_MAX = 64
#: claims that a pass looks at before it lets requests through, and for how long
SLICE, SLICE_PAUSE_S = 500, 0.001
OWNER = " sweeper"


class Sweeper:
    """Expires claims and unblocks tasks, on the word of the watch and every `reconcile_s`."""

    def __init__(self, office: Office, metrics: Metrics, *, reconcile_s: float) -> None:
        self._board, self._desk, self._clock = office.board, office.desk, office.clock
        self._deadlines, self._purse = office.deadlines, office.purse
        self._reconcile_s = reconcile_s
        self._floor = office.incarnation * rules.GENERATIONS
        self._expire: dict[str, None] = {}
        self._unblock: dict[str, None] = {}
        self._work = asyncio.Event()
        self._expired = metrics.counter("if_coordinator_expired_total")

    # -- told by the board (must not wait) ---------------------------------------------------------------------------

    def session_gone(self, session: str, lease: int) -> None:
        for task_id in self._board.held.get(session, ()):
            if self._board.tasks[task_id].task.lease == lease:
                self._expire[task_id] = None
        if self._expire:
            self._work.set()

    def task_changed(self, change: Change) -> None:
        """A task that got done may open others; a task that arrived blocked may have nothing left to wait for."""
        if change.after is None:
            return
        task = change.after.task
        if task.state == "done" and (change.before is None or change.before.task.state != "done"):
            candidates: Iterable[str] = self._board.released_by(change.task_id)
        elif task.state == "blocked" and self._board.all_done(task.spec.depends_on):
            candidates = (change.task_id,)
        else:
            return
        for task_id in candidates:
            self._unblock[task_id] = None
        if self._unblock:
            self._work.set()

    def deadline_passed(self, task_id: str) -> None:
        """Also told when a claim ended in time and its deadline with it: then there is nothing to expire."""
        self._expire[task_id] = None
        self._work.set()

    # -- the tasks of the actor --------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Never returns. Raises what makes the actor start again."""
        while True:
            await self._work.wait()
            self._work.clear()
            await self._clock.sleep(self._clock.jitter(0.0, STAGGER_S))
            unblock, self._unblock = list(self._unblock), {}
            expire, self._expire = list(self._expire), {}
            await self._each(self._unblock_one, unblock)
            await self._each(self._expire_one, expire)

    async def reconcile(self) -> None:
        """Never returns: looks at every claim now and then, whatever the watch said; a little at a time, since a pass
        over a hundred thousand claims would keep every request waiting.
        """
        while True:
            looked = 0
            for session in tuple(self._board.held):
                self._look_at(session)
                looked += len(self._board.held.get(session, ()))
                if looked >= SLICE:
                    looked = 0
                    await self._clock.sleep(SLICE_PAUSE_S)
            if self._expire or self._unblock:
                self._work.set()
            await self._clock.sleep(self._reconcile_s)

    def _look_at(self, session: str) -> None:
        for task_id, _ in self._board.orphans(session, self._floor):
            self._expire[task_id] = None
        for task_id in self._board.held.get(session, ()):
            lease = self._board.tasks[task_id].task.deadline_lease
            if lease and self._deadlines.get(task_id) != lease:
                self._expire[task_id] = None

    @staticmethod
    async def _each(act: Callable[[str], Awaitable[None]], task_ids: list[str]) -> None:
        for at in range(0, len(task_ids), AT_ONCE_MAX):
            await asyncio.gather(*(act(task_id) for task_id in task_ids[at : at + AT_ONCE_MAX]))

    async def _expire_one(self, task_id: str) -> None:
        while (stored := self._board.tasks.get(task_id)) is not None and stored.task.state == "claimed":
            task = stored.task
            seat = self._board.sessions.get(task.session)
            if seat is None or seat.lease != task.lease:
                why, gone = (
                    "session ended",
                    Compare(records.session_key(task.session), Target.LEASE, Op.NOT_EQUAL, task.lease),
                )
            elif task.deadline_lease and self._deadlines.get(task_id) != task.deadline_lease:
                why, gone = (
                    "deadline passed",
                    Compare(records.deadline_key(task_id), Target.LEASE, Op.NOT_EQUAL, task.deadline_lease),
                )
            elif task.fence < self._floor:
                why, gone = "restored from a backup", None
            else:
                return
            write = Write(
                task_id,
                rules.expired(task, why=why, now=self._clock.wall_ms()),
                stored.mod_revision,
                stored.create_revision,
            )
            try:
                payment = None
                if task.hold is not None:
                    payment = self._purse.ending(stored, "its claim expired", await self._purse.ended.current())
                known = self._purse.endings_seen
                if await self._desk.write(OWNER, write, (gone,) if gone else (), payment):
                    self._expired.inc()
                    return
            except FabricError:
                return  # the next pass tries again
            if self._board.tasks.get(task_id) is stored and self._purse.endings_seen == known:
                return  # it was the lease that is not gone: the board will hear

    async def _unblock_one(self, task_id: str) -> None:
        while (stored := self._board.tasks.get(task_id)) is not None and stored.task.state == "blocked":
            if not self._board.all_done(stored.task.spec.depends_on):
                return
            task = rules.unblocked(stored.task, by="", now=self._clock.wall_ms())
            write = Write(task_id, task, stored.mod_revision, stored.create_revision)
            try:
                if await self._desk.write(OWNER, write):
                    return
            except FabricError:
                self._unblock[task_id] = None  # picked up with the next work, at the latest by the next reconcile
                return
