"""Sessions: who is there, and what they hold. One lease each, kept by `renew`."""

from __future__ import annotations

from typing import Any

import msgspec

from ifabric.actor.base import Caller
from ifabric.clock import rfc3339
from ifabric.errors import Overloaded, SessionLost
from ifabric.store.base import Delete, Put, absent, leased
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import MSG_ID_HEADER, encode
from ifabric_actors.coordinator import records, rules
from ifabric_actors.coordinator.desk import TRIES_MAX, Committed, Plan, Write
from ifabric_actors.coordinator.office import Office, reply_of
from ifabric_actors.coordinator.records import Seat, Session, Task
from ifabric_actors.identity import rules as identity

#: how a claim ends; `expired` also names the holder, but is not its doing, and `cancelled` names the operator, who may
#: go by the holder's session
_ENDS = ("completed", "failed", "released", "expired", "cancelled")


class Sessions:
    """Carries out `hello`, `renew` and `bye`."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._board, self._desk, self._store, self._clock = office.board, office.desk, office.store, office.clock

    async def hello(self, message: wire.Hello, caller: Caller) -> Any:
        ttl_s = message.ttl_s or self._office.ttl_s
        message = await self._as_its_agent(message, caller)
        fresh = 0

        def decide() -> Plan:
            seat = self._board.sessions.get(caller.session)
            session = Session(
                ttl_s=seat.session.ttl_s if seat is not None else ttl_s,
                capabilities=message.capabilities,
                accepts=message.accepts,
                account=message.account,
                at=self._clock.wall_ms(),
            )
            key = records.session_key(caller.session)
            lease = seat.lease if seat is not None else fresh
            condition = leased(key, lease) if seat is not None else absent(key)
            reply = wire.HelloReply(
                session=caller.session,
                ttl_s=session.ttl_s,
                incarnation=self._office.incarnation,
                account=message.account,
            )
            return Plan(reply, compares=(condition,), others=(Put(key, records.encode(session), lease),))

        if caller.session not in self._board.sessions:
            await self._desk.look(caller, message, ())
        done = None
        for _ in range(TRIES_MAX):
            if caller.session not in self._board.sessions and not fresh:
                fresh = await self._store.grant(ttl_s)
            done = await self._desk.attempt(caller, message, decide(), ())
            if done is not None:
                break
        if isinstance(done, Committed):
            put = done.plan.others[0]
            assert isinstance(put, Put)
            session = msgspec.json.decode(put.value, type=Session)
            # the lease that was committed: while one was granted, another hello may have registered the session
            self._board.seat(caller.session, Seat(session, put.lease, done.revision, frozenset(session.capabilities)))
            if put.lease != fresh:
                await self._store.keep_alive(put.lease)
                if fresh:
                    await self._store.revoke(fresh)
            return done.plan.reply
        if fresh:
            await self._store.revoke(fresh)
        if done is None:
            raise Overloaded(f"hello lost {TRIES_MAX} races; nothing was done", what="contention")
        return done.reply

    async def _as_its_agent(self, message: wire.Hello, caller: Caller) -> wire.Hello:
        """With the account and the capabilities that the session's agent was given. Raises `Forbidden`."""
        if self._office.agent_of is None:
            return message
        agent = await self._office.agent_of(caller.session)
        return msgspec.structs.replace(
            message,
            account=identity.account_for(caller.session, message.account, agent),
            capabilities=identity.capabilities_for(caller.session, message.capabilities, agent),
        )

    async def renew(self, message: wire.Renew, caller: Caller) -> wire.RenewReply:
        seat = await self._office.seat(caller)
        ttl_s = await self._store.keep_alive(seat.lease)
        if ttl_s <= 0:
            raise SessionLost(session=caller.session)
        board, session = self._board, caller.session
        named = {held.task: held.fence for held in message.claims}
        doubtful = [task for task, fence in named.items() if not self._is_held(task, session, fence)]
        unnamed = [task for task in board.held.get(session, ()) if task not in named]
        if doubtful or unnamed:
            await self._desk.learn_tasks((*doubtful, *unnamed), session)
        lost: list[wire.HeldClaim] = []
        cancelled: list[wire.HeldClaim] = []
        for held in message.claims:
            if not self._is_held(held.task, session, held.fence):
                known = board.tasks.get(held.task)
                if known is not None and known.task.fence == held.fence and _ended_by(known.task, session):
                    continue
                off = known is not None and known.task.state == "cancelled" and known.task.fence == held.fence
                (cancelled if off else lost).append(held)
        for held in lost:
            await self._tell_renew_lost(session, held)
        return wire.RenewReply(
            ttl_s=ttl_s,
            lost=tuple(lost),
            cancelled=tuple(cancelled),
            unnamed=tuple(
                wire.HeldClaim(task, board.tasks[task].task.fence)
                for task in unnamed
                if task in board.held.get(session, ())
            ),
        )

    async def _tell_renew_lost(self, session: str, held: wire.HeldClaim) -> None:
        """An event, if there was such a claim: anybody may ask about any."""
        known = self._board.tasks.get(held.task)
        if known is None or not any(
            (entry.session, entry.fence) == (session, held.fence) for entry in known.task.history
        ):
            return
        event = wire.TaskEvent(
            event="renew_lost",
            at=rfc3339(self._clock.wall_ms()),
            revision=self._office.feed.revision,
            task=held.task,
            state=known.task.state,
            session=session,
            fence=held.fence,
        )
        message_id = f"renew_lost/{held.task}@{held.fence}"
        await self._office.bus.publish(subjects.event("task", "renew_lost"), encode(event), {MSG_ID_HEADER: message_id})

    async def bye(self, message: wire.Bye, caller: Caller) -> Any:
        replay = await self._desk.look(caller, message, ())
        if replay is not None:
            return replay.reply
        gone: list[str] = []
        while True:
            seat = self._board.sessions.get(caller.session)
            key = records.session_key(caller.session)
            others: tuple[Delete, ...] = ()
            if seat is not None:
                await self._office.feed.settle()
                held = sorted(self._board.held.get(caller.session, ()))
                gone += [task_id for task_id in held if await self._give_back(caller.session, seat, task_id)]
                condition, others = leased(key, seat.lease), (Delete(key),)
            else:  # its receipt still keeps a duplicate from ending the session's next life
                condition = absent(key)
            plan = Plan(wire.ByeReply(released=tuple(gone)), compares=(condition,), others=others)
            done = await self._desk.attempt(caller, message, plan, ())
            if done is not None:
                break
        if isinstance(done, Committed) and seat is not None:
            self._board.unseat(caller.session, done.revision)
            await self._store.revoke(seat.lease)
        return reply_of(done)

    async def _give_back(self, session: str, seat: Seat, task_id: str) -> bool:
        purse = self._office.purse
        while (stored := self._board.tasks.get(task_id)) is not None and rules.holds(stored.task, session, seat):
            task = rules.released(stored.task, reason="bye", now=self._clock.wall_ms())
            payment = None
            if stored.task.hold is not None:
                payment = purse.ending(stored, "its session said bye", await purse.ended.current())
            write = Write(task_id, task, stored.mod_revision, stored.create_revision)
            if await self._desk.write(session, write, payment=payment):
                return True
        return False

    def _is_held(self, task_id: str, session: str, fence: int) -> bool:
        stored = self._board.tasks.get(task_id)
        if stored is None:
            return False
        task: Task = stored.task
        if fence // rules.GENERATIONS != self._office.incarnation:
            return (
                False  # of before a restore: every write with it is refused, and the sweeper is about to free the task
            )
        return task.state == "claimed" and task.session == session and task.fence == fence


def _ended_by(task: Task, session: str) -> bool:
    """Whether the last claim was ended by its holder, whose renewal crossed its own completion on the way."""
    last = next((entry for entry in reversed(task.history) if entry.fence == task.fence and entry.event in _ENDS), None)
    return last is not None and last.session == session and last.event not in ("expired", "cancelled")
