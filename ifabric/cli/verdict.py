"""Judges a run by its event stream alone: what was claimed, by whom, under which fence, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ifabric.wire.coordinator import TaskEvent

#: events after which nobody holds the task
ENDS = ("completed", "released", "expired", "failed", "cancelled")


class Held(NamedTuple):
    """A claim: who, which task, under which fence."""

    session: str
    task: str
    fence: int


class Verdict(NamedTuple):
    """What the events say. The tuples name the tasks that break a promise, in order."""

    completed: int
    claimed: int
    expired: int
    #: claims of killed agents that expired, with the task then completed by another
    rescued: int
    never_done: tuple[str, ...]
    done_twice: tuple[str, ...]
    two_holders: tuple[str, ...]
    fence_fell: tuple[str, ...]
    stale_completion: tuple[str, ...]
    not_rescued: tuple[str, ...]
    #: events were lost: the stream cannot be judged
    gaps: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether every promise was kept."""
        return not any(found for found in self if isinstance(found, tuple))


def judge(events: Iterable[TaskEvent], tasks: Iterable[str], victims: Iterable[Held] = ()) -> Verdict:
    """Reads the events in their order.

    `tasks` are those that must have been completed, `victims` the claims whose
    holders were killed: each must have ended before the kill took effect
    (completed under its own fence), or have expired and been completed by another
    session under a greater fence.
    """
    holder: dict[str, tuple[str | None, int]] = {}
    last_fence: dict[str, int] = {}
    completions: dict[str, list[Held]] = {}
    expired: set[tuple[str, int]] = set()
    claims = 0
    two, fell, stale, gaps = set(), set(), set(), set()
    for event in events:
        task = event.task
        if event.event == "resync":
            gaps.add(f"revision {event.revision}")
        elif event.event == "claimed":
            claims += 1
            if task in holder:
                two.add(task)
            if event.fence <= last_fence.get(task, 0):
                fell.add(task)
            holder[task] = (event.session, event.fence)
            last_fence[task] = event.fence
        elif event.event in ENDS:
            if event.event == "completed":
                completions.setdefault(task, []).append(Held(event.session or "", task, event.fence))
                if holder.get(task) != (event.session, event.fence):
                    stale.add(task)
            elif event.event == "expired":
                expired.add((task, event.fence))
            holder.pop(task, None)
    rescued, lost = 0, set()
    for victim in victims:
        by_others = [one for one in completions.get(victim.task, ()) if one.fence > victim.fence]
        if by_others and (victim.task, victim.fence) in expired:
            rescued += 1
        elif victim not in completions.get(victim.task, ()):
            lost.add(victim.task)
    return Verdict(
        completed=len(completions),
        claimed=claims,
        expired=len(expired),
        rescued=rescued,
        never_done=tuple(sorted(set(tasks) - completions.keys())),
        done_twice=tuple(sorted(task for task, times in completions.items() if len(times) > 1)),
        two_holders=tuple(sorted(two)),
        fence_fell=tuple(sorted(fell)),
        stale_completion=tuple(sorted(stale)),
        not_rescued=tuple(sorted(lost)),
        gaps=tuple(sorted(gaps)),
    )
