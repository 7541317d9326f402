"""What the kernel holds around a worker, should a guest ever break out of WebAssembly. Linux only.

wasmtime is the wall; this is the ditch behind it. Each measure below stands alone, none relies on another, and where
the kernel or the daemon's own rights do not allow one, the others are still there: what was applied comes back by
name, and `missing` says what was not.

**In the fork server**, once (`isolate`): a network, System V objects and mounts of its own, with nothing in them. As
root at once; for others through a user namespace, tried in a child first, for a half-made one cannot be left again.

**In each worker**, before it sees a byte of anybody else's (`confine`):

- *files*: descriptors are closed. The root directory becomes the worker's own list of descriptors (``/proc/self/fd``),
  so the only names there are those of what it holds; `path_of` is how one is opened. Landlock then refuses to open
  anything else, which needs no rights and holds where the root could not be changed. A sealed memfd is no file of any
  file system, and Landlock lets it be opened.
- *who it is*: as root it becomes nobody, without groups and capabilities. It is not dumpable: another process of the
  same user, such as the next worker, can neither trace it nor read it. (Its own /proc/self/fd stays open to it.)
- *what it takes*: private memory is limited by what it may add (`RLIMIT_DATA`: the address space cannot be, since
  wasmtime reserves 4 GiB of it for each memory), files cannot be written, nothing is locked, core dumps are none.
  Out of memory, the kernel ends a worker before anybody else. The number of its threads is limited by
  `no_more_threads`, when all of them have started: `RLIMIT_NPROC` counts those of all processes of the user.
- *system calls*: `seccomp` is the list.
- *its end*: it is killed when the fork server dies. The kernel forgets that at a change of user, so it is asked last.

**What is left**: a guest with the worker's processor state can use processor time up to the daemon's own deadline, read
what the worker has in memory (the modules and the run of the guest itself), and talk to the daemon. Without a root of
its own and Landlock, on an old kernel, it can read what its user can.

**What is to be loaded before.** Nothing can be imported afterwards: `isolate` loads what Python itself loads late
(`LATE`); whoever forks workers runs whatever else they need once, before the first fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import platform
import resource
import signal
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ifabric_actors.chassis import seccomp

#: by name, what each measure stops
MEASURES = {
    "no_new_privs": "no program gives it more rights",
    "network": "no interface, not even loopback",
    "ipc": "no System V objects or message queues of others",
    "hostname": "a name of its own",
    "mounts": "mounts do not get out",
    "limits": "memory, files, descriptors",
    "first_to_go": "out of memory, it is killed first",
    "nice": "the daemon goes before it",
    "session": "no terminal, no signals to a group",
    "environment": "no variables of the daemon",
    "descriptors": "only what it was given",
    "root": "no path but to what it holds",
    "own_user": "not the daemon's user",
    "capabilities": "none",
    "undumpable": "no tracing by its own user",
    "parent_death": "it does not outlive its parent",
    "landlock": "no file is opened or changed",
    "landlock_net": "no TCP",
    "landlock_scope": "no signals and abstract sockets to the outside",
    "seccomp": "only the listed system calls",
}
NOBODY = 65534
NICE = 5
REHEARSAL_BYTES = 64 << 20
#: above any descriptor that there can be
DESCRIPTORS_MAX = 1 << 30
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NAMESPACES = {"network": CLONE_NEWNET, "ipc": CLONE_NEWIPC, "hostname": CLONE_NEWUTS, "mounts": CLONE_NEWNS}
MS_REC, MS_SLAVE = 0x4000, 0x80000
CAPABILITY_VERSION_3 = 0x20080522
#: numbers of landlock_create_ruleset and landlock_restrict_self, on all machines
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446
#: (first version that has them, rights), of files: all of version 1, then REFER, TRUNCATE, IOCTL_DEV
LANDLOCK_FILES = ((1, 0x1FFF), (2, 0x2000), (3, 0x4000), (5, 0x8000))
#: versions that know of TCP, and of signals and abstract sockets
LANDLOCK_NET, LANDLOCK_SCOPE = 4, 6
#: what Python loads when it is first needed: to format a traceback, to decode a name
LATE = (
    "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "linecache", "socket", "threading", "tokenize",
    "traceback",
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
#: the process that called `isolate`: whose forks are confined
_server = 0


class Rlimits(NamedTuple):
    """What a worker may take. Sizes in bytes."""

    #: private writable memory, beside what it has when it is confined
    data_bytes: int
    #: of processor time, in seconds: at the end of it SIGXCPU ends it. None: as much as it gets
    cpu_s: int | None = None
    #: open at a time. Each loaded module holds one, its socket and WASI's runtime about six
    descriptors: int = 64
    #: what it keeps of what is open now; of 0, 1 and 2 those that are not here lead nowhere
    keep: tuple[int, ...] = ()


def missing(*applied: str) -> dict[str, str]:
    """The measures that are not among these, and what each would stop."""
    return {name: stops for name, stops in MEASURES.items() if name not in applied}


def isolate(parent: int = 0) -> tuple[str, ...]:
    """Confines the fork server, before it starts or loads anything.

    It dies with the thread that started it, and at once when `parent` is given and is not its parent any more.
    Returned are the measures that hold for every worker: those applied here, and those that a first fork, which ends
    again, could apply to itself.
    """
    global _server
    for name in LATE:
        importlib.import_module(name)
    applied = [name for name, flag in NAMESPACES.items() if _done(_unshare, flag)]
    if not applied and os.geteuid() != 0 and _rehearsed(_own_namespaces):
        _own_namespaces()
        applied += NAMESPACES
    if "mounts" in applied:
        # what is unmounted outside has to go here, too: else it would be busy for as long as we live
        _done(_checked, _libc.mount, b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None)
    applied += _all_done(no_new_privs=_no_new_privs, parent_death=_die_with_parent)
    if parent and os.getppid() != parent:
        os._exit(1)
    _server = os.getpid()
    seccomp.program(platform.machine(), _server)  # what it keeps of it is every worker's
    return tuple(dict.fromkeys([*applied, *_of_a_worker()]))


def confine(limits: Rlimits) -> tuple[str, ...]:
    """Confines this process, a fresh fork with one thread, for good. The measures that were applied, by name.

    Nothing here waits, and nothing that the kernel refuses is an error; `OSError` is a limit that cannot be set.
    """
    applied = _all_done(
        no_new_privs=_no_new_privs,
        session=os.setsid,
        nice=lambda: os.setpriority(os.PRIO_PROCESS, 0, NICE),
        first_to_go=_first_to_go,
        environment=_forget_environment,
        descriptors=lambda: _close_all_but(limits.keep),
    )
    os.umask(0o077)
    _limit(limits)
    applied.append("limits")
    applied += _all_done(
        root=_own_root,
        own_user=_become_nobody,
        capabilities=_drop_capabilities,
        undumpable=_hide_from_its_own_user,
        parent_death=_die_with_parent,
    )
    if _server and os.getppid() != _server:
        os._exit(1)  # it died before the kernel was asked
    applied += _landlock()
    code = seccomp.program(platform.machine(), os.getpid())
    if code is not None and _done(seccomp.install, code):
        applied.append("seccomp")
    return tuple(applied)


def no_more_threads() -> None:
    """From now on this process, whose user is not root, starts no thread."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def path_of(fd: int) -> str:
    """The name by which a descriptor can be opened again, confined or not."""
    usual = Path(f"/proc/self/fd/{fd}")
    return str(usual) if usual.exists() else f"/{fd}"


