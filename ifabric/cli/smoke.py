"""`ifabric smoke`: the runbook's three smoke tests against a running daemon.

The tasks need a capability that only this run's session has, so that no agent of a live swarm takes one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

from ifabric.cli.connect import client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import check, plain, print_json
from ifabric.clock import SystemClock, monotonic
from ifabric.connecting import credential_of, session_of
from ifabric.errors import FabricError, Unreachable
from ifabric.wire import coordinator as wire

if TYPE_CHECKING:
    from ifabric.client import Client

CLAIMS = 100
P95_MS = 10.0
EVENT_S = 5.0


class Result(NamedTuple):
    """One test, as a line. `ms` is its figure, in milliseconds; None when there is none."""

    name: str
    passed: bool
    says: str
    ms: float | None = None


def smoke(*, json: Json = False, where: Where | None = None) -> int:
    """Run three tests against the daemon: a claim is granted; its event arrives; 100
    claims have a p95 below 10 ms.

    It makes tasks of its own, which no other agent can take, and deletes them,
    which takes an operator's credential where there are identities. Exit 1 if a
    test fails.

    For example:

        ifabric smoke --nats nats://10.0.0.5:4222
    """
    results = asyncio.run(_all(where))
    passed = all(result.passed for result in results)
    if json:
        print_json({"passed": passed, "tests": [result._asdict() for result in results]})
    else:
        for result in results:
            check(result.passed, f"{result.name:<18}{plain(result.says)}")
    return 0 if passed else 1


async def _all(where: Where | None) -> list[Result]:
    mark = f"SMOKE-{SystemClock().token()[:8]}"
    made: list[str] = []

    async def submit(c: Client, names: list[str]) -> None:
        made.extend(names)
        await c.submit([wire.TaskSpec(id=name, title="smoke test", needs=(mark,)) for name in names])

    session = session_of(None, credential_of((where or Where()).credentials)) or mark
    async with client(where, session, ttl_s=30, capabilities=(mark,)) as connected:
        try:
            await submit(connected, [f"{mark}-claim"])  # nobody there: this says so
            return [
                await _tried("task claim", _claim(connected, f"{mark}-claim")),
                await _tried("real-time events", _event(connected, f"{mark}-event", submit)),
                await _tried("claim latency", _latency(connected, mark, submit)),
            ]
        finally:
            await _clean(connected, made)


async def _tried(name: str, test: Awaitable[Result]) -> Result:
    """A test's result; a refusal is one too."""
    try:
        return await test
    except FabricError as error:
        if isinstance(error, Unreachable):
            raise
        return Result(name, False, error.message)


Submit = Callable[["Client", list[str]], Awaitable[None]]


async def _claim(c: Client, task: str) -> Result:
    began = monotonic()
    claim = await c.claim(task)
    ms = (monotonic() - began) * 1000
    return Result("task claim", True, f"granted under fence {claim.fence} in {ms:.1f} ms", ms)


async def _event(c: Client, task: str, submit: Submit) -> Result:
    async with c.subscribe() as events:
        await submit(c, [task])
        began = monotonic()
        claim = await c.claim(task)
        try:
            async with asyncio.timeout(EVENT_S):
                async for event in events:
                    if (event.task, event.event, event.fence) == (task, "claimed", claim.fence):
                        break
        except TimeoutError:
            return Result("real-time events", False, f"no `claimed` event within {EVENT_S:g} s")
    ms = (monotonic() - began) * 1000
    return Result("real-time events", True, f"`claimed` seen {ms:.1f} ms after asking", ms)


async def _latency(c: Client, mark: str, submit: Submit) -> Result:
    names = [f"{mark}-{number}" for number in range(CLAIMS)]
    await submit(c, names)
    taken = []
    for name in names:
        began = monotonic()
        await c.claim(name)
        taken.append((monotonic() - began) * 1000)
    taken.sort()
    p50, p95 = taken[len(taken) // 2], taken[int(len(taken) * 0.95) - 1]
    says = f"p95 {p95:.2f} ms over {len(taken)} claims, one after the other (p50 {p50:.2f} ms, limit {P95_MS:g} ms)"
    return Result("claim latency", p95 < P95_MS, says, p95)


async def _clean(c: Client, tasks: list[str]) -> None:
    """Takes the tasks away again, whatever became of them."""

    async def one(task: str) -> None:
        with contextlib.suppress(FabricError):  # it was never made
            await c.operate(wire.Cancel, task)
            await c.operate(wire.Purge, task)

    await asyncio.gather(*(one(task) for task in tasks))
