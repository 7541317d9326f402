"""Servers of the daemon's own: started again when they die, gone when it dies, and their data kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from ifabric.client import Client
from ifabric.programs import find_etcd, find_nats_server
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import coordinator as wire
from tests.conftest import needed
from tests.system.test_process import WAIT_S, run, until


def children(pid: int) -> dict[str, int]:
    """The servers that a daemon has started, by name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == pid and rest.split()[0] != "Z":
                found[name] = int(stat.parent.name)
    return found


def servers_of(folder: Path) -> set[int]:
    """Every process that was started for this folder and is no daemon, whoever is its parent."""
    found = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = cmdline.read_bytes()
            if str(folder).encode() in words and b"ifabric\0run" not in words:
                found.add(int(cmdline.parent.name))
    return found


async def nothing_left(folder: Path) -> bool:
    return not servers_of(folder)


async def something_left(folder: Path) -> bool:
    return bool(servers_of(folder))


async def another(daemon: RealDaemon, name: str, pid: int) -> bool:
    """Whether the daemon has a server of that name that is not that process."""
    return children(daemon.pid).get(name, pid) != pid


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[RealDaemon]:
    """A daemon without any server configured, not yet started."""
    with needed("etcd and nats-server"):
        find_etcd(), find_nats_server()
    made = RealDaemon(tmp_path / "state", [], [])
    yield made
    if made.running:
        await made.close()
    await until(lambda: nothing_left(tmp_path))


@contextlib.asynccontextmanager
async def agent(daemon: RealDaemon, session: str) -> AsyncIterator[Client]:
    assert daemon.found is not None
    client = Client.connect(daemon.found.nats, session=session, ttl_s=60, timeout_s=WAIT_S)
    client.leave_on_exit = False
    async with client:
        yield client


async def test_a_server_that_is_killed_comes_back_on_its_port_and_data_and_claims_go_on(
    daemon: RealDaemon, tmp_path: Path
) -> None:
    await daemon.start()
    before = children(daemon.pid)
    assert {"etcd", "nats-server"} <= set(before)
    async with agent(daemon, "a-1") as client:
        await client.submit([wire.TaskSpec(id=f"t{number}") for number in range(3)])
        held = [await client.claim("t0")]
        for number, name in ((1, "nats-server"), (2, "etcd")):
            os.kill(before[name], signal.SIGKILL)
            await until(partial(another, daemon, name, before[name]))
            held.append(await client.claim(f"t{number}"))
        for claim in held:
            await claim.complete()
        assert (await client.list(state="done")).counts["done"] == 3

    async def healthy() -> bool:
        return (await daemon.ready()) == (200, [])

    await until(healthy)
    again = [line for line in daemon.log() if line["event"] == "starting again"]
    assert [(line["branch"], line["child"]) for line in again] == [("servers", "nats"), ("servers", "etcd")]
    assert all("ended with -9" in line["reason"] for line in again)
    assert await daemon.terminate() == 0
    assert not servers_of(tmp_path)


async def test_a_daemon_killed_with_sigkill_leaves_no_server_behind_and_the_next_finds_the_data(
    daemon: RealDaemon, tmp_path: Path
) -> None:
    await daemon.start()
    async with agent(daemon, "a-1") as client:
        await client.submit([wire.TaskSpec(id="done"), wire.TaskSpec(id="held"), wire.TaskSpec(id="free")])
        await (await client.claim("done")).complete({"n": 1})
        claim = await client.claim("held")
        servers = servers_of(tmp_path)
        assert len(servers) == 2
        await daemon.kill()
        await until(lambda: nothing_left(tmp_path))

    await daemon.start()
    assert not servers & servers_of(tmp_path)
    async with agent(daemon, "a-1") as client:
        done, held = await client.get("done"), await client.get("held")
        assert (done.state, done.result) == ("done", {"n": 1})
        assert (held.state, held.session, held.fence) == ("claimed", "a-1", claim.fence)
        again = await client.claim("held")
        assert (again.fence, (await again.complete()).state) == (claim.fence, "done")
        assert (await client.get("free")).state == "pending"
    assert await daemon.terminate() == 0


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGTERM, "started"), (signal.SIGINT, "asked for its version")])
async def test_a_signal_while_the_servers_start_leaves_none_behind(
    daemon: RealDaemon, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    await daemon.start(ready=False)
    await until(partial(another, daemon, "etcd", daemon.pid))
    if moment == "started":
        await until(partial(something_left, tmp_path))
    daemon.signal(number)
    assert await daemon.wait() == 0
    assert not servers_of(tmp_path)


async def test_a_server_that_cannot_start_ends_the_daemon_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "nats-server"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo v2.15.1 && exit\necho 'no port today' >&2\nexit 3\n")
    broken.chmod(0o755)
    one = RealDaemon(tmp_path / "broken", [], [], environment={"IFABRIC_NATS_SERVER": str(broken)})
    await one.start(ready=False)
    assert await one.wait() == 1
    reason = one.log()[-1]["reason"]
    assert "nats-server 2.15.1 ($IFABRIC_NATS_SERVER) did not start" in reason
    assert reason.endswith("no port today")


# -- no room ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Takes all the room but so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "ballast").write_bytes(bytes(free - leave))


@pytest.mark.parametrize("leave", [0, 4096])
async def test_on_a_full_disk_the_start_fails_with_a_sentence_that_names_the_place_and_the_reason(
    tiny: Path, leave: int
) -> None:
    fill(tiny, leave)
    ran = await run(
        "run", "--state-dir", str(tiny), IFABRIC__HTTP__PORT="0", IFABRIC__COORDINATOR__LOGGING__FORMAT="json"
    )
    assert ran.code == 1
    assert "a bug in ifabric" not in ran.said
    reason = json.loads(ran.said.splitlines()[-1])["reason"]
    no_room = f"cannot write to the state directory {tiny}: No space left on device"
    did_not_start = f"did not start, with 0 MB left on the disk of {tiny};"
    assert no_room in reason or did_not_start in reason
    assert not servers_of(tiny)


async def test_the_reason_of_a_server_that_panics_is_shown_and_not_its_stack(tiny: Path) -> None:
    fill(tiny, 1 << 19)
    ran = await run(
        "run", "--state-dir", str(tiny), IFABRIC__HTTP__PORT="0", IFABRIC__COORDINATOR__LOGGING__FORMAT="json"
    )
    reason = json.loads(ran.said.splitlines()[-1])["reason"]
    assert "no space left on device" in reason
    assert "main.go" not in reason
