"""What is recorded of a run and of its calls to the outside, where the request for it is traced."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from ifabric.handling import Span

if TYPE_CHECKING:
    from ifabric_actors.chassis.pool import Outcome

#: of a name that a guest says, in an attribute
SAID_MAX = 64
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class _Asked(msgspec.Struct):
    endpoint: str = ""
    method: str = "GET"


class _Answered(msgspec.Struct):
    status: int = 0
    #: instead of a response
    error: dict[str, Any] | None = None


_asked, _answered = msgspec.json.Decoder(_Asked), msgspec.json.Decoder(_Answered)


def ended(span: Span | None, outcome: Outcome) -> None:
    """How a run ended, and what it took."""
    done = outcome.done
    if span is None:
        return
    if outcome.why is not None:
        span.note({"error.type": outcome.why.code})
    if done is None:
        return
    span.note(
        {
            "ifabric.run.end": done.end,
            "ifabric.run.wall_s": done.wall_s,
            "ifabric.run.cpu_s": done.cpu_s,
            "ifabric.run.fuel": done.fuel,
            "ifabric.run.memory_peak_bytes": done.memory_peak_bytes,
        }
    )
    if done.end == "exit":
        span.note({"process.exit.code": done.exit_code})
    elif outcome.why is None:
        span.note({"error.type": done.detail or done.end})


async def called(run: Span, request: bytes, call: Awaitable[bytes]) -> bytes:
    """A call to an endpoint: the endpoint's name and the method as the guest asks for them, and what came of it."""
    asked = _decoded(_asked, request) or _Asked()
    method = asked.method if asked.method in METHODS else "_OTHER"
    told = {"ifabric.endpoint": asked.endpoint[:SAID_MAX], "http.request.method": method}
    span = run.child("egress", told, outward=True)
    try:
        answer = await call
    except BaseException as error:
        span.end(error)
        raise
    answered = _decoded(_answered, answer)
    if answered is not None and answered.status:
        span.note({"http.response.status_code": answered.status})
    if answered is not None and answered.error is not None:
        span.note({"error.type": str(answered.error.get("code"))})
    span.end()
    return answer


def _decoded(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """None for what a guest may have made of it; who answers the guest tells it."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
