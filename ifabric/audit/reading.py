"""Reads the audit out of JetStream, with no more rights than an auditor has.

It speaks JetStream's own API over the bus: an ordered consumer (nothing is acknowledged; the server numbers what it
delivers, so a lost message is noticed, and the consumer made anew from there), with flow control, so that a long stream
is read in bounded memory and no faster than it is looked at. What needs not be read is left out by the server, by
subject and by when it was stored.

A record may be stored long after it was made: while NATS is away it waits in its daemon's spool. So "since" may begin
with what was stored since, but "until" has to read on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from ifabric.audit.heads import PAGE, PREFIX
from ifabric.audit.stored import Stored, StreamFacts, ms_of
from ifabric.audit.stored import read as read_record
from ifabric.bus.base import Bus, Incoming
from ifabric.clock import Clock, rfc3339
from ifabric.errors import FabricError, Forbidden, Unavailable, Unreachable
from ifabric.store.base import Store, prefix_end
from ifabric.wire import subjects
from ifabric.wire.audit import AuditRecord, Head
from ifabric.wire.audit import heads as head_decoder
from ifabric.wire.envelope import MSG_ID_HEADER

API = "$JS.API"
ASK_S = 10.0
BEAT_S = 2.0
#: without a word for so long, the consumer is gone
STALL_S = 3 * BEAT_S
#: when the server has nothing to send for so many beats, nothing comes: it counts messages that its disk has lost
IDLE_BEATS = 3
#: a consumer that nobody listens to ends by itself
LINGER_S = 30
#: what clocks of daemons and NATS servers may differ
SKEW_MS = 300_000
#: how many are looked at first for the newest that match, and what that grows by
FIRST_LOOK, GROWTH = 256, 8
_NO_STREAM = 10059


class Courier(Bus, Protocol):
    """A bus that gives out subjects for answers of many messages."""

    def new_inbox(self) -> str:
        """A subject that nobody else listens to."""


class NoAudit(FabricError):
    """There is no audit: NATS has no stream IF_AUDIT."""


class _Answer(msgspec.Struct):
    error: dict[str, Any] | None = None
    config: dict[str, Any] = {}
    state: dict[str, Any] = {}
    created: str = ""
    num_pending: int = 0


def not_allowed() -> Forbidden:
    """What somebody is told who is no auditor."""
    return Forbidden(
        "this credential may not read the audit; ask an operator for one that may: "
        "`ifabric agent create NAME --role auditor`",
        what="nats",
        stream=subjects.AUDIT_STREAM,
    )


async def _ask(bus: Bus, what: str, body: object) -> _Answer:
    try:
        answer = await bus.request(f"{API}.{what}", msgspec.json.encode(body), timeout_s=ASK_S)
    except Forbidden:
        raise not_allowed() from None
    except Unavailable as error:
        if error.facts.get("reason") == "no_responders":
            raise Unavailable("the NATS server has no JetStream, or it is not ready", what="jetstream") from None
        raise
    try:
        found = msgspec.json.decode(answer.data, type=_Answer)
    except msgspec.MsgspecError as error:
        raise Unavailable(f"JetStream's answer is not understood: {error}", what="jetstream") from None
    if found.error is not None:
        code = found.error.get("err_code")
        if code == _NO_STREAM:
            raise NoAudit(
                "there is no audit: NATS has no stream IF_AUDIT. A daemon with `audit.enabled` makes it when it starts"
            )
        raise Unavailable(f"JetStream: {found.error.get('description', 'no reason given')} ({code})", what="jetstream")
    return found


async def facts(bus: Bus) -> StreamFacts:
    """What the stream is. Raises `NoAudit`, `Forbidden`, `Unavailable`."""
    found = await _ask(bus, f"STREAM.INFO.{subjects.AUDIT_STREAM}", {})
    config, state = found.config, found.state
    transformed = config.get("mirror") or config.get("sources") or config.get("subject_transform")
    return StreamFacts(
        name=subjects.AUDIT_STREAM,
        subjects=tuple(config.get("subjects") or ()),
        first_seq=int(state.get("first_seq", 0)),
        last_seq=int(state.get("last_seq", 0)),
        messages=int(state.get("messages", 0)),
        bytes=int(state.get("bytes", 0)),
        created_ms=_ms(found.created),
        first_ms=_ms(str(state.get("first_ts", ""))),
        max_age_s=float(config.get("max_age", 0)) / 1e9,
        max_bytes=int(config.get("max_bytes", -1)),
        max_msgs=int(config.get("max_msgs", -1)),
        max_msgs_per_subject=int(config.get("max_msgs_per_subject", -1)),
        deny_delete=bool(config.get("deny_delete")),
        deny_purge=bool(config.get("deny_purge")),
        retention=str(config.get("retention", "")),
        discard=str(config.get("discard", "")),
        storage=str(config.get("storage", "")),
        foreign=bool(transformed),
    )


def _ms(moment: str) -> int:
    """Go's RFC 3339 with nanoseconds, of which Python takes what it can; 0 when it says no moment (year 1 is none)."""
    try:
        found = ms_of(moment)
    except (ValueError, OverflowError):
        return 0
    return max(0, found)


