"""`ifabric smoke`: the runbook's three smoke tests against a running daemon."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from ifabric.cli.connect import Where, client
from ifabric.cli.output import out, print_json
from ifabric.client import Client
from ifabric.clock import SystemClock, monotonic
from ifabric.errors import FabricError
from ifabric.wire import coordinator as wire

CLAIMS = 100
P95_MS = 10.0
EVENT_S = 5.0


class Result(NamedTuple):
    """One test, as a line."""

    name: str
    passed: bool
    figure: str


def smoke(*, json: bool = False, where: Where | None = None) -> int:
    """Run three tests against the daemon: a claim is granted, its event arrives, 100 claims have a p95 below 10 ms.

    It makes tasks of its own and deletes them. Exit 1 if a test fails.
    """
    results = asyncio.run(_all(where))
    passed = all(result.passed for result in results)
    if json:
        print_json({"passed": passed, "tests": [result._asdict() for result in results]})
    else:
        for result in results:
            out.print(f"{'[green]✔[/]' if result.passed else '[red]✘[/]'} {result.name:<18}{result.figure}")
    return 0 if passed else 1


async def _all(where: Where | None) -> list[Result]:
    mark = SystemClock().token()[:8]
    names = [f"SMOKE-{mark}-{number}" for number in range(CLAIMS)]
    async with client(where, f"smoke-{mark}", ttl_s=30) as connected:
        try:
            await connected.submit([wire.TaskSpec(id=name) for name in names])
            return [
                await _claim(connected, f"SMOKE-{mark}-a"),
                await _event(connected, f"SMOKE-{mark}-b"),
                await _latency(connected, names),
            ]
        finally:
            await _clean(connected, [*names, f"SMOKE-{mark}-a", f"SMOKE-{mark}-b"])


async def _claim(c: Client, task: str) -> Result:
    await c.submit([wire.TaskSpec(id=task)])
    began = monotonic()
    try:
        claim = await c.claim(task)
    except FabricError as error:
        return Result("task claim", False, str(error))
    return Result("task claim", True, f"granted under fence {claim.fence} in {(monotonic() - began) * 1000:.1f} ms")


async def _event(c: Client, task: str) -> Result:
    async with c.subscribe() as events:
        await c.submit([wire.TaskSpec(id=task)])
        began = monotonic()
        await c.claim(task)
        try:
            async with asyncio.timeout(EVENT_S):
                async for event in events:
                    if event.task == task and event.event == "claimed":
                        return Result(
                            "real-time events",
                            True,
                            f"`claimed` seen {(monotonic() - began) * 1000:.1f} ms after asking",
                        )
        except TimeoutError:
            pass  # said below
    return Result("real-time events", False, f"no `claimed` event within {EVENT_S:g} s")


async def _latency(c: Client, names: list[str]) -> Result:
    taken = []
    for name in names:
        began = monotonic()
        await c.claim(name)
        taken.append((monotonic() - began) * 1000)
    taken.sort()
    p95 = taken[int(len(taken) * 0.95) - 1]
    figure = f"p95 {p95:.2f} ms over {len(taken)} claims (p50 {taken[len(taken) // 2]:.2f} ms, limit {P95_MS:g} ms)"
    return Result("claim latency", p95 < P95_MS, figure)


async def _clean(c: Client, tasks: list[str]) -> None:
    """Takes the tasks away again, whatever became of them."""

    async def one(task: str) -> None:
        for verb in (wire.Cancel, wire.Purge):
            try:
                await c.operate(verb, task)
            except FabricError:
                continue  # it was never made, or is cancelled already

    await asyncio.gather(*(one(task) for task in tasks))
