"""What an operator does from the page: an admin command of the wire, said in the operator's name.

So whoever carries it out audits it like every other. What is refused here never becomes a command: the page tells the
witnesses itself.

The body is the command's own; a `request_id` in it makes a retry get the first answer. Only JSON is taken and only a
header says who acts, no cookie: a form or a script of another site can do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Asked

from ifabric.errors import BadRequest, TooLarge
from ifabric.wire import chassis, coordinator, governor
from ifabric.wire.envelope import MicroUsd, Mutation, RequestId, TaskId, decode

BODY_MAX = 64 * 1024
WHY = "from the live page"


class _Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request_id: RequestId | None = None


class _Task(_Body, frozen=True, kw_only=True):
    task: TaskId


class _Breaker(_Body, frozen=True, kw_only=True):
    breaker: governor.BreakerName
    why: Annotated[str, Meta(max_length=200)] = WHY


class _Limit(_Body, frozen=True, kw_only=True):
    account: governor.Account
    #: null: no limit; it must be said
    limit_micro_usd: MicroUsd | None
    window: governor.Window = "total"


class _Run(_Body, frozen=True, kw_only=True):
    run: chassis.RunId
    why: Annotated[str, Meta(max_length=256)] = WHY


class Action(NamedTuple):
    """How a body becomes a command."""

    decoder: msgspec.json.Decoder[_Body]
    command: Callable[..., Mutation]


def _action(body: type[_Body], command: Callable[..., Mutation]) -> Action:
    return Action(msgspec.json.Decoder(body), command)


def _turn(state: Literal["open", "closed"]) -> Callable[[_Breaker], Mutation]:
    def command(body: _Breaker) -> Mutation:
        return governor.SetBreaker(breaker=body.breaker, state=state, why=body.why, request_id=body.request_id)

    return command


ACTIONS: Mapping[str, Action] = {
    "cancel": _action(_Task, lambda b: coordinator.Cancel(task=b.task, request_id=b.request_id)),
    "requeue": _action(_Task, lambda b: coordinator.Requeue(task=b.task, request_id=b.request_id)),
    "open": _action(_Breaker, _turn("open")),
    "close": _action(_Breaker, _turn("closed")),
    "limit": _action(
        _Limit,
        lambda b: governor.SetAccount(
            account=b.account, limit_micro_usd=b.limit_micro_usd, window=b.window, request_id=b.request_id
        ),
    ),
    "kill": _action(_Run, lambda b: chassis.Kill(run=b.run, why=b.why, request_id=b.request_id)),
}


async def command_of(name: str, asked: Asked) -> Mutation:
    """The command that a request is. `BadRequest` names the field, `TooLarge` the limit."""
    kind = asked.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("an action is JSON: send Content-Type: application/json; nothing was done")
    action = ACTIONS[name]
    return action.command(decode(action.decoder, await _body(asked)))


async def _body(asked: Asked) -> bytes:
    too_large = TooLarge(f"the body of an action has at most {BODY_MAX} bytes; nothing was done", allowed=BODY_MAX)
    length = asked.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 9 or int(length) > BODY_MAX):
        raise too_large
    body = bytearray()
    try:
        async for chunk in asked.stream():
            body += chunk
            if len(body) > BODY_MAX:
                raise too_large
    except ClientDisconnect:
        raise BadRequest("the request ended before its body; nothing was done") from None
    return bytes(body)
