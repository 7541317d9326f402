"""A thousand runs of hostile modules on real servers: contained, with a bound on what they cost the daemon."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ifabric.testing.servers import RealServer
from tests.actors.conftest import CLOCK, World
from tests.conftest import needed
from tests.guests.bomb import Bomb
from tests.guests.bombs import BOMBS
from tests.guests.build import compiler
from tests.guests.suite import CONFIG, answer, eventually, fits, is_idle, resident_bytes, says_hello

pytestmark = pytest.mark.slow

MIB = 1 << 20
ROUNDS = 6
#: of a worker beyond its guest's memory, as the standard has it
OVERHEAD_BYTES = 64 * MIB


@pytest.fixture
async def house(etcd: RealServer, nats: RealServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    with needed("guests in C"):
        compiler()
    world = World(etcd.url, nats.url)
    await world.open()
    await world.daemon(actors=(), chassis=CONFIG, state_dir=tmp_path_factory.mktemp("proof"))
    await eventually(lambda: is_idle(world), 20.0)
    yield world
    await world.close()


class Watch:
    """Looks every few milliseconds how late the loop is and how large the workers are."""

    def __init__(self, world: World) -> None:
        self._pool: Any = world.daemons[0].actor.pool  # type: ignore[attr-defined]
        self.late_s: list[float] = []
        self.largest_bytes = 0

    async def run(self) -> None:
        """Never returns."""
        while True:
            before = CLOCK.monotonic()
            await asyncio.sleep(0.005)
            self.late_s.append(CLOCK.monotonic() - before - 0.005)
            for pid in self._pool.pids():
                try:
                    self.largest_bytes = max(self.largest_bytes, resident_bytes(pid))
                except FileNotFoundError:
                    continue

    def p99_s(self) -> float:
        return sorted(self.late_s)[int(len(self.late_s) * 0.99)]


async def test_a_thousand_hostile_runs_cost_the_daemon_nothing(house: World) -> None:
    kept: list[tuple[Bomb, str]] = []
    for bomb in BOMBS:
        if not bomb.refused_at_put:
            came = await answer(house, "put", wasm=base64.b64encode(bomb.make()).decode())
            if came["code"] == "ok":
                kept.append((bomb, came["module"]))
    watch, sizes, runs = Watch(house), [], 0
    watching = asyncio.create_task(watch.run())
    try:
        for _ in range(ROUNDS):
            for bomb, module in kept:
                came, _ = await asyncio.gather(
                    answer(house, "run", "hostile", module=module, **bomb.request()), says_hello(house, times=1)
                )
                assert any(
                    fits(one, {"stdout": "", "stderr": "", "truncated": False, **came}) for one in bomb.answers
                ), f"{bomb.name}: {came}"
                runs += 1
            sizes.append(resident_bytes(os.getpid()))
    finally:
        watching.cancel()
    assert runs >= 1000
    print(f"the loop was late by at most {watch.p99_s() * 1000:.1f} ms, 99 of 100 times")
    most = CONFIG["runtime"]["max_memory_mb"] * MIB + OVERHEAD_BYTES
    assert watch.largest_bytes <= most, f"a worker had {watch.largest_bytes / MIB:.0f} MB"
    assert sizes[-1] - sizes[1] <= 16 * MIB, f"the daemon grew: {[size // MIB for size in sizes]} MB"
    await eventually(lambda: is_idle(house))
