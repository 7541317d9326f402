"""What operators do to tasks, under ``if.v1.admin``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ifabric.actor.base import Caller
from ifabric.store.base import Delete
from ifabric.wire import coordinator as wire
from ifabric_actors.coordinator import records, rules
from ifabric_actors.coordinator.desk import Committed, Plan, Write
from ifabric_actors.coordinator.money import hold_key
from ifabric_actors.coordinator.office import Office, reply_of
from ifabric_actors.coordinator.records import Task


class Operators:
    """Carries out `cancel`, `requeue` and `purge`."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._board, self._desk, self._store, self._clock = office.board, office.desk, office.store, office.clock

    async def cancel(self, message: wire.Cancel, caller: Caller) -> Any:
        def decide(task: Task, now: int) -> Task:
            return rules.cancelled(task, operator=caller.session, now=now, request=message.request_id or "")

        return await self._operate(message, caller, decide)

    async def requeue(self, message: wire.Requeue, caller: Caller) -> Any:
        def decide(task: Task, now: int) -> Task:
            blocked = not self._board.all_done(task.spec.depends_on)
            return rules.requeued(
                task, blocked=blocked, operator=caller.session, now=now, request=message.request_id or ""
            )

        return await self._operate(message, caller, decide)

    async def purge(self, message: wire.Purge, caller: Caller) -> Any:
        name = message.task.encode()

        def plan() -> Plan:
            stored = self._office.known(message.task)
            dependents = self._board.dependents.get(message.task, ())
            waiting = [t for t in dependents if self._board.tasks[t].task.state == "blocked"]
            rules.refuse_purge(stored.task, needed_by=waiting)
            key = records.task_key(message.task)
            gone = tuple(Delete(prefix + name) for prefix in (records.TASKS, records.PAYLOADS, records.RESULTS))
            reply = wire.StateReply(state=stored.task.state)
            return Plan(reply, compares=(records.as_seen(key, stored),), others=gone)

        done = await self._desk.transact(caller, message, (message.task,), plan)
        if isinstance(done, Committed):
            self._board.forget(message.task, done.revision)
        return reply_of(done)

    async def _operate(self, message: Any, caller: Caller, decide: Callable[[Task, int], Task]) -> Any:
        purse = self._office.purse
        ended = await purse.ended.current()
        also: dict[bytes, None] = {}

        def plan() -> Plan:
            stored = self._office.known(message.task)
            task = decide(stored.task, self._clock.wall_ms())
            write = Write(message.task, task, stored.mod_revision, stored.create_revision)
            payment = None
            if stored.task.hold is not None:
                also[hold_key(stored.task)] = None
                payment = purse.ending(stored, "its task was cancelled", ended)
            return Plan(wire.StateReply(state=task.state), (write,), payment=payment)

        return reply_of(await self._desk.transact(caller, message, (message.task,), plan, also))
