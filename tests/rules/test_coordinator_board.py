"""The board's indexes agree with its records, whatever arrives in whatever order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric.wire.coordinator import STATES, State, TaskSpec
from ifabric_actors.coordinator.board import Board, Change
from ifabric_actors.coordinator.records import Seat, Session, Stored, Task


def board() -> Board:
    return Board(lambda change: None, lambda session, lease: None)


def stored(
    task_id: str, revision: int, state: State = "pending", *, created: int = 0, session: str = "", **spec: object
) -> Stored:
    made = TaskSpec(id=task_id, **spec)  # type: ignore[arg-type]
    lease = 5 if state == "claimed" else 0
    return Stored(Task(spec=made, state=state, body="", session=session, lease=lease), revision, created or revision)


def fill(*tasks: Stored) -> Board:
    made = board()
    for one in tasks:
        made.put(one.task.spec.id, one)
    return made


NONE: frozenset[str] = frozenset()


def test_the_best_task_has_the_highest_priority_then_is_the_oldest() -> None:
    made = fill(stored("old", 1), stored("young", 2), stored("urgent", 3, priority=5))
    assert made.best(NONE) == "urgent"
    made.put("urgent", stored("urgent", 4, "done", priority=5))
    assert made.best(NONE) == "old"


def test_a_task_is_offered_only_to_who_can_do_it_and_the_lack_is_named() -> None:
    made = fill(stored("a", 1, needs=("rust", "gpu")), stored("b", 2, needs=("go", "x", "y")))
    assert made.best(frozenset({"rust"})) is None
    assert made.missing(frozenset({"rust"})) == ["gpu"]
    assert made.best(frozenset({"rust", "gpu"})) == "a"


def test_wishes_decide_between_equal_priorities() -> None:
    made = fill(stored("plain", 1, wants=("gpu", "big")), stored("wished", 2, wants=("rust",)))
    assert made.best(frozenset({"rust"})) == "wished"
    assert made.best(frozenset({"gpu"})) == "plain"


def test_a_reserved_task_is_offered_to_nobody_until_it_is_given_up() -> None:
    made = fill(stored("a", 1))
    assert made.reserve("a")
    assert not made.reserve("a")
    assert made.best(NONE) is None
    made.unreserve("a")
    assert made.best(NONE) == "a"


def test_spreading_stays_within_one_priority() -> None:
    made = fill(stored("hi1", 1, priority=1), stored("hi2", 2, priority=1), stored("lo", 3))
    assert {made.best(NONE, spread=8, pick=lambda n, i=i: i % n) for i in range(8)} == {"hi1", "hi2"}


def test_what_was_deleted_does_not_come_back_by_a_late_read() -> None:
    made = fill(stored("a", 1))
    made.forget("a", 5)
    made.put("a", stored("a", 4))
    assert "a" not in made.tasks
    made.put("a", stored("a", 6))
    assert "a" in made.tasks


def test_a_session_that_comes_back_with_another_lease_has_lost_its_old_claims() -> None:
    gone: list[tuple[str, int]] = []
    made = Board(lambda change: None, lambda session, lease: gone.append((session, lease)))
    made.seat("s", Seat(Session(ttl_s=9), 5, 1, NONE))
    made.put("a", stored("a", 2, "claimed", session="s"))
    assert list(made.orphans("s", 0)) == []
    made.seat("s", Seat(Session(ttl_s=9), 6, 3, NONE))
    assert gone == [("s", 5)]
    assert list(made.orphans("s", 0)) == [("a", "session ended")]


def test_the_last_dependency_opens_what_waits() -> None:
    made = fill(stored("a", 1), stored("b", 2, "done"), stored("c", 3, "blocked", depends_on=("a", "b")))
    made.put("d", stored("d", 4, "blocked", depends_on=("a", "x")))
    assert made.released_by("a") == ["c"]
    assert made.waiting_for(("a", "b", "x")) == ("a", "x")


def test_pages_are_in_the_order_of_ids_and_say_when_there_is_more() -> None:
    made = fill(stored("b", 1), stored("a", 2), stored("c", 3, "done"))
    first, more = made.page(None, None, 2)
    assert ([task_id for task_id, _ in first], more) == (["a", "b"], True)
    rest, more = made.page(None, "b", 2)
    assert ([task_id for task_id, _ in rest], more) == (["c"], False)
    assert made.page("done", None, 2)[0][0][0] == "c"


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.integers(1, 30),
            st.sampled_from([*STATES, "deleted"]),
            st.sampled_from([(), ("x",), ("x", "y")]),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_the_indexes_follow_any_history(history: list[tuple[str, int, str, tuple[str, ...], bool]]) -> None:
    """Counts, shelves and holdings are what a fresh look at the records would give."""
    changes: list[Change] = []
    made = Board(changes.append, lambda session, lease: None)
    for task_id, revision, state, needs, reserve in history:
        if state == "deleted":
            made.forget(task_id, revision)
        else:
            made.put(task_id, stored(task_id, revision, state, session="s", needs=needs))  # type: ignore[arg-type]
        if reserve:
            made.reserve(task_id)
        else:
            made.unreserve(task_id)
    everyone = frozenset({"x", "y"})
    offered = set()
    while (best := made.best(everyone)) is not None:
        offered.add(best)
        made.reserve(best)
    for task_id in "abcd":
        made.unreserve(task_id)
    while (best := made.best(everyone)) is not None:
        offered.add(best)
        made.reserve(best)
    assert offered == {t for t, s in made.tasks.items() if s.task.state == "pending"}
    assert made.held.get("s", set()) == {t for t, s in made.tasks.items() if s.task.state == "claimed"}
    for state in STATES:
        assert made.counts[state] == sum(s.task.state == state for s in made.tasks.values())
