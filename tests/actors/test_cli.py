"""The command line, as its users meet it: a process, its two streams and its exit code, against a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ifabric import endpoints
from ifabric.cli import main
from ifabric.cli.app import VERBS
from ifabric.cli.demo import _kill
from ifabric.cli.holding import _value
from ifabric.cli.output import out, plain
from ifabric.cli.task import usd
from ifabric.cli.verdict import Held
from ifabric.clock import monotonic
from ifabric.errors import BadRequest, StartupError
from ifabric.programs import find_etcd, find_nats_server
from ifabric.wire import coordinator as wire

WAIT_S = 30.0
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("IFABRIC", "COORDINATOR_", "NO_COLOR", "FORCE"))
}


class Ran(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def start(*words: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ifabric", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN | environ,
    )


def run(*words: str, stdin: str | None = None, **environ: str) -> Ran:
    with start(*words, **environ) as process:
        try:
            out, err = process.communicate(stdin, WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Ran(process.returncode, out, err)


def in_process(capsys: pytest.CaptureFixture[str], *words: str) -> Ran:
    """A command that needs no loop of its own."""
    code = main(words)
    return Ran(code, *capsys.readouterr())


Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a running daemon."""
    try:
        find_etcd(), find_nats_server()
    except StartupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    state = tmp_path_factory.mktemp("cli")
    config = state / "c.yaml"
    config.write_text("http: {port: 0}\n")
    with start("run", "--config", str(config), "--state-dir", str(state)) as daemon:
        until = monotonic() + WAIT_S
        try:
            while endpoints.read(state) is None:
                assert daemon.poll() is None and monotonic() < until, daemon.communicate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(0.02)
            # its log must not fill the pipe
            threading.Thread(target=lambda: list(daemon.stderr or ()), daemon=True).start()
            yield state
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(WAIT_S) == 0
        finally:
            daemon.kill()


@pytest.fixture(scope="module")
def cli(folder: Path) -> Cli:
    """A command that finds the daemon."""

    def ask(*words: str, stdin: str | None = None, **environ: str) -> Ran:
        return run(*words, "--state-dir", str(folder), stdin=stdin, **environ)

    return ask


@pytest.fixture
def tasks(cli: Cli, request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Puts tasks on the board, with ids that no other test has."""
    mark = re.sub(r"[^a-z0-9]", "", request.node.name.lower())[-40:]

    def load(*items: str) -> list[str]:
        text = "".join(f"- [ ] {mark}.{number} {item}\n" for number, item in enumerate(items))
        done = cli("board", "load", "-", "--format", "md", stdin=text)
        assert done.code == 0, done.err
        return [f"{mark}.{number}" for number in range(len(items))]

    return load


# -- what needs no daemon --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["task", "--help"], ["task", "claim", "--help"], ["status", "--help"]]
)
def test_asking_what_there_is_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        f"import sys\nfrom ifabric.cli import main\nassert main({words!r}) == 0\n"
        "print(sorted({'nats', 'grpc', 'aetcd', 'uvloop', 'markdown_it', 'yaml', 'starlette', 'cryptography'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=CLEAN, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", [name for name, _, _ in VERBS])
def test_the_help_of_each_verb_is_its_own_and_takes_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *verb.split(), "--help")
    assert done.code == 0
    assert f"Usage: ifabric {verb}" in done.out
    assert ("--json" in done.out) == (verb != "run")
    assert "--no-json" not in done.out


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ifabric task claim P0.1.5 --session alice" in in_process(capsys, "task", "claim", "--help").out
    assert "ifabric board load TASKS.md" in in_process(capsys, "--help").out


@pytest.mark.parametrize(
    "words",
    [
        ["nosuch"],
        ["task", "nosuch"],
        ["task", "claim", "a1"],
        ["task", "list", "--state", "weird"],
        ["task", "list", "--limit", "0"],
        ["task", "claim", "a1", "--session", "x", "--ttl", "1"],
        ["task", "claim", "a1", "--session", "sp ace"],
        ["board", "load", "/nonexistent.md"],
        ["board", "load", "/nonexistent"],
        ["--nosuch"],
        ["--config", "/nonexistent.yaml"],
        ["check-config", "/nonexistent.yaml"],
    ],
)
def test_usage_and_configuration_errors_are_2_and_say_why(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *words)
    assert done.code == 2
    assert done.err.strip() and not done.out
    assert "Traceback" not in done.err


def test_without_a_verb_it_runs_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    with_verb = in_process(capsys, "run", "--config", "/nonexistent.yaml")
    assert in_process(capsys, "--config", "/nonexistent.yaml") == with_verb
    assert "/nonexistent.yaml: cannot be read" in with_verb.err


def test_completion_is_a_flag_of_the_program_and_not_of_run(tmp_path: Path) -> None:
    done = run("--install-completion", "--shell", "bash", "--output", str(tmp_path / "c"), HOME=str(tmp_path))
    assert done.code == 0, done.err
    assert "ifabric" in (tmp_path / "c").read_text()


@pytest.mark.parametrize(
    "words", [["task", "list"], ["svc", "ls"], ["watch"], ["smoke"], ["status"], ["task", "next", "-s", "x"]]
)
def test_nobody_there_is_3_and_says_what_to_do(words: list[str], tmp_path: Path) -> None:
    done = run(*words, "--state-dir", str(tmp_path))
    assert done.code == 3
    assert re.fullmatch(r"error: no daemon runs .* `ifabric run`.*\n", done.err)
    if words != ["status"]:
        done = run(*words, "--timeout", "0.5", "--nats", "nats://127.0.0.1:1")
        assert done.code == 3
        assert "127.0.0.1:1" in done.err and "Traceback" not in done.err


def test_an_error_is_json_too_when_json_was_asked_for(tmp_path: Path) -> None:
    done = run("task", "list", "--json", "--state-dir", str(tmp_path))
    assert done.code == 3
    assert "no daemon runs" in done.json["error"]["message"]


def test_a_bug_is_one_sentence_and_a_traceback_only_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ifabric.asyncapi.document", broken)
    monkeypatch.delenv("IFABRIC_DEBUG", raising=False)
    done = in_process(capsys, "asyncapi")
    assert done.code == 1
    assert done.err == "error: a bug in ifabric: ZeroDivisionError: by zero (IFABRIC_DEBUG=1 shows where)\n"
    monkeypatch.setenv("IFABRIC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["asyncapi"])


def test_a_reader_who_has_seen_enough_is_no_reason_for_a_traceback() -> None:
    with start("asyncapi") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(WAIT_S) == 1


def test_check_config_names_file_line_and_what_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("http:\n  port: 8080\n  hots: x\n")
    done = in_process(capsys, "check-config", str(bad))
    assert done.code == 2
    assert f"{bad}:3: unknown key http.hots; did you mean `host`?" in done.err
    errors = json.loads(in_process(capsys, "check-config", str(bad), "--json").out)
    assert errors["ok"] is False and len(errors["errors"]) == 1
    bad.write_text("http: {host: 0.0.0.0}\n")
    done = in_process(capsys, "check-config", str(bad))
    assert done.code == 0
    assert "! http.host: 0.0.0.0 is reachable" in done.out


def test_a_dry_run_reads_and_checks_and_needs_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = tmp_path / "b.md"
    board.write_text("- [x] a1 one\n- [ ] Two\n")
    done = in_process(capsys, "board", "load", str(board), "--dry-run")
    assert (done.code, done.out) == (0, "✔ 2 task(s) would be loaded, 1 of them done\n")
    assert "two has no id; it is loaded as two" in done.err
    board.write_text("- [ ] a1 {priority: soon}\n- [ ] a1 {depends: zz}\n")
    done = in_process(capsys, "board", "load", str(board), "--dry-run", "--json")
    assert done.code == 2
    assert [line.split(": ")[0] for line in done.json["errors"]] == [f"{board}:1", f"{board}:2"]


def test_asyncapi_is_printed_as_yaml_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "asyncapi").out.startswith("asyncapi: 3.0.0\n")
    assert in_process(capsys, "asyncapi", "--json").json["asyncapi"] == "3.0.0"


def test_somebody_elses_text_is_shown_and_not_obeyed() -> None:
    assert out.render_str(plain("a\x1b[31m[red]b\nc\x9b[/]")).plain == "a\\x1b[31m[red]b c\\x9b[/]"


@pytest.mark.parametrize(("micro_usd", "said"), [(0, "0.00 USD"), (1_500_000, "1.50 USD"), (1, "0.000001 USD")])
def test_money_is_shown_exactly(micro_usd: int, said: str) -> None:
    assert usd(micro_usd) == said


def test_a_result_is_json_or_text_and_never_broken_json() -> None:
    assert (_value(None), _value('{"a": [1]}'), _value("well done"), _value("7")) == (None, {"a": [1]}, "well done", 7)
    with pytest.raises(BadRequest, match="looks like JSON"):
        _value('{"a": ')


# -- against a daemon ------------------------------------------------------------------------------------------------


def test_a_claim_outlives_the_command_until_its_holder_ends_it(cli: Cli, tasks: Callable[..., list[str]]) -> None:
    one, two = tasks("first", "second")
    taken = cli("task", "claim", one, "--session", "alice", "--ttl", "120")
    assert taken.code == 0
    assert re.search(rf"alice holds {re.escape(one)} under fence \d+ for 120 s, attempt 1", taken.out)
    assert re.search(rf"ifabric task complete {re.escape(one)} --session alice --fence \d+ --state-dir /", taken.out)

    refused = cli("task", "claim", one, "--session", "bob", "--json")
    assert refused.code == 1
    assert refused.json["error"]["code"] == "claim_taken"
    assert refused.json["error"]["by"] == "alice"
    assert refused.err.startswith("error: ")

    again = cli("task", "claim", one, IFABRIC_SESSION="alice")
    assert again.code == 0 and "still holds" in again.out
    renewed = cli("task", "renew", "--session", "alice", "--json").json
    assert [held["task"] for held in renewed["held"]] == [one]

    fence = renewed["held"][0]["fence"]
    stale = cli("task", "complete", one, "--session", "alice", "--fence", str(fence - 1), "--json")
    assert (stale.code, stale.json["error"]["code"]) == (1, "claim_lost")
    stolen = cli("task", "complete", one, "--session", "bob", "--json")
    assert (stolen.code, stolen.json["error"]["code"]) == (1, "claim_lost")
    done = cli("task", "complete", one, "--session", "alice", "--fence", str(fence), "--result", '{"a": 1}')
    assert (done.code, done.out) == (0, f"✔ {one} is done\n")
    found = cli("task", "show", one, "--json").json
    assert (found["state"], found["result"]) == ("done", {"a": 1})
    assert [line["event"] for line in found["history"]] == ["submitted", "claimed", "completed"]
    assert cli("task", "show", two).out.startswith(f"{two} pending  second\n")


def test_next_takes_what_the_session_can_do_and_failing_it_costs_an_attempt(
    cli: Cli, tasks: Callable[..., list[str]]
) -> None:
    (one,) = tasks("paint {needs: brush-x, paint-x; attempts: 2}")
    nothing = cli("task", "next", "-s", "carol", "--capabilities", "nothing-x", "--json")
    assert nothing.code == 1 or nothing.json["task"] != one
    taken = cli("task", "next", "-s", "dave", "--capabilities", "brush-x,paint-x", "--json").json
    while taken["task"] != one:  # other tests leave pending tasks that anybody can do
        taken = cli(
            "task", "next", "-s", "dave", "--capabilities", "brush-x", "--capabilities", "paint-x", "--json"
        ).json
    released = cli("task", "release", one, "-s", "dave", "--reason", "lunch")
    assert (released.code, released.out) == (0, f"✔ {one} is pending\n")
    cli("task", "claim", one, "-s", "dave", "--capabilities", "brush-x,paint-x")
    failed = cli("task", "fail", one, "no brush", "-s", "dave")
    assert failed.out == f"✔ {one} is pending, after attempt 1 of 2\n"
    cli("task", "claim", one, "-s", "dave", "--capabilities", "brush-x,paint-x")
    dead = cli("task", "fail", one, "no paint", "-s", "dave", "--no-retry", "--json").json
    assert dead["state"] == "dead"
    assert "no paint" in cli("task", "show", one).out


def test_operators_cancel_requeue_and_purge(cli: Cli, tasks: Callable[..., list[str]]) -> None:
    (one,) = tasks("thing")
    assert cli("task", "cancel", one).out == f"✔ {one} is cancelled\n"
    assert cli("task", "requeue", one).out == f"✔ {one} is pending\n"
    refused = cli("task", "purge", one)
    assert refused.code == 1 and refused.err.startswith("error: ")
    cli("task", "cancel", one)
    assert cli("task", "purge", one).out == f"✔ {one} is deleted; it was cancelled\n"
    gone = cli("task", "show", one)
    assert (gone.code, gone.err) == (1, f"error: there is no task {one}\n")


def test_loading_a_board_twice_changes_nothing_and_a_conflict_names_what_differs(cli: Cli, tmp_path: Path) -> None:
    board = tmp_path / "b.md"
    rows = [f"- [ ] big.{n:03} task {n} {{depends: big.{n - 1:03}}}\n" for n in range(1, 250)]
    board.write_text("".join(reversed(rows)) + "- [x] big.000 start\n")
    first = cli("board", "load", str(board), "--json").json
    assert (first["created"], first["existing"], first["done"]) == (250, 0, 1)
    again = cli("board", "load", str(board))
    assert again.out == "✔ 0 task(s) loaded, 250 there already; 1 on the board are checked as done\n"
    assert cli("task", "show", "big.000", "--json").json["state"] == "done"
    assert cli("task", "show", "big.001", "--json").json["state"] == "pending"
    assert cli("task", "show", "big.249", "--json").json["waiting_for"] == ["big.248"]

    board.write_text("- [ ] big.000 another beginning {priority: 3}\n- [ ] big.new never loaded\n")
    other = cli("board", "load", str(board))
    assert other.code == 1
    assert "task big.000 exists and is another: title is 'start' there, 'another beginning' on the board" in other.err
    assert "priority is 0 there, 3 on the board" in other.err
    assert cli("task", "show", "big.new").code == 1

    board.write_text("".join(f"- [ ] more.{n}\n" for n in range(100)) + "- [ ] big.000 another beginning\n")
    halfway = cli("board", "load", str(board))
    assert halfway.code == 1
    assert "100 tasks were created before; load the board again to complete it" in halfway.err


def test_pages_of_tasks_can_be_walked_and_a_task_is_one_line(cli: Cli, tasks: Callable[..., list[str]]) -> None:
    title = "a long title " * 20
    names = tasks(title.strip(), "short", "short")
    listed = cli("task", "list", "--limit", "1", "--after", names[0] + "-", "--json").json
    assert len(listed["tasks"]) == 1 and listed["after"]
    page = cli("task", "list", "--limit", "1000", "--state", "pending")
    (line,) = [line for line in page.out.splitlines() if line.startswith(names[0])]
    assert line.rstrip().endswith("a long title")
    assert re.search(r"\nblocked \d+  pending \d+  claimed \d+  done \d+  dead \d+  cancelled \d+\n$", page.out)
    first = cli("task", "list", "--limit", "1")
    assert re.search(r"more: ifabric task list --limit 1 --after \S+ --state-dir /", first.out)


def test_status_says_how_the_daemon_is(cli: Cli, folder: Path) -> None:
    done = cli("status", "--json")
    assert done.code == 0
    assert done.json["health"]["status"] == "healthy"
    assert done.json["endpoints"]["pid"] == endpoints.read(folder).pid  # type: ignore[union-attr]
    assert set(done.json["tasks"]) == {"blocked", "pending", "claimed", "done", "dead", "cancelled"}
    assert isinstance(done.json["sessions"], int)
    told = cli("status", http_proxy="http://127.0.0.1:1").out
    assert told.startswith("● healthy  ifabric ") and "✔ coordinator\n" in told


def test_the_daemons_services_are_discovered_as_micro_services(cli: Cli) -> None:
    assert {service["name"] for service in cli("svc", "ls", "--json").json} == {"coordinator", "governor", "chassis"}
    about = next(one for one in cli("svc", "info", "--json").json if one["name"] == "coordinator")
    assert any(one["subject"] == "if.v1.coordinator.claim.*" for one in about["endpoints"])
    assert "if.v1.admin.coordinator.cancel.*" in cli("svc", "info").out
    assert re.search(r"^list +[1-9]", cli("svc", "stats").out, re.MULTILINE)


def test_smoke_runs_three_tests_that_no_other_agent_can_disturb_and_leaves_nothing(cli: Cli) -> None:
    done = cli("smoke", "--json")
    claim, events, latency = done.json["tests"]
    assert claim["passed"] and events["passed"]
    assert latency["passed"] == (latency["ms"] < 10)
    assert done.code == (0 if latency["passed"] else 1)
    assert [one["name"] for one in (claim, events, latency)] == ["task claim", "real-time events", "claim latency"]
    listed = cli("task", "list", "--limit", "1000", "--after", "SMOKE", "--json").json["tasks"]
    assert not [line for line in listed if line["task"].startswith("SMOKE")]


def test_watch_shows_each_event_as_a_line_until_ctrl_c(cli: Cli, folder: Path, tasks: Callable[..., list[str]]) -> None:
    one, two = tasks("a", "b")
    with start("watch", "--task", two, "--since-start", "--state-dir", str(folder)) as process:
        assert process.stdout is not None
        assert re.fullmatch(rf"\S+Z submitted  {re.escape(two)} .*\n", process.stdout.readline())
        cli("task", "claim", one, "-s", "erin")
        cli("task", "claim", two, "-s", "erin")
        assert re.fullmatch(rf"\S+Z claimed    {re.escape(two)} by erin fence \d+\n", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


# -- the demo --------------------------------------------------------------------------------------------------------


class FrozenSwarm:
    """Writes down what is done to its agents."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __getattr__(self, verb: str) -> Callable[[str], None]:
        return lambda session: self.done.append(f"{verb} {session}")


@pytest.mark.parametrize(
    ("state", "session", "fence", "killed"),
    [("claimed", "a", 7, True), ("claimed", "b", 8, False), ("claimed", "a", 8, False), ("done", None, 7, False)],
)
async def test_an_agent_is_killed_only_in_the_middle_of_its_task(
    state: wire.State, session: str | None, fence: int, killed: bool
) -> None:
    class Board:
        async def get(self, task: str) -> wire.GetReply:
            spec = wire.TaskSpec(id=task)
            return wire.GetReply(
                task=task, state=state, session=session, fence=fence, attempt=1, spec=spec, history=(), revision=1
            )

    swarm: Any = FrozenSwarm()
    board: Any = Board()
    victim = await _kill(board, swarm, wire.TaskLine(task="t", state="claimed", session="a", fence=7))
    assert victim == (Held("a", "t", 7) if killed else None)
    assert swarm.done == ["freeze a", "kill a" if killed else "thaw a"]


def processes_of(folder: Path) -> dict[int, str]:
    """The command lines of living processes that name the folder, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line:
                found[int(entry.parent.name)] = line
    return found


@pytest.mark.slow
def test_a_demo_with_a_killed_agent_keeps_every_promise_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    done = run("demo", "--agents", "4", "--tasks", "30", "--kill", "1", "--json", TMPDIR=str(tmp_path))
    assert done.code == 0, done.out + done.err
    verdict = done.json
    assert verdict["held"] and verdict["completed"] == verdict["tasks"] == 30
    assert verdict["killed"] == 1
    assert verdict["claim_latency_ms"]["p50"] > 0
    assert done.err == ""
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    process = start("demo", "--agents", "3", "--tasks", "5000", TMPDIR=str(tmp_path))
    assert process.stderr is not None
    try:
        while "claimed" not in (said := process.stderr.readline()):
            assert said, "it ended before it was interrupted"
        process.send_signal(number)
        _, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []
        assert processes_of(tmp_path) == {}
    finally:
        process.kill()
        for left in processes_of(tmp_path):
            os.kill(left, signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
