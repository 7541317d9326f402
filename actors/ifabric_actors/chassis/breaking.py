"""Asks the governor whether an endpoint may be called, and tells it how the call went."""

from __future__ import annotations

import email.utils
import re
from typing import TypeVar

import msgspec

from ifabric.bus.base import Bus
from ifabric.errors import BreakerOpen, FabricError, Overloaded, Unavailable, from_body
from ifabric.wire import governor as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import ERROR_CODE_HEADER, Request, decode, encode, loads, onward
from ifabric.wire.governor import Verdict

R = TypeVar("R", bound=msgspec.Struct)

#: the governor answers in milliseconds, or is not there: a guest waits meanwhile, within its wall clock
ASK_TIMEOUT_S = 2.0
#: statuses below 500 that are the endpoint's own trouble; as the SDK judges (`ifabric.breaking`)
ITS_OWN = (408, 429)
LATENCY_MAX_S = 86_400.0

_ADMIT_REPLY = msgspec.json.Decoder(wire.AdmitReply)
_REPORT_REPLY = msgspec.json.Decoder(wire.BreakerReply)


def verdict(status: int) -> Verdict:
    """What a response's status says of the endpoint. Other 4xx are the guest's own mistakes and say nothing."""
    if status >= 500 or status in ITS_OWN:
        return "failure"
    return "success" if status < 400 else "ignored"


def retry_after_s(values: list[bytes], wall_ms: int) -> float | None:
    """What `Retry-After` asks for, in seconds from now: it says so, or names a date (RFC 9110, 10.2.3)."""
    said = values[0].decode("latin-1").strip() if values else ""
    if re.fullmatch(r"[0-9]{1,9}", said, re.ASCII):
        seconds = float(said)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - wall_ms / 1000
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), wire.RETRY_AFTER_MAX_S)


class GovernorBreakers:
    """The breakers of the fabric, asked over the bus in the name of the session whose run it is."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def admit(self, name: str, session: str) -> str:
        """A permit. `BreakerOpen`; `Overloaded`; `Unavailable` when the governor does not say."""
        try:
            return (await self._ask(wire.Admit(breaker=name), session, _ADMIT_REPLY)).permit
        except (BreakerOpen, Overloaded):
            raise
        except FabricError as error:
            # whatever it is, it is no fault of the guest's, and without a word of the governor nothing goes out
            raise Unavailable(
                f"whether {name} may be called is not known: {error}", what="governor", why=error.code
            ) from None

    async def report(
        self,
        name: str,
        session: str,
        permit: str,
        outcome: Verdict,
        *,
        latency_s: float,
        retry_after_s: float | None = None,
    ) -> None:
        """Tells the governor. One that is lost is lost: a probe's permit times out by itself."""
        message = wire.Report(
            breaker=name,
            permit=permit,
            outcome=outcome,
            latency_s=min(max(0.0, latency_s), LATENCY_MAX_S),
            retry_after_s=retry_after_s,
        )
        try:
            await self._ask(message, session, _REPORT_REPLY)
        except FabricError:
            return

    async def _ask(self, message: Request, session: str, reply: msgspec.json.Decoder[R]) -> R:
        subject = subjects.request(message.component, message.verb, session)
        answer = await self._bus.request(subject, encode(message), timeout_s=ASK_TIMEOUT_S, headers=onward())
        if ERROR_CODE_HEADER in answer.headers:
            raise from_body(loads(answer.data))
        return decode(reply, answer.data)
