"""Backups of real clusters, hurt in every way that was thought of, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import pyrage
import pytest
from aetcd import rpc

from ifabric.backup import incarnations, making, restoring, streams
from ifabric.backup.bucket import Bucket
from ifabric.backup.etcdutl import Peer, find_etcdutl
from ifabric.backup.making import Made, make_backup, verify
from ifabric.backup.manifest import BackupFailed, BackupRefused
from ifabric.backup.places import Folder
from ifabric.backup.restoring import RESTORED_KEY, Target
from ifabric.bus.base import JournalSpec, ObjectSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.bus.serverconf import Identities
from ifabric.cli.app import run_app
from ifabric.clock import SystemClock
from ifabric.config_ops import S3, Backup
from ifabric.errors import ClaimLost, FabricError, Forbidden, Unavailable, Unreachable
from ifabric.store.channel import EtcdSettings, open_line
from ifabric.store.commit import INCARNATION_KEY
from ifabric.testing.clusters import Certificates, Members, etcd_cluster, nats_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire import subjects
from ifabric.wire.permissions import DAEMON_INBOX, inbox_prefix, permissions
from ifabric.wire.replay import Restore
from tests.conftest import emptied, needed
from tests.system.conftest import around

CLOCK = SystemClock()
KEY = pyrage.x25519.Identity.generate()
SETTINGS = Backup(recipients=(str(KEY.to_public()),))


#: a sweeper that comes late: what is refused is refused by the fence, and not because the task was freed meanwhile
AS_IT_IS = {"actors": ["coordinator"], "coordinator": {"reconcile_interval_seconds": 60}}


def reach(members: Members, certificates: Certificates | None = None, user: str = "root") -> EtcdSettings:
    return EtcdSettings(endpoints=tuple(members.urls), **(certificates.client(user) if certificates else {}))


@contextlib.asynccontextmanager
async def line_to(settings: EtcdSettings, at: int = 0) -> AsyncIterator[Any]:
    line = open_line(settings.endpoints[at], settings)
    try:
        yield line
    finally:
        await line.close()


async def put(settings: EtcdSettings, keys: dict[str, bytes]) -> None:
    async with line_to(settings) as line:
        kv = rpc.KVStub(line)
        for key, value in keys.items():
            await kv.Put(rpc.PutRequest(key=key.encode(), value=value), timeout=20)


async def read(settings: EtcdSettings, key: bytes) -> tuple[bytes, int]:
    """A key's value, and etcd's revision."""
    async with line_to(settings) as line:
        got = await rpc.KVStub(line).Range(rpc.RangeRequest(key=key), timeout=20)
        return (got.kvs[0].value if got.kvs else b"", got.header.revision)


async def peers(settings: EtcdSettings, at: int = 0) -> list[Peer]:
    async with line_to(settings, at) as line:
        listed = await rpc.ClusterStub(line).MemberList(rpc.MemberListRequest(), timeout=20)
        return sorted(Peer(member.name, member.peerURLs[0]) for member in listed.members)


async def backed_up(settings: EtcdSettings, directory: Path, **options: Any) -> Made:
    options.setdefault("bus", None)
    return await make_backup(SETTINGS, settings, options.pop("bus"), CLOCK, directory=directory, **options)


async def restored(made: Made, work: Path, cluster: list[Peer], members: Members, bus: Any = None) -> restoring.Ready:
    """All members of a cluster made of a backup, by the way that the command goes."""
    work.mkdir()
    opened = await restoring.check(made.path, [KEY], work, CLOCK)
    number = incarnations.take(opened.manifest.incarnation, made.path.parent, None, "test")
    targets = [Target(*peer, folder) for peer, folder in zip(cluster, members.folders, strict=True)]
    restoring.check_targets(targets, cluster)
    ready = await restoring.prepare(opened, number, CLOCK)
    await restoring.make_members(opened, ready, targets, cluster, None)
    return ready


def leftovers(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name != ".lock") if directory.exists() else []


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
async def etcd(etcd: RealServer) -> AsyncIterator[RealServer]:
    """The session's etcd, given back empty: what is put there here is no record that a daemon could read."""
    yield etcd
    async with emptied(etcd.url):
        pass


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # servers of its own, or many runs
async def test_a_lost_cluster_comes_back_and_the_fences_of_before_are_refused(tmp_path: Path) -> None:
    """Three etcd and a NATS, a daemon, a claim; a backup; everything is deleted; the claim's holder is told that it lost."""
    with needed("etcd and nats-server"):
        etcd_there, nats_there = etcd_cluster(3), nats_cluster(1)
    async with contextlib.AsyncExitStack() as closing:
        etcd = await closing.enter_async_context(etcd_there)
        nats = await closing.enter_async_context(nats_there)
        settings = reach(etcd)
        cluster = await peers(settings)
        async with around(etcd.members[0], nats.members[0]) as world:
            daemon = RealDaemon(tmp_path / "d", etcd.urls, nats.urls, AS_IT_IS)
            world.closing.push_async_callback(daemon.close)
            await daemon.start()
            agent = await world.client("alice", ttl_s=600)
            await agent.submit([{"id": "T.1"}, {"id": "T.2"}])
            claim = await agent.claim("T.1")
            made = await backed_up(settings, tmp_path / "b", bus=world.bus)
            assert made.complaints == ()
            assert made.facts.streams == ("IF_EVENTS", "IF_AUDIT")
            await agent.submit([{"id": "T.3"}])  # after it: lost
            looked = await verify(made.path, [KEY], CLOCK, deep=True)
            assert looked.keys == looked.manifest.keys
            assert looked.manifest.keys["tasks/"] == 2

            await daemon.terminate()
            await etcd.destroy()
            ready = await restored(made, tmp_path / "work", cluster, etcd)
            await etcd.start()
            value, revision = await read(settings, INCARNATION_KEY)
            assert value == b"2"
            assert revision > 1_000_000_000, "revisions were moved on"
            note = msgspec.json.decode((await read(settings, RESTORED_KEY))[0], type=Restore)
            assert (note.revision, note.incarnation, note.backup) == (made.facts.revision, 2, made.path.name)
            assert datetime.fromisoformat(note.at) == made.facts.at
            assert ready.warnings == ()

            await daemon.start()
            for verb, body in (("complete", {}), ("fail", {"error": "x"}), ("release", {})):
                with pytest.raises(ClaimLost):
                    await world.ask(verb, "alice", timeout_s=20, task="T.1", fence=claim.fence, **body)
            renewed = await world.ask("renew", "alice", timeout_s=20, claims=[{"task": "T.1", "fence": claim.fence}])
            assert "T.1" in str(renewed["lost"])
            listed = await world.ask("list", "alice", timeout_s=20)
            assert {task["task"] for task in listed["tasks"]} == {"T.1", "T.2"}
            await world.ask("hello", "bob", timeout_s=20, ttl_s=60)
            again = await world.ask("next", "bob", timeout_s=20, wait_s=15)
            assert again["fence"] >> 40 == 2
            assert again["fence"] > claim.fence
            assert await incarnations.of_events(world.bus) in (1, 2)
            assert await incarnations.of_etcd(settings) == 2


