"""A claim in the hands of its holder.

**What `lost` is for.** The holder of a claim works on, wherever it is, when the lease behind the claim ends; the
fabric cannot stop it, only refuse what it brings back. `lost` tells it early: when a renewal says so, when the
session is gone, and when no renewal got through for so long that the lease may have ended. That last moment is
counted from when the last successful renewal was *sent*, and comes before the lease's own end (five sixths of it), so
that an honest holder stops before anybody else begins.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ifabric.errors import ClaimLost, FabricError
from ifabric.wire import coordinator as wire

if TYPE_CHECKING:
    from ifabric.client import Client

#: how long leaving a block may take to give the task back
LEAVE_S = 2.0


class Claim:
    """One task, held.

    As a block it ends the claim by how the block ends: completed; failed with the exception's text (which goes on);
    released when cancelled. While the block runs, a claim that is lost cancels it, and `ClaimLost` comes out.

        async with claim:
            await claim.complete({"answer": 42})
    """

    def __init__(self, client: Client, reply: wire.ClaimReply) -> None:
        self._client = client
        self.task = reply.task
        #: pass it to every side effect that can check it: it only grows for this task
        self.fence = reply.fence
        self.attempt = reply.attempt
        self.ttl_s = reply.ttl_s
        self.spec = reply.spec
        self.again = reply.again
        #: set when the claim is no longer held; `lost_reason` says why
        self.lost = asyncio.Event()
        self.lost_reason = ""
        #: completed, failed or released by us
        self.ended = False
        self._body: asyncio.Task[Any] | None = None
        self._cancelled_body = False

    def __repr__(self) -> str:
        how = "ended" if self.ended else f"lost: {self.lost_reason}" if self.lost.is_set() else "held"
        return f"<Claim {self.task} fence {self.fence} attempt {self.attempt}, {how}>"

    async def complete(self, result: Any = None, *, cost_micro_usd: int | None = None) -> wire.CompleteReply:
        """The work is done; `result` is any JSON. Raises `ClaimLost` when somebody else holds the task by now."""
        message = wire.Complete(task=self.task, fence=self.fence, result=result, cost_micro_usd=cost_micro_usd)
        reply: wire.CompleteReply = await self._end(message)
        return reply

    async def fail(self, error: str, *, retry: bool = True) -> wire.FailReply:
        """The attempt failed; `retry=False` lets the task die at once."""
        message = wire.Fail(task=self.task, fence=self.fence, error=error[:2048], retry=retry)
        reply: wire.FailReply = await self._end(message)
        return reply

    async def release(self, reason: str = "") -> wire.StateReply:
        """Gives the task back; it costs no attempt."""
        reply: wire.StateReply = await self._end(wire.Release(task=self.task, fence=self.fence, reason=reason[:2048]))
        return reply

    async def _end(self, message: wire.Complete | wire.Fail | wire.Release) -> Any:
        try:
            reply = await self._client.call(message)
        except ClaimLost as lost:
            self.set_lost(lost.message)
            raise
        self.ended = True
        self._client.forget(self)
        return reply

    def set_lost(self, reason: str) -> None:
        """The claim is no longer held. Told by the client; harmless when it has ended."""
        if self.ended or self.lost.is_set():
            return
        self.lost_reason = reason
        self.lost.set()
        self._client.forget(self)
        if self._body is not None and self._body is not asyncio.current_task():
            self._cancelled_body = True
            self._body.cancel()

    # -- as a block --------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self.lost.is_set():
            raise ClaimLost(f"the claim was lost before the work began: {self.lost_reason}", task=self.task)
        self._body = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        if self._cancelled_body and body is not None:
            self._cancelled_body = False
            others = body.uncancel()
            if isinstance(error, asyncio.CancelledError) and others == 0:
                raise ClaimLost(f"the claim was lost during the work: {self.lost_reason}", task=self.task) from None
        if self.ended or self.lost.is_set():
            return
        if error is None:
            try:
                await self.complete()
            except FabricError as unsent:
                self.set_lost(f"could not be completed: {unsent}")  # so that it is not renewed with nobody at work
                raise
        elif isinstance(error, Exception):
            await self._leave(
                wire.Fail(task=self.task, fence=self.fence, error=f"{type(error).__name__}: {error}"[:2048])
            )
        else:
            await asyncio.shield(
                self._leave(wire.Release(task=self.task, fence=self.fence, reason=f"{type(error).__name__}"))
            )

    async def _leave(self, message: wire.Fail | wire.Release) -> None:
        """Ends the claim on the way out of a block. The block's own exception is what matters; what could not be sent
        is seen by the next renewals, held by nobody, and given back.
        """
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._end(message)
        except (FabricError, TimeoutError) as unsent:
            self.set_lost(f"could not be given back: {unsent}")
