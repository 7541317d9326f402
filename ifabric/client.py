"""The SDK: tasks for an agent, over NATS.

    async with ifabric.Client.connect(capabilities=["python"]) as client:
        async for claim in client.tasks():
            async with claim:
                await claim.complete(work_on(claim.spec))

**A retry is the same request.** Every mutating request carries an id, and when no answer comes it is sent again with
the same one: the fabric answers it once, whichever daemon gets it. Only when `timeout_s` is up does the error reach
the caller, and then the outcome is unknown.

**One renewal for all.** The session is renewed at a third of its TTL, in one request for all its claims
(`ifabric.renewal`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from ifabric import endpoints
from ifabric.bus.base import Answer, Bus, Incoming, Journal
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.claims import Claim
from ifabric.clock import Clock, SystemClock
from ifabric.errors import FabricError, NoTaskMatches, ServerError, SessionLost, Unavailable, Unreachable, from_body
from ifabric.renewal import Renewal
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import DEADLINE_HEADER, ERROR_CODE_HEADER, Mutation, Reply, Request, encode, loads

#: how long an attempt waits for its answer: short at first, since a frozen daemon keeps its share of the requests until
#: NATS has missed its pings for three seconds, and the next attempt may reach another; long once it is the fabric that is slow
SHORT_ATTEMPT_S, SHORT_FOR_S, ATTEMPT_S = 0.5, 3.5, 2.0
BACKOFF_S = (0.05, 0.25)
EVENTS_MAX = 10_000
_DECODERS: dict[type[Request], msgspec.json.Decoder[Any]] = {
    request: msgspec.json.Decoder(reply) for request, reply in wire.REPLIES.items()
}
_EVENTS = msgspec.json.Decoder(wire.TaskEvent)


class Client:
    """A session of the fabric. Use `connect`."""

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        *,
        session: str,
        capabilities: Iterable[str] = (),
        account: str | None = None,
        ttl_s: int | None = None,
        timeout_s: float = 5.0,
        where: str = "NATS",
    ) -> None:
        self.session = session
        self.claims: dict[str, Claim] = {}
        self._bus = bus
        self._clock = clock
        self._hello = wire.Hello(capabilities=tuple(capabilities), account=account, ttl_s=ttl_s)
        self._timeout_s = timeout_s
        self._where = where
        self._renewal = Renewal(self, clock, session)
        self._greeting: asyncio.Lock = asyncio.Lock()
        #: requests for a claim whose answer is still to come: request id -> task, or "" for any
        self.claiming: dict[str, str] = {}
        #: whether leaving the client ends its session and gives back what it holds
        self.leave_on_exit = True

    @classmethod
    def connect(
        cls,
        nats: str | None = None,
        *,
        session: str | None = None,
        capabilities: Iterable[str] = (),
        account: str | None = None,
        ttl_s: int | None = None,
        timeout_s: float = 5.0,
        state_dir: Path | None = None,
    ) -> Client:
        """A client to be entered with `async with`.

        nats: the servers' URLs, separated by commas; else ``$IFABRIC_NATS``; else the daemon of this machine, found
        by its
            endpoints.json in `state_dir` (default: the user's state directory).
        session: `[A-Za-z0-9_-]{1,64}`; else ``$IFABRIC_SESSION``; else host name and a random end. The same session
        from two
            connections is one session.
        ttl_s: seconds that the session lives without a renewal (default: the daemon's). timeout_s: how long a request
        is tried.

        Entering raises `Unreachable` when there is nobody.
        """
        clock = SystemClock()
        urls = address_of(nats, state_dir)
        name = session or os.environ.get("IFABRIC_SESSION") or _name(clock)
        subjects.request("coordinator", "hello", name)  # refuses a malformed one by name, before anything is sent
        settings = NatsSettings(servers=tuple(urls.split(",")), name=f"ifabric {name}", connect_timeout_s=timeout_s)
        return cls(
            Nats(settings, clock),
            clock,
            session=name,
            capabilities=capabilities,
            account=account,
            ttl_s=ttl_s,
            timeout_s=timeout_s,
            where=urls,
        )

    async def __aenter__(self) -> Self:
        await self._bus.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewal.running:
            await self._renewal.stop()
            if self.leave_on_exit:
                with contextlib.suppress(
                    FabricError, TimeoutError
                ):  # a session that cannot say bye ends with its lease
                    async with asyncio.timeout(ATTEMPT_S):
                        await self.call(wire.Bye())
        for claim in list(self.claims.values()):
            claim.set_lost("the client was closed")
        await self._bus.close()

    # -- tasks -------------------------------------------------------------------------------------------------------

    async def tasks(self, *, wait_s: float = 10.0, until_empty: bool = False) -> AsyncIterator[Claim]:
        """One claim after the other, for ever; with `until_empty`, until nothing pending can be taken.

        A fabric that is away, full or overloaded for a while is waited for. It raises `Unreachable` only when it was
        never there.
        """
        while True:
            try:
                claim = await self.next(wait_s=0.0 if until_empty else wait_s)
            except NoTaskMatches:
                if until_empty:
                    return
                continue
            except (ServerError, Unreachable) as error:
                away = isinstance(error, Unreachable) and self._renewal.running
                if until_empty or not (error.retryable or away):
                    raise
                await self._clock.sleep(self._clock.jitter(0.2, 1.0))
                continue
            yield claim

    async def work(
        self, handle: Callable[[Claim], Awaitable[Any]], *, concurrency: int = 1, until_empty: bool = False
    ) -> None:
        """Runs `handle` on one task after the other, `concurrency` at once; what it returns is the result.

        An exception fails its task, and a lost claim is left alone; either way the next task is taken.
        """

        async def worker() -> None:
            async for claim in self.tasks(until_empty=until_empty):
                with contextlib.suppress(Exception):  # it is in the task's record, as its error
                    async with claim:
                        result = await handle(claim)
                        if not claim.ended:
                            await claim.complete(result)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())

    async def claim(self, task: str, *, hold_micro_usd: int | None = None) -> Claim:
        """Takes one task. Raises `ClaimTaken`, `NotClaimable`, `CapabilityMissing`, `UnknownTask`."""
        return await self._take(wire.Claim(task=task, hold_micro_usd=hold_micro_usd), None)

    async def next(self, *, wait_s: float = 0.0, hold_micro_usd: int | None = None) -> Claim:
        """Takes the best task there is, waiting up to `wait_s` for one. Raises `NoTaskMatches`."""
        wait_s = min(wait_s, wire.WAIT_MAX_S)
        attempt_s = wait_s + ATTEMPT_S if wait_s else None
        return await self._take(wire.Next(wait_s=wait_s, hold_micro_usd=hold_micro_usd), attempt_s)

    async def _take(self, message: wire.Claim | wire.Next, attempt_s: float | None) -> Claim:
        request_id = self._clock.token()
        message = msgspec.structs.replace(message, request_id=request_id)
        self.claiming[request_id] = message.task if isinstance(message, wire.Claim) else ""
        try:
            while True:
                if not self._renewal.running:
                    await self.hello()
                greeted = self._renewal.greeted
                try:
                    reply: wire.ClaimReply = await self.call(message, attempt_s=attempt_s)
                    break
                except SessionLost as lost:
                    await self._renewal.session_lost(lost.message, greeted=greeted)
        finally:
            del self.claiming[request_id]
        held = self.claims.get(reply.task)
        if held is not None and held.fence == reply.fence:
            return held
        claim = self.claims[reply.task] = Claim(self, reply)
        return claim

    def forget(self, claim: Claim) -> None:
        """The claim has ended or was lost: it is renewed no more."""
        if self.claims.get(claim.task) is claim:
            del self.claims[claim.task]

    # -- the other verbs ---------------------------------------------------------------------------------------------

    async def hello(self) -> wire.HelloReply:
        """Registers the session and keeps it; `claim`, `next` and `tasks` do it by themselves."""
        async with self._greeting:
            sent = self._clock.monotonic()
            reply: wire.HelloReply = await self.call(self._hello)
            self._renewal.begin(sent, reply.ttl_s)
            return reply

    async def ask_renewal(self, held: tuple[wire.HeldClaim, ...], within_s: float) -> wire.RenewReply:
        """One attempt at a renewal; the client sends them by itself."""
        reply: wire.RenewReply = await self.call(wire.Renew(claims=held), attempt_s=within_s, again=False)
        return reply

    async def submit(
        self, tasks: Iterable[wire.TaskSpec | dict[str, Any]], *, done: Iterable[str] = ()
    ) -> wire.SubmitReply:
        """Creates tasks, at most 100, all or none. Raises `Conflict`, `Cycle`, `UnknownDependency`, `BadRequest`."""
        specs = tuple(
            task if isinstance(task, wire.TaskSpec) else msgspec.convert(task, wire.TaskSpec) for task in tasks
        )
        reply: wire.SubmitReply = await self.call(wire.Submit(tasks=specs, done=tuple(done)))
        return reply

    async def get(self, task: str) -> wire.GetReply:
        """One task with its history. Raises `UnknownTask`."""
        reply: wire.GetReply = await self.call(wire.Get(task=task))
        return reply

    async def list(
        self, *, state: wire.State | None = None, limit: int = 100, after: str | None = None
    ) -> wire.ListReply:
        """A page of tasks in the order of their ids, and the count of each state."""
        reply: wire.ListReply = await self.call(wire.List(state=state, limit=limit, after=after))
        return reply

    async def complete(self, task: str, fence: int, result: Any = None) -> wire.CompleteReply:
        """Ends a claim by its fence, for holders that are not this process. Raises `ClaimLost`."""
        reply: wire.CompleteReply = await self.call(wire.Complete(task=task, fence=fence, result=result))
        return reply

    async def fail(self, task: str, fence: int, error: str, *, retry: bool = True) -> wire.FailReply:
        """The attempt under this fence failed."""
        reply: wire.FailReply = await self.call(wire.Fail(task=task, fence=fence, error=error, retry=retry))
        return reply

    async def release(self, task: str, fence: int, reason: str = "") -> wire.StateReply:
        """Gives a task back by its fence."""
        reply: wire.StateReply = await self.call(wire.Release(task=task, fence=fence, reason=reason))
        return reply

    async def operate(self, verb: type[wire.Cancel | wire.Requeue | wire.Purge], task: str) -> wire.StateReply:
        """What an operator does: `wire.Cancel`, `wire.Requeue` or `wire.Purge`."""
        reply: wire.StateReply = await self.call(verb(task=task))
        return reply

    async def events(
        self, *, after_seq: int | None = None, until_seq: int | None = None
    ) -> AsyncIterator[wire.TaskEvent]:
        """Task events as they come; with `after_seq`, those that the journal keeps after that position first.

        `until_seq` ends it with the event at that position.
        """
        if after_seq is None:
            async with self.subscribe() as events:
                async for event in events:
                    yield event
        else:
            async for entry in (await self.journal()).read(after_seq=after_seq, subject=subjects.event("task", ">")):
                for found in _event(entry.data):
                    yield found
                if until_seq is not None and entry.seq >= until_seq:
                    return

    async def journal(self) -> Journal:
        """The stream that keeps the events. Raises `Unavailable`."""
        return await self._bus.journal(subjects.EVENT_STREAM)

    @contextlib.asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[wire.TaskEvent]]:
        """Task events from now on: what happens inside the block, even at its very start, is not missed.

        What happens while NATS is away is: `events(after_seq)` has it. Raises `Unavailable` when the connection has
        closed for good.
        """
        queue: asyncio.Queue[bytes] = asyncio.Queue(EVENTS_MAX)
        closed = self._bus.lost

        async def take(incoming: Incoming) -> None:
            await queue.put(incoming.data)

        async def each() -> AsyncIterator[wire.TaskEvent]:
            while True:
                coming = asyncio.ensure_future(queue.get())
                ends: set[asyncio.Future[Any]] = {coming, closed}
                try:
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise Unavailable(f"no more events: {closed.result()}", what="nats", reason="closed")
                finally:
                    coming.cancel()
                for found in _event(coming.result()):
                    yield found

        subscription = await self._bus.subscribe(subjects.event("task", ">"), take)
        try:
            yield each()
        finally:
            await subscription.unsubscribe()

    # -- asking ------------------------------------------------------------------------------------------------------

    async def call(self, message: Request, *, attempt_s: float | None = None, again: bool = True) -> Any:
        """Sends one request until it is answered (without `again`: once); the reply's struct, or the refusal as an
        exception.

        A mutation without an id gets one. `Unavailable`: nobody answered in time, and whether it was carried out is
        unknown.
        """
        if isinstance(message, Mutation) and message.request_id is None:
            message = msgspec.structs.replace(message, request_id=self._clock.token())
        subject = subjects.request(message.component, message.verb, self.session, admin=message.admin)
        data = encode(message)
        began = self._clock.monotonic()
        until = began + max(self._timeout_s, attempt_s or 0.0)
        while True:
            short = self._clock.monotonic() - began < SHORT_FOR_S
            patience_s = attempt_s or min(SHORT_ATTEMPT_S if short else ATTEMPT_S, self._timeout_s)
            headers = {DEADLINE_HEADER: str(int(patience_s * 1000))}
            try:
                answer = await self._bus.request(subject, data, timeout_s=patience_s, headers=headers)
                return _read(message, answer)
            except FabricError as error:
                late = not again or self._clock.monotonic() >= until
                if isinstance(error, Unavailable) and error.facts.get("reason") == "no_responders" and late:
                    raise Unreachable(
                        f"no {message.component} answers at {self._where}; is the daemon running? `ifabric run` starts one"
                    ) from None
                in_vain = isinstance(error, NoTaskMatches) or error.facts.get("what") == "governor"
                if late or in_vain or not error.retryable:
                    raise
            await self._clock.sleep(self._clock.jitter(*BACKOFF_S))


def _read(message: Request, answer: Answer) -> Any:
    if answer.headers and ERROR_CODE_HEADER in answer.headers:
        raise from_body(loads(answer.data) if answer.data else None)
    try:
        reply: Reply = _DECODERS[type(message)].decode(answer.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FabricError(f"the answer to {message.verb} is not one: {error}") from None
    return reply


def _event(data: bytes) -> tuple[wire.TaskEvent, ...]:
    """The event in a message; none when it is not one: whoever may publish there could else end every subscriber."""
    try:
        return (_EVENTS.decode(data),)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()


def address_of(nats: str | None, state_dir: Path | None) -> str:
    """NATS's URLs: as given, of the environment, or of this machine's daemon. `Unreachable` when there is none."""
    given = nats or os.environ.get("IFABRIC_NATS")
    if given:
        return given
    folder = state_dir or endpoints.default_state_dir()
    found = endpoints.read(folder)
    if found is None:
        raise Unreachable(
            f"no daemon runs on this machine (none in {folder}). Start one with `ifabric run`, or say where NATS is: --nats, $IFABRIC_NATS."
        )
    return found.nats


def _name(clock: Clock) -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "agent"
    return f"{host}-{clock.token()[:12]}"
