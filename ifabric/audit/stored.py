"""What the stream IF_AUDIT holds, as it was found there: by whoever wrote it, and perhaps changed since."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import msgspec

from ifabric.wire import subjects
from ifabric.wire.audit import AuditRecord, records

#: characters of something unreadable that are worth showing
SHOWN = 120
_HEX = frozenset("0123456789abcdef")


class Stored(NamedTuple):
    """A message of the stream."""

    seq: int
    subject: str
    #: its `Nats-Msg-Id`; "" when it has none
    message_id: str
    data: bytes
    #: when the server stored it, ms since the epoch
    stored_ms: int


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream's configuration and state, as far as an audit depends on it. Ages in seconds, 0: for ever."""

    name: str
    subjects: tuple[str, ...]
    first_seq: int
    last_seq: int
    messages: int
    bytes: int
    #: ms since the epoch; 0: not known
    created_ms: int
    first_ms: int
    max_age_s: float
    max_bytes: int
    max_msgs: int
    max_msgs_per_subject: int
    deny_delete: bool
    deny_purge: bool
    retention: str
    discard: str
    storage: str
    #: it takes in what others hold: a mirror, sources, or rewritten subjects
    foreign: bool


class Unreadable(NamedTuple):
    """A message that is no record, and why."""

    why: str


def read(stored: Stored) -> AuditRecord | Unreadable:
    """The record in a message. Whatever the bytes are, nothing is raised."""
    try:
        record = records.decode(stored.data)
        ms_of(record.at)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        return Unreadable(f"it is no audit record: {error}"[:200])
    if not subjects.SESSION.fullmatch(record.chain) or record.n < 1:
        return Unreadable("it has no chain and number that a daemon gives")
    if len(record.prev) != 64 or not _HEX.issuperset(record.prev):
        return Unreadable("what it has for the hash of the record before it is none")
    return record


def ms_of(at: str) -> int:
    """RFC 3339 as ms since the epoch. `ValueError` when it is no moment, or does not say of which zone."""
    moment = datetime.fromisoformat(at)
    if moment.tzinfo is None:
        raise ValueError(f"{at!r} has no time zone")
    return round(moment.timestamp() * 1000)


def beginning(data: bytes) -> str:
    """The beginning of something unreadable, for a person. It may hold anything: show it as text of somebody else's."""
    text = data[: SHOWN * 4].decode("utf-8", "backslashreplace")
    return text[:SHOWN] + ("…" if len(text) > SHOWN or len(data) > SHOWN * 4 else "")
