"""Money, as an agent spends it: held first, charged when it is known what it was.

    async with claim.hold(micro_usd("0.25"), step="draft") as hold:
        answer = await model(...)
        hold.cost_micro_usd = price_of(answer)

**Money that is spent is spent.** Leaving the block ends the hold: with `cost_micro_usd` set it is charged, and without
it freed, also when the block raised or was cancelled; a provider bills a call that nobody waited for. The ending
runs to its end however often the block is cancelled, but not for ever. What could not be said in time is left to the
hold's expiry, which frees the money and not the truth: the exception carries a note, and `hold.unsent` says so.

**A name makes a retry the same.** A hold of a claim that is named after its *step* has an id made from the task, the
fence and that name: the step done again, by this process or its next life, is charged once. When it had been charged,
`charged_before` says what, and the block may be left at once; when it had been freed, nothing was charged, and the
step gets a hold anew. A step that is to be charged each time it is done needs a name for each time.

Amounts are whole micro-USD; `micro_usd` makes them from what people write.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from decimal import Decimal
from types import TracebackType
from typing import Self

from msgspec.structs import replace

from ifabric.calling import LEAVE_S, Line, to_its_end
from ifabric.errors import Conflict, FabricError, UnknownHold
from ifabric.wire import governor as wire
from ifabric.wire.envelope import Usage

MICRO_USD_MAX = 2**53 - 1
#: how often one step may be begun and freed
AGAIN_MAX = 100
#: how a hold ends without a charge
ENDED_FREE = ("voided", "expired")
LOG = logging.getLogger("ifabric")
_USD = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?", re.ASCII)


def micro_usd(usd: str | Decimal) -> int:
    """US dollars as whole micro-USD, exactly: ``micro_usd("0.25") == 250_000``.

    A float has no exact amount, and an int could mean either unit: `TypeError`. `ValueError` when it is no amount,
    below zero, or finer than a millionth.
    """
    if isinstance(usd, str):
        if not _USD.fullmatch(usd):
            raise ValueError(f"{usd[:40]!r} is no amount in USD: digits, and up to six after the point, as in '0.25'")
        exact = Decimal(usd)
    elif isinstance(usd, Decimal):
        exact = usd
    else:
        raise TypeError(f"an amount in USD is text or a Decimal, not {usd!r}: write micro_usd('{usd}')")
    sign, digits, exponent = exact.as_tuple()
    if not isinstance(exponent, int) or (sign and any(digits)):
        raise ValueError(f"{exact} is no amount in USD: it is not a number from 0 up")
    if exponent < -6 and any(digits[exponent + 6 :]):
        raise ValueError(f"{exact} USD is finer than a millionth")
    if exact.adjusted() > 10 or (found := int(exact.scaleb(6))) > MICRO_USD_MAX:
        raise ValueError(f"{exact} USD is more than can be counted")
    return found


def whole(amount: int, name: str = "amount_micro_usd") -> int:
    """The amount itself, if it is one. `TypeError` for a float or a bool, `ValueError` out of range."""
    if isinstance(amount, bool) or not isinstance(amount, int):
        raise TypeError(
            f"{name} is whole micro-USD, an int, and not {amount!r}: write 250_000, or micro_usd('0.25'), for 25 cents"
        )
    if not 0 <= amount <= MICRO_USD_MAX:
        raise ValueError(f"{name} is from 0 to {MICRO_USD_MAX}, and not {amount}")
    return amount


def step_id(task: str, fence: int, step: str) -> str:
    """The id of the hold or entry for one step of a claim: the same whenever that step is done again."""
    digest = hashlib.blake2b("\0".join((task, str(fence), step)).encode(), digest_size=24).digest()
    return base64.urlsafe_b64encode(digest).decode()


class Hold:
    """An amount set aside, for the length of a block. It is used once; `name` is its id in the session.

    step: the claim's step that it is for; its name is derived from that.
    """

    def __init__(self, line: Line, message: wire.Reserve, *, step: str | None = None) -> None:
        whole(message.amount_micro_usd)
        self._line = line
        self._message = message
        self._step = step
        self.name = message.hold
        self.amount_micro_usd = message.amount_micro_usd
        #: what was bought, to be told with the cost
        self.usage: Usage | None = None
        #: the governor's answers, once there are
        self.reserved: wire.ReserveReply | None = None
        self.charged: wire.CommitReply | None = None
        #: what the step was charged when it was done before; None: nothing was
        self.charged_before: int | None = None
        #: committed or voided, and the governor knows it
        self.ended = False
        #: why its ending could not be told; then it ends with its claim, its session or its time
        self.unsent = ""
        self._cost: int | None = None

    def __repr__(self) -> str:
        how = "ended" if self.ended else f"unsent: {self.unsent}" if self.unsent else "held" if self.reserved else "new"
        return f"<Hold {self.name} of {self.amount_micro_usd} micro-USD, {how}>"

    @property
    def cost_micro_usd(self) -> int | None:
        """What it cost, as far as is known: charged when the block is left, however it is left. None: nothing."""
        return self._cost

    @cost_micro_usd.setter
    def cost_micro_usd(self, amount: int | None) -> None:
        self._cost = None if amount is None else whole(amount, "cost_micro_usd")

    async def commit(self, amount_micro_usd: int, *, usage: Usage | None = None) -> wire.CommitReply:
        """Charges what it cost, under or over what is held, and frees the rest.

        Raises `Conflict` when the hold has ended in another way.
        """
        self.cost_micro_usd = whole(amount_micro_usd)
        self.usage = usage or self.usage
        message = wire.Commit(hold=self.name, amount_micro_usd=amount_micro_usd, usage=self.usage)
        reply: wire.CommitReply = await self._line.call(message)
        self.ended, self.charged = True, reply
        return reply

    async def void(self) -> wire.VoidReply:
        """Frees all of it: nothing was spent."""
        self._cost = None
        reply: wire.VoidReply = await self._line.call(wire.Void(hold=self.name))
        self.ended = True
        return reply

    # -- as a block --------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Raises `BudgetShort`, which names the account; then nothing is held."""
        if self.reserved is not None:
            raise RuntimeError(f"the hold {self.name} was used before: make another")
        try:
            await self._reserve()
        except asyncio.CancelledError as cancelled:  # the answer may still be on its way
            await self._leave(cancelled)
            raise
        return self

    async def _reserve(self) -> None:
        for again in range(1, AGAIN_MAX):
            known: str | None = None
            try:
                reply: wire.ReserveReply = await self._line.ask(self._message)
            except Conflict as used:  # before, for another amount
                known = used.facts.get("state")
                if self._step is None or known not in ENDED_FREE:
                    raise
            if known is None and (self._step is None or reply.expires_in_s > 0 or not await self._was_freed()):
                self.reserved = reply
                return
            self.name = step_id(str(self._message.task), self._message.fence or 0, f"{self._step}\0{again}")
            self._message = replace(self._message, hold=self.name, request_id=None)
        raise Conflict(f"the step {self._step} was begun and freed {AGAIN_MAX} times; nothing was held")

    async def _was_freed(self) -> bool:
        """Of a hold that had ended before: whether it was freed and not charged."""
        try:
            await self._line.call(wire.Void(hold=self.name))
        except Conflict as ended:
            self.charged_before = ended.facts.get("charged")
            return False
        return True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ended or (self._cost is None and self.charged_before is not None):
            return
        if error is None and self._cost is not None:
            try:
                await to_its_end(self.commit(self._cost))
            except FabricError as unsent:
                self._note(unsent, unsent)
                raise
        else:
            await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        """Ends the hold on the way out of a block, whose own exception is what matters."""

        async def end() -> None:
            try:
                async with asyncio.timeout(LEAVE_S):
                    await (self.void() if self._cost is None else self.commit(self._cost))
            except UnknownHold as unknown:
                if self.reserved is not None or self._cost is not None:  # else it was never placed
                    self._note(unknown, error)
            except (FabricError, TimeoutError) as unsent:
                self._note(unsent, error)

        await to_its_end(end())

    def _note(self, unsent: Exception, error: BaseException | None) -> None:
        what = "freed" if self._cost is None else f"charged with {self._cost} micro-USD"
        self.unsent = f"the hold {self.name} could not be {what}: {str(unsent) or 'no answer in time'}"
        if error is not None:
            error.add_note(self.unsent)
        else:
            LOG.warning("%s", self.unsent)
