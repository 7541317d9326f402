"""Everything that is supervised keeps to the lifecycle contract; and the stress that says so can fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from ifabric.actor.base import Actor, Context
from ifabric.actor.pulse import Pulse
from ifabric.clock import SystemClock
from ifabric.config import Config
from ifabric.metrics import Metrics
from ifabric.store.commit import Committer
from ifabric.supervision.spec import Branch, Budget, Child, Part, Strategy
from ifabric.supervision.supervisor import Supervisor
from ifabric.testing import lifecycle
from ifabric.testing.clock import VirtualClock
from ifabric.testing.lifecycle import stress, stress_actor
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryStore
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.governor.actor import Governor
from tests.actors.fakes import Stage
from tests.actors.probe import Probe


async def test_a_pulse_keeps_the_contract() -> None:
    await stress(Pulse(VirtualClock()))


async def test_a_runner_keeps_the_contract() -> None:
    stage = Stage(Probe)
    await stress(stage.runner)
    assert stage.bus.sinks == {}
    assert all(actor.stops for actor in stage.actors)


async def test_an_actor_keeps_the_contract() -> None:
    context = Stage(Probe).context
    await stress_actor(lambda: Probe(context))


@pytest.mark.parametrize("kind", [Coordinator, Governor])
async def test_every_resident_keeps_the_contract(kind: type[Actor]) -> None:
    clock = SystemClock()
    store, bus = MemoryStore(clock), MemoryBus(MemoryHub())
    await store.connect()
    await bus.connect()
    metrics = Metrics()
    committer = Committer(store, clock, metrics)
    await committer.start()
    settings = Config()
    context = Context(
        store=store,
        bus=bus,
        committer=committer,
        clock=clock,
        metrics=metrics,
        config=settings.section(kind.component),
        settings=settings,
        log=structlog.get_logger(),
    )
    await stress_actor(lambda: kind(context), rounds=20)
    await committer.stop()
    await store.close()
    await bus.close()


async def test_a_tree_keeps_the_contract() -> None:
    clock = VirtualClock()
    inner = Branch("inner", Strategy.ONE_FOR_ONE, Budget(1, 1.0), (Child("pulse", Pulse(clock)),))
    tree = Branch("tree", Strategy.ONE_FOR_ALL, Budget(1, 1.0), (Child("runner", Stage(Probe).runner), inner))
    await stress(Supervisor(tree, clock))


# -- the stress can fail ----------------------------------------------------------------------------------------------


class Chore:
    """A task, started and stopped; each subclass breaks one sentence of the contract."""

    lost: asyncio.Future[str] | None = None
    task: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(asyncio.Event().wait(), name="chore")

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class NotBeforeStart(Chore):
    async def stop(self) -> None:
        assert self.task is not None, "not started"
        await super().stop()


class NotTwice(Chore):
    async def stop(self) -> None:
        await super().stop()
        assert self.task is None or self.task.get_name() == "chore", "stopped already"
        if self.task is not None:
            self.task.set_name("stopped")


class LeavesItsTask(Chore):
    async def stop(self) -> None:
        """Forgets to."""


class LostAtOnce(Chore):
    async def start(self) -> None:
        await super().start()
        self.lost = asyncio.get_running_loop().create_future()
        self.lost.set_result("bad luck")


class NotWhenCancelled(Chore):
    async def start(self) -> None:
        task = asyncio.create_task(asyncio.Event().wait(), name="chore")
        await asyncio.sleep(0)
        self.task = task  # too late: cancelled before, nobody knows of it


class OnlyOnce(Chore):
    starts = 0

    async def start(self) -> None:
        self.starts += 1
        assert self.starts == 1, "started before"
        await super().start()


class NeverStops(Chore):
    async def stop(self) -> None:
        if self.task is not None:
            await asyncio.Event().wait()


async def test_a_thing_that_keeps_the_contract_passes() -> None:
    await stress(Chore())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (NotBeforeStart, "not started"),
        (NotTwice, "stopped already"),
        (LeavesItsTask, r"round 1 left running: \['chore'\]"),
        (LostAtOnce, "lost at once"),
        (NotWhenCancelled, "left running"),
        (OnlyOnce, "started before"),
        (NeverStops, "stop 1: not done"),
    ],
)
async def test_a_thing_that_breaks_the_contract_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: type[Chore], complaint: str
) -> None:
    monkeypatch.setattr(lifecycle, "PATIENCE_S", 0.05)
    before = asyncio.all_tasks()
    with pytest.raises(AssertionError, match=complaint):
        await stress(wrong())
    left = asyncio.all_tasks() - before
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


class Leaky(Actor):
    """Its chore belongs to nobody."""

    component = "probe"

    async def start(self) -> None:
        self.chore = asyncio.create_task(asyncio.Event().wait(), name="leaked")


async def test_an_actor_that_leaves_a_task_behind_is_found() -> None:
    made: list[Leaky] = []

    def make() -> Leaky:
        made.append(Leaky(Stage(Probe).context))
        return made[-1]

    with pytest.raises(AssertionError, match="leaked"):
        await stress_actor(make)
    made[-1].chore.cancel()
    await asyncio.gather(made[-1].chore, return_exceptions=True)


async def test_a_part_made_of_functions_tells_of_its_end() -> None:
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    chore = Chore()
    part = Part(chore.start, chore.stop, lambda: lost)
    await stress(part)
    lost.set_result("bad luck")
    assert part.lost is lost
    assert Part(chore.start, chore.stop).lost is None


# -- the clock --------------------------------------------------------------------------------------------------------


async def test_sleepers_wake_in_the_order_of_their_moments_and_see_their_own_time() -> None:
    clock = VirtualClock(now_s=0)
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps_s: float) -> None:
        for nap_s in naps_s:
            await clock.sleep(nap_s)
            woken.append((name, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(*about)) for about in (("a", 2.0), ("b", 1.0, 0.5), ("c", 2.0), ("d", 9.0))]
    await clock.advance(3.0)
    assert woken == [("b", 1.0), ("b", 1.5), ("a", 2.0), ("c", 2.0)]
    assert (clock.monotonic(), clock.sleepers) == (3.0, 1)
    assert "wake in (6) s" in repr(clock)
    tasks[3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert clock.sleepers == 0


async def test_a_frozen_clock_wakes_everybody_late() -> None:
    clock = VirtualClock(now_s=0)
    sleeping = asyncio.create_task(clock.sleep(1.0))
    await clock.settle()
    clock.freeze(5.0)
    await clock.settle()
    assert not sleeping.done()
    await clock.advance(0)
    assert sleeping.done()
    assert clock.monotonic() == 5.0


async def test_run_moves_time_as_far_as_needed_and_no_further() -> None:
    clock = VirtualClock(now_s=0)
    await clock.run(clock.sleep(86_400.0), within_s=90_000.0)
    assert clock.monotonic() == 86_400.0
    with pytest.raises(AssertionError, match="not done within 10 s"):
        await clock.run(clock.sleep(11.0), within_s=10.0)
    with pytest.raises(AssertionError, match="nobody sleeps"):
        await clock.run(asyncio.Event().wait())


def test_the_same_seed_brings_the_same_chance() -> None:
    one, two, other = VirtualClock(7), VirtualClock(7), VirtualClock(8)
    drawn = [one.token() for _ in range(1000)]
    assert drawn == [two.token() for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert other.token() not in drawn
    assert {len(token) for token in drawn} == {22}
    jitters = [one.jitter(2.0, 3.0) for _ in range(1000)]
    assert min(jitters) >= 2.0
    assert max(jitters) < 3.0
    assert sum(jitters) / 1000 == pytest.approx(2.5, abs=0.05)
    assert {one.pick("xyz") for _ in range(100)} == set("xyz")


async def test_wall_time_follows_the_same_hand() -> None:
    clock = VirtualClock()
    before_ms = clock.wall_ms()
    await clock.advance(1.5)
    assert clock.wall_ms() - before_ms == 1500
