"""Runs a program as a unit of config/deploy/systemd would, as far as a process can do that to itself: `sealed.py UNIT PROGRAM...`.

Applied are PrivateUsers (as a user that is not root), an empty capability set, NoNewPrivileges, UMask, and with a filter of
system calls SystemCallFilter, SystemCallErrorNumber, RestrictNamespaces, RestrictAddressFamilies and
MemoryDenyWriteExecute, after systemd's src/shared/seccomp-util.c. What systemd does with mounts is not here: what the
daemon may write is said by its configuration.

The user that the program is within its namespace is not root, and outside it is whoever runs this, so files can be read.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from ifabric_actors.chassis import confinement, seccomp
from ifabric_actors.chassis.seccomp import AND, LOAD, NUMBER_AT, Instruction
from tests.system.deployment import unit

#: of the machine's own kernel headers
NUMBERS = Path("/usr/include") / f"{platform.machine()}-linux-gnu/asm/unistd_64.h"
USER = 7777
EPERM = seccomp.ERROR | errno.EPERM
ENOSYS = seccomp.ERROR | errno.ENOSYS
FLAGS = {"cgroup": 0x02000000, "ipc": 0x08000000, "net": 0x40000000, "mnt": 0x00020000, "pid": 0x20000000,
         "user": 0x10000000, "uts": 0x04000000, "time": 0x80}  # fmt: skip
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}


@cache
def members(name: str) -> frozenset[str]:
    """The system calls of a set such as `@system-service`; of a call, itself."""
    if not name.startswith("@"):
        return frozenset({name})
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    return frozenset().union(*(members(line.strip()) for line in text.splitlines() if re.match(r"    [@\w]", line)))


def allowed(filters: list[str]) -> frozenset[str]:
    """What the lines of SystemCallFilter= come to: an allow-list, since the first is one."""
    found = members("@default")
    for line in filters:
        names = frozenset().union(*map(members, line.removeprefix("~").split()))
        found = found - names if line.startswith("~") else found | names
    return found


def program(service: dict[str, list[str]]) -> bytes:
    """The filter."""
    numbers = {name: int(number) for name, number in re.findall(r"__NR_(\w+) (\d+)", NUMBERS.read_text())}
    audit, _ = seccomp.MACHINES[platform.machine()]
    code: list[Instruction] = [(LOAD, 0, 0, seccomp.ARCH_AT), (seccomp.EQUAL, 1, 0, audit), seccomp._end(seccomp.KILL)]
    code.append((LOAD, 0, 0, NUMBER_AT))
    for name, body in _looked_at(service).items():
        code += seccomp._case(numbers[name], body)
    for name in sorted(allowed(service["SystemCallFilter"]) & numbers.keys()):
        code += seccomp._case(numbers[name], [seccomp._end(seccomp.ALLOW)])
    return seccomp._packed([*code, seccomp._end(EPERM)])


def _looked_at(service: dict[str, list[str]]) -> dict[str, list[Instruction]]:
    """Calls whose arguments decide. All of them are in the allow-list besides."""
    body = {"clone3": [seccomp._end(ENOSYS)]}  # its flags cannot be looked at, so systemd takes it away
    (namespaces,) = service["RestrictNamespaces"]
    kept = () if namespaces == "yes" else namespaces.split()
    denied = sum(flag for name, flag in FLAGS.items() if name not in kept and name != "time")
    for name in ("unshare", "clone"):
        body[name] = [seccomp._argument(0), (AND, 0, 0, denied), *seccomp._one_of((0,), EPERM)]
    families = tuple(FAMILIES[name] for name in service["RestrictAddressFamilies"][0].split())
    body["socket"] = [seccomp._argument(0), *seccomp._one_of(families, EPERM)]
    if service.get("MemoryDenyWriteExecute") == ["yes"]:
        both = mmap.PROT_WRITE | mmap.PROT_EXEC
        body["mmap"] = [seccomp._argument(2), (AND, 0, 0, both), *seccomp._one_of((0, 1, 2, 4), EPERM)]
        body["mprotect"] = [seccomp._argument(2), (AND, 0, 0, mmap.PROT_EXEC), *seccomp._one_of((0,), EPERM)]
    return body


def seal(service: dict[str, list[str]]) -> None:
    """This process, for good, from the next program on. `OSError`: the kernel refuses."""
    code = program(service)
    uid, gid = os.geteuid(), os.getegid()
    confinement._unshare(confinement.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{USER} {uid} 1"), ("gid_map", f"{USER} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    os.umask(int(service["UMask"][0], 8))
    for capability in range(64):
        if ctypes.CDLL(None).prctl(24, ctypes.c_ulong(capability), 0, 0, 0):  # PR_CAPBSET_DROP
            break
    confinement._no_new_privs()
    seccomp.install(code)


if __name__ == "__main__":
    seal(unit(Path(sys.argv[1]))["Service"])
    os.execv(sys.argv[2], sys.argv[2:])
