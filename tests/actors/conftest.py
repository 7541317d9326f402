"""Coordinators inside the test, over the twins and over real etcd and NATS: what must hold, must hold over both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.actor.base import Actor
from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.errors import FabricError, from_body
from ifabric.store.base import Delete, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.harness import Daemon
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryEtcd, MemoryStore
from ifabric.testing.servers import RealServer
from ifabric.wire import subjects
from ifabric_actors.chassis.actor import Chassis
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.governor.actor import Governor

CLOCK = SystemClock()


class World:
    """One cluster: as many daemons as a test wants, and a way to ask them."""

    def __init__(self, etcd_url: str | None, nats_url: str | None) -> None:
        self.real = etcd_url is not None
        self._etcd_url, self._nats_url = etcd_url, nats_url
        self.memory = MemoryEtcd(CLOCK)
        self.hub = MemoryHub()
        self.daemons: list[Daemon] = []
        self._closing: list[Any] = []
        self.bus: Bus

    async def open(self) -> None:
        self.bus = await self.connection()
        store = await self.store()
        await store.txn(Txn((), (Delete(b"\x00", b"\xff"),)))

    async def connection(self) -> Bus:
        bus: Bus = Nats(NatsSettings(servers=(self._nats_url,)), CLOCK) if self._nats_url else MemoryBus(self.hub)
        await bus.connect()
        self._closing.append(bus)
        return bus

    async def store(self) -> Any:
        store: Any = (
            Etcd(EtcdSettings(endpoints=(self._etcd_url,)), CLOCK)
            if self._etcd_url
            else MemoryStore(CLOCK, self.memory)
        )
        await store.connect()
        self._closing.append(store)
        return store

    async def daemon(
        self,
        limits: dict[str, int | float] | None = None,
        *,
        actors: tuple[type[Actor], ...] = (Coordinator,),
        governor: dict[str, object] | None = None,
        chassis: dict[str, object] | None = None,
        state_dir: Path | None = None,
        **config: object,
    ) -> Daemon:
        """Another daemon on this cluster. With `governor` or `chassis` (sections, may be empty) it runs those too."""
        config = {"reconcile_interval_seconds": 0.5, **config}
        kinds = [*actors, *([Governor] if governor is not None else []), *([Chassis] if chassis is not None else [])]
        made = Daemon(
            kinds,
            await self.store(),
            await self.connection(),
            governor=governor,
            chassis=chassis,
            state_dir=state_dir,
            **config,
        )
        self.daemons.append(made)
        return await made.start(**(limits or {}))

    async def ask(
        self,
        verb: str,
        session: str,
        *,
        admin: bool = False,
        timeout_s: float = 5.0,
        component: str = "coordinator",
        **body: Any,
    ) -> dict[str, Any]:
        """One request; the reply, or the refusal as an exception."""
        data = msgspec.json.encode(body)
        return await self.ask_raw(verb, session, data, admin=admin, timeout_s=timeout_s, component=component)

    async def ask_raw(
        self,
        verb: str,
        session: str,
        data: bytes,
        *,
        admin: bool = False,
        timeout_s: float = 5.0,
        component: str = "coordinator",
    ) -> dict[str, Any]:
        subject = subjects.request(component, verb, session, admin=admin)
        answer = await self.bus.request(subject, data, timeout_s=timeout_s)
        body: dict[str, Any] = msgspec.json.decode(answer.data)
        if "Nats-Service-Error-Code" in answer.headers:
            error = from_body(body)
            assert answer.headers["Nats-Service-Error-Code"] == str(error.status)
            raise error
        return body

    async def refusal(self, verb: str, session: str, **body: Any) -> FabricError:
        """The refusal that a request must get."""
        with pytest.raises(FabricError) as caught:
            await self.ask(verb, session, **body)
        return caught.value

    async def close(self) -> None:
        for daemon in self.daemons:
            await daemon.stop()
        for one in reversed(self._closing):
            await one.close()


@pytest.fixture(params=["memory", "real"])
async def world(request: pytest.FixtureRequest, etcd: RealServer, nats: RealServer) -> AsyncIterator[World]:
    """A cluster without daemons."""
    real = request.param == "real"
    made = World(etcd.url if real else None, nats.url if real else None)
    await made.open()
    yield made
    await made.close()