class Wanted(NamedTuple):
    """Which records are meant. Empty: any."""

    component: str = ""
    verb: str = ""
    session: str = ""
    outcome: str = ""
    task: str = ""
    account: str = ""
    request_id: str = ""
    #: a trace's id, or a part of the traceparent
    trace: str = ""
    #: anywhere in what was stored, whatever its case
    text: str = ""
    #: of when they were made, ms since the epoch; 0: open
    since_ms: int = 0
    until_ms: int = 0

    @property
    def subject(self) -> str:
        """What the server is asked for."""
        if not self.component and not self.verb:
            return ""
        return subjects.audit(self.component or "*", self.verb or "*")

    @property
    def all(self) -> bool:
        """Whether everything on `subject` is meant, readable or not."""
        return not any(self[2:])

    def has(self, stored: Stored) -> bool:
        """Whether a message is one of them. What is unreadable is, unless it would have to be read to tell."""
        if self.text and self.text.lower().encode() not in stored.data.lower():
            return False
        exact = (self.session, self.outcome, self.task, self.account, self.request_id, self.trace)
        if not any(exact) and not self.since_ms and not self.until_ms:
            return True
        record = read_record(stored)
        if not isinstance(record, AuditRecord):
            return not any(exact) and self._in_time(stored.stored_ms)
        own = (record.session, record.outcome, record.task, record.account, record.request_id)
        if any(wanted and wanted != found for wanted, found in zip(exact, own, strict=False)):
            return False
        return (not self.trace or self.trace in record.trace) and self._in_time(ms_of(record.at))

    def _in_time(self, at_ms: int) -> bool:
        return self.since_ms <= at_ms and (not self.until_ms or at_ms < self.until_ms)


async def newest(
    bus: Courier, clock: Clock, wanted: Wanted, number: int, last_seq: int, first_seq: int
) -> list[Stored]:
    """The last so many that are meant, in order; what is looked at for them grows backwards from the stream's end."""
    found: deque[Stored] = deque()
    end, size = last_seq, max(number, FIRST_LOOK)
    while end >= first_seq and len(found) < number:
        start = max(first_seq, end - size + 1)
        part: deque[Stored] = deque(maxlen=number - len(found))
        async with contextlib.aclosing(messages(bus, clock, after_seq=start - 1, until_seq=end, wanted=wanted)) as read:
            async for stored in read:
                if wanted.has(stored):
                    part.append(stored)
        found.extendleft(reversed(part))
        end, size = start - 1, size * GROWTH
    return list(found)


async def messages(
    bus: Courier,
    clock: Clock,
    *,
    after_seq: int = 0,
    until_seq: int | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  it cannot be changed
    progress: Callable[[int, int], None] | None = None,
) -> AsyncGenerator[Stored]:
    """The stream's messages after `after_seq`, in order, as far as the server can choose; `Wanted.has` does the rest.

    They end at `until_seq`, which is no later than the stream's end; with None they go on for ever, and a connection
    that is lost is waited for. `progress` is told how many were read and how many there are.

    Raises `NoAudit`, `Forbidden`; with an end, `Unavailable` when the server stops answering.
    """
    if until_seq is not None and until_seq <= after_seq:
        return
    done = 0
    while True:
        since_ms = wanted.since_ms - SKEW_MS if wanted.since_ms and not after_seq else 0
        consumer = _Consumer(bus, clock, after_seq, since_ms, wanted.subject)
        try:
            async with contextlib.aclosing(consumer.read(until_seq)) as arriving:
                async for stored, left in arriving:
                    if until_seq is not None and stored.seq > until_seq:
                        return
                    after_seq, done = stored.seq, done + 1
                    yield stored
                    if progress is not None:
                        progress(done, done + left)
            if until_seq is not None:
                return
        except _Gap:
            continue
        except (Unavailable, Unreachable):
            if until_seq is not None:
                raise
            await clock.sleep(1.0)


class _Gap(Exception):
    """A message was lost on its way to us: read again from the last one."""


