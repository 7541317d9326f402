"""The money of a claim: its hold begins and ends in the claim's own transactions.

A claim with a hold is one decision and one transaction: the task is claimed and the money set aside, or neither. The
task's record carries the hold, so that whatever ends the claim (its holder, its session's death, an operator) ends the
hold with it: charged at the cost that was told, or freed. A hold that its holder committed by itself, before the claim
ended, is found by the compare on its record, which was written in the transaction of the claim and not since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec.structs import replace

from ifabric.actor.base import Context
from ifabric.actor.receipts import Leases
from ifabric.errors import Unavailable
from ifabric.metrics import Metrics
from ifabric.store.base import KV, Put, absent, unchanged
from ifabric.wire.envelope import Usage
from ifabric.wire.governor import account_of, claim_hold, path_of
from ifabric_actors.coordinator.records import Seat, Stored, Task, TaskHold
from ifabric_actors.governor import ledger
from ifabric_actors.governor import records as money
from ifabric_actors.governor.books import TASK, Books, Place
from ifabric_actors.governor.records import Hold
from ifabric_actors.governor.teller import standing, teller_of

#: endings of holds that are remembered until their claims have ended too
SEEN_MAX = 10_000


class Paid(NamedTuple):
    """What money adds to a plan: fields of its reply, the task's hold, and what is compared and put."""

    reply: dict[str, Any]
    hold: TaskHold | None
    compares: tuple[Any, ...]
    puts: tuple[Put, ...]
    usage: Usage | None = None


class Payment(NamedTuple):
    """A part of a plan that is decided on accounts: these, and these tallies. `key` is where the hold is kept."""

    key: bytes
    accounts: tuple[str, ...]
    places: tuple[Place, ...]
    pay: Callable[[Books], Paid]


