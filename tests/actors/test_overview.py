"""Looking at the whole: every session, every account, and a search over a large board that keeps nobody waiting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ifabric.clock import monotonic
from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator.actor import Coordinator
from ifabric_actors.coordinator.records import Stored, Task

from .conftest import World


async def everything(world: World, verb: str, of: str, **body: Any) -> list[dict[str, Any]]:
    """All pages of a verb, one after another."""
    found: list[dict[str, Any]] = []
    after: dict[str, Any] = {}
    while True:
        reply = await world.ask(verb, "op", **body, **after)
        found += reply[of]
        if "after" not in reply:
            return found
        after = {"after": reply["after"]}


async def test_sessions_are_listed_with_what_they_hold(world: World) -> None:
    await world.daemon()
    await world.ask("submit", "op", tasks=[{"id": "T"}, {"id": "U"}])
    await world.ask("hello", "a", capabilities=["python"], account="acme/research", ttl_s=30)
    for name in ("c", "b"):
        await world.ask("hello", name, ttl_s=60)
    for task in ("U", "T"):
        await world.ask("claim", "a", task=task)
    reply = await world.ask("sessions", "op", admin=True, limit=2)
    assert reply == {
        "sessions": [
            {
                "session": "a",
                "account": "acme/research",
                "capabilities": ["python"],
                "ttl_s": 30,
                "claims": ["T", "U"],
                "held": 2,
            },
            {"session": "b", "capabilities": [], "ttl_s": 60, "claims": []},
        ],
        "after": "b",
        "total": 3,
    }
    rest = await world.ask("sessions", "op", admin=True, after="b")
    assert ([line["session"] for line in rest["sessions"]], "after" in rest) == (["c"], False)
    found = await world.ask("sessions", "op", admin=True, match="RESEARCH")
    assert [line["session"] for line in found["sessions"]] == ["a"]
    await world.ask("bye", "a")
    gone = await world.ask("sessions", "op", admin=True)
    assert ([line["session"] for line in gone["sessions"]], gone["total"]) == (["b", "c"], 2)


async def test_accounts_are_a_tree_that_is_walked_a_level_at_a_time(world: World) -> None:
    await world.daemon(governor={})

    async def limit(account: str, amount: int | None) -> None:
        await world.ask("account", "op", component="governor", admin=True, account=account, limit_micro_usd=amount)

    await limit("acme/research", 1000)
    await limit("acme/ops", None)
    await limit("zed", 5)
    await world.ask("hello", "a", account="acme/research")
    await world.ask("spend", "a", component="governor", entry="e", amount_micro_usd=100)

    async def level(**body: Any) -> dict[str, Any]:
        return await world.ask("accounts", "op", component="governor", admin=True, **body)

    top = await level()
    assert [(line["account"], line["children"]) for line in top["accounts"]] == [("acme", 2), ("zed", 0)]
    assert (top["accounts"][0]["limit_micro_usd"], top["accounts"][0]["available_micro_usd"]) == (None, None)
    assert top["accounts"][0]["spent_micro_usd"] == 100, "what is spent is spent on the whole path"
    first = await level(parent="acme", limit=1)
    assert ([line["account"] for line in first["accounts"]], first["after"], first["total"]) == (
        ["acme/ops"],
        "acme/ops",
        2,
    )
    (research,) = (await level(parent="acme", after=first["after"]))["accounts"]
    assert research == {
        "account": "acme/research",
        "window": "total",
        "limit_micro_usd": 1000,
        "spent_micro_usd": 100,
        "held_micro_usd": 0,
        "available_micro_usd": 900,
        "children": 1,
    }
    (own,) = (await level(parent="acme/research"))["accounts"]
    assert (own["account"], own["spent_micro_usd"], own["children"]) == ("acme/research/@a", 100, 0)
    assert (await level(parent="acme/research/@a"))["accounts"] == []


async def test_tasks_are_found_by_a_part_of_their_id_or_title(world: World) -> None:
    await world.daemon()
    specs = [{"id": f"job.{n}", "title": "Émile's Report" if n % 2 else ""} for n in range(9)]
    await world.ask("submit", "op", tasks=specs)
    found = await everything(world, "list", "tasks", match="ÉMILE", limit=2)
    assert [line["task"] for line in found] == ["job.1", "job.3", "job.5", "job.7"]
    assert [line["task"] for line in await everything(world, "list", "tasks", match="B.8")] == ["job.8"]
    assert await everything(world, "list", "tasks", match="report", state="done") == []


async def test_titles_that_would_not_fit_into_one_message_come_on_more_pages(world: World) -> None:
    await world.daemon()
    for part in range(10):
        specs = [{"id": f"t{part}.{n:02}", "title": "\U0001f4a3" * 2000} for n in range(20)]
        await world.ask("submit", "op", tasks=specs)
    first = await world.ask("list", "op", limit=1000)
    assert 0 < len(first["tasks"]) < 200
    assert len(await everything(world, "list", "tasks", limit=1000)) == 200


@pytest.mark.parametrize("world", ["memory"], indirect=True)
async def test_a_search_over_a_hundred_thousand_tasks_keeps_nobody_waiting(world: World) -> None:
    daemon = await world.daemon(reconcile_interval_seconds=1000)
    coordinator = daemon.actor
    assert isinstance(coordinator, Coordinator)
    for n in range(100_000):
        name = f"job/{n:06}"
        task = Task(spec=TaskSpec(id=name, title="a title of the usual length"), state="done", body="")
        coordinator.board.put(name, Stored(task, 1, 1))
    waits: list[float] = []
    done = asyncio.Event()

    async def feel() -> None:
        while not done.is_set():
            began = monotonic()
            await asyncio.sleep(0)
            waits.append(monotonic() - began)

    feeling = asyncio.create_task(feel())
    await asyncio.sleep(0)
    began = monotonic()
    replies = await asyncio.gather(*(world.ask("list", f"s{n}", match="nowhere", timeout_s=30) for n in range(5)))
    took = monotonic() - began
    done.set()
    await feeling
    assert all(reply["tasks"] == [] and "after" not in reply for reply in replies)
    waits.sort()
    late = [wait for wait in waits if wait > 0.010]
    assert len(waits) > 400, "others had their turns meanwhile"
    assert len(late) <= len(waits) // 50, (
        f"{len(late)} of {len(waits)} turns took over 10 ms, the longest {waits[-1]:.4f} s"
    )
    print(
        f"5 searches in {took:.3f} s; the longest turn {waits[-1] * 1000:.1f} ms, median {waits[len(waits) // 2] * 1000:.2f} ms"
    )
