"""What does a sandbox cost? An empty guest through NATS, beside wasmtime in the caller's own process, node's WASI, and a
process for each call; what is cold; what a worker weighs; how exact its share of the processor is; and whether bombs
hurt anybody else.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nats
import wasmtime
from nats.aio.client import Client

from bench.breakers import ECHO, responder
from bench.stand import closed_loop, percentile, stand
from ifabric.clock import monotonic

ROUNDS = 5
ALONE, CLOSED, CALLERS = 2_000, 10_000, 32
EMPTY = '(module (func (export "_start")))'
LOOP = '(module (func (export "_start") (loop (br 0))))'
#: guests that only take: each is contained, again and again, while somebody else claims tasks
MEMORY = """(module (memory (export "memory") 1) (func (export "_start") (loop
  (drop (memory.grow (i32.const 64)))
  (memory.fill (i32.const 0) (i32.const 1) (i32.mul (memory.size) (i32.const 65536))) (br 0))))"""
OUTPUT = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2) (data (i32.const 4) "\\00\\80\\00\\00") (func (export "_start") (loop
  (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16))) (br 0))))"""
CALLS = """(module
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (memory (export "memory") 1) (func (export "_start") (loop
  (drop (call $clock (i32.const 1) (i64.const 1) (i32.const 0))) (br 0))))"""
BOMBS: dict[str, tuple[str, dict[str, float]]] = {
    "loop": (LOOP, {"wall_s": 0.5}),
    "memory": (MEMORY, {"wall_s": 0.5}),
    "output": (OUTPUT, {}),
    "recursion": ('(module (func $f (export "_start") (call $f)))', {}),
    "calls": (CALLS, {"wall_s": 0.5}),
}
#: compiled modules that a daemon has at hand, and its workers, by default
AT_HAND, WORKERS_MAX = 32, 8
SHARES = (10, 25, 50)
CLAIMS = 1_500
NODE = """
import { WASI } from 'node:wasi'; import { readFileSync } from 'node:fs';
const module = new WebAssembly.Module(readFileSync(process.argv[2])); const times = [];
for (let i = 0; i < %d; i++) {
  const began = process.hrtime.bigint();
  const wasi = new WASI({ version: 'preview1', args: ['guest'], env: {} });
  wasi.start(new WebAssembly.Instance(module, wasi.getImportObject()));
  times.push(Number(process.hrtime.bigint() - began) / 1e3);
}
times.sort((a, b) => a - b); console.log(JSON.stringify([times[times.length >> 1], times[Math.floor(times.length * .95)]]));
"""


def us(seconds: list[float]) -> str:
    """Sorted latencies, as people read them."""
    return f"p50 {percentile(seconds, 0.5) * 1e6:8,.0f}  p95 {percentile(seconds, 0.95) * 1e6:8,.0f} us"


async def ask(client: Client, verb: str, session: str, component: str = "chassis", **body: Any) -> dict[str, Any]:
    """One request's answer, whatever it is."""
    data = json.dumps(body).encode()
    answer: dict[str, Any] = json.loads(
        (await client.request(f"if.v1.{component}.{verb}.{session}", data, timeout=60)).data
    )
    return answer


async def put(client: Client, wat: str | bytes) -> str:
    """The module's name."""
    wasm = wat if isinstance(wat, bytes) else bytes(wasmtime.wat2wasm(wat))
    answer = await ask(client, "put", "bench", wasm=base64.b64encode(wasm).decode())
    module: str = answer["module"]
    return module


