"""The process that a guest runs in.

**One process, one guest at a time.** wasmtime-py is not thread-safe, no limit of wasmtime's reaches into a host
function, and a crash takes its process with it: so guests run in processes of their own, which are worth nothing. The
daemon gives each run an end on its own clock and kills the worker that is still busy then; the limits below are what
makes that rare.

**Nothing is kept but compiled code.** A run gets a new store and instance (a tenth of a millisecond), and both are gone
after it. What a worker keeps from run to run are modules, which are read-only and come as sealed descriptors.

**Time.** A thread raises the engine's epoch every five milliseconds while there is work. The guest's code looks at it in
every loop and function, and calls `_look` here, which ends the run at its deadline, and otherwise puts it to sleep for
as long as it has had more of the processor than its share. So `cpu_percent` holds over the whole run, to a tick.

**What ends a run, ends it by name.** wasmtime tells its limits in words; `_named` is the one table from those words to
the fabric's. A `memory.grow` beyond the limit is no end: WebAssembly has an answer for it, -1, and the guest gets it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from typing import Any

import wasmtime
from wasmtime import _bindings as ffi
from wasmtime._extern import wrap_extern

from ifabric.clock import block, monotonic, thread_cpu
from ifabric_actors.chassis import confinement, frames
from ifabric_actors.chassis.engine import TICK_S
from ifabric_actors.chassis.preview1 import Host, Stopped, link

#: how long the ticker goes on after the last run, so that the next one need not wake it
LINGER_S = 1.0
CONTINUE = 0
MAGIC = b"\0asm"
#: of what wasmtime says about an end
MESSAGE_MAX = 1000
_ON_DEADLINE = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ffi.wasmtime_update_deadline_kind_t),
)
_NO_FINALIZER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(0)
_TRAPS = {
    wasmtime.TrapCode.UNREACHABLE: "unreachable",
    wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS: "memory_out_of_bounds",
    wasmtime.TrapCode.TABLE_OUT_OF_BOUNDS: "table_out_of_bounds",
    wasmtime.TrapCode.INDIRECT_CALL_TO_NULL: "indirect_call_to_null",
    wasmtime.TrapCode.BAD_SIGNATURE: "bad_signature",
    wasmtime.TrapCode.INTEGER_OVERFLOW: "integer_overflow",
    wasmtime.TrapCode.INTEGER_DIVISION_BY_ZERO: "integer_division_by_zero",
    wasmtime.TrapCode.BAD_CONVERSION_TO_INTEGER: "bad_conversion_to_integer",
}
_LIMIT_TRAPS = {wasmtime.TrapCode.STACK_OVERFLOW: "stack_bytes", wasmtime.TrapCode.OUT_OF_FUEL: "fuel"}
#: wasmtime's words for what `Store.set_limits` refuses
_LIMIT_WORDS = (
    ("exceeds memory limits", "memory_bytes"),
    ("exceeds table limits", "table_elements"),
    ("instance count too high", "instances"),
    ("memory count too high", "memories"),
    ("table count too high", "tables"),
)


class Ticker:
    """Raises an engine's epoch while somebody runs."""

    def __init__(self, engine: wasmtime.Engine) -> None:
        self._engine = engine
        self._wanted = threading.Event()
        self._running = False
        self._last = 0.0

    def start(self) -> None:
        """In the process that it is for: threads do not survive a fork."""
        threading.Thread(target=self._run, name="epoch", daemon=True).start()

    def begin(self) -> None:
        self._running = True
        if not self._wanted.is_set():
            self._wanted.set()

    def end(self) -> None:
        self._last = monotonic()
        self._running = False

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            block(TICK_S)
            self._engine.increment_epoch()
            if self._has_nobody():
                self._wanted.clear()
                if not self._has_nobody():  # somebody came between the two
                    self._wanted.set()

    def _has_nobody(self) -> bool:
        return not self._running and monotonic() - self._last > LINGER_S


