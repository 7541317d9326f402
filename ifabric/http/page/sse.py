"""Server-sent events: what is sent to everybody who looks, encoded once.

**One who does not keep up is let go.** A viewer has a short queue; when that is full, its stream ends, and its browser
asks again and begins with the history. A peer that takes nothing at all holds its connection until the kernel gives it
up (the listener's TCP_USER_TIMEOUT), and until then it still counts as a viewer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ifabric.cancellation import cancel_and_wait
from ifabric.wire.envelope import encode

#: pieces that may wait for one viewer; there is one a second
QUEUE_MAX = 8


def frame(event: str, data: Any) -> bytes:
    """One event. JSON has no line breaks of its own, so no content can begin another field."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), encode(data))


class Viewer:
    """Somebody who looks."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._told = asyncio.Event()
        #: nothing more is taken
        self.over = False

    def put(self, piece: bytes) -> None:
        """Hands over a piece; the stream ends when too many wait already."""
        if len(self._waiting) >= QUEUE_MAX:
            self.close()
        elif not self.over:
            self._waiting.append(piece)
            self._told.set()

    def close(self) -> None:
        """Ends the stream; what waits is not sent."""
        self.over = True
        self._waiting.clear()
        self._told.set()

    async def next(self) -> bytes | None:
        """The next piece; None when the stream is over."""
        while not self.over:
            if self._waiting:
                return self._waiting.popleft()
            self._told.clear()
            await self._told.wait()
        return None


class Stream(Response):
    """An answer that goes on until the viewer leaves, is let go, or the page ends."""

    def __init__(self, viewer: Viewer, left: Callable[[Viewer], None], headers: Mapping[str, str]) -> None:
        self._viewer = viewer
        self._left = left
        self._head = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch(receive), name="page: viewer")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._head})
            while (piece := await self._viewer.next()) is not None:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._viewer.close()
            self._left(self._viewer)
            await cancel_and_wait(watching)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._viewer.close()
