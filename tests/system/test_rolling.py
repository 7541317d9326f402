"""Three daemons are replaced one by one under load, and no agent of the SDK is told of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ifabric.bus.base import Answer
from ifabric.calling import Line
from ifabric.cancellation import cancel_and_wait
from ifabric.claims import Claim
from ifabric.client import Client
from ifabric.errors import FabricError, NoTaskMatches, Unavailable
from ifabric.testing.clock import VirtualClock
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import coordinator as wire
from ifabric.wire.envelope import ERROR_CODE_HEADER
from tests.conftest import needed
from tests.guests.build import compiler, guest
from tests.system.conftest import Cluster, Load, eventually

#: small pools: three daemons share the machine with all else
CONFIG: dict[str, Any] = {"chassis": {"sandbox_pool": {"min_size": 1, "max_size": 2}}}
#: a session's life; it is renewed at a third, so several times while the daemons are replaced
TTL_S = 6
ACCOUNT, LIMIT, COST, ESTIMATE = "org", 10**9, 7, 1_000


class Crew:
    """Agents of the SDK that do everything but plain tasks, until told to stop; what they are told is kept.

    Errors are those that reach an agent: nothing is tried again here.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.errors: list[str] = []
        self.did: Counter[str] = Counter()
        #: what the agents were told that they were charged
        self.charged = 0
        #: held by an agent from before the first daemon leaves until after the last has come
        self.kept: list[Claim] = []
        self.parked: list[asyncio.Task[str]] = []

    async def start(self) -> Crew:
        await (await self._cluster.client("purser")).set_account(ACCOUNT, LIMIT)
        for number in range(4):
            spender = await self._cluster.client(f"spender-{number}", ttl_s=TTL_S, account=ACCOUNT)
            self._begin("hold", spender, self._hold)
            self._begin(
                "spend", await self._cluster.client(f"payer-{number}", ttl_s=TTL_S, account=ACCOUNT), self._spend
            )
        for number in range(2):
            runner = await self._cluster.client(f"runner-{number}", ttl_s=TTL_S)
            module = await runner.put_module(guest("hello"))
            self._begin("run", runner, lambda client, module=module: self._run(client, module))
        for number in range(5):
            keeper = await self._cluster.client(f"keeper-{number}", ttl_s=TTL_S, capabilities=[f"keep-{number}"])
            await keeper.submit([wire.TaskSpec(id=f"kept/{number}", needs=(f"keep-{number}",))])
            claim = await keeper.claim(f"kept/{number}")
            self.kept.append(claim)
            self._begin("keep", keeper, lambda _, claim=claim: self._keep(claim))
        for number in range(12):
            waiter = await self._cluster.client(
                f"waiter-{number}", ttl_s=TTL_S, capabilities=["park"], accepts=[f"park-{number}"]
            )
            self.parked.append(asyncio.create_task(self._park(waiter, number)))
        self._cluster.closing.push_async_callback(cancel_and_wait, *self._tasks, *self.parked)
        return self

    def _begin(self, what: str, client: Client, act: Callable[[Client], Awaitable[None]]) -> None:
        async def again_and_again() -> None:
            while not self._stopping:
                try:
                    await act(client)
                except FabricError as error:
                    self.errors.append(f"{what} of {client.session}: {error!r}")
                else:
                    self.did[what] += 1
                await asyncio.sleep(0.02)

        self._tasks.append(asyncio.create_task(again_and_again()))

    async def _hold(self, client: Client) -> None:
        async with client.hold(ESTIMATE) as hold:
            hold.cost_micro_usd = COST
        self.charged += COST

    async def _spend(self, client: Client) -> None:
        reply = await client.spend(COST)
        self.charged += reply.charged  # after the wait: others add to it meanwhile

    async def _run(self, client: Client, module: str) -> None:
        result = await client.run_module(module, client.session, wall_s=5)
        assert result.text == f"hello {client.session}\n"

    async def _keep(self, claim: Claim) -> None:
        if claim.lost.is_set():
            self.errors.append(f"{claim.task} was lost: {claim.lost_reason}")
        await asyncio.sleep(0.1)

    async def _park(self, client: Client, number: int) -> str:
        """One long poll after the other, until there is the task that only this agent can do."""
        while True:
            try:
                claim = await client.next(wait_s=20.0)
            except NoTaskMatches:
                continue
            await claim.complete({"by": number})
            return str(claim.task)

    async def finish(self) -> None:
        """What was parked gets its task, and what was kept is completed."""
        submitter = await self._cluster.client("submitter")
        wanted = [f"parked/{number}" for number in range(len(self.parked))]
        await submitter.submit(
            [wire.TaskSpec(id=task, needs=("park",), labels=(f"park-{number}",)) for number, task in enumerate(wanted)]
        )
        async with asyncio.timeout(30):
            assert await asyncio.gather(*self.parked) == wanted
        self._stopping = True
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)
        for claim in self.kept:
            await claim.complete()


