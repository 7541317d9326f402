"""Judges a run by its event stream alone: what was claimed, by whom, under which fence, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ifabric.wire.coordinator import TaskEvent

ENDS = ("completed", "released", "expired", "failed", "cancelled")


class Verdict(NamedTuple):
    """What the events say. The lists name the tasks that break a promise."""

    completed: int
    claimed: int
    expired: int
    taken_over: int
    done_twice: tuple[str, ...]
    two_holders: tuple[str, ...]
    fence_fell: tuple[str, ...]
    stale_completion: tuple[str, ...]
    never_done: tuple[str, ...]


def judge(events: Iterable[TaskEvent], tasks: Iterable[str]) -> Verdict:
    """Reads the events in their order; `tasks` are those that must have been completed."""
    holder: dict[str, tuple[str | None, int]] = {}
    last_fence: dict[str, int] = {}
    completions: dict[str, int] = {}
    expired_once: set[str] = set()
    claimed = expired = 0
    taken_over: set[str] = set()
    two, fell, stale = set(), set(), set()
    for event in events:
        task = event.task
        if event.event == "claimed":
            claimed += 1
            if task in holder:
                two.add(task)
            if event.fence <= last_fence.get(task, 0):
                fell.add(task)
            if task in expired_once:
                taken_over.add(task)
            holder[task] = (event.session, event.fence)
            last_fence[task] = event.fence
        elif event.event in ENDS:
            if event.event == "completed":
                completions[task] = completions.get(task, 0) + 1
                if holder.get(task) != (event.session, event.fence):
                    stale.add(task)
            elif event.event == "expired":
                expired += 1
                expired_once.add(task)
            holder.pop(task, None)
    twice = sorted(task for task, times in completions.items() if times > 1)
    missing = sorted(set(tasks) - completions.keys())
    return Verdict(
        len(completions), claimed, expired, len(taken_over),
        tuple(twice), tuple(sorted(two)), tuple(sorted(fell)), tuple(sorted(stale)), tuple(missing),
    )  # fmt: skip
