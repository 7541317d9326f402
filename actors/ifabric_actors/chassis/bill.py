"""What a run costs, and who is charged: the session's hold that the run names, through the governor."""

from __future__ import annotations

from typing import Any

import msgspec

from ifabric.actor.base import Context
from ifabric.errors import BadRequest, FabricError, Unavailable, UnknownHold, from_body
from ifabric.wire import governor, subjects
from ifabric.wire.envelope import ERROR_CODE_HEADER, Request, encode, loads, onward

ASK_S = 2.0
#: how long a charge is tried: the governor may be restarting
TRY_S = 20.0
_balance = msgspec.json.Decoder(governor.BalanceReply)


class Bill:
    """Charges runs."""

    def __init__(self, context: Context) -> None:
        self._bus, self._clock, self._log = context.bus, context.clock, context.log
        self._hold_required = context.config.price.hold_required

    async def expect(self, session: str, hold: str | None) -> None:
        """Before a run: its hold is there and open. `UnknownHold`, `BadRequest` when there has to be one,
        `Unavailable` when there is no governor to ask.
        """
        if hold is None:
            if self._hold_required:
                raise BadRequest(
                    "a run here is paid for: name one of the session's holds as `hold`; it was not started"
                )
            return
        balance = _balance.decode(await self._ask(governor.Balance(), session))
        if not any(line.hold == hold and line.session == session for line in balance.holds):
            raise UnknownHold(f"session {session} has no open hold {hold}; the run was not started", hold=hold)

    async def charge(self, session: str, hold: str, run: str, cost_micro_usd: int) -> None:
        """After a run: commits its hold with what it cost. A charge that cannot be made in time is logged."""
        message = governor.Commit(hold=hold, amount_micro_usd=cost_micro_usd, request_id=run)
        until = self._clock.monotonic() + TRY_S
        while True:
            try:
                await self._ask(message, session)
            except FabricError as error:
                if not isinstance(error, Unavailable) or self._clock.monotonic() > until:
                    self._log.error(
                        "a run could not be charged", run=run, session=session, hold=hold,
                        cost_micro_usd=cost_micro_usd, why=str(error),
                    )  # fmt: skip
                    return
                await self._clock.sleep(self._clock.jitter(0.05, 0.25))
            else:
                return

    async def _ask(self, message: Request, session: str) -> bytes:
        subject = subjects.request(message.component, message.verb, session)
        try:
            answer = await self._bus.request(subject, encode(message), timeout_s=ASK_S, headers=onward())
        except Unavailable as error:
            raise Unavailable(f"the governor does not answer: {error}", what="governor") from None
        if ERROR_CODE_HEADER in answer.headers:
            body: Any = loads(answer.data)
            raise from_body(body)
        return answer.data
