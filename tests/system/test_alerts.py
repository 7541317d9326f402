"""Each alert of the runbook, before a real Prometheus: a real daemon is brought into the state, it fires, and it ends after.

The rules are the shipped ones, hurried (`scraping.hurried`). Two states cannot be had here. The disk of etcd cannot be made slow from outside
it, so EtcdHighDiskLatency is fed in its unit test only (`rules/etcd.yml`), and here it is seen that its series are there. And
`etcd_network_peer_round_trip_time_seconds` is there, with three members, but not slow.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import BreakerOpen, FabricError
from ifabric.testing.clusters import etcd_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.proxy import Proxy
from tests.conftest import needed
from tests.guests.bomb import forever, of_text, wat
from tests.system.conftest import Cluster, eventually
from tests.system.scraping import FABRIC, Prometheus, prometheus, target

pytestmark = pytest.mark.slow

#: quick to judge, and small enough that one guest fills the memory of all workers
CONFIG: dict[str, Any] = {
    "actors": ["coordinator", "governor", "chassis"],
    "governor": {
        "budget": {"cost_tracking_interval": 1},
        "circuit_breaker": {"failure_threshold": 3, "minimum_calls": 3, "half_open_probes": 1, "reset_timeout": 3},
    },
    "chassis": {
        "runtime": {"max_memory_mb": 192, "max_execution_time_seconds": 120, "max_cpu_percent": 20},
        "sandbox_pool": {"min_size": 1, "max_size": 1},
    },
}
OUT_OF_BOUNDS = of_text(wat("(drop (i32.load (i32.const 65533)))"))
#: writes to 176 MiB, and keeps them until it is ended
HOG = of_text(
    wat(
        "(drop (memory.grow (i32.const 2816)))"
        "(memory.fill (i32.const 65536) (i32.const 90) (i32.const 184549376))" + forever("")
    )
)


async def admitted(cluster: Cluster) -> str:
    reply = await cluster.ask("admit", "s", component="governor", breaker="openai/gpt-x")
    return str(reply["permit"])


async def put(cluster: Cluster, wasm: bytes) -> str:
    body = base64.b64encode(wasm).decode()
    return str((await cluster.ask("put", "guest", component="chassis", wasm=body, timeout_s=30.0))["module"])


@contextlib.asynccontextmanager
async def again_and_again(work: Callable[[int], Awaitable[Any]], pause_s: float = 0.02) -> AsyncIterator[None]:
    """Does it until the block ends, whatever becomes of each time."""

    async def go() -> None:
        for number in range(1_000_000):
            with contextlib.suppress(FabricError, TimeoutError):
                await work(number)
            await asyncio.sleep(pause_s)

    going = asyncio.create_task(go())
    try:
        yield
    finally:
        await cancel_and_wait(going)


@contextlib.asynccontextmanager
async def watched(folder: Path, daemon: RealDaemon, etcd: list[str]) -> AsyncIterator[Prometheus]:
    """A Prometheus that sees the daemon and etcd, and has begun to."""
    assert daemon.found is not None
    jobs = {"if-coordinator": [target(daemon.found.http)], "etcd": [target(url) for url in etcd]}
    async with prometheus(folder, jobs) as seen:

        async def scraped() -> bool:
            return set((await seen.targets()).values()) == {"up"}

        await eventually(scraped, 30.0)
        yield seen


def told(alert: dict[str, Any], playbook: str) -> None:
    """It says what an alert has to, with its templates filled in."""
    annotations = alert["annotations"]
    assert annotations["runbook_url"] == f"{FABRIC}/playbooks/{playbook}"
    assert annotations["summary"] and annotations["description"]
    assert not any("error expanding" in text or "{{" in text or "<no value>" in text for text in annotations.values())


async def claims(cluster: Cluster, number: int) -> None:
    """A task put on the board, claimed and completed."""
    task = f"alerts/{number}"
    await cluster.ask("submit", "a", tasks=[{"id": task}])
    got = await cluster.ask("claim", "a", task=task)
    await cluster.ask("complete", "a", task=task, fence=got["fence"])


async def test_breaker_budget_and_sandboxes_fire_and_end(cluster: Cluster, tmp_path: Path) -> None:
    """GovernorCircuitBreakerOpen, GovernorBudgetExhausted, ChassisSandboxEscape, ChassisMemoryHigh."""
    daemon = await cluster.daemon(config=CONFIG)
    async with watched(tmp_path / "prometheus", daemon, [cluster.etcd.url]) as seen:
        for _ in range(3):
            permit = await admitted(cluster)
            await cluster.ask(
                "report", "s", component="governor", permit=permit, outcome="failure", breaker="openai/gpt-x"
            )
        with pytest.raises(BreakerOpen):
            await admitted(cluster)
        told(await seen.fires("GovernorCircuitBreakerOpen"), "breaker")

        async def closed() -> bool:
            with contextlib.suppress(BreakerOpen):
                permit = await admitted(cluster)
                answer = await cluster.ask(
                    "report", "s", component="governor", permit=permit, outcome="success", breaker="openai/gpt-x"
                )
                return bool(answer["state"] == "closed")
            return False

        await eventually(closed, 30.0)
        await seen.resolves("GovernorCircuitBreakerOpen")

        await cluster.ask("account", "op", component="governor", admin=True, account="shop", limit_micro_usd=1_000_000)
        await cluster.ask("hello", "rich", ttl_s=600)
        await cluster.ask("spend", "rich", component="governor", entry="all", amount_micro_usd=39_500_000)
        alert = await seen.fires("GovernorBudgetExhausted")
        told(alert, "budget")
        assert alert["labels"]["account"] == "@"
        balance = await cluster.ask("balance", "rich", component="governor")
        own = balance["path"][0]["account"]
        await cluster.ask("account", "op", component="governor", admin=True, account=own, limit_micro_usd=900_000_000)
        await seen.resolves("GovernorBudgetExhausted")

        module = await put(cluster, OUT_OF_BOUNDS())
        with pytest.raises(FabricError, match="trap"):
            await cluster.ask("run", "guest", component="chassis", module=module, timeout_s=30.0)
        alert = await seen.fires("ChassisSandboxEscape")
        told(alert, "sandbox-violation")
        assert alert["labels"]["security"] == "high"
        assert "1 of kind trap" in alert["annotations"]["description"]
        await seen.resolves("ChassisSandboxEscape")

        module = await put(cluster, HOG())
        hog = asyncio.create_task(
            cluster.ask("run", "guest", component="chassis", module=module, limits={"wall_s": 60.0}, timeout_s=90.0)
        )
        told(await seen.fires("ChassisMemoryHigh"), "sandbox-memory")
        run = (await cluster.ask("runs", "op", component="chassis"))["runs"][0]["run"]
        await cluster.ask("kill", "op", component="chassis", admin=True, run=run)
        with pytest.raises(FabricError):
            await hog
        await seen.resolves("ChassisMemoryHigh")


async def test_an_etcd_that_answers_late_makes_claims_late(cluster: Cluster, tmp_path: Path) -> None:
    """CoordinatorHighLatency: each answer of etcd is held for some hundredths of a second, and then is not."""
    async with Proxy("127.0.0.1", cluster.etcd.port) as proxy:
        daemon = await cluster.daemon(etcd=f"http://127.0.0.1:{proxy.port}", config={"actors": ["coordinator"]})

        async def late(_: int) -> None:
            proxy.hold("downstream")
            await asyncio.sleep(0.05)
            proxy.release("downstream")

        async with watched(tmp_path / "prometheus", daemon, [cluster.etcd.url]) as seen:
            await cluster.ask("hello", "a", ttl_s=600)
            async with again_and_again(lambda number: claims(cluster, number)):
                async with again_and_again(late, pause_s=0.002):
                    alert = await seen.fires("CoordinatorHighLatency")
                    told(alert, "latency")
                    assert target(str(daemon.found and daemon.found.http)) in alert["annotations"]["description"]
                    p95 = await seen.value("if_coordinator_claim_latency_p95")
                    assert p95 is not None and 10 < p95 < 1000
                proxy.release("downstream")
            # without claims: on a machine that has other work to do, sound ones may be late too
            await seen.resolves("CoordinatorHighLatency")


async def test_a_frozen_etcd_is_told_and_so_are_the_claims_that_fail_by_it(fragile: Cluster, tmp_path: Path) -> None:
    """CoordinatorEtcdDisconnected and CoordinatorLowSuccessRate."""
    daemon = await fragile.daemon(config={"actors": ["coordinator"]})
    async with watched(tmp_path / "prometheus", daemon, [fragile.etcd.url]) as seen:
        await fragile.ask("hello", "a", ttl_s=600)
        await fragile.ask("submit", "a", tasks=[{"id": f"frozen/{n}"} for n in range(50)])

        async def claim(number: int) -> None:
            await fragile.ask("claim", "a", task=f"frozen/{number % 50}", timeout_s=10.0)

        async with again_and_again(claim, pause_s=0.1):

            async def sound() -> bool:
                return await seen.value("if_coordinator_claim_success_rate") == 1

            await eventually(sound, 30.0)
            fragile.etcd.freeze()
            told(await seen.fires("CoordinatorEtcdDisconnected"), "etcd-down")
            told(await seen.fires("CoordinatorLowSuccessRate"), "low-success")
            assert "DaemonNotReady" in await seen.firing()
            fragile.etcd.thaw()
            for name in ("CoordinatorEtcdDisconnected", "CoordinatorLowSuccessRate", "DaemonNotReady"):
                await seen.resolves(name)


async def test_three_etcd_without_a_quorum_say_that_they_have_no_leader(cluster: Cluster, tmp_path: Path) -> None:
    """EtcdNoLeader and EtcdNoQuorum; the series of slow disks and networks are there, and say that they are not."""
    with needed("etcd"):
        closing = contextlib.AsyncExitStack()
        members = await closing.enter_async_context(etcd_cluster())
    async with closing:
        daemon = RealDaemon(
            tmp_path / "daemon",
            members.urls,
            [cluster.nats.url],
            {"actors": ["coordinator"]},
        )
        closing.push_async_callback(daemon.close)
        await daemon.start()
        async with watched(tmp_path / "prometheus", daemon, members.urls) as seen:
            assert await seen.value("count(etcd_server_has_leader == 1)") == 3
            for name in ("etcd_disk_backend_commit_duration_seconds", "etcd_network_peer_round_trip_time_seconds"):
                assert await seen.query(f"{name}_bucket"), name
            for member in members.members[1:]:
                member.freeze()
            told(await seen.fires("EtcdNoLeader"), "etcd-no-quorum")
            told(await seen.fires("EtcdNoQuorum"), "etcd-no-quorum")
            told(await seen.fires("CoordinatorEtcdDisconnected"), "etcd-down")
            for member in members.members[1:]:
                member.thaw()
            for name in ("EtcdNoLeader", "EtcdNoQuorum", "CoordinatorEtcdDisconnected"):
                await seen.resolves(name)
