"""A running etcd or nats-server that can be hurt."""

from __future__ import annotations

import contextlib
import os
import signal

from ifabric.embedded import Server


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
