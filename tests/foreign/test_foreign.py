"""A client that shares no line with the fabric: NATS's own JavaScript packages, and the protocol's text."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.errors import StartupError
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire.protocol import REQUESTS
from tests.conftest import needed

HERE = Path(__file__).parent
#: git-ignored; kept between runs as long as the lock is the same
MODULES = HERE.parent.parent / ".tools" / "node"


async def run(*command: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What the program says. A failure shows what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}:\n{err.decode()}{out.decode()}"
    return out.decode()


@pytest.fixture(scope="module")
async def modules() -> Path:
    """The folder with the packages, installed from the lock by name and digest."""
    with needed("the foreign client"):
        missing = [program for program in ("node", "npm") if shutil.which(program) is None]
        if missing:
            raise StartupError(f"no {' and no '.join(missing)} on PATH")
    lock = (HERE / "package-lock.json").read_bytes()
    done = MODULES / "installed.json"
    if not done.is_file() or done.read_bytes() != lock:
        MODULES.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, MODULES / name)
        await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=MODULES)
        done.write_bytes(lock)
    return MODULES


async def test_a_client_in_another_language_works_by_the_protocol_alone(
    etcd: RealServer, nats: RealServer, modules: Path, tmp_path: Path
) -> None:
    daemon = await RealDaemon(tmp_path, [etcd.url], [nats.url]).start()
    try:
        script = str(HERE / "client.mjs")
        said = await run("node", script, nats.url, cwd=tmp_path, environment={"FOREIGN_MODULES": str(modules)})
    finally:
        await daemon.close()
    seen: dict[str, Any] = msgspec.json.decode(said)

    (ping,), (info,), (stats,) = seen["ping"], seen["info"], seen["stats"]
    assert (ping["name"], ping["type"]) == ("coordinator", "io.nats.micro.v1.ping_response")
    assert ping["id"] == info["id"] == stats["id"]
    subjects = {endpoint["subject"] for endpoint in info["endpoints"]}
    assert subjects == {
        f"if.v1.{'admin.' if kind.admin else ''}coordinator.{kind.verb}.*"
        for kind in REQUESTS
        if kind.component == "coordinator"
    }
    counted = {endpoint["name"]: endpoint for endpoint in stats["endpoints"]}
    assert (counted["claim"]["num_requests"], counted["claim"]["num_errors"]) == (4, 2)
    assert counted["claim"]["average_processing_time"] > 0

    assert (seen["hello"]["session"], seen["hello"]["ttl_s"]) == ("js-one", 30)
    assert seen["submit"]["created"] == ["JS.1"]
    claim = seen["claim"]
    assert claim["spec"]["payload"] == {"say": "grüß 💥"}
    assert claim["fence"] == seen["hello"]["incarnation"] * 2**40 + 1
    assert seen["retried"]["fence"] == claim["fence"]
    taken = seen["taken"]
    assert (taken["code"], taken["header"]) == (409, "409")
    assert taken["sentence"] == taken["body"]["error"]["message"] == "task JS.1 is held by js-one"
    assert (taken["body"]["error"]["code"], taken["body"]["error"]["by"]) == ("claim_taken", "js-one")
    assert seen["renew"]["ttl_s"] == 30
    assert seen["limit"]["path"] == [{"account": "@js-one", "limit": 1000, "spent": 0, "held": 0, "available": 1000}]
    assert (seen["reserve"]["hold"], seen["reserve"]["path"][0]["held"]) == ("h1", 900)
    short = seen["short"]
    assert (short["code"], short["header"], short["body"]["error"]["code"]) == (403, "403", "budget_short")
    assert {name: short["body"]["error"][name] for name in ("account", "need", "have", "held")} == {
        "account": "@js-one",
        "need": 101,
        "have": 100,
        "held": 900,
    }
    assert {name: seen["commit"][name] for name in ("charged", "late", "overdraft")} == {
        "charged": 250,
        "late": False,
        "overdraft": 0,
    }
    assert (seen["admit"]["state"], seen["report"]) == ("closed", {"state": "closed"})
    ranked = {one["session"]: one for one in seen["match"]["ranked"]}
    assert (ranked["js-one"]["matches"], ranked["js-two"]["missing"]) == (True, ["wasm"])
    assert (seen["late"]["code"], seen["late"]["body"]["error"]["code"]) == (503, "deadline_exceeded")
    assert (seen["wrong"]["code"], seen["wrong"]["body"]["error"]["code"]) == (409, "claim_lost")
    assert seen["complete"]["state"] == "done"
    assert (seen["get"]["state"], seen["get"]["result"]) == ("done", [1, 2.5])
    assert (seen["malformed"]["code"], seen["malformed"]["body"]["error"]["code"]) == (400, "bad_request")
    assert seen["purge"]["state"] == "done"
    assert [bye.get("released", []) for bye in seen["bye"]] == [[], []]
