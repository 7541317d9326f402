"""Nothing of a run is there in the next one: tenants that look for each other's canaries, in one worker and in two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.actors.conftest import World
from tests.conftest import needed
from tests.guests.build import guest
from tests.guests.suite import CONFIG, answer, eventually, is_idle, put, whole, workers

OWN = {"a": "CANARY:aaaaaaaa", "b": "CANARY:bbbbbbbb"}
PAGES = 4
#: by how many workers there are
RUNS = {1: 1000, 2: 300}


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
async def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A daemon with so many workers, and no others."""
    world = World(None, None)
    await world.open()
    config = {**CONFIG, "sandbox_pool": {"min_size": request.param, "max_size": request.param}}
    await world.daemon(actors=(), chassis=config, state_dir=tmp_path_factory.mktemp("tenants"))
    await eventually(lambda: is_idle(world, request.param), 20.0)
    yield world
    await world.close()


async def looked(world: World, module: str, tenant: str, turn: int) -> None:
    """One run of a tenant, whose canary is in all that a run can hold; it must find nobody else's."""
    own, end = OWN[tenant], {3: "trap", 7: "loop"}.get(turn % 50, "")
    request: dict[str, Any] = {
        "args": [own, own * 20],
        "env": {"PAGES": str(PAGES), own.replace(":", "_"): own, "END": end},
        "stdin": own * 50,
        "limits": {"wall_s": 0.1 if end == "loop" else 5.0, "memory_bytes": 4 << 20},
    }
    came = await answer(world, "run", tenant, module=module, **request)
    wanted = {"trap": "trap", "loop": "limit"}.get(end, "ok")
    assert came["code"] == wanted, came
    told = ["runs 1", "args 3", "env 3", f"stdin {len(own) * 50}", f"left {PAGES}"]
    assert came["stdout"].splitlines() == told, f"run {turn} of {tenant}"


async def test_the_canary_of_another_would_be_found_if_it_were_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(None, None)
    with needed("guests in C"):
        wasm = guest("remember")
    await world.open()
    try:
        await world.daemon(actors=(), chassis=CONFIG, state_dir=tmp_path_factory.mktemp("planted"))
        module = await put(world, wasm)
        came = await answer(
            world,
            "run",
            module=module,
            args=[OWN["a"], OWN["b"]],
            env={"PAGES": "1", "X": OWN["b"]},
            stdin=OWN["b"] * 3,
        )
    finally:
        await world.close()
    assert came["stdout"].count(f"found memory {OWN['b']}") == 2
    assert came["stdout"].count(f"found stdin {OWN['b']}") == 3
    assert OWN["a"] not in came["stdout"]


async def test_nothing_of_a_run_is_there_in_the_next(house: World, request: pytest.FixtureRequest) -> None:
    count = request.node.callspec.params["house"]
    with needed("guests in C"):
        wasm = guest("remember")
    module = await put(house, wasm)
    await eventually(lambda: whole(house, count))
    before = workers()
    for turn in range(0, RUNS[count], 2):
        await asyncio.gather(looked(house, module, "a", turn), looked(house, module, "b", turn + 1))
    assert workers() == before, "the same processes had all the runs"
