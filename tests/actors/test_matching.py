"""Who is offered what, and what is said when nothing is: over the twins and over real etcd and NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from ifabric.errors import BreakerOpen, CapabilityMissing, NoTaskMatches
from ifabric.store.base import Delete, Put, Txn
from ifabric.wire import subjects
from ifabric.wire.governor import MatchEvent
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.governor import matcher, records

from .conftest import CLOCK, World

PATIENCE_S = 10.0
#: of wishes for two things, one of which is there
HALF = 0.6


async def submit(world: World, *specs: dict[str, Any]) -> None:
    await world.ask("submit", "op", tasks=list(specs))


async def eventually(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


async def breaker(world: World, name: str, **fields: Any) -> None:
    """Writes a breaker's record, as a governor would, and waits until every coordinator knows it; without fields it
    is deleted.
    """
    key = records.breaker_key(name)
    store = await world.store()
    await store.txn(Txn((), (Put(key, msgspec.json.encode(fields)) if fields else Delete(key),)))
    boards = [actor.board for daemon in world.daemons for actor in daemon.actors if isinstance(actor, Coordinator)]
    tripped = fields.get("state") in ("open", "half_open")
    await eventually(lambda: all((name in board.breakers) is tripped for board in boards))


async def parked(world: World, count: int) -> None:
    waiters: Any = world.daemons[0].actor._waiters  # type: ignore[attr-defined]
    await eventually(lambda: len(waiters) == count)


# -- next ----------------------------------------------------------------------------------------------------------------


async def test_next_offers_what_suits_well_enough_and_claim_takes_what_it_names(world: World) -> None:
    daemon = await world.daemon()
    await submit(world, {"id": "W", "wants": ["gpu", "big"]}, {"id": "N", "needs": ["rust"], "wants": ["gpu", "big"]})
    await world.ask("hello", "a", capabilities=["gpu"])
    nothing = await world.refusal("next", "a")
    assert isinstance(nothing, NoTaskMatches)
    assert nothing.facts == {"pending": 2, "missing": ["rust"], "best_score": HALF, "min_score": 0.7}
    assert "missing: rust; the best scores 0.6 without big, and 0.7 is asked for" in nothing.message
    why = "if_governor_capability_match_failures_total"
    assert [daemon.counted(why, why=one) for one in ("capability", "score", "label", "breaker")] == [1, 1, 0, 0]
    await world.ask("hello", "b", capabilities=["gpu", "rust"])
    assert (await world.ask("next", "b"))["task"] == "N"
    given = daemon.metrics.histogram("if_governor_capability_match_score")
    assert (sum(given.counts), given.total) == (1, pytest.approx(0.2 + 0.8 * 2 / 3, abs=1e-6))
    assert (await world.ask("claim", "a", task="W"))["task"] == "W"


async def test_a_score_is_weighed_before_age_and_after_priority(world: World) -> None:
    await world.daemon()
    await world.ask("hello", "a", capabilities=["rust", "gpu"])
    half, whole = {"needs": ["rust"], "wants": ["gpu", "big"]}, {"needs": ["rust"], "wants": ["gpu"]}
    await submit(world, {"id": "half", **half}, {"id": "whole", **whole}, {"id": "urgent", "priority": 1, **half})
    assert [(await world.ask("next", "a"))["task"] for _ in range(3)] == ["urgent", "whole", "half"]


async def test_a_busy_session_is_offered_what_an_idle_one_would_be(world: World) -> None:
    await world.daemon()
    await world.ask("hello", "a", capabilities=list("abcde"))
    await submit(world, *({"id": f"T{n}", "wants": list("abcdefgh")} for n in range(9)))
    given = {(await world.ask("next", "a"))["task"] for _ in range(9)}
    assert given == {f"T{n}" for n in range(9)}


# -- labels ----------------------------------------------------------------------------------------------------------


async def test_labels_bind_in_both_directions(world: World) -> None:
    await world.daemon()
    await submit(world, {"id": "plain"}, {"id": "docs", "labels": ["docs", "easy"], "needs": ["pen"]})
    await world.ask("hello", "a", capabilities=["pen"], accepts=["docs"])
    assert (await world.ask("next", "a"))["task"] == "docs"
    nothing = await world.refusal("next", "a")
    assert nothing.facts == {"pending": 1, "missing": [], "labels": []}
    assert "no labels" in nothing.message
    by_id = await world.refusal("claim", "a", task="plain")
    assert isinstance(by_id, CapabilityMissing)
    assert by_id.facts == {"task": "plain", "missing": [], "labels": ["docs"]}
    await submit(world, {"id": "hard", "labels": ["proof"], "priority": 1})
    assert (await world.refusal("next", "a")).facts["labels"] == ["proof"]
    await world.ask("hello", "a", capabilities=["pen"])
    assert (await world.ask("next", "a"))["task"] == "hard"
    assert (await world.ask("claim", "a", task="plain"))["task"] == "plain"


async def test_the_one_who_waits_and_accepts_the_label_is_woken(world: World) -> None:
    await world.daemon()
    await world.ask("hello", "first", accepts=["tests"])
    await world.ask("hello", "second", accepts=["docs"])
    waiting = [asyncio.create_task(world.ask("next", name, wait_s=8)) for name in ("first", "second")]
    await parked(world, 2)
    await submit(world, {"id": "D", "labels": ["docs"]})
    assert (await waiting[1])["task"] == "D"
    assert not waiting[0].done()
    await submit(world, {"id": "T", "labels": ["tests"]})
    assert (await waiting[0])["task"] == "T"


# -- breakers ----------------------------------------------------------------------------------------------------------


async def test_a_task_that_needs_what_fails_is_not_given_out_until_it_is_closed(world: World) -> None:
    await world.daemon()
    await submit(world, {"id": "T", "needs": ["openai/gpt-x"]})
    await world.ask("hello", "a", capabilities=["openai/gpt-x"])
    await breaker(world, "openai/gpt-x", state="open", until=CLOCK.wall_ms() + 60_000)
    nothing = await world.refusal("next", "a")
    assert nothing.facts == {"pending": 1, "missing": [], "breakers": ["openai/gpt-x"]}
    assert "openai/gpt-x" in nothing.message
    by_id = await world.refusal("claim", "a", task="T")
    assert isinstance(by_id, BreakerOpen)
    assert by_id.facts["breaker"] == "openai/gpt-x"
    assert 0 < by_id.facts["probe_in_s"] <= 60
    await breaker(world, "openai/gpt-x", state="closed")
    assert (await world.ask("next", "a"))["task"] == "T"


async def test_one_that_an_operator_holds_open_is_named_without_a_time(world: World) -> None:
    await world.daemon()
    await submit(world, {"id": "T", "needs": ["x"]})
    await world.ask("hello", "a", capabilities=["x"])
    await breaker(world, "x", state="open")
    assert (await world.refusal("claim", "a", task="T")).facts["probe_in_s"] is None
    await breaker(world, "x")
    assert (await world.ask("claim", "a", task="T"))["task"] == "T"


async def test_what_was_open_before_a_daemon_started_is_known_to_it(world: World) -> None:
    store = await world.store()
    await store.txn(Txn((), (Put(records.breaker_key("x"), b'{"state":"open"}'),)))
    await world.daemon()
    await submit(world, {"id": "T", "needs": ["x"]})
    await world.ask("hello", "a", capabilities=["x"])
    assert (await world.refusal("next", "a")).facts["breakers"] == ["x"]


async def test_a_trip_loses_nobody_who_waits(world: World) -> None:
    await world.daemon()
    await submit(world, *({"id": f"T{n}", "needs": ["x"]} for n in range(3)))
    await breaker(world, "x", state="open")
    names = [f"s{n}" for n in range(5)]
    for name in names:
        await world.ask("hello", name, capabilities=["x"])
    waiting = [asyncio.create_task(world.ask("next", name, wait_s=9)) for name in names]
    await parked(world, 5)
    await breaker(world, "x", state="closed")
    async with asyncio.timeout(PATIENCE_S / 2):
        given = [(await task)["task"] for task in waiting[:3]]
    assert sorted(given) == ["T0", "T1", "T2"]
    await submit(world, {"id": "T3"}, {"id": "T4"})
    assert {(await task)["task"] for task in waiting[3:]} == {"T3", "T4"}


async def test_who_waits_is_given_the_task_when_a_probe_may_go(world: World) -> None:
    """Or nobody would ever call, and the breaker would stay open."""
    await world.daemon()
    await submit(world, {"id": "T", "needs": ["x"]})
    await world.ask("hello", "a", capabilities=["x"])
    until = CLOCK.wall_ms() + 400
    await breaker(world, "x", state="open", until=until)
    assert (await world.ask("next", "a", wait_s=9))["task"] == "T"
    assert until <= CLOCK.wall_ms() < until + 5_000


async def test_a_task_that_a_claim_gave_up_goes_to_who_waits(world: World) -> None:
    """While the claim was being decided, the task was nobody's: who came then found nothing, and would not be woken."""
    daemon = await world.daemon()
    await submit(world, {"id": "T"})
    await world.ask("hello", "a")
    board = daemon.actor.board  # type: ignore[attr-defined]
    assert board.reserve("T")
    waiting = asyncio.create_task(world.ask("next", "a", wait_s=9))
    await parked(world, 1)
    board.unreserve("T")
    async with asyncio.timeout(PATIENCE_S / 2):
        assert (await waiting)["task"] == "T"


