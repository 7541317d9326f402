"""A real Prometheus, with the rules that are shipped, at the pace of a test."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import yaml

from ifabric.clock import SystemClock
from ifabric.embedded import Server, free_port, http_get
from ifabric.errors import StartupError
from ifabric.programs import Program
from tests.conftest import needed
from tests.system.conftest import eventually
from tests.system.deployment import DEPLOY, ROOT

MONITORING = DEPLOY / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))
PROGRAMS = ROOT / ".tools/deploy/usr/bin"
#: what replaces every window of the shipped rules, and every `for`
WINDOW, FOR = "10s", "1s"
FABRIC = "https://fabric.example:8080"


def tool(name: str) -> str:
    """Of Debian's unstable suite, or on PATH. Missing: skipped on a laptop, an error in CI."""
    with needed(name):
        if (PROGRAMS / name).exists():
            return str(PROGRAMS / name)
        if (found := shutil.which(name)) is None:
            raise StartupError("not there: `just deploy-programs` fetches it")
    return found


def shipped() -> dict[str, dict[str, Any]]:
    """The alerts that are shipped, by name."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    found = {rule["alert"]: rule for rule in rules}
    assert len(found) == len(rules), "two alerts have one name"
    return found


@cache
def recorded() -> set[str]:
    """The names that the shipped rules record."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def hurried(text: str) -> str:
    """A file of rules with the shipped expressions, and nothing changed but how long they look back and wait."""
    text, windows = re.subn(r"\[\d+[smhd]\]", f"[{WINDOW}]", text)
    text, waits = re.subn(r"^( +)for: \d+[smhd]$", rf"\1for: {FOR}", text, flags=re.MULTILINE)
    assert windows or waits
    assert not re.search(r"\[\d+[mhd]\]|for: \d+[mhd]", text), "a window or a wait was overlooked"
    return text


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=10.0)

    async def close(self) -> None:
        await self._http.aclose()

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression returns now. What does not parse is an AssertionError."""
        answer = (await self._http.post("/api/v1/query", data={"query": expression})).json()
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        result = answer["data"]["result"]
        return result if answer["data"]["resultType"] == "vector" else [{"metric": {}, "value": result}]

    async def value(self, expression: str) -> float | None:
        """Of the first series; None when there is none."""
        found = await self.query(expression)
        return float(found[0]["value"][1]) if found else None

    async def firing(self) -> dict[str, list[dict[str, Any]]]:
        """The alerts that fire now, by name: labels and annotations."""
        alerts = (await self._http.get("/api/v1/alerts")).json()["data"]["alerts"]
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in alerts:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    async def fires(self, name: str, within_s: float = 60.0) -> dict[str, Any]:
        """The alert, once it fires. `TimeoutError` when it does not."""

        async def found() -> list[dict[str, Any]]:
            return (await self.firing()).get(name, [])

        alerts: list[dict[str, Any]] = await eventually(found, within_s)
        return alerts[0]

    async def resolves(self, name: str, within_s: float = 90.0) -> None:
        """Returns when the alert does not fire any more."""

        async def gone() -> bool:
            return name not in await self.firing()

        await eventually(gone, within_s)

    async def targets(self) -> dict[str, str]:
        """How each target is: its address -> up, down or unknown."""
        active = (await self._http.get("/api/v1/targets")).json()["data"]["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in active}


@contextlib.asynccontextmanager
async def prometheus(folder: Path, jobs: Mapping[str, Sequence[str]]) -> AsyncIterator[Prometheus]:
    """One that scrapes these targets every second, over http, and evaluates the shipped rules as often.

    `jobs`: a job of the shipped configuration -> host:port of each target.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    names = [job["job_name"] for job in config["scrape_configs"]]
    assert set(jobs) <= set(names), "a job that is not shipped"
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s", "external_labels": {"ifabric": FABRIC}}
    config["rule_files"] = [str(folder / "rules/*.yml")]
    config["scrape_configs"] = [
        {"job_name": job, "metrics_path": "/metrics", "static_configs": [{"targets": list(jobs[job])}]}
        for job in names
        if job in jobs
    ]
    del config["alerting"]
    (folder / "rules").mkdir(parents=True)
    for path in RULES:
        (folder / "rules" / path.name).write_text(hurried(path.read_text()))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()

    async def ready() -> bool:
        return b" 200 " in (await http_get(port, "/-/ready"))[:20]

    server = Server(
        Program(tool("prometheus"), (0, 0, 0), "deploy-programs"),
        [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        folder / "prometheus.log",
        ready,
        SystemClock(),
    )
    await server.start()
    client = Prometheus(f"http://127.0.0.1:{port}")
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


def target(url: str) -> str:
    """host:port of a URL."""
    return url.rpartition("//")[2]
