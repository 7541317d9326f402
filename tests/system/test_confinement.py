"""What a worker may not do although its guest has broken out, tried from inside; and what it still has to do.

The tests are of a small fork server (this file as a program), one for each user, whose forks are confined and then try
one thing: a *probe*. Every measure is also tried with those before it taken away, else seccomp would hide the rest; and
every probe of something forbidden is tried without confinement first, where it has to succeed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import json
import mmap
import os
import platform
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if sys.platform != "linux":
    pytest.skip("confinement is of Linux", allow_module_level=True)

import wasmtime
from wasmtime import _bindings as ffi

from ifabric_actors.chassis import confinement, seccomp

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "actors"), *filter(None, sys.path)]
MIB = 1 << 20
SECRET = "IFABRIC_TEST_SECRET"
WAIT_S = 20.0
USER = 1000
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
EVERYWHERE = ctypes.create_string_buffer(8)
X86 = platform.machine() == "x86_64"


# -- the guest --------------------------------------------------------------------------------------------------------

WASI = "wasi_snapshot_preview1"
GUEST = f"""(module
  (import "{WASI}" "args_sizes_get" (func $args (param i32 i32) (result i32)))
  (import "{WASI}" "random_get" (func $random (param i32 i32) (result i32)))
  (import "{WASI}" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "{WASI}" "fd_fdstat_get" (func $stat (param i32 i32) (result i32)))
  (import "{WASI}" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 1000) "from the module's own pages")
  (func (export "wasi")
    (if (call $args (i32.const 0) (i32.const 4)) (then unreachable))
    (if (call $random (i32.const 16) (i32.const 16)) (then unreachable))
    (if (call $clock (i32.const 1) (i64.const 1) (i32.const 32)) (then unreachable))
    (drop (call $stat (i32.const 1) (i32.const 64)))
    (call $exit (i32.add (i32.const 40) (i32.load (i32.const 0)))))
  (func (export "grow") (result i32) (memory.grow (i32.const 8191)))
  (func (export "fill") (memory.fill (i32.const 0) (i32.const 1) (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 1))))
  (func (export "out_of_bounds") (drop (i32.load (i32.const 0x7ffffff0))))
  (func (export "by_zero") (drop (i32.div_s (i32.const 1) (i32.const 0))))
  (func $deep (export "too_deep") (call $deep))
  (func (export "unreachable") unreachable)
  (func (export "spin") (loop (br 0)))
)"""
DEADLINE = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ffi.wasmtime_update_deadline_kind_t),
)
NO_FINALIZER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(0)


def engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.parallel_compilation = False
    return wasmtime.Engine(config)


class Loaded:
    """The guest in a confined process: it comes through the socket, as a module does."""

    def __init__(self, made: wasmtime.Engine, channel: socket.socket) -> None:
        self.engine = made
        _, fds, _, _ = socket.recv_fds(channel, 1, 1)
        self.module = wasmtime.Module.deserialize_file(made, confinement.path_of(fds[0]))
        self.linker = wasmtime.Linker(made)
        self.linker.define_wasi()

    def run(self, entry: str, deadline: int = 10**6, on_deadline: Any = None) -> Any:
        store = wasmtime.Store(self.engine)
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["guest", "one"]
        store.set_wasi(wasi)
        store.set_epoch_deadline(deadline)
        if on_deadline is not None:
            ffi.wasmtime_store_epoch_deadline_callback(store.ptr(), on_deadline, None, NO_FINALIZER)
        try:
            exports = self.linker.instantiate(store, self.module).exports(store)
            result = exports[entry](store)
            return [result, exports["fill"](store)] if entry == "grow" else result
        except wasmtime.ExitTrap as stopped:
            return stopped.code
        except wasmtime.Trap as trap:
            return trap.trap_code.name
        finally:
            store.close()


# -- the fork server --------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """What a probe has beside its arguments."""

    engine: wasmtime.Engine
    channel: socket.socket


PROBES: dict[str, Callable[..., Any]] = {}


def probe(function: Callable[..., Any]) -> Callable[..., Any]:
    PROBES[function.__name__] = function
    return function


#: a measure, and how a fork does without it
WITHOUT: dict[str, Callable[[], None]] = {}


def _refuse(*_: object) -> None:
    raise OSError(errno.EPERM, "left out")


for _name, _function in (
    ("root", "_own_root"), ("own_user", "_become_nobody"), ("capabilities", "_drop_capabilities"),
    ("undumpable", "_hide_from_its_own_user"),
):  # fmt: skip
    WITHOUT[_name] = partial(setattr, confinement, _function, _refuse)
WITHOUT["parent"] = partial(setattr, confinement, "_server", 1 << 22)
WITHOUT["landlock"] = partial(setattr, confinement, "_landlock", list)
WITHOUT["seccomp"] = partial(setattr, seccomp, "program", lambda *_: None)


def serve(uid: int, isolated: bool) -> None:
    """One line of JSON a request and reply."""
    made = engine()
    code = bytes(wasmtime.Module(made, GUEST).serialize())
    module = os.memfd_create("module", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(module, code)
    fcntl.fcntl(
        module, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    for name in confinement.LATE:
        importlib.import_module(name)  # the user may have no way to where they are
    os.dup2(module, 200)  # above all that a worker is given
    if os.geteuid() == 0:
        os.setgroups([4, 27])
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        libc.prctl(confinement.PR_SET_DUMPABLE, 1, 0, 0, 0)  # as any process that was started by its user is
    applied = confinement.isolate(os.getppid()) if isolated else ()
    print(json.dumps({"applied": applied, "pid": os.getpid()}), flush=True)
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(made, module, json.loads(line))), flush=True)


def _in_a_fork(made: wasmtime.Engine, module: int, asked: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(readable)
        _try(made, theirs, writable, asked)
    theirs.close()
    os.close(writable)
    with contextlib.suppress(BrokenPipeError):
        socket.send_fds(ours, [b"m"], [module])
    said = b""
    deadline = time.monotonic() + WAIT_S
    while select.select([readable], [], [], max(0, deadline - time.monotonic()))[0]:
        piece = os.read(readable, 65536)
        if not piece or asked.get("leave"):
            said += piece
            break
        said += piece
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(readable)
    ours.close()
    status = None if asked.get("leave") else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"status": status, "pid": pid, **(json.loads(said) if said else {})}


def _try(made: wasmtime.Engine, channel: socket.socket, out: int, asked: dict[str, Any]) -> None:
    """Never returns. The answer is there before the process ends, unless the probe ended it."""
    try:
        applied: tuple[str, ...] = ()
        took_s = 0.0
        if asked["confined"]:
            for name in asked["without"]:
                WITHOUT[name]()
            limits = {"data_bytes": 900 * MIB, **asked["limits"]}
            keep = (channel.fileno(), out, *asked.get("keep", ()))
            began = time.perf_counter()
            applied = confinement.confine(confinement.Rlimits(keep=keep, **limits))
            took_s = time.perf_counter() - began
        answer: dict[str, Any] = {"applied": applied, "took_s": took_s}
        try:
            more = (out,) if asked.get("out") else ()
            answer["result"] = PROBES[asked["probe"]](Context(made, channel), *asked["args"], *more)
        except OSError as error:
            answer["error"] = errno.errorcode.get(error.errno or 0, str(error))
        except MemoryError:
            answer["error"] = "MemoryError"
        os.write(out, json.dumps(answer).encode())
        if asked.get("leave"):
            time.sleep(3 * WAIT_S)
    except BaseException:
        os.write(out, json.dumps({"broken": traceback.format_exc()}).encode())
    finally:
        os._exit(0)


# -- the tests' end of it ---------------------------------------------------------------------------------------------


class Tried(NamedTuple):
    """What became of a probe."""

    result: Any
    #: of the OSError that it met
    error: str | None
    #: negative: the signal that ended it
    status: int | None
    applied: tuple[str, ...]
    took_s: float
    pid: int

    @property
    def refused(self) -> bool:
        return self.error in {"EPERM", "EACCES", "ENOENT", "ENOSYS"} or self.status == -signal.SIGSYS


class Box:
    """A fork server, and whose it is."""

    def __init__(self, uid: int, *, isolated: bool = True) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(uid), str(int(isolated))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(PATHS), SECRET: "hunter2", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._uid, self._could = uid, dict[str, bool]()
        self.user = "root" if uid == 0 and os.geteuid() == 0 else "user"
        try:
            ready = self._line()
        except AssertionError:
            self.close()
            raise
        self.applied: tuple[str, ...] = tuple(ready["applied"])
        self.pid: int = ready["pid"]

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, name: str, *args: Any, without: str = "", confined: bool = True, **more: Any) -> Tried:
        """Forks, confines the fork without what is not wanted, and has it try the probe."""
        limits = more.pop("limits", {})
        asked = {"probe": name, "args": args, "without": without.split(), "confined": confined, "limits": limits}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked | more).encode() + b"\n")
        self._process.stdin.flush()
        found = self._line()
        assert "broken" not in found, found["broken"]
        applied = tuple(found.get("applied", ()))
        return Tried(
            found.get("result"), found.get("error"), found["status"], applied, found.get("took_s", 0), found["pid"]
        )

    def needs(self, *names: str) -> None:
        """Skips, and says so, what the kernel or the user here does not allow: by trying it, not by asking the code."""
        lacking = [name for name in names if not self.could(name)]
        if lacking:
            pytest.skip(f"as {self.user}, this kernel does not allow {lacking}")

    def could(self, name: str) -> bool:
        if name not in self._could:
            with contextlib.closing(Box(self._uid, isolated=False)) as plain:
                self._could |= {one: plain.ask("could", one, confined=False).error is None for one in COULD}
        return self._could[name]

    def kill(self) -> None:
        self._process.kill()
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._process.stdout.close()


@contextlib.contextmanager
def opened(uid: int, *, isolated: bool = True) -> Iterator[Box]:
    with contextlib.closing(Box(uid, isolated=isolated)) as box:
        yield box


@pytest.fixture(scope="module")
def free() -> Iterator[Box]:
    """Whose forks are not confined, of the user that runs the tests: here everything has to be possible."""
    with opened(0, isolated=False) as box:
        yield box


@pytest.fixture(scope="module", params=["root", "user"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("the tests do not run as root: only the path of other users is tried")
    with opened(USER if request.param == "user" and os.geteuid() == 0 else 0) as box:
        yield box


# -- what the kernel allows -------------------------------------------------------------------------------------------


def _as_root_or_in_a_namespace(step: Callable[[], object]) -> None:
    if os.geteuid() != 0:
        confinement._own_namespaces()
    step()


COULD: dict[str, Callable[[], object]] = {
    "seccomp": lambda: asks_prctl(None, 21, 0) if platform.machine() in seccomp.MACHINES else _refuse(),
    "landlock": lambda: landlock_of(1),
    "landlock_net": lambda: landlock_of(4),
    "landlock_scope": lambda: landlock_of(6),
    "network": lambda: _as_root_or_in_a_namespace(lambda: system_call(number("unshare"), confinement.CLONE_NEWNET)),
    "root": lambda: _as_root_or_in_a_namespace(lambda: os.chroot("/")),
    "own_user": lambda: os.setresuid(*[confinement.NOBODY] * 3),
}


@probe
def could(context: Context, name: str) -> bool:
    COULD[name]()
    return True


def landlock_of(version: int) -> None:
    if system_call(confinement.LANDLOCK_CREATE, None, 0, 1) < version:
        _refuse()


# -- probes of what is forbidden --------------------------------------------------------------------------------------


def system_call(number: int, *args: Any) -> int:
    found: int = libc.syscall(*[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in (number, *args)])
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def number(name: str) -> int:
    tables = seccomp.ALLOWED | seccomp.KILLS | seccomp.LOOKED_AT | {"tgkill": seccomp.TGKILL}
    return tables[name][seccomp.MACHINES[platform.machine()].column]


@probe
def nothing(context: Context) -> bool:
    return True


@probe
def connects(context: Context, host: str, port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(5)
        sock.connect((host, port))
    return True


@probe
def sends_a_datagram(context: Context, host: str, port: int) -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (host, port))


@probe
def connects_to_a_path(context: Context, path: str) -> bool:
    socket.socket(socket.AF_UNIX).connect(path)
    return True


@probe
def forks(context: Context) -> bool:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


@probe
def executes(context: Context) -> int:
    os.execv("/bin/true", ["true"])


@probe
def spawns(context: Context) -> int:
    return os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1]


@probe
def opens(context: Context, path: str) -> int:
    return len(os.read(os.open(path, os.O_RDONLY), 10))


@probe
def lists(context: Context, path: str) -> list[str]:
    return [entry.name for entry in Path(path).iterdir()]


@probe
def finds(context: Context, path: str) -> bool:
    Path(path).stat()
    return True


@probe
def creates(context: Context, path: str) -> int:
    return os.write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), b"x")


@probe
def removes(context: Context, path: str) -> bool:
    Path(path).unlink()
    return True


@probe
def writes_to_memory_of(context: Context, pid: int) -> bool:
    os.open(f"/proc/{pid}/mem", os.O_RDWR)
    return True


@probe
def traces(context: Context, pid: int) -> bool:
    system_call(number("ptrace"), 0x4206, pid, None, None)  # PTRACE_SEIZE: stops nobody
    return True


@probe
def reads_memory_of(context: Context, pid: int) -> bool:
    vector = struct.pack("@PN", ctypes.addressof(EVERYWHERE), 8)  # the parent's, whose fork this is
    system_call(number("process_vm_readv"), pid, vector, 1, vector, 1, 0)
    return True


@probe
def signals(context: Context, pid: int) -> bool:
    os.kill(pid, 0)
    return True


@probe
def signals_a_thread(context: Context, pid: int) -> bool:
    system_call(number("tgkill"), pid, pid, 0)
    return True


@probe
def calls(context: Context, name: str, *args: int) -> bool:
    system_call(number(name), *args)
    return True


@probe
def calls_number(context: Context, which: int) -> bool:
    system_call(which, *[0] * 6)
    return True


@probe
def asks_prctl(context: Context, option: int, value: int) -> int:
    found: int = libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "prctl")
    return found


@probe
def calls_as_32_bits(context: Context) -> int:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid there); int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()


@probe
def is_(context: Context) -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()
    fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status, re.MULTILINE))
    return fields | {
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "session": os.getsid(0) == os.getpid(),
    }


@probe
def knows_variables(context: Context) -> list[Any]:
    return [Path("/proc/self/environ").read_bytes().decode(), dict(os.environ)]


# -- what is forbidden ------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """What lies about outside."""

    tcp: int
    udp: int
    unix: str
    secret: str
    folder: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Open to everybody: it is not the file system's permissions that are tried."""
    folder = tmp_path_factory.mktemp("outside")
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            with contextlib.suppress(OSError):
                above.chmod(0o777 if above == folder else above.stat().st_mode | 0o055)
    secret = folder / "cached.cwasm"
    secret.write_text("of another tenant")
    secret.chmod(0o666)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        path = str(folder / "socket")
        unix.bind(path)
        unix.listen(64)
        Path(path).chmod(0o777)
        yield World(tcp.getsockname()[1], udp.getsockname()[1], path, str(secret), str(folder))


