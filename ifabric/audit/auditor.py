"""The auditor: makes a record of every command, keeps it on disk, and brings it into the stream IF_AUDIT.

**Before the sender is told.** `witness` chains a record and sets it aside; `flush` writes what was set aside to the spool,
all in one. It is called before the connection sends anything, and at the latest in the loop's next turn: so whoever was
answered has a record, also when the daemon is killed at once, and a thousand answers that leave together cost one write.

**Nothing of this holds up a command.** The stream is appended to in a task of its own; while JetStream is away records
wait in the spool. When the spool is full, or its disk is, records are dropped: they are counted, `/health` says so, and
the next record that has room says how many there were (`fabric.dropped`). A dropped one has no number: the chain goes on.

**A life is a chain.** It begins with `fabric.begun` and ends with `fabric.ended`; one without an end was killed. What a
life has left in the spool is brought into the stream by the next one that has the same state directory. How far the
stream has a chain is told to etcd every few seconds (`ifabric.audit.heads`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from pathlib import Path
from typing import Any, Final

from ifabric.audit.carrier import DAY_S, Carrier
from ifabric.audit.chain import RECORD_MAX_BYTES, Chain
from ifabric.audit.heads import Heads
from ifabric.audit.spool import SEGMENT_BYTES, Row
from ifabric.bus.base import Bus, JournalSpec
from ifabric.clock import Clock, rfc3339
from ifabric.config_ops import Audit
from ifabric.handling import Handling
from ifabric.metrics import Metrics
from ifabric.store.base import Store
from ifabric.wire import subjects
from ifabric.wire.audit import BEGUN, DROPPED, ENDED

#: what may wait in memory while the disk takes nothing
PENDING_MAX_BYTES: Final = 1 << 20
RETRY_S: Final = 0.25
LOGGED_EVERY_S: Final = 60.0
#: for how old the oldest record is that waits: moments are kept this far apart, and so many
MOMENT_S, MOMENTS = 0.2, 200_000


class Auditor:
    """One daemon's audit. It is supervised, and its life does not end by itself."""

    lost: asyncio.Future[str] | None = None

    def __init__(
        self,
        settings: Audit,
        folder: Path,
        store: Store,
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        log: Any,
        *,
        version: str,
    ) -> None:
        self._settings, self._folder, self._bus, self._clock = settings, folder, bus, clock
        self._metrics, self._log, self._version = metrics, log, version
        self._daemon = f"{socket.gethostname()}:{os.getpid()}"
        self._heads = Heads(store, clock, self._daemon)
        self._spec = JournalSpec(
            subjects.AUDIT_STREAM,
            (subjects.AUDIT,),
            max_age_s=settings.max_age_days * DAY_S,
            max_bytes=settings.max_bytes,
            replicas=settings.replicas,
            immutable=True,
            discard="new" if settings.when_full == "refuse" else "old",
        )
        self._skip = frozenset(settings.skip)
        #: of the present life; None between two
        self._chain: Chain | None = None
        self._row: Row | None = None
        self._carrier: Carrier | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: the last record is made
        self._ending = False
        #: made, and not on disk yet
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        #: why not, and when it is tried again
        self._unwritable = ""
        self._again_at = 0.0
        #: dropped since the last record that says so: how many, since when, why
        self._dropped: tuple[int, str, str] = (0, "", "")
        #: when records were made: (the first number of a moment, on the monotonic clock)
        self._made: deque[tuple[int, float]] = deque(maxlen=MOMENTS)
        self._logged: dict[str, float] = {}
        self._counted = {
            outcome: metrics.counter("if_audit_records_total", outcome=outcome)
            for outcome in ("ok", "refused", "error")
        }
        self._lost_records = metrics.counter("if_audit_dropped_total")
        metrics.before_render.append(self._measure)

    # -- being told --------------------------------------------------------------------------------------------------

    def witness(self, handling: Handling) -> None:
        """Makes the record of a message. Never raises: who asked is to be answered."""
        try:
            if self._skip and self._is_skipped(handling):
                return
            self._counted[handling.outcome].inc()
            chain = self._chain
            if chain is None or self._ending or self._is_full():
                self._drop()
                return
            if self._dropped[0]:
                self._tell_dropped(chain)
            self._keep(chain.of(handling, self._clock.wall_ms()))
        except Exception as error:
            self._lost_records.inc()
            self._say("a record of the audit could not be made", verb=handling.verb, exc_info=error)

    def _is_skipped(self, handling: Handling) -> bool:
        error = handling.error
        name = f"{handling.component}.{handling.verb}"
        return (name if error is None else f"{name}:{error.code}") in self._skip

    def flush(self) -> None:
        """Writes what was set aside. Never raises; what cannot be written now is tried again."""
        row, chain, carrier = self._row, self._chain, self._carrier
        if not self._pending or row is None or chain is None or carrier is None:
            return
        now = self._clock.monotonic()
        if self._unwritable and now < self._again_at:
            return
        lines = b"\n".join(self._pending) + b"\n"
        try:
            row.append(lines)
        except OSError as error:
            self._unwritable, self._again_at = error.strerror or str(error), now + RETRY_S
            self._say("the audit cannot be written to its spool", folder=str(self._folder), why=self._unwritable)
            return
        if not self._made or now - self._made[-1][1] > MOMENT_S:
            self._made.append((chain.n - len(self._pending) + 1, now))
        self._unwritable = ""
        self._pending.clear()
        self._pending_bytes = 0
        carrier.size += len(lines)
        carrier.more.set()

    def _keep(self, data: bytes) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data) + 1
        if len(self._pending) == 1 and self._loop is not None:
            self._loop.call_soon(self.flush)

    def _is_full(self) -> bool:
        most = self._settings.spool_max_bytes - RECORD_MAX_BYTES
        there = self._carrier.size if self._carrier is not None else 0
        return self._pending_bytes > PENDING_MAX_BYTES or there + self._pending_bytes > most

    def _drop(self) -> None:
        self._lost_records.inc()
        number, since, why = self._dropped
        if not number:
            since = rfc3339(self._clock.wall_ms())
            why = (
                "the audit was not running" if self._chain is None or self._ending
                else f"the spool could not be written ({self._unwritable})" if self._unwritable
                else "the spool was full"
            )  # fmt: skip
        self._dropped = (number + 1, since, why)
        self._say("records of the audit are dropped", since=since, why=why)

    def _tell_dropped(self, chain: Chain) -> None:
        number, since, why = self._dropped
        self._dropped = (0, "", "")
        self._keep(chain.own(DROPPED, self._clock.wall_ms(), why=f"since {since}: {why}", count=number))

    def _say(self, what: str, **about: Any) -> None:
        """Logs it, unless it did so a moment ago."""
        now = self._clock.monotonic()
        if now - self._logged.get(what, -LOGGED_EVERY_S) >= LOGGED_EVERY_S:
            self._logged[what] = now
            self._log.error(what, **about)

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins a chain. What the world does (a full disk, no JetStream, no etcd) does not keep it from starting."""
        self._loop = asyncio.get_running_loop()
        chain = Chain(self._clock.token(), self._daemon)
        segment_bytes = min(SEGMENT_BYTES, max(RECORD_MAX_BYTES, self._settings.spool_max_bytes // 8))
        self._row = Row(self._folder, chain.chain, segment_bytes=segment_bytes)
        self._carrier = Carrier(
            self._row, self._folder, self._spec, self._heads, self._bus, self._clock, self._metrics,
            flush=self.flush, say=self._say,
        )  # fmt: skip
        self._chain, self._ending = chain, False
        self._made.clear()
        self._keep(chain.own(BEGUN, self._clock.wall_ms(), why=f"ifabric {self._version}"))
        self.flush()
        self._carrier.start()

    async def stop(self) -> None:
        """Ends the chain, and gives the stream a moment to take the rest. Twice is harmless."""
        chain, carrier = self._chain, self._carrier
        if chain is None or carrier is None or self._ending:
            return
        if self._dropped[0] and not self._is_full():
            self._tell_dropped(chain)
        self._keep(chain.own(ENDED, self._clock.wall_ms()))
        self._ending, self._again_at = True, 0.0
        self.flush()
        try:
            await carrier.finish(chain.n)
        finally:
            self._lose_pending()
            self._chain = self._row = self._carrier = None

    def _lose_pending(self) -> None:
        """At the end of a life: what the disk did not take is gone, but for the last one, which says that it is the end."""
        lost = len(self._pending) - 1
        self._pending.clear()
        self._pending_bytes = 0
        if lost > 0:
            number, since, _ = self._dropped
            why = f"the spool could not be written ({self._unwritable})"
            self._lost_records.inc(lost)
            self._dropped = (number + lost, since or rfc3339(self._clock.wall_ms()), why)
            self._log.error("the last records of the audit are lost", records=lost, why=why)

    # -- what is told of it ------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Records that the stream does not have yet."""
        chain, row, carrier = self._chain, self._row, self._carrier
        return 0 if chain is None or row is None or carrier is None else chain.n - row.mark.n + carrier.left

    @property
    def lag_s(self) -> float:
        """How old the oldest of them is, within a fifth of a second."""
        chain, row, carrier = self._chain, self._row, self._carrier
        if chain is None or row is None or carrier is None:
            return 0.0
        own = 0.0
        if self._made and row.mark.n < chain.n:
            while len(self._made) > 1 and self._made[1][0] <= row.mark.n + 1:
                self._made.popleft()
            own = self._clock.monotonic() - self._made[0][1]
        return max(own, carrier.left_s)

    def _measure(self) -> None:
        self._metrics.gauge("if_audit_waiting").set(self.waiting)
        self._metrics.gauge("if_audit_lag_seconds").set(self.lag_s)
        self._metrics.gauge("if_audit_spool_bytes").set(self._carrier.size if self._carrier is not None else 0)

    def warnings(self) -> tuple[str, ...]:
        """What `/health` says of it."""
        said: list[str] = []
        number, since, why = self._dropped
        if self._unwritable:
            said.append(f"the audit cannot be written to {self._folder}: {self._unwritable}")
        if self._carrier is not None and self._carrier.trouble:
            said.append(f"{self.waiting} records of the audit wait in {self._folder}: {self._carrier.trouble}")
        if number:
            said.append(f"{number} records of the audit were dropped since {since}: {why}")
        return tuple(said)
