"""Asks etcd how it is, now and then, so that health is known without any traffic.

Whether the last call was answered the store knows by itself, but on an idle daemon there is no last call: a frozen
etcd would be found by the first agent, and one that came back by nobody. And that etcd is full (NOSPACE) no call says
but a refused write: reads, deletes and keep-alives go on working.

Now and then it reads as well when the last whole backup was begun: `ifabric backup run`, which may run anywhere and not for
long, leaves word of it in etcd, so that whoever watches the daemons learns of backups that are not made any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.store.base import KV, Store

ASK_S = 1.0
#: when the newest whole backup was begun: seconds since the epoch, in decimal
BACKUP_KEY = b"fabric/backup"
BACKUP_EVERY = 15


class Vitals:
    """A supervised part. `full` is whether etcd takes no more writes, as of its last answer."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self.full = False
        #: how long its last answer took, in seconds; None before the first
        self.latency_s: float | None = None
        #: when the newest whole backup was begun, in seconds since the epoch; 0: never, as far as etcd knows
        self.backup_at_s = 0.0

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
        for times in itertools.count():
            with contextlib.suppress(FabricError):  # the store knows that it was not answered
                asked = self._clock.monotonic()
                self.full = "NOSPACE" in (await self._store.health()).alarms
                self.latency_s = self._clock.monotonic() - asked
                if times % BACKUP_EVERY == 0:
                    self.backup_at_s = _seconds(await self._store.get(BACKUP_KEY))
            await self._clock.sleep(ASK_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(f"{task.get_name()} ended: {None if task.cancelled() else task.exception()!r}")


def _seconds(kv: KV | None) -> float:
    """Whoever may write there may write anything: what is no number is no backup."""
    if kv is None or not re.fullmatch(rb"[0-9]{1,12}", kv.value):
        return 0.0
    return float(kv.value)
