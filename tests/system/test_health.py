"""What a real daemon says of itself while what it depends on is hurt: /livez, /readyz, /health, and its metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ifabric.clock import monotonic
from ifabric.config_base import MetricsPort
from ifabric.embedded import free_port, http_get
from ifabric.errors import BadRequest, FabricError, StartupError
from ifabric.testing.daemons import RealDaemon
from tests.actors.test_egress import Seen, Site, by_path, http
from tests.actors.vault_stub import VaultStub
from tests.conftest import needed
from tests.guests.build import guest
from tests.system.conftest import Cluster, around, eventually, servers
from tests.system.test_faults_store import fill

ROOT = Path(__file__).parent.parent.parent
ELSEWHERE = {"environment": {"PYTHONPATH": str(Path(__file__).parent / "elsewhere")}}
TALKATIVE: dict[str, Any] = {"config": {"actors": ["talkative:Talkative"]}, **ELSEWHERE}


async def dependency(daemon: RealDaemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (await daemon.health())["dependencies"][name]
    return found


async def until_state(daemon: RealDaemon, name: str, state: str) -> dict[str, Any]:
    async def so() -> dict[str, Any] | None:
        found = await dependency(daemon, name)
        return found if found["state"] == state else None

    found: dict[str, Any] = await eventually(so, 30.0)
    return found


async def codes(daemon: RealDaemon) -> tuple[int, int, int]:
    """Of /livez, /readyz and /health."""
    livez, readyz, health = [(await daemon.http(path))[0] for path in ("/livez", "/readyz", "/health")]
    assert (await daemon.http("/healthz"))[0] == health
    return livez, readyz, health


async def test_a_healthy_daemon_says_what_the_runbook_expects_and_each_dependency_apart(cluster: Cluster) -> None:
    daemon = await cluster.daemon()
    assert await codes(daemon) == (200, 200, 200)
    await until_state(daemon, "loop", "steady")  # it was busy while it started
    health = await daemon.health()
    assert {"status": "healthy", "etcd": "connected"}.items() <= health.items(), "the runbook's, section 3"
    found = health["dependencies"]
    assert {name: (one["state"], one["up"]) for name, one in found.items()} == {
        "etcd": ("connected", True),
        "nats": ("connected", True),
        "vault": ("unused", True),
        "loop": ("steady", True),
    }
    assert all(0 <= one["since_s"] < 60 for one in found.values())
    assert 0 < (await until_asked(daemon))["latency_ms"] < 5000
    assert found["loop"].keys() >= {"lag_s", "worst_s"}
    assert found["vault"]["detail"] == "no credentials are configured"
    assert (health["not_ready"], health["warnings"]) == ([], health["warnings"])
    names = {child["name"] for child in health["actors"]["children"]}
    assert {"http", "store", "bus", "residents"} <= names
    for name in ("etcd", "nats", "vault", "loop"):
        assert await daemon.metric("if_dependency_up", dependency=name) == 1
    assert await daemon.metric("if_ready") == 1


async def until_asked(daemon: RealDaemon) -> dict[str, Any]:
    async def asked() -> dict[str, Any] | None:
        found = await dependency(daemon, "etcd")
        return found if "latency_ms" in found else None

    found: dict[str, Any] = await eventually(asked)
    return found


@pytest.mark.parametrize("fault", ["frozen", "killed"])
async def test_without_etcd_it_is_degraded_and_says_since_when_and_what_that_means(
    fragile: Cluster, fault: str
) -> None:
    daemon = await fragile.daemon()
    before = monotonic()
    if fault == "frozen":
        fragile.etcd.freeze()
    else:
        await fragile.etcd.kill()
    await until_state(daemon, "etcd", "disconnected")
    await eventually(lambda: degraded(daemon))
    assert await codes(daemon) == (200, 503, 200)
    first = await dependency(daemon, "etcd")
    assert first["since_s"] <= monotonic() - before + 0.2
    assert first["means"].startswith("Nothing is claimed") and not first["up"] and "latency_ms" not in first
    assert await daemon.metric("if_dependency_up", dependency="etcd") == 0
    assert await daemon.metric("if_dependency_up", dependency="nats") == 1
    assert await daemon.metric("if_ready") == 0

    async def older() -> bool:
        return bool((await dependency(daemon, "etcd"))["since_s"] >= first["since_s"] + 0.2)

    await eventually(older)
    if fault == "frozen":
        fragile.etcd.thaw()
        back = await until_state(daemon, "etcd", "connected")
        assert back["since_s"] < 3
        await eventually(lambda: healthy(daemon))


async def degraded(daemon: RealDaemon) -> bool:
    return bool((await daemon.health())["status"] == "degraded")


async def healthy(daemon: RealDaemon) -> bool:
    return bool((await daemon.health())["status"] == "healthy")


async def test_without_nats_it_is_degraded_and_only_nats_is_down(fragile: Cluster) -> None:
    daemon = await fragile.daemon()
    await fragile.nats.kill()
    found = await until_state(daemon, "nats", "disconnected")
    assert found["means"].startswith("Nobody reaches this daemon") and not found["up"]
    assert await codes(daemon) == (200, 503, 200)
    status, missing = await daemon.ready()
    assert status == 503 and "nats is disconnected" in missing
    assert (await dependency(daemon, "etcd"))["up"]


@pytest.mark.slow
async def test_a_full_etcd_is_connected_and_all_the_same_no_dependency_that_is_up() -> None:
    async with servers(quota_bytes=4 << 20) as pair, around(*pair) as full:
        daemon = await full.daemon(config={"actors": ["coordinator"]})
        await fill(full)
        found = await until_state(daemon, "etcd", "full")
        assert not found["up"] and "ifabric doctor" in found["means"] and found["latency_ms"] > 0
        assert await daemon.metric("if_dependency_up", dependency="etcd") == 0


async def test_a_loop_that_was_blocked_shows_until_it_has_been_steady_for_a_while(cluster: Cluster) -> None:
    """It stands still for a second, which nobody scrapes; what comes after tells of it."""
    daemon = await cluster.daemon(config={"actors": []})
    await until_state(daemon, "loop", "steady")
    daemon.freeze()
    await asyncio.sleep(1.0)  # the fault itself
    daemon.thaw()
    found = await until_state(daemon, "loop", "late")
    assert found["worst_s"] >= 0.5 and not found["up"] and "ms within 10 s" in found["detail"]
    assert found["lag_s"] <= found["worst_s"]
    health = await daemon.health()
    assert health["status"] == "healthy", "it serves"
    assert await daemon.metric("if_loop_lag_max_seconds") >= 0.5
    assert await daemon.metric("if_dependency_up", dependency="loop") == 0
    late = await daemon.metric("if_loop_late_seconds_count") - await daemon.metric(
        "if_loop_late_seconds_bucket", le="0.5"
    )
    assert late >= 1


async def test_while_it_starts_it_is_alive_and_not_ready(fragile: Cluster) -> None:
    port = free_port()
    fragile.nats.freeze()
    daemon = fragile.another(config={"http": {"port": port}, "nats": {"connect_timeout_seconds": 600}})
    await daemon.start(ready=False)

    async def ask(path: str) -> tuple[int, bytes]:
        answer = await http_get(port, path)
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]

    async def listening() -> bool:
        with contextlib.suppress(IndexError):  # no answer yet
            return (await ask("/livez"))[0] == 200
        return False

    await eventually(listening, 30)
    assert [(await ask(path))[0] for path in ("/readyz", "/health", "/healthz", "/metrics")] == [503, 503, 503, 200]
    health = json.loads((await ask("/health"))[1])
    assert health["status"] == "starting" and health["not_ready"][0] == "starting"
    assert health["dependencies"]["nats"]["state"] == "disconnected"
    fragile.nats.thaw()

    async def ready() -> bool:
        return (await ask("/readyz"))[0] == 200

    await eventually(ready, 30)


# -- what residents depend on ------------------------------------------------------------------------------------------


async def test_what_a_resident_depends_on_is_told_with_its_own_state(cluster: Cluster) -> None:
    daemon = await cluster.daemon(**TALKATIVE)
    await cluster.ask("lean", "a", component="talkative", on="warehouse")
    assert (await dependency(daemon, "warehouse"))["state"] == "connected"
    await cluster.ask("lean", "a", component="talkative", on="warehouse", trouble="it burns; token=canary-1234")
    found = await dependency(daemon, "warehouse")
    assert (found["state"], found["up"], found["detail"]) == ("unreachable", False, "it burns; token=[redacted]")
    assert found["heard_s"] < 10
    assert await daemon.metric("if_dependency_up", dependency="warehouse") == 0
    health = await daemon.health()
    assert health["status"] == "healthy"
    assert "warehouse is unreachable: it burns; token=[redacted]" in health["warnings"]


async def test_an_actor_that_was_started_again_says_how_often_and_why_last(cluster: Cluster) -> None:
    daemon = await cluster.daemon(**TALKATIVE)
    await cluster.ask("fall", "a", component="talkative", why="tired, with password=canary")

    async def again() -> dict[str, Any] | None:
        residents = next(one for one in (await daemon.health())["actors"]["children"] if one["name"] == "residents")
        (one,) = residents["children"]
        return one if one["restarts"] and one["state"] == "running" else None

    found = await eventually(again)
    assert (found["restarts"], found["reason"]) == (1, "tired, with password=[redacted]")
    assert await daemon.metric("if_actor_restarts_total", actor="talkative:Talkative") == 1


@pytest.fixture
def vault() -> Iterator[VaultStub]:
    made = VaultStub(monotonic)
    made.secrets["secret/data/llm"] = {"api_key": "sk-canary-of-the-provider"}
    yield made
    made.close()


@pytest.fixture
async def provider() -> AsyncIterator[Site]:
    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"{}", "200 OK", "Content-Type: application/json"))

    async with Site(by_path(rest=echo)) as site:
        yield site


def sandboxes(provider: Site, vault: VaultStub, folder: Path) -> dict[str, Any]:
    """The configuration of a chassis whose guests call with a secret of Vault's, read again for each call."""
    (folder / "vault-token").write_text(vault.root + "\n")
    credential = {"vault_path": "secret/data/llm", "field": "api_key"}
    return {
        "endpoints": {"llm": {"url": provider.url, "networks": ["127.0.0.0/8"], "credential": credential}},
        "credentials": {
            "vault_addr": vault.url, "vault_token_path": str(folder / "vault-token"), "timeout_seconds": 0.5,
            "cache_seconds": 0.001,
        },
    }  # fmt: skip


