"""Group commit: many small transactions in one round trip, none of which can hurt another.

**Why.** etcd spends most of a small transaction on what does not depend on its size: a gRPC call, a raft proposal, an
fsync. Commands that arrive while a commit is in flight therefore wait for it and then go together, each as a *nested*
transaction with its own compares. The faster they come, the larger the batch: nobody waits for a timer, and a command
that is alone goes alone.

**Each for itself.** A nested transaction whose compare fails runs its own `otherwise` and leaves the others be. But
some faults are the whole batch's: a key that is put twice, a put under a lease that is gone, too many operations. So
(1) two requests that write one key never share a batch, the later one waits; (2) a request that is put under a lease
compares that the lease's key is there, so that the put is not tried after it died; (3) when the store still refuses a
batch, every request in it is carried out again, alone, and only the guilty one is told; (4) a request too large to
share travels alone; (5) when more is waiting than a batch holds, every owner gets the same share of it.

**The reply that got lost.** A transaction that timed out may have been committed. It is sent again as it was: if it
had been committed, its own compares now fail, and the failing branch reads the request's *witness*, a key that it
writes with a value nobody else would write (a receipt). If the witness says what we would have written, the request
had succeeded. This is sound because a witness is never overwritten by another value while its request can still be
retried.

**When the store is gone.** A batch is retried until `timeout_s` has passed since it was first sent; then its requests
are answered `unavailable` (outcome unknown), and until a probe succeeds every new request is refused at once, so that
nobody queues for nothing.

**The guard.** Every batch compares the fabric's *incarnation*, which changes when a cluster is restored from a
backup. A daemon that still believes in the old one commits nothing, and its supervisor makes it start again from what
is stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import FabricError, Overloaded, Unavailable
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
    TxnRefused,
    TxnResult,
    absent,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ifabric.clock import Clock
    from ifabric.metrics import Metrics

INCARNATION_KEY = b"fabric/incarnation"
#: requests in one transaction. etcd counts one for each plus the largest inside, and allows 128.
BATCH_MAX = 100
#: operations (and compares) of a request that may share a batch
SHARED_OPS_MAX = 24
#: operations of a request at all: it is folded into groups of `SHARED_OPS_MAX`
REQUEST_OPS_MAX = 1000
COMPARES_MAX = 110
QUEUE_MAX = 16_384
PROBE_S = 0.25
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


class _Waiting(NamedTuple):
    request: Request
    future: asyncio.Future[Outcome]
    keys: frozenset[bytes]


class Committer:
    """Commits requests in groups. One for each process; `lost` tells why it must be started again."""

    def __init__(
        self, store: Store, clock: Clock, metrics: Metrics, *, timeout_s: float = 5.0, in_flight_max: int = 2
    ) -> None:
        self._store = store
        self._clock = clock
        self._timeout_s = timeout_s
        self._in_flight_max = in_flight_max
        self._queue: deque[_Waiting] = deque()
        self._batches: set[asyncio.Task[None]] = set()
        self._writing: set[bytes] = set()
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
        first = Put(INCARNATION_KEY, b"1")
        result = await self._store.txn(Txn((absent(INCARNATION_KEY),), (first,), (_GUARD,)))
        value = first.value
        if not result.succeeded:
            answer = result.answers[0]
            assert isinstance(answer, Got)
            value = answer.kvs[0].value
        self.incarnation = int(value)
        self._guard = Compare(INCARNATION_KEY, Target.VALUE, Op.EQUAL, value)

    async def stop(self) -> None:
        """Lets what was accepted finish; refuses the rest."""
        while self._batches:
            await asyncio.wait(self._batches)
        if self._probe is not None:
            await cancel_and_wait(self._probe)
        while self._queue:
            self._fail(self._queue.popleft(), Unavailable(what="etcd"))

    def __len__(self) -> int:
        return len(self._queue)

    async def commit(self, request: Request) -> Outcome:
        """Carries out one request, with others.

        Raises `Unavailable` (it may have happened), `StoreFull` or `TxnRefused` (it has not), `Overloaded` (not tried).
        """
        if self.down is not None:
            raise self.down
        if len(self._queue) >= QUEUE_MAX:
            raise Overloaded(what="commit queue", queue_max=QUEUE_MAX)
        assert len(request.then) <= REQUEST_OPS_MAX
        assert len(request.compares) <= COMPARES_MAX
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        keys = frozenset(op.key for op in request.then if type(op) is not Get)
        self._queue.append(_Waiting(request, future, keys))
        if not self._scheduled and len(self._batches) < self._in_flight_max:
            # at the end of this turn of the loop, so that commands which arrived together go together
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)
        return await future

    # -- making batches ---------------------------------------------------------------------------------------------

    def _send(self) -> None:
        self._scheduled = False
        while self._queue and len(self._batches) < self._in_flight_max:
            batch = self._take()
            if not batch:
                return  # all that waits writes keys that are in flight; the end of that batch calls again
            for waiting in batch:
                self._writing |= waiting.keys
            task = asyncio.create_task(self._carry_out(batch), name="commit")
            self._batches.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.lost.done():
            self.lost.set_result(f"group commit failed: {error!r}")
        if self._queue and not self._scheduled:
            self._send()

    def _take(self) -> list[_Waiting]:
        """The next batch: in order of arrival, disjoint in the keys it writes, fair to the owners when there are too
        many.
        """
        owners: dict[str, int] = {}
        if len(self._queue) > BATCH_MAX:
            for waiting in self._queue:
                owners[waiting.request.owner] = 0
        share = max(1, BATCH_MAX // len(owners)) if owners else BATCH_MAX
        batch: list[_Waiting] = []
        writing = set(self._writing)
        left: list[_Waiting] = []
        queue = self._queue
        while queue and len(batch) < BATCH_MAX:
            waiting = queue.popleft()
            request = waiting.request
            if waiting.future.done():  # its caller was cancelled
                continue
            taken = owners.get(request.owner, 0)
            large = _is_large(request)
            if taken >= share or not writing.isdisjoint(waiting.keys) or (large and batch):
                left.append(waiting)
                writing |= waiting.keys  # what comes later and writes the same key must not overtake it
                continue
            batch.append(waiting)
            writing |= waiting.keys
            if owners:
                owners[request.owner] = taken + 1
            if large:
                break
        queue.extendleft(reversed(left))
        return batch

    # -- carrying them out --------------------------------------------------------------------------------------------

    async def _carry_out(self, batch: list[_Waiting]) -> None:
        started = self._clock.monotonic()
        self._batch_size.observe(len(batch))
        try:
            await self._until_known(batch, started)
        except TxnRefused as refused:
            if len(batch) == 1:
                self._fail(batch[0], refused)
            else:
                self._retries_refused.inc(len(batch))
                await asyncio.gather(*(self._carry_out([waiting]) for waiting in batch))
        except Unavailable as gone:
            self._go_down(gone)
            for waiting in batch:
                self._fail(waiting, gone)
        except FabricError as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
            else:  # a full store still reads and deletes
                await asyncio.gather(*(self._carry_out([waiting]) for waiting in batch))
        finally:
            for waiting in batch:
                self._writing -= waiting.keys
            self._batch_seconds.observe(self._clock.monotonic() - started)

    async def _until_known(self, batch: list[_Waiting], started: float) -> None:
        """Sends the batch until its outcome is known. Raises `Unavailable` when `timeout_s` has passed."""
        doubt = False
        while True:
            txn = self._txn(batch, doubt=doubt)
            try:
                result = await self._store.txn(txn)
            except Unavailable:
                if self._clock.monotonic() - started > self._timeout_s:
                    raise
                doubt = True
                self._retries_unknown.inc()
                await self._clock.sleep(self._clock.jitter(0.01, 0.05))
                continue
            self._settle(batch, result, doubt=doubt)
            return

    def _txn(self, batch: list[_Waiting], *, doubt: bool) -> Txn:
        if len(batch) == 1:
            request = batch[0].request
            otherwise = (*_otherwise(request, doubt=doubt), _GUARD)
            return Txn((self._guard, *request.compares), _folded(request.then), _folded(otherwise))
        return Txn(
            (self._guard,),
            tuple(Txn(w.request.compares, w.request.then, _otherwise(w.request, doubt=doubt)) for w in batch),
            (_GUARD,),
        )

    def _settle(self, batch: list[_Waiting], result: TxnResult, *, doubt: bool) -> None:
        if not result.succeeded:
            guard = _flat(result.answers)[-1]
            assert isinstance(guard, Got)
            if not guard.kvs or guard.kvs[0].value != self._guard.value:
                self._stale(batch)
                return
        if len(batch) == 1:
            answers = _flat(result.answers)
            only = result._replace(answers=answers if result.succeeded else answers[:-1])
            self._answer(batch[0], only, result.revision, doubt=doubt)
            return
        for waiting, answer in zip(batch, result.answers, strict=True):
            assert isinstance(answer, TxnResult)
            self._answer(waiting, answer, result.revision, doubt=doubt)

    @staticmethod
    def _answer(waiting: _Waiting, result: TxnResult, revision: int, *, doubt: bool) -> None:
        if waiting.future.done():
            return
        answers = result.answers
        if not result.succeeded and doubt and waiting.keys:
            if waiting.request.witness is None:
                waiting.future.set_exception(Unavailable(what="etcd"))
                return
            witness, answers = answers[-1], answers[:-1]
            if isinstance(witness, Got) and witness.kvs and witness.kvs[0].value == waiting.request.witness.value:
                waiting.future.set_result(Outcome(True, witness.kvs[0].mod_revision, ()))
                return
        reads = tuple(a if isinstance(a, Got) else None for a in answers)
        waiting.future.set_result(Outcome(result.succeeded, revision, reads))

    def _stale(self, batch: Sequence[_Waiting]) -> None:
        if not self.lost.done():
            self.lost.set_result("the cluster was restored from a backup: its incarnation has changed")
        for waiting in batch:
            self._fail(waiting, Unavailable(what="fabric", reason="incarnation changed"))

    @staticmethod
    def _fail(waiting: _Waiting, error: FabricError) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(error)

    # -- while the store is gone --------------------------------------------------------------------------------------

    def _go_down(self, error: FabricError) -> None:
        if self.down is None:
            self.down = error
            self._probe = asyncio.create_task(self._come_back(), name="commit probe")
        while self._queue:
            self._fail(self._queue.popleft(), error)

    async def _come_back(self) -> None:
        while True:
            await self._clock.sleep(PROBE_S)
            try:
                await self._store.get(INCARNATION_KEY)
            except FabricError:
                continue
            self.down = None
            return


def _is_large(request: Request) -> bool:
    return max(len(request.then), len(request.compares), len(request.otherwise)) > SHARED_OPS_MAX


def _folded(ops: tuple[Put | Delete | Get, ...]) -> tuple[Put | Delete | Get | Txn, ...]:
    """Many operations as a few nested transactions of them, within etcd's count."""
    if len(ops) <= SHARED_OPS_MAX:
        return ops
    return tuple(Txn((), ops[at : at + SHARED_OPS_MAX]) for at in range(0, len(ops), SHARED_OPS_MAX))


def _flat(answers: tuple[Got | Deleted | Done | TxnResult, ...]) -> tuple[Got | Deleted | Done | TxnResult, ...]:
    if not answers or type(answers[0]) is not TxnResult:
        return answers
    return tuple(a for group in answers if type(group) is TxnResult for a in group.answers)


def _otherwise(request: Request, *, doubt: bool) -> tuple[Get, ...]:
    if doubt and request.witness is not None:
        return (*request.otherwise, Get(request.witness.key))
    return request.otherwise
