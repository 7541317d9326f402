"""Keeps leases alive over one long stream.

etcd answers a keep-alive from its leader's memory, without a proposal, so a stream carries thousands a second; a
stream for each (which is what a plain client opens) would cost ten times that. Whoever asks for a lease that is
already under way shares the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from aetcd import rpc

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import Unavailable
from ifabric.store.channel import Connection

#: an answer later than this means that the endpoint is in trouble, and the stream moves on
ANSWER_S = 1.0
#: what is asked within this time is sent in one go: sending wakes this process up, and so does each answer, and a
#: process that is up already does it for a third less
GATHER_S = 0.01


class KeepAlives:
    """Renews leases for one connection."""

    def __init__(self, etcd: Connection, clock: Clock) -> None:
        self._etcd = etcd
        self._clock = clock
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self._to_send: list[int] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._moving = False

    async def renew(self, lease: int, timeout_s: float) -> float:
        """The seconds that the lease has now, 0.0 when it is gone. Raises `Unavailable`."""
        future = self._waiting.get(lease)
        if future is None:
            future = self._waiting[lease] = asyncio.get_running_loop().create_future()
            self._to_send.append(lease)
            self._wake.set()
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name="etcd keep-alive")
        timer = asyncio.get_running_loop().call_later(timeout_s, _give_up, future)
        try:
            return await asyncio.shield(future)
        finally:
            timer.cancel()
            if future.done() and self._waiting.get(lease) is future:
                del self._waiting[lease]

    def move(self) -> None:
        """Goes on over the channel that is in use by now. What has no answer yet is asked again there."""
        self._moving = True
        self._wake.set()

    def close(self) -> None:
        """Ends the stream; whoever waits is told so."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for future in self._waiting.values():
            _give_up(future)
        self._waiting, self._to_send = {}, []

    async def _run(self) -> None:
        """Streams one after the other while there is anything to renew."""
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            self._moving = False
            channel = self._etcd.channel
            call = channel.keep_alive()
            reading = asyncio.create_task(self._read(call), name="etcd keep-alive answers")
            try:
                await self._write(call, reading)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                self._etcd.rotate(channel)
            finally:
                call.cancel()
                await cancel_and_wait(reading)
            self._to_send = [lease for lease, future in self._waiting.items() if not future.done()]
            await self._clock.sleep(0.05)

    async def _write(self, call: Any, reading: asyncio.Task[None]) -> None:
        """Sends what is to be sent until the stream breaks or owes an answer for too long."""
        reading.add_done_callback(lambda _: self._wake.set())
        while True:
            leases, self._to_send = self._to_send, []
            for lease in leases:
                await call.write(rpc.LeaseKeepAliveRequest(ID=lease))
            if self._to_send:
                continue
            self._wake.clear()
            if reading.done() or self._moving:
                return
            oldest = next(iter(self._waiting.values()), None)
            try:
                async with asyncio.timeout(None if oldest is None else ANSWER_S):
                    await self._wake.wait()
                await self._clock.sleep(GATHER_S)
            except TimeoutError:
                if oldest is not None and not oldest.done():
                    raise

    async def _read(self, call: Any) -> None:
        while True:
            answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            future = self._waiting.pop(answer.ID, None)
            if future is not None and not future.done():
                future.set_result(float(answer.TTL))


def _give_up(future: asyncio.Future[float]) -> None:
    if not future.done():
        future.set_exception(Unavailable("etcd does not answer a keep-alive.", what="etcd"))
