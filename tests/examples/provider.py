"""An agent that pays: a provider's HTTP API behind a budget, holds and a breaker.

    python tests/examples/provider.py

It starts a provider on this machine (it sells completions, tells each one's price, and has a bad minute in the middle)
and a daemon with servers of its own in a scratch folder, so that no budget of yours is touched. The board would cost
more than the budget allows. At the end the books are compared: what the provider has billed is what the fabric has
charged, to the millionth of a dollar, and not more than the cap.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

import ifabric
from ifabric import Usage, micro_usd
from ifabric.cli.demo import scratch_daemon
from ifabric.cli.output import usd
from ifabric.errors import BreakerOpen, BudgetShort

TASKS = 40
CAP = micro_usd("1.00")
#: what a completion may cost at most: known before it is asked for
ESTIMATE = micro_usd("0.05")
WORKERS = 4
BREAKER = "provider/complete"
#: the provider's bad minute: which of its calls fail
OUTAGE = range(8, 12)
CONFIG = (
    "governor: {circuit_breaker: {failure_threshold: 3, minimum_calls: 3, reset_timeout: 1, half_open_probes: 1}}\n"
)


# -- the agent ------------------------------------------------------------------------------------------------------------


class Agent:
    """Works off the board until the money is gone."""

    def __init__(self, client: ifabric.Client, http: httpx.AsyncClient) -> None:
        self._client, self._http = client, http
        self.stopped_by: list[BudgetShort] = []
        self.waited = 0

    async def work(self) -> None:
        """Each task is taken together with the money for it, or not at all."""
        try:
            async for claim in self._client.tasks(until_empty=True, hold_micro_usd=ESTIMATE):
                try:
                    async with claim:
                        await self._do(claim)
                except BreakerOpen:
                    self.waited += 1  # the task is pending again, for when the provider is back
                    await asyncio.sleep(1)
                except (httpx.HTTPStatusError, BudgetShort):
                    continue  # it is in the task's record, as its error
        except BudgetShort as short:
            self.stopped_by.append(short)

    async def _do(self, claim: ifabric.Claim) -> None:
        answer = await self._complete(claim.spec.title)
        claim.cost_micro_usd += micro_usd(answer["price_usd"])  # charged with the claim's end, whatever that is
        if claim.spec.payload["review"]:  # a step with money of its own, charged once however often it is done
            async with claim.hold(ESTIMATE, step="review") as hold:
                review = await self._complete("review: " + answer["text"])
                hold.cost_micro_usd = micro_usd(review["price_usd"])
                hold.usage = Usage(tokens_in=review["tokens_in"], tokens_out=review["tokens_out"])
        await claim.complete({"text": answer["text"]})

    async def _complete(self, prompt: str) -> Any:
        """One call. What the provider does wrong opens the breaker, and then nobody calls for a while."""
        async with self._client.breaker(BREAKER, wait_s=5):
            answer = await self._http.post("/v1/complete", json={"prompt": prompt})
            answer.raise_for_status()
        return answer.json()


# -- the provider ---------------------------------------------------------------------------------------------------------


class Provider(BaseHTTPRequestHandler):
    """Sells completions. What it has billed is the other side of the books."""

    calls = failed = 0
    billed = Decimal(0)
    lock = threading.Lock()
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        with Provider.lock:
            Provider.calls += 1
            number = Provider.calls
            price = Decimal("0.020001") + Decimal(len(prompt) * 137 % 29) / 1000
            if number in OUTAGE:
                Provider.failed += 1
            else:
                Provider.billed += price
        if number in OUTAGE:
            limited = number % 2 == 0
            self._answer(429 if limited else 500, {"error": "try later"}, {"Retry-After": "1"} if limited else {})
        else:
            sold = {"text": prompt.upper(), "price_usd": str(price), "tokens_in": len(prompt), "tokens_out": 7}
            self._answer(200, sold, {})

    def _answer(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def provider() -> Iterator[str]:
    """Its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


# -- the play -------------------------------------------------------------------------------------------------------------


async def play(nats: str, url: str) -> bool:
    """Lets the agent work, and reads the books."""
    async with (
        ifabric.Client.connect(nats, session="agent", account="acme", capabilities=["example"]) as client,
        httpx.AsyncClient(base_url=url, timeout=5) as http,
        client.subscribe("breaker") as happened,
    ):
        await client.set_account("acme", CAP)
        spec = {"needs": ["example"], "max_attempts": 10}
        await client.submit(
            {"id": f"T.{n:02}", "title": f"poem {'la ' * (n % 7)}", "payload": {"review": n % 4 == 0}, **spec}
            for n in range(TASKS)
        )
        agent = Agent(client, http)
        await asyncio.gather(*(agent.work() for _ in range(WORKERS)))
        async with asyncio.timeout(10):
            opened = await anext(
                event async for event in happened if (event.breaker, event.event) == (BREAKER, "opened")
            )
        books = await client.balance("acme")
        closed = all(line.state == "closed" for line in await client.breakers() if line.breaker == BREAKER)
        done = (await client.list(limit=1)).counts["done"]
    return report(agent, books, done, opened.why if closed else "")


def report(agent: Agent, books: Any, done: int, opened_why: str) -> bool:
    """What came of it, line by line; whether all of it is as it must be."""
    line = books.path[-1]
    billed = micro_usd(Provider.billed)
    promises = (
        (line.spent == billed, f"the provider has billed {usd(billed)}, the fabric has charged {usd(line.spent)}"),
        (line.spent <= CAP and line.overdraft == 0, f"the cap of {usd(CAP)} holds: {usd(line.available)} are left"),
        (line.held == 0 and not books.holds, "no hold is left behind"),
        (
            bool(agent.stopped_by),
            f"the agent stopped when the next task had no money: {done} of {TASKS} tasks are done",
        ),
        (bool(opened_why), f"the breaker opened ({opened_why}) and closed again"),
        (
            0 < Provider.failed <= len(OUTAGE),
            f"{Provider.failed} of {Provider.calls} calls met the outage; {agent.waited} tasks were put back for later",
        ),
    )
    for held, what in promises:
        print(f"{'✔' if held else '✘'} {what}")
    for short in agent.stopped_by[:1]:
        print(f"  {short.message}")
    return all(held for held, _ in promises)


def main() -> int:
    """0 when the books agree."""
    with (
        provider() as url,
        tempfile.TemporaryDirectory(prefix="ifabric-example-", ignore_cleanup_errors=True) as folder,
        scratch_daemon(Path(folder), quiet=True, config_text=CONFIG) as found,
    ):
        return 0 if asyncio.run(play(found.nats, url)) else 1


if __name__ == "__main__":
    sys.exit(main())
