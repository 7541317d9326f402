"""Connections to endpoints: made to addresses that were checked, and kept for the next call.

**The check and the connection are of one address.** A name is resolved here, each address that it has is judged, and
the connection is made to one of them by its number: nobody resolves the name a second time, so there is no moment in
which DNS could answer differently (rebinding). A name that has one bad address is refused as a whole: what may answer
so once will do it again. A connection that is kept needs no second check, since the peer of a TCP connection does not
change, whatever its name leads to by then; and it is kept for seconds.

**A response is of the request that was sent before it.** HTTP/1.1 knows that by order alone: whoever gets an endpoint
to send two responses for one request has written the next guest's. So a connection goes back only when nothing is left
in it, neither read nor unread, and is looked at again before it is used; everything else is aborted.

**What a connection may bring** is bounded in bytes as they come, and not only by what they mean: a megabyte of body is
many when each byte is a chunk of its own, and there is no end to responses of 1xx. And nobody reads for long without
giving others their turn: a thousand chunks are in one packet.

httpcore speaks HTTP; its pool is not used. It keeps for good a connection whose request was cancelled before it was made
(encode/httpcore#1093, open in 1.0.9), and requests are cancelled here whenever a guest's time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, cast

import httpcore

from ifabric.errors import ConfigError, Unavailable
from ifabric_actors.chassis import addresses, outbound
from ifabric_actors.chassis.outbound import Head, Sending
from ifabric_actors.chassis.routes import Route

#: as `loop.getaddrinfo`: called with host, port and `type`, returns (family, type, proto, name, (address, port, ...))
Resolve = Callable[..., Awaitable[Sequence[tuple[Any, ...]]]]

#: below what servers usually have (Node and Apache: 5 s), so that it is us who hang up
KEEPALIVE_S = 4.0
#: for one address, while there are others to try
CONNECT_S = 3.0
ADDRESSES_MAX = 16
#: connections to one endpoint at once; a further call waits for one
CONNECTIONS_MAX = 32
READ_BYTES = 16 * 1024
HEAD_MAX_BYTES = 32 * 1024
#: until the head of the response is there, responses of 1xx before it
PROLOGUE_MAX_BYTES = 128 * 1024
#: bytes on the wire for one byte of body, besides `WIRE_BYTES`
WIRE_FACTOR = 2
WIRE_BYTES = 256 * 1024
#: of one response; each costs some 8 us, be it of one byte
CHUNKS_MAX = 64 * 1024
#: after so many others have their turn
CHUNKS_AT_ONCE = 64

# at DEBUG httpcore logs the headers of responses, and with them what an endpoint repeats
logging.getLogger("httpcore").setLevel(logging.INFO)


class Broken(Unavailable):
    """The connection ended before the response did, or it brought no response; what was done is unknown."""


class _Reader(asyncio.StreamReader):
    """Knows how much has come."""

    received = 0

    def feed_data(self, data: Any) -> None:
        self.received += len(data)
        super().feed_data(data)


class _Stream(httpcore.AsyncNetworkStream):
    """The bytes of one connection. Timeouts are the caller's: one for all of a call."""

    def __init__(self, route: Route, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._route, self._reader, self._writer = route, reader, writer
        self.taken = 0
        #: bytes that may still come
        self.left = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self.quiet:
            await asyncio.sleep(0)  # what has come is read without waiting: others have their turn first
        try:
            data = await self._reader.read(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(type(error).__name__) from error
        self.taken += len(data)
        self.left -= len(data)
        if self.left < 0:
            raise outbound.too_long(self._route)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._writer.write(buffer)
            await self._writer.drain()
        except OSError as error:
            raise httpcore.WriteError(type(error).__name__) from error

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Closes at once, whatever is still to be sent."""
        self._writer.transport.abort()

    @property
    def quiet(self) -> bool:
        """Nothing has come that was not read, not even its end."""
        return self._reader.received == self.taken and not self._reader.at_eof()

    def get_extra_info(self, info: str) -> Any:
        return not self.quiet if info == "is_readable" else None


class Connection(httpcore.AsyncHTTP11Connection):
    """One connection, for one request at a time."""

    READ_NUM_BYTES = READ_BYTES
    MAX_INCOMPLETE_EVENT_SIZE = HEAD_MAX_BYTES

    def __init__(self, route: Route, stream: _Stream) -> None:
        origin = httpcore.Origin(route.scheme.encode(), route.host.encode(), route.port)
        super().__init__(origin, stream, keepalive_expiry=KEEPALIVE_S)
        self._route, self._stream = route, stream
        self.used = False
        self._before = 0

    async def exchange(
        self, sending: Sending, headers: Sequence[tuple[bytes, bytes]], heard: Callable[[Head], None]
    ) -> tuple[Head, bytes]:
        """Writes a request and reads its response. `heard` is told its beginning, and may raise to read no further.

        `Broken`; `TooLarge` for a response over the endpoint's limit.
        """
        route = self._route
        self._before = self._stream.taken
        self._stream.left = PROLOGUE_MAX_BYTES
        url = httpcore.URL(scheme=route.scheme, host=route.host, port=route.port, target=sending.target)
        request = httpcore.Request(sending.method, url, headers=headers, content=sending.body)
        try:
            response = await self.handle_async_request(request)
            head = Head(response.status, tuple((name.lower(), value) for name, value in response.headers))
            heard(head)
            if sending.method != "HEAD" and outbound.length(head) > route.response_max_bytes:
                raise outbound.too_long(route)  # and not a byte of it is waited for
            self._stream.left = route.response_max_bytes * WIRE_FACTOR + WIRE_BYTES
            body, count = bytearray(), 0
            # it is a generator: closed here, or it would be closed by a task that nobody has
            async with contextlib.aclosing(
                cast("AsyncGenerator[bytes, None]", aiter(cast("Any", response.stream)))
            ) as chunks:
                async for chunk in chunks:
                    body += chunk
                    count += 1
                    if len(body) > route.response_max_bytes or count > CHUNKS_MAX:
                        raise outbound.too_long(route)
                    if count % CHUNKS_AT_ONCE == 0:
                        await asyncio.sleep(0)
            await response.aclose()
        # httpcore's own words are left out: they may quote what the endpoint repeated
        except httpcore.NetworkError:
            message = f"the endpoint {route.name} broke the connection"
            raise Broken(message, what="endpoint", why="connection") from None
        except httpcore.ProtocolError:
            message = f"what the endpoint {route.name} sent is not HTTP, or has no end"
            raise Broken(message, what="endpoint", why="protocol") from None
        return head, bytes(body)

    @property
    def taken(self) -> int:
        """Bytes of the response so far, as they came."""
        return self._stream.taken - self._before

    @property
    def is_stale(self) -> bool:
        """It was kept, and when it was used again nothing came: most likely it had been closed."""
        return self.used and self.taken == 0

    @property
    def is_clean(self) -> bool:
        """Whether another request may be sent."""
        rest, ended = self._h11_state.trailing_data
        return self.is_available() and not rest and not ended and self._stream.quiet and not self.has_expired()

    def abort(self) -> None:
        """Closes at once."""
        self._stream.abort()


class Dialer:
    """The connections to one endpoint."""

    def __init__(self, route: Route, tls: ssl.SSLContext | None, resolve: Resolve | None) -> None:
        self.route, self._tls = route, tls
        self._resolve = resolve
        #: held while a connection is used
        self.slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._closed = False
        self._lookup: asyncio.Task[list[str]] | None = None

    def kept(self) -> Connection | None:
        """A connection that is there already."""
        while self._idle:
            connection = self._idle.pop()  # the last one used: the others may grow old and go
            if connection.is_clean:
                connection.used = True
                return connection
            self._drop(connection)
        return None

    async def dial(self) -> Connection:
        """A new connection. `EgressDenied` for an address, `Unavailable` when there is no connection to be had."""
        found = await self._addresses()
        for address in found:
            why = addresses.refused(address, self.route.networks)
            if why is not None:
                raise outbound.denied(self.route, f"address of {self.route.host}: {why}")
        error: OSError | None = None
        tried = found[:ADDRESSES_MAX]
        for number, address in enumerate(tried, 1):
            try:
                async with asyncio.timeout(CONNECT_S if number < len(tried) else None):
                    stream = await self._connect(address)
            except ssl.SSLError as refused:
                raise self._no_tls(refused) from None
            except OSError as failed:  # TimeoutError is one
                error = failed
                continue
            connection = Connection(self.route, stream)
            if self._closed:
                connection.abort()
                raise _stopping()
            self._open.add(connection)
            return connection
        why = type(error).__name__ if error is not None else "no address"
        raise Unavailable(
            f"no connection to the endpoint {self.route.name} can be made: {why}", what="endpoint", why="connection"
        )

    def give_back(self, connection: Connection) -> None:
        """Keeps it for the next call, or closes it."""
        if connection in self._open and connection.is_clean:
            self._idle.append(connection)
        else:
            self._drop(connection)

    def sweep(self) -> None:
        """Closes what was not used for too long, or was closed by the other side."""
        for connection in [one for one in self._idle if not one.is_clean]:
            self._idle.remove(connection)
            self._drop(connection)

    def close(self) -> None:
        """Closes everything, also what is in use; for good."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._open):
            self._drop(connection)
        if self._lookup is not None:
            self._lookup.cancel()

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.abort()

    async def _connect(self, address: str) -> _Stream:
        loop = asyncio.get_running_loop()
        reader = _Reader(limit=READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(
            lambda: protocol,
            address,
            self.route.port,
            ssl=self._tls,
            server_hostname=self.route.host if self._tls is not None else None,
        )
        return _Stream(self.route, reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def _no_tls(self, error: ssl.SSLError) -> Unavailable:
        why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        return Unavailable(
            f"the endpoint {self.route.name} could not prove who it is: {why or type(error).__name__}",
            what="endpoint",
            why="tls",
        )

    async def _addresses(self) -> list[str]:
        """What the host's name leads to. One lookup at a time: a slow one would else take all threads that there are
        for lookups, and with them NATS's and etcd's.
        """
        if self._closed:
            raise _stopping()
        try:
            return [str(ipaddress.ip_address(self.route.host))]
        except ValueError:
            if self._lookup is None or self._lookup.done():
                self._lookup = asyncio.create_task(self._look_up(), name=f"look up {self.route.host}")
                self._lookup.add_done_callback(_heard)
        lookup = self._lookup
        await asyncio.wait({lookup})
        if lookup.cancelled():
            raise _stopping()
        return lookup.result()

    async def _look_up(self) -> list[str]:
        resolve = self._resolve or asyncio.get_running_loop().getaddrinfo
        try:
            found = await resolve(self.route.host, self.route.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unavailable(
                f"the name of the endpoint {self.route.name} is not found: {type(error).__name__}",
                what="endpoint",
                why="name",
            ) from None
        return list(dict.fromkeys(entry[4][0] for entry in found))


def _stopping() -> Unavailable:
    return Unavailable("the chassis is stopping", what="egress")


def _heard(task: asyncio.Task[Any]) -> None:
    """What a task raised is known, even if whoever waited for it has gone."""
    if not task.cancelled():
        task.exception()


def contexts(routes: Sequence[Route]) -> dict[str, ssl.SSLContext | None]:
    """How each endpoint proves who it is: by the system's authorities, or those of its own file. `ConfigError`."""
    made: dict[str | None, ssl.SSLContext] = {}
    for ca_cert in {route.ca_cert for route in routes if route.scheme == "https"}:
        try:
            context = ssl.create_default_context(cafile=ca_cert)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"ca_cert of an endpoint, {ca_cert}, cannot be used: {error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.hostname_checks_common_name = False
        context.set_alpn_protocols(["http/1.1"])
        made[ca_cert] = context
    return {route.name: made[route.ca_cert] if route.scheme == "https" else None for route in routes}
