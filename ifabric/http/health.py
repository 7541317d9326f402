"""How the daemon is: what the HTTP port, the metrics and the service manager tell of it.

A *dependency* is what the daemon cannot do its work without: etcd, NATS, Vault where a resident asks it, and its own
event loop. Each has a state, and since when, which is seen at every beat of the pulse and not only when somebody asks.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from ifabric import log
from ifabric.actor.base import Parts
from ifabric.actor.dependencies import Dependencies
from ifabric.actor.pulse import Pulse
from ifabric.clock import Clock
from ifabric.metrics import Metrics
from ifabric.store.commit import Committer
from ifabric.store.vitals import Vitals

Phase = Literal["starting", "serving", "draining"]
#: an event loop that was so late within so long is one that callers notice
LATE_S = 0.25
LATELY_S = 10.0


class Dependency(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of what the daemon depends on. `up` is for machines: whether it can be had."""

    state: str
    up: bool
    #: for how long it has been so
    since_s: float
    #: what is known of it
    detail: str = ""
    #: what it means for those who use the fabric
    means: str = ""
    #: etcd: how long its last answer took
    latency_ms: float | None = None
    #: Vault: how long ago it was last asked
    heard_s: float | None = None
    #: the loop: how late it was just now, and at worst within the last minute
    lag_s: float | None = None
    worst_s: float | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the whole, at one moment."""

    status: Literal["starting", "healthy", "degraded", "draining"]
    etcd: Literal["connected", "disconnected", "full"]
    nats: Literal["connected", "disconnected"]
    loop_lag_s: float
    version: str
    uptime_s: float
    #: why the daemon is not ready for requests; empty when it is
    not_ready: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dependencies: dict[str, Dependency] = {}
    #: the supervision tree
    actors: dict[str, Any] = {}


class Status(Protocol):
    """Whoever can tell."""

    def snapshot(self) -> Snapshot: ...


class _Connection(Protocol):
    @property
    def connected(self) -> bool: ...


class _Store(_Connection, Protocol):
    attempts_failed: int
    rotations: int


class _Bus(_Connection, Protocol):
    reconnects: int
    slow_consumers: int
    spoofed: int


#: what a state means for those who use the fabric
MEANS = {
    "etcd disconnected": "Nothing is claimed, completed or charged; what is held stays held while its lease lasts.",
    "etcd full": "Nothing new is taken in; what is held can be renewed and looked at. See `ifabric doctor`.",
    "nats disconnected": "Nobody reaches this daemon; others go on answering.",
    "vault unreachable": "Sandboxes that call with a credential are refused when what is cached is over.",
    "loop late": "Every answer of this daemon is late by as much.",
}


class Signs:
    """Looks at the parts of one daemon, and says how they are."""

    def __init__(
        self,
        store: _Store,
        bus: _Bus,
        committer: Committer,
        vitals: Vitals,
        pulse: Pulse,
        parts: Parts,
        clock: Clock,
        metrics: Metrics,
        *,
        version: str,
        asks_vault: bool,
    ) -> None:
        self._store, self._bus, self._committer = store, bus, committer
        self._vitals, self._pulse, self._clock, self._metrics = vitals, pulse, clock, metrics
        self._reported = parts.get(Dependencies, Dependencies)
        self._version, self._asks_vault = version, asks_vault
        self._born = clock.monotonic()
        #: (state, since when), by name
        self._states: dict[str, tuple[str, float]] = {}
        self._late = metrics.histogram("if_loop_late_seconds")
        pulse.each_beat = self.beat
        self.look()

    def beat(self) -> None:
        """At each beat of the pulse."""
        self._late.observe(self._pulse.lag_s)
        self.look()

    def look(self) -> dict[str, Dependency]:
        """How each dependency is now."""
        now = self._clock.monotonic()
        return {
            "etcd": self._etcd(now),
            "nats": self._nats(now),
            "vault": self._vault(now),
            **{name: self._other(name, now) for name in self._reported.reports if name != "vault"},
            "loop": self._loop(now),
        }

    def snapshot(self, tree: dict[str, Any], phase: Phase, warnings: tuple[str, ...]) -> Snapshot:
        """What `/health` says. `tree` is the supervision tree, as it describes itself."""
        found = self.look()
        _redacted(tree)
        not_ready: list[str] = [] if phase == "serving" else [phase]
        not_ready += [f"{name} is {found[name].state}" for name in ("etcd", "nats") if not found[name].up]
        not_ready += [f"{child['name']} is not running" for child in leaves(tree) if child["state"] != "running"]
        told = [
            f"{name} is {one.state}: {one.detail or one.means}"
            for name, one in found.items()
            if not one.up and name not in ("etcd", "nats", "loop")
        ]
        if (trouble := log.figures().trouble) is not None:
            told.append(f"the log: {trouble}")
        return Snapshot(
            status="degraded" if phase == "serving" and not_ready else "healthy" if phase == "serving" else phase,
            etcd=found["etcd"].state,  # type: ignore[arg-type]
            nats=found["nats"].state,  # type: ignore[arg-type]
            loop_lag_s=round(self._pulse.lag_s, 4),
            version=self._version,
            uptime_s=round(self._clock.monotonic() - self._born, 1),
            not_ready=tuple(not_ready),
            warnings=(*warnings, *told),
            dependencies=found,
            actors=tree,
        )

    def count(self, *, ready: bool) -> None:
        """Brings the metrics of all this up to date."""
        metrics, store, bus = self._metrics, self._store, self._bus
        for name, one in self.look().items():
            metrics.gauge("if_dependency_up", dependency=name).set(one.up)
        metrics.gauge("if_ready").set(ready)
        metrics.gauge("if_coordinator_event_bus_health").set(store.connected and self._committer.down is None)
        metrics.gauge("if_bus_connected").set(bus.connected)
        metrics.gauge("if_loop_lag_seconds").set(self._pulse.lag_s)
        metrics.gauge("if_loop_lag_max_seconds").set(self._pulse.worst_s())
        metrics.gauge("if_backup_last_success_timestamp_seconds").set(self._vitals.backup_at_s)
        metrics.counter("if_store_attempts_failed_total").raise_to(store.attempts_failed)
        metrics.counter("if_store_rotations_total").raise_to(store.rotations)
        metrics.counter("if_bus_reconnects_total").raise_to(bus.reconnects)
        metrics.counter("if_bus_slow_consumers_total").raise_to(bus.slow_consumers)
        metrics.counter("if_bus_spoofed_replies_total").raise_to(bus.spoofed)
        figures = log.figures()
        for level, number in figures.written.items():
            metrics.counter("if_log_entries_total", level=level).raise_to(number)
        metrics.counter("if_log_held_back_total").raise_to(figures.held_back)
        metrics.counter("if_log_lost_total").raise_to(figures.lost)

    # -- one at a time ------------------------------------------------------------------------------------------------

    def _etcd(self, now: float) -> Dependency:
        down = self._committer.down
        up = down is None and self._store.connected
        state = "disconnected" if not up else "full" if self._vitals.full else "connected"
        took = self._vitals.latency_s
        return self._seen(
            "etcd",
            state,
            now,
            up=state == "connected",
            detail="" if down is None else down.message,
            latency_ms=None if took is None or not up else round(took * 1000, 2),
        )

    def _nats(self, now: float) -> Dependency:
        up = self._bus.connected
        again = self._bus.reconnects
        detail = f"the connection came back {again} times since the start" if again else ""
        return self._seen("nats", "connected" if up else "disconnected", now, up=up, detail=detail)

    def _vault(self, now: float) -> Dependency:
        if "vault" in self._reported.reports:
            return self._other("vault", now)
        detail = "nothing has asked it for a secret yet" if self._asks_vault else "no credentials are configured"
        return self._seen("vault", "unused", now, up=True, detail=detail)

    def _other(self, name: str, now: float) -> Dependency:
        report = self._reported.reports[name]
        up = report.trouble is None
        state = "connected" if up else "unreachable"
        self._states[name] = (state, report.since)
        return self._seen(name, state, now, up=up, detail=report.trouble or "", heard_s=round(now - report.heard, 1))

    def _loop(self, now: float) -> Dependency:
        late = self._pulse.worst_s(LATELY_S) >= LATE_S
        return self._seen(
            "loop",
            "late" if late else "steady",
            now,
            up=not late,
            detail=f"up to {self._pulse.worst_s(LATELY_S) * 1000:.0f} ms within {LATELY_S:.0f} s" if late else "",
            lag_s=round(self._pulse.lag_s, 4),
            worst_s=round(self._pulse.worst_s(), 4),
        )

    def _seen(self, name: str, state: str, now: float, *, up: bool, detail: str = "", **figures: Any) -> Dependency:
        known = self._states.get(name)
        if known is None or known[0] != state:
            known = self._states[name] = (state, now)
        return Dependency(
            state=state,
            up=up,
            since_s=round(now - known[1], 1),
            detail=log.redact(detail, DETAIL_MAX),
            means=MEANS.get(f"{name} {state}", ""),
            **figures,
        )


#: of a sentence about a dependency or a part: more is cut
DETAIL_MAX = 500


def leaves(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a supervision tree that have no children."""
    found: list[dict[str, Any]] = []
    for child in tree["children"]:
        found += leaves(child) if "children" in child else [child]
    return found


def _redacted(tree: dict[str, Any]) -> None:
    """The reasons for which parts ended come from anywhere."""
    for child in tree["children"]:
        if "reason" in child:
            child["reason"] = log.redact(child["reason"], DETAIL_MAX)
        if "children" in child:
            _redacted(child)