async def through_nats(client: Client) -> None:
    """An empty guest, warm, at 1 and at 32 callers, beside an echo over the same NATS."""
    module = await put(client, EMPTY)
    asked = json.dumps({"module": module}).encode()

    async def run(number: int) -> None:
        answer = await client.request(f"if.v1.chassis.run.c{number % CALLERS}", asked, timeout=30)
        if answer.headers is not None:
            raise SystemExit(f"run: {answer.headers}")

    async def echo(_: int) -> None:
        await client.request(ECHO, asked, timeout=30)

    for name, act in (("echo", echo), ("run", run)):
        await closed_loop(act, itertools.islice(itertools.count(), 2_000), CALLERS)  # warm
        alone = [await closed_loop(act, itertools.islice(itertools.count(), ALONE), 1) for _ in range(ROUNDS)]
        print(f"{name:>20}, 1 caller:   {us(sorted(itertools.chain(*alone)))}")
        rates, taken = [], []
        for _ in range(ROUNDS):
            began = monotonic()
            taken += await closed_loop(act, itertools.islice(itertools.count(), CLOSED), CALLERS)
            rates.append(CLOSED / (monotonic() - began))
        print(f"{name:>20}, {CALLERS} callers: {us(sorted(taken))}  {statistics.median(rates):8,.0f} /s")


def beside() -> None:
    """The same guest without a chassis: in this process, in node, and in a process for each call."""
    config = wasmtime.Config()
    config.epoch_interruption = config.consume_fuel = True
    engine = wasmtime.Engine(config)
    wasm = bytes(wasmtime.wat2wasm(EMPTY))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    prepared = linker.instantiate_pre(wasmtime.Module(engine, wasm))
    taken = []
    for _ in range(ALONE * ROUNDS):
        began = monotonic()
        store = wasmtime.Store(engine)
        store.set_wasi(wasmtime.WasiConfig())
        store.set_limits(memory_size=1 << 24)
        store.set_fuel(10**9)
        store.set_epoch_deadline(10)
        entry = prepared.instantiate(store).exports(store)["_start"]
        assert isinstance(entry, wasmtime.Func)
        entry(store)
        store.close()
        taken.append(monotonic() - began)
    print(f"{'wasmtime in-process':>20}, 1 caller:   {us(sorted(taken))}  (no isolation)")
    with tempfile.TemporaryDirectory() as name:
        file, program = Path(name) / "empty.wasm", Path(name) / "run.mjs"
        node_wasm = '(module (memory (export "memory") 1) (func (export "_start")))'
        file.write_bytes(bytes(wasmtime.wat2wasm(node_wasm)))
        program.write_text(NODE % 2000)
        if shutil.which("node"):
            command = ["node", "--no-warnings", str(program), str(file)]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(
                f"{'node WASI in-process':>20}, 1 caller:   p50 {found[0]:8,.0f}  p95 {found[1]:8,.0f} us  (no limits)"
            )
            program.write_text(NODE % 1)
            print(f"{'node, a process each':>20}, 1 caller:   {us(_each(command))}")
        code = (
            "import sys, wasmtime as w; e = w.Engine(); s = w.Store(e); "
            "w.Instance(s, w.Module.from_file(e, sys.argv[1]), []).exports(s)['_start'](s)"
        )
        print(f"{'python, process each':>20}, 1 caller:   {us(_each([sys.executable, '-c', code, str(file)]))}")


def _each(command: list[str]) -> list[float]:
    taken = []
    for _ in range(20):
        began = monotonic()
        subprocess.run(command, capture_output=True, check=True)
        taken.append(monotonic() - began)
    return sorted(taken)


def sized(functions: int, salt: int) -> bytes:
    """A module with so many little functions, unlike any other."""
    body = "(local.set 0 (i32.mul (i32.add (local.get 0) (i32.const 7)) (i32.const 31)))" * 10
    text = "".join(f"(func (param i32) (result i32) {body} (local.get 0))" for _ in range(functions))
    return bytes(wasmtime.wat2wasm(f'(module (func (export "_start")) (func (result i32) (i32.const {salt})) {text})'))


