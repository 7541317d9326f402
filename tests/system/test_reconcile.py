"""A cluster is lost while money is spent, and comes back from an older snapshot of etcd: after `ifabric reconcile` every
account has spent to the micro-USD what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import rfc3339
from ifabric.embedded import Server, embedded_etcd
from ifabric.errors import StartupError
from ifabric.programs import find_etcd
from ifabric.store.base import Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.wire import replay as wire
from ifabric.wire import subjects
from ifabric.wire.governor import BudgetEvent
from ifabric_actors.governor import records
from tests.conftest import needed
from tests.system.auditor import Said
from tests.system.conftest import CLOCK, Cluster, around, eventually, servers
from tests.system.spenders import Spender

#: several processes, two etcds one after the other, and some hundred charges: half a minute
pytestmark = pytest.mark.slow

BUMP = 1_000_000
SPENDERS = 12


def tool(name: str) -> str:
    """etcd's own tool, beside the etcd that is used. `StartupError` when it is not there."""
    found = Path(find_etcd().path).with_name(name)
    if not found.exists():
        raise StartupError(f"there is no {name} beside {find_etcd().path}")
    return str(found)


async def run(*words: str) -> tuple[int, str]:
    """A command's exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "ETCDCTL_API": "3"}
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


class Snapshot:
    """A backup of etcd in a file."""

    def __init__(self, file: Path, revision: int, at: str) -> None:
        self.file, self.revision, self.at = file, revision, at

    @staticmethod
    async def save(cluster: Cluster, file: Path) -> Snapshot:
        at = rfc3339(CLOCK.wall_ms())
        code, said = await run(tool("etcdctl"), f"--endpoints={cluster.etcd.url}", "snapshot", "save", str(file))
        assert code == 0, said
        code, said = await run(tool("etcdutl"), "snapshot", "status", str(file), "--write-out=json")
        assert code == 0, said
        return Snapshot(file, msgspec.json.decode(said.splitlines()[-1])["revision"], at)

    async def restored(self, folder: Path, port: int) -> Server:
        """An etcd made of it, on that port, under a new incarnation, with the mark of a restore."""
        _, usage = await run(tool("etcdutl"), "snapshot", "restore", "--help")
        bump = (f"--bump-revision={BUMP}", "--mark-compacted") if "--bump-revision" in usage else ()
        code, said = await run(
            *(tool("etcdutl"), "snapshot", "restore", str(self.file), f"--data-dir={folder / 'etcd'}"),
            *("--name=embedded", "--initial-cluster=embedded=http://127.0.0.1:1"),
            *("--initial-advertise-peer-urls=http://127.0.0.1:1", *bump),
        )
        assert code == 0, said
        server, url = embedded_etcd(find_etcd(), folder, port, CLOCK)
        await server.start()
        store = Etcd(EtcdSettings(endpoints=(url,)), CLOCK)
        await store.connect()
        kv = await store.get(b"fabric/incarnation")
        assert kv is not None
        incarnation = int(kv.value) + 1
        mark = wire.Restore(
            revision=self.revision,
            at=self.at,
            restored_at=rfc3339(CLOCK.wall_ms()),
            incarnation=incarnation,
            backup=self.file.name,
        )
        puts = (Put(kv.key, b"%d" % incarnation), Put(records.RESTORED_KEY, records.encode(mark)))
        await store.txn(Txn((), puts))
        await store.close()
        return server


async def spent(store: Any) -> dict[str, int]:
    """What every account has spent in every window, as etcd knows it."""
    got, _ = await store.range(records.TALLIES, records.TALLIES[:-1] + b"0")
    return {kv.key.decode(): records.tally(kv).spent for kv in got.kvs if records.tally(kv).spent}


async def journal_events(cluster: Cluster) -> list[BudgetEvent]:
    """All that the journal tells about money now."""
    journal = await cluster.bus.journal(subjects.EVENT_STREAM)
    last = await journal.last()
    found: list[BudgetEvent] = []
    if last is not None:
        reading: Any = journal.read(after_seq=0)
        async with contextlib.aclosing(reading) as entries:
            async for entry in entries:
                if entry.subject.startswith(subjects.event("budget", "")):
                    found.append(msgspec.json.decode(entry.data, type=BudgetEvent))
                if entry.seq >= last.seq:
                    break
    return found


async def told_all(cluster: Cluster) -> None:
    """Returns when the journal tells of all that etcd knows of holds."""

    async def told() -> bool:
        got, _ = await cluster.store.range(records.HOLDS, records.HOLDS[:-1] + b"0")
        newest = max((kv.mod_revision for kv in got.kvs), default=0)
        return newest <= max((event.revision for event in await journal_events(cluster)), default=0)

    await eventually(told, 30)


@contextlib.asynccontextmanager
async def spending(cluster: Cluster, pause_at: int) -> AsyncIterator[list[Spender]]:
    """Spenders at work until the block ends; it begins when they have been told of so many charges and holds."""
    spenders = [Spender(cluster.bus, f"s{n}", n, lambda at, said: None) for n in range(SPENDERS)]
    going = True
    running = [asyncio.create_task(one.work(lambda: going)) for one in spenders]

    async def reached() -> bool:
        for task in running:
            if task.done():
                task.result()
        return drawn(spenders) >= pause_at

    try:
        await eventually(reached, 60)
        yield spenders
    finally:
        going = False
        async with asyncio.timeout(60):
            await asyncio.gather(*running)


def drawn(spenders: list[Spender]) -> int:
    return sum(one.counts[f"{verb}: ok"] for one in spenders for verb in ("commit", "spend", "complete"))


async def reconcile(cluster: Cluster, *words: str) -> tuple[int, dict[str, Any]]:
    """`ifabric reconcile` as a process; its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ifabric", "reconcile", "--nats", cluster.nats.url, "--timeout", "60", "--json"),
        *words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    return process.returncode or 0, msgspec.json.decode(out)


