"""Certificates that are exchanged while the daemon runs: on SIGHUP at once, and when the files change by themselves.

The files are looked at every `LOOK_S` (time, size and inode of what the names lead to, so that a swapped link counts,
which is how Kubernetes does it). A change is taken up when it looked the same twice: a certificate and its key are two
files, and nobody writes two files at once. What cannot be used changes nothing: the old ones stay in use, the log says
why, and it is tried again at each look until the files are good or the old ones are back.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ifabric import log, pki
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.metrics import Metrics
from ifabric.tls import Checked, Files, check_files, day

LOOK_S = 5.0
#: from this many days before a certificate expires, the daemon's health warns
SOON_DAYS = 7.0

Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class Used:
    """Files in use, and how their user is made to read them again. `apply` raises `FabricError` when it has not."""

    name: str
    files: Files
    apply: Callable[[], Awaitable[None]]


#: looks up again what of the configuration is kept elsewhere, and writes it to its files; the keys of what has changed.
#: It may block.
Refresh = Callable[[], list[str]]


class Reloader:
    """A supervised part. What was read last is remembered over its lives, so that no change is missed between them."""

    def __init__(
        self,
        used: Sequence[Used],
        clock: Clock,
        metrics: Metrics,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        refresh: Refresh | None = None,
        *,
        look_s: float = LOOK_S,
    ) -> None:
        self._used = [one for one in used if one.files.paths]
        self._clock = clock
        self._metrics = metrics
        self._around = around
        self._refresh = refresh
        self._look_s = look_s
        self._log = log.get()
        # before anything reads the files: whatever changes from now on is a change
        self._loaded = {one.name: signature(one.files) for one in self._used}
        self._seen = dict(self._loaded)
        self._checked: dict[str, Checked] = {}
        self._complaints: dict[str, str] = {}
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        for one in self._used:
            for outcome in ("done", "failed"):
                self._count(one.name, outcome, 0)

    def check(self) -> None:
        """All files, before anything starts. Raises `ConfigError`."""
        for one in self._used:
            self._took(one, check_files(one.files, now=self._now()))

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when looking has ended, which is a bug."""
        return self._lost

    async def start(self) -> None:
        """Begins to look."""
        self._lost = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name="certificates")
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Looks no more. Twice is harmless."""
        task, self._task, self._lost = self._task, None, None
        if task is not None:
            await cancel_and_wait(task)

    def ask(self) -> None:
        """Reads all files again, changed or not, as soon as possible (SIGHUP)."""
        self._asked.set()

    def warnings(self) -> list[str]:
        """Certificates that expire soon or have, and files that cannot be used: a sentence each."""
        now = self._now()
        found = list(self._complaints.values())
        for one in self._used:
            own = self._checked.get(one.name, Checked()).own
            if own is not None and (left := own.days_left(now)) < SOON_DAYS:
                ends = f"expires in {left:.1f} days, on" if left > 0 else "expired on"
                path = one.files.cert_file
                found.append(f"{one.files.key('cert_file')}: the certificate in {path} {ends} {day(own.not_after)}")
        return found

    async def look(self, *, anyway: bool = False) -> None:
        """Looks at the files once, and reads those that have changed; all of them with `anyway`."""
        now = {one.name: signature(one.files) for one in self._used}
        settled = {name for name, found in now.items() if self._seen[name] == found}
        self._seen = now
        wanted = [o for o in self._used if anyway or (now[o.name] != self._loaded[o.name] and o.name in settled)]
        if not wanted:
            return
        with self._around():
            for one in wanted:
                await self._read_again(one, now[one.name])

    async def _read_again(self, one: Used, found: Signature) -> None:
        try:
            checked = check_files(one.files, now=self._now())
            await one.apply()
        except FabricError as error:
            self._count(one.name, "failed")
            sentence = f"the certificates for {one.name} were not exchanged, the old ones stay in use: {error}"
            if self._complaints.get(one.name) != sentence:
                self._log.error(sentence, part=one.name)
            self._complaints[one.name] = sentence
            return
        self._loaded[one.name] = found
        self._complaints.pop(one.name, None)
        self._count(one.name, "done")
        self._took(one, checked)
        self._log.info("certificates exchanged", part=one.name, **_told(checked))

    def _took(self, one: Used, checked: Checked) -> None:
        self._checked[one.name] = checked
        for part, facts in ((one.name, checked.own), (f"{one.name}_ca", checked.authority)):
            if facts is not None:
                gauge = self._metrics.gauge("if_certificate_expiry_timestamp_seconds", part=part)
                gauge.set(facts.not_after.timestamp())

    def _count(self, part: str, outcome: str, amount: int = 1) -> None:
        self._metrics.counter("if_certificate_reloads_total", part=part, outcome=outcome).inc(amount)

    def _now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self._clock.wall_ms() / 1000, dt.UTC)

    async def _run(self) -> None:
        while True:
            asked = await self._next()
            if asked and self._refresh is not None:
                await self._look_up(self._refresh)
            if asked and not self._used:
                self._log.info("there are no certificates to read again")
            await self.look(anyway=asked)

    async def _look_up(self, refresh: Refresh) -> None:
        self._complaints.pop("secrets", None)
        try:
            if changed := await asyncio.to_thread(refresh):
                self._log.info("secrets looked up", changed=", ".join(changed))
        except FabricError as error:
            sentence = f"secrets could not be looked up, the old ones stay in use: {error}"
            self._log.error(sentence)
            self._complaints["secrets"] = sentence

    async def _next(self) -> bool:
        """Returns when it is time to look; whether somebody asked."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._look_s):
                await self._asked.wait()
        asked = self._asked.is_set()
        self._asked.clear()
        return asked

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(f"{task.get_name()} ended: {None if task.cancelled() else task.exception()!r}")


def signature(files: Files) -> Signature:
    """What changes when one of the files does, or what its name leads to."""
    return tuple(_state(path) for path in files.paths)


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _told(checked: Checked) -> dict[str, str]:
    def end(facts: pki.Facts) -> str:
        return facts.not_after.isoformat()

    own, authority = checked.own, checked.authority
    return {
        **({"certificate": own.common_name, "expires": end(own)} if own else {}),
        **({"authority": authority.common_name, "authority_expires": end(authority)} if authority else {}),
    }
