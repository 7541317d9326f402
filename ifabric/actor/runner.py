"""Runs one actor: receive, decode, handle, answer.

A message is handled in a task of its own, started when it arrives; more than `in_flight_max` at once wait in the mailbox, and
when that is full the sender is told so at once. A task costs 1.1 us, of the 4 to 5 us that a message costs here altogether
(2 cores, uvloop). A pool of workers would save half a microsecond and a first step outside of any task a whole one, but a
task for each message is what can be cancelled, timed and named one by one, and what `asyncio.timeout` in a handler needs.

**After a crash** the requests in flight are answered `unavailable`, and the endpoints stay mounted: what arrives meanwhile waits in
the mailbox for the next instance, so a crash costs its callers a moment, not an error. `stop` ends all of it: everything accepted is
answered, by the actor as long as `drain_timeout_s` allows, then with `unavailable`.

**The sink never raises.** It is called from the connection's read loop, which an exception would end: one hostile header would
make the daemon deaf. So whatever could fail about a message is looked at in its task.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ifabric.actor.base import Actor, Caller, Context, Handler
from ifabric.actor.mailbox import Letter, Mailbox
from ifabric.actor.pulse import Pulse
from ifabric.bus.base import Endpoint, Headers, Incoming, Service
from ifabric.cancellation import cancel_and_wait
from ifabric.errors import BadRequest, DeadlineExceeded, FabricError, Internal, Overloaded, TooLarge, Unavailable
from ifabric.handling import CURRENT, Handling, Outcome
from ifabric.wire import subjects
from ifabric.wire.envelope import DEADLINE_HEADER, TRACE_HEADER, decode, encode

#: how many refusals may be on their way out at once; beyond that the sender hears nothing and tries again
REFUSING_MAX = 1_000
#: a deadline header, in milliseconds: digits of ASCII, and not thousands of them
MILLISECONDS = re.compile(r"[0-9]{1,12}")


class Verb:
    """A handler with its metrics at hand."""

    __slots__ = ("error", "handler", "name", "ok", "overloaded", "pattern", "prefix", "refused", "seconds")

    def __init__(self, name: str, handler: Handler, component: str, context: Context) -> None:
        metrics = context.metrics
        self.name = name
        self.handler = handler
        self.pattern = subjects.endpoint(component, name, admin=handler.message.admin)
        #: the session is what follows it in a subject
        self.prefix = len(self.pattern) - 1
        self.ok, self.refused, self.error = (
            metrics.counter("if_actor_messages_total", actor=component, verb=name, outcome=outcome)
            for outcome in ("ok", "refused", "error")
        )
        self.overloaded = metrics.counter("if_actor_overloaded_total", actor=component, verb=name)
        self.seconds = metrics.histogram("if_actor_handling_seconds", actor=component, verb=name)


class Runner:
    """One supervised actor. `start` after a crash is a new instance behind the same endpoints."""

    def __init__(
        self,
        actor: Callable[[Context], Actor],
        component: type[Actor],
        context: Context,
        pulse: Pulse,
        *,
        mailbox_max: int = 8192,
        in_flight_max: int = 2048,
        drain_timeout_s: float = 10.0,
    ) -> None:
        self._make = actor
        self._class = component
        self._context = context
        self._clock = context.clock
        self._pulse = pulse
        self._tracer = context.tracer
        self._in_flight_max = in_flight_max
        self._drain_timeout_s = drain_timeout_s
        metrics, name = context.metrics, component.component
        self._mailbox = Mailbox(mailbox_max, metrics.gauge("if_actor_mailbox_depth", actor=name))
        self._in_flight: dict[asyncio.Task[None], Letter] = {}
        metrics.gauge("if_actor_mailbox_max", actor=name).set(mailbox_max)
        self._in_flight_gauge = metrics.gauge("if_actor_in_flight", actor=name)
        self._refusing: set[asyncio.Task[None]] = set()
        self._service: Service | None = None
        #: the instance that lives, or is to be cleared away
        self._instance: Actor | None = None
        #: the same while it takes messages, else None
        self._actor: Actor | None = None
        self._lost: asyncio.Future[str] | None = None
        #: what an `unavailable` says is missing
        self._missing = component.component
        #: done when nothing is in flight or waiting; there only while draining
        self._quiet: asyncio.Future[None] | None = None
        self._dropped = {
            why: metrics.counter("if_actor_dropped_total", actor=name, why=why)
            for why in ("expired", "frozen", "bad_subject", "overloaded")
        }
        self._verbs = [Verb(verb, handler, name, context) for (verb, _), handler in component.handlers.items()]

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the actor has crashed."""
        return self._lost

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """A new instance, started; then, the first time, its endpoints on the bus. Whatever waits is handled."""
        self._lost = asyncio.get_running_loop().create_future()
        self._missing = self._class.component
        try:
            self._instance = instance = self._make(self._context)
            await instance.start()
            if self._service is None:
                self._service = await self._mount()
        except BaseException:
            await self._stop_instance()
            if self._service is None:
                await self._turn_away()
            raise
        self._actor = instance
        instance.crashed.add_done_callback(partial(self._crashed, instance))
        self._pull()

    async def clear(self) -> None:
        """After a crash: ends what is left of the instance. The endpoints and what waits are for the next one."""
        await self._end_in_flight()
        await self._stop_instance()

    async def stop(self) -> None:
        """Takes nothing new, lets the actor answer what was accepted, answers the rest, and stops the actor."""
        self._missing = "draining" if self._actor is not None else self._class.component
        try:
            if self._service is not None:
                await self._service.drain()
                self._service = None
            if self._actor is not None:
                self._actor.draining()
                await self._drained(self._actor)
        finally:
            self._actor = None
            try:
                await self._end_in_flight()
                await self._turn_away()
            finally:
                await self._stop_instance()
                self._lost = None

    async def _mount(self) -> Service:
        endpoints = [
            Endpoint(
                f"admin-{verb.name}" if verb.handler.message.admin else verb.name,
                verb.pattern,
                self._sink(verb),
                {"schema": verb.handler.message.__name__},
            )
            for verb in self._verbs
        ]
        name, version, description = self._class.component, self._class.version, self._class.description
        return await self._context.bus.serve(name, version, description, endpoints)

    def _crashed(self, instance: Actor, crashed: asyncio.Future[str]) -> None:
        if instance is not self._instance:
            return
        self._actor = None  # from now on messages wait in the mailbox
        for task in self._in_flight:
            task.cancel()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(crashed.result())

    async def _drained(self, actor: Actor) -> None:
        """Returns when nothing is in flight or waiting, when the time for it is up, or when the actor has crashed."""
        self._quiet = quiet = asyncio.get_running_loop().create_future()
        self._tell_quiet()
        timer = asyncio.create_task(self._clock.sleep(self._drain_timeout_s))
        ends: set[asyncio.Future[Any]] = {quiet, timer, actor.crashed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not quiet.done():
                self._context.log.warning(
                    "not everything was answered while draining",
                    in_flight=len(self._in_flight),
                    waiting=len(self._mailbox),
                )
        finally:
            self._quiet = None
            await cancel_and_wait(timer)

    def _tell_quiet(self) -> None:
        if self._quiet is not None and not self._quiet.done() and not self._in_flight and not self._mailbox:
            self._quiet.set_result(None)

    async def _end_in_flight(self) -> None:
        """Cancels what is being handled; who waits for it is told."""
        await cancel_and_wait(*self._in_flight)
        await asyncio.gather(*self._refusing, return_exceptions=True)

    async def _turn_away(self) -> None:
        """Refuses what waits; after a standstill it is dropped, for its senders have given up."""
        while self._mailbox:
            letter = self._mailbox.take()
            if self._pulse.frozen():
                self._drop(letter.incoming, "frozen")
            else:
                missing = Unavailable(what=self._missing)
                self._tell_unhandled(letter, missing)
                await self._refuse(letter, missing)

    async def _stop_instance(self) -> None:
        instance, self._instance, self._actor = self._instance, None, None
        if instance is not None:
            await instance.stop()

    # -- receiving --------------------------------------------------------------------------------------------------

    def _sink(self, verb: Verb) -> Callable[[Incoming], None]:
        def take(incoming: Incoming) -> None:
            if self._pulse.frozen():
                self._drop(incoming, "frozen")
                return
            letter = Letter(verb, incoming, self._clock.monotonic())
            actor = self._actor
            if actor is not None and len(self._in_flight) < self._in_flight_max:
                self._begin(actor, letter)
            elif not self._mailbox.put(letter):
                verb.overloaded.inc()
                if len(self._refusing) < REFUSING_MAX:
                    verb.refused.inc()
                    self._refuse_soon(letter, Overloaded(what=self._class.component, mailbox_max=self._mailbox.most))
                else:
                    self._drop(incoming, "overloaded")

        return take

    def _begin(self, actor: Actor, letter: Letter) -> None:
        task = asyncio.get_running_loop().create_task(self._handle(actor, letter))
        self._in_flight[task] = letter
        self._in_flight_gauge.set(len(self._in_flight))
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        letter = self._in_flight.pop(task)
        self._in_flight_gauge.set(len(self._in_flight))
        if task.cancelled() and not letter.answered:  # perhaps before its first step, so its own code could not answer
            letter.verb.error.inc()
            self._refuse_soon(letter, Unavailable(what=self._missing, maybe_done=True))
        if self._mailbox:
            self._pull()
        self._tell_quiet()

    def _pull(self) -> None:
        """Begins what waits, as far as there is room."""
        while self._mailbox and self._actor is not None and len(self._in_flight) < self._in_flight_max:
            self._begin(self._actor, self._mailbox.take())

    def _drop(self, incoming: Incoming, why: str) -> None:
        self._dropped[why].inc()
        incoming.drop()

    # -- handling ---------------------------------------------------------------------------------------------------

    async def _handle(self, actor: Actor, letter: Letter) -> None:
        verb, incoming = letter.verb, letter.incoming
        if self._pulse.frozen():
            letter.answered = True
            self._drop(incoming, "frozen")
            return
        handling = Handling(self._class.component, verb.name, "", letter.arrived, admin=verb.handler.message.admin)
        CURRENT.set(handling)  # of this task, which is this message's
        try:
            caller = self._caller(letter)
            handling.session, handling.trace = caller.session, caller.trace
            if self._tracer is not None:
                self._tracer.begin(handling)
            handling.message = message = decode(verb.handler.decoder, incoming.data)
            handling.reply = reply = await verb.handler.function(actor, message, caller)
            data = encode(reply)
        except FabricError as error:
            verb.refused.inc()
            self._tell(handling, "refused", error)
            await self._refuse(letter, error)
        except Exception as error:
            verb.error.inc()
            self._context.log.exception(
                "handler failed", verb=verb.name, subject=incoming.subject, request_id=handling.request_id
            )
            internal = Internal(verb=verb.name)
            try:
                self._tell(handling, "error", internal)
                await self._refuse(letter, internal)
            finally:
                if isinstance(error, AssertionError):
                    actor.crash(f"{verb.name}: a check of our own failed: {error}")
        else:
            self._tell(handling, "ok")
            await self._answer(letter, data)
        finally:
            verb.seconds.observe(self._clock.monotonic() - letter.arrived)
            if handling.span is not None and self._tracer is not None:
                self._tracer.end(handling, answered=letter.answered)

    def _tell(self, handling: Handling, outcome: Outcome, error: FabricError | None = None) -> None:
        handling.ended, handling.outcome, handling.error = self._clock.monotonic(), outcome, error
        self._context.tell(handling)

    def _tell_unhandled(self, letter: Letter, error: FabricError) -> None:
        """Of a message that no handler saw, or not to its end."""
        verb, session = letter.verb, letter.incoming.subject[letter.verb.prefix :]
        known = session if subjects.SESSION.fullmatch(session) else ""
        admin = verb.handler.message.admin
        self._tell(Handling(self._class.component, verb.name, known, letter.arrived, admin=admin), "refused", error)

    def _caller(self, letter: Letter) -> Caller:
        """Who asks. `BadRequest` for a session or a deadline that is not one, `DeadlineExceeded` when it is too late."""
        verb, incoming = letter.verb, letter.incoming
        session = incoming.subject[verb.prefix :]
        if not subjects.SESSION.fullmatch(session):
            self._dropped["bad_subject"].inc()
            raise BadRequest(f"the session in the subject must match {subjects.SESSION.pattern}", session=session[:100])
        headers = incoming.headers
        if not headers:
            return Caller(session, verb.handler.message.admin)
        deadline = _deadline(headers, letter.arrived)
        if deadline is not None and deadline <= self._clock.monotonic():
            self._dropped["expired"].inc()
            raise DeadlineExceeded
        return Caller(session, verb.handler.message.admin, deadline, headers.get(TRACE_HEADER, ""))

    async def _answer(self, letter: Letter, data: bytes) -> None:
        letter.answered = True
        try:
            await letter.incoming.respond(data)
        except TooLarge as error:  # it was not sent, and the sender is to hear of it
            letter.verb.refused.inc()
            await self._refuse(letter, error)
            return
        except FabricError as unsent:
            self._context.log.info("an answer could not be sent", subject=letter.incoming.subject, why=str(unsent))
        letter.verb.ok.inc()

    def _refuse_soon(self, letter: Letter, error: FabricError) -> None:
        self._tell_unhandled(letter, error)
        refusing = asyncio.get_running_loop().create_task(self._refuse(letter, error))
        self._refusing.add(refusing)
        refusing.add_done_callback(self._refusing.discard)

    async def _refuse(self, letter: Letter, error: FabricError) -> None:
        """Tells the sender why, as far as there is one that can be reached."""
        letter.answered = True
        incoming = letter.incoming
        if not incoming.reply:
            self._context.log.info(
                "refused, without a reply subject", subject=incoming.subject, code=error.code, why=error.message
            )
            incoming.drop()
            return
        try:
            await incoming.respond_error(error.status, error.message, encode(error.to_body()))
        except FabricError as unsent:
            self._context.log.info("an answer could not be sent", subject=incoming.subject, why=str(unsent))


def _deadline(headers: Headers, arrived: float) -> float | None:
    given = headers.get(DEADLINE_HEADER)
    if not given:
        return None
    if not MILLISECONDS.fullmatch(given):
        raise BadRequest(f"{DEADLINE_HEADER} is a number of milliseconds, not {given[:40]!r}")
    return arrived + int(given) / 1000
