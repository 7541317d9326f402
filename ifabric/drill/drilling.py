"""The drill, in its order: load, work, back up, work on, lose, restore, reconcile, and look at what there is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ifabric.client import Client
from ifabric.clock import SystemClock, monotonic
from ifabric.drill import evidence
from ifabric.drill.agents import HOLD, ROOT, TEAMS, Agents, Told
from ifabric.drill.evidence import Moments
from ifabric.drill.town import DrillFailed, Town, town
from ifabric.drill.verdict import Facts, Grant, Reconciled, Stale
from ifabric.errors import FabricError
from ifabric.wire import coordinator as wire

#: micro-USD; far from what is spent, so that what is measured is the fabric and not a cap
ROOT_LIMIT, TEAM_LIMIT = 10_000_000_000, 4_000_000_000
LOAD_AT_ONCE = 8
#: how long agents work on after the cluster was reconciled, and how long the last of their requests may take
AFTER_S, LAST_S = 1.0, 15.0
#: until when an agent must have a claim again
BACK_S = 180.0
#: tasks for a holder who sleeps through all of it: nobody else can take them
HELD_BEFORE, HELD_SINCE, SKILL = "held/before-the-backup", "held/since-the-backup", "sleeping"
HOLDER, SUCCESSOR, OPERATOR = "drill-sleeper", "drill-successor", "drill-operator"
TTL_S, TIMEOUT_S = 600, 30.0
FENCE_BITS = 40

#: told what is going on, and how far it is: done, and in all (0: unknown)
Tell = Callable[[str, float, float], None]
#: a step to leave out: for a test of the verdict
Left = Literal["", "reconcile"]


class Plan(NamedTuple):
    """What was asked for."""

    tasks: int
    agents: int
    #: of work in all, half of it before the backup
    seconds: float
    nodes: int
    daemons: int
    everything: bool = False
    leave_out: Left = ""


class Outcome(NamedTuple):
    """What came of it."""

    facts: Facts
    #: seconds to put the tasks on the board
    load_s: float
    #: claims that agents were granted before the loss, and from then on
    claims: tuple[int, int]
    #: how often agents met which error
    errors: dict[str, int]
    #: size of the backup in bytes, and how many keys of etcd are in it
    backup_bytes: int
    backup_keys: int


class _Backup(NamedTuple):
    began: float
    took_s: float
    at: datetime
    bytes: int
    keys: int


async def perform(plan: Plan, folder: Path, tell: Tell) -> Outcome:
    """The whole drill, in `folder`. `DrillFailed` or another `FabricError` when a step of it did not work at all."""
    tell(f"starting {plan.nodes} etcd, {plan.nodes} NATS and {plan.daemons} daemons", 0, 0)
    async with contextlib.AsyncExitStack() as closing:
        scene = await closing.enter_async_context(town(folder, nodes=plan.nodes, daemons=plan.daemons))
        operator, sleeper = [
            await closing.enter_async_context(_client(scene, session)) for session in (OPERATOR, HOLDER)
        ]
        return await _Drill(plan, scene, operator, sleeper, tell).run(closing)


def _client(scene: Town, session: str, **options: Any) -> Client:
    client = Client.connect(
        scene.urls, session=session, capabilities=[SKILL], accepts=[SKILL], ttl_s=TTL_S, timeout_s=TIMEOUT_S, **options
    )
    client.leave_on_exit = False
    return client


class _Drill:
    """One drill."""

    def __init__(self, plan: Plan, scene: Town, operator: Client, sleeper: Client, tell: Tell) -> None:
        self._plan, self._scene, self._tell = plan, scene, tell
        self._operator, self._sleeper = operator, sleeper
        self._told = Told()
        self._limits = {ROOT: ROOT_LIMIT, **{f"{ROOT}/team-{n}": TEAM_LIMIT for n in range(TEAMS)}}
        self._phases: list[tuple[str, float]] = []
        self._stale: list[Stale] = []

    async def run(self, closing: contextlib.AsyncExitStack) -> Outcome:
        plan, scene, told = self._plan, self._scene, self._told
        loaded, load_s = await self._load()
        fences = [await self._hold(HELD_BEFORE)]
        agents = Agents(scene.urls, plan.agents, told)
        closing.push_async_callback(agents.close)
        await agents.start()
        await self._work(plan.seconds / 2)
        seq = await evidence.last_seq(self._operator)
        backup = await self._back_up()
        fences.append(await self._hold(HELD_SINCE))
        await self._work(plan.seconds / 2)

        newest = max(grant.fence for _, grant in told.grants)
        back = told.first_above((newest >> FENCE_BITS) + 1 << FENCE_BITS)
        lost_at_ms = SystemClock().wall_ms()
        loss = monotonic()
        seq_lost = await self._come_back(agents)
        rto_s = await self._first_claim(back, loss)
        reconciled = await self._reconcile()
        await self._refused(fences)
        await asyncio.sleep(AFTER_S)
        await agents.stop(LAST_S)

        self._tell("looking at what there is", 0, 0)
        when = Moments(backup.began, loss)
        journal = await evidence.read_journal(self._operator, seq, seq_lost)
        submitted, completed = await evidence.fates(self._operator, loaded, told, journal, when)
        greeting = await self._operator.hello()
        facts = Facts(
            everything=plan.everything,
            rto_s=rto_s,
            phases=tuple(self._phases),
            backup_age_s=lost_at_ms / 1000 - backup.at.timestamp(),
            backup_s=backup.took_s,
            submitted=submitted,
            completed=completed,
            charges=await evidence.charges(self._operator, told, journal, when),
            accounts=await evidence.accounts(self._operator, told),
            limits=await evidence.limits(self._operator, self._limits),
            incarnations=(newest >> FENCE_BITS, greeting.incarnation),
            grants=tuple(grant for _, grant in told.grants),
            stale=tuple(self._stale),
            reconciled=reconciled,
        )
        before = sum(at < loss for at, _ in told.grants)
        claims = (before, len(told.grants) - before)
        return Outcome(facts, load_s, claims, dict(told.errors), backup.bytes, backup.keys)

    # -- before -------------------------------------------------------------------------------------------------------

    async def _load(self) -> tuple[list[str], float]:
        """Limits, the sleeper's tasks, and so many more; what was put on the board, and how long that took."""
        began = monotonic()
        for account, limit in self._limits.items():
            await self._operator.set_account(account, limit)
        asleep = [wire.TaskSpec(id=task, needs=(SKILL,), labels=(SKILL,)) for task in (HELD_BEFORE, HELD_SINCE)]
        await self._operator.submit(asleep)
        names = [f"load/{number:06d}" for number in range(self._plan.tasks)]
        most, done = wire.SUBMIT_MAX_TASKS, 0
        chunks = iter([names[at : at + most] for at in range(0, len(names), most)])

        async def submit() -> None:
            nonlocal done
            for chunk in chunks:
                await self._operator.submit([wire.TaskSpec(id=name) for name in chunk])
                done += len(chunk)
                self._tell("loading tasks", done, len(names))

        async with asyncio.TaskGroup() as group:
            for _ in range(LOAD_AT_ONCE):
                group.create_task(submit())
        return [*names, HELD_BEFORE, HELD_SINCE], monotonic() - began

    async def _hold(self, task: str) -> int:
        """The sleeper takes a task; its fence."""
        claim = await self._sleeper.claim(task, hold_micro_usd=HOLD)
        self._told.granted(Grant(task, claim.fence))
        return claim.fence

    async def _work(self, seconds: float) -> None:
        began = monotonic()
        while (worked := monotonic() - began) < seconds:
            self._tell("agents at work", worked, seconds)
            await asyncio.sleep(min(0.2, seconds - worked))

    async def _back_up(self) -> _Backup:
        """A backup, made and read to its end while the agents work."""
        self._tell("making a backup", 0, 0)
        began = monotonic()
        config = ("--config", str(self._scene.config))
        made = await self._scene.verb("backup", "run", *config)
        took_s = monotonic() - began
        self._tell("reading the backup to its end", 0, 0)
        seen = await self._scene.verb("backup", "verify", "latest", *config)
        keys = sum(seen["manifest"]["keys"].values())
        return _Backup(began, took_s, datetime.fromisoformat(made["facts"]["at"]), made["facts"]["size"], keys)

    # -- the loss, and the way back -------------------------------------------------------------------------------------

    async def _come_back(self, agents: Agents) -> int:
        """Loses the cluster and restores it; the journal's last position before a daemon was there again."""
        scene, everything = self._scene, self._plan.everything
        self._tell("the cluster is lost", 0, 0)
        await self._phase("killed, and the data deleted", scene.lose(everything=everything))
        agents.no_more_tasks()
        self._tell("restoring", 0, 0)
        await self._phase("daemons stopped", scene.stop_daemons())
        if everything:
            await self._phase("empty nats-servers started", scene.nats.start())
        await self._phase("restored: checked, a new incarnation, members made", scene.restore(everything=everything))
        seq = await evidence.last_seq(self._operator)
        await self._phase("etcd started", scene.etcd.start())
        await self._phase("daemons ready, the last of them", scene.start_daemons())
        return seq

    async def _first_claim(self, back: asyncio.Future[float], loss: float) -> float | None:
        began = monotonic()
        try:
            async with asyncio.timeout(BACK_S):
                rto_s = await back - loss
        except TimeoutError:
            return None
        self._phases.append(("first claim", max(0.0, loss + rto_s - began)))
        return rto_s

    async def _reconcile(self) -> Reconciled | None:
        if self._plan.leave_out == "reconcile":
            return None
        self._tell("charging again what was spent since the backup", 0, 0)
        words = ("reconcile", "--nats", self._scene.urls, "--timeout", "60")
        said = await self._phase("reconciled", self._scene.verb(*words, expected=(0, 1)))
        if "journal" not in said:
            raise DrillFailed(f"`ifabric reconcile` did not work: {said.get('error', {}).get('message', said)}")
        journal = said["journal"]
        return Reconciled(journal["complete"], said["entries"], said["charged_micro_usd"], tuple(journal["gaps"]))

    async def _phase(self, name: str, act: Any) -> Any:
        began = monotonic()
        found = await act
        self._phases.append((name, monotonic() - began))
        return found

    async def _refused(self, fences: list[int]) -> None:
        """The sleeper wakes up and brings back what it holds no more: to a task that is free, and to one with a new holder."""
        for task, fence in zip((HELD_BEFORE, HELD_SINCE), fences, strict=True):
            await self._try(f"complete {task}", task, fence)
        async with _client(self._scene, SUCCESSOR) as successor:
            claim = await successor.claim(HELD_BEFORE)
            self._told.granted(Grant(HELD_BEFORE, claim.fence))
            await self._try(f"complete {HELD_BEFORE}, which is somebody else's now", HELD_BEFORE, fences[0])
            await claim.complete()

    async def _try(self, what: str, task: str, fence: int) -> None:
        code = ""
        try:
            await self._sleeper.complete(task, fence)
        except FabricError as refusal:
            code = refusal.code
        self._stale.append(Stale(what, code))
