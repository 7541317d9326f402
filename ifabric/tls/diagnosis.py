"""Why TLS with a server fails, in words: one handshake made for that, with Python's ssl.

gRPC and nats-py pass on what their TLS library says, or only that a connection ended. Here a server is asked once more,
by hand, up to the first byte that it answers: a server refuses a client's certificate after the client's handshake is
done (TLS 1.3), so the refusal is only there to be read. When the server's certificate is what fails, a second handshake
that verifies nothing fetches it, to say whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from cryptography import x509

from ifabric import pki
from ifabric.clock import monotonic
from ifabric.errors import ConfigError
from ifabric.tls import Files, client_context, day

#: OpenSSL's X509_V_ERR_..., as far as they are told apart
EXPIRED, NOT_YET, OTHER_HOST, OTHER_ADDRESS, NOT_FOR_SERVERS = 10, 9, 62, 64, 26
#: no issuer known, itself signed, and a signature that is not by the authority of that name
UNKNOWN_AUTHORITY = (2, 7, 18, 19, 20, 21)
#: what ssl says of bytes that are no TLS
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "BAD_RECORD_TYPE")
#: a server's alerts about the client's certificate, and what each says of it
_REFUSALS = {
    "UNKNOWN_CA": "its authority is not one that the server trusts",
    "CERTIFICATE_EXPIRED": "it has expired by the server's clock",
    "CERTIFICATE_REVOKED": "it was revoked",
    "UNSUPPORTED_CERTIFICATE": "it is not one for clients",
    "BAD_CERTIFICATE": "its authority is not one that the server trusts, or it is not one for clients",
    "CERTIFICATE_UNKNOWN": "its authority is not one that the server trusts, or it is not one for clients",
    "ACCESS_DENIED": "it may not connect",
    "CERTIFICATE_REQUIRED": "it was not taken for one",
}
INFO_MAX_BYTES = 65_536
#: how long a refusal of our certificate is waited for before anything is said
REFUSAL_S = 0.3


@dataclass(frozen=True)
class Dialect:
    """How a kind of server is spoken to. `hello` makes it answer; with `greets` it speaks first, before TLS."""

    server: str
    hello: bytes
    alpn: tuple[str, ...] = ()
    greets: bool = False
    #: what an address begins with, in the clear and with TLS
    schemes: tuple[str, str] = ("http://", "https://")
    port: int = 443


#: an HTTP/2 preface and an empty SETTINGS frame
ETCD = Dialect("etcd", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0", ("h2",), port=2379)
NATS = Dialect("nats-server", b"PING\r\n", greets=True, schemes=("nats://", "tls://"), port=4222)
HTTP = Dialect("HTTP server", b"GET /livez HTTP/1.0\r\n\r\n")


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a server, in a sentence. `certain`: trying again does not help until somebody changes
    something. Otherwise nobody was there to ask.
    """

    sentence: str
    certain: bool = True


async def diagnose(url: str, files: Files, dialect: Dialect, *, tls: bool = True, timeout_s: float) -> Trouble | None:
    """What is wrong with TLS to the server at `url`; None when nothing is. `tls`: whether it is wanted."""
    return await asyncio.to_thread(examine, url, files, dialect, tls=tls, timeout_s=timeout_s)


def examine(
    url: str, files: Files, dialect: Dialect, *, tls: bool = True, verify: bool = True, timeout_s: float
) -> Trouble | None:
    """The same, for who may wait. Without `verify` only what the server has against us counts."""
    try:
        at = urlsplit(url if "://" in url else f"//{url}")
        host, port = at.hostname or "", at.port or dialect.port
    except ValueError as error:
        return Trouble(f"this is no address: {error}")
    return _Examination(host, port, files, dialect, monotonic() + timeout_s, verify).result(tls=tls)


