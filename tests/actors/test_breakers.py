"""Breakers over the twins and over real servers: what callers, operators and other daemons see."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ifabric.actor.base import Caller
from ifabric.errors import BadRequest, BreakerOpen, Conflict, FabricError, Unavailable, UnknownPermit
from ifabric.store.base import Delete, Put, Txn, prefix_end
from ifabric.store.commit import Outcome, Request
from ifabric.testing.harness import Daemon
from ifabric.wire import governor as wire
from ifabric_actors.governor import records, switches
from ifabric_actors.governor.actor import Governor
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.circuit import Circuit
from tests.actors.conftest import World

NAME = "openai/gpt-x"
S1 = Caller("s1")
#: open long enough to be looked at
SLOW: dict[str, Any] = {"failure_threshold": 3, "minimum_calls": 3, "reset_timeout": 60.0, "half_open_probes": 2}
#: open for hardly a moment
FAST: dict[str, Any] = {**SLOW, "reset_timeout": 0.001, "reset_timeout_max": 0.001}


async def daemon(world: World, **config: Any) -> Daemon:
    return await world.daemon(governor={"circuit_breaker": {**SLOW, **config}}, actors=())


def breakers(of: Daemon) -> Breakers:
    """The present ones of a daemon, to ask it and no other."""
    found = next(actor for actor in reversed(of.actors) if isinstance(actor, Governor))
    return found.breakers


async def ask(world: World, verb: str, session: str = "s1", **body: Any) -> dict[str, Any]:
    return await world.ask(verb, session, component="governor", **body)


async def admit(world: World, session: str = "s1", name: str = NAME) -> str:
    answer = await ask(world, "admit", session, breaker=name)
    assert isinstance(answer["permit"], str)
    return answer["permit"]


async def report(world: World, permit: str, outcome: str, session: str = "s1", **more: Any) -> str:
    answer = await ask(world, "report", session, **{"breaker": NAME, "permit": permit, "outcome": outcome, **more})
    return str(answer["state"])


async def call(world: World, outcome: str, **more: Any) -> str:
    """One call, admitted and reported."""
    return await report(world, await admit(world), outcome, **more)


async def fail(world: World, times: int = 3) -> str:
    return [await call(world, "failure") for _ in range(times)][-1]


async def trip(at: Daemon, times: int = 3) -> None:
    """Calls that fail, all at one daemon."""
    for _ in range(times):
        admitted = await breakers(at).admit(wire.Admit(breaker=NAME), S1)
        await breakers(at).report(wire.Report(breaker=NAME, permit=admitted.permit, outcome="failure"), S1)


async def refused(world: World, session: str = "s1") -> FabricError:
    return await world.refusal("admit", session, component="governor", breaker=NAME)


async def eventually(true: Callable[[], Awaitable[Any]], within_s: float = 5.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (found := await true()):
            await asyncio.sleep(0.005)
    return found


async def probe(world: World, session: str = "s1") -> str:
    """A probe's permit, as soon as there is one."""

    async def admitted() -> str | None:
        try:
            answer = await ask(world, "admit", session, breaker=NAME)
        except BreakerOpen:
            return None
        assert answer["state"] == "half_open"
        return str(answer["permit"])

    found: str = await eventually(admitted)
    return found


async def record(world: World, name: str = NAME) -> Circuit:
    kv = await (await world.store()).get(records.breaker_key(name))
    assert kv is not None
    return Breakers.read(kv)


async def due(of: Daemon, name: str = NAME) -> None:
    """Its time is over: as if `until` had come."""
    kv = await of.store.get(records.breaker_key(name))
    assert kv is not None
    now = of.clock.wall_ms()
    value = msgspec.json.encode(msgspec.structs.replace(Breakers.read(kv), until=now - 1, event=""))
    written = await of.store.txn(Txn((), (Put(kv.key, value),)))
    breakers(of).take(kv._replace(value=value, mod_revision=written.revision))


# -- closed, and open ------------------------------------------------------------------------------------------------------


