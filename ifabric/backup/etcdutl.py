"""etcdutl: what is in a snapshot, and members made of one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from ifabric.backup.manifest import BackupRefused
from ifabric.errors import StartupError
from ifabric.programs import Program, Version, find_etcd, parse_version

#: etcd does not restore a database of gigabytes in less
RUN_S = 1800.0
#: how far the revisions of a restored cluster are moved on for each incarnation: more than are written in between
BUMP = 1_000_000_000
_SAID_MAX = 600


class Facts(msgspec.Struct, frozen=True):
    """What `etcdutl snapshot status` says."""

    hash: int
    revision: int
    total_keys: int = msgspec.field(name="totalKey")
    total_bytes: int = msgspec.field(name="totalSize")


class Peer(NamedTuple):
    """A member of the cluster to be: its name and where the others reach it (`https://10.0.0.1:2380`)."""

    name: str
    url: str


@dataclass(frozen=True)
class Tool:
    """An etcdutl, and what it can."""

    path: str
    version: Version
    #: whether it moves revisions on (`--bump-revision`, `--mark-compacted`)
    bumps: bool


async def find_etcdutl(etcd: Program | None = None) -> Tool:
    """The one beside the etcd that is used here, else the one on PATH. `StartupError` says how to get one."""
    beside = Path((etcd or find_etcd()).path).with_name("etcdutl")
    path = str(beside) if os.access(beside, os.X_OK) else shutil.which("etcdutl")
    if path is None:
        raise StartupError(
            f"there is no etcdutl beside {beside.with_name('etcd')} and none on PATH; nothing was done. It comes with every "
            "etcd from 3.5 on: `just etcd` brings both."
        )
    return await asyncio.to_thread(_look, path)


@cache
def _look(path: str) -> Tool:
    def said(*words: str) -> str:
        try:
            return subprocess.run(
                [path, *words], capture_output=True, text=True, errors="replace", timeout=20, check=False
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise StartupError(f"{path} does not run: {error}; nothing was done") from None

    version = parse_version(said("version"))
    return Tool(path, version, "--bump-revision" in said("snapshot", "restore", "--help"))


async def status(tool: Tool, fd: int) -> Facts:
    """Of the snapshot in an open file, which etcdutl walks through. `BackupRefused` when it is no sound database."""
    code, out, err = await _run(tool.path, "snapshot", "status", f"/dev/fd/{fd}", "-w", "json", keep=(fd,))
    if code != 0:
        raise BackupRefused(f"etcdutl finds the snapshot damaged: {_first(err)}; nothing was touched", reason="corrupt")
    try:
        return msgspec.json.decode(out, type=Facts)
    except msgspec.MsgspecError:
        raise BackupRefused(
            f"etcdutl says of the snapshot: {_first(out)}; nothing was touched", reason="corrupt"
        ) from None


async def make_member(
    tool: Tool,
    snapshot: Path,
    data_dir: Path,
    me: Peer,
    peers: Sequence[Peer],
    token: str,
    *,
    bump: int = 0,
) -> None:
    """Makes the data directory of one member of a snapshot. It is there whole or not at all.

    `BackupRefused` when etcdutl does not, with what it said.
    """
    fresh = data_dir.with_name(f".{data_dir.name}.restoring")
    shutil.rmtree(fresh, ignore_errors=True)
    given = [
        *("snapshot", "restore", str(snapshot), "--data-dir", str(fresh), "--name", me.name),
        *("--initial-cluster", ",".join(f"{peer.name}={peer.url}" for peer in peers)),
        *("--initial-cluster-token", token, "--initial-advertise-peer-urls", me.url),
        *(("--bump-revision", str(bump), "--mark-compacted") if bump else ()),
    ]
    try:
        code, out, err = await _run(tool.path, *given)
        if code != 0:
            why = _first(err or out)
            raise BackupRefused(
                f"etcdutl made no member {me.name}: {why}; {data_dir} was not touched", reason="etcdutl"
            )
        _moved(fresh, data_dir)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _moved(fresh: Path, data_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        data_dir.rmdir()  # an empty one, which was looked at before
    fresh.chmod(0o700)
    fresh.rename(data_dir)


async def _run(*words: str, keep: Sequence[int] = ()) -> tuple[int, bytes, bytes]:
    return await asyncio.to_thread(_run_here, words, tuple(keep))


def _run_here(words: Sequence[str], keep: tuple[int, ...]) -> tuple[int, bytes, bytes]:
    """In a thread, and without code between fork and exec: there, gRPC's threads of this process end the child."""
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=keep,
            timeout=RUN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, b"", f"Error: it did not end within {RUN_S:.0f} s".encode()
    return done.returncode, done.stdout, done.stderr


def _first(said: bytes) -> str:
    """The error in what a Go program says: the line that begins with it, else the first."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("Error:")), lines[0] if lines else "nothing")
    return found.removeprefix("Error: ")[:_SAID_MAX]
