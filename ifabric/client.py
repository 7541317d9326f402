"""The SDK: tasks for an agent, over NATS.

    async with ifabric.Client.connect(capabilities=["python"]) as client:
        async for claim in client.tasks():
            async with claim:
                await claim.complete(work_on(claim.spec))

How a request is sent is in `ifabric.calling`, what happens is heard through `ifabric.listening`, money and breakers
are in `ifabric.governing`, and sandboxes in `ifabric.sandboxing`; here are the session and its tasks.

**One renewal for all.** The session is renewed at a third of its TTL, in one request for all its claims
(`ifabric.renewal`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats
from ifabric.calling import ATTEMPT_S, address_of
from ifabric.claims import Claim
from ifabric.clock import Clock, SystemClock
from ifabric.connecting import credential_of, session_of, settings_for
from ifabric.errors import FabricError, NoTaskMatches, ServerError, SessionLost, Unreachable
from ifabric.governing import Governed
from ifabric.listening import Listening
from ifabric.renewal import Renewal
from ifabric.sandboxing import Sandboxed
from ifabric.spending import whole
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import Mutation, Request, Usage

__all__ = ["Client", "address_of"]


class Client(Listening, Governed, Sandboxed):
    """A session of the fabric. Use `connect`."""

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        *,
        session: str,
        capabilities: Iterable[str] = (),
        accepts: Iterable[str] = (),
        account: str | None = None,
        ttl_s: int | None = None,
        timeout_s: float = 5.0,
        where: str = "NATS",
    ) -> None:
        super().__init__(bus, clock, session=session, timeout_s=timeout_s, where=where)
        self.claims: dict[str, Claim] = {}
        self._hello = wire.Hello(capabilities=tuple(capabilities), accepts=tuple(accepts), account=account, ttl_s=ttl_s)
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
        accepts: Iterable[str] = (),
        account: str | None = None,
        ttl_s: int | None = None,
        timeout_s: float = 5.0,
        state_dir: Path | None = None,
        credentials: str | Path | None = None,
        ca: str | Path | None = None,
    ) -> Client:
        """A client to be entered with `async with`.

        nats: the servers' URLs, separated by commas; else ``$IFABRIC_NATS``; else the daemon of this machine, found
            by its endpoints.json in `state_dir` (default: the user's state directory).
        session: `[A-Za-z0-9_-]{1,64}`; else ``$IFABRIC_SESSION``; else host name and a random end. The same session
            from two connections is one session.
        accepts: take only tasks with one of these labels. account: whose money it spends, as ``acme/research``.
        ttl_s: seconds that the session lives without a renewal (default: the daemon's).
        timeout_s: how long a request is tried.
        credentials: the file that `ifabric agent create` made; else ``$IFABRIC_CREDENTIALS``. The session is its.
        ca: certificates of the authorities to trust, in PEM; else ``$IFABRIC_CA``, else the system's.

        Entering raises `Unreachable` when there is nobody, and `Forbidden` when NATS does not let the credential in.
        """
        clock = SystemClock()
        urls = address_of(nats, state_dir)
        credential = credential_of(credentials)
        name = session_of(session, credential) or _name(clock)
        subjects.request("coordinator", "hello", name)  # refuses a malformed one by name, before anything is sent
        settings = settings_for(urls, name, credential, ca, timeout_s)
        return cls(
            Nats(settings, clock),
            clock,
            session=name,
            capabilities=capabilities,
            accepts=accepts,
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

    async def tasks(
        self, *, wait_s: float = 10.0, until_empty: bool = False, hold_micro_usd: int | None = None
    ) -> AsyncIterator[Claim]:
        """One claim after the other, for ever; with `until_empty`, until nothing pending can be taken.

        A fabric that is away, full or overloaded for a while is waited for. It raises `Unreachable` only when it was
        never there, and `BudgetShort` when `hold_micro_usd` is not available: then no task was taken.
        """
        while True:
            try:
                claim = await self.next(wait_s=0.0 if until_empty else wait_s, hold_micro_usd=hold_micro_usd)
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
        self,
        handle: Callable[[Claim], Awaitable[Any]],
        *,
        concurrency: int = 1,
        until_empty: bool = False,
        hold_micro_usd: int | None = None,
    ) -> None:
        """Runs `handle` on one task after the other, `concurrency` at once; what it returns is the result.

        An exception fails its task, and a lost claim is left alone; either way the next task is taken.
        """

        async def worker() -> None:
            async for claim in self.tasks(until_empty=until_empty, hold_micro_usd=hold_micro_usd):
                with contextlib.suppress(Exception):  # it is in the task's record, as its error
                    async with claim:
                        result = await handle(claim)
                        if not claim.ended:
                            await claim.complete(result)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())

    async def claim(self, task: str, *, hold_micro_usd: int | None = None) -> Claim:
        """Takes one task, and with `hold_micro_usd` sets that aside for it: both or neither.

        Raises `ClaimTaken`, `NotClaimable`, `CapabilityMissing`, `UnknownTask`, `BudgetShort`.
        """
        return await self._take(wire.Claim(task=task, hold_micro_usd=hold_micro_usd), None)

    async def next(self, *, wait_s: float = 0.0, hold_micro_usd: int | None = None) -> Claim:
        """Takes the best task there is, waiting up to `wait_s` for one, and sets `hold_micro_usd` aside for it.

        Raises `NoTaskMatches`, `BudgetShort`.
        """
        wait_s = min(wait_s, wire.WAIT_MAX_S)
        attempt_s = wait_s + ATTEMPT_S if wait_s else None
        return await self._take(wire.Next(wait_s=wait_s, hold_micro_usd=hold_micro_usd), attempt_s)

    async def _take(self, message: wire.Claim | wire.Next, attempt_s: float | None) -> Claim:
        if message.hold_micro_usd is not None:
            whole(message.hold_micro_usd, "hold_micro_usd")
        request_id = self._clock.token()
        message = msgspec.structs.replace(message, request_id=request_id)
        self.claiming[request_id] = message.task if isinstance(message, wire.Claim) else ""
        try:
            reply: wire.ClaimReply = await self.ask(message, attempt_s=attempt_s)
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
        """Registers the session and keeps it; what needs it (a claim, a hold, a spend) does it by itself."""
        async with self._greeting:
            sent = self._clock.monotonic()
            reply: wire.HelloReply = await self.call(self._hello)
            self._renewal.begin(sent, reply.ttl_s)
            return reply

    async def ask(self, message: Request, *, attempt_s: float | None = None) -> Any:
        """`call`, for what only a session that is there may ask: it is greeted first, and again when it was lost."""
        if isinstance(message, Mutation) and message.request_id is None:
            message = msgspec.structs.replace(message, request_id=self._clock.token())
        while True:
            if not self._renewal.running:
                await self.hello()
            greeted = self._renewal.greeted
            try:
                return await self.call(message, attempt_s=attempt_s)
            except SessionLost as lost:
                await self._renewal.session_lost(lost.message, greeted=greeted)

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

    async def complete(
        self,
        task: str,
        fence: int,
        result: Any = None,
        *,
        cost_micro_usd: int | None = None,
        usage: Usage | None = None,
    ) -> wire.CompleteReply:
        """Ends a claim by its fence, for holders that are not this process. Raises `ClaimLost`."""
        message = wire.Complete(
            task=task, fence=fence, result=result, cost_micro_usd=_cost(cost_micro_usd), usage=usage
        )
        reply: wire.CompleteReply = await self.call(message)
        return reply

    async def fail(
        self,
        task: str,
        fence: int,
        error: str,
        *,
        retry: bool = True,
        cost_micro_usd: int | None = None,
        usage: Usage | None = None,
    ) -> wire.FailReply:
        """The attempt under this fence failed."""
        message = wire.Fail(
            task=task, fence=fence, error=error, retry=retry, cost_micro_usd=_cost(cost_micro_usd), usage=usage
        )
        reply: wire.FailReply = await self.call(message)
        return reply

    async def release(self, task: str, fence: int, reason: str = "") -> wire.StateReply:
        """Gives a task back by its fence."""
        reply: wire.StateReply = await self.call(wire.Release(task=task, fence=fence, reason=reason))
        return reply

    async def operate(self, verb: type[wire.Cancel | wire.Requeue | wire.Purge], task: str) -> wire.StateReply:
        """What an operator does: `wire.Cancel`, `wire.Requeue` or `wire.Purge`."""
        reply: wire.StateReply = await self.call(verb(task=task))
        return reply


def _cost(amount: int | None) -> int | None:
    return None if amount is None else whole(amount, "cost_micro_usd")


def _name(clock: Clock) -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40] or "agent"
    return f"{host}-{clock.token()[:12]}"
