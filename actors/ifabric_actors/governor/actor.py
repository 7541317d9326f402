"""The governor: budgets that cannot be overspent, breakers in front of what fails, and which session suits a task.

A verb is carried out by one of three: `money` (with `ledger`, which decides, and `teller`, which commits many
decisions at once), `breakers` (with `circuit`) and `matcher` (with `matching`). They share one feed. What happens by
itself, a hold that ends with its owner, is in `holds`.
"""

from __future__ import annotations

from typing import Any

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.actor.feed import Feed
from ifabric.actor.receipts import Receipts
from ifabric.wire import governor as wire
from ifabric_actors.coordinator import records as tasks
from ifabric_actors.governor import records
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.matcher import Matcher
from ifabric_actors.governor.roster import Sessions, Tasks

#: how often gauges are brought up to date
REPORT_S = 1.0


class Governor(Actor):
    """Budgets, breakers and matching."""

    component = "governor"
    description = "Keeps budgets, breakers, and which session suits a task."

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        settings = context.settings.coordinator
        self._receipts = Receipts(context.store, context.clock, keep_s=settings.receipt_ttl_seconds)
        self.sessions, self.tasks = Sessions(), Tasks()
        self.breakers = Breakers(context, self._receipts)
        self._matcher = Matcher(context, self.sessions, self.tasks, self.breakers)
        self._feed = Feed(
            context.store,
            (records.GOVERNOR, tasks.SESSIONS, tasks.TASKS),
            {
                records.BREAKERS: self.breakers,
                tasks.SESSIONS: self.sessions,
                tasks.TASKS: self.tasks,
            },
        )

    async def start(self) -> None:
        await self._feed.load()
        self.spawn(self._feed.follow(), name="feed")
        self.spawn(self._report(), name="report")

    async def stop(self) -> None:
        await super().stop()
        await self._receipts.stop()
        await self._feed.stop()

    async def _report(self) -> None:
        """Never returns: brings the gauges up to date."""
        while True:
            self.breakers.refresh()
            self._matcher.refresh()
            await self.context.clock.sleep(REPORT_S)

    # -- the verbs

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
