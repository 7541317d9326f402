"""Daemons inside a test: the runtime around one actor, over any store and bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import structlog

from ifabric.actor.base import Actor, Context
from ifabric.actor.pulse import Pulse
from ifabric.actor.runner import Runner
from ifabric.bus.base import Bus
from ifabric.clock import Clock, SystemClock
from ifabric.config import Config, Coordinator
from ifabric.metrics import Metrics
from ifabric.store.base import Store
from ifabric.store.commit import Committer


class Daemon:
    """One actor with all that a daemon gives it, but the processes and ports."""

    def __init__(
        self, actor: type[Actor], store: Store, bus: Bus, clock: Clock | None = None, **coordinator: object
    ) -> None:
        self.clock = clock or SystemClock()
        self.store = store
        self.bus = bus
        self.metrics = Metrics()
        self.actors: list[Actor] = []
        self.pulse = Pulse(self.clock)
        self.committer = Committer(store, self.clock, self.metrics, timeout_s=2.0)
        self._class = actor
        self._settings = Config(coordinator=msgspec.convert(coordinator, Coordinator))
        self.runner: Runner | None = None

    async def start(self, **limits: float) -> Daemon:
        """Starts it; `limits` are the runner's."""
        await self.committer.start()
        await self.pulse.start()
        context = Context(
            store=self.store,
            bus=self.bus,
            committer=self.committer,
            clock=self.clock,
            metrics=self.metrics,
            config=self._settings.section(self._class.component),
            settings=self._settings,
            log=structlog.get_logger(),
        )

        def make(given: Context) -> Actor:
            self.actors.append(self._class(given))
            return self.actors[-1]

        self.runner = Runner(make, self._class, context, self.pulse, **limits)  # type: ignore[arg-type]
        await self.runner.start()
        return self

    @property
    def actor(self) -> Actor:
        """The present instance."""
        return self.actors[-1]

    async def stop(self) -> None:
        """Drains and stops."""
        if self.runner is not None:
            await self.runner.stop()
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
