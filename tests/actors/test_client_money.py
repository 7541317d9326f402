"""Money and breakers as an agent's program meets them: blocks that end however they end, lost replies, refusals."""

# ruff: noqa: PT012  the blocks are what is tested

from __future__ import annotations

import asyncio
import email.utils
import io
import urllib.error
from collections.abc import AsyncIterator
from decimal import Decimal
from email.message import Message
from typing import Any

import httpx
import pytest

from ifabric import errors, micro_usd
from ifabric.blocking import SyncClient
from ifabric.breaking import judge
from ifabric.client import Client
from ifabric.errors import BreakerOpen, BudgetShort, ClaimLost, Conflict, Unavailable
from ifabric.spending import Hold, step_id
from ifabric.testing.clock import VirtualClock
from ifabric.wire.envelope import Usage

from .conftest import World
from .sdk import client, submitted, tap, until_state

#: breakers that open after three failures, and quickly try again
QUICK = {"failure_threshold": 3, "minimum_calls": 1, "reset_timeout": 0.2, "half_open_probes": 1}


async def spent(c: Client) -> tuple[int, int]:
    """What the session's own account has spent, and holds."""
    line = (await c.balance()).path[-1]
    return line.spent, line.held


@pytest.fixture
async def governed(world: World) -> World:
    """A cluster with one daemon that governs."""
    await world.daemon(governor={"circuit_breaker": QUICK})
    return world


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that have little time to say how they ended."""
    for module in ("claims", "spending", "breaking"):
        monkeypatch.setattr(f"ifabric.{module}.LEAVE_S", 0.2)


async def cancelled_inside(block: Any, act: Any = None) -> asyncio.CancelledError:
    """Enters the block, does what `act` says, is cancelled there, and gives what came out."""
    inside = asyncio.Event()
    came: list[asyncio.CancelledError] = []

    async def work() -> None:
        try:
            async with block as entered:
                if act is not None:
                    act(entered)
                inside.set()
                await asyncio.Event().wait()
        except asyncio.CancelledError as cancelled:
            came.append(cancelled)
            raise

    working = asyncio.create_task(work())
    async with asyncio.timeout(5):
        await inside.wait()
        working.cancel()
        await asyncio.wait((working,))
    assert working.cancelled()
    return came[0]


# -- amounts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usd", "amount"),
    [("0.25", 250_000), ("100", 100_000_000), ("0.000001", 1), ("0", 0), ("9007199254.740991", 2**53 - 1),
     (Decimal("1.5"), 1_500_000), (Decimal("1E+2"), 100_000_000), (Decimal("2.5000000000"), 2_500_000)],
)  # fmt: skip
def test_dollars_become_whole_micro_usd_exactly(usd: str | Decimal, amount: int) -> None:
    assert micro_usd(usd) == amount


@pytest.mark.parametrize(
    "usd",
    ["", "0.0000001", "-1", "+1", "1e3", "nan", "inf", " 1", "1\n", "1_000", "1,5", "$1", ".5", "5.", "٣", "99999999999",
     "9007199254.740992", Decimal("0.0000001"), Decimal(-1), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"),
     Decimal("1E+400000"), Decimal("1E-400000"), Decimal("9007199254.740992")],
)  # fmt: skip
def test_what_is_no_exact_amount_is_refused(usd: str | Decimal) -> None:
    with pytest.raises(ValueError):
        micro_usd(usd)


@pytest.mark.parametrize("amount", [0.25, 1.0, True, None, 3, float("nan")])
def test_dollars_are_text_or_decimal_and_the_refusal_says_what_to_write(amount: Any) -> None:
    with pytest.raises(TypeError, match="micro_usd\\('"):
        micro_usd(amount)


async def test_an_amount_that_is_not_a_whole_number_never_leaves_the_process(world: World) -> None:
    await world.daemon(governor={})
    await submitted(world, "T")
    line = tap(world)
    async with client(world, over=line) as c:
        claim = await c.claim("T")
        seen = len(line.sent)
        for bad in (0.25, 1.0, True, "1", Decimal(1), float("nan")):
            amount: Any = bad
            with pytest.raises(TypeError, match=r"whole micro-USD, an int, and not .*micro_usd\('0.25'\)"):
                await c.spend(amount)
            with pytest.raises(TypeError):
                c.hold(amount)
            with pytest.raises(TypeError):
                claim.hold(amount, step="s")
            with pytest.raises(TypeError):
                claim.cost_micro_usd = amount
            with pytest.raises(TypeError):
                claim.hold(1).cost_micro_usd = amount
            with pytest.raises(TypeError):
                await claim.complete(cost_micro_usd=amount)
            with pytest.raises(TypeError):
                await c.complete("T", 1, cost_micro_usd=amount)
            with pytest.raises(TypeError):
                await c.next(hold_micro_usd=amount)
            with pytest.raises(TypeError):
                await c.set_account("acme", amount)
        for far in (-1, 2**53):
            with pytest.raises(ValueError, match="from 0 to"):
                await c.spend(far)
        assert line.sent[seen:] == []


# -- a hold as a block ------------------------------------------------------------------------------------------------------


async def test_a_hold_is_charged_with_what_it_cost_and_freed_when_it_cost_nothing(governed: World) -> None:
    async with client(governed) as c:
        async with c.hold(500) as hold:
            assert await spent(c) == (0, 500)
            assert "held" in repr(hold)
            hold.cost_micro_usd = 300
            hold.usage = Usage(tokens_in=7, purpose="coordination")
        assert await spent(c) == (300, 0)
        assert hold.ended and hold.charged is not None and hold.charged.charged == 300
        async with c.hold(500) as hold:
            pass
        assert await spent(c) == (300, 0)
        async with c.hold(500) as hold:
            reply = await hold.commit(700)  # over what was held, and told once
            hold.cost_micro_usd = 1
        assert (reply.charged, reply.overdraft) == (700, 0)
        async with c.hold(500) as hold:
            hold.cost_micro_usd = 9
            assert (await hold.void()).released == 500
        assert await spent(c) == (1000, 0)
        with pytest.raises(RuntimeError, match="make another"):
            await hold.__aenter__()


async def test_what_was_spent_is_charged_also_when_the_block_raises_or_is_cancelled(governed: World) -> None:
    def cost(hold: Hold) -> None:
        hold.cost_micro_usd = 100

    async with client(governed) as c:
        with pytest.raises(ZeroDivisionError):
            async with c.hold(500) as hold:
                cost(hold)
                1 / 0  # noqa: B018
        assert await spent(c) == (100, 0)
        with pytest.raises(ZeroDivisionError):
            async with c.hold(500):
                1 / 0  # noqa: B018
        assert await spent(c) == (100, 0)
        await cancelled_inside(c.hold(500), cost)
        assert await spent(c) == (200, 0)
        await cancelled_inside(c.hold(500))
        assert await spent(c) == (200, 0)


async def test_an_ending_is_told_to_its_end_however_often_the_block_is_cancelled(governed: World) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        inside = asyncio.Event()

        async def work() -> None:
            async with c.hold(500) as hold:
                hold.cost_micro_usd = 100
                inside.set()
                await asyncio.Event().wait()

        working = asyncio.create_task(work())
        await inside.wait()
        line.lose["commit"] = 1
        working.cancel()
        async with asyncio.timeout(5):
            while not line.bodies("commit"):
                await asyncio.sleep(0)
        working.cancel()
        await asyncio.sleep(0)
        working.cancel()
        await asyncio.wait((working,))
        assert working.cancelled()
        assert await spent(c) == (100, 0)
        assert len({body["request_id"] for body in line.bodies("commit")}) == 1 < len(line.bodies("commit"))


async def test_an_ending_that_cannot_be_told_is_said_and_takes_little_time(governed: World, hasty: None) -> None:
    line = tap(governed)

    def cost(hold: Hold) -> None:
        hold.cost_micro_usd = 100

    async with client(governed, over=line, timeout_s=0.4) as c:
        await c.hello()
        line.silent = lambda verb: verb in ("commit", "void")
        with pytest.raises(ZeroDivisionError) as caught:
            async with c.hold(500, name="h-1") as hold:
                cost(hold)
                1 / 0  # noqa: B018
        assert "the hold h-1 could not be charged with 100 micro-USD" in caught.value.__notes__[0] == hold.unsent
        assert not hold.ended and "unsent" in repr(hold)
        came = await cancelled_inside(c.hold(500, name="h-2"))
        assert "the hold h-2 could not be freed" in came.__notes__[0]
        with pytest.raises(Unavailable) as unsent:  # a block that went well must not look as if it were paid
            async with c.hold(500, name="h-3") as hold:
                cost(hold)
        assert "h-3" in unsent.value.__notes__[0]
        async with c.hold(500, name="h-4") as hold:
            pass
        assert "h-4" in hold.unsent
        line.silent = lambda _: False
        assert await spent(c) == (0, 2000)  # they end with their owner; a cost is told again by its name
        assert (await hold.commit(5)).charged == 5


async def test_no_block_hangs_on_its_way_out_however_patient_its_client_is(governed: World, hasty: None) -> None:
    await submitted(governed, "T", "U")
    line = tap(governed)

    def cost(paid: Any) -> None:
        paid.cost_micro_usd = 100

    async with client(governed, over=line, timeout_s=3600) as c:
        claims = [await c.claim("T", hold_micro_usd=500), await c.claim("U")]
        line.silent = lambda verb: verb not in ("reserve", "admit", "renew")
        async with asyncio.timeout(20):
            for block in (c.hold(500), claims[0], claims[1]):
                came = await cancelled_inside(block, cost)
                assert came.__notes__[0].endswith(": no answer in time")
            for block in (c.hold(500), c.breaker("p/x")):
                await cancelled_inside(block)
            with pytest.raises(ZeroDivisionError):
                async with c.breaker("p/x"), c.hold(500):
                    1 / 0  # noqa: B018
        c.leave_on_exit = False
        line.silent = lambda _: False


async def test_a_hold_that_is_cancelled_while_it_is_asked_for_is_freed(governed: World) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        await c.hello()
        line.lose["reserve"] = 1_000

        async def enter() -> None:
            async with c.hold(500):
                raise AssertionError("it was never told that it has it")

        entering = asyncio.create_task(enter())
        async with asyncio.timeout(5):
            while line.lose["reserve"] == 1_000:
                await asyncio.sleep(0.01)
        assert await spent(c) == (0, 500)
        entering.cancel()
        await asyncio.wait((entering,))
        assert entering.cancelled()
        assert await spent(c) == (0, 0)


async def test_lost_replies_charge_once(governed: World) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        await c.hello()
        line.lose = {"reserve": 1, "commit": 1, "spend": 2, "void": 1}
        async with c.hold(500) as hold:
            hold.cost_micro_usd = 100
        async with c.hold(500):
            pass
        assert (await c.spend(50)).charged == 50
        assert await spent(c) == (150, 0)
        assert len(line.bodies("spend")) == 3
        assert len({body["request_id"] for body in line.bodies("spend")}) == 1
        await c.spend(7, entry="once")
        await c.spend(7, entry="once")
        assert await spent(c) == (157, 0)
        with pytest.raises(Conflict):
            await c.spend(8, entry="once")


async def test_a_session_greets_and_comes_back_by_itself_to_spend(governed: World) -> None:
    async with client(governed) as c:
        assert (await c.spend(5)).path[-1].account == "@me"  # nobody has said hello
        await governed.ask("bye", "me")
        async with c.hold(5) as hold:
            hold.cost_micro_usd = 5
        assert await spent(c) == (10, 0)


# -- steps ------------------------------------------------------------------------------------------------------------------


async def test_a_step_that_is_done_again_is_charged_once(governed: World) -> None:
    """Also by the next life of the process, which has the claim from the fabric and remembers nothing."""
    await submitted(governed, "T", "U")

    async def step(c: Client, task: str, name: str) -> Hold:
        claim = await c.claim(task)
        async with claim.hold(500, step=name) as hold:
            hold.cost_micro_usd = 100
        return hold

    first = client(governed)
    first.leave_on_exit = False
    async with first as c:
        hold = await step(c, "T", "draft")
        assert hold.charged_before is None
        assert hold.name == step_id("T", c.claims["T"].fence, "draft")
    async with client(governed) as c:
        hold = await step(c, "T", "draft")
        assert hold.charged_before == 100
        assert await spent(c) == (100, 0)
        await step(c, "T", "revise")
        await step(c, "U", "draft")
        assert await spent(c) == (300, 0)
        async with c.claims["T"].hold(500, step="draft") as hold:
            pass  # it sees that it is paid, and leaves
        assert not hold.unsent
        with pytest.raises(Conflict):
            async with c.claims["T"].hold(500, step="draft") as hold:
                hold.cost_micro_usd = 101
        assert await spent(c) == (300, 0)


async def test_a_step_that_was_freed_is_held_anew(governed: World) -> None:
    await submitted(governed, "T")
    async with client(governed) as c:
        claim = await c.claim("T")
        for number in range(3):
            with pytest.raises(ZeroDivisionError):
                async with claim.hold(500 + number, step="draft"):  # also with another estimate
                    assert await spent(c) == (0, 500 + number)
                    1 / 0  # noqa: B018
        async with claim.hold(500, step="draft") as hold:
            assert await spent(c) == (0, 500)
            hold.cost_micro_usd = 100
        async with claim.hold(500, step="draft") as hold:
            assert hold.charged_before == 100
        assert await spent(c) == (100, 0)
        with pytest.raises(TypeError, match="not by both"):
            claim.hold(1, step="a", name="b")


def test_the_name_of_a_step_is_made_of_task_fence_and_step_and_fits_the_wire() -> None:
    names = {
        step_id(task, fence, step) for task in ("T", "T1") for fence in (1, 11) for step in ("", "1", "a b/\x00é" * 99)
    }
    assert len(names) == 12
    assert all(len(name) == 32 and name.replace("-", "a").replace("_", "a").isalnum() for name in names)


# -- a claim's money --------------------------------------------------------------------------------------------------------


async def test_a_claim_takes_its_hold_and_tells_its_cost_however_it_ends(governed: World) -> None:
    await submitted(governed, "done", "named", "fails", "left", "released", "plain")
    async with client(governed) as c:
        async with await c.claim("done", hold_micro_usd=500) as claim:
            assert claim.hold_id
            assert await spent(c) == (0, 500)
            claim.cost_micro_usd += 10
            claim.cost_micro_usd += 1
        assert await spent(c) == (11, 0)
        async with await c.claim("named", hold_micro_usd=500) as claim:
            claim.cost_micro_usd += 1000
            assert (await claim.complete(cost_micro_usd=9)).charged == 9
        assert await spent(c) == (20, 0)
        with pytest.raises(ZeroDivisionError):
            async with await c.claim("fails", hold_micro_usd=500) as claim:
                claim.cost_micro_usd = 30
                1 / 0  # noqa: B018
        assert await spent(c) == (50, 0)

        def cost(claim: Any) -> None:
            claim.cost_micro_usd = 100

        await cancelled_inside(await c.claim("left", hold_micro_usd=500), cost)
        assert (await governed.ask("get", "op", task="left"))["state"] == "pending"
        assert await spent(c) == (150, 0)
        claim = await c.claim("released")
        claim.cost_micro_usd = 7  # without a hold
        await claim.release("not mine")
        assert await spent(c) == (157, 0)
        async with await c.claim("plain") as claim:
            assert claim.hold_id is None
        assert await spent(c) == (157, 0)


async def test_what_a_lost_claim_has_cost_is_charged_late(governed: World) -> None:
    """The hold has ended with the claim; the money was spent all the same."""
    await submitted(governed, "T", "U")
    async with client(governed, ttl_s=2) as c, c.subscribe("budget") as events:
        with pytest.raises(ClaimLost):
            async with await c.claim("T", hold_micro_usd=500) as claim:
                claim.cost_micro_usd = 100
                await governed.ask("cancel", "op", admin=True, task="T")
                await asyncio.Event().wait()
        assert await spent(c) == (100, 0)
        with pytest.raises(ClaimLost):
            async with await c.claim("U", hold_micro_usd=500) as claim:
                await governed.ask("cancel", "op", admin=True, task="U")
                await claim.complete(cost_micro_usd=50)
        assert await spent(c) == (150, 0)
        assert not claim.unsent
        late: dict[int, int] = {}  # by revision: an event may be told twice
        async with asyncio.timeout(10):
            async for event in events:
                if event.event == "commit" and event.late and event.task in ("T", "U"):
                    late[event.revision] = event.charged
                if sorted(late.values()) == [50, 100]:
                    break


async def test_a_cost_whose_answer_was_lost_is_not_charged_again_on_the_way_out(governed: World, hasty: None) -> None:
    """The completion was carried out, and nobody heard of it; then the block fails the claim, which is over."""
    await submitted(governed, "T", "U")
    line = tap(governed)
    async with client(governed, over=line, timeout_s=0.3) as c:
        for task, held in (("T", 500), ("U", None)):
            line.lose["complete"] = 1_000
            claim = await c.claim(task, hold_micro_usd=held)
            with pytest.raises(Unavailable):
                async with claim:
                    await claim.complete(cost_micro_usd=100)
            assert not claim.unsent
        assert await spent(c) == (200, 0)


async def test_a_charge_whose_answer_was_lost_is_tried_again_and_charged_once(governed: World, hasty: None) -> None:
    await submitted(governed, "T")
    line = tap(governed)
    async with client(governed, over=line) as c:
        async with await c.claim("T") as claim:
            claim.cost_micro_usd = 100
            line.lose["spend"] = 1_000
            await claim.release()
            assert claim.unsent and await spent(c) == (100, 0)
            line.lose["spend"] = 0
        assert not claim.unsent
        assert await spent(c) == (100, 0)


async def _first(events: AsyncIterator[Any], count: int, wanted: Any) -> AsyncIterator[Any]:
    async for event in events:
        if wanted(event):
            yield event
            count -= 1
            if not count:
                return


async def test_a_cost_that_cannot_be_told_is_said(governed: World, hasty: None) -> None:
    await submitted(governed, "T", "U")
    line = tap(governed)
    async with client(governed, over=line, timeout_s=0.3) as c:
        claim = await c.claim("T", hold_micro_usd=500)
        other = await c.claim("U")
        line.silent = lambda verb: verb in ("commit", "fail", "release", "spend")
        with pytest.raises(ZeroDivisionError) as caught:
            async with claim:
                claim.cost_micro_usd = 100
                1 / 0  # noqa: B018
        assert "T has cost 100 micro-USD could not be told" in caught.value.__notes__[0] == claim.unsent

        def cost(claim: Any) -> None:
            claim.cost_micro_usd = 100

        came = await cancelled_inside(other, cost)
        assert "U has cost 100 micro-USD" in came.__notes__[0]
        line.silent = lambda _: False


async def test_a_short_budget_is_an_answer_and_not_tried_again(governed: World) -> None:
    await submitted(governed, "T")
    line = tap(governed)
    async with client(governed, over=line, account="acme") as c:
        await c.set_account("acme", 100)
        with pytest.raises(BudgetShort) as short:
            await c.claim("T", hold_micro_usd=101)
        assert (short.value.facts["account"], short.value.facts["have"], short.value.facts["need"]) == (
            "acme",
            100,
            101,
        )
        with pytest.raises(BudgetShort):
            async with c.hold(101):
                raise AssertionError("nothing was held")
        with pytest.raises(BudgetShort):
            await c.spend(101)
        with pytest.raises(BudgetShort):
            async for _ in c.tasks(hold_micro_usd=101):
                raise AssertionError("a task without its money")

        async def handle(claim: Any) -> None:
            raise AssertionError("a task without its money")

        with pytest.raises(BaseExceptionGroup) as group:
            await c.work(handle, hold_micro_usd=101)
        assert isinstance(group.value.exceptions[0], BudgetShort)
        assert [len(line.bodies(verb)) for verb in ("claim", "reserve", "spend", "next")] == [1, 1, 1, 2]
        assert (await governed.ask("get", "op", task="T"))["state"] == "pending"
        async for claim in c.tasks(hold_micro_usd=100, until_empty=True):
            async with claim:
                claim.cost_micro_usd = 100
        assert (await c.balance("acme")).path[-1].available == 0


async def test_balances_and_limits_are_seen_from_above_and_below(governed: World) -> None:
    async with client(governed, account="acme/research") as c:
        assert (await c.set_account("acme", 1_000, window="day")).path[-1].window == "day"
        await c.spend(10, account="acme/research/@me/drafts")
        own = await c.balance()
        assert [line.account for line in own.path] == ["acme", "acme/research", "acme/research/@me"]
        assert [line.spent for line in own.path] == [10, 10, 10]
        assert {line.account for line in (await c.balance("acme", tree=True)).below} >= {"acme/research/@me/drafts"}
        async with c.hold(5, ttl_s=60):
            (held,) = (await c.balance("acme")).holds
            assert (held.session, held.amount) == ("me", 5)
        await c.set_account("acme", None)
        assert (await c.balance("acme")).path[-1].limit is None
        with pytest.raises(errors.UnknownAccount):
            await c.balance("nobody")
        with pytest.raises(errors.Forbidden):
            await c.spend(1, account="acme")


# -- breakers ---------------------------------------------------------------------------------------------------------------


async def test_a_breaker_opens_on_failures_waits_and_closes_on_a_probe(governed: World) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        async with c.breaker("p/x") as block:
            assert block.permit is not None and block.permit.state == "closed"
        assert block.permit is None
        for _ in range(3):
            with pytest.raises(ConnectionResetError):
                async with c.breaker("p/x"):
                    raise ConnectionResetError
        seen = len(line.bodies("admit"))
        with pytest.raises(BreakerOpen) as refused:
            async with c.breaker("p/x"):
                raise AssertionError("nothing is admitted")
        assert 0 < refused.value.facts["probe_in_s"] <= 0.2
        assert len(line.bodies("admit")) == seen + 1
        with pytest.raises(BreakerOpen):
            async with c.breaker("p/x", wait_s=0.001):
                raise AssertionError("nothing is admitted")
        async with c.breaker("p/x", wait_s=5) as block:
            assert block.permit is not None and block.permit.state == "half_open"
        assert {line.state for line in await c.breakers()} <= {"closed"}
        outcomes = [body["outcome"] for body in line.bodies("report")]
        assert outcomes == ["success", "failure", "failure", "failure", "success"]
        assert all(body["latency_s"] >= 0 for body in line.bodies("report"))


async def test_who_waits_while_another_probes_hears_of_it_long_before_the_probe_would_time_out(governed: World) -> None:
    async with client(governed, "one") as one, client(governed, "two") as two:
        for _ in range(3):
            async with one.breaker("p/x") as block:
                block.failure()
        async with one.breaker("p/x", wait_s=5) as probe:
            assert probe.permit is not None and probe.permit.state == "half_open"
            with pytest.raises(BreakerOpen) as refused:
                async with two.breaker("p/x"):
                    raise AssertionError("the one probe is out")
            assert refused.value.facts["probe_in_s"] > 20
            waiting = asyncio.create_task(two.breaker("p/x", wait_s=10).__aenter__())
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            block = await waiting
        assert block.permit is not None and block.permit.state == "closed"
        await block.__aexit__(None, None, None)


async def test_one_that_an_operator_holds_open_is_not_waited_for(governed: World) -> None:
    async with client(governed) as c:
        assert await c.set_breaker("p/x", "open", why="the invoice") == "open"
        with pytest.raises(BreakerOpen) as refused:
            async with asyncio.timeout(5), c.breaker("p/x", wait_s=60):
                raise AssertionError("nothing is admitted")
        assert refused.value.facts.get("probe_in_s") is None
        assert await c.set_breaker("p/x", "closed") == "closed"
        async with c.breaker("p/x"):
            pass


async def test_our_own_mistakes_and_refusals_do_not_trip_it(governed: World) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        await c.hello()
        for error in (
            ValueError("x"),
            KeyError("x"),
            BudgetShort(),
            RuntimeError("?"),
            Unavailable(),
            *[TypeError()] * 5,
        ):
            with pytest.raises(type(error)):
                async with c.breaker("p/x"):
                    raise error
        await cancelled_inside(c.breaker("p/x"))
        assert {body["outcome"] for body in line.bodies("report")} == {"ignored"}
        assert len(line.bodies("report")) == 11
        async with c.breaker("p/x"):
            pass


async def test_the_caller_may_know_better(governed: World) -> None:
    line = tap(governed)

    def said() -> tuple[str, float | None]:
        body = line.bodies("report")[-1]
        return body["outcome"], body.get("retry_after_s")

    async with client(governed, over=line) as c:
        async with c.breaker("p/x") as block:
            block.failure(retry_after_s=0.01)
        assert said() == ("failure", 0.01)
        with pytest.raises(OSError):
            async with c.breaker("p/x") as block:
                block.success()
                raise OSError
        assert said() == ("success", None)
        async with c.breaker("p/x") as block:
            block.ignored()
        assert said() == ("ignored", None)
        for classify, verdict in ((lambda _: "failure", "failure"), (lambda _: None, "ignored")):
            with pytest.raises(ValueError):
                async with c.breaker("p/y", classify=classify):
                    raise ValueError
            assert said()[0] == verdict

        def broken(_: BaseException) -> Any:
            raise LookupError("a bug")

        with pytest.raises(ValueError) as caught:
            async with c.breaker("p/y", classify=broken):
                raise ValueError
        assert caught.value.__notes__ == ["classify failed on this exception: LookupError: a bug"]
        assert said()[0] == "ignored"


async def test_around_a_function_each_call_goes_through(governed: World) -> None:
    async with client(governed) as c:

        @c.breaker("p/x")
        async def ask(question: str, *, loud: bool = False) -> str:
            """Asks."""
            if question == "?":
                raise TimeoutError
            return question.upper() if loud else question

        assert await ask("a", loud=True) == "A"
        assert (ask.__name__, ask.__doc__) == ("ask", "Asks.")
        assert await asyncio.gather(*(ask(str(n)) for n in range(5))) == [str(n) for n in range(5)]
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await ask("?")
        with pytest.raises(BreakerOpen):
            await ask("a")


async def test_a_report_that_is_not_taken_hides_nothing_and_takes_little_time(governed: World, hasty: None) -> None:
    line = tap(governed)
    async with client(governed, over=line) as c:
        line.silent = lambda verb: verb == "report"
        with pytest.raises(ZeroDivisionError) as caught:
            async with c.breaker("p/x"):
                1 / 0  # noqa: B018
        assert "the report to the breaker p/x was not taken" in caught.value.__notes__[0]
        await cancelled_inside(c.breaker("p/x"))
        async with c.breaker("p/x") as block:
            pass
        assert "p/x" in block.unsent
        with pytest.raises(RuntimeError, match="entered already"):
            async with block, block:
                pass
        line.silent = lambda _: False
        async with c.breaker("p/x") as block:
            assert block.permit is not None
            block.permit = type(block.permit)(permit="forged", state="closed")
        assert "permit" in block.unsent


# -- whose fault it was -----------------------------------------------------------------------------------------------------


def answered(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://provider.test/")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, headers=named, request=request))


def urllib_error(status: int, retry_after: str | None = None) -> urllib.error.HTTPError:
    headers = Message()
    if retry_after is not None:
        headers["Retry-After"] = retry_after
    return urllib.error.HTTPError("http://provider.test/", status, "no", headers, io.BytesIO())


class APIStatusError(Exception):
    """As OpenAI's and Anthropic's clients raise it."""

    def __init__(self, status_code: int, headers: Any = None) -> None:
        self.status_code = status_code
        self.response = type("Response", (), {"status_code": status_code, "headers": headers or {}})()


class APIConnectionError(Exception):
    """The same; it has no status."""


class ClientResponseError(Exception):
    """As aiohttp raises it."""

    def __init__(self, status: int, headers: Any) -> None:
        self.status, self.headers = status, headers


class ServerDisconnectedError(type("ClientConnectionError", (Exception,), {})):  # type: ignore[misc]
    """aiohttp's, which is no OSError."""


