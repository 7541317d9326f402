"""Money over daemons: holds, their ends, and the claims that carry them, over the twins and over real etcd and NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ifabric.errors import BudgetShort, ClaimLost, ClaimTaken, Conflict, FabricError, Forbidden, SessionLost
from ifabric.store.base import Delete, Put, Txn, prefix_end
from ifabric.wire import governor as wire
from ifabric.wire import subjects
from ifabric_actors.coordinator import records as board
from ifabric_actors.governor import holds, records
from ifabric_actors.governor.actor import Governor
from tests.actors.conftest import World

MILLION = 1_000_000


async def ask(world: World, verb: str, session: str, **body: Any) -> dict[str, Any]:
    return await world.ask(verb, session, component="governor", **body)


async def refusal(world: World, verb: str, session: str, **body: Any) -> FabricError:
    return await world.refusal(verb, session, component="governor", **body)


async def limit(world: World, account: str, micro_usd: int | None, **more: Any) -> dict[str, Any]:
    return await ask(world, "account", "op", admin=True, account=account, limit_micro_usd=micro_usd, **more)


async def eventually(true: Callable[[], Awaitable[Any]], within_s: float = 10.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (found := await true()):
            await asyncio.sleep(0.02)
    return found


async def line(world: World, account: str, session: str = "op") -> dict[str, Any]:
    found: dict[str, Any] = (await ask(world, "balance", session, account=account))["path"][-1]
    return found


async def sums(world: World, account: str) -> tuple[int, int]:
    """What was spent on an account, and is held."""
    found = await line(world, account)
    return found["spent"], found["held"]


async def freed(world: World, account: str, spent: int = 0) -> None:
    """Returns when nothing is held on an account any more."""

    async def is_freed() -> bool:
        return await sums(world, account) == (spent, 0)

    await eventually(is_freed)


def budget_event(data: bytes) -> list[wire.BudgetEvent]:
    """The event in a message; none in what other tests have put into the journal, which they share."""
    try:
        return [msgspec.json.decode(data, type=wire.BudgetEvent)]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []


async def stored_hold(world: World, session: str, name: str) -> Any:
    store = await world.store()
    return await store.get(records.hold_key(session, name))


async def claimed(world: World, task: str, session: str = "a", **body: Any) -> dict[str, Any]:
    """A session of `acme` with a claim of a task that is made for it."""
    await world.ask("hello", session, account="acme", **({"ttl_s": body.pop("ttl_s")} if "ttl_s" in body else {}))
    await world.ask("submit", session, tasks=[{"id": task, **body.pop("spec", {})}])
    return await world.ask("claim", session, task=task, **body)


# -- holding and ending ------------------------------------------------------------------------------------------------


async def test_a_hold_is_set_aside_on_the_whole_path_charged_and_freed(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme/research")
    held = await ask(world, "reserve", "a", hold="h", amount_micro_usd=3 * MILLION)
    assert [one["account"] for one in held["path"]] == ["acme", "acme/research", "acme/research/@a"]
    assert [one["held"] for one in held["path"]] == [3 * MILLION] * 3
    assert [one["limit"] for one in held["path"]] == [None, None, 40 * MILLION]
    assert 800 < held["expires_in_s"] <= 900
    done = await ask(world, "commit", "a", hold="h", amount_micro_usd=MILLION)
    assert (done["charged"], done["late"], done["overdraft"]) == (MILLION, False, 0)
    assert [(one["spent"], one["held"]) for one in done["path"]] == [(MILLION, 0)] * 3
    await ask(world, "reserve", "a", hold="i", amount_micro_usd=5)
    assert await ask(world, "void", "a", hold="i") == {"released": 5}
    assert await ask(world, "void", "a", hold="i") == {"released": 5}
    assert (await ask(world, "spend", "a", entry="e", amount_micro_usd=7))["charged"] == 7
    assert await sums(world, "acme") == (MILLION + 7, 0)


async def test_a_session_has_its_default_budget_and_not_a_micro_dollar_more(world: World) -> None:
    await world.daemon(governor={"budget": {"default_session_budget": "0.000010"}})
    await world.ask("hello", "a")
    await ask(world, "spend", "a", entry="e", amount_micro_usd=4)
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=6)
    short = await refusal(world, "spend", "a", entry="f", amount_micro_usd=1)
    assert isinstance(short, BudgetShort)
    assert short.facts == {"account": "@a", "have": 0, "need": 1, "held": 6, "spent": 4, "limit": 10}
    await limit(world, "@a", 11)
    await ask(world, "spend", "a", entry="f", amount_micro_usd=1)


async def test_a_retry_on_another_daemon_gets_the_first_answer_and_is_charged_once(world: World) -> None:
    await world.daemon(governor={})
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    body = {"hold": "h", "amount_micro_usd": 10, "request_id": "r"}
    first = await ask(world, "reserve", "a", **body)
    assert all(answer == first for answer in [await ask(world, "reserve", "a", **body) for _ in range(8)])
    charge = {"hold": "h", "amount_micro_usd": 8, "request_id": "c"}
    answers = await asyncio.gather(*(ask(world, "commit", "a", **charge) for _ in range(16)))
    assert all(answer == answers[0] for answer in answers)
    spend = {"entry": "e", "amount_micro_usd": 5}
    told = await asyncio.gather(*(ask(world, "spend", "a", **spend) for _ in range(16)))
    assert {answer["charged"] for answer in told} == {5}
    assert await sums(world, "acme") == (13, 0)


async def test_a_retry_gets_its_first_answer_even_when_it_would_be_refused_now(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a")
    await limit(world, "@a", 10)
    first = await ask(world, "reserve", "a", hold="h", amount_micro_usd=10, request_id="r")
    assert await ask(world, "reserve", "a", hold="h", amount_micro_usd=10, request_id="r") == first
    again = await ask(world, "reserve", "a", hold="h", amount_micro_usd=10)
    assert again["hold"] == "h"
    await world.ask("bye", "a")
    assert await ask(world, "reserve", "a", hold="h", amount_micro_usd=10, request_id="r") == first


async def test_a_name_is_used_once_whatever_for(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a")
    await world.ask("hello", "b")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=10, request_id="r")
    for verb, body in (
        ("reserve", {"hold": "h", "amount_micro_usd": 11}),
        ("reserve", {"hold": "h", "amount_micro_usd": 10, "ttl_s": 5}),
        ("spend", {"entry": "h", "amount_micro_usd": 10}),
        ("reserve", {"hold": "other", "amount_micro_usd": 10, "request_id": "r"}),
        ("commit", {"hold": "h", "amount_micro_usd": 10, "request_id": "r"}),
        ("void", {"hold": "h", "request_id": "r"}),
    ):
        assert isinstance(await refusal(world, verb, "a", **body), Conflict), (verb, body)
    await ask(world, "spend", "a", entry="e", amount_micro_usd=1)
    assert isinstance(await refusal(world, "commit", "a", hold="e", amount_micro_usd=2), Conflict)
    assert isinstance(await refusal(world, "void", "a", hold="e"), Conflict)
    assert (await refusal(world, "commit", "b", hold="h", amount_micro_usd=10)).code == "unknown_hold"
    await ask(world, "reserve", "b", hold="h", amount_micro_usd=3)
    assert await sums(world, "@a") == (1, 10)


async def test_two_hundred_spenders_on_two_daemons_stop_exactly_at_the_cap(world: World) -> None:
    await world.daemon(governor={})
    await world.daemon(governor={})
    await limit(world, "acme", 1_000)
    await asyncio.gather(*(world.ask("hello", f"s{n}", account="acme/team") for n in range(20)))

    async def spend(number: int) -> str:
        body = {"entry": f"e{number}", "hold": f"e{number}", "amount_micro_usd": 10, "request_id": f"r{number}"}
        try:
            await ask(world, ("spend", "reserve")[number % 2], f"s{number % 20}", timeout_s=20, **body)
        except BudgetShort:
            return "short"
        return "done"

    outcomes = await asyncio.gather(*(spend(number) for number in range(200)))
    assert outcomes.count("done") == 100
    found = await line(world, "acme")
    assert (found["spent"] + found["held"], found["available"], found.get("overdraft")) == (1_000, 0, None)


async def test_a_refusal_names_the_account_that_is_short_and_leaves_the_others_alone(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme/team")
    await limit(world, "acme/team", 5, window="day")
    short = await refusal(world, "reserve", "a", hold="h", amount_micro_usd=6)
    assert (short.facts["account"], short.facts["have"], short.facts["need"]) == ("acme/team", 5, 6)
    assert await stored_hold(world, "a", "h") is None
    assert (await refusal(world, "balance", "a", account="acme")).code == "unknown_account"


async def test_a_session_draws_on_its_own_account_and_below_it_only(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme/research")
    below = await ask(world, "reserve", "a", hold="h", amount_micro_usd=1, account="acme/research/@a/sub/@1")
    assert [one["account"] for one in below["path"]][-2:] == ["acme/research/@a/sub", "acme/research/@a/sub/@1"]
    for other in ("acme", "acme/research", "acme/research/@b", "other", "acme/research/@ab"):
        found = await refusal(world, "spend", "a", entry="e", amount_micro_usd=1, account=other)
        assert isinstance(found, Forbidden), other
    assert await sums(world, "acme/research/@a") == (0, 1)


async def test_nobody_holds_anything_without_a_session_or_where_budgets_are_off(world: World) -> None:
    await world.daemon(governor={"budget": {"enabled": False}})
    assert isinstance(await world.refusal("claim", "a", task="T", hold_micro_usd=1), FabricError)
    found = await refusal(world, "reserve", "a", hold="h", amount_micro_usd=1)
    assert (found.code, found.facts["what"]) == ("unavailable", "governor")
    held = await world.refusal("next", "a", hold_micro_usd=1)
    assert (held.code, held.facts["what"]) == ("unavailable", "governor")


async def test_a_session_that_never_said_hello_holds_nothing(world: World) -> None:
    await world.daemon(governor={})
    assert isinstance(await refusal(world, "reserve", "a", hold="h", amount_micro_usd=1), SessionLost)
    assert isinstance(await refusal(world, "balance", "a"), SessionLost)


# -- limits and windows ----------------------------------------------------------------------------------------------


async def test_a_lowered_limit_lets_nothing_through_until_there_is_room_again(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "spend", "a", entry="e", amount_micro_usd=10)
    lowered = await limit(world, "acme", 4)
    assert lowered["path"][-1]["available"] == -6
    assert isinstance(await refusal(world, "reserve", "a", hold="h", amount_micro_usd=0), BudgetShort)
    await limit(world, "acme", None)
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=100)


async def test_a_limit_counts_for_a_daemon_that_has_not_heard_of_it(world: World) -> None:
    one = await world.daemon(governor={})
    other = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    for number in range(8):  # both know the account now
        await ask(world, "spend", "a", entry=f"w{number}", amount_micro_usd=1)
    for window in ("total", "month", "day"):
        await limit(world, "acme", 8, window=window)
        spent = (await line(world, "acme"))["spent"]
        answers = await asyncio.gather(
            *(ask(world, "spend", "a", entry=f"{window}{n}", amount_micro_usd=9 - spent) for n in range(8)),
            return_exceptions=True,
        )
        assert all(isinstance(answer, BudgetShort) for answer in answers), answers
    assert one.counted("if_governor_requests_total", verb="spend", outcome="short") + other.counted(
        "if_governor_requests_total", verb="spend", outcome="short"
    ) == pytest.approx(24)


async def test_a_balance_shows_the_path_the_open_holds_and_what_is_below(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme/x")
    await world.ask("hello", "b", account="acme/y")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5, ttl_s=60)
    await ask(world, "spend", "b", entry="e", amount_micro_usd=2)
    found = await ask(world, "balance", "op", account="acme", tree=True)
    assert [(one["account"], one["spent"], one["held"]) for one in found["path"]] == [("acme", 2, 5)]
    assert [one["account"] for one in found["below"]] == ["acme/x", "acme/x/@a", "acme/y", "acme/y/@b"]
    (held,) = found["holds"]
    assert (held["hold"], held["session"], held["account"], held["amount"]) == ("h", "a", "acme/x/@a", 5)
    assert 50 < held["expires_in_s"] <= 60
    assert (await ask(world, "balance", "b"))["path"][-1]["account"] == "acme/y/@b"
    everything = await ask(world, "balance", "op", tree=True)
    assert [one["account"] for one in everything["below"]] == ["acme", *[one["account"] for one in found["below"]]]
    assert [one["hold"] for one in everything["holds"]] == ["h"]


# -- the end of an owner ----------------------------------------------------------------------------------------------


async def test_a_hold_ends_with_its_session_and_a_late_commit_is_charged_all_the_same(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5)
    await world.ask("bye", "a")
    await freed(world, "acme")
    kv = await stored_hold(world, "a", "h")
    assert (records.hold(kv).state, records.hold(kv).note) == ("expired", "its session ended")
    late = await ask(world, "commit", "a", hold="h", amount_micro_usd=9)
    assert (late["charged"], late["late"]) == (9, True)
    assert await ask(world, "commit", "a", hold="h", amount_micro_usd=9) == late
    assert await sums(world, "acme") == (9, 0)
    assert daemon.counted("if_governor_late_commits_total") == 1
    assert daemon.counted("if_governor_holds_expired_total") == 1


async def test_a_hold_ends_with_its_own_time(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5, ttl_s=1)
    await freed(world, "acme")
    assert records.hold(await stored_hold(world, "a", "h")).note == "its time was up"


@pytest.mark.parametrize("with_claim", [False, True])
async def test_a_session_that_has_come_back_holds_under_its_new_life_though_the_daemon_has_not_heard(
    world: World, with_claim: bool
) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    governor = next(actor for actor in daemon.actors if isinstance(actor, Governor))
    await governor._feed.settle()
    old = governor.sessions.seats["a"]
    await world.ask("bye", "a")
    claim = await claimed(world, "T")
    await governor._feed.settle()
    governor.sessions.seats["a"] = old  # as when the watch is behind
    more = {"task": "T", "fence": claim["fence"]} if with_claim else {}
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5, **more)
    session = await (await world.store()).get(board.session_key("a"))
    assert records.hold(await stored_hold(world, "a", "h")).lease == session.lease != old.lease


@pytest.mark.parametrize("owner", ["session", "claim", "time"])
async def test_the_end_of_an_owner_is_heard_at_once_and_not_only_found_by_the_slow_pass(
    world: World, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "GRACE_MS", 0)
    await world.daemon(governor={}, reconcile_interval_seconds=3600)
    claim = await claimed(world, "T")
    more: dict[str, Any] = {"ttl_s": 1} if owner == "time" else {}
    if owner == "claim":
        more = {"task": "T", "fence": claim["fence"]}
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5, **more)
    if owner == "session":
        await world.ask("bye", "a")
    elif owner == "claim":
        await world.ask("release", "a", task="T", fence=claim["fence"])
    await freed(world, "acme")


async def test_a_hold_whose_daemon_and_session_died_is_found_by_the_next_daemon(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5)
    await daemon.stop()
    world.daemons.remove(daemon)
    store = await world.store()
    await store.txn(Txn((), (Delete(board.session_key("a")),)))
    await world.daemon(governor={})
    await freed(world, "acme")


async def test_a_hold_for_a_claim_needs_its_fence_and_ends_with_it(world: World) -> None:
    await world.daemon(governor={})
    claim = await claimed(world, "T")
    for fence, task in ((claim["fence"] + 1, "T"), (claim["fence"], "U")):
        lost = await refusal(world, "reserve", "a", hold="h", amount_micro_usd=5, task=task, fence=fence)
        assert isinstance(lost, ClaimLost)
        assert isinstance(
            await refusal(world, "spend", "a", entry="h", amount_micro_usd=5, task=task, fence=fence), ClaimLost
        )
    assert (await refusal(world, "reserve", "a", hold="h", amount_micro_usd=5, task="T")).code == "bad_request"
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5, task="T", fence=claim["fence"])
    await world.ask("release", "a", task="T", fence=claim["fence"])
    await freed(world, "acme")
    assert records.hold(await stored_hold(world, "a", "h")).note == "its claim ended"


# -- claims that carry money --------------------------------------------------------------------------------------------


async def test_a_claim_and_its_hold_are_one_step_or_none(world: World) -> None:
    await world.daemon(governor={})
    await limit(world, "acme", 10)
    await world.ask("hello", "a", account="acme")
    await world.ask("submit", "a", tasks=[{"id": "T"}])
    assert isinstance(await world.refusal("claim", "a", task="T", hold_micro_usd=11), BudgetShort)
    assert isinstance(await world.refusal("next", "a", hold_micro_usd=11), BudgetShort)
    assert (await world.ask("get", "a", task="T"))["state"] == "pending"
    assert (await world.ask("claim", "a", task="T", hold_micro_usd=10))["hold"].startswith("claim-")
    await world.ask("hello", "b", account="acme")
    assert isinstance(await world.refusal("claim", "b", task="T", hold_micro_usd=0), ClaimTaken)
    assert await sums(world, "acme") == (0, 10)
    store = await world.store()
    task, hold = await store.get(board.task_key("T")), await store.range(records.HOLDS, prefix_end(records.HOLDS))
    assert [kv.mod_revision for kv in hold[0].kvs] == [task.mod_revision]


async def test_fifty_agents_claim_with_holds_and_the_budget_ends_before_the_tasks_do(world: World) -> None:
    await world.daemon(governor={})
    await world.daemon(governor={})
    await limit(world, "acme", 300)
    await world.ask("hello", "op", account="acme")
    await world.ask("submit", "op", tasks=[{"id": f"T{n}"} for n in range(50)])
    await asyncio.gather(*(world.ask("hello", f"s{n}", account="acme") for n in range(50)))

    async def take(number: int) -> dict[str, Any] | FabricError:
        try:
            return await world.ask("next", f"s{number}", hold_micro_usd=10, request_id="n", timeout_s=20)
        except BudgetShort as short:
            return short

    answers = await asyncio.gather(*(take(number) for number in range(50)))
    got = [answer["task"] for answer in answers if isinstance(answer, dict)]
    assert (len(got), len(set(got))) == (30, 30)
    assert await sums(world, "acme") == (0, 300)
    assert (await world.ask("list", "op"))["counts"]["claimed"] == 30


@pytest.mark.parametrize(
    "way", ["complete", "complete with a cost", "fail", "fail with a cost", "release", "cancel", "bye"]
)
async def test_however_a_claim_ends_its_hold_ends_with_it(world: World, way: str) -> None:
    daemon = await world.daemon(governor={})
    claim = await claimed(world, "T", hold_micro_usd=10)
    body: dict[str, Any] = {"task": "T", "fence": claim["fence"]}
    cost = {"cost_micro_usd": 7, "usage": {"purpose": "coordination", "tokens_in": 5}} if "cost" in way else {}
    if way.startswith("complete"):
        done = await world.ask("complete", "a", **body, **cost)
        assert done.get("charged") == (7 if cost else None)
    elif way.startswith("fail"):
        assert (await world.ask("fail", "a", error="x", **body, **cost)).get("charged") == (7 if cost else None)
    elif way == "release":
        await world.ask("release", "a", **body)
    elif way == "cancel":
        await world.ask("cancel", "op", admin=True, task="T")
    else:
        await world.ask("bye", "a")
    assert await sums(world, "acme") == ((7, 0) if cost else (0, 0))
    store = await world.store()
    kv = await store.get(records.hold_key("a", claim["hold"]))
    hold = records.hold(kv)
    assert (hold.state, hold.charged) == (("committed", 7) if cost else ("expired", 0))
    if cost:
        assert hold.usage is not None and (hold.usage.purpose, hold.usage.tokens_in) == ("coordination", 5)
        assert daemon.counted("if_governor_charged_micro_usd_total", purpose="coordination") == 7
    assert kv.mod_revision == (await store.get(board.task_key("T"))).mod_revision
    assert board.stored(await store.get(board.task_key("T"))).task.hold is None


async def test_a_claim_that_expires_frees_its_hold_in_the_same_step(world: World) -> None:
    await world.daemon(governor={})
    claim = await claimed(world, "T", hold_micro_usd=10)
    store = await world.store()
    await store.txn(Txn((), (Delete(board.session_key("a")),)))  # as when the lease ends

    async def expired() -> bool:
        return bool((await world.ask("get", "op", task="T"))["state"] == "pending")

    await eventually(expired)
    assert await sums(world, "acme") == (0, 0)
    kv = await store.get(records.hold_key("a", claim["hold"]))
    assert kv.mod_revision == (await store.get(board.task_key("T"))).mod_revision
    late = await ask(world, "commit", "a", hold=claim["hold"], amount_micro_usd=3)
    assert (late["late"], late["charged"]) == (True, 3)


async def test_a_hold_that_its_holder_committed_is_not_ended_again_with_the_claim(world: World) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "reserve", "a", hold="other", amount_micro_usd=100)  # so that the sums alone tell nothing
    for number, (way, body) in enumerate(
        [("complete", {}), ("fail", {"error": "x"}), ("release", {}), ("complete", {"cost_micro_usd": 4})]
    ):
        claim = await claimed(world, f"T{number}", hold_micro_usd=10)
        await ask(world, "commit", "a", hold=claim["hold"], amount_micro_usd=4)
        await world.ask(way, "a", task=f"T{number}", fence=claim["fence"], **body)
        assert await sums(world, "acme") == (4 * (number + 1), 100)
    claim = await claimed(world, "U", hold_micro_usd=10)
    await ask(world, "commit", "a", hold=claim["hold"], amount_micro_usd=4)
    other = await world.refusal("complete", "a", task="U", fence=claim["fence"], cost_micro_usd=5)
    assert (other.code, other.facts["charged"]) == ("conflict", 4)
    assert (await world.ask("get", "a", task="U"))["state"] == "claimed"
    await world.ask("bye", "a")
    assert (await world.ask("get", "op", task="U"))["state"] == "pending"
    await freed(world, "acme", spent=20)


async def test_a_cost_that_nothing_was_held_for_is_charged_over_the_limit_and_recorded(world: World) -> None:
    daemon = await world.daemon(governor={})
    await limit(world, "acme", 5)
    claim = await claimed(world, "T")
    done = await world.ask("complete", "a", task="T", fence=claim["fence"], cost_micro_usd=8, request_id="c")
    assert (done["state"], done["charged"], done["overdraft"]) == ("done", 8, 3)
    assert await world.ask("complete", "a", task="T", fence=claim["fence"], cost_micro_usd=8, request_id="c") == done
    found = await line(world, "acme")
    assert (found["spent"], found["available"], found["overdraft"]) == (8, -3, 3)
    assert daemon.counted("if_governor_overdraft_micro_usd_total") == 3
    assert daemon.counted("if_governor_charged_micro_usd_total", purpose="work") == 8


async def test_a_retried_claim_with_a_hold_is_one_claim_and_one_hold(world: World) -> None:
    await world.daemon(governor={})
    await world.daemon(governor={})
    await limit(world, "acme", 10)
    await world.ask("hello", "a", account="acme")
    await world.ask("submit", "a", tasks=[{"id": "T"}, {"id": "U"}])
    answers = await asyncio.gather(
        *(world.ask("next", "a", hold_micro_usd=10, request_id="n", timeout_s=20) for _ in range(10))
    )
    assert len({(answer["task"], answer["fence"], answer["hold"]) for answer in answers}) == 1
    assert await sums(world, "acme") == (0, 10)
    again = await world.ask("claim", "a", task=answers[0]["task"], hold_micro_usd=10)
    assert (again["again"], again["hold"]) == (True, answers[0]["hold"])
    assert await sums(world, "acme") == (0, 10)


async def test_a_tasks_own_budget_counts_over_all_its_attempts_and_next_passes_it_over(world: World) -> None:
    await world.daemon(governor={})
    claim = await claimed(world, "poor", spec={"budget_micro_usd": 10, "priority": 5}, hold_micro_usd=8)
    await world.ask("fail", "a", task="poor", fence=claim["fence"], error="x", cost_micro_usd=6)
    short = await world.refusal("claim", "a", task="poor", hold_micro_usd=5)
    assert (short.facts["account"], short.facts["have"]) == ("task:poor", 4)
    alone = await world.refusal("next", "a", hold_micro_usd=5)
    assert (alone.code, alone.facts["account"]) == ("budget_short", "task:poor")
    await world.ask("submit", "a", tasks=[{"id": "rich"}])
    assert (await world.ask("next", "a", hold_micro_usd=5))["task"] == "rich"
    assert (await world.ask("next", "a", hold_micro_usd=4))["task"] == "poor"


async def test_what_is_held_for_a_claim_is_within_the_tasks_budget(world: World) -> None:
    await world.daemon(governor={})
    claim = await claimed(world, "T", spec={"budget_micro_usd": 10})
    body = {"task": "T", "fence": claim["fence"]}
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=6, **body)
    short = await refusal(world, "spend", "a", entry="e", amount_micro_usd=5, **body)
    assert short.facts["account"] == "task:T"
    await ask(world, "spend", "a", entry="e", amount_micro_usd=4, **body)


# -- told -----------------------------------------------------------------------------------------------------------------


async def test_what_was_committed_is_told_as_events_in_order(world: World) -> None:
    await world.daemon(governor={})
    await limit(world, "told", 10)
    await world.ask("hello", "a", account="told")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5)
    await ask(world, "commit", "a", hold="h", amount_micro_usd=12, usage={"tokens_out": 3})
    await limit(world, "told", 100)
    await ask(world, "reserve", "a", hold="i", amount_micro_usd=1)
    await ask(world, "void", "a", hold="i")
    await ask(world, "reserve", "a", hold="j", amount_micro_usd=1)
    await world.ask("bye", "a")
    bus = await world.connection()
    journal = await bus.journal(subjects.EVENT_STREAM)
    told: list[wire.BudgetEvent] = []
    async with asyncio.timeout(20):
        async for entry in journal.read(after_seq=0, subject=subjects.event("budget", ">")):
            told += [event for event in budget_event(entry.data) if event.account.startswith("told")]
            if told and told[-1].event == "expired":
                break
    happened = [event.event for event in told]
    assert sorted(happened[1:3]) == ["account", "hold"], "one transaction: the session's account, and its first hold"
    assert [happened[0], *happened[3:]] == [
        *("account", "commit", "overdraft", "account", "hold", "void", "hold", "expired")
    ]
    commit = next(event for event in told if event.event == "commit")
    assert (commit.account, commit.hold, commit.session, commit.amount) == ("told/@a", "h", "a", 5)
    assert (commit.charged, commit.overdraft, commit.late) == (12, 2, False)
    assert commit.usage is not None and commit.usage.tokens_out == 3
    assert told[-1].note == "its session ended"
    assert sorted(event.revision for event in told) == [event.revision for event in told]


async def test_the_gauges_say_how_full_accounts_are_and_what_coordination_costs(world: World) -> None:
    daemon = await world.daemon(governor={"budget": {"cost_tracking_interval": 0.05}})
    await limit(world, "acme", 100)
    await world.ask("hello", "a", account="acme")
    await ask(world, "spend", "a", entry="w", amount_micro_usd=30, usage={"tokens_in": 1})
    await ask(world, "spend", "a", entry="c", amount_micro_usd=10, usage={"purpose": "coordination"})
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=10)

    def gauge(name: str, **labels: str) -> float:
        return daemon.metrics.gauge(name, **labels).value

    async def told() -> bool:
        return (
            gauge("if_governor_budget_utilization", account="acme") == 0.5
            and gauge("if_governor_budget_utilization", account="@") == 50 / (40 * MILLION)
            and gauge("if_governor_cost_overhead_percent") == 25.0
            and gauge("if_governor_holds_open") == 1
        )

    await eventually(told)


async def test_a_lease_that_died_under_ended_holds_costs_one_more_try(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await ask(world, "reserve", "a", hold="h", amount_micro_usd=5)
    governor = next(actor for actor in daemon.actors if isinstance(actor, Governor))
    await governor._kept_ended.current()
    governor._kept_ended._lease = 424242
    assert (await ask(world, "commit", "a", hold="h", amount_micro_usd=5, request_id="c"))["charged"] == 5
    assert await sums(world, "acme") == (5, 0)


async def test_a_damaged_record_is_named_and_nothing_is_decided_on_it(world: World) -> None:
    daemon = await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    store = await world.store()
    await store.txn(Txn((), (Put(records.hold_key("a", "h"), b"{"),)))
    found = await refusal(world, "commit", "a", hold="h", amount_micro_usd=5)
    assert found.code in ("internal", "unavailable")
    assert daemon.counted("if_governor_requests_total", verb="commit", outcome="done") == 0


async def test_a_record_that_was_damaged_once_keeps_no_event_from_being_told(world: World) -> None:
    store = await world.store()
    await store.txn(Txn((), (Put(records.hold_key("x", "h"), b"{"),)))
    await store.txn(Txn((), (Delete(records.hold_key("x", "h")),)))
    await world.daemon(governor={})
    await limit(world, "after-damage", 5)
    journal = await (await world.connection()).journal(subjects.EVENT_STREAM)
    async with asyncio.timeout(20):
        async for entry in journal.read(after_seq=0, subject=subjects.event("budget", "account")):
            if any(event.account == "after-damage" for event in budget_event(entry.data)):
                break


async def test_what_is_long_over_is_forgotten_and_what_still_counts_is_kept(world: World) -> None:
    daemon = await world.daemon(governor={})
    await limit(world, "acme", 100)
    await limit(world, "acme/day", 100, window="day")
    claim = await claimed(world, "T", spec={"budget_micro_usd": 10}, hold_micro_usd=5)
    await world.ask("complete", "a", task="T", fence=claim["fence"], cost_micro_usd=5)
    for session, account in (("b", "acme/day"), ("busy", "acme")):
        await world.ask("hello", session, account=account)
        await ask(world, "spend", session, entry="e", amount_micro_usd=3)
    await ask(world, "reserve", "busy", hold="h", amount_micro_usd=1)
    await limit(world, "acme/@set", 7)
    governor = next(actor for actor in daemon.actors if isinstance(actor, Governor))
    await governor._feed.settle()
    assert await governor.accounts.forget_idle(daemon.committer, daemon.clock, 60) == 0
    assert await governor.accounts.forget_idle(daemon.committer, daemon.clock, -60) == 5
    await governor._feed.settle()
    names = {one["account"] for one in (await ask(world, "balance", "op", tree=True))["below"]}
    assert names == {"acme", "acme/day", "acme/@busy", "acme/@set"}
    assert await sums(world, "acme") == (11, 1)
    store = await world.store()
    assert await store.get(records.tally_key("task:T", "total")) is None
    assert (await ask(world, "spend", "a", entry="again", amount_micro_usd=1))["path"][-1]["spent"] == 1
    await world.ask("bye", "busy")
    await freed(world, "acme", spent=12)
