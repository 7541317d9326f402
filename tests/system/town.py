"""A town with identities: three NATS servers that ask who comes, one etcd, daemons that answer, and people."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ifabric import credentials
from ifabric.bus.hardened import HardenedClient
from ifabric.bus.nats import Nats
from ifabric.bus.serverconf import Identities
from ifabric.client import Client
from ifabric.clock import SystemClock
from ifabric.connecting import settings_for
from ifabric.credentials import Credential
from ifabric.testing.clusters import Members, nats_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer, etcd_server
from ifabric.wire import identity as wire
from ifabric.wire.permissions import inbox_prefix

CLOCK = SystemClock()


@dataclass
class Town:
    """Where a test lives."""

    folder: Path
    etcd: RealServer
    nats: Members
    operator: Credential
    config: dict[str, Any]
    daemons: list[RealDaemon] = field(default_factory=list)

    @property
    def urls(self) -> str:
        """NATS, as the SDK takes it."""
        return ",".join(self.nats.urls)

    def path(self, name: str) -> str:
        """Of a file in the town's folder."""
        return str(self.folder / name)

    async def daemon(self, **more: Any) -> RealDaemon:
        """One more daemon, ready."""
        folder = self.folder / f"daemon-{len(self.daemons)}"
        made = RealDaemon(folder, [self.etcd.url], self.nats.urls, {**self.config, **more})
        self.daemons.append(made)
        return await made.start()

    def client(self, credential: Credential, **options: Any) -> Client:
        """The SDK, with a credential that is written to a file for it."""
        path = self.folder / f"{credential.public_key}.nk"
        if not path.exists():
            credential.write(path)
        client = Client.connect(self.urls, credentials=path, **options)
        client.leave_on_exit = False
        return client

    async def create(self, name: str, **options: Any) -> Credential:
        """A new agent."""
        made = credentials.make(name)
        async with self.client(self.operator) as operator:
            await operator.call(wire.CreateAgent(agent=name, public_key=made.public_key, **options))
        return made

    async def ask(self, message: Any) -> Any:
        """As the operator."""
        async with self.client(self.operator) as operator:
            return await operator.call(message)

    @contextlib.asynccontextmanager
    async def bus(self, credential: Credential) -> AsyncIterator[Nats]:
        """The daemon's own way of talking to NATS, as somebody."""
        bus = Nats(settings_for(self.urls, credential.session or "nobody", credential, None, 5.0), CLOCK)
        await bus.connect()
        yield bus
        await bus.close()

    @contextlib.asynccontextmanager
    async def raw(self, credential: Credential | None, server: int = 0, **options: Any) -> AsyncIterator[Stranger]:
        """A plain connection to one server, whose errors are kept."""
        stranger = Stranger()
        proof = {"nkeys_seed_str": credential.seed} if credential is not None else {}
        await stranger.client.connect(
            self.nats.urls[server],
            error_cb=stranger.heard,
            allow_reconnect=False,
            inbox_prefix=inbox_prefix(credential.session if credential else "nobody"),
            **(proof | options),
        )
        yield stranger
        await stranger.client.close()

    def nats_log(self) -> str:
        """All that the servers wrote."""
        return "".join(path.read_text() for path in sorted((self.folder / "nats" / "log").glob("*.log")))


class Stranger:
    """Somebody with a NATS client and bad intentions."""

    def __init__(self) -> None:
        self.client = HardenedClient()
        self.errors: list[str] = []
        self.got: list[tuple[str, bytes]] = []

    async def heard(self, error: Exception) -> None:
        self.errors.append(str(error))

    async def take(self, msg: Any) -> None:
        self.got.append((msg.subject, msg.data))

    async def settle(self) -> None:
        """Returns when the server has answered all that was sent."""
        await self.client.flush()
        await self.client.flush()

    async def publish(self, subject: str, data: bytes = b"{}", **more: Any) -> bool:
        """Whether the server let it through."""
        before = len(self.errors)
        await self.client.publish(subject, data, **more)
        await self.settle()
        return not any(f'publish to "{subject.lower()}"' in error for error in self.errors[before:])

    async def subscribe(self, subject: str, queue: str = "") -> bool:
        """Whether the server let it."""
        before = len(self.errors)
        await self.client.subscribe(subject, queue=queue, cb=self.take)
        await self.settle()
        return not any(f'subscription to "{subject.lower()}"' in error for error in self.errors[before:])


@contextlib.asynccontextmanager
async def town(
    folder: Path, *, size: int = 3, daemons: int = 2, page_operators: tuple[str, ...] = (), **config: Any
) -> AsyncIterator[Town]:
    """A town with so many NATS servers and daemons, which may act for these operators from their live page."""
    issuer, system, daemon = credentials.make(kind="account"), credentials.make(), credentials.make()
    operator = credentials.make("ann")
    for name, one in (("issuer", issuer), ("system", system), ("daemon", daemon)):
        one.write(folder / f"{name}.nk")
    identities = Identities(
        issuer=issuer.public_key, daemon=daemon.public_key, system=system.public_key, page_operators=page_operators
    )
    given = {
        "nats": {"nkey_seed_file": str(folder / "daemon.nk")},
        "identity": {
            "enabled": True,
            "issuer_seed_file": str(folder / "issuer.nk"),
            "system_seed_file": str(folder / "system.nk"),
            "operators": {"ann": operator.public_key},
            **config.pop("identity", {}),
        },
        "chassis": {"sandbox_pool": {"min_size": 1, "max_size": 1}},
        **config,
    }
    async with (
        etcd_server() as etcd,
        nats_cluster(size, identities=identities, folder=folder / "nats") as nats,
    ):
        made = Town(folder, etcd, nats, operator, given)
        try:
            await asyncio.gather(*(made.daemon() for _ in range(daemons)))
            yield made
        finally:
            for one in made.daemons:
                await one.close()
