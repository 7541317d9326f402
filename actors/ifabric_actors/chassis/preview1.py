"""WASI preview 1, as far as a guest here has it.

Arguments, environment and random numbers are wasmtime's. Everything else is ours, for two reasons. Some of it is a
limit: what is written is counted and cut, a sleep never outlasts the run, the clocks tell a guest nothing but its own
time, an exit code is whatever the guest says. And the rest is a file system that is not there: three descriptors that
are no files, and no directory to open anything in. wasmtime's own would say the same by way of threads and of code
that has let guests out before; a table of error numbers cannot.

A worker has one run at a time, so there is one `Host`, and a host function may raise `Stopped`: the guest ends there,
and the exception comes out of the call into it. (With two threads in one process wasmtime-py may hand it to the wrong
one.)
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import wasmtime

from ifabric.clock import block, monotonic, wall_ns

WASI = "wasi_snapshot_preview1"
OK, EBADF, EFAULT, EFBIG, EINVAL, ENOTDIR, ENOTSUP, ESPIPE = 0, 8, 21, 22, 28, 54, 58, 70
#: pieces of one write or read, and subscriptions of one poll
VECTORS_MAX = 1024
REQUEST_MAX = 2 << 20
CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_CPU_PROCESS, CLOCK_CPU_THREAD = range(4)
ABSTIME = 1
#: what each descriptor may do (rights of fd_read and fd_write); that it is no terminal makes C write in large pieces
RIGHTS = {0: 1 << 1, 1: 1 << 6, 2: 1 << 6}
_FDSTAT, _FILESTAT = struct.Struct("<BxH4xQQ"), struct.Struct("<QQB7xQQQQQ")
#: what comes of asking for a file where there is none, by the types of its numbers (i: 32 bits, I: 64)
_NO_FILES = {
    "fd_advise": ("iIIi", ESPIPE), "fd_allocate": ("iII", ESPIPE), "fd_datasync": ("i", EINVAL), "fd_sync": ("i", EINVAL),
    "fd_fdstat_set_flags": ("ii", OK), "fd_fdstat_set_rights": ("iII", ENOTSUP), "fd_filestat_set_size": ("iI", EINVAL),
    "fd_filestat_set_times": ("iIIi", ENOTSUP), "fd_pread": ("iiiIi", ESPIPE), "fd_pwrite": ("iiiIi", ESPIPE),
    "fd_prestat_get": ("ii", EBADF), "fd_prestat_dir_name": ("iii", EBADF), "fd_readdir": ("iiiIi", ENOTDIR),
    "fd_renumber": ("ii", ENOTSUP), "fd_seek": ("iIii", ESPIPE), "fd_tell": ("ii", ESPIPE),
    "path_create_directory": ("iii", ENOTDIR), "path_filestat_get": ("iiiii", ENOTDIR),
    "path_filestat_set_times": ("iiiiIIi", ENOTDIR), "path_link": ("iiiiiii", ENOTDIR),
    "path_open": ("iiiiiIIii", ENOTDIR), "path_readlink": ("iiiiii", ENOTDIR), "path_remove_directory": ("iii", ENOTDIR),
    "path_rename": ("iiiiii", ENOTDIR), "path_unlink_file": ("iii", ENOTDIR),
}  # fmt: skip
_U32X2, _U32, _U64 = struct.Struct("<II"), struct.Struct("<I"), struct.Struct("<Q")
_SUBSCRIPTION = struct.Struct("<QB7xI4xQQH6x")
_EVENT = struct.Struct("<QHB5xQH6x")


class Stopped(Exception):
    """The run ends here: by its own word (`exit`), or by a limit or a refusal."""

    def __init__(self, end: str, detail: str = "", message: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.end, self.detail, self.message, self.code = end, detail, message, code


class FaultError(Exception):
    """The guest named memory that it does not have."""


class Host:
    """What the host functions see of the run that is on."""

    def __init__(self) -> None:
        self.began = self.deadline = 0.0
        self.stdin = b""
        self._read = 0
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.room = 0
        self.truncated = False
        self._open = set(RIGHTS)
        #: asks the daemon; raises `Stopped`
        self.http: Callable[[bytes], bytes] = _no_http
        self._response = b""

    def begin(self, stdin: bytes, output_bytes: int, wall_s: float) -> None:
        """Nothing of the last run is left."""
        self.began = monotonic()
        self.deadline = self.began + wall_s
        self.stdin, self._read = stdin, 0
        self.stdout, self.stderr = bytearray(), bytearray()
        self.room, self.truncated = output_bytes, False
        self._open = set(RIGHTS)
        self._response = b""

    # -- the functions; numbers arrive as signed 32 or 64 bits

    def fd_write(self, memory: Memory, fd: int, vectors: int, count: int, written: int) -> int:
        if fd not in (1, 2) or fd not in self._open:
            return EBADF
        pieces = memory.vectors(vectors, count)
        total = sum(length for _, length in pieces)
        memory.check(written, 4)
        if total and self.truncated:
            raise Stopped("limit", "output_bytes", "it wrote on after its output was full")
        kept = min(total, self.room)
        left = kept
        out = self.stdout if fd == 1 else self.stderr
        for at, length in pieces:
            out += memory.read(at, min(length, left))
            left -= min(length, left)
        self.room -= kept
        memory.write(written, _U32.pack(kept))
        self.truncated = self.truncated or kept < total
        return EFBIG if kept < total else OK

    def fd_read(self, memory: Memory, fd: int, vectors: int, count: int, read: int) -> int:
        if fd != 0 or fd not in self._open:
            return EBADF
        memory.check(read, 4)
        began = self._read
        for at, length in memory.vectors(vectors, count):
            piece = self.stdin[self._read : self._read + length]
            memory.write(at, piece)
            self._read += len(piece)
        memory.write(read, _U32.pack(self._read - began))
        return OK

    def fd_close(self, fd: int) -> int:
        if fd not in self._open:
            return EBADF
        self._open.discard(fd)
        return OK

    def fd_fdstat_get(self, memory: Memory, fd: int, at: int) -> int:
        if fd not in self._open:
            return EBADF
        memory.write(at, _FDSTAT.pack(0, 0, RIGHTS[fd], 0))
        return OK

    def fd_filestat_get(self, memory: Memory, fd: int, at: int) -> int:
        if fd not in self._open:
            return EBADF
        memory.write(at, _FILESTAT.pack(0, 0, 0, 1, 0, 0, 0, 0))
        return OK

    def no_file(self, number: int) -> Callable[..., int]:
        """Answers whatever is asked of a descriptor that is there with this error number."""
        return lambda fd, *_: number if fd in self._open else EBADF

    def clock_time_get(self, memory: Memory, clock: int, _precision: int, at: int) -> int:
        now = self._now_ns(clock)
        if now is None:
            return EINVAL
        memory.write(at, _U64.pack(now))
        return OK

    def clock_res_get(self, memory: Memory, clock: int, at: int) -> int:
        if self._now_ns(clock) is None:
            return EINVAL
        memory.write(at, _U64.pack(1000))
        return OK

    def poll_oneoff(self, memory: Memory, subscriptions: int, events: int, count: int, ready: int) -> int:
        count &= 0xFFFFFFFF
        if not 0 < count <= VECTORS_MAX:
            return EINVAL
        memory.check(ready, 4)
        asked = [
            _SUBSCRIPTION.unpack(memory.read((subscriptions & 0xFFFFFFFF) + 48 * i, _SUBSCRIPTION.size))
            for i in range(count)
        ]
        memory.check(events, 32 * count)
        # input and outputs are always ready; what stands in a clock's place is their descriptor then
        found = [
            _EVENT.pack(data, OK if fd in self._open else EBADF, kind, 0, 0)
            for data, kind, fd, *_ in asked
            if kind != 0
        ]
        if not found:
            waits = [self._wait_s(clock, timeout, flags) for _, _, clock, timeout, _, flags in asked]
            self.sleep(min(waits))
            due = (one for one, wait in zip(asked, waits, strict=True) if wait <= min(waits))
            found = [_EVENT.pack(one[0], OK, 0, 0, 0) for one in due]
        memory.write(events, b"".join(found))
        memory.write(ready, _U32.pack(len(found)))
        return OK

    def sched_yield(self) -> int:
        return OK

    def proc_exit(self, code: int) -> None:
        raise Stopped("exit", code=code & 0xFFFFFFFF)

    def call_http(self, memory: Memory, request: int, length: int, out: int, room: int) -> int:
        """The answer's length, or the negative length that it needs; then it is kept for a call without a request."""
        length, room = length & 0xFFFFFFFF, room & 0xFFFFFFFF
        memory.check(out, room)
        if length:
            if length > REQUEST_MAX:
                raise Stopped(
                    "trap", "other", f"a request of {length} bytes for ifabric.http; {REQUEST_MAX} are allowed"
                )
            self._response = self.http(memory.read(request, length))
        if len(self._response) > room:
            return -len(self._response)
        response, self._response = self._response, b""
        memory.write(out, response)
        return len(response)

    # -- time

    def sleep(self, wait_s: float) -> None:
        """Blocks the run; a sleep that would outlast it ends it now."""
        left = self.deadline - monotonic()
        if wait_s >= left:
            raise Stopped("limit", "wall_s", f"it asked to sleep for {wait_s:.6g} s with {max(left, 0):.3g} s left")
        block(wait_s)

    def _now_ns(self, clock: int) -> int | None:
        if clock == CLOCK_REALTIME:
            return wall_ns()
        if clock in (CLOCK_MONOTONIC, CLOCK_CPU_PROCESS, CLOCK_CPU_THREAD):
            return int((monotonic() - self.began) * 1e9)
        return None

    def _wait_s(self, clock: int, timeout_ns: int, flags: int) -> float:
        if flags & ABSTIME:
            timeout_ns = max(0, timeout_ns - (self._now_ns(clock) or 0))
        return timeout_ns / 1e9