async def test_access_control_in_a_snapshot_survives_its_restore(tmp_path: Path) -> None:
    """The scratch etcd needs root there, and the restored cluster still knows who may do what."""
    certificates = Certificates(tmp_path / "pki")
    async with etcd_cluster(1, certificates=certificates) as etcd:
        root, stranger = reach(etcd, certificates), reach(etcd, certificates, "stranger")
        await put(root, {"fabric/incarnation": b"3", "tasks/a": b"1"})
        async with line_to(root) as line:
            auth = rpc.AuthStub(line)
            await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="unused"), timeout=20)
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"), timeout=20)
            await auth.AuthEnable(rpc.AuthEnableRequest(), timeout=20)
        with pytest.raises(Forbidden, match="role root"):
            await backed_up(stranger, tmp_path / "b")
        assert leftovers(tmp_path / "b") == []
        made = await backed_up(root, tmp_path / "b")
        cluster = await peers(root)
        await etcd.destroy()
        await restored(made, tmp_path / "work", cluster, etcd)
        await etcd.start()
        assert (await read(root, INCARNATION_KEY))[0] == b"4"
        with pytest.raises(Forbidden):
            await backed_up(stranger, tmp_path / "b")


async def test_hosts_that_share_a_prepared_snapshot_make_the_same_cluster(tmp_path: Path, etcd: Any) -> None:
    settings = EtcdSettings(endpoints=(etcd.url,))
    await put(settings, {"fabric/incarnation": b"1"})
    made = await backed_up(settings, tmp_path / "b")
    (tmp_path / "one").mkdir()
    opened = await restoring.check(made.path, [KEY], tmp_path / "one", CLOCK)
    ready = await restoring.prepare(opened, 7, CLOCK)
    shared = await restoring.write_prepared(ready, tmp_path, [KEY])
    assert shared.name.startswith("prepared-")
    cluster = [Peer("etcd-1", "http://127.0.0.1:1"), Peer("etcd-2", "http://127.0.0.1:2")]
    for host in ("host-1", "host-2"):
        (tmp_path / host).mkdir()
        opened = await restoring.check(shared, [KEY], tmp_path / host, CLOCK)
        ready = await restoring.prepare(opened, 0, CLOCK)
        assert ready.manifest.incarnation == 7
        target = Target(*cluster[0], tmp_path / host / "data")
        await restoring.make_members(opened, ready, [target], cluster, None)
    assert digests(tmp_path / "host-1" / "data") == digests(tmp_path / "host-2" / "data")

    class Later(SystemClock):
        def wall_ms(self) -> int:
            return super().wall_ms() + 25 * 3_600_000

    (tmp_path / "late").mkdir()
    with pytest.raises(BackupRefused, match="prepared 25 hours ago"):
        await restoring.check(shared, [KEY], tmp_path / "late", Later())


