"""Clusters: three etcd and three nats-server on loopback, with TLS and identities when they are asked for.

Each member is a real process that can be frozen, killed, wiped and started again; all ends with the block.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ifabric.bus.serverconf import Identities, Routes, ServerConf, Tls
from ifabric.clock import SystemClock
from ifabric.embedded import Server, free_port, http_get
from ifabric.pki import Authority
from ifabric.programs import find_etcd, find_nats_server
from ifabric.scratch.servers import RealServer

HOSTS = ("localhost", "127.0.0.1", "::1")
#: common names for which every `Certificates` has a client certificate
CLIENTS = ("root", "ifabric", "backup", "prometheus", "stranger")


class Certificates:
    """A folder with an authority (`ca.crt`), one server certificate for loopback, and client certificates by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create("InfraFabric test CA")
        self.authority.pair.write(folder, "ca")
        self.authority.issue("server", HOSTS).write(folder, "server")
        for name in CLIENTS:
            self.authority.issue(name, client=True).write(folder, name)

    def path(self, name: str) -> str:
        """Of a file in the folder, for example `ca.crt` or `ifabric.key`."""
        return str(self.folder / name)

    def tls(self, *, verify: bool = False) -> Tls:
        """For a nats-server."""
        return Tls(
            cert_file=self.path("server.crt"),
            key_file=self.path("server.key"),
            ca_file=self.path("ca.crt"),
            verify=verify,
        )

    def client(self, name: str = "ifabric") -> dict[str, str]:
        """The keys of a configuration's section: `ca_cert`, `cert_file`, `key_file`."""
        return {
            "ca_cert": self.path("ca.crt"),
            "cert_file": self.path(f"{name}.crt"),
            "key_file": self.path(f"{name}.key"),
        }


class Members:
    """The members of a cluster."""

    def __init__(self, members: list[RealServer], folders: list[Path], peers: Sequence[str] = ()) -> None:
        self.members = members
        #: the data of each: whatever is in there is the member's, and its name is the member's name
        self.folders = folders
        #: of an etcd: where the members reach each other
        self.peers = tuple(peers)

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [member.url for member in self.members]

    async def start(self) -> None:
        """All of them side by side: none is healthy before most are."""
        await asyncio.gather(*(member.start_again() for member in self.members))

    async def stop(self) -> None:
        """Orderly. Twice is harmless."""
        await asyncio.gather(*(member.stop() for member in self.members))

    async def destroy(self) -> None:
        """SIGKILL for all at once, and their data deleted."""
        await asyncio.gather(*(member.kill() for member in self.members))
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def etcd_cluster(
    size: int = 3,
    *,
    certificates: Certificates | None = None,
    arguments: tuple[str, ...] = (),
    name: str = "test",
    state: str = "new",
    folder: Path | None = None,
) -> AsyncIterator[Members]:
    """An etcd cluster of `size`; with certificates, TLS on every port and client certificates demanded.

    `folder`: where the members' data is, `etcd-1`, `etcd-2`...; it is kept, and may hold restored data already.
    """
    with _folder(folder) as base:
        ports = [(free_port(), free_port(), free_port()) for _ in range(size)]
        scheme = "https" if certificates else "http"
        names = [f"etcd-{n}" for n in range(1, size + 1)]
        peers = [f"{scheme}://127.0.0.1:{peer}" for _, peer, _ in ports]
        initial = ",".join(f"{member}={peer}" for member, peer in zip(names, peers, strict=True))
        members = []
        for member, (client, _, health), peer in zip(names, ports, peers, strict=True):
            url = f"{scheme}://127.0.0.1:{client}"
            given = [
                f"--name={member}",
                f"--data-dir={base / member}",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={initial}",
                f"--initial-cluster-token={name}",
                f"--initial-cluster-state={state}",
                f"--listen-metrics-urls=http://127.0.0.1:{health}",
                "--grpc-keepalive-min-time=1s",
                "--log-level=warn",
                "--logger=zap",
                *(_etcd_tls(certificates) if certificates else ()),
                *arguments,
            ]
            server = Server(
                find_etcd(), given, base / "log" / f"{member}.log", _healthy(health, "/health"), SystemClock()
            )
            members.append(RealServer(server, url))
        cluster = Members(members, [base / member for member in names], peers)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


@contextlib.asynccontextmanager
async def nats_cluster(
    size: int = 3,
    *,
    certificates: Certificates | None = None,
    verify: bool = False,
    identities: Identities | None = None,
    folder: Path | None = None,
) -> AsyncIterator[Members]:
    """A NATS cluster of `size` with JetStream; with certificates, TLS for clients and between the servers.

    With `verify`, clients need a certificate. With `identities`, they need to be somebody.
    """
    with _folder(folder) as base:
        ports = [(free_port(), free_port(), free_port()) for _ in range(size)]
        tls = certificates.tls(verify=verify) if certificates else None
        between = replace(tls, verify=True) if tls else None
        routes = [f"nats-route://127.0.0.1:{route}" for _, route, _ in ports]
        members, folders = [], []
        for number, (client, route, health) in enumerate(ports, start=1):
            name = f"nats-{number}"
            conf = ServerConf(
                name=name,
                listen=f"127.0.0.1:{client}",
                store_dir=base / name,
                monitoring=f"127.0.0.1:{health}",
                tls=tls,
                routes=Routes(cluster="test", listen=f"127.0.0.1:{route}", routes=routes, tls=between)
                if size > 1
                else None,
                identities=identities,
            )
            path = base / f"{name}.conf"
            path.write_text(conf.text())
            server = Server(
                find_nats_server(),
                ["-c", str(path)],
                base / "log" / f"{name}.log",
                _healthy(health, "/healthz"),
                SystemClock(),
            )
            members.append(RealServer(server, f"{'tls' if tls else 'nats'}://127.0.0.1:{client}"))
            folders.append(base / name)
        cluster = Members(members, folders)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


def _etcd_tls(certificates: Certificates) -> list[str]:
    found = []
    for prefix in ("", "peer-"):
        found += [
            f"--{prefix}cert-file={certificates.path('server.crt')}",
            f"--{prefix}key-file={certificates.path('server.key')}",
            f"--{prefix}trusted-ca-file={certificates.path('ca.crt')}",
            f"--{prefix}client-cert-auth",
        ]
    return [*found, "--tls-min-version=TLS1.3"]


def _healthy(port: int, path: str) -> Callable[[], Awaitable[bool]]:
    async def healthy() -> bool:
        return b" 200 " in (await http_get(port, path))[:20]

    return healthy


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ifabric-scratch-") as folder:
        yield Path(folder)
