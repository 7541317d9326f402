"""`ifabric maintenance` on real clusters: space is found, given back, and etcd takes writes again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ifabric.bus.nats import Nats, NatsSettings
from ifabric.care.cluster import Cluster as EtcdCluster
from ifabric.care.revisions import revision_at
from ifabric.clock import SystemClock
from ifabric.errors import StoreFull
from ifabric.store.base import Delete, Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.clusters import Certificates, Members, etcd_cluster
from tests.conftest import needed
from tests.system.conftest import Cluster, around, eventually, servers
from tests.system.test_doctor import ifabric

#: clusters are filled, defragmented and broken
pytestmark = pytest.mark.slow

CLOCK = SystemClock()
MIB = 1 << 20
QUOTA = 16 * MIB
PIECE = b"x" * (256 * 1024)


async def grow(store: Etcd, writes: int) -> None:
    """Writes one key again and again: all but the last are history."""
    for _ in range(writes):
        await store.txn(Txn((), (Put(b"history", PIECE),)))


async def fill(store: Etcd, key: str) -> int:
    """Writes until etcd is full, `key` with its {} filled in; how many writes that took."""
    for number in range(10_000):
        try:
            await store.txn(Txn((), (Put(key.format(number).encode(), PIECE),)))
        except StoreFull:
            return number
    raise AssertionError("the quota is not this large")


@pytest.fixture
async def small() -> AsyncIterator[Cluster]:
    async with servers(quota_bytes=QUOTA) as pair, around(*pair) as cluster:
        yield cluster


async def test_a_full_etcd_takes_writes_again_after_exactly_what_doctor_says(small: Cluster) -> None:
    daemon = await small.daemon()
    await fill(small.store, "history")

    async def not_ready() -> bool:
        return (await daemon.ready())[0] == 503

    await eventually(not_ready)
    where = ("--state-dir", str(daemon._folder))
    ran = await ifabric("doctor", *where)
    assert ran.code == 1
    assert "✘ full (NOSPACE on embedded): nothing is written any more" in ran.out
    assert "✘ is degraded: etcd is full" in ran.out
    told = re.search(r"NOSPACE.*\n\s+→ (ifabric .*)\n", ran.out)
    assert told is not None, ran.out
    for command in told[1].split(" && "):
        done = await ifabric(*shlex.split(command)[1:])
        assert done.code == 0, done
    assert "1 NOSPACE alarm(s) taken away" in done.err

    async def ready() -> bool:
        return await daemon.ready() == (200, [])

    await eventually(ready)
    await small.ask("hello", "a", ttl_s=60, timeout_s=20.0)
    await small.ask("submit", "a", tasks=[{"id": "t"}], timeout_s=20.0)
    after = await ifabric("doctor", "--json", *where)
    assert after.code == 0, after.out
    assert not [one for one in after.findings("warning") if "file of" in one or "full" in one]


@pytest.mark.slow
async def test_an_alarm_stays_while_there_is_no_room(small: Cluster, tmp_path: Path) -> None:
    """Nothing is history here: what fills etcd is what the keys are. Slow: it is filled once more."""
    number = await fill(small.store, "live/{}")
    config = tmp_path / "fabric.yaml"
    config.write_text(
        json.dumps({"coordinator": {"etcd": {"endpoints": [small.etcd.url]}}, "nats": {"servers": [small.nats.url]}})
    )
    where = ("--config", str(config))
    assert (await ifabric("maintenance", "compact", "--keep", "0s", *where)).code == 0
    ran = await ifabric("maintenance", "defrag", "--yes", "--disarm", *where)
    assert (ran.code, "the alarm stays: embedded has no room yet" in ran.err) == (1, True), ran.err
    assert (await small.store.health()).alarms == ("NOSPACE",)
    for one in range(number):
        await small.store.txn(Txn((), (Delete(f"live/{one}".encode(), None),)))
    assert (await ifabric("maintenance", "compact", "--keep", "0s", *where)).code == 0
    ran = await ifabric("maintenance", "defrag", "--yes", "--disarm", "--json", *where)
    assert json.loads(ran.out)["disarmed"] == 1
    assert json.loads(ran.out)["done"][0]["freed_bytes"] > QUOTA // 2
    await grow(small.store, 1)


async def test_what_is_kept_of_the_history_is_what_was_asked_for(small: Cluster) -> None:
    """The journal says which revision it was; etcd itself does not know."""
    daemon = await small.daemon()
    await small.ask("hello", "a", ttl_s=60, timeout_s=20.0)
    where = ("--state-dir", str(daemon._folder))
    bus = Nats(NatsSettings(servers=(small.nats.url,)), CLOCK)
    await bus.connect()
    seen: list[tuple[int, float]] = []
    for number in range(6):
        await small.ask("submit", "a", tasks=[{"id": f"t{number}"}], timeout_s=20.0)
        task = await small.store.get(f"tasks/t{number}".encode())
        assert task is not None

        async def told(revision: int = task.mod_revision) -> bool:
            return await revision_at(bus, CLOCK.wall_ms() / 1000 + 1) == revision

        await eventually(told)
        seen.append((task.mod_revision, CLOCK.wall_ms() / 1000))
    for revision, moment in seen:
        assert await revision_at(bus, moment) == revision
    assert await revision_at(bus, seen[0][1] - 3600) is None
    await bus.close()
    ran = await ifabric("maintenance", "compact", "--revision", str(seen[3][0]), "--json", *where)
    assert ran.code == 0
    store = small.store
    got, _ = await store.range(b"tasks/", b"tasks0", revision=seen[3][0])
    assert len(got.kvs) == 4


@pytest.mark.slow
async def test_a_history_that_is_not_there_is_neither_forgotten_nor_waited_for(small: Cluster) -> None:
    """Slow: whole commands, for what the test above asks of the journal itself."""
    daemon = await small.daemon()
    where = ("--state-dir", str(daemon._folder))
    await small.ask("submit", "a", tasks=[{"id": "t"}], timeout_s=20.0)
    ran = await ifabric("maintenance", "compact", "--keep", "1h", "--json", *where)
    assert (ran.code, json.loads(ran.out)["revision"]) == (0, None)
    future = await ifabric("maintenance", "compact", "--revision", "1000000", *where)
    assert (future.code, "still to come" in future.err) == (2, True)


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[tuple[Members, Certificates, str]]:
    """Three members with TLS, a configuration that leads to them, and much history."""
    certificates = Certificates(tmp_path / "pki")
    with needed("etcd"):
        async with etcd_cluster(certificates=certificates, folder=tmp_path / "etcd") as etcd:
            path = tmp_path / "fabric.yaml"
            path.write_text(json.dumps({"coordinator": {"etcd": {"endpoints": etcd.urls, **certificates.client()}}}))
            yield etcd, certificates, str(path)


def settings(etcd: Members, certificates: Certificates) -> EtcdSettings:
    return EtcdSettings(endpoints=tuple(etcd.urls), **certificates.client())


@pytest.mark.slow
async def test_members_are_defragmented_one_at_a_time_the_leader_last_and_only_while_all_are_well(
    three: tuple[Members, Certificates, str],
) -> None:
    """Slow: a member is frozen until the others have missed it."""
    etcd, certificates, config = three
    store = Etcd(settings(etcd, certificates), CLOCK)
    await store.connect()
    await grow(store, 40)
    await store.close()
    where = ("--config", config)
    assert (await ifabric("maintenance", "compact", "--keep", "0s", *where)).code == 0
    async with EtcdCluster(settings(etcd, certificates), CLOCK) as looking:
        before = await looking.look()
    assert before.leader is not None
    plan = await ifabric("maintenance", "defrag", "--json", *where)
    assert (plan.code, json.loads(plan.out)["order"][-1]) == (2, before.leader.name)
    number = 0 if before.leader.name != "etcd-1" else 1  # a leader would have another after it
    follower = etcd.members[number]
    follower.freeze()
    try:
        ran = await ifabric("maintenance", "defrag", "--yes", *where)
    finally:
        follower.thaw()
    if f"; etcd-{number + 1} was not defragmented" in ran.err:  # its turn is the first: then it is told of itself
        assert (ran.code, "it does not answer (" in ran.err) == (1, True), ran.err
    else:
        assert (ran.code, "2 of 3 members are well, 3 have to be" in ran.err) == (1, True), ran.err
    async with EtcdCluster(settings(etcd, certificates), CLOCK) as looking:
        untouched = await looking.look()
    assert [one.size_bytes for one in untouched.members] == [one.size_bytes for one in before.members]

    async def done() -> dict[str, Any] | None:
        ran = await ifabric("maintenance", "defrag", "--yes", "--json", *where)
        return json.loads(ran.out) if ran.code == 0 else None

    found = (await eventually(done, 60.0))["done"]  # the thawed one is well again in a moment
    assert found[-1]["member"] == before.leader.name
    assert {one["member"] for one in found} == {"etcd-1", "etcd-2", "etcd-3"}
    assert all(one["freed_bytes"] > 5 * MIB for one in found), found
    one = await ifabric("maintenance", "defrag", "--yes", "--json", "--member", "etcd-2", *where)
    assert [done["member"] for done in json.loads(one.out)["done"]] == ["etcd-2"]


async def test_the_leadership_is_handed_over_to_a_member_that_is_well(three: tuple[Members, Certificates, str]) -> None:
    etcd, certificates, _ = three
    async with EtcdCluster(settings(etcd, certificates), CLOCK) as cluster:
        found = await cluster.look()
        leader = found.leader
        assert leader is not None
        heir = next(one for one in found.members if one.id != leader.id)
        await cluster.move_leader(leader, heir)

        async def leads() -> bool:
            now = (await cluster.look()).leader
            return now is not None and now.id == heir.id

        await eventually(leads)
