"""One gRPC channel to one etcd endpoint: TLS, keepalive, and the calls we make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from aetcd import rpc

from ifabric.errors import ConfigError
from ifabric.store.base import Got

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


class Channel:
    """The calls to one endpoint, each made ready once."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel) -> None:
        self.endpoint = endpoint
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
    scheme, _, target = endpoint.rpartition("://")
    if scheme == "https":
        credentials = grpc.ssl_channel_credentials(
            _pem(settings.ca_cert, "ca_cert"),
            _pem(settings.key_file, "key_file"),
            _pem(settings.cert_file, "cert_file"),
        )
        return Channel(endpoint, grpc.aio.secure_channel(target, credentials, options=OPTIONS))
    return Channel(endpoint, grpc.aio.insecure_channel(target, options=OPTIONS))


def _as_it_is(message: bytes) -> bytes:
    return message


def _pem(path: str | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"coordinator.etcd.{name}: cannot read {path}: {error.strerror}") from None