async def test_a_data_directory_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "member").write_text("somebody's")
    peer = Peer("etcd-1", "http://127.0.0.1:1")
    with pytest.raises(BackupRefused, match="not empty"):
        restoring.check_targets([Target(*peer, tmp_path / "data")], [peer])
    with pytest.raises(BackupRefused, match="not among the members"):
        restoring.check_targets([Target("etcd-2", peer.url, tmp_path / "new")], [peer])


async def test_a_snapshot_that_is_damaged_inside_a_sound_archive_is_refused(tmp_path: Path, etcd: Any) -> None:
    """Whoever made the archive sealed what was damaged already: etcd's own digest tells."""
    settings = EtcdSettings(endpoints=(etcd.url,))
    await put(settings, {"tasks/a": b"1"})
    made = await backed_up(settings, tmp_path / "b")
    (tmp_path / "x").mkdir()
    opened = await restoring.check(made.path, [KEY], tmp_path / "x", CLOCK)
    db = opened.file("etcd.db")
    whole = db.read_bytes()
    tool = await find_etcdutl()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:9000] + b"\xff" + whole[9001:], b"", whole[:-32]):
        db.write_bytes(damaged)
        with pytest.raises(BackupRefused, match="nothing was touched"):
            await making.check_snapshot(db, opened.manifest, tool)
    db.write_bytes(whole)
    with pytest.raises(BackupRefused, match="revision"):
        await making.check_snapshot(db, msgspec.structs.replace(opened.manifest, revision=0), tool)
    with pytest.raises(BackupRefused, match="incarnation"):
        await restoring.prepare(
            restoring.Opened(made.path, opened.folder, msgspec.structs.replace(opened.manifest, incarnation=77), tool),
            78,
            CLOCK,
        )


async def test_an_etcd_that_is_empty_or_has_forgotten_its_last_deletion_is_backed_up(tmp_path: Path) -> None:
    """etcdutl tells the revision of the last key that it finds, which may be older than etcd's."""
    async with etcd_cluster(1) as etcd:
        settings = reach(etcd)
        empty = await backed_up(settings, tmp_path / "b")
        assert empty.facts.revision == 1
        await put(settings, {"tasks/a": b"1", "tasks/b": b"1"})
        async with line_to(settings) as line:
            gone = await rpc.KVStub(line).DeleteRange(
                rpc.DeleteRangeRequest(key=b"tasks/", range_end=b"tasks0"), timeout=20
            )
            revision = gone.header.revision
            await rpc.KVStub(line).Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=20)
        made = await backed_up(settings, tmp_path / "b")
        assert made.facts.revision == revision
        assert (await verify(made.path, [KEY], CLOCK, deep=True)).keys == {}


