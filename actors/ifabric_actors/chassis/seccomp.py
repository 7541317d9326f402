"""Which system calls a confined worker may make: a BPF program, written here and checked by the kernel at each call.

**An allow-list.** What Python, libc and wasmtime were seen to need, and a little around it: reading and writing what is
open, memory, signals to itself, futexes, time, threads. The kernel has some 370 calls, a worker uses 50; the bugs by
which a process becomes root are in the others. Three answers to the rest:

- *The end*, for what no honest worker has a reason to try: another program or process, a socket, a namespace, another
  process's memory or signals, kernel interfaces with a history (`KILLS`). The worker dies of SIGSYS, which the daemon
  can tell from every other end: it is the mark of a guest that left WebAssembly.
- *ENOSYS*, for calls younger than `YOUNG`: libraries try the newest first and know to do without. `clone3` is one of
  them on purpose: its flags are in memory, where a filter cannot look, and glibc takes `clone` instead.
- *EPERM* for all others: Python and Rust meet an error that they are used to.

**What is looked at in arguments.** `clone` makes threads only; `openat` reads only; `tgkill` reaches this process only,
whose number is a constant of the program; `fcntl`, `ioctl` and `prctl` do a handful of things each, and none of them
takes back a confinement; `prlimit64` is about this process only. Paths cannot be looked at (they are in memory): which
files can be opened is for Landlock and the root directory to say.

**What is not here.** Writable and executable memory is allowed: ctypes makes its callbacks so, and a compiler of
machine code has to turn one into the other anyhow.

**Cost.** Calls that are always allowed are in a bitmap of the kernel's (5.11 and later) and never reach the program;
the few with looked-at arguments come first. The program is about 350 instructions; the kernel takes a third of a
millisecond to compile them.

Sources: linux/seccomp.h, linux/filter.h, linux/audit.h; numbers from asm/unistd_64.h and asm-generic/unistd.h, which
`tests/system/test_confinement.py` compares where they are installed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Instruction = tuple[int, int, int, int]

#: what the kernel shows the program: number, architecture, instruction pointer, six arguments of 64 bits
NUMBER_AT, ARCH_AT, ARGS_AT = 0, 4, 16
LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
#: system calls from here on have one number on all machines; the first is of Linux 5.1
YOUNG = 424
#: on x86-64, numbers with this bit are of the x32 interface
X32 = 0x40000000
PR_SET_SECCOMP, MODE_FILTER = 22, 2
#: of what a filter may be; the kernel allows 4096
INSTRUCTIONS_MAX = 1024


class Machine(NamedTuple):
    """An architecture: its audit number, and which column of the tables it reads."""

    audit: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

#: a call's numbers on x86-64 and aarch64; -1: not there
Numbers = dict[str, tuple[int, int]]
ALLOWED: Numbers = {
    # what is open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62),
    "close": (3, 57), "close_range": (436, 436), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    # the socket to the daemon, and waiting for it; epoll and eventfd are of the runtime under wasmtime's WASI
    "recvmsg": (47, 212), "sendmsg": (46, 211), "recvfrom": (45, 207), "sendto": (44, 206), "shutdown": (48, 210),
    "getsockname": (51, 204), "getsockopt": (55, 209), "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1),
    "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    # memory
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "membarrier": (324, 283),
    # signals to itself, and threads
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168), "gettid": (186, 178),
    "exit": (60, 93), "exit_group": (231, 94),
    # time and chance
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, -1), "times": (100, 153), "getrandom": (318, 278),
    # who and what it is
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getrusage": (98, 165), "getrlimit": (97, 163), "uname": (63, 160), "sysinfo": (99, 179),
}  # fmt: skip
KILLS: Numbers = {
    # another program, another process
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "process_mrelease": (448, 448),
    # the network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # namespaces, mounts, roots
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # who it is
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147),
    "setresgid": (119, 149), "setfsuid": (122, 151), "setfsgid": (123, 152), "setgroups": (116, 159),
    "capset": (126, 91), "personality": (135, 92),
    # the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "fanotify_init": (300, 262),
    "modify_ldt": (154, -1), "iopl": (172, -1), "ioperm": (173, -1), "clock_settime": (227, 112),
    "settimeofday": (164, 170), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
LOOKED_AT: Numbers = {
    "clone": (56, 220), "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
    "prlimit64": (302, 261),
}  # fmt: skip
TGKILL = (234, 131)

CLONE_THREAD = 0x10000
#: of `clone`: new namespaces, processes that can be traced or waited for elsewhere, shared input and output
NO_THREAD = 0x7E020000 | 0x80000000 | 0x1000 | 0x2000 | 0x4000 | 0x8000
#: O_CLOEXEC, O_NONBLOCK, O_NOCTTY: the same on both machines, and reading is 0
OPEN_FLAGS = 0o2004400
#: F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS
FCNTLS = (1, 2, 3, 4, 1030, 1034)
#: FIONBIO, FIONCLEX, FIOCLEX
IOCTLS = (0x5421, 0x5450, 0x5451)
#: PR_SET_NAME, PR_GET_NAME, PR_SET_VMA: names of threads and of memory
PRCTLS = (15, 16, 0x53564D41)


def program(machine: str, pid: int) -> bytes | None:
    """The filter for a process on a machine (`platform.machine()`). None: for such a machine there is none."""
    if machine not in MACHINES:
        return None
    audit, column = MACHINES[machine]
    own = [_argument(0), *_one_of((pid,), KILL)]
    code: list[Instruction] = [(LOAD, 0, 0, ARCH_AT), (EQUAL, 1, 0, audit), _end(KILL), (LOAD, 0, 0, NUMBER_AT)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), _end(KILL)]
    return _packed([*code, *_case(TGKILL[column], own)]) + _the_same_for_all(column)


@lru_cache
def _the_same_for_all(column: int) -> bytes:
    """The rest, which is built once in a fork server: it is most of what confining a worker would cost."""
    code: list[Instruction] = []
    for name, body in _BODIES.items():
        code += _case(LOOKED_AT[name][column], body)
    for numbers, answer in ((ALLOWED, ALLOW), (KILLS, KILL)):
        for both in numbers.values():
            if both[column] >= 0:
                code += _case(both[column], [_end(answer)])
    code += [(AT_LEAST, 0, 1, YOUNG), _end(ERROR | errno.ENOSYS), _end(ERROR | errno.EPERM)]
    assert len(code) <= INSTRUCTIONS_MAX
    return _packed(code)


def _packed(code: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _end(answer: int) -> Instruction:
    return (RETURN, 0, 0, answer)


def _case(number: int, body: Sequence[Instruction]) -> list[Instruction]:
    """The body, which always returns, for the call with that number. The number stays loaded for the next case."""
    return [(EQUAL, 0, len(body), number), *body]


def _argument(index: int) -> Instruction:
    """The lower half of an argument; all that are looked at are of 32 bits. Both machines are little-endian."""
    return (LOAD, 0, 0, ARGS_AT + 8 * index)


def _one_of(values: Sequence[int], otherwise: int) -> list[Instruction]:
    """Allowed when what is loaded is one of these."""
    checks: list[Instruction] = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*checks, _end(otherwise), _end(ALLOW)]


_REFUSED = ERROR | errno.EPERM
_BODIES = {
    "clone": [_argument(0), (AND, 0, 0, CLONE_THREAD | NO_THREAD), *_one_of((CLONE_THREAD,), KILL)],
    "openat": [_argument(2), (AND, 0, 0, ~OPEN_FLAGS & 0xFFFFFFFF), *_one_of((0,), _REFUSED)],
    "fcntl": [_argument(1), *_one_of(FCNTLS, _REFUSED)],
    "ioctl": [_argument(1), *_one_of(IOCTLS, _REFUSED)],
    "prctl": [_argument(0), *_one_of(PRCTLS, _REFUSED)],
    "prlimit64": [_argument(0), *_one_of((0,), KILL)],
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(code: bytes) -> None:
    """Filters this thread and those that it starts, for good. After no_new_privs. `OSError`: the kernel refused."""
    buffer = ctypes.create_string_buffer(code, len(code))
    described = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), ctypes.byref(described), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel takes no filter of system calls: {os.strerror(number)}")
