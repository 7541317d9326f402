"""Answers that get lost, go to the wrong place, or come too late to matter."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ifabric.embedded import die_with_parent
from ifabric.errors import ClaimTaken, Conflict, Unavailable
from ifabric.testing.proxy import Proxy
from ifabric.wire import subjects
from ifabric_actors.coordinator import records
from tests.system.conftest import Cluster, around, eventually, servers

#: replies are lost and waited for
pytestmark = pytest.mark.slow


async def prepared(cluster: Cluster) -> None:
    """A session, tasks, and one claim before: what a claim needs besides its own commit is there."""
    await cluster.ask("hello", "a", ttl_s=60)
    await cluster.ask("submit", "a", tasks=[{"id": f"t{n}", "priority": -n} for n in range(4)])
    assert (await cluster.ask("next", "a", request_id="r0"))["task"] == "t0"


async def the_claim_of_t1(cluster: Cluster) -> records.Task | None:
    """Its record, once somebody holds it."""
    record = await cluster.record("t1")
    return record if record.state == "claimed" else None


async def nothing_else_is_held(cluster: Cluster, claimed: records.Task) -> bool:
    """`next` was carried out once: it took t1, and a retry took nothing more."""
    states = {task: record.state for task, record in (await cluster.all_records()).items()}
    return states == {"t0": "claimed", "t1": "claimed", "t2": "pending", "t3": "pending"} and (
        await cluster.record("t1") == claimed
    )


async def test_an_answer_lost_on_its_way_to_nats_is_given_again_by_another_daemon(cluster: Cluster) -> None:
    async with Proxy("127.0.0.1", cluster.nats.port) as proxy:
        await cluster.daemon(nats=f"nats://127.0.0.1:{proxy.port}")
        await prepared(cluster)
        proxy.hold("upstream")  # the daemon hears, and is not heard
        with pytest.raises(Unavailable, match="no answer in time"):
            await cluster.ask("next", "a", request_id="r1", timeout_s=1.0)
        claimed = await the_claim_of_t1(cluster)
        assert claimed is not None
        proxy.disable()
        await cluster.daemon()
        reply = await cluster.ask("next", "a", request_id="r1")
        assert (reply["task"], reply["fence"], reply["attempt"]) == ("t1", claimed.fence, 1)
        assert await nothing_else_is_held(cluster, claimed)
        with pytest.raises(Conflict):
            await cluster.ask("claim", "a", task="t2", request_id="r1")


@pytest.mark.parametrize("request_id", ["r1", None])
async def test_an_answer_lost_on_its_way_from_etcd_is_recognised_by_the_daemon_that_waited_for_it(
    cluster: Cluster, request_id: str | None
) -> None:
    async with Proxy("127.0.0.1", cluster.etcd.port) as proxy:
        daemon = await cluster.daemon(etcd=f"http://127.0.0.1:{proxy.port}")
        await prepared(cluster)
        proxy.hold("downstream")
        asking = asyncio.create_task(cluster.ask("next", "a", request_id=request_id, timeout_s=10.0))
        claimed = await eventually(lambda: the_claim_of_t1(cluster))
        proxy.reset_peer()
        proxy.release("downstream")
        reply = await asking
        assert (reply["task"], reply["fence"], reply["attempt"]) == ("t1", claimed.fence, 1)
        assert await nothing_else_is_held(cluster, claimed)
        assert await daemon.metric("if_store_commit_retries_total", why="unknown") > 0


async def test_every_daemon_gives_the_first_answer_while_one_waits_for_its_own_from_etcd(cluster: Cluster) -> None:
    async with Proxy("127.0.0.1", cluster.etcd.port) as proxy, answers(cluster, "_INBOX.test.r1") as got:
        await cluster.daemon(etcd=f"http://127.0.0.1:{proxy.port}")
        await prepared(cluster)
        proxy.hold("downstream")
        subject = subjects.request("coordinator", "next", "a")
        body = msgspec.json.encode({"request_id": "r1"})
        await cluster.bus.publish(subject, body, reply="_INBOX.test.r1")
        claimed = await eventually(lambda: the_claim_of_t1(cluster))
        await cluster.daemon()

        async def answered() -> list[Any]:
            await cluster.bus.publish(subject, body, reply="_INBOX.test.r1")
            return [reply for reply in got if "fence" in reply]  # NATS gives some to the daemon that waits

        await eventually(answered)
        before = len(got)
        proxy.release("downstream")

        async def both() -> bool:
            return len(got) > before

        await eventually(both)
        assert {(reply["task"], reply["fence"]) for reply in got if "error" not in reply} == {("t1", claimed.fence)}
        assert await nothing_else_is_held(cluster, claimed)


async def test_an_agent_that_did_not_hear_that_its_task_is_done_hears_it_when_it_asks_again(cluster: Cluster) -> None:
    async with Proxy("127.0.0.1", cluster.nats.port) as proxy:
        await cluster.daemon()
        agent = await cluster.client("a", nats=f"nats://127.0.0.1:{proxy.port}")
        await agent.submit([{"id": "t"}])
        claim = await agent.claim("t")
        proxy.hold("downstream")
        completing = asyncio.create_task(claim.complete({"by": "a"}))

        async def done() -> bool:
            return (await cluster.record("t")).state == "done"

        await eventually(done)
        proxy.reset_peer()
        proxy.release("downstream")
        assert (await completing).state == "done"  # and not claim_lost, which any other request would get
        assert (await cluster.record("t")).fence == claim.fence


@contextlib.asynccontextmanager
async def answers(cluster: Cluster, subject: str) -> AsyncIterator[list[dict[str, Any]]]:
    """What arrives on a subject, decoded."""
    got: list[dict[str, Any]] = []
    subscription = await cluster.bus.subscribe(subject, lambda incoming: got.append(msgspec.json.decode(incoming.data)))
    yield got
    await subscription.unsubscribe()


@pytest.mark.parametrize(
    "reply",
    ["if.v1.coordinator.complete.victim", "evil.subject", "_INBOX", "_INBOXES.x", "$JS.API.STREAM.DELETE.IF_EVENTS"],
)
async def test_a_reply_subject_that_is_no_inbox_is_never_published_to(spoofed: Cluster, reply: str) -> None:
    cluster = spoofed
    daemon = cluster.daemons[0]
    spoofs = await daemon.metric("if_bus_spoofed_replies_total")
    handled = await daemon.metric("if_actor_messages_total", verb="hello")
    async with answers(cluster, reply) as seen:
        await cluster.bus.publish(subjects.request("coordinator", "hello", "a"), b"{}", reply=reply)
        assert (await cluster.ask("hello", "a"))["session"] == "a"  # behind it, on the same connection
        assert (await cluster.ask("hello", "a"))["session"] == "a"  # and behind the answer to the one before
        assert seen == []
    assert await daemon.metric("if_bus_spoofed_replies_total") == spoofs + 1
    assert await daemon.metric("if_actor_messages_total", verb="hello") == handled + 2  # it was not carried out either


@pytest.fixture(scope="module")
async def spoofed() -> AsyncIterator[Cluster]:
    """One daemon for all the reply subjects."""
    async with servers() as pair, around(*pair) as made:
        await made.daemon()
        yield made


#: claims a task, says its fence, and completes it when its next line of input comes
AGENT = """
import asyncio, sys
import ifabric
from ifabric.errors import ClaimLost

