"""Judges a run: what clients were told, against every revision that etcd went through.

Nothing here knows how the coordinator works, only what it promises: see the invariants of the design, and
`rules.TRANSITIONS` for the life of a task.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ifabric.testing.memory_store import MemoryEtcd
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.records import Entry, Task
from ifabric_actors.coordinator.rules import TRANSITIONS
from tests.simulation.agents import AGAIN, Call
from tests.simulation.money import broken_promises, unsettled

#: what a holder does, and the line that it leaves in the task's history
ENDINGS = {"complete": "completed", "fail": "failed", "release": "released"}


class Write(NamedTuple):
    """One modification of a task."""

    revision: int
    task_id: str
    before: Task | None
    after: Task

    @property
    def entries(self) -> Sequence[Entry]:
        """The lines that it added to the history."""
        return self.after.history[-self.after.fresh :]


class Past:
    """etcd's whole history, arranged for questions."""

    def __init__(self, etcd: MemoryEtcd) -> None:
        self.writes: list[Write] = []
        self.tasks: dict[str, Task] = {}
        self._leases: defaultdict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for revision, events in etcd.history:
            for event in events:
                key = event.kv.key
                if not key.startswith(records.TASKS):
                    self._leases[key].append((revision, 0 if event.deleted else event.kv.lease))
                elif not event.deleted:
                    task_id, task = key[len(records.TASKS) :].decode(), records.stored(event.kv).task
                    self.writes.append(Write(revision, task_id, self.tasks.get(task_id), task))
                    self.tasks[task_id] = task

    def lease(self, key: bytes, before: int) -> int:
        """On which lease the key hung just before that revision; 0 when it was not there."""
        at = bisect_left(self._leases[key], (before, 0))
        return self._leases[key][at - 1][1] if at else 0


def settled(etcd: MemoryEtcd) -> dict[str, str]:
    """The tasks that are neither done nor dead, the holds that nobody owns, and what they are."""
    found = {}
    for key, kv in etcd.keys.items():
        if key.startswith(records.TASKS) and (state := records.stored(kv).task.state) not in ("done", "dead"):
            found[key.decode()] = state
    return found | unsettled(etcd)


def violations(calls: Sequence[Call], etcd: MemoryEtcd) -> list[str]:
    """Every promise that was broken, as a sentence."""
    past = Past(etcd)
    return [
        *_illegal_lives(past),
        *_claims_of_the_dead(past),
        *_requests_carried_out_twice(past),
        *_two_holders(calls),
        *_fences_told_out_of_order(calls),
        *_acknowledged_and_not_there(calls, past),
        *_answered_in_two_ways(calls),
        *broken_promises(calls, etcd),
    ]


def _illegal_lives(past: Past) -> Iterator[str]:
    for revision, task_id, before, after in past.writes:
        where = f"revision {revision}: task {task_id}"
        if before is None:
            continue
        if after.state not in TRANSITIONS[before.state].values():
            yield f"{where} went from {before.state} to {after.state}"
        granted = any(entry.event == "claimed" for entry in after.history[-after.fresh :])
        if granted and not (after.fence > before.fence and after.generation == before.generation + 1):
            yield f"{where} was granted under fence {after.fence} after {before.fence}"
        if not granted and after.fence != before.fence:
            yield f"{where} changed its fence without a grant"


def _claims_of_the_dead(past: Past) -> Iterator[str]:
    """Only a live session is given a task, or may end its claim; only a dead one is robbed of it."""
    for write in past.writes:
        revision, task_id, before, after = write
        where = f"revision {revision}: task {task_id}"
        for entry in write.entries:
            if entry.event == "claimed":
                if past.lease(records.session_key(entry.session), revision) != after.lease:
                    yield f"{where} was granted to {entry.session}, whose session had ended"
                continue
            if before is None or before.state != "claimed":
                continue
            session = past.lease(records.session_key(before.session), revision)
            deadline = past.lease(records.deadline_key(task_id), revision)
            alive = session == before.lease and (not before.deadline_lease or deadline == before.deadline_lease)
            if entry.event in ENDINGS.values() and entry.note != "bye":
                if (entry.session, entry.fence) != (before.session, before.fence):
                    yield f"{where} was {entry.event} by {entry.session} under {entry.fence}, held under {before.fence}"
                if not alive:
                    yield f"{where} was {entry.event} by {entry.session}, whose claim had ended"
            elif entry.event == "expired" and alive:
                yield f"{where} was taken from {before.session}, which was alive"


