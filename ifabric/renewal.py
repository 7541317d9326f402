"""Keeps a client's session, and with it all its claims, in one request at a third of the TTL.

What a renewal's answer calls lost is lost (see `ifabric.claims`). What it calls *unnamed*, held but unknown to us, is a
claim whose answer got lost, or is still on its way: it is given back once it has been seen twice and every request that
was under way when it was first seen has had its end. (A worker that waits for tasks always has one under way, so "none
is under way" would never come.)

**Silence.** No attempt, and no pause, reaches past the moment until which the session is believed. When that comes
without a renewal, every claim is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import Protocol

from ifabric.cancellation import cancel_and_wait
from ifabric.claims import Claim
from ifabric.clock import Clock
from ifabric.errors import ClaimLost, FabricError, SessionLost
from ifabric.wire import coordinator as wire

#: shares of the TTL: when the session is renewed, until when it is believed without a renewal, and how long it may take
#: to give claims back that are not ours to work on
RENEW_AT, TRUST, GIVE_BACK = 1 / 3, 5 / 6, 1 / 6
ATTEMPT_S = 1.0
BACKOFF_S = (0.05, 0.25)


class Session(Protocol):
    """What a renewal needs of its client."""

    claims: dict[str, Claim]
    #: requests for a claim whose answer is still to come: request id -> task, or "" for any
    claiming: dict[str, str]

    async def ask_renewal(self, held: tuple[wire.HeldClaim, ...], within_s: float) -> wire.RenewReply: ...

    async def hello(self) -> wire.HelloReply: ...

    async def release(self, task: str, fence: int, reason: str = "") -> wire.StateReply: ...


class Renewal:
    """Renews one session until it is stopped."""

    def __init__(self, session: Session, clock: Clock, name: str) -> None:
        self._session = session
        self._clock = clock
        self._name = name
        self._ttl_s = 0.0
        self._trusted_until = 0.0
        #: held but unknown to us -> the requests that it may be the answer to
        self._unnamed: dict[tuple[str, int], set[str]] = {}
        #: how often the session has been greeted: tells a refusal of now from one of an earlier life
        self.greeted = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a session to keep."""
        return self._task is not None

    def begin(self, sent: float, ttl_s: float) -> None:
        """The session lives for `ttl_s` seconds from some moment after `sent`."""
        self.greeted += 1
        self._ttl_s = ttl_s
        self._trusted_until = sent + ttl_s * TRUST
        if self._task is None:
            # in no context: it outlives what the first request was for, and its trace
            run = self._run()
            self._task = asyncio.create_task(run, name=f"renew {self._name}", context=contextvars.Context())

    async def stop(self) -> None:
        """Renews no more. Twice is harmless."""
        task, self._task = self._task, None
        if task is not None:
            await cancel_and_wait(task)

    async def session_lost(self, reason: str, *, greeted: int) -> None:
        """Every claim is lost with it; a new life of the session begins, unless one has since `greeted`."""
        if greeted == self.greeted:
            self.lose_all(reason)
            await self._session.hello()

    def lose_all(self, reason: str) -> None:
        """Tells every claim."""
        for claim in list(self._session.claims.values()):
            claim.set_lost(reason)

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(self._ttl_s * RENEW_AT)
            while True:
                sent, greeted = self._clock.monotonic(), self.greeted
                try:
                    await self._once(sent, min(ATTEMPT_S, self._trusted_s() or ATTEMPT_S))
                    break
                except SessionLost as lost:
                    with contextlib.suppress(FabricError):  # the next claim says hello again
                        await self.session_lost(lost.message, greeted=greeted)
                    break
                except FabricError:
                    pause = self._clock.jitter(*BACKOFF_S)
                    await self._clock.sleep(min(pause, self._trusted_s() or pause))

    def _trusted_s(self) -> float:
        """How long the session is still believed; when that is 0, every claim is lost."""
        left = max(0.0, self._trusted_until - self._clock.monotonic())
        if not left:
            self.lose_all("no renewal got through in time")
        return left

    async def _once(self, sent: float, within_s: float) -> None:
        held = tuple(wire.HeldClaim(claim.task, claim.fence) for claim in self._session.claims.values())
        for at in range(0, max(1, len(held)), wire.RENEW_MAX_CLAIMS):
            reply = await self._session.ask_renewal(held[at : at + wire.RENEW_MAX_CLAIMS], within_s)
            self._trusted_until = sent + reply.ttl_s * TRUST
            self._learn(reply)
        await self._give_back({(one.task, one.fence) for one in reply.unnamed})

    def _learn(self, reply: wire.RenewReply) -> None:
        for about, reason in ((reply.lost, "its lease had ended"), (reply.cancelled, "cancelled by an operator")):
            for one in about:
                claim = self._session.claims.get(one.task)
                if claim is not None and claim.fence == one.fence:
                    claim.set_lost(reason)

    async def _give_back(self, unnamed: set[tuple[str, int]]) -> None:
        session = self._session
        unnamed -= {(claim.task, claim.fence) for claim in session.claims.values()}
        known, self._unnamed = self._unnamed, {}
        with contextlib.suppress(TimeoutError):  # it is seen again
            async with asyncio.timeout(self._ttl_s * GIVE_BACK):  # the next renewal must not wait for it
                for task, fence in unnamed:
                    first = known.get((task, fence))
                    if first is None or first & session.claiming.keys() or task in session.claiming.values():
                        self._unnamed[task, fence] = set(session.claiming) if first is None else first
                        continue
                    with contextlib.suppress(ClaimLost):  # it has ended by itself
                        await session.release(task, fence, "the answer to its claim was lost")
