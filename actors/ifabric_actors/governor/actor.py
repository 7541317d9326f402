"""The governor: budgets that cannot be overspent, breakers in front of what fails, and which session suits a task.

A verb is carried out by one of five: `money` and `budgets` (with `ledger`, which decides, and `teller`, which commits
many decisions at once), `restoration` (with `replay`), `breakers` (with `circuit`) and `matcher` (with `matching`). They
share one feed. What happens by itself, a hold that ends with its owner, is in `holds`.
"""

from __future__ import annotations

from typing import Any

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.actor.feed import Feed
from ifabric.actor.publisher import Publisher
from ifabric.actor.receipts import Leases, Receipts
from ifabric.bus.base import JournalSpec
from ifabric.errors import FabricError
from ifabric.wire import governor as wire
from ifabric.wire import overview, subjects
from ifabric.wire import replay as lost
from ifabric_actors.coordinator import records as tasks
from ifabric_actors.governor import records
from ifabric_actors.governor.accounts import Accounts
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.budgets import Budgets
from ifabric_actors.governor.events import source
from ifabric_actors.governor.holds import Holds, Sweeper
from ifabric_actors.governor.lastwords import LastWords
from ifabric_actors.governor.matcher import Matcher
from ifabric_actors.governor.money import Money
from ifabric_actors.governor.office import Office
from ifabric_actors.governor.outages import Both
from ifabric_actors.governor.overhead import Overhead
from ifabric_actors.governor.overview import Overview
from ifabric_actors.governor.restoration import Restoration
from ifabric_actors.governor.roster import Sessions, Tasks
from ifabric_actors.governor.teller import teller_of

#: how often gauges are brought up to date
REPORT_S = 1.0
#: how often long idle accounts are looked for
FORGET_S = 3600.0


