"""What does it cost to find a task for a session, and sessions for a task?

`next` on a board of its own, without a daemon: 1,000 sessions take turns at 10,000 pending tasks of 1, 100 and 10,000
different demands, with the cache and without it. `match` over 1,000 sessions, asked through NATS of a daemon. And what
the governor pays for knowing every task: one event of each kind, taken in.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import msgspec
import nats

from bench.stand import closed_loop, percentile, stand
from ifabric.clock import monotonic, seeded
from ifabric.store.base import KV
from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.records import Stored, Task
from ifabric_actors.coordinator.shelves import Shelves
from ifabric_actors.governor.matching import Cache, Offer, Terms
from ifabric_actors.governor.roster import Tasks

SESSIONS, TASKS, PICKS = 1_000, 10_000, 5_000
DEMANDS = (1, 100, 10_000)
#: among how many different sets of capabilities the sessions are spread
KINDS = (1, 50, 1_000)
NAMES = tuple(f"skill-{number}" for number in range(40))
HAVE, NEED, WANT = 12, 2, 1
ALONE, CLOSED, CALLERS = 500, 2_000, 16


def board_of(demands: int, *, cache: bool) -> Board:
    """A board with all tasks pending."""
    chance = seeded(demands)
    # one demand: what is asked of nobody in particular, as on a board that says nothing of capabilities
    asked: dict[tuple[tuple[str, ...], tuple[str, ...]], None] = {((), ()): None} if demands == 1 else {}
    while len(asked) < demands:
        names = chance.sample(NAMES, NEED + WANT)
        asked[tuple(sorted(names[:NEED])), tuple(names[NEED:])] = None
    made = Board(
        lambda _change: None,
        lambda _session, _lease: None,
        Shelves(Terms(), Cache(monotonic, enabled=cache), Cache(monotonic, enabled=cache)),
    )
    for number, (needs, wants) in zip(range(TASKS), itertools.cycle(asked), strict=False):
        spec = TaskSpec(id=f"T{number}", needs=needs, wants=wants)
        made.put(spec.id, Stored(Task(spec=spec, state="pending", body=""), number + 1, number + 1))
    return made


def picks(demands: int, kinds: int, *, cache: bool) -> str:
    """One line: what a pick cost."""
    chance = seeded(kinds)
    sets = [frozenset(chance.sample(NAMES, HAVE)) for _ in range(kinds)]
    offers = [Offer(sets[number % kinds]) for number in range(SESSIONS)]
    board = board_of(demands, cache=cache)
    taken: list[float] = []
    found = 0
    for number in range(PICKS):
        began = monotonic()
        best = board.best(offers[number % SESSIONS])
        taken.append(monotonic() - began)
        if best is not None:
            found += 1
            stored = board.tasks[best.task_id]
            board.reserve(best.task_id)
            held = msgspec.structs.replace(stored.task, state="claimed", session="s")
            board.put(best.task_id, Stored(held, TASKS + number + 1, stored.create_revision))
            board.unreserve(best.task_id)
    mean = sum(taken) / len(taken)
    taken.sort()
    p50, p99 = (percentile(taken, share) * 1e6 for share in (0.5, 0.99))
    return f"mean {mean * 1e6:8.1f}  p50 {p50:8.1f}  p99 {p99:8.1f} us a pick ({found:,} of {PICKS:,} found one)"


def events() -> str:
    """One line: what taking in a task's life costs the governor."""
    roster = Tasks()
    spec = TaskSpec(id="T", needs=("a", "b"), wants=("c",), title="a title of usual length, or so")
    values = [
        records.encode(Task(spec=spec, state="pending", body="0" * 32)),
        records.encode(Task(spec=spec, state="claimed", body="0" * 32, session="agent-7", fence=2**40 + 1, lease=7)),
        records.encode(Task(spec=spec, state="done", body="0" * 32, fence=2**40 + 1)),
    ]
    keys = [records.task_key(f"T{number}") for number in range(TASKS)]
    began = monotonic()
    for revision, value in enumerate(values, 1):
        for key in keys:
            roster.take(KV(key, value, 1, revision, revision, 0))
    return f"{(monotonic() - began) / (len(values) * TASKS) * 1e6:.2f} us an event"


async def matches() -> None:
    """Prints how long a `match` takes over all sessions, with one set of capabilities and with a thousand."""
    async with stand() as where:
        nc = await nats.connect(where.nats)

        async def ask(subject: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = await nc.request(subject, json.dumps(body).encode(), timeout=30)
            found: dict[str, Any] = json.loads(answer.data)
            if "error" in found:
                raise SystemExit(f"{subject}: {found['error']}")
            return found

        chance = seeded(1)
        for kinds in (1, SESSIONS):
            sets = [chance.sample(NAMES, HAVE) for _ in range(kinds)]
            for number in range(SESSIONS):
                body = {"ttl_s": 600, "capabilities": sets[number % kinds]}
                await ask(f"if.v1.coordinator.hello.s{number}", body)
            await asyncio.sleep(1)
            demands = [
                {"needs": names[:NEED], "wants": names[NEED:]}
                for names in (chance.sample(NAMES, NEED + WANT) for _ in range(ALONE + CLOSED))
            ]
            for what, of in (("the same demand", demands[:1]), ("always another demand", demands)):
                bodies = itertools.cycle(of)

                async def act(_number: int, bodies: Any = bodies) -> None:
                    await ask("if.v1.governor.match.bench", next(bodies))

                reply = await ask("if.v1.governor.match.bench", of[0])
                assert reply["sessions"] == SESSIONS, reply["sessions"]
                alone = await closed_loop(act, iter(range(ALONE)), 1)
                began = monotonic()
                await closed_loop(act, iter(range(CLOSED)), CALLERS)
                print(
                    f"  match, {SESSIONS:,} sessions, {kinds:>5,} kinds, {what}: alone p50 "
                    f"{percentile(alone, 0.5) * 1e3:.2f} ms, p95 {percentile(alone, 0.95) * 1e3:.2f} ms; "
                    f"closed loop {CLOSED / (monotonic() - began):,.0f} /s"
                )
        await nc.close()


async def main() -> None:
    """Prints every figure."""
    for demands, kinds, cache in itertools.product(DEMANDS, KINDS, (True, False)):
        print(
            f"  next, {demands:>6,} demands, {kinds:>5,} kinds of session, cache {'on ' if cache else 'off'}: "
            f"{picks(demands, kinds, cache=cache)}"
        )
    print(f"  a task's change, into the governor's roster: {events()}")
    await matches()
