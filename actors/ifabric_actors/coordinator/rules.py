"""What the coordinator believes about tasks, claims and fences. Pure: no clock, no store, no waiting.

**A claim is a lease, and a lease is not a lock.** etcd decides when a session is dead; the session's work goes on
wherever it runs, and finds out later. So the promise is not "only one works on it", which nobody can keep, but: *at
most one is told granted under a fence, fences only grow, and what arrives under an old one changes nothing*. The
fence goes to every side effect that can check it.

**The fence** is ``incarnation * 2^40 + generation``: the generation counts the grants of this task; the incarnation
counts the restores of the cluster, because a restored backup has forgotten the last generations and would give them
out again. 2^53 keeps it exact in every JSON reader. It is never compared with another task's.

**Attempts.** A grant costs one. Giving the task back on purpose (`release`, `bye`) returns it; failing, or dying with
it, does not. When the last one is spent the task is `dead`, and only an operator brings it back: a poisonous task
must not eat the swarm.

**Who may end a claim**: the session that holds it, under its fence, while its session's lease lives (the actor adds
that compare to the transaction); the lease's end; the claim's own deadline; an operator.

Every function takes what is stored and returns what is to be stored, or raises the refusal. The commit compares that
what was stored is still so: a decision made on old knowledge has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from msgspec.structs import replace

from ifabric.errors import BadRequest, CapabilityMissing, ClaimLost, ClaimTaken, Cycle, NotClaimable, TooLarge
from ifabric.wire.coordinator import State, TaskSpec
from ifabric.wire.envelope import PAYLOAD_MAX_BYTES
from ifabric_actors.coordinator.records import HISTORY_MAX, Entry, Seat, Task, body_digest

Event = Literal[
    "submit",
    "claim",
    "release",
    "expire",
    "complete",
    "fail",
    "give_up",
    "unblock",
    "cancel",
    "requeue",
    "requeue_blocked",
]

GENERATIONS = 2**40
INCARNATION_MAX = 2**13 - 1
#: what one submission may take in the store: etcd takes 1.5 MiB in one transaction, and the records have more to say
SUBMISSION_MAX_BYTES = 1_310_720

#: The whole life of a task. What is not here is refused.
TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    "blocked": {"unblock": "pending", "cancel": "cancelled"},
    "pending": {"claim": "claimed", "cancel": "cancelled"},
    "claimed": {
        "release": "pending",
        "expire": "pending",
        "fail": "pending",
        "give_up": "dead",
        "complete": "done",
        "cancel": "cancelled",
    },
    "done": {},
    "dead": {"requeue": "pending", "requeue_blocked": "blocked", "cancel": "cancelled"},
    "cancelled": {"requeue": "pending", "requeue_blocked": "blocked"},
}


def fence_of(incarnation: int, generation: int) -> int:
    """The fence of a grant."""
    assert 0 < incarnation <= INCARNATION_MAX, "the incarnation is out of range"
    assert 0 < generation < GENERATIONS, "the generation is out of range"
    return incarnation * GENERATIONS + generation


def _move(task: Task, event: Event, *entries: Entry, **changes: Any) -> Task:
    state = TRANSITIONS[task.state].get(event)
    if state is None:
        raise NotClaimable(
            f"task {task.spec.id} is {task.state}: it cannot {event}", state=task.state, task=task.spec.id
        )
    history = (*task.history, *entries)[-HISTORY_MAX:]
    return replace(task, state=state, history=history, fresh=len(entries), **changes)


_FREE: dict[str, Any] = {"session": "", "lease": 0, "deadline_lease": 0, "hold": None}


# -- submitting -----------------------------------------------------------------------------------------------------


def submitted(
    spec: TaskSpec, *, payload_bytes: int, blocked: bool, done: bool, order: int, now: int, by: Entry
) -> Task:
    """A new task's record. `BadRequest` when it cannot be one."""
    if payload_bytes > PAYLOAD_MAX_BYTES:
        raise TooLarge(
            f"the payload of task {spec.id} has {payload_bytes} bytes; {PAYLOAD_MAX_BYTES} are allowed. Nothing was submitted.",
            limit_bytes=PAYLOAD_MAX_BYTES,
        )
    if len(set(spec.depends_on)) != len(spec.depends_on):
        raise BadRequest(f"task {spec.id} names a dependency twice")
    state: State = "done" if done else "blocked" if blocked else "pending"
    return Task(
        spec=replace(spec, payload=None),
        state=state,
        body=body_digest(spec),
        order=order,
        payload=payload_bytes > 0,
        history=(replace(by, at=now, event="submitted", note="arrived done" if done else ""),),
    )


