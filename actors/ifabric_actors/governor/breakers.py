"""Carries out `admit`, `report`, `breakers` and the admin verb `breaker`.

What a breaker does is decided in `circuit`; `switches` writes it. A closed breaker is admitted and counted for without
etcd; a refusal costs nothing either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ifabric.actor.base import Caller, Context
from ifabric.actor.publisher import Entry
from ifabric.actor.receipts import Receipts
from ifabric.clock import rfc3339
from ifabric.errors import BreakerOpen, FabricError, UnknownPermit
from ifabric.store.base import KV, Get, Got, Put, Txn, absent
from ifabric.wire import governor as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import encode
from ifabric_actors.governor import circuit as circuits
from ifabric_actors.governor import records
from ifabric_actors.governor.circuit import Circuit, Terms
from ifabric_actors.governor.mirror import Mirror, circuit_of
from ifabric_actors.governor.permits import CLOSED, PROBE, Permit, Permits
from ifabric_actors.governor.switches import STATES, Decide, Switches

#: what permits are sealed with; made by the daemon that starts first
SECRET_KEY = records.GOVERNOR + b"secrets/permits"
#: what one answer to `breakers` shows: those that are not closed first
LINES_MAX = 2_000
EVENTS = {"open": "opened", "half_open": "half_open", "closed": "closed"}
#: `list` is a method of the class
Entries = list[Entry]


class Breakers:
    """Every breaker, as this daemon knows it; the taker of their keys."""

    def __init__(self, context: Context, receipts: Receipts) -> None:
        config, metrics = context.settings.governor.circuit_breaker, context.metrics
        self._context, self._clock = context, context.clock
        self._enabled: bool = config.enabled
        self._terms = Terms(
            failure_threshold=config.failure_threshold,
            minimum_calls=config.minimum_calls,
            window_s=config.window_seconds,
            reset_timeout_s=config.reset_timeout,
            reset_timeout_max_s=config.reset_timeout_max,
            half_open_probes=config.half_open_probes,
            probe_timeout_s=config.probe_timeout_seconds,
            slow_call_s=config.slow_call_seconds,
        )
        self._mirror = Mirror(self._terms.window_s, config.breakers_max)
        self._find = self._mirror.find
        self._switches = Switches(context, receipts, self._mirror)
        self._permits: Permits
        self._admits = {
            outcome: metrics.counter("if_governor_admits_total", outcome=outcome)
            for outcome in ("closed", "probe", "refused")
        }
        self._admitted_closed = self._admits["closed"]
        self._reports = {
            outcome: metrics.counter("if_governor_reports_total", outcome=outcome)
            for outcome in ("success", "failure", "ignored", "unknown")
        }
        self._any_open = metrics.gauge("if_governor_circuit_breaker_open")
        self._by_state = {state: metrics.gauge("if_governor_breakers", state=state) for state in STATES}

    async def start(self) -> None:
        """Loads the secret of permits, or founds it. Raises `Unavailable`."""
        first = Put(SECRET_KEY, (self._clock.token() + self._clock.token()).encode())
        result = await self._context.store.txn(Txn((absent(SECRET_KEY),), (first,), (Get(SECRET_KEY),)))
        secret = first.value
        if not result.succeeded:
            answer = result.answers[0]
            assert isinstance(answer, Got)
            secret = answer.kvs[0].value
        self._permits = Permits(secret, self._clock.token()[:11])

    @property
    def open(self) -> frozenset[str]:
        """The names of the breakers that are open or half open."""
        return self._mirror.open

    # -- what etcd says -----------------------------------------------------------------------------------------------

    def take(self, kv: KV) -> Circuit:
        return self._mirror.take(kv)

    def gone(self, key: bytes, revision: int) -> None:
        self._mirror.gone(key, revision)

    def known(self) -> Iterable[bytes]:
        return self._mirror.known()

    @staticmethod
    def read(kv: KV) -> Circuit:
        """The record at a breaker's key, for the publisher."""
        return circuit_of(kv)

    def tell(self, kv: KV, record: Circuit | None) -> Entries:
        """One event for each transition, an operator's too when the state stays as it was; none for other writes."""
        if record is None or not record.event:
            return []
        name, what = kv.key[len(records.BREAKERS) :].decode(), EVENTS[record.state]
        event = wire.BreakerEvent(
            event=what,
            at=rfc3339(record.at),
            revision=kv.mod_revision,
            breaker=name,
            state=record.state,
            trips=record.trips,
            probe_in_s=record.last_open_s if record.state == "open" and not circuits.held(record) else None,
            by=record.by,
            why=record.why,
        )
        return [(subjects.event("breaker", what), encode(event), f"breakers/{name}@{kv.mod_revision}")]

    # -- the verbs ----------------------------------------------------------------------------------------------------

    async def admit(self, message: wire.Admit, caller: Caller) -> wire.AdmitReply:
        """A closed breaker costs a look-up and a checksum."""
        name, permits = message.breaker, self._permits
        known = self._find(name)
        if known is None or known.circuit.state == "closed" or not self._enabled:
            generation = 0 if known is None else known.circuit.generation
            self._admitted_closed.inc()
            permit = permits.write(name, caller.session, CLOSED, generation, permits.nonce())
            return wire.AdmitReply(permit=permit, state="closed")
        try:
            return await self._probe(name, caller)
        except BreakerOpen:
            self._admits["refused"].inc()
            raise

    async def _probe(self, name: str, caller: Caller) -> wire.AdmitReply:
        permits, terms = self._permits, self._terms
        circuits.refuse(name, self._mirror.get(name).circuit, terms, self._clock.wall_ms())
        nonce = permits.nonce()

        def decide(circuit: Circuit) -> Circuit | None:
            if circuit.state == "closed" or any(permit == nonce for permit, _ in circuit.probes):
                return None  # nobody has to probe any more, or an attempt of ours whose reply was lost has written it
            return circuits.admitted(name, circuit, terms, self._clock.wall_ms(), nonce)

        circuit = await self._switches.change(name, caller.session, decide)
        if circuit.state == "closed":
            self._admitted_closed.inc()
            permit = permits.write(name, caller.session, CLOSED, circuit.generation, nonce)
            return wire.AdmitReply(permit=permit, state="closed")
        self._admits["probe"].inc()
        permit = permits.write(name, caller.session, PROBE, circuit.generation, nonce)
        return wire.AdmitReply(permit=permit, state="half_open", report_in_s=terms.probe_timeout_s)

    async def report(self, message: wire.Report, caller: Caller) -> wire.BreakerReply:
        if not self._enabled:
            self._reports[message.outcome].inc()
            return wire.BreakerReply(state="closed")
        name = message.breaker
        try:
            permit = self._permits.read(name, caller.session, message.permit)
            if not self._permits.use(permit):
                raise UnknownPermit(breaker=name)
            try:
                if permit.generation > self._mirror.get(name).circuit.generation:
                    await self._switches.look(name, caller.session)  # it was given out by a daemon that knows more
                circuit = await self._take_report(message, caller.session, permit)
            except FabricError as error:
                if not isinstance(error, UnknownPermit):
                    self._permits.unuse(permit)
                raise
        except UnknownPermit:
            self._reports["unknown"].inc()
            raise
        self._reports[message.outcome].inc()
        return wire.BreakerReply(state=circuit.state)

    async def _take_report(self, message: wire.Report, owner: str, permit: Permit) -> Circuit:
        """What the breaker is after the report."""
        circuit = self._mirror.get(message.breaker).circuit
        verdict = circuits.weighed(self._terms, message.outcome, message.latency_s)
        retry_after_s = (message.retry_after_s or 0.0) if verdict == "failure" else 0.0
        if permit.generation != circuit.generation:
            if circuits.lengthened(circuit, self._clock.wall_ms(), permit.generation, retry_after_s) is None:
                return circuit
            return await self._switches.change(message.breaker, owner, self._lengthen(permit, retry_after_s))
        if permit.kind == PROBE:
            return await self._judge(message.breaker, owner, permit, verdict, retry_after_s)
        if verdict == "ignored":
            return circuit
        return await self._count(message.breaker, owner, permit, verdict == "failure", retry_after_s)

    def _lengthen(self, permit: Permit, retry_after_s: float) -> Decide:
        """The decision about a report from before the breaker's present state."""
        return lambda circuit: circuits.lengthened(circuit, self._clock.wall_ms(), permit.generation, retry_after_s)

    async def _count(self, name: str, owner: str, permit: Permit, failed: bool, retry_after_s: float) -> Circuit:
        """Counts a call that was admitted while the breaker was closed. It trips when that is enough."""
        terms, now, window = self._terms, self._clock.monotonic(), self._mirror.window(name)
        window.count(now, failed=failed, retry_after_s=retry_after_s)
        if not window.is_enough(terms):
            return self._mirror.get(name).circuit
        why = f"{window.failures} of {window.calls} calls failed"
        asked_s = window.retry_after_s(now)
        lengthen = self._lengthen(permit, retry_after_s)

        def decide(circuit: Circuit) -> Circuit | None:
            if circuit.state != "closed" or circuit.generation != permit.generation:
                return lengthen(circuit)
            return circuits.tripped(circuit, terms, self._clock.wall_ms(), retry_after_s=asked_s, why=why)

        try:
            return await self._switches.change(name, owner, decide)
        except FabricError as error:
            # it was counted, and the next one that is counted tries again
            self._context.log.warning("a breaker could not be opened", breaker=name, why=str(error))
            return self._mirror.get(name).circuit

    async def _judge(
        self, name: str, owner: str, permit: Permit, verdict: wire.Verdict, retry_after_s: float
    ) -> Circuit:
        """Records what a probe found."""
        lengthen, seen = self._lengthen(permit, retry_after_s), False

        def decide(circuit: Circuit) -> Circuit | None:
            nonlocal seen
            if circuit.generation != permit.generation:
                return lengthen(circuit)
            now = self._clock.wall_ms()
            try:
                after = circuits.judged(name, circuit, self._terms, now, permit.nonce, verdict, retry_after_s)
            except UnknownPermit:
                if seen:
                    return None  # an attempt of ours has taken it away, and its reply was lost
                raise
            seen = True
            return after

        try:
            return await self._switches.change(name, owner, decide)
        except UnknownPermit:
            await self._switches.look(name, owner)  # it may have been given out elsewhere, a moment ago
            return await self._switches.change(name, owner, decide)

    async def list(self, message: wire.Breakers, caller: Caller) -> wire.BreakersReply:
        mirror, now = self._mirror, self._clock.monotonic()
        mirror.roll(now)
        counted = sorted(mirror.windows.keys() - mirror.open, key=lambda name: -mirror.windows[name].failures)
        there = [*sorted(mirror.open), *counted]
        names = sorted(there[:LINES_MAX])
        return wire.BreakersReply(breakers=tuple(self._line(name, now) for name in names), more=len(there) > LINES_MAX)

    def _line(self, name: str, now: float) -> wire.BreakerLine:
        circuit, window, wall_ms = self._mirror.get(name).circuit, self._mirror.windows.get(name), self._clock.wall_ms()
        if window is not None:
            window.roll(now)
        return wire.BreakerLine(
            breaker=name,
            state=circuit.state,
            failures=window.failures if window is not None else 0,
            calls=window.calls if window is not None else 0,
            opened_ago_s=None if circuit.state == "closed" else max(0, wall_ms - circuit.opened_at) / 1000,
            probe_in_s=circuits.probe_in_s(circuit, self._terms, wall_ms),
            trips=circuit.trips,
            by=circuit.by,
            why=circuit.why,
        )

    async def set(self, message: wire.SetBreaker, caller: Caller) -> Any:
        """As an operator wants it. The record says who, why and by which request: that is the audit."""

        def decide(circuit: Circuit) -> Circuit:
            now, request = self._clock.wall_ms(), message.request_id or ""
            return circuits.forced(circuit, message.state, now, by=caller.session, why=message.why, request=request)

        return await self._switches.carry_out(message, caller.session, decide)

    def refresh(self) -> None:
        """Brings the gauges up to date."""
        mirror = self._mirror
        mirror.roll(self._clock.monotonic())
        half_open = sum(mirror.get(name).circuit.state == "half_open" for name in mirror.open)
        self._any_open.set(1 if mirror.open else 0)
        self._by_state["half_open"].set(half_open)
        self._by_state["open"].set(len(mirror.open) - half_open)
        self._by_state["closed"].set(len(mirror.windows.keys() - mirror.open))
