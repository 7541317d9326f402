"""NATS, behind the seam of `ifabric.bus.base`.

What nats-py does by default is right for a chat and wrong for commands, so: nothing is buffered while disconnected (a
command that is delivered minutes later is a stale one), reconnecting never gives up, a server that answers no ping
for three seconds is dead, and a connection that closes for good (an expired credential does that, in silence)
resolves `lost`, for a supervisor to see.

**The reply subject is hostile.** The server does not check who owns it, and an agent could make the daemon publish a
command in its name. A request that wants its answer outside an inbox is dropped here, and never reaches anybody.

**So are requests without one, where identities are on.** JetStream publishes what it is asked to, wherever it is asked
to: its answers go to any reply subject, its snapshots and consumers deliver to any subject, and the server lets all of
that pass. Whoever may ask JetStream one question could so have a command said in anybody's name. What JetStream says has
no reply subject or one of its own, so only a request with the session's own inbox is one of the session's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nats
import nats.errors
from nats.aio.msg import Msg

from ifabric.bus import tls
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
from ifabric.bus.delivery import Delivery
from ifabric.bus.hardened import HardenedClient
from ifabric.bus.journal import open_journal
from ifabric.bus.micro import MicroService, settled
from ifabric.bus.objects import open_objects
from ifabric.bus.translation import shut_out, translate
from ifabric.cancellation import heard
from ifabric.clock import Clock
from ifabric.credentials import read_seed
from ifabric.errors import FabricError, Unreachable
from ifabric.tls import Files, client_context
from ifabric.wire import subjects

NO_HEADERS: Headers = {}


@dataclass(frozen=True, kw_only=True)
class NatsSettings:
    """Where NATS is and how to reach it. Times in seconds, files in PEM."""

    servers: tuple[str, ...]
    name: str = "ifabric"
    connect_timeout_s: float = 5.0
    nkey_seed_file: str | None = None
    #: the seed itself, for who has it already
    nkey_seed: str | None = field(default=None, repr=False)
    credentials_file: str | None = None
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    inbox_prefix: str = "_INBOX"
    #: requests are answered below `_INBOX.<session>.` only, and none is carried out that wants no answer: the server sees
    #: to it that this inbox is the session's own
    private_inboxes: bool = False
    #: what a plain subscription may have waiting before the connection drops messages
    pending_msgs_max: int = 65_536
    pending_bytes_max: int = 64 * 1024 * 1024

    @property
    def files(self) -> Files:
        """The certificates."""
        return Files(ca_cert=self.ca_cert, cert_file=self.cert_file, key_file=self.key_file)

    @property
    def has_key(self) -> bool:
        """Whether it proves to be somebody."""
        return self.nkey_seed is not None or self.nkey_seed_file is not None

    @property
    def tls(self) -> bool:
        """Whether nothing may be sent in the clear."""
        return bool(self.files.paths) or any(server.startswith("tls://") for server in self.servers)


class Nats:
    """A connection to NATS."""

    def __init__(
        self, settings: NatsSettings, clock: Clock, on_error: Callable[[str, Exception], None] | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._on_error = on_error
        #: called before anything is sent; must not raise
        self.before_sending: Callable[[], None] = _nothing
        self._client = HardenedClient()
        self._closing = True
        self._connecting = self._shut_out = False
        self._leaving: asyncio.Task[None] | None = None
        self.slow_consumers = 0
        self.spoofed = 0
        self.reconnects = 0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def _before_sending(self) -> None:
        self.before_sending()

    # -- life --------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        settings = self._settings
        self._client, self._closing = HardenedClient(self._before_sending), False
        self._connecting, self._shut_out, self._examined = True, False, False
        self.lost = asyncio.get_running_loop().create_future()
        where = ", ".join(settings.servers)
        try:
            async with asyncio.timeout(settings.connect_timeout_s - self._explain_s):
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
                    nkeys_seed_str=self._seed(),
                    user_credentials=settings.credentials_file,
                    no_echo=False,
                )
        except TimeoutError:
            last = self._client.last_error
            await self._abandon()
            why = await self._explained() or str(last or "") or _waiting(settings)
            raise Unreachable(f"no NATS answers at {where}" + (f": {why}" if why else "")) from None
        except Unreachable:
            await self._abandon()
            raise
        except nats.errors.AuthorizationError:
            await self._abandon()
            raise shut_out(known=settings.has_key) from None
        except (nats.errors.Error, OSError, ssl.SSLError) as error:
            await self._abandon()
            raise Unreachable(f"cannot connect to NATS at {where}: {await self._explained() or error}") from None
        finally:
            self._connecting = self._examined = False

    async def reload(self) -> None:
        """The certificates as they are now, for the next connection; the present one stays.

        Raises `ConfigError`, and `Unreachable` when every server would refuse them; then nothing has changed.
        """
        context = self._tls()
        if context is not None:
            await self._usable()
            self._client.options["tls"] = context

    async def _usable(self) -> None:
        settings = self._settings
        await tls.usable(settings.servers, settings.files, tls=settings.tls, timeout_s=self._explain_s)

    @property
    def _explain_s(self) -> float:
        """Of the time to connect, what is kept for finding out why it failed."""
        return min(1.0, self._settings.connect_timeout_s / 4)

    async def _explained(self) -> str:
        settings = self._settings
        return await tls.explained(settings.servers, settings.files, tls=settings.tls, timeout_s=self._explain_s)

    def _seed(self) -> str | None:
        settings = self._settings
        if settings.nkey_seed is None and settings.nkey_seed_file is not None:
            return read_seed(settings.nkey_seed_file)
        return settings.nkey_seed

    async def _abandon(self) -> None:
        """Ends a connection that never came to be."""
        self._closing = True
        await self._client.close()

    def _tls(self) -> ssl.SSLContext | None:
        return client_context(self._settings.files) if self._settings.tls else None

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
        if isinstance(error, nats.errors.AuthorizationError):
            self._shut_out = True
            if self._connecting:
                raise error  # out of nats-py's loop, which would ask again and again
            self._leaving = asyncio.create_task(self._client.close(), name="nats: shut out")
        elif self._connecting and not self._examined:
            self._examined = True
            await self._usable()  # a certificate does not get better by asking again: out of the loop, too
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
                else "NATS does not let this credential in any more"
                if self._shut_out
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
            raise self._translated(error) from None

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        try:
            msg = await heard(self._client.request(subject, data, timeout=timeout_s, headers=_mapping(headers)))
        except (nats.errors.Error, OSError) as error:
            raise self._translated(error) from None
        return Answer(msg.data, msg.headers or NO_HEADERS)

    async def ask_all(self, subject: str, data: bytes, *, within_s: float, answers_max: int = 10_000) -> list[Answer]:
        answers: list[Answer] = []

        def take(incoming: Incoming) -> None:
            # without data and with a status: nobody listens
            if len(answers) < answers_max and (incoming.data or "Status" not in incoming.headers):
                answers.append(Answer(incoming.data, incoming.headers))

        inbox = self.new_inbox()
        subscription = await self.subscribe(inbox, take)
        try:
            await self.publish(subject, data, reply=inbox)
            await self._flushed(subject)
            await self._clock.sleep(within_s)
        finally:
            await subscription.unsubscribe()
        return answers

    async def _flushed(self, published: str) -> None:
        """Returns when the server has taken what was published. Raises `Forbidden` when it did not pass it on."""
        try:
            await settled(self._client)
            self._client.check_allowed("publish", published)
        except (nats.errors.Error, OSError) as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> FabricError:
        """As the table says, unless the server has shut us out for good."""
        return shut_out(known=self._settings.has_key) if self._shut_out else translate(error)

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
            self._client.check_allowed("subscription", subject)
        except (nats.errors.Error, OSError) as error:
            raise self._translated(error) from None
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
        if not self._may_answer(msg):
            self.spoofed += 1
            return None
        return Delivery(self, msg, answered)

    def _may_answer(self, msg: Msg) -> bool:
        if not msg.reply:
            return not self._settings.private_inboxes
        if not subjects.may_answer(msg.reply):
            return False
        return not self._settings.private_inboxes or subjects.is_own_inbox(msg.reply, msg.subject)

    async def journal(self, spec: JournalSpec | str) -> Journal:
        return await open_journal(self._client, spec)

    async def objects(self, spec: ObjectSpec | str) -> Objects:
        return await open_objects(self._client, spec)


def _nothing() -> None:
    """Of what must be done before anything is sent."""


def _waiting(settings: NatsSettings) -> str:
    """What it may be when a server takes the connection and then says nothing."""
    return "it does not say who we are: is a daemon there that answers its auth callout?" if settings.has_key else ""


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