def refuse_large_submission(stored_bytes: int) -> None:
    """JSON may grow when it is stored: ``1e15`` becomes eighteen bytes."""
    if stored_bytes > SUBMISSION_MAX_BYTES:
        raise TooLarge(
            f"the tasks take {stored_bytes} bytes; {SUBMISSION_MAX_BYTES} may be submitted at once. Nothing was submitted.",
            limit_bytes=SUBMISSION_MAX_BYTES,
        )


def refuse_cycle(specs: Iterable[TaskSpec]) -> None:
    """Raises `Cycle`, naming one, when the tasks depend on each other in a circle.

    Only tasks of one submission can: a dependency exists before what depends on it, or comes with it.
    """
    depends = {spec.id: spec.depends_on for spec in specs}
    settled: set[str] = set()
    for root, first in depends.items():
        if root in settled:
            continue
        path: dict[str, None] = {root: None}
        stack = [(root, iter(first))]
        while stack:
            task, rest = stack[-1]
            for other in rest:
                if other in path:
                    circle = [*list(path)[list(path).index(other) :], other]
                    raise Cycle(f"the tasks depend on each other in a circle: {' -> '.join(circle)}", cycle=circle)
                if other in depends and other not in settled:
                    path[other] = None
                    stack.append((other, iter(depends[other])))
                    break
            else:
                stack.pop()
                path.pop(task)
                settled.add(task)


# -- claiming ---------------------------------------------------------------------------------------------------------


def holds(task: Task, session: str, seat: Seat) -> bool:
    """Whether this session, in this life of it, holds the task."""
    return task.state == "claimed" and task.session == session and task.lease == seat.lease


def claimed(
    task: Task, session: str, seat: Seat, *, incarnation: int, deadline_lease: int, now: int, request: str
) -> Task:
    """The task in the hands of `session`. Raises `ClaimTaken`, `NotClaimable` or `CapabilityMissing`."""
    if task.state == "claimed":
        raise ClaimTaken(f"task {task.spec.id} is held by {task.session}", task=task.spec.id, by=task.session)
    missing = sorted(set(task.spec.needs) - seat.capabilities)
    if missing:
        raise CapabilityMissing(
            f"task {task.spec.id} needs {', '.join(missing)}, which session {session} does not have",
            task=task.spec.id,
            missing=missing,
        )
    generation = task.generation + 1
    fence = fence_of(incarnation, generation)
    grown = _move(
        task,
        "claim",
        Entry(now, "claimed", session, fence, request=request),
        generation=generation,
        fence=fence,
        attempt=task.attempt + 1,
        session=session,
        lease=seat.lease,
        deadline_lease=deadline_lease,
    )
    assert grown.fence > task.fence, "a fence only grows"
    return grown


# -- ending a claim --------------------------------------------------------------------------------------------------


def check_holder(task: Task, session: str, fence: int, *, seat: Seat | None, incarnation: int) -> None:
    """Raises `ClaimLost` unless `session` holds the task under `fence`, now and in this incarnation of the cluster."""
    if (
        task.state == "claimed"
        and task.session == session
        and task.fence == fence
        and fence // GENERATIONS == incarnation
        and seat is not None
        and seat.lease == task.lease
    ):
        return
    facts: dict[str, Any] = {"task": task.spec.id, "fence": task.fence, "state": task.state}
    if task.state == "claimed" and task.session != session:
        facts["by"] = task.session
    raise ClaimLost(
        f"session {session} does not hold task {task.spec.id} under fence {fence}; it is {task.state}, last fence {task.fence}",
        **facts,
    )


