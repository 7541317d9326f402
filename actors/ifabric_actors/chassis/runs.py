"""A run from its request to its answer.

What can refuse it comes before a worker is asked for: limits, the session's places, the claim, the hold, the secrets of
its endpoints, the module. What it took is known after it, however it ended, and is charged then; its answer says how
it ended, or its refusal does, with what the guest wrote until then.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from ifabric.actor.base import Caller, Context
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import rfc3339
from ifabric.errors import (
    BadRequest,
    EgressDenied,
    FabricError,
    Killed,
    LimitReached,
    Overloaded,
    SandboxDied,
    ServerError,
    Trap,
    Unavailable,
)
from ifabric.handling import CURRENT, step
from ifabric.wire import chassis as wire
from ifabric_actors.chassis import frames, limits, records, spans
from ifabric_actors.chassis.bill import Bill
from ifabric_actors.chassis.egress import Egress, Outgoing
from ifabric_actors.chassis.events import Announcer
from ifabric_actors.chassis.modules import Modules
from ifabric_actors.chassis.once import Repeats
from ifabric_actors.chassis.pool import Code, Job, Outcome, Pool
from ifabric_actors.chassis.register import Register
from ifabric_actors.chassis.slo import ServiceLevel
from ifabric_actors.chassis.standing import Standing

#: how long another daemon's answer to a repeated run is waited for, beyond what a run may last
PATIENCE_S = 30.0
#: traps that ordinary programs do not end with
SUSPICIOUS = ("memory_out_of_bounds", "table_out_of_bounds", "indirect_call_to_null", "bad_signature")
OUTCOMES = {
    Trap: "trap", LimitReached: "limit", EgressDenied: "egress_denied", Overloaded: "overloaded", SandboxDied: "died",
    Killed: "killed", Unavailable: "unavailable",
}  # fmt: skip


class Runs:
    """Carries runs out, for one daemon."""

    def __init__(
        self,
        context: Context,
        pool: Pool,
        modules: Modules,
        egress: Egress,
        register: Register,
        announcer: Announcer,
        level: ServiceLevel,
    ) -> None:
        self._context, self._clock = context, context.clock
        self._config = context.config
        self._pool, self._modules, self._egress = pool, modules, egress
        self._register, self._announcer, self._level = register, announcer, level
        self._repeats = Repeats(context, register.daemon)
        self._bill = Bill(context)
        self._places: Counter[str] = Counter()
        metrics = context.metrics
        self._outcomes = {
            outcome: metrics.counter("if_chassis_runs_total", outcome=outcome)
            for outcome in ("done", "refused", *OUTCOMES.values())
        }
        self._seconds = metrics.histogram("if_chassis_run_seconds")
        self._overhead = metrics.histogram("if_chassis_overhead_seconds")
        self._fuel = metrics.counter("if_chassis_fuel_total")
        self._violations = {
            kind: metrics.counter("if_chassis_sandbox_violations_total", kind=kind)
            for kind in ("trap", "limit", "egress", "died")
        }

    async def stop(self) -> None:
        await self._repeats.stop()

    async def run(self, message: wire.Run, caller: Caller) -> wire.RunReply | msgspec.Raw:
        """The answer, or the refusal as an exception; whichever, it is counted."""
        attempt = Attempt(message, caller.session, self._clock.token(), self._clock.monotonic())
        error: FabricError | None = None
        try:
            with self._place(caller.session):
                if message.request_id is not None and (message.endpoints or message.hold is not None):
                    return await self._once(attempt, message)
                return await self._carry_out(attempt)
        except FabricError as refused:
            error = refused
            raise
        finally:
            self._count(attempt, error)

    # -- the steps

    @contextmanager
    def _place(self, session: str) -> Iterator[None]:
        """One of the session's places."""
        most = self._config.runtime.max_runs_per_session
        if self._places[session] >= most:
            raise LimitReached(
                f"{most} runs of session {session} are on or wait already; it was not started",
                which="runs_per_session",
                allowed=most,
            )
        self._places[session] += 1
        try:
            yield
        finally:
            self._places[session] -= 1
            if not self._places[session]:
                del self._places[session]

    async def _once(self, attempt: Attempt, message: wire.Run) -> wire.RunReply | msgspec.Raw:
        """A run with effects: at most once, and its answer again for a retry."""
        patience_s = self._config.runtime.max_execution_time_seconds + PATIENCE_S
        first = await self._repeats.begin(message, attempt.session, attempt.run, patience_s=patience_s)
        if first is not None:
            return first
        ended: wire.RunReply | FabricError
        try:
            ended = await self._carry_out(attempt)
        except FabricError as error:
            if not attempt.started:
                await self._repeats.forget(message, attempt.session)
                raise
            ended = error
        await self._repeats.finish(message, attempt.session, attempt.run, ended)
        if isinstance(ended, FabricError):
            raise ended
        return ended

    async def _carry_out(self, attempt: Attempt) -> wire.RunReply:
        message, session = attempt.message, attempt.session
        granted = limits.granted(self._config.runtime, message.limits)
        stdin = _stdin(message)
        _check_words(message)
        standing = await self._stand(message, session)
        await self._bill.expect(session, message.hold)
        outgoing = Outgoing(
            run=attempt.run,
            session=session,
            task=message.task,
            fence=message.fence,
            endpoints=frozenset(message.endpoints),
            deadline=self._clock.monotonic() + granted.wall_s,  # until it is known when it begins
            claim=None if standing is None else standing.ask,
        )
        if message.endpoints:
            await self._egress.prepare(outgoing)
        async with self._modules.open(message.module) as code:
            start = frames.Start(
                run=self._pool.number(),
                module=code.number,
                entry=message.entry,
                args=message.args,
                env=message.env,
                stdin=stdin,
                wall_s=granted.wall_s,
                cpu_percent=granted.cpu_percent,
                memory_bytes=granted.memory_bytes,
                fuel=granted.fuel,
                output_bytes=granted.output_bytes,
                tables=granted.tables,
                table_elements=granted.table_elements,
            )
            outcome = await self._in_worker(attempt, start, code, outgoing, standing)
        usage = self._usage(outcome, start, outgoing)
        attempt.wall_s = usage.wall_s
        self._fuel.inc(usage.fuel)
        if message.hold is not None:
            await self._bill.charge(session, message.hold, attempt.run, usage.cost_micro_usd)
        error = outcome.why or _ending(outcome.done, start)
        if error is not None:
            error.facts |= {"run": attempt.run, **_output(outcome.done), "usage": msgspec.to_builtins(usage)}
            raise error
        assert outcome.done is not None, "a run without an error has an end"
        return wire.RunReply(
            run=attempt.run, exit_code=outcome.done.exit_code, usage=usage, **_output(outcome.done)
        )  # fmt: skip

    async def _in_worker(
        self, attempt: Attempt, start: frames.Start, code: Code, outgoing: Outgoing, standing: Standing | None
    ) -> Outcome:
        message, handling = attempt.message, CURRENT.get()

        async def answer(request: bytes) -> bytes:
            outgoing.deadline = job.until  # the guest's own limit comes before it
            CURRENT.set(handling)  # this call has a task of its own, begun where the worker is listened to
            if span is None:
                return await self._egress.call(request, outgoing)
            return await spans.called(span, request, self._egress.call(request, outgoing))

        job = attempt.job = Job(attempt.session, start, code, answer)
        now = self._clock.wall_ms()
        entry = records.Running(
            run=attempt.run, session=attempt.session, module=message.module, daemon=self._register.daemon, at=now,
            ends=now + int(start.wall_s * 1000), task=message.task,
        )  # fmt: skip
        self._register.enter(attempt.run, job, entry)
        holding = None
        if standing is not None:
            holding = asyncio.create_task(standing.hold_to(job), name="chassis claim")
        with step("run", {"ifabric.run": attempt.run, "ifabric.module": message.module}) as span:
            try:
                outcome = await self._pool.run(job)
                spans.ended(span, outcome)
                return outcome
            finally:
                if holding is not None:
                    await cancel_and_wait(holding)
                await self._register.leave(attempt.run)

    async def _stand(self, message: wire.Run, session: str) -> Standing | None:
        if (message.task is None) != (message.fence is None):
            raise BadRequest("task and fence go together; the run was not started")
        if message.task is None or message.fence is None:
            return None
        standing = Standing(self._context.store, self._clock, session, message.task, message.fence)
        await standing.check()
        return standing

    def _usage(self, outcome: Outcome, start: frames.Start, outgoing: Outgoing) -> wire.RunUsage:
        """What the worker says it took; of one that died, what the daemon knows."""
        done = outcome.done
        wall_s = outcome.wall_s if done is None else done.wall_s
        fuel = 0 if done is None else done.fuel
        memory = start.memory_bytes if done is None else done.memory_peak_bytes
        sent = outgoing.bytes_out + outgoing.bytes_in
        return wire.RunUsage(
            wall_s=round(wall_s, 6),
            cpu_s=0.0 if done is None else round(done.cpu_s, 6),
            fuel=fuel,
            memory_peak_bytes=memory,
            stdout_bytes=0 if done is None else done.stdout_bytes,
            egress_bytes=sent,
            egress_calls=outgoing.calls,
            cost_micro_usd=limits.cost_micro_usd(
                self._config.price, fuel=fuel, memory_bytes=memory, wall_s=wall_s, egress_bytes=sent
            ),
        )

    # -- what is told of it

    def _count(self, attempt: Attempt, error: FabricError | None) -> None:
        now = self._clock.monotonic()
        took_s = now - attempt.began
        outcome = "done" if error is None else next((o for k, o in OUTCOMES.items() if isinstance(error, k)), "refused")
        self._outcomes[outcome].inc()
        self._seconds.observe(took_s)
        ours = isinstance(error, ServerError) and error.facts.get("what") not in ("vault", "governor")
        if attempt.started or ours:
            overhead_s = max(0.0, took_s - attempt.wall_s)
            self._overhead.observe(overhead_s)
            self._level.add(now, overhead_s, not ours)
        if error is not None and attempt.started:
            self._violation(attempt, error)

    def _violation(self, attempt: Attempt, error: FabricError) -> None:
        match error:
            case Trap() if error.facts.get("kind") in SUSPICIOUS:
                kind, detail = "trap", error.facts["kind"]
            case LimitReached():
                kind, detail = "limit", error.facts.get("which", "")
            case EgressDenied():
                kind, detail = "egress", error.facts.get("why", "")
            case SandboxDied():
                kind, detail = "died", error.facts.get("signal", "")
            case _:
                return
        self._violations[kind].inc()
        self._announcer.tell(
            "violation",
            wire.ViolationEvent(
                event="violation", at=rfc3339(self._clock.wall_ms()), run=attempt.run, session=attempt.session,
                module=attempt.message.module, kind=f"{kind}: {detail}"[:200], message=error.message[:500],
                task=attempt.message.task, daemon=self._register.daemon,
            ),
        )  # fmt: skip


