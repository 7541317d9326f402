"""The claim that a run is for: whether its holder still holds it, and for how long.

A run under a claim may last as long as the claim: it ends when another holds the task, when the session's lease has
gone, and, if etcd cannot be asked, when the lease that was last seen would have run out. Whoever renews its claim
moves that end; so the deadline of a run is the tighter of its own limit and what is left of the claim, at every moment.
"""

from __future__ import annotations

import msgspec

from ifabric.clock import Clock
from ifabric.errors import ClaimLost, FabricError, UnknownTask
from ifabric.store.base import Get, Got, Store, Txn, record
from ifabric_actors.chassis.pool import Job
from ifabric_actors.coordinator import records

#: how often a claim is looked at, at most; and at least, as a share of what it has left
LOOK_S, LOOK_SHARE = 2.0, 1 / 3
_tasks = msgspec.json.Decoder(records.Task)


class Standing:
    """One claim, of the session that asks for a run."""

    def __init__(self, store: Store, clock: Clock, session: str, task: str, fence: int) -> None:
        self._store, self._clock = store, clock
        self._session, self._task, self._fence = session, task, fence
        #: on the clock's scale: until then the claim is believed
        self._until = 0.0

    async def check(self) -> float:
        """The seconds that the claim has left. `ClaimLost` when it is not held any more, `UnknownTask`, `Unavailable`."""
        asked = self._clock.monotonic()
        reads = (Get(records.task_key(self._task)), Get(records.session_key(self._session)))
        task, session = (await self._store.txn(Txn((), reads))).answers
        assert isinstance(task, Got)
        assert isinstance(session, Got)
        if not task.kvs:
            raise UnknownTask(f"there is no task {self._task}; nothing was run", task=self._task)
        found = record(_tasks, task.kvs[0])
        held = found.state == "claimed" and found.session == self._session and found.fence == self._fence
        if not held or not session.kvs or session.kvs[0].lease != found.lease:
            by = found.session if found.state == "claimed" and found.session != self._session else None
            raise ClaimLost(
                f"the claim of {self._task} with fence {self._fence} is not held by {self._session} any more; "
                "the run was ended or not started",
                task=self._task, by=by, fence=found.fence,
            )  # fmt: skip
        left_s = await self._store.left(found.lease)
        if left_s <= 0:
            raise ClaimLost(f"the session's lease has run out under the claim of {self._task}", task=self._task)
        self._until = asked + left_s
        return left_s

    async def ask(self) -> None:
        """`check`, for who only wants to know that it is held."""
        await self.check()

    async def hold_to(self, job: Job) -> None:
        """Ends the run when the claim ends. Never returns before that."""
        while True:
            left_s = self._until - self._clock.monotonic()
            await self._clock.sleep(max(0.05, min(LOOK_S, left_s * LOOK_SHARE)))
            try:
                await self.check()
            except (ClaimLost, UnknownTask) as lost:
                job.end(lost)
                return
            except FabricError:
                if self._clock.monotonic() >= self._until:
                    job.end(ClaimLost(
                        f"etcd could not be asked for so long that the claim of {self._task} may have run out",
                        task=self._task, fence=self._fence,
                    ))  # fmt: skip
                    return
