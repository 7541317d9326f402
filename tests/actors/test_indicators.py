"""What the alerts are made of is counted for what it is: claims that wait, are refused or fail; holds; backups."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from ifabric.backup.noting import note
from ifabric.errors import BudgetShort, NoTaskMatches
from ifabric.store.base import Delete, Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.store.vitals import BACKUP_KEY, Vitals
from ifabric.testing.harness import Daemon
from ifabric.testing.servers import RealServer
from tests.actors.conftest import CLOCK, World
from tests.system.conftest import eventually


def outcomes(daemon: Daemon) -> dict[str, float]:
    kinds = ("granted", "again", "taken", "none", "refused", "error")
    return {kind: daemon.counted("if_coordinator_claims_total", outcome=kind) for kind in kinds}


async def test_a_claim_that_waited_for_work_was_not_slow(world: World) -> None:
    daemon = await world.daemon()
    await world.ask("hello", "a", ttl_s=60)
    waiting = asyncio.create_task(world.ask("next", "a", wait_s=5.0))
    await asyncio.sleep(0.7)  # the time that is not to be counted
    await world.ask("submit", "b", tasks=[{"id": "T"}])
    assert (await waiting)["task"] == "T"
    latency = daemon.metrics.histogram("if_coordinator_claim_latency_seconds")
    assert sum(latency.counts) == 1
    assert latency.total < 0.6


async def test_every_next_is_counted_once_by_what_became_of_it(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", ttl_s=60)
    with pytest.raises(NoTaskMatches):
        await world.ask("next", "a")
    await world.ask("submit", "a", tasks=[{"id": "T"}])
    with pytest.raises(BudgetShort):
        await world.ask("next", "a", hold_micro_usd=10**12)
    await world.ask("next", "a")
    assert outcomes(daemon) == {"granted": 1, "again": 0, "taken": 0, "none": 1, "refused": 1, "error": 0}


async def test_the_daemon_tells_of_the_backup_that_was_noted(etcd: RealServer) -> None:
    settings = EtcdSettings(endpoints=(etcd.url,))
    store = Etcd(settings, CLOCK)
    await store.connect()
    vitals = Vitals(store, CLOCK)
    assert vitals.backup_at_s == 0
    assert await note(settings, datetime(2026, 11, 28, tzinfo=UTC)) is None
    await vitals.start()
    try:

        async def known() -> bool:
            return vitals.backup_at_s == datetime(2026, 11, 28, tzinfo=UTC).timestamp()

        await eventually(known)
    finally:
        await vitals.stop()
    await store.txn(Txn((), (Put(BACKUP_KEY, b"soon"),)))
    other = Vitals(store, CLOCK)
    other.backup_at_s = 1.0
    await other.start()

    async def read() -> bool:
        return other.backup_at_s == 0

    await eventually(read)
    await other.stop()
    await store.txn(Txn((), (Delete(BACKUP_KEY),)))
    await store.close()
    nowhere = await note(EtcdSettings(endpoints=("http://127.0.0.1:1",)), datetime.now(UTC))
    assert nowhere is not None and "127.0.0.1:1" in nowhere
