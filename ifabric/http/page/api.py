"""What the page asks for when somebody looks closer: each a question of the wire, asked over the bus as `_page`.

The query of the URL is the request's fields. The answer is the wire's reply, or the wire's error body with its status.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as Asked
from starlette.responses import Response

from ifabric.errors import BadRequest, FabricError, Forbidden
from ifabric.http.page.asking import Asker
from ifabric.http.page.shell import SAFE
from ifabric.wire import chassis, coordinator, governor, overview
from ifabric.wire.envelope import Request, encode

JSON = "application/json"
#: a question's answer is of this moment
FRESH: Mapping[str, str] = {**SAFE, "Cache-Control": "no-store"}

M = TypeVar("M", bound=Request)


def answer(reply: Any) -> Response:
    """A reply of the wire."""
    return Response(encode(reply), headers=dict(FRESH), media_type=JSON)


def refusal(error: FabricError) -> Response:
    """An error, as the wire has it."""
    headers = dict(FRESH)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="ifabric"'
    if (retry_in_s := error.facts.get("retry_in_s")) is not None:
        headers["Retry-After"] = str(max(1, round(retry_in_s)))
    return Response(encode(error.to_body()), error.status, headers, JSON)


def message_of(kind: type[M], query: Mapping[str, str]) -> M:
    """The request that a URL's query is; empty values count as absent. `BadRequest` names the field."""
    given = {field: text for field in kind.__struct_fields__ if (text := query.get(field))}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{error}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_rebound(host_header: str) -> None:
    """`Forbidden` for a page of somewhere else that had its name resolve to this machine (DNS rebinding): its scripts
    would be told everything, but the browser still calls it by its name.
    """
    host = host_header.strip()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name):
        raise Forbidden(
            "This port listens on this machine alone, and is called localhost; nothing was shown. To reach the page "
            "under another name, set page.viewer_token_file.",
            host=host[:100],
        )


QUESTIONS: Mapping[str, type[Request]] = {
    "tasks": coordinator.List,
    "task": coordinator.Get,
    "sessions": overview.Sessions,
    "accounts": overview.Accounts,
    "account": governor.Balance,
    "breakers": governor.Breakers,
    "sandboxes": chassis.Runs,
    "modules": chassis.Modules,
}


async def question(name: str, asker: Asker, query: Mapping[str, str]) -> Any:
    """The reply to one of `QUESTIONS`."""
    message = message_of(QUESTIONS[name], query)
    if isinstance(message, governor.Balance) and message.account is None:
        raise BadRequest("name an account: ?account=NAME")
    reply = await asker.ask(message)
    if isinstance(reply, chassis.RunsReply):
        return {"runs": reply.runs, "workers": reply.pool, "slo": reply.slo}
    return reply


async def unknown(asked: Asked) -> Response:
    """What is no question and no action."""
    error = BadRequest(f"there is no {asked.method} {asked.url.path[:100]} here")
    return Response(encode(error.to_body()), 404, dict(FRESH), JSON)
