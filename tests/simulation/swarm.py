"""A swarm in one process: coordinators over the twins, agents, faults, all on virtual time and one seed."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import dataclass
from typing import Any

from ifabric.errors import FabricError
from ifabric.store.base import Put, Txn
from ifabric.testing.clock import VirtualClock
from ifabric.testing.harness import Daemon
from ifabric.testing.memory_bus import MemoryBus
from ifabric.testing.memory_store import MemoryEtcd
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.governor.actor import Governor
from ifabric_actors.governor.records import Account, account_key, encode
from tests.simulation.agents import Agent, Ledger
from tests.simulation.checker import settled, violations
from tests.simulation.money import LIMIT, ORG, SESSION_LIMIT
from tests.simulation.network import SimulatedHub, SimulatedStore, Weather

DAEMONS, AGENTS = 3, 5
#: of virtual time: with faults, and at most without
STORM_S, CALM_S = 30.0, 90.0

TASKS: list[dict[str, Any]] = [
    *({"id": f"free{n}", "max_attempts": 1000} for n in range(5)),
    {"id": "after", "depends_on": ["free0"], "max_attempts": 1000},
    {"id": "long-after", "depends_on": ["after", "free1"], "max_attempts": 1000},
    {"id": "limited", "deadline_s": 2, "max_attempts": 1000},
    {"id": "fragile", "max_attempts": 3},
    {"id": "urgent", "priority": 5, "max_attempts": 1000},
]


@dataclass
class Verdict:
    """What a run has shown. `wrong` is empty when all is well."""

    seed: int
    wrong: list[str]
    requests: int
    commits: int
    #: of all that was asked and told: two runs of one seed are the same to the letter
    digest: str

    def __str__(self) -> str:
        lines = "\n  ".join(self.wrong[:10])
        return f"seed {self.seed} (replay with IFABRIC_SEED={self.seed}):\n  {lines}"


class Host:
    """A place where a daemon runs, is killed, and runs again."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.daemon: Daemon | None = None
        self.store: SimulatedStore
        self._ending: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Tries until there is an etcd to start with."""
        sim = self._simulation
        while self.daemon is None:
            self.store = SimulatedStore(sim.weather, sim.etcd)
            bus = MemoryBus(sim.hub)
            await self.store.connect()
            await bus.connect()
            daemon = Daemon(
                (Coordinator, Governor),
                self.store,
                bus,
                sim.clock,
                governor={"budget": {"default_session_budget": f"0.{SESSION_LIMIT:06}"}},
                reconcile_interval_seconds=0.7,
                task_claim_ttl_seconds=3,
            )
            try:
                await daemon.start(drain_timeout_s=2.0)
            except FabricError:
                await _end(daemon, self.store)
                await sim.clock.sleep(0.2)
                continue
            self.daemon = daemon
            self._watch = asyncio.ensure_future(self._supervise(daemon))

    async def _supervise(self, daemon: Daemon) -> None:
        """A crash that nobody ordered is the daemon's own, and a finding."""
        either: list[asyncio.Future[Any]] = [daemon.committer.lost]
        for runner in daemon.runners:
            assert runner.lost is not None
            either.append(runner.lost)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        why = next(one.result() for one in either if one.done())
        self._simulation.crashes.append(f"a daemon crashed by itself: {why}")

    def kill(self) -> None:
        """As SIGKILL does it: from one moment to the next it neither hears nor says anything."""
        daemon, self.daemon = self.daemon, None
        if daemon is None:
            return
        if self._watch is not None:
            self._watch.cancel()
        self.store.down = True
        daemon.bus.disconnect()  # type: ignore[attr-defined]
        hub = self._simulation.hub
        hub.interests = [one for one in hub.interests if one.bus is not daemon.bus]
        self._ending.append(asyncio.ensure_future(_end(daemon, self.store)))

    async def stop(self) -> None:
        """As SIGTERM does it."""
        daemon, self.daemon = self.daemon, None
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if daemon is not None:
            await _end(daemon, self.store)
        await asyncio.gather(*self._ending)


async def _end(daemon: Daemon, store: SimulatedStore) -> None:
    await daemon.stop()
    await store.close()
    await daemon.bus.close()


