"""Where a breaker's decision meets etcd: one compare-and-swap on its key, decided again when it had changed.

One at a time for each breaker: two of one daemon would only race each other, and whoever waits for its turn often finds
that there is nothing left to do. So two hundred callers at an open breaker cost as many writes as there are probes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from msgspec.structs import replace

from ifabric.actor.base import Context
from ifabric.actor.receipts import Receipts, receipt_key, replayed
from ifabric.errors import Overloaded
from ifabric.store.base import Compare, Get, Put, TxnRefused, absent, unchanged
from ifabric.store.commit import Outcome, Request
from ifabric.wire import governor as wire
from ifabric.wire.envelope import encode
from ifabric_actors.governor import records
from ifabric_actors.governor.circuit import Circuit
from ifabric_actors.governor.mirror import Known, Mirror

#: decisions for one request before it is told that the fabric is overloaded
TRIES_MAX = 32
STATES: tuple[wire.BreakerState, ...] = ("closed", "open", "half_open")

#: is given what is known, and answers what is to be stored, or None: nothing
Decide = Callable[[Circuit], Circuit | None]


class Switches:
    """Carries decisions out for one daemon."""

    def __init__(self, context: Context, receipts: Receipts, mirror: Mirror) -> None:
        self._context, self._receipts, self._mirror = context, receipts, mirror
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._transitions = {
            to: context.metrics.counter("if_governor_breaker_transitions_total", to=to) for to in STATES
        }

    async def change(self, name: str, owner: str, decide: Decide) -> Circuit:
        """Decides and commits until it goes through; the breaker then.

        Raises what `decide` raises, `Overloaded` when others kept changing the breaker, and what `Committer.commit`
        raises.
        """
        done = await self._transact(name, owner, decide, None)
        assert isinstance(done, Circuit)
        return done

    async def carry_out(self, message: wire.SetBreaker, owner: str, decide: Decide) -> wire.BreakerReply | msgspec.Raw:
        """The same for an operator's command, whose repetition gets the first answer."""
        done = await self._transact(message.breaker, owner, decide, message)
        return wire.BreakerReply(state=done.state) if isinstance(done, Circuit) else done

    async def look(self, name: str, owner: str) -> None:
        """Reads a breaker from etcd, together with other requests."""
        get = Get(records.breaker_key(name))
        self._learn(name, await self._context.committer.commit(Request((), (get,), (), owner)))

    async def _transact(
        self, name: str, owner: str, decide: Decide, message: wire.SetBreaker | None
    ) -> Circuit | msgspec.Raw:
        turn = self._turns.get(name)
        if turn is None:
            turn = self._turns[name] = asyncio.Lock()
        for _ in range(TRIES_MAX):
            async with turn:
                known = self._mirror.get(name)
                after = decide(known.circuit)
                if after is None:
                    return known.circuit
                after = replace(after, write=self._context.clock.token())
                done = await self._attempt(name, owner, known, after, message)
                if done is not None:
                    return done
        raise Overloaded(f"breaker {name} lost {TRIES_MAX} races; nothing was done", what="contention")

    async def _attempt(
        self, name: str, owner: str, known: Known, after: Circuit, message: wire.SetBreaker | None
    ) -> Circuit | msgspec.Raw | None:
        """One commit: the breaker as stored, or the first answer to the command. None: something had changed."""
        key = records.breaker_key(name)
        compares: list[Compare] = [unchanged(key, known.mod_revision)]
        puts, reads = [Put(key, encode(after))], [Get(key)]
        if message is not None and message.request_id is not None:
            reply = wire.BreakerReply(state=after.state)
            receipt = self._receipts.put(owner, message, reply, await self._receipts.current())
            compares.append(absent(receipt.key))
            puts.append(receipt)
            reads.append(Get(receipt_key(owner, message.request_id)))
        request = Request(tuple(compares), tuple(puts), tuple(reads), owner, witness=puts[-1])
        try:
            outcome = await self._context.committer.commit(request)
        except TxnRefused:
            if len(puts) == 1:
                raise
            self._receipts.retire()  # the lease under the receipt has gone, which only a frozen daemon sees
            return None
        if outcome.succeeded:
            self._mirror.put(name, after, outcome.revision)
            self._note(name, after)
            return after
        self._learn(name, outcome)
        first = outcome.answers[1] if len(outcome.answers) > 1 else None
        return replayed(first.kvs[0], message) if first is not None and first.kvs and message is not None else None

    def _learn(self, name: str, outcome: Outcome) -> None:
        """Takes in what was read. What was not there had gone before this revision: it may have been made at it."""
        got = outcome.answers[0]
        assert got is not None, "a read is answered"
        if got.kvs:
            self._mirror.take(got.kvs[0])
        else:
            self._mirror.forget(name, outcome.revision - 1)

    def _note(self, name: str, circuit: Circuit) -> None:
        """Counts and logs a transition that this daemon made."""
        if not circuit.event:
            return
        self._transitions[circuit.state].inc()
        said: dict[str, Any] = {"breaker": name, "transition": circuit.event, "trips": circuit.trips}
        said |= {word: text for word in ("by", "why", "request") if (text := getattr(circuit, word))}
        log = self._context.log
        if circuit.state == "open":
            log.warning("a breaker opened", **said, open_s=circuit.last_open_s if circuit.until else None)
        elif circuit.state == "half_open":
            log.info("a breaker lets probes through", **said)
        else:
            log.info("a breaker closed", **said)
