"""A message that NATS has delivered, to be answered at most once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nats.aio.msg import Msg

from ifabric.bus.base import Headers
from ifabric.bus.translation import error_headers
from ifabric.clock import monotonic
from ifabric.errors import TooLarge

NO_HEADERS: Headers = {}


class Publisher(Protocol):
    """What a delivery needs of its connection."""

    @property
    def max_payload_bytes(self) -> int: ...

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None) -> None: ...


class Delivery:
    """A message from NATS, to be answered at most once."""

    __slots__ = ("_answered", "_began", "_bus", "_done", "data", "headers", "reply", "subject")

    def __init__(self, bus: Publisher, msg: Msg, answered: Callable[[float, str | None], None] | None = None) -> None:
        self._bus = bus
        self._done = False
        #: the endpoint's statistics, told when the answer goes out
        self._answered = answered
        self._began = monotonic() if answered is not None else 0.0
        self.subject: str = msg.subject
        self.data: bytes = msg.data
        self.reply: str = msg.reply
        self.headers: Headers = msg.headers or NO_HEADERS

    async def respond(self, data: bytes, headers: Headers | None = None) -> None:
        if len(data) > self._bus.max_payload_bytes:
            raise TooLarge(f"the answer has {len(data)} bytes, more than NATS carries")
        self._end(None)
        if self.reply:
            await self._bus.publish(self.reply, data, headers)

    async def respond_error(self, status: int, sentence: str, data: bytes) -> None:
        self._end(f"{status}:{sentence}")
        if self.reply:
            await self._bus.publish(self.reply, data, error_headers(status, sentence))

    def drop(self) -> None:
        self._end(None)

    def _end(self, error: str | None) -> None:
        assert not self._done, "a message is answered once"
        self._done = True
        if self._answered is not None:
            self._answered(self._began, error)
