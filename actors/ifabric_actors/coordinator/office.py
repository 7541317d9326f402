"""What the coordinator's clerks share: the board, the desk, and a few questions that all of them ask."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from ifabric.actor.base import Caller
from ifabric.actor.feed import Feed
from ifabric.bus.base import Bus
from ifabric.clock import Clock
from ifabric.errors import SessionLost, UnknownTask
from ifabric.store.base import Store
from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.desk import Committed, Desk, Replayed
from ifabric_actors.coordinator.money import Purse
from ifabric_actors.coordinator.records import Seat, Stored, Task
from ifabric_actors.identity.records import Agent


@dataclass(kw_only=True)
class Office:
    """One coordinator's shared parts."""

    store: Store
    bus: Bus
    clock: Clock
    board: Board
    desk: Desk
    purse: Purse
    feed: Feed
    incarnation: int
    ttl_s: int
    #: what is known of an agent; None where there are no identities
    agent_of: Callable[[str], Awaitable[Agent | None]] | None
    #: task -> lease of the claim's own deadline, while that lives
    deadlines: dict[str, int]

    async def seat(self, caller: Caller) -> Seat:
        """The caller's session. Raises `SessionLost` once etcd has confirmed it."""
        seat = self.board.sessions.get(caller.session)
        if seat is None:
            kv = await self.store.get(records.session_key(caller.session))
            if kv is None:
                raise SessionLost(session=caller.session)
            seat = records.seat(kv)
            self.board.seat(caller.session, seat)
        return seat

    def known(self, task_id: str) -> Stored:
        """The task on the board. Raises `UnknownTask`."""
        stored: Stored | None = self.board.tasks.get(task_id)
        if stored is None:
            raise UnknownTask(f"there is no task {task_id}", task=task_id)
        return stored

    async def payload(self, task: Task) -> bytes:
        """The task's payload as JSON; b"" when it has none."""
        if not task.payload:
            return b""
        kv = await self.store.get(records.PAYLOADS + task.spec.id.encode())
        return kv.value if kv is not None else b""


def with_payload(task: Task, payload: bytes) -> TaskSpec:
    """The spec as it was submitted."""
    if not payload:
        return task.spec
    return msgspec.structs.replace(task.spec, payload=msgspec.json.decode(payload))


def reply_of(done: Committed | Replayed) -> Any:
    return done.reply if isinstance(done, Replayed) else done.plan.reply