class Strangers:
    """Clients in the manner of `nats req`: each request once, short or parked, and whatever comes back is counted."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.short: Counter[str] = Counter()
        self.parked: Counter[str] = Counter()

    def start(self) -> list[asyncio.Task[None]]:
        short = [asyncio.create_task(self._ask(f"stranger-{n}")) for n in range(4)]
        return [*short, *(asyncio.create_task(self._wait(f"idler-{n}")) for n in range(4))]

    async def _ask(self, session: str) -> None:
        while True:
            self.short[await self._outcome("list", session, limit=1)] += 1
            await asyncio.sleep(0.01)

    async def _wait(self, session: str) -> None:
        await self._cluster.ask("hello", session, ttl_s=600, accepts=[session])
        while True:
            self.parked[await self._outcome("next", session, wait_s=15, timeout_s=20.0)] += 1
            await asyncio.sleep(0.05)

    async def _outcome(self, verb: str, session: str, **body: Any) -> str:
        try:
            await self._cluster.ask(verb, session, **body)
        except NoTaskMatches:
            return "no task"
        except FabricError as error:
            return f"{error.code}: {error.facts.get('what')} {error.facts.get('reason', '')}".strip()
        return "ok"


async def replaced(daemon: RealDaemon) -> None:
    """The daemon goes, in its own time, and another comes in its place."""
    assert await daemon.terminate() == 0
    await daemon.start()


class Leaving:
    """A fabric whose daemons leave one after the other, each after as long as a long poll lasts; the last one stays."""

    def __init__(self, clock: VirtualClock, leaving: int) -> None:
        self._clock, self.left = clock, leaving

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Any = None) -> Answer:
        if self.left:
            await self._clock.sleep(20.0)
            self.left -= 1
            gone = Unavailable("The daemon is stopping; ask again, another one will answer.", what="draining")
            return Answer(msgspec.json.encode(gone.to_body()), {ERROR_CODE_HEADER: "503"})
        return Answer(b'{"task": "t", "fence": 1, "attempt": 1, "ttl_s": 60, "spec": {"id": "t"}}', {})


async def test_a_long_poll_that_meets_one_leaving_daemon_after_the_other_is_asked_again_of_the_next() -> None:
    """Each replacement of a daemon hands its parked polls over, however long those have waited already."""
    clock = VirtualClock()
    line = Line(Leaving(clock, 3), clock, session="a", timeout_s=5.0, where="here")  # type: ignore[arg-type]
    asking = asyncio.create_task(line.call(wire.Next(wait_s=20.0), attempt_s=22.0))
    for _ in range(70):
        await clock.advance(1.0)
    assert (await asking).task == "t"


@pytest.mark.slow
async def test_three_daemons_are_replaced_one_by_one_and_no_request_of_the_sdk_fails(cluster: Cluster) -> None:
    """Slow: three drains and three starts of whole daemons, with sandboxes, under load."""
    with needed("guests in C"):
        compiler()
    daemons = [await cluster.daemon(config=CONFIG) for _ in range(3)]
    crew = await Crew(cluster).start()
    strangers = Strangers(cluster)
    strange = strangers.start()
    cluster.closing.push_async_callback(cancel_and_wait, *strange)
    load = Load(cluster, agents=10, pause_s=0.02)
    await load.start()
    for daemon in daemons:
        await load.reach(len(load.completed) + 50)

        async def parked_here(daemon: RealDaemon = daemon) -> bool:
            return await daemon.metric("if_coordinator_waiters") > 0

        await eventually(parked_here)  # so that somebody's long poll is on the daemon that leaves
        before = dict(crew.did)
        await replaced(daemon)

        async def all_went_on(before: dict[str, int] = before) -> bool:
            return all(crew.did[what] > count for what, count in before.items())

        await eventually(all_went_on, 30.0)
    await load.reach(len(load.completed) + 50)
    await crew.finish()
    await cancel_and_wait(*strange)
    await load.stop()
    print(f"\nthree daemons replaced: {load.figures()}; {dict(crew.did)}")
    print(f"without retries: short requests {dict(strangers.short)}, long polls {dict(strangers.parked)}")
    assert crew.errors + load.errors == []
    known = await cluster.all_records()
    mine = {task for task in known if task.startswith(("kept/", "parked/"))}
    load.submitted += mine
    verdict = await load.verdict()
    assert verdict.held, verdict
    assert verdict.completed == len(load.submitted)
    assert [known[claim.task].fence for claim in crew.kept] == [claim.fence for claim in crew.kept]
    balance = await (await cluster.client("auditor")).balance(ACCOUNT)
    assert balance.path[0].spent == crew.charged
    assert balance.path[0].held == 0
    assert {outcome for outcome in strangers.short if outcome != "ok"} <= {"unavailable: nats no_responders"}