class Governor(Actor):
    """Budgets, breakers and matching."""

    component = "governor"
    description = "Keeps budgets, breakers, and which session suits a task."

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        settings = context.settings.coordinator
        self._receipts = Receipts(context.store, context.clock, keep_s=settings.receipt_ttl_seconds)
        governor = context.config
        self._kept_ended = Leases(context.store, context.clock, keep_s=governor.budget.ended_hold_ttl_seconds)
        self.sessions, self.tasks, self.holds = Sessions(), Tasks(), Holds()
        self.teller = teller_of(context)
        office = Office(context, self.teller, self.sessions, self.holds, self._receipts, self._kept_ended)
        self._money, self._budgets = Money(office), Budgets(office)
        self._restoration = Restoration(office, context.committer)
        self._overview = Overview(office)
        self._sweeper = Sweeper(
            self.holds,
            self.sessions,
            self.tasks,
            self.teller,
            self._kept_ended,
            context.clock,
            context.metrics,
            reconcile_s=settings.reconcile_interval_seconds,
        )
        self.sessions.on_gone, self.tasks.on_ended = self._sweeper.session_gone, self._sweeper.claim_ended
        self.accounts = Accounts(self.teller.memory)
        self.breakers = Breakers(context, self._receipts)
        self._matcher = Matcher(context, self.sessions, self.tasks, self.breakers)
        self._feed = Feed(
            context.store,
            (records.GOVERNOR, tasks.SESSIONS, tasks.TASKS),
            {
                records.ACCOUNTS: self.accounts,
                records.TALLIES: self.accounts,
                records.HOLDS: self.holds,
                records.BREAKERS: Both(self.breakers, self._matcher.outages),
                tasks.SESSIONS: self.sessions,
                tasks.TASKS: self.tasks,
            },
        )

        self._overhead = Overhead()
        self.holds.on_ended = self._overhead.add
        events = context.settings.events
        told = source(self.breakers.read, self.breakers.tell)
        spec = JournalSpec(
            subjects.EVENT_STREAM,
            (subjects.EVENTS,),
            max_age_s=events.max_age_seconds,
            max_bytes=events.max_bytes,
            replicas=events.replicas,
        )
        self._last_words = LastWords(context, told, self.teller.written)
        self._publisher = Publisher(
            told,
            context.store,
            context.bus,
            context.clock,
            self._feed,
            spec,
            published=context.metrics.counter("if_governor_events_published_total"),
            lag=context.metrics.gauge("if_governor_event_lag_seconds"),
        )

    async def start(self) -> None:
        await self.breakers.start()
        await self._feed.load()
        self.spawn(self._feed.follow(), name="feed")
        self.spawn(self._sweeper.sweep(), name="sweep")
        self.spawn(self._sweeper.tick(), name="tick")
        self.spawn(self._sweeper.reconcile(), name="reconcile")
        self.spawn(self._publisher.run(self.context.log), name="publisher")
        self.spawn(self._last_words.watch(), name="last words")
        self.spawn(self._track(), name="track costs")
        self.spawn(self._forget(), name="forget idle accounts")
        self.spawn(self._matcher.watch(), name="match")
        self.spawn(self._report(), name="report")

    async def stop(self) -> None:
        await self._last_words.at_the_end()
        await super().stop()
        await self._receipts.stop()
        await self._kept_ended.stop()
        await self._feed.stop()

    async def _report(self) -> None:
        """Never returns: brings the gauges up to date."""
        while True:
            self.breakers.refresh()
            self._matcher.refresh()
            await self.context.clock.sleep(REPORT_S)

    async def _track(self) -> None:
        """Never returns: brings the gauges of money up to date, every `cost_tracking_interval`."""
        context = self.context
        overhead = context.metrics.gauge("if_governor_cost_overhead_percent")
        while True:
            overhead.set(self._overhead.percent(context.clock.wall_ms()))
            await self.accounts.refresh(context.metrics, context.clock)
            await context.clock.sleep(context.config.budget.cost_tracking_interval)

    async def _forget(self) -> None:
        """Never returns: now and then, what is long over is deleted."""
        context = self.context
        while True:
            await context.clock.sleep(context.clock.jitter(0.5, 1.5) * FORGET_S)
            try:
                await self.accounts.forget_idle(
                    context.committer, context.clock, context.config.budget.account_ttl_seconds
                )
            except FabricError as error:
                context.log.info("idle accounts are forgotten another time", why=str(error))

    # -- the verbs

    @handles
    async def reserve(self, message: wire.Reserve, caller: Caller) -> Any:
        return await self._money.reserve(message, caller)

    @handles
    async def commit(self, message: wire.Commit, caller: Caller) -> Any:
        return await self._money.commit(message, caller)

    @handles
    async def void(self, message: wire.Void, caller: Caller) -> Any:
        return await self._money.void(message, caller)

    @handles
    async def spend(self, message: wire.Spend, caller: Caller) -> Any:
        return await self._money.spend(message, caller)

    @handles
    async def balance(self, message: wire.Balance, caller: Caller) -> wire.BalanceReply:
        return await self._budgets.balance(message, caller)

    @handles
    async def set_account(self, message: wire.SetAccount, caller: Caller) -> Any:
        return await self._budgets.set_account(message, caller)

    @handles
    async def replay(self, message: lost.Replay, caller: Caller) -> lost.ReplayReply:
        return await self._restoration.replay(message, caller)

    @handles
    async def restored(self, message: lost.Restored, caller: Caller) -> lost.RestoredReply:
        return await self._restoration.restored(message, caller)

    @handles
    async def match(self, message: wire.Match, caller: Caller) -> wire.MatchReply:
        return await self._matcher.match(message, caller)

    @handles
    async def admit(self, message: wire.Admit, caller: Caller) -> wire.AdmitReply:
        return await self.breakers.admit(message, caller)

    @handles
    async def report(self, message: wire.Report, caller: Caller) -> wire.BreakerReply:
        return await self.breakers.report(message, caller)

    @handles
    async def list_breakers(self, message: wire.Breakers, caller: Caller) -> wire.BreakersReply:
        return await self.breakers.list(message, caller)

    @handles
    async def set_breaker(self, message: wire.SetBreaker, caller: Caller) -> Any:
        return await self.breakers.set(message, caller)

    @handles
    async def list_accounts(self, message: overview.Accounts, caller: Caller) -> overview.AccountsReply:
        return await self._overview.accounts(message)
