"""The chassis over the wire, on the twins and on real etcd and NATS: runs, their claims and holds, and who ends them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import wasmtime

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import (
    BadRequest,
    ClaimLost,
    Conflict,
    EgressDenied,
    FabricError,
    Killed,
    LimitReached,
    ModuleRefused,
    NotWasm,
    SandboxDied,
    Trap,
    UnknownHold,
    UnknownModule,
    UnknownRun,
    UnknownTask,
)
from ifabric.store.base import Delete, Txn
from ifabric_actors.chassis import records
from tests.actors.conftest import World

Answer = dict[str, Any]
EXIT = '(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))'
WRITE = '(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))'
SLEEP = '(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))'
LOOP = '(module (func (export "_start") (loop (br 0))))'
#: sleeps for a fifth of a second at a time, for ever
SLEEPER = f"""(module {SLEEP} (memory (export "memory") 1) (data (i32.const 24) "\\00\\c2\\eb\\0b\\00\\00\\00\\00")
  (data (i32.const 16) "\\01") (func (export "_start")
  (loop (drop (call $poll (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 200))) (br 0))))"""
CALLS = """(module (import "ifabric" "http" (func $http (param i32 i32 i32 i32) (result i32))) (memory (export "memory") 1)
  (data (i32.const 0) "{\\"endpoint\\":\\"llm\\",\\"path\\":\\"/\\"}")
  (func (export "_start") (drop (call $http (i32.const 0) (i32.const 29) (i32.const 1000) (i32.const 60000)))))"""


def writes(text: str, fd: int = 1) -> str:
    """A guest that writes this once. `text` is in WebAssembly's own escapes."""
    length = len(text.encode().decode("unicode_escape")) if "\\" not in text else text.count("\\")
    size = length.to_bytes(4, "little").hex()
    words = "\\08\\00\\00\\00" + "".join(f"\\{size[i : i + 2]}" for i in range(0, 8, 2))
    return f"""(module {WRITE} (memory (export "memory") 2) (data (i32.const 0) "{words}") (data (i32.const 8) "{text}")
      (func (export "_start")
        (drop (call $write (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 4)))))"""


HELLO = writes("hello")
REFUSED = bytes(wasmtime.wat2wasm('(module (import "wasi_snapshot_preview1" "sock_send" (func (param i32))))'))


async def ask(world: World, verb: str, session: str = "a", **body: Any) -> Answer:
    return await world.ask(verb, session, component="chassis", timeout_s=20.0, **body)


async def put(world: World, wat: str, session: str = "a") -> str:
    wasm = wasmtime.wat2wasm(wat)
    kept = await ask(world, "put", session, wasm=base64.b64encode(bytes(wasm)).decode())
    module: str = kept["module"]
    return module


async def run(world: World, wat: str, session: str = "a", **request: Any) -> Answer:
    return await ask(world, "run", session, module=await put(world, wat), **request)


async def refusal(world: World, wat: str, session: str = "a", **request: Any) -> FabricError:
    with pytest.raises(FabricError) as caught:
        await run(world, wat, session, **request)
    return caught.value


