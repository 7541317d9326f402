"""The live part of the page: who looks, and what they are sent.

The points of the charts are always kept, for whoever looks next. All else happens only while somebody looks: every
second the whole is asked for once and encoded once, however many look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ifabric.audit.refusals import Refusals
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError, Unavailable
from ifabric.http.page.events import EVENTS_MAX, Events
from ifabric.http.page.history import STEP_S, History
from ifabric.http.page.overview import Overview
from ifabric.http.page.sse import Viewer, frame
from ifabric.metrics import Metrics

TICK_S = 1.0
VIEWERS_MAX = 200


class Live:
    """A part of the daemon: keeps the history, and sends what is new to who looks."""

    def __init__(
        self,
        history: History,
        overview: Overview,
        events: Events,
        refusals: Refusals,
        metrics: Metrics,
        clock: Clock,
        log: Any,
    ) -> None:
        self._history, self._overview, self._events, self._refusals = history, overview, events, refusals
        self._clock, self._log = clock, log
        self._viewers: set[Viewer] = set()
        self._gauge = metrics.gauge("if_page_viewers")
        self._dropped = metrics.counter("if_page_viewers_dropped_total")
        self._somebody = asyncio.Event()
        self._unsent: list[bytes] = []
        self._now = b""
        self._told = 0
        self._tasks: list[asyncio.Task[None]] = []

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to keep the history."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._forever(self._point, STEP_S), name="page history"),
                asyncio.create_task(self._watch(), name="page viewers"),
            ]

    async def stop(self) -> None:
        """Ends every stream."""
        tasks, self._tasks = self._tasks, []
        await cancel_and_wait(*tasks)
        for viewer in list(self._viewers):
            viewer.close()
        self._somebody.clear()
        try:
            await self._events.close()
        except FabricError as error:
            self._log.info("the page's subscription goes with its connection", why=str(error))

    # -- who looks ----------------------------------------------------------------------------------------------------

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    def join(self) -> Viewer:
        """A new viewer, who is told the history first. `Unavailable` when there are as many as may be."""
        if not self._tasks:
            raise Unavailable("The page is not up; try again.", what="page")
        if len(self._viewers) >= VIEWERS_MAX:
            raise Unavailable(
                f"{VIEWERS_MAX} look at this daemon's page already; look at another daemon's, or later.",
                what="viewers",
                viewers_max=VIEWERS_MAX,
            )
        self._tell_refusals()
        self._send()  # to those who are here: what the new one is told now is no news to it later
        viewer = Viewer()
        history = {"step_s": STEP_S, "points": list(self._history.points)}
        viewer.put(
            frame("history", history)
            + frame("refusals", list(self._refusals.last))
            + (self._now if self._viewers else b"")
        )
        self._viewers.add(viewer)
        self._gauge.set(len(self._viewers))
        self._somebody.set()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Its stream has ended."""
        self._viewers.discard(viewer)
        self._gauge.set(len(self._viewers))
        if not self._viewers:
            self._somebody.clear()

    # -- what they are sent -------------------------------------------------------------------------------------------

    async def _forever(self, step: Callable[[], Any], every_s: float) -> None:
        """Never returns: does it again and again. A bug of the page is none of the daemon's other business."""
        due = self._clock.monotonic()
        while True:
            due = max(due + every_s, self._clock.monotonic())
            await self._clock.sleep(due - self._clock.monotonic())
            try:
                step()
            except Exception:
                self._log.exception("the live page has failed, and goes on")

    def _point(self) -> None:
        point = self._history.step()
        if self._viewers:
            self._unsent.append(frame("point", point))

    async def _watch(self) -> None:
        """Never returns: while somebody looks, everything once a second."""
        while True:
            if not self._somebody.is_set():
                await self._quietly(self._events.close)
                self._unsent.clear()
                await self._somebody.wait()
            due = self._clock.monotonic() + TICK_S
            try:
                await self._tell()
            except Exception:
                self._log.exception("the live page has failed, and goes on")
            await self._clock.sleep(max(0.05, due - self._clock.monotonic()))

    async def _tell(self) -> None:
        listening = await self._quietly(self._events.open)
        self._now = frame("now", await self._overview.now(len(self._viewers)))
        self._unsent.append(self._now)
        if listening and (events := self._events.take()):
            self._unsent.append(frame("events", events))
        self._tell_refusals()
        self._send()

    def _tell_refusals(self) -> None:
        new = self._refusals.since(self._told)
        self._told = self._refusals.total
        if new and self._viewers:
            self._unsent.append(frame("refusals", new[-EVENTS_MAX:]))

    async def _quietly(self, what: Callable[[], Any]) -> bool:
        """Does it; False when the bus does not let it. The page itself says that: health, and what is null."""
        try:
            await what()
        except FabricError as error:
            self._log.debug("the page hears no events", why=str(error))
            return False
        return True

    def _send(self) -> None:
        """What has gathered, in one piece, to everybody."""
        if not self._unsent:
            return
        piece = b"".join(self._unsent)
        self._unsent.clear()
        for viewer in self._viewers:
            if not viewer.over:
                viewer.put(piece)
                self._dropped.inc(viewer.over)