class Purse:
    """Begins and ends the holds of claims."""

    def __init__(self, context: Context) -> None:
        settings = context.settings.governor.budget
        self._enabled = settings.enabled
        self.teller = teller_of(context)
        self.ended = Leases(context.store, context.clock, keep_s=settings.ended_hold_ttl_seconds)
        #: records of holds that had ended before their claim
        self._seen: dict[bytes, KV] = {}
        #: how many there have been
        self.endings_seen = 0
        self._meters = _Meters(context.metrics)

    def refuse_without_budgets(self, amount_micro_usd: int | None) -> None:
        """`Unavailable` when a hold is asked for where there are no budgets."""
        if amount_micro_usd is not None and not self._enabled:
            raise Unavailable(
                "Budgets are switched off (governor.budget.enabled); nothing was claimed or held.", what="governor"
            )

    # -- beginning ----------------------------------------------------------------------------------------------------

    def placing(self, task: Task, seat: Seat, session: str, amount: int, request: str) -> Payment:
        """A hold for a claim in the making: `task` is the record that is written."""
        account = account_of(seat.session.account, session)
        spec = task.spec
        name = claim_hold(spec.id, task.fence)
        key = money.hold_key(session, name)

        def pay(books: Books) -> Paid:
            path = books.path(account, task=spec.id, budget_micro_usd=spec.budget_micro_usd)
            on = tuple((line.account, line.window) for line in path)
            own = TaskHold(name, account, amount, on, books.now_ms)
            settled = ledger.reserved(replace(_hold(task, own), request=request), path)
            books.put(settled.path)
            return Paid({"hold": name}, own, (absent(key),), (Put(key, money.encode(settled.hold)),))

        places = ((TASK + spec.id, "total"),) if spec.budget_micro_usd is not None else ()
        return Payment(key, path_of(account), places, pay)

    # -- ending -------------------------------------------------------------------------------------------------------

    def ending(
        self,
        stored: Stored,
        why: str,
        ended: int,
        *,
        cost: int | None = None,
        usage: Usage | None = None,
        seat: Seat | None = None,
        request: str = "",
    ) -> Payment | None:
        """What the end of a claim does to its money; None: nothing. `ended` is the lease that the record hangs on then.

        With a cost, that is charged; without one, what is held is freed.
        """
        task = stored.task
        own = task.hold
        if own is None:
            if cost is None or seat is None:
                return None
            return self._costing(task, seat, cost, usage, ended, request)
        key = hold_key(task)
        seen = self._seen.get(key)
        hold = money.hold(seen) if seen is not None else _hold(task, own)
        compare = unchanged(key, seen.mod_revision if seen is not None else stored.mod_revision)

        def pay(books: Books) -> Paid:
            if hold.state != "open" and cost is None:  # its holder has ended it before
                return Paid({}, None, (compare,), ())
            path, now = books.at(hold.on), books.now_ms
            if cost is not None:
                settled = ledger.committed(hold, path, cost, usage=usage, now=now, request=request)
                reply = {"charged": settled.hold.charged, "overdraft": settled.hold.overdraft}
            else:
                settled, reply = ledger.expired(hold, path, why=why, now=now), {}
            if settled.again:
                return Paid(reply, None, (compare,), ())
            books.put(settled.path)
            return Paid(reply, None, (compare,), (Put(key, money.encode(settled.hold), ended),), usage)

        return Payment(key, standing(hold), hold.on, pay)

    def _costing(
        self, task: Task, seat: Seat, cost: int, usage: Usage | None, ended: int, request: str
    ) -> Payment | None:
        """A cost that nothing was held for."""
        if not self._enabled:
            return None
        account = account_of(seat.session.account, task.session)
        name = claim_hold(task.spec.id, task.fence)
        key = money.hold_key(task.session, name)
        budget = task.spec.budget_micro_usd

        def pay(books: Books) -> Paid:
            path = books.path(account, task=task.spec.id, budget_micro_usd=budget)
            own = TaskHold(name, account, 0, tuple((line.account, line.window) for line in path), books.now_ms)
            hold = replace(_hold(task, own), request=request)
            settled = ledger.costed(hold, path, cost, usage=usage, now=books.now_ms)
            books.put(settled.path)
            reply = {"charged": cost, "overdraft": settled.hold.overdraft}
            return Paid(reply, None, (absent(key),), (Put(key, money.encode(settled.hold), ended),), usage)

        places = ((TASK + task.spec.id, "total"),) if budget is not None else ()
        return Payment(key, path_of(account), places, pay)

    # -- what was seen --------------------------------------------------------------------------------------------------

    def see(self, kv: KV) -> None:
        """A hold's record was read: it is remembered when the hold has ended."""
        if money.hold(kv).state == "open" or kv.key in self._seen:
            return
        self._seen[kv.key] = kv
        self.endings_seen += 1
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]

    def count(self, verb: str, paid: Paid) -> None:
        """Counts what was committed."""
        self._meters.count(verb, paid)

    def count_short(self) -> None:
        """Counts a claim that was refused for its hold."""
        self._meters.short.inc()


class _Meters:
    """The metrics of money that claims move."""

    def __init__(self, metrics: Metrics) -> None:
        self._done = {
            verb: metrics.counter("if_governor_requests_total", verb=verb, outcome="done")
            for verb in ("claim", "complete")
        }
        self.short = metrics.counter("if_governor_requests_total", verb="claim", outcome="short")
        self._charged = {
            purpose: metrics.counter("if_governor_charged_micro_usd_total", purpose=purpose)
            for purpose in ("work", "coordination")
        }
        self._overdrafts = metrics.counter("if_governor_overdraft_micro_usd_total")

    def count(self, verb: str, paid: Paid) -> None:
        done = self._done.get(verb)
        if done is not None:
            done.inc()
        if paid.reply.get("charged"):
            self._charged[paid.usage.purpose if paid.usage is not None else "work"].inc(paid.reply["charged"])
            self._overdrafts.inc(paid.reply["overdraft"])


def hold_key(task: Task) -> bytes:
    """Where the hold of a claim is kept."""
    assert task.hold is not None, "the claim has a hold"
    return money.hold_key(task.session, task.hold.name)


def _hold(task: Task, own: TaskHold) -> Hold:
    """The record of a claim's hold, while it is open."""
    return Hold(
        state="open",
        session=task.session,
        account=own.account,
        amount=own.amount,
        on=own.on,
        at=own.at,
        lease=task.lease,
        task=task.spec.id,
        fence=task.fence,
        body="claim",
    )
