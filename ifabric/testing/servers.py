"""Real servers for tests, on free ports of loopback, in folders that are thrown away."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ifabric.clock import SystemClock
from ifabric.embedded import QUOTA_BYTES, Server, embedded_etcd, embedded_nats
from ifabric.programs import find_etcd, find_nats_server
from ifabric.scratch.servers import RealServer

__all__ = ["RealServer", "etcd_server", "nats_server"]


@contextlib.asynccontextmanager
async def _running(make: Callable[[Path], tuple[Server, str]]) -> AsyncIterator[RealServer]:
    with tempfile.TemporaryDirectory(prefix="ifabric-test-") as folder:
        server, url = make(Path(folder))
        real = RealServer(server, url)
        await server.start()
        try:
            yield real
        finally:
            await real.stop()


def etcd_server(*, quota_bytes: int = QUOTA_BYTES) -> contextlib.AbstractAsyncContextManager[RealServer]:
    """A single etcd."""
    return _running(lambda folder: embedded_etcd(find_etcd(), folder, 0, SystemClock(), quota_bytes=quota_bytes))


def nats_server() -> contextlib.AbstractAsyncContextManager[RealServer]:
    """A single nats-server with JetStream."""
    return _running(lambda folder: embedded_nats(find_nats_server(), folder, 0, SystemClock()))
