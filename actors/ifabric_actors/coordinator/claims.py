"""Giving tasks out: by id (`claim`), or the best one there is (`next`)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ifabric.actor.base import Caller
from ifabric.errors import BudgetShort, ClaimTaken, FabricError, NoTaskMatches, SessionLost, UnknownTask
from ifabric.metrics import Metrics
from ifabric.store.base import Get, Got, Put, leased
from ifabric.wire import coordinator as wire
from ifabric.wire.envelope import Mutation
from ifabric_actors.coordinator import records, rules
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.desk import Committed, Plan, Replayed, Write
from ifabric_actors.coordinator.office import Office, with_payload
from ifabric_actors.coordinator.records import Seat, Stored, Task
from ifabric_actors.coordinator.waiters import Waiters
from ifabric_actors.governor.books import TASK
from ifabric_actors.governor.matching import Demand

#: among how many tasks of one priority colliding daemons choose
SPREAD_MAX = 256
#: a long poll that waits for a breaker's time looks again so much after it
PROBE_MARGIN_S = 0.01


class _Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the receipt of a claim keeps: the task's spec is in etcd already."""

    task: str
    fence: int
    attempt: int
    ttl_s: float
    hold: str | None = None


_kept = msgspec.json.Decoder(_Kept)


class Claims:
    """Carries out `claim` and `next`."""

    def __init__(self, office: Office, waiters: Waiters, metrics: Metrics) -> None:
        self._office = office
        self._board, self._desk, self._store, self._clock = office.board, office.desk, office.store, office.clock
        self._waiters = waiters
        self._spread = 1
        self._latency = metrics.histogram("if_coordinator_claim_latency_seconds")
        self._claims = {
            outcome: metrics.counter("if_coordinator_claims_total", outcome=outcome)
            for outcome in ("granted", "again", "taken", "none", "refused", "error")
        }
        self._scores = metrics.histogram("if_governor_capability_match_score")
        self._failures = {
            why: metrics.counter("if_governor_capability_match_failures_total", why=why)
            for why in ("capability", "label", "score", "breaker")
        }
        office.board.on_offer = self._offer

    async def claim(self, message: wire.Claim, caller: Caller) -> wire.ClaimReply:
        started = self._clock.monotonic()
        self._office.purse.refuse_without_budgets(message.hold_micro_usd)
        deadline = 0
        stored = self._board.tasks.get(message.task)
        if stored is None:
            await self._desk.look(caller, message, (message.task,))
            stored = self._board.tasks.get(message.task)
        if stored is not None and stored.task.spec.deadline_s is not None:
            deadline = await self._store.grant(stored.task.spec.deadline_s)

        def decide() -> Plan:
            seat = self._board.sessions.get(caller.session)
            if seat is None:
                raise SessionLost(session=caller.session)
            known = self._board.tasks.get(message.task)
            if known is None:
                raise UnknownTask(f"there is no task {message.task}", task=message.task)
            if rules.holds(known.task, caller.session, seat):
                if message.request_id is None:
                    raise _HeldAlreadyError(known.task, seat)
                return _held_already(caller, known, seat)
            if known.task.state == "pending":
                self._board.at(self._clock.wall_ms())
                self._board.refuse(known.task.spec, caller.session, seat.offer)
            return self._grant(caller, message, known, seat, deadline, message.hold_micro_usd)

        reserved = self._board.reserve(message.task)
        try:
            done = await self._desk.transact(caller, message, (message.task,), decide)
        except _HeldAlreadyError as held:
            self._claims["again"].inc()
            await self._not_needed(deadline)
            return await self._again(held.task, held.seat)
        except FabricError as refusal:
            await self._not_needed(deadline)
            self._count_refusal(refusal)
            if isinstance(refusal, ClaimTaken):
                holder = self._board.sessions.get(str(refusal.facts.get("by")))
                refusal.facts["ttl_s"] = holder.session.ttl_s if holder is not None else 0
            raise
        finally:
            if reserved:
                self._board.unreserve(message.task)
        if isinstance(done, Committed) and not done.plan.writes:
            self._claims["again"].inc()
            await self._not_needed(deadline)
            reply: wire.ClaimReply = done.plan.reply
            stored = self._office.known(message.task)
            return msgspec.structs.replace(
                reply, spec=with_payload(stored.task, await self._office.payload(stored.task))
            )
        reply = await self._granted(message.task, done, deadline)
        self._latency.observe(self._clock.monotonic() - started)
        return reply

    async def next(self, message: wire.Next, caller: Caller) -> wire.ClaimReply:
        started = self._clock.monotonic()
        self._office.purse.refuse_without_budgets(message.hold_micro_usd)
        skipped = _Skipped(self._board)
        try:
            return await self._next(message, caller, started, skipped)
        except NoTaskMatches:
            self._claims["none"].inc()
            raise
        except FabricError as refusal:
            self._count_refusal(refusal)
            raise
        finally:
            skipped.back()

    async def _next(self, message: wire.Next, caller: Caller, started: float, skipped: _Skipped) -> wire.ClaimReply:
        until = started + message.wait_s
        looked = settled = False
        while True:
            try:
                seat = await self._office.seat(caller)
            except SessionLost:  # the first answer to a retry outlives the session that it was given to
                replay = await self._desk.look(caller, message, ())
                if replay is None:
                    raise
                return await self._replayed(replay)
            self._board.at(self._clock.wall_ms())
            best = self._board.best(seat.offer, spread=self._spread, pick=self._pick)
            if best is not None:
                try:
                    reply = await self._take(message, caller, seat, best.task_id)
                except BudgetShort as short:
                    if not skipped.passes_over(best.task_id, short):
                        raise
                    continue
                if reply is not None:
                    self._latency.observe(self._clock.monotonic() - started)
                    self._scores.observe(best.score)
                    return reply
                continue
            if not looked:  # the answer to a retry may be a task that is no longer pending
                looked = True
                replay = await self._desk.look(caller, message, ())
                if replay is not None:
                    return await self._replayed(replay)
                continue
            left = until - self._clock.monotonic()
            if left > 0:
                await self._wait(seat, left)
                started = self._clock.monotonic()  # that there was no work to give is no latency
            elif not settled:  # claims under way may leave a task, and one of them may be a duplicate of this request
                settled = True
                await self._desk.turns_over()
                await self._office.feed.settle()
                replay = await self._desk.look(caller, message, ())
                if replay is not None:
                    return await self._replayed(replay)
            else:
                raise skipped.short or self._no_task(seat)

    async def _take(self, message: wire.Next, caller: Caller, seat: Seat, task_id: str) -> wire.ClaimReply | None:
        """One try at one task. None: somebody else was faster, or the session is not what it was."""
        self._board.reserve(task_id)
        try:
            stored = self._board.tasks[task_id]
            deadline_s = stored.task.spec.deadline_s
            deadline = await self._store.grant(deadline_s) if deadline_s is not None else 0
            plan = self._grant(caller, message, stored, seat, deadline, message.hold_micro_usd)
            try:
                done = await self._desk.attempt(caller, message, plan, (task_id,))
            except FabricError:
                await self._not_needed(deadline)
                raise
        finally:
            self._board.unreserve(task_id)
        if done is None:
            self._spread = min(SPREAD_MAX, self._spread * 2)
            await self._not_needed(deadline)
            return None
        self._spread = max(1, self._spread - 1)
        return await self._granted(task_id, done, deadline)

    async def _wait(self, seat: Seat, seconds: float) -> None:
        due_s = self._board.probe_due_in_s
        waiter = self._waiters.park(seat.offer)
        timer = asyncio.get_running_loop().call_later(
            seconds if due_s is None else min(seconds, due_s + PROBE_MARGIN_S), _wake, waiter.woken
        )
        try:
            await waiter.woken
        finally:
            timer.cancel()
            self._waiters.leave(waiter)

    def _offer(self, demand: Demand, tasks: int) -> None:
        """Tasks may have become possible to take: wakes as many of those who wait for one."""
        while tasks > 0 and len(self._waiters) and self._waiters.offer(demand, self._board.takes):
            tasks -= 1

    def _no_task(self, seat: Seat) -> NoTaskMatches:
        """The refusal of `next`, with what stands in the way."""
        pending, found = self._board.pending, self._board.obstacles(seat.offer)
        if found is None:
            return NoTaskMatches(pending=pending, missing=[])
        for kind in found.kinds():
            self._failures[kind].inc()
        min_score = self._board.shelves.terms.min_score
        facts: dict[str, Any] = {"pending": pending, "missing": list(found.missing)}
        if found.labels or found.unlabelled:
            facts["labels"] = list(found.labels)
        if found.breakers:
            facts["breakers"] = list(found.breakers)
        if found.best_score is not None:
            facts |= {"best_score": found.best_score, "min_score": min_score}
        return NoTaskMatches(found.sentence(pending, min_score), **facts)

    def _grant(
        self, caller: Caller, message: Mutation, stored: Stored, seat: Seat, deadline: int, hold_micro_usd: int | None
    ) -> Plan:
        task_id = stored.task.spec.id
        task = rules.claimed(
            stored.task,
            caller.session,
            seat,
            incarnation=self._office.incarnation,
            deadline_lease=deadline,
            now=self._clock.wall_ms(),
            request=message.request_id or "",
        )
        ttl_s = float(seat.session.ttl_s)
        others = (Put(records.deadline_key(task_id), str(task.fence).encode(), deadline),) if deadline else ()
        reads = (Get(records.PAYLOADS + task_id.encode()),) if task.payload else ()
        return Plan(
            wire.ClaimReply(task=task_id, fence=task.fence, attempt=task.attempt, ttl_s=ttl_s, spec=task.spec),
            (Write(task_id, task, stored.mod_revision, stored.create_revision),),
            (leased(records.session_key(caller.session), seat.lease),),
            others,
            reads,
            kept=_Kept(task_id, task.fence, task.attempt, ttl_s),
            payment=None
            if hold_micro_usd is None
            else self._office.purse.placing(task, seat, caller.session, hold_micro_usd, message.request_id or ""),
        )

    async def _granted(self, task_id: str, done: Committed | Replayed, deadline: int) -> wire.ClaimReply:
        if isinstance(done, Replayed):
            await self._not_needed(deadline)
            return await self._replayed(done)
        self._claims["granted"].inc()
        if deadline:
            self._office.deadlines[task_id] = deadline
        reply: wire.ClaimReply = done.plan.reply
        task = done.plan.writes[0].task
        if not task.payload:
            return reply
        got = done.reads[0]
        payload = got.kvs[0].value if isinstance(got, Got) and got.kvs else await self._office.payload(task)
        return msgspec.structs.replace(reply, spec=with_payload(task, payload))

    async def _replayed(self, done: Replayed) -> wire.ClaimReply:
        """The first answer to a claim, with the spec put back."""
        kept = _kept.decode(done.reply)
        self._claims["again"].inc()
        await self._desk.learn_tasks((kept.task,), kept.task)
        stored = self._board.tasks.get(kept.task)
        if stored is None:
            raise UnknownTask(f"task {kept.task} was claimed by this request and has been purged since", task=kept.task)
        spec = with_payload(stored.task, await self._office.payload(stored.task))
        return wire.ClaimReply(
            task=kept.task, fence=kept.fence, attempt=kept.attempt, ttl_s=kept.ttl_s, spec=spec, hold=kept.hold
        )

    async def _again(self, task: Task, seat: Seat) -> wire.ClaimReply:
        spec = with_payload(task, await self._office.payload(task))
        return wire.ClaimReply(
            task=spec.id,
            fence=task.fence,
            attempt=task.attempt,
            ttl_s=seat.session.ttl_s,
            spec=spec,
            hold=_hold_of(task),
            again=True,
        )

    async def _not_needed(self, deadline: int) -> None:
        """A deadline's lease that no claim came to hang on."""
        if deadline:
            await self._store.revoke(deadline)

    def _count_refusal(self, refusal: FabricError) -> None:
        if isinstance(refusal, BudgetShort):
            self._office.purse.count_short()
        if isinstance(refusal, ClaimTaken):
            self._claims["taken"].inc()
        else:
            self._claims["error" if refusal.status >= 500 else "refused"].inc()

    def _pick(self, below: int) -> int:
        return self._clock.pick(range(below))


