"""The daemons at work under what their units forbid: no system call, namespace or kind of memory that they need is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wasmtime

if sys.platform != "linux":
    pytest.skip("systemd is of Linux", allow_module_level=True)

from ifabric.client import Client
from ifabric.errors import StartupError
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from tests.conftest import needed
from tests.system import sealed
from tests.system.deployment import DEPLOY, ROOT, unit

ACTORS = ("coordinator", "governor", "chassis")
GUEST = bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1) (func (export "_start")))'))

pytestmark = pytest.mark.slow  # ten daemons are started, each by a program that reads systemd's lists first

Start = Callable[..., Any]


@pytest.fixture
def under(tmp_path: Path, etcd: RealServer, nats: RealServer, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes a daemon with one actor that runs as a unit says."""
    with needed("systemd-analyze and the kernel's headers"):
        if shutil.which("systemd-analyze") is None or not sealed.NUMBERS.exists():
            raise StartupError("not there: apt-get install systemd linux-libc-dev")

    def made(actor: str, file: Path) -> RealDaemon:
        wrapper = tmp_path / f"python-{file.stem}"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.system.sealed {file} {sys.executable} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr("ifabric.scratch.daemons.sys.executable", str(wrapper))
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'actors'}"}
        return RealDaemon(tmp_path / file.stem, [etcd.url], [nats.url], {"actors": [actor]}, environment)

    return made


def changed(tmp_path: Path, actor: str, *edits: tuple[str, str]) -> Path:
    """The unit, with lines of it replaced."""
    text = (DEPLOY / f"systemd/if-{actor}.service").read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / f"{actor}-{len(edits)}.service"
    path.write_text(text)
    return path


def without(daemon: RealDaemon) -> list[str]:
    """The measures around sandboxes that could not be taken."""
    (line,) = [line for line in daemon.log() if line["event"] == "sandboxes can be started"]
    found: list[str] = line["without"]
    return found


@pytest.mark.parametrize("actor", ACTORS)
async def test_a_daemon_works_as_its_unit_runs_it(actor: str, under: Start, nats: RealServer) -> None:
    """It starts, answers, runs a guest if it is the chassis, and stops; nothing it did was an error."""
    daemon = await under(actor, DEPLOY / f"systemd/if-{actor}.service").start()
    try:
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status and "CapBnd:\t0000000000000000" in status
        assert await daemon.ready() == (200, [])
        assert await daemon.metric("process_open_fds") > 0
        if actor == "chassis":
            async with Client.connect(nats.url, session="sealed") as client:
                assert (await client.run_module(GUEST)).exit_code == 0
        assert await daemon.terminate() == 0
        assert "Traceback" not in daemon.log_text()
        assert not [line for line in daemon.log() if line.get("level") == "error"]
    finally:
        await daemon.close()


async def test_the_unit_of_the_chassis_takes_nothing_from_its_sandboxes(under: Start, tmp_path: Path) -> None:
    """Every measure around a sandbox is there that is there for the same user without the unit's filters."""
    unsealed = changed(
        tmp_path,
        "chassis",
        ("SystemCallFilter=~@privileged @keyring", "SystemCallFilter=@known"),
        ("RestrictNamespaces=user net ipc uts mnt", "RestrictNamespaces=user net ipc uts mnt pid cgroup"),
    )
    found = []
    for file in (DEPLOY / "systemd/if-chassis.service", unsealed):
        daemon = await under("chassis", file).start()
        try:
            found.append(without(daemon))
        finally:
            await daemon.close()
    assert found[0] == found[1]
    assert not {"network", "ipc", "hostname", "mounts", "seccomp", "root", "limits"} & set(found[0])


@pytest.mark.parametrize(
    ("old", "new", "gone"),
    [
        ("RestrictNamespaces=user net ipc uts mnt", "RestrictNamespaces=yes", "network"),
        ("landlock_restrict_self chroot mount", "landlock_restrict_self mount", "root"),
        ("SystemCallFilter=seccomp landlock_create_ruleset", "SystemCallFilter=seccomp", "landlock"),
    ],
)
async def test_every_relaxation_of_the_chassis_is_needed(
    old: str, new: str, gone: str, under: Start, tmp_path: Path
) -> None:
    """Taken back, a measure around the sandboxes is missing."""
    daemon = await under("chassis", changed(tmp_path, "chassis", (old, new))).start()
    try:
        assert gone in without(daemon)
    finally:
        await daemon.close()


async def test_memory_that_is_written_and_then_executed_is_needed_by_the_chassis(
    under: Start, tmp_path: Path, nats: RealServer
) -> None:
    """With MemoryDenyWriteExecute no module can be compiled."""
    file = changed(tmp_path, "chassis", ("LockPersonality=yes", "LockPersonality=yes\nMemoryDenyWriteExecute=yes"))
    daemon = await under("chassis", file).start(ready=False)
    try:
        assert unit(file)["Service"]["MemoryDenyWriteExecute"] == ["yes"]
        assert await daemon.wait() != 0
    finally:
        await daemon.close()
