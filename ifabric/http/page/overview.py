"""What the page says is now: health, the board, breakers, workers, actors.

Most of it is asked over the bus; what only the daemon itself counts is read from its metrics. **What cannot be told is
null**: an answer that does not come in time, a component that runs nowhere, or, of what is only counted, not here. A
zero is said by who knows that it is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from ifabric.clock import Clock, rfc3339
from ifabric.errors import FabricError
from ifabric.http.health import Status
from ifabric.http.page.asking import Asker
from ifabric.metrics import Child, Gauge, Histogram, Metrics
from ifabric.wire import chassis, coordinator, governor, overview
from ifabric.wire.envelope import Request

#: how long a question may take that is asked every second
GLANCE_S = 0.9
#: lines of a list that is sent every second; the rest is asked for
SHOWN_MAX = 50
#: how many accounts, the fullest first
FULLEST = 10


class Actor(Struct, frozen=True, kw_only=True):
    """One resident of this daemon. Counted since the daemon started."""

    actor: str
    state: str
    restarts: int
    mailbox: int
    in_flight: int
    handled: int
    refused: int
    errors: int


class Overview:
    """Looks, when asked."""

    def __init__(
        self,
        asker: Asker,
        metrics: Metrics,
        status: Status,
        clock: Clock,
        hosted: Mapping[str, str],
        daemon: str,
        waiting: Callable[[], int] | None,
    ) -> None:
        self._asker, self._metrics, self._status, self._clock = asker, metrics, status, clock
        #: as the configuration and the supervision tree call a resident -> the component that it is
        self._named = hosted
        self._hosted = frozenset(hosted.values())
        self._daemon = daemon
        self._waiting = waiting
        self._stored, self._dropped = (
            metrics.counter("if_audit_stored_total"),
            metrics.counter("if_audit_dropped_total"),
        )
        self._messages = metrics.children("if_actor_messages_total")
        self._fullest = metrics.children("if_governor_budget_utilization")

    async def now(self, viewers: int) -> dict[str, Any]:
        """All of it, within a second."""
        missing: dict[str, str] = {}

        async def glance(message: Request) -> Any:
            try:
                return await self._asker.glance(message, GLANCE_S)
            except FabricError as error:
                missing[f"{message.component}.{message.verb}"] = error.message
                return None

        board, breakers, workers, sessions = await asyncio.gather(
            glance(coordinator.List(limit=1)),
            glance(governor.Breakers()),
            self._workers(glance),
            self._sessions(glance),
        )
        snapshot = self._status.snapshot()
        counts = board.counts if board is not None else None
        pool = workers or {"workers": None, "queue": None}
        return {
            "at": rfc3339(self._clock.wall_ms()),
            "daemon": self._daemon,
            "health": snapshot,
            "counts": counts,
            "sessions": sessions,
            "active": None if counts is None else counts.get("claimed", 0),
            "waiters": self._counted("coordinator", "if_coordinator_waiters"),
            "unmatched": self._counted("governor", "if_governor_unmatched_tasks"),
            "holds": self._counted("governor", "if_governor_holds_open"),
            "breakers": None if breakers is None else [_breaker(line) for line in breakers.breakers[:SHOWN_MAX]],
            **pool,
            "overhead_percent": self._counted("governor", "if_governor_cost_overhead_percent"),
            "budget_fullest": self._budgets(),
            "actors": list(self._actors(snapshot.actors)),
            "audit": self._audit(),
            "viewers": viewers,
            #: why something is null: component.verb -> a sentence
            "missing": missing,
        }

    async def _sessions(self, glance: Any) -> int | None:
        """How many there are: read where they are counted, else asked for."""
        if "coordinator" in self._hosted:
            return _whole(self._metrics.gauge("if_coordinator_active_sessions"))
        found = await glance(overview.Sessions(limit=1))
        return None if found is None else int(found.total)

    async def _workers(self, glance: Any) -> dict[str, Any] | None:
        """Of the chassis that runs here, or of one that answers."""
        metrics = self._metrics
        if "chassis" in self._hosted:
            idle, busy = (_whole(metrics.gauge("if_chassis_workers", state=state)) for state in ("idle", "busy"))
            return {"workers": {"idle": idle, "busy": busy}, "queue": _whole(metrics.gauge("if_chassis_queue_depth"))}
        found: chassis.RunsReply | None = await glance(chassis.Runs())
        if found is None:
            return None
        return {"workers": {"idle": found.pool.idle, "busy": found.pool.busy}, "queue": found.pool.queued}

    def _counted(self, component: str, name: str) -> float | int | None:
        if component not in self._hosted:
            return None
        value = self._metrics.gauge(name).value
        return int(value) if value == int(value) else round(value, 3)

    def _budgets(self) -> dict[str, float] | None:
        if "governor" not in self._hosted:
            return None
        filled = {dict(labels)["account"]: round(_value(child), 4) for labels, child in self._fullest.items()}
        fullest = sorted(filled, key=lambda account: -filled[account])[:FULLEST]
        return {account: filled[account] for account in fullest}

    def _audit(self) -> dict[str, int] | None:
        """How the audit of this daemon is; null where nothing is audited."""
        if self._waiting is None:
            return None
        return {"stored": int(self._stored.value), "waiting": self._waiting(), "dropped": int(self._dropped.value)}

    def _actors(self, tree: Mapping[str, Any]) -> Iterator[Actor]:
        metrics = self._metrics
        for child in _residents(tree):
            name = self._named.get(child["name"], child["name"])
            handled = {"ok": 0, "refused": 0, "error": 0}
            for labels, count in self._messages.items():
                about = dict(labels)
                if about["actor"] == name:
                    handled[about["outcome"]] += int(_value(count))
            yield Actor(
                actor=name,
                state=child["state"],
                restarts=child["restarts"],
                mailbox=_whole(metrics.gauge("if_actor_mailbox_depth", actor=name)),
                in_flight=_whole(metrics.gauge("if_actor_in_flight", actor=name)),
                handled=sum(handled.values()),
                refused=handled["refused"],
                errors=handled["error"],
            )


def _residents(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for child in tree.get("children", ()):
        if child["name"] == "residents":
            yield from child.get("children", ())


def _breaker(line: governor.BreakerLine) -> dict[str, Any]:
    told: dict[str, Any] = {"breaker": line.breaker, "state": line.state, "failures": line.failures}
    if line.opened_ago_s is not None:
        told["opened_ago_s"] = line.opened_ago_s
    if line.probe_in_s is not None:
        told["probe_in_s"] = line.probe_in_s
    return told


def _whole(gauge: Gauge) -> int:
    return int(gauge.value)


def _value(child: Child) -> float:
    assert not isinstance(child, Histogram), "it is one number"
    return child.value
