"""The coordinator's beliefs, case by case. No loop, no server, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from ifabric.errors import CapabilityMissing, ClaimLost, ClaimTaken, Cycle, NotClaimable, TooLarge
from ifabric.wire.coordinator import STATES, TaskSpec
from ifabric_actors.coordinator import rules
from ifabric_actors.coordinator.records import Entry, Seat, Session, Task

INCARNATION = 1
BY = Entry(0, "submitted", "s")


def seat(*capabilities: str, lease: int = 7) -> Seat:
    return Seat(Session(ttl_s=60, capabilities=capabilities), lease, 1, frozenset(capabilities))


def task(**spec: object) -> Task:
    made = TaskSpec(id="t", **spec)  # type: ignore[arg-type]
    return rules.submitted(made, payload_bytes=0, blocked=bool(made.depends_on), done=False, order=0, now=1, by=BY)


def claim(of: Task, session: str = "alice", of_seat: Seat | None = None) -> Task:
    return rules.claimed(of, session, of_seat or seat(), incarnation=INCARNATION, deadline_lease=0, now=2, request="r")


def test_every_state_of_the_wire_is_in_the_table_and_leads_only_to_states_of_the_wire() -> None:
    assert set(rules.TRANSITIONS) == set(STATES)
    assert {to for moves in rules.TRANSITIONS.values() for to in moves.values()} <= set(STATES)


def test_a_claim_names_its_holder_and_costs_an_attempt() -> None:
    held = claim(task())
    assert (held.state, held.session, held.lease, held.attempt) == ("claimed", "alice", 7, 1)
    assert held.fence == rules.fence_of(1, 1) == 2**40 + 1
    assert held.history[-1] == Entry(2, "claimed", "alice", held.fence, request="r")


def test_a_held_task_is_taken_for_everybody_else() -> None:
    with pytest.raises(ClaimTaken) as refusal:
        claim(claim(task()), "bob")
    assert refusal.value.facts == {"task": "t", "by": "alice"}


def test_a_task_that_needs_more_than_the_session_has_says_what_is_missing() -> None:
    with pytest.raises(CapabilityMissing) as refusal:
        claim(task(needs=("rust", "gpu")), "alice", seat("rust"))
    assert refusal.value.facts["missing"] == ["gpu"]


@pytest.mark.parametrize("state", ["blocked", "done", "dead", "cancelled"])
def test_only_a_pending_task_is_claimable(state: str) -> None:
    with pytest.raises(NotClaimable) as refusal:
        claim(replace(task(), state=state))
    assert refusal.value.facts["state"] == state


def test_the_fence_grows_with_every_grant_and_outgrows_a_restored_backup() -> None:
    first = claim(task())
    second = claim(rules.released(first, reason="", now=3))
    restored = rules.claimed(
        rules.released(first, reason="", now=3), "bob", seat(), incarnation=2, deadline_lease=0, now=4, request=""
    )
    assert first.fence < second.fence < restored.fence < 2**53


@pytest.mark.parametrize(
    ("session", "fence", "with_seat", "incarnation"),
    [
        ("bob", rules.fence_of(1, 1), seat(), 1),
        ("alice", rules.fence_of(1, 2), seat(), 1),
        ("alice", rules.fence_of(2, 1), seat(), 1),
        ("alice", rules.fence_of(1, 1), None, 1),
        ("alice", rules.fence_of(1, 1), seat(lease=8), 1),
        ("alice", rules.fence_of(1, 1), seat(), 2),
    ],
    ids=[
        "another session",
        "another fence",
        "a fence of the future",
        "session gone",
        "session reborn",
        "after a restore",
    ],
)
def test_who_does_not_hold_the_claim_is_told_so(
    session: str, fence: int, with_seat: Seat | None, incarnation: int
) -> None:
    with pytest.raises(ClaimLost) as refusal:
        rules.check_holder(claim(task()), session, fence, seat=with_seat, incarnation=incarnation)
    assert refusal.value.facts["fence"] == rules.fence_of(1, 1)


def test_the_holder_under_its_fence_is_believed() -> None:
    rules.check_holder(claim(task()), "alice", rules.fence_of(1, 1), seat=seat(), incarnation=1)


def test_giving_back_costs_no_attempt_and_frees_the_task() -> None:
    free = rules.released(claim(task()), reason="shutdown", now=3)
    assert (free.state, free.attempt, free.session, free.lease) == ("pending", 0, "", 0)


def test_failing_costs_the_attempt_and_the_last_one_kills() -> None:
    one = rules.failed(claim(task(max_attempts=2)), error="boom", retry=True, now=3)
    assert (one.state, one.attempt, one.error, one.fresh) == ("pending", 1, "boom", 1)
    two = rules.failed(claim(one), error="boom", retry=True, now=4)
    assert (two.state, two.fresh) == ("dead", 2)
    assert [entry.event for entry in two.history[-2:]] == ["failed", "dead"]


def test_a_failure_that_wants_no_retry_kills_at_once() -> None:
    assert rules.failed(claim(task()), error="no", retry=False, now=3).state == "dead"


def test_dying_with_a_task_costs_the_attempt_too() -> None:
    assert rules.expired(claim(task()), why="session ended", now=3).attempt == 1
    assert rules.expired(claim(task(max_attempts=1)), why="session ended", now=3).state == "dead"


def test_an_operator_brings_a_dead_task_back_with_all_attempts() -> None:
    dead = rules.expired(claim(task(max_attempts=1)), why="", now=3)
    again = rules.requeued(dead, blocked=False, operator="root", now=4)
    assert (again.state, again.attempt, again.generation) == ("pending", 0, 1)
    assert rules.requeued(dead, blocked=True, operator="root", now=4).state == "blocked"


def test_a_done_task_stays_done() -> None:
    done = rules.completed(claim(task()), result=False, now=3)
    for act in (
        lambda: rules.cancelled(done, operator="root", now=4),
        lambda: rules.requeued(done, blocked=False, operator="root", now=4),
        lambda: rules.expired(done, why="", now=4),
    ):
        with pytest.raises(NotClaimable):
            act()


@pytest.mark.parametrize(
    ("specs", "circle"),
    [
        ([("a", ("a",))], ["a", "a"]),
        ([("a", ("b",)), ("b", ("a",))], ["a", "b", "a"]),
        ([("a", ("b",)), ("b", ("c",)), ("c", ("b",))], ["b", "c", "b"]),
    ],
)
def test_a_circle_of_dependencies_is_refused_and_named(
    specs: list[tuple[str, tuple[str, ...]]], circle: list[str]
) -> None:
    with pytest.raises(Cycle) as refusal:
        rules.refuse_cycle([TaskSpec(id=i, depends_on=d) for i, d in specs])
    assert refusal.value.facts["cycle"] == circle


@given(st.lists(st.integers(0, 60), max_size=60))
def test_dependencies_that_point_backwards_are_never_a_circle(back: list[int]) -> None:
    specs = [TaskSpec(id=f"t{i}", depends_on=tuple({f"t{b % i}"}) if i else ()) for i, b in enumerate(back)]
    rules.refuse_cycle(specs)
    assert len(specs) == len(back)


def test_a_payload_over_the_limit_is_refused_by_name() -> None:
    with pytest.raises(TooLarge, match="task t has 65537 bytes"):
        rules.submitted(TaskSpec(id="t"), payload_bytes=65537, blocked=False, done=False, order=0, now=1, by=BY)


def test_what_is_unfinished_or_waited_for_is_not_purged() -> None:
    with pytest.raises(NotClaimable, match="cancel it first"):
        rules.refuse_purge(task(), needed_by=())
    done = rules.completed(claim(task()), result=False, now=3)
    with pytest.raises(NotClaimable, match="waited for by x"):
        rules.refuse_purge(done, needed_by=("x",))
    rules.refuse_purge(done, needed_by=())


class AnyLife(RuleBasedStateMachine):
    """Whatever happens to a task, fences grow, attempts stay within bounds, and only a claimed task has a holder."""

    def __init__(self) -> None:
        super().__init__()
        self.task = task(max_attempts=3)
        self.highest = 0

    @precondition(lambda self: self.task.state == "pending")
    @rule(session=st.sampled_from(["a", "b"]))
    def take(self, session: str) -> None:
        self.task = claim(self.task, session)
        assert self.task.fence > self.highest
        self.highest = self.task.fence

    @precondition(lambda self: self.task.state == "claimed")
    @rule(how=st.sampled_from(["release", "fail", "expire", "complete", "cancel"]))
    def end(self, how: str) -> None:
        self.task = {
            "release": lambda: rules.released(self.task, reason="", now=1),
            "fail": lambda: rules.failed(self.task, error="e", retry=True, now=1),
            "expire": lambda: rules.expired(self.task, why="w", now=1),
            "complete": lambda: rules.completed(self.task, result=False, now=1),
            "cancel": lambda: rules.cancelled(self.task, operator="o", now=1),
        }[how]()

    @precondition(lambda self: self.task.state == "done")
    @rule()
    def start_over_with_another_task(self) -> None:
        self.task, self.highest = task(max_attempts=3), 0

    @precondition(lambda self: self.task.state in ("dead", "cancelled"))
    @rule()
    def bring_back(self) -> None:
        self.task = rules.requeued(self.task, blocked=False, operator="o", now=1)

    @invariant()
    def holds_together(self) -> None:
        assert 0 <= self.task.attempt <= self.task.spec.max_attempts
        assert (self.task.lease != 0) == (self.task.state == "claimed")
        assert self.task.fence == self.highest


test_any_life = AnyLife.TestCase
