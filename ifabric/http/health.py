"""What the HTTP port says about the process: alive, ready, healthy."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the whole, at one moment."""

    status: Literal["starting", "healthy", "degraded", "draining"]
    etcd: Literal["connected", "disconnected", "full"]
    nats: Literal["connected", "disconnected"]
    loop_lag_s: float
    version: str
    uptime_s: float
    #: why the daemon is not ready for requests; empty when it is
    not_ready: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: the supervision tree
    actors: dict[str, Any] = {}


class Status(Protocol):
    """Whoever can tell."""

    def snapshot(self) -> Snapshot: ...