async def test_it_opens_at_the_threshold_and_says_when_it_may_be_tried(world: World) -> None:
    one = await daemon(world)
    assert await fail(world, 2) == "closed"
    assert await call(world, "success") == "closed"
    assert await fail(world, 1) == "open"
    error = await refused(world)
    assert isinstance(error, BreakerOpen)
    assert error.retryable
    assert error.facts["breaker"] == NAME
    assert error.facts["state"] == "open"
    assert 50 < error.facts["probe_in_s"] <= 60
    assert breakers(one).open == frozenset({NAME})
    assert one.counted("if_governor_admits_total", outcome="refused") == 1
    assert one.counted("if_governor_breaker_transitions_total", to="open") == 1
    assert one.counted("if_governor_reports_total", outcome="failure") == 3
    assert (await record(world)).why == "3 of 4 calls failed"
    assert await admit(world, name="another")


async def test_what_was_the_callers_own_fault_never_opens_it(world: World) -> None:
    await daemon(world)
    assert [await call(world, "ignored", latency_s=900, retry_after_s=900) for _ in range(10)] == ["closed"] * 10


async def test_a_success_that_took_too_long_is_a_failure_when_configured(world: World) -> None:
    await daemon(world, slow_call_seconds=2.0)
    assert [await call(world, "success", latency_s=1.9) for _ in range(3)][-1] == "closed"
    assert [await call(world, "success", latency_s=2.0) for _ in range(3)][-1] == "open"


async def test_few_calls_are_no_evidence(world: World) -> None:
    await daemon(world, minimum_calls=6)
    assert await fail(world, 5) == "closed"
    assert await call(world, "success") == "open"


async def test_what_says_nothing_is_no_call_either(world: World) -> None:
    await daemon(world, minimum_calls=6)
    await fail(world, 5)
    assert [await call(world, "ignored") for _ in range(5)] == ["closed"] * 5
    assert (await ask(world, "breakers"))["breakers"][0]["calls"] == 5


async def test_failures_that_come_together_open_it_once(world: World) -> None:
    one = await daemon(world)
    permits = [await admit(world) for _ in range(8)]
    states = await asyncio.gather(*(report(world, permit, "failure") for permit in permits))
    assert states == ["closed"] * 2 + ["open"] * 6
    assert one.counted("if_governor_breaker_transitions_total", to="open") == 1
    assert (await record(world)).trips == 1


async def test_what_the_resource_asked_for_is_honoured_whichever_failure_brought_it(world: World) -> None:
    await daemon(world)
    late = await admit(world)
    await call(world, "failure", retry_after_s=500)
    await fail(world, 2)
    assert 490 < (await refused(world)).facts["probe_in_s"] <= 500
    before = await record(world)
    assert await report(world, late, "failure", retry_after_s=5_000) == "open"
    assert 4_990 < (await refused(world)).facts["probe_in_s"] <= 5_000
    after = await record(world)
    assert (after.generation, after.event) == (before.generation, "")


async def test_what_was_under_way_when_it_opened_changes_nothing(world: World) -> None:
    await daemon(world)
    permits = [await admit(world) for _ in range(5)]
    await fail(world)
    before = await record(world)
    assert [await report(world, permit, "success") for permit in permits[:3]] == ["open"] * 3
    assert [await report(world, permit, "failure") for permit in permits[3:]] == ["open"] * 2
    assert await record(world) == before


