"""Daemons inside a test: the runtime around one actor, over any store and bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from ifabric.actor.base import Actor, Context, Parts
from ifabric.actor.pulse import Pulse
from ifabric.actor.runner import Runner
from ifabric.bus.base import Bus
from ifabric.clock import Clock, SystemClock
from ifabric.config import Config, Coordinator, Governor
from ifabric.config_chassis import Chassis
from ifabric.handling import Tracer, Witness
from ifabric.metrics import Metrics
from ifabric.store.base import Store
from ifabric.store.commit import Committer


class Daemon:
    """Actors with all that a daemon gives them, but the processes and ports. `governor` and `chassis` are
    sections, the other settings are the coordinator's.
    """

    def __init__(
        self,
        actors: type[Actor] | Sequence[type[Actor]],
        store: Store,
        bus: Bus,
        clock: Clock | None = None,
        governor: Mapping[str, object] | None = None,
        chassis: Mapping[str, object] | None = None,
        state_dir: Path | None = None,
        tracer: Tracer | None = None,
        **coordinator: object,
    ) -> None:
        self.clock = clock or SystemClock()
        self.store = store
        self.bus = bus
        self.metrics = Metrics()
        self.actors: list[Actor] = []
        self.pulse = Pulse(self.clock)
        self.committer = Committer(store, self.clock, self.metrics, timeout_s=2.0)
        self._classes = [actors] if isinstance(actors, type) else list(actors)
        self._settings = Config(
            coordinator=msgspec.convert(coordinator, Coordinator),
            governor=msgspec.convert(governor or {}, Governor),
            chassis=msgspec.convert(chassis or {}, Chassis),
            state_dir=None if state_dir is None else str(state_dir),
        )
        self._parts = Parts()
        #: set before `start`
        self.witnesses: tuple[Witness, ...] = ()
        self._tracer = tracer
        #: of the first actor, and of all
        self.runner: Runner | None = None
        self.runners: list[Runner] = []

    async def start(self, **limits: float) -> Daemon:
        """Starts it; `limits` are the runner's."""
        await self.committer.start()
        await self.pulse.start()
        for kind in self._classes:
            runner = self._runner(kind, **limits)
            self.runners.append(runner)
            self.runner = self.runner or runner
            await runner.start()
        return self

    def _runner(self, kind: type[Actor], **limits: float) -> Runner:
        context = Context(
            store=self.store,
            bus=self.bus,
            committer=self.committer,
            clock=self.clock,
            metrics=self.metrics,
            config=self._settings.section(kind.component),
            settings=self._settings,
            log=structlog.get_logger(),
            parts=self._parts,
            witnesses=self.witnesses,
            tracer=self._tracer,
        )

        def make(given: Context) -> Actor:
            self.actors.append(kind(given))
            return self.actors[-1]

        return Runner(make, kind, context, self.pulse, **limits)  # type: ignore[arg-type]

    @property
    def actor(self) -> Actor:
        """The present instance of the first."""
        return next(actor for actor in reversed(self.actors) if isinstance(actor, self._classes[0]))

    async def stop(self) -> None:
        """Drains and stops."""
        for runner in reversed(self.runners):
            await runner.stop()
        await self.pulse.stop()
        await self.committer.stop()

    def counted(self, name: str, **labels: str) -> float:
        """A counter's value."""
        return self.metrics.counter(name, **labels).value


@contextlib.asynccontextmanager
async def no_tasks_left() -> AsyncIterator[None]:
    """Fails when the block leaves a task running."""
    before = asyncio.all_tasks()
    yield
    for _ in range(50):
        left = {task for task in asyncio.all_tasks() - before if not task.done()}
        if not left:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"left running: {sorted(task.get_name() for task in left)}")
