"""Real servers, one of each for the whole session; a program that is missing skips on a laptop and fails in CI."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvloop

from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.errors import StartupError
from ifabric.store.base import Delete, Store, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryStore
from ifabric.testing.servers import RealServer, etcd_server, nats_server

# A shell's background job ignores Ctrl-C, and what it starts does: the programs under test would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemon runs on uvloop, and so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@contextlib.contextmanager
def needed(what: str) -> Iterator[None]:
    """A missing program is no reason to fail on a laptop; in CI it is."""
    try:
        yield
    except StartupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{what}: {error}")


@pytest.fixture(scope="session")
async def etcd() -> AsyncIterator[RealServer]:
    """One etcd for the session. Tests that hurt it start their own."""
    with needed("etcd"):
        server = etcd_server()
        real = await server.__aenter__()
    yield real
    await server.__aexit__(None, None, None)


@pytest.fixture(scope="session")
async def nats() -> AsyncIterator[RealServer]:
    """One nats-server for the session."""
    with needed("nats-server"):
        server = nats_server()
        real = await server.__aenter__()
    yield real
    await server.__aexit__(None, None, None)


@contextlib.asynccontextmanager
async def emptied(url: str) -> AsyncIterator[Etcd]:
    """A connection to an etcd from which everything was deleted."""
    # an attempt that a slow disk outlasts would be of unknown outcome: that is another test's
    store = Etcd(EtcdSettings(endpoints=(url,), attempt_timeout_s=3.0), SystemClock())
    await store.connect()
    await store.txn(Txn((), (Delete(b"\x00", b"\xff"),)))
    yield store
    await store.close()


@pytest.fixture
async def real_store(etcd: RealServer) -> AsyncIterator[Etcd]:
    """A connection to the session's etcd, empty."""
    async with emptied(etcd.url) as store:
        yield store


@pytest.fixture(params=["memory", "etcd"])
async def store(request: pytest.FixtureRequest, etcd: RealServer) -> AsyncIterator[Store]:
    """An empty store: the twin, and the real one."""
    if request.param == "etcd":
        async with emptied(etcd.url) as real:
            yield real
    else:
        twin = MemoryStore(SystemClock())
        await twin.connect()
        yield twin
        await twin.close()


@pytest.fixture(params=["memory", "nats"])
async def buses(request: pytest.FixtureRequest, nats: RealServer) -> AsyncIterator[tuple[Bus, Bus]]:
    """Two connections to one bus: of the twin, and of the real one."""
    hub = MemoryHub()
    settings = NatsSettings(servers=(nats.url,))
    pair: tuple[Bus, Bus] = (
        (Nats(settings, SystemClock()), Nats(settings, SystemClock()))
        if request.param == "nats"
        else (MemoryBus(hub), MemoryBus(hub))
    )
    for one in pair:
        await one.connect()
    yield pair
    for one in pair:
        await one.close()