class Memory:
    """The guest's memory, for the length of one host call; every access is checked."""

    __slots__ = ("_at", "_size")

    def __init__(self, caller: wasmtime.Caller) -> None:
        found = caller.get("memory")
        if not isinstance(found, wasmtime.Memory):
            raise Stopped("trap", "other", "it called the host without exporting its memory as `memory`")
        self._size = found.data_len(caller)
        self._at = ctypes.cast(found.data_ptr(caller), ctypes.c_void_p).value or 0

    def check(self, at: int, length: int) -> int:
        """The address as a number; `FaultError` when not all of it is there."""
        at &= 0xFFFFFFFF
        if at + length > self._size:
            raise FaultError
        return at

    def read(self, at: int, length: int) -> bytes:
        return ctypes.string_at(self._at + self.check(at, length), length)

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(self._at + self.check(at, len(data)), data, len(data))

    def vectors(self, at: int, count: int) -> list[tuple[int, int]]:
        """The pieces (address, length) that a list of them names, each of which is there."""
        count &= 0xFFFFFFFF
        if count > VECTORS_MAX:
            raise FaultError
        pieces = list(_U32X2.iter_unpack(self.read(at, 8 * count)))
        for piece, length in pieces:
            self.check(piece, length)
        return pieces


def _no_http(_request: bytes) -> bytes:
    raise Stopped("stopped", message="no call is possible")