# -- as configured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{"min_match_score": 0.2}, {"enabled": False}], ids=["lower", "off"])
async def test_an_operator_may_have_wishes_only_order(world: World, section: dict[str, object]) -> None:
    await world.daemon(governor={"capabilities": section})
    await submit(world, {"id": "W", "wants": ["gpu"]}, {"id": "N", "needs": ["gpu"]})
    await world.ask("hello", "a")
    assert (await world.ask("next", "a"))["task"] == "W"
    assert (await world.refusal("next", "a")).facts == {"pending": 1, "missing": ["gpu"]}


async def test_breakers_that_are_switched_off_keep_nothing_back(world: World) -> None:
    store = await world.store()
    await store.txn(Txn((), (Put(records.breaker_key("x"), b'{"state":"open"}'),)))
    await world.daemon(governor={"circuit_breaker": {"enabled": False}})
    await submit(world, {"id": "T", "needs": ["x"]})
    await world.ask("hello", "a", capabilities=["x"])
    assert (await world.ask("next", "a"))["task"] == "T"


# -- match -------------------------------------------------------------------------------------------------------------


async def test_match_ranks_the_sessions_and_explains_each(world: World) -> None:
    daemon = await world.daemon(governor={})
    await submit(world, {"id": "T1"}, {"id": "T2"})
    await world.ask("hello", "best", capabilities=["rust", "gpu"])
    await world.ask("hello", "busy", capabilities=["rust", "gpu"])
    await world.ask("hello", "lacks", capabilities=["gpu"])
    await world.ask("hello", "picky", capabilities=["rust", "gpu"], accepts=["docs"])
    await world.ask("hello", "poor", capabilities=["rust"])
    for task in ("T1", "T2"):
        await world.ask("claim", "busy", task=task)
    governor: Any = daemon.actors[-1]
    await eventually(lambda: len(governor.sessions.seats) == 5 and governor.tasks.claims_of("busy") == 2)
    asked = {"needs": ["rust"], "wants": ["gpu", "big", "fast"], "labels": ["code"]}
    reply = await world.ask("match", "op", component="governor", **asked)
    assert (reply["sessions"], reply["min_score"]) == (5, 0.7)
    lines = {line["session"]: line for line in reply["ranked"]}
    assert list(lines) == ["best", "busy", "poor", "picky", "lacks"]
    assert {name: line["score"] for name, line in lines.items()} == {
        "best": HALF, "busy": pytest.approx(HALF - 0.1 * 2 / 3, abs=1e-6), "poor": 0.4, "picky": 0.0, "lacks": 0.0,
    }  # fmt: skip
    assert lines["best"]["reason"] == ("Would not be offered it: 0.6 is below 0.7 (without big, fast, which it wants).")
    assert "holds 2 claims" in lines["busy"]["reason"]
    assert "accepts only docs" in lines["picky"]["reason"]
    assert (lines["lacks"]["missing"], "lacks rust" in lines["lacks"]["reason"]) == (["rust"], True)
    assert not any(line.get("matches") for line in lines.values())
    asked["wants"] = ["gpu"]
    reply = await world.ask("match", "op", component="governor", sessions=["busy", "ghost", "best"], **asked)
    assert [(line["session"], line.get("matches", False)) for line in reply["ranked"]] == [
        ("best", True), ("busy", True), ("ghost", False),
    ]  # fmt: skip
    assert reply["ranked"][2]["reason"] == "There is no such session."
    asked["wants"] = ["gpu", "big"]
    (busy,) = (await world.ask("match", "op", component="governor", sessions=["busy"], **asked))["ranked"]
    assert (busy["score"] < 0.7, busy["matches"]) == (True, True), "`next` would offer it: there load does not count"
    assert "its load, which `next` leaves out" in busy["reason"]


