"""`ifabric demo`: a swarm on this machine, start to end, judged by its event stream."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from importlib.resources import files
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ifabric import endpoints
from ifabric.board import read_board
from ifabric.cli.board import chunks_of
from ifabric.cli.output import err, out, print_json
from ifabric.cli.swarm import agent
from ifabric.cli.verdict import Verdict, judge
from ifabric.client import Client
from ifabric.clock import monotonic, seeded
from ifabric.errors import StartupError
from ifabric.wire import subjects
from ifabric.wire.coordinator import TaskEvent, TaskSpec

TTL_S = 3
WORK_S = (0.01, 0.10)
BOUND_S = 120.0
READY_S = 30.0
CAPABILITIES = ("python", "wasm", "chaos")


class Plan(NamedTuple):
    """What was asked for."""

    agents: int
    tasks: int
    kill: int
    seed: int


class Outcome(NamedTuple):
    """What came of it."""

    verdict: Verdict
    killed: int
    latencies_ms: list[float]
    seconds: float
    tasks: int


def demo(
    *,
    agents: Annotated[int, Parameter(validator=Number(gte=1, lte=200), help="Agents, each a process.")] = 20,
    tasks: Annotated[int, Parameter(validator=Number(gte=20, lte=20_000), help="Tasks on the board.")] = 500,
    kill: Annotated[
        int, Parameter(validator=Number(gte=0, lte=100), help="Agents to kill (SIGKILL) in the middle of a task.")
    ] = 5,
    seed: int = 1,
    json: bool = False,
) -> int:
    """Run a swarm on this machine and check what it did.

    It starts etcd, NATS and a daemon in a scratch folder, loads a board, and lets agents work it off, each a process
    that speaks NATS. Some are killed in the middle of a task and replaced. Then the event stream is read, and nothing
    else is believed: every task done exactly once, never two holders at a time, fences that only grow. Exit 0 only if
    all of it held.

    Examples:
        ifabric demo
        ifabric demo --agents 50 --tasks 2000 --kill 10
    """
    plan = Plan(agents, tasks, kill, seed)
    with tempfile.TemporaryDirectory(prefix="ifabric-demo-") as name, _daemon(Path(name), quiet=json) as found:
        outcome = asyncio.run(_bounded(plan, found, Path(name), quiet=json))
    return _report(outcome, json=json)


@contextlib.contextmanager
def _daemon(folder: Path, *, quiet: bool) -> Any:
    """A daemon in `folder`, ready; stopped and cleared away afterwards."""
    config = folder / "demo.yaml"
    config.write_text("http: {port: 0}\ncoordinator: {logging: {level: WARNING}}\n")
    if not quiet:
        err.print("[dim]starting etcd, NATS and the daemon ...[/]")
    log = (folder / "daemon.log").open("wb")
    daemon = subprocess.Popen(
        [sys.executable, "-m", "ifabric", "run", "--config", str(config), "--state-dir", str(folder)],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        until = monotonic() + READY_S
        while (found := endpoints.read(folder)) is None:
            if daemon.poll() is not None or monotonic() > until:
                said = (folder / "daemon.log").read_text(errors="replace").strip().splitlines()[-8:]
                raise StartupError("the daemon did not start:\n" + "\n".join(said))
            asyncio.run(asyncio.sleep(0.02))
        yield found
    finally:
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        log.close()
        shutil.rmtree(folder / "etcd", ignore_errors=True)


class _Swarm:
    """The agents' processes."""

    def __init__(self, nats: str, folder: Path) -> None:
        self._nats = nats
        self._latencies = str(folder / "latencies")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ifabric.cli.swarm"])
        self._lives: dict[int, int] = {}
        self.processes: dict[str, tuple[int, BaseProcess]] = {}

    def start(self, number: int) -> None:
        """A new life of an agent, with a session of its own."""
        life = self._lives[number] = self._lives.get(number, 0) + 1
        session = f"agent-{number:03d}-{life}"
        process = self._context.Process(
            target=agent, args=(self._nats, session, CAPABILITIES, TTL_S, WORK_S, self._latencies), daemon=True
        )
        process.start()
        self.processes[session] = (number, process)

    def kill(self, session: str) -> bool:
        """Kills an agent as a crash would, and starts its next life."""
        number, process = self.processes.pop(session, (0, None))
        if process is None or process.pid is None or not process.is_alive():
            return False
        os.kill(process.pid, signal.SIGKILL)
        process.join(5)
        self.start(number)
        return True

    def stop(self) -> None:
        """Asks all to end, and after a while makes them."""
        for _, process in self.processes.values():
            process.terminate()
        for _, process in self.processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def latencies_ms(self) -> list[float]:
        """Of every claim that an agent asked for and got at once, sorted."""
        try:
            text = Path(self._latencies).read_text()
        except FileNotFoundError:
            return []
        return sorted(float(line) * 1000 for line in text.split())