async def fetch(cluster: Cluster, module: str) -> dict[str, Any]:
    return await cluster.ask(
        "run", "a", component="chassis", timeout_s=20, module=module, args=["llm", "GET", "/x"], endpoints=["llm"]
    )


async def put_fetch(cluster: Cluster) -> str:
    wasm = base64.b64encode(guest("fetch")).decode()
    module: str = (await cluster.ask("put", "a", component="chassis", timeout_s=30, wasm=wasm))["module"]
    return module


async def test_vault_is_unused_then_connected_then_unreachable_and_back(
    cluster: Cluster, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    config = {"chassis": sandboxes(provider, vault, tmp_path), "actors": ["chassis", "governor"]}
    daemon = await cluster.daemon(config=config)
    found = await dependency(daemon, "vault")
    assert (found["state"], found["detail"]) == ("unused", "nothing has asked it for a secret yet")
    module = await put_fetch(cluster)
    assert (await fetch(cluster, module))["exit_code"] == 0
    found = await until_state(daemon, "vault", "connected")
    assert found["up"] and found["heard_s"] < 30
    vault.freeze()
    with pytest.raises(FabricError):
        await fetch(cluster, module)
    found = await until_state(daemon, "vault", "unreachable")
    assert not found["up"] and found["detail"] and found["means"].startswith("Sandboxes that call with a credential")
    assert await codes(daemon) == (200, 200, 200), "all else goes on"
    assert any(sentence.startswith("vault is unreachable") for sentence in (await daemon.health())["warnings"])
    assert await daemon.metric("if_dependency_up", dependency="vault") == 0
    vault.thaw()
    await fetch(cluster, module)
    await until_state(daemon, "vault", "connected")


# -- metrics of a real daemon ------------------------------------------------------------------------------------------


def promtool(page: str) -> subprocess.CompletedProcess[str]:
    with needed("promtool"):
        at = ROOT / ".tools/deploy/usr/bin/promtool"
        found = str(at) if at.exists() else shutil.which("promtool")
        if found is None:
            raise StartupError("not there: `just deploy-programs` fetches it")
    return subprocess.run([found, "check", "metrics"], input=page, capture_output=True, text=True, check=False)


HOSTILE = 'x"} 1\nif_ready 5\n# HELP if_ready \\ {forged="1"}'


async def test_the_page_of_a_real_daemon_is_what_promtool_wants_whatever_agents_call_things(cluster: Cluster) -> None:
    daemon = await cluster.daemon()
    before = {family.name for family in text_string_to_metric_families((await daemon.http("/metrics"))[1])}
    for verb, component, admin, body in (
        ("account", "governor", True, {"account": HOSTILE, "limit_micro_usd": 5}),
        ("admit", "governor", False, {"breaker": HOSTILE}),
        ("report", "governor", False, {"breaker": HOSTILE, "permit": "p", "outcome": "failure"}),
        ("submit", "coordinator", False, {"tasks": [{"id": HOSTILE}]}),
        ("hello", "coordinator", False, {"capabilities": [HOSTILE]}),
    ):
        with pytest.raises(BadRequest):
            await cluster.ask(verb, "a", component=component, admin=admin, **body)
    await cluster.ask("hello", "a")
    await cluster.ask("submit", "a", tasks=[{"id": "t.1", "title": HOSTILE}])
    await cluster.ask("claim", "a", task="t.1")
    page = (await daemon.http("/metrics"))[1]
    assert "forged" not in page
    assert {family.name for family in text_string_to_metric_families(page)} == before
    checked = promtool(page)
    assert checked.stderr.split("\n")[:-1] in ([], [ACCEPTED]), checked.stderr


#: the runbook's own name
ACCEPTED = 'if_chassis_sandbox_count non-histogram and non-summary metrics should not have "_count" suffix'


async def test_what_a_daemon_can_count_is_there_from_the_start_at_zero(cluster: Cluster) -> None:
    daemon = await cluster.daemon()
    page = (await daemon.http("/metrics"))[1]
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    series = {(sample.name, *sorted(sample.labels.items())) for sample in samples}
    verbs = {
        (sample.labels["actor"], sample.labels["verb"])
        for sample in samples
        if sample.name == "if_actor_messages_total"
    }
    assert {("coordinator", "claim"), ("governor", "reserve"), ("chassis", "run")} <= verbs
    for actor, verb in verbs:
        for outcome in ("ok", "refused", "error"):
            assert ("if_actor_messages_total", ("actor", actor), ("outcome", outcome), ("verb", verb)) in series
        assert ("if_actor_handling_seconds_count", ("actor", actor), ("verb", verb)) in series
    for actor in ("coordinator", "governor", "chassis"):
        for name in ("if_actor_mailbox_depth", "if_actor_in_flight", "if_actor_restarts_total"):
            assert (name, ("actor", actor)) in series
        for why in ("expired", "frozen", "bad_subject", "overloaded"):
            assert ("if_actor_dropped_total", ("actor", actor), ("why", why)) in series


async def test_the_runbooks_ports_and_path_answer_prometheus(cluster: Cluster) -> None:
    """9090, 9091 and 9092, as its three files have them; here at free ones."""
    ports = {name: free_port() for name in ("coordinator", "governor", "chassis")}
    config = {name: {"metrics": {"enabled": True, "port": port, "path": "/metrics"}} for name, port in ports.items()}
    daemon = await cluster.daemon(config=config)
    for port in ports.values():
        answer = await http_get(port, "/metrics")
        assert answer.startswith(b"HTTP/1.1 200") and b"if_coordinator_claims_total" in answer
    assert (await daemon.http("/metrics"))[0] == 200, "and 8080, which the runbook asks, too"
    for file, port in (("coordinator", 9090), ("governor", 9091), ("chassis", 9092)):
        text = (ROOT / f"config/{file}.production.yaml").read_text()
        assert f"port: {port}" in text
    assert MetricsPort().path == "/metrics"