def caused(cause: BaseException) -> RuntimeError:
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


LOOP = RuntimeError("a circle")
LOOP.__cause__ = LOOP


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, "success"),
        *((answered(status), "failure") for status in (500, 502, 503, 529, 429, 408)),
        *((answered(status), "ignored") for status in (301, 400, 401, 403, 404, 409, 413, 422, 499)),
        (urllib_error(503), "failure"),
        (urllib_error(404), "ignored"),  # it is an OSError too
        (urllib.error.URLError(ConnectionRefusedError()), "failure"),
        (APIStatusError(529), "failure"),
        (APIStatusError(400), "ignored"),
        (ClientResponseError(500, {}), "failure"),
        (APIConnectionError(), "failure"),
        (ServerDisconnectedError(), "failure"),
        (httpx.ConnectError("no"), "failure"),
        (httpx.ReadTimeout("no"), "failure"),
        (httpx.RemoteProtocolError("no"), "failure"),
        (httpx.PoolTimeout("ours"), "ignored"),
        (httpx.UnsupportedProtocol("ours"), "ignored"),
        (httpx.InvalidURL("ours"), "ignored"),
        (TimeoutError(), "failure"),
        (ConnectionResetError(), "failure"),
        (OSError(101, "unreachable"), "failure"),
        (FileNotFoundError("prompt.txt"), "ignored"),
        (PermissionError("prompt.txt"), "ignored"),
        (ValueError(), "ignored"),
        (TypeError(), "ignored"),
        (KeyError(), "ignored"),
        (ZeroDivisionError(), "ignored"),
        (asyncio.CancelledError(), "ignored"),
        (KeyboardInterrupt(), "ignored"),
        (Unavailable(what="nats"), "ignored"),  # the fabric's trouble, whose status is 503
        (BudgetShort(), "ignored"),
        (caused(TimeoutError()), "failure"),
        (caused(ValueError()), "ignored"),
        (LOOP, "ignored"),
        (ExceptionGroup("two", [ValueError(), ExceptionGroup("one", [ConnectionError()])]), "failure"),
        (ExceptionGroup("one", [ValueError()]), "ignored"),
        (APIStatusError(True), "ignored"),
        (APIStatusError(99999), "ignored"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_whose_fault_it_was(error: BaseException | None, verdict: str) -> None:
    assert judge(error, VirtualClock()).verdict == verdict


def test_what_a_provider_asks_for_is_understood() -> None:
    clock = VirtualClock()
    soon = email.utils.formatdate(clock.wall_ms() / 1000 + 90, usegmt=True)
    past = email.utils.formatdate(clock.wall_ms() / 1000 - 90, usegmt=True)
    for error, asked in (
        (answered(429, retry_after="7"), 7.0),
        (answered(503, Retry_After="0.5"), 0.5),
        (urllib_error(429, "12"), 12.0),
        (APIStatusError(429, {"Retry-After": "3"}), 3.0),
        (ClientResponseError(503, {"retry-after": " 4 "}), 4.0),
        (answered(429, retry_after="999999999"), 86_400.0),
        (answered(429, retry_after=past), 0.0),
    ):
        assert judge(error, clock).retry_after_s == asked
    asked_s = judge(answered(429, retry_after=soon), clock).retry_after_s
    assert asked_s is not None and 88 < asked_s <= 90
    for said in ("", "soon", "-5", "nan", "inf", "1e9", "٣", "9" * 400, "Mon, 99 Foo 2026 00:00:00 GMT"):
        assert judge(APIStatusError(429, {"retry-after": said}), clock) == ("failure", None)
    assert judge(APIStatusError(429, 7), clock) == ("failure", None)
    assert judge(APIStatusError(429, {"retry-after": 7}), clock) == ("failure", None)
    assert judge(answered(404, retry_after="7"), clock).retry_after_s is None


# -- events, matching and code without await ------------------------------------------------------------------------------


async def test_events_are_heard_by_what_they_are_about(governed: World) -> None:
    async with client(governed) as c, c.subscribe("all") as every, c.subscribe("breaker") as breakers:
        await submitted(governed, "T")
        await c.spend(5, entry="heard-1")
        await c.set_breaker("p/heard", "open", why="a test")
        async with asyncio.timeout(10):
            opened = [event async for event in _first(breakers, 1, lambda event: event.breaker == "p/heard")]
            assert [(event.event, event.by, event.why) for event in opened] == [("opened", "me", "a test")]
            heard: set[str] = set()
            async for event in every:
                heard.add(f"{type(event).__name__} {event.event}")
                if {"TaskEvent submitted", "BudgetEvent commit", "BreakerEvent opened"} <= heard:
                    break
            last = await (await c.journal()).last()
            assert last is not None
            money = [event async for event in c.events("budget", after_seq=0, until_seq=last.seq)]
        assert [event.charged for event in money if (event.event, event.hold) == ("commit", "heard-1")] == [5]


async def test_noise_under_the_events_ends_no_subscriber(governed: World) -> None:
    async with client(governed) as c, c.subscribe("all") as every:
        for subject in ("budget.commit", "weather.rain", "task", "budget.commit.x"):
            await governed.bus.publish(f"if.v1.event.{subject}", b"\xff{")
        await governed.bus.publish("if.v1.event.weather.rain", b"{}")
        await submitted(governed, "noise-T")
        async with asyncio.timeout(10):
            heard = [event async for event in _first(every, 1, lambda event: getattr(event, "task", "") == "noise-T")]
            assert heard[0].event == "submitted"


async def test_who_suits_a_task_is_told_with_the_reasons(governed: World) -> None:
    async with client(governed, "able", capabilities=["rust"]) as able, client(governed, "unable") as unable:
        await able.hello()
        await unable.hello()
        async with asyncio.timeout(5):
            while (found := await able.match(["rust"])).sessions < 2:
                await asyncio.sleep(0.02)
        first, second = found.ranked
        assert (first.session, first.matches, second.session, second.missing) == ("able", True, "unable", ("rust",))
        assert [one.session for one in (await able.match(["rust"], sessions=["unable"])).ranked] == ["unable"]


async def test_money_and_breakers_without_await(governed: World) -> None:
    if not governed.real:
        return  # the twin's hub lives on one loop
    await submitted(governed, "T", "U", "V")

    def script() -> None:
        with SyncClient(governed._nats_url, session="plain", account="acme") as c:
            assert c.spend(5, entry="x").charged == 5
            with c.hold(500) as hold:
                hold.cost_micro_usd = 10
                hold.usage = Usage(tokens_out=1)
            assert hold.ended
            with c.claim("T", hold_micro_usd=50) as claim:
                with claim.hold(40, step="s") as hold:
                    hold.commit(3)
                claim.cost_micro_usd += 2
            with pytest.raises(KeyboardInterrupt), c.hold(500) as hold:
                hold.cost_micro_usd = 20
                raise KeyboardInterrupt
            with c.hold(1) as hold:
                assert hold.void().released == 1
            with pytest.raises(ValueError), c.next(hold_micro_usd=7) as claim:
                claim.cost_micro_usd += 100
                raise ValueError
            assert [one.task for one in c.tasks(until_empty=True, hold_micro_usd=1)]
            line = c.balance().path[-1]
            assert (line.account, line.spent) == ("acme/@plain", 140)
            for _ in range(3):
                with pytest.raises(OSError), c.breaker("p/sync"):
                    raise OSError
            with pytest.raises(BreakerOpen), c.breaker("p/sync"):
                raise AssertionError("nothing is admitted")
            with c.breaker("p/sync", wait_s=5) as block:
                block.success()
            assert not block.unsent

    async with asyncio.timeout(30):
        await asyncio.to_thread(script)
    assert (await until_state(governed, "T", "done"))["state"] == "done"
