"""The fork server and the workers, as the daemon holds them: a socket each, and a descriptor to end them by.

Everything is non-blocking on the daemon's loop. A worker is killed through its pidfd, so never another process that
got its number; a fork server that dies takes all its workers along (they asked the kernel for that), and the next
worker that is wanted starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import StartupError, Unavailable
from ifabric_actors.chassis import frames

#: the fork server: until it is ready; a fork: until it is reported
START_S, FORK_S = 20.0, 5.0
BUFFER = 1 << 18


class Channel:
    """One end of a socket, on the loop."""

    def __init__(
        self,
        sock: socket.socket,
        kind: object,
        on_frame: Callable[[frames.Frame, list[int]], None],
        on_end: Callable[[], None],
        *,
        takes_fds: bool,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader = frames.Reader(kind)
        self._on_frame, self._on_end = on_frame, on_end
        #: a worker has none to give; whoever might speak in its place is not to fill our table of them
        self._takes_fds = takes_fds
        self._out = bytearray()
        self._open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, *sent: frames.Frame, fds: Sequence[int] = ()) -> None:
        """Sends, or keeps what the socket does not take yet. Descriptors go with what is sent first."""
        if not self._open:
            return
        data = frames.pack(*sent)
        if self._out:
            assert not fds, "descriptors travel on an idle socket"
            self._out += data
            return
        try:
            count = self._sock.sendmsg([data], frames.rights(fds))
        except BlockingIOError:
            assert not fds, "descriptors travel on an idle socket"
            count = 0
        except OSError:
            self.close()
            return
        if count < len(data):
            self._out += data[count:]
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def close(self) -> None:
        """Tells the other side that no more comes. Twice is harmless."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    def _readable(self) -> None:
        try:
            data, fds = frames.receive(self._sock, BUFFER) if self._takes_fds else (self._sock.recv(BUFFER), [])
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._reader.feed(data)
        try:
            while (frame := self._reader.take()) is not None:
                self._on_frame(frame, fds)
        except (ValueError, msgspec.DecodeError):  # not a worker of ours any more
            data = b""
        if not data:
            self.close()
            self._on_end()

    def _writable(self) -> None:
        try:
            count = self._sock.send(self._out[:BUFFER])
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._out[:count]
        if not self._out:
            self._loop.remove_writer(self._sock.fileno())


class Worker:
    """A worker process."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.pid = 0
        self._pidfd = -1
        self._ended = asyncio.get_running_loop().create_future()
        #: called with each frame, and with None when the worker has gone
        self.listener: Callable[[frames.Frame | None], None] | None = None
        self.gone = self.killed = False
        self.runs = 0
        self.idle_since = 0.0
        #: modules that it has loaded, the last used last
        self.loaded: dict[int, None] = {}
        self.channel = Channel(
            sock, frames.FromWorker, lambda frame, _: self._tell(frame), self._leave, takes_fds=False
        )

    def born(self, pid: int, pidfd: int) -> None:
        """The fork server has said who it is."""
        self.pid, self._pidfd = pid, pidfd

    def died(self, status: int) -> None:
        """The fork server has said how it ended."""
        if not self._ended.done():
            self._ended.set_result(status)
        self._leave()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def status(self, timeout_s: float = 2.0) -> int | None:
        """How it ended: its exit code or the negative number of a signal; None when nobody says."""
        await asyncio.wait({self._ended}, timeout=timeout_s)
        return self._ended.result() if self._ended.done() else None

    def kill(self) -> None:
        """Ends it at once, whatever it is doing, stopped or not."""
        self.killed = True
        self.channel.close()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._leave()

    def dismiss(self) -> None:
        """Lets an idle worker end by itself."""
        self.gone = True
        self.channel.close()

    def _tell(self, frame: frames.Frame | None) -> None:
        if self.listener is not None:
            self.listener(frame)

    def _leave(self) -> None:
        if not self.gone:
            self.gone = True
            self._tell(None)


class ForkServer:
    """Starts workers. Starts itself when it is first needed, and again when it has died."""

    def __init__(self, settings: frames.Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._numbers = itertools.count(1)
        self._workers: dict[int, Worker] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._ready: asyncio.Future[frames.Ready] | None = None
        self._lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> frames.Ready:
        """Returns when it can fork. `StartupError` when it cannot be started."""
        async with self._lock:
            if self._ready is not None and self._ready.done() and self._channel is not None:
                return self._ready.result()
            await self._stop()
            ours, theirs = socket.socketpair()
            ready: asyncio.Future[frames.Ready] = asyncio.get_running_loop().create_future()
            self._ready = ready
            self._channel = Channel(ours, frames.FromServer, self._on_frame, self._on_end, takes_fds=True)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "ifabric_actors.chassis.nursery", str(theirs.fileno()), str(os.getpid()),
                    msgspec.json.encode(self._settings).decode(),
                    pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                    env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.environ.get("PATH", "")},
                )  # fmt: skip
            finally:
                theirs.close()
            self._watch = asyncio.create_task(self._reap(self._process), name="chassis fork server")
            ends: set[asyncio.Future[Any]] = {ready, self._watch}
            await asyncio.wait(ends, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await self._stop()
                raise StartupError("the fork server for sandboxes did not start; its own words are on stderr")
            return ready.result()

    async def fork(self, *, compiles: bool = False) -> Worker:
        """A new worker. `Unavailable` when the fork server does not answer."""
        try:
            await self.start()
        except StartupError as error:
            raise Unavailable(str(error), what="sandbox") from None
        ours, theirs = socket.socketpair()
        worker = Worker(next(self._numbers), ours)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._workers[worker.number], self._waiting[worker.number] = worker, waiting
        try:
            assert self._channel is not None
            self._channel.send(frames.Fork(worker.number, compiles), fds=(theirs.fileno(),))
            theirs.close()
            await asyncio.wait({waiting}, timeout=FORK_S)
        finally:
            self._waiting.pop(worker.number, None)
            if worker.pid == 0:
                worker.kill()
        if worker.pid == 0 or worker.gone:
            if self._process is not None and not waiting.done():
                self._process.kill()  # frozen: its workers end with it, and the next fork has a new one
            raise Unavailable("no sandbox could be started", what="sandbox")
        return worker

    async def stop(self) -> None:
        """Ends it, and all workers with it."""
        async with self._lock:
            await self._stop()

    async def _stop(self) -> None:
        for worker in list(self._workers.values()):
            worker.kill()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None and self._watch is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await asyncio.wait({self._watch})
            await cancel_and_wait(self._watch)
            self._process = self._watch = None
        for worker in list(self._workers.values()):
            worker.died(-signal.SIGKILL)
        self._workers.clear()

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._on_end()

    def _on_end(self) -> None:
        """The fork server has gone, and so have its workers."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for worker in list(self._workers.values()):
            worker.died(-signal.SIGKILL)
        self._workers.clear()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)

    def _on_frame(self, frame: frames.Frame, fds: list[int]) -> None:
        match frame:
            case frames.Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(frame)
            case frames.Forked():
                pidfd = fds.pop(0)
                worker = self._workers.get(frame.number)
                if worker is None or worker.gone:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.close(pidfd)
                else:
                    worker.born(frame.pid, pidfd)
                waiting = self._waiting.get(frame.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)
            case frames.Ended():
                worker = self._workers.pop(frame.number, None)
                if worker is not None:
                    worker.died(frame.status)
