"""The live page in a real browser, over a real daemon with agents at work."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Route, expect
from wasmtime import wat2wasm

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import Killed
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import coordinator as wire
from tests.system.browsing import CONTRAST, TOKEN, Sight, chromium, keep_pictures, looking, paged
from tests.system.conftest import Cluster, Load, eventually

BREAKER = "openai/gpt-x"
EVIL = "<img src=x onerror='window.hit=1'>"
#: a guest that ends when it is ended
FOREVER = wat2wasm('(module (memory (export "memory") 1) (func (export "_start") (loop br 0)))')
TURNED = "abc\u202etxt.exe"


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    keep_pictures(tmp_path_factory.mktemp("pictures"))
    async with chromium() as started:
        yield started


@pytest.fixture
async def daemon(cluster: Cluster, tmp_path: Path) -> RealDaemon:
    return await paged(cluster, tmp_path)


async def fail_until_open(cluster: Cluster, breaker: str) -> None:
    """Calls through it fail until it opens."""
    for _ in range(5):
        permit = (await cluster.ask("admit", "s", component="governor", breaker=breaker))["permit"]
        body = {"breaker": breaker, "permit": permit, "outcome": "failure"}
        if (await cluster.ask("report", "s", component="governor", **body))["state"] == "open":
            return
    raise AssertionError("it did not open")


async def furnish(cluster: Cluster) -> None:
    """Something of everything that the page shows."""
    client = await cluster.client("planner", account="acme/research", capabilities=["python"], ttl_s=60)
    await client.submit(
        [
            wire.TaskSpec(
                id="plan/first", title="Draw the plan", priority=5, payload={"steps": [1, 2, {"deep": True}]}
            ),
            wire.TaskSpec(id="plan/second", title="Carry out the plan", depends_on=("plan/first",)),
            wire.TaskSpec(id="plan/gpu", title="Train the model", needs=("gpu",)),
        ]
    )
    for account, limit in (("acme", 200_000_000), ("acme/research", 80_000_000)):
        await cluster.ask("account", "ann", component="governor", admin=True, account=account, limit_micro_usd=limit)
    await client.spend(31_250_000, entry="first")
    await client.claim("plan/first")
    await fail_until_open(cluster, BREAKER)
    with pytest.raises(Exception, match="gpu"):
        await client.claim("plan/gpu")


@pytest.mark.slow
async def test_numbers_move_and_everything_can_be_found(cluster: Cluster, daemon: RealDaemon, browser: Browser) -> None:
    """Agents work, and the page shows it: figures, charts, the board, a task with its history, a search, a filter."""
    await furnish(cluster)
    load = await Load(cluster, 4, pause_s=0.05).start()
    async with looking(browser, daemon) as sight:
        await sight.look()
        await expect(sight.at("#status-word")).to_have_text("Healthy")
        await expect(sight.at("#status-why")).to_contain_text("etcd and NATS answer")
        await expect(sight.at("#status-since")).to_have_text(re.compile(r"^since \d\d:\d\d:\d\d \(\d"))
        await expect(sight.at("#notices")).to_contain_text("1 breaker is not closed")
        await expect(sight.tile("rate")).to_have_text(re.compile(r"[1-9]"))
        await expect(sight.tile("p95")).to_have_text(re.compile(r"\d"))
        await sight.differs(sight.at("[data-state=done] b"))
        await expect(sight.at("#chart-rate path.series")).to_have_attribute("d", re.compile(r"^M.+L"))
        await expect(sight.at("#chart-latency path.series.high")).to_have_attribute("d", re.compile(r"^M"))
        await expect(sight.at("#chart-rate-summary")).to_have_text(re.compile(r"^Now claims/s [\d.]+\. Highest"))
        await the_board_searches_and_filters(sight)
        await a_task_opens(sight)
        await the_rest_is_there(sight)
        assert await sight.elements() < 4000
        await sight.page.set_viewport_size({"width": 1440, "height": 2040})
        await expect(sight.at("#sandboxes-body")).to_contain_text("Workers")
        await sight.picture("light")
    async with looking(browser, daemon, scheme="dark") as sight:
        await sight.look("#task=plan%2Ffirst")  # a link that somebody was sent
        await expect(sight.at("#panel-title")).to_contain_text("plan/first")
        await expect(sight.at("#panel-body .timeline")).to_contain_text("claimed")
        await sight.picture("panel-dark")
        await sight.page.keyboard.press("Escape")
        await expect(sight.at("#panel")).to_be_hidden()
        await sight.page.set_viewport_size({"width": 1440, "height": 2040})
        await expect(sight.at("#sandboxes-body")).to_contain_text("Workers")
        await sight.picture("dark")
    await load.stop()


async def the_board_searches_and_filters(sight: Sight) -> None:
    await sight.at("#tasks-search").fill("the plan")
    await expect(sight.at("#tasks-list .row:visible")).to_have_count(2)
    await expect(sight.at("#tasks-list")).to_contain_text("Carry out the plan")
    await sight.at("[role=tab][data-state=blocked]").click()
    await expect(sight.at("#tasks-list .row:visible .id")).to_have_text(["plan/second"])
    assert await sight.page.evaluate("location.hash") == "#state=blocked&match=the+plan"
    await sight.at("#tasks-search").fill("nothing is called this")
    await expect(sight.at("#tasks-empty")).to_contain_text("No task's id or title contains")
    await sight.at("#tasks-search").fill("")
    await sight.at("[role=tab][data-state=all]").click()


async def a_task_opens(sight: Sight) -> None:
    await sight.at("#tasks-search").fill("plan/first")
    row = sight.at(
        "#tasks-list .row:visible",
    )
    await expect(row).to_have_count(1)
    await row.click()
    panel = sight.at("#panel-body")
    await expect(panel.locator(".timeline .what")).to_have_text(["claimed", "submitted"])
    await expect(panel.locator("pre")).to_contain_text('"deep": true')
    await expect(panel).to_contain_text("planner")
    assert await sight.page.evaluate("location.hash") == "#task=plan%2Ffirst"
    await expect(sight.at("#panel .act:visible")).to_have_count(0)  # nobody acts without a token
    await panel.get_by_role("link", name="planner").first.click()
    await expect(sight.at("#panel-title")).to_contain_text("planner")
    await expect(panel).to_contain_text("acme/research")
    await sight.at("#panel-close").click()
    await sight.at("#tasks-search").fill("")


async def the_rest_is_there(sight: Sight) -> None:
    await sight.at("#budgets").scroll_into_view_if_needed()
    tree = sight.at("#budgets-tree")
    await expect(tree.locator("[data-account=acme]")).to_contain_text("left of $200.00")
    await tree.locator("[data-account=acme] .twist").first.click()
    await tree.locator("[data-account='acme/research'] .twist").first.click()
    await expect(tree.locator("[data-account='acme/research/@planner']")).to_be_visible()
    line = sight.at(f"[data-breaker='{BREAKER}']")
    await expect(line.locator(".countdown")).to_have_text(re.compile(r"^probe in \d"))
    await sight.differs(line.locator(".countdown"))
    await sight.at("#sessions").scroll_into_view_if_needed()
    await sight.at("#sessions-search").fill("planner")
    await expect(sight.at("#sessions-list .ref.id")).to_have_text(["planner"])
    await expect(sight.at("#sessions-list")).to_contain_text("plan/first")
    await expect(sight.at("#refusals-list")).to_contain_text("capability_missing")
    await sight.at("#refusals-list").get_by_role("button", name="planner").first.click()
    await expect(sight.at("#refusals-search")).to_have_value("planner")
    await expect(sight.at("#actors-tree")).to_contain_text("coordinator")
    await expect(sight.at("#cluster-facts")).to_contain_text("connected")
    await expect(sight.at("#feed-list .happened").first).to_be_visible()
    await sight.at("#feed-kind").select_option("breaker")
    await expect(sight.at("#feed-list li.happened .kind").filter(has_not_text="breaker")).to_have_count(0)
    await sight.at("#feed-kind").select_option("")
    await sight.at("#feed-pause").click()
    await expect(sight.at("#feed-meta")).to_have_text(re.compile(r"paused, [1-9]"))
    await sight.at("#feed-pause").click()


async def test_an_operator_acts_and_nobody_else(cluster: Cluster, daemon: RealDaemon, browser: Browser) -> None:
    """Without a token nothing can be done, with a wrong one neither, and it says so; with one it is done, and seen."""
    await furnish(cluster)
    async with looking(browser, daemon, allowed=frozenset({401, 403})) as sight:
        await sight.look("#task=plan%2Fgpu")
        await expect(sight.at("#panel-body .panel-state .state")).to_have_text("pending")
        await expect(sight.at(".act:visible")).to_have_count(0)
        assert await post(sight, "cancel", {"task": "plan/gpu"}) == 401
        await sight.operate("this-token-is-nobodys")
        await sight.at("#panel .act", has_text="Cancel").click()
        await expect(sight.at("#dialog")).to_contain_text("is taken off the board")
        await sight.picture("confirm")
        assert "Refused: this token may not act here." in await sight.do()
        assert (await cluster.record("plan/gpu")).state == "pending"
        await sight.at("#another").click()
        await sight.at("#token").fill(TOKEN)
        await sight.page.get_by_role("button", name="Use it").click()
        await sight.at("#panel .act", has_text="Cancel").click()
        assert await sight.do() == "Done: the task is cancelled."
        await sight.at("#leave").click()
        assert (await cluster.record("plan/gpu")).state == "cancelled"
        await expect(sight.at("#panel-body .panel-state .state")).to_have_text("cancelled")
        await sight.at("#panel .act", has_text="Requeue").click()
        assert await sight.do() == "Done: the task is pending."
        await sight.at("#leave").click()
        await sight.at("#panel-close").click()
        await the_board_follows(cluster, sight)
        await a_breaker_is_opened_and_closed(sight)
        await a_limit_is_set(cluster, sight)
        await a_sandbox_is_killed(cluster, sight)
        await sight.page.reload()
        await expect(sight.at("#operator")).to_have_text("Operator")  # it was in memory only
        await expect(sight.at(".act:visible")).to_have_count(0)


async def post(sight: Sight, action: str, body: dict[str, Any]) -> int:
    """The status that a script of the page is answered with, which shows no token."""
    script = """async ([action, body]) => (await fetch(`/api/actions/${action}`, {method: "POST",
        headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)})).status"""
    status: int = await sight.page.evaluate(script, [action, body])
    return status


async def the_board_follows(cluster: Cluster, sight: Sight) -> None:
    """What somebody else does is seen without a reload."""
    await sight.at("[role=tab][data-state=cancelled]").click()
    await expect(sight.at("#tasks-empty")).to_have_text("No task is cancelled.")
    await cluster.ask("cancel", "ann", admin=True, task="plan/gpu")
    await expect(sight.at("#tasks-list .row:visible .id")).to_have_text(["plan/gpu"])
    await expect(sight.at("[role=tab][data-state=cancelled] b")).to_have_text("1")


async def a_breaker_is_opened_and_closed(sight: Sight) -> None:
    line = sight.at(f"[data-breaker='{BREAKER}']")
    await line.get_by_role("button", name="Close").click()
    assert await sight.do() == "Done: the breaker is closed."
    await sight.at("#leave").click()
    await expect(line.locator(".state")).to_have_text("closed")
    await line.get_by_role("button", name="Open").click()
    await sight.at("#breaker-why").fill(EVIL)
    assert await sight.do() == "Done: the breaker is open."
    await sight.at("#leave").click()
    await expect(line.locator(".state")).to_have_text("open")
    await expect(line).to_contain_text("until closed by hand")
    await expect(line).to_contain_text(f"held by ann: {EVIL}")


async def a_limit_is_set(cluster: Cluster, sight: Sight) -> None:
    await sight.at("[data-account=acme] .act").first.click()
    await sight.at("#limit").fill("12.3456789")
    await sight.at("#confirm").click()
    await expect(sight.at("#dialog .outcome")).to_contain_text("up to six places")
    await sight.at("#limit").fill("150.25")
    assert await sight.do() == "Done: the limit is set."
    await sight.at("#leave").click()
    path = (await cluster.ask("balance", "ann", component="governor", account="acme"))["path"]
    assert path[0]["limit"] == 150_250_000
    await expect(sight.at("[data-account=acme]").first).to_contain_text("of $150.25")


async def test_what_others_write_is_only_ever_text(cluster: Cluster, daemon: RealDaemon, browser: Browser) -> None:
    """Titles, payloads, results, errors and names that are markup or turn the text around are shown as they are."""
    client = await cluster.client("mallory", ttl_s=60)
    payload = {EVIL: [EVIL, TURNED, "</pre><script>window.hit=1</script>"], "url": "javascript:window.hit=1"}
    hostile = wire.TaskSpec(id="javascript:window.hit/1", title=f"{EVIL} {TURNED}", payload=payload, max_attempts=1)
    await client.submit([hostile])
    claim = await client.claim(hostile.id)
    async with looking(browser, daemon) as sight:
        await sight.look("#task=javascript%3Awindow.hit%2F1")
        await claim.fail(f"{EVIL} {TURNED}", retry=False)
        await fail_until_open(cluster, "javascript:window.hit/2")
        panel = sight.at("#panel-body")
        await expect(panel.locator(".outcome.bad")).to_contain_text(EVIL)
        await expect(panel.locator("pre")).to_contain_text("</pre><script>window.hit=1</script>")
        assert "\u202e" not in await panel.inner_text()
        assert "abc\\u202etxt.exe" in await panel.inner_text()
        await expect(sight.at("#tasks-list")).to_contain_text(EVIL)
        await expect(sight.at("#feed-list")).to_contain_text("javascript:window.hit/2")
        await sight.picture("hostile")
        await no_link_leads_away(sight)


async def test_a_daemon_that_lies_is_only_ever_text(daemon: RealDaemon, browser: Browser) -> None:
    """Even where the fabric would not let such a name through, the page shows it and nothing more."""
    lies = json.loads(json.dumps(LIES).replace("EVIL", "<img src=x onerror='window.hit=1'>\\u202e"))

    async def lie(route: Route) -> None:
        path = route.request.url.split("/api/")[1].split("?")[0]
        if path == "stream":
            body = "".join(f"event: {event}\ndata: {json.dumps(data)}\n\n" for event, data in lies["stream"])
            await route.fulfill(body=body, content_type="text/event-stream")
        elif path in lies:
            await route.fulfill(json=lies[path])
        else:
            await route.fulfill(status=404, json={"error": {"code": "EVIL", "message": lies["sentence"]}})

    async with looking(browser, daemon, allowed=frozenset({404})) as sight:
        await sight.page.route("**/api/**", lie)
        await sight.page.set_viewport_size({"width": 1440, "height": 2040})
        await sight.page.goto(f"{sight.origin}/")
        for place in ("#tasks-list", "#sessions-list", "#budgets-tree", "#refusals-list", "#feed-list", "#breakers-list",
                      "#cluster-warnings", "#actors-tree", "#sandboxes-body", "#notices"):  # fmt: skip
            await expect(sight.at(place)).to_contain_text("<img src=x", timeout=20_000)
        for what in ("task", "session", "account", "breaker"):
            await sight.page.evaluate("(h) => { location.hash = h }", f"{what}={lies['sentence']}")
            await expect(sight.at("#panel-title")).to_contain_text(what)
            await expect(sight.at("#panel-title")).to_contain_text("<img src=x")
            await no_link_leads_away(sight)
        assert "\u202e" not in await sight.page.evaluate("document.body.innerText")
        assert await sight.at("main img, aside img, main script, aside script, iframe, object").count() == 0


async def no_link_leads_away(sight: Sight) -> None:
    hrefs = await sight.page.evaluate("[...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
    assert hrefs and all(href.startswith(("#", "/playbooks/")) for href in hrefs), hrefs


NOW = {
    "at": "2026-01-01T00:00:00Z", "daemon": "EVIL", "sessions": 1, "active": 1, "waiters": 0, "unmatched": 1, "holds": 0,
    "counts": {"pending": 1, "EVIL": 3}, "budget_fullest": {"EVIL": 0.99}, "viewers": 1, "missing": {"EVIL": "EVIL"},
    "health": {"status": "EVIL", "etcd": "EVIL", "nats": "EVIL", "not_ready": ["EVIL"], "warnings": ["EVIL"],
               "EVIL": {"EVIL": "EVIL"}, "dependencies": {"EVIL": {"state": "EVIL", "detail": "EVIL", "up": False}},
               "actors": {"name": "EVIL", "children": [{"name": "EVIL", "state": "EVIL", "reason": "EVIL", "restarts": 2}]}},
    "breakers": [{"breaker": "EVIL", "state": "EVIL", "failures": 1}],
    "actors": [{"actor": "EVIL", "state": "EVIL", "restarts": 1, "mailbox": 0}],
}  # fmt: skip
LIES: dict[str, Any] = {
    "sentence": "EVIL",
    "stream": [
        ("history", {"step_s": 2, "points": []}),
        ("now", NOW),
        ("events", [{"subject": "if.v1.event.EVIL.x", "event": "EVIL", "task": "EVIL", "session": "EVIL", "at": "EVIL",
                     "breaker": "EVIL", "account": "EVIL", "note": "EVIL"},
                    {"event": "violation", "kind": "EVIL", "session": "EVIL", "message": "EVIL", "at": "EVIL"}]),
        ("refusals", [{"at": "EVIL", "session": "EVIL", "component": "EVIL", "verb": "EVIL", "code": "EVIL", "why": "EVIL",
                       "task": "EVIL"}]),
    ],
    "tasks": {"tasks": [{"task": "EVIL", "state": "pending", "title": "EVIL", "needs": ["EVIL"], "session": "EVIL"}],
              "counts": {"pending": 1}},
    "task": {"task": "EVIL", "state": "EVIL", "error": "EVIL", "session": "EVIL", "waiting_for": ["EVIL"], "result": "EVIL",
             "spec": {"title": "EVIL", "needs": ["EVIL"], "depends_on": ["EVIL"], "payload": {"EVIL": "EVIL"}},
             "history": [{"at": "EVIL", "event": "EVIL", "session": "EVIL", "note": "EVIL"}]},
    "sessions": {"sessions": [{"session": "EVIL", "account": "EVIL", "capabilities": ["EVIL"], "ttl_s": 9,
                               "claims": ["EVIL"]}], "total": 1},
    "accounts": {"accounts": [{"account": "EVIL", "window": "EVIL", "limit_micro_usd": 5, "spent_micro_usd": 1,
                               "held_micro_usd": 1, "available_micro_usd": 3, "children": 0}], "total": 1},
    "account": {"path": [{"account": "EVIL", "limit": 1, "spent": 1, "held": 0, "window": "EVIL"}],
                "holds": [{"hold": "EVIL", "session": "EVIL", "amount": 1, "at": "EVIL", "task": "EVIL"}]},
    "breakers": {"breakers": [{"breaker": "EVIL", "state": "EVIL", "failures": 1, "by": "EVIL", "why": "EVIL"}]},
    "sandboxes": {"runs": [{"run": "EVIL", "session": "EVIL", "module": "EVIL", "task": "EVIL", "daemon": "EVIL",
                            "age_s": 1, "wall_left_s": 1}]},
}  # fmt: skip


@pytest.mark.slow
async def test_a_lost_daemon_is_said_to_be_lost(cluster: Cluster, daemon: RealDaemon, browser: Browser) -> None:
    """The page says that what it shows is old, and goes on by itself when the daemon is back; it says when it drains."""
    await furnish(cluster)
    async with looking(browser, daemon, may_be_lost=True) as sight:
        await sight.look()
        await expect(sight.at("#status-word")).to_have_text("Healthy")
        await expect(sight.tile("sessions")).to_have_text(re.compile(r"^\d"))
        daemon.freeze()  # its connections stay, and nothing comes: said well before the page gives the connection up
        await expect(sight.at("#status-word")).to_have_text("Connection lost", timeout=10_000)
        await expect(sight.at("#status-why")).to_contain_text(re.compile(r"What you see is \d+ s old"))
        daemon.thaw()
        await expect(sight.at("#status-word")).to_have_text("Healthy")
        await daemon.kill()
        await expect(sight.at("#status-word")).to_have_text("Connection lost")
        await expect(sight.at("#status-why")).to_contain_text(re.compile(r"Trying( again in \d+ s\.|…)"))
        assert await sight.page.title() == "Connection lost · InfraFabric"
        await expect(sight.at("#retry")).to_be_visible()
        await sight.picture("lost")
        await sight.at("#retry").click()  # in vain, and no harm
        await expect(sight.at("#status-word")).to_have_text("Connection lost")
        await daemon.start()  # found by the page itself, which tries at least every 18 s
        await expect(sight.at("#status-word")).to_have_text("Healthy", timeout=40_000)
        await expect(sight.tile("sessions")).to_have_text(re.compile(r"^\d"))
        await expect(sight.at("body")).not_to_have_class(re.compile("stale"))


@pytest.mark.slow
async def test_the_page_says_what_is_degraded(fragile: Cluster, tmp_path: Path, browser: Browser) -> None:
    """Without etcd it says so in words, since when, and what to read."""
    daemon = await paged(fragile, tmp_path)
    async with looking(browser, daemon, allowed=frozenset({503})) as sight:
        await sight.look()
        await expect(sight.at("#status-word")).to_have_text("Healthy")
        await fragile.etcd.kill()
        await expect(sight.at("#status-word")).to_have_text("Degraded", timeout=30_000)
        await expect(sight.at("#status-why")).to_contain_text("etcd is disconnected")
        await expect(sight.at("#status-since")).to_have_text(re.compile(r"^since \d\d:\d\d:\d\d"))
        await expect(sight.at("#notices")).to_contain_text("etcd is disconnected")
        href = await sight.at("#notices .book").first.get_attribute("href")
        assert href == "/playbooks/etcd-down"
        await sight.picture("degraded")
        await fragile.etcd.start_again()
        await expect(sight.at("#status-word")).to_have_text("Healthy", timeout=30_000)


@pytest.mark.slow
async def test_it_works_with_keys_alone_and_can_be_read(cluster: Cluster, daemon: RealDaemon, browser: Browser) -> None:
    """Every list and button is reached by keys; text keeps its contrast in both themes; nothing is wider than a phone."""
    await furnish(cluster)
    for scheme in ("light", "dark"):
        async with looking(browser, daemon, scheme=scheme) as sight:
            await sight.page.set_viewport_size({"width": 1440, "height": 2040})
            await sight.look()
            await expect(sight.at("#sandboxes-body")).to_contain_text("Workers")
            await expect(sight.at("#tasks-list .row:visible")).to_have_count(3)
            assert await sight.page.evaluate(CONTRAST) == []
            await sight.page.evaluate("location.hash = 'task=plan%2Ffirst'")
            await expect(sight.at("#panel-body pre")).to_be_visible()
            assert await sight.page.evaluate(CONTRAST) == []
    async with looking(browser, daemon, size="phone") as sight:
        await sight.look()
        await expect(sight.at("#tasks-list .row:visible")).to_have_count(3)
        assert await sight.page.evaluate("document.documentElement.scrollWidth") == 360
        await sight.picture("phone")
        await sight.page.set_viewport_size({"width": 360, "height": 5000})
        await expect(sight.at("#sandboxes-body")).to_contain_text("Workers")
        await sight.picture("phone-whole")
        assert await sight.page.evaluate(CONTRAST) == []
        assert await sight.page.evaluate("document.documentElement.scrollWidth") == 360
    async with looking(browser, daemon) as sight:
        await sight.look()
        await expect(sight.at("#tasks-list .row:visible")).to_have_count(3)
        await keys_alone(sight)


async def keys_alone(sight: Sight) -> None:
    press = sight.page.keyboard.press
    reached = set()
    for _ in range(120):
        await press("Tab")
        focused = await sight.page.evaluate(
            "[document.activeElement.id || document.activeElement.textContent.slice(0, 20),"
            " document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== 'none']"
        )
        reached.add(focused[0])
        assert focused[1], f"{focused[0]} does not show that it has the focus"
    wanted = {"skip", "theme", "operator", "tasks-search", "tasks-list", "budgets-tree", "breakers-list", "sessions-search",
              "refusals-list", "actors-tree", "feed-pause", "feed-list"}  # fmt: skip
    assert wanted <= reached
    await sight.at("#tasks-list").focus()
    await press("ArrowDown")
    await press("Enter")
    await expect(sight.at("#panel-title")).to_contain_text("plan/gpu")
    assert await sight.page.evaluate("document.activeElement.id") == "panel-title"
    await press("Escape")
    await expect(sight.at("#panel")).to_be_hidden()
    assert await sight.page.evaluate("document.activeElement.id") == "tasks-list"
    await sight.at("[role=tab][data-state=all]").focus()
    await press("ArrowRight")
    assert await sight.page.evaluate("document.activeElement.dataset.state") == "pending"
    await sight.at("#chart-rate .plot-box").focus()
    await press("ArrowLeft")
    await expect(sight.at("#chart-rate .chart-time")).to_have_text(re.compile(r"\d\d:\d\d:\d\d"))
    await sight.at("#theme").focus()
    await press("Enter")
    assert await sight.page.evaluate("document.documentElement.dataset.theme") == "light"
    await press("Enter")
    await sight.page.reload()
    assert await sight.page.evaluate("document.documentElement.dataset.theme") == "dark"


async def a_sandbox_is_killed(cluster: Cluster, sight: Sight) -> None:
    client = await cluster.client("runner", ttl_s=60)
    running = asyncio.create_task(client.run_module(FOREVER, wall_s=120))
    try:
        await sight.at("#sandboxes").scroll_into_view_if_needed()
        run = sight.at("#sandboxes-body .item", has_text="runner")
        await run.get_by_role("button", name="Kill").click()
        await expect(sight.at("#dialog")).to_contain_text("is ended where it stands")
        assert await sight.do() == "Done: the run was ended."
        await sight.at("#leave").click()
        with pytest.raises(Killed):
            await running
    finally:
        await cancel_and_wait(running)


@pytest.mark.slow
async def test_a_hundred_thousand_tasks_are_no_more_than_ten(
    cluster: Cluster, daemon: RealDaemon, browser: Browser
) -> None:
    """The end of the list is reached, a search finds one, and the document stays as small as with a few tasks."""
    client = await cluster.client("planner", ttl_s=60)

    async def submit(first: int) -> None:
        for start in range(first, first + 25_000, 100):
            specs = [wire.TaskSpec(id=f"t/{n:06}", title=f"Task {n}") for n in range(start, start + 100)]
            await client.submit(specs)

    await asyncio.gather(*(submit(first) for first in range(0, 100_000, 25_000)))
    async with looking(browser, daemon) as sight:
        await sight.look()
        await expect(sight.at("[role=tab][data-state=pending] b")).to_have_text("100,000", timeout=30_000)
        few = await sight.elements()
        await sight.page.evaluate(
            "(() => { const l = document.getElementById('tasks-list'); l.scrollTop = l.scrollHeight; })()"
        )
        await expect(sight.at("#tasks-list .row[aria-posinset='100000'] .id")).to_have_text("t/099999", timeout=90_000)
        assert await sight.elements() < few + 500
        assert await sight.at("#tasks-list .row").count() < 100
        await sight.picture("hundred-thousand")
        await sight.page.evaluate("document.getElementById('tasks-list').scrollTop = 36 * 50_000")
        await expect(sight.at("#tasks-list .row[aria-posinset='50003'] .id")).to_have_text("t/050002")
        await sight.at("#tasks-search").fill("t/0777")
        await expect(sight.at("#tasks-meta")).to_have_text("100 found")
        assert await sight.elements() < few + 500


async def test_a_viewers_token_is_asked_for(cluster: Cluster, tmp_path: Path, browser: Browser) -> None:
    """With `page.viewer_token_file` nothing is shown before a token is."""
    token = tmp_path / "viewer.token"
    token.write_text("a-token-to-look-with")
    token.chmod(0o600)
    daemon = await paged(cluster, tmp_path, page={"viewer_token_file": str(token)})
    await furnish(cluster)

    async def there() -> bool:
        return (await daemon.http("/api/tasks"))[0] == 401

    await eventually(there)
    async with looking(browser, daemon, allowed=frozenset({401, 403})) as sight:
        await sight.page.goto(f"{sight.origin}/")
        await expect(sight.at("#dialog-title")).to_have_text("This page asks who looks")
        await expect(sight.at("#status-word")).to_have_text("Locked")
        await expect(sight.at("#tasks-list .row:not(.loading):visible")).to_have_count(0)
        await sight.at("#token").fill("this-token-is-nobodys")
        await sight.page.get_by_role("button", name="Use it").click()
        await expect(sight.at("#dialog")).to_contain_text("not one to look with")
        await sight.at("#token").fill("a-token-to-look-with")
        await sight.page.get_by_role("button", name="Use it").click()
        await expect(sight.at("#status-word")).to_have_text("Healthy")
        await expect(sight.at("#tasks-list .row:visible")).to_have_count(3)
