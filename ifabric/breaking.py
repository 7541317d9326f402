"""A breaker around a call to something that may fail, and what an exception says about it.

    async with client.breaker("openai/gpt-x"):
        answer = await model(...)

**Whose fault it was** decides what is reported. Only what is shaped like the resource's own trouble is a *failure*: no
connection, no answer in time, a status of 500 and above, 408 and 429 (with what `Retry-After` asks for). What the
caller did is *ignored*: other statuses, a `ValueError`, a cancellation, a refusal of the fabric (a budget that is
short says nothing about the model). An exception that nothing is known of is judged by its cause, and is ignored when it
has none: a breaker that trips on our own bugs takes a healthy resource from everybody. `classify` knows better, when
you do. Clients of HTTP are recognised by what their exceptions have and how they are called, and none is imported.

**The report is the block's duty**, for a probe's permit is held until it comes. It is sent however the block ends, but
not for ever, and one that cannot be sent hides nothing: a permit times out by itself.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import logging
import re
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, ParamSpec, Self, TypeVar

from ifabric.calling import LEAVE_S, Line, to_its_end
from ifabric.clock import Clock
from ifabric.errors import BreakerOpen, FabricError
from ifabric.wire import governor as wire
from ifabric.wire.governor import Verdict

P = ParamSpec("P")
R = TypeVar("R")
Classify = Callable[[BaseException], Verdict | None]

LOG = logging.getLogger("ifabric")
#: statuses below 500 that are the resource's own trouble
ITS_OWN = (408, 429)
#: `OSError`s of this machine's files
_OF_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
#: names of exceptions without a status, of httpx, aiohttp, OpenAI's and Anthropic's clients, botocore
_LOST = {
    "TransportError", "APIConnectionError", "APITimeoutError", "ClientConnectionError", "ClientPayloadError",
    "EndpointConnectionError", "ReadTimeoutError", "ConnectTimeoutError", "ConnectionClosedError",
}  # fmt: skip
#: and of those among them that are the caller's: an address that is none, a pool that is too small
_OURS = {"UnsupportedProtocol", "LocalProtocolError", "PoolTimeout", "InvalidURL", "InvalidUrlClientError"}
_CAUSES_MAX = 8
#: the shortest pause before asking again, and the longest while others probe: their word may come at any moment
PAUSE_S = (0.02, 0.1)
PROBING_PAUSE_S = 0.3


class Outcome(NamedTuple):
    """What an exception says about the resource."""

    verdict: Verdict
    retry_after_s: float | None = None


def judge(error: BaseException | None, clock: Clock, depth: int = 0) -> Outcome:
    """What the end of a block says. None: it ended well."""
    if error is None:
        return Outcome("success")
    if isinstance(error, FabricError) or depth > _CAUSES_MAX:
        return Outcome("ignored")
    if isinstance(error, BaseExceptionGroup):
        among = [judge(one, clock, depth + 1) for one in error.exceptions]
        return next((outcome for outcome in among if outcome.verdict == "failure"), Outcome("ignored"))
    status = _status(error)
    if status is not None:
        failed = status >= 500 or status in ITS_OWN
        return Outcome("failure", _retry_after(error, clock)) if failed else Outcome("ignored")
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _OURS or isinstance(error, _OF_FILES):
        return Outcome("ignored")
    if isinstance(error, OSError | TimeoutError) or names & _LOST:
        return Outcome("failure")
    known = isinstance(error, ValueError | TypeError | KeyError) or not isinstance(error, Exception)
    return Outcome("ignored") if known or error.__cause__ is None else judge(error.__cause__, clock, depth + 1)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception tells, wherever its library keeps it."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (response, "status")):
        found = getattr(holder, name, None)
        if isinstance(found, int) and not isinstance(found, bool) and 100 <= found <= 599:
            return int(found)
    return None


def _retry_after(error: BaseException, clock: Clock) -> float | None:
    """What `Retry-After` asks for, in seconds from now: it says so, or names a date (RFC 9110, 10.2.3)."""
    for holder in (getattr(error, "response", None), error):
        get = getattr(getattr(holder, "headers", None), "get", None)
        if not callable(get):
            continue
        said = get("retry-after") or get("Retry-After")
        if isinstance(said, str) and (seconds := _seconds(said.strip(), clock)) is not None:
            return min(max(seconds, 0.0), wire.RETRY_AFTER_MAX_S)
    return None


def _seconds(said: str, clock: Clock) -> float | None:
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", said, re.ASCII):
        return float(said)
    try:
        return email.utils.parsedate_to_datetime(said).timestamp() - clock.wall_ms() / 1000
    except (ValueError, OverflowError):
        return None


class Breaker:
    """A call to a resource, as a block or around a function; it may be entered again, but not while it is entered.

    Entering raises `BreakerOpen`, with `probe_in_s`, unless a call is admitted within `wait_s`.
    """

    def __init__(
        self, line: Line, clock: Clock, name: str, *, classify: Classify | None = None, wait_s: float = 0.0
    ) -> None:
        self._line = line
        self._clock = clock
        self.name = name
        self._classify = classify
        self._wait_s = wait_s
        #: the governor's answer; None outside of the block
        self.permit: wire.AdmitReply | None = None
        #: why the last report could not be sent; then a probe's permit times out
        self.unsent = ""
        self._began = 0.0
        self._said: tuple[Outcome, float] | None = None

    def success(self) -> None:
        """It went well, whatever the block does from now on."""
        self._say(Outcome("success"))

    def failure(self, *, retry_after_s: float | None = None) -> None:
        """The resource failed, even if no exception says so."""
        self._say(Outcome("failure", retry_after_s))

    def ignored(self) -> None:
        """It says nothing about the resource."""
        self._say(Outcome("ignored"))

    def _say(self, outcome: Outcome) -> None:
        self._said = outcome, self._clock.monotonic()

    def __call__(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        """The function, each call of it through the breaker."""

        @functools.wraps(function)
        async def through(*args: P.args, **named: P.kwargs) -> R:
            async with Breaker(self._line, self._clock, self.name, classify=self._classify, wait_s=self._wait_s):
                return await function(*args, **named)

        return through

    async def __aenter__(self) -> Self:
        if self.permit is not None:
            raise RuntimeError(f"this block of the breaker {self.name} is entered already: make another")
        until = self._clock.monotonic() + self._wait_s
        while True:
            try:
                self.permit = await self._line.call(wire.Admit(breaker=self.name))
                break
            except BreakerOpen as refused:
                probe_in_s = refused.facts.get("probe_in_s")
                if probe_in_s is None:  # an operator holds it open
                    raise
                probing = refused.facts.get("state") == "half_open"
                pause_s = min(float(probe_in_s), PROBING_PAUSE_S) if probing else float(probe_in_s)
                pause_s = max(pause_s, self._clock.jitter(*PAUSE_S))
                if self._clock.monotonic() + pause_s > until:
                    raise
                await self._clock.sleep(pause_s)
        self.unsent, self._said, self._began = "", None, self._clock.monotonic()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.permit is not None, "it was entered"
        permit, self.permit = self.permit.permit, None
        outcome, at = self._said or (self._judged(error), self._clock.monotonic())
        message = wire.Report(
            breaker=self.name,
            permit=permit,
            outcome=outcome.verdict,
            latency_s=min(max(0.0, at - self._began), 86_400.0),
            retry_after_s=outcome.retry_after_s,
        )
        await to_its_end(self._report(message, error))

    def _judged(self, error: BaseException | None) -> Outcome:
        outcome = judge(error, self._clock)
        if self._classify is None or error is None:
            return outcome
        try:
            verdict = self._classify(error)
        except Exception as bug:
            error.add_note(f"classify failed on this exception: {type(bug).__name__}: {bug}")
            return outcome
        return outcome if verdict is None else Outcome(verdict, outcome.retry_after_s if verdict == "failure" else None)

    async def _report(self, message: wire.Report, error: BaseException | None) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._line.call(message)
        except (FabricError, TimeoutError) as unsent:
            self.unsent = f"the report to the breaker {self.name} was not taken: {str(unsent) or 'no answer in time'}"
            if error is not None:
                error.add_note(self.unsent)
            else:
                LOG.warning("%s", self.unsent)


__all__ = ["Breaker", "Classify", "Outcome", "Verdict", "judge"]
