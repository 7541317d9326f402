"""What the README shows works as it stands there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ifabric import endpoints
from ifabric.board import read_board
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.client import Client
from ifabric.clock import SystemClock, monotonic
from ifabric.config_file import load
from tests.guests.build import guest

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PATIENCE_S = 20.0


def block(language: str, containing: str) -> str:
    """The one code block in that language that contains a text."""
    found = [body for of, body in BLOCKS if of == language and containing in body]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {containing!r}"
    return found[0]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[endpoints.Endpoints]:
    """A daemon that hosts all three actors and the README's own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "readme_echo.py").write_text(block("python", "class Echo(Actor)"))
    (folder / "c.yaml").write_text("http: {port: 0}\nactors: [coordinator, governor, chassis, 'readme_echo:Echo']\n")
    command = [sys.executable, "-m", "ifabric", "run", "-c", str(folder / "c.yaml"), "--state-dir", str(folder)]
    log = folder / "daemon.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=out, stderr=out)
    until = monotonic() + PATIENCE_S
    while (found := endpoints.read(folder)) is None:
        assert process.poll() is None and monotonic() < until, log.read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    yield found
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


async def test_the_agent_that_pays_is_charged_what_its_calls_cost(daemon: endpoints.Endpoints, tmp_path: Path) -> None:
    script = tmp_path / "pay.py"
    script.write_text(block("python", "asyncio.run(pay())"))
    async with Client.connect(daemon.nats, session="owner") as owner:
        await owner.submit([{"id": "M.1", "title": "one"}, {"id": "M.2", "title": "two"}])
        environment = {**os.environ, "IFABRIC_NATS": daemon.nats}
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, str(script)], env=environment, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0
        assert [(await owner.get(task)).result for task in ("M.1", "M.2")] == [{"text": "ONE"}, {"text": "TWO"}]
        (acme, research) = (await owner.balance("acme/research")).path
        assert (acme.spent, acme.held) == (research.spent, research.held) == (2 * 2 * 31_250, 0)


async def test_the_agent_that_runs_what_nobody_has_read_gets_its_output_and_its_limits(
    daemon: endpoints.Endpoints, tmp_path: Path
) -> None:
    (tmp_path / "tool.wasm").write_bytes(guest("echo"))
    (tmp_path / "sandbox.py").write_text(block("python", "asyncio.run(sandbox())"))
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "sandbox.py"], cwd=tmp_path, env={**os.environ, "IFABRIC_NATS": daemon.nats},
        timeout=PATIENCE_S, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "hello" in done.stdout
    assert "--shout" in done.stdout
    assert done.stdout.endswith("ended at its limit fuel\n")


def test_the_readmes_endpoint_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(block("yaml", "vault_path"))
    config, warnings = load([file], {})
    assert config.chassis.endpoints["openai"].credential is not None
    assert warnings == []


async def test_the_ten_line_worker_works_off_a_board(daemon: endpoints.Endpoints, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(block("python", "asyncio.run(main())"))
    async with Client.connect(daemon.nats, session="boss") as boss, boss.subscribe() as events:
        await boss.submit([{"id": "R.1", "title": "four"}, {"id": "R.2", "title": "seventeen chars  "}])
        worker = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "IFABRIC_NATS": daemon.nats})
        try:
            left = {"R.1", "R.2"}
            async for event in events:
                if event.event == "completed":
                    left.discard(event.task)
                if not left:
                    break
        finally:
            worker.kill()
            worker.wait()
        assert (await boss.get("R.1")).result == {"length": 4}
        assert (await boss.get("R.2")).result == {"length": 17}


async def test_the_readmes_actor_answers_any_nats_client(daemon: endpoints.Endpoints) -> None:
    bus = Nats(NatsSettings(servers=(daemon.nats,)), SystemClock())
    await bus.connect()
    answer = await bus.request("if.v1.echo.say.alice", json.dumps({"text": "hello"}).encode(), timeout_s=5)
    await bus.close()
    assert msgspec.json.decode(answer.data) == {"text": "hello", "by": "alice"}


def test_the_readmes_board_is_read_as_it_says() -> None:
    board = read_board(block("markdown", "P0.1.1"), format="md", filename="README.md")
    assert [task.id for task in board.tasks] == ["P0.1.0", "P0.1.1", "P0.2.1"]
    assert tuple(board.done) == ("P0.1.0",)
    parser, review = board.tasks[1], board.tasks[2]
    assert (parser.title, parser.needs, parser.depends_on, parser.priority) == (
        "Write the parser",
        ("rust", "wasm"),
        ("P0.1.0",),
        5,
    )
    assert (review.title, review.needs, review.depends_on, review.priority) == (
        "Review the code",
        ("review",),
        ("P0.1.1",),
        3,
    )


def test_every_verb_that_the_readme_names_exists() -> None:
    from ifabric.cli.app import GROUPS, VERBS

    verbs = {name for name, _, _ in VERBS}
    groups = "|".join(f"{name} " for name in GROUPS)
    named = re.findall(rf"^\s+ifabric ((?:{groups})?[a-z-]+)", TEXT, re.MULTILINE)
    assert named
    assert set(named) <= verbs
