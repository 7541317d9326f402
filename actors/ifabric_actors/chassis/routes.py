"""The endpoints of the configuration as egress goes by them: read once, and refused at the start. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ifabric.errors import ConfigError
from ifabric_actors.chassis.addresses import Network

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.(?!-)[a-z0-9_-]{1,63})*")
_BASE = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*/?")
#: what carries no secret, since the request itself stands on it
_NO_SECRETS = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding", "user-agent")


@dataclass(frozen=True)
class Route:
    """One endpoint. `host` is what is resolved, what TLS proves, and what `Host` says."""

    name: str
    scheme: str
    host: str
    port: int
    #: the path of its URL, without a slash at the end
    base: str
    methods: frozenset[str]
    paths: tuple[str, ...]
    request_max_bytes: int
    response_max_bytes: int
    timeout_s: float
    calls_per_second: float
    calls_per_run: int
    redirects_max: int
    networks: tuple[Network, ...]
    breaker: str | None
    #: a `Credential` of the configuration
    credential: Any
    ca_cert: str | None

    @property
    def authority(self) -> str:
        """What the header `Host` says (RFC 9110, 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """As in "https://api.openai.com"."""
        return f"{self.scheme}://{self.authority}"

    @property
    def secret_header(self) -> str | None:
        """The header with the credential, in lower case."""
        return None if self.credential is None else self.credential.header.lower()


def route(name: str, endpoint: Any) -> Route:
    """What an `Endpoint` of the configuration says. `ConfigError` when no request could be made by it."""
    try:
        parts = urlsplit(endpoint.url)
        host, port = _host(parts.hostname or ""), parts.port or _PORTS[parts.scheme]
    except ValueError as error:
        raise ConfigError(f"chassis.endpoints.{name}.url: {endpoint.url} names no host and port: {error}") from None
    if not _BASE.fullmatch(parts.path):
        raise ConfigError(f"chassis.endpoints.{name}.url: {parts.path} is not a path that others can be below")
    credential = endpoint.credential
    if credential is not None and credential.header.lower() in _NO_SECRETS:
        raise ConfigError(f"chassis.endpoints.{name}.credential.header: {credential.header} cannot carry a secret")
    return Route(
        name=name,
        scheme=parts.scheme,
        host=host,
        port=port,
        base=parts.path.rstrip("/"),
        methods=frozenset(endpoint.methods),
        paths=tuple(endpoint.paths),
        request_max_bytes=endpoint.request_max_bytes,
        response_max_bytes=endpoint.response_max_bytes,
        timeout_s=endpoint.timeout_seconds,
        calls_per_second=endpoint.calls_per_second,
        calls_per_run=endpoint.calls_per_run,
        redirects_max=endpoint.redirects_max,
        networks=tuple(ipaddress.ip_network(network) for network in endpoint.networks),
        breaker=endpoint.breaker,
        credential=credential,
        ca_cert=endpoint.ca_cert,
    )


def _host(text: str) -> str:
    """A host name in the letters of DNS, or an IP address. `ValueError` when it is neither."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        host = text.encode("idna").decode("ascii").lower()
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ValueError(f"{text!r} is not the name of a host")
    return host


class Bucket:
    """A rate that is kept: a second's worth may go at once. Times in seconds, monotonic."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._most = per_s, max(1.0, per_s)
        self._left, self._at = self._most, now

    def take(self, now: float) -> float:
        """0.0, and one is taken; or how long it is until the next may be."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / self._per_s
