"""One session's line to the fabric: requests that are sent until they are answered.

**A retry is the same request.** Every mutating request carries an id, and when no answer comes it is sent again with
the same one: the fabric answers it once, whichever daemon gets it. Only when `timeout_s` is up does the error reach
the caller, and then the outcome is unknown.

**What is not tried again.** That nothing matches, that a budget is short and that a breaker is open are answers, not
accidents: what to do about them, and how long to wait, is the caller's decision.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ifabric import endpoints
from ifabric.bus.base import Answer, Bus
from ifabric.clock import Clock
from ifabric.errors import BreakerOpen, BudgetShort, FabricError, NoTaskMatches, Unavailable, Unreachable, from_body
from ifabric.tracing.asking import Asking, asks
from ifabric.wire import protocol, subjects
from ifabric.wire.envelope import (
    DEADLINE_HEADER,
    ERROR_CODE_HEADER,
    TRACE_HEADER,
    Mutation,
    Reply,
    Request,
    encode,
    loads,
)

T = TypeVar("T")

#: how long an attempt waits for its answer: short at first, since a frozen daemon keeps its share of the requests until
#: NATS has missed its pings for three seconds, and the next attempt may reach another; long once it is the fabric that is slow
SHORT_ATTEMPT_S, SHORT_FOR_S, ATTEMPT_S = 0.5, 3.5, 2.0
BACKOFF_S = (0.05, 0.25)
#: how long leaving a block may take to say how it ended
LEAVE_S = 2.0
_DECODERS: dict[type[Request], msgspec.json.Decoder[Any]] = {
    request: msgspec.json.Decoder(reply) for request, reply in protocol.REPLIES.items()
}
#: answers that the same request would only get again
_ANSWERS = (NoTaskMatches, BudgetShort, BreakerOpen)


class Line:
    """Asks for one session."""

    def __init__(self, bus: Bus, clock: Clock, *, session: str, timeout_s: float, where: str) -> None:
        self.session = session
        #: W3C traceparent that requests go on with where this process has no span of OpenTelemetry; "" for none
        self.trace = ""
        self._bus = bus
        self._clock = clock
        self._timeout_s = timeout_s
        self._where = where

    async def call(self, message: Request, *, attempt_s: float | None = None, again: bool = True) -> Any:
        """Sends one request until it is answered (without `again`: once); the reply's struct, or the refusal as an
        exception.

        A mutation without an id gets one. `Unavailable`: nobody answered in time, and whether it was carried out is
        unknown.
        """
        if isinstance(message, Mutation) and message.request_id is None:
            message = msgspec.structs.replace(message, request_id=self._clock.token())
        asking = asks(message, self.session, self.trace)
        if asking is None:
            return await self._answered(message, None, attempt_s, again)
        try:
            reply = await self._answered(message, asking, attempt_s, again)
        except BaseException as error:
            asking.end(error)
            raise
        asking.end()
        return reply

    async def _answered(self, message: Request, asking: Asking | None, attempt_s: float | None, again: bool) -> Any:
        subject = subjects.request(message.component, message.verb, self.session, admin=message.admin)
        data = encode(message)
        began = self._clock.monotonic()
        until = began + max(self._timeout_s, attempt_s or 0.0)
        while True:
            short = self._clock.monotonic() - began < SHORT_FOR_S
            patience_s = attempt_s or min(SHORT_ATTEMPT_S if short else ATTEMPT_S, self._timeout_s)
            headers = {DEADLINE_HEADER: str(int(patience_s * 1000))}
            if asking is not None:
                headers[TRACE_HEADER] = asking.traceparent
            try:
                answer = await self._bus.request(subject, data, timeout_s=patience_s, headers=headers)
                return _read(message, answer)
            except FabricError as error:
                if error.facts.get("what") == "draining":  # a daemon that hands over is no sign that nobody is there
                    until = max(until, self._clock.monotonic() + self._timeout_s)
                late = not again or self._clock.monotonic() >= until
                if isinstance(error, Unavailable) and error.facts.get("reason") == "no_responders" and late:
                    raise Unreachable(
                        f"no {message.component} answers at {self._where}; is the daemon running? `ifabric run` starts one"
                    ) from None
                in_vain = isinstance(error, _ANSWERS) or error.facts.get("what") == "governor"
                if late or in_vain or not error.retryable:
                    raise
            await self._clock.sleep(self._clock.jitter(*BACKOFF_S))

    async def ask(self, message: Request, *, attempt_s: float | None = None) -> Any:
        """`call`, for what only a session that is there may ask; who keeps one says hello first."""
        return await self.call(message, attempt_s=attempt_s)


def _read(message: Request, answer: Answer) -> Any:
    if answer.headers and ERROR_CODE_HEADER in answer.headers:
        raise from_body(loads(answer.data) if answer.data else None)
    try:
        reply: Reply = _DECODERS[type(message)].decode(answer.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FabricError(f"the answer to {message.verb} is not one: {error}") from None
    return reply


async def to_its_end(last_words: Coroutine[Any, Any, T]) -> T:
    """Runs what a block has to say on its way out, to its end, even if the block is being cancelled or is cancelled
    once more. The cancellation comes out afterwards; so the coroutine must be bounded in time by itself.
    """
    speaking = asyncio.ensure_future(last_words)
    cancelled: asyncio.CancelledError | None = None
    while not speaking.done():
        try:
            await asyncio.wait((speaking,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not speaking.cancelled():
            speaking.exception()  # it is seen, and the cancellation goes first
        raise cancelled
    return speaking.result()


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