@pytest.fixture
async def doomed(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster whose etcd is to be lost."""
    with needed("etcdctl and etcdutl"):
        tool("etcdctl"), tool("etcdutl")
    async with servers() as pair, around(*pair) as made:
        yield made


async def test_nothing_that_was_spent_is_lost_with_an_etcd_that_comes_back_from_an_older_snapshot(
    doomed: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = doomed
    daemon = await cluster.daemon()
    limit = {"account": "org", "limit_micro_usd": 40_000_000, "window": "day"}
    await cluster.ask("account", "operator", component="governor", admin=True, timeout_s=20, **limit)
    code, said = await reconcile(cluster)
    assert code == 2 and "does not know of a restore" in said["error"]["message"]
    async with spending(cluster, 60) as spenders:
        snapshot = await Snapshot.save(cluster, tmp_path / "snapshot.db")
        known = drawn(spenders)
        await eventually(lambda: _more(spenders, known + 150), 60)
    await told_all(cluster)
    before = await spent(cluster.store)
    await daemon.kill()
    await cluster.etcd.kill()

    server = await snapshot.restored(tmp_path / "restored", cluster.etcd.port)
    try:
        await daemon.start()
        forgotten = await spent(cluster.store)
        lost = {key: before[key] - forgotten.get(key, 0) for key in before}
        assert sum(lost.values()) > 0, "the snapshot is older"
        entries = await _interrupted(cluster)
        code, first = await reconcile(cluster)
        assert code == 0, first
        after = await spent(cluster.store)
        missing = sum(abs(before.get(key, 0) - after.get(key, 0)) for key in before | after)
        org = next(key for key in lost if key.endswith("/org"))
        with capsys.disabled():
            print(
                f"\n  forgotten {lost[org]} micro-USD of {before[org]}; {first['entries']} entries replayed, "
                f"{entries} of them before it was killed; lost for good: {missing} micro-USD"
            )
        assert missing == 0
        assert first["journal"]["complete"] and first["done"]["charged"] + first["done"]["added"] > 0
        code, second = await reconcile(cluster)
        assert (code, second["charged_micro_usd"], second["done"]["again"]) == (0, 0, second["entries"])
        assert await spent(cluster.store) == after
        kv = await cluster.store.get(records.RECONCILED_KEY)
        assert kv is not None and records.reconciled(kv).complete and records.reconciled(kv).finished_at
    finally:
        await daemon.close()
        await server.stop()


async def _more(spenders: list[Spender], number: int) -> bool:
    return drawn(spenders) >= number


async def _interrupted(cluster: Cluster) -> int:
    """A run that is killed as soon as it has written something; how many holds it had got to."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ifabric", "reconcile", "--nats", cluster.nats.url, "--timeout", "60"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    async def replayed() -> int:
        got, _ = await cluster.store.range(records.HOLDS, records.HOLDS[:-1] + b"0")
        return sum(records.hold(kv).note == wire.REPLAYED for kv in got.kvs)

    await eventually(replayed, 60)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    return await replayed()


async def test_what_dies_with_etcd_and_every_daemon_at_one_instant_is_no_more_than_the_journal_had_not_heard(
    doomed: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = doomed
    daemon = await cluster.daemon()
    charges: dict[tuple[str, int], Said] = {}
    spenders = [Spender(cluster.bus, f"s{n}", n, charges.__setitem__) for n in range(SPENDERS)]
    running = [asyncio.create_task(one.work(lambda: True)) for one in spenders]
    await eventually(lambda: _more(spenders, 400), 90)
    os.kill(daemon.pid, signal.SIGKILL)
    os.kill(cluster.etcd.pid, signal.SIGKILL)
    await cancel_and_wait(*running)
    told = {(event.session, event.hold) for event in await journal_events(cluster) if event.event == "commit"}
    acknowledged = [one for one in charges.values() if one.outcome == "ok" and one.charged]
    lost = [one for one in acknowledged if (one.session, one.hold) not in told]
    await daemon.kill()
    await cluster.etcd.stop()
    with capsys.disabled():
        print(
            f"\n  of {len(acknowledged)} acknowledged charges {len(lost)} are not in the journal: "
            f"{sum(one.charged or 0 for one in lost)} micro-USD"
        )
    assert len(lost) <= 100, "some tens of milliseconds of one daemon's charges, and no more"