class Simulation:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.clock = VirtualClock(seed)
        self.weather = Weather(seed, self.clock)
        self.etcd = MemoryEtcd(self.clock)
        self.hub = SimulatedHub(self.weather)
        self.ledger = Ledger()
        self.crashes: list[str] = []
        self._hosts = [Host(self) for _ in range(DAEMONS)]

    async def run(self) -> Verdict:
        """Faults first, and nothing wrong may happen; then none, and everything must settle."""
        return await self.clock.run(self._run())

    async def _run(self) -> Verdict:
        self.weather.faulty = False
        for host in self._hosts:
            await host.start()
        bus = MemoryBus(self.hub)
        await bus.connect()
        agents = [
            Agent(f"agent{n}", self.weather, bus, self.ledger, [task["id"] for task in TASKS]) for n in range(AGENTS)
        ]
        self.weather.faulty = True
        await self._set_limit()
        submitted = await agents[0].ask("submit", tasks=TASKS)
        while submitted.code != "ok":
            submitted = await agents[0].ask("submit", tasks=TASKS)
        living = [asyncio.ensure_future(agent.live()) for agent in agents]
        await self._trouble(self.clock.monotonic() + STORM_S)
        await self._calm(agents)
        left = await self._settle()
        for task in living:
            task.cancel()
        ended = await asyncio.gather(*living, return_exceptions=True)
        broken = [f"an agent failed: {one!r}" for one in ended if not isinstance(one, asyncio.CancelledError)]
        for host in self._hosts:
            await host.stop()
        await asyncio.gather(*self.weather.late)
        await bus.close()
        wrong = broken + self.crashes + violations(self.ledger.calls, self.etcd)
        if left:
            wrong.append(f"{CALM_S:g} s after the last fault not settled: {left}")
        requests = sum(len(call.attempts) for call in self.ledger.calls)
        digest = hashlib.sha256(repr(self.ledger.calls).encode()).hexdigest()
        return Verdict(self.seed, wrong, requests, self.etcd.revision, digest)

    async def _set_limit(self) -> None:
        """What an operator did before the storm."""
        account = Account(limit=LIMIT, by="operator")
        self.etcd.txn(Txn((), (Put(account_key(ORG), encode(account)),)))

    async def _calm(self, agents: list[Agent]) -> None:
        self.weather.faulty = False
        for host in self._hosts:
            host.store.down, host.store.behind_s = False, 0.0
            if host.daemon is None:
                await host.start()
        for agent in agents:
            agent.calm = True

    async def _settle(self) -> dict[str, str]:
        """What has not settled when time is up."""
        until = self.clock.monotonic() + CALM_S
        while (left := settled(self.etcd)) and self.clock.monotonic() < until:
            await self.clock.sleep(1.0)
        return left

    async def _trouble(self, until: float) -> None:
        """Hurts one thing after the other."""
        chance = self.weather.chance
        while self.clock.monotonic() < until:
            await self.clock.sleep(chance.uniform(0.3, 1.5))
            host = chance.choice(self._hosts)
            drawn = chance.random()
            if host.daemon is None:
                await host.start()
            elif drawn < 0.25:
                host.kill()
                await self.clock.sleep(chance.uniform(0.0, 2.0))
                await host.start()
            elif drawn < 0.3:
                await host.stop()
            elif drawn < 0.5:
                await self._down([host], chance.uniform(0.2, 4.0))
            elif drawn < 0.6:
                await self._down(self._hosts, chance.uniform(0.2, 4.0))
            elif drawn < 0.9:
                host.store.behind_s = chance.choice([0.0, 0.3, 1.0, 3.0])
            else:
                self.etcd.compact(self.etcd.revision)

    async def _down(self, hosts: list[Host], seconds: float) -> None:
        stores = [host.store for host in hosts if host.daemon is not None]
        for store in stores:
            store.down = True
        await self.clock.sleep(seconds)
        for store in stores:
            store.down = False


async def simulate(seed: int) -> Verdict:
    """One run, and nothing left behind."""
    return await Simulation(seed).run()


def seeds(first: int, count: int) -> list[int]:
    """Those seeds, or the one that `IFABRIC_SEED` says."""
    given = os.environ.get("IFABRIC_SEED")
    return [int(given)] if given else list(range(first, first + count))
