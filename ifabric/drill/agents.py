"""Agents at work through a loss, and what each was told: the drill's own memory, which is not lost.

An agent takes a task with a hold, pays for a step now and then, and completes the task with its cost; as the SDK has it,
and with the SDK's patience. It goes on while the fabric is gone, and so the first of them that is granted a claim says
when the fabric is back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ifabric.cancellation import cancel_and_wait
from ifabric.claims import Claim
from ifabric.client import Client
from ifabric.clock import monotonic, seeded
from ifabric.drill.verdict import Grant
from ifabric.errors import ClaimLost, FabricError, NoTaskMatches
from ifabric.wire import coordinator as wire
from ifabric.wire.governor import account_of, claim_hold

ROOT, TEAMS = "drill", 4
#: micro-USD: what a claim holds, what a task and a step cost
HOLD, COST, STEP = 20_000, (1, 5_000), (1, 1_000)
#: every so many tasks have a step with a hold of its own
STEP_EVERY = 5
TTL_S = 60
TIMEOUT_S = 10.0
#: tasks that are on the board beyond what was taken, at least; so there is something to take when the fabric is back
AHEAD = 300
FEW = 5
PAUSE_S = 0.05


class Charge(NamedTuple):
    """An acknowledged charge (micro-USD), and when the answer came (monotonic seconds)."""

    at: float
    session: str
    hold: str
    account: str
    micro_usd: int


class Done(NamedTuple):
    """An acknowledged completion."""

    at: float
    task: str
    fence: int


class Told:
    """What agents were told, all of them together."""

    def __init__(self) -> None:
        #: (when, what)
        self.grants: list[tuple[float, Grant]] = []
        self.completed: list[Done] = []
        self.charges: list[Charge] = []
        #: account of a session -> micro-USD that were asked for without an answer
        self.unknown: Counter[str] = Counter()
        #: (when, task)
        self.submitted: list[tuple[float, str]] = []
        #: how often each error was met
        self.errors: Counter[str] = Counter()
        self._on_grant: Callable[[Grant], None] | None = None

    def granted(self, grant: Grant) -> None:
        """An agent was told that it holds a task."""
        self.grants.append((monotonic(), grant))
        if self._on_grant is not None:
            self._on_grant(grant)

    def first_above(self, fence: int) -> asyncio.Future[float]:
        """Done, with the moment, at the first grant under a fence above that one."""
        first: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def look(grant: Grant) -> None:
            if grant.fence > fence and not first.done():
                first.set_result(monotonic())

        self._on_grant = look
        return first


class Agents:
    """So many agents, and one who puts new tasks on the board while they work."""

    def __init__(self, nats: str, number: int, told: Told) -> None:
        self._told = told
        self._stopping = False
        self._submitting = True
        self._clients = [
            Client.connect(
                nats, session=f"drill-{n:03d}", account=f"{ROOT}/team-{n % TEAMS}", ttl_s=TTL_S, timeout_s=TIMEOUT_S
            )
            for n in range(number)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """They greet the fabric, and work from then on."""
        for client in self._clients:
            client.leave_on_exit = False
            await client.__aenter__()
            await client.hello()
        self._tasks = [asyncio.create_task(self._work(client), name=client.session) for client in self._clients]
        self._tasks.append(asyncio.create_task(self._submit(self._clients[0]), name="submit"))

    def no_more_tasks(self) -> None:
        """Nothing new is put on the board from now on."""
        self._submitting = False

    async def stop(self, within_s: float) -> None:
        """Lets each end what it is at, and then waits no longer. Twice is harmless."""
        self._stopping, self._submitting = True, False
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        tasks, self._tasks = self._tasks, []
        await cancel_and_wait(*tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def close(self) -> None:
        """Ends them, and their connections."""
        try:
            await self.stop(0.0)
        finally:
            for client in self._clients:
                await client.__aexit__(None, None, None)

    # -- one agent ----------------------------------------------------------------------------------------------------

    async def _work(self, client: Client) -> None:
        chance, account, number = seeded(client.session), self._account(client), 0
        while not self._stopping:
            try:
                claim = await client.next(hold_micro_usd=HOLD)
            except NoTaskMatches:
                await asyncio.sleep(PAUSE_S)
                continue
            except FabricError as error:
                self._told.errors[f"next: {error.code}"] += 1
                await asyncio.sleep(PAUSE_S)
                continue
            number += 1
            self._told.granted(Grant(claim.task, claim.fence))
            step = chance.randint(*STEP) if number % STEP_EVERY == 0 else 0
            await self._carry_out(client, claim, account, chance.randint(*COST), step)

    async def _carry_out(self, client: Client, claim: Claim, account: str, cost: int, step: int) -> None:
        told = self._told
        try:
            async with claim:
                claim.cost_micro_usd += cost
                if step:
                    await self._step(client, claim, account, step)
                await claim.complete({"by": client.session})
                at = monotonic()
                told.completed.append(Done(at, claim.task, claim.fence))
                self._charged(client, claim.hold_id or claim_hold(claim.task, claim.fence), account, cost)
                return
        except ClaimLost:
            told.errors["claim_lost"] += 1
        except FabricError as error:
            told.errors[f"complete: {error.code}"] += 1
            told.unknown[account] += cost
            return
        if claim.unsent:  # the SDK charges what a lost claim has cost, if it can
            told.unknown[account] += cost
        else:
            self._charged(client, claim.hold_id or claim_hold(claim.task, claim.fence), account, cost)

    async def _step(self, client: Client, claim: Claim, account: str, cost: int) -> None:
        """A call that is paid for by itself."""
        hold = claim.hold(2 * cost, step="call")
        try:
            async with hold:
                hold.cost_micro_usd = cost
        finally:
            if hold.charged is not None:
                self._charged(client, hold.name, account, hold.charged.charged)
            elif hold.cost_micro_usd is not None:  # it was held, and then the answer to its charge did not come
                self._told.unknown[account] += cost

    def _charged(self, client: Client, hold: str, account: str, cost: int) -> None:
        self._told.charges.append(Charge(monotonic(), client.session, hold, account, cost))

    @staticmethod
    def _account(client: Client) -> str:
        number = int(client.session.rpartition("-")[2])
        return account_of(f"{ROOT}/team-{number % TEAMS}", client.session)

    # -- new tasks ----------------------------------------------------------------------------------------------------

    async def _submit(self, client: Client) -> None:
        made = 0
        while self._submitting:
            short = made - len(self._told.grants) < AHEAD
            batch = [wire.TaskSpec(id=f"new/{made + n:06d}") for n in range(wire.SUBMIT_MAX_TASKS if short else FEW)]
            try:
                await client.submit(batch)
            except FabricError as error:
                self._told.errors[f"submit: {error.code}"] += 1
                await asyncio.sleep(PAUSE_S)
                continue  # the same again: what was carried out is not done twice
            now = monotonic()
            self._told.submitted += ((now, task.id) for task in batch)
            made += len(batch)
            await asyncio.sleep(PAUSE_S)
