"""The journal: a JetStream stream that keeps what was appended.

Appending waits for one acknowledgement a batch, not for one a message: JetStream numbers a stream's messages in the
order in which a connection sent them, so when the last of n is stored as number `before + n`, all n are. Anything
else (a duplicate among them, another writer in between, a message refused) makes the sum wrong, and then every
message of the batch is sent again and acknowledged by itself. A message that was stored already is recognised by its
id and not stored twice.

That may leave a hole: one that was refused, for the stream was full, say, and those after it stored. Where the order
matters more (the audit), each message but the first says after which it is to be stored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

import nats.errors
import nats.js.api as js
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext

from ifabric.bus.base import Entry, JournalSize, JournalSpec
from ifabric.bus.hardened import PermissionsViolation
from ifabric.bus.streams import made
from ifabric.errors import FabricError, Forbidden, Unavailable
from ifabric.wire.envelope import MSG_ID_HEADER

ACK_S = 5.0
#: messages that may be under way when each is acknowledged by itself
WINDOW = 64
#: what a stream that is there already is brought up to
_KEPT_UP = ("subjects", "max_age", "max_bytes", "duplicate_window", "num_replicas", "discard")
#: and one that is to be immutable besides. Never the other way: the server does not allow it.
_IMMUTABLE = ("deny_delete", "deny_purge")
#: JetStream's error codes: "wrong last msg ID"
_NOT_NEXT = 10070
_AFTER_HEADER = "Nats-Expected-Last-Msg-Id"
#: and "maximum bytes exceeded", "insufficient storage resources", "insufficient resources"
_FULL = {10077: "full", 10047: "no_room", 10023: "no_room"}


async def open_journal(client: Client, spec: JournalSpec | str) -> JetStreamJournal:
    """The stream as specified, created or brought up to date; by name alone, as it is.

    Raises `Unavailable`, and `Forbidden` when the server does not allow it.
    """
    context = client.jetstream(timeout=ACK_S)
    if isinstance(spec, str):
        try:
            there = await context.stream_info(spec)
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, spec) from None
        return JetStreamJournal(context, spec, there.state.last_seq)
    config = js.StreamConfig(
        name=spec.name,
        subjects=list(spec.subjects),
        max_age=spec.max_age_s,
        max_bytes=spec.max_bytes,
        duplicate_window=min(spec.duplicate_window_s, spec.max_age_s),  # the server's rule
        num_replicas=spec.replicas,
        storage=js.StorageType.FILE,
        discard=js.DiscardPolicy.NEW if spec.discard == "new" else js.DiscardPolicy.OLD,
        deny_delete=spec.immutable,
        deny_purge=spec.immutable,
    )
    try:
        info = await made(context, config, _KEPT_UP + (_IMMUTABLE if spec.immutable else ()))
    except (nats.errors.Error, OSError) as error:
        raise _failed(error, spec.name) from None
    return JetStreamJournal(context, spec.name, info.state.last_seq)


def _failed(error: Exception, stream: str) -> FabricError:
    """What to raise for nats-py's error."""
    if isinstance(error, PermissionsViolation):
        return Forbidden(
            f"{error}: this session may not use the stream {stream}. Operators may read it; an agent hears "
            "the events of tasks, matches, breakers and the fabric from when it subscribes",
            what="nats",
            stream=stream,
        )
    reason = _FULL.get(error.err_code or 0) if isinstance(error, nats.js.errors.APIError) else None
    if reason == "full":
        return Unavailable(f"the stream {stream} is full and takes nothing new", what="jetstream", reason=reason)
    if reason == "no_room":
        return Unavailable(
            f"JetStream has not the room that the stream {stream} is to have: give it more (max_file_store), or the "
            "stream less (max_bytes)",
            what="jetstream",
            reason=reason,
        )
    return Unavailable(f"JetStream does not answer: {error or type(error).__name__}", what="jetstream")


def _command(subject: str, data: bytes, message_id: str, *, after: str = "") -> bytes:
    """NATS's HPUB with the message's id; and with that of the one that must be the stream's last."""
    expected = f"{_AFTER_HEADER}: {after}\r\n" if after else ""
    header = f"NATS/1.0\r\n{MSG_ID_HEADER}: {message_id}\r\n{expected}\r\n".encode()
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (subject.encode(), len(header), len(header) + len(data), header, data)


