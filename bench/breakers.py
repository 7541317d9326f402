"""What does a breaker cost a call that it lets through? `admit` beside an echo over the same NATS, in one run.

The echo is the least that any service can do: a bare nats-py responder on uvloop, in a process of its own, which
sends back as many bytes as `admit` does. One caller asks both in turns of a few hundred requests. Beside it: what a
report costs, a refusal, and what 64 callers get through.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import nats
import uvloop
from nats.aio.client import Client

from bench.stand import closed_loop, percentile, stand
from ifabric.clock import monotonic

ROUNDS = 9
ALONE = 2_000
TURN = 250
CALLERS = 64
CLOSED = 10_000
BREAKER = "openai/gpt-x"
ECHO = "bench.echo"
ASKED = json.dumps({"breaker": BREAKER}).encode()

Act = Callable[[int], Awaitable[None]]


async def echo(url: str) -> None:
    """The responder's process: answers each request with what `admit` would say, until it is ended."""
    client = await nats.connect(url)
    answer = b'{"permit":"c0.12345678901ffff.0123456789abcdef01234567","state":"closed"}'

    async def respond(msg: nats.aio.msg.Msg) -> None:
        await client.publish(msg.reply, answer)

    await client.subscribe(ECHO, cb=respond)
    await client.flush()
    print("ready", flush=True)
    await asyncio.get_running_loop().create_future()


@contextlib.asynccontextmanager
async def responder(url: str) -> AsyncIterator[None]:
    """The echo, ready."""
    process = subprocess.Popen([sys.executable, "-m", "bench.breakers", url], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        yield
    finally:
        process.terminate()
        process.wait(10)


class Caller:
    """One connection, and the verbs as acts."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._permits: list[bytes] = []

    async def echo(self, _: int) -> None:
        await self._client.request(ECHO, ASKED, timeout=30)

    async def admit(self, number: int) -> None:
        answer = await self._client.request(f"if.v1.governor.admit.c{number % CALLERS}", ASKED, timeout=30)
        if answer.headers is not None:
            raise SystemExit(f"admit: {answer.headers}")

    async def admit_and_report(self, number: int) -> None:
        session = f"c{number % CALLERS}"
        answer = await self._client.request(f"if.v1.governor.admit.{session}", ASKED, timeout=30)
        body = {"breaker": BREAKER, "permit": json.loads(answer.data)["permit"], "outcome": "success"}
        answer = await self._client.request(f"if.v1.governor.report.{session}", json.dumps(body).encode(), timeout=30)
        if answer.headers is not None:
            raise SystemExit(f"report: {answer.headers}")

    async def refused(self, number: int) -> None:
        subject = f"if.v1.governor.admit.c{number % CALLERS}"
        answer = await self._client.request(subject, b'{"breaker":"held"}', timeout=30)
        if answer.headers is None:
            raise SystemExit("a breaker that is held open let a call through")


async def alone(acts: dict[str, Act]) -> dict[str, list[float]]:
    """One caller, the acts in turns; the latencies of each, sorted, in seconds."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for at in range(0, ALONE, TURN):
        for name, act in acts.items():
            for number in range(at, at + TURN):
                began = monotonic()
                await act(number)
                taken[name].append(monotonic() - began)
    return {name: sorted(seconds) for name, seconds in taken.items()}


async def main() -> None:
    """Prints every figure, and the ratio that counts."""
    async with stand() as where, responder(where.nats):
        client = await nats.connect(where.nats)
        caller = Caller(client)
        hold = json.dumps({"breaker": "held", "state": "open"}).encode()
        await client.request("if.v1.admin.governor.breaker.bench", hold, timeout=30)
        acts: dict[str, Act] = {
            "echo": caller.echo,
            "admit": caller.admit,
            "admit+report": caller.admit_and_report,
            "refused": caller.refused,
        }
        await alone(acts)  # warm
        rounds = [await alone(acts) for _ in range(ROUNDS)]
        for name in acts:
            p50, p95, p99 = (
                statistics.median(percentile(taken[name], share) * 1e6 for taken in rounds)
                for share in (0.5, 0.95, 0.99)
            )
            print(f"{name:>13}: alone p50 {p50:6.0f}  p95 {p95:6.0f}  p99 {p99:6.0f} us")
        ratios = [percentile(taken["admit"], 0.5) / percentile(taken["echo"], 0.5) for taken in rounds]
        for name, act in acts.items():
            began = monotonic()
            await closed_loop(act, itertools.islice(itertools.count(), CLOSED), CALLERS)
            print(f"{name:>13}: {CALLERS} callers {CLOSED / (monotonic() - began):8,.0f} /s")
        print(f"admit / echo, p50 alone: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        await client.close()


if __name__ == "__main__":
    uvloop.run(echo(sys.argv[1]))
