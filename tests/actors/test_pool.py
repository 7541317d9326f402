"""The workers' pool, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import wasmtime
from msgspec.structs import replace

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import SystemClock
from ifabric.config_chassis import Chassis, ModuleStore, SandboxPool
from ifabric.errors import BadRequest, FabricError, LimitReached, ModuleRefused, Overloaded, SandboxDied, Unavailable
from ifabric.metrics import Metrics
from ifabric_actors.chassis import frames
from ifabric_actors.chassis.pool import Job, Outcome, Pool
from ifabric_actors.chassis.processes import ForkServer

MIB = 1 << 20
LOOP = '(module (func (export "_start") (loop (br 0))))'
EMPTY = '(module (func (export "_start")))'
CALLS = """(module (import "ifabric" "http" (func $http (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1) (data (i32.const 0) "ask")
  (func (export "_start") (call $exit (call $http (i32.const 0) (i32.const 3) (i32.const 100) (i32.const 50)))))"""


class Code:
    """A compiled module."""

    numbers = iter(range(1, 10_000))

    def __init__(self, code: bytes) -> None:
        self.number = next(self.numbers)
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.write(self.fd, code)


class Stand:
    """A pool, and what is needed to use it."""

    def __init__(self, **pool: Any) -> None:
        modules = {k: pool.pop(k) for k in list(pool) if k in ModuleStore.__struct_fields__}
        modules.setdefault("compile_memory_mb", 256)
        config = Chassis(sandbox_pool=SandboxPool(**pool), modules=ModuleStore(**modules))
        self.metrics = Metrics()
        self.server = ForkServer(
            frames.Settings(
                stack_bytes=512 * 1024, run_memory_bytes=128 * MIB, compile_memory_bytes=256 * MIB, compile_cpu_s=2
            ),
            SystemClock(),
        )
        self.pool = Pool(self.server, config, SystemClock(), self.metrics, structlog.get_logger())

    async def code(self, wat: str) -> Code:
        return Code(await self.pool.compile(wasmtime.wat2wasm(wat)))

    def job(self, code: Code, session: str = "a", answer: Any = None, **limits: Any) -> Job:
        start = frames.Start(
            run=self.pool.number(), module=code.number, entry="_start", args=(), env={}, stdin=b"", wall_s=5.0,
            cpu_percent=100, memory_bytes=16 * MIB, fuel=10**12, output_bytes=1000, tables=1, table_elements=100,
        )  # fmt: skip

        async def nothing(request: bytes) -> bytes:
            raise BadRequest("no calls here")

        return Job(session, replace(start, **limits), code, answer or nothing)

    async def run(self, code: Code, **options: Any) -> Outcome:
        return await self.pool.run(self.job(code, **options))

    def begin(self, job: Job) -> asyncio.Task[Outcome]:
        return asyncio.create_task(self.pool.run(job))

    def ended(self, why: str) -> float:
        return self.metrics.counter("if_chassis_workers_ended_total", why=why).value


Make = Callable[..., Awaitable[Stand]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Stand] = []

    async def start(**pool: Any) -> Stand:
        stand = Stand(**pool)
        made.append(stand)
        await stand.pool.start()
        return stand

    yield start
    for stand in made:
        await stand.pool.stop()


async def until(holds: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def busy(job: Job) -> int:
    """The process that runs it, once it does."""
    await until(lambda: job.worker is not None)
    assert job.worker is not None
    return job.worker.pid


async def test_a_run_ends_with_what_its_guest_did(make: Make) -> None:
    stand = await make()
    outcome = await stand.run(await stand.code(EMPTY))
    assert outcome.why is None
    assert outcome.done is not None
    assert (outcome.done.end, outcome.done.exit_code, outcome.done.fuel) == ("exit", 0, 1)


async def test_a_killed_worker_costs_one_run_and_is_replaced(make: Make) -> None:
    stand = await make(min_size=2, max_size=2)
    code = await stand.code(LOOP)
    first, second = stand.job(code), stand.job(code, wall_s=0.5)
    runs = [stand.begin(first), stand.begin(second)]
    os.kill(await busy(first), signal.SIGKILL)
    died, other = await asyncio.gather(*runs)
    assert isinstance(died.why, SandboxDied)
    assert died.why.facts == {"signal": "SIGKILL"}
    assert (other.why, other.done and other.done.detail) == (None, "wall_s")
    await until(lambda: stand.pool.idle == 2)
    assert stand.ended("died") == 1


async def test_a_stopped_worker_is_killed_when_its_time_is_over(make: Make) -> None:
    stand = await make()
    job = stand.job(await stand.code(LOOP), wall_s=0.2)
    running = stand.begin(job)
    pid = await busy(job)
    os.kill(pid, signal.SIGSTOP)
    outcome = await running
    assert isinstance(outcome.why, LimitReached)
    assert outcome.why.facts == {"which": "wall_s", "allowed": 0.2}
    assert outcome.wall_s < 1.0
    await until(lambda: not alive(pid))
    assert (await stand.run(await stand.code(EMPTY))).why is None
    assert stand.ended("killed") == 1


async def test_a_caller_that_goes_takes_its_guest_along(make: Make) -> None:
    stand = await make(max_size=1)
    job = stand.job(await stand.code(LOOP), wall_s=60)
    running = stand.begin(job)
    pid = await busy(job)
    await cancel_and_wait(running)
    await until(lambda: not alive(pid))
    assert (await stand.run(await stand.code(EMPTY))).why is None


async def test_the_line_is_bounded_in_length_and_in_time(make: Make) -> None:
    stand = await make(max_size=1, queue_max=1, queue_wait_seconds=0.2)
    code = await stand.code(LOOP)
    running = stand.job(code, wall_s=1.0)
    first = stand.begin(running)
    await busy(running)
    waits = stand.begin(stand.job(code))
    await until(lambda: stand.pool.queued == 1)
    with pytest.raises(Overloaded, match="1 runs wait for a sandbox already; it was not started"):
        await stand.run(code)
    with pytest.raises(Overloaded, match=r"no sandbox was free within 0\.2 s; the run was not started"):
        await waits
    assert stand.pool.queued == 0
    assert (await first).why is None


async def test_one_who_waits_can_go_or_be_ended_and_the_next_is_served(make: Make) -> None:
    stand = await make(max_size=1)
    loop, empty = await stand.code(LOOP), await stand.code(EMPTY)
    first = stand.job(loop, wall_s=0.5)
    running = stand.begin(first)
    await busy(first)
    goes, ended = stand.begin(stand.job(empty, session="b")), stand.job(empty, session="c")
    waits, last = stand.begin(ended), stand.begin(stand.job(empty, session="d"))
    await until(lambda: stand.pool.queued == 3)
    await cancel_and_wait(goes)
    ended.end(FabricError("enough"))
    with pytest.raises(FabricError, match="enough"):
        await waits
    assert (await running).why is None
    assert (await last).why is None


async def test_a_worker_is_replaced_after_so_many_runs(make: Make) -> None:
    stand = await make(max_size=1, max_runs=3)
    code, pids = await stand.code(EMPTY), []
    for _ in range(6):
        job = stand.job(code)
        await stand.pool.run(job)
        assert job.worker is not None
        pids.append(job.worker.pid)
    assert len(set(pids[:3])) == 1
    assert len(set(pids[3:])) == 1
    assert pids[0] != pids[3]
    await until(lambda: not alive(pids[0]))
    assert stand.ended("recycled") == 2


async def test_without_a_pool_each_run_has_a_process_of_its_own(make: Make) -> None:
    stand = await make(enabled=False, min_size=0, max_size=1)
    code, pids = await stand.code(EMPTY), []
    for _ in range(3):
        job = stand.job(code)
        await stand.pool.run(job)
        assert job.worker is not None
        pids.append(job.worker.pid)
    assert len(set(pids)) == 3
    await until(lambda: not any(map(alive, pids)))


async def test_idle_workers_end_down_to_the_least_number(make: Make) -> None:
    stand = await make(min_size=1, max_size=3, idle_seconds=0.05)
    code = await stand.code(EMPTY)
    await asyncio.gather(*(stand.run(code, session=str(i)) for i in range(30)))
    await until(lambda: stand.pool.idle > 1)
    tending = asyncio.create_task(stand.pool.tend())
    await until(lambda: stand.pool.idle == 1)
    assert (await stand.run(code)).why is None
    await cancel_and_wait(tending)


async def test_a_fork_server_that_dies_takes_its_workers_along_and_the_next_run_has_another(make: Make) -> None:
    stand = await make()
    loop, empty = await stand.code(LOOP), await stand.code(EMPTY)
    job = stand.job(loop, wall_s=60)
    running = stand.begin(job)
    worker = await busy(job)
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    outcome = await running
    assert isinstance(outcome.why, SandboxDied)
    await until(lambda: not alive(worker))
    assert (await stand.run(empty)).why is None


async def test_a_fork_server_that_is_stopped_is_replaced(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifabric_actors.chassis.processes.FORK_S", 0.2)
    stand = await make(min_size=1, max_size=2, queue_wait_seconds=8)
    loop, empty = await stand.code(LOOP), await stand.code(EMPTY)
    job = stand.job(loop, wall_s=0.6)
    running = stand.begin(job)
    worker = await busy(job)
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGSTOP)
    outcome = await stand.run(empty)  # needs another worker
    assert outcome.why is None
    await running
    await until(lambda: not alive(server))


async def test_modules_are_forgotten_beyond_the_most_and_loaded_again(make: Make) -> None:
    stand = await make(max_size=1, loaded_max=2)
    codes = [
        await stand.code(f'(module (func (export "_start")) (func (result i32) (i32.const {i})))') for i in range(4)
    ]
    for code in (*codes, *codes, codes[3]):
        assert (await stand.run(code)).why is None
    (worker,) = stand.pool._idle
    assert list(worker.loaded) == [codes[2].number, codes[3].number]


async def test_a_run_prefers_the_worker_that_has_its_module(make: Make) -> None:
    stand = await make(min_size=3, max_size=3)
    code = await stand.code(EMPTY)
    await until(lambda: stand.pool.idle == 3)
    for _ in range(5):
        assert (await stand.run(code)).why is None
    assert sorted(worker.runs for worker in stand.pool._idle) == [0, 0, 5]


async def test_a_call_of_the_guest_is_answered_or_ends_its_run(make: Make) -> None:
    stand = await make()
    code, asked = await stand.code(CALLS), []

    async def answer(request: bytes) -> bytes:
        asked.append(request)
        if len(asked) > 1:
            raise BadRequest("not that one")
        return b"12345"

    told = await stand.run(code, answer=answer)
    assert (told.why, told.done and told.done.exit_code, asked) == (None, 5, [b"ask"])
    ended = await stand.run(code, answer=answer)
    assert str(ended.why) == "not that one"
    assert ended.done is not None
    assert stand.ended("killed") == 0


async def test_a_call_that_takes_too_long_ends_with_the_run_and_its_answer_reaches_nobody(make: Make) -> None:
    stand = await make(max_size=1)
    code, late = await stand.code(CALLS), asyncio.Event()
    cancelled = asyncio.Event()

    async def slow(request: bytes) -> bytes:
        try:
            await late.wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b"late"

    outcome = await stand.run(code, answer=slow, wall_s=0.2)
    assert outcome.done is not None
    assert (outcome.done.end, outcome.done.detail) == ("limit", "wall_s")
    assert cancelled.is_set()

    async def prompt(request: bytes) -> bytes:
        return b"yes"

    again = await stand.run(code, answer=prompt)
    assert again.done is not None
    assert again.done.exit_code == 3


async def test_a_module_whose_compilation_takes_too_much_memory_or_time_is_refused(make: Make) -> None:
    stand = await make(compile_timeout_seconds=0.3)
    deep = '(module (func (export "_start")' + "(block " * 900 + ")" * 900 + "))"
    await stand.code(deep)
    many = "(module" + "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const 7)))" * 60_000 + ")"
    with pytest.raises(ModuleRefused, match=r"took more than (0\.3 s|256 MB)"):
        await stand.code(many)
    stand = await make(compile_timeout_seconds=30)
    with pytest.raises(ModuleRefused, match="256 MB|processor time"):
        await stand.code(many)
    assert (await stand.run(await stand.code(EMPTY))).why is None


async def test_what_is_no_module_is_refused_by_the_compiler_in_its_words(make: Make) -> None:
    stand = await make()
    with pytest.raises(ModuleRefused, match="the module was not compiled: it does not begin as"):
        await stand.pool.compile(b"(module)")


async def test_a_stop_ends_runs_and_refuses_those_that_wait(make: Make) -> None:
    stand = await make(max_size=1)
    job = stand.job(await stand.code(LOOP), wall_s=60)
    running = stand.begin(job)
    pid = await busy(job)
    waits = stand.begin(stand.job(job.code))  # type: ignore[arg-type]
    await until(lambda: stand.pool.queued == 1)
    await stand.pool.stop()
    with pytest.raises(Unavailable, match="the chassis stops"):
        await waits
    assert isinstance((await running).why, FabricError)
    await until(lambda: not alive(pid))
    with pytest.raises(Unavailable, match="was not started"):
        await stand.run(job.code)  # type: ignore[arg-type]
