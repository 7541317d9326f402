"""A connection that no message of a stranger can break.

The server passes subjects, reply subjects and headers on as it got them, whatever bytes they are, and does not check
who owns a reply subject. nats-py 2.16 trusts them, and an exception in its read loop ends the loop: the daemon is deaf
until its own pings go unanswered, three seconds for one message. What got through, each by one message of any agent:

- a subject or a reply subject that is not UTF-8, and a header block shorter than its first line, or with a status that
  is not UTF-8: exceptions in the read loop;
- a vertical tab or a form feed in a subject: the server takes them for part of a name and nats-py for a space, so the
  message arrives at another subscription, or the connection breaks.

So here names are read as the server reads them, broken headers count as none, and what still fails is reported and
costs only its own message. `tests/actors/test_hostile.py` sends all of it.

**What is denied is told to whoever asked.** The server says so in a message of its own, later, which names the subject
(in lower case, by then) and not the call: a denied request would just time out. Here it ends with `PermissionsViolation`
at once, and a publish or a subscription can ask afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable
from typing import Any

import nats.errors
import nats.protocol.parser
from nats.aio.client import AUTHORIZATION_VIOLATION, Client
from nats.aio.transport import TcpTransport

from ifabric.tls import Files, client_context

#: nats-py's own, but for `\s` and `\S`: the server parts its words with spaces alone
_WORD, _GAP = rb"([^ \t\r\n]+)", rb"[ \t]+"
_HEAD = _GAP + _WORD + _GAP + rb"(\d+)" + _GAP + rb"(" + _WORD + _GAP + rb")?"
nats.protocol.parser.MSG_RE = re.compile(rb"\AMSG" + _HEAD + rb"(\d+)\r\n")
nats.protocol.parser.HMSG_RE = re.compile(rb"\AHMSG" + _HEAD + rb"(\d+)" + _GAP + rb"(\d+)\r\n")


_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')
#: denials that nobody has asked about, and requests that may be answered already: so many are remembered
KEPT_MAX = 256
#: for a connection to close; one that does not has no handshake behind it
CLOSE_S = 0.5


class PermissionsViolation(nats.errors.Error):  # type: ignore[misc]
    """The server does not allow it."""

    def __init__(self, what: str, subject: str) -> None:
        super().__init__(f"NATS does not allow a {what} to {subject}")
        self.what, self.subject = what, subject


class _Line(TcpTransport):  # type: ignore[misc]
    """nats-py's transport, with two things of its TLS put right.

    After a handshake that failed, it waits for ever for a connection to close that nobody tells about it any more, and
    whoever connects or reconnects waits with it. And the loop, when it turns a plain connection to TLS, does not
    introduce the stream to it: the stream takes itself for a plain one, holds no sender back, and is warned about
    whenever the server hangs up.

    And whoever must have done something before a word leaves (the audit writes) is called here, once for all that leaves
    together: nats-py collects answers and sends them in a later turn of the loop, or in this one.
    """

    def __init__(self, before_sending: Callable[[], None]) -> None:
        super().__init__()
        self._before_sending = before_sending

    def write(self, payload: Any) -> None:
        self._before_sending()
        super().write(payload)

    def writelines(self, payload: Any) -> None:
        self._before_sending()
        super().writelines(payload)

    def __bool__(self) -> bool:
        return True  # else nats-py takes one of its own

    async def wait_closed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await super().wait_closed()

    async def connect_tls(self, *args: Any, **options: Any) -> None:
        await super().connect_tls(*args, **options)
        transport = self._io_writer.transport
        if (stream := transport.get_protocol()) is not None:  # else the server has hung up already
            stream.connection_made(transport)


class HardenedClient(Client):  # type: ignore[misc]
    """nats-py's client, reading what strangers send with care."""

    def __init__(self, before_sending: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._before_sending = before_sending
        #: what each request asked, by the token of its inbox
        self._asked: dict[str, str] = {}
        self._denials: dict[tuple[str, str], None] = {}

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, Any] | None = None
    ) -> None:
        """As nats-py's; it remembers what a request asked."""
        prefix = self._resp_sub_prefix
        if reply and prefix and reply.startswith(mine := prefix.decode()):
            if len(self._asked) > KEPT_MAX + 2 * len(self._resp_map):
                self._asked = {token: asked for token, asked in self._asked.items() if token in self._resp_map}
            self._asked[reply[len(mine) :]] = subject
        await super().publish(subject, payload, reply=reply, headers=headers)

    async def _process_connect_init(self) -> None:
        """As nats-py's, whose connection is none for ever when the server's ping comes before its welcome: an auth
        callout may take longer than the interval of its pings.
        """
        transport = self._transport
        read = transport.readline

        async def beyond_pings() -> bytes:
            while (line := await read()).startswith(b"PING"):
                transport.write(b"PONG\r\n")
                await transport.drain()
            found: bytes = line
            return found

        transport.readline = beyond_pings
        try:
            await super()._process_connect_init()
        except BaseException as error:
            transport.close()  # nats-py forgets it, and opens the next
            if isinstance(error, nats.errors.Error) and AUTHORIZATION_VIOLATION in str(error).lower():
                raise nats.errors.AuthorizationError from None
            raise
        finally:
            transport.readline = read

    async def _process_err(self, err_msg: str) -> None:
        found = _DENIED.search(err_msg)
        if found is not None:
            what, subject = found[1], found[2].lower()
            waiting = [token for token, asked in self._asked.items() if asked.lower() == subject]
            futures = [future for token in waiting if (future := self._resp_map.get(token)) and not future.done()]
            if what == "publish" and futures:
                for future in futures:
                    future.set_exception(PermissionsViolation(what, subject))
                return
            if len(self._denials) >= KEPT_MAX:
                self._denials.clear()
            self._denials[what, subject] = None
        await super()._process_err(err_msg)

    def check_allowed(self, what: str, subject: str) -> None:
        """Raises `PermissionsViolation` when the server has denied this `publish` or `subscription`."""
        if self._denials.pop((what, subject.lower()), self) is None:
            raise PermissionsViolation(what, subject)

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """What the settings say; TLS 1.3 and the system's authorities when only the server asks for TLS."""
        context: ssl.SSLContext | None = self.options.get("tls")
        return context or client_context(Files())

    async def _connect_to_server(self, s: Any) -> None:
        if self._transport is None and s.uri.scheme in ("nats", "tls"):
            self._transport: Any = _Line(self._before_sending)
        await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py takes TLS from whoever says that it is required, and goes on in the clear otherwise
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise nats.errors.Error("the server offers no TLS, and nothing is sent in the clear")
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            # what waits would be written to a transport that has gone, and end the closing half done
            self._pending: list[bytes] = []
            self._pending_data_size = 0
        await super()._close(status, do_cbs)
        for future in self._resp_map.values():  # no answer comes any more, and nobody would tell who waits
            if not future.done():
                future.set_exception(nats.errors.ConnectionClosedError())
                future.exception()  # it is seen, where nobody waits: nats-py keeps those of requests that were not sent

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception as error:
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        if not headers:
            return None
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except (IndexError, UnicodeDecodeError) as error:
            await self._error_cb(error)
            return None
        return found

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        return self.msg_class(
            subject=subject.decode("utf-8", "replace"),
            reply=reply.decode("utf-8", "replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )
