"""The daemon as the machine sees it: a process with arguments, files, signals and an exit code."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ifabric import __version__, endpoints
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.embedded import free_port
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire import subjects

ELSEWHERE = Path(__file__).parent / "elsewhere"
WAIT_S = 30.0
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("IFABRIC", "COORDINATOR_"))}

Make = Callable[..., RealDaemon]


class Ran(NamedTuple):
    """What a process came to."""

    code: int
    said: str


async def run(*words: str, **environ: str) -> Ran:
    """`python -m ifabric` with those words, to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "ifabric", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=CLEAN | environ,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        out, _ = await process.communicate()
        raise AssertionError(f"it did not end; it said:\n{out.decode()}") from None
    assert process.returncode is not None
    return Ran(process.returncode, out.decode())


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await true():
            await asyncio.sleep(0.01)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
async def daemon(tmp_path: Path, etcd: RealServer, nats: RealServer) -> AsyncIterator[Make]:
    """Makes daemons on the session's servers, or on what a test gives instead."""
    made: list[RealDaemon] = []

    def make(config: dict[str, Any] | None = None, **options: Any) -> RealDaemon:
        where = {"etcd": [etcd.url], "nats": [nats.url]} | options
        made.append(RealDaemon(tmp_path / "state", config=config, **where))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
async def bus(nats: RealServer) -> AsyncIterator[Nats]:
    """What an agent has: a connection to NATS."""
    made = Nats(NatsSettings(servers=(nats.url,)), SystemClock())
    await made.connect()
    yield made
    await made.close()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# -- ready, and gone again -------------------------------------------------------------------------------------------


async def test_while_it_runs_a_private_file_says_where_it_is_and_at_the_end_it_is_gone(
    daemon: Make, tmp_path: Path, etcd: RealServer, nats: RealServer
) -> None:
    one = await daemon().start()
    file = tmp_path / "state" / "endpoints.json"
    said = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert said == {
        "nats": nats.url,
        "etcd": [etcd.url],
        "http": said["http"],
        "pid": one.pid,
        "version": __version__,
    }
    assert await one.ready() == (200, [])
    health = await one.health()
    assert (health["status"], health["etcd"], health["nats"]) == ("healthy", "connected", "connected")
    assert await one.metric("if_bus_connected") == 1

    refused = await run("run", "--state-dir", str(tmp_path / "state"))
    assert refused.code == 1
    assert f"another daemon runs with the state directory {tmp_path / 'state'}" in refused.said
    assert json.loads(file.read_text()) == said

    assert await one.terminate() == 0
    there = sorted(path.name for path in file.parent.iterdir())
    assert there == ["audit", "compiled", "daemon.log", "fabric.yaml", "lock"]
    assert list((file.parent / "audit").iterdir()) == [], "all of the audit has gone into the stream"
    assert [line["event"] for line in one.log()][-2:] == ["draining", "stopped"]


async def test_ctrl_c_ends_it_like_sigterm_and_what_a_dead_daemon_left_is_not_believed(
    daemon: Make, tmp_path: Path
) -> None:
    one = await daemon().start()
    await one.kill()
    assert (tmp_path / "state" / "endpoints.json").exists()
    assert endpoints.read(tmp_path / "state") is None
    await one.start()
    one.signal(signal.SIGINT)
    assert await one.wait() == 0
    assert not (tmp_path / "state" / "endpoints.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_it_starts_ends_it_with_0(
    daemon: Make, tmp_path: Path, black_hole: str, number: signal.Signals
) -> None:
    port = free_port()
    silent = black_hole.replace("http:", "nats:")
    one = daemon({"http": {"port": port}, "nats": {"connect_timeout_seconds": 600}}, nats=[silent])
    await one.start(ready=False)
    one.found = endpoints.Endpoints(nats="", etcd=(), http=f"http://127.0.0.1:{port}", pid=one.pid, version="")

    async def listening() -> bool:
        try:
            return (await one.http("/livez"))[0] == 200
        except OSError:
            assert one.running, one.log_text()
            return False

    await until(listening)
    status, missing = await one.ready()
    assert status == 503
    assert "nats is disconnected" in missing
    assert "bus is not running" in missing
    assert (await one.health())["status"] == "starting"
    one.signal(number)
    assert await one.wait() == 0
    assert not (tmp_path / "state" / "endpoints.json").exists()


