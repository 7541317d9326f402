"""Ending a claim: by its holder, under its fence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ifabric.actor.base import Caller
from ifabric.store.base import Delete, Put, leased
from ifabric.wire import coordinator as wire
from ifabric.wire.envelope import encode
from ifabric.wire.governor import claim_hold
from ifabric_actors.coordinator import records, rules
from ifabric_actors.coordinator.desk import Plan, Write
from ifabric_actors.coordinator.office import Office, reply_of
from ifabric_actors.coordinator.records import Stored, Task
from ifabric_actors.governor import records as money

#: blocked tasks that a completion opens in its own transaction; more of them follow right behind it
UNBLOCK_MAX = 60


class Endings:
    """Carries out `release`, `complete` and `fail`."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._board, self._desk, self._store, self._clock = office.board, office.desk, office.store, office.clock

    async def release(self, message: wire.Release, caller: Caller) -> Any:
        def decide(stored: Stored, now: int) -> tuple[Task, Any]:
            task = rules.released(stored.task, reason=message.reason, now=now, request=message.request_id or "")
            return task, wire.StateReply(state=task.state)

        return await self._end(message, caller, decide)

    async def fail(self, message: wire.Fail, caller: Caller) -> Any:
        def decide(stored: Stored, now: int) -> tuple[Task, Any]:
            task = rules.failed(
                stored.task, error=message.error, retry=message.retry, now=now, request=message.request_id or ""
            )
            return task, wire.FailReply(state=task.state, attempt=task.attempt, max_attempts=task.spec.max_attempts)

        return await self._end(message, caller, decide)

    async def complete(self, message: wire.Complete, caller: Caller) -> Any:
        result = encode(message.result) if message.result is not None else b""
        rules.refuse_large_result(message.task, len(result))
        others = (Put(records.RESULTS + message.task.encode(), result),) if result else ()
        opened: list[str] = []

        def decide(stored: Stored, now: int) -> tuple[Task, Any]:
            task = rules.completed(stored.task, result=bool(result), now=now, request=message.request_id or "")
            opened[:] = self._board.released_by(message.task)
            return task, wire.CompleteReply(state="done", unblocked=tuple(opened))

        def opens(now: int) -> tuple[Write, ...]:
            writes = []
            for task_id in opened[:UNBLOCK_MAX]:
                known = self._board.tasks[task_id]
                task = rules.unblocked(known.task, by=message.task, now=now)
                writes.append(Write(task_id, task, known.mod_revision, known.create_revision))
            return tuple(writes)

        return await self._end(message, caller, decide, others, opens)

    async def _end(
        self,
        message: wire.Release | wire.Complete | wire.Fail,
        caller: Caller,
        decide: Callable[[Stored, int], tuple[Task, Any]],
        others: tuple[Put, ...] = (),
        opens: Callable[[int], tuple[Write, ...]] | None = None,
    ) -> Any:
        """Ends the caller's claim under its fence, or raises `ClaimLost`."""
        purse = self._office.purse
        cost, usage = (None, None) if isinstance(message, wire.Release) else (message.cost_micro_usd, message.usage)
        ended = await purse.ended.current() if self._has_money(message, cost) else 0

        def plan() -> Plan:
            stored = self._office.known(message.task)
            task = stored.task
            seat = self._board.sessions.get(caller.session)
            rules.check_holder(task, caller.session, message.fence, seat=seat, incarnation=self._office.incarnation)
            assert seat is not None
            now = self._clock.wall_ms()
            after, reply = decide(stored, now)
            compares = [leased(records.session_key(caller.session), seat.lease)]
            ends: tuple[Put | Delete, ...] = others
            if task.deadline_lease:
                compares.append(leased(records.deadline_key(message.task), task.deadline_lease))
                ends = (*others, Delete(records.deadline_key(message.task)))
                if self._office.deadlines.get(message.task) != task.deadline_lease:
                    raise rules.deadline_lost(task)
            writes: tuple[Write, ...] = (Write(message.task, after, stored.mod_revision, stored.create_revision),)
            payment = purse.ending(
                stored,
                f"its task was {after.history[-1].event}",
                ended,
                cost=cost,
                usage=usage,
                seat=seat,
                request=message.request_id or "",
            )
            writes += opens(now) if opens is not None else ()
            return Plan(reply, writes, tuple(compares), ends, payment=payment)

        also: tuple[bytes, ...] = (records.deadline_key(message.task),)
        if ended:
            also = (*also, money.hold_key(caller.session, claim_hold(message.task, message.fence)))
        return reply_of(await self._desk.transact(caller, message, (message.task,), plan, also))

    def _has_money(self, message: wire.Release | wire.Complete | wire.Fail, cost: int | None) -> bool:
        """Whether the end of this claim may end a hold, or charge something."""
        stored = self._board.tasks.get(message.task)
        return cost is not None or stored is None or stored.task.hold is not None
