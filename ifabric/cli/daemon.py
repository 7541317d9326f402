"""Asks this machine's daemon over its HTTP port, with or without TLS."""

from __future__ import annotations

import hashlib
import http.client
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter

from ifabric.endpoints import Endpoints
from ifabric.errors import Unreachable

if TYPE_CHECKING:
    from ifabric.tls import Files

BODY_MAX_BYTES = 8 * 1024 * 1024


@Parameter(name="*")
@dataclass(frozen=True)
class HttpTls:
    """Certificates for the daemon's HTTP port."""

    http_ca: Annotated[
        str | None,
        Parameter(
            env_var="IFABRIC_HTTP_CA",
            help="Verify the daemon's https by this authority. Default: by the certificate that endpoints.json names.",
        ),
    ] = None
    http_cert: Annotated[
        str | None, Parameter(env_var="IFABRIC_HTTP_CERT", help="Client certificate, when http.client_ca demands one.")
    ] = None
    http_key: Annotated[str | None, Parameter(env_var="IFABRIC_HTTP_KEY", help="Its key.")] = None

    @property
    def files(self) -> Files:
        """The same, as TLS takes them."""
        from ifabric.tls import Files

        return Files(ca_cert=self.http_ca, cert_file=self.http_cert, key_file=self.http_key, ca_key="--http-ca")


def ask(found: Endpoints, path: str, timeout_s: float, tls: HttpTls | None = None) -> bytes:
    """The body of a GET, also of an unhealthy answer (503). Raises `Unreachable`, which says why."""
    url = urlsplit(found.http)
    files = (tls or HttpTls()).files
    connection = connection_to(found, url.hostname or "", url.port, timeout_s, files)
    where = found.http + path
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(BODY_MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        from ifabric.tls.diagnosis import HTTP, examine

        tls_is_on, verify = found.http.startswith("https://"), files.ca_cert is not None
        trouble = examine(found.http, files, HTTP, tls=tls_is_on, verify=verify, timeout_s=timeout_s)
        why = trouble.sentence if trouble is not None else error
        raise Unreachable(f"the daemon's HTTP port does not answer at {where}: {why}") from None
    finally:
        connection.close()
    if answer.status not in (200, 503):
        raise Unreachable(f"the daemon's HTTP port answers {answer.status} at {where}")
    return body


def connection_to(
    found: Endpoints, host: str, port: int | None, timeout_s: float, files: Files
) -> http.client.HTTPConnection:
    """A connection that is not opened yet, and that knows the daemon by its certificate when it is https."""
    if not found.http.startswith("https://"):
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    from ifabric.tls import client_context

    context = client_context(files)
    if files.ca_cert is not None:
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return _Pinned(host, port, timeout=timeout_s, context=context, pin=found.http_pin)


class _Pinned(http.client.HTTPSConnection):
    """Knows the server by its certificate itself, and says nothing to another."""

    def __init__(self, host: str, port: int | None, *, timeout: float, context: ssl.SSLContext, pin: str) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._pin = pin

    def connect(self) -> None:
        super().connect()
        der = self.sock.getpeercert(binary_form=True)
        if der is None or hashlib.sha256(der).hexdigest() != self._pin:
            self.close()
            raise Unreachable(
                f"whoever listens on {self.host}:{self.port} does not show the certificate that endpoints.json names: it is "
                "not this daemon, or it is exchanging its certificate now; nothing was asked"
            )