@dataclass(frozen=True)
class _Examination:
    host: str
    port: int
    files: Files
    dialect: Dialect
    until: float
    verify: bool = True

    def result(self, *, tls: bool) -> Trouble | None:
        try:
            return self._secured() if tls else self._in_the_clear()
        except ConfigError as error:
            return Trouble(error.message)
        except TimeoutError:
            return Trouble("no answer in time", certain=False)
        except ConnectionRefusedError:
            return Trouble("nobody listens there", certain=False)
        except socket.gaierror as error:
            return Trouble(f"the host {self.host} cannot be found: {error.strerror}", certain=False)
        except OSError as error:
            return Trouble(f"cannot be reached: {error.strerror or error}", certain=False)

    # -- one connection ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _dialled(self) -> Iterator[tuple[socket.socket, bool | None]]:
        """A connection, and whether the server offers TLS as far as it said so itself."""
        with socket.create_connection((self.host, self.port), self._left_s()) as connection:
            yield connection, self._greeting(connection) if self.dialect.greets else None

    def _left_s(self) -> float:
        return max(0.05, self.until - monotonic())

    def _greeting(self, connection: socket.socket) -> bool:
        said = b""
        while b"\n" not in said and len(said) < INFO_MAX_BYTES:
            connection.settimeout(self._left_s())
            more = connection.recv(4096)
            if not more:
                break
            said += more
        word, _, about = said.partition(b" ")
        try:
            info = msgspec.json.decode(about) if word.upper() == b"INFO" else None
        except msgspec.DecodeError:
            info = None
        if not isinstance(info, dict):
            raise ConfigError(f"this is no {self.dialect.server}: it does not say INFO")
        return bool(info.get("tls_required") or info.get("tls_available"))

    # -- with TLS ----------------------------------------------------------------------------------------------------

    def _secured(self) -> Trouble | None:
        context = client_context(self.files)
        if not self.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self._dialled() as (plain, offered):
            if offered is False:
                return self._no_tls()
            try:
                connection = self._handshake(context, plain)
            except ssl.SSLCertVerificationError as error:
                return Trouble(self._about_server(error))
            except ssl.SSLEOFError:
                return self._ended()
            except ssl.SSLError as error:
                return self._failed(error)
            except ConnectionResetError:
                return self._ended()
            with connection:
                return self._answered(connection)

    def _handshake(self, context: ssl.SSLContext, plain: socket.socket) -> ssl.SSLSocket:
        if self.dialect.alpn:
            context.set_alpn_protocols(list(self.dialect.alpn))
        plain.settimeout(self._left_s())
        return context.wrap_socket(plain, server_hostname=self.host)

    def _answered(self, connection: ssl.SSLSocket) -> Trouble | None:
        """Says hello and reads: what a server has against a client's certificate comes now."""
        try:
            # first only read: a server that hangs up on what it has not read takes its own last word along
            connection.settimeout(min(REFUSAL_S, self._left_s()))
            with contextlib.suppress(TimeoutError):
                return None if connection.recv(1) else Trouble(self._refused(""))
            connection.settimeout(self._left_s())
            connection.sendall(self.dialect.hello)
            return None if connection.recv(1) else Trouble(self._refused(""))
        except TimeoutError:
            return None  # slow, but not for a certificate's sake
        except (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError):
            return Trouble(self._refused(""))
        except ssl.SSLError as error:
            return self._failed(error)

    def _failed(self, error: ssl.SSLError) -> Trouble:
        reason = error.reason or str(error)
        alert = reason.partition("_ALERT_")[2]
        if any(sign in reason for sign in _NO_TLS):
            return self._no_tls()
        if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
            return Trouble("it does not offer TLS 1.3, and nothing older is spoken: raise its TLS version")
        if alert in _REFUSALS:
            return Trouble(self._refused(alert))
        return Trouble(f"TLS fails: {reason.lower().replace('_', ' ')}")

    def _refused(self, alert: str) -> str:
        if self.files.cert_file is None:
            guess = "" if alert else " (it hung up after the handshake without a reason, which looks like it)"
            return f"it demands a client certificate, and none is configured: set cert_file and key_file{guess}"
        silent = "it hung up after the handshake without a reason; its authority may not be one that the server trusts"
        why = _REFUSALS.get(alert, silent)
        own = pki.facts(Path(self.files.cert_file).read_bytes())
        return (
            f"it refused our certificate {self.files.cert_file} ({own.common_name}, signed by {own.issuer}, valid until "
            f"{day(own.not_after)}): {why}"
        )

    def _ended(self) -> Trouble:
        """It hung up instead of a handshake: a server without TLS, if it answers in the clear."""
        with contextlib.suppress(OSError), self._dialled() as (plain, _):
            plain.sendall(self.dialect.hello)
            plain.settimeout(self._left_s())
            if plain.recv(1):
                return self._no_tls()
        return Trouble("it ends the connection instead of a TLS handshake", certain=False)

    def _no_tls(self) -> Trouble:
        clear, secured = self.dialect.schemes
        return Trouble(
            f"this {self.dialect.server} speaks no TLS on port {self.port}: give it a certificate, or write {clear} instead of "
            f"{secured} and no certificate files, if nobody can listen in between"
        )

    # -- without -----------------------------------------------------------------------------------------------------

    def _in_the_clear(self) -> Trouble | None:
        with self._dialled() as (plain, offered):
            if offered is not None:
                return self._secured() if offered else None
            try:
                self._handshake(_verifies_nothing(), plain).close()
            except ssl.SSLEOFError:
                return None
            except ssl.SSLError as error:
                if "_ALERT_" not in (error.reason or ""):
                    return None
            except ConnectionResetError:
                return None
        clear, secured = self.dialect.schemes
        return Trouble(
            f"this {self.dialect.server} speaks TLS on port {self.port}: write {secured} instead of {clear}, and set ca_cert"
        )

    # -- the server's certificate ------------------------------------------------------------------------------------

    def _about_server(self, error: ssl.SSLCertVerificationError) -> str:
        code, found = error.verify_code, self._presented()
        name = f"its certificate ({found.common_name})" if found else "its certificate"
        if code in (OTHER_HOST, OTHER_ADDRESS):
            hosts = ", ".join(found.hosts) if found and found.hosts else "no host (its common name does not count)"
            return f"{name} is for {hosts} and not for {self.host}: connect to one of those, or issue one for this name"
        if code in UNKNOWN_AUTHORITY:
            issuer = f" {found.issuer}" if found else " an authority"
            if self.files.ca_cert is None:
                return f"{name} is signed by{issuer}, which is none of the system's authorities: set ca_cert"
            return f"{name} is signed by{issuer}, and not by an authority that {self.files.ca_cert} has"
        if code == EXPIRED:
            own = found is not None and found.days_left() < 0
            return (
                f"{name} expired on {day(found.not_after)}" if found and own else f"an authority of {name} has expired"
            )
        if code == NOT_YET:
            early = f" before {day(found.not_before)}" if found else " yet"
            return f"{name} is not valid{early}: wait, issue another, or set the clock right"
        if code == NOT_FOR_SERVERS:
            return f"{name} is one for clients and not for servers"
        return f"{name} is not accepted: {error.verify_message}"

    def _presented(self) -> pki.Facts | None:
        with contextlib.suppress(OSError, ConfigError, ValueError):
            context = _verifies_nothing()
            with self._dialled() as (plain, _), self._handshake(context, plain) as connection:
                der = connection.getpeercert(binary_form=True)
                return pki.facts_of(x509.load_der_x509_certificate(der)) if der else None
        return None


def _verifies_nothing() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
