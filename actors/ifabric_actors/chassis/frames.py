"""What daemon, fork server and workers say to each other: msgpack in frames, over Unix stream sockets.

A frame is its length (4 bytes, little endian) and one of the messages below. Descriptors travel with the first byte of
the frame that they belong to. Both ends were started by the daemon; still, what a worker says is not believed further
than the types go, since a guest that broke out of WebAssembly would speak in its place.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence

import msgspec

#: a module to be compiled, or its compiled form, is the largest there is
FRAME_MAX = 1 << 30
FDS_MAX = 4
_LENGTH = struct.Struct("<I")
CHUNK = 1 << 16


class Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="k"):
    """The base of all messages."""


# -- daemon to fork server, and back


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What workers are made with. Sizes in bytes."""

    stack_bytes: int
    #: private memory that a worker may have beside its share of ours
    run_memory_bytes: int
    compile_memory_bytes: int
    compile_cpu_s: int
    descriptors: int = 64


class Fork(Frame, frozen=True, array_like=True, tag="fork"):
    """Start a worker on the socket that comes with it."""

    number: int
    #: for one module, with more memory, and processor time that is limited
    compiles: bool = False


class Forked(Frame, frozen=True, array_like=True, tag="forked"):
    """It runs; a descriptor of the process comes with it."""

    number: int
    pid: int


class Ended(Frame, frozen=True, array_like=True, tag="ended"):
    """A worker is gone: its exit code, or the negative number of the signal that ended it."""

    number: int
    status: int


class Ready(Frame, frozen=True, array_like=True, tag="ready"):
    """The fork server can fork. What confines it, and what of that this kernel did not allow."""

    fingerprint: str
    confined: tuple[str, ...]


# -- daemon to worker


class Load(Frame, frozen=True, array_like=True, tag="load"):
    """Keep a compiled module, which comes as a descriptor, under this number."""

    module: int


class Drop(Frame, frozen=True, array_like=True, tag="drop"):
    """Forget a module."""

    module: int


class Start(Frame, frozen=True, array_like=True, tag="start"):
    """Run a module that was loaded. Times in seconds, sizes in bytes."""

    run: int
    module: int
    entry: str
    args: tuple[str, ...]
    env: dict[str, str]
    stdin: bytes
    wall_s: float
    cpu_percent: float
    memory_bytes: int
    fuel: int
    output_bytes: int
    tables: int
    table_elements: int


class Response(Frame, frozen=True, array_like=True, tag="response"):
    """What the guest's call of `ifabric.http` came to."""

    run: int
    data: bytes


class Stop(Frame, frozen=True, array_like=True, tag="stop"):
    """The guest's call of `ifabric.http` ends its run. Why is the daemon's business."""

    run: int


class Compile(Frame, frozen=True, array_like=True, tag="compile"):
    """Compile a module."""

    wasm: bytes


# -- worker to daemon


class Http(Frame, frozen=True, array_like=True, tag="http"):
    """The guest calls `ifabric.http` and waits."""

    run: int
    data: bytes


class Done(Frame, frozen=True, array_like=True, tag="done"):
    """The run is over. `end` is "exit", "trap", "limit", "entry" or "stopped"; `detail` says which trap or limit."""

    run: int
    end: str
    detail: str
    message: str
    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    wall_s: float
    cpu_s: float
    fuel: int
    memory_peak_bytes: int
    stdout_bytes: int
    #: where a trap happened, when the module has names
    function: str = ""


class Compiled(Frame, frozen=True, array_like=True, tag="compiled"):
    """The compiled form of a module."""

    code: bytes


class Refused(Frame, frozen=True, array_like=True, tag="refused"):
    """The module cannot be compiled, or not be loaded, in place of `Compiled` and of `Done`."""

    why: str


ToServer = Fork
FromServer = Ready | Forked | Ended
ToWorker = Load | Drop | Start | Response | Stop | Compile
FromWorker = Http | Done | Compiled | Refused

_encoder = msgspec.msgpack.Encoder()


def pack(*frames: Frame) -> bytes:
    """The frames as bytes to send."""
    parts = []
    for frame in frames:
        body = _encoder.encode(frame)
        parts += [_LENGTH.pack(len(body)), body]
    return b"".join(parts)


class Reader:
    """Makes frames of what a socket delivers, piece by piece."""

    def __init__(self, kind: object) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """More of what was received."""
        self._buffer += data

    def take(self) -> Frame | None:
        """The next frame that is complete, or None. `ValueError` when it is none of ours."""
        buffer = self._buffer
        if len(buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(buffer)
        if length > FRAME_MAX:
            raise ValueError(f"a frame of {length} bytes")
        end = _LENGTH.size + length
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            frame: Frame = self._decode(view[_LENGTH.size : end])
        del buffer[:end]
        return frame


def receive(sock: socket.socket, size: int = CHUNK) -> tuple[bytes, list[int]]:
    """What there is to read, and the descriptors that came with it; blocks when nothing is there and the socket does.

    Nothing: the other side has gone, whether or not it had read all that it was sent.
    """
    try:
        data, ancillary, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return b"", []
    fds: list[int] = []
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(packed[: len(packed) - len(packed) % numbers.itemsize])
            fds += numbers
    return data, fds


def rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that carries descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
