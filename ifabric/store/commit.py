"""Group commit: many small transactions in one round trip, none of which can hurt another.

**Why.** etcd spends most of a small transaction on what does not depend on its size: a gRPC call, a raft proposal, an
fsync. Commands that arrive while a commit is in flight therefore wait for it and then go together, each as a *nested*
transaction with its own compares. The faster they come, the larger the batch: nobody waits for a timer, and a command
that is alone goes alone. One batch at a time: with two in flight both were half as large, and every figure was worse
(5,000 claims/s on two cores: p95 11 ms against 26 ms).

**Each for itself.** A nested transaction whose compare fails runs its own `otherwise` and leaves the others be. But
some faults are the whole batch's: a key that is put twice, a put under a lease that is gone, too many operations. So
(1) two requests that write one key never share a batch, the later one waits; (2) a request that is put under a lease
compares that the lease's key is there, so that the put is not tried after it died; (3) when the store still refuses a
batch, every request in it is carried out again, alone, and only the guilty one is told; (4) a request too large to
share travels alone; (5) owners take turns, so that none fills a batch while others wait. Who goes next, and with whom,
is decided in `ifabric.store.waiting`.

**The reply that got lost.** A transaction that timed out may have been committed. It is sent again as it was: if it
had been committed, its own compares now fail, and the failing branch reads the request's *witness*, a key that it
writes with a value nobody else would write (a receipt). If the witness says what we would have written, the request
had succeeded. This is sound because a witness is never overwritten by another value while its request can still be
retried. A refusal in doubt (the lease died, or the store filled up, between two attempts) says nothing about the first
attempt, so the witness is asked then too.

**When the store is gone.** A batch is retried until `timeout_s` has passed since it was first sent, whether the store
fails or says nothing; then its requests are answered `unavailable` (outcome unknown). Well before that, after
`REFUSE_AFTER_S`, what was not sent yet and whatever comes is refused at once, until a probe succeeds: nobody queues for
nothing.

**The guard.** Every batch compares the fabric's *incarnation*, which changes when a cluster is restored from a
backup. A daemon that still believes in the old one commits nothing, and its supervisor makes it start again from what
is stored.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import FabricError, Overloaded, Unavailable
from ifabric.handling import CURRENT
from ifabric.store.base import (
    Compare,
    Delete,
    Deleted,
    Done,
    Get,
    Got,
    Op,
    Put,
    Store,
    Target,
    Txn,
    TxnResult,
    absent,
)
from ifabric.store.waiting import Waiting, WaitingRoom

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ifabric.clock import Clock
    from ifabric.handling import Span
    from ifabric.metrics import Metrics

INCARNATION_KEY = b"fabric/incarnation"
#: operations of a request at all: it is folded into groups of `FOLD_OPS`
REQUEST_OPS_MAX = 1000
FOLD_OPS = 12
COMPARES_MAX = 114
QUEUE_MAX = 16_384
PROBE_S = 0.25
#: a batch without an answer for this long, and nothing new is accepted: longer than etcd takes over a lost packet or a
#: slow disk, and in time for the sender to hear a reason before it gives up
REFUSE_AFTER_S = 1.0
_GUARD = Get(INCARNATION_KEY)


class Request(NamedTuple):
    """One command's transaction. No key may be put twice in it."""

    compares: tuple[Compare, ...]
    then: tuple[Put | Delete | Get, ...]
    otherwise: tuple[Get, ...] = ()
    #: whose it is: owners get equal shares of a full batch
    owner: str = ""
    #: the put that tells this request from all others; without one, a lost reply is answered as `unavailable`
    witness: Put | None = None


class Outcome(NamedTuple):
    """What became of a request: which branch ran, at which revision, and the answers of its operations.

    A request that was recognised by its witness has `succeeded`, the revision of the commit and no answers.
    """

    succeeded: bool
    revision: int
    answers: tuple[Got | None, ...]


