"""Money among real processes that are killed and frozen: nothing overspent, nothing leaked, nothing lost or charged twice.

Three daemons share the load of many spenders, under limits that bind: what is held comes up against the organisation's
limit, the teams' and some sessions' all the time. Afterwards every revision that etcd went through is judged
(`auditor`), and so is what each caller was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import monotonic
from ifabric.embedded import die_with_parent
from ifabric.testing.daemons import RealDaemon
from ifabric_actors.coordinator import records as board
from ifabric_actors.governor import records
from tests.system.auditor import Auditor, Change, Said
from tests.system.conftest import Cluster, eventually
from tests.system.spenders import ORG, TEAMS, TTL_S, Spender

pytestmark = pytest.mark.slow

SPENDERS = 64
DRAWN = 20_000
#: 64 spenders that hold 100,000 each on average would hold 6,400,000, and what they leave to die besides
ORG_LIMIT, TEAM_LIMIT, SESSION_LIMIT = 7_000_000, 1_100_000, 260_000
#: the config's default_session_budget
SESSION_DEFAULT = 40_000_000
DRAWS = ("reserve: ok", "spend: ok", "claim: ok")
ROOT = Path(__file__).parents[2]


async def capped(cluster: Cluster) -> int:
    """Sets the limits; the revision before."""
    _, revision = await cluster.store.range(b"nothing", b"nothinh")
    limits: list[tuple[str, int]] = [(ORG, ORG_LIMIT), *((f"{ORG}/team{n}", TEAM_LIMIT) for n in range(TEAMS))]
    for account, limit in limits:
        await limited(cluster, account, limit)
    return revision


async def limited(cluster: Cluster, account: str, limit: int | None) -> None:
    await cluster.ask(
        "account", "operator", component="governor", admin=True, account=account, limit_micro_usd=limit, timeout_s=5.0
    )


class Spenders:
    """Spenders within the test, and all that they were told."""

    def __init__(self, cluster: Cluster, number: int = SPENDERS) -> None:
        self._cluster = cluster
        self.told: dict[tuple[str, int], Said] = {}
        self.all = [Spender(cluster.bus, f"s{n}", n, self.told.__setitem__) for n in range(number)]
        self._enough = 0
        self._running: list[asyncio.Task[None]] = []

    async def start(self) -> Spenders:
        """Some sessions have a limit of their own, the others the default one."""
        for number, spender in enumerate(self.all):
            if number % 4 == 0:
                await limited(self._cluster, f"{spender.account}/@{spender.session}", SESSION_LIMIT)
        self._enough = 1 << 60
        self._running = [asyncio.create_task(one.work(lambda: self.drawn < self._enough)) for one in self.all]
        self._cluster.closing.push_async_callback(cancel_and_wait, *self._running)
        return self

    @property
    def counts(self) -> Counter[str]:
        return sum((one.counts for one in self.all), Counter())

    @property
    def drawn(self) -> int:
        """Reservations that were granted: holds, claims with one, and spends at once."""
        return sum(one.counts[draw] for one in self.all for draw in DRAWS)

    async def reach(self, drawn: int, within_s: float = 300.0) -> None:
        async def reached() -> bool:
            for task in self._running:
                if task.done():
                    task.result()
            return self.drawn >= drawn

        await eventually(reached, within_s)

    async def stop(self) -> None:
        self._enough = 0
        async with asyncio.timeout(90):
            await asyncio.gather(*self._running)
        assert [wrong for one in self.all for wrong in one.wrong] == []


async def at_rest(cluster: Cluster, within_s: float) -> float:
    """Waits until every session has ended and nothing is held; how long that took."""
    began = monotonic()

    async def nothing() -> bool:
        sessions, _ = await cluster.store.range(board.SESSIONS, board.SESSIONS[:-1] + b"0")
        if sessions.kvs:
            return False
        tallies, _ = await cluster.store.range(records.TALLIES, records.TALLIES[:-1] + b"0")
        return not any(records.tally(kv).held for kv in tallies.kvs)

    with contextlib.suppress(TimeoutError):  # the auditor says then what is still held
        await eventually(nothing, within_s)
    return monotonic() - began


async def audited(cluster: Cluster, after: int, told: dict[tuple[str, int], Said]) -> Auditor:
    """The history since a revision, judged at every revision of it, and what callers were told."""
    _, until = await cluster.store.range(b"nothing", b"nothinh")
    changes: dict[int, list[Change]] = {}

    async def ask_for_progress() -> None:
        while True:
            await cluster.store.progress()
            await asyncio.sleep(0.05)

    asking = asyncio.create_task(ask_for_progress())
    watch = cluster.store.watch((records.GOVERNOR, board.TASKS), after_revision=after)
    try:
        async with asyncio.timeout(60), contextlib.aclosing(watch) as batches:  # type: ignore[type-var]
            async for batch in batches:
                assert not batch.resync, "the past was compacted away"
                for kv, deleted, _ in batch.events:
                    if kv.mod_revision <= until:
                        change = Change(kv.key, None if deleted else kv.value)
                        changes.setdefault(kv.mod_revision, []).append(change)
                if batch.revision >= until:
                    break
    finally:
        await cancel_and_wait(asking)
    auditor = Auditor(default_session_micro_usd=SESSION_DEFAULT)
    for revision in sorted(changes):
        auditor.take(revision, changes[revision])
    auditor.at_rest()
    auditor.compare(told.values())
    assert auditor.found == [], "\n".join([f"{len(auditor.found)} violations:", *auditor.found[:20]])
    return auditor


def figures(title: str, spenders: Spenders, auditor: Auditor, took_s: float, rest_s: float) -> str:
    """What was measured."""
    counts = spenders.counts
    overdraft = sum(tally.overdraft for (name, _), tally in auditor.tallies.items() if name == ORG)
    return (
        f"\n{title}: {spenders.drawn} reservations drawn by {len(spenders.all)} spenders in {took_s:.0f} s, over "
        f"{auditor.revisions} revisions; nothing held any more {rest_s:.1f} s after the last; the organisation's limit "
        f"used to {auditor.fullest[ORG]:.4f} (overdraft {overdraft})\n    {dict(sorted(counts.items()))}"
    )


@contextlib.asynccontextmanager
async def repeatedly(act: Callable[[int], Awaitable[None]]) -> AsyncIterator[list[float]]:
    """Does something again and again until the block is left; when it did."""
    times: list[float] = []
    leaving = asyncio.Event()

    async def loop() -> None:
        while not leaving.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):  # how long things go well
                    await leaving.wait()
                return
            await act(len(times))
            times.append(monotonic())

    looping = asyncio.create_task(loop())
    try:
        yield times
        leaving.set()
        await looping
    finally:
        await cancel_and_wait(looping)


def binds(counts: Counter[str]) -> None:
    """The load was what it is meant to be: every limit was met, and every kind of end took place."""
    missing = [what for what in ("short: org", "short: team", "short: session", "void: ok", "commit: ok", "commit: late",
                                 "complete: ok", "answered twice") if not counts[what]]  # fmt: skip
    assert missing == [], counts


async def test_no_micro_usd_is_overspent_lost_or_leaked_while_daemons_are_killed(cluster: Cluster) -> None:
    daemons = await cluster.many(3)
    before = await capped(cluster)
    began = monotonic()

    async def kill_one(number: int) -> None:
        daemon = daemons[number % 3]
        await daemon.kill()
        await daemon.start()

    spenders = await Spenders(cluster).start()
    async with repeatedly(kill_one) as kills:
        await spenders.reach(DRAWN)
        await spenders.stop()
    took_s = monotonic() - began
    rest_s = await at_rest(cluster, TTL_S + 10.0)
    binds(spenders.counts)
    # the caps of the teams are lifted, and what is left of the organisation's is taken to the last micro-USD
    for number in range(TEAMS):
        await limited(cluster, f"{ORG}/team{number}", None)
    unlimited = spenders.all[1::4]
    for spender in unlimited:
        await spender.hello()

    async def take_all() -> None:
        await asyncio.gather(*(spender.take_the_rest(300_000) for spender in unlimited))

    assert await unlimited[0].overspend(take_all, by=777)
    auditor = await audited(cluster, before, spenders.told)
    org, over = auditor.tallies[ORG, "total"], auditor.accounts[ORG].limit
    assert (org.spent, over) == (ORG_LIMIT + 777, ORG_LIMIT), "spent to the last micro-USD, and then what it did cost"
    assert len(kills) >= 5, kills
    print(figures(f"a daemon killed {len(kills)} times", spenders, auditor, took_s, rest_s))


async def test_a_daemon_that_was_frozen_charges_nothing_twice_when_it_wakes(cluster: Cluster) -> None:
    daemons = await cluster.many(3)
    before = await capped(cluster)
    began = monotonic()
    spenders = await Spenders(cluster).start()
    await spenders.reach(600)
    daemons[0].freeze()
    await asyncio.sleep(5.0)  # how long the fault lasts
    daemons[0].thaw()
    await spenders.reach(spenders.drawn + 600)
    await serves_again(daemons[0])
    await spenders.stop()
    took_s = monotonic() - began
    rest_s = await at_rest(cluster, TTL_S + 10.0)
    auditor = await audited(cluster, before, spenders.told)
    print(figures("1 of 3 daemons frozen for 5 s", spenders, auditor, took_s, rest_s))


async def serves_again(daemon: RealDaemon) -> None:
    """It answers requests about money."""
    served = await daemon.metric("if_actor_messages_total", actor="governor", outcome="ok")

    async def more() -> bool:
        return await daemon.metric("if_actor_messages_total", actor="governor", outcome="ok") > served

    await eventually(more)


async def test_an_etcd_that_was_frozen_costs_time_and_no_money(fragile: Cluster) -> None:
    await fragile.many(3)
    before = await capped(fragile)
    began = monotonic()
    spenders = await Spenders(fragile).start()
    await spenders.reach(600)
    fragile.etcd.freeze()
    await asyncio.sleep(2.0)  # how long the fault lasts
    fragile.etcd.thaw()
    await spenders.reach(spenders.drawn + 1_000)
    await spenders.stop()
    took_s = monotonic() - began
    rest_s = await at_rest(fragile, TTL_S + 10.0)
    auditor = await audited(fragile, before, spenders.told)
    print(figures("etcd frozen for 2 s", spenders, auditor, took_s, rest_s))


# -- agents that die ------------------------------------------------------------------------------------------------------


class Agents:
    """One process of spenders, until it is killed. `told` outlives it."""

    def __init__(self, nats: str, first: int, number: int, told: dict[tuple[str, int], Said]) -> None:
        self._arguments = (nats, str(first), str(number))
        self._told = told

    async def start(self) -> Agents:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.system.spenders", *self._arguments),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=die_with_parent,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # the last one may have been cut off
                (session, number), said = msgspec.json.decode(line, type=tuple[tuple[str, int], Said])
                self._told[session, number] = said

    async def kill(self) -> None:
        assert self._process.returncode is None, "it was at work until now"
        self._process.kill()
        await self._process.wait()
        await self._reading

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading


async def test_what_dead_agents_held_is_free_after_their_time_to_live(cluster: Cluster) -> None:
    await cluster.many(3)
    before = await capped(cluster)
    told: dict[tuple[str, int], Said] = {}
    each, living, started = 16, list[Agents](), 0

    async def another() -> None:
        nonlocal started
        made = Agents(cluster.nats.url, started * each, each, told)
        started += 1
        cluster.closing.push_async_callback(made.close)
        living.append(await made.start())

    for _ in range(4):
        await another()

    async def one_dies(number: int) -> None:
        await living.pop(0).kill()
        await another()

    def drawn() -> int:
        return sum(said.outcome == "ok" for said in told.values() if said.verb in ("reserve", "spend", "claim"))

    async def reached() -> bool:
        return drawn() >= 3_000

    async with repeatedly(one_dies) as deaths:
        await eventually(reached, 60.0)
    await asyncio.gather(*(agents.kill() for agents in living))
    held = await held_on(cluster, ORG)
    rest_s = await at_rest(cluster, TTL_S + 3.0)
    auditor = await audited(cluster, before, told)
    outcomes = Counter(f"{said.verb}: {said.outcome}" for said in told.values())
    assert held > 0, "they died holding something"
    assert outcomes["reserve: unknown"] + outcomes["commit: unknown"] > 0, "they died in the middle of something"
    states = Counter(hold.state for hold in auditor.holds.values())
    print(
        f"\nagents killed: {len(deaths) + len(living)} processes of {each} sessions, {drawn()} reservations; "
        f"{held} micro-USD were held when the last died, none {rest_s:.1f} s later (TTL {TTL_S} s)\n"
        f"    holds {dict(states)}\n    {dict(sorted(outcomes.items()))}"
    )


async def held_on(cluster: Cluster, account: str) -> int:
    kv: Any = await cluster.store.get(records.tally_key(account, "total"))
    return records.tally(kv).held
