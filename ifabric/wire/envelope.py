"""How a message is packed: JSON, one object, with errors that name the place.

`decode` is the one boundary where bytes from outside become values. msgspec checks types and ranges and names the path
(`$.tasks[3].needs`); two kinds of hostile input escape its `DecodeError` and are caught here too: nesting deeper than
the interpreter's stack (`RecursionError`) and text that is not UTF-8. The stack is no limit to rely on: what just fits
where it is received does not fit where it is read again, a few calls deeper. So nesting has a limit of its own.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from ifabric.errors import BadRequest
from ifabric.handling import CURRENT
from ifabric.wire.subjects import SESSION_ID, TASK_ID

ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"
DEADLINE_HEADER = "If-Deadline-Ms"
TRACE_HEADER = "traceparent"
MSG_ID_HEADER = "Nats-Msg-Id"

#: what a task's `payload` or `result` may take, in bytes of JSON
PAYLOAD_MAX_BYTES = 64 * 1024
#: lists and objects inside each other, in one message
NESTING_MAX = 128

TaskId = Annotated[str, msgspec.Meta(pattern=TASK_ID, description="up to 128 characters; may contain dots")]
SessionId = Annotated[str, msgspec.Meta(pattern=SESSION_ID)]
RequestId = Annotated[str, msgspec.Meta(pattern=SESSION_ID, description="unique per request; a retry repeats it")]
Capability = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,63}$(?!\n)")]
Capabilities = Annotated[tuple[Capability, ...], msgspec.Meta(max_length=64)]
MicroUsd = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1, description="integer micro-USD")]
Fence = Annotated[int, msgspec.Meta(ge=0, lt=2**53, description="incarnation * 2^40 + generation")]
Text = Annotated[str, msgspec.Meta(max_length=2048)]


Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Purpose = Literal["work", "coordination"]


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the money was spent on."""

    tokens_in: Tokens = 0
    tokens_out: Tokens = 0
    #: coordination: talking about the work (planning, voting, reading the board), and not the work itself
    purpose: Purpose = "work"


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base of every reply: absent fields have their default. A list that a reply is asked for is always there."""


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base of every request. Unknown fields are ignored, so that an older daemon serves a newer client."""

    component: ClassVar[str]
    verb: ClassVar[str]
    reply: ClassVar[type[Reply]]
    #: only under ``if.v1.admin``
    admin: ClassVar[bool] = False


class Mutation(Request, frozen=True, kw_only=True, omit_defaults=True):
    """A request that changes state; with a `request_id` a retry gets the first answer."""

    request_id: RequestId | None = None


M = TypeVar("M", bound=msgspec.Struct)
_encoder = msgspec.json.Encoder()
encode = _encoder.encode
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BRACKET = re.compile(rb"[\[\]{}]")


def decode(decoder: msgspec.json.Decoder[M], data: bytes) -> M:
    """The message in `data`; `BadRequest` with the path when it is not one. An empty payload reads as ``{}``."""
    try:
        message = decoder.decode(data or b"{}")
    except msgspec.ValidationError as error:
        raise BadRequest(f"{error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the payload is not JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the payload is nested too deeply") from None
    if data.count(b"[") + data.count(b"{") > NESTING_MAX and _depth(data) > NESTING_MAX:
        raise BadRequest(f"the payload is nested too deeply: {NESTING_MAX} levels are allowed")
    return message


def onward() -> dict[str, str] | None:
    """Headers for a request that is made because of the message being handled: it goes on with that one's trace."""
    handling = CURRENT.get()
    if handling is None or not handling.trace:
        return None
    return {TRACE_HEADER: handling.trace if handling.span is None else handling.span.traceparent}


def _depth(data: bytes) -> int:
    """How deep lists and objects are nested in well-formed JSON."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def loads(data: bytes) -> Any:
    """Any JSON value; `BadRequest` when it is not one."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the payload is not JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the payload is nested too deeply") from None