class Committer:
    """Commits requests in groups. One for each process; `lost` tells why it must be started again."""

    def __init__(self, store: Store, clock: Clock, metrics: Metrics, *, timeout_s: float = 5.0) -> None:
        self._store = store
        self._clock = clock
        self._timeout_s = timeout_s
        self._room = WaitingRoom()
        #: the one that is in flight
        self._batch: asyncio.Task[None] | None = None
        self._scheduled = False
        self._probe: asyncio.Task[None] | None = None
        self._guard = absent(INCARNATION_KEY)
        self.incarnation = 0
        self.down: FabricError | None = None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._batch_size = metrics.histogram("if_store_commit_batch_size")
        self._batch_seconds = metrics.histogram("if_store_commit_seconds")
        self._retries_unknown = metrics.counter("if_store_commit_retries_total", why="unknown")
        self._retries_refused = metrics.counter("if_store_commit_retries_total", why="refused")

    async def start(self) -> None:
        """Reads the incarnation, or founds the first one. Raises `Unavailable`."""
        self.lost = asyncio.get_running_loop().create_future()
        self.down = None
        kv = await self._store.get(INCARNATION_KEY)  # a host that only runs guests may read it, and not write it
        value = b"1" if kv is None else kv.value
        if kv is None:
            first = Put(INCARNATION_KEY, value)
            result = await self._store.txn(Txn((absent(INCARNATION_KEY),), (first,), (_GUARD,)))
            if not result.succeeded:
                answer = result.answers[0]
                assert isinstance(answer, Got)
                value = answer.kvs[0].value
        self.incarnation = int(value)
        self._guard = Compare(INCARNATION_KEY, Target.VALUE, Op.EQUAL, value)

    async def stop(self) -> None:
        """Lets what was accepted finish; refuses the rest."""
        if self._probe is not None:
            await cancel_and_wait(self._probe)
            self._probe = None
        self.down = Unavailable("The daemon is stopping; nothing was tried.", what="draining", maybe_done=False)
        while self._batch is not None or self._scheduled:
            await (asyncio.wait({self._batch}) if self._batch is not None else asyncio.sleep(0))
        for waiting in self._room:
            _fail(waiting, self.down)

    def __len__(self) -> int:
        return len(self._room)

    async def commit(self, request: Request) -> Outcome:
        """Carries out one request, with others.

        Raises `Unavailable` (it may have happened), `StoreFull` or `TxnRefused` (it has not), `Overloaded` (not tried).
        """
        if self.down is not None:
            raise _another(self.down)
        if len(self._room) >= QUEUE_MAX:
            raise Overloaded(what="commit queue", queue_max=QUEUE_MAX)
        assert len(request.then) <= REQUEST_OPS_MAX
        assert len(request.compares) <= COMPARES_MAX
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = Waiting(request, future)
        self._room.add(waiting)
        if not self._scheduled and self._batch is None and self._room.ready:
            # at the end of this turn of the loop, so that commands which arrived together go together
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)
        handling = CURRENT.get()
        if handling is None or handling.span is None:
            return await future
        return await _recorded(waiting, handling.span)

    # -- sending batches --------------------------------------------------------------------------------------------

    def _send(self) -> None:
        self._scheduled = False
        if self._batch is None and (batch := self._room.take()):
            self._batch = asyncio.create_task(self._carry_out(batch), name="commit")
            self._batch.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._batch = None
        if not task.cancelled() and (error := task.exception()) is not None and not self.lost.done():
            self.lost.set_result(f"group commit failed: {error!r}")
        if not self._scheduled:
            self._send()

    # -- carrying them out --------------------------------------------------------------------------------------------

    async def _carry_out(self, batch: list[Waiting]) -> None:
        started = self._clock.monotonic()
        try:
            await self._attempt(batch, started)
        finally:
            for waiting in batch:
                if not waiting.future.done():  # we have a bug, or are cancelled
                    _fail(waiting, Unavailable(what="etcd"))
                self._room.over(waiting)
            self._batch_seconds.observe(self._clock.monotonic() - started)

    async def _attempt(self, batch: list[Waiting], started: float) -> None:
        self._batch_size.observe(len(batch))
        for waiting in batch:
            if waiting.span is not None:
                waiting.span.event("sent", {"ifabric.commit.batch_size": len(batch)})
        try:
            await self._until_known(batch, started)
        except Unavailable as gone:
            self._go_down(gone)
            for waiting in batch:
                _fail(waiting, gone)
        except FabricError as refused:  # in a batch it is perhaps another's: and a full store still reads and deletes
            if len(batch) > 1:
                self._retries_refused.inc(len(batch))
                alone = (self._attempt([waiting], started) for waiting in batch)
                for failed in await asyncio.gather(*alone, return_exceptions=True):
                    if failed is not None:
                        raise failed from None
            elif batch[0].doubt and batch[0].keys:
                await self._ask_witness(batch[0], refused, started)
            else:
                _fail(batch[0], refused)

    async def _ask_witness(self, waiting: Waiting, refused: FabricError, started: float) -> None:
        """Refused now, but an earlier attempt may have been carried out: its witness knows."""
        witness = waiting.request.witness
        if witness is None:
            _fail(waiting, Unavailable(what="etcd"))
            return
        asked = Waiting(Request((), (Get(witness.key),)), asyncio.get_running_loop().create_future())
        await self._attempt([asked], started)
        try:
            outcome = await asked.future
        except FabricError as error:
            _fail(waiting, error)
            return
        found = _witnessed(outcome.answers[0], witness)
        if found is None:
            _fail(waiting, refused)
        elif not waiting.future.done():
            waiting.future.set_result(found)

    async def _until_known(self, batch: list[Waiting], started: float) -> None:
        """Sends the batch until its outcome is known. Raises `Unavailable` when `timeout_s` has passed."""
        while True:
            txn = self._txn(batch)
            left_s = started + self._timeout_s - self._clock.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    result = await self._store.txn(txn)
            except (Unavailable, TimeoutError) as error:
                for waiting in batch:
                    waiting.doubt = True
                if isinstance(error, TimeoutError):
                    raise Unavailable("etcd does not answer in time", what="etcd", maybe_done=True) from None
                if left_s <= 0:
                    raise
                if self._clock.monotonic() - started > REFUSE_AFTER_S:
                    self._go_down(error)
                self._retries_unknown.inc(len(batch))
                await self._clock.sleep(self._clock.jitter(0.01, 0.05))
                continue
            self._settle(batch, result)
            return

    def _txn(self, batch: list[Waiting]) -> Txn:
        if len(batch) == 1:
            request = batch[0].request
            otherwise = (*_otherwise(batch[0]), _GUARD)
            return Txn((self._guard, *request.compares), _folded(request.then), _folded(otherwise))
        return Txn(
            (self._guard,),
            tuple([Txn(w.request.compares, w.request.then, _otherwise(w)) for w in batch]),
            (_GUARD,),
        )

    def _settle(self, batch: list[Waiting], result: TxnResult) -> None:
        if not result.succeeded:
            guard = _flat(result.answers)[-1]
            assert isinstance(guard, Got)
            if not guard.kvs or guard.kvs[0].value != self._guard.value:
                self._stale(batch)
                return
        if len(batch) == 1:
            answers = _flat(result.answers)
            only = result._replace(answers=answers if result.succeeded else answers[:-1])
            self._answer(batch[0], only, result.revision)
            return
        for waiting, answer in zip(batch, result.answers, strict=True):
            assert isinstance(answer, TxnResult)
            self._answer(waiting, answer, result.revision)

    @staticmethod
    def _answer(waiting: Waiting, result: TxnResult, revision: int) -> None:
        if waiting.future.done():
            return
        answers = result.answers
        if not result.succeeded and waiting.doubt and waiting.keys:
            if waiting.request.witness is None:
                waiting.future.set_exception(Unavailable(what="etcd"))
                return
            answers, seen = answers[:-1], answers[-1]
            found = _witnessed(seen, waiting.request.witness)
            if found is not None:
                waiting.future.set_result(found)
                return
        reads = tuple([a if type(a) is Got else None for a in answers])
        waiting.future.set_result(Outcome(result.succeeded, revision, reads))

    def _stale(self, batch: Sequence[Waiting]) -> None:
        if not self.lost.done():
            self.lost.set_result("the cluster was restored from a backup: its incarnation has changed")
        for waiting in batch:
            _fail(waiting, Unavailable(what="fabric", reason="incarnation changed"))

    # -- while the store is gone --------------------------------------------------------------------------------------

    def _go_down(self, error: FabricError) -> None:
        if self.down is None:
            self.down = _another(error)
            self._probe = asyncio.create_task(self._come_back(), name="commit probe")
        for waiting in self._room:
            _fail(waiting, error)  # the next `take` clears them away

    async def _come_back(self) -> None:
        while True:
            await self._clock.sleep(PROBE_S)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._store.get(INCARNATION_KEY)
            except (FabricError, TimeoutError):
                continue
            self.down = None
            return