class _Skipped:
    """Tasks whose own budget is too short for the hold that is asked for: this `next` passes them over."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._tasks: list[str] = []
        #: why the first of them was
        self.short: BudgetShort | None = None

    def passes_over(self, task_id: str, short: BudgetShort) -> bool:
        """Takes the task off its shelf until `back`; False when it is another account that is short."""
        if short.facts["account"] != TASK + task_id:
            return False
        self.short = self.short or short
        if self._board.reserve(task_id):
            self._tasks.append(task_id)
        return True

    def back(self) -> None:
        """Puts them back."""
        for task_id in self._tasks:
            self._board.unreserve(task_id)


class _HeldAlreadyError(FabricError):
    """The session holds the task already."""

    def __init__(self, task: Task, seat: Seat) -> None:
        super().__init__()
        self.task, self.seat = task, seat


def _held_already(caller: Caller, known: Stored, seat: Seat) -> Plan:
    """Nothing to write but the receipt: a retry is told the same, whatever has become of the claim by then."""
    task, ttl_s = known.task, float(seat.session.ttl_s)
    return Plan(
        wire.ClaimReply(
            task=task.spec.id,
            fence=task.fence,
            attempt=task.attempt,
            ttl_s=ttl_s,
            spec=task.spec,
            hold=_hold_of(task),
            again=True,
        ),
        compares=(
            records.as_seen(records.task_key(task.spec.id), known),
            leased(records.session_key(caller.session), seat.lease),
        ),
        kept=_Kept(task.spec.id, task.fence, task.attempt, ttl_s, _hold_of(task)),
    )


def _hold_of(task: Task) -> str | None:
    return task.hold.name if task.hold is not None else None


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