Attempt = tuple[str, Callable[[World, Box], tuple[Any, ...]]]
FORBIDDEN: dict[str, Attempt] = {
    "a connection to loopback": ("connects", lambda w, b: ("127.0.0.1", w.tcp)),
    "a datagram to loopback": ("sends_a_datagram", lambda w, b: ("127.0.0.1", w.udp)),
    "a connection to a path": ("connects_to_a_path", lambda w, b: (w.unix,)),
    "a fork": ("forks", lambda w, b: ()),
    "another program": ("executes", lambda w, b: ()),
    "another program beside it": ("spawns", lambda w, b: ()),
    "the list of users": ("opens", lambda w, b: ("/etc/passwd",)),
    "the cache": ("opens", lambda w, b: (w.secret,)),
    "the cache, by a path that goes up": ("opens", lambda w, b: (f"../../../../..{w.secret}",)),
    "the parent's environment": ("opens", lambda w, b: (f"/proc/{b.pid}/environ",)),
    "the parent's memory, as a file": ("writes_to_memory_of", lambda w, b: (b.pid,)),
    "the parent's memory": ("reads_memory_of", lambda w, b: (b.pid,)),
    "a folder's list": ("lists", lambda w, b: (w.folder,)),
    "a new file": ("creates", lambda w, b: (f"{w.folder}/new",)),
    "another one's file": ("creates", lambda w, b: (w.secret,)),
    "a trace of the parent": ("traces", lambda w, b: (b.pid,)),
    "a signal to the parent": ("signals", lambda w, b: (b.pid,)),
    "a signal to a thread of the parent": ("signals_a_thread", lambda w, b: (b.pid,)),
    "a descriptor of the parent's process": ("calls", lambda w, b: ("pidfd_open", b.pid, 0)),
    "limits of the parent": ("calls", lambda w, b: ("prlimit64", b.pid, 7, 0, 0)),
    "the user root": ("calls", lambda w, b: ("setuid", 0)),
    "a namespace": ("calls", lambda w, b: ("unshare", confinement.CLONE_NEWUSER)),
    "a ring for input and output": ("calls", lambda w, b: ("io_uring_setup", 1, 0)),
    "a program in the kernel": ("calls", lambda w, b: ("bpf", 0, 0, 0)),
    "a counter of the processor's": ("calls", lambda w, b: ("perf_event_open", 0, 0, 0, 0, 0)),
    "its own page faults": ("calls", lambda w, b: ("userfaultfd", 0)),
    "a keyring": ("calls", lambda w, b: ("keyctl", 0, -3, 1)),
    "a mount": ("calls", lambda w, b: ("mount", 0, 0, 0, 0, 0)),
    "another root": ("calls", lambda w, b: ("chroot", 0)),
    "a module of the kernel": ("calls", lambda w, b: ("finit_module", -1, 0, 0)),
}
#: those for which the kernel has another answer than yes, for want of sense in the arguments
NONSENSE = {
    "a ring for input and output": "EFAULT",
    "a program in the kernel": "EINVAL",
    "a counter of the processor's": "EFAULT",
    "a mount": "EFAULT",
    "another root": "EFAULT",
    "a module of the kernel": "EBADF",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_it_is_refused(what: str, box: Box, free: Box, world: World) -> None:
    box.needs("seccomp")
    name, arguments = FORBIDDEN[what]
    control = free.ask(name, *arguments(world, free), confined=False)
    if control.refused:
        pytest.skip(f"it is refused here without confinement, too: {control}")
    assert control.error == NONSENSE.get(what), f"unconfined it should have been done: {control}"
    tried = box.ask(name, *arguments(world, box))
    assert tried.refused, tried
    assert box.ask("nothing").result, "the fork server is as it was"


def test_what_no_honest_worker_tries_ends_it_with_a_signal_of_its_own(box: Box) -> None:
    box.needs("seccomp")
    for name in ("socket", "execve", "ptrace", "unshare", "io_uring_setup", "setuid", "process_vm_readv", "kill"):
        assert box.ask("calls", name, 0, 0, 0).status == -signal.SIGSYS, name


@pytest.mark.skipif(not X86, reason="there are two more ways into the kernel on x86-64 only")
def test_no_other_way_into_the_kernel_is_open(box: Box) -> None:
    box.needs("seccomp")
    x32_getpid = seccomp.X32 | 39
    assert box.ask("calls_number", x32_getpid).status == -signal.SIGSYS
    assert box.ask("calls_as_32_bits").status == -signal.SIGSYS


def test_confinement_cannot_be_taken_back(box: Box) -> None:
    box.needs("seccomp")
    for option, value in ((confinement.PR_SET_PDEATHSIG, 0), (confinement.PR_SET_DUMPABLE, 1), (22, 0)):
        assert box.ask("asks_prctl", option, value).error == "EPERM"


def test_unknown_system_calls_are_as_on_an_older_kernel(box: Box) -> None:
    box.needs("seccomp")
    assert box.ask("calls_number", 435).error == "ENOSYS", "clone3: glibc takes clone then"
    assert box.ask("calls_number", 5000).error == "ENOSYS"
    assert box.ask("calls", "exit", 0).status == 0
    memfd_create = 319 if X86 else 279
    assert box.ask("calls_number", memfd_create).error == "EPERM"


# -- each measure alone -----------------------------------------------------------------------------------------------


def test_landlock_alone_refuses_files_tcp_and_signals(box: Box, world: World) -> None:
    box.needs("landlock")
    alone = partial(box.ask, without="seccomp root own_user")
    assert alone("opens", "/etc/passwd").error == "EACCES"
    assert alone("creates", world.secret).error == "EACCES"
    assert alone("creates", f"{world.folder}/new").error == "EACCES"
    assert alone("removes", world.secret).error == "EACCES"
    assert alone("lists", world.folder).error == "EACCES"
    assert alone("opens", f"/proc/{box.pid}/environ").error == "EACCES"
    assert alone("traces", box.pid).error == "EPERM"
    box.needs("landlock_scope")
    assert alone("signals", box.pid).error == "EPERM"
    box.needs("landlock_net")
    assert alone("connects", "127.0.0.1", world.tcp).error == "EACCES"


def test_the_root_alone_leaves_no_name_but_those_of_its_descriptors(box: Box, world: World) -> None:
    box.needs("root")
    alone = partial(box.ask, without="seccomp landlock own_user")
    for path in ("/etc/passwd", world.secret, f"..{world.secret}", f"../../../..{world.secret}", "/proc"):
        assert alone("finds", path).error == "ENOENT"
    assert all(name.isdigit() for name in alone("lists", "/").result)
    assert alone("lists", "..").result == alone("lists", "/").result


def test_the_network_alone_has_nobody_in_it(box: Box, world: World) -> None:
    box.needs("network")
    alone = partial(box.ask, confined=False)
    assert alone("connects", "127.0.0.1", world.tcp).error == "ENETUNREACH"
    assert alone("sends_a_datagram", "127.0.0.1", world.udp).error == "ENETUNREACH"


def test_nobody_alone_cannot_touch_its_parent(box: Box) -> None:
    box.needs("own_user")
    alone = partial(box.ask, without="seccomp landlock root")
    assert alone("traces", box.pid).error == "EPERM"
    assert alone("signals", box.pid).error == "EPERM"
    assert alone("writes_to_memory_of", box.pid).error == "EACCES"
    assert alone("calls", "setuid", 0).error == "EPERM"


def test_it_is_nobody_in_particular(box: Box) -> None:
    found = box.ask("is_", without="seccomp landlock root").result
    if box.could("own_user"):
        assert found["Uid"].split() == found["Gid"].split() == [str(confinement.NOBODY)] * 4
        assert found["Groups"] == ""
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(found[kind], 16) == 0, kind
    assert found["NoNewPrivs"] == "1"
    assert found["session"]
    assert found["nice"] == confinement.NICE
    assert found["oom_score_adj"] == 1000
    assert found["Umask"] == "0077"


def test_a_worker_gains_no_rights_even_where_its_fork_server_could(free: Box) -> None:
    assert free.ask("is_", confined=False).result["NoNewPrivs"] == "0"
    assert free.ask("is_", without="seccomp landlock root own_user").result["NoNewPrivs"] == "1"


def test_the_capabilities_of_a_root_that_stays_root_are_gone_as_well(box: Box) -> None:
    """As in a container whose root may not become anybody else, and in a user namespace."""
    found = box.ask("is_", without="seccomp landlock root own_user").result
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(found[kind], 16) == 0, kind


def test_it_knows_nothing_of_the_daemon_s_environment(box: Box) -> None:
    block, variables = box.ask("knows_variables", confined=False).result
    assert SECRET in block
    assert SECRET in variables
    block, variables = box.ask("knows_variables", without="seccomp landlock root own_user undumpable").result
    assert block.strip("\0") == ""
    assert variables == {"TOKIO_WORKER_THREADS": "1"}


def test_another_process_of_its_user_cannot_trace_it(box: Box) -> None:
    assert box.ask("asks_prctl", 3, 0, without="seccomp").result == 0  # PR_GET_DUMPABLE
    if box.user == "root":
        return  # nobody else is nobody here
    victim = box.ask("nothing", leave=True)
    try:
        other = partial(box.ask, confined=False)
        assert other("traces", victim.pid).error == "EPERM"
        assert other("opens", f"/proc/{victim.pid}/environ").error == "EACCES"
    finally:
        os.kill(victim.pid, signal.SIGKILL)


@probe
def holds(context: Context) -> list[str]:
    links = sorted(Path("/proc/self/fd").iterdir(), key=lambda link: int(link.name))
    return [str(link.readlink()) for link in links if link.exists() or link.is_symlink()]


def test_it_holds_only_what_it_was_given(box: Box) -> None:
    control = box.ask("holds", confined=False).result
    assert len([name for name in control if "memfd:module" in name]) == 2
    found = box.ask("holds", without="seccomp landlock root own_user").result
    null, rest = found[:3], found[3:]
    assert null == ["/dev/null"] * 3
    assert sorted(name.partition(":")[0] for name in rest) == ["pipe", "socket"]


def test_what_libffi_maps_its_callbacks_from_stays_open(tmp_path: Path) -> None:
    """Its number would be another file's otherwise, and that would be mapped as code (libffi's tramp.c)."""
    paths = [tmp_path / name for name in ("code", "data", "unmapped")]
    for path in paths:
        path.write_bytes(bytes(4096))
    with contextlib.ExitStack() as stack:
        code, data, unmapped = (stack.enter_context(path.open("rb")) for path in paths)
        written = stack.enter_context(paths[0].open("r+b"))
        stack.enter_context(mmap.mmap(code.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
        stack.enter_context(mmap.mmap(data.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ))
        ours = {file.fileno() for file in (code, data, unmapped, written)}
        assert confinement._code_of_callbacks() & ours == {code.fileno()}


@probe
def keeps_a_library_open(context: Context, out: int) -> list[bool]:
    rows = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    library = os.open(next(row[5] for row in rows if "x" in row[1] and row[5:] and "libc" in row[5]), os.O_RDONLY)
    other = os.open(__file__, os.O_RDONLY)
    confinement._close_all_but((context.channel.fileno(), out))
    return [Path(f"/proc/self/fd/{fd}").exists() for fd in (library, other)]


def test_a_library_that_is_mapped_as_code_stays_open(free: Box) -> None:
    assert free.ask("keeps_a_library_open", confined=False, out=True).result == [True, False]


# -- limits -----------------------------------------------------------------------------------------------------------


@probe
def takes(context: Context, size: int) -> int:
    return len(bytearray(size))


@probe
def opens_many(context: Context) -> int:
    channel = context.channel
    kept = [channel]
    with contextlib.suppress(OSError):
        while True:
            kept.append(channel.dup())
    return max(one.fileno() for one in kept)


@probe
def starts_threads(context: Context, before: int, after: int) -> int:
    """How many of them started. They end with the process."""
    started = 0

    def start(count: int) -> None:
        nonlocal started
        for _ in range(count):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            started += 1

    start(before)
    if after:
        confinement.no_more_threads()
        with contextlib.suppress(RuntimeError):
            start(after)
    return started


@probe
def has_limits(context: Context) -> dict[str, list[int]]:
    kinds = ("CORE", "FSIZE", "MEMLOCK", "MSGQUEUE", "NOFILE", "CPU")
    return {kind: list(resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))) for kind in kinds}


def test_more_memory_than_its_limit_is_an_error_in_the_worker(box: Box) -> None:
    small = {"data_bytes": 64 * MIB}
    assert box.ask("takes", 56 * MIB, limits=small).result == 56 * MIB
    tried = box.ask("takes", 65 * MIB, limits=small)
    assert (tried.error, tried.status) == ("MemoryError", 0)
    assert box.ask("nothing").result


def test_limits_are_on_both_sides_and_cannot_be_raised(box: Box) -> None:
    found = box.ask("has_limits", limits={"cpu_s": 7, "descriptors": 40}).result
    assert found == {
        "CORE": [0, 0], "FSIZE": [0, 0], "MEMLOCK": [0, 0], "MSGQUEUE": [0, 0], "NOFILE": [40, 40], "CPU": [7, 7],
    }  # fmt: skip
    assert box.ask("opens_many", limits={"descriptors": 40}).result == 39


@probe
def writes_to_a_new_file(context: Context) -> int:
    return os.write(os.memfd_create("new"), b"x")


def test_no_file_grows(box: Box) -> None:
    assert box.ask("writes_to_a_new_file", confined=False).result == 1
    assert box.ask("writes_to_a_new_file", without="seccomp").error == "EFBIG"


def test_threads_end_when_all_have_started(box: Box) -> None:
    assert box.ask("starts_threads", 3, 0).result == 3
    assert box.ask("starts_threads", 2, 5).result == 2


def exists(pid: int) -> bool:
    """Not as a zombie: whoever inherits it may take its time."""
    try:
        return " Z " not in re.sub(r"\(.*\)", "", Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False


@pytest.mark.parametrize("user", ["root", "user"])
def test_it_does_not_outlive_the_fork_server(user: str) -> None:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    own = Box(USER if user == "user" and os.geteuid() == 0 else 0)
    worker = own.ask("nothing", leave=True)
    assert exists(worker.pid)
    own.kill()
    deadline = time.monotonic() + WAIT_S
    while exists(worker.pid):
        assert time.monotonic() < deadline, "it outlived its parent"
        select.select([], [], [], 0.005)


def test_a_fork_server_whose_daemon_has_gone_ends_at_once() -> None:
    code = "from ifabric_actors.chassis.confinement import isolate; isolate(parent=1 << 22); print('still here')"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'actors'}"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=WAIT_S, env=env, check=False)
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_worker_whose_fork_server_died_before_it_asked_ends_at_once(box: Box) -> None:
    assert box.ask("nothing", without="parent").status == 1


# -- what has to work -------------------------------------------------------------------------------------------------


@probe
def runs(context: Context, *entries: str) -> list[Any]:
    loaded = Loaded(context.engine, context.channel)
    return [loaded.run(entry) for entry in entries]


@probe
def runs_with_a_ticker(context: Context) -> dict[str, Any]:
    """Half of the processor for a fifth of a second, then an end."""
    loaded = Loaded(context.engine, context.channel)
    threading.Thread(target=_tick, args=(context.engine,), daemon=True).start()
    began, cpu_began = time.monotonic(), time.thread_time()

    def look(_context: Any, _data: Any, delta: Any, kind: Any) -> int:
        wall_s, cpu_s = time.monotonic() - began, time.thread_time() - cpu_began
        delta[0], kind[0] = 1, 0
        time.sleep(max(0.0, cpu_s / 0.5 - wall_s))
        if wall_s < 0.2:
            return 0
        return ctypes.cast(ffi.wasmtime_error_new(b"time is up"), ctypes.c_void_p).value or 0

    callback = DEADLINE(look)  # made after the confinement: memory for its code is had then
    try:
        loaded.run("spin", deadline=1, on_deadline=callback)
    except wasmtime.WasmtimeError as error:
        ended = str(error).splitlines()[-1].strip()
    return {"ended": ended, "share": (time.thread_time() - cpu_began) / (time.monotonic() - began)}


def _tick(made: wasmtime.Engine) -> None:
    while True:
        time.sleep(0.005)
        made.increment_epoch()


@probe
def compiles(context: Context, functions: int) -> int:
    return len(wasmtime.Module(context.engine, many_functions(functions)).serialize())


def many_functions(count: int) -> bytes:
    """A valid module of that many functions, each of a few instructions: small to send, large to compile."""

    def sized(body: bytes) -> bytes:
        return leb(len(body)) + body

    def leb(value: int) -> bytes:
        out = bytearray()
        while True:
            value, low = value >> 7, value & 0x7F
            out.append(low | (0x80 if value else 0))
            if not value:
                return bytes(out)

    body = sized(b"\x00" + b"\x41\x00\x28\x02\x00\x1a" * 40 + b"\x0b")
    return b"\0asm\x01\0\0\0" + b"".join(
        bytes([section]) + sized(content)
        for section, content in (
            (1, b"\x01\x60\x00\x00"),
            (3, leb(count) + b"\x00" * count),
            (5, b"\x01\x00\x01"),
            (10, leb(count) + body * count),
        )
    )


@probe
def is_python_as_ever(context: Context) -> str:
    class Node:
        other: Any

    a, b = Node(), Node()
    a.other, b.other = b, a
    del a, b
    assert gc.collect() >= 2
    try:
        {}["a key that is not there"]
    except KeyError:
        said = traceback.format_exc()
    "é".encode("latin-1"), "x".encode("ascii"), b"x".decode("utf-8")
    kept = [ctypes.CFUNCTYPE(None)(lambda: None) for _ in range(600)]
    assert os.urandom(8) != os.urandom(8)
    assert select.select([context.channel], [], [], 0)[0] == [context.channel]
    context.channel.settimeout(0.01)
    return said + str(len(kept))


def test_a_guest_runs_with_arguments_chance_and_a_clock(box: Box) -> None:
    tried = box.ask("runs", "wasi", "wasi")
    assert tried.result == [42, 42], tried


@probe
def counts_threads(context: Context) -> int:
    Loaded(context.engine, context.channel).run("wasi")
    return len(list(Path("/proc/self/task").iterdir()))


def test_wasi_starts_one_thread_and_not_one_for_each_processor(box: Box) -> None:
    assert box.ask("counts_threads", without="seccomp landlock root own_user").result == 2


def test_a_guest_s_memory_is_there_up_to_its_limit(box: Box) -> None:
    assert box.ask("runs", "grow", limits={"data_bytes": 600 * MIB}).result == [[1, None]], "512 MiB, all written to"


def test_a_guest_that_wants_more_than_the_process_may_have_gets_no(box: Box) -> None:
    tried = box.ask("runs", "grow", "wasi", limits={"data_bytes": 128 * MIB})
    assert tried.result == [[-1, None], 42], "memory.grow says so, and the next run is not disturbed"


def test_traps_are_caught_where_they_come_as_signals(box: Box) -> None:
    entries = ("out_of_bounds", "by_zero", "too_deep", "unreachable", "wasi")
    expected = ["MEMORY_OUT_OF_BOUNDS", "INTEGER_DIVISION_BY_ZERO", "STACK_OVERFLOW", "UNREACHABLE", 42]
    assert box.ask("runs", *entries, *entries).result == expected * 2


def test_epochs_tick_and_the_processor_is_shared(box: Box) -> None:
    found = box.ask("runs_with_a_ticker").result
    assert "time is up" in found["ended"]
    assert 0 < found["share"] < 0.65


def test_a_compiler_runs_within_its_limits(box: Box) -> None:
    limits = {"data_bytes": 512 * MIB, "cpu_s": 20}
    assert box.ask("compiles", 100, limits=limits).result > 10_000


def test_a_compile_bomb_ends_its_worker_by_memory(box: Box) -> None:
    tried = box.ask("compiles", 20_000, limits={"data_bytes": 48 * MIB, "cpu_s": 20})
    assert tried.status in (-signal.SIGABRT, -signal.SIGSEGV) or tried.error == "MemoryError", tried
    assert box.ask("compiles", 100).result


def test_a_compile_bomb_ends_its_worker_by_processor_time(box: Box) -> None:
    tried = box.ask("compiles", 40_000, limits={"data_bytes": 4096 * MIB, "cpu_s": 1})
    assert tried.status in (-signal.SIGXCPU, -signal.SIGKILL), tried
    assert box.ask("compiles", 100).result


def test_python_has_what_it_loads_late(box: Box) -> None:
    assert "KeyError: 'a key that is not there'" in box.ask("is_python_as_ever").result


def test_what_python_loads_late_is_loaded_before() -> None:
    code = """if True:
        import os, sys
        from ifabric_actors.chassis import confinement
        confinement.isolate()
        pid = os.fork()
        if pid == 0:
            confinement.confine(confinement.Rlimits(data_bytes=64 << 20))
            try:
                import linecache, socket, threading, traceback, tokenize
                "\u00e9".encode("latin_1"), b"x".decode("ascii"), b"x".decode("utf_8")
                try: {}["late"]
                except KeyError: os._exit(7 if "KeyError" in traceback.format_exc() else 2)
            finally: os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'actors'}"}
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, timeout=WAIT_S, env=env, check=True)
    assert ended.stdout == b"7\n", ended.stderr


def test_what_was_not_applied_is_said_with_what_it_would_stop(box: Box) -> None:
    applied = box.applied
    assert set(box.ask("nothing").applied) <= set(applied), "the fork server knew it beforehand"
    assert confinement.missing(*applied).keys() == confinement.MEASURES.keys() - set(applied)
    assert confinement.missing(*confinement.MEASURES) == {}
    if box.user == "user":
        assert "own_user" in confinement.missing(*applied)


DENIED = ("unshare", "mount", "chroot", "setgroups", "setresgid", "setresuid", "capset", "prctl")


@probe
def confines_where_the_kernel_allows_nothing(context: Context, out: int) -> list[Any]:
    """As in a container of a strict host: under a filter that refuses all there is to be confined with."""
    code = [(seccomp.LOAD, 0, 0, seccomp.NUMBER_AT)]
    denied = [number(name) for name in DENIED] + [confinement.LANDLOCK_CREATE, 112 if X86 else 157, 141 if X86 else 140]
    for which in denied:  # the last two: setsid, setpriority
        code += seccomp._case(which, [seccomp._end(EPERM)])
    libc.prctl(confinement.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    seccomp.install(seccomp._packed([*code, seccomp._end(seccomp.ALLOW)]))
    isolated = confinement.isolate()
    confinement._server = 0  # this is no fork of it, but itself
    limits = confinement.Rlimits(data_bytes=64 * MIB, keep=(context.channel.fileno(), out))
    return [isolated, confinement.confine(limits), Loaded(context.engine, context.channel).run("wasi")]


def test_where_the_kernel_allows_nothing_the_rest_is_done(free: Box) -> None:
    isolated, confined, ran = free.ask("confines_where_the_kernel_allows_nothing", confined=False, out=True).result
    assert confined == ["first_to_go", "environment", "descriptors", "limits"]
    assert isolated == confined, "which is what the fork server told before"
    assert ran == 42


# -- the filter, on both machines -------------------------------------------------------------------------------------


def answer(code: bytes, audit: int, which: int, *args: int) -> int:
    """What the kernel does with the program, instruction by instruction."""
    data = struct.pack("<IIQ6Q", which, audit, 0, *args, *[0] * (6 - len(args)))
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, constant = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        match operation:
            case seccomp.LOAD:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case seccomp.AND:
                accumulator &= constant
            case seccomp.EQUAL:
                at += if_true if accumulator == constant else if_false
            case seccomp.AT_LEAST:
                at += if_true if accumulator >= constant else if_false
            case seccomp.RETURN:
                return constant
            case _:
                raise AssertionError(f"no such instruction: {operation:#x}")


EPERM, ENOSYS = seccomp.ERROR | errno.EPERM, seccomp.ERROR | errno.ENOSYS


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_answers_as_its_tables_say(machine: str) -> None:
    audit, column = seccomp.MACHINES[machine]
    code = seccomp.program(machine, 4711)
    assert code is not None
    ask = partial(answer, code, audit)
    expected = {
        numbers[column]: said
        for table, said in ((seccomp.ALLOWED, seccomp.ALLOW), (seccomp.KILLS, seccomp.KILL))
        for numbers in table.values()
    }
    looked_at = {numbers[column] for numbers in seccomp.LOOKED_AT.values()} | {seccomp.TGKILL[column]}
    for which in set(range(700)) - looked_at:
        assert ask(which) == expected.get(which, ENOSYS if which >= seccomp.YOUNG else EPERM), which
    assert answer(code, audit ^ 1, 0) == seccomp.KILL
    assert ask(seccomp.X32 | 1) == (seccomp.KILL if machine == "x86_64" else ENOSYS)

    clone, openat, fcntl, ioctl, prctl, prlimit = (
        partial(ask, seccomp.LOOKED_AT[name][column])
        for name in ("clone", "openat", "fcntl", "ioctl", "prctl", "prlimit64")
    )
    glibc_thread, musl_thread, fork = 0x3D0F00, 0x7D0F00, 0x1200011
    assert clone(glibc_thread) == clone(musl_thread) == seccomp.ALLOW
    assert clone(fork) == clone(0x4111) == clone(glibc_thread | confinement.CLONE_NEWNET) == seccomp.KILL
    assert ask(seccomp.TGKILL[column], 4711, 1, 6) == seccomp.ALLOW
    assert ask(seccomp.TGKILL[column], 1, 1, 6) == seccomp.KILL
    assert openat(2**64 - 100, 1, os.O_RDONLY | os.O_CLOEXEC) == seccomp.ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_PATH, os.O_TMPFILE):
        assert openat(2**64 - 100, 1, flags | os.O_CLOEXEC) == EPERM
    assert fcntl(3, 4, os.O_NONBLOCK) == seccomp.ALLOW
    assert fcntl(3, 8, 1) == fcntl(3, 1033, 0) == EPERM, "no owner of signals, no seals"
    assert ioctl(3, 0x5421) == seccomp.ALLOW
    assert ioctl(3, 0x5412) == EPERM, "no typing into a terminal"
    assert prctl(15) == seccomp.ALLOW
    assert prlimit(0) == seccomp.ALLOW
    assert prlimit(1) == seccomp.KILL


def test_other_machines_have_no_filter_and_say_so() -> None:
    assert seccomp.program("riscv64", 1) is None


def test_numbers_are_those_of_the_kernel_s_headers() -> None:
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    if not all(header.exists() for header in headers):
        pytest.skip("the kernel's headers (linux-libc-dev) are not installed, or for another machine")
    texts = [header.read_text() for header in headers]
    known = [{name: int(at) for name, at in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)} for text in texts]
    known[1]["newfstatat"] = known[1]["fstatat"]
    tables = seccomp.ALLOWED | seccomp.KILLS | seccomp.LOOKED_AT | {"tgkill": seccomp.TGKILL}
    for name, numbers in tables.items():
        assert numbers == tuple(of.get(name, -1) for of in known), name


if __name__ == "__main__":
    serve(int(sys.argv[1]), bool(int(sys.argv[2])))
