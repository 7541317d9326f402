"""The dashboard, panel by panel, over a real Prometheus that scrapes a real daemon under load, and a real etcd."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ifabric.errors import FabricError, NoTaskMatches
from ifabric.testing.clusters import etcd_cluster
from ifabric.testing.daemons import RealDaemon
from tests.conftest import needed
from tests.guests.bomb import of_text, wat
from tests.system.conftest import Cluster, eventually
from tests.system.scraping import MONITORING, Prometheus, prometheus, target
from tests.system.test_monitoring import NAMES, unknown

DASHBOARD = json.loads((MONITORING / "grafana/dashboards/phase-0-overview.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] not in ("row", "alertlist")]
EXPRESSIONS = [(panel["title"], one["expr"]) for panel in PANELS for one in panel["targets"]]
#: what may be empty, because it is not there in a fabric without TLS
MAY_BE_EMPTY = {"Certificates expire in"}
#: NaN says: nothing happened within the window. What did happen here may not be.
UNITS = {"short", "s", "ms", "ops", "bytes", "percent", "percentunit", "currencyUSD"}
CONFIG: dict[str, Any] = {
    "actors": ["coordinator", "governor", "chassis"],
    "governor": {
        "budget": {"cost_tracking_interval": 1},
        "circuit_breaker": {"failure_threshold": 3, "minimum_calls": 3, "reset_timeout": 600},
    },
    "chassis": {"runtime": {"max_memory_mb": 64}, "sandbox_pool": {"min_size": 1, "max_size": 2}},
}


def filled(expression: str) -> str:
    """With Grafana's variables as they are when all is chosen."""
    expression = expression.replace("$__rate_interval", "10s").replace("$job", "if-.+").replace("$instance", ".*")
    assert "$" not in expression, expression
    return expression


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_dashboard_names_no_metric_that_nobody_exports() -> None:
    for title, expression in EXPRESSIONS:
        assert not unknown(filled(expression)), (title, unknown(filled(expression)))


def test_every_panel_has_a_description_a_unit_and_the_chosen_data_source() -> None:
    assert DASHBOARD["title"] == "Phase 0 - Production Overview"
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(titles)
    for panel in PANELS:
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert [panel for panel in DASHBOARD["panels"] if panel["type"] == "alertlist"]


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    ("title", "unit", "scale"),
    [("Claim latency", "ms", 1), ("Event loop lag", "s", 1), ("Sandbox memory", "percentunit", 1)],
)
def test_the_unit_of_a_panel_is_that_of_its_expression(title: str, unit: str, scale: int) -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == title)
    assert panel["fieldConfig"]["defaults"]["unit"] == unit


# -- the data ---------------------------------------------------------------------------------------------------------


async def live(cluster: Cluster, stop: asyncio.Event) -> None:
    """What a day brings, every few hundredths of a second: work, refusals, money for both purposes, guests."""
    hello = of_text(wat("(nop)"))()
    escape = of_text(wat("(drop (i32.load (i32.const 65533)))"))()
    modules = []
    for wasm in (hello, escape):
        body = base64.b64encode(wasm).decode()
        modules.append((await cluster.ask("put", "a", component="chassis", wasm=body, timeout_s=30.0))["module"])
    await cluster.ask("hello", "a", ttl_s=600, capabilities=["code:python"])
    await cluster.ask("submit", "a", tasks=[{"id": "held"}, {"id": "odd", "needs": ["code:cobol"]}])
    await cluster.ask("claim", "a", task="held", hold_micro_usd=1_000_000)
    await cluster.ask("account", "op", component="governor", admin=True, account="shop", limit_micro_usd=5_000_000)
    for _ in range(3):
        permit = (await cluster.ask("admit", "a", component="governor", breaker="openai"))["permit"]
        await cluster.ask("report", "a", component="governor", permit=permit, outcome="failure", breaker="openai")
    number = 0
    while not stop.is_set():
        number += 1
        await cluster.ask("submit", "a", tasks=[{"id": f"day/{number}", "wants": ["code:python"]}])
        got = await cluster.ask("next", "a")
        await cluster.ask("complete", "a", task=got["task"], fence=got["fence"])
        with contextlib.suppress(NoTaskMatches):
            await cluster.ask("next", "a")
        for purpose in ("work", "coordination"):
            entry = f"{purpose}-{number}"
            await cluster.ask(
                "spend", "a", component="governor", entry=entry, amount_micro_usd=100, usage={"purpose": purpose}
            )
        with contextlib.suppress(FabricError):
            module = modules[number % 5 == 0]
            await cluster.ask("run", "a", component="chassis", module=module, timeout_s=30.0)
        await asyncio.sleep(0.02)


async def empty(seen: Prometheus) -> dict[str, str]:
    """Panels and names without data, with what stands in the way."""
    found = {}
    for title, expression in [*EXPRESSIONS, *((name, name) for name in NAMES)]:
        if title in MAY_BE_EMPTY:
            await seen.query(filled(expression))
            continue
        name = expression if title != "if_governor_capability_match_score" else f"{expression}_bucket"
        values = [float(series["value"][1]) for series in await seen.query(filled(name))]
        if not any(math.isfinite(value) for value in values):
            found[f"{title}: {expression}"] = f"{len(values)} series, none with a number"
    return found


@pytest.mark.slow
async def test_every_panel_and_every_name_of_the_runbook_has_data(cluster: Cluster, tmp_path: Path) -> None:
    """Of a daemon with work, an open breaker, a hold and guests of both kinds, and of an etcd of three."""
    async with contextlib.AsyncExitStack() as closing:
        with needed("etcd"):
            members = await closing.enter_async_context(etcd_cluster())
        daemon = RealDaemon(tmp_path / "daemon", members.urls, [cluster.nats.url], CONFIG)
        closing.push_async_callback(daemon.close)
        await daemon.start()
        assert daemon.found is not None
        jobs = {"if-coordinator": [target(daemon.found.http)], "etcd": [target(url) for url in members.urls]}
        seen = await closing.enter_async_context(prometheus(tmp_path / "prometheus", jobs))
        stop = asyncio.Event()
        working = asyncio.create_task(live(cluster, stop))
        try:

            async def whole() -> bool:
                return working.done() or not await empty(seen)

            with contextlib.suppress(TimeoutError):
                await eventually(whole, 120.0)
            assert not working.done() or working.result() is None
            assert await empty(seen) == {}
            # the runbook's query, word for word but for the window, is in milliseconds
            p95 = await seen.value(
                "histogram_quantile(0.95, sum by (le) (rate(if_coordinator_claim_latency_bucket[10s])))"
            )
            assert p95 is not None and 0.1 < p95 < 5_000
            recorded = await seen.value("if_coordinator_claim_latency_p95")
            assert recorded is not None and recorded == pytest.approx(p95, rel=0.9)
            assert re.fullmatch(
                r"1|0\.\d+", str(await seen.value("if_coordinator_claim_success_rate")).removesuffix(".0")
            )
        finally:
            stop.set()
            await working


def test_the_dashboard_is_where_grafana_looks_for_it() -> None:
    provider = (MONITORING / "grafana/dashboards/fabric.yaml").read_text()
    assert "path: /etc/grafana/provisioning/dashboards" in provider
    assert Path(MONITORING / "grafana/dashboards/phase-0-overview.json").is_file()
