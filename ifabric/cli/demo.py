"""`ifabric demo`: a swarm on this machine, start to end, judged by its event stream."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ifabric import endpoints
from ifabric.board import read_board
from ifabric.cli.board import chunks_of
from ifabric.cli.options import Json
from ifabric.cli.output import check, err, out, plain, print_json
from ifabric.cli.swarm import Swarm
from ifabric.cli.verdict import Held, Verdict, judge
from ifabric.client import Client
from ifabric.clock import monotonic, seeded
from ifabric.errors import StartupError
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects

TTL_S = 3
WORK_S = (0.01, 0.10)
READY_S = 30.0
CATCH_UP_S = 10.0
CAPABILITIES = ("python", "wasm", "chaos")


class Plan(NamedTuple):
    """What was asked for."""

    agents: int
    tasks: int
    kill: int
    seed: int

    @property
    def bound_s(self) -> float:
        """When to stop waiting for the board to be done: several times what it takes."""
        return 30.0 + 3 * self.tasks * (sum(WORK_S) / 2 / self.agents + 0.01)


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
    tasks: Annotated[int, Parameter(validator=Number(gte=20, lte=20_000), help="Tasks to do.")] = 500,
    kill: Annotated[
        int, Parameter(validator=Number(gte=0, lte=100), help="Agents to kill (SIGKILL) in the middle of a task.")
    ] = 5,
    seed: Annotated[int, Parameter(help="Of the tasks' priorities and the moments of the kills.")] = 1,
    json: Json = False,
) -> int:
    """Run a swarm on this machine and check what it did.

    It starts etcd, NATS and a daemon in a scratch folder, loads a board, and lets
    agents work it off, each a process that speaks NATS. Some are killed in the
    middle of a task and replaced. Then the event stream is read, and nothing else
    is believed: every task done exactly once, never two holders at a time, fences
    that only grow, the killed agents' tasks done by others. Exit 0 only if all of
    it held.

    For example:

        ifabric demo
        ifabric demo --agents 50 --tasks 2000 --kill 10
    """
    plan = Plan(agents, tasks, kill, seed)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # so that nothing is left running
    with tempfile.TemporaryDirectory(prefix="ifabric-demo-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with scratch_daemon(folder, quiet=json) as found:
            outcome = asyncio.run(_play(plan, found.nats, folder, quiet=json))
    return _report(plan, outcome, json=json)


def _interrupt(*_: Any) -> None:
    """Whoever handles Ctrl-C just now, the loop or Python itself, is to handle this the same."""
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def scratch_daemon(folder: Path, *, quiet: bool, config_text: str = "") -> Iterator[endpoints.Endpoints]:
    """A daemon in `folder` with servers of its own, ready; stopped afterwards, and its servers with it."""
    config = folder / "demo.yaml"
    config.write_text(f"http: {{port: 0}}\ncoordinator: {{logging: {{level: WARNING}}}}\n{config_text}")
    if not quiet:
        err.print("[dim]starting etcd, NATS and the daemon ...[/]")
    log = folder / "daemon.log"
    with log.open("wb") as written:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "ifabric", "run", "--config", str(config), "--state-dir", str(folder)],
            stdout=written,
            stderr=written,
            start_new_session=True,  # Ctrl-C is ours: the daemon goes last
        )
    try:
        until = monotonic() + READY_S
        while (found := endpoints.read(folder)) is None:
            if daemon.poll() is not None or monotonic() > until:
                said = log.read_text(errors="replace").strip().splitlines()[-8:]
                raise StartupError("the daemon did not start:\n" + "\n".join(said))
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(0.02)
        yield found
    finally:
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


async def _play(plan: Plan, nats: str, folder: Path, *, quiet: bool) -> Outcome:
    swarm = Swarm(nats, folder, capabilities=CAPABILITIES, ttl_s=TTL_S, work_s=WORK_S)
    began = monotonic()
    try:
        async with Client.connect(nats, session="demo") as client:
            names, before = await _load(client, plan)
            for number in range(plan.agents):
                swarm.start(number)
            victims = await _watch(client, swarm, plan, len(names), before, quiet=quiet)
            seconds = monotonic() - began
            events = await _events(client, set(names))
    finally:
        swarm.stop()
    return Outcome(judge(events, names, victims), len(victims), swarm.latencies_ms(), seconds, len(names))


async def _load(client: Client, plan: Plan) -> tuple[list[str], int]:
    """The board that ships, and generated tasks: the ids of those that are to be done, and how many arrived done."""
    text = (files("ifabric.cli") / "demo_board.md").read_text(encoding="utf-8")
    board = read_board(text, format="md", filename="demo_board.md")
    chance = seeded(plan.seed)
    generated = [
        wire.TaskSpec(
            id=f"T.{number:05d}",
            title=f"generated task {number}",
            priority=chance.randint(-2, 2),
            needs=(chance.choice(CAPABILITIES),) if number % 3 == 0 else (),
            wants=(chance.choice(CAPABILITIES),),
            depends_on=(f"T.{number - 1:05d}",) if number % 10 == 0 and number else (),
            max_attempts=20,
        )
        for number in range(plan.tasks - len(board.tasks) + len(board.done))
    ]
    for chunk in chunks_of((*board.tasks, *generated)):
        await client.submit(chunk, done=[task.id for task in chunk if task.id in board.done])
    return [task.id for task in (*board.tasks, *generated) if task.id not in board.done], len(board.done)


async def _watch(client: Client, swarm: Swarm, plan: Plan, total: int, before: int, *, quiet: bool) -> list[Held]:
    """Follows the board until it is done, killing agents on the way; the claims that the killed ones held."""
    chance = seeded(plan.seed)
    kills = sorted(chance.uniform(0.05, 0.7) * total for _ in range(plan.kill))
    victims: list[Held] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as progress:
        bar = progress.add_task("working", total=total)
        until, said = monotonic() + plan.bound_s, 0.0
        while monotonic() < until:
            page = await client.list(state="claimed", limit=plan.agents)
            done = page.counts["done"] - before
            about = f"done {done}, claimed {page.counts['claimed']}, killed {len(victims)}"
            progress.update(bar, completed=done, description=about)
            if not quiet and not err.is_terminal and monotonic() - said > 1:
                said = monotonic()
                err.print(f"  {about} of {total}")
            if done >= total:
                break
            if len(victims) < len(kills) and done >= kills[len(victims)]:
                holders = [line for line in page.tasks if line.session in swarm]
                victim = await _kill(client, swarm, chance.choice(holders)) if holders else None
                victims += [victim] if victim else []
            await asyncio.sleep(0.02)
    return victims


async def _kill(client: Client, swarm: Swarm, line: wire.TaskLine) -> Held | None:
    """Kills the task's holder if it is in the middle of it: it is stopped first, and then asked about."""
    session = str(line.session)
    swarm.freeze(session)
    found = await client.get(line.task)
    if found.state != "claimed" or (found.session, found.fence) != (session, line.fence):
        swarm.thaw(session)  # it was faster
        return None
    swarm.kill(session)
    return Held(session, line.task, line.fence)


