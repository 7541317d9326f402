"""The same words, again and again: after so many within a minute they are counted and not written.

The same are entries with the same event from the same place in the code. The rest of them, also the text of an
exception, may differ, for a flood is just that: one line a request, each with another request in it. What was held back
is told when the minute is over, in one line with their number; so nothing is silent, and the last minute of a flood is
told by the loop's timer, or by the next line of any kind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

WINDOW_S = 60.0
#: places that are counted for at once; beyond that all events of a place are one
PLACES_MAX = 1000


class Place(NamedTuple):
    """What is counted together."""

    where: str
    event: str


@dataclass
class _Window:
    began: float
    level: str
    actor: str
    said: int = 0
    held: int = 0


@dataclass(frozen=True)
class Held:
    """So many of these were not written. `level` is that of the last."""

    place: Place
    times: int
    level: str
    actor: str
    within_s: float


class Repeats:
    """Counts. `tell` is called with what was held back, when its minute is over. Threads may share it."""

    def __init__(self, most: int, now: Callable[[], float], tell: Callable[[Held], None]) -> None:
        """`most` entries a minute are written; 0: all."""
        self._most = most
        self._now = now
        self._tell = tell
        self._windows: dict[Place, _Window] = {}
        #: places with something held back, in the order in which that began
        self._holding: dict[Place, None] = {}
        self._due = float("inf")
        self._lock = threading.Lock()
        #: entries held back so far
        self.held = 0

    def may_say(self, where: str, event: str, level: str, actor: str) -> bool:
        """Whether this one is written."""
        if not self._most:
            return True
        now = self._now()
        if now >= self._due:
            self.tell_ended()
        with self._lock:
            place, window = self._window(Place(where, event), now, level, actor)
            if window.said < self._most:
                window.said += 1
                return True
            window.held += 1
            window.level, window.actor = level, actor
            self.held += 1
            self._holding[place] = None
            if window.held > 1:
                return False
            self._due = min(self._due, window.began + WINDOW_S)
        self._wake(window.began + WINDOW_S - now)
        return False

    def tell_ended(self, *, all_of_them: bool = False) -> None:
        """Tells of the minutes that are over; at the end of the process, of those that are not, too."""
        now = self._now()
        with self._lock:
            over = [place for place in self._holding if all_of_them or now >= self._windows[place].began + WINDOW_S]
            found = []
            for place in over:
                window = self._windows.pop(place)
                del self._holding[place]
                found.append(Held(place, window.held, window.level, window.actor, round(now - window.began, 1)))
            self._due = min((self._windows[p].began + WINDOW_S for p in self._holding), default=float("inf"))
        for held in found:
            self._tell(held)

    def _window(self, place: Place, now: float, level: str, actor: str) -> tuple[Place, _Window]:
        window = self._windows.get(place)
        if window is None and len(self._windows) >= PLACES_MAX:
            self._windows = {
                one: kept for one, kept in self._windows.items() if kept.held or now < kept.began + WINDOW_S
            }
            if len(self._windows) >= PLACES_MAX:
                place = Place(place.where, "")
                window = self._windows.get(place)
        if window is None or (now >= window.began + WINDOW_S and not window.held):
            window = self._windows[place] = _Window(now, level, actor)
        return place, window

    def _wake(self, after_s: float) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread, or no loop yet: the next line of any kind tells it
            return
        loop.call_later(max(0.0, after_s) + 0.05, self.tell_ended)