async def test_while_draining_what_was_accepted_is_answered_and_readyz_says_so(
    daemon: Make, bus: Nats, tmp_path: Path
) -> None:
    one = await daemon(
        {"actors": ["neighbour:Neighbour"], "drain_timeout_seconds": 30}, environment={"PYTHONPATH": str(ELSEWHERE)}
    ).start()
    gate = tmp_path / "gate"
    subject = subjects.request("neighbour", "hold", "a-1")
    held = asyncio.create_task(bus.request(subject, json.dumps({"until": str(gate)}).encode(), timeout_s=WAIT_S))

    async def in_flight() -> bool:
        return await one.metric("if_actor_in_flight") == 1

    async def draining() -> bool:
        return (await one.ready())[1][:1] == ["draining"]

    await until(in_flight)
    one.signal(signal.SIGTERM)
    await until(draining)
    assert (await one.http("/readyz"))[0] == 503
    assert (await one.http("/health"))[0] == 503
    assert (await one.health())["status"] == "draining"
    assert (await one.http("/livez"))[0] == 200
    gate.touch()
    assert json.loads((await held).data)["motto"] == "held"
    assert await one.wait() == 0


# -- what keeps it from starting -------------------------------------------------------------------------------------


async def test_a_bad_configuration_ends_with_2_and_every_mistake_on_a_line(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.yaml", "http:\n  prot: 1\nnats: {servers: 5}\n")
    ran = await run("run", "--config", bad, "--state-dir", str(tmp_path / "state"))
    assert ran.code == 2
    assert f"{bad}:2: unknown key http.prot; did you mean `port`?" in ran.said
    assert f"{bad}:3: nats.servers: expected `array`, got `int`" in ran.said
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("actors: [cordinator]\n", "did you mean 'coordinator'?"),
        ("actors: ['nowhere.at:All']\n", "there is no module 'nowhere'"),
        ("coordinator: {logging: {output: /dev/null/x.log}}\n", "logging.output: cannot write /dev/null/x.log"),
    ],
)
async def test_a_configuration_that_names_what_is_not_there_ends_with_2(tmp_path: Path, text: str, says: str) -> None:
    servers = "nats: {servers: ['nats://127.0.0.1:1']}\nhttp: {port: 0}\n"
    environ = {"IFABRIC__COORDINATOR__ETCD__ENDPOINTS": "['http://127.0.0.1:1']"}
    config = write(tmp_path / "c.yaml", servers + text)
    ran = await run("run", "--config", config, "--state-dir", str(tmp_path / "state"), **environ)
    assert ran.code == 2, ran.said
    assert says in ran.said


async def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "file", "")
    ran = await run("run", "--state-dir", f"{file}/state")
    assert ran.code == 1
    assert f"cannot use the state directory {file}/state: Not a directory" in ran.said


