"""Keeping a claim, and losing it: what the holder is told, and when. Over the twins and over real servers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ifabric import errors
from ifabric.claims import Claim
from ifabric.renewal import TRUST, Renewal
from ifabric.store.base import Get, Got
from ifabric.store.commit import Outcome
from ifabric.testing.clock import VirtualClock
from ifabric.wire import coordinator as wire
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.records import Seat

from .conftest import World
from .sdk import Tap, client, events_of, state, submitted, tap, until_state

FOREVER = asyncio.Event


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fifth of a second with the shortest TTL there is: what a renewal brings is not waited for so long."""
    monkeypatch.setattr("ifabric.renewal.RENEW_AT", 0.1)


async def end_session(world: World, session: str) -> None:
    """As an administrator does with etcdctl, or the end of its lease."""
    store = await world.store()
    kv = await store.get(records.session_key(session))
    assert kv is not None
    await store.revoke(kv.lease)


async def lost_inside(claim: Claim) -> tuple[str, bool]:
    """What comes out of a block that works until it is stopped, and whether the work was told before."""
    told = False
    try:
        async with asyncio.timeout(15) as patience, claim:
            try:
                await FOREVER().wait()
            except asyncio.CancelledError:
                told = claim.lost.is_set()
                raise
    except errors.ClaimLost as lost:
        assert not patience.expired(), "the work was stopped by this test, not by the claim"
        return lost.message, told
    raise AssertionError("the block went on")


# -- keeping ----------------------------------------------------------------------------------------------------------------


async def test_renewal_keeps_every_claim_of_the_session_well_past_its_ttl(world: World) -> None:
    await world.daemon()
    await submitted(world, "A", "B")
    line = tap(world)
    async with client(world, over=line, ttl_s=2) as c:
        claims = [await c.claim("A"), await c.claim("B")]
        await line.until_sent("renew", 15)  # one each 0.2 s: three seconds of a TTL of two
        assert not any(claim.lost.is_set() for claim in claims)
        assert [len(body["claims"]) for body in line.bodies("renew")] == [2] * len(line.bodies("renew"))
        for claim in claims:
            await claim.complete()
    assert events_of(await world.ask("get", "op", task="A")) == ["submitted", "claimed", "completed"]


# -- losing -----------------------------------------------------------------------------------------------------------------


async def test_a_cancelled_task_stops_the_work_and_says_who_cancelled_it(world: World) -> None:
    await world.daemon()
    await submitted(world, "T")
    async with client(world, ttl_s=2) as c:
        claim = await c.claim("T")
        working = asyncio.create_task(lost_inside(claim))
        await c.operate(wire.Cancel, "T")
        message, told = await working
        assert "cancelled by an operator" in message
        assert told
        assert c.claims == {}
        assert "lost: cancelled by an operator" in repr(claim)
        with pytest.raises(errors.ClaimLost):
            await claim.complete()


async def test_with_the_session_every_claim_is_lost_and_a_new_life_begins_by_itself(world: World) -> None:
    await world.daemon()
    await submitted(world, "T", "U")
    line = tap(world)
    async with client(world, over=line, ttl_s=2) as c:
        working = [asyncio.create_task(lost_inside(await c.claim(task))) for task in ("T", "U")]
        await asyncio.sleep(0)
        await end_session(world, "me")
        for message, told in await asyncio.gather(*working):
            assert "not registered" in message
            assert told
        await until_state(world, "T", "pending")
        async with await c.claim("T") as again:
            await line.until_sent("renew", 1)
            assert not again.lost.is_set()
    assert len(line.bodies("hello")) >= 2


async def test_a_claim_begins_a_new_life_of_a_lost_session_without_waiting_for_a_renewal(world: World) -> None:
    await world.daemon()
    await submitted(world, "T", "U")
    line = tap(world)
    async with client(world, over=line, ttl_s=600) as c:
        old = await c.claim("T")
        await end_session(world, "me")
        async with await c.claim("U"):
            assert old.lost.is_set()
    assert line.bodies("renew") == []


async def test_a_late_word_of_an_old_life_ends_no_claim_of_the_new_one(world: World) -> None:
    await world.daemon()
    await submitted(world, "T")
    async with client(world, ttl_s=600) as c:
        await c.hello()
        before = c._renewal.greeted
        await c.hello()
        claim = await c.claim("T")
        await c._renewal.session_lost("the session is not registered", greeted=before)
        assert not claim.lost.is_set()
        await c._renewal.session_lost("the session is not registered", greeted=c._renewal.greeted)
        assert claim.lost.is_set()


async def test_in_silence_the_holder_stops_while_the_claim_is_still_its_own(world: World) -> None:
    """Five sixths of the TTL after the last renewal was sent: nobody else can have begun by then."""
    await world.daemon()
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line, ttl_s=2) as c:
        claim = await c.claim("T")
        await line.until_sent("renew", 1)
        line.silent = lambda verb: verb in ("renew", "bye")
        message, told = await lost_inside(claim)
        assert await state(world, "T") == "claimed"  # the lease has not ended: the holder stopped first
        assert "no renewal got through" in message
        assert told
    await until_state(world, "T", "pending")


