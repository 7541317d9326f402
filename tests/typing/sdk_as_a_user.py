"""The SDK as a user writes it. Nobody runs this file: `uv run mypy` reads it, and it fails when a type gets worse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any, assert_type

import ifabric
from ifabric import (
    Breaker,
    BreakerEvent,
    BudgetEvent,
    ChassisEvent,
    Client,
    Coordinator,
    EventBus,
    ExitStatus,
    Hold,
    Limits,
    Result,
    SyncClient,
    TaskEvent,
    TaskSpec,
    Usage,
    errors,
    micro_usd,
    output_of,
)
from ifabric.claims import Claim
from ifabric.sandboxing import Output
from ifabric.sync import Subscription, SyncBreaker, SyncClaim, SyncHold
from ifabric.wire.chassis import InspectReply, KillReply, ModulesReply, PutReply, RunsReply, RunUsage
from ifabric.wire.coordinator import CompleteReply, FailReply, GetReply, ListReply, State, StateReply, SubmitReply
from ifabric.wire.governor import BalanceReply, BreakerLine, BreakerState, CommitReply, MatchReply, PathReply, VoidReply


async def worker() -> None:
    async with ifabric.Client.connect(capabilities=["python"]) as client:
        async for claim in client.tasks():
            async with claim:
                await claim.complete({"squared": claim.spec.payload**2})


async def every_call(client: Client) -> None:
    assert_type(client.session, str)
    assert_type(client.tasks(until_empty=True), AsyncIterator[Claim])
    claim = await client.claim("T")
    assert_type(claim, Claim)
    assert_type(await client.next(wait_s=1.5, hold_micro_usd=100), Claim)
    assert_type((claim.task, claim.fence, claim.attempt, claim.ttl_s), tuple[str, int, int, float])
    assert_type(claim.spec, TaskSpec)
    assert_type(claim.lost.is_set(), bool)
    assert_type(claim.lost_reason, str)
    assert_type(await claim.complete([1, 2], cost_micro_usd=5), CompleteReply)
    assert_type(await claim.fail("no", retry=False), FailReply)
    assert_type(await claim.release("later"), StateReply)
    submitted = await client.submit([TaskSpec(id="T", needs=("gpu",), priority=3), {"id": "U"}], done=["U"])
    assert_type(submitted, SubmitReply)
    assert_type(submitted.created, tuple[str, ...])
    found = await client.get("T")
    assert_type(found, GetReply)
    assert_type(found.state, State)
    assert_type(found.session, str | None)
    assert_type(await client.list(state="pending", limit=10), ListReply)
    async for event in client.events(after_seq=0):
        assert_type(event, TaskEvent)
    async with client.subscribe() as events:
        assert_type(events, AsyncIterator[TaskEvent])


async def money(client: Client) -> None:
    assert_type(micro_usd("0.25") + micro_usd(Decimal("1.5")), int)
    assert_type(await client.spend(100, entry="e", account="acme", usage=Usage(tokens_in=1)), CommitReply)
    async with client.hold(500, name="h", ttl_s=60) as hold:
        assert_type(hold, Hold)
        assert_type(hold.cost_micro_usd, int | None)
        hold.cost_micro_usd = 300
        hold.usage = Usage(tokens_out=7, purpose="coordination")
        assert_type(await hold.commit(300), CommitReply)
        assert_type(await hold.void(), VoidReply)
        assert_type((hold.ended, hold.unsent, hold.charged_before), tuple[bool, str, int | None])
    async for claim in client.tasks(hold_micro_usd=500):
        assert_type(claim.hold_id, str | None)
        async with claim, claim.hold(100, step="draft") as hold:
            claim.cost_micro_usd += 5
            assert_type(await claim.complete(cost_micro_usd=5, usage=Usage()), CompleteReply)
            assert_type(await claim.fail("no", cost_micro_usd=5), FailReply)
    assert_type(await client.balance("acme", tree=True), BalanceReply)
    assert_type(await client.set_account("acme", None, window="day"), PathReply)
    assert_type(await client.match(["gpu"], sessions=["a"]), MatchReply)


async def breakers(client: Client) -> None:
    async with client.breaker("openai/gpt-x", classify=lambda error: "ignored", wait_s=5) as breaker:
        assert_type(breaker, Breaker)
        breaker.success()
        breaker.failure(retry_after_s=7.5)
        breaker.ignored()

    @client.breaker("openai/gpt-x")
    async def ask(question: str, *, loud: bool) -> bytes:
        return question.encode()

    assert_type(await ask("why", loud=True), bytes)
    assert_type(await client.breakers(), tuple[BreakerLine, ...])
    assert_type(await client.set_breaker("openai/gpt-x", "open", why="the invoice"), BreakerState)


async def sandboxes(client: Client) -> None:
    module = await client.put_module(Path("tool.wasm"))
    assert_type(module, str)
    assert_type(await client.keep_module(b"..."), PutReply)
    result = await client.run_module(
        module,
        "--count",
        "3",
        stdin="text",
        env={"LANG": "C"},
        limits=Limits(fuel=1000),
        wall_s=5,
        endpoints=["openai"],
        check=True,
    )
    assert_type(result, Result)
    assert_type((result.run, result.exit_code, result.stdout, result.text), tuple[str, int, bytes, str])
    assert_type(result.usage, RunUsage)
    async with client.hold(500) as hold:
        await client.run_module(Path("tool.wasm"), hold=hold)
    async for claim in client.tasks():
        assert_type(await claim.run(b"...", "x", wall_s=5, hold="h", check=True), Result)
    assert_type(await client.inspect_module(Path("tool.wasm")), InspectReply)
    assert_type(await client.modules(limit=5), ModulesReply)
    assert_type(await client.runs(), RunsReply)
    assert_type(await client.kill_run("r", why="it loops"), KillReply)
    try:
        await client.run_module(module)
    except ExitStatus as ended:
        assert_type(ended.result, Result)
    except errors.Trap as trap:
        assert_type(output_of(trap), Output | None)


async def what_happens(client: Client) -> None:
    assert_type(client.events("budget"), AsyncIterator[BudgetEvent])
    async with client.subscribe("breaker") as events:
        assert_type(events, AsyncIterator[BreakerEvent])
    assert_type(client.events("chassis"), AsyncIterator[ChassisEvent])
    async for event in client.events("all"):
        if isinstance(event, TaskEvent):
            assert_type(event.task, str)


async def with_a_function(client: Client) -> None:
    async def handle(claim: Claim) -> dict[str, str]:
        return {"did": claim.task}

    await client.work(handle, concurrency=4)


async def refused(client: Client) -> str:
    try:
        await client.claim("T")
    except errors.ClaimTaken as taken:
        assert_type(taken.message, str)
        assert_type(taken.facts, dict[str, Any])
        return str(taken.facts["by"])
    except (errors.Unreachable, errors.FabricError) as error:
        assert_type(error.retryable, bool)
    return ""


def without_await() -> None:
    with SyncClient(session="me", ttl_s=30) as client:
        for claim in client.tasks(until_empty=True):
            assert_type(claim, SyncClaim)
            with claim:
                assert_type(claim.is_lost, bool)
                assert_type(claim.complete(1), CompleteReply)
        assert_type(client.get("T"), GetReply)


def money_without_await() -> None:
    with SyncClient(account="acme") as client:
        assert_type(client.spend(5), CommitReply)
        with client.hold(500) as hold, client.breaker("openai/gpt-x", wait_s=1) as breaker:
            assert_type(hold, SyncHold)
            hold.cost_micro_usd = 5
            assert_type(breaker, SyncBreaker)
            breaker.success()
        with client.next(hold_micro_usd=7) as claim, claim.hold(5, step="s") as hold:
            claim.cost_micro_usd += 5
        assert_type(client.balance(), BalanceReply)


def sandboxes_without_await() -> None:
    with SyncClient() as client:
        module = client.put_module(b"...")
        assert_type(client.run_module(module, "x", wall_s=5, task="T", fence=3), Result)
        with client.hold(500) as hold, client.claim("T") as claim:
            assert_type(client.run_module(Path("tool.wasm"), hold=hold), Result)
            assert_type(claim.run(module, "x", hold=hold, check=True), Result)
        assert_type(client.runs(), RunsReply)


def as_the_runbook_does() -> None:
    bus = EventBus("etcd", {"nats": "nats://127.0.0.1:4222"})
    assert_type(bus.connect(), bool)
    coordinator = Coordinator(bus)
    assert_type(coordinator.claim_task("T", "me"), bool)
    assert_type(coordinator.release_task("T", "me"), bool)
    assert_type(coordinator.get_task("T"), dict[str, Any])
    assert_type(coordinator.subscribe_task_updates(lambda event: print(event["task"])), Subscription)


async def mistakes_are_found(client: Client) -> None:
    """Each line is an error, and mypy says so when one is not."""
    TaskSpec("T")  # type: ignore[call-arg]
    TaskSpec(id=7)  # type: ignore[arg-type]
    client.tasks(wait="20")  # type: ignore[call-arg]
    await client.submit(done="T")  # type: ignore[call-arg]
    await client.work("not a function")  # type: ignore[arg-type]
    micro_usd(0.25)  # type: ignore[arg-type]
    await client.spend(0.25)  # type: ignore[arg-type]
    client.hold("0.25")  # type: ignore[arg-type]
    await client.set_breaker("x", "half_open")  # type: ignore[arg-type]
    client.events("weather")  # type: ignore[call-overload]
    await client.run_module("sha256:9f86", 3)  # type: ignore[arg-type]
    await client.run_module("sha256:9f86", seconds=3)  # type: ignore[call-arg]
    await (await client.claim("T")).run("sha256:9f86", wall_s="3")  # type: ignore[arg-type]
    Coordinator("not a bus")  # type: ignore[arg-type]
