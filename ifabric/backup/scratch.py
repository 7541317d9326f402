"""A scratch etcd: one member, made of a snapshot, on loopback, for as long as a block.

It has TLS with an authority that lives as long as it does, and whoever calls is `root`. So nobody else on the machine
can read in it, and a snapshot in which etcd's access control is on can be changed: there the certificate's name is
the user, and `root` is the one that such an etcd always has.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from aetcd import rpc

from ifabric.backup.etcdutl import Peer, Tool, make_member
from ifabric.backup.manifest import BackupRefused
from ifabric.clock import Clock
from ifabric.embedded import QUOTA_BYTES, free_port, http_get
from ifabric.errors import StartupError
from ifabric.pki import Authority
from ifabric.programs import Program
from ifabric.store.channel import EtcdSettings, open_line

CALL_S = 30.0
#: a large database is read through before etcd answers
READY_S = 300.0
_BECOME = "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);os.execv(sys.argv[1],sys.argv[1:])"
NAME = "scratch"


class Scratch(NamedTuple):
    """A running one: how to reach it, and a channel."""

    settings: EtcdSettings
    line: grpc.aio.Channel


@contextlib.asynccontextmanager
async def scratch(
    program: Program, tool: Tool, snapshot: Path, within: Path, clock: Clock, *, bump: int = 0
) -> AsyncIterator[Scratch]:
    """Makes it of `snapshot` below `within`, starts it, and takes all of it away with the block.

    `BackupRefused` when etcdutl or etcd does not take the snapshot.
    """
    with tempfile.TemporaryDirectory(prefix=".ifabric-scratch-", dir=within) as made:
        folder = Path(made)
        client, peer, health = free_port(), free_port(), free_port()
        me = Peer(NAME, f"https://127.0.0.1:{peer}")
        await make_member(tool, snapshot, folder / "data", me, [me], clock.token(), bump=bump)
        settings = _certified(folder, f"https://127.0.0.1:{client}")
        log = folder / "etcd.log"
        words = _words(program, folder, settings, me, health, _size(snapshot))
        process = _begun(words, log)
        line = open_line(settings.endpoints[0], settings)
        try:
            await _healthy(process, health, log, clock)
            await _silence(line)
            yield Scratch(settings, line)
        finally:
            await line.close()
            process.kill()  # nothing in it is needed any more
            await asyncio.to_thread(process.wait)


def _size(path: Path) -> int:
    return path.stat().st_size


def _certified(folder: Path, url: str) -> EtcdSettings:
    authority = Authority.create("InfraFabric restore", days=2)
    authority.pair.write(folder, "ca")
    authority.issue("scratch", ("127.0.0.1", "localhost"), days=2).write(folder, "server")
    authority.issue("root", days=2, client=True).write(folder, "root")
    return EtcdSettings(
        endpoints=(url,),
        ca_cert=str(folder / "ca.crt"),
        cert_file=str(folder / "root.crt"),
        key_file=str(folder / "root.key"),
    )


def _words(program: Program, folder: Path, settings: EtcdSettings, me: Peer, health: int, size: int) -> list[str]:
    url = settings.endpoints[0]
    arguments = [
        program.path,
        f"--name={me.name}",
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={me.url}",
        f"--initial-advertise-peer-urls={me.url}",
        f"--initial-cluster={me.name}={me.url}",
        f"--listen-metrics-urls=http://127.0.0.1:{health}",
        f"--quota-backend-bytes={max(QUOTA_BYTES, 2 * size)}",
        "--client-cert-auth",
        "--peer-client-cert-auth",
        "--log-level=warn",
        "--logger=zap",
    ]
    for prefix in ("", "peer-"):
        arguments += [
            f"--{prefix}cert-file={folder / 'server.crt'}",
            f"--{prefix}key-file={folder / 'server.key'}",
            f"--{prefix}trusted-ca-file={folder / 'ca.crt'}",
        ]
    return arguments


def _begun(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The kernel ends it with this process, however that ends.

    A small Python asks for that and becomes etcd. Code of ours between fork and exec would be simpler, but gRPC has
    threads here by now, and a child that runs anything but exec then may die of them.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BECOME, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-3:]


async def _healthy(process: subprocess.Popen[bytes], port: int, log: Path, clock: Clock) -> None:
    until = clock.monotonic() + READY_S
    while b" 200 " not in (await http_get(port, "/health"))[:20]:
        if process.poll() is not None or clock.monotonic() > until:
            said = _tail(log)
            raise StartupError(
                "\n".join(["etcd did not start on the snapshot; nothing was touched. Its log ends:", *said])
            )
        await clock.sleep(0.02)


async def _silence(line: grpc.aio.Channel) -> None:
    """An etcd that was full when the snapshot was taken takes no change: what it has room for is the new one's affair."""
    maintenance = rpc.MaintenanceStub(line)
    alarms: Any = await maintenance.Alarm(rpc.AlarmRequest(action=rpc.AlarmRequest.GET), timeout=CALL_S)
    for alarm in alarms.alarms:
        if alarm.alarm == rpc.CORRUPT:
            raise BackupRefused(
                "the snapshot is of an etcd that knew its data to be corrupt; nothing was touched", reason="corrupt"
            )
        await maintenance.Alarm(
            rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, memberID=alarm.memberID, alarm=alarm.alarm),
            timeout=CALL_S,
        )