async def main(nats):
    async with ifabric.Client.connect(nats, session="slow", ttl_s=2) as client:
        claim = await client.claim("t")
        print(claim.fence, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        try:
            await claim.complete({"by": "slow"})
        except ClaimLost as error:
            print(error.code, error.facts["by"], error.facts["fence"], flush=True)
        else:
            print("completed", flush=True)

asyncio.run(main(sys.argv[1]))
"""


async def test_a_holder_that_slept_past_its_time_to_live_completes_nothing(cluster: Cluster) -> None:
    await cluster.daemon()
    other = await cluster.client("other", ttl_s=60)
    await other.submit([{"id": "t"}])
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, cluster.nats.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    fence = int(await agent.stdout.readline())
    with pytest.raises(ClaimTaken):
        await other.claim("t")
    agent.send_signal(signal.SIGSTOP)
    taken = await other.next(wait_s=20)
    assert taken.task == "t"
    assert taken.fence > fence
    agent.stdin.write(b"complete it\n")  # what it does first when it wakes
    agent.send_signal(signal.SIGCONT)
    said, _ = await asyncio.wait_for(agent.communicate(), 15)
    assert said.decode().split() == ["claim_lost", "other", str(taken.fence)]
    assert (await other.get("t")).session == "other"
    await taken.complete({"by": "other"})
    assert (await other.get("t")).result == {"by": "other"}