class _Consumer:
    """One ordered consumer of the server's."""

    def __init__(self, bus: Courier, clock: Clock, after_seq: int, since_ms: int, subject: str) -> None:
        self._bus = bus
        self._name = f"audit-{clock.token()}"
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue()
        self._inbox = bus.new_inbox()
        self._config: dict[str, Any] = {
            "name": self._name,
            "deliver_subject": self._inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after_seq + 1,
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(BEAT_S * 1e9),
            "inactive_threshold": LINGER_S * 1_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if since_ms > 0:
            del self._config["opt_start_seq"]
            self._config |= {"deliver_policy": "by_start_time", "opt_start_time": rfc3339(since_ms)}
        if subject:
            self._config["filter_subject"] = subject

    async def read(self, until_seq: int | None) -> AsyncGenerator[tuple[Stored, int]]:
        """Its messages, each with how many come after it. It ends when there is none up to `until_seq` any more."""
        subscription = await self._bus.subscribe(self._inbox, self._queue.put_nowait)
        stream = subjects.AUDIT_STREAM
        suffix = f".{self._config['filter_subject']}" if "filter_subject" in self._config else ""
        try:
            asked = {"stream_name": stream, "config": self._config, "action": "create"}
            made = await _ask(self._bus, f"CONSUMER.CREATE.{stream}.{self._name}{suffix}", asked)
            left, expected, idle = made.num_pending, 1, 0
            while until_seq is None or (left > 0 and idle < IDLE_BEATS):
                incoming = await self._next()
                if incoming.headers.get("Status") == "100":
                    idle += await self._beat(incoming, expected)
                    continue
                stored, number, left = _taken(incoming)
                if number != expected:
                    raise _Gap
                expected, idle = expected + 1, 0
                yield stored, left
                if until_seq is not None and stored.seq >= until_seq:
                    return
        finally:
            with contextlib.suppress(FabricError):
                await subscription.unsubscribe()
                await _ask(self._bus, f"CONSUMER.DELETE.{stream}.{self._name}", {})

    async def _next(self) -> Incoming:
        try:
            async with asyncio.timeout(STALL_S):
                return await self._queue.get()
        except TimeoutError:
            raise Unavailable(f"JetStream says nothing for {STALL_S:.0f} s", what="nats", reason="timeout") from None

    async def _beat(self, incoming: Incoming, expected: int) -> bool:
        """The server is there, or waits to be told that we have come so far. Whether it has nothing to send now."""
        stalled = incoming.reply or incoming.headers.get("Nats-Consumer-Stalled", "")
        if stalled:
            await self._bus.publish(stalled, b"")
        last = incoming.headers.get("Nats-Last-Consumer")
        if last is None or not last.isdigit():
            return False
        if int(last) >= expected:
            raise _Gap
        return not stalled


def _taken(incoming: Incoming) -> tuple[Stored, int, int]:
    """A message, its number among those delivered, and how many are left; as ADR-15 has it in the reply subject."""
    parts = incoming.reply.split(".")
    # $JS.ACK.<stream>.<consumer>.<delivered>.<seq>.<number>.<ns>.<left>, or with domain and account before the stream
    figures = parts[4:9] if len(parts) == 9 else parts[6:11]
    if parts[:2] != ["$JS", "ACK"] or len(figures) < 5 or not all(one.isdecimal() for one in figures):
        raise Unavailable("what came is not JetStream's", what="jetstream")
    _, seq, number, ns, left = map(int, figures)
    stored = Stored(seq, incoming.subject, incoming.headers.get(MSG_ID_HEADER, ""), incoming.data, ns // 1_000_000)
    return stored, number, left


class Heads(NamedTuple):
    """What daemons have told etcd, by chain; and the keys there that hold no such thing."""

    by_chain: dict[str, Head]
    unreadable: list[str]


async def heads(store: Store) -> Heads:
    """All of them. Raises `Unavailable`, and `Forbidden` when etcd does not show them."""
    found: dict[str, Head] = {}
    unreadable = []
    start, end = PREFIX, prefix_end(PREFIX)
    while True:
        got, _ = await store.range(start, end, limit=PAGE)
        for kv in got.kvs:
            name = kv.key[len(PREFIX) :].decode("utf-8", "replace")
            try:
                head = head_decoder.decode(kv.value)
            except (msgspec.MsgspecError, ValueError):
                unreadable.append(name)
                continue
            if head.chain == name:
                found[name] = head
            else:
                unreadable.append(name)
        if len(got.kvs) < PAGE:
            return Heads(found, unreadable)
        start = got.kvs[-1].key + b"\x00"