async def _recorded(waiting: Waiting, parent: Span) -> Outcome:
    """The outcome, with a span of the request's own, from now to then: the batch that carries it has many parents."""
    waiting.span = span = parent.child("commit")
    try:
        outcome = await waiting.future
    except BaseException as error:
        span.end(error)
        raise
    span.note({"ifabric.commit.succeeded": outcome.succeeded, "ifabric.revision": outcome.revision})
    span.end()
    return outcome


def _fail(waiting: Waiting, error: FabricError) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(_another(error))


def _another(error: FabricError) -> FabricError:
    """A copy: an exception that is raised again and again keeps the frames of all who ever saw it."""
    return type(error)(error.message, **error.facts)


def _witnessed(seen: object, witness: Put) -> Outcome | None:
    """The outcome of a request whose witness is there; None when it is not."""
    if isinstance(seen, Got) and seen.kvs:
        kv = seen.kvs[0]
        if kv.value == witness.value and kv.lease == witness.lease:
            return Outcome(True, kv.mod_revision, ())
    return None


def _folded(ops: tuple[Put | Delete | Get, ...]) -> tuple[Put | Delete | Get | Txn, ...]:
    """Many operations as nested transactions of a few, within etcd's count: the compares and the largest group count
    together.
    """
    if len(ops) <= FOLD_OPS:
        return ops
    return tuple(Txn((), ops[at : at + FOLD_OPS]) for at in range(0, len(ops), FOLD_OPS))


def _flat(answers: tuple[Got | Deleted | Done | TxnResult, ...]) -> tuple[Got | Deleted | Done | TxnResult, ...]:
    if not answers or type(answers[0]) is not TxnResult:
        return answers
    return tuple(a for group in answers if type(group) is TxnResult for a in group.answers)


def _otherwise(waiting: Waiting) -> tuple[Get, ...]:
    request = waiting.request
    if waiting.doubt and request.witness is not None:
        return (*request.otherwise, Get(request.witness.key))
    return request.otherwise
