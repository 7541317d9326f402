"""Task events, made from what was committed: one for each transition that a write made."""

from __future__ import annotations

from typing import Any

from ifabric.actor.publisher import Entry, Source
from ifabric.clock import Clock, rfc3339
from ifabric.store.base import KV
from ifabric.wire import subjects
from ifabric.wire.coordinator import EVENTS, FURTHER_EVENTS, TaskEvent
from ifabric.wire.envelope import encode
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.records import Task

#: the events that stand for a revision (`renew_lost` is an answer that somebody got, and was never committed)
COMMITTED = tuple(what for what in (*EVENTS, *FURTHER_EVENTS) if what != "renew_lost")


def source(clock: Clock) -> Source:
    """What the coordinator publishes."""

    def tell(kv: KV, record: Any) -> list[Entry]:
        task_id, revision = kv.key[len(records.TASKS) :].decode(), kv.mod_revision
        if record is None:
            body = {"event": "purged", "at": rfc3339(clock.wall_ms()), "revision": revision, "task": task_id}
            return [(subjects.event("task", "purged"), encode(body), f"tasks/{task_id}@{revision}")]
        task: Task = record
        return [
            (
                subjects.event("task", entry.event),
                encode(
                    TaskEvent(
                        event=entry.event,
                        at=rfc3339(entry.at),
                        revision=revision,
                        task=task_id,
                        state=task.state,
                        session=entry.session or None,
                        fence=entry.fence,
                        attempt=task.attempt,
                        note=entry.note,
                    )
                ),
                f"tasks/{task_id}@{revision}.{place}",
            )
            for place, entry in enumerate(task.history[-task.fresh :] if task.fresh else ())
        ]

    return Source(
        key=records.PUBLISHER_KEY,
        prefix=records.TASKS,
        read=lambda kv: records.stored(kv).task,
        tell=tell,
        subjects=tuple(subjects.event("task", what) for what in COMMITTED),
        resync_subject=subjects.event("task", "resync"),
    )