def deadline_lost(task: Task) -> ClaimLost:
    """The refusal when a claim's own deadline has passed."""
    return ClaimLost(
        f"the claim of task {task.spec.id} had a deadline of {task.spec.deadline_s} s, which has passed",
        task=task.spec.id,
        fence=task.fence,
        state=task.state,
    )


def refuse_large_result(task_id: str, result_bytes: int) -> None:
    if result_bytes > PAYLOAD_MAX_BYTES:
        raise TooLarge(
            f"the result of task {task_id} has {result_bytes} bytes; {PAYLOAD_MAX_BYTES} are allowed. Nothing was completed.",
            limit_bytes=PAYLOAD_MAX_BYTES,
        )


def released(task: Task, *, reason: str, now: int, request: str = "") -> Task:
    """Back on the board, as if it had not been claimed but for the fence."""
    entry = Entry(now, "released", task.session, task.fence, reason[:200], request)
    return _move(task, "release", entry, attempt=max(0, task.attempt - 1), **_FREE)


def completed(task: Task, *, result: bool, now: int, request: str = "") -> Task:
    entry = Entry(now, "completed", task.session, task.fence, request=request)
    return _move(task, "complete", entry, result=result, error="", **_FREE)


def failed(task: Task, *, error: str, retry: bool, now: int, request: str = "") -> Task:
    """Pending again, or dead when the attempts are spent or a retry is not wanted."""
    entry = Entry(now, "failed", task.session, task.fence, error[:200], request)
    return _spent(task, "fail", entry, again=retry, error=error)


def expired(task: Task, *, why: str, now: int) -> Task:
    """What becomes of a claim whose session's lease, own deadline or incarnation has ended."""
    return _spent(task, "expire", Entry(now, "expired", task.session, task.fence, why), again=True, error=task.error)


def _spent(task: Task, event: Event, entry: Entry, *, again: bool, error: str) -> Task:
    if again and task.attempt < task.spec.max_attempts:
        return _move(task, event, entry, error=error, **_FREE)
    note = f"{task.attempt} of {task.spec.max_attempts} attempts spent" if again else "no retry was wanted"
    dead = Entry(entry.at, "dead", task.session, task.fence, note)
    return _move(task, "give_up", entry, dead, error=error, **_FREE)


# -- dependencies and operators --------------------------------------------------------------------------------------


def unblocked(task: Task, *, by: str, now: int) -> Task:
    return _move(task, "unblock", Entry(now, "unblocked", note=f"after {by}" if by else ""))


def cancelled(task: Task, *, operator: str, now: int, request: str = "") -> Task:
    """Off the board. A holder keeps its fence in the record, so that its renewal can tell it so."""
    entry = Entry(now, "cancelled", operator, task.fence, "by an operator", request)
    return _move(task, "cancel", entry, lease=0, deadline_lease=0, hold=None)


def requeued(task: Task, *, blocked: bool, operator: str, now: int, request: str = "") -> Task:
    """Back on the board with all its attempts."""
    entry = Entry(now, "requeued", operator, task.fence, "by an operator", request)
    return _move(task, "requeue_blocked" if blocked else "requeue", entry, attempt=0, error="", **_FREE)


def refuse_purge(task: Task, *, needed_by: Iterable[str]) -> None:
    """Raises `NotClaimable` unless the task may be forgotten."""
    if task.state not in ("done", "dead", "cancelled"):
        raise NotClaimable(f"task {task.spec.id} is {task.state}: cancel it first", state=task.state, task=task.spec.id)
    waiting = sorted(needed_by)[:10]
    if waiting:
        raise NotClaimable(
            f"task {task.spec.id} is waited for by {', '.join(waiting)}", state=task.state, needed_by=waiting
        )
