"""Runs one actor: receive, decode, handle, answer.

A message is handled in a task of its own, started when it arrives; more than `in_flight_max` at once wait in the
mailbox, and when that is full the sender is told so at once. While the actor is being started again, messages wait in
the mailbox too: the service stays mounted, and a crash costs its callers a moment, not an error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ifabric.actor.base import Actor, Caller, Context, Handler
from ifabric.actor.pulse import Pulse
from ifabric.bus.base import Endpoint, Incoming, Service
from ifabric.errors import BadRequest, DeadlineExceeded, FabricError, Internal, Overloaded, TooLarge, Unavailable
from ifabric.wire import subjects
from ifabric.wire.envelope import DEADLINE_HEADER, TRACE_HEADER, decode, encode

#: how many refusals are answered at once when everything is full; beyond that the sender hears nothing and tries again
REFUSING_MAX = 1_000


class _Letter(NamedTuple):
    verb: _Verb
    incoming: Incoming
    deadline: float | None


class _Verb:
    """A handler with its metrics at hand."""

    __slots__ = ("error", "handler", "name", "ok", "prefix", "refused", "seconds")

    def __init__(self, name: str, handler: Handler, component: str, context: Context) -> None:
        metrics = context.metrics
        self.name = name
        self.handler = handler
        self.prefix = len(subjects.endpoint(component, name, admin=handler.message.admin)) - 1
        self.ok, self.refused, self.error = (
            metrics.counter("if_actor_messages_total", actor=component, verb=name, outcome=outcome)
            for outcome in ("ok", "refused", "error")
        )
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
        self._mailbox_max = mailbox_max
        self._in_flight_max = in_flight_max
        self._drain_timeout_s = drain_timeout_s
        self._mailbox: deque[_Letter] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()
        self._service: Service | None = None
        self._actor: Actor | None = None
        self._crash_watch: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        metrics, name = context.metrics, component.component
        self._depth = metrics.gauge("if_actor_mailbox_depth", actor=name)
        self._in_flight = metrics.gauge("if_actor_in_flight", actor=name)
        self._dropped = {
            why: metrics.counter("if_actor_dropped_total", actor=name, why=why)
            for why in ("expired", "frozen", "bad_subject")
        }
        self._verbs = [_Verb(verb, handler, name, context) for (verb, _), handler in component.handlers.items()]

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the actor has crashed."""
        return self._lost

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """A new instance, started; then, the first time, its endpoints on the bus."""
        self._lost = asyncio.get_running_loop().create_future()
        actor = self._make(self._context)
        try:
            await actor.start()
            if self._service is None:
                self._service = await self._mount()
        except BaseException:
            await actor.stop()
            raise
        self._actor = actor
        self._crash_watch = asyncio.create_task(self._watch(actor), name=f"{self._class.component} crash watch")
        self._pull()

    async def _mount(self) -> Service:
        name = self._class.component
        endpoints = [
            Endpoint(
                verb.name if not verb.handler.message.admin else f"admin-{verb.name}",
                subjects.endpoint(name, verb.name, admin=verb.handler.message.admin),
                self._sink(verb),
                {"schema": verb.handler.message.__name__},
            )
            for verb in self._verbs
        ]
        return await self._context.bus.serve(name, self._class.version, self._class.description, endpoints)

    async def _watch(self, actor: Actor) -> None:
        reason = await asyncio.shield(actor.crashed)
        self._actor = None  # from now on messages wait in the mailbox
        for task in list(self._tasks):
            task.cancel()
        assert self._lost is not None
        self._lost.set_result(reason)

    async def stop(self) -> None:
        """After a crash: clears away the old instance. Otherwise drains: everything accepted is answered, nothing new
        taken.
        """
        crashed = self._lost is not None and self._lost.done()
        actor, self._actor = self._actor, self._actor if not crashed else None
        if not crashed and self._service is not None:
            service, self._service = self._service, None
            await service.drain()
            if actor is not None:
                actor.draining()
                await self._finish()
        if self._crash_watch is not None:
            self._crash_watch.cancel()
            await asyncio.gather(self._crash_watch, return_exceptions=True)
        self._actor = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._refusing, return_exceptions=True)
        if actor is not None:
            await actor.stop()
        if not crashed:
            while self._mailbox:
                await self._refuse(self._mailbox.popleft().incoming, Unavailable(what=self._class.component))
        self._lost = None

    async def _finish(self) -> None:
        """Until nothing is in flight or waiting, or the time for it is up."""
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                while self._tasks or self._mailbox:
                    await asyncio.wait(self._tasks) if self._tasks else await asyncio.sleep(0)
        except TimeoutError:
            self._context.log.warning("drain timed out", in_flight=len(self._tasks), waiting=len(self._mailbox))

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _sink(self, verb: _Verb) -> Callable[[Incoming], None]:
        def take(incoming: Incoming) -> None:
            if self._pulse.frozen():
                self._dropped["frozen"].inc()
                incoming.drop()
                return
            deadline = None
            if incoming.headers and (given := incoming.headers.get(DEADLINE_HEADER)):
                deadline = self._clock.monotonic() + int(given) / 1000 if given.isdigit() else None
            letter = _Letter(verb, incoming, deadline)
            if self._actor is not None and len(self._tasks) < self._in_flight_max:
                self._begin(letter)
            elif len(self._mailbox) < self._mailbox_max:
                self._mailbox.append(letter)
                self._depth.set(len(self._mailbox))
            elif len(self._refusing) < REFUSING_MAX:
                full = Overloaded(what=self._class.component, mailbox_max=self._mailbox_max)
                refusing = asyncio.create_task(self._refuse(incoming, full))
                self._refusing.add(refusing)
                refusing.add_done_callback(self._refusing.discard)
            else:
                incoming.drop()

        return take

    def _begin(self, letter: _Letter) -> None:
        task = asyncio.get_running_loop().create_task(self._handle(letter))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._mailbox:
            self._pull()

    def _pull(self) -> None:
        """Begins what waits, as far as there is room."""
        while self._mailbox and self._actor is not None and len(self._tasks) < self._in_flight_max:
            letter = self._mailbox.popleft()
            if self._pulse.frozen():
                self._dropped["frozen"].inc()
                letter.incoming.drop()
            else:
                self._begin(letter)
        self._depth.set(len(self._mailbox))

    # -- handling ----------------------------------------------------------------------------------------------------

    async def _handle(self, letter: _Letter) -> None:
        verb, incoming, deadline = letter
        actor = self._actor
        began = self._clock.monotonic()
        answered = False
        try:
            if actor is None:
                raise Unavailable(what=self._class.component)
            session = incoming.subject[verb.prefix :]
            if not subjects.SESSION.fullmatch(session):
                self._dropped["bad_subject"].inc()
                raise BadRequest(f"the session in the subject must match {subjects.SESSION_ID}", session=session[:100])
            if deadline is not None and deadline <= began:
                self._dropped["expired"].inc()
                raise DeadlineExceeded
            headers = incoming.headers
            trace = headers.get(TRACE_HEADER, "") if headers else ""
            caller = Caller(session, verb.handler.message.admin, deadline, trace)
            message = decode(verb.handler.decoder, incoming.data)
            reply = await verb.handler.function(actor, message, caller)
            data = encode(reply)
            answered = True
            await incoming.respond(data)
            verb.ok.inc()
        except FabricError as error:
            verb.refused.inc()
            if not answered or isinstance(error, TooLarge):  # too large an answer was not sent
                await self._refuse(incoming, error)
        except asyncio.CancelledError:
            verb.error.inc()
            if not answered:
                await self._refuse(incoming, Unavailable(what=self._class.component))
            raise
        except Exception as error:
            verb.error.inc()
            self._context.log.exception("handler failed", verb=verb.name, subject=incoming.subject)
            await self._refuse(incoming, Internal(verb=verb.name))
            if isinstance(error, AssertionError) and actor is not None:
                actor.crash(f"{verb.name}: a check of our own failed: {error}")
        finally:
            verb.seconds.observe(self._clock.monotonic() - began)

    async def _refuse(self, incoming: Incoming, error: FabricError) -> None:
        """Tells the sender why, as far as there is one that can be reached."""
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