def _requests_carried_out_twice(past: Past) -> Iterator[str]:
    effects = Counter((entry.request, w.task_id) for w in past.writes for entry in w.entries if entry.request)
    yield from (
        f"request {request} was carried out {n} times on {task}" for (request, task), n in effects.items() if n > 1
    )
    grants = Counter(e.request for w in past.writes for e in w.entries if e.request and e.event == "claimed")
    yield from (f"request {request} was granted {n} tasks" for request, n in grants.items() if n > 1)


def _granted(calls: Sequence[Call]) -> Iterator[tuple[Call, dict[str, Any], int, int]]:
    """Who was told that it holds a task: the call, the answer, when it was first asked and when answered."""
    for call in calls:
        for attempt in call.attempts:
            if call.verb in ("claim", "next") and attempt.code == "ok":
                yield call, attempt.body, call.attempts[0].sent, attempt.answered


def _two_holders(calls: Sequence[Call]) -> Iterator[str]:
    holders: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for call, body, _, _ in _granted(calls):
        holders[body["task"], body["fence"]].add(call.session)
    for (task, fence), sessions in holders.items():
        if len(sessions) > 1:
            yield f"task {task} was granted to {sorted(sessions)} under one fence, {fence}"


def _fences_told_out_of_order(calls: Sequence[Call]) -> Iterator[str]:
    """A grant asked for after another was answered has a greater fence, or is the same grant."""
    first: dict[tuple[str, str, int], tuple[int, int]] = {}
    for call, body, sent, answered in _granted(calls):
        known = first.setdefault((call.request_id, body["task"], body["fence"]), (sent, answered))
        if known[1] > answered:
            first[call.request_id, body["task"], body["fence"]] = (known[0], answered)
    grants = [(task, fence, sent, answered) for (_, task, fence), (sent, answered) in first.items()]
    for task, fence, _, answered in grants:
        for other, its_fence, sent, _ in grants:
            if other == task and sent > answered and its_fence < fence:
                yield f"task {task} was granted under {its_fence} after it had been under {fence}"


def _acknowledged_and_not_there(calls: Sequence[Call], past: Past) -> Iterator[str]:
    left = {(w.task_id, e.event, e.fence, e.session): e.request for w in past.writes for e in w.entries}
    submitted = {w.task_id for w in past.writes}
    for call, body, _, _ in _granted(calls):
        if (body["task"], "claimed", body["fence"], call.session) not in left:
            yield f"{call.session} was granted {body['task']} under {body['fence']}, which etcd never knew"
    for call in calls:
        if not any(attempt.code == "ok" for attempt in call.attempts):
            continue
        if call.verb == "submit":
            missing = {task["id"] for task in call.body["tasks"]} - submitted
            if missing:
                yield f"the submission of {sorted(missing)} was acknowledged, and they are not there"
        if call.verb not in ENDINGS:
            continue
        task_id, fence = call.body["task"], call.body["fence"]
        request = left.get((task_id, ENDINGS[call.verb], fence, call.session))
        if request != call.request_id:
            yield f"{call.verb} of {task_id} under {fence} was acknowledged to {call.session}, and etcd never knew"
        elif call.verb == "complete" and past.tasks[task_id].state != "done":
            yield f"the completion of {task_id} was acknowledged, and it is {past.tasks[task_id].state}"


def _answered_in_two_ways(calls: Sequence[Call]) -> Iterator[str]:
    for call in calls:
        good = [attempt for attempt in call.attempts if attempt.code == "ok"]
        if call.verb == "renew" or not good:
            continue
        different = [attempt.body for attempt in good if _essence(attempt.body) != _essence(good[0].body)]
        if different:
            yield f"{call.verb} {call.request_id} was answered {good[0].body} and {different[0]}"
        since = min(attempt.answered for attempt in good)
        for attempt in call.attempts:
            if attempt.sent > since and attempt.code not in ("ok", "", *AGAIN):
                yield f"{call.verb} {call.request_id} had succeeded, and was then refused: {attempt.code}"


def _essence(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("again", "spec", "ttl_s")}