async def test_a_closed_breaker_is_admitted_and_counted_for_without_asking_etcd(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon(world)

    async def unasked(*_: Any, **__: Any) -> Any:
        raise AssertionError("etcd was asked")

    monkeypatch.setattr(one.committer, "commit", unasked)  # all that breakers ask goes through it
    assert await call(world, "success") == "closed"
    assert await fail(world, 2) == "closed"
    monkeypatch.undo()


async def test_a_trip_that_etcd_does_not_take_is_tried_again_at_the_next_count(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon(world)

    async def gone(request: Request) -> Outcome:
        raise Unavailable(what="etcd")

    monkeypatch.setattr(one.committer, "commit", gone)
    assert await fail(world, 4) == "closed"
    monkeypatch.undo()
    assert await call(world, "success") == "open"


async def test_switched_off_it_lets_everything_through(world: World) -> None:
    await daemon(world, enabled=False)
    assert await fail(world, 10) == "closed"
    assert await report(world, "made up", "failure") == "closed"
    await ask(world, "breaker", "olga", admin=True, breaker=NAME, state="open")
    assert (await ask(world, "admit", breaker=NAME))["state"] == "closed"


# -- permits ---------------------------------------------------------------------------------------------------------------


async def unknown(world: World, permit: str, session: str = "s1", **more: Any) -> None:
    error = await world.refusal(
        "report",
        session,
        **{"component": "governor", "breaker": NAME, "permit": permit, "outcome": "failure", **more},
    )
    assert isinstance(error, UnknownPermit), error


async def test_a_permit_counts_once_for_its_own_session_and_breaker(world: World) -> None:
    one = await daemon(world)
    for _ in range(3):
        permit = await admit(world)
        await unknown(world, permit, "s2")
        await unknown(world, permit, breaker="openai/gpt-y")
        await unknown(world, permit[:-1] + ("0" if permit[-1] != "0" else "1"))
        await unknown(world, permit.replace("c0", "c1", 1))
        await unknown(world, permit.replace("c", "p", 1))
        await unknown(world, "")
        await unknown(world, ".")
        await report(world, permit, "success")
        await unknown(world, permit)
    assert await fail(world, 2) == "closed"
    assert one.counted("if_governor_reports_total", outcome="unknown") == 24


async def test_a_report_that_reaches_another_daemon_is_believed(world: World) -> None:
    one, two = await daemon(world), await daemon(world)
    for _ in range(3):
        admitted = await breakers(one).admit(wire.Admit(breaker=NAME), S1)
        message = wire.Report(breaker=NAME, permit=admitted.permit, outcome="failure")
        answer = await breakers(two).report(message, S1)
    assert answer.state == "open"


async def test_a_probe_reports_to_a_daemon_that_has_heard_nothing_yet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await daemon(world), await daemon(world)
    monkeypatch.setattr(breakers(two)._mirror, "put", lambda *_: None)  # its watch tells it nothing
    await trip(one)
    await due(one)
    probes = [await breakers(one).admit(wire.Admit(breaker=NAME), S1) for _ in range(2)]
    assert breakers(two).open == frozenset()
    monkeypatch.undo()
    states = [
        (await breakers(two).report(wire.Report(breaker=NAME, permit=one.permit, outcome="success"), S1)).state
        for one in probes
    ]
    assert states == ["half_open", "closed"]


async def test_a_probe_reports_to_a_daemon_that_has_not_heard_of_it_yet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await daemon(world), await daemon(world)
    await trip(one)
    await due(one)
    await breakers(one).admit(wire.Admit(breaker=NAME), S1)

    async def heard() -> bool:
        return breakers(two)._mirror.get(NAME).circuit.state == "half_open"

    await eventually(heard)
    monkeypatch.setattr(breakers(two)._mirror, "put", lambda *_: None)
    second = await breakers(one).admit(wire.Admit(breaker=NAME), S1)
    monkeypatch.undo()
    message = wire.Report(breaker=NAME, permit=second.permit, outcome="failure")
    assert (await breakers(two).report(message, S1)).state == "open"


# -- half open -------------------------------------------------------------------------------------------------------------


async def test_probes_that_succeed_close_it_and_the_past_is_forgotten(world: World) -> None:
    one = await daemon(world, **FAST)
    await fail(world)
    probes = [await probe(world, "s1"), await probe(world, "s2")]
    full = await refused(world)
    assert full.facts["state"] == "half_open"
    assert 25 < full.facts["probe_in_s"] <= 30
    assert await report(world, probes[0], "success") == "half_open"
    assert await report(world, probes[1], "success", "s2") == "closed"
    assert breakers(one).open == frozenset()
    assert await fail(world, 2) == "closed"
    transitions = {to: one.counted("if_governor_breaker_transitions_total", to=to) for to in ("half_open", "closed")}
    assert transitions == {"half_open": 1, "closed": 1}
    assert one.counted("if_governor_admits_total", outcome="probe") == 2


async def test_one_probe_that_fails_opens_it_for_twice_as_long(world: World) -> None:
    one = await daemon(world)
    await fail(world)
    await due(one)
    first, second = await probe(world), await probe(world, "s2")
    assert await report(world, first, "failure") == "open"
    assert 110 < (await refused(world)).facts["probe_in_s"] <= 120
    assert await report(world, second, "success", "s2") == "open"  # accepted, and of no effect


async def test_a_slow_success_of_a_probe_is_a_failure_too(world: World) -> None:
    await daemon(world, **FAST, slow_call_seconds=2.0)
    await fail(world)
    assert await report(world, await probe(world), "success", latency_s=2.5) == "open"


async def test_an_ignored_probe_makes_room_and_decides_nothing(world: World) -> None:
    await daemon(world, **FAST)
    await fail(world)
    probes = [await probe(world), await probe(world)]
    assert (await refused(world)).code == "breaker_open"
    assert await report(world, probes[0], "ignored") == "half_open"
    assert (await record(world)).successes == 0
    await probe(world, "s2")


async def test_a_probe_that_never_reports_frees_its_permit_and_its_late_report_is_refused(world: World) -> None:
    await daemon(world, **FAST, probe_timeout_seconds=0.2)
    await fail(world)
    lost = [await probe(world), await probe(world)]
    others = [await probe(world, "s2"), await probe(world, "s2")]
    await unknown(world, lost[0])
    assert (await record(world)).state == "half_open"
    answer = await ask(world, "breakers")
    assert [line["state"] for line in answer["breakers"]] == ["half_open"]
    assert len({*lost, *others}) == 4


async def test_many_callers_at_two_daemons_get_exactly_so_many_probes(world: World) -> None:
    one, two = await daemon(world), await daemon(world)
    await trip(one)
    await due(one)

    async def two_knows() -> bool:
        return 0 < breakers(two)._mirror.get(NAME).circuit.until < two.clock.wall_ms()

    await eventually(two_knows)

    waits: list[float] = []

    async def try_one(number: int) -> str | None:
        try:
            reply = await breakers((one, two)[number % 2]).admit(wire.Admit(breaker=NAME), Caller(f"s{number}"))
        except BreakerOpen as error:
            waits.append(error.facts["probe_in_s"])
            return None
        return reply.permit

    permits = [permit for permit in await asyncio.gather(*(try_one(n) for n in range(60))) if permit is not None]
    assert len(permits) == len(set(permits)) == 2
    assert len(waits) == 58
    assert all(wait_s >= 0 for wait_s in waits)
    found = await record(world)
    assert (found.state, len(found.probes)) == ("half_open", 2)
    both = [each.counted("if_governor_breaker_transitions_total", to="half_open") for each in (one, two)]
    assert sum(both) == 1


async def test_those_who_wait_for_a_probe_cost_etcd_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon(world)
    await trip(one)
    await due(one)
    commits: list[Request] = []
    commit = one.committer.commit

    async def counted(request: Request) -> Outcome:
        commits.append(request)
        return await commit(request)

    monkeypatch.setattr(one.committer, "commit", counted)
    asked = [breakers(one).admit(wire.Admit(breaker=NAME), Caller(f"s{n}")) for n in range(60)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, wire.AdmitReply) for answer in answers) == len(commits) == 2


class Unheard:
    """A committer whose first replies are lost: what it wrote is there, and somebody else has written since."""

    def __init__(self, one: Daemon, lost: int = 1) -> None:
        self._commit, self._store, self.lost = one.committer.commit, one.store, lost

    async def __call__(self, request: Request) -> Outcome:
        outcome = await self._commit(request)
        if not request.compares or not self.lost:
            return outcome
        assert outcome.succeeded
        self.lost -= 1
        kv = await self._store.get(records.breaker_key(NAME))
        assert kv is not None
        await self._store.txn(Txn((), (Put(kv.key, kv.value),)))
        read = await self._commit(Request((), request.otherwise, (), request.owner))
        return read._replace(succeeded=False)


async def test_a_probe_whose_admission_is_not_known_to_have_gone_through_has_one_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon(world, **FAST)
    await fail(world)
    monkeypatch.setattr(one.committer, "commit", Unheard(one))
    permit = await probe(world)
    assert len((await record(world)).probes) == 1
    assert await report(world, permit, "success") == "half_open"


async def test_a_probes_report_that_is_not_known_to_have_gone_through_counts_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon(world, **FAST)
    await fail(world)
    permit = await probe(world)
    monkeypatch.setattr(one.committer, "commit", Unheard(one))
    assert await report(world, permit, "success") == "half_open"
    assert (await record(world)).successes == 1


async def test_a_probes_report_that_etcd_did_not_take_may_be_sent_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await daemon(world, **FAST)
    await fail(world)
    permit = await probe(world)

    async def gone(request: Request) -> Outcome:
        raise Unavailable(what="etcd")

    monkeypatch.setattr(one.committer, "commit", gone)
    with pytest.raises(Unavailable):
        await report(world, permit, "success")
    monkeypatch.undo()
    assert await report(world, permit, "success") == "half_open"


# -- operators ---------------------------------------------------------------------------------------------------------------


async def switch(world: World, state: str, **more: Any) -> str:
    body = {"breaker": NAME, "state": state, **more}
    return str((await ask(world, "breaker", "olga", admin=True, **body))["state"])


async def test_an_operator_holds_it_open_until_one_closes_it(world: World) -> None:
    one = await daemon(world, **FAST)
    assert await switch(world, "open", why="the bill", request_id="r1") == "open"
    facts = (await refused(world)).facts
    assert facts == {"breaker": NAME, "probe_in_s": None, "state": "open", "by": "olga", "why": "the bill"}
    found = await record(world)
    assert (found.by, found.why, found.request) == ("olga", "the bill", "r1")
    assert found.at > 0
    line = (await ask(world, "breakers"))["breakers"][0]
    assert (line["by"], line["why"], "probe_in_s" in line) == ("olga", "the bill", False)
    assert await switch(world, "closed") == "closed"
    assert await call(world, "success") == "closed"
    assert one.counted("if_governor_breaker_transitions_total", to="closed") == 1


async def test_closing_forgets_the_counts_of_every_daemon(world: World) -> None:
    one, two = await daemon(world), await daemon(world)
    for each in (one, two):
        await trip(each, 2)
    old = [await breakers(each).admit(wire.Admit(breaker=NAME), S1) for each in (one, two)]
    await switch(world, "closed")

    async def heard() -> bool:
        return not any(breakers(each)._mirror.windows for each in (one, two))

    await eventually(heard)
    for each, permit in zip((one, two), old, strict=True):
        message = wire.Report(breaker=NAME, permit=permit.permit, outcome="failure")
        assert (await breakers(each).report(message, S1)).state == "closed"
        assert not breakers(each)._mirror.windows


async def test_a_repeated_command_gets_the_first_answer_and_is_carried_out_once(world: World) -> None:
    one, two = await daemon(world), await daemon(world)
    command = wire.SetBreaker(breaker=NAME, state="open", why="x", request_id="r1")
    first = await breakers(one).set(command, Caller("olga", admin=True))
    await breakers(one).set(wire.SetBreaker(breaker=NAME, state="closed"), Caller("olga", admin=True))
    again = await breakers(two).set(command, Caller("olga", admin=True))
    assert msgspec.json.encode(again) == msgspec.json.encode(first) == b'{"state":"open"}'
    assert (await record(world)).state == "closed"
    with pytest.raises(Conflict):
        await switch(world, "closed", request_id="r1")
    assert (await record(world)).generation == 2


async def test_a_command_is_carried_out_although_the_lease_of_its_receipt_has_gone(world: World) -> None:
    one = await daemon(world)
    await switch(world, "open", request_id="r1")
    await one.store.revoke(next(a for a in one.actors if isinstance(a, Governor))._receipts._lease)
    assert await switch(world, "closed", request_id="r2") == "closed"
    assert (await record(world)).generation == 2


async def test_only_the_admin_subject_reaches_the_switch(world: World) -> None:
    await daemon(world)
    error = await world.refusal("breaker", "s1", component="governor", breaker=NAME, state="open")
    assert error.code == "unavailable"  # nobody listens there


# -- other daemons, other lives --------------------------------------------------------------------------------------------------


async def test_a_daemon_that_starts_later_knows_what_is_open(world: World) -> None:
    one = await daemon(world)
    permit = await admit(world)
    await fail(world)
    await one.stop()
    two = await daemon(world)
    assert breakers(two).open == frozenset({NAME})
    assert (await refused(world)).code == "breaker_open"
    assert await report(world, permit, "failure") == "open"  # given out by the one before


async def test_transitions_are_shared(world: World) -> None:
    one, two = await daemon(world, **FAST), await daemon(world, **FAST)
    await trip(one)

    async def both(state: str) -> bool:
        return all(breakers(each)._mirror.get(NAME).circuit.state == state for each in (one, two))

    await eventually(lambda: both("open"))
    probes = [await probe(world), await probe(world)]
    await eventually(lambda: both("half_open"))
    for permit in probes:
        await report(world, permit, "success")
    await eventually(lambda: both("closed"))


async def test_a_record_that_somebody_deleted_is_as_if_it_had_never_been(world: World) -> None:
    one = await daemon(world)
    await fail(world)
    await one.store.txn(Txn((), (Delete(records.BREAKERS, prefix_end(records.BREAKERS)),)))

    async def closed() -> bool:
        return not breakers(one).open

    await eventually(closed)
    assert await fail(world) == "open"


async def test_old_news_changes_nothing(world: World) -> None:
    one = await daemon(world)
    await fail(world)
    kv = await one.store.get(records.breaker_key(NAME))
    assert kv is not None
    await switch(world, "closed")
    breakers(one).take(kv)
    breakers(one).gone(kv.key, kv.mod_revision)
    assert breakers(one).open == frozenset()
    assert list(breakers(one).known()) == [kv.key]


async def test_losing_every_race_is_told_as_overload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await daemon(world, **FAST)
    await fail(world)
    monkeypatch.setattr(switches, "TRIES_MAX", 3)
    monkeypatch.setattr(breakers(one)._mirror, "take", lambda kv: None)  # never learns
    kv = await one.store.get(records.breaker_key(NAME))
    assert kv is not None
    value = msgspec.json.encode(msgspec.structs.replace(Breakers.read(kv), write="another"))
    await one.store.txn(Txn((), (Put(kv.key, value),)))

    async def told() -> str | None:
        error = await refused(world)
        return error.code if error.code != "breaker_open" else None

    assert await eventually(told) == "overloaded"


# -- what is shown -----------------------------------------------------------------------------------------------------------


async def test_the_list_is_in_the_order_of_names_and_bounded(world: World) -> None:
    one = await daemon(world, breakers_max=3)
    await fail(world)
    for name in ("e", "d", "c", "b", "a"):
        permit = await admit(world, name=name)
        await report(world, permit, "failure", breaker=name)
    lines = (await ask(world, "breakers"))["breakers"]
    assert [(line["breaker"], line["state"], line["failures"]) for line in lines] == [
        ("a", "closed", 1),
        ("b", "closed", 1),
        ("c", "closed", 1),
        (NAME, "open", 0),
    ]
    assert lines[3]["trips"] == 1
    assert 0 <= lines[3]["opened_ago_s"] < 60
    assert 0 < lines[3]["probe_in_s"] <= 60
    breakers(one).refresh()
    gauges = {state: one.metrics.gauge("if_governor_breakers", state=state).value for state in switches.STATES}
    assert gauges == {"closed": 3, "open": 1, "half_open": 0}
    assert one.metrics.gauge("if_governor_circuit_breaker_open").value == 1


async def test_a_window_that_nothing_is_left_in_is_forgotten(world: World) -> None:
    one = await daemon(world, window_seconds=0.05)
    await fail(world, 2)

    async def forgotten() -> bool:
        return (await ask(world, "breakers"))["breakers"] == []

    await eventually(forgotten)
    assert not breakers(one)._mirror.windows
    assert await fail(world, 1) == "closed"


async def test_each_transition_is_told_once_and_nothing_else(world: World) -> None:
    one = await daemon(world, **FAST)
    told: list[tuple[str, str]] = []
    writes: list[str] = []
    store = await world.store()
    _, start = await store.range(b"a", b"b")
    await fail(world)
    first, second = await probe(world), await probe(world)
    await report(world, first, "success")
    await report(world, second, "success")
    await switch(world, "open", why="x")
    await switch(world, "closed", why="y")
    _, end = await store.range(b"a", b"b")
    async with asyncio.timeout(5):
        async for batch in store.watch((records.BREAKERS,), after_revision=start):
            for event in batch.events:
                writes.append(Breakers.read(event.kv).write)
                for subject, body, ident in breakers(one).tell(event.kv, Breakers.read(event.kv)):
                    found = msgspec.json.decode(body, type=wire.BreakerEvent)
                    assert found.breaker == NAME
                    assert ident == f"breakers/{NAME}@{event.kv.mod_revision}"
                    assert subject == f"if.v1.event.breaker.{found.event}"
                    told.append((found.event, found.why))
            if batch.revision >= end:
                break
    assert len(set(writes)) == len(writes) == 7  # each unlike any other: a lost reply is told from another's write
    assert told == [
        ("opened", "3 of 3 calls failed"),
        ("half_open", ""),
        ("closed", ""),
        ("opened", "x"),
        ("closed", "y"),
    ]


# -- hostile input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("admit", b"{}"),
        ("admit", b'{"breaker":""}'),
        ("admit", b'{"breaker":"%b"}' % (b"a" * 65)),
        ("admit", b'{"breaker":"a\\n"}'),
        ("admit", b'{"breaker":"a b"}'),
        ("admit", b'{"breaker":"a\\u0000"}'),
        ("admit", b'{"breaker":"../up"}'),
        ("admit", b'{"breaker":1}'),
        ("admit", b'{"breaker":["a"]}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"maybe"}'),
        ("report", b'{"breaker":"b","permit":"%b","outcome":"success"}' % (b"x" * 129)),
        ("report", b'{"breaker":"b","permit":"\\ud800","outcome":"success"}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"success","latency_s":NaN}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"success","latency_s":1e999}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"success","latency_s":-1}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"success","latency_s":true}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"failure","retry_after_s":86401}'),
        ("report", b'{"breaker":"b","permit":"x","outcome":"failure","retry_after_s":"60"}'),
        ("report", b'{"breaker":"b","permit":null,"outcome":"failure"}'),
    ],
)
async def test_what_is_not_a_request_is_refused_with_its_place(world: World, verb: str, body: bytes) -> None:
    await daemon(world)
    with pytest.raises(BadRequest):
        await world.ask_raw(verb, "s1", body, component="governor")


@pytest.mark.parametrize("permit", ["", ".", "..", "c.x.y", "c1.2", "é" * 64, "\u0000", "c-1.a.b", "p" * 128])
async def test_whatever_is_sent_as_a_permit_is_at_most_unknown(world: World, permit: str) -> None:
    await daemon(world)
    await unknown(world, permit)
