"""What is on the board: putting tasks there, and reading it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from ifabric.actor.base import Caller
from ifabric.clock import rfc3339
from ifabric.errors import Conflict, UnknownDependency, UnknownTask
from ifabric.store.base import Put
from ifabric.wire import coordinator as wire
from ifabric.wire.envelope import encode
from ifabric.wire.overview import fitting
from ifabric_actors.coordinator import paging, records, rules
from ifabric_actors.coordinator.desk import Plan, Write
from ifabric_actors.coordinator.office import Office, reply_of, with_payload
from ifabric_actors.coordinator.records import Entry, Stored


class Submissions:
    """Carries out `submit`, `get` and `list`."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._board, self._desk, self._store, self._clock = office.board, office.desk, office.store, office.clock
        #: one search at a time: between two pieces of it, others wait for one piece and not for many
        self._searching = asyncio.Lock()

    async def submit(self, message: wire.Submit, caller: Caller) -> Any:
        rules.refuse_cycle(message.tasks)
        specs = {spec.id: spec for spec in message.tasks}
        if len(specs) != len(message.tasks):
            raise Conflict("a task id is given twice in one submission; nothing was submitted")
        payloads = {s.id: encode(s.payload) if s.payload is not None else b"" for s in message.tasks}
        bare = (len(encode(msgspec.structs.replace(s, payload=None))) for s in message.tasks)
        rules.refuse_large_submission(sum(bare) + sum(map(len, payloads.values())))
        elsewhere = tuple(sorted({d for s in message.tasks for d in s.depends_on} - specs.keys()))
        done_ids = set(message.done)

        await self._desk.learn_tasks([task for task in elsewhere if task not in self._board.tasks], caller.session)

        def decide() -> Plan:
            now = self._clock.wall_ms()
            unknown = [task for task in elsewhere if task not in self._board.tasks]
            if unknown:
                raise UnknownDependency(
                    f"no task {', '.join(unknown[:10])} exists; nothing was submitted", unknown=unknown
                )
            by = Entry(now, "submitted", caller.session, request=message.request_id or "")
            existing, writes, others = [], [], []
            finished = {task for task in elsewhere if self._board.all_done((task,))} | done_ids
            for spec in message.tasks:
                known = self._board.tasks.get(spec.id)
                if known is not None:
                    if known.task.body != records.body_digest(spec):
                        raise Conflict(f"task {spec.id} exists with another body; nothing was submitted", task=spec.id)
                    existing.append(spec.id)
                    if known.task.state == "done":
                        finished.add(spec.id)
            for order, spec in enumerate(message.tasks):
                if spec.id in self._board.tasks:
                    continue
                task = rules.submitted(
                    spec,
                    payload_bytes=len(payloads[spec.id]),
                    blocked=not finished.issuperset(spec.depends_on),
                    done=spec.id in done_ids,
                    order=order,
                    now=now,
                    by=by,
                )
                writes.append(Write(spec.id, task))
                if payloads[spec.id]:
                    others.append(Put(records.PAYLOADS + spec.id.encode(), payloads[spec.id]))
            reply = wire.SubmitReply(created=tuple(w.task_id for w in writes), existing=tuple(existing))
            return Plan(reply, tuple(writes), others=tuple(others))

        return reply_of(await self._desk.transact(caller, message, tuple(specs), decide))

    async def get(self, message: wire.Get, caller: Caller) -> wire.GetReply:
        name = message.task.encode()
        keys = (records.TASKS, records.PAYLOADS, records.RESULTS)
        kvs = [await self._store.get(prefix + name) for prefix in keys[:1]]
        if kvs[0] is None:
            raise UnknownTask(f"there is no task {message.task}", task=message.task)
        stored = records.stored(kvs[0])
        task = stored.task
        self._board.put(message.task, stored)
        payload = await self._store.get(records.PAYLOADS + name) if task.payload else None
        result = await self._store.get(records.RESULTS + name) if task.result else None
        return wire.GetReply(
            task=message.task,
            state=task.state,
            attempt=task.attempt,
            fence=task.fence,
            session=task.session if task.state == "claimed" else None,
            spec=with_payload(task, payload.value if payload else b""),
            result=msgspec.json.decode(result.value) if result else None,
            error=task.error,
            waiting_for=self._board.waiting_for(task.spec.depends_on) if task.state == "blocked" else (),
            history=tuple(
                wire.Transition(
                    at=rfc3339(entry.at), event=entry.event, session=entry.session, fence=entry.fence, note=entry.note
                )
                for entry in task.history
            ),
            revision=stored.mod_revision,
        )

    async def list(self, message: wire.List, caller: Caller) -> wire.ListReply:
        await self._office.feed.settle()
        found = await self._search(message)
        lines = [
            wire.TaskLine(
                task=task_id,
                state=stored.task.state,
                title=stored.task.spec.title,
                priority=stored.task.spec.priority,
                needs=stored.task.spec.needs,
                session=stored.task.session if stored.task.state == "claimed" else None,
                attempt=stored.task.attempt,
                max_attempts=stored.task.spec.max_attempts,
                fence=stored.task.fence,
            )
            for task_id, stored in found[: message.limit]
        ]
        shown = fitting(lines)
        after = shown[-1].task if len(found) > len(shown) else None
        return wire.ListReply(tasks=shown, after=after, counts=dict[str, int](self._board.counts.items()))

    async def _search(self, message: wire.List) -> Sequence[tuple[str, Stored]]:
        """The page, and one more when there is one."""
        board, want = self._board, message.limit + 1
        needle = (message.match or "").casefold()
        found, after, end = paging.look(
            board.tasks, message.state, needle, message.after, want, max(want, paging.PIECE)
        )
        if end or len(found) == want:
            return found
        async with self._searching:
            while not end and len(found) < want:
                await self._clock.sleep(0)
                more, after, end = paging.look(board.tasks, message.state, needle, after, want - len(found))
                found += more
        return found
