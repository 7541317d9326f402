"""NATS, behind the seam of `ifabric.bus.base`.

What nats-py does by default is right for a chat and wrong for commands, so: nothing is buffered while disconnected (a
command that is delivered minutes later is a stale one), reconnecting never gives up, a server that answers no ping
for three seconds is dead, and a connection that closes for good (an expired credential does that, in silence)
resolves `lost`, for a supervisor to see.

**The reply subject is hostile.** The server does not check who owns it, and an agent could make the daemon publish a
command in its name. A request that wants its answer outside an inbox is dropped here, and never reaches anybody.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nats
import nats.errors
from nats.aio.msg import Msg

from ifabric.bus.base import (
    Answer,
    Endpoint,
    Headers,
    Incoming,
    Journal,
    JournalSpec,
    Objects,
    ObjectSpec,
    Service,
    Subscription,
)
from ifabric.bus.hardened import HardenedClient
from ifabric.bus.journal import open_journal
from ifabric.bus.micro import MicroService, settled
from ifabric.bus.objects import open_objects
from ifabric.cancellation import heard
from ifabric.clock import Clock, monotonic
from ifabric.errors import BadRequest, FabricError, Forbidden, TooLarge, Unavailable, Unreachable
from ifabric.wire import subjects

NO_HEADERS: Headers = {}


@dataclass(frozen=True, kw_only=True)
class NatsSettings:
    """Where NATS is and how to reach it. Times in seconds, files in PEM."""

    servers: tuple[str, ...]
    name: str = "ifabric"
    connect_timeout_s: float = 5.0
    nkey_seed_file: str | None = None
    credentials_file: str | None = None
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    inbox_prefix: str = "_INBOX"
    #: what a plain subscription may have waiting before the connection drops messages
    pending_msgs_max: int = 65_536
    pending_bytes_max: int = 64 * 1024 * 1024


def translate(error: Exception) -> FabricError:
    """The one table from nats-py's errors to ours."""
    if isinstance(error, nats.errors.NoRespondersError):
        return Unavailable("nobody answers on this subject", what="nats", reason="no_responders")
    if isinstance(error, nats.errors.MaxPayloadError):
        return TooLarge("the message is larger than NATS carries; it was not sent")
    if isinstance(error, nats.errors.BadSubjectError | nats.errors.InvalidCallbackTypeError):
        return BadRequest(f"the subject is not one: {error}")
    if isinstance(error, nats.errors.TimeoutError | TimeoutError):
        return Unavailable("no answer in time; whether it was carried out is unknown", what="nats", reason="timeout")
    if isinstance(error, nats.errors.AuthorizationError):
        return Forbidden(f"NATS does not allow it: {error}", what="nats")
    return Unavailable(f"not connected to NATS ({error or type(error).__name__})", what="nats", reason="disconnected")


class Delivery:
    """A message from NATS, to be answered at most once."""

    __slots__ = ("_answered", "_began", "_bus", "_done", "data", "headers", "reply", "subject")

    def __init__(self, bus: Nats, msg: Msg, answered: Callable[[float, str | None], None] | None = None) -> None:
        self._bus = bus
        self._done = False
        #: the endpoint's statistics, told when the answer goes out
        self._answered = answered
        self._began = monotonic() if answered is not None else 0.0
        self.subject: str = msg.subject
        self.data: bytes = msg.data
        self.reply: str = msg.reply
        self.headers: Headers = msg.headers or NO_HEADERS

    async def respond(self, data: bytes, headers: Headers | None = None) -> None:
        if len(data) > self._bus.max_payload_bytes:
            raise TooLarge(f"the answer has {len(data)} bytes, more than NATS carries")
        self._end(None)
        if self.reply:
            await self._bus.publish(self.reply, data, headers)

    async def respond_error(self, status: int, sentence: str, data: bytes) -> None:
        self._end(f"{status}:{sentence}")
        if self.reply:
            await self._bus.publish(self.reply, data, error_headers(status, sentence))

    def drop(self) -> None:
        self._end(None)

    def _end(self, error: str | None) -> None:
        assert not self._done, "a message is answered once"
        self._done = True
        if self._answered is not None:
            self._answered(self._began, error)


def error_headers(status: int, sentence: str) -> dict[str, str]:
    """The headers of an error answer (ADR-32). A header is one line of text."""
    line = " ".join(sentence.split()).encode("ascii", "replace").decode()
    return {"Nats-Service-Error": line[:1000], "Nats-Service-Error-Code": str(status)}


