"""The runs that are on: this daemon's by name, and the long ones of all daemons in etcd, where an operator finds them.

A run is entered when it has lasted a second, on the lease that says that its daemon lives; an operator who wants it
ended writes so beside it, and whichever daemon has it, ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from ifabric.actor.base import Context
from ifabric.actor.feed import Feed
from ifabric.actor.receipts import Leases
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import rfc3339
from ifabric.errors import FabricError, Killed, Unavailable, UnknownRun
from ifabric.store.base import KV, Delete, Get, Got, Put, Txn, prefix_end, present, record
from ifabric.store.session import Session
from ifabric.wire import chassis as wire
from ifabric_actors.chassis import records
from ifabric_actors.chassis.pool import Job

ENTER_AFTER_S = 1.0
LEASE_S = 15
#: how long an operator's word is kept, and how long one who said it waits for the end
KILL_S, PATIENCE_S = 60, 5.0
LIST_MAX = 1000


class Register:
    """One daemon's runs, and the way to the others'."""

    def __init__(self, context: Context) -> None:
        self._store, self._clock, self._log = context.store, context.clock, context.log
        self.daemon = context.clock.token()
        self._jobs: dict[str, Job] = {}
        #: of each run, what enters it: a timer first
        self._entries: dict[str, asyncio.TimerHandle | asyncio.Task[None]] = {}
        self._session: Session | None = None
        self._words = Leases(context.store, context.clock, keep_s=KILL_S)
        self._feed = Feed(context.store, (records.KILLS,), {records.KILLS: _Kills(self)})

    async def start(self) -> None:
        """Says that this daemon lives."""
        await self._renew()
        await self._feed.load()

    async def stop(self) -> None:
        """Says that it does not."""
        for entry in self._entries.values():
            entry.cancel()
        await cancel_and_wait(*(entry for entry in self._entries.values() if isinstance(entry, asyncio.Task)))
        await self._feed.stop()
        await self._words.stop()
        if self._session is not None:
            await self._session.close()

    async def follow(self) -> None:
        """Never returns: hears operators."""
        await self._feed.follow()

    async def keep(self) -> None:
        """Never returns: says that this daemon lives, also after etcd could not be reached for long."""
        while True:
            assert self._session is not None, "it was started"
            await asyncio.wait({self._session.lost})
            try:
                await self._renew()
            except FabricError as error:
                self._log.warning("the register of runs could not be renewed", why=str(error))
                await self._clock.sleep(self._clock.jitter(0.5, 1.5))

    async def _renew(self) -> None:
        if self._session is not None:
            await self._session.orphan()
        self._session = session = Session(self._store, self._clock, LEASE_S)
        await session.__aenter__()
        await self._store.txn(Txn((), (Put(records.key(records.DAEMONS, self.daemon), b"{}", session.lease),)))

    # -- this daemon's runs

    def enter(self, run: str, job: Job, entry: records.Running) -> None:
        """A run begins."""
        self._jobs[run] = job
        self._entries[run] = asyncio.get_running_loop().call_later(ENTER_AFTER_S, self._now_long, run, entry)

    async def leave(self, run: str) -> None:
        """A run is over."""
        self._jobs.pop(run, None)
        entry = self._entries.pop(run)
        if not isinstance(entry, asyncio.Task):
            entry.cancel()
            return
        await cancel_and_wait(entry)
        try:
            await self._store.txn(Txn((), (Delete(records.key(records.RUNS, run)),)))
        except FabricError as error:  # it goes with the daemon's lease
            self._log.info("a run could not be taken out of the register", run=run, why=str(error))

    def kill(self, run: str, word: records.Kill) -> None:
        """An operator wants it ended, if it is this daemon's."""
        job = self._jobs.get(run)
        if job is not None:
            job.end(
                Killed(f"{word.by} ended the run" + (f": {word.why}" if word.why else ""), by=word.by, why=word.why)
            )

    def _now_long(self, run: str, entry: records.Running) -> None:
        self._entries[run] = asyncio.create_task(self._enter(run, entry), name="chassis register")

    async def _enter(self, run: str, entry: records.Running) -> None:
        assert self._session is not None, "it was started"
        put = Put(records.key(records.RUNS, run), records.value(entry), self._session.lease)
        try:
            await self._store.txn(Txn((present(records.key(records.DAEMONS, self.daemon)),), (put,)))
        except FabricError as error:
            self._log.info("a run could not be entered into the register", run=run, why=str(error))

    # -- all daemons'

    async def list(self) -> tuple[wire.RunLine, ...]:
        """The long runs there are, the oldest first."""
        got, _ = await self._store.range(records.RUNS, prefix_end(records.RUNS), limit=LIST_MAX)
        now = self._clock.wall_ms()
        found = sorted((record(records.running, kv) for kv in got.kvs), key=lambda one: one.at)
        return tuple(
            wire.RunLine(
                run=one.run,
                session=one.session,
                module=one.module,
                since=rfc3339(one.at),
                age_s=max(0, now - one.at) / 1000,
                wall_left_s=max(0, one.ends - now) / 1000,
                task=one.task,
                daemon=one.daemon,
            )
            for one in found
        )

    async def end(self, run: str, word: records.Kill) -> records.Running:
        """Has a run ended, wherever it is, and waits for it. `UnknownRun`; `Unavailable` when nobody ended it in time."""
        entry = records.key(records.RUNS, run)
        put = Put(records.key(records.KILLS, run), records.value(word), await self._words.current())
        found = (await self._store.txn(Txn((present(entry),), (put, Get(entry)), (Get(entry),)))).answers[-1]
        assert isinstance(found, Got)
        if not found.kvs:
            raise UnknownRun(f"no run {run} has lasted longer than a second; nothing was ended", run=run)
        until = self._clock.monotonic() + PATIENCE_S
        while await self._store.get(entry) is not None:
            if self._clock.monotonic() > until:
                raise Unavailable(f"run {run} has not ended yet; its daemon does not answer", what="chassis")
            await self._clock.sleep(0.02)
        return record(records.running, found.kvs[0])


class _Kills:
    """Hears operators' words."""

    def __init__(self, register: Register) -> None:
        self._register = register
        self._known: set[bytes] = set()

    def take(self, kv: KV) -> Any:
        self._known.add(kv.key)
        word = record(records.kill, kv)
        self._register.kill(kv.key.removeprefix(records.KILLS).decode(), word)
        return word

    def gone(self, key: bytes, revision: int) -> None:
        self._known.discard(key)

    def known(self) -> Iterable[bytes]:
        return self._known
