"""The SDK as its users meet it: workers, blocks, retries, refusals. Over the twins and over real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ifabric
from ifabric import errors
from ifabric.client import Client, address_of
from ifabric.wire import coordinator as wire

from .conftest import World
from .sdk import client, events_of, state, submitted, tap, until_state

# -- workers --------------------------------------------------------------------------------------------------------------


async def test_a_worker_takes_ten_lines(world: World) -> None:
    await world.daemon()
    await submitted(world, *({"id": f"T{n}", "payload": n} for n in range(5)))
    async with client(world) as c:
        async for claim in c.tasks(until_empty=True):
            async with claim:
                await claim.complete({"squared": claim.spec.payload**2})
        done = [await c.get(f"T{n}") for n in range(5)]
    assert [task.result for task in done] == [{"squared": n * n} for n in range(5)]


async def test_tasks_go_on_as_they_come_and_end_only_when_asked_to(world: World) -> None:
    await world.daemon()
    async with client(world) as c:
        assert [claim.task async for claim in c.tasks(until_empty=True)] == []

        async def first() -> str:
            async for claim in c.tasks(wait_s=10):
                return claim.task
            raise AssertionError("tasks() ended by itself")

        waiting = asyncio.create_task(first())
        async with asyncio.timeout(5):
            while not c.claiming:
                await asyncio.sleep(0)
        await submitted(world, "T")
        async with asyncio.timeout(5):
            assert await waiting == "T"


async def test_work_runs_as_many_at_once_as_asked_and_a_failure_fails_its_own_task_only(world: World) -> None:
    await world.daemon()
    await submitted(world, *({"id": f"T{n}", "max_attempts": 1} for n in range(12)))
    busy = most = 0
    full = asyncio.Event()

    async def handle(claim: ifabric.Claim) -> dict[str, str]:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        if busy == 4:
            full.set()
        async with asyncio.timeout(5):
            await full.wait()  # nobody finishes before all four are at it
        busy -= 1
        if claim.task == "T3":
            raise LookupError("no such thing")
        return {"did": claim.task}

    async with client(world) as c:
        await c.work(handle, concurrency=4, until_empty=True)
        assert (await c.list()).counts["done"] == 11
        assert (await c.get("T5")).result == {"did": "T5"}
        failed = await c.get("T3")
    assert most == 4
    assert (failed.state, failed.error) == ("dead", "LookupError: no such thing")


async def test_a_worker_waits_for_a_fabric_that_is_away_and_goes_on(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr("ifabric.client.ATTEMPT_S", 0.2)
    first = await world.daemon()
    await submitted(world, "A")
    done: list[str] = []
    line = tap(world)

    async def work(c: Client) -> None:
        async for claim in c.tasks(wait_s=0.1):
            async with claim:
                done.append(claim.task)

    async with client(world, over=line, ttl_s=60, timeout_s=0.3) as c:
        working = asyncio.create_task(work(c))
        await until_state(world, "A", "done")
        await first.stop()
        seen = len(line.bodies("next"))
        async with asyncio.timeout(15):  # it has given up on some requests, and yet not on the fabric
            while len({body["request_id"] for body in line.bodies("next")[seen:]}) < 3:
                await asyncio.sleep(0.01)
        await world.daemon()
        await submitted(world, "B")
        await until_state(world, "B", "done")
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    assert done == ["A", "B"]


# -- a claim as a block ---------------------------------------------------------------------------------------------------


async def test_a_block_ends_the_claim_by_how_it_ends(world: World) -> None:
    await world.daemon()
    await submitted(world, "good", "bad", "left", "given-back")
    async with client(world) as c:
        async with await c.claim("good") as claim:
            assert "held" in repr(claim)
        with pytest.raises(ZeroDivisionError):
            async with await c.claim("bad"):
                1 / 0  # noqa: B018
        inside = asyncio.Event()

        async def leave() -> None:
            async with await c.claim("left"):
                inside.set()
                await asyncio.Event().wait()

        leaving = asyncio.create_task(leave())
        await inside.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        async with await c.claim("given-back") as claim:
            await claim.release("not today")
        assert c.claims == {}
        found = {task: await c.get(task) for task in ("good", "bad", "left", "given-back")}
    assert [found[task].state for task in found] == ["done", "pending", "pending", "pending"]
    assert found["bad"].error == "ZeroDivisionError: division by zero"
    assert (found["bad"].attempt, found["left"].attempt) == (1, 0)
    assert [t.history[-1].event for t in found.values()] == ["completed", "failed", "released", "released"]
    assert found["given-back"].history[-1].note == "not today"


async def test_leaving_the_client_gives_back_what_it_holds(world: World) -> None:
    await world.daemon()
    await submitted(world, "T", "U")
    async with client(world) as c:
        claim = await c.claim("T")
    assert claim.lost.is_set()
    assert (await world.ask("get", "op", task="T"))["attempt"] == 0
    assert await state(world, "T") == "pending"
    with pytest.raises(errors.ClaimLost, match="the client was closed"):
        async with claim:
            raise AssertionError("nothing is held any more")
    async with client(world, "stays", ttl_s=60) as c:
        c.leave_on_exit = False
        await c.claim("U")
    assert await state(world, "U") == "claimed"


async def test_the_same_claim_twice_is_one_claim(world: World) -> None:
    await world.daemon()
    await submitted(world, "T")
    async with client(world) as c:
        assert await c.claim("T") is await c.claim("T")


# -- a retry is the same request ------------------------------------------------------------------------------------------


async def test_a_request_whose_answers_are_lost_is_sent_again_with_its_id_and_takes_effect_once(world: World) -> None:
    await world.daemon()
    line = tap(world)
    async with client(world, over=line) as c:
        for verb in ("submit", "claim", "complete", "fail", "release", "cancel", "hello"):
            line.lose[verb] = 2
        assert (await c.submit([{"id": "T", "payload": [1]}, {"id": "F"}, {"id": "R"}])).created == ("T", "F", "R")
        claims = {task: await c.claim(task) for task in ("T", "F", "R")}
        await claims["T"].complete(41)
        await claims["F"].fail("no")
        await claims["R"].release()
        await c.operate(wire.Cancel, "R")
        found = {task: msgspec.to_builtins(await c.get(task)) for task in claims}
    assert claims["T"].spec.payload == [1]
    assert events_of(found["T"]) == ["submitted", "claimed", "completed"]
    assert events_of(found["F"]) == ["submitted", "claimed", "failed"]
    assert events_of(found["R"]) == ["submitted", "claimed", "released", "cancelled"]
    for verb, requests in (("submit", 1), ("claim", 3), ("complete", 1), ("fail", 1), ("release", 1), ("cancel", 1)):
        bodies = line.bodies(verb)
        assert len(bodies) == requests + 2, verb
        assert len({body["request_id"] for body in bodies}) == requests, verb
        assert len({msgspec.json.encode(body) for body in bodies}) == requests, verb


async def test_when_the_time_is_up_the_outcome_is_unknown_and_the_error_says_so(world: World) -> None:
    await world.daemon()
    line = tap(world)
    line.lose["submit"] = 99
    async with client(world, over=line, timeout_s=0.2) as c:
        with pytest.raises(errors.Unavailable) as caught:
            await c.submit([{"id": "T"}])
        assert (caught.value.retryable, caught.value.facts["reason"]) == (True, "timeout")
        line.lose.clear()
        assert (await c.submit([{"id": "T"}])).existing == ("T",)


# -- refusals -------------------------------------------------------------------------------------------------------------


async def test_every_refusal_is_a_type_with_its_facts(world: World) -> None:
    await world.daemon()
    await submitted(
        world, "held", "done", {"id": "picky", "needs": ["gpu"]}, {"id": "later", "depends_on": ["held"]}, "free"
    )
    async with client(world, "other") as o, client(world) as c:
        theirs = await o.claim("held")
        await (await c.claim("done")).complete()
        lost = await c.claim("free")
        await c.operate(wire.Cancel, "free")
        big = "x" * 70_000

        async def refusal(what: Any, kind: type[errors.FabricError]) -> dict[str, Any]:
            with pytest.raises(kind) as caught:
                await what
            assert type(caught.value) is kind
            assert caught.value.message
            return caught.value.facts

        assert (await refusal(c.claim("nope"), errors.UnknownTask))["task"] == "nope"
        taken = await refusal(c.claim("held"), errors.ClaimTaken)
        assert (taken["by"], taken["ttl_s"] > 0) == ("other", True)
        assert (await refusal(c.claim("done"), errors.NotClaimable))["state"] == "done"
        assert (await refusal(c.claim("later"), errors.NotClaimable))["state"] == "blocked"
        assert (await refusal(c.claim("picky"), errors.CapabilityMissing))["missing"] == ["gpu"]
        none = await refusal(c.next(), errors.NoTaskMatches)
        assert (none["pending"], none["missing"]) == (1, ["gpu"])
        facts = await refusal(c.complete("held", theirs.fence), errors.ClaimLost)
        assert (facts["by"], facts["fence"]) == ("other", theirs.fence)
        for ending in (lost.complete(), lost.fail("x"), lost.release()):
            assert (await refusal(ending, errors.ClaimLost))["state"] == "cancelled"
        assert lost.lost.is_set()
        await refusal(c.get("nope"), errors.UnknownTask)
        await refusal(c.operate(wire.Purge, "held"), errors.NotClaimable)
        await refusal(c.operate(wire.Requeue, "nope"), errors.UnknownTask)
        await refusal(c.submit([{"id": "held", "title": "another"}]), errors.Conflict)
        circle = [{"id": "x", "depends_on": ["y"]}, {"id": "y", "depends_on": ["x"]}]
        assert (await refusal(c.submit(circle), errors.Cycle))["cycle"]
        unknown = await refusal(c.submit([{"id": "x", "depends_on": ["nope"]}]), errors.UnknownDependency)
        assert unknown["unknown"] == ["nope"]
        await refusal(c.submit([]), errors.BadRequest)
        await refusal(c.submit([{"id": "x", "payload": big}]), errors.TooLarge)
        await refusal(theirs.complete(big), errors.TooLarge)
        await refusal(c.submit([{"id": "x", "payload": big * 20}]), errors.TooLarge)
        assert not theirs.ended
        assert not theirs.lost.is_set()


async def test_a_specification_is_checked_before_it_is_sent(world: World) -> None:
    await world.daemon()
    line = tap(world)
    async with client(world, over=line) as c:
        for bad in ({"id": "x", "depends": ["y"]}, {"id": "no spaces"}, {"id": "x", "needs": "gpu"}):
            with pytest.raises(msgspec.ValidationError):
                await c.submit([bad])
    assert line.bodies("submit") == []


async def test_without_a_daemon_it_is_unreachable_and_says_what_to_do(world: World) -> None:
    async with client(world, timeout_s=0.2) as c:
        with pytest.raises(errors.Unreachable, match=r"no coordinator answers at the test.*`ifabric run` starts one"):
            await c.list()
        with pytest.raises(errors.Unreachable):  # a worker that never found anybody says so too
            await anext(c.tasks())


async def test_without_nats_it_is_unreachable_and_says_where_it_looked(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(errors.Unreachable, match=r"nats://127\.0\.0\.1:9"):
        async with Client.connect("nats://127.0.0.1:9", timeout_s=0.3):
            raise AssertionError("nobody is there")
    monkeypatch.delenv("IFABRIC_NATS", raising=False)
    with pytest.raises(errors.Unreachable, match=rf"none in {tmp_path}.*`ifabric run`.*IFABRIC_NATS"):
        address_of(None, tmp_path)
    monkeypatch.setenv("IFABRIC_NATS", "nats://one,nats://two")
    assert address_of(None, tmp_path) == "nats://one,nats://two"


@pytest.mark.parametrize("name", ["a.b", "a b", "*", ">", "", "ä", "x" * 65, "a\n"])
async def test_a_session_name_is_refused_before_anything_is_sent(world: World, name: str) -> None:
    if name:  # none given is no bad name
        with pytest.raises(ValueError, match="session id"):
            Client.connect("nats://127.0.0.1:9", session=name)
    line = tap(world)
    async with client(world, name, over=line) as c:
        with pytest.raises(ValueError, match="session id"):
            await c.next()
    assert line.sent == []


async def test_the_session_may_come_from_the_environment_or_is_made_up(monkeypatch: Any) -> None:
    monkeypatch.setenv("IFABRIC_SESSION", "from-outside")
    assert Client.connect("nats://127.0.0.1:9").session == "from-outside"
    assert Client.connect("nats://127.0.0.1:9", session="mine").session == "mine"
    monkeypatch.delenv("IFABRIC_SESSION")
    one, two = Client.connect("nats://127.0.0.1:9").session, Client.connect("nats://127.0.0.1:9").session
    assert one != two
    monkeypatch.setenv("IFABRIC_SESSION", "not.one")
    with pytest.raises(ValueError, match="session id"):
        Client.connect("nats://127.0.0.1:9")


async def test_an_answer_that_is_none_is_an_error_of_the_fabric(world: World) -> None:
    bus = await world.connection()

    async def babble(message: Any) -> None:
        await message.respond(b'{"tasks": 7}')

    subscription = await bus.subscribe("if.v1.coordinator.list.*", babble)
    async with client(world) as c:
        with pytest.raises(errors.FabricError, match="the answer to list is not one"):
            await c.list()
    await subscription.unsubscribe()


# -- events ---------------------------------------------------------------------------------------------------------------


async def test_events_come_as_they_happen_and_from_a_position_of_the_journal(world: World) -> None:
    await world.daemon()
    async with client(world) as c:  # the id is of this test alone: the journal outlives the tests before it
        await c.submit([{"id": "before"}])
        async with c.subscribe() as events:
            await c.submit([{"id": "story"}])
            async with await c.claim("story") as claim:
                fence = claim.fence
            story = []
            async with asyncio.timeout(10):
                async for event in events:
                    if event.task == "story":
                        story.append((event.event, event.state, event.fence))
                        if event.event == "completed":
                            break
        assert story == [("submitted", "pending", 0), ("claimed", "claimed", fence), ("completed", "done", fence)]
        journal = await c.journal()
        last = await journal.last()
        assert last is not None
        async with asyncio.timeout(10):
            kept = [event async for event in c.events(after_seq=0, until_seq=last.seq)]
            assert [(e.task, e.event) for e in kept if e.task == "story"][-1] == ("story", "completed")
            after = [event async for event in c.events(after_seq=last.seq - 1, until_seq=last.seq)]
            assert [e.event for e in after] == ["completed"]


async def test_an_event_that_is_none_does_not_end_a_subscription(world: World) -> None:
    """Whoever may publish there could otherwise make every subscriber deaf with one message."""
    await world.daemon()
    bus = await world.connection()
    async with client(world) as c, c.subscribe() as events:
        for junk in (b"", b"junk", b"[]", b'{"event": 1}', b'{"event": "\xff"}', b"[" * 100_000):
            await bus.publish("if.v1.event.task.claimed", junk)
        await c.submit([{"id": "story"}])
        async with asyncio.timeout(10):
            async for event in events:
                if (event.task, event.event) == ("story", "submitted"):
                    break


async def test_events_end_with_the_connection(world: World) -> None:
    async with client(world) as c, c.subscribe() as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await c._bus.close()
        with pytest.raises(errors.Unavailable, match="no more events"):
            async with asyncio.timeout(5):
                await waiting