async def eventually(true: Callable[[], Awaitable[Any]], within_s: float = 10.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (found := await true()):
            await asyncio.sleep(0.02)
    return found


async def registered(world: World, session: str) -> Answer:
    """The session's run, once it is in the register."""

    async def there() -> Any:
        found = await ask(world, "runs", "op")
        return next((line for line in found["runs"] if line["session"] == session), None)

    line: Answer = await eventually(there)
    return line


# -- what comes back


async def test_a_run_answers_with_what_its_guest_wrote_and_took(world: World) -> None:
    await world.daemon(chassis={})
    answer = await run(world, HELLO)
    assert (answer["exit_code"], answer["stdout"]) == (0, "hello")
    usage = answer["usage"]
    assert usage["stdout_bytes"] == 5
    assert usage["memory_peak_bytes"] == 2 * 65_536
    assert 0 < usage["wall_s"] < 5
    assert usage["fuel"] > 0
    assert usage["cost_micro_usd"] == usage["egress_calls"] == 0
    assert "stderr" not in answer
    errors = await run(world, writes("oh", fd=2))
    assert (errors["stderr"], errors.get("stdout", "")) == ("oh", "")


async def test_an_exit_code_is_whatever_the_guest_says(world: World) -> None:
    await world.daemon(chassis={})
    for code in (1, 126, 255, 256):
        answer = await run(world, f'(module {EXIT} (func (export "_start") (call $exit (i32.const {code}))))')
        assert answer["exit_code"] == code
    answer = await run(world, f'(module {EXIT} (func (export "_start") (call $exit (i32.const -1))))')
    assert answer["exit_code"] == 2**32 - 1


async def test_bytes_that_are_no_text_come_back_in_base64(world: World) -> None:
    await world.daemon(chassis={})
    answer = await run(world, writes("\\ff\\fe\\00"))
    assert base64.b64decode(answer["stdout_b64"]) == b"\xff\xfe\x00"
    assert "stdout" not in answer


async def test_a_trap_a_limit_and_a_wrong_entry_are_told_apart_with_what_was_written(world: World) -> None:
    await world.daemon(chassis={})
    trap = await refusal(world, '(module (func $boom (export "_start") unreachable))')
    assert isinstance(trap, Trap)
    assert (trap.facts["kind"], trap.facts["function"]) == ("unreachable", "boom")
    assert "in boom: wasm trap: wasm `unreachable` instruction executed" in str(trap)
    limit = await refusal(world, LOOP, limits={"wall_s": 0.1})
    assert isinstance(limit, LimitReached)
    assert (limit.facts["which"], limit.facts["allowed"]) == ("wall_s", 0.1)
    assert limit.facts["usage"]["wall_s"] < 0.5
    flood = await refusal(
        world, HELLO.replace("(drop", "(loop (drop").replace("4)))))", "4))) (br 0))))"), limits={"output_bytes": 12}
    )
    assert isinstance(flood, LimitReached)
    assert (flood.facts["which"], flood.facts["stdout"], flood.facts["truncated"]) == (
        "output_bytes",
        "hellohellohe",
        True,
    )
    entry = await refusal(world, HELLO, entry="main")
    assert isinstance(entry, BadRequest)
    assert "it exports no function main" in str(entry)


async def test_more_than_is_allowed_is_refused_before_anything_runs(world: World) -> None:
    await world.daemon(chassis={"runtime": {"max_memory_mb": 64}})
    error = await refusal(world, HELLO, limits={"memory_bytes": 65 << 20})
    assert isinstance(error, LimitReached)
    assert error.facts == {"which": "memory_bytes", "allowed": 64 << 20}
    assert "it was not started" in str(error)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"stdin": "a", "stdin_b64": "YQ=="}, "both"),
        ({"stdin_b64": "no base64!"}, "not base64"),
        ({"args": ["a\0b"]}, "NUL"),
        ({"env": {"A=B": "c"}}, "equals sign"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"task": "t"}, "task and fence go together"),
        ({"endpoints": ["nowhere"]}, "nowhere"),
        ({"limits": {"fuel": -1}}, "fuel"),
        ({"limits": {"wall_s": 0}}, "wall_s"),
    ],
)
async def test_a_malformed_run_is_refused_by_name(world: World, request_: Answer, word: str) -> None:
    await world.daemon(chassis={})
    error = await refusal(world, HELLO, **request_)
    assert isinstance(error, BadRequest)
    assert word in str(error)


