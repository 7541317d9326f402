"""Carries out `reserve`, `commit`, `void` and `spend`: holds begin and end, or were before and are answered again."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import msgspec

from ifabric.actor.base import Caller
from ifabric.errors import (
    BadRequest,
    BudgetShort,
    ClaimLost,
    Conflict,
    FabricError,
    Forbidden,
    Overloaded,
    Unavailable,
    UnknownHold,
)
from ifabric.store.base import Compare, Put, TxnRefused, absent, leased, unchanged
from ifabric.store.commit import Request
from ifabric.wire import governor as wire
from ifabric.wire.envelope import Mutation
from ifabric_actors.coordinator import records as board
from ifabric_actors.coordinator.records import Seat
from ifabric_actors.governor import ledger, records
from ifabric_actors.governor.books import TASK, Books
from ifabric_actors.governor.ledger import Path, Settled, told
from ifabric_actors.governor.office import TRIES_MAX, Office, Replayed
from ifabric_actors.governor.records import Hold
from ifabric_actors.governor.teller import Draft, Posting, standing


class _For(NamedTuple):
    """What a hold is for: the claim, and the compares that it is still held."""

    task: str
    fence: int
    budget_micro_usd: int | None
    compares: tuple[Compare, ...]


class Money:
    """The clerk for all verbs about money."""

    def __init__(self, office: Office) -> None:
        self._office, self._teller, self._holds, self._clock = office, office.teller, office.holds, office.clock
        metrics = office.metrics
        self._outcomes = {
            (verb, outcome): metrics.counter("if_governor_requests_total", verb=verb, outcome=outcome)
            for verb in ("reserve", "commit", "void", "spend")
            for outcome in ("done", "short")
        }
        self._late = metrics.counter("if_governor_late_commits_total")
        self._charged = {
            purpose: metrics.counter("if_governor_charged_micro_usd_total", purpose=purpose)
            for purpose in ("work", "coordination")
        }
        self._overdrafts = metrics.counter("if_governor_overdraft_micro_usd_total")

    # -- holding ------------------------------------------------------------------------------------------------------

    async def reserve(self, message: wire.Reserve, caller: Caller) -> Any:
        ttl_s = message.ttl_s or self._office.config.hold_ttl_seconds

        def settle(hold: Hold, path: Path) -> Settled:
            return ledger.reserved(replace_end(hold, hold.at + ttl_s * 1000), path)

        def reply(settled: Settled) -> wire.ReserveReply:
            hold = settled.hold
            left_s = max(0, hold.expires_at - self._clock.wall_ms()) / 1000 if hold.state == "open" else 0.0
            return wire.ReserveReply(hold=message.hold, expires_in_s=left_s, path=told(settled.path))

        return await self._begin(message, message.hold, caller, settle, reply)

    async def spend(self, message: wire.Spend, caller: Caller) -> Any:
        def settle(hold: Hold, path: Path) -> Settled:
            return ledger.entered(hold, path, usage=message.usage, now=hold.at)

        return await self._begin(message, message.entry, caller, settle, _charged)

    async def _begin(
        self, message: wire.Reserve | wire.Spend, name: str, caller: Caller, settle: Any, reply: Any
    ) -> Any:
        """Writes a new hold, or answers as when it was new."""
        self._office.refuse_without_budgets()
        if (message.task is None) != (message.fence is None):
            raise BadRequest("task and fence go together; nothing was held or charged")
        key, body = records.hold_key(caller.session, name), _body(message)
        keys = self._office.keys(caller, message, key)
        for attempt in range(TRIES_MAX):
            try:
                # what the mirror says is a moment old: where it was wrong, or a refusal hangs on it, etcd is asked
                seat = await self._office.seat(caller.session, fresh=attempt > 0 or message.task is not None)
                account = self._account_of(message.account, caller.session, seat)
                work = await self._work(message, caller.session, seat)
                lease, ended = await self._office.leases(message, ended=message.verb == "spend")
            except FabricError as refusal:
                return await self._confirmed(refusal, message, caller, key, body, reply)

            def make(
                books: Books, seat: Seat = seat, account: str = account, work: _For = work, leases: Any = (lease, ended)
            ) -> Draft:
                path = books.path(account, task=work.task, budget_micro_usd=work.budget_micro_usd)
                hold = Hold(
                    state="open",
                    session=caller.session,
                    account=account,
                    amount=message.amount_micro_usd,
                    on=tuple((line.account, line.window) for line in path),
                    at=books.now_ms,
                    lease=seat.lease,
                    task=work.task,
                    fence=work.fence,
                    body=body,
                    request=message.request_id or "",
                )
                settled = settle(hold, path)
                books.put(settled.path)
                compares = (absent(key), leased(board.session_key(caller.session), seat.lease), *work.compares)
                return self._draft(caller, message, compares, key, settled, _once(reply(settled)), *leases)

            accounts = wire.path_of(account)
            places = ((TASK + work.task, "total"),) if work.budget_micro_usd is not None else ()
            try:
                posted = await self._teller.post(Posting(accounts, places, keys, make, caller.session))
            except TxnRefused:
                self._office.retire()
                continue
            except FabricError as refusal:
                if isinstance(refusal, BudgetShort):
                    self._outcomes[message.verb, "short"].inc()
                return await self._confirmed(refusal, message, caller, key, body, reply)
            if posted.outcome.succeeded:
                return self._done(message.verb, key, posted.answer, posted.outcome.revision)
            found = await self._found(message, caller, key, body, reply)
            if found is not None:
                return found
        raise Overloaded(f"{message.verb} lost {TRIES_MAX} races; nothing was done", what="contention")

    async def _confirmed(
        self, refusal: FabricError, message: Any, caller: Caller, key: bytes, body: str, reply: Any
    ) -> Any:
        """The first answer, when the request had been carried out: then it is no wonder that it is refused now."""
        if not isinstance(refusal, Unavailable | Overloaded):
            found = await self._found(message, caller, key, body, reply)
            if found is not None:
                return found
        raise refusal

    async def _found(self, message: Any, caller: Caller, key: bytes, body: str, reply: Any) -> Any:
        """What this request, or another one for the same hold, was answered. `Conflict` when that one was different."""
        for _ in range(TRIES_MAX):
            kv = await self._office.look(message, caller, key)
            if isinstance(kv, Replayed):
                return kv.reply
            if kv is None:
                return None
            hold = records.hold(kv)
            if hold.body != body and not _same_as_replayed(hold, message):
                raise Conflict(
                    f"{key[len(records.HOLDS) :].decode()} was used before, with another amount, account or verb; "
                    "nothing was held or charged",
                    state=hold.state,
                )
            answer = reply(Settled(hold, await self._office.lines(hold), again=True))
            if await self._office.keep(message, caller, key, kv.mod_revision, answer):
                return answer
        raise Overloaded(f"{message.verb} lost {TRIES_MAX} races; nothing was done", what="contention")

    # -- ending -------------------------------------------------------------------------------------------------------

    async def commit(self, message: wire.Commit, caller: Caller) -> Any:
        request = message.request_id or ""

        def settle(hold: Hold, path: Path) -> Settled:
            return ledger.committed(
                hold, path, message.amount_micro_usd, usage=message.usage, now=self._clock.wall_ms(), request=request
            )

        return await self._end(message, caller, settle, _charged)

    async def void(self, message: wire.Void, caller: Caller) -> Any:
        def settle(hold: Hold, path: Path) -> Settled:
            return ledger.voided(hold, path, now=self._clock.wall_ms(), request=message.request_id or "")

        def reply(settled: Settled) -> wire.VoidReply:
            return wire.VoidReply(released=settled.hold.amount if settled.hold.state == "voided" else 0)

        return await self._end(message, caller, settle, reply)

    async def _end(self, message: wire.Commit | wire.Void, caller: Caller, settle: Any, reply: Any) -> Any:
        """Ends a hold, or answers as when it was ended."""
        self._office.refuse_without_budgets()
        key = records.hold_key(caller.session, message.hold)
        keys = self._office.keys(caller, message, key)
        known = self._holds.open.get(key)
        hold, revision = (known.hold, known.mod_revision) if known is not None else (None, 0)
        for _ in range(TRIES_MAX):
            if hold is None:
                kv = await self._office.look(message, caller, key)
                if isinstance(kv, Replayed):
                    return kv.reply
                if kv is None:
                    raise UnknownHold(hold=message.hold)
                hold, revision = records.hold(kv), kv.mod_revision
            # what has ended is refused, or answered again, before any account is looked at
            if hold.state != "open" and settle(hold, ()).again:
                answer = reply(Settled(hold, await self._office.lines(hold), again=True))
                if await self._office.keep(message, caller, key, revision, answer):
                    return answer
                hold = None
                continue
            lease, ended = await self._office.leases(message, ended=True)

            def make(books: Books, hold: Hold = hold, revision: int = revision, leases: Any = (lease, ended)) -> Draft:
                settled = settle(hold, books.at(hold.on))
                books.put(settled.path)
                compares = (unchanged(key, revision),)
                return self._draft(caller, message, compares, key, settled, _once(reply(settled)), *leases)

            try:
                posted = await self._teller.post(Posting(standing(hold), hold.on, keys, make, caller.session))
            except TxnRefused:
                self._office.retire()
                continue
            if posted.outcome.succeeded:
                return self._done(message.verb, key, posted.answer, posted.outcome.revision)
            hold = None
        raise Overloaded(f"{message.verb} lost {TRIES_MAX} races; nothing was done", what="contention")

    # -- what they share ------------------------------------------------------------------------------------------------

    def _account_of(self, named: str | None, session: str, seat: Seat) -> str:
        own = wire.account_of(seat.session.account, session)
        if named is None or named == own or named.startswith(own + "/"):
            return named or own
        raise Forbidden(
            f"session {session} draws on {own} and on what is below it, not on {named}; nothing was held or charged",
            account=own,
        )

    async def _work(self, message: wire.Reserve | wire.Spend, session: str, seat: Seat) -> _For:
        """The claim that it is for. `ClaimLost` when the session does not hold it under this fence."""
        if message.task is None or message.fence is None:
            return _For("", 0, None, ())
        key = board.task_key(message.task)
        (kv,) = await self._office.read((key,), session)
        task = board.stored(kv).task if kv is not None else None
        held = task is not None and (task.state, task.session, task.fence, task.lease) == (
            "claimed",
            session,
            message.fence,
            seat.lease,
        )
        if task is None or kv is None or not held:
            raise ClaimLost(
                f"session {session} does not hold task {message.task} under fence {message.fence}; "
                "nothing was held or charged",
                task=message.task,
                fence=task.fence if task is not None else 0,
            )
        return _For(message.task, message.fence, task.spec.budget_micro_usd, (unchanged(key, kv.mod_revision),))

    def _draft(
        self,
        caller: Caller,
        message: Mutation,
        compares: tuple[Compare, ...],
        key: bytes,
        settled: Settled,
        reply: Any,
        lease: int,
        ended: int,
    ) -> Draft:
        hold = settled.hold
        put = Put(key, records.encode(hold), 0 if hold.state == "open" else ended)
        more, puts = self._office.receipt(caller, message, reply, lease)
        return Draft(Request((*compares, *more), (put, *puts)), (hold, reply))

    def _done(self, verb: str, key: bytes, answer: tuple[Hold, Any], revision: int) -> Any:
        hold, reply = answer
        self._holds.committed(key, hold, revision)
        self._outcomes[verb, "done"].inc()
        if hold.charged:
            self._charged[hold.usage.purpose if hold.usage is not None else "work"].inc(hold.charged)
            self._overdrafts.inc(hold.overdraft)
        if hold.state == "late":
            self._late.inc()
            self._office.log.warning(
                "a hold was committed after its end", session=hold.session, account=hold.account, charged=hold.charged
            )
        return reply


def _once(reply: Any) -> msgspec.Raw:
    """A reply as bytes, for the receipt and for the caller."""
    return msgspec.Raw(records.encode(reply))


def _charged(settled: Settled) -> wire.CommitReply:
    hold = settled.hold
    return wire.CommitReply(
        charged=hold.charged, late=hold.state == "late", overdraft=hold.overdraft, path=told(settled.path)
    )


def _body(message: wire.Reserve | wire.Spend) -> str:
    """Tells what was asked from anything else that the same name may be used for."""
    asked = msgspec.structs.replace(message, request_id=None)
    return hashlib.blake2b(message.verb.encode() + records.encode(asked), digest_size=8).hexdigest()


def _same_as_replayed(hold: Hold, message: wire.Reserve | wire.Spend) -> bool:
    """Whether it asks again for what a replay has made: of that no more than the amounts is known."""
    cost = hold.amount if message.verb == "reserve" else hold.charged
    return hold.body == records.REPLAYED_BODY and cost == message.amount_micro_usd


def replace_end(hold: Hold, expires_at: int) -> Hold:
    """The hold with a moment (ms since the epoch) at which it ends by itself."""
    return msgspec.structs.replace(hold, expires_at=expires_at)
