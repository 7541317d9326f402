"""The wire protocol as an AsyncAPI 3 document, made from the message structs.

What is described is the daemon: it receives requests on one channel a verb and sends events on one channel each. A
reply goes to the inbox that the request names, which is NATS's business: its channel has no address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ifabric import __version__
from ifabric.errors import CallerError, FabricError, ServerError, all_codes
from ifabric.wire import protocol as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import (
    DEADLINE_HEADER,
    ERROR_CODE_HEADER,
    ERROR_HEADER,
    MSG_ID_HEADER,
    TRACE_HEADER,
    Request,
)

_REF = "#/components/schemas/{name}"
_SESSION = {
    "description": "Who asks: proven by the server's permissions, never by the payload.",
    "examples": ["worker-1"],
}
_REQUEST_HEADERS = {
    "type": "object",
    "properties": {
        DEADLINE_HEADER: {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "Milliseconds: work that cannot finish in time is refused, not started.",
        },
        TRACE_HEADER: {"type": "string", "description": "W3C trace context."},
    },
}
_ERROR_HEADERS = {
    "type": "object",
    "required": [ERROR_HEADER, ERROR_CODE_HEADER],
    "properties": {
        ERROR_HEADER: {"type": "string", "description": "A sentence."},
        ERROR_CODE_HEADER: {"type": "string", "pattern": "^[1-5][0-9]{2}$"},
    },
}
_EVENT_HEADERS = {
    "type": "object",
    "required": [MSG_ID_HEADER],
    "properties": {MSG_ID_HEADER: {"type": "string", "description": "The same for the same event, whoever sends it."}},
}


def document() -> dict[str, Any]:
    """The whole of version 1, as plain data."""
    types: list[Any] = [*wire.REQUESTS, *dict.fromkeys(wire.REPLIES.values()), *dict.fromkeys(wire.EVENTS.values())]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    schemas["Error"] = _error_schema()
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for request in wire.REQUESTS:
        _add_verb(request, channels, operations)
    for (about, what), kind in wire.EVENTS.items():
        _add_event(about, what, kind.__name__, channels, operations)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "InfraFabric",
            "version": __version__,
            "description": "Tasks, claims, money, breakers and events over NATS: JSON in UTF-8, one object a message. "
            "Errors carry the headers of ADR-32.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"schemas": _without_discriminators(schemas), "messages": _messages()},
    }


def _add_verb(request: type[Request], channels: dict[str, Any], operations: dict[str, Any]) -> None:
    name = f"{'admin_' if request.admin else ''}{request.component}_{request.verb}"
    channels[name] = {
        "address": subjects.endpoint(request.component, request.verb, admin=request.admin)[:-1] + "{session}",
        "parameters": {"session": _SESSION},
        "messages": _refs("#/components/messages", request.__name__),
    }
    answers = (request.reply.__name__, "Error")
    channels[f"{name}_reply"] = {"address": None, "messages": _refs("#/components/messages", *answers)}
    operations[name] = {
        "action": "receive",
        "summary": (request.__doc__ or "").strip(),
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": list(_refs(f"#/channels/{name}/messages", request.__name__).values()),
        "reply": {
            "channel": {"$ref": f"#/channels/{name}_reply"},
            "messages": list(_refs(f"#/channels/{name}_reply/messages", *answers).values()),
        },
        "bindings": {"nats": {"queue": request.component, "bindingVersion": "0.1.0"}},
    }


def _add_event(about: str, what: str, kind: str, channels: dict[str, Any], operations: dict[str, Any]) -> None:
    name = f"event_{about}_{what}"
    channels[name] = {"address": subjects.event(about, what), "messages": _refs("#/components/messages", kind)}
    operations[name] = {
        "action": "send",
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": list(_refs(f"#/channels/{name}/messages", kind).values()),
    }


def _refs(where: str, *names: str) -> dict[str, dict[str, str]]:
    return {name: {"$ref": f"{where}/{name}"} for name in names}


def _messages() -> dict[str, Any]:
    made: dict[str, Any] = {one.__name__: {"headers": _REQUEST_HEADERS} for one in wire.REQUESTS}
    made |= {one.__name__: {} for one in wire.REPLIES.values()}
    made |= {one.__name__: {"headers": _EVENT_HEADERS} for one in wire.EVENTS.values()}
    made["Error"] = {"headers": _ERROR_HEADERS}
    return {name: {"name": name, **about, "payload": {"$ref": _REF.format(name=name)}} for name, about in made.items()}


def _error_schema() -> dict[str, Any]:
    codes = {code: kind for code, kind in sorted(all_codes().items()) if issubclass(kind, CallerError | ServerError)}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "retryable"],
                "additionalProperties": True,
                "properties": {
                    "code": {"enum": list(codes), "description": _said(codes)},
                    "message": {"type": "string"},
                    "retryable": {"type": "boolean"},
                },
            }
        },
    }


def _said(codes: Mapping[str, type[FabricError]]) -> str:
    """A line for each code: its ADR-32 number and its sentence."""
    return "\n".join(f"- {code} ({kind.status}): {kind().message}" for code, kind in codes.items())


def _without_discriminators(value: Any) -> Any:
    """Msgspec writes OpenAPI's `discriminator`, which AsyncAPI 3 does not allow."""
    if isinstance(value, dict):
        return {key: _without_discriminators(one) for key, one in value.items() if key != "discriminator"}
    if isinstance(value, list | tuple):
        return [_without_discriminators(one) for one in value]
    return value