async def test_arguments_variables_and_input_reach_the_guest_and_nothing_else_does(world: World) -> None:
    counts = """(module (import "wasi_snapshot_preview1" "args_sizes_get" (func $args (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "environ_sizes_get" (func $env (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 32) "\\80\\00\\00\\00\\40\\00\\00\\00") (func (export "_start")
      (drop (call $args (i32.const 0) (i32.const 4))) (drop (call $env (i32.const 8) (i32.const 12)))
      (drop (call $read (i32.const 0) (i32.const 32) (i32.const 1) (i32.const 16)))
      (if (i32.ne (call $prestat (i32.const 3) (i32.const 48)) (i32.const 8)) (then unreachable))
      (call $exit (i32.add (i32.mul (i32.load (i32.const 0)) (i32.const 10000)) (i32.add
        (i32.mul (i32.load (i32.const 8)) (i32.const 100)) (i32.load (i32.const 16)))))))"""
    await world.daemon(chassis={})
    answer = await run(world, counts, args=["one", "two"], env={"A": "1"}, stdin="héllo")
    assert answer["exit_code"] == 3 * 10_000 + 1 * 100 + 6  # the guest's own name is its first argument
    assert (await run(world, counts))["exit_code"] == 1 * 10_000


# -- modules


async def test_what_is_no_module_or_not_allowed_is_refused_and_not_kept(world: World) -> None:
    await world.daemon(chassis={})
    with pytest.raises(NotWasm):
        await ask(world, "put", wasm=base64.b64encode(b"#!/bin/sh").decode())
    with pytest.raises(BadRequest, match="base64"):
        await ask(world, "put", wasm="%%%")
    with pytest.raises(BadRequest):
        await ask(world, "put")
    with pytest.raises(ModuleRefused, match="sock_send") as refused:
        await ask(world, "put", wasm=base64.b64encode(REFUSED).decode())
    assert refused.value.facts["why"]
    listed = {line["module"] for line in (await ask(world, "modules", limit=1000))["modules"]}
    assert f"sha256:{hashlib.sha256(REFUSED).hexdigest()}" not in listed
    with pytest.raises(UnknownModule):
        await ask(world, "run", module=f"sha256:{'0' * 64}")


async def test_a_module_put_at_one_daemon_runs_at_another(world: World) -> None:
    first = await world.daemon(chassis={})
    module = await put(world, HELLO)
    await world.daemon(chassis={})
    await first.stop()
    world.daemons.remove(first)
    assert (await ask(world, "run", module=module))["stdout"] == "hello"
    assert module in {line["module"] for line in (await ask(world, "modules", limit=1000))["modules"]}


# -- sessions


async def test_a_session_has_so_many_places_and_another_has_its_own(world: World) -> None:
    await world.daemon(chassis={"runtime": {"max_runs_per_session": 2}, "sandbox_pool": {"max_size": 4}})
    runs = [asyncio.create_task(run(world, SLEEPER, limits={"wall_s": 30})) for _ in range(2)]
    await registered(world, "a")
    error = await refusal(world, HELLO)
    assert isinstance(error, LimitReached)
    assert (error.facts["which"], error.facts["allowed"]) == ("runs_per_session", 2)
    assert (await run(world, HELLO, session="b"))["stdout"] == "hello"
    for line in (await ask(world, "runs", "op"))["runs"]:
        await ask(world, "kill", "op", admin=True, run=line["run"])
    assert {type(one) for one in await asyncio.gather(*runs, return_exceptions=True)} == {Killed}
    assert (await run(world, HELLO))["stdout"] == "hello"


# -- operators


async def test_an_operator_sees_long_runs_of_all_daemons_and_ends_one(world: World) -> None:
    await world.daemon(chassis={})
    await world.daemon(chassis={})
    running = asyncio.create_task(run(world, SLEEPER, limits={"wall_s": 60}))
    line = await registered(world, "a")
    assert line["wall_left_s"] > 50
    assert (await run(world, HELLO, session="b"))["stdout"] == "hello"
    assert [one["session"] for one in (await ask(world, "runs", "op"))["runs"]] == ["a"]  # a short one leaves no trace
    for _ in range(3):  # whichever daemon is asked
        assert len((await ask(world, "runs", "op"))["runs"]) == 1
    killed = await ask(world, "kill", "op", admin=True, run=line["run"], why="too loud")
    assert killed == {"run": line["run"], "session": "a"}
    with pytest.raises(Killed, match="op ended the run: too loud") as error:
        await running
    assert error.value.facts["by"] == "op"
    assert (await ask(world, "runs", "op"))["runs"] == []
    with pytest.raises(UnknownRun):
        await ask(world, "kill", "op", admin=True, run=line["run"])