class Sandbox:
    """An engine, and what a guest finds around itself. Made once, before forking: it holds nothing of a run."""

    def __init__(self, engine: wasmtime.Engine) -> None:
        self.engine = engine
        self.host = Host()
        self._linker = wasmtime.Linker(engine)
        link(self._linker, self.host)
        self.ticker = Ticker(engine)
        self._on_deadline = _ON_DEADLINE(self._look)
        self._stopped: Stopped | None = None
        self._cpu_began = self._share = 0.0

    def prepare(self, fd: int) -> wasmtime.InstancePre:
        """A module from its compiled form, ready to be started. `WasmtimeError` when it does not fit."""
        return self.linked(wasmtime.Module.deserialize_file(self.engine, confinement.path_of(fd)))

    def linked(self, module: wasmtime.Module) -> wasmtime.InstancePre:
        """The module with its imports. `WasmtimeError` when one of them is not what it takes it for."""
        return self._linker.instantiate_pre(module)

    def run(self, module: wasmtime.InstancePre, start: frames.Start) -> frames.Done:
        """Runs a guest from start to end, whatever its end is."""
        host, store = self.host, wasmtime.Store(self.engine)
        self._stopped = None
        memory, end, function = None, Stopped("exit"), ""
        self.ticker.begin()
        host.begin(start.stdin, start.output_bytes, start.wall_s)
        self._cpu_began, self._share = thread_cpu(), start.cpu_percent / 100
        try:
            self._equip(store, start)
            instance = module.instantiate(store)
            memory, entry = _export(store, instance, "memory"), _export(store, instance, start.entry)
            if not isinstance(entry, wasmtime.Func):
                raise Stopped("entry", message=f"it exports no function {start.entry}")
            kind = entry.type(store)
            if kind.params or kind.results:
                raise Stopped("entry", message=f"{start.entry} takes or returns something; an entry does neither")
            entry(store)
        except Stopped as stopped:
            end = stopped.with_traceback(None)  # which would keep the store in a circle
        except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
            end, function = self._stopped or _named(error), _place(error)
        finally:
            self.ticker.end()
            wall_s, cpu_s = monotonic() - host.began, thread_cpu() - self._cpu_began
            fuel = start.fuel - store.get_fuel()
            memory_peak = memory.data_len(store) if isinstance(memory, wasmtime.Memory) else start.memory_bytes
            store.close()
        return frames.Done(
            run=start.run,
            end=end.end,
            detail=end.detail,
            message=end.message[:MESSAGE_MAX],
            exit_code=end.code,
            stdout=bytes(host.stdout),
            stderr=bytes(host.stderr),
            truncated=host.truncated,
            wall_s=wall_s,
            cpu_s=cpu_s,
            fuel=fuel,
            memory_peak_bytes=memory_peak,
            stdout_bytes=len(host.stdout),
            function=function,
        )

    def _equip(self, store: wasmtime.Store, start: frames.Start) -> None:
        store.set_limits(start.memory_bytes, start.table_elements, instances=1, tables=start.tables, memories=1)
        store.set_fuel(start.fuel)
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["guest", *start.args]
        wasi.env = start.env.items()
        store.set_wasi(wasi)
        ffi.wasmtime_store_epoch_deadline_callback(store.ptr(), self._on_deadline, None, _NO_FINALIZER)
        store.set_epoch_deadline(1)

    def _look(self, _context: Any, _data: Any, delta: Any, kind: Any) -> int:
        """Called from within the guest, every tick: may it go on, and not faster than its share?

        Nothing may be raised here: there is no Python on the other side.
        """
        delta[0], kind[0] = 1, CONTINUE
        now, deadline = monotonic(), self.host.deadline
        if now < deadline:
            ahead_s = (thread_cpu() - self._cpu_began) / self._share - (now - self.host.began)
            if ahead_s > 0:
                block(min(ahead_s, deadline - now))
            if monotonic() < deadline:
                return 0
        self._stopped = Stopped("limit", "wall_s", "its time was up")
        return ctypes.cast(ffi.wasmtime_error_new(b"time is up"), ctypes.c_void_p).value or 0


def _export(store: wasmtime.Store, instance: wasmtime.Instance, name: str) -> Any:
    """One export, or None. (`Instance.exports` would make an object of each: a guest may have very many.)"""
    item, text = ffi.wasmtime_extern_t(), name.encode()
    there = ffi.wasmtime_instance_export_get(
        store._context(),
        ctypes.byref(instance._instance),
        ctypes.create_string_buffer(text),
        len(text),
        ctypes.byref(item),
    )
    return wrap_extern(item) if there else None


