"""Streams: taken out of JetStream and put back, by its own snapshot API.

What the server gives is its own format (a tar in S2 of the stream's blocks) and goes back as it came, so that sequence
numbers, headers and duplicates' ids are what they were. The chunks are acknowledged one by one, which is how the server
knows how fast it may send. Consumers are left out: ours live for one reader each.

A stream is put back where there is none. One that is there and ever held a message is left alone: it is newer than the
backup. One that never did is replaced: a daemon that was started too early makes such, and so does a cluster (2.15.1,
seen), some seconds after a restore that failed in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple, Protocol

import msgspec

from ifabric.backup.manifest import BackupFailed, StreamFacts
from ifabric.bus.base import Bus, Incoming
from ifabric.errors import FabricError, Unavailable
from ifabric.wire.permissions import STREAMS

API = "$JS.API.STREAM"
#: ours, as far as they are there: events, the audit, the modules
OURS = STREAMS
CHUNK = 128 * 1024
ASK_S = 10.0
#: the server sends nothing more without a word: its own limit for a reader that does not acknowledge is 5 s
STALL_S = 20.0
_NOT_FOUND = (10059, 10076, 10039)


class Courier(Bus, Protocol):
    """A bus that gives out subjects for answers of many messages."""

    def new_inbox(self) -> str:
        """A subject that nobody else listens to."""


class Saved(NamedTuple):
    """A stream that was taken out: its facts, and the request that puts it back."""

    facts: StreamFacts
    #: JSON, `{"config": ..., "state": ...}`
    about: bytes


class Put(NamedTuple):
    """What became of a stream in a restore: `restored`, `kept` (it was there) or `failed`, and why."""

    name: str
    outcome: str
    messages: int
    why: str = ""


class _State(msgspec.Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Answer(msgspec.Struct):
    error: dict[str, Any] | None = None
    config: msgspec.Raw = msgspec.Raw(b"null")
    state: msgspec.Raw = msgspec.Raw(b"null")
    deliver_subject: str = ""
    streams: list[str] | None = None
    total: int = 0


async def _ask(bus: Courier, verb: str, body: object, *, timeout_s: float = ASK_S) -> _Answer:
    answer = await bus.request(f"{API}.{verb}", msgspec.json.encode(body), timeout_s=timeout_s)
    return _decoded(answer.data)


def _decoded(data: bytes) -> _Answer:
    try:
        return msgspec.json.decode(data, type=_Answer)
    except msgspec.MsgspecError as error:
        raise Unavailable(f"JetStream's answer is not understood: {error}", what="jetstream") from None


def _why(answer: _Answer) -> str:
    error = answer.error or {}
    return f"{error.get('description', 'no reason given')} ({error.get('err_code', error.get('code'))})"


async def there(bus: Courier, wanted: Sequence[str] = OURS) -> list[str]:
    """Which of the streams exist. In a cluster a snapshot of one that does not is never answered."""
    answer = await _ask(bus, "NAMES", {})
    if answer.error is not None:
        raise Unavailable(f"JetStream does not list its streams: {_why(answer)}", what="jetstream")
    return [name for name in wanted if name in (answer.streams or ())]


async def facts(bus: Courier, name: str) -> StreamFacts | None:
    """What a stream is now; None when there is none."""
    answer = await _ask(bus, f"INFO.{name}", {})
    if answer.error is not None:
        if answer.error.get("err_code") in _NOT_FOUND:
            return None
        raise Unavailable(f"JetStream does not say what {name} is: {_why(answer)}", what="jetstream")
    return _facts(name, bytes(answer.state))


def _facts(name: str, state: bytes) -> StreamFacts:
    found = msgspec.json.decode(state, type=_State)
    return StreamFacts(
        name=name, messages=found.messages, bytes=found.bytes, first_seq=found.first_seq, last_seq=found.last_seq
    )


async def save(bus: Courier, name: str, file: IO[bytes], progress: Callable[[int], None]) -> Saved:
    """Takes a stream out into `file`. `BackupFailed` when it did not come whole."""
    inbox = bus.new_inbox()
    queue: asyncio.Queue[Incoming] = asyncio.Queue()
    subscription = await bus.subscribe(inbox, queue.put_nowait)
    try:
        asked = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": CHUNK, "jsck": True}
        answer = await _ask(bus, f"SNAPSHOT.{name}", asked)
        if answer.error is not None:
            raise BackupFailed(f"JetStream gives no snapshot of {name}: {_why(answer)}")
        while True:
            async with asyncio.timeout(STALL_S):
                part = await queue.get()
            if not part.data:
                status = part.headers.get("Status", "204")
                if not status.startswith("2"):
                    said = part.headers.get("Description", "")
                    raise BackupFailed(f"JetStream's snapshot of {name} ended early: {status} {said}")
                break
            file.write(part.data)
            progress(len(part.data))
            if part.reply:
                await bus.publish(part.reply, b"")
        file.flush()
    except TimeoutError:
        raise BackupFailed(f"JetStream's snapshot of {name} stopped: no word for {STALL_S:.0f} s") from None
    except OSError as error:
        raise BackupFailed(f"the stream {name} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(FabricError):
            await subscription.unsubscribe()
    about = b'{"config":%b,"state":%b}' % (bytes(answer.config), bytes(answer.state))
    return Saved(_facts(name, bytes(answer.state)), about)


async def _clear(bus: Courier, name: str) -> str:
    """Deletes a stream that never held anything; why not, or nothing."""
    try:
        answer = await _ask(bus, f"DELETE.{name}", {})
    except Unavailable as error:  # what a server says to one who may not
        return error.message
    return _why(answer) if answer.error is not None else ""


async def put_back(
    bus: Courier, name: str, about: bytes, file: IO[bytes], *, replicas: int | None, progress: Callable[[int], None]
) -> Put:
    """Puts a stream back. With `replicas`, kept by so many servers, whatever it was."""
    asked = msgspec.json.decode(about, type=dict[str, Any])
    expected = _facts(name, msgspec.json.encode(asked.get("state") or {}))
    found = await facts(bus, name)
    if found is not None and (found.last_seq or expected.last_seq == 0):
        return Put(name, "kept", found.messages, "it is there already")
    if found is not None and (why := await _clear(bus, name)):
        return Put(
            name, "failed", 0, f"an empty stream of this name is there and cannot be replaced: {why}. Delete it."
        )
    if replicas is not None:
        asked["config"]["num_replicas"] = replicas
    answer = await _ask(bus, f"RESTORE.{name}", asked)
    if answer.error is not None or not answer.deliver_subject:
        return Put(name, "failed", 0, _why(answer))
    file.seek(0)
    while data := file.read(CHUNK):
        said = await bus.request(answer.deliver_subject, data, timeout_s=STALL_S)
        if said.data and (refused := _decoded(said.data)).error is not None:
            return Put(name, "failed", 0, _why(refused))
        progress(len(data))
    end = _decoded((await bus.request(answer.deliver_subject, b"", timeout_s=STALL_S * 3)).data)
    if end.error is not None:
        return Put(name, "failed", 0, _why(end))
    now = await facts(bus, name)
    if now is None or now.messages < expected.messages or now.last_seq < expected.last_seq:
        return Put(name, "failed", now.messages if now else 0, f"it should have {expected.messages} messages")
    return Put(name, "restored", now.messages)
