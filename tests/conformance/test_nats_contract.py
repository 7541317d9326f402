"""The private names of nats-py that the bus builds on. When one of these fails, a new nats-py needs a look, not a workaround."""

from __future__ import annotations

import inspect

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.micro.service import Endpoint, EndpointConfig, Service, ServiceConfig


def test_an_endpoint_has_the_fields_that_ours_counts_in() -> None:
    service = Service(Client(), ServiceConfig("n", "1.0.0"))
    made = Endpoint(service, EndpointConfig("e", handler=None, subject="s", queue_group="q"))  # type: ignore[arg-type]
    for name in (
        "_service",
        "_subject",
        "_queue_group",
        "_subscription",
        "_num_requests",
        "_num_errors",
        "_last_error",
    ):
        assert hasattr(made, name)
    assert (made._processing_time, made._average_processing_time) == (0, 0)
    for name in ("_client", "_endpoints", "_subscriptions", "_stopped", "_queue_group"):
        assert hasattr(service, name)


def test_a_message_is_put_into_the_subscriptions_queue_without_waiting() -> None:
    source = inspect.getsource(Client._process_msg)
    assert "sub._pending_queue.put_nowait(msg)" in source
    assert "sub._pending_bytes_limit > 0" in source
    assert "await self._pending_queue.join()" in inspect.getsource(Subscription._drain)


def test_a_command_can_be_handed_to_the_connection() -> None:
    assert list(inspect.signature(Client._send_command).parameters) == ["self", "cmd", "priority"]


def test_a_flush_overtakes_the_buffer_which_is_why_ours_flushes_twice() -> None:
    """When this fails, nats-py has mended it, and one flush will do."""
    assert "self._transport.write(PING_PROTO)" in inspect.getsource(Client._send_ping)
    for name in ("_send_unsubscribe", "_remove_sub"):
        assert hasattr(Client, name)
