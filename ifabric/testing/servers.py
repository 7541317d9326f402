"""Real servers for tests, on free ports of loopback, in folders that are thrown away."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ifabric.clock import SystemClock
from ifabric.embedded import QUOTA_BYTES, Server, embedded_etcd, embedded_nats
from ifabric.programs import find_etcd, find_nats_server


class RealServer:
    """A running etcd or nats-server that can be hurt."""

    def __init__(self, server: Server, url: str) -> None:
        self._server = server
        self.url = url

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Its process."""
        pid = self._server.pid
        assert pid is not None, "the server does not run"
        return pid

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        lost = self._server.lost
        os.kill(self.pid, signal.SIGKILL)
        assert lost is not None
        await lost
        await self._server.stop()

    async def start_again(self) -> None:
        """On the same port and data."""
        await self._server.start()

    async def stop(self) -> None:
        """Orderly; also when it is frozen. Twice is harmless."""
        if self._server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
        await self._server.stop()


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
