"""The runner: what becomes of a message, whatever happens to it, to the actor and to the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ifabric.actor import runner as runner_module
from ifabric.actor.base import Actor, Caller, handles
from ifabric.wire.envelope import Reply
from tests.actors.fakes import MAX_PAYLOAD_BYTES, Stage
from tests.actors.probe import Echo, Hold, Peek, Probe


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with Stage(Probe) as made:
        yield made


# -- the table of handlers --------------------------------------------------------------------------------------------


def test_the_table_of_handlers_is_the_schema() -> None:
    assert {key: handler.message for key, handler in Probe.handlers.items()}.keys() == {
        ("echo", False),
        ("echo", True),
        ("hold", False),
        ("break", False),
    }
    assert Probe.handlers["echo", True].message is Peek


def test_two_handlers_for_one_message_fail_at_import() -> None:
    with pytest.raises(TypeError, match=r"Twice\.two: echo has a handler already, .*Twice\.one"):

        class Twice(Actor):
            component = "probe"

            @handles
            async def one(self, message: Echo, caller: Caller) -> Reply:
                return Reply()

            @handles
            async def two(self, message: Echo, caller: Caller) -> Reply:
                return Reply()


@pytest.mark.parametrize("name", ["other", None])
def test_a_message_of_another_component_fails_at_import(name: str | None) -> None:
    async def one(self: Any, message: Echo, caller: Caller) -> Reply:
        return Reply()

    with pytest.raises(TypeError, match="Echo belongs to probe"):
        type("Wrong", (Actor,), {"one": handles(one)} | ({"component": name} if name else {}))


def test_a_handler_without_an_annotation_fails_at_import() -> None:
    with pytest.raises(TypeError, match="annotate the message"):

        class Bare(Actor):
            component = "probe"

            @handles
            async def one(self, message, caller):
                return Reply()


def test_a_handler_that_is_not_async_fails_at_import() -> None:
    with pytest.raises(TypeError, match="`async def`"):

        class Blocking(Actor):
            component = "probe"

            @handles  # type: ignore[type-var]
            def one(self, message: Hold, caller: Caller) -> Reply:
                return Reply()


# -- one message ------------------------------------------------------------------------------------------------------


async def test_a_request_is_decoded_handled_and_answered(stage: Stage) -> None:
    sent = stage.bus.send("echo", {"text": "hi"}, session="agent-7", headers={"traceparent": "00-ab-cd-01"})
    outcome, body = await sent.outcome()
    assert outcome == "ok"
    expected = {"text": "hi", "session": "agent-7", "admin": False, "trace": "00-ab-cd-01", "life": stage.actor.life}
    assert body == expected
    assert stage.metrics.counts["if_actor_messages_total ok"] == 1
    assert stage.metrics.counts["if_actor_handling_seconds echo"] == 1


async def test_an_operators_verb_is_another_endpoint_than_an_agents(stage: Stage) -> None:
    assert (await stage.bus.send("echo", admin=True).outcome())[1]["text"] == "peek"
    assert stage.bus.metadata["admin-echo"] == {"schema": "Peek"}


async def test_requests_do_not_wait_for_each_other(stage: Stage) -> None:
    held = stage.bus.send("hold")
    assert (await stage.bus.send("echo").outcome())[0] == "ok"
    await stage.clock.settle()
    assert stage.metrics.counts["if_actor_in_flight probe"] == 1
    stage.actor.gate.set()
    assert (await held.outcome())[0] == "ok"


@pytest.mark.parametrize("session", ["", "a b", "a$b", "x" * 65, "ä"])
async def test_a_session_that_is_not_one_is_refused(stage: Stage, session: str) -> None:
    assert await stage.bus.send("echo", session=session).code() == "bad_request"
    assert stage.metrics.counts["if_actor_dropped_total bad_subject"] == 1
    assert stage.actor.echoed == []


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b'{"text": 7}', b"\xff\xfe", b"[" * 100_000, b'{"text": "\xed\xa0\x80"}'], ids=lambda r: r[:9]
)
async def test_what_is_not_the_message_is_refused_with_its_place(stage: Stage, raw: bytes) -> None:
    assert await stage.bus.send("echo", raw=raw).code() == "bad_request"
    assert stage.logged == []


async def test_a_refusal_carries_its_status_and_its_facts(stage: Stage) -> None:
    outcome, body = await stage.bus.send("break", {"how": "refuse"}).outcome()
    assert outcome == 409
    assert body["error"]["code"] == "claim_taken"
    assert (body["error"]["by"], body["error"]["ttl_s"]) == ("b-2", 3)
    assert stage.metrics.counts["if_actor_messages_total refused"] == 1


@pytest.mark.parametrize("how", ["bug", "deep", "not json"])
async def test_a_poisonous_message_does_not_take_the_actor_down(stage: Stage, how: str) -> None:
    for number in range(20):
        assert await stage.bus.send("break", {"how": how, "request_id": f"r-{number}"}).code() == "internal"
    assert len(stage.actors) == 1
    assert not stage.runner.lost.done()
    assert (await stage.bus.send("echo").outcome())[0] == "ok"
    assert stage.metrics.counts["if_actor_messages_total error"] == 20
    assert [line["request_id"] for line in stage.logged] == [f"r-{number}" for number in range(20)]
    assert all(line["exc_info"] for line in stage.logged)


async def test_a_handler_whose_own_wait_was_cancelled_is_answered_all_the_same(stage: Stage) -> None:
    assert await stage.bus.send("break", {"how": "cancel"}).code() == "unavailable"
    assert not stage.runner.lost.done()


async def test_an_answer_that_the_bus_cannot_carry_is_an_error_and_not_a_silence(stage: Stage) -> None:
    assert await stage.bus.send("echo", {"size": MAX_PAYLOAD_BYTES}).code() == "too_large"
    assert stage.metrics.counts["if_actor_messages_total ok"] == 0


async def test_without_a_reply_subject_it_is_carried_out_and_its_error_logged(stage: Stage) -> None:
    await stage.bus.send("echo", {"text": "quiet"}, reply="").outcome()
    assert stage.actor.echoed == ["quiet"]
    assert (await stage.bus.send("break", {"how": "refuse"}, reply="").outcome())[0] == "dropped"
    assert [line["code"] for line in stage.logged] == ["claim_taken"]


# -- deadlines --------------------------------------------------------------------------------------------------------


async def test_the_handler_is_told_how_long_its_caller_waits(stage: Stage) -> None:
    _, body = await stage.bus.send("echo", headers={"If-Deadline-Ms": "1500"}).outcome()
    assert body["left_s"] == 1.5


async def test_a_deadline_that_has_passed_is_not_started(stage: Stage) -> None:
    assert await stage.bus.send("echo", headers={"If-Deadline-Ms": "0"}).code() == "deadline_exceeded"
    assert stage.actor.echoed == []
    assert stage.metrics.counts["if_actor_dropped_total expired"] == 1


async def test_a_deadline_that_passes_in_the_mailbox_is_not_started() -> None:
    async with Stage(Probe, in_flight_max=1) as stage:
        held = stage.bus.send("hold")
        late = stage.bus.send("echo", {"text": "late"}, headers={"If-Deadline-Ms": "900"})
        in_time = stage.bus.send("echo", {"text": "in time"}, headers={"If-Deadline-Ms": "1100"})
        await stage.clock.advance(1.0)
        stage.actor.gate.set()
        assert await late.code() == "deadline_exceeded"
        assert (await in_time.outcome())[0] == "ok"
        assert (await held.outcome())[0] == "ok"
        assert stage.actor.echoed == ["in time"]


@pytest.mark.parametrize("given", ["soon", "-5", "1.5", "²", "٣", "9" * 5000, " 7"])
async def test_a_deadline_that_is_not_a_number_is_refused_and_harms_nobody(stage: Stage, given: str) -> None:
    # int("²") and int of 5,000 digits raise; in the sink that would end the connection's read loop
    assert await stage.bus.send("echo", headers={"If-Deadline-Ms": given}).code() == "bad_request"
    assert (await stage.bus.send("echo").outcome())[0] == "ok"


# -- too much ---------------------------------------------------------------------------------------------------------


async def test_a_full_mailbox_answers_overloaded_at_once() -> None:
    async with Stage(Probe, mailbox_max=3, in_flight_max=2) as stage:
        sent = [stage.bus.send("hold") for _ in range(8)]
        for refused in sent[5:]:
            outcome, body = await refused.outcome()
            assert (outcome, body["error"]["code"], body["error"]["mailbox_max"]) == (429, "overloaded", 3)
        await stage.clock.settle()
        assert stage.actor.holding == 2
        assert stage.metrics.counts["if_actor_mailbox_depth probe"] == 3
        stage.actor.gate.set()
        assert [(await accepted.outcome())[0] for accepted in sent[:5]] == ["ok"] * 5
        await stage.clock.settle()
        assert stage.metrics.counts["if_actor_mailbox_depth probe"] == 0
        assert stage.metrics.counts["if_actor_in_flight probe"] == 0


async def test_what_waits_is_handled_in_the_order_of_its_arrival() -> None:
    async with Stage(Probe, in_flight_max=1) as stage:
        held = stage.bus.send("hold")
        sent = [stage.bus.send("echo", {"text": str(number)}) for number in range(50)]
        stage.actor.gate.set()
        await asyncio.gather(held.outcome(), *(one.outcome() for one in sent))
        assert stage.actor.echoed == [str(number) for number in range(50)]


async def test_refusals_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "REFUSING_MAX", 2)
    async with Stage(Probe, mailbox_max=0, in_flight_max=1) as stage:
        held = stage.bus.send("hold")
        sent = [stage.bus.send("echo") for _ in range(5)]
        assert [(await one.outcome())[0] for one in sent] == [429, 429, "dropped", "dropped", "dropped"]
        assert stage.metrics.counts["if_actor_dropped_total overloaded"] == 3
        stage.actor.gate.set()
        await held.outcome()


# -- crashes ----------------------------------------------------------------------------------------------------------


async def restart(stage: Stage) -> None:
    """What the supervisor does when the actor has crashed."""
    async with asyncio.timeout(5):
        await stage.runner.lost
    await stage.runner.clear()
    await stage.runner.start()


async def test_a_failed_assertion_crashes_the_actor_and_its_sender_is_told(stage: Stage) -> None:
    assert await stage.bus.send("break", {"how": "assert"}).code() == "internal"
    async with asyncio.timeout(5):
        assert "the sums do not match" in await stage.runner.lost


async def test_the_end_of_a_task_of_its_own_crashes_the_actor(stage: Stage) -> None:
    stage.actor.chore_ends.set_result(None)
    async with asyncio.timeout(5):
        assert await stage.runner.lost == "probe chore ended"


async def test_the_failure_of_a_task_of_its_own_crashes_the_actor_and_is_logged(stage: Stage) -> None:
    stage.actor.chore_ends.set_exception(OSError("no route"))
    async with asyncio.timeout(5):
        assert "no route" in await stage.runner.lost
    assert isinstance(stage.logged[0]["exc_info"], OSError)


async def test_a_crash_answers_what_is_in_flight_unavailable(stage: Stage) -> None:
    held = [stage.bus.send("hold") for _ in range(10)]
    await stage.clock.settle()
    assert stage.actor.holding == 10
    stage.actor.crash("enough")
    for one in held:
        outcome, body = await one.outcome()
        assert (outcome, body["error"]["what"], body["error"]["maybe_done"]) == (503, "probe", True)
    await stage.clock.settle()
    assert stage.metrics.counts["if_actor_in_flight probe"] == 0


async def test_a_crash_answers_also_what_has_not_taken_its_first_step(stage: Stage) -> None:
    stage.actor.crash("enough")
    sent = stage.bus.send("echo")  # its task is cancelled before it runs
    assert await sent.code() == "unavailable"
    assert stage.actor.echoed == []


async def test_what_arrives_while_the_actor_is_down_is_answered_by_the_next_instance(stage: Stage) -> None:
    first = stage.actor
    first.crash("enough")
    await stage.clock.settle()
    waiting = [stage.bus.send("echo") for _ in range(5)]
    await stage.clock.settle()
    assert not any(one.answer.done() for one in waiting)
    await restart(stage)
    assert {(await one.outcome())[1]["life"] for one in waiting} == {stage.actor.life}
    assert stage.actor is not first
    assert first.stops == 1
    assert stage.bus.served == 1


async def test_a_restart_that_fails_keeps_what_waits_for_the_next_try(stage: Stage) -> None:
    stage.actor.crash("enough")
    await stage.clock.settle()
    waiting = stage.bus.send("echo")
    Probe.refuse_to_start.append(OSError("not yet"))
    with pytest.raises(OSError, match="not yet"):
        await restart(stage)
    assert not waiting.answer.done()
    assert stage.actor.stops == 1
    await stage.runner.clear()
    await stage.runner.start()
    assert (await waiting.outcome())[0] == "ok"


async def test_when_the_actor_is_given_up_what_waits_is_answered_unavailable(stage: Stage) -> None:
    stage.actor.crash("enough")
    await stage.clock.settle()
    waiting = stage.bus.send("echo")
    await stage.runner.clear()
    await stage.runner.stop()
    outcome, body = await waiting.outcome()
    assert (outcome, body["error"]["what"]) == (503, "probe")
    assert stage.bus.sinks == {}


async def test_a_crashed_actor_that_was_stopped_is_mounted_again_by_its_next_start(stage: Stage) -> None:
    # its branch restarts it together with the bus: the old endpoints hang on a connection that is gone
    stage.actor.crash("enough")
    await stage.clock.settle()
    await stage.runner.stop()
    await stage.runner.start()
    assert stage.bus.served == 2
    assert (await stage.bus.send("echo").outcome())[0] == "ok"


async def test_a_first_start_that_fails_leaves_nothing_mounted() -> None:
    stage = Stage(Probe)
    Probe.refuse_to_start.append(OSError("no store"))
    with pytest.raises(OSError, match="no store"):
        await stage.runner.start()
    assert stage.bus.served == 0
    assert stage.actor.stops == 1


async def test_a_start_that_cannot_mount_answers_what_came_meanwhile() -> None:
    stage = Stage(Probe)
    mount = stage.bus.serve
    early: list[Any] = []

    async def half_mounted(*args: Any) -> Any:
        await mount(*args)
        early.append(stage.bus.send("echo"))
        raise OSError("the connection has gone")

    stage.bus.serve = half_mounted  # type: ignore[method-assign]
    with pytest.raises(OSError, match="connection has gone"):
        await stage.runner.start()
    assert await early[0].code() == "unavailable"


# -- a process that stood still ---------------------------------------------------------------------------------------


async def test_after_a_standstill_the_backlog_is_dropped_unanswered() -> None:
    async with Stage(Probe, in_flight_max=1) as stage:
        held = stage.bus.send("hold")
        await stage.clock.settle()
        waiting = [stage.bus.send("echo") for _ in range(3)]
        stage.clock.freeze(3.0)
        arriving = stage.bus.send("echo")
        stage.actor.gate.set()
        assert [(await one.outcome())[0] for one in (*waiting, arriving)] == ["dropped"] * 4
        assert stage.metrics.counts["if_actor_dropped_total frozen"] == 4
        assert stage.actor.echoed == []
        assert (await held.outcome())[0] == "ok"


async def test_what_waits_for_a_crashed_actor_is_dropped_after_a_standstill(stage: Stage) -> None:
    stage.actor.crash("enough")
    await stage.clock.settle()
    waiting = stage.bus.send("echo")
    stage.clock.freeze(3.0)
    await stage.runner.stop()
    assert (await waiting.outcome())[0] == "dropped"


async def test_a_standstill_is_told_to_the_supervisor_even_when_no_message_comes(stage: Stage) -> None:
    await stage.clock.advance(10)
    assert not stage.pulse.frozen()
    stage.clock.freeze(4.0)
    await stage.clock.advance(0.25)
    assert stage.pulse.lost is not None
    assert "stood still for 4" in stage.pulse.lost.result()


async def test_the_process_is_taken_for_frozen_until_it_has_joined_again(stage: Stage) -> None:
    stage.clock.freeze(3.0)
    await stage.clock.advance(5.0)
    assert (await stage.bus.send("echo").outcome())[0] == "dropped"
    await stage.pulse.stop()
    await stage.pulse.start()
    assert (await stage.bus.send("echo").outcome())[0] == "ok"


async def test_a_short_pause_is_lag_and_no_standstill(stage: Stage) -> None:
    await stage.clock.advance(1.0)
    stage.clock.freeze(1.9)
    await stage.clock.advance(0)
    assert stage.pulse.lag_s == pytest.approx(1.65)
    assert not stage.pulse.frozen()
    await stage.clock.advance(0.25)
    assert stage.pulse.lag_s == 0


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_a_drain_answers_everything_that_was_accepted() -> None:
    stage = Stage(Probe, in_flight_max=10)
    async with stage:
        sent = [stage.bus.send("hold") for _ in range(100)]
        await stage.clock.settle()
        stopping = asyncio.create_task(stage.runner.stop())
        await stage.clock.settle()
        assert stage.actor.drained
        assert stage.bus.sinks == {}
        assert stage.actor.stops == 0
        stage.actor.gate.set()
        assert [(await one.outcome())[0] for one in sent] == ["ok"] * 100
        await stopping
        assert stage.actor.stops == 1


async def test_what_cannot_be_answered_in_time_is_told_that_the_daemon_is_draining() -> None:
    async with Stage(Probe, in_flight_max=2, drain_timeout_s=3.0) as stage:
        sent = [stage.bus.send("hold") for _ in range(5)]
        await stage.clock.settle()
        stopping = asyncio.create_task(stage.runner.stop())
        await stage.clock.advance(2.9)
        assert not any(one.answer.done() for one in sent)
        await stage.clock.advance(0.2)
        for one in sent:
            outcome, body = await one.outcome()
            assert (outcome, body["error"]["what"]) == (503, "draining")
        await stopping
        assert stage.actor.stops == 1
        assert [(line["in_flight"], line["waiting"]) for line in stage.logged] == [(2, 3)]


async def test_a_crash_while_draining_ends_the_drain() -> None:
    async with Stage(Probe, in_flight_max=1) as stage:
        sent = [stage.bus.send("hold") for _ in range(3)]
        stopping = asyncio.create_task(stage.runner.stop())
        await stage.clock.settle()
        stage.actor.crash("enough")
        for one in sent:
            assert await one.code() == "unavailable"
        async with asyncio.timeout(5):
            await stopping


async def test_an_actor_is_stopped_even_when_the_bus_cannot_be_drained(stage: Stage) -> None:
    held = stage.bus.send("hold")
    await stage.clock.settle()

    async def fail() -> None:
        raise OSError("the connection has gone")

    service: Any = stage.runner._service
    service.drain, mend = fail, service.drain
    with pytest.raises(OSError, match="connection has gone"):
        await stage.runner.stop()
    assert await held.code() == "unavailable"
    assert stage.actor.stops == 1
    service.drain = mend
