"""Hostile modules, over the wire: each is contained, told by name, and leaves the pool as it was."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import pytest

from ifabric.errors import FabricError
from tests.actors.conftest import CLOCK, World
from tests.conftest import needed
from tests.guests import build
from tests.guests.bomb import Bomb
from tests.guests.bombs import BOMBS
from tests.guests.bombs_calls import entries, every_call
from tests.guests.suite import CONFIG, answer, eventually, is_idle, judge, put, run, says_hello, throw, whole, workers


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    """The guests that are written in C need one."""
    with needed("guests in C"):
        build.compiler()


@pytest.fixture(scope="module")
async def sandbox(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One daemon for all bombs, over the twins."""
    world = World(None, None)
    await world.open()
    await world.daemon(actors=(), chassis=CONFIG, state_dir=tmp_path_factory.mktemp("bombs"))
    await eventually(lambda: is_idle(world), 20.0)
    yield world
    await world.close()


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
async def test_a_bomb_is_contained_and_leaves_the_pool_as_it_was(sandbox: World, bomb: Bomb) -> None:
    judge(bomb, *await throw(sandbox, bomb))
    await says_hello(sandbox)
    await eventually(lambda: is_idle(sandbox))


async def test_no_call_of_the_host_can_be_hurt_by_numbers(sandbox: World) -> None:
    module = await put(sandbox, every_call())
    await eventually(lambda: whole(sandbox))  # the compiler has gone
    before = workers()
    for entry in entries():
        began = CLOCK.monotonic()
        came = await answer(sandbox, "run", module=module, entry=entry, limits={"wall_s": 1.0, "output_bytes": 1000})
        assert came["code"] in ("ok", "trap", "limit"), f"{entry}: {came}"
        assert CLOCK.monotonic() - began < 1.5, f"{entry} took too long"
    assert workers() == before, "a worker was lost over it"


async def test_a_guest_gets_what_it_was_given_and_nothing_else(sandbox: World) -> None:
    module = await put(sandbox, build.guest("echo"))
    reply = await run(sandbox, module, args=["a", "b c"], env={"A": "1", "EXIT": "7"}, stdin="line\n")
    assert reply["exit_code"] == 7
    assert reply["stdout"] == "arg guest\narg a\narg b c\nenv A=1\nenv EXIT=7\nline\n"
    assert reply["stderr"] == "done\n"
    bare = await run(sandbox, module)
    assert (bare["exit_code"], bare["stdout"]) == (0, "arg guest\n")
    raw = bytes(range(256))
    bytes_back = await run(sandbox, module, stdin_b64=base64.b64encode(raw).decode())
    assert base64.b64decode(bytes_back["stdout_b64"]) == b"arg guest\n" + raw


async def test_a_guest_computes(sandbox: World) -> None:
    numbers = [(i * 7919) % 10_007 - 5000 for i in range(5000)]
    reply = await run(sandbox, await put(sandbox, build.guest("sort")), stdin=" ".join(map(str, numbers)))
    told = reply["stdout"].split()
    assert told[:6] == ["count", "5000", "sum", str(sum(numbers)), "median", str(sorted(numbers)[2500])]
    assert [int(one) for one in told[6:]] == sorted(numbers)


async def test_a_guest_reaches_no_file_in_any_way(sandbox: World) -> None:
    reply = await run(sandbox, await put(sandbox, build.guest("files")), limits={"wall_s": 5})
    assert reply["stdout"].splitlines()[-1:] == ["got 0"], reply["stdout"]
    assert int(reply["stdout"].split()[1]) > 5000


async def test_a_guest_has_three_descriptors_whatever_it_does_to_them(sandbox: World) -> None:
    reply = await run(sandbox, await put(sandbox, build.guest("fds")), stdin="x" * 100)
    assert reply["stdout"] == "answered 0\nstretched 0\n"


async def test_a_guest_is_told_the_time(sandbox: World) -> None:
    before_ms = CLOCK.wall_ms()
    reply = await run(sandbox, await put(sandbox, build.guest("clock")))
    (_, now), (_, steps) = (line.split() for line in reply["stdout"].splitlines())
    assert before_ms // 1000 <= int(now) <= CLOCK.wall_ms() // 1000
    assert int(steps) > 0


@pytest.mark.parametrize("how", ["sleep", "poll"])
async def test_a_guest_may_sleep_within_its_time_and_not_beyond(sandbox: World, how: str) -> None:
    module = await put(sandbox, build.guest("sleepy"))
    slept = int((await run(sandbox, module, args=[how, "100"], limits={"wall_s": 1.0}))["stdout"].split()[1])
    assert 99 <= slept <= 250
    began = CLOCK.monotonic()
    with pytest.raises(FabricError) as caught:
        await run(sandbox, module, args=[how, "100000"], limits={"wall_s": 5.0})
    assert (caught.value.code, caught.value.facts["which"]) == ("limit", "wall_s")
    assert CLOCK.monotonic() - began < 1.0, "it is ended when it asks, and not when the time is over"


async def test_a_guest_gets_as_much_memory_as_its_run_allows(sandbox: World) -> None:
    module = await put(sandbox, build.guest("alloc"))
    for megabytes in (4, 16, 64):
        reply = await run(sandbox, module, limits={"memory_bytes": megabytes << 20, "wall_s": 5})
        got = int(reply["stdout"].split()[1])
        assert megabytes - 2 <= got < megabytes
        assert got << 20 <= reply["usage"]["memory_peak_bytes"] <= megabytes << 20


async def test_what_is_refused_is_explained_by_inspect_too(sandbox: World) -> None:
    for bomb in BOMBS:
        wasm = bomb.make()
        if not bomb.refused_at_put or bomb.name.startswith("conditions") or len(wasm) > 300_000:
            continue
        told = await answer(sandbox, "inspect", wasm=base64.b64encode(wasm).decode())
        if told["code"] == "ok":  # what only a compiler finds is not said without one
            assert told["accepted"] == (not told.get("why")), bomb.name
        else:
            assert told["code"] in ("not_wasm", "bad_request"), f"{bomb.name}: {told}"
