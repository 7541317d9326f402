"""Workers that are killed, stopped, or die with their fork server: one run is lost, and the pool is whole again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ifabric.testing.harness import no_tasks_left
from tests.actors.conftest import CLOCK, World
from tests.conftest import needed
from tests.guests.bomb import forever, of_text, wat
from tests.guests.build import compiler
from tests.guests.suite import (
    CONFIG,
    GRACE_S,
    answer,
    children,
    descriptors,
    eventually,
    fork_servers,
    is_idle,
    pool,
    put,
    says_hello,
    state,
    ticks,
    whole,
    workers,
)

WORKERS = 2
LOOP = of_text(wat(forever("")))


@pytest.fixture
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A daemon with two workers that are both there."""
    with needed("guests in C"):
        compiler()
    world = World(None, None)
    await world.open()
    await world.daemon(actors=(), chassis=CONFIG, state_dir=tmp_path_factory.mktemp("faults"))
    await eventually(lambda: is_idle(world), 20.0)
    yield world
    await world.close()
    assert not fork_servers(), "a fork server outlived its daemon"


async def are_all() -> bool:
    return len(workers()) == WORKERS


async def are_busy(world: World, count: int) -> bool:
    return (await pool(world)).busy == count


async def busy_worker(before: dict[int, int]) -> int:
    """The one of these workers whose processor time has grown since."""

    async def grown() -> int:
        return next((pid for pid in before if ticks(pid) > before[pid] + 4), 0)

    pid: int = await eventually(grown)
    return pid


async def looping(
    world: World, wall_s: float = 10.0, *, beside: tuple[int, ...] = ()
) -> tuple[asyncio.Task[dict[str, Any]], int]:
    """A run that never ends by itself, and the worker that it is in. `beside`: those that are busy already."""
    module = await put(world, LOOP())
    await eventually(are_all)  # and no compiler that has not gone yet
    before = {pid: ticks(pid) for pid in workers() if pid not in beside}
    task = asyncio.create_task(answer(world, "run", module=module, limits={"wall_s": wall_s}))
    return task, await busy_worker(before)


async def test_a_worker_that_is_killed_takes_only_its_own_run_along(house: World) -> None:
    task, pid = await looping(house)
    other, _ = await looping(house, wall_s=1.0, beside=(pid,))
    os.kill(pid, signal.SIGKILL)
    came = await task
    assert came["code"] == "sandbox_died", came
    assert came.get("signal") == "SIGKILL"
    assert (await other)["which"] == "wall_s"
    await eventually(lambda: whole(house))
    assert pid not in workers()
    await says_hello(house)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGTERM, signal.SIGXCPU])
async def test_a_worker_that_dies_by_another_signal_is_told_by_its_name(house: World, number: signal.Signals) -> None:
    task, pid = await looping(house)
    os.kill(pid, number)
    came = await task
    assert (came["code"], came.get("signal")) == ("sandbox_died", number.name), came
    await eventually(lambda: whole(house))
    await says_hello(house)


async def test_a_worker_that_is_stopped_is_killed_at_its_deadline(house: World) -> None:
    began = CLOCK.monotonic()
    task, pid = await looping(house, wall_s=1.0)
    os.kill(pid, signal.SIGSTOP)
    came = await task
    took_s = CLOCK.monotonic() - began
    assert (came["code"], came.get("which")) == ("limit", "wall_s"), came
    assert 1.0 <= took_s <= 1.0 * 1.1 + GRACE_S + 2.0
    await eventually(lambda: whole(house))
    assert pid not in workers()
    await says_hello(house)


async def test_an_idle_worker_that_is_killed_costs_nobody_a_run(house: World) -> None:
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    await says_hello(house)
    await eventually(lambda: whole(house))


async def test_idle_workers_that_die_are_replaced_before_anybody_wants_one(house: World) -> None:
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: whole(house))


async def test_an_idle_worker_that_is_stopped_costs_a_run_no_more_than_its_time(house: World) -> None:
    first, second = workers()
    os.kill(first, signal.SIGSTOP)
    module = await put(house, of_text(wat("nop"))())
    came = await asyncio.gather(*(answer(house, "run", module=module, limits={"wall_s": 0.5}) for _ in range(2)))
    assert {one["code"] for one in came} <= {"ok", "limit"}
    await eventually(lambda: whole(house))
    assert second in workers()
    await says_hello(house)


async def test_a_fork_server_that_dies_is_replaced_with_all_its_workers(house: World) -> None:
    (server,) = fork_servers()
    task, _ = await looping(house)
    os.kill(server, signal.SIGKILL)
    assert (await task)["code"] in ("sandbox_died", "unavailable")
    await eventually(lambda: whole(house), 10.0)
    assert fork_servers() != [server]
    await says_hello(house)


async def test_a_hundred_kills_leave_the_pool_as_it_was(house: World) -> None:
    module = await put(house, LOOP())
    await says_hello(house)
    await eventually(lambda: whole(house))
    (server,) = fork_servers()
    open_here, open_there = descriptors(), descriptors(server)
    killed = 0
    while killed < 100:
        runs = [asyncio.create_task(answer(house, "run", module=module, limits={"wall_s": 10})) for _ in range(2)]
        await eventually(lambda: are_busy(house, WORKERS))
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            killed += 1
        assert {one["code"] for one in await asyncio.gather(*runs)} == {"sandbox_died"}
    await eventually(lambda: whole(house), 5.0)
    assert fork_servers() == [server]
    await says_hello(house)
    await eventually(lambda: whole(house))
    assert abs(descriptors() - open_here) <= 2, f"{open_here} descriptors before, {descriptors()} now"
    assert abs(descriptors(server) - open_there) <= 2


async def test_a_daemon_that_stops_ends_its_runs_and_leaves_no_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with no_tasks_left():
        world = World(None, None)
        await world.open()
        daemon = await world.daemon(actors=(), chassis=CONFIG, state_dir=tmp_path_factory.mktemp("stops"))
        await eventually(lambda: whole(world), 20.0)
        module = await put(world, LOOP())
        task = asyncio.create_task(answer(world, "run", module=module, limits={"wall_s": 1.0}))
        await eventually(lambda: are_busy(world, 1))
        here = workers() + fork_servers()
        await daemon.stop()
        came = await asyncio.wait_for(task, 5)
        assert came["code"] in ("limit", "unavailable", "sandbox_died"), came
        await world.close()

    async def none_left() -> bool:  # a zombie of the fork server is init's to bury
        return not any(state(pid) not in ("", "Z") for pid in here)

    await eventually(none_left, 1.0)
    assert not set(children(os.getpid())) & set(here), "one of them is a zombie"
