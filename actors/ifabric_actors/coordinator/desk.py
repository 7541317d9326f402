"""Where a decision meets etcd: decide on what is known, commit if it is still so, else look again.

A plan says which records to write and what it saw of them. It becomes one request of the group commit: every record
unchanged since, every further condition, no receipt yet under this request id; then the records, the receipt with the
answer, and what else the plan puts. When it does not go through, what is there instead is read, so the next decision
is made on the truth.

*A grant is confirmed by its compares, a refusal by a read.* The board may be a moment behind, so a refusal that was
decided on it is not spoken until the keys it depends on, and the request's receipt, have been read from etcd.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from ifabric.actor.base import Caller
from ifabric.actor.receipts import Receipts, receipt_key, replayed
from ifabric.errors import CallerError, FabricError, Overloaded
from ifabric.metrics import Metrics
from ifabric.store.base import KV, Compare, Delete, Get, Got, Put, TxnRefused, absent, unchanged
from ifabric.store.commit import Committer, Outcome, Request
from ifabric.wire.envelope import Mutation
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.money import Paid, Payment, Purse, hold_key
from ifabric_actors.coordinator.records import Stored, Task
from ifabric_actors.governor.books import Books
from ifabric_actors.governor.records import HOLDS
from ifabric_actors.governor.teller import Draft, Posted, Posting

#: decisions for one request before it is told that the fabric is overloaded
TRIES_MAX = 32


class Write(NamedTuple):
    """A task's next record, and the modification it was decided on (0: the task must not exist)."""

    task_id: str
    task: Task
    seen: int = 0
    order_revision: int = 0


class Plan(NamedTuple):
    """What to commit, and what to answer then."""

    reply: Any
    writes: tuple[Write, ...] = ()
    compares: tuple[Compare, ...] = ()
    others: tuple[Put | Delete, ...] = ()
    reads: tuple[Get, ...] = ()
    #: what the receipt keeps of the reply (default: all of it)
    kept: Any = None
    #: money that moves in the same transaction, for the first of the writes
    payment: Payment | None = None
    paid: Paid | None = None


class Committed(NamedTuple):
    """The plan is in etcd; `reads` answers its reads (None for each when a lost reply was recognised)."""

    plan: Plan
    revision: int
    reads: tuple[Got | None, ...]


class Replayed(NamedTuple):
    """The request had been carried out before; this was the answer."""

    reply: msgspec.Raw


