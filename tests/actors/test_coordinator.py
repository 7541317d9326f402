"""The coordinator's promises, over the twins and over real etcd and NATS."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ifabric.errors import (
    CapabilityMissing,
    ClaimLost,
    ClaimTaken,
    Conflict,
    Cycle,
    FabricError,
    NoTaskMatches,
    NotClaimable,
    SessionLost,
    TooLarge,
    Unavailable,
    UnknownDependency,
    UnknownTask,
)
from ifabric.store.base import Put, Txn
from ifabric.store.commit import INCARNATION_KEY
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.coordinator.sweeper import Sweeper

from .conftest import World

PATIENCE_S = 10.0


async def tasks(world: World, *specs: dict[str, Any] | str) -> None:
    await world.ask("submit", "op", tasks=[{"id": s} if isinstance(s, str) else s for s in specs])


async def eventually(world: World, task: str, **wanted: Any) -> dict[str, Any]:
    """The task, once it is as wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await world.ask("get", "op", task=task)
            if all(found.get(key) == value for key, value in wanted.items()):
                return found
            await asyncio.sleep(0.02)


# -- invariant 1: one live holder ---------------------------------------------------------------------------------------


async def test_two_hundred_sessions_race_for_one_task_and_one_gets_it(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await tasks(world, "T")
    names = [f"s{n}" for n in range(200)]
    await asyncio.gather(*(world.ask("hello", name) for name in names))
    answers = await asyncio.gather(*(world.ask("claim", name, task="T") for name in names), return_exceptions=True)
    granted = [a for a in answers if isinstance(a, dict)]
    refused = [a for a in answers if isinstance(a, ClaimTaken)]
    assert (len(granted), len(refused)) == (1, 199)
    holder = (await world.ask("get", "op", task="T"))["session"]
    assert {refusal.facts["by"] for refusal in refused} == {holder}


async def test_fences_grow_over_release_expiry_and_restart(world: World) -> None:
    daemon = await world.daemon()
    await tasks(world, {"id": "T", "max_attempts": 9})
    fences = []
    await world.ask("hello", "a", ttl_s=60)
    for _ in range(3):
        fences.append((await world.ask("claim", "a", task="T"))["fence"])
        await world.ask("release", "a", task="T", fence=fences[-1])
    await daemon.stop()
    await world.daemon()
    fences.append((await world.ask("claim", "a", task="T"))["fence"])
    assert fences == sorted(set(fences))
    assert fences[0] == 2**40 + 1


async def test_two_daemons_give_every_task_to_one_session_only(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await tasks(world, *(f"T{n:03d}" for n in range(100)))
    names = [f"s{n}" for n in range(20)]
    await asyncio.gather(*(world.ask("hello", name) for name in names))
    taken: list[str] = []

    async def worker(name: str) -> None:
        while True:
            try:
                claim = await world.ask("next", name)
            except NoTaskMatches:
                return
            taken.append(claim["task"])
            await world.ask("complete", name, task=claim["task"], fence=claim["fence"])

    await asyncio.gather(*(worker(name) for name in names))
    assert sorted(taken) == [f"T{n:03d}" for n in range(100)]
    assert (await world.ask("list", "op"))["counts"]["done"] == 100


# -- invariant 2: a stale holder changes nothing --------------------------------------------------------------------------


async def test_a_holder_that_slept_past_its_ttl_comes_back_to_claim_lost(world: World) -> None:
    await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "sleepy", ttl_s=2)
    old = (await world.ask("claim", "sleepy", task="T"))["fence"]
    await eventually(world, "T", state="pending")
    await world.ask("hello", "sleepy", ttl_s=60)
    for verb, more in (("complete", {}), ("fail", {"error": "x"}), ("release", {})):
        refusal = await world.refusal(verb, "sleepy", task="T", fence=old, **more)
        assert isinstance(refusal, ClaimLost)
        assert refusal.facts["fence"] == old
    await world.ask("hello", "quick")
    new = (await world.ask("claim", "quick", task="T"))["fence"]
    lost = await world.refusal("complete", "sleepy", task="T", fence=old)
    assert (lost.facts["by"], lost.facts["fence"]) == ("quick", new)
    assert (await world.ask("complete", "quick", task="T", fence=new))["state"] == "done"


async def test_the_session_is_compared_in_the_transaction_not_on_the_board(world: World) -> None:
    """The daemon still believes in a session whose lease is gone: its board is behind. The commit is not fooled."""
    daemon = await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a", ttl_s=60)
    fence = (await world.ask("claim", "a", task="T"))["fence"]
    board = daemon.actor.board  # type: ignore[attr-defined]
    seat = board.sessions["a"]
    await daemon.store.revoke(seat.lease)
    board.sessions["a"] = seat
    refusal = await world.refusal("complete", "a", task="T", fence=fence)
    assert isinstance(refusal, ClaimLost)
    assert (await world.ask("get", "op", task="T"))["state"] != "done"


async def test_a_wrong_fence_and_a_strangers_hand_are_refused(world: World) -> None:
    await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a")
    await world.ask("hello", "b")
    fence = (await world.ask("claim", "a", task="T"))["fence"]
    for session, wrong in (("a", fence + 1), ("a", fence - 1), ("a", 0), ("b", fence), ("nobody", fence)):
        assert isinstance(await world.refusal("complete", session, task="T", fence=wrong), ClaimLost)
    assert (await world.ask("get", "op", task="T"))["state"] == "claimed"


async def test_a_claim_may_have_a_deadline_of_its_own(world: World) -> None:
    await world.daemon()
    await tasks(world, {"id": "T", "deadline_s": 2})
    await world.ask("hello", "a", ttl_s=60)
    fence = (await world.ask("claim", "a", task="T"))["fence"]
    found = await eventually(world, "T", state="pending")
    assert found["history"][-1]["note"] == "deadline passed"
    assert isinstance(await world.refusal("complete", "a", task="T", fence=fence), ClaimLost)
    again = await world.ask("claim", "a", task="T")
    assert (await world.ask("complete", "a", task="T", fence=again["fence"]))["state"] == "done"


async def test_a_daemon_that_has_not_heard_of_a_deadline_yet_believes_its_holder(world: World) -> None:
    first, second = await world.daemon(), await world.daemon()
    await tasks(world, {"id": "T", "deadline_s": 60})
    await world.ask("hello", "a", ttl_s=60)
    fence = (await world.ask("claim", "a", task="T"))["fence"]
    for daemon in (first, second):
        coordinator = daemon.actor
        assert isinstance(coordinator, Coordinator)
        coordinator._office.deadlines.clear()
    assert (await world.ask("complete", "a", task="T", fence=fence))["state"] == "done"


async def test_after_a_restore_the_old_fences_are_refused(world: World) -> None:
    daemon = await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a", ttl_s=60)
    old = (await world.ask("claim", "a", task="T"))["fence"]
    await daemon.store.txn(Txn((), (Put(INCARNATION_KEY, b"2"),)))
    refusal = await world.refusal("complete", "a", task="T", fence=old)
    assert isinstance(refusal, Unavailable), "a daemon that believes in the old incarnation commits nothing"
    assert "incarnation" in (await daemon.committer.lost)
    await daemon.stop()
    world.daemons.remove(daemon)
    await world.daemon()
    assert isinstance(await world.refusal("complete", "a", task="T", fence=old), ClaimLost)
    found = await eventually(world, "T", state="pending")
    assert found["history"][-1]["note"] == "restored from a backup"
    assert (await world.ask("claim", "a", task="T"))["fence"] > old
    assert (await world.ask("hello", "b"))["incarnation"] == 2


async def test_after_a_restore_a_renewal_tells_the_old_fences_before_they_are_swept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a", ttl_s=60)
    old = (await world.ask("claim", "a", task="T"))["fence"]
    await daemon.stop()
    world.daemons.remove(daemon)
    await daemon.store.txn(Txn((), (Put(INCARNATION_KEY, b"2"),)))

    async def not_yet(self: Sweeper, task_id: str) -> None:
        """The sweeper has not come to it."""

    monkeypatch.setattr(Sweeper, "_expire_one", not_yet)
    await world.daemon()
    renewed = await world.ask("renew", "a", claims=[{"task": "T", "fence": old}])
    assert renewed["lost"] == [{"task": "T", "fence": old}]


# -- invariant 3 and 4: acknowledged is kept; a retry is the same request ---------------------------------------------------


async def test_a_retry_gets_the_first_answer_from_another_daemon(world: World) -> None:
    first = await world.daemon()
    await tasks(world, {"id": "T", "payload": {"deep": [1, 2]}}, {"id": "U", "depends_on": ["T"]})
    await world.ask("hello", "a", request_id="h1")
    claim = await world.ask("claim", "a", task="T", request_id="c1")
    await first.stop()
    world.daemons.remove(first)
    await world.daemon()
    assert await world.ask("claim", "a", task="T", request_id="c1") == claim
    done = await world.ask("complete", "a", task="T", fence=claim["fence"], request_id="d1")
    assert done == {"state": "done", "unblocked": ["U"]}
    assert await world.ask("complete", "a", task="T", fence=claim["fence"], request_id="d1") == done
    assert await world.ask("claim", "a", task="T", request_id="c1") == claim, "even now that it is done"
    taken = await world.ask("next", "a", request_id="n1")
    assert taken["task"] == "U"
    assert await world.ask("next", "a", request_id="n1") == taken
    await world.ask("release", "a", task="U", fence=taken["fence"], request_id="r1")
    assert await world.ask("next", "a", request_id="n1") == taken, "a late retry does not claim anew"
    assert (await world.ask("get", "op", task="U"))["state"] == "pending"


async def test_the_same_id_with_another_body_is_a_conflict(world: World) -> None:
    await world.daemon()
    await tasks(world, "T", "U")
    await world.ask("hello", "a")
    fence = (await world.ask("claim", "a", task="T", request_id="x"))["fence"]
    assert isinstance(await world.refusal("claim", "a", task="U", request_id="x"), Conflict)
    assert isinstance(await world.refusal("complete", "a", task="T", fence=fence, request_id="x"), Conflict)
    assert (await world.ask("get", "op", task="T"))["state"] == "claimed"
    await world.ask("hello", "b")
    assert (await world.ask("claim", "b", task="U", request_id="x"))["task"] == "U", (
        "another session's id is another id"
    )


async def test_duplicates_in_flight_take_effect_once(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await tasks(world, *(f"T{n}" for n in range(30)))
    await world.ask("hello", "a")
    copies = [world.ask("next", "a", request_id=f"n{n % 10}") for n in range(50)]
    answers = await asyncio.gather(*copies)
    by_id = {n: {a["task"] for a in answers[n::10]} for n in range(10)}
    assert all(len(one) == 1 for one in by_id.values())
    assert (await world.ask("list", "op", state="claimed"))["counts"]["claimed"] == 10


async def test_a_lost_reply_of_etcd_is_recognised_by_the_witness(world: World) -> None:
    """etcd committed, and its answer never came: the daemon sends it again and knows its own work."""
    daemon = await world.daemon()
    if world.real:
        pytest.skip("the twin loses exactly the reply; the real one is frozen in tests/system")
    await tasks(world, "T")
    await world.ask("hello", "a")
    daemon.store.lose_next_reply = True  # type: ignore[attr-defined]
    claim = await world.ask("claim", "a", task="T", request_id="c")
    assert claim["attempt"] == 1
    daemon.store.lose_next_request = True  # type: ignore[attr-defined]
    done = await world.ask("complete", "a", task="T", fence=claim["fence"], request_id="d")
    assert done["state"] == "done"
    daemon.store.lose_next_reply = True  # type: ignore[attr-defined]
    await world.ask("hello", "b", request_id="h")
    assert daemon.counted("if_store_commit_retries_total", why="unknown") == 3


async def test_a_daemon_rebuilds_everything_from_the_store(world: World) -> None:
    daemon = await world.daemon()
    await tasks(world, "A", {"id": "B", "depends_on": ["A"]}, {"id": "C", "priority": 5})
    await world.ask("hello", "a", capabilities=["x"])
    claim = await world.ask("next", "a")
    assert claim["task"] == "C"
    await daemon.stop()
    world.daemons.remove(daemon)
    await world.daemon()
    page = await world.ask("list", "op")
    assert {line["task"]: line["state"] for line in page["tasks"]} == {"A": "pending", "B": "blocked", "C": "claimed"}
    assert (await world.ask("renew", "a"))["unnamed"] == [{"task": "C", "fence": claim["fence"]}]


# -- invariant 7 and the verbs ------------------------------------------------------------------------------------------------


async def test_refusals_name_the_facts(world: World) -> None:
    await world.daemon()
    await tasks(world, {"id": "T", "needs": ["gpu", "rust"]}, "D", {"id": "B", "depends_on": ["D"]})
    await world.ask("hello", "a", capabilities=["rust"])
    assert isinstance(await world.refusal("claim", "ghost", task="T"), SessionLost)
    assert isinstance(await world.refusal("claim", "a", task="none"), UnknownTask)
    lacking = await world.refusal("claim", "a", task="T")
    assert isinstance(lacking, CapabilityMissing)
    assert lacking.facts["missing"] == ["gpu"]
    blocked = await world.refusal("claim", "a", task="B")
    assert isinstance(blocked, NotClaimable)
    assert blocked.facts["state"] == "blocked"
    held = await world.refusal("claim", "a", task="D", hold_micro_usd=40_000_001)
    assert (held.code, held.facts["account"], held.facts["need"]) == ("budget_short", "@a", 40_000_001)
    await world.ask("next", "a")
    nothing = await world.refusal("next", "a")
    assert isinstance(nothing, NoTaskMatches)
    assert nothing.facts == {"pending": 1, "missing": ["gpu"]}


async def test_submitting_is_all_or_nothing_and_repeatable(world: World) -> None:
    await world.daemon()
    good = {"id": "A", "payload": {"b": 1, "a": 2}}
    for bad, error in (
        ([good, {"id": "B", "depends_on": ["none"]}], UnknownDependency),
        ([good, {"id": "B", "depends_on": ["C"]}, {"id": "C", "depends_on": ["B"]}], Cycle),
        ([good, good], Conflict),
        ([good, {"id": "B", "payload": "x" * 70_000}], TooLarge),
    ):
        assert isinstance(await world.refusal("submit", "op", tasks=bad), error)
        assert (await world.ask("list", "op"))["tasks"] == [] if "tasks" in await world.ask("list", "op") else True
    assert (await world.ask("submit", "op", tasks=[good]))["created"] == ["A"]
    assert (await world.ask("submit", "op", tasks=[{"id": "A", "payload": {"a": 2, "b": 1}}]))["existing"] == ["A"]
    assert isinstance(await world.refusal("submit", "op", tasks=[{"id": "A", "title": "other"}, {"id": "Z"}]), Conflict)
    assert isinstance(await world.refusal("get", "op", task="Z"), UnknownTask)


async def test_a_hundred_tasks_go_in_one_transaction(world: World) -> None:
    daemon = await world.daemon()
    many = [{"id": f"T{n:03d}", "payload": n, "depends_on": ["T000"] if n else []} for n in range(100)]
    assert len((await world.ask("submit", "op", tasks=many))["created"]) == 100
    got, _ = await daemon.store.range(records.TASKS, b"tasks0")
    assert got.total == 100
    assert len({kv.create_revision for kv in got.kvs}) == 1
    await world.ask("hello", "a")
    claim = await world.ask("next", "a")
    done = await world.ask("complete", "a", task=claim["task"], fence=claim["fence"])
    assert len(done["unblocked"]) == 99
    assert (await eventually(world, "T099", state="pending"))["spec"]["payload"] == 99


async def test_completing_unblocks_in_the_same_transaction(world: World) -> None:
    await world.daemon()
    await tasks(world, "A", "B", {"id": "C", "depends_on": ["A", "B"]}, {"id": "D", "depends_on": ["A"]})
    await world.ask("hello", "a")
    revisions = {}
    for name, opens in (("A", ["D"]), ("B", ["C"])):
        fence = (await world.ask("claim", "a", task=name))["fence"]
        assert (await world.ask("complete", "a", task=name, fence=fence, result={"r": name}))["unblocked"] == opens
        revisions[name] = (await world.ask("get", "op", task=name))["revision"]
    assert (await world.ask("get", "op", task="D"))["revision"] == revisions["A"]
    assert (await world.ask("get", "op", task="C"))["revision"] == revisions["B"]
    assert (await world.ask("get", "op", task="A"))["result"] == {"r": "A"}


async def test_a_task_submitted_while_its_dependency_completes_is_not_left_behind(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await world.ask("hello", "a")
    for n in range(20):
        await tasks(world, f"A{n}")
        fence = (await world.ask("claim", "a", task=f"A{n}"))["fence"]
        await asyncio.gather(
            world.ask("complete", "a", task=f"A{n}", fence=fence),
            tasks(world, {"id": f"B{n}", "depends_on": [f"A{n}"]}),
        )
    for n in range(20):
        await eventually(world, f"B{n}", state="pending")


async def test_failures_spend_attempts_and_the_operator_brings_back(world: World) -> None:
    await world.daemon()
    await tasks(world, {"id": "T", "max_attempts": 2})
    await world.ask("hello", "a")
    for state, attempt in (("pending", 1), ("dead", 2)):
        fence = (await world.ask("claim", "a", task="T"))["fence"]
        reply = await world.ask("fail", "a", task="T", fence=fence, error="boom")
        assert (reply["state"], reply["attempt"], reply["max_attempts"]) == (state, attempt, 2)
    assert (await world.ask("get", "op", task="T"))["error"] == "boom"
    assert isinstance(await world.refusal("claim", "a", task="T"), NotClaimable)
    assert (await world.ask("requeue", "root", task="T", admin=True))["state"] == "pending"
    assert (await world.ask("cancel", "root", task="T", admin=True))["state"] == "cancelled"
    assert (await world.ask("purge", "root", task="T", admin=True))["state"] == "cancelled"
    assert isinstance(await world.refusal("get", "op", task="T"), UnknownTask)


async def test_a_renewal_says_what_is_lost_cancelled_and_held_unknown(world: World) -> None:
    await world.daemon()
    await tasks(world, "A", "B", "C", "D")
    await world.ask("hello", "a", ttl_s=60)
    fence = {name: (await world.ask("claim", "a", task=name))["fence"] for name in "ABC"}
    await world.ask("cancel", "root", task="A", admin=True)
    await world.ask("complete", "a", task="C", fence=fence["C"])
    named = [{"task": "A", "fence": fence["A"]}, {"task": "C", "fence": fence["C"]}, {"task": "D", "fence": 7}]
    reply = await world.ask("renew", "a", claims=named)
    assert reply["ttl_s"] == 60
    assert reply["cancelled"] == [{"task": "A", "fence": fence["A"]}]
    assert reply["lost"] == [{"task": "D", "fence": 7}], "one's own completion is no loss"
    assert reply["unnamed"] == [{"task": "B", "fence": fence["B"]}]
    assert isinstance(await world.refusal("renew", "ghost"), SessionLost)


async def test_only_a_claim_that_there_was_is_announced_as_lost(world: World) -> None:
    await world.daemon()
    await tasks(world, "T", "U")
    await world.ask("hello", "a", ttl_s=60)
    fence = (await world.ask("claim", "a", task="T"))["fence"]
    await world.ask("cancel", "root", task="T", admin=True)
    await world.ask("requeue", "root", task="T", admin=True)
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    await world.bus.subscribe(
        "if.v1.event.task.renew_lost", lambda incoming: events.put_nowait(msgspec.json.decode(incoming.data))
    )
    await world.ask("hello", "b")
    await world.ask("claim", "b", task="T")
    made_up = [{"task": "T", "fence": fence + 1}, {"task": "U", "fence": fence}, {"task": "nowhere", "fence": 1}]
    reply = await world.ask("renew", "a", claims=[*made_up, {"task": "T", "fence": fence}])
    assert len(reply["lost"]) == 4
    async with asyncio.timeout(PATIENCE_S):
        told = await events.get()
    assert (told["task"], told["session"], told["fence"]) == ("T", "a", fence)
    assert events.empty()


async def test_renewing_keeps_the_claim_and_bye_gives_it_back_without_cost(world: World) -> None:
    await world.daemon()
    await tasks(world, "T", "U")
    await world.ask("hello", "a", ttl_s=2)
    await world.ask("claim", "a", task="T")
    for _ in range(4):
        await asyncio.sleep(0.8)  # longer than the TTL altogether
        assert (await world.ask("renew", "a"))["ttl_s"] == 2
    await world.ask("claim", "a", task="U")
    assert (await world.ask("bye", "a", request_id="b"))["released"] == ["T", "U"]
    assert (await world.ask("bye", "a", request_id="b"))["released"] == ["T", "U"]
    assert await world.ask("bye", "a") == {"released": []}
    found = await world.ask("get", "op", task="T")
    assert (found["state"], found["attempt"]) == ("pending", 0)


async def test_one_session_from_two_connections_is_one_session(world: World) -> None:
    await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a", capabilities=["x"], ttl_s=30)
    first = await world.ask("claim", "a", task="T")
    again = await world.ask("hello", "a", capabilities=["x", "y"])
    assert again["ttl_s"] == 30
    held = await world.ask("claim", "a", task="T")
    assert (held["fence"], held["again"]) == (first["fence"], True)


async def test_next_takes_by_priority_and_capability_and_waits_for_work(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await tasks(world, "low", {"id": "high", "priority": 9}, {"id": "gpu", "priority": 99, "needs": ["gpu"]})
    await world.ask("hello", "a")
    assert [(await world.ask("next", "a"))["task"] for _ in range(2)] == ["high", "low"]
    waiting = [asyncio.ensure_future(world.ask("next", "a", wait_s=8, timeout_s=10)) for _ in range(2)]
    await asyncio.sleep(0.05)
    await tasks(world, "fresh1", "fresh2")
    assert {(await one)["task"] for one in waiting} == {"fresh1", "fresh2"}
    late = await world.refusal("next", "a", wait_s=0.1)
    assert isinstance(late, NoTaskMatches)


async def test_lists_are_paged_and_see_what_another_daemon_committed(world: World) -> None:
    await world.daemon()
    await world.daemon()
    for n in range(10):
        await tasks(world, f"T{n}")
        page = await world.ask("list", "op", limit=1000)
        assert page["counts"]["pending"] == n + 1, "a list is never behind what was acknowledged"
    seen, after = [], None
    while True:
        page = await world.ask("list", "op", limit=3, **({"after": after} if after else {}))
        seen += [line["task"] for line in page["tasks"]]
        after = page.get("after")
        if after is None:
            break
    assert seen == [f"T{n}" for n in range(10)]


async def test_events_tell_the_story_in_order_and_once(world: World) -> None:
    await world.daemon()
    await world.daemon()
    await tasks(world, {"id": "STORY", "max_attempts": 1})
    await world.ask("hello", "a")
    fence = (await world.ask("claim", "a", task="STORY"))["fence"]
    await world.ask("fail", "a", task="STORY", fence=fence, error="x")
    await world.ask("requeue", "root", task="STORY", admin=True)
    await world.ask("cancel", "root", task="STORY", admin=True)
    await world.ask("purge", "root", task="STORY", admin=True)
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                journal = await world.bus.journal("IF_EVENTS")
                break
            except FabricError:
                await asyncio.sleep(0.05)
        assert (await world.ask("list", "op"))["tasks"] == []
        async for entry in journal.read():
            if b'"STORY"' not in entry.data:
                continue  # of other tests, which publish there what is no event, too
            event = msgspec.json.decode(entry.data)["event"]
            seen.append(event)
            if event == "purged":
                break
    assert seen == ["submitted", "claimed", "failed", "dead", "requeued", "cancelled", "purged"]


# -- invariant 9, and harm ------------------------------------------------------------------------------------------------------


async def test_a_poisoned_request_harms_nobody_else_in_its_batch(world: World) -> None:
    """Dead sessions, duplicates and impossible leases among honest requests: only they are refused."""
    daemon = await world.daemon()
    await tasks(world, *(f"T{n:02d}" for n in range(60)))
    names = [f"s{n}" for n in range(20)]
    await asyncio.gather(*(world.ask("hello", name, ttl_s=60) for name in names))
    board = daemon.actor.board  # type: ignore[attr-defined]
    for name in names[:5]:  # gone, but the board does not know yet
        seat = board.sessions[name]
        await daemon.store.revoke(seat.lease)
        board.sessions[name] = seat
    receipts = daemon.actor._receipts  # type: ignore[attr-defined]
    await receipts.current()
    receipts._lease = 424242  # the lease under every receipt does not exist: etcd refuses the whole batch
    asked = [world.ask("claim", names[n % 20], task=f"T{n:02d}", request_id=f"r{n}") for n in range(60)]
    asked += [world.ask("claim", names[n % 20], task=f"T{n:02d}", request_id=f"r{n}") for n in range(60)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for n, answer in enumerate(answers):
        if n % 20 < 5:
            assert isinstance(answer, SessionLost), answer
        else:
            assert isinstance(answer, dict), answer
            assert answer == answers[(n + 60) % 120]
    assert (await world.ask("list", "op"))["counts"]["claimed"] == 45


async def test_a_full_mailbox_says_overloaded_at_once(world: World) -> None:
    await world.daemon({"mailbox_max": 5, "in_flight_max": 5})
    await tasks(world, "T")
    await world.ask("hello", "a")
    answers = await asyncio.gather(*(world.ask("get", "a", task="T") for _ in range(200)), return_exceptions=True)
    codes = {answer.code if isinstance(answer, FabricError) else "ok" for answer in answers}
    assert codes == {"ok", "overloaded"}


async def test_long_polls_are_bounded_and_answered_when_the_daemon_stops(world: World) -> None:
    daemon = await world.daemon(waiters_max=3)
    await world.ask("hello", "a")
    waiting = [asyncio.ensure_future(world.ask("next", "a", wait_s=30, timeout_s=40)) for _ in range(5)]
    async with asyncio.timeout(5):
        while len([one for one in waiting if one.done()]) < 2:
            await asyncio.sleep(0.01)
    assert {one.exception().code for one in waiting if one.done()} == {"overloaded"}  # type: ignore[union-attr]
    await daemon.stop()
    world.daemons.remove(daemon)
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    drained = [a for a in answers if isinstance(a, Unavailable) and a.facts.get("what") == "draining"]
    assert len(drained) == 3


async def test_a_crash_restarts_from_the_store_and_answers_who_waits(world: World) -> None:
    daemon = await world.daemon()
    await tasks(world, "T")
    await world.ask("hello", "a")
    waiting = asyncio.ensure_future(world.ask("next", "ghost2", wait_s=30, timeout_s=40))
    await world.ask("hello", "ghost2")
    await world.ask("claim", "a", task="T")
    polling = asyncio.ensure_future(world.ask("next", "ghost2", wait_s=30, timeout_s=40))
    await asyncio.sleep(0.1)
    runner = daemon.runner
    assert runner is not None
    assert runner.lost is not None
    daemon.actor.crash("a test says so")
    assert await runner.lost == "a test says so"
    with pytest.raises(Unavailable):
        await polling
    with pytest.raises(FabricError):
        await waiting
    meanwhile = asyncio.ensure_future(world.ask("get", "a", task="T"))
    await asyncio.sleep(0.05)
    assert not meanwhile.done(), "it waits in the mailbox"
    await runner.clear()
    await runner.start()
    assert (await meanwhile)["session"] == "a"
    assert len(daemon.actors) == 2
