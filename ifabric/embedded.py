"""Real servers of the daemon's own: etcd and nats-server as children, on loopback, under its state directory.

The default, so that one command starts everything; the data is kept. They are not for production, where a cluster
outlives the daemon. Each is a supervised part: when it dies it is started again, on the same port and the same data.

They run in a session of their own, so that Ctrl-C in a terminal reaches the daemon alone, which stops them when it
has drained; and they die with the daemon however it dies, because the kernel is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from ifabric.bus.serverconf import ServerConf
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import StartupError
from ifabric.programs import Program

READY_S = 20.0
STOP_S = 5.0
QUOTA_BYTES = 8 << 30
#: below it a server that did not start probably had no room: etcd takes 64 MB for its log, before anything is in it
ROOM_BYTES = 128 << 20
#: in what a Go program says when it panics: below the reason, and within a line of JSON
_STACKS = re.compile(r'\ngoroutine [\s\S]*|,"stacktrace":"(?:\\.|[^"\\])*"')
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Runs in the child before its program: the kernel ends it when the daemon dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written in the block is a `StartupError` that names the folder and the reason."""
    try:
        yield
    except OSError as error:
        raise StartupError(f"cannot write to the state directory {folder}: {error.strerror}") from None


class StateLock:
    """One daemon for each state directory."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: int | None = None

    def take(self) -> None:
        """`StartupError` when another daemon has it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(
                f"another daemon runs with the state directory {self._path.parent}. Stop it, or give this one --state-dir."
            ) from None
        except OSError as error:
            raise StartupError(f"cannot use the state directory {self._path.parent}: {error.strerror}") from None

    def give_back(self) -> None:
        """Twice is harmless."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Server:
    """One child: a program with its arguments, ready when `probe` says so."""

    def __init__(
        self, program: Program, arguments: list[str], log: Path, probe: Callable[[], Awaitable[bool]], clock: Clock
    ) -> None:
        self._program = program
        self._arguments = arguments
        self._log = log
        self._probe = probe
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        #: where in the log file this life of the child begins
        self._log_from = 0

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the child has ended by itself."""
        return self._lost

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Returns when the server answers. `StartupError` shows the end of its log."""
        self._lost = asyncio.get_running_loop().create_future()
        with writing(self._log.parent):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            log = self._log.open("ab")
        with log:
            self._log_from = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                self._program.path,
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        until = self._clock.monotonic() + READY_S
        while not await self._probe():
            if self._process.returncode is not None or self._clock.monotonic() > until:
                await self.stop()
                raise StartupError(
                    f"{self._program} did not start{self._no_room()}; its log {self._log} ends:\n{self._tail()}"
                )
            await self._clock.sleep(0.01)
        self._watch = asyncio.create_task(self._wait(self._process), name=f"watch {Path(self._program.path).name}")

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        assert self._lost is not None
        if not self._lost.done():
            self._lost.set_result(f"{self._program} ended with {code}")

    async def stop(self) -> None:
        """Asks it to end, and after `STOP_S` makes it."""
        if self._watch is not None:
            await cancel_and_wait(self._watch)
            self._watch = None
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _no_room(self) -> str:
        free = shutil.disk_usage(self._log.parent).free
        return f", with {free >> 20} MB left on the disk of {self._log.parent.parent}" if free < ROOM_BYTES else ""

    def _tail(self) -> str:
        try:
            said = self._log.read_bytes()[self._log_from :].decode(errors="replace")
        except OSError:
            return "  (no log)"
        reason = _STACKS.sub("", said)
        return "\n".join("  " + line for line in reason.splitlines()[-5:])


def embedded_etcd(
    program: Program, folder: Path, port: int, clock: Clock, *, quota_bytes: int = QUOTA_BYTES
) -> tuple[Server, str]:
    """An etcd with its data in `folder`, and its URL."""
    peer, port = free_port(), port or free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [
        f"--data-dir={folder / 'etcd'}",
        "--name=embedded",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
        f"--initial-cluster=embedded=http://127.0.0.1:{peer}",
        f"--quota-backend-bytes={quota_bytes}",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=10m",
        "--grpc-keepalive-min-time=1s",
        "--log-level=warn",
    ]
    if program.version >= (3, 4, 0):
        arguments.append("--logger=zap")

    async def healthy() -> bool:
        return b'"health":"true"' in await http_get(port, "/health")

    return Server(program, arguments, folder / "log" / "etcd.log", healthy, clock), url


def embedded_nats(program: Program, folder: Path, port: int, clock: Clock) -> tuple[Server, str]:
    """A nats-server with JetStream, its data in `folder`, and its URL."""
    port = port or free_port()
    config = folder / "nats.conf"
    with writing(folder):
        config.parent.mkdir(parents=True, exist_ok=True)
        conf = ServerConf(name="ifabric-embedded", listen=f"127.0.0.1:{port}", store_dir=folder / "nats")
        config.write_text(conf.text())

    async def listening() -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            return (await reader.readline()).startswith(b"INFO")
        finally:
            writer.close()

    server = Server(program, ["-c", str(config)], folder / "log" / "nats.log", listening, clock)
    return server, f"nats://127.0.0.1:{port}"


async def http_get(port: int, path: str) -> bytes:
    """The whole answer of something on loopback; nothing when there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(1):
            return await reader.read()
    except (OSError, TimeoutError):
        return b""
    finally:
        writer.close()