class Silence:
    """A client whose renewals fail at once from some moment on."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.claims: dict[str, Claim] = {}
        self.claiming: dict[str, str] = {}
        self.patience_s: list[float] = []
        self.ttl_s: float | None = 30.0
        self.released: list[tuple[str, int]] = []

    async def ask_renewal(self, held: tuple[wire.HeldClaim, ...], within_s: float) -> wire.RenewReply:
        self.patience_s.append(within_s)
        if self.ttl_s is None:
            await self.clock.sleep(within_s)
            raise errors.Unavailable(what="nats")
        return wire.RenewReply(ttl_s=self.ttl_s, lost=(), cancelled=(), unnamed=())

    async def hello(self) -> Any:
        raise AssertionError("the session is not lost")

    async def release(self, task: str, fence: int, reason: str = "") -> Any:
        self.released.append((task, fence))

    def forget(self, claim: Claim) -> None:
        self.claims.pop(claim.task, None)


async def test_trust_ends_at_five_sixths_of_the_ttl_after_the_last_renewal_was_sent() -> None:
    clock = VirtualClock()
    session = Silence(clock)
    renewal = Renewal(session, clock, "me")  # type: ignore[arg-type]
    reply = wire.ClaimReply(task="T", fence=1, attempt=1, ttl_s=30, spec=wire.TaskSpec(id="T"))
    claim = session.claims["T"] = Claim(session, reply)  # type: ignore[arg-type]
    renewal.begin(clock.monotonic(), 30.0)
    await clock.advance(3.0)  # a renewal, now
    assert len(session.patience_s) == 1
    session.ttl_s = None
    await clock.advance(30.0 * TRUST - 0.001)
    assert not claim.lost.is_set()
    await clock.advance(0.002)
    assert claim.lost.is_set()
    session.ttl_s = 30.0
    tries = len(session.patience_s)
    await clock.advance(3.0)
    assert len(session.patience_s) > tries  # it goes on trying: the session may live yet
    await renewal.stop()
    await renewal.stop()


async def test_more_claims_than_one_renewal_may_name_are_named_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "RENEW_MAX_CLAIMS", 2)
    clock = VirtualClock()
    session = Silence(clock)
    asked: list[list[str]] = []

    async def ask(held: tuple[wire.HeldClaim, ...], within_s: float) -> wire.RenewReply:
        asked.append([one.task for one in held])
        return wire.RenewReply(ttl_s=30.0, lost=held[1:], cancelled=(), unnamed=())

    session.ask_renewal = ask  # type: ignore[method-assign]
    claims = {}
    for task in "ABCDE":
        reply = wire.ClaimReply(task=task, fence=1, attempt=1, ttl_s=30, spec=wire.TaskSpec(id=task))
        claims[task] = session.claims[task] = Claim(session, reply)  # type: ignore[arg-type]
    renewal = Renewal(session, clock, "me")  # type: ignore[arg-type]
    renewal.begin(clock.monotonic(), 30.0)
    while not asked:
        await clock.advance(1.0)
    await renewal.stop()
    assert asked == [["A", "B"], ["C", "D"], ["E"]]
    assert {task for task, claim in claims.items() if claim.lost.is_set()} == {"B", "D"}


# -- claims whose answer was lost --------------------------------------------------------------------------------------------


async def lose_a_claim(world: World, line: Tap, c: Any, task: str) -> None:
    """The task is granted, and the client never hears of it."""
    line.lose["claim"] = 99
    with pytest.raises(errors.Unavailable):
        await c.claim(task)
    line.lose.clear()
    assert await state(world, task) == "claimed"
    assert c.claims == {}


async def test_a_claim_whose_answer_was_lost_is_given_back(world: World) -> None:
    await world.daemon()
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line, ttl_s=2, timeout_s=0.2) as c:
        await lose_a_claim(world, line, c, "T")
        found = await until_state(world, "T", "pending")
    assert found["history"][-1]["note"] == "the answer to its claim was lost"
    assert found["attempt"] == 0


async def test_it_is_given_back_by_a_worker_that_waits_for_its_next_task_too(world: World) -> None:
    """Such a worker always has a request under way; only one from before could still be the answer."""
    await world.daemon()
    await submitted(world, {"id": "T", "needs": ["gpu"]})
    line = tap(world)
    async with client(world, over=line, ttl_s=2, timeout_s=0.2, capabilities=["gpu"]) as c:
        await lose_a_claim(world, line, c, "T")
        async with asyncio.timeout(15):
            assert (await anext(c.tasks(wait_s=1))).task == "T"  # given back, it is the next task
    assert "released" in events_of(await world.ask("get", "op", task="T"))


async def test_a_claim_under_way_is_not_given_back(world: World) -> None:
    """The grant is committed and its answer still on its way when a renewal sees it, however often."""
    await world.daemon()
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line, ttl_s=2, timeout_s=0.2) as c:
        await c.hello()
        c.claiming["a request that is slow"] = ""
        await lose_a_claim(world, line, c, "T")
        await line.until_sent("renew", 4)
        assert await state(world, "T") == "claimed"
        del c.claiming["a request that is slow"]
        await until_state(world, "T", "pending")


async def test_what_is_asked_for_by_name_again_is_not_given_back_meanwhile() -> None:
    """Claiming what one holds answers with the fence that one has: the answer is to be worth something."""
    session = Silence(VirtualClock())
    renewal = Renewal(session, session.clock, "me")  # type: ignore[arg-type]
    renewal.begin(0.0, 30.0)
    seen = {("T", 7)}
    await renewal._give_back(set(seen))
    assert session.released == []  # seen once: it may have ended meanwhile
    session.claiming["again"] = "T"
    await renewal._give_back(set(seen))
    assert session.released == []
    session.claiming["again"] = "U"
    await renewal._give_back(set(seen))
    assert session.released == [("T", 7)]
    await renewal.stop()


@pytest.mark.parametrize("verb", ["complete", "fail"])
async def test_a_claim_that_could_not_be_ended_is_not_kept_with_nobody_at_work(world: World, verb: str) -> None:
    await world.daemon()
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line, ttl_s=2, timeout_s=0.2) as c:
        claim = await c.claim("T")
        line.silent = lambda sent: sent == verb

        async def work() -> None:
            async with claim:
                if verb == "fail":
                    raise KeyError("x")

        with pytest.raises(errors.Unavailable if verb == "complete" else KeyError):
            await work()
        assert claim.lost.is_set()
        found = await until_state(world, "T", "pending")
    assert found["history"][-1]["note"] == "the answer to its claim was lost"


async def test_a_lost_claim_lets_a_cancellation_from_outside_through(world: World) -> None:
    """Who cancels the work and loses the claim at once must not see ClaimLost in place of its cancellation."""
    await world.daemon()
    await submitted(world, "T")
    async with client(world, ttl_s=600) as c:
        claim = await c.claim("T")
        inside = asyncio.Event()

        async def work() -> None:
            async with claim:
                inside.set()
                await FOREVER().wait()

        working = asyncio.create_task(work())
        await inside.wait()
        claim.set_lost("for the test")
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


async def test_many_hellos_at_once_after_a_loss_all_register_the_session(world: World) -> None:
    """One of them creates the session's key in the very transaction in which another reads that it is gone."""
    await world.daemon()
    for _ in range(10):
        await world.ask("hello", "me", ttl_s=60)
        await end_session(world, "me")
        answers = await asyncio.gather(*(world.ask("hello", "me", ttl_s=60) for _ in range(20)))
        assert [answer["session"] for answer in answers] == ["me"] * 20


