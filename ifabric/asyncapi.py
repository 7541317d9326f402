"""The wire protocol as an AsyncAPI 3 document, made from the message structs."""

from __future__ import annotations

from typing import Any

import msgspec

from ifabric import __version__
from ifabric.errors import CallerError, ServerError, all_codes
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects

_REF = "#/components/schemas/{name}"
SESSION = {
    "description": "Who asks: proven by the server's permissions, never by the payload.",
    "examples": ["worker-1"],
}


def document() -> dict[str, Any]:
    """The whole of version 1, as plain data."""
    types: list[Any] = [*wire.REQUESTS, *dict.fromkeys(wire.REPLIES.values()), wire.TaskEvent]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    schemas["Error"] = _error_schema()
    messages: dict[str, Any] = {name: {"payload": {"$ref": _REF.format(name=name)}} for name in schemas}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for request in wire.REQUESTS:
        name = f"{'admin_' if request.admin else ''}{request.component}_{request.verb}"
        subject = subjects.endpoint(request.component, request.verb, admin=request.admin)[:-1] + "{session}"
        reply = request.reply.__name__
        channels[name] = {
            "address": subject,
            "parameters": {"session": SESSION},
            "messages": {request.__name__: {"$ref": f"#/components/messages/{request.__name__}"}},
        }
        channels[f"{name}_reply"] = {
            "address": None,
            "messages": {one: {"$ref": f"#/components/messages/{one}"} for one in (reply, "Error")},
        }
        operations[name] = {
            "action": "receive",
            "summary": (request.__doc__ or "").strip(),
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/{request.__name__}"}],
            "reply": {
                "channel": {"$ref": f"#/channels/{name}_reply"},
                "messages": [{"$ref": f"#/channels/{name}_reply/messages/{one}"} for one in (reply, "Error")],
            },
            "bindings": {"nats": {"queue": request.component, "bindingVersion": "0.1.0"}},
        }
    for event in (*wire.EVENTS, *wire.FURTHER_EVENTS):
        name = f"event_task_{event}"
        channels[name] = {
            "address": subjects.event("task", event),
            "messages": {"TaskEvent": {"$ref": "#/components/messages/TaskEvent"}},
        }
        operations[name] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/TaskEvent"}],
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "InfraFabric",
            "version": __version__,
            "description": "Tasks, claims and events over NATS: JSON in UTF-8, one object a message. Errors carry the headers of ADR-32.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"schemas": _without_discriminators(schemas), "messages": messages},
    }


def _error_schema() -> dict[str, Any]:
    codes = all_codes()
    on_wire = sorted(code for code, kind in codes.items() if issubclass(kind, CallerError | ServerError))
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "retryable"],
                "additionalProperties": True,
                "properties": {
                    "code": {"enum": on_wire, "description": "; ".join(f"{c}: {codes[c].status}" for c in on_wire)},
                    "message": {"type": "string"},
                    "retryable": {"type": "boolean"},
                },
            }
        },
    }


def _without_discriminators(value: Any) -> Any:
    """Msgspec writes OpenAPI's `discriminator`, which AsyncAPI 3 does not allow."""
    if isinstance(value, dict):
        return {key: _without_discriminators(one) for key, one in value.items() if key != "discriminator"}
    if isinstance(value, list | tuple):
        return [_without_discriminators(one) for one in value]
    return value
