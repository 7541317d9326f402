"""What the clerks of money share: sessions, receipts, and the questions that all of them ask etcd."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from ifabric.actor.base import Caller, Context
from ifabric.actor.receipts import Leases, Receipts, receipt_key, replayed
from ifabric.errors import SessionLost, Unavailable
from ifabric.store.base import KV, Compare, Get, Got, Put, TxnRefused, absent, unchanged
from ifabric.store.commit import Request
from ifabric.wire.envelope import Mutation
from ifabric_actors.coordinator import records as board
from ifabric_actors.coordinator.records import Seat
from ifabric_actors.governor.holds import Holds
from ifabric_actors.governor.ledger import Path
from ifabric_actors.governor.records import Hold
from ifabric_actors.governor.roster import Sessions
from ifabric_actors.governor.teller import Teller, standing

#: decisions for one request before it is told that the fabric is overloaded
TRIES_MAX = 32


class Replayed(NamedTuple):
    """The request had been carried out; this was the answer."""

    reply: msgspec.Raw


class Office:
    """One governor's shared parts."""

    def __init__(
        self, context: Context, teller: Teller, sessions: Sessions, holds: Holds, receipts: Receipts, ended: Leases
    ) -> None:
        self.teller, self.sessions, self.holds = teller, sessions, holds
        self.receipts, self.ended = receipts, ended
        self.clock, self.log, self.metrics = context.clock, context.log, context.metrics
        self.config = context.settings.governor.budget
        self._committer = context.committer

    def refuse_without_budgets(self) -> None:
        """`Unavailable` where budgets are switched off."""
        if not self.config.enabled:
            raise Unavailable(
                "Budgets are switched off (governor.budget.enabled); nothing was held or charged.", what="governor"
            )

    async def seat(self, session: str, *, fresh: bool = False) -> Seat:
        """The session, as last heard of or (`fresh`) as it is now. `SessionLost` once etcd has confirmed it."""
        seat = None if fresh else self.sessions.seats.get(session)
        if seat is None:
            (kv,) = await self.read((board.session_key(session),), session)
            if kv is None:
                raise SessionLost(session=session)
            seat = board.seat(kv)
        return seat

    async def leases(self, message: Mutation, *, ended: bool) -> tuple[int, int]:
        """What the receipt hangs on, and what an ended hold does; 0 for what is not written."""
        lease = await self.receipts.current() if message.request_id is not None else 0
        return lease, await self.ended.current() if ended else 0

    def retire(self) -> None:
        """A lease has gone, which only a frozen daemon sees."""
        self.receipts.retire()
        self.ended.retire()

    @staticmethod
    def keys(caller: Caller, message: Mutation, *keys: bytes) -> tuple[bytes, ...]:
        """What a request writes: these keys, and its receipt."""
        if message.request_id is None:
            return keys
        return (*keys, receipt_key(caller.session, message.request_id))

    def receipt(
        self, caller: Caller, message: Mutation, reply: Any, lease: int
    ) -> tuple[tuple[Compare, ...], tuple[Put, ...]]:
        """What a transaction compares and puts for its receipt; nothing for a request without an id."""
        if message.request_id is None:
            return (), ()
        put = self.receipts.put(caller.session, message, reply, lease)
        return (absent(put.key),), (put,)

    async def look(self, message: Mutation, caller: Caller, key: bytes) -> KV | Replayed | None:
        """What stands at a key now; the first answer instead when the request had been carried out."""
        keys: tuple[bytes, ...] = (key,)
        if message.request_id is not None:
            keys = (key, receipt_key(caller.session, message.request_id))
        kv, *receipt = await self.read(keys, caller.session)
        if receipt and receipt[0] is not None:
            return Replayed(replayed(receipt[0], message))
        return kv

    async def keep(self, message: Mutation, caller: Caller, key: bytes, revision: int, reply: Any) -> bool:
        """Writes the receipt of an answer that changes nothing, so that a retry is told the same whatever becomes of the
        record meanwhile. False: it has changed already.
        """
        if message.request_id is None:
            return True
        lease, _ = await self.leases(message, ended=False)
        compares, puts = self.receipt(caller, message, reply, lease)
        try:
            outcome = await self._committer.commit(
                Request((unchanged(key, revision), *compares), puts, (), caller.session, witness=puts[0])
            )
        except TxnRefused:
            self.retire()
            return False
        return outcome.succeeded

    async def read(self, keys: tuple[bytes, ...], owner: str) -> list[KV | None]:
        """What stands at these keys now."""
        outcome = await self._committer.commit(Request((), tuple(Get(key) for key in keys), owner=owner))
        return [got.kvs[0] if isinstance(got, Got) and got.kvs else None for got in outcome.answers]

    async def lines(self, hold: Hold) -> Path:
        """Where a hold stands, as of now."""
        names = standing(hold)
        now_ms = await self.teller.fresh(names, owner=hold.session)
        return tuple(self.teller.memory.line(name, now_ms) for name in names)
