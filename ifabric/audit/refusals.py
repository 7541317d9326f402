"""The last refusals, in memory, for whoever watches the live page."""

from __future__ import annotations

from collections import deque

import msgspec

from ifabric.audit.chain import reason
from ifabric.clock import Clock, rfc3339
from ifabric.handling import Handling

KEPT = 100
#: an agent without work is told so every few seconds: that would push out whatever somebody is to see
IDLE = "no_task_matches"


class Refusal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One command that was not carried out, or of which that is not sure (`code` internal; or `why` says so)."""

    at: str
    component: str
    verb: str
    session: str
    code: str
    why: str
    task: str = ""


class Refusals:
    """Those of this process, the oldest first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.last: deque[Refusal] = deque(maxlen=KEPT)
        #: how many there were in all
        self.total = 0

    def witness(self, handling: Handling) -> None:
        """Takes note of a refusal. Never raises."""
        error = handling.error
        if handling.outcome == "ok" or error is None or error.code == IDLE:
            return
        task = getattr(handling.message, "task", None)
        self.total += 1
        self.last.append(
            Refusal(
                at=rfc3339(self._clock.wall_ms()),
                component=handling.component,
                verb=handling.verb,
                session=handling.session,
                code=error.code,
                why=reason(error),
                task=task if isinstance(task, str) else "",
            )
        )

    def since(self, total: int) -> list[Refusal]:
        """Those after the first `total`, as far as they are kept."""
        fresh = min(self.total - total, len(self.last))
        return list(self.last)[len(self.last) - fresh :] if fresh > 0 else []
