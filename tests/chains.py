"""Chains of audit records for tests, as daemons write them, and as somebody would change them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import nats
import nats.js.api as js
from nats.js.errors import NotFoundError

from ifabric.audit.stored import Stored
from ifabric.clock import rfc3339
from ifabric.wire import subjects
from ifabric.wire.audit import BEGUN, NONE_BEFORE, AuditRecord, Head, hash_of, message_id
from ifabric.wire.envelope import encode

#: when, where it does not matter
NOW = 1_800_000_000_000
Entry = tuple[str, str, bytes]


class Life:
    """A daemon that writes its chain."""

    def __init__(self, chain: str, at_ms: int = NOW - 60_000) -> None:
        self.chain, self.n, self.prev, self.at_ms = chain, 0, NONE_BEFORE, at_ms

    def next(self, component: str = "coordinator", verb: str = "claim", **fields: Any) -> Entry:
        """Subject, message id and bytes of its next record."""
        self.n, self.at_ms = self.n + 1, self.at_ms + 1
        record = AuditRecord(
            at=rfc3339(self.at_ms),
            chain=self.chain,
            n=self.n,
            prev=self.prev,
            component=component,
            verb=verb,
            daemon=f"{self.chain}'s host",
            **fields,
        )
        data = encode(record)
        self.prev = hash_of(data)
        return subjects.audit(component, verb), message_id(self.chain, self.n), data

    def head(self, **fields: Any) -> Head:
        return Head(chain=self.chain, n=self.n, hash=self.prev, at=rfc3339(self.at_ms), **fields)


def stream_of(entries: list[Entry], first_seq: int = 1) -> list[Stored]:
    return [Stored(first_seq + at, *entry, NOW - 60_000 + at) for at, entry in enumerate(entries)]


def chain(name: str = "c1", number: int = 9) -> tuple[Life, list[Entry]]:
    """A life of so many records, from its beginning on; it goes on."""
    life = Life(name)
    entries = [life.next("fabric", BEGUN)]
    entries += [life.next(session=f"agent-{at}", task=f"t{at}", request_id=f"r{at}") for at in range(number - 1)]
    return life, entries


def altered(entry: Entry, **changes: Any) -> Entry:
    """The same with other fields, and all else as it was."""
    body = json.loads(entry[2]) | changes
    return entry[0], entry[1], json.dumps(body, separators=(",", ":")).encode()


def rechained(entries: list[Entry]) -> list[Entry]:
    """With all hashes computed anew: what somebody does who knows how."""
    made: list[Entry] = []
    for entry in entries:
        prev = hash_of(made[-1][2]) if made else NONE_BEFORE
        made.append(altered(entry, prev=prev))
    return made


async def fill(url: str, entries: list[Entry], **config: Any) -> None:
    """The stream with these messages and no others, in this order; made anew."""
    client = await nats.connect(url)
    context = client.jetstream()
    with contextlib.suppress(NotFoundError):
        await context.delete_stream(subjects.AUDIT_STREAM)
    known: dict[str, Any] = {"max_age": 90 * 86_400, "deny_delete": True, "deny_purge": True, "discard": "new"}
    known |= {"max_bytes": 64 << 20, "duplicate_window": 120}
    await context.add_stream(js.StreamConfig(name=subjects.AUDIT_STREAM, subjects=[subjects.AUDIT], **(known | config)))
    await put(url, entries)
    await client.close()


async def put(url: str, entries: list[Entry]) -> None:
    """Some more messages. One whose message id is there already is not stored: an `AssertionError`."""
    client = await nats.connect(url)
    context = client.jetstream()
    for subject, name, data in entries:
        headers = {"Nats-Msg-Id": name} if name else None
        ack = await context.publish(subject, data, headers=headers)
        assert not ack.duplicate, name
    await client.close()