def _named(error: Exception) -> Stopped:
    """Why the guest ended, in the fabric's words."""
    said = str(error).rpartition("Caused by:")[2].strip()
    if isinstance(error, wasmtime.Trap):
        code = error.trap_code
        if code in _LIMIT_TRAPS:
            return Stopped("limit", _LIMIT_TRAPS[code], said)
        return Stopped("trap", _TRAPS.get(code, "other") if code is not None else "other", said)
    for words, which in _LIMIT_WORDS:
        if words in said:
            return Stopped("limit", which, said)
    return Stopped("trap", "other", said)


def _place(error: Exception) -> str:
    """The innermost function of a trap, if the module names it."""
    places = error.frames if isinstance(error, wasmtime.Trap) else []
    return (places[0].func_name or "")[:256] if places else ""


class Worker:
    """Talks to the daemon: loads, runs, compiles, one thing after another."""

    def __init__(self, sandbox: Sandbox, sock: socket.socket) -> None:
        self._sandbox = sandbox
        self._sock = sock
        self._reader = frames.Reader(frames.ToWorker)
        self._fds: list[int] = []
        self._modules: dict[int, wasmtime.InstancePre | str] = {}
        self._running = 0
        sandbox.host.http = self._http

    def serve(self, *, runs: bool) -> None:
        """Returns when the daemon has gone, or wants no more of this worker. runs: not only compiles."""
        if runs:
            self._sandbox.ticker.start()
        confinement.no_more_threads()
        while frame := self._next():
            self._handle(frame)

    def _handle(self, frame: frames.Frame) -> None:
        match frame:
            case frames.Start():
                self._running = frame.run
                module = self._modules[frame.module]
                self._send(frames.Refused(module) if isinstance(module, str) else self._sandbox.run(module, frame))
            case frames.Load():
                self._load(frame)
            case frames.Drop():
                self._modules.pop(frame.module, None)
            case frames.Compile():
                self._compile(frame)

    def _load(self, frame: frames.Load) -> None:
        fd = self._fds.pop(0)
        try:
            self._modules[frame.module] = self._sandbox.prepare(fd)
        except wasmtime.WasmtimeError as error:
            self._modules[frame.module] = str(error)
        finally:
            os.close(fd)

    def _compile(self, frame: frames.Compile) -> None:
        if not frame.wasm.startswith(MAGIC):  # wasmtime-py would take it for WebAssembly's text format
            self._send(frames.Refused("it does not begin as a WebAssembly module does"))
            return
        try:
            module = wasmtime.Module(self._sandbox.engine, frame.wasm)
            self._sandbox.linked(module)
            code = bytes(module.serialize())
        except wasmtime.WasmtimeError as error:
            self._send(frames.Refused(str(error)))
        else:
            self._send(frames.Compiled(code))

    def _http(self, request: bytes) -> bytes:
        """Waits for the daemon's answer no longer than the run may last."""
        self._send(frames.Http(self._running, request))
        while True:
            left_s = self._sandbox.host.deadline - monotonic()
            if left_s <= 0:
                raise Stopped("limit", "wall_s", "its time was up while it waited for a response")
            self._sock.settimeout(left_s)
            try:
                frame = self._next()
            except TimeoutError:
                continue
            finally:
                self._sock.settimeout(None)
            if isinstance(frame, frames.Response) and frame.run == self._running:
                return frame.data
            if frame is None or (isinstance(frame, frames.Stop) and frame.run == self._running):
                raise Stopped("stopped", message="the daemon ended it")

    def _next(self) -> frames.Frame | None:
        """The next frame; None when there is nobody to send one."""
        while (frame := self._reader.take()) is None:
            data, fds = frames.receive(self._sock)
            self._fds += fds
            if not data:
                return None
            self._reader.feed(data)
        return frame

    def _send(self, frame: frames.Frame) -> None:
        self._sock.sendall(frames.pack(frame))