# -- asking the kernel ------------------------------------------------------------------------------------------------


def _done(step: Callable[..., object], *args: object) -> bool:
    """Whether the kernel did it."""
    try:
        step(*args)
    except OSError:
        return False
    return True


def _all_done(**steps: Callable[[], object]) -> list[str]:
    """The names of those that the kernel did, in their order."""
    return [name for name, step in steps.items() if _done(step)]


def _checked(function: Callable[..., int], *args: object) -> int:
    result = function(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl, ctypes.c_int(option), ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def _unshare(flags: int) -> None:
    _checked(_libc.unshare, ctypes.c_int(flags))


def _no_new_privs() -> None:
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


# -- namespaces -------------------------------------------------------------------------------------------------------


def _rehearsed(step: Callable[[], None]) -> bool:
    """Whether a child could do it."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _done(step) else 1)
    return os.waitpid(pid, 0)[1] == 0


def _own_namespaces() -> None:
    """New ones, in a user namespace where this user is the one that it was."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWUSER | sum(NAMESPACES.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        _write(f"/proc/self/{name}", text)


def _of_a_worker() -> list[str]:
    """What `confine` comes to here."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writable, " ".join(confine(Rlimits(data_bytes=REHEARSAL_BYTES, keep=(writable,)))).encode())
        finally:
            os._exit(0)
    os.close(writable)
    try:
        return os.read(readable, 4096).decode().split()
    finally:
        os.close(readable)
        os.waitpid(pid, 0)


# -- a worker's steps -------------------------------------------------------------------------------------------------


def _first_to_go() -> None:
    _write("/proc/self/oom_score_adj", "1000")


def _forget_environment() -> None:
    """The variables, and the block below the stack that they came in.

    One is left for the runtime under wasmtime's WASI, which else starts a thread for each processor.
    """
    os.environ.clear()
    os.environ["TOKIO_WORKER_THREADS"] = "1"
    fields = _read("/proc/self/stat").rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # fields 50 and 51 of proc_pid_stat(5); the name was the second
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)


def _close_all_but(keep: tuple[int, ...]) -> None:
    """0, 1 and 2 lead to /dev/null, or are kept; of the others, those that are kept."""
    low = 3
    for fd in sorted({0, 1, 2, *keep, *_code_of_callbacks()}):
        if fd > low:
            os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, DESCRIPTORS_MAX)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in {0, 1, 2} - set(keep):
        os.dup2(null, fd)
    os.close(null)


def _code_of_callbacks() -> set[int]:
    """Descriptors of files that are mapped as code: libffi opens its own once, and maps it for each ctypes callback.

    Closed, its number would soon be another file's, and that would be mapped as code. (CPython before 3.12 does
    without.)
    """
    try:
        opened = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except FileNotFoundError:
        return set()  # no /proc
    readable = {}
    for number in opened:
        with contextlib.suppress(OSError):  # one of them was the listing's own
            status, flags = os.fstat(number), fcntl.fcntl(number, fcntl.F_GETFL)
            if stat.S_ISREG(status.st_mode) and flags & os.O_ACCMODE == os.O_RDONLY:
                readable[number] = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino)
    if not readable:
        return set()
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
        rows = [line.split(maxsplit=5) for line in lines]
    code = {(device, int(inode)) for _, rights, _, device, inode, *_ in rows if "x" in rights}
    return {number for number, place in readable.items() if place in code}


def _limit(limits: Rlimits) -> None:
    pages = int(_read("/proc/self/statm").split()[5])
    _lower(resource.RLIMIT_DATA, pages * resource.getpagesize() + limits.data_bytes)
    _lower(resource.RLIMIT_NOFILE, limits.descriptors)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        _lower(kind, 0)
    if limits.cpu_s is not None:
        _lower(resource.RLIMIT_CPU, limits.cpu_s)


def _lower(kind: int, value: int) -> None:
    """Sets a limit for good; never above the one that holds."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _own_root() -> None:
    os.chdir("/proc/self/fd")
    os.chroot(".")