async def _events(client: Client, names: set[str]) -> list[wire.TaskEvent]:
    """Everything in the journal, to where it tells of every task's end and has had nothing new for a moment."""
    events: list[wire.TaskEvent] = []
    journal = await client.journal()
    seen = 0
    until = monotonic() + CATCH_UP_S  # the publisher may be a moment behind the board
    while monotonic() < until:
        last = await journal.last()
        if last is not None and last.seq > seen:
            events += [event async for event in client.events(after_seq=seen, until_seq=last.seq)]
            seen = last.seq
        elif names <= {event.task for event in events if event.event == "completed"}:
            break
        await asyncio.sleep(0.3)
    return events


def _report(plan: Plan, outcome: Outcome, *, json: bool) -> int:
    verdict, latencies = outcome.verdict, outcome.latencies_ms
    p50, p95, p99 = (latencies[int(len(latencies) * share)] if latencies else 0.0 for share in (0.50, 0.95, 0.99))
    if json:
        figures = {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)}
        print_json(
            {
                "held": verdict.held,
                "tasks": outcome.tasks,
                "killed": outcome.killed,
                "seconds": round(outcome.seconds, 1),
                "claim_latency_ms": figures,
                **verdict._asdict(),
            }
        )
        return 0 if verdict.held else 1
    promises = (
        (f"every task done: {outcome.tasks - len(verdict.never_done)} of {outcome.tasks}", verdict.never_done),
        ("each exactly once", verdict.done_twice),
        ("never two holders at a time", verdict.two_holders),
        ("fences only grow", verdict.fence_fell),
        ("every completion by the last holder, under its fence", verdict.stale_completion),
        (f"killed agents' tasks done by others: {verdict.rescued} of {outcome.killed}", verdict.not_rescued),
        (f"no event is missing from {subjects.EVENT_STREAM}", verdict.gaps),
    )
    for promise, broken in promises:
        check(not broken, promise + (f"  [red]{plain(', '.join(broken[:5]))}[/]" if broken else ""))
    fewer = f" (of {plan.kill} asked for)" if outcome.killed < plan.kill else ""
    out.print(
        f"  {verdict.claimed} claims by {plan.agents} agents, {outcome.killed} of them killed in the middle of a "
        f"task{fewer} and replaced, {verdict.expired} claims expired"
    )
    out.print(f"  claim latency p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, as the agents saw it")
    out.print(f"  {outcome.seconds:.1f} s from the first task submitted to the last one done")
    return 0 if verdict.held else 1
