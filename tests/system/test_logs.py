"""The log of a real daemon: rotated under its feet, flooded, and with secrets all around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.errors import FabricError
from ifabric.pki import Authority
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import subjects
from ifabric.wire.envelope import TRACE_HEADER
from tests.actors.test_egress import Site
from tests.actors.vault_stub import VaultStub
from tests.system.conftest import Cluster, eventually
from tests.system.test_health import ELSEWHERE, fetch, provider, put_fetch, sandboxes, vault

__all__ = ["provider", "vault"]

TALKATIVE = "talkative:Talkative"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def tell(cluster: Cluster, session: str = "a", **body: Any) -> None:
    with pytest.raises(FabricError):  # it fails in the end, on purpose
        await cluster.ask("tell", session, component="talkative", **body)


def logging_to(path: Path, **more: Any) -> dict[str, Any]:
    section = {"output": str(path), "level": "DEBUG", "format": "json", **more}
    return {"config": {"actors": [TALKATIVE], "coordinator": {"logging": section}}, **ELSEWHERE}


async def test_each_line_of_a_message_says_whose_it_is_and_others_do_not(cluster: Cluster, tmp_path: Path) -> None:
    daemon = await cluster.daemon(**logging_to(tmp_path / "fabric.log"))
    subject = subjects.request("talkative", "tell", "agent-7")
    body = msgspec.json.encode({"what": "a story"})
    headers = {TRACE_HEADER: f"00-{TRACE}-00f067aa0ba902b7-01"}
    await cluster.bus.request(subject, body, timeout_s=5, headers=headers)
    assert await daemon.terminate() == 0
    told = entries(tmp_path / "fabric.log")
    whose = {"session": "agent-7", "verb": "tell", "trace": TRACE, "actor": "talkative"}
    of_it = [entry for entry in told if "a story" in json.dumps(entry)]
    assert len(of_it) == 6, "the resident's, a library's, the loop's, and the runner's"
    for entry in of_it:
        assert whose.items() <= entry.items(), entry
    for entry in told:
        if entry["event"] in ("ready", "draining", "stopped"):
            assert not {"session", "verb", "trace"} & entry.keys()


async def test_a_file_is_rotated_by_a_signal_and_no_line_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "fabric.log"
    daemon = await cluster.daemon(**logging_to(path, repeats_per_minute=0))
    stop = asyncio.Event()
    asked = 0

    async def ask() -> None:
        nonlocal asked
        while not stop.is_set():
            await tell(cluster, what=f"line {asked}")
            asked += 1

    asking = asyncio.create_task(ask())
    for number in range(1, 4):
        before = asked

        async def more(before: int = before) -> bool:
            return asked > before + 3

        await eventually(more)
        path.rename(tmp_path / f"fabric.log.{number}")
        daemon.signal(signal.SIGHUP)
        await eventually(lambda: there(path))
    stop.set()
    await asking
    assert await daemon.terminate() == 0
    files = [*(tmp_path / f"fabric.log.{number}" for number in range(1, 4)), path]
    told = [entry for file in files for entry in entries(file)]
    for number in range(asked):
        assert sum(entry.get("what") == f"line {number}" for entry in told) == 1
    assert all(any(entry.get("what") for entry in entries(file)) for file in files[:3])


async def there(path: Path) -> bool:
    return path.exists()


async def test_a_file_is_rotated_without_any_signal(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "fabric.log"
    await cluster.daemon(**logging_to(path, repeats_per_minute=0))
    path.rename(tmp_path / "fabric.log.1")

    async def opened_again() -> bool:
        await tell(cluster, what="x")
        return path.exists() and bool(entries(path))

    await eventually(opened_again)
    assert {entry["event"] for entry in entries(tmp_path / "fabric.log.1")} >= {"ready"}


async def test_a_flood_is_written_so_often_and_then_counted_to_the_end(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "fabric.log"
    daemon = await cluster.daemon(**logging_to(path, repeats_per_minute=5))
    await tell(cluster, what="again", times=1000)
    assert await daemon.metric("if_log_held_back_total") == 995
    assert await daemon.metric("if_log_lost_total") == 0
    assert await daemon.terminate() == 0
    told = [entry for entry in entries(path) if "telling" in (entry["event"], entry.get("of"))]
    assert [entry["event"] for entry in told] == ["telling"] * 5 + ["said again"]
    assert (told[-1]["times"], told[-1]["level"], told[-1]["actor"]) == (995, "debug", "talkative")
    assert told[-1]["from"].startswith("talkative:")


async def test_a_daemon_whose_stderr_is_the_journal_says_how_bad_each_line_is(cluster: Cluster, tmp_path: Path) -> None:
    config = {
        "http": {"port": 0},
        "actors": [TALKATIVE],
        "coordinator": {"etcd": {"endpoints": [cluster.etcd.url]}, "logging": {"level": "DEBUG"}},
        "nats": {"servers": [cluster.nats.url]},
    }
    (tmp_path / "fabric.yaml").write_text(json.dumps(config))
    journal = tmp_path / "journal"
    with journal.open("wb") as stream:
        found = os.fstat(stream.fileno())
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "ifabric",
                "run",
                "-c",
                str(tmp_path / "fabric.yaml"),
                "--state-dir",
                str(tmp_path),
            ),
            stderr=stream,
            env={**os.environ, **ELSEWHERE["environment"], "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"},
        )
    try:

        async def ready() -> bool:
            return b'"ready"' in journal.read_bytes()

        await eventually(ready, 30)
        await tell(cluster, what="x")
    finally:
        process.terminate()
        await process.wait()
    lines = journal.read_text().splitlines()
    priorities = {json.loads(line[3:])["level"]: line[:3] for line in lines}
    assert priorities == {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}


SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
#: kinds of secrets, each with a part that nobody may be shown
CANARIES = {
    "nkey seed": (SEED, SEED[10:40]),
    "age key": ("AGE-SECRET-KEY-1CANARYAGEQQQQQQQQQQQQQQQQQ", "CANARYAGE"),
    "Vault token": ("hvs.canaryvaulttoken0123456789", "canaryvaulttoken"),
    "old Vault token": ("s.canaryoldvault0123456789", "canaryoldvault"),
    "operator's token": ("Bearer canary-operator-token-0123456789", "canary-operator"),
    "provider's key": ("sk-canary-of-the-provider", "canary-of-the-provider"),
    "password": ("nats://ann:canarypassword@nats-1:4222", "canarypassword"),
    "assigned": ("token=canaryassigned", "canaryassigned"),
}


async def test_secrets_planted_everywhere_are_in_no_log_no_health_and_no_metric(
    cluster: Cluster, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    """In its files, in Vault, in requests with and without permission, in an actor's own lines, errors and crash."""
    pem, output = Authority.create().pair.key.decode(), tmp_path / "fabric.log"
    canaries = {**CANARIES, "private key": (pem, pem.splitlines()[1])}
    token, key = canaries["operator's token"][0].removeprefix("Bearer "), canaries["Vault token"][0]
    vault.tokens[key] = vault.tokens[vault.root]
    (tmp_path / "daemon.nk").write_text(SEED + "\n")
    (tmp_path / "operator").write_text(token + "\n")
    section = sandboxes(provider, vault, tmp_path)
    (tmp_path / "vault-token").write_text(key + "\n")
    daemon = await cluster.daemon(
        config={
            "actors": ["coordinator", "governor", "chassis", TALKATIVE],
            "chassis": section,
            "nats": {"nkey_seed_file": str(tmp_path / "daemon.nk")},
            "page": {"operators": {"ann": str(tmp_path / "operator")}},
            "coordinator": {"logging": {"output": str(output), "level": "DEBUG", "repeats_per_minute": 0}},
        },
        **ELSEWHERE,
    )
    module = await put_fetch(cluster)
    assert (await fetch(cluster, module))["exit_code"] == 0
    shown: list[str] = []
    for name, (secret, part) in canaries.items():
        await tell(cluster, what=secret)
        with pytest.raises(FabricError):
            await cluster.ask("submit", "a", tasks=[{"id": secret + "\n", secret: secret}])
        await posted(daemon, "/api/actions/cancel", secret, {"task": secret})
        await posted(daemon, "/api/actions/cancel", f"Bearer {part}", {"task": secret})
        await cluster.ask("lean", "a", component="talkative", on="warehouse", trouble=f"it said {secret}")
        shown += [(await daemon.http(path))[1] for path in ("/health", "/healthz", "/readyz", "/metrics")]
        assert "it said " in shown[-4], name
    await posted(daemon, "/api/actions/cancel", f"Bearer {token}", {"task": "t"})
    vault.instead = (403, {"errors": [f"no: {key}"]}, {})
    with pytest.raises(FabricError):
        await fetch(cluster, module)
    await cluster.ask("fall", "a", component="talkative", why=f"it knows {' '.join(s for s, _ in canaries.values())}")

    async def fell() -> bool:
        shown.append((await daemon.http("/health"))[1])
        return "it knows" in shown[-1]

    await eventually(fell)
    assert await daemon.terminate() == 0
    log = output.read_text() + daemon.log_text()
    assert log.count("[redacted]") >= 8 * len(canaries), "it was said, and again and again"
    hits = {name: part for name, (_, part) in canaries.items() if part in log or any(part in page for page in shown)}
    assert hits == {}


async def posted(daemon: RealDaemon, path: str, authorization: str, body: dict[str, Any]) -> str:
    """What a POST is answered: the head and the body."""
    assert daemon.found is not None
    _, _, port = daemon.found.http.rpartition(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    data = json.dumps(body).encode()
    header = authorization.replace("\n", " ")
    writer.write(
        f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: {header}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer.decode()
