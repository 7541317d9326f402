"""What is printed as the protocol is the protocol: every verb, event and error of the wire is in it, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from ifabric.asyncapi import document
from ifabric.errors import CallerError, ServerError, all_codes
from ifabric.wire import envelope, subjects
from ifabric.wire import protocol as wire
from ifabric.wire.coordinator import TaskSpec

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for one in value.values():
            yield from references(one)
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def resolved(reference: str) -> Any:
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def addresses(action: str) -> dict[str, Any]:
    """The operations of one direction, by the address of their channel."""
    operations = [one for one in DOCUMENT["operations"].values() if one["action"] == action]
    return {resolved(one["channel"]["$ref"])["address"]: one for one in operations}


def test_every_verb_of_the_wire_is_received_on_its_subject_and_answered_by_its_reply_or_an_error() -> None:
    received = addresses("receive")
    assert len(received) == len(wire.REQUESTS)
    for request in wire.REQUESTS:
        subject = subjects.request(request.component, request.verb, "SESSION", admin=request.admin)
        operation = received[subject.replace("SESSION", "{session}")]
        (asked,) = (resolved(resolved(one["$ref"])["$ref"]) for one in operation["messages"])
        assert asked["payload"] == {"$ref": f"#/components/schemas/{request.__name__}"}
        answers = {one["$ref"].rpartition("/")[2] for one in operation["reply"]["messages"]}
        assert answers == {wire.REPLIES[request].__name__, "Error"}
        assert operation["summary"], f"{request.__name__} says what it does"


def test_every_event_of_the_wire_is_sent_on_its_subject() -> None:
    assert set(addresses("send")) == {subjects.event(*about) for about in wire.EVENTS}


def test_every_error_that_travels_is_a_code_and_no_other_is() -> None:
    error = SCHEMAS["Error"]["properties"]["error"]["properties"]["code"]
    codes = {code: kind for code, kind in all_codes().items() if issubclass(kind, CallerError | ServerError)}
    assert set(error["enum"]) == set(codes)
    for code, kind in codes.items():
        assert f"- {code} ({kind.status}): " in error["description"]


def test_every_field_of_every_message_is_described_by_its_wire_name() -> None:
    for struct in (*wire.REQUESTS, *wire.REPLIES.values(), TaskSpec, *wire.EVENTS.values()):
        assert set(SCHEMAS[struct.__name__]["properties"]) == set(struct.__struct_encode_fields__)


def test_every_reference_leads_somewhere_and_nothing_is_there_that_asyncapi_does_not_know() -> None:
    for reference in references(DOCUMENT):
        assert isinstance(resolved(reference), dict), reference
    text = msgspec.json.encode(DOCUMENT).decode()
    assert '"discriminator"' not in text
    assert "prefixItems" not in text
    assert DOCUMENT["asyncapi"] == "3.0.0"


@pytest.mark.parametrize("name", [envelope.ERROR_HEADER, envelope.ERROR_CODE_HEADER, envelope.DEADLINE_HEADER])
def test_the_headers_are_named_as_they_travel(name: str) -> None:
    assert any(
        name in one.get("headers", {}).get("properties", ()) for one in DOCUMENT["components"]["messages"].values()
    )


def test_names_are_such_that_references_to_them_can_be_written() -> None:
    for part in ("channels", "operations"):
        assert all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in DOCUMENT[part])
