"""The fork server: one small process with wasmtime loaded and nothing else, whose forks become workers.

It is started clean by the daemon, with one socket and no other descriptor, before any guest has run, and it never runs
one: so a worker begins its life without a byte of the daemon's memory, and without the threads that would make a fork
of the daemon unsafe. All pages that it has are shared with its workers, which is what makes them small and quick.

Started as ``python -m ifabric_actors.chassis.nursery FD PARENT SETTINGS``; it ends when the daemon closes the socket, and all
workers with it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys

import msgspec
import wasmtime

from ifabric_actors.chassis import confinement, engine, frames
from ifabric_actors.chassis.worker import Sandbox, Worker

MIB = 1 << 20


class Nursery:
    """Forks, and tells of ends."""

    def __init__(self, control: socket.socket, settings: frames.Settings) -> None:
        self._control = control
        self._settings = settings
        self._engine = engine.build(settings.stack_bytes)
        self._sandbox = Sandbox(self._engine)
        self._reader = frames.Reader(frames.ToServer)
        self._numbers: dict[int, int] = {}
        self._sockets: list[int] = []

    def serve(self, confined: tuple[str, ...]) -> None:
        """Returns when the daemon has gone."""
        _warm(self._sandbox)
        wakeup, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self._send(frames.Ready(engine.fingerprint(self._engine, self._settings.stack_bytes), confined))
        gc.collect()
        gc.freeze()
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wakeup, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == wakeup:
                        os.read(wakeup, 512)
                        self._reap()
                    elif not self._receive():
                        return

    def _receive(self) -> bool:
        data, fds = frames.receive(self._control)
        self._sockets += fds
        self._reader.feed(data)
        while (frame := self._reader.take()) is not None:
            assert isinstance(frame, frames.Fork), "only forks are asked for"
            self._fork(frame, self._sockets.pop(0))
        return bool(data)

    def _fork(self, wanted: frames.Fork, fd: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(wanted, fd)
        os.close(fd)
        self._numbers[pid] = wanted.number
        process = os.pidfd_open(pid)
        self._send(frames.Forked(wanted.number, pid), process)
        os.close(process)

    def _become_worker(self, wanted: frames.Fork, fd: int) -> None:
        """Never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            settings = self._settings
            confinement.confine(
                confinement.Rlimits(
                    data_bytes=settings.compile_memory_bytes if wanted.compiles else settings.run_memory_bytes,
                    cpu_s=settings.compile_cpu_s if wanted.compiles else None,
                    descriptors=settings.descriptors,
                    keep=(fd,),
                )
            )
            Worker(self._sandbox, socket.socket(fileno=fd)).serve(runs=not wanted.compiles)
            status = 0
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._send(frames.Ended(self._numbers.pop(pid), os.waitstatus_to_exitcode(status)))

    def _send(self, frame: frames.Frame, *fds: int) -> None:
        data = frames.pack(frame)
        sent = self._control.sendmsg([data], frames.rights(fds))
        if sent < len(data):
            self._control.sendall(data[sent:])


def _warm(sandbox: Sandbox) -> None:
    """Runs an empty module once: what is loaded and looked up only then would else be so in every worker again."""
    wasm = bytes(wasmtime.wat2wasm(
        '(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)'
        ' (func (export "_start") (call $exit (i32.const 7))) (func (export "trap") unreachable))'
    ))  # fmt: skip
    code = bytes(wasmtime.Module(sandbox.engine, wasm).serialize())
    fd = os.memfd_create("warm", os.MFD_CLOEXEC)
    try:
        os.write(fd, code)
        module = sandbox.prepare(fd)
    finally:
        os.close(fd)
    for entry in ("_start", "trap", "none"):
        start = frames.Start(
            run=0, module=0, entry=entry, args=(), env={}, stdin=b"", wall_s=10, cpu_percent=100, memory_bytes=MIB,
            fuel=10**6, output_bytes=0, tables=1, table_elements=1,
        )  # fmt: skip
        done = sandbox.run(module, start)
        assert done.exit_code == (7 if entry == "_start" else 0), f"an empty module does not run: {done}"


def main(fd: int, parent: int, settings: bytes) -> None:
    """The process."""
    confined = confinement.isolate(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which drains
    nursery = Nursery(socket.socket(fileno=fd), msgspec.json.decode(settings, type=frames.Settings))
    with contextlib.suppress(BrokenPipeError):  # the daemon went while something was being told to it
        nursery.serve(confined)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode())
