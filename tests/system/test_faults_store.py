"""etcd frozen, killed, full: work is refused with a reason, what is held is kept, and all comes back by itself."""

from __future__ import annotations

import grpc
import pytest
from aetcd import rpc

from ifabric.clock import monotonic
from ifabric.errors import StoreFull, Unavailable
from ifabric.store.base import Delete, Put, Txn
from ifabric.testing.daemons import RealDaemon
from tests.system.conftest import Cluster, Load, around, eventually, servers


async def is_ready(daemon: RealDaemon) -> bool:
    return await daemon.ready() == (200, [])


async def says_that_etcd_is_gone(daemon: RealDaemon) -> bool:
    return await daemon.ready() == (503, ["etcd is disconnected"])


@pytest.mark.parametrize("fault", ["frozen", pytest.param("killed", marks=pytest.mark.slow)])
async def test_without_etcd_new_work_is_refused_soon_and_nothing_acknowledged_is_lost(
    fragile: Cluster, fault: str
) -> None:
    daemons = await fragile.many(2)
    await fragile.ask("hello", "probe", ttl_s=60)
    load = await Load(fragile, agents=20).start()
    await load.reach(200)
    began = monotonic()
    if fault == "frozen":
        fragile.etcd.freeze()
    else:
        await fragile.etcd.kill()
    for daemon in daemons:
        await eventually(lambda daemon=daemon: says_that_etcd_is_gone(daemon))
    noticed_s = monotonic() - began

    async def refused_at_once() -> Unavailable | None:
        """A refusal that the daemon gave of itself, before its own patience with etcd was spent."""
        try:
            await fragile.ask("submit", "probe", tasks=[{"id": f"p{monotonic()}"}], timeout_s=1.0)
        except Unavailable as error:
            return error if error.facts.get("what") == "etcd" else None
        raise AssertionError("it was accepted, without etcd")

    error = await eventually(refused_at_once, within_s=3.5)  # timeout_seconds is 5
    refused_s = monotonic() - began
    assert error.retryable
    if fault == "frozen":
        fragile.etcd.thaw()
    else:
        await fragile.etcd.start_again()
    began = monotonic()
    for daemon in daemons:
        await eventually(lambda daemon=daemon: is_ready(daemon))
    ready_s = monotonic() - began
    await load.reach(len(load.completed) + 200)
    working_s = monotonic() - began
    await load.stop()
    assert all("Unavailable" in error for error in load.errors), load.errors
    verdict = await load.nothing_acknowledged_is_lost()
    assert verdict.held, verdict
    print(
        f"\netcd {fault}: /readyz of 2 daemons said so after {noticed_s:.2f} s, work was refused after {refused_s:.2f} s; "
        f"ready again {ready_s:.2f} s after its return, 200 tasks more after {working_s:.2f} s; {load.figures()}, "
        f"{len(load.errors)} errors reached an agent"
    )


async def test_an_idle_daemon_notices_that_etcd_froze_and_that_it_came_back(fragile: Cluster) -> None:
    daemon = await fragile.daemon(config={"actors": []})
    fragile.etcd.freeze()
    await eventually(lambda: says_that_etcd_is_gone(daemon))
    fragile.etcd.thaw()
    await eventually(lambda: is_ready(daemon))


@pytest.mark.slow
async def test_a_full_etcd_refuses_new_work_keeps_what_is_held_and_recovers_when_given_room() -> None:
    async with servers(quota_bytes=4 << 20) as pair, around(*pair) as cluster:
        daemon = await cluster.daemon()
        await cluster.ask("hello", "a", ttl_s=30)
        await cluster.ask("submit", "a", tasks=[{"id": f"t{n}"} for n in range(3)])
        claim = await cluster.ask("claim", "a", task="t0", request_id="r0")
        await fill(cluster)

        async def says_full() -> bool:
            return await daemon.ready() == (503, ["etcd is full"])

        await eventually(says_full)
        assert (await daemon.health())["etcd"] == "full"
        for verb, body in (
            ("claim", {"task": "t1"}),
            ("claim", {"task": "t2", "request_id": "r1"}),
            ("next", {}),
            ("submit", {"tasks": [{"id": "t9"}]}),
            ("complete", {"task": "t0", "fence": claim["fence"]}),
        ):
            with pytest.raises(StoreFull) as refused:
                await cluster.ask(verb, "a", **body)
            assert refused.value.retryable
        with pytest.raises(StoreFull):
            await cluster.ask("hello", "b")
        held = {"task": "t0", "fence": claim["fence"]}
        renewed = await cluster.ask("renew", "a", claims=[held])
        assert renewed["ttl_s"] > 20
        assert (await cluster.ask("get", "a", task="t0"))["state"] == "claimed"
        await make_room(cluster)
        await eventually(lambda: is_ready(daemon))
        assert (await cluster.ask("complete", "a", **held))["state"] == "done"
        assert (await cluster.ask("claim", "a", task="t2", request_id="r1"))["attempt"] == 1
        assert (await cluster.ask("next", "a"))["task"] == "t1"


async def fill(cluster: Cluster) -> None:
    """Writes until etcd says that it is full."""
    try:
        for number in range(1000):
            await cluster.store.txn(Txn((), (Put(b"filler/%d" % number, bytes(200_000)),)))
    except StoreFull:
        return
    raise AssertionError("etcd took 200 MB into a quota of 4")


async def make_room(cluster: Cluster) -> None:
    """What the operator does: delete, compact, defragment, disarm."""
    answer = await cluster.store.txn(Txn((), (Delete(b"filler/", b"filler0"),)))
    async with grpc.aio.insecure_channel(cluster.etcd.url.removeprefix("http://")) as channel:
        await rpc.KVStub(channel).Compact(rpc.CompactionRequest(revision=answer.revision, physical=True))
        maintenance = rpc.MaintenanceStub(channel)
        await maintenance.Defragment(rpc.DefragmentRequest())
        member = (await maintenance.Status(rpc.StatusRequest())).header.member_id
        off = rpc.AlarmRequest.DEACTIVATE
        await maintenance.Alarm(rpc.AlarmRequest(action=off, memberID=member, alarm=rpc.AlarmType.Value("NOSPACE")))
