"""The coordinator: gives each task to one session at a time.

A verb is carried out by one of the clerks: it reads the board, lets `rules` decide, and hands the plan to the `desk`,
which commits it if nothing had changed. What happens by itself (expiry, unblocking, events) is in `sweeper` and
`publisher`; how the board keeps up with etcd is in `feed`.
"""

from __future__ import annotations

from typing import Any

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.actor.publisher import Publisher
from ifabric.actor.receipts import Receipts
from ifabric.bus.base import JournalSpec
from ifabric.wire import coordinator as wire
from ifabric.wire import overview, subjects
from ifabric_actors.coordinator.board import Board, Change
from ifabric_actors.coordinator.claims import Claims
from ifabric_actors.coordinator.desk import Desk
from ifabric_actors.coordinator.endings import Endings
from ifabric_actors.coordinator.events import source
from ifabric_actors.coordinator.feed import feed_of
from ifabric_actors.coordinator.money import Purse
from ifabric_actors.coordinator.office import Office
from ifabric_actors.coordinator.operators import Operators
from ifabric_actors.coordinator.overview import Overview
from ifabric_actors.coordinator.sessions import Sessions
from ifabric_actors.coordinator.shelves import shelves_of
from ifabric_actors.coordinator.submissions import Submissions
from ifabric_actors.coordinator.sweeper import Sweeper
from ifabric_actors.coordinator.waiters import Waiters
from ifabric_actors.governor.outages import Outages
from ifabric_actors.identity.register import agents_of


class Coordinator(Actor):
    """Tasks, sessions and claims."""

    component = "coordinator"
    description = "Gives each task to one session at a time, with a fence."

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config, metrics, clock, store = context.config, context.metrics, context.clock, context.store
        governor, identity = context.settings.governor, context.settings.identity
        self.board = Board(
            self._changed,
            self._gone,
            shelves_of(governor.capabilities, clock, metrics),
            Outages(enabled=governor.circuit_breaker.enabled),
        )
        self._receipts = Receipts(store, clock, keep_s=config.receipt_ttl_seconds)
        self._waiters = Waiters(config.waiters_max)
        deadlines: dict[str, int] = {}
        self._feed = feed_of(store, self.board, deadlines, self._deadline_passed)
        self._purse = Purse(context)
        desk = Desk(self.board, deadlines, context.committer, self._receipts, self._purse, metrics)
        self._office = Office(
            store=store,
            bus=context.bus,
            clock=clock,
            board=self.board,
            desk=desk,
            purse=self._purse,
            feed=self._feed,
            incarnation=context.committer.incarnation,
            ttl_s=config.task_claim_ttl_seconds,
            agent_of=agents_of(store, identity.operators) if identity.enabled else None,
            deadlines=deadlines,
        )
        self._sessions = Sessions(self._office)
        self._submissions = Submissions(self._office)
        self._claims = Claims(self._office, self._waiters, metrics)
        self._endings = Endings(self._office)
        self._operators = Operators(self._office)
        self._overview = Overview(self._office)
        self._sweeper = Sweeper(self._office, metrics, reconcile_s=config.reconcile_interval_seconds)
        events = context.settings.events
        journal = JournalSpec(
            subjects.EVENT_STREAM,
            (subjects.EVENTS,),
            max_age_s=events.max_age_seconds,
            max_bytes=events.max_bytes,
            replicas=events.replicas,
        )
        self._publisher = Publisher(
            source(clock),
            store,
            context.bus,
            clock,
            self._feed,
            journal,
            published=metrics.counter("if_coordinator_events_published_total"),
            lag=metrics.gauge("if_coordinator_event_lag_seconds"),
        )

    async def start(self) -> None:
        await self._feed.load()
        self.spawn(self._feed.follow(), name="feed")
        self.spawn(self._sweeper.sweep(), name="sweep")
        self.spawn(self._sweeper.reconcile(), name="reconcile")
        self.spawn(self._publisher.run(self.context.log), name="publisher")
        self.spawn(self._report(), name="report")

    async def stop(self) -> None:
        self._waiters.close()
        await super().stop()
        await self._receipts.stop()
        await self._purse.ended.stop()
        await self._feed.stop()

    def draining(self) -> None:
        self._waiters.close()

    # -- told by the board ------------------------------------------------------------------------------------------

    def _changed(self, change: Change) -> None:
        self._sweeper.task_changed(change)

    def _gone(self, session: str, lease: int) -> None:
        self._sweeper.session_gone(session, lease)

    def _deadline_passed(self, task_id: str) -> None:
        self._sweeper.deadline_passed(task_id)

    async def _report(self) -> None:
        """Never returns: brings the gauges up to date."""
        metrics = self.context.metrics
        active = metrics.gauge("if_coordinator_active_tasks")
        sessions = metrics.gauge("if_coordinator_active_sessions")
        waiters = metrics.gauge("if_coordinator_waiters")
        states = {state: metrics.gauge("if_coordinator_tasks", state=state) for state in wire.STATES}
        while True:
            active.set(self.board.counts["claimed"])
            sessions.set(len(self.board.sessions))
            waiters.set(len(self._waiters))
            for state, gauge in states.items():
                gauge.set(self.board.counts[state])
            await self.context.clock.sleep(1.0)

    # -- the verbs

    @handles
    async def hello(self, message: wire.Hello, caller: Caller) -> Any:
        return await self._sessions.hello(message, caller)

    @handles
    async def renew(self, message: wire.Renew, caller: Caller) -> wire.RenewReply:
        return await self._sessions.renew(message, caller)

    @handles
    async def bye(self, message: wire.Bye, caller: Caller) -> Any:
        return await self._sessions.bye(message, caller)

    @handles
    async def submit(self, message: wire.Submit, caller: Caller) -> Any:
        return await self._submissions.submit(message, caller)

    @handles
    async def get(self, message: wire.Get, caller: Caller) -> wire.GetReply:
        return await self._submissions.get(message, caller)

    @handles
    async def list(self, message: wire.List, caller: Caller) -> wire.ListReply:
        return await self._submissions.list(message, caller)

    @handles
    async def claim(self, message: wire.Claim, caller: Caller) -> wire.ClaimReply:
        return await self._claims.claim(message, caller)

    @handles
    async def next(self, message: wire.Next, caller: Caller) -> wire.ClaimReply:
        return await self._claims.next(message, caller)

    @handles
    async def release(self, message: wire.Release, caller: Caller) -> Any:
        return await self._endings.release(message, caller)

    @handles
    async def complete(self, message: wire.Complete, caller: Caller) -> Any:
        return await self._endings.complete(message, caller)

    @handles
    async def fail(self, message: wire.Fail, caller: Caller) -> Any:
        return await self._endings.fail(message, caller)

    @handles
    async def cancel(self, message: wire.Cancel, caller: Caller) -> Any:
        return await self._operators.cancel(message, caller)

    @handles
    async def requeue(self, message: wire.Requeue, caller: Caller) -> Any:
        return await self._operators.requeue(message, caller)

    @handles
    async def purge(self, message: wire.Purge, caller: Caller) -> Any:
        return await self._operators.purge(message, caller)

    @handles
    async def list_sessions(self, message: overview.Sessions, caller: Caller) -> overview.SessionsReply:
        return await self._overview.sessions(message)
