"""Asks etcd how it is, now and then, so that health is known without any traffic.

Whether the last call was answered the store knows by itself, but on an idle daemon there is no last call: a frozen
etcd would be found by the first agent, and one that came back by nobody. And that etcd is full (NOSPACE) no call says
but a refused write: reads, deletes and keep-alives go on working.
"""

from __future__ import annotations

import asyncio
import contextlib

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.store.base import Store

ASK_S = 1.0


class Vitals:
    """A supervised part. `full` is whether etcd takes no more writes, as of its last answer."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self.full = False

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when asking has ended, which is a bug."""
        return self._lost

    async def start(self) -> None:
        """Begins to ask."""
        self._lost = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name="vitals of etcd")
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Asks no more. Twice is harmless."""
        task, self._task, self._lost = self._task, None, None
        if task is not None:
            await cancel_and_wait(task)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(FabricError):  # the store knows that it was not answered
                self.full = "NOSPACE" in (await self._store.health()).alarms
            await self._clock.sleep(ASK_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(f"{task.get_name()} ended: {None if task.cancelled() else task.exception()!r}")
