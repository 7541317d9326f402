"""nats-server killed and started again: everybody reconnects and goes on, and nothing old is carried out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ifabric.clock import monotonic
from ifabric.errors import Unavailable
from ifabric.testing.proxy import Proxy
from ifabric.wire import subjects
from tests.system.conftest import Cluster, Load, eventually


@pytest.mark.slow
async def test_daemons_and_agents_outlive_the_death_of_nats(fragile: Cluster) -> None:
    daemons = await fragile.many(2)
    load = await Load(fragile, agents=20).start()
    await load.reach(200)
    await fragile.nats.kill()

    async def says_that_nats_is_gone() -> bool:
        return all([await daemon.ready() == (503, ["nats is disconnected"]) for daemon in daemons])

    await eventually(says_that_nats_is_gone)
    began = monotonic()
    await fragile.nats.start_again()
    await load.reach(len(load.completed) + 200)
    working_s = monotonic() - began

    async def ready() -> bool:
        return all([await daemon.ready() == (200, []) for daemon in daemons])

    await eventually(ready)
    await load.stop()
    assert load.errors == []  # it was back before the SDK's patience was spent
    verdict = await load.verdict()
    assert verdict.held, verdict
    assert [await daemon.metric("if_bus_reconnects_total") for daemon in daemons] == [1, 1]
    assert [await daemon.metric("if_actor_restarts_total") for daemon in daemons] == [0, 0]
    print(f"\nnats killed: 200 tasks more {working_s:.2f} s after its return; {load.figures()}")


async def test_a_request_made_without_a_connection_fails_at_once_and_is_not_delivered_later(fragile: Cluster) -> None:
    await fragile.daemon()
    await fragile.ask("hello", "a", ttl_s=60)
    await fragile.ask("submit", "a", tasks=[{"id": "t"}, {"id": "u"}])
    agent = await fragile.client("b", timeout_s=0.5, ttl_s=60)
    await agent.hello()
    await fragile.nats.kill()
    subject = subjects.request("coordinator", "claim", "a")
    body = msgspec.json.encode({"task": "t", "request_id": "stale"})

    async def cut_off() -> bool:
        return not fragile.bus.connected

    await eventually(cut_off)
    with pytest.raises(Unavailable, match="not connected"):
        await fragile.bus.request(subject, body, timeout_s=5.0)
    with pytest.raises(Unavailable, match="not connected"):
        await fragile.bus.publish(subject, body)
    with pytest.raises(Unavailable):
        await agent.claim("t")
    await fragile.nats.start_again()

    async def granted() -> dict[str, Any] | None:
        try:
            return await fragile.ask("claim", "a", task="u")
        except Unavailable:
            return None

    await eventually(granted)
    assert await agent.claim("t")  # the same connections carry requests again, and nobody had taken it before
    record = await fragile.record("t")
    assert (record.generation, record.session) == (1, "b")


async def test_an_answer_made_without_a_connection_is_not_delivered_later(fragile: Cluster) -> None:
    """The daemon's side of it: what it wanted to say while it was cut off is not said when it is back."""
    inbox = "_INBOX.test.r1"
    got: list[bytes] = []
    async with Proxy("127.0.0.1", fragile.nats.port) as proxy:
        daemon = await fragile.daemon(nats=f"nats://127.0.0.1:{proxy.port}")
        subscription = await fragile.bus.subscribe(inbox, lambda incoming: got.append(incoming.data))
        await fragile.ask("hello", "a", ttl_s=60)
        subject = subjects.request("coordinator", "next", "a")
        await fragile.bus.publish(subject, msgspec.json.encode({"wait_s": 1.0}), reply=inbox)

        async def parked() -> bool:
            return await daemon.metric("if_coordinator_waiters") == 1

        await eventually(parked)
        proxy.disable()

        async def answered() -> bool:
            return await daemon.metric("if_actor_messages_total", verb="next") == 1

        await eventually(answered)
        proxy.enable()
        async with asyncio.timeout(10):
            while await daemon.ready() != (200, []):
                await asyncio.sleep(0.02)
        assert (await fragile.ask("renew", "a"))["ttl_s"] > 0  # behind it on the same connection
        assert got == []
        await subscription.unsubscribe()


async def test_a_daemon_that_is_told_to_stop_while_nats_is_gone_stops_in_order(fragile: Cluster) -> None:
    daemon = await fragile.daemon()
    await fragile.nats.kill()

    async def cut_off() -> bool:
        return await daemon.ready() == (503, ["nats is disconnected"])

    await eventually(cut_off)
    assert await daemon.terminate() == 0
    assert "could not be stopped" not in daemon.log_text()