# -- claims


async def claimed(world: World, task: str, session: str = "a", **hello: Any) -> int:
    await world.ask("hello", session, **hello)
    await world.ask("submit", session, tasks=[{"id": task}])
    fence: int = (await world.ask("claim", session, task=task))["fence"]
    return fence


async def test_a_run_for_a_claim_needs_the_claim(world: World) -> None:
    await world.daemon(chassis={})
    fence = await claimed(world, "t1")
    assert (await run(world, HELLO, task="t1", fence=fence))["stdout"] == "hello"
    for who, number in (("b", fence), ("a", fence + 1)):
        error = await refusal(world, HELLO, session=who, task="t1", fence=number)
        assert isinstance(error, ClaimLost)
    assert isinstance(await refusal(world, HELLO, task="t9", fence=1), UnknownTask)
    await world.ask("complete", "a", task="t1", fence=fence)
    assert isinstance(await refusal(world, HELLO, task="t1", fence=fence), ClaimLost)


async def test_a_run_ends_when_its_claim_does(world: World) -> None:
    await world.daemon(chassis={})
    fence = await claimed(world, "t2")
    running = asyncio.create_task(run(world, SLEEPER, task="t2", fence=fence, limits={"wall_s": 60}))
    assert (await registered(world, "a"))["task"] == "t2"
    await world.ask("release", "a", task="t2", fence=fence)
    with pytest.raises(ClaimLost, match="not held by a any more"):
        await running


@pytest.mark.slow
async def test_a_run_ends_when_its_sessions_lease_runs_out_and_not_while_it_is_renewed(world: World) -> None:
    await world.daemon(chassis={})
    fence = await claimed(world, "t3", ttl_s=2)
    running = asyncio.create_task(run(world, SLEEPER, task="t3", fence=fence, limits={"wall_s": 60}))
    for _ in range(8):
        await asyncio.sleep(0.5)  # longer than the lease, were it not renewed
        await world.ask("renew", "a")
        assert not running.done()
    with pytest.raises(ClaimLost):
        await running


# -- money


PRICED: dict[str, Any] = {"price": {"per_billion_fuel_usd": 1000, "per_gb_second_usd": 0}}


async def spent(world: World, session: str) -> tuple[int, int]:
    line = (await world.ask("balance", session, component="governor"))["path"][-1]
    return line["spent"], line["held"]


async def test_a_run_is_charged_to_its_hold_however_it_ends(world: World) -> None:
    await world.daemon(governor={}, chassis=PRICED)
    await world.ask("hello", "a")
    for name in ("h1", "h2"):
        await world.ask("reserve", "a", component="governor", hold=name, amount_micro_usd=1_000_000)
    done = await run(world, HELLO, hold="h1")
    cost = done["usage"]["cost_micro_usd"]
    assert cost == done["usage"]["fuel"]  # a thousand dollars a billion
    assert await spent(world, "a") == (cost, 1_000_000)
    error = await refusal(world, LOOP, hold="h2", limits={"fuel": 5000})
    assert isinstance(error, LimitReached)
    assert error.facts["usage"]["cost_micro_usd"] == 5000
    assert await spent(world, "a") == (cost + 5000, 0)


async def test_a_run_whose_hold_is_not_there_does_not_start(world: World) -> None:
    await world.daemon(governor={}, chassis={"price": {"hold_required": True}})
    await world.ask("hello", "a")
    assert isinstance(await refusal(world, HELLO, hold="none"), UnknownHold)
    error = await refusal(world, HELLO)
    assert isinstance(error, BadRequest)
    assert "name one of the session's holds" in str(error)