class JetStreamJournal:
    """One stream."""

    def __init__(self, context: JetStreamContext, stream: str, last_seq: int) -> None:
        self._context = context
        self._stream = stream
        self._last_seq = last_seq

    async def append(self, entries: Sequence[tuple[str, bytes, str]], *, strictly: bool = False) -> None:
        if not entries:
            return
        if strictly:
            await self._append_strictly(entries)
            return
        try:
            if len(entries) > 1:
                await self._send(b"".join(_command(*entry) for entry in entries[:-1]))
            ack = await self._append_one(entries[-1])
            if ack.duplicate or ack.seq != self._last_seq + len(entries):
                for at in range(0, len(entries), WINDOW):
                    acks = await asyncio.gather(*(self._append_one(entry) for entry in entries[at : at + WINDOW]))
                    ack = max(acks, key=lambda one: one.seq)
            self._last_seq = max(self._last_seq, ack.seq)
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, self._stream) from None

    async def _append_strictly(self, entries: Sequence[tuple[str, bytes, str]]) -> None:
        """The first that is not there yet is waited for, and each after it says which one must stand right before it: so
        the server refuses all after one that it did not take, or after somebody else's. From there it begins again.

        (By its number would not do: with another writer's message in between, the next one but one has the right number.)
        """
        at = 0
        try:
            while at < len(entries):
                ack = await self._append_one(entries[at])
                at += 1
                rest = entries[at:]
                if ack.duplicate or not rest:
                    continue
                if len(rest) > 1:
                    pairs = pairwise(entries[at - 1 : -1])
                    await self._send(b"".join(_command(*entry, after=before[2]) for before, entry in pairs))
                try:
                    await self._append_one(entries[-1], after=entries[-2][2])
                    return
                except nats.js.errors.APIError as error:
                    if error.err_code != _NOT_NEXT:
                        raise
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, self._stream) from None

    async def size(self) -> JournalSize:
        try:
            info = await self._context.stream_info(self._stream)
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, self._stream) from None
        most = info.config.max_bytes
        return JournalSize(info.state.messages, info.state.bytes, -1 if most is None else most)

    async def _send(self, commands: bytes) -> None:
        """Hands many publications to the connection at once: nats-py's `publish` costs more than all else here."""
        client = self._context._nc
        if not client.is_connected:
            raise nats.errors.ConnectionClosedError
        await client._send_command(commands)

    async def _append_one(self, entry: tuple[str, bytes, str], *, after: str = "") -> js.PubAck:
        subject, data, message_id = entry
        headers = {MSG_ID_HEADER: message_id}
        if after:
            headers[_AFTER_HEADER] = after
        return await self._context.publish(subject, data, timeout=ACK_S, stream=self._stream, headers=headers)

    async def last(self, subject: str | None = None) -> Entry | None:
        try:
            if subject is None:
                info = await self._context.stream_info(self._stream)
                if not info.state.messages:
                    return None
                found = await self._context.get_msg(self._stream, info.state.last_seq)
            else:
                found = await self._context.get_last_msg(self._stream, subject)
        except nats.js.errors.NotFoundError:
            return None
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, self._stream) from None
        return Entry(found.subject or "", found.data or b"", found.headers or {}, found.seq or 0)

    async def read(self, *, after_seq: int = 0, subject: str | None = None) -> AsyncIterator[Entry]:
        config = js.ConsumerConfig(deliver_policy=js.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after_seq + 1)
        try:
            subscription = await self._context.subscribe(
                subject or ">", stream=self._stream, config=config, ordered_consumer=True
            )
        except (nats.errors.Error, OSError) as error:
            raise _failed(error, self._stream) from None
        try:
            while True:
                try:
                    message = await subscription.next_msg(timeout=60)
                except nats.errors.TimeoutError:
                    continue
                except (nats.errors.Error, OSError) as error:
                    raise _failed(error, self._stream) from None
                yield Entry(message.subject, message.data, message.headers or {}, message.metadata.sequence.stream)
        finally:
            with contextlib.suppress(
                nats.errors.Error, OSError
            ):  # a connection that has gone took the consumer with it
                await subscription.unsubscribe()