# -- etcd is hurt --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # servers of its own, or many runs
async def test_a_frozen_member_is_not_waited_for_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    """Of three, one is frozen and one is killed in the middle of its snapshot: the backup is made of what is left."""
    async with etcd_cluster(3) as etcd:
        settings = reach(etcd)
        await put(settings, {"fabric/incarnation": b"1", **{f"big/{n}": os.urandom(1_000_000) for n in range(12)}})
        by_url = dict(zip(etcd.urls, etcd.members, strict=True))
        etcd.members[0].freeze()
        made = await backed_up(settings, tmp_path / "b")
        assert made.endpoint != etcd.urls[0]
        assert any(etcd.urls[0] in warning for warning in made.warnings)
        etcd.members[0].thaw()

        killed: list[str] = []
        asked = made.endpoint

        def kill(what: str, done: int, of: int) -> None:
            if what == "etcd" and not killed:
                assert done < of
                killed.append(asked)
                os.kill(by_url[asked].pid, signal.SIGKILL)

        only = EtcdSettings(endpoints=(asked,))
        with pytest.raises(BackupFailed, match="no etcd gave a whole snapshot"):
            await backed_up(only, tmp_path / "c", tell=kill)
        assert killed
        assert leftovers(tmp_path / "c") == [], "nothing half is left"
        after = await backed_up(settings, tmp_path / "c")
        assert after.endpoint != asked
        assert any(asked in warning for warning in after.warnings)
        assert (await verify(after.path, [KEY], CLOCK)).manifest.keys["big/"] == 12


async def test_without_any_etcd_there_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no backup was made"):
        await backed_up(EtcdSettings(endpoints=("127.0.0.1:1",)), tmp_path / "b")
    assert leftovers(tmp_path / "b") == []


# -- streams -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def bus_to(nats: Members) -> AsyncIterator[Nats]:
    bus = Nats(NatsSettings(servers=tuple(nats.urls)), CLOCK)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


