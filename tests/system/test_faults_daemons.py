"""Daemons that are killed, frozen, stopped: work goes on, and nothing is done twice."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from ifabric.errors import FabricError, NoTaskMatches, StartupError, Unavailable
from ifabric.testing.proxy import Proxy
from tests.system.conftest import Cluster, Load, eventually

#: daemons are killed and frozen under load
pytestmark = pytest.mark.slow


@pytest.mark.slow
async def test_a_daemon_killed_under_load_costs_no_task_and_no_agent_an_error(cluster: Cluster) -> None:
    daemons = await cluster.many(3)
    load = await Load(cluster, agents=50).start()
    await load.reach(200)
    await daemons[0].kill()
    await load.reach(len(load.completed) + 300)
    await load.stop()
    assert load.errors == []
    verdict = await load.verdict()
    assert verdict.held, verdict
    assert verdict.completed == len(load.submitted)
    print(f"\n1 of 3 killed: {verdict.completed} tasks by 50 agents, {load.figures()}")


@pytest.mark.slow
async def test_a_frozen_daemon_holds_others_up_for_moments_and_does_no_harm_on_waking(cluster: Cluster) -> None:
    daemons = await cluster.many(3)
    load = await Load(cluster, agents=50, pause_s=0.05).start()
    await load.reach(200)
    daemons[0].freeze()
    await asyncio.sleep(10.0)  # how long the fault lasts
    daemons[0].thaw()

    async def rejoined() -> bool:
        return await daemons[0].ready() == (200, []) and "starting again" in daemons[0].log_text()

    await eventually(rejoined)
    assert await daemons[0].metric("if_actor_dropped_total", why="frozen") > 0
    served = await daemons[0].metric("if_actor_messages_total", outcome="ok")

    async def serves_again() -> bool:
        return await daemons[0].metric("if_actor_messages_total", outcome="ok") > served

    await eventually(serves_again)
    await load.stop()
    assert load.errors == []
    verdict = await load.verdict()
    assert verdict.held, verdict
    print(f"\n1 of 3 frozen for 10 s: {verdict.completed} tasks by 50 agents, {load.figures()}")


async def test_what_waited_for_a_frozen_daemon_is_dropped_and_not_carried_out(cluster: Cluster) -> None:
    daemon = await cluster.daemon()
    await cluster.ask("hello", "a", ttl_s=60)
    await cluster.ask("submit", "a", tasks=[{"id": "t"}])
    daemon.freeze()
    with pytest.raises(Unavailable, match="no answer in time"):
        await cluster.ask("claim", "a", task="t", timeout_s=3.0)  # as long as the daemon calls frozen, and more
    daemon.thaw()

    async def rejoined() -> bool:
        return (await daemon.metric("if_actor_dropped_total", why="frozen"), await daemon.ready()) == (1, (200, []))

    await eventually(rejoined)
    assert (await cluster.record("t")).state == "pending"

    async def granted() -> dict[str, Any] | None:
        try:
            return await cluster.ask("claim", "a", task="t")
        except Unavailable:
            return None  # it is about to mount its endpoints again

    assert (await eventually(granted))["attempt"] == 1


async def test_a_daemon_that_is_told_to_stop_hands_its_work_over_without_one_error(cluster: Cluster) -> None:
    daemons = await cluster.many(2)
    load = await Load(cluster, agents=30).start()
    await load.reach(150)
    assert await daemons[0].terminate() == 0
    await load.reach(len(load.completed) + 150)
    await load.stop()
    assert load.errors == []
    verdict = await load.verdict()
    assert verdict.held, verdict
    print(f"\n1 of 2 told to stop: {verdict.completed} tasks by 30 agents, {load.figures()}")


async def test_the_last_daemon_answers_all_that_it_took_and_takes_nothing_new(cluster: Cluster) -> None:
    daemon = await cluster.daemon()
    await cluster.ask("hello", "a", ttl_s=60)
    polls = [asyncio.create_task(cluster.ask("next", "a", wait_s=30, timeout_s=25)) for _ in range(20)]

    async def parked() -> bool:
        return await daemon.metric("if_coordinator_waiters") == 20

    await eventually(parked)
    answered, refused = 0, []

    async def submit(number: int) -> None:
        """One request after the other, until nobody is there to take it."""
        nonlocal answered
        while True:
            try:
                await cluster.ask("submit", "a", tasks=[{"id": f"{number}.{answered}", "needs": ["nothing-has-it"]}])
                answered += 1
            except FabricError as error:
                refused.append(error)
                if error.facts.get("reason") == "no_responders":
                    return

    busy = [asyncio.create_task(submit(number)) for number in range(40)]

    async def under_way() -> bool:
        return answered > 200

    await eventually(under_way)
    assert await daemon.terminate() == 0
    async with asyncio.timeout(10):
        await asyncio.gather(*busy)
        ends = await asyncio.gather(*polls, return_exceptions=True)
    assert {error.facts.get("reason") for error in refused} == {"no_responders"}  # and none was left unanswered
    assert {repr(end.facts["what"]) for end in ends if isinstance(end, Unavailable)} == {"'draining'"}, ends
    assert len(await cluster.all_records()) == answered
    assert "not everything was answered" not in daemon.log_text()


async def test_a_daemon_that_is_told_to_stop_waits_for_etcd_and_answers_what_it_had_begun(cluster: Cluster) -> None:
    async with Proxy("127.0.0.1", cluster.etcd.port) as proxy:
        daemon = await cluster.daemon(etcd=f"http://127.0.0.1:{proxy.port}")
        await cluster.ask("hello", "a", ttl_s=60)
        await cluster.ask("submit", "a", tasks=[{"id": "t"}])
        proxy.hold("downstream")
        asking = asyncio.create_task(cluster.ask("claim", "a", task="t", timeout_s=10.0))

        async def begun() -> bool:
            return (await cluster.record("t")).state == "claimed"

        await eventually(begun)
        daemon.signal(signal.SIGTERM)

        async def asked_etcd_again() -> bool:
            return await daemon.metric("if_store_commit_retries_total", why="unknown") > 0

        await eventually(asked_etcd_again)  # half a second, and it is still there for this one request
        assert "draining" in (await daemon.ready())[1]
        proxy.release("downstream")
        assert (await asking)["fence"] == (await cluster.record("t")).fence
        assert await daemon.wait() == 0


@pytest.mark.slow
async def test_claims_outlive_the_death_of_every_daemon_and_the_dead_still_expire(cluster: Cluster) -> None:
    daemons = await cluster.many(2)
    await cluster.ask("hello", "kept", ttl_s=60)
    await cluster.ask("hello", "gone", ttl_s=2)
    await cluster.ask("submit", "kept", tasks=[{"id": f"t{n}"} for n in range(20)])
    fences = {f"t{n}": (await cluster.ask("claim", "kept", task=f"t{n}"))["fence"] for n in range(10)}
    dead = {f"t{n}": (await cluster.ask("claim", "gone", task=f"t{n}"))["fence"] for n in range(10, 20)}
    await asyncio.gather(*(daemon.kill() for daemon in daemons))

    async def lease_has_ended() -> bool:
        return await cluster.store.get(b"sessions/gone") is None  # while no daemon is there to see it

    await eventually(lease_has_ended)
    await asyncio.gather(*(daemon.start() for daemon in daemons))
    held = [{"task": task, "fence": fence} for task, fence in fences.items()]
    renewed = await cluster.ask("renew", "kept", claims=held)
    assert (renewed.get("lost", []), renewed.get("unnamed", [])) == ([], [])

    async def given_back() -> bool:
        return all([(await cluster.record(task)).state == "pending" for task in dead])

    await eventually(given_back)
    await cluster.ask("hello", "next", ttl_s=60)
    for task, fence in dead.items():
        assert (await cluster.ask("claim", "next", task=task))["fence"] > fence
    for task, fence in fences.items():
        assert (await cluster.ask("complete", "kept", task=task, fence=fence))["state"] == "done"
    with pytest.raises(NoTaskMatches):
        await cluster.ask("next", "next")


async def test_a_fabric_without_residents_starts_is_ready_and_stops(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ifabric_actors.py").write_text("raise ModuleNotFoundError('hidden', name='ifabric_actors')\n")
    hidden = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(StartupError, match="there is no module 'ifabric_actors'"):
        await cluster.another(environment=hidden).start()
    daemon = await cluster.daemon(config={"actors": []}, environment=hidden)
    assert await daemon.ready() == (200, [])
    assert await daemon.terminate() == 0
