"""What a daemon had acknowledged about money is in the journal, also when etcd is gone before its watch could tell it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from ifabric.bus.base import Journal
from ifabric.cli.lost import Span
from ifabric.cli.reconcile import bars, read
from ifabric.clock import SystemClock
from ifabric.errors import FabricError
from ifabric.store.base import Batch
from ifabric.testing.harness import Daemon
from ifabric.wire import subjects
from ifabric.wire.replay import ACKNOWLEDGED, ReplayEntry
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.governor.actor import Governor
from tests.actors.conftest import World
from tests.conformance.faulty import Faulty

WORDS = subjects.event(*ACKNOWLEDGED)


class Doomed(Faulty):
    """A store whose watch falls silent, and which is gone after that."""

    silent = False

    async def range(self, *args: Any, **options: Any) -> Any:
        await self._reach()
        return await self._store.range(*args, **options)

    async def watch(self, *args: Any, **options: Any) -> AsyncIterator[Batch]:
        async for batch in self._store.watch(*args, **options):
            while self.silent:
                await asyncio.sleep(3600)
            yield batch


async def journal_of(world: World) -> Journal:
    return await (await world.connection()).journal(subjects.EVENT_STREAM)


async def spend(world: World, entry: str, amount: int) -> None:
    said = await world.ask("spend", "alice", component="governor", entry=entry, amount_micro_usd=amount)
    assert said["charged"] == amount


async def told(world: World, subject: str) -> Any:
    """The last message on a subject, as soon as there is one."""
    async with asyncio.timeout(20):
        while True:
            try:
                if (last := await (await journal_of(world)).last(subject)) is not None:
                    return last
            except FabricError:  # the stream is not there yet
                pass
            await asyncio.sleep(0.05)


async def entries(world: World) -> dict[str, ReplayEntry]:
    """What `ifabric reconcile` would charge, were everything lost."""
    span = Span(0, 0, datetime(2100, 1, 1, tzinfo=UTC))
    found = await read(await journal_of(world), span, bars(json=True))
    return {entry.hold: entry for entry in found.told.entries}


@pytest.fixture
def mark() -> str:
    """Ends the names of one test's entries: the journal of a real NATS has other tests' as well."""
    return SystemClock().token()


@pytest.fixture
async def doomed(world: World, mark: str) -> tuple[Daemon, Doomed]:
    """A daemon that has charged 100, told the journal, and 23 more that its watch will not tell."""
    store = Doomed(await world.store())
    daemon = Daemon((Coordinator, Governor), store, await world.connection(), governor={})
    world.daemons.append(daemon)
    await daemon.start()
    await world.ask("hello", "alice", account="acme")
    await spend(world, f"heard-{mark}", 100)
    while f"heard-{mark}" not in await entries(world):
        await told(world, subjects.event("budget", "commit"))
    store.silent = True
    await spend(world, f"unheard-{mark}", 23)
    return daemon, store


async def test_a_daemon_that_is_stopped_when_etcd_is_gone_tells_what_it_had_acknowledged(
    world: World, doomed: tuple[Daemon, Doomed], mark: str
) -> None:
    daemon, store = doomed
    assert f"unheard-{mark}" not in await entries(world)
    store.down = True
    await daemon.stop()
    known = await entries(world)
    names = (f"heard-{mark}", f"unheard-{mark}")
    assert [(known[name].fate, known[name].charged_micro_usd) for name in names] == [
        ("committed", 100),
        ("committed", 23),
    ]


async def test_a_daemon_that_lives_on_without_etcd_tells_it_too(
    world: World, doomed: tuple[Daemon, Doomed], mark: str
) -> None:
    _, store = doomed
    store.down = True
    with pytest.raises(FabricError):
        await world.ask(
            "spend", "alice", component="governor", entry=f"refused-{mark}", amount_micro_usd=1, timeout_s=10
        )
    async with asyncio.timeout(20):
        while f"unheard-{mark}" not in (known := await entries(world)):
            await asyncio.sleep(0.05)
    assert known[f"unheard-{mark}"].charged_micro_usd == 23
    assert f"refused-{mark}" not in known, "what was not acknowledged is not told"


async def test_a_publisher_is_not_led_to_believe_that_all_before_the_last_words_was_told(
    world: World, doomed: tuple[Daemon, Doomed], mark: str
) -> None:
    """They are no events: etcd comes back with its data, and the next daemon tells it as if nothing had happened."""
    daemon, store = doomed
    store.down = True
    await daemon.stop()
    await told(world, WORDS)
    await world.daemon(governor={})
    async with asyncio.timeout(30):
        while (
            last := await told(world, subjects.event("budget", "commit"))
        ) and f'"unheard-{mark}"'.encode() not in last.data:
            await asyncio.sleep(0.05)


async def test_while_etcd_lives_a_daemon_that_stops_says_nothing(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "alice", account="acme")
    await spend(world, "first", 1)
    await told(world, subjects.event("budget", "commit"))
    before = await (await journal_of(world)).last(WORDS)  # of other tests, on the session's server
    await spend(world, "heard", 100)
    await daemon.stop()
    after = await (await journal_of(world)).last(WORDS)
    assert (after and after.seq) == (before and before.seq)