def link(linker: wasmtime.Linker, host: Host) -> None:
    """All that a guest may import."""
    linker.allow_shadowing = True
    linker.define_wasi()
    i32, i64 = wasmtime.ValType.i32(), wasmtime.ValType.i64()
    kinds = {"i": i32, "I": i64}
    own: list[tuple[str, str, Callable[..., int]]] = [
        ("fd_write", "iiii", host.fd_write),
        ("fd_read", "iiii", host.fd_read),
        ("fd_fdstat_get", "ii", host.fd_fdstat_get),
        ("fd_filestat_get", "ii", host.fd_filestat_get),
        ("clock_time_get", "iIi", host.clock_time_get),
        ("clock_res_get", "ii", host.clock_res_get),
        ("poll_oneoff", "iiii", host.poll_oneoff),
    ]
    for name, takes, function in own:
        kind = wasmtime.FuncType([kinds[one] for one in takes], [i32])
        linker.define_func(WASI, name, kind, _guarded(function), access_caller=True)
    for name, (takes, number) in _NO_FILES.items():
        kind = wasmtime.FuncType([kinds[one] for one in takes], [i32])
        linker.define_func(WASI, name, kind, host.no_file(number))
    linker.define_func(WASI, "path_symlink", wasmtime.FuncType([i32] * 5, [i32]), lambda *_: ENOTDIR)
    linker.define_func(WASI, "fd_close", wasmtime.FuncType([i32], [i32]), host.fd_close)
    linker.define_func(WASI, "sched_yield", wasmtime.FuncType([], [i32]), host.sched_yield)
    linker.define_func(WASI, "proc_exit", wasmtime.FuncType([i32], []), host.proc_exit)
    linker.define_func(
        "ifabric", "http", wasmtime.FuncType([i32] * 4, [i32]), _guarded(host.call_http, trap=True), access_caller=True
    )


def _guarded(function: Callable[..., int], *, trap: bool = False) -> Callable[..., int]:
    """With the guest's memory in place of its caller; a bad address is an error number, or with `trap` its end."""

    def call(caller: wasmtime.Caller, *numbers: Any) -> int:
        try:
            return function(Memory(caller), *numbers)
        except FaultError:
            if trap:
                raise Stopped("trap", "memory_out_of_bounds", "it named memory that it does not have") from None
            return EFAULT

    return call
