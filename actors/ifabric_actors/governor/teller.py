"""Carries the ledger's decisions out: many postings in one transaction.

A *posting* is a decision about some accounts together with all else that it writes: a hold, a receipt, a claimed
task. Postings that share a root account wait for each other; while a transaction for it is in flight they gather, and
the next one takes as many as fit: each is decided on the accounts as the one before it leaves them, and the accounts
are compared and written once, for all of them. So a posting is part of a transaction that either goes through whole,
or not at all.

**When it does not go through**, the same transaction reads everything that it compared. An account that another daemon
has changed is taken in, and all are decided again. A posting whose *own* condition no longer holds (its task was taken,
its request had been carried out) is handed back to who made it, and the others go on without it: one loser does not
hold up the rest, and no round is lost without learning why.

**A refusal is an answer like any other**, decided on accounts that may be old or on money that the posting before it
has just taken. It is spoken only when the transaction that compares those accounts has gone through: there is one even
when all were refused, with nothing to write.

One teller serves all the actors of a process, so that they do not race each other for an account.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from ifabric.actor.base import Context
from ifabric.actor.receipts import RECEIPTS
from ifabric.clock import Clock
from ifabric.errors import FabricError, Overloaded
from ifabric.handling import CURRENT, Span, step
from ifabric.metrics import Metrics
from ifabric.store.base import KV, Compare, Get, Got, Put, fulfilled
from ifabric.store.commit import COMPARES_MAX, Committer, Outcome, Request
from ifabric_actors.governor import records
from ifabric_actors.governor.books import TASK, Books, Memory, Place
from ifabric_actors.governor.ledger import BehindError
from ifabric_actors.governor.records import Hold

#: what one transaction of the group commit may compare, and write
TOGETHER_MAX, OPS_MAX = COMPARES_MAX, 300
#: compares that a posting may have besides those of its accounts and of the keys that it writes
OWN_MAX = 4
#: rounds that a posting may lose to other daemons before it is told that the fabric is overloaded
ROUNDS_MAX = 64
READ_AT_ONCE = 20
#: records of holds that are remembered for `lastwords`: what one daemon writes in some seconds
WRITTEN_MAX = 10_000


class Draft(NamedTuple):
    """A posting, decided: what it writes and compares besides its accounts, and what to answer."""

    request: Request
    answer: Any = None


class Posting(NamedTuple):
    """What is to be decided: on these accounts (their whole paths) and these tallies, by `make`.

    `keys` are what it writes besides: two postings that write one key never share a transaction.
    """

    accounts: tuple[str, ...]
    places: tuple[Place, ...]
    keys: tuple[bytes, ...]
    #: decides, puts what it decided into the books, and says what else is written. May raise a refusal.
    make: Callable[[Books], Draft]
    owner: str


class Posted(NamedTuple):
    """What became of a posting. Its own conditions failed when the outcome did not succeed: nothing was written."""

    outcome: Outcome
    answer: Any


class _Waiting:
    __slots__ = ("began", "future", "posting", "rounds", "span")

    def __init__(self, posting: Posting, began: float) -> None:
        self.posting = posting
        self.began = began
        self.rounds = 0
        self.span: Span | None = None
        self.future: asyncio.Future[Posted] = asyncio.get_running_loop().create_future()


class _Attempt(NamedTuple):
    """One transaction in the making."""

    books: Books
    drafts: list[tuple[_Waiting, Draft]]
    refused: list[tuple[_Waiting, FabricError]]
    #: decided on a record that is older than the accounts, or the other way round
    behind: list[_Waiting]


class Teller:
    """Posts for one process. It has no life of its own: a root account's queue runs while there is something in it."""

    def __init__(self, committer: Committer, clock: Clock, metrics: Metrics, default_session_micro_usd: int) -> None:
        self._committer, self._clock = committer, clock
        self.memory = Memory(default_session_micro_usd)
        self._queues: dict[str, deque[_Waiting]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._name, self._attempts = clock.token(), itertools.count(1)
        self._slots: list[int] = []
        self._slots_made = 0
        #: the records of holds that were written last
        self.written: deque[KV] = deque(maxlen=WRITTEN_MAX)
        self._seconds = metrics.histogram("if_governor_posting_seconds")
        self._together = metrics.histogram("if_governor_posting_batch_size")
        self._races = metrics.counter("if_governor_posting_races_total")

    async def post(self, posting: Posting) -> Posted:
        """Decides and commits one posting, with others.

        Raises the refusal of `make` once etcd has confirmed what it was decided on, `Overloaded` when other daemons
        were faster all the time, and what `Committer.commit` raises.
        """
        root = posting.accounts[0].partition("/")[0]
        waiting = _Waiting(posting, self._clock.monotonic())
        queue = self._queues.get(root)
        if queue is not None:
            queue.append(waiting)
        else:
            self._queues[root] = deque((waiting,))
            running = asyncio.create_task(self._run(root), name=f"teller {root}")
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        handling = CURRENT.get()
        if handling is None or handling.span is None:
            return await waiting.future
        with step("posting") as span:
            waiting.span = span
            posted = await waiting.future
            if span is not None:
                outcome = posted.outcome
                span.note({"ifabric.commit.succeeded": outcome.succeeded, "ifabric.revision": outcome.revision})
            return posted

    async def fresh(self, names: tuple[str, ...], *, owner: str) -> int:
        """Reads these accounts from etcd, whatever is known of them; the moment (ms) that their windows are of."""
        now_ms = self._clock.wall_ms()
        await self._read([Get(records.account_key(name)) for name in names], owner, and_absence=False)
        lines = [self.memory.line(name, now_ms) for name in names]
        await self._read(
            [Get(records.tally_key(line.account, line.window)) for line in lines], owner, and_absence=False
        )
        return now_ms

    # -- one root account ---------------------------------------------------------------------------------------------

    async def _run(self, root: str) -> None:
        """Works the queue off."""
        queue = self._queues[root]
        CURRENT.set(None)  # of this task, which began with one message and is for many
        slot = self._slots.pop() if self._slots else self._new_slot()
        batch: list[_Waiting] = []
        again: list[_Waiting] = []
        try:
            while queue or again:
                batch, again = again, []
                now_ms = await self._learn_what_is_asked(batch, queue)
                attempt = self._assemble(batch, queue, Books(self.memory, now_ms))
                if attempt.drafts or attempt.refused:
                    again = await self._carry_out(attempt, slot)
                if attempt.behind:
                    await self._look_again(attempt.behind)
                self.memory.trim()
        except BaseException as error:  # a bug, or the end of the process: whoever waits is told, and it is raised
            ended = error if isinstance(error, FabricError) else RuntimeError(f"the teller ended: {error!r}")
            for waiting in (*batch, *again, *queue):
                _tell(waiting, ended)
            queue.clear()
            raise
        finally:
            self._slots.append(slot)
            del self._queues[root]

    def _new_slot(self) -> int:
        self._slots_made += 1
        return self._slots_made

    async def _learn_what_is_asked(self, batch: list[_Waiting], queue: deque[_Waiting]) -> int:
        """Moves what may go together from the queue to the batch, and reads the accounts that are not known yet.

        The moment (ms since the epoch) as of which they are known.
        """
        while queue and len(batch) < TOGETHER_MAX:
            batch.append(queue.popleft())
        while True:  # twice at most, but around midnight: an account's limit says which of its tallies counts
            now_ms = self._clock.wall_ms()
            asked: dict[Get, None] = {}
            for waiting in batch:
                asked |= dict.fromkeys(self.memory.unknown(waiting.posting.accounts, waiting.posting.places, now_ms))
            if not asked:
                return now_ms
            try:
                await self._read(list(asked), batch[0].posting.owner)
            except FabricError as error:
                for waiting in batch:
                    _tell(waiting, error)
                batch.clear()

    async def _read(self, gets: list[Get], owner: str, *, and_absence: bool = True) -> None:
        parts = [tuple(gets[at : at + READ_AT_ONCE]) for at in range(0, len(gets), READ_AT_ONCE)]
        outcomes = await asyncio.gather(*(self._committer.commit(Request((), part, owner=owner)) for part in parts))
        for part, outcome in zip(parts, outcomes, strict=True):
            for get, got in zip(part, outcome.answers, strict=True):
                assert isinstance(got, Got), "a read is answered"
                if got.kvs or and_absence:
                    self.memory.learn(get.key, got.kvs[0] if got.kvs else None, outcome.revision)

    def _assemble(self, batch: list[_Waiting], queue: deque[_Waiting], books: Books) -> _Attempt:
        """Decides as many as fit into one transaction; the others go back to the head of the queue."""
        attempt = _Attempt(books, [], [], [])
        keys: set[bytes] = set()
        later: list[_Waiting] = []
        compares = ops = 0
        for at, waiting in enumerate(batch):
            if waiting.future.done():  # its caller was cancelled
                continue
            posting = waiting.posting
            if not keys.isdisjoint(posting.keys):
                later.append(waiting)
                continue
            # at the most; what was refused is compared too
            most = len(posting.keys) + OWN_MAX + books.unseen(posting.accounts, posting.places)
            if (attempt.drafts or attempt.refused) and (compares + books.size + most > TOGETHER_MAX or ops > OPS_MAX):
                later += batch[at:]
                break
            try:
                draft = posting.make(books)
            except FabricError as refusal:
                attempt.refused.append((waiting, refusal))
                continue
            except BehindError:
                attempt.behind.append(waiting)
                continue
            except Exception as error:  # a bug, and its own: but the books may be half written, so they begin anew
                _tell(waiting, error)
                queue.extendleft(reversed(batch))
                return _Attempt(books, [], [], [])
            attempt.drafts.append((waiting, draft))
            keys.update(posting.keys)
            compares += len(draft.request.compares)
            ops += len(draft.request.then)
        queue.extendleft(reversed(later))
        return attempt

    async def _look_again(self, behind: list[_Waiting]) -> None:
        """Reads the accounts anew, and hands the postings back: who made them looks at his own records."""
        places = dict.fromkeys(place for waiting in behind for place in waiting.posting.places)
        try:
            await self._read([Get(records.tally_key(*place)) for place in places], behind[0].posting.owner)
        except FabricError as error:
            for waiting in behind:
                _tell(waiting, error)
        for waiting in behind:
            if not waiting.future.done():
                waiting.future.set_result(Posted(Outcome(False, 0, ()), None))

    async def _carry_out(self, attempt: _Attempt, slot: int) -> list[_Waiting]:
        """One transaction; who is to be decided again."""
        request = self._request(attempt, slot)
        everyone = [*(waiting for waiting, _ in attempt.drafts), *(waiting for waiting, _ in attempt.refused)]
        for waiting in everyone:
            if waiting.span is not None:
                waiting.span.event("sent", {"ifabric.commit.batch_size": len(everyone)})
        try:
            outcome = await self._committer.commit(request)
        except FabricError as error:
            for waiting in everyone:
                _tell(waiting, error)
            return []
        if outcome.succeeded:
            attempt.books.committed(outcome.revision)
            self._together.observe(len(everyone))
            self._answer(attempt, outcome, request)
            return []
        self._races.inc()
        return self._learn_why(attempt, request, outcome)

    def _request(self, attempt: _Attempt, slot: int) -> Request:
        compares: dict[Compare, None] = dict.fromkeys(attempt.books.compares())
        then: list[Any] = []
        for _, draft in attempt.drafts:
            compares |= dict.fromkeys(draft.request.compares)
            then += draft.request.then
        witness = None
        if attempt.drafts:
            then += attempt.books.puts()
            # a receipt is unlike any other and never overwritten. Without one, a key of the slot's own: no other attempt
            # of the slot begins before this one is over.
            witness = next((op for op in then if type(op) is Put and op.key.startswith(RECEIPTS)), None)
            if witness is None:
                value = b"%d" % next(self._attempts)
                witness = Put(records.POSTED + f"{self._name}/{slot}".encode(), value)
                then.append(witness)
        # a limit has no compare of its own where a tally is there: whoever changes it rewrites the tally, and then it is read
        limits = (records.account_key(name) for name in attempt.books.names())
        otherwise = tuple(Get(key) for key in dict.fromkeys((*(compare.key for compare in compares), *limits)))
        owner = (attempt.drafts or attempt.refused)[0][0].posting.owner
        return Request(tuple(compares), tuple(then), otherwise, owner, witness)

    def _answer(self, attempt: _Attempt, outcome: Outcome, request: Request) -> None:
        now, at = self._clock.monotonic(), 0
        for op in request.then:
            if type(op) is Put and op.key.startswith(records.HOLDS):
                self.written.append(KV(op.key, op.value, 0, outcome.revision, 0, op.lease))
        for waiting, draft in attempt.drafts:
            until = at + len(draft.request.then)
            answers = outcome.answers[at:until] if outcome.answers else ()
            at = until
            if not waiting.future.done():
                waiting.future.set_result(Posted(Outcome(True, outcome.revision, answers), draft.answer))
            self._seconds.observe(now - waiting.began)
        for waiting, refusal in attempt.refused:
            _tell(waiting, refusal)

    def _learn_why(self, attempt: _Attempt, request: Request, outcome: Outcome) -> list[_Waiting]:
        """Takes in what stands at the compared keys. Who failed by a condition of its own is handed back."""
        there = {}
        for get, got in zip(request.otherwise, outcome.answers, strict=True):
            assert isinstance(got, Got), "a read is answered"
            there[get.key] = got.kvs[0] if got.kvs else None
            if get.key.startswith((records.ACCOUNTS, records.TALLIES)):
                self.memory.learn(get.key, there[get.key], outcome.revision)
        again = []
        for waiting, draft in attempt.drafts:
            if all(fulfilled(compare, there[compare.key]) for compare in draft.request.compares):
                again.append(waiting)
            elif not waiting.future.done():
                waiting.future.set_result(Posted(Outcome(False, outcome.revision, ()), draft.answer))
        again += (waiting for waiting, _ in attempt.refused)
        for waiting in again:
            waiting.rounds += 1
            if waiting.rounds > ROUNDS_MAX:
                _tell(
                    waiting, Overloaded(f"lost {ROUNDS_MAX} races for an account; nothing was done", what="contention")
                )
        return [waiting for waiting in again if not waiting.future.done()]


def standing(hold: Hold) -> tuple[str, ...]:
    """The accounts whose limits a decision about a hold needs to know."""
    return tuple(name for name, _ in hold.on if not name.startswith(TASK))


def _tell(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)


def teller_of(context: Context) -> Teller:
    """The one teller of this process."""
    default = context.settings.governor.budget.default_session_micro_usd
    return context.parts.get(Teller, lambda: Teller(context.committer, context.clock, context.metrics, default))