class Desk:
    """Carries plans out for one coordinator."""

    def __init__(
        self,
        board: Board,
        deadlines: dict[str, int],
        committer: Committer,
        receipts: Receipts,
        purse: Purse,
        metrics: Metrics,
    ) -> None:
        self._board = board
        self._deadlines = deadlines
        self._committer = committer
        self._receipts = receipts
        self._purse = purse
        self._turns: dict[str, asyncio.Future[None]] = {}
        self._cas_failures = metrics.counter("if_coordinator_cas_failures_total")

    async def transact(
        self,
        caller: Caller,
        message: Mutation,
        task_ids: tuple[str, ...],
        decide: Callable[[], Plan],
        also: Iterable[bytes] = (),
    ) -> Committed | Replayed:
        """Decides and commits until it goes through. `decide` must depend on these tasks, the caller's session and the
        keys in `also` only.

        Raises what `decide` raises once etcd has confirmed it, `Overloaded` when others kept changing the tasks, and
        what `Committer.commit` raises.
        """
        confirmed = False
        for _ in range(TRIES_MAX):
            await self._turn(task_ids)
            try:
                plan = decide()
            except FabricError:
                if confirmed:
                    raise
                replay = await self.look(caller, message, task_ids, also)
                if replay is not None:
                    return replay
                confirmed = True
                continue
            done = await self.attempt(caller, message, plan, task_ids, also)
            if done is not None:
                return done
            confirmed = True
        raise Overloaded(f"{message.verb} lost {TRIES_MAX} races; nothing was done", what="contention")

    async def attempt(
        self,
        caller: Caller,
        message: Mutation,
        plan: Plan,
        task_ids: tuple[str, ...],
        also: Iterable[bytes] = (),
    ) -> Committed | Replayed | None:
        """One commit. None: something had changed, and the board knows it now."""
        lease = await self._receipts.current() if message.request_id is not None else 0
        turn = asyncio.get_running_loop().create_future()
        for task_id in task_ids:
            self._turns[task_id] = turn
        try:
            plan, outcome = await self._commit(caller, message, plan, lease)
        except CallerError:  # the payment was refused: no wonder, when this request has been carried out before
            replay = await self.look(caller, message, task_ids, also)
            if replay is None:
                raise
            return replay
        except TxnRefused:
            if not lease and plan.payment is None:
                raise
            self._receipts.retire()  # the lease under the receipt has gone, which only a frozen daemon sees
            self._purse.ended.retire()
            return None
        finally:
            for task_id in task_ids:
                if self._turns.get(task_id) is turn:
                    del self._turns[task_id]
            turn.set_result(None)
            for write in plan.writes:
                self._board.expected.pop(write.task_id, None)
        if outcome.succeeded:
            self._take_in(plan.writes, outcome)
            reads = outcome.answers[-len(plan.reads) :] if outcome.answers else (None,) * len(plan.reads)
            return Committed(plan, outcome.revision, reads if plan.reads else ())
        self._cas_failures.inc()
        return await self.look(caller, message, task_ids, also)

    async def _commit(self, caller: Caller, message: Mutation, plan: Plan, lease: int) -> tuple[Plan, Outcome]:
        """The plan as it was committed, or tried, and what became of it."""
        if plan.payment is None:
            return plan, await self._committer.commit(self._request(caller, message, plan, lease))

        def make(books: Books) -> Draft:
            whole = _paid(plan, books)
            return Draft(self._request(caller, message, whole, lease), whole)

        keys = [records.task_key(write.task_id) for write in plan.writes]
        if message.request_id is not None:
            keys.append(receipt_key(caller.session, message.request_id))
        posted = await self._post(plan.payment, keys, make, caller.session)
        if posted.outcome.succeeded:
            self._purse.count(message.verb, posted.answer.paid)
        return posted.answer or plan, posted.outcome

    async def _post(
        self, payment: Payment, keys: Iterable[bytes], make: Callable[[Books], Draft], owner: str
    ) -> Posted:
        posting = Posting(payment.accounts, payment.places, (payment.key, *keys), make, owner)
        return await self._purse.teller.post(posting)

    async def look(
        self, caller: Caller, message: Mutation, task_ids: Iterable[str], also: Iterable[bytes] = ()
    ) -> Replayed | None:
        """Reads the tasks, the caller's session, the request's receipt and the keys in `also` from etcd, together with
        other requests.
        """
        concerns = (*self._concerns(caller, message, task_ids), *(Get(key) for key in also))
        outcome = await self._committer.commit(Request((), concerns, owner=caller.session))
        return self._learn(concerns, outcome, caller, message)

    async def learn_tasks(self, task_ids: Iterable[str], owner: str) -> None:
        """Reads tasks from etcd into the board."""
        gets = tuple(Get(records.task_key(task_id)) for task_id in task_ids)
        for at in range(0, len(gets), 20):
            part = gets[at : at + 20]
            outcome = await self._committer.commit(Request((), part, owner=owner))
            self._learn(part, outcome, None, None)

    async def write(
        self, owner: str, write: Write, compares: tuple[Compare, ...] = (), payment: Payment | None = None
    ) -> bool:
        """Commits one record on the daemon's own account (an expiry, an unblocking). False: it had changed meanwhile."""
        key = records.task_key(write.task_id)

        def request(task: Task, *more: Any) -> Request:
            put = Put(key, records.encode(task))
            return Request(
                (unchanged(key, write.seen), *compares, *(more[0] if more else ())),
                (put, *(more[1] if more else ())),
                (Get(key),),
                owner,
                witness=put,
            )

        if payment is None:
            outcome = await self._committer.commit(request(write.task))
        else:

            def make(books: Books) -> Draft:
                paid = payment.pay(books)
                return Draft(request(write.task, paid.compares, paid.puts))

            try:
                outcome = (await self._post(payment, (key,), make, owner)).outcome
            except TxnRefused:
                self._purse.ended.retire()
                return False
        if outcome.succeeded:
            self._take_in((write,), outcome)
            return True
        held = self._board.tasks.get(write.task_id)
        asked = (Get(key), *([Get(hold_key(held.task))] if held is not None and held.task.hold is not None else ()))
        self._learn(asked, await self._committer.commit(Request((), asked, owner=owner)), None, None)
        return False

    async def turns_over(self) -> None:
        """Returns when the commits that are in flight now are over."""
        if self._turns:
            await asyncio.wait(set(self._turns.values()))

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _turn(self, task_ids: tuple[str, ...]) -> None:
        """Waits until no commit of this daemon is in flight for these tasks: deciding now would only lose the race."""
        for task_id in task_ids:
            while (turn := self._turns.get(task_id)) is not None:
                await asyncio.wait({turn})  # a caller that is cancelled here cancels nobody else's turn

    def _request(self, caller: Caller, message: Mutation, plan: Plan, lease: int) -> Request:
        compares = [*plan.compares]
        then: list[Put | Delete | Get] = []
        for write in plan.writes:
            key = records.task_key(write.task_id)
            value = records.encode(write.task)
            compares.append(unchanged(key, write.seen))
            then.append(Put(key, value))
            self._board.expected[write.task_id] = (value, write.task)
        then += plan.others
        receipt = None
        if message.request_id is not None:
            kept = plan.reply if plan.kept is None else plan.kept
            receipt = self._receipts.put(caller.session, message, kept, lease)
            compares.append(absent(receipt.key))
            then.append(receipt)
        witness = receipt or next((op for op in then if type(op) is Put), None)
        then += plan.reads
        return Request(tuple(compares), tuple(then), (), caller.session, witness)

    @staticmethod
    def _concerns(caller: Caller, message: Mutation, task_ids: Iterable[str]) -> tuple[Get, ...]:
        gets = [Get(records.task_key(task_id)) for task_id in task_ids]
        gets.append(Get(records.session_key(caller.session)))
        if message.request_id is not None:
            gets.append(Get(receipt_key(caller.session, message.request_id)))
        return tuple(gets)

    def _take_in(self, writes: tuple[Write, ...], outcome: Outcome) -> None:
        for write in writes:
            created = write.order_revision or outcome.revision
            self._board.put(write.task_id, Stored(write.task, outcome.revision, created))

    def _learn(
        self, asked: tuple[Get, ...], outcome: Outcome, caller: Caller | None, message: Mutation | None
    ) -> Replayed | None:
        """Takes what was read into the board; the receipt, when there is one, is the answer.

        What was not there had gone before this revision: at it, another request of the same batch may have made it
        anew, after the read.
        """
        replay, gone = None, outcome.revision - 1
        for get, got in zip(asked, outcome.answers, strict=True):
            assert got is not None, "a read is answered"
            kv: KV | None = got.kvs[0] if got.kvs else None
            key = get.key
            if key.startswith(records.TASKS):
                task_id = key[len(records.TASKS) :].decode()
                if kv is None:
                    self._board.forget(task_id, gone)
                else:
                    self._board.put(task_id, records.stored(kv))
            elif key.startswith(records.SESSIONS):
                session = key[len(records.SESSIONS) :].decode()
                if kv is None:
                    self._board.unseat(session, gone)
                else:
                    self._board.seat(session, records.seat(kv))
            elif key.startswith(records.DEADLINES):
                task_id = key[len(records.DEADLINES) :].decode()
                if kv is None:
                    self._deadlines.pop(task_id, None)
                else:
                    self._deadlines[task_id] = kv.lease
            elif key.startswith(HOLDS):
                if kv is not None:
                    self._purse.see(kv)
            elif kv is not None and message is not None:
                replay = Replayed(replayed(kv, message))
        return replay


def _paid(plan: Plan, books: Books) -> Plan:
    """The plan with what its money adds: to the first task, to the reply, to what is compared and put."""
    assert plan.payment is not None, "the plan moves money"
    paid = plan.payment.pay(books)
    first, *rest = plan.writes
    return plan._replace(
        reply=replace(plan.reply, **paid.reply),
        kept=replace(plan.kept, **paid.reply) if plan.kept is not None else None,
        writes=(first._replace(task=replace(first.task, hold=paid.hold)), *rest),
        compares=(*plan.compares, *paid.compares),
        others=(*plan.others, *paid.puts),
        paid=paid,
    )
