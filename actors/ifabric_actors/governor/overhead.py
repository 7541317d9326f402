"""How much of the money goes into coordination.

    if_governor_cost_overhead_percent = 100 * coordination / (coordination + work)

over everything charged within the last hour, on all daemons, in micro-USD. What counts as coordination is what the
agents said it was: the `purpose` in the `usage` of a commit, a spend or a completion (planning, voting, reading the
board), and what does not say counts as work. The fabric itself charges nothing, so what nobody reports is not in it: it
is a ratio of recorded usage, not an estimate. Tokens are recorded beside it and are not in the formula, since a token
has no price of its own. Nothing charged: 0.
"""

from __future__ import annotations

from collections import deque

from ifabric_actors.governor.records import Hold

WINDOW_MS = 3_600_000
SLOT_MS = 60_000


class Overhead:
    """Sums by the minute."""

    def __init__(self) -> None:
        #: (the minute, coordination, all), oldest first
        self._slots: deque[list[int]] = deque()

    def add(self, hold: Hold) -> None:
        """A hold that has ended."""
        if not hold.charged:
            return
        slot = hold.ended_at // SLOT_MS
        at = next((found for found in reversed(self._slots) if found[0] <= slot), None)
        if at is None or at[0] != slot:
            at = [slot, 0, 0]
            self._slots.append(at)
            if len(self._slots) > 1 and self._slots[-2][0] > slot:  # told late, or listed at the start
                self._slots = deque(sorted(self._slots))
        at[1] += hold.charged if hold.usage is not None and hold.usage.purpose == "coordination" else 0
        at[2] += hold.charged

    def percent(self, now_ms: int) -> float:
        """The ratio over the last hour."""
        while self._slots and self._slots[0][0] * SLOT_MS <= now_ms - WINDOW_MS - SLOT_MS:
            self._slots.popleft()
        total = sum(slot[2] for slot in self._slots)
        return 100 * sum(slot[1] for slot in self._slots) / total if total else 0.0