async def ask(bus: Nats, verb: str, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode(
        (await bus.request(f"$JS.API.STREAM.{verb}", msgspec.json.encode(body), timeout_s=20)).data
    )
    return answer


async def filled(bus: Nats, name: str, replicas: int, messages: int) -> None:
    while "error" in (made := await ask(bus, f"CREATE.{name}", name=name, subjects=["x.>"], num_replicas=replicas)):
        assert made["error"]["code"] == 503, made  # the cluster is not ready yet
        await asyncio.sleep(0.1)
    for number in range(messages):
        await bus.request(f"x.{number}", os.urandom(20_000), timeout_s=20, headers={"Nats-Msg-Id": str(number)})


async def there_and_back(nats: Members, tmp_path: Path, replicas: int) -> None:
    """A stream is taken out, lost with all servers, and put back with every sequence number and header."""
    async with bus_to(nats) as bus:
        await filled(bus, "IF_EVENTS", replicas, 60)
        await ask(bus, "MSG.DELETE.IF_EVENTS", seq=5)
        before = [await ask(bus, "MSG.GET.IF_EVENTS", seq=seq) for seq in (1, 5, 60)]
        with (tmp_path / "stream").open("w+b") as file:
            saved = await streams.save(bus, "IF_EVENTS", file, lambda _: None)
            assert (saved.facts.messages, saved.facts.last_seq) == (59, 60)
            kept = await streams.put_back(bus, "IF_EVENTS", saved.about, file, replicas=None, progress=lambda _: None)
            assert kept.outcome == "kept", "what is there is newer"
            await nats.destroy()
            await nats.start()
            size = file.seek(0, 2)
            file.seek(size // 2)
            byte = file.read(1)
            for damaged in (bytes([byte[0] ^ 1]), byte):
                file.seek(size // 2)
                file.write(damaged)
                put_back = await eventually_answered(bus, saved, file)
                assert put_back.outcome == ("restored" if damaged == byte else "failed"), put_back
        after = [await ask(bus, "MSG.GET.IF_EVENTS", seq=seq) for seq in (1, 5, 60)]
        assert [one.get("message") for one in after] == [one.get("message") for one in before]


async def eventually_answered(bus: Nats, saved: streams.Saved, file: Any) -> streams.Put:
    """A cluster that has just started, or still clears away a failed restore, says so."""
    async with asyncio.timeout(60):
        while True:
            try:
                found = await streams.put_back(
                    bus, "IF_EVENTS", saved.about, file, replicas=None, progress=lambda _: None
                )
            except Unavailable:
                await asyncio.sleep(0.2)
                continue
            if not any(word in found.why for word in ("10008", "10130", "10009", "10074", "10005", "there already")):
                return found
            await asyncio.sleep(0.2)


async def test_an_empty_stream_is_replaced_and_one_that_ever_held_something_is_not(tmp_path: Path) -> None:
    async with nats_cluster(1) as nats, bus_to(nats) as bus:
        await filled(bus, "IF_EVENTS", 1, 3)
        with (tmp_path / "stream").open("w+b") as file:
            saved = await streams.save(bus, "IF_EVENTS", file, lambda _: None)
            await ask(bus, "PURGE.IF_EVENTS")
            kept = await streams.put_back(bus, "IF_EVENTS", saved.about, file, replicas=None, progress=lambda _: None)
            assert kept.outcome == "kept"
            await ask(bus, "DELETE.IF_EVENTS")
            await filled(bus, "IF_EVENTS", 1, 0)
            found = await streams.put_back(bus, "IF_EVENTS", saved.about, file, replicas=None, progress=lambda _: None)
        assert (found.outcome, found.messages) == ("restored", 3)


async def test_modules_come_back_whole(tmp_path: Path) -> None:
    async with nats_cluster(1) as nats, bus_to(nats) as bus:
        objects = await bus.objects(ObjectSpec("IF_MODULES", 1 << 26))
        module = os.urandom(700_000)
        await objects.put("sha256:1", module)
        with (tmp_path / "stream").open("w+b") as file:
            saved = await streams.save(bus, "OBJ_IF_MODULES", file, lambda _: None)
            await nats.destroy()
            await nats.start()
            async with asyncio.timeout(30):
                while not bus.connected:
                    await asyncio.sleep(0.05)
            about = saved.about
            found = await streams.put_back(bus, "OBJ_IF_MODULES", about, file, replicas=None, progress=lambda _: None)
        assert found.outcome == "restored"
        assert await (await bus.objects("IF_MODULES")).get("sha256:1") == module


async def test_a_stream_comes_back_with_its_numbers_and_headers(tmp_path: Path) -> None:
    async with nats_cluster(1) as nats:
        await there_and_back(nats, tmp_path, 1)


@pytest.mark.slow  # three servers that elect leaders, twice
async def test_a_stream_of_three_replicas_comes_back(tmp_path: Path) -> None:
    async with nats_cluster(3) as nats:
        await there_and_back(nats, tmp_path, 3)


async def test_a_backup_without_nats_is_made_and_says_what_is_missing(tmp_path: Path, etcd: Any) -> None:
    made = await backed_up(EtcdSettings(endpoints=(etcd.url,)), tmp_path / "b", without_streams="nobody is there")
    assert "nobody is there" in made.complaints[0].message
    assert made.facts.missing == ("the streams: nobody is there",)
    assert (await verify(made.path, [KEY], CLOCK)).warnings == made.facts.missing


# -- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> Bucket:
    """A new bucket there."""
    for name in ("access", "secret"):
        (tmp_path / name).write_text("testing\n")
    name = f"b-{CLOCK.token().lower().replace('_', 'x').strip('-')}"
    made = Bucket(
        S3(
            bucket=name,
            endpoint_url=s3,
            access_key_file=str(tmp_path / "access"),
            secret_key_file=str(tmp_path / "secret"),
        )
    )
    made._client.create_bucket(Bucket=name)
    return made


def another(of: Bucket, **changes: Any) -> Bucket:
    return Bucket(msgspec.structs.replace(of._settings, **changes))


async def test_what_s3_did_not_take_is_brought_by_the_next_run(tmp_path: Path, etcd: Any, bucket: Bucket) -> None:
    settings = EtcdSettings(endpoints=(etcd.url,))
    down = another(bucket, endpoint_url="http://127.0.0.1:1")
    first = await backed_up(settings, tmp_path / "b", bucket=down, wants_streams=False)
    assert [type(error) for error in first.complaints] == [Unavailable]
    assert first.path.exists()
    gone = await backed_up(
        settings, tmp_path / "b2", bucket=another(bucket, bucket="no-such-bucket"), wants_streams=False
    )
    assert "NoSuchBucket" in gone.complaints[0].message

    await put(settings, {"another/key": b"1"})  # a backup of its own name, were it within the same second
    second = await backed_up(settings, tmp_path / "b", bucket=bucket, wants_streams=False)
    assert second.complaints == ()
    assert set(second.uploaded) == {first.path.name, second.path.name}
    assert [facts.file for facts in bucket.backups()] == [first.path.name, second.path.name]
    (tmp_path / "here").mkdir()
    brought = bucket.download(second.facts, tmp_path / "here", lambda _: None)
    assert brought.read_bytes() == second.path.read_bytes()
    assert (await verify(brought, [KEY], CLOCK)).manifest.revision == second.facts.revision


def test_a_wrong_key_for_s3_is_told_without_the_key(tmp_path: Path, bucket: Bucket) -> None:
    from moto.core import set_initial_no_auth_action_count

    @set_initial_no_auth_action_count(0)
    def asked() -> None:
        bucket.backups()

    with pytest.raises(FabricError) as refused:
        asked()
    assert "InvalidAccessKeyId" in refused.value.message
    assert (tmp_path / "secret").read_text().strip() not in refused.value.message.replace("ifabric", "")


def test_a_large_backup_goes_in_parts_and_an_interrupted_upload_is_not_listed(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.rules.test_backup import facts_of

    monkeypatch.setattr("ifabric.backup.bucket.PART_BYTES", 5 << 20)
    path = tmp_path / "ifabric-20261128T183000Z-rev1.tar.zst.age"
    path.write_bytes(os.urandom(11 << 20))
    facts = facts_of(path, revision=1)
    parts = 0

    def interrupt(_: int) -> None:
        nonlocal parts
        parts += 1
        if parts == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bucket.upload(path, facts, interrupt)
    assert bucket.backups() == []
    assert not bucket._client.list_multipart_uploads(Bucket=bucket._settings.bucket).get("Uploads")
    bucket.upload(path, facts, lambda _: None)
    assert bucket.backups() == [facts]
    assert bucket.download(facts, tmp_path, lambda _: None).stat().st_size == 11 << 20


def test_retention_in_s3_deletes_only_what_is_ours_and_old(tmp_path: Path, bucket: Bucket) -> None:
    from tests.rules.test_backup import facts_of

    for number, at in enumerate((datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 11, 28, tzinfo=UTC))):
        path = tmp_path / f"ifabric-{at:%Y%m%dT%H%M%SZ}-rev{number}.tar.zst.age"
        path.write_bytes(b"x")
        bucket.upload(path, facts_of(path, at=at, revision=number), lambda _: None)
    theirs = "ifabric/ifabric-20260101T000000Z-rev77.tar.zst.age"
    bucket._client.put_object(Bucket=bucket._settings.bucket, Key=theirs, Body=b"x")
    gone = bucket.delete_expired(datetime(2026, 11, 29, tzinfo=UTC), retention_days=7, keep_min=1)
    assert gone == ["ifabric-20260101T000000Z-rev0.tar.zst.age"]
    left = {item["Key"] for item in bucket._client.list_objects_v2(Bucket=bucket._settings.bucket)["Contents"]}
    assert theirs in left
    assert len(left) == 3


def test_an_incarnation_is_taken_in_s3_once(tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    assert incarnations.take(1, tmp_path / "here", bucket, "x") == 2
    assert incarnations.take(1, tmp_path / "there", bucket, "x") == 3, "another host, that has only S3 in common"


# -- the command, ended and starved -------------------------------------------------------------------------------------


def command(tmp_path: Path, etcd_url: str, *words: str) -> list[str]:
    """`ifabric backup run` as a process, on this etcd, without NATS."""
    file = tmp_path / "fabric.yaml"
    config = {
        "coordinator": {"etcd": {"endpoints": [etcd_url]}},
        "backup": {"recipients": list(SETTINGS.recipients), "directory": str(tmp_path / "b")},
        "state_dir": str(tmp_path / "state"),
    }
    file.write_bytes(msgspec.json.encode(config))
    return [sys.executable, "-m", "ifabric", "backup", *words, "--config", str(file)]


async def test_a_disk_that_is_full_leaves_nothing_and_says_so(tmp_path: Path, etcd: Any) -> None:
    settings = EtcdSettings(endpoints=(etcd.url,))
    await put(settings, {f"big/{n}": os.urandom(500_000) for n in range(3)})

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    words = command(tmp_path, etcd.url, "run", "--no-streams", "--json")
    done = await asyncio.to_thread(
        subprocess.run, words, capture_output=True, text=True, preexec_fn=starved, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "no backup was made" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path / "b") == []


@pytest.mark.slow  # servers of its own, or many runs
async def test_a_run_that_is_killed_leaves_no_half_backup_that_is_listed(tmp_path: Path, etcd: Any) -> None:
    settings = EtcdSettings(endpoints=(etcd.url,))
    await put(settings, {f"big/{n}": os.urandom(1_000_000) for n in range(16)})
    process = await asyncio.create_subprocess_exec(
        *command(tmp_path, etcd.url, "run", "--no-streams"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    async with asyncio.timeout(60):
        while not any(name.endswith(".partial") for name in leftovers(tmp_path / "b")) and process.returncode is None:
            await asyncio.sleep(0.001)
    process.kill()
    await process.wait()
    left = leftovers(tmp_path / "b")
    assert left and all(name.startswith(".") for name in left), left
    assert Folder(tmp_path / "b").backups() == []
    listed = await asyncio.to_thread(
        subprocess.run, command(tmp_path, etcd.url, "list", "--json"), capture_output=True, timeout=60, check=True
    )
    assert msgspec.json.decode(listed.stdout)["backups"] == []
    made = await backed_up(settings, tmp_path / "b", wants_streams=False)
    assert leftovers(tmp_path / "b") == sorted([made.path.name, f"{made.path.name}.json"])


async def ifabric(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """A verb with --json: its exit code, what it printed, and what it complained of."""
    capsys.readouterr()
    code = await asyncio.to_thread(run_app, [*words, "--json"])
    said = capsys.readouterr()
    return code, msgspec.json.decode(said.out) if said.out else None, said.err


async def test_the_verbs_make_list_verify_and_restore(
    tmp_path: Path, etcd: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a key that is made to two restores of one backup; whoever has another key, or no empty folder, changes nothing."""
    key, other = str(tmp_path / "key"), str(tmp_path / "other")
    _, made_key, _ = await ifabric(capsys, "backup", "run", "--make-key", key)
    await ifabric(capsys, "backup", "run", "--make-key", other)
    config = {
        "coordinator": {"etcd": {"endpoints": [etcd.url]}},
        "backup": {"recipients": [made_key["recipient"]], "directory": str(tmp_path / "b")},
        "state_dir": str(tmp_path / "state"),
    }
    (tmp_path / "c.yaml").write_bytes(msgspec.json.encode(config))
    where = ("--config", str(tmp_path / "c.yaml"))
    await put(EtcdSettings(endpoints=(etcd.url,)), {"fabric/incarnation": b"1"})

    code, made, said = await ifabric(capsys, "backup", "run", *where)
    assert (code, made["facts"]["streams"]) == (1, []), "no NATS is configured: the streams are missing in it"
    assert "the streams" in said
    code, listed, _ = await ifabric(capsys, "backup", "list", *where)
    assert [(row["backup"], row["state"]) for row in listed["backups"]] == [(Path(made["backup"]).name, "whole")]
    code, seen, _ = await ifabric(capsys, "backup", "verify", *where, "--identity-file", key, "--deep")
    assert (code, seen["good"]) == (0, True)

    member = f"etcd-1=http://127.0.0.1:1={tmp_path / 'new' / 'etcd'}"
    before = leftovers(tmp_path / "b")
    refused = [
        (("--identity-file", other, "--yes"), 1, "not encrypted for this key"),
        ((), 2, "no private key"),
        (("--identity-file", str(tmp_path / "none")), 2, "cannot read the age key"),
        (("--identity-file", key, "--incarnation", "1", "--yes"), 1, "not between"),
    ]
    for words, expected, why in refused:
        code, _, said = await ifabric(capsys, "restore", "latest", *where, "--member", member, *words)
        assert code == expected, said
        assert why in said
    code, report, _ = await ifabric(capsys, "restore", "latest", *where, "--member", member, "--identity-file", key)
    assert (code, report["done"]) == (0, False)
    assert (leftovers(tmp_path / "b"), leftovers(tmp_path / "new")) == (before, []), "nothing was touched"

    found = []
    for number in (1, 2):
        target = f"etcd-1=http://127.0.0.1:1={tmp_path / f'new-{number}' / 'etcd'}"
        code, report, said = await ifabric(
            capsys, "restore", made["backup"], *where, "--member", target, "--identity-file", key, "--yes"
        )
        assert code == 0, said
        found.append(report["incarnation"])
        assert report["keys"]["backup"]["fabric/"] + 1 == report["keys"]["restored"]["fabric/"]
        assert any("reconcile" in sentence for sentence in report["not_recovered"])
        assert [path.name for path in (tmp_path / f"new-{number}").iterdir()] == ["etcd"], "and no plain text beside it"
    assert found[1] == found[0] + 1
    code, _, said = await ifabric(
        capsys, "restore", "latest", *where, "--member", target, "--identity-file", key, "--yes"
    )
    assert (code, "not empty" in said) == (1, True)


@pytest.mark.slow  # servers of its own, or many runs
async def test_backups_are_made_again_and_again_also_after_one_that_failed(tmp_path: Path) -> None:
    async with etcd_cluster(1) as etcd:
        words = command(tmp_path, etcd.urls[0], "run", "--no-streams", "--json", "--every", "1.1")
        process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(90):
                first = msgspec.json.decode(await process.stdout.readline())
                await etcd.members[0].kill()
                while "error" not in msgspec.json.decode(await process.stdout.readline()):
                    continue
                await etcd.members[0].start_again()
                while "backup" not in (after := msgspec.json.decode(await process.stdout.readline())):
                    continue
        finally:
            process.kill()
            await process.wait()
    assert after["backup"] != first["backup"]


async def test_a_credential_of_the_role_backup_may_take_streams_out_and_put_them_back(tmp_path: Path) -> None:
    users = {name: nkeys_pair() for name in ("issuer", "daemon", "system", "backup")}
    prefix = inbox_prefix("backup-1")
    identities = Identities(
        issuer=users["issuer"][1],
        daemon=users["daemon"][1],
        system=users["system"][1],
        static={users["backup"][1]: permissions("backup", "backup-1", ())},
    )
    async with nats_cluster(1, identities=identities) as nats:
        made = NatsSettings(servers=tuple(nats.urls), nkey_seed=users["backup"][0], inbox_prefix=prefix)
        bus = Nats(made, CLOCK)
        daemon = Nats(
            NatsSettings(servers=tuple(nats.urls), nkey_seed=users["daemon"][0], inbox_prefix=DAEMON_INBOX), CLOCK
        )
        for one in (bus, daemon):
            await one.connect()
        journal = await daemon.journal(JournalSpec("IF_EVENTS", (subjects.EVENTS,), 3600, 1 << 20))
        await journal.append([(subjects.event("task", "claimed"), b"{}", "1")])
        with (tmp_path / "stream").open("w+b") as file:
            assert await streams.there(bus) == ["IF_EVENTS"]
            saved = await streams.save(bus, "IF_EVENTS", file, lambda _: None)
            await daemon.request("$JS.API.STREAM.DELETE.IF_EVENTS", b"", timeout_s=10)
            found = await streams.put_back(bus, "IF_EVENTS", saved.about, file, replicas=None, progress=lambda _: None)
        assert (found.outcome, found.messages) == ("restored", 1)
        for one in (bus, daemon):
            await one.close()


def nkeys_pair() -> tuple[str, str]:
    """A seed and its public key, of a user."""
    pair = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    return pair.seed.decode(), pair.public_key.decode()