def _become_nobody() -> None:
    """From root to a user that owns nothing. `OSError`: it is not root, or may not."""
    if os.geteuid() != 0:
        raise PermissionError("only root can become somebody else")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _hide_from_its_own_user() -> None:
    _prctl(PR_SET_DUMPABLE, 0)


def _drop_capabilities() -> None:
    header = struct.pack("=II", CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset, header, bytes(24))


def _landlock() -> list[str]:
    """Refuses every access to files that this kernel's Landlock knows of; TCP, signals, abstract sockets as well."""
    version = _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return []
    files = sum(rights for first, rights in LANDLOCK_FILES if version >= first)
    handled = struct.pack("=QQQ", files, 0b11, 0b11)
    size = 24 if version >= LANDLOCK_SCOPE else 16 if version >= LANDLOCK_NET else 8
    try:
        rules = _checked(
            _libc.syscall, ctypes.c_long(LANDLOCK_CREATE), handled, ctypes.c_size_t(size), ctypes.c_uint32(0)
        )
        _checked(_libc.syscall, ctypes.c_long(LANDLOCK_RESTRICT), ctypes.c_int(rules), ctypes.c_uint32(0))
    except OSError:
        return []
    os.close(rules)
    since = {"landlock": 1, "landlock_net": LANDLOCK_NET, "landlock_scope": LANDLOCK_SCOPE}
    return [name for name, first in since.items() if version >= first]
