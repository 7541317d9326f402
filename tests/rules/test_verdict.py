"""The demo's judge: for each promise, a stream of events that breaks it."""

from __future__ import annotations

import pytest

from ifabric.cli.verdict import Held, Verdict, judge
from ifabric.wire.coordinator import TaskEvent


def stream(*lines: str) -> list[TaskEvent]:
    """Events written as ``event task session fence``."""
    made = []
    for revision, line in enumerate(lines):
        event, task, session, fence = line.split()
        who = None if session == "-" else session
        made.append(TaskEvent(event=event, at="", revision=revision, task=task, session=who, fence=int(fence)))
    return made


GOOD = stream("submitted t - 0", "claimed t a 1", "expired t a 1", "claimed t b 2", "completed t b 2")


def test_a_run_that_keeps_every_promise_is_held() -> None:
    verdict = judge(GOOD, ["t"], [Held("a", "t", 1)])
    assert verdict.held
    assert (verdict.completed, verdict.claimed, verdict.expired, verdict.rescued) == (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("broken", "events"),
    [
        ("never_done", stream("claimed t a 1")),
        ("done_twice", stream("claimed t a 1", "completed t a 1", "claimed t b 2", "completed t b 2")),
        ("two_holders", stream("claimed t a 1", "claimed t b 2", "completed t b 2")),
        ("fence_fell", stream("claimed t a 2", "released t a 2", "claimed t b 2", "completed t b 2")),
        ("stale_completion", stream("claimed t a 1", "expired t a 1", "claimed t b 2", "completed t a 1")),
        ("stale_completion", stream("claimed t a 1", "completed t b 1")),
        ("stale_completion", stream("completed t a 1")),
        ("gaps", [*GOOD, TaskEvent(event="resync", at="", revision=9)]),
    ],
)
def test_each_broken_promise_is_found_and_named(broken: str, events: list[TaskEvent]) -> None:
    verdict = judge(events, ["t"])
    assert not verdict.held
    assert getattr(verdict, broken)
    others = [field for field in Verdict._fields if isinstance(getattr(verdict, field), tuple) and field != broken]
    assert not any(getattr(verdict, field) for field in others)


def test_a_killed_agents_task_must_be_done_by_another_or_have_been_done_before_the_kill() -> None:
    victim = Held("a", "t", 1)
    assert judge(stream("claimed t a 1", "completed t a 1"), ["t"], [victim]).held
    unseen = stream("claimed t a 1", "released t a 1", "claimed t b 2")
    verdict = judge(unseen, [], [victim])
    assert verdict.not_rescued == ("t",)
    assert not verdict.held