async def test_what_is_read_as_gone_may_have_been_made_anew_at_the_same_revision(world: World) -> None:
    """A batch is one transaction: what it reads first and writes afterwards has one revision."""
    daemon = await world.daemon()
    await world.ask("hello", "me", ttl_s=60)
    board, desk = daemon.actor.board, daemon.actor._office.desk  # type: ignore[attr-defined]
    seat = board.sessions["me"]
    at = seat.mod_revision + 5
    desk._learn((Get(records.session_key("me")),), Outcome(False, at, (Got((), 0),)), None, None)
    assert "me" not in board.sessions
    board.seat("me", seat)
    assert "me" not in board.sessions, "old news"
    board.seat("me", seat._replace(mod_revision=at))
    assert "me" in board.sessions


async def test_a_hello_that_is_overtaken_while_it_gets_a_lease_knows_the_lease_that_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await world.daemon()
    await submitted(world, "T")
    asked, go_on = asyncio.Event(), asyncio.Event()
    grant = daemon.store.grant

    async def slow_once(ttl_s: int) -> int:
        if not asked.is_set():
            asked.set()
            await go_on.wait()
        return await grant(ttl_s)

    await world.ask("hello", "warm", request_id="so-that-receipts-have-their-lease")
    board = daemon.actor.board  # type: ignore[attr-defined]
    seat, seated = board.seat, []

    def spy(session: str, found: Seat) -> None:
        seated.append((session, found.lease))
        seat(session, found)

    monkeypatch.setattr(board, "seat", spy)
    monkeypatch.setattr(daemon.store, "grant", slow_once)
    slow = asyncio.create_task(world.ask("hello", "me"))
    async with asyncio.timeout(10):
        await asked.wait()
    await world.ask("hello", "me")
    go_on.set()
    assert (await slow)["session"] == "me"
    kv = await (await world.store()).get(records.session_key("me"))
    assert {lease for session, lease in seated if session == "me"} == {kv.lease}
    assert (await world.ask("claim", "me", task="T"))["task"] == "T"
