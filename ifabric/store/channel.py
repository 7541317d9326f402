"""One gRPC channel to one etcd endpoint: TLS, keepalive, and the calls we make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from aetcd import rpc

from ifabric import pki
from ifabric.errors import ConfigError, Forbidden
from ifabric.store.base import Got
from ifabric.tls import Files
from ifabric.tls.diagnosis import ETCD, Trouble, diagnose

#: All are needed. A ping more often than every 5 s gets the connection killed by etcd's default floor;
#: `keepalive_timeout_ms` alone did not notice a frozen server with grpcio 1.85; unlimited pings without data keep an
#: idle watch honest; and a restarted server is found again at once instead of after gRPC's default backoff of up to
#: two minutes.
OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)


#: users or roles changed between a request's arrival and its turn: it was not carried out, and may be asked again
OLD_ROLES = "revision of auth store is old"


@dataclass(frozen=True, kw_only=True)
class EtcdSettings:
    """Where etcd is and how to reach it. Times in seconds, files in PEM.

    An endpoint is `https://host:port`, `http://host:port` or `host:port` (plain).
    """

    endpoints: tuple[str, ...]
    timeout_s: float = 5.0
    attempt_timeout_s: float = 0.5
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def secured(self) -> bool:
        """Whether any endpoint is https."""
        return any(endpoint.startswith("https://") for endpoint in self.endpoints)

    @property
    def files(self) -> Files:
        """The certificates, as the configuration calls them."""
        return Files(section="coordinator.etcd", ca_cert=self.ca_cert, cert_file=self.cert_file, key_file=self.key_file)


class Channel:
    """The calls to one endpoint, each made ready once."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel, user: str = "") -> None:
        self.endpoint = endpoint
        #: whom etcd takes us for: the common name of our certificate; "" without one
        self.user = user
        self._channel = channel
        kv, lease, maintenance = rpc.KVStub(channel), rpc.LeaseStub(channel), rpc.MaintenanceStub(channel)
        self.range: Any = kv.Range
        #: takes bytes: see `ifabric.store.encoding`
        self.txn: Any = channel.unary_unary(
            "/etcdserverpb.KV/Txn", request_serializer=_as_it_is, response_deserializer=rpc.TxnResponse.FromString
        )
        self.grant: Any = lease.LeaseGrant
        self.left: Any = lease.LeaseTimeToLive
        self.revoke: Any = lease.LeaseRevoke
        self.keep_alive: Any = lease.LeaseKeepAlive
        self.watch: Any = rpc.WatchStub(channel).Watch
        self.status: Any = maintenance.Status
        self.alarm: Any = maintenance.Alarm
        self.defragment: Any = maintenance.Defragment
        self.move_leader: Any = maintenance.MoveLeader
        self.compact: Any = kv.Compact
        self.members: Any = rpc.ClusterStub(channel).MemberList

    async def close(self) -> None:
        """Ends every call on it. Twice is harmless."""
        await self._channel.close()


class Connection(Protocol):
    """What a stream needs of the connection that it belongs to."""

    @property
    def channel(self) -> Channel: ...

    def rotate(self, failed: Channel) -> None: ...

    async def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int = 0) -> tuple[Got, int]: ...


def open_channel(endpoint: str, settings: EtcdSettings) -> Channel:
    """A channel that connects with its first call. `ConfigError` when a certificate file cannot be read."""
    return Channel(endpoint, open_line(endpoint, settings), user_of(settings))


def open_line(endpoint: str, settings: EtcdSettings) -> grpc.aio.Channel:
    """The same, for stubs of one's own."""
    scheme, _, target = endpoint.rpartition("://")
    if scheme == "https":
        credentials = grpc.ssl_channel_credentials(
            _pem(settings.ca_cert, "ca_cert"),
            _pem(settings.key_file, "key_file"),
            _pem(settings.cert_file, "cert_file"),
        )
        return grpc.aio.secure_channel(target, credentials, options=OPTIONS)
    return grpc.aio.insecure_channel(target, options=OPTIONS)


async def explain(endpoint: str, settings: EtcdSettings, error: grpc.aio.AioRpcError, *, timeout_s: float) -> Trouble:
    """Why an endpoint does not answer: what TLS has against it, or else what gRPC says."""
    secured = endpoint.startswith("https://")
    found = await diagnose(endpoint, settings.files, ETCD, tls=secured, timeout_s=timeout_s)
    if found is not None and (found.certain or secured):
        return Trouble(f"{endpoint}: {found.sentence}", found.certain)
    return Trouble(f"{endpoint}: {error.code().name.lower()}, {(error.details() or '')[:300]}", certain=False)


def user_of(settings: EtcdSettings) -> str:
    """The common name of the client certificate, which is etcd's user. "" when there is none, or none that is read."""
    pem = _pem(settings.cert_file, "cert_file")
    try:
        return pki.facts(pem).common_name if pem is not None else ""
    except ValueError:
        return ""  # gRPC says what is wrong with it when it connects


def forbidden(user: str, details: str) -> Forbidden:
    """Of etcd's access control. `user`: the common name of our certificate; "" when we showed none."""
    who = f"the user {user}, the common name of the certificate" if user else "anybody without a client certificate"
    return Forbidden(f"etcd does not allow this to {who}: {details}; nothing was done", what="etcd", user=user)


def _as_it_is(message: bytes) -> bytes:
    return message


def _pem(path: str | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"coordinator.etcd.{name}: cannot read {path}: {error.strerror}") from None