async def test_match_knows_breakers_labels_and_who_has_left(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", capabilities=["x", "y"], accepts=["docs"])
    governor: Any = daemon.actors[-1]
    await eventually(lambda: "a" in governor.sessions.seats)

    async def only(**asked: Any) -> dict[str, Any]:
        found: dict[str, Any] = (await world.ask("match", "op", component="governor", **asked))["ranked"][0]
        return found

    assert (await only(needs=["x"], labels=["docs"]))["matches"]
    assert "matches" not in await only(needs=["x"])
    await breaker(world, "x", state="open")
    await eventually(lambda: "x" in governor._matcher.outages.weather.blocked)
    assert "the breaker of x is not closed" in (await only(needs=["x"], labels=["docs"]))["reason"]
    weighed = await only(needs=["y"], wants=["x"], labels=["docs"])
    assert (weighed["matches"], weighed["score"]) == (True, 0.95)
    await breaker(world, "x", state="closed")
    await eventually(lambda: not governor._matcher.outages.weather.unwell)
    assert (await only(needs=["x"], labels=["docs"]))["score"] == 1.0
    await world.ask("hello", "a", capabilities=["y"])
    await eventually(lambda: governor.sessions.seats["a"].capabilities == {"y"})
    assert (await only(needs=["x"]))["missing"] == ["x"]
    await world.ask("bye", "a")
    await eventually(lambda: not governor.sessions.seats)
    assert (await world.ask("match", "op", component="governor"))["sessions"] == 0


# -- tasks that nobody can take ---------------------------------------------------------------------------------------


async def test_what_nobody_can_take_is_told_once_and_cleared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GRACE_S", 0.2), ("LOOK_S", 0.02), ("MINUTE_MS", 10**15)):
        monkeypatch.setattr(matcher, name, value)
    daemon = await world.daemon(governor={})
    other = await world.daemon(governor={})
    told: list[MatchEvent] = []
    await world.bus.subscribe(
        subjects.event("match", "unmatched"), lambda got: told.append(msgspec.json.decode(got.data, type=MatchEvent))
    )
    await world.ask("hello", "a", capabilities=["rust"])
    needs = {"needs": ["rust", "gpu"], "labels": ["code"]}
    await submit(world, {"id": "T1", **needs}, {"id": "T2", **needs}, {"id": "fine", "needs": ["rust"]})
    await eventually(lambda: len(told) == 2)
    assert {event.at[:10] for event in told} == {told[0].at[:10]}
    event = told[0]
    assert (event.event, set(event.needs), event.labels, event.missing) == (
        "unmatched", {"rust", "gpu"}, ("code",), ("gpu",),
    )  # fmt: skip
    assert (event.tasks, event.example) == (2, "T1")
    journal = await world.bus.journal(subjects.EVENT_STREAM)

    def unmatched() -> list[float]:
        values = []
        for one in (daemon, other):
            governor: Any = one.actors[-1]
            governor._matcher.refresh()
            values.append(one.metrics.gauge("if_governor_unmatched_tasks").value)
        return values

    async def counted(tasks: int) -> None:
        await eventually(lambda: unmatched() == [tasks, tasks])

    await counted(2)
    await submit(world, {"id": "another", "needs": ["gpu", "lead"]})
    await eventually(lambda: sum(event.example == "another" for event in told) == 2)
    assert sum(event.example == "T1" for event in told) == 2, "many looks later it is still told once by each"
    await world.ask("cancel", "op", admin=True, task="another")
    await counted(2)
    first = await journal.last(subjects.event("match", "unmatched"))
    assert first is not None
    await world.ask("hello", "b", capabilities=["rust", "gpu"])
    await counted(0)
    await world.ask("bye", "b")
    await eventually(lambda: sum(event.example == "T1" for event in told) == 4)
    await counted(2)
    last = await journal.last(subjects.event("match", "unmatched"))
    assert last is not None
    assert last.seq == first.seq, "within one minute the journal keeps one, of however many daemons"


async def test_what_is_pending_for_a_moment_is_no_news(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "LOOK_S", 0.02)
    daemon = await world.daemon(governor={})
    governor: Any = daemon.actors[-1]
    told: list[bytes] = []
    await world.bus.subscribe(subjects.event("match", "unmatched"), lambda got: told.append(got.data))
    await submit(world, {"id": "T", "needs": ["gpu"]})
    await eventually(lambda: governor._matcher._unmatched)
    await world.ask("hello", "b", capabilities=["gpu"])
    await eventually(lambda: not governor._matcher._unmatched)
    governor._matcher.refresh()
    assert (told, daemon.metrics.gauge("if_governor_unmatched_tasks").value) == ([], 0)