async def _bounded(plan: Plan, found: endpoints.Endpoints, folder: Path, *, quiet: bool) -> Outcome:
    swarm = _Swarm(found.nats, folder)
    began = monotonic()
    try:
        async with Client.connect(found.nats, session="demo") as client:
            names, before = await _load(client, plan)
            for number in range(plan.agents):
                swarm.start(number)
            killed = await _run(client, swarm, plan, len(names), before, quiet=quiet)
            seconds = monotonic() - began
            events = [event async for event in _all_events(client)]
    finally:
        swarm.stop()
    return Outcome(judge(events, names), killed, swarm.latencies_ms(), seconds, len(names))


async def _load(client: Client, plan: Plan) -> tuple[list[str], int]:
    """The board that ships, and plain tasks besides: the ids of those that are to be done, and how many arrived done."""
    text = (files("ifabric.cli") / "demo_board.md").read_text(encoding="utf-8")
    board = read_board(text, format="md", filename="demo_board.md")
    chance = seeded(plan.seed)
    plain = [
        TaskSpec(
            id=f"T.{number:05d}",
            title=f"plain task {number}",
            priority=chance.randint(-2, 2),
            wants=(chance.choice(CAPABILITIES),),
            depends_on=(f"T.{number - 1:05d}",) if number % 10 == 0 and number else (),
            max_attempts=20,
        )
        for number in range(plan.tasks - len(board.tasks) + len(board.done))
    ]
    for chunk in chunks_of((*board.tasks, *plain)):
        await client.submit(chunk, done=[task.id for task in chunk if task.id in board.done])
    return [task.id for task in (*board.tasks, *plain) if task.id not in board.done], len(board.done)


async def _run(client: Client, swarm: _Swarm, plan: Plan, total: int, before: int, *, quiet: bool) -> int:
    """Watches the board until it is done, killing agents on the way; how many."""
    chance = seeded(plan.seed)
    kills = sorted(chance.uniform(0.1, 0.7) * total for _ in range(plan.kill))
    killed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as progress:
        bar = progress.add_task("working", total=total)
        until, said = monotonic() + BOUND_S, 0.0
        while monotonic() < until:
            page = await client.list(state="claimed", limit=100)
            counts = page.counts
            done = counts["done"] - before
            about = f"done {done}, claimed {counts['claimed']}, killed {killed}"
            progress.update(bar, completed=done, description=about)
            if not quiet and not err.is_terminal and monotonic() - said > 1:
                said = monotonic()
                err.print(f"  {about} of {total}")
            if done >= total:
                break
            if killed < len(kills) and done >= kills[killed]:
                holders = [line.session for line in page.tasks if line.session in swarm.processes]
                if holders and swarm.kill(str(chance.choice(holders))):
                    killed += 1
            await asyncio.sleep(0.05)
    return killed


async def _all_events(client: Client) -> AsyncIterator[TaskEvent]:
    """Everything in the journal, to where it ends once it has caught up with the board."""
    journal = await client.journal()
    quiet = 0
    seen = 0
    while quiet < 5:  # the publisher may be a moment behind the board
        last = await journal.last()
        seq = last.seq if last is not None else 0
        quiet = quiet + 1 if seq == seen and seq else 0
        seen = seq
        await asyncio.sleep(0.1)
    async for event in client.events(after_seq=0, until_seq=seen):
        yield event


def _report(outcome: Outcome, *, json: bool) -> int:
    verdict, latencies = outcome.verdict, outcome.latencies_ms
    promises = (
        (f"every task done: {verdict.completed} of {outcome.tasks}", verdict.never_done),
        ("each exactly once", verdict.done_twice),
        ("never two holders at a time", verdict.two_holders),
        ("fences only grow", verdict.fence_fell),
        ("every completion by the holder, under its fence", verdict.stale_completion),
    )
    held = all(not broken for _, broken in promises) and verdict.completed == outcome.tasks
    p50, p95, p99 = (latencies[int(len(latencies) * share)] if latencies else 0.0 for share in (0.50, 0.95, 0.99))
    if json:
        figures = {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)}
        print_json(
            {
                "held": held,
                "killed": outcome.killed,
                "seconds": round(outcome.seconds, 1),
                "claim_latency_ms": figures,
                **verdict._asdict(),
            }
        )
        return 0 if held else 1
    for promise, broken in promises:
        names = f"  [red]{escape(', '.join(broken[:5]))}[/]" if broken else ""
        out.print(f"{'[red]✘[/]' if broken else '[green]✔[/]'} {promise}{names}")
    out.print(
        f"  {verdict.claimed} claims, {outcome.killed} agents killed in the middle of a task, "
        f"{verdict.expired} claims expired, {verdict.taken_over} of those tasks taken over by another agent"
    )
    out.print(f"  claim latency p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, as the agents saw it")
    out.print(f"  {outcome.seconds:.1f} s; checked from the event stream {subjects.EVENT_STREAM}")
    return 0 if held else 1
