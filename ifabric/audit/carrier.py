"""Carries records from the spool into the stream, in order, and tells etcd how far they are.

Whatever fails is tried again: JetStream that is away, a stream that is full, an etcd without a quorum. Records wait on
disk meanwhile, and nobody else waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from ifabric.audit.chain import key_of
from ifabric.audit.heads import Heads
from ifabric.audit.spool import Mark, Row, left_behind
from ifabric.bus.base import Bus, Journal, JournalSpec
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.metrics import Metrics
from ifabric.wire import subjects
from ifabric.wire.audit import hash_of, message_id

#: records that come this close together are appended together: they are safe on disk, and each append has its costs
GATHER_S: Final = 0.1
BATCH_BYTES: Final = 256 << 10
BATCH_MAX: Final = 512
LOOK_S: Final = 1.0
#: how often etcd is told, the stream measured, and old heads are looked for
HEAD_S: Final = 10.0
MEASURE_S: Final = 30.0
FORGET_S: Final = 3600.0
#: at the end: for the stream to take the last records, and for etcd to hear of it
STOP_S, LAST_HEAD_S = 3.0, 2.0
#: trouble that is shorter is nobody's business
TROUBLE_S: Final = 5.0
DAY_S: Final = 86_400


class Carrier:
    """For one life: of this life's row, after those that earlier ones have left."""

    def __init__(
        self,
        row: Row,
        folder: Path,
        spec: JournalSpec,
        heads: Heads,
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        *,
        flush: Callable[[], None],
        say: Callable[..., None],
    ) -> None:
        self._row, self._folder, self._spec, self._heads, self._bus, self._clock = row, folder, spec, heads, bus, clock
        self._flush, self._say = flush, say
        #: of earlier lives: what the stream does not have, and what etcd is to be told of
        self._left = self._found()
        self._brought: list[Row] = []
        newest = {row.chain: row.newest() for row in self._left}
        self._left_until = {chain: n for chain, (n, _) in newest.items()}
        self._left_since = min((since for _, since in newest.values() if since), default="")
        #: on disk, of all rows
        self.size = 0
        self._weigh()
        #: there is more; the number that is waited for, and that it has come
        self.more = asyncio.Event()
        self._until = -1
        self._reached = asyncio.Event()
        self._journal: Journal | None = None
        self._trouble: tuple[str, float] | None = None
        self._stored = metrics.counter("if_audit_stored_total")
        self._stream_bytes = metrics.gauge("if_audit_stream_bytes")
        self._stream_max_bytes = metrics.gauge("if_audit_stream_max_bytes")
        self._tasks: list[asyncio.Task[None]] = []

    def _found(self) -> list[Row]:
        try:
            return [row for row in left_behind(self._folder) if row.chain != self._row.chain]
        except OSError as error:
            self._say("the audit's spool cannot be read", folder=str(self._folder), why=error.strerror)
            return []

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins."""
        self._tasks = [
            asyncio.create_task(self._endlessly(self._store, self._in_trouble), name="audit: store"),
            asyncio.create_task(self._endlessly(self._tell, self._untold), name="audit: tell"),
        ]

    async def finish(self, n: int) -> None:
        """The row has ended with this number: gives the stream a moment to take it, etcd to hear of it, and stops.

        What could not be brought stays on disk, for the next life.
        """
        self._until = n
        self.more.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S if self._bus.connected else 0):
                await self._reached.wait()
        await cancel_and_wait(*self._tasks)
        row, all_of_it = self._row, self._row.mark.n >= n
        try:
            async with asyncio.timeout(LAST_HEAD_S):
                await self._heads.tell(row.chain, row.mark, ended=all_of_it)
            if all_of_it:
                row.remove()
        except (FabricError, TimeoutError, OSError) as error:
            self._say("the audit's last head was not told; the next life does it", why=str(error) or "no answer")
        for one in (row, *self._left, *self._brought):
            one.close()

    async def _endlessly(self, once: Callable[[], Awaitable[None]], tell: Callable[[str], None]) -> None:
        while True:
            try:
                await once()
            except FabricError as error:
                tell(error.message)
            except OSError as error:
                tell(f"the spool cannot be read: {error.strerror}: {error.filename or self._folder}")
            except Exception as error:  # a bug: the audit waits, and the daemon goes on
                tell(f"it failed: {error!r}")
                self._say("the audit has failed, and is tried again", exc_info=error)
            await self._clock.sleep(self._clock.jitter(0.2, 1.0))

    def _in_trouble(self, why: str) -> None:
        self._trouble = (why, self._trouble[1] if self._trouble is not None else self._clock.monotonic())

    def _untold(self, why: str) -> None:
        self._say("how far the audit is cannot be told to etcd or asked of the stream", why=why)

    @property
    def trouble(self) -> str:
        """Why the stream takes nothing, when that has lasted a while; else ""."""
        lasting = self._trouble is not None and self._clock.monotonic() - self._trouble[1] >= TROUBLE_S
        return self._trouble[0] if lasting and self._trouble is not None else ""

    # -- into the stream ---------------------------------------------------------------------------------------------

    async def _store(self) -> None:
        self._journal = journal = await self._bus.journal(self._spec)
        while self._left:
            await self._drain(journal, self._left[0])
            self._brought.append(self._left.pop(0))
        self._left_since = ""
        while True:
            self._flush()
            await self._drain(journal, self._row)
            self._trouble = None
            if self._row.mark.n == self._until:
                self._reached.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):  # a disk that takes nothing is tried again
                    await self.more.wait()
            self.more.clear()
            await self._clock.sleep(GATHER_S)

    async def _drain(self, journal: Journal, row: Row) -> None:
        """All that the row has."""
        while lines := row.ahead(BATCH_BYTES):
            entries: list[tuple[str, bytes, str]] = []
            length, newest, daemon = 0, b"", ""
            n = row.mark.n
            for line in lines[:BATCH_MAX]:
                length += len(line) + 1
                key = key_of(line)
                if not key or key.chain != row.chain:
                    self._say("something in the spool is no record of the audit", chain=row.chain)
                elif key.n > n:  # else the stream has it
                    entries.append((subjects.audit(key.component, key.verb), line, message_id(key.chain, key.n)))
                    n, newest, daemon = key.n, line, key.daemon
            await journal.append(entries, strictly=True)
            row.pass_over(length)
            if entries:
                self._stored.inc(len(entries))
                try:
                    row.note(Mark(n, hash_of(newest), daemon))
                except OSError as error:  # then some are sent twice after a crash
                    self._say("how far the stream has the audit cannot be noted", why=error.strerror)
            row.sweep()
            self._weigh()

    def _weigh(self) -> None:
        self.size = self._row.size + sum(row.size for row in self._left)

    # -- to etcd, and to whoever asks --------------------------------------------------------------------------------

    async def _tell(self) -> None:
        row, told = self._row, None
        measured = forgotten = -FORGET_S
        while True:
            while self._brought:
                await self._heads.tell(self._brought[0].chain, self._brought[0].mark, ended=True)
                self._brought.pop(0).remove()
            if row.mark != told:
                mark = row.mark
                await self._heads.tell(row.chain, mark)
                told = mark
            now = self._clock.monotonic()
            if now - forgotten >= FORGET_S:
                forgotten = now
                await self._heads.forget(self._spec.max_age_s + DAY_S)
            if self._journal is not None and now - measured >= MEASURE_S:
                measured = now
                size = await self._journal.size()
                self._stream_bytes.set(size.bytes)
                self._stream_max_bytes.set(size.max_bytes)
            await self._clock.sleep(HEAD_S if row.mark.n else 1.0)

    @property
    def left(self) -> int:
        """Records of earlier lives that the stream does not have yet."""
        return sum(max(0, self._left_until[row.chain] - row.mark.n) for row in self._left)

    @property
    def left_s(self) -> float:
        """How old the oldest of them is."""
        if not self._left_since:
            return 0.0
        made = datetime.fromisoformat(self._left_since).timestamp()
        return max(0.0, self._clock.wall_ms() / 1000 - made)