async def test_an_etcd_that_does_not_answer_ends_with_3_and_is_named(daemon: Make, black_hole: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    one = daemon({"coordinator": {"etcd": {"timeout_seconds": 1}}}, etcd=[nobody, black_hole])
    await one.start(ready=False)
    assert await one.wait() == 3
    reason = one.log()[-1]["reason"]
    assert reason.startswith("no etcd answers: ")
    assert nobody in reason
    assert black_hole in reason


async def test_a_nats_that_does_not_answer_ends_with_3_and_is_named(daemon: Make) -> None:
    nobody = f"nats://127.0.0.1:{free_port()}"
    one = daemon({"nats": {"connect_timeout_seconds": 1}}, nats=[nobody])
    await one.start(ready=False)
    assert await one.wait() == 3
    assert one.log()[-1]["reason"].startswith(f"no NATS answers at {nobody}")


async def test_an_http_port_that_is_taken_ends_with_1_and_is_named(daemon: Make, black_hole: str) -> None:
    port = int(black_hole.rpartition(":")[2])
    one = daemon({"http": {"port": port}})
    await one.start(ready=False)
    assert await one.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in one.log()[-1]["reason"]


# -- residents from elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which the neighbour is installed, as pip would do it."""
    about = tmp_path / "site" / "neighbour-1.0.dist-info"
    about.mkdir(parents=True)
    write(about / "METADATA", "Metadata-Version: 2.1\nName: neighbour\nVersion: 1.0\n")
    write(about / "entry_points.txt", "[ifabric.actors]\nneighbour = neighbour:Neighbour\n")
    return {"PYTHONPATH": f"{ELSEWHERE}:{about.parent}"}


async def ask(bus: Nats, component: str, verb: str, **body: Any) -> dict[str, Any]:
    subject = subjects.request(component, verb, "a-1")
    answer = await bus.request(subject, json.dumps(body).encode(), timeout_s=WAIT_S)
    found: dict[str, Any] = json.loads(answer.data)
    return found


async def test_an_actor_that_crashes_is_started_again_alone_and_who_waits_gets_an_answer(
    daemon: Make, bus: Nats, installed: dict[str, str], tmp_path: Path
) -> None:
    config = {"actors": ["neighbour", "neighbour:Other"], "options": {"neighbour": {"motto": "from the config"}}}
    one = await daemon(config, environment=installed).start()
    assert await ask(bus, "neighbour", "say") == {"life": 1, "motto": "from the config"}
    assert await one.metric("if_actor_restarts_total", actor="neighbour") == 0
    held = [asyncio.create_task(ask(bus, "neighbour", "hold", until=str(tmp_path / "never"))) for _ in range(3)]

    async def in_flight() -> bool:
        return await one.metric("if_actor_in_flight", actor="neighbour") == 3

    await until(in_flight)
    assert (await ask(bus, "neighbour", "break"))["error"]["code"] == "internal"
    for answer in await asyncio.gather(*held):
        assert answer["error"]["code"] == "unavailable"
        assert answer["error"]["retryable"] is True
    assert (await ask(bus, "neighbour", "say"))["life"] == 2
    assert (await ask(bus, "other", "say"))["life"] == 1
    assert await one.metric("if_actor_restarts_total", actor="neighbour") == 1
    assert await one.metric("if_actor_restarts_total") == 1
    assert (await one.health())["status"] == "healthy"
    (again,) = [line for line in one.log() if line["event"] == "starting again"]
    assert (again["child"], again["branch"]) == ("neighbour", "residents")
    assert "the sums do not match" in again["reason"]


async def test_an_actor_that_cannot_start_keeps_the_daemon_from_starting_and_the_log_says_why(daemon: Make) -> None:
    config = {"actors": ["neighbour:Neighbour"], "options": {"neighbour": {"lives_max": 0}}}
    one = daemon(config, environment={"PYTHONPATH": str(ELSEWHERE)})
    await one.start(ready=False)
    assert await one.wait() == 1
    last = one.log()[-1]
    assert "there is no life 1" in last["reason"]
    assert "neighbour.py" in last["exception"]


async def test_an_actor_that_cannot_start_again_ends_the_process_with_1_and_the_reason(
    daemon: Make, bus: Nats, tmp_path: Path
) -> None:
    config = {"actors": ["neighbour:Neighbour", "neighbour:Other"], "options": {"neighbour": {"lives_max": 1}}}
    one = await daemon(config, environment={"PYTHONPATH": str(ELSEWHERE)}).start()
    assert (await ask(bus, "neighbour", "break"))["error"]["code"] == "internal"
    assert await one.wait() == 1
    (failed,) = [line for line in one.log() if line["event"] == "the fabric has failed"]
    assert "residents" in failed["reason"]
    assert "there is no life" in failed["reason"]
    assert not (tmp_path / "state" / "endpoints.json").exists()


@pytest.mark.slow
async def test_an_actor_that_crashes_again_and_again_ends_the_process_with_1_and_the_reason(
    daemon: Make, bus: Nats
) -> None:
    one = await daemon({"actors": ["neighbour:Neighbour"]}, environment={"PYTHONPATH": str(ELSEWHERE)}).start()
    subject = subjects.request("neighbour", "break", "a-1")

    async def poison() -> None:
        while one.running:
            await bus.publish(subject, b"{}")
            await asyncio.sleep(0.02)

    poisoning = asyncio.create_task(poison())
    assert await one.wait() == 1
    await poisoning
    (failed,) = [line for line in one.log() if line["event"] == "the fabric has failed"]
    assert "the sums do not match" in failed["reason"]
    assert "restarts within" in failed["reason"]