class Nats:
    """A connection to NATS."""

    def __init__(
        self, settings: NatsSettings, clock: Clock, on_error: Callable[[str, Exception], None] | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._on_error = on_error
        self._client = HardenedClient()
        self._closing = True
        self.slow_consumers = 0
        self.spoofed = 0
        self.reconnects = 0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # -- life --------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        settings = self._settings
        self._client, self._closing = HardenedClient(), False
        self.lost = asyncio.get_running_loop().create_future()
        where = ", ".join(settings.servers)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                await self._client.connect(
                    servers=list(settings.servers),
                    name=settings.name,
                    pending_size=-1,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    connect_timeout=2,
                    ping_interval=1,
                    max_outstanding_pings=2,
                    inbox_prefix=settings.inbox_prefix,
                    error_cb=self._error,
                    closed_cb=self._closed,
                    reconnected_cb=self._reconnected,
                    tls=self._tls(),
                    nkeys_seed=settings.nkey_seed_file,
                    user_credentials=settings.credentials_file,
                    no_echo=False,
                )
        except TimeoutError:
            last = self._client.last_error
            await self._abandon()
            raise Unreachable(f"no NATS answers at {where}" + (f": {last}" if last else "")) from None
        except (nats.errors.Error, OSError, ssl.SSLError) as error:
            await self._abandon()
            raise Unreachable(f"cannot connect to NATS at {where}: {error}") from None

    async def _abandon(self) -> None:
        """Ends a connection that never came to be."""
        self._closing = True
        await self._client.close()

    def _tls(self) -> ssl.SSLContext | None:
        settings = self._settings
        if not (settings.ca_cert or settings.cert_file or any(s.startswith("tls://") for s in settings.servers)):
            return None
        context = ssl.create_default_context(cafile=settings.ca_cert)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
        return context

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        try:
            if self._client.is_connected:
                await settled(self._client)
        except (nats.errors.Error, OSError):
            pass  # what was not sent now is lost with the connection, and its senders were told nothing
        await self._client.close()

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def max_payload_bytes(self) -> int:
        """The largest message that the server takes."""
        return int(self._client.max_payload)

    async def _error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.slow_consumers += 1
        self.report("nats", error)

    def report(self, where: str, error: Exception) -> None:
        """Tells whoever asked to be told of errors that have no caller."""
        if self._on_error is not None:
            self._on_error(where, error)

    async def _closed(self) -> None:
        if not self.lost.done():
            why = (
                "closed"
                if self._closing
                else f"NATS closed the connection for good: {self._client.last_error or 'no reason given'}"
            )
            self.lost.set_result(why)

    async def _reconnected(self) -> None:
        self.reconnects += 1

    # -- messages ----------------------------------------------------------------------------------------------------

    def new_inbox(self) -> str:
        """A subject that nobody else listens to, for answers that are more than one."""
        return str(self._client.new_inbox())

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        try:
            await self._client.publish(subject, data, reply=reply, headers=_mapping(headers))
        except (nats.errors.Error, OSError) as error:
            raise translate(error) from None

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        try:
            msg = await heard(self._client.request(subject, data, timeout=timeout_s, headers=_mapping(headers)))
        except (nats.errors.Error, OSError) as error:
            raise translate(error) from None
        return Answer(msg.data, msg.headers or NO_HEADERS)

    async def subscribe(
        self, subject: str, handler: Callable[[Incoming], Awaitable[None] | None], *, queue: str = ""
    ) -> Subscription:
        async def deliver(msg: Msg) -> None:
            outcome = handler(Delivery(self, msg))
            if outcome is not None:
                await outcome

        try:
            subscription = await self._client.subscribe(
                subject,
                queue=queue,
                cb=deliver,
                pending_msgs_limit=self._settings.pending_msgs_max,
                pending_bytes_limit=self._settings.pending_bytes_max,
            )
            await settled(self._client)
        except (nats.errors.Error, OSError) as error:
            raise translate(error) from None
        return _Subscription(subscription)

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Service:
        service = MicroService(self._client, name, version, description, self._admit)
        try:
            await service.open(endpoints)
            await settled(self._client)
        except (nats.errors.Error, OSError) as error:
            raise translate(error) from None
        return service

    def _admit(self, msg: Msg, answered: Callable[[float, str | None], None]) -> Delivery | None:
        """A request to be handed over; None when its answer would go where it must not."""
        if msg.reply and not subjects.may_answer(msg.reply):
            self.spoofed += 1
            return None
        return Delivery(self, msg, answered)

    async def journal(self, spec: JournalSpec | str) -> Journal:
        return await open_journal(self._client, spec)

    async def objects(self, spec: ObjectSpec | str) -> Objects:
        return await open_objects(self._client, spec)


def _mapping(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(headers) if headers else None


class _Subscription:
    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        try:
            await self._subscription.unsubscribe()
        except (nats.errors.Error, OSError):
            return  # the connection or the subscription has gone: nothing is delivered any more
