"""Keeps a client's session, and with it all its claims, in one request at a third of the TTL.

What a renewal's answer calls lost is lost (see `ifabric.claims`). What it calls *unnamed*, held but unknown to us, is a
claim whose answer got lost: seen twice, with no claim under way, it is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from ifabric.cancellation import cancel_and_wait
from ifabric.claims import Claim
from ifabric.clock import Clock
from ifabric.errors import ClaimLost, FabricError, SessionLost
from ifabric.wire import coordinator as wire

#: shares of the TTL: when the session is renewed, and until when it is believed without a renewal
RENEW_AT, TRUST = 1 / 3, 5 / 6
ATTEMPT_S = 1.0
BACKOFF_S = (0.05, 0.25)


class Session(Protocol):
    """What a renewal needs of its client."""

    claims: dict[str, Claim]
    #: claims asked for whose answer is still to come
    claiming: int

    async def ask_renewal(self, held: tuple[wire.HeldClaim, ...], attempt_s: float) -> wire.RenewReply: ...

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
        self._unnamed: set[tuple[str, int]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a session to keep."""
        return self._task is not None

    def begin(self, sent: float, ttl_s: float) -> None:
        """The session lives for `ttl_s` seconds from some moment after `sent`."""
        self._ttl_s = ttl_s
        self._trusted_until = sent + ttl_s * TRUST
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"renew {self._name}")

    async def stop(self) -> None:
        """Renews no more. Twice is harmless."""
        task, self._task = self._task, None
        if task is not None:
            await cancel_and_wait(task)

    async def session_lost(self, reason: str) -> None:
        """Every claim is lost with it; a new life of the session begins."""
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
                sent = self._clock.monotonic()
                if sent >= self._trusted_until:
                    self.lose_all("no renewal got through in time")
                try:
                    await self._once(sent)
                    break
                except SessionLost as lost:
                    with contextlib.suppress(FabricError):  # the next claim says hello again
                        await self.session_lost(lost.message)
                    break
                except FabricError:
                    await self._clock.sleep(self._clock.jitter(*BACKOFF_S))

    async def _once(self, sent: float) -> None:
        held = tuple(wire.HeldClaim(claim.task, claim.fence) for claim in self._session.claims.values())
        reply = await self._session.ask_renewal(held[: wire.RENEW_MAX_CLAIMS], ATTEMPT_S)
        self._trusted_until = sent + reply.ttl_s * TRUST
        for about, reason in ((reply.lost, "its lease had ended"), (reply.cancelled, "cancelled by an operator")):
            for one in about:
                claim = self._session.claims.get(one.task)
                if claim is not None and claim.fence == one.fence:
                    claim.set_lost(reason)
        await self._give_back({(one.task, one.fence) for one in reply.unnamed})

    async def _give_back(self, unnamed: set[tuple[str, int]]) -> None:
        """A claim whose answer may still be on its way is left alone until the next renewal."""
        unnamed -= {(claim.task, claim.fence) for claim in self._session.claims.values()}
        if self._session.claiming == 0:
            for task, fence in unnamed & self._unnamed:
                with contextlib.suppress(ClaimLost):  # it has ended by itself
                    await self._session.release(task, fence, "the answer to its claim was lost")
        self._unnamed = unnamed
