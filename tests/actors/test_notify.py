"""What a daemon tells its service manager, read from a real datagram socket, of a real daemon process."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import SystemClock, monotonic
from ifabric.notify import Notifier
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer

CLOCK = SystemClock()
#: a beat each half of it
WATCHDOG_S = 0.4
WITHIN_S = 30.0


class Manager:
    """The other end: what systemd would read."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    async def said(self) -> dict[str, str]:
        """The next words. `TimeoutError` when there are none."""
        async with asyncio.timeout(WITHIN_S):
            data = await asyncio.get_running_loop().sock_recv(self._socket, 65536)
        return dict(line.split("=", 1) for line in data.decode().splitlines())

    async def until(self, word: str) -> dict[str, str]:
        """Reads on until that is said."""
        while word not in (words := await self.said()):
            pass
        return words

    def drain(self) -> int:
        """Forgets what was said; how much it was."""
        count = 0
        try:
            while self._socket.recv(65536):
                count += 1
        except BlockingIOError:
            return count
        raise AssertionError("a datagram is never empty")

    def close(self) -> None:
        """Nobody listens any more."""
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """A service manager, at an address of each kind."""
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@ifabric-test-{os.getpid()}")
    yield made
    made.close()


def notifier(manager: Manager, **environ: str) -> Notifier:
    return Notifier.of({"NOTIFY_SOCKET": manager.address, **environ}, CLOCK)


async def test_a_daemon_says_that_it_is_ready_that_it_lives_and_that_it_stops(
    manager: Manager, tmp_path: Path, etcd: RealServer, nats: RealServer
) -> None:
    """READY when it serves, WATCHDOG while its loop turns and never when the process is frozen, STOPPING at its end."""
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    daemon = RealDaemon(tmp_path / "daemon", [etcd.url], [nats.url], {"actors": ["coordinator"]}, environment)
    try:
        await daemon.start()
        assert (await manager.until("READY"))["STATUS"] == "healthy"
        for _ in range(3):
            await manager.until("WATCHDOG")
        daemon.freeze()
        manager.drain()
        await asyncio.sleep(4 * WATCHDOG_S)  # the time is what is tested: nothing is there to wait for
        assert manager.drain() == 0, "a frozen daemon says nothing"
        daemon.thaw()
        await manager.until("WATCHDOG")
        assert await daemon.terminate() == 0
        assert "STATUS" in await manager.until("STOPPING")
    finally:
        await daemon.close()


@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
async def test_children_are_not_told_where_the_manager_listens(
    manager: Manager, tmp_path: Path, etcd: RealServer, nats: RealServer
) -> None:
    """The fork server of the sandboxes, and whatever else is started, has no name of the socket."""
    daemon = RealDaemon(
        tmp_path / "daemon", [etcd.url], [nats.url], {"actors": ["chassis"]}, {"NOTIFY_SOCKET": manager.address}
    )
    try:
        await daemon.start()
        tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
        children = [pid for task in tasks for pid in (task / "children").read_text().split()]
        assert children, "the chassis has a fork server"
        for pid in children:
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
    finally:
        await daemon.close()


def test_the_variables_are_taken_out_of_the_environment(manager: Manager) -> None:
    """So that a child that inherits the environment cannot speak in our place."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Notifier.of(environ, CLOCK).close()
    assert environ == {"HOME": "/"}


async def test_a_reload_is_said_with_its_time(manager: Manager) -> None:
    """RELOADING with the monotonic clock's microseconds, which systemd compares with when it asked; then READY."""
    notify = notifier(manager)
    before = monotonic()
    notify.reloading()
    notify.ready("healthy")
    said = await manager.said()
    assert said["RELOADING"] == "1"
    assert before * 1e6 - 1 <= int(said["MONOTONIC_USEC"]) <= monotonic() * 1e6
    assert await manager.said() == {"READY": "1", "STATUS": "healthy"}
    notify.close()


async def test_a_tree_that_has_failed_stops_the_watchdog(manager: Manager) -> None:
    """The state is still told, and told once."""
    notify = notifier(manager, WATCHDOG_USEC="20000", WATCHDOG_PID=str(os.getpid()))
    asked = 0

    def alive() -> bool:
        nonlocal asked
        asked += 1
        return asked <= 2

    beating = asyncio.create_task(notify.beat(alive, lambda: "degraded:\n etcd is disconnected"))
    async with asyncio.timeout(WITHIN_S):
        while asked < 6:
            await asyncio.sleep(0.01)
    await cancel_and_wait(beating)
    said = [await manager.said() for _ in range(3)]
    assert said == [{"WATCHDOG": "1"}, {"STATUS": "degraded: etcd is disconnected"}, {"WATCHDOG": "1"}]
    assert manager.drain() == 0
    notify.close()


@pytest.mark.parametrize("environ", [{"WATCHDOG_PID": "1", "WATCHDOG_USEC": "1000"}, {"WATCHDOG_USEC": "x"}, {}])
async def test_a_watchdog_that_is_not_for_this_process_is_not_answered(
    manager: Manager, environ: dict[str, str]
) -> None:
    """Only the state is told then."""
    notify = notifier(manager, **environ)
    beating = asyncio.create_task(notify.beat(lambda: True, lambda: "healthy"))
    assert await manager.said() == {"STATUS": "healthy"}
    await cancel_and_wait(beating)
    assert manager.drain() == 0
    notify.close()


async def test_nobody_listens_and_nothing_fails(manager: Manager, tmp_path: Path) -> None:
    """A manager that has gone, a socket that is not there, and none at all."""
    notify = notifier(manager)
    manager.close()
    for one in (notify, Notifier.of({"NOTIFY_SOCKET": str(tmp_path / "none")}, CLOCK), Notifier.of({}, CLOCK)):
        one.ready("healthy")
        one.status("degraded")
        one.stopping()
        one.close()
        one.close()
