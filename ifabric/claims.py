"""A claim in the hands of its holder.

**What `lost` is for.** The holder of a claim works on, wherever it is, when the lease behind the claim ends; the
fabric cannot stop it, only refuse what it brings back. `lost` tells it early: when a renewal says so, when the
session is gone, and when no renewal got through for so long that the lease may have ended. That last moment is
counted from when the last successful renewal was *sent*, and comes before the lease's own end (five sixths of it), so
that an honest holder stops before anybody else begins.

**What it cost.** `complete` and `fail` tell it, and it is charged in the same transaction, to the hold that was taken
with the claim or without one. `cost_micro_usd` collects it on the way, and then whatever ends the claim tells it: also
a release and a loss, where it is charged by itself, since what was spent is spent. Work that is paid step by step has
a hold for each (`hold`); those are charged by themselves and are no part of `cost_micro_usd`.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from ifabric.calling import LEAVE_S, to_its_end
from ifabric.errors import ClaimLost, FabricError, UnknownHold
from ifabric.sandboxing import Module, Result, RunOptions, output_of
from ifabric.spending import Hold, step_id, whole
from ifabric.wire import coordinator as wire
from ifabric.wire import governor
from ifabric.wire.envelope import Usage

if TYPE_CHECKING:
    from ifabric.client import Client

LOG = logging.getLogger("ifabric")


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
        #: what was taken with the claim, if anything: it ends with it
        self.hold_id = reply.hold
        #: what was bought, to be told with the cost
        self.usage: Usage | None = None
        #: why what it cost could not be told, if it could not
        self.unsent = ""
        self._cost = 0
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

    @property
    def cost_micro_usd(self) -> int:
        """What the work has cost so far; add to it. The claim's end tells it, unless it is given another cost."""
        return self._cost

    @cost_micro_usd.setter
    def cost_micro_usd(self, amount: int) -> None:
        self._cost = whole(amount, "cost_micro_usd")

    async def complete(
        self, result: Any = None, *, cost_micro_usd: int | None = None, usage: Usage | None = None
    ) -> wire.CompleteReply:
        """The work is done; `result` is any JSON. Raises `ClaimLost` when somebody else holds the task by now."""
        cost, usage = self._told(cost_micro_usd, usage)
        message = wire.Complete(task=self.task, fence=self.fence, result=result, cost_micro_usd=cost, usage=usage)
        reply: wire.CompleteReply = await self._end(message)
        return reply

    async def fail(
        self, error: str, *, retry: bool = True, cost_micro_usd: int | None = None, usage: Usage | None = None
    ) -> wire.FailReply:
        """The attempt failed; `retry=False` lets the task die at once."""
        cost, usage = self._told(cost_micro_usd, usage)
        message = wire.Fail(
            task=self.task, fence=self.fence, error=error[:2048], retry=retry, cost_micro_usd=cost, usage=usage
        )
        reply: wire.FailReply = await self._end(message)
        return reply

    async def release(self, reason: str = "") -> wire.StateReply:
        """Gives the task back; it costs no attempt. What it has cost so far is charged first."""
        await self.settle(None)
        reply: wire.StateReply = await self._end(wire.Release(task=self.task, fence=self.fence, reason=reason[:2048]))
        return reply

    def hold(
        self,
        amount_micro_usd: int,
        *,
        step: str | None = None,
        name: str | None = None,
        account: str | None = None,
        ttl_s: int | None = None,
    ) -> Hold:
        """An amount set aside for one step of the work, for the length of an `async with` block; it ends with the
        claim at the latest. Named by its `step`, it is charged once however often the step is done (`ifabric.spending`).
        """
        if step is not None and name is not None:
            raise TypeError("a hold is named by its step or by a name, and not by both")
        known = step_id(self.task, self.fence, step) if step is not None else name
        return self._client.hold(
            amount_micro_usd, name=known, account=account, ttl_s=ttl_s, task=self.task, fence=self.fence, step=step
        )

    async def run(
        self, module: Module, *args: str, hold: Hold | str | None = None, **options: Unpack[RunOptions]
    ) -> Result:
        """Runs WebAssembly for the task, as `Client.run_module` does, for as long as the claim is held (`ClaimLost`).

        What it cost is charged to `hold`; without one it is added to `cost_micro_usd`, and told with the claim's end.
        """
        cost = 0
        try:
            result = await self._client.run_module(module, *args, claim=self, hold=hold, **options)
            cost = result.usage.cost_micro_usd
        except FabricError as ended:
            if isinstance(ended, ClaimLost):
                self.set_lost(ended.message)
            written = output_of(ended)
            cost = written.usage.cost_micro_usd if written is not None and written.usage is not None else 0
            raise
        finally:
            if hold is None:
                self.cost_micro_usd += cost
        return result

    def _told(self, cost: int | None, usage: Usage | None) -> tuple[int | None, Usage | None]:
        """What an ending says about money: what it is given, else what was collected, if anything was."""
        if cost is not None:
            self.cost_micro_usd = cost
        return (cost if cost is not None else self._cost or None), usage or self.usage

    async def _end(self, message: wire.Complete | wire.Fail | wire.Release) -> Any:
        try:
            reply = await self._client.call(message)
        except ClaimLost as lost:
            self.set_lost(lost.message)
            await self.settle(lost)
            raise
        self.ended = True
        if not isinstance(message, wire.Release):  # which says nothing of costs
            self._cost = 0
        self._client.forget(self)
        return reply

    async def _charge(self) -> None:
        """What the work has cost, without an end of the claim that could tell it: under the name that the end itself
        would give it, so that an end that was carried out after all has charged it, and it is not charged again.
        """
        cost, name = self._cost, self.hold_id or governor.claim_hold(self.task, self.fence)
        try:
            await self._client.call(governor.Commit(hold=name, amount_micro_usd=cost, usage=self.usage))
        except UnknownHold:
            await self._client.spend(cost, entry=name, usage=self.usage)
        self._cost, self.unsent = 0, ""

    async def settle(self, error: BaseException | None) -> None:
        """Charges what nobody has told yet, on the way out, where it must neither take long nor hide what has
        happened: what cannot be charged is said in `unsent` and in a note on the error.
        """
        if not self._cost:
            return
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._charge()
        except (FabricError, TimeoutError) as unsent:
            self._say_unsent(unsent, error)

    def _say_unsent(self, unsent: Exception, error: BaseException | None) -> None:
        if not self._cost:
            return
        why = str(unsent) or "no answer in time"
        self.unsent = f"that {self.task} has cost {self._cost} micro-USD could not be told: {why}"
        if error is not None:
            error.add_note(self.unsent)
        LOG.warning("%s", self.unsent)

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
                lost = ClaimLost(f"the claim was lost during the work: {self.lost_reason}", task=self.task)
                await to_its_end(self.settle(lost))
                raise lost from None
        if self.ended or self.lost.is_set():
            if self._cost:
                await to_its_end(self.settle(error))
        elif error is None:
            try:
                await self.complete()
            except FabricError as unsent:
                self.set_lost(f"could not be completed: {unsent}")  # so that it is not renewed with nobody at work
                if not self.unsent:
                    self._say_unsent(unsent, unsent)
                raise
        elif isinstance(error, Exception):
            cost, usage = self._told(None, None)
            said = f"{type(error).__name__}: {error}"[:2048]
            await self._leave(
                wire.Fail(task=self.task, fence=self.fence, error=said, cost_micro_usd=cost, usage=usage), error
            )
        else:
            await to_its_end(
                self._leave(wire.Release(task=self.task, fence=self.fence, reason=f"{type(error).__name__}"), error)
            )

    async def _leave(self, message: wire.Fail | wire.Release, error: BaseException) -> None:
        """Ends the claim on the way out of a block. The block's own exception is what matters; what could not be sent
        is seen by the next renewals, held by nobody, and given back.
        """
        if isinstance(message, wire.Release):
            await self.settle(error)
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._end(message)
        except (FabricError, TimeoutError) as unsent:
            self.set_lost(f"could not be given back: {unsent}")
            self._say_unsent(unsent, error)  # not sent again in another way: it may have been carried out