class Attempt:
    """One request for a run, and how far it has come."""

    def __init__(self, message: wire.Run, session: str, run: str, began: float) -> None:
        self.message, self.session, self.run, self.began = message, session, run, began
        self.job: Job | None = None
        #: the guest's own time
        self.wall_s = 0.0

    @property
    def started(self) -> bool:
        """Whether the guest has begun."""
        return self.job is not None and self.job.worker is not None


def _stdin(message: wire.Run) -> bytes:
    if message.stdin is not None and message.stdin_b64 is not None:
        raise BadRequest("stdin and stdin_b64 are both there; one of them is what the guest reads")
    if message.stdin_b64 is None:
        return (message.stdin or "").encode()
    try:
        return base64.b64decode(message.stdin_b64, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("stdin_b64 is not base64; the run was not started") from None


def _check_words(message: wire.Run) -> None:
    """C's strings end at a zero, and a variable's name at its equals sign."""
    for word in (*message.args, *message.env, *message.env.values()):
        if "\0" in word:
            raise BadRequest("an argument or a variable holds a NUL character; the run was not started")
    for name in message.env:
        if "=" in name:
            raise BadRequest(f"a variable's name holds an equals sign: {name[:100]!r}; the run was not started")


def _ending(done: frames.Done | None, start: frames.Start) -> FabricError | None:
    """What a worker's word on the end is to the caller; None for an exit."""
    assert done is not None, "a worker that died is an error already"
    if done.end == "limit":
        allowed = getattr(start, done.detail, None)
        told = f": {allowed:g}" if isinstance(allowed, int | float) else ""
        return LimitReached(
            f"the run was ended at its limit {done.detail}{told} ({done.message})", which=done.detail, allowed=allowed
        )
    if done.end == "trap":
        function = {"function": done.function} if done.function else {}
        where = f" in {done.function}" if done.function else ""
        return Trap(f"the guest was ended by a trap{where}: {done.message}", kind=done.detail, **function)
    if done.end == "entry":
        return BadRequest(f"the module cannot be entered there: {done.message}; nothing was run", entry=start.entry)
    assert done.end == "exit", "the daemon knows why it stopped a run"
    return None


def _output(done: frames.Done | None) -> dict[str, Any]:
    """What the guest wrote, as text where it is text that JSON does not blow up."""
    if done is None:
        return {}
    told: dict[str, Any] = {"truncated": True} if done.truncated else {}
    for name, data in (("stdout", done.stdout), ("stderr", done.stderr)):
        text = _as_text(data)
        if text is None:
            told[f"{name}_b64"] = base64.b64encode(data).decode()
        elif text:
            told[name] = text
    return told


def _as_text(data: bytes) -> str | None:
    """The text; None when it is none, or is longer as JSON than in base64."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if not text.isprintable() and len(msgspec.json.encode(text)) > len(data) * 4 // 3 + 4:
        return None
    return text
