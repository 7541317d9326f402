"""The seam to the message bus: what the fabric asks of NATS, in NATS's words.

Delivery is what core NATS gives: at most once, in order per publisher and subject, spread over the members of a queue
group. Nothing that must be true may depend on it. The *journal* (a JetStream stream) keeps what was appended, dedupes
by message id within its window, and is a record for others to read, never a source of truth. *Objects* (a JetStream
object store) are blobs larger than a message, whole or not there.

`ifabric.bus.nats` is the real one, `ifabric.testing.memory_bus` its twin; `tests/conformance/test_bus.py` and
`test_objects.py` hold both to this text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ifabric.errors import ServerError

Headers = Mapping[str, str]


class Incoming(Protocol):
    """A message that was delivered to a subscription or an endpoint."""

    subject: str
    data: bytes
    headers: Headers
    #: where the sender waits for the answer; "" when it does not
    reply: str

    async def respond(self, data: bytes, headers: Headers | None = None) -> None:
        """Answers the sender. Does nothing when there is no reply subject. Raises `Unavailable` when disconnected.

        A second answer to one message is a bug and raises `AssertionError`.
        """

    async def respond_error(self, status: int, sentence: str, data: bytes) -> None:
        """Answers with the error headers of ADR-32 (and counts it in the endpoint's statistics)."""

    def drop(self) -> None:
        """The message will not be answered (no reply subject, or a backlog that is thrown away)."""


@dataclass(frozen=True)
class Endpoint:
    """One verb of a service: requests on `subject` go to exactly one member of the service's queue group."""

    name: str
    subject: str
    #: called in the order of arrival; must not block, and answers later through the message
    sink: Callable[[Incoming], None]
    metadata: Mapping[str, str] = field(default_factory=dict)


class Service(Protocol):
    """A running micro service (ADR-32): discoverable, with statistics."""

    id: str

    async def drain(self) -> None:
        """Takes no new requests. Returns when everything the server has already sent was handed to a sink.

        Requests handed over are still to be answered. Draining twice is harmless.
        """

    def statistics(self) -> Mapping[str, Any]:
        """The service's ``$SRV.STATS`` answer."""


class Subscription(Protocol):
    async def unsubscribe(self) -> None:
        """No message is delivered after this returns. Twice is harmless."""


@dataclass(frozen=True)
class Answer:
    """The reply to a request. `headers` carry `Nats-Service-Error` when it is an error."""

    data: bytes
    headers: Headers


@dataclass(frozen=True)
class Entry:
    """A message in a journal."""

    subject: str
    data: bytes
    headers: Headers
    #: position in the stream, counting from 1
    seq: int


@dataclass(frozen=True)
class JournalSpec:
    """A stream to keep. Created when absent, and updated when it differs in what may be changed."""

    name: str
    subjects: tuple[str, ...]
    max_age_s: int
    max_bytes: int
    #: the same `Nats-Msg-Id` within this window is stored once
    duplicate_window_s: int = 120
    replicas: int = 1
    #: nobody may delete or purge what is in it, not even who made it. It cannot be taken back.
    immutable: bool = False
    #: a full one, of `max_bytes`, forgets the `old`, or refuses the `new` (`Unavailable`, with the reason `full`)
    discard: Literal["old", "new"] = "old"


@dataclass(frozen=True)
class JournalSize:
    """How much is in a journal, and how much may be; as the server counts, which is more than the messages' own bytes."""

    messages: int
    bytes: int
    #: -1: no limit
    max_bytes: int


class Journal(Protocol):
    async def append(self, entries: Sequence[tuple[str, bytes, str]], *, strictly: bool = False) -> None:
        """Appends (subject, data, message id), in order; returns when the stream has stored them all.

        Safe to repeat: an id that was stored within the window is not stored again. Raises `Unavailable`; then some may
        have been stored: any of them, or with `strictly` some of the first and none after one that was not.
        """

    async def size(self) -> JournalSize:
        """How full it is. Raises `Unavailable`."""

    async def last(self, subject: str | None = None) -> Entry | None:
        """The newest entry (on that subject), or None when there is none."""

    def read(self, *, after_seq: int = 0, subject: str | None = None) -> AsyncIterator[Entry]:
        """The entries after `after_seq` in order, then new ones as they come, until the iterator is closed."""


class ObjectDamaged(ServerError):
    """The object in the store is not the one that was put; it was not read."""


@dataclass(frozen=True)
class ObjectSpec:
    """A bucket to keep. Created when absent, and updated when it differs in what may be changed."""

    name: str
    #: of all objects together, as they are stored; what would be over it is refused
    max_bytes: int
    replicas: int = 1
    description: str = ""


@dataclass(frozen=True)
class ObjectInfo:
    """What the store knows of an object."""

    name: str
    size: int
    #: when it was put, by the server's clock, since the epoch
    modified_ms: int
    description: str = ""


class Objects(Protocol):
    """A bucket. Every call ends within a minute and raises `Unavailable` when the bus cannot carry it out.

    Whoever may publish on the bus may put and delete here: what is read is what somebody put, no more.
    """

    async def put(self, name: str, data: bytes, description: str = "") -> None:
        """Stores `data` in place of what was there; when it returns, all of it is stored.

        One that is interrupted leaves the object as it was. Raises `StoreFull` when the bucket has no room, and
        `BadRequest` when `name` is empty or has more than 512 bytes.
        """

    async def get(self, name: str, *, max_bytes: int | None = None) -> bytes | None:
        """The object, checked against its digest; None when there is none.

        Raises `TooLarge`, and reads nothing, when it has more than `max_bytes`. Raises `ObjectDamaged`.
        """

    async def info(self, name: str) -> ObjectInfo | None:
        """What is known of it without reading it. Raises `ObjectDamaged` when not even that can be read."""

    async def page(self, *, prefix: str = "", after: str = "", limit: int | None = None) -> Sequence[ObjectInfo]:
        """Those whose name begins with `prefix` and comes after `after`, in the order of their names.

        Those that cannot be read are left out.
        """

    async def delete(self, name: str) -> bool:
        """Deletes it, damaged or not. False: there was none."""

    async def sweep(self, before_ms: int) -> int:
        """Frees what interrupted puts from before that moment have left. How many there were."""


class Bus(Protocol):
    """A connection to the message bus."""

    #: done when the connection is closed for good (not merely reconnecting), with the reason: a supervisor restarts it
    lost: asyncio.Future[str]

    async def connect(self) -> None:
        """Connects, or raises `Unreachable` naming the servers and why, within the configured time."""

    async def close(self) -> None:
        """Drains what is to be sent and closes. Twice is harmless; while disconnected too."""

    @property
    def connected(self) -> bool: ...

    @property
    def max_payload_bytes(self) -> int:
        """The largest message that the server takes, its headers included."""

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Service:
        """Starts a micro service whose endpoints share the queue group `name`. When it returns, the server knows
        them.
        """

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None) -> None:
        """Sends. Raises `Unavailable` at once when disconnected: nothing is kept to be sent later."""

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        """Sends and waits for one answer. `Forbidden`: the server does not allow it, and did not pass it on.

        `Unavailable(reason="no_responders")`: nobody listens, so nothing happened. `Unavailable(reason="timeout")` or
        `reason="disconnected"`: it may have happened. An error answer is returned, not raised.
        """

    async def ask_all(self, subject: str, data: bytes, *, within_s: float, answers_max: int = 10_000) -> list[Answer]:
        """Sends to everybody who listens; the answers that came in that time, in the order in which they came.

        Empty when nobody listens. Raises `Unavailable` when disconnected, and `Forbidden`.
        """

    async def subscribe(
        self, subject: str, handler: Callable[[Incoming], Awaitable[None] | None], *, queue: str = ""
    ) -> Subscription:
        """Delivers messages to `handler` one after another. When it returns, the server knows the subscription.

        Raises `Forbidden` when the server does not allow it.
        """

    async def journal(self, spec: JournalSpec | str) -> Journal:
        """The stream of `spec`, created if need be; or, by its name, one that is there. Raises `Unavailable`."""

    async def objects(self, spec: ObjectSpec | str) -> Objects:
        """The bucket of `spec`, created if need be; or, by its name, one that is there. Raises `Unavailable`."""