async def test_without_a_governor_a_run_with_a_hold_is_refused_and_another_goes_on(world: World) -> None:
    await world.daemon(chassis={})
    error = await refusal(world, HELLO, hold="h")
    assert error.facts["what"] == "governor"
    assert (await run(world, HELLO))["stdout"] == "hello"


# -- a guest that calls out


async def test_a_guest_without_endpoints_is_ended_when_it_calls_out(world: World) -> None:
    daemon = await world.daemon(chassis={})
    error = await refusal(world, CALLS)
    assert isinstance(error, EgressDenied)
    assert error.facts["usage"]["egress_bytes"] == 0
    assert daemon.metrics.counter("if_chassis_sandbox_violations_total", kind="egress").value == 1


# -- at most once


async def test_a_run_with_effects_is_carried_out_once_and_a_retry_gets_the_first_answer(world: World) -> None:
    await world.daemon(governor={}, chassis=PRICED)
    await world.daemon(governor={}, chassis=PRICED)
    await world.ask("hello", "a")
    await world.ask("reserve", "a", component="governor", hold="h", amount_micro_usd=1_000_000)
    module = await put(world, HELLO)
    body: Answer = {"module": module, "hold": "h", "request_id": "r1"}
    answers = await asyncio.gather(*(ask(world, "run", **body) for _ in range(6)))
    assert all(answer == answers[0] for answer in answers)
    assert await spent(world, "a") == (answers[0]["usage"]["cost_micro_usd"], 0)
    with pytest.raises(Conflict):
        await ask(world, "run", **{**body, "args": ["other"]})


async def test_a_retry_of_a_run_that_failed_gets_the_same_refusal_and_one_that_did_not_start_runs(world: World) -> None:
    await world.daemon(governor={}, chassis=PRICED)
    await world.ask("hello", "a")
    first = await refusal(world, LOOP, hold="h", request_id="r", limits={"fuel": 99})
    assert isinstance(first, UnknownHold)  # nothing ran: the same request may be tried again
    await world.ask("reserve", "a", component="governor", hold="h", amount_micro_usd=1_000_000)
    second = await refusal(world, LOOP, hold="h", request_id="r", limits={"fuel": 99})
    assert isinstance(second, LimitReached)
    third = await refusal(world, LOOP, hold="h", request_id="r", limits={"fuel": 99})
    assert third.to_body() == second.to_body()
    assert await spent(world, "a") == (99, 0)


async def test_a_run_with_effects_whose_daemon_died_is_not_run_again(world: World) -> None:
    await world.daemon(governor={}, chassis={})
    await world.ask("hello", "a")
    await world.ask("reserve", "a", component="governor", hold="h", amount_micro_usd=1_000_000)
    body: Answer = {"module": await put(world, SLEEPER), "hold": "h", "request_id": "r", "limits": {"wall_s": 30}}
    running = asyncio.create_task(ask(world, "run", **body))
    line = await registered(world, "a")
    retry = asyncio.create_task(ask(world, "run", **body))
    store = await world.store()
    await store.txn(
        Txn((), (Delete(records.key(records.DAEMONS, line["daemon"])),))
    )  # as its lease would, were it dead
    with pytest.raises(SandboxDied, match="it was not run again"):
        await retry
    await ask(world, "kill", "op", admin=True, run=line["run"])
    with pytest.raises(Killed):
        await running


# -- the end


async def test_a_daemon_that_stops_ends_its_runs_and_says_so(world: World) -> None:
    daemon = await world.daemon(limits={"drain_timeout_s": 0.3}, chassis={})
    running = asyncio.create_task(run(world, SLEEPER, limits={"wall_s": 60}))
    await registered(world, "a")
    await daemon.stop()
    world.daemons.remove(daemon)
    with pytest.raises(FabricError) as error:
        await running
    assert error.value.code == "unavailable"
    await cancel_and_wait(running)
