"""A TCP proxy that breaks connections on purpose: it holds what flows one way, cuts, and turns new ones away.

The directions are toxiproxy's: *upstream* is what the client sends to the server, *downstream* what it gets back.
Holding `downstream` is how a reply is lost after its request was carried out.

    async with Proxy("127.0.0.1", 2379) as proxy:       # the client is given proxy.port
        proxy.hold("downstream")                        # nothing comes back ...
        proxy.reset_peer()                              # ... and then the connection breaks
        proxy.release("downstream")
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from ifabric.cancellation import cancel_and_wait

Direction = Literal["upstream", "downstream"]
_CHUNK = 65_536
#: SO_LINGER of zero seconds: closing sends a reset instead of an end
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to one address while its block runs."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._gates: dict[Direction, asyncio.Event] = {"upstream": asyncio.Event(), "downstream": asyncio.Event()}
        for gate in self._gates.values():
            gate.set()
        self._enabled = True
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        #: bytes that arrived from either side, forwarded or held
        self.arrived: dict[Direction, int] = {"upstream": 0, "downstream": 0}
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset_peer()
        await cancel_and_wait(*self._links)
        await self._server.wait_closed()

    def hold(self, direction: Direction) -> None:
        """Forwards nothing that way until `release`; the connections stay."""
        self._gates[direction].clear()

    def release(self, direction: Direction) -> None:
        """Forwards what was held, and goes on."""
        self._gates[direction].set()

    def reset_peer(self) -> None:
        """Breaks every connection; what was held is lost."""
        for task, writers in self._links.items():
            for writer in writers:
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
            task.cancel()

    def disable(self) -> None:
        """As `reset_peer`, and new connections are closed at once until `enable`."""
        self._enabled = False
        self.reset_peer()

    def enable(self) -> None:
        """Takes new connections again."""
        self._enabled = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = [writer]
        try:
            if self._enabled:
                await self._forward(reader, writer, self._links[task])
        except (OSError, asyncio.CancelledError):
            pass  # the connection broke, or was broken by `reset_peer`: both ends are closed below
        finally:
            for one in self._links.pop(task):
                one.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, writers: list[asyncio.StreamWriter]
    ) -> None:
        from_server, to_server = await asyncio.open_connection(*self._target)
        writers.append(to_server)
        ways = (
            asyncio.create_task(self._pump("upstream", reader, to_server), name="proxy upstream"),
            asyncio.create_task(self._pump("downstream", from_server, writer), name="proxy downstream"),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*ways)

    async def _pump(self, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                self.arrived[direction] += len(data)
                await self._gates[direction].wait()
                sink.write(data)
                await sink.drain()