async def cold(client: Client) -> None:
    """From source: put and the first run. From the compiled cache: a run once so many others have come between that
    neither the daemon nor a worker has the module at hand.
    """
    for functions in (1, 3_000):
        modules, taken = [], []
        for number in range(5):
            wasm = sized(functions, functions * 100 + number)
            began = monotonic()
            modules.append(await put(client, wasm))
            await ask(client, "run", "cold", module=modules[-1])
            taken.append(monotonic() - began)
        print(f"{'cold, from source':>20}, {len(wasm) / 1e3:5,.0f} kB:   {us(sorted(taken))}")
        for number in range(AT_HAND + 1):
            other = await put(client, sized(1, functions * 1000 + number))
            for _ in range(WORKERS_MAX):
                await ask(client, "run", "cold", module=other)
        taken = []
        for module in modules:
            began = monotonic()
            await ask(client, "run", "cold", module=module)
            taken.append(monotonic() - began)
        print(f"{'cold, from the cache':>20}, {len(wasm) / 1e3:5,.0f} kB:   {us(sorted(taken))}")


async def share(client: Client) -> None:
    """A guest that never stops, with so much of the processor, for two seconds."""
    module = await put(client, LOOP)
    for percent in SHARES:
        limits = {"wall_s": 2.0, "cpu_percent": percent}
        usage = (await ask(client, "run", "share", module=module, limits=limits))["error"]["usage"]
        got = usage["cpu_s"] / usage["wall_s"] * 100
        print(f"{'cpu_percent':>20}  asked {percent:3d}, got {got:5.1f} over {usage['wall_s']:.2f} s")


def weigh(pid: int) -> None:
    """The private memory of each worker: the daemon's grandchildren that are workers."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rsplit(")", 1)[1].split()
            parents[int(stat.parent.name)] = (int(rest[1]), (stat.parent / "cmdline").read_bytes())
        except OSError:
            continue
    nursery = next(p for p, (parent, line) in parents.items() if parent == pid and b"chassis.nursery" in line)
    sizes = [private_mb(p) for p, (parent, _) in parents.items() if parent == nursery]
    print(f"{'private memory':>20}: {min(sizes):.1f} to {max(sizes):.1f} MB a worker ({len(sizes)}), "
          f"the fork server {private_mb(nursery):.1f} MB")  # fmt: skip


def private_mb(pid: int) -> float:
    """Memory that a process shares with nobody, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


async def bombs(client: Client) -> None:
    """The p95 of claims, alone and while bombs go off."""
    modules = {name: await put(client, wat) for name, (wat, _) in BOMBS.items()}
    numbers = itertools.count()
    stop = asyncio.Event()

    async def claim(number: int) -> None:
        session = f"w{number % 4}"
        task = f"bomb{id(numbers)}x{next(numbers)}"
        await ask(client, "submit", session, "coordinator", tasks=[{"id": task}])
        began = monotonic()
        claimed = await ask(client, "claim", session, "coordinator", task=task)
        taken.append(monotonic() - began)
        if "fence" not in claimed:
            raise SystemExit(f"claim: {claimed}")
        fence = claimed["fence"]
        await ask(client, "complete", session, "coordinator", task=task, fence=fence)

    async def throw(name: str) -> None:
        while not stop.is_set():
            await ask(client, "run", f"bomber-{name}", module=modules[name], limits=BOMBS[name][1])

    for session in range(4):
        await ask(client, "hello", f"w{session}", "coordinator", ttl_s=3600)
    ratios = []
    for _ in range(ROUNDS):
        taken: list[float] = []
        await closed_loop(claim, itertools.islice(itertools.count(), CLAIMS), 4)
        quiet, taken = sorted(taken), []
        stop.clear()
        throwing = [asyncio.create_task(throw(name)) for name in BOMBS]
        await closed_loop(claim, itertools.islice(itertools.count(), CLAIMS), 4)
        stop.set()
        await asyncio.gather(*throwing)
        loud = sorted(taken)
        ratios.append(percentile(loud, 0.95) / percentile(quiet, 0.95))
    print(f"{'claims, quiet':>20}:             {us(quiet)}")
    print(f"{'claims among bombs':>20}:             {us(loud)}  ratio of p95 {statistics.median(ratios):.2f}")


async def main() -> None:
    """Prints every figure."""
    async with stand() as where, responder(where.nats):
        client = await nats.connect(where.nats)
        await through_nats(client)
        weigh(where.pid)
        await cold(client)
        await share(client)
        await bombs(client)
        await client.close()
    beside()
