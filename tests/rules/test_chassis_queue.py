"""Whose turn it is in front of the sandboxes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric_actors.chassis.queue import FairQueue


def taken(queue: FairQueue[str]) -> list[str]:
    return [queue.take() for _ in range(len(queue))]


def test_sessions_take_turns_and_keep_their_own_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.put(item[0], item)
    assert taken(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_session_with_a_thousand_runs_delays_another_one_by_one_run() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.put("greedy", f"greedy{number}")
    queue.put("modest", "modest")
    assert [queue.take(), queue.take()] == ["greedy0", "modest"]


def test_who_leaves_the_line_is_not_called_and_does_not_hold_its_sessions_place() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.put(item[0], item)
    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("z", "a2")
    assert len(queue) == 2
    assert taken(queue) == ["a2", "b1"]
    with pytest.raises(IndexError):
        queue.take()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_nothing_is_lost_or_called_twice(steps: list[tuple[str, bool]]) -> None:
    queue: FairQueue[str] = FairQueue()
    put, got = [], []
    for number, (session, takes) in enumerate(steps):
        if takes and len(queue):
            got.append(queue.take())
        else:
            put.append(f"{session}{number}")
            queue.put(session, put[-1])
    got += taken(queue)
    assert sorted(got) == sorted(put)
    for session in "abc":
        own = [item for item in got if item[0] == session]
        assert own == [item for item in put if item[0] == session]
