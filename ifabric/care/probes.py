"""Small questions over bare connections: an HTTP GET, the greeting of a nats-server, the certificate that is presented.

Nothing here trusts what it hears: answers are cut at a limit, and every question ends in time.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from cryptography import x509

from ifabric.care.facts import Offset
from ifabric.clock import Clock
from ifabric.errors import ConfigError

#: one question
ASK_S = 3.0
ANSWER_MAX_BYTES = 8 * 1024 * 1024
#: the ports that a URL without one means
PORTS = {"http": 80, "https": 443, "nats": 4222, "tls": 4222}


@dataclass(frozen=True)
class Response:
    """What came back, when it was asked for and when it was there (wall clock, seconds)."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent_at: float
    came_at: float

    @property
    def clock(self) -> Offset | None:
        """The server's clock by its `Date`, which is cut to whole seconds."""
        try:
            told = email.utils.parsedate_to_datetime(self.headers["date"]).timestamp()
        except (KeyError, ValueError):
            return None
        return Offset(least_s=told - self.came_at, most_s=told + 1.0 - self.sent_at)


def offset(told: str, sent_at: float, came_at: float) -> Offset | None:
    """A clock by an RFC 3339 time of an answer that was asked for at `sent_at` and there at `came_at`."""
    try:
        at = msgspec.convert(told, dt.datetime).timestamp()
    except msgspec.ValidationError:
        return None
    return Offset(least_s=at - came_at, most_s=at - sent_at)


def trusting(ca_cert: str | None, cert_file: str | None = None, key_file: str | None = None) -> ssl.SSLContext:
    """Verifies by `ca_cert` (None: the system's), and shows our certificate. `ConfigError` names what cannot be read."""
    try:
        context = ssl.create_default_context(cafile=ca_cert)
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use the certificates {', '.join(filter(None, (ca_cert, cert_file, key_file)))}: {error}"
        ) from None
    return context


def unverified() -> ssl.SSLContext:
    """Takes any certificate: to look at it, and at nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's authorities, which take long to read
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def address(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. `ConfigError` when it is no URL."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 80)
    except ValueError as error:
        raise ConfigError(f"{url} is no URL: {error}") from None


async def get(
    url: str, clock: Clock, *, timeout_s: float, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] = {}
) -> Response:
    """One GET. `OSError` and `TimeoutError` when there is no answer, `ValueError` when it is not HTTP."""
    scheme, host, port = address(url)
    parts = urlsplit(url if "://" in url else f"http://{url}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"GET {path} HTTP/1.0", f"Host: {host}:{port}", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    context = (tls or trusting(None)) if scheme == "https" else None
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            sent_at = clock.wall_ms() / 1000
            writer.write("\r\n".join(lines).encode())
            whole = await _read(reader)
        finally:
            writer.transport.abort()
    came_at = clock.wall_ms() / 1000
    head, _, body = whole.partition(b"\r\n\r\n")
    status, *rest = head.decode("latin-1").split("\r\n")
    named = (line.partition(":") for line in rest)
    found = {name.strip().lower(): value.strip() for name, _, value in named}
    if not status.startswith("HTTP/1."):
        raise ValueError("the answer is not HTTP")
    return Response(int(status.split(" ")[1]), found, body, sent_at, came_at)


async def _read(reader: asyncio.StreamReader) -> bytes:
    found = bytearray()
    while chunk := await reader.read(65_536):
        found += chunk
        if len(found) > ANSWER_MAX_BYTES:
            raise ValueError(f"the answer is larger than {ANSWER_MAX_BYTES} bytes")
    return bytes(found)


async def greeting(url: str, *, timeout_s: float) -> dict[str, Any]:
    """What a nats-server says to everybody who connects. Errors as of `get`."""
    _, host, port = address(url)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            return _info(await reader.readline())
        finally:
            writer.transport.abort()


def _info(line: bytes) -> dict[str, Any]:
    if not line.startswith(b"INFO "):
        raise ValueError("it does not greet as a nats-server does")
    found: dict[str, Any] = msgspec.json.decode(line[5:], type=dict)
    return found


async def presented(url: str, *, timeout_s: float) -> x509.Certificate | None:
    """The certificate that a server shows; None when it speaks without TLS. Errors as of `get`."""
    scheme, host, port = address(url)
    if scheme not in ("https", "nats", "tls"):
        return None
    # in a thread: asyncio's streams, turned to TLS in the middle, log what is no trouble
    shown = await asyncio.to_thread(_presented, host, port, timeout_s, greets=scheme != "https")
    return x509.load_der_x509_certificate(shown) if shown else None


def _presented(host: str, port: int, timeout_s: float, *, greets: bool) -> bytes | None:
    with socket.create_connection((host, port), timeout=timeout_s) as plain:
        if greets:
            with plain.makefile("rb", buffering=0) as reader:  # no byte of what follows is to be swallowed
                info = _info(reader.readline(65_536))
            if not info.get("tls_required"):
                return None
        with unverified().wrap_socket(plain, server_hostname=host) as over_tls:
            return over_tls.getpeercert(binary_form=True)


def document(response: Response) -> dict[str, Any]:
    """The JSON object in a body. `ValueError` when there is none."""
    found: dict[str, Any] = msgspec.json.decode(response.body, type=dict)
    return found


def words(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {ASK_S:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
