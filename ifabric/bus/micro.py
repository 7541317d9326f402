"""NATS micro services (ADR-32) that serve many requests at once.

`nats.micro` serves one request at a time for each endpoint and throws away what is queued when it stops. Discovery
and statistics are still its own; an endpoint is ours. It hands a message over in the turn of the loop in which it was
read from the socket: the subscription's queue is replaced by one that calls the sink, so no task has to wake up for
it. The sink is a bounded mailbox, which is the back-pressure.

This touches private names of nats-py; `tests/conformance/test_nats_contract.py` watches them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro.service import Endpoint as MicroEndpoint
from nats.micro.service import EndpointConfig, ServiceConfig
from nats.micro.service import Service as Micro

from ifabric.bus.base import Endpoint, Incoming
from ifabric.clock import monotonic
from ifabric.wire import subjects

#: makes a request of a message, or refuses it; the function is told when it was answered: (began, error or None)
Admit = Callable[[Msg, Callable[[float, str | None], None]], Incoming | None]


async def settled(client: Client) -> None:
    """Returns when the server has taken everything that was sent before, and we what it had sent.

    nats-py's `flush` writes its PING straight to the socket, past the commands that wait in its buffer, so one answer
    says nothing of them. By the time it has come, the buffer has been written; the second PING is behind it.
    """
    await client.flush()
    await client.flush()


class DirectQueue:
    """Takes the place of a subscription's queue: what is put into it is handled at once."""

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self.put_nowait = take

    def qsize(self) -> int:
        return 0

    def empty(self) -> bool:
        return True

    async def join(self) -> None:
        """Nothing ever waits here."""

    async def get(self) -> Msg:
        """Never returns: there is nothing to take out."""
        return await asyncio.get_running_loop().create_future()


class ConcurrentEndpoint(MicroEndpoint):  # type: ignore[misc]
    """An endpoint whose requests do not wait for each other."""

    def __init__(
        self,
        service: Micro,
        config: EndpointConfig,
        admit: Admit,
        sink: Callable[[Incoming], None],
    ) -> None:
        super().__init__(service, config)
        self._admit = admit
        self._sink = sink

    async def _start(self) -> None:
        subscription = await self._service._client.subscribe(
            self._subject, queue=self._queue_group, pending_bytes_limit=0
        )
        subscription._pending_queue = DirectQueue(self._take)
        self._subscription = subscription

    async def _stop(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            client = self._service._client
            await client._send_unsubscribe(subscription._id)
            await settled(client)
            client._remove_sub(subscription._id)

    def _take(self, msg: Msg) -> None:
        incoming = self._admit(msg, self.answered)
        if incoming is not None:
            self._num_requests += 1
            self._sink(incoming)

    def answered(self, began: float, error: str | None) -> None:
        """Counts an answer. ADR-32 wants nanoseconds."""
        self._processing_time += int((monotonic() - began) * 1e9)
        self._average_processing_time = self._processing_time // max(1, self._num_requests)
        if error is not None:
            self._num_errors += 1
            self._last_error = error[:200]


class MicroService(Micro):  # type: ignore[misc]
    """A discoverable service of concurrent endpoints."""

    def __init__(self, client: Client, name: str, version: str, description: str, admit: Admit) -> None:
        metadata = {"protocol_version": "1"}
        super().__init__(client, ServiceConfig(name, version, description, metadata, queue_group=name))
        self._admit = admit
        self._subscriptions: dict[str, Any] = {}

    async def open(self, endpoints: Sequence[Endpoint]) -> None:
        """Starts answering discovery, then subscribes the endpoints."""
        await self.start()
        for endpoint in endpoints:
            config = EndpointConfig(
                endpoint.name, _unused, self._queue_group, endpoint.subject, dict(endpoint.metadata)
            )
            served = ConcurrentEndpoint(self, config, self._admit, endpoint.sink)
            await served._start()
            self._endpoints.append(served)

    async def drain(self) -> None:
        """Takes no new requests; what the server had sent has been handed over when this returns."""
        try:
            await asyncio.gather(*(endpoint._stop() for endpoint in self._endpoints))
            for subscription in self._subscriptions.values():
                await subscription.unsubscribe()
        except (nats.errors.Error, OSError):
            pass  # without a connection nothing new can come
        self._subscriptions = {}
        self._stopped.set()

    # discovery is asked by strangers too: its answers go to inboxes only, as all answers do

    async def _handle_ping_request(self, msg: Msg) -> None:
        if subjects.may_answer(msg.reply):
            await super()._handle_ping_request(msg)

    async def _handle_info_request(self, msg: Msg) -> None:
        if subjects.may_answer(msg.reply):
            await super()._handle_info_request(msg)

    async def _handle_stats_request(self, msg: Msg) -> None:
        if subjects.may_answer(msg.reply):
            await super()._handle_stats_request(msg)

    def statistics(self) -> Mapping[str, Any]:
        """What ``$SRV.STATS`` answers."""
        found: Mapping[str, Any] = self.stats().to_dict()
        return found


async def _unused(_: object) -> None:
    raise AssertionError("a concurrent endpoint hands its messages to a sink")
