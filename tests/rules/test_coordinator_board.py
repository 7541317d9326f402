"""The board's indexes agree with its records, whatever arrives in whatever order."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric.errors import BreakerOpen, CapabilityMissing
from ifabric.wire.coordinator import STATES, State, TaskSpec
from ifabric_actors.coordinator import shelves as shelves_module
from ifabric_actors.coordinator.board import Board, Change
from ifabric_actors.coordinator.paging import look
from ifabric_actors.coordinator.records import Seat, Session, Stored, Task
from ifabric_actors.coordinator.shelves import Shelves
from ifabric_actors.governor.matching import Cache, Demand, Offer, Terms


def stored(
    task_id: str, revision: int, state: State = "pending", *, created: int = 0, session: str = "", **spec: object
) -> Stored:
    made = TaskSpec(id=task_id, **spec)  # type: ignore[arg-type]
    lease = 5 if state == "claimed" else 0
    return Stored(Task(spec=made, state=state, body="", session=session, lease=lease), revision, created or revision)


def shelves(terms: Terms, **cache: Any) -> Shelves:
    return Shelves(terms, Cache(float, **cache), Cache(float, **cache))


def fill(*tasks: Stored) -> Board:
    return fill_with(Terms(), *tasks)


def fill_with(terms: Terms, *tasks: Stored) -> Board:
    made = Board(lambda change: None, lambda session, lease: None, shelves(terms))
    for one in tasks:
        made.put(one.task.spec.id, one)
    return made


NONE: frozenset[str] = frozenset()


def best(made: Board, *capabilities: str, accepts: tuple[str, ...] = (), **options: Any) -> str | None:
    """The task that a session with these capabilities would be offered."""
    found = made.best(Offer(frozenset(capabilities), frozenset(accepts)), **options)
    return found.task_id if found is not None else None


def test_the_best_task_has_the_highest_priority_then_is_the_oldest() -> None:
    made = fill(stored("old", 1), stored("young", 2), stored("urgent", 3, priority=5))
    assert best(made) == "urgent"
    made.put("urgent", stored("urgent", 4, "done", priority=5))
    assert best(made) == "old"


def test_a_task_is_offered_only_to_who_can_do_it_and_the_lack_is_named() -> None:
    made = fill(stored("a", 1, needs=("rust", "gpu")), stored("b", 2, needs=("go", "x", "y")))
    assert best(made, "rust") is None
    why = made.obstacles(Offer(frozenset({"rust"})))
    assert why is not None
    assert (why.missing, why.kinds()) == (("gpu",), ("capability",))
    assert best(made, "rust", "gpu") == "a"


def test_the_score_decides_between_equal_priorities() -> None:
    made = fill(
        stored("half", 1, needs=("rust",), wants=("gpu", "big")),
        stored("whole", 2, needs=("rust",), wants=("gpu",)),
        stored("young", 3, needs=("rust",), wants=("gpu",)),
        stored("urgent", 4, needs=("rust",), wants=("gpu", "big"), priority=1),
    )
    assert best(made, "rust", "gpu") == "urgent"
    made.reserve("urgent")
    assert best(made, "rust", "gpu") == "whole"
    made.reserve("whole")
    assert best(made, "rust", "gpu") == "young"
    made.reserve("young")
    assert best(made, "rust", "gpu") == "half"


def test_what_scores_too_little_is_not_offered_and_the_score_is_told() -> None:
    made = fill(stored("wished", 1, wants=("gpu", "big")))
    assert best(made, "gpu") is None
    why = made.obstacles(Offer(frozenset({"gpu"})))
    assert why is not None
    assert (why.best_score, why.wishes, why.missing) == (0.6, ("big",), ())
    assert best(made, "gpu", "big") == "wished"
    assert best(fill_with(Terms(min_score=0.6), stored("wished", 1, wants=("gpu", "big"))), "gpu") == "wished"
    assert best(fill_with(Terms(enabled=False), stored("wished", 1, wants=("gpu", "big")))) == "wished"


def test_labels_bind_who_names_some() -> None:
    made = fill(stored("plain", 1), stored("docs", 2, labels=("docs", "easy")))
    assert best(made, accepts=("docs",)) == "docs"
    assert best(made, accepts=("tests",)) is None
    assert best(made) == "plain"


def test_a_breaker_that_is_open_keeps_a_task_and_offers_it_again_when_it_closes() -> None:
    offers: list[tuple[Demand, int]] = []
    made = fill(stored("a", 1, needs=("x/y",)), stored("b", 2, needs=("x/y",)), stored("c", 3, needs=("z",)))
    made.on_offer = lambda demand, tasks: offers.append((demand, tasks))
    made.breaker("x/y", b'{"state": "open", "until": 5000}')
    assert (best(made, "x/y"), offers) == (None, [])
    why = made.obstacles(Offer(frozenset({"x/y"})))
    assert why is not None
    assert (why.breakers, why.kinds()) == (("x/y",), ("capability", "breaker"))
    made.breaker("x/y", None)
    assert best(made, "x/y") == "a"
    assert offers == [(Demand(frozenset({"x/y"})), 2)]
    made.breaker("x/y", b'{"state": "open", "until": 5000}')
    made.at(4_999)
    assert best(made, "x/y") is None
    made.at(5_000)
    assert best(made, "x/y") == "a"
    assert len(offers) == 2


@pytest.mark.parametrize("terms", [Terms(min_score=0.0), Terms(enabled=False)], ids=["no threshold", "off"])
def test_no_setting_lets_through_what_must_not_be(terms: Terms) -> None:
    made = fill_with(terms, stored("a", 1, needs=("x",)), stored("b", 2, needs=("y",)), stored("c", 3, labels=("l",)))
    made.breaker("x", b'{"state": "open"}')
    assert best(made, "x", accepts=("m",)) is None
    made.put("c", stored("c", 4, "done", created=3))
    assert best(made, "x") is None
    made.breaker("x", None)
    assert best(made, "x") == "a"


def test_by_id_only_what_must_be_is_checked() -> None:
    made = fill()
    made.breaker("x", b'{"state": "open", "until": 5000}')
    made.at(1_000)
    made.refuse(TaskSpec(id="T", wants=("a", "b", "x")), "s", Offer())
    with pytest.raises(CapabilityMissing) as missing:
        made.refuse(TaskSpec(id="T", needs=("x", "b"), labels=("l",)), "s", Offer(frozenset("b"), frozenset("m")))
    assert missing.value.facts == {"task": "T", "missing": ["x"], "labels": ["m"]}
    with pytest.raises(BreakerOpen) as blocked:
        made.refuse(TaskSpec(id="T", needs=("x",)), "s", Offer(frozenset("x")))
    assert blocked.value.facts == {"breaker": "x", "probe_in_s": 4.0, "task": "T"}


def test_a_reserved_task_is_offered_to_nobody_until_it_is_given_up() -> None:
    made = fill(stored("a", 1))
    assert made.reserve("a")
    assert not made.reserve("a")
    assert best(made) is None
    made.unreserve("a")
    assert best(made) == "a"


def test_spreading_stays_within_one_priority() -> None:
    made = fill(stored("hi1", 1, priority=1), stored("hi2", 2, priority=1), stored("lo", 3))
    assert {best(made, spread=8, pick=lambda n, i=i: i % n) for i in range(8)} == {"hi1", "hi2"}


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
    tasks = fill(stored("b", 1), stored("a", 2), stored("c", 3, "done")).tasks
    first = look(tasks, None, "", None, 2)
    assert ([task_id for task_id, _ in first.found], first.end) == (["a", "b"], False)
    rest = look(tasks, None, "", first.after, 2)
    assert ([task_id for task_id, _ in rest.found], rest.end) == (["c"], True)
    assert look(tasks, "done", "", None, 2).found[0][0] == "c"


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
    offered = set()
    while (found := best(made, "x", "y")) is not None:
        offered.add(found)
        made.reserve(found)
    for task_id in "abcd":
        made.unreserve(task_id)
    while (found := best(made, "x", "y")) is not None:
        offered.add(found)
        made.reserve(found)
    assert offered == {t for t, s in made.tasks.items() if s.task.state == "pending"}
    assert made.held.get("s", set()) == {t for t, s in made.tasks.items() if s.task.state == "claimed"}
    for state in STATES:
        assert made.counts[state] == sum(s.task.state == state for s in made.tasks.values())


# -- what is remembered ------------------------------------------------------------------------------------------------

#: as few as that are looked through each time, and remembered for an offer, while these tests run
FEW = 3
#: demands
MANY = 4 * FEW
#: tasks of each demand
EACH = 3
WISHES = ("v", "w", "x")


def many(task: int, priority: int) -> Stored:
    """A task of one of many demands; every fifth of those asks for what not all can do."""
    number = task % MANY
    needs = ("rare", f"n{number}") if number % 5 == 0 else (f"n{number}",)
    labels = ("odd",) if number % 2 else ("even",)
    spec: dict[str, Any] = {"needs": needs, "wants": (WISHES[number % 3],), "labels": labels, "priority": priority}
    return stored(f"t{task}", task + 1, created=task + 1, **spec)


EVERYTHING = frozenset(f"n{number}" for number in range(MANY))
OFFERS = (
    Offer(EVERYTHING | {"rare", *WISHES}),
    Offer(EVERYTHING | {"v"}),
    Offer(EVERYTHING | {"rare", "w"}, frozenset({"odd"})),
    Offer(frozenset({"n1", "n2", "n3", "v", "x"})),
    Offer(),
)
steps = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, len(OFFERS) - 1), st.booleans()),
    st.tuples(st.just("ask many"), st.integers(0, len(OFFERS) - 1), st.integers(1, 2 * MANY)),
    st.tuples(st.just("put"), st.integers(0, EACH * MANY - 1), st.integers(-1, 1)),
    st.tuples(st.just("done"), st.integers(0, EACH * MANY - 1), st.none()),
    st.tuples(st.just("back"), st.integers(0, EACH * MANY - 1), st.none()),
    st.tuples(
        st.just("trip"), st.sampled_from(("n1", "n7", "rare", "w")), st.sampled_from((None, "open", "half_open"))
    ),
    st.tuples(st.just("wait"), st.floats(0, 9), st.none()),
)


@mock.patch.multiple(shelves_module, BEST_MAX=FEW, SHELVES_FEW=FEW)
@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=50), st.integers(1, 4), st.sampled_from([0.0, 0.7, 0.95]))
def test_what_is_remembered_is_what_would_be_found(
    history: list[tuple[str, Any, Any]], entries_max: int, min_score: float
) -> None:
    """Two boards see the same, one of them with a cache: they offer the same tasks, with the same scores."""
    now = [0.0]
    cache: Cache[Offer, Any] = Cache(lambda: now[0], ttl_s=10, entries_max=entries_max)
    terms = Terms(min_score=min_score)
    with_cache = Board(lambda change: None, lambda session, lease: None, Shelves(terms, cache, cache))
    without = Board(lambda change: None, lambda session, lease: None, shelves(terms, enabled=False))
    revision = EACH * MANY

    def both(act: str, *args: Any) -> None:
        for made in (with_cache, without):
            getattr(made, act)(*args)

    def ask(offer: Offer) -> str | None:
        found = with_cache.best(offer)
        assert found == without.best(offer)
        return found.task_id if found is not None else None

    for number in range(EACH * MANY):
        both("put", f"t{number}", many(number, 0))
    for step, one, other in history:
        revision += 1
        if step == "ask":
            found = ask(OFFERS[one])
            if found is not None and other:
                both("reserve", found)
        elif step == "ask many":
            for _ in range(other):
                found = ask(OFFERS[one])
                if found is not None:
                    both("reserve", found)
        elif step == "put":
            task = many(one, other)
            both("put", f"t{one}", task._replace(mod_revision=revision))
        elif step == "done":
            both("put", f"t{one}", stored(f"t{one}", revision, "done", created=one + 1))
        elif step == "back":
            both("unreserve", f"t{one}")
        elif step == "trip":
            both("breaker", one, b'{"state": "%s"}' % other.encode() if other else None)
        else:
            now[0] += one
    for offer in OFFERS:
        ask(offer)
    if not history:
        assert cache.misses.value, "the cache is asked at all"


@mock.patch.multiple(shelves_module, BEST_MAX=FEW, SHELVES_FEW=FEW)
def test_many_demands_are_looked_through_once_for_many_tasks() -> None:
    now = [0.0]
    cache: Cache[Offer, Any] = Cache(lambda: now[0])
    made = Board(lambda change: None, lambda session, lease: None, Shelves(Terms(), cache, Cache(float)))
    for number in range(EACH * MANY):
        made.put(f"t{number}", many(number, 0))
    given_out = []
    while (found := made.best(OFFERS[0])) is not None:
        given_out.append(found.task_id)
        made.reserve(found.task_id)
    assert given_out == [f"t{number}" for number in range(EACH * MANY)]
    assert cache.misses.value == 1
    assert cache.hits.value >= EACH * MANY - EACH * FEW - 1
