"""`ifabric sandbox`, and where the chassis shows in other verbs: against a chassis without sandboxes that says what a test
expects, and against a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ifabric import endpoints
from ifabric.cli import main
from ifabric.cli.sandbox import _service_level, _time, short, size
from ifabric.cli.watch import _said
from ifabric.clock import monotonic
from ifabric.errors import StartupError
from ifabric.programs import find_etcd, find_nats_server
from ifabric.wire import chassis as wire

from .fake_chassis import LINE, SLO, USAGE, WASM, named
from .test_cli import CLEAN, WAIT_S, Cli, Ran, in_process, run, start
from .test_client_sandbox import ECHOES, LOOPS, TRAPS

ROOT = Path(__file__).parents[2]
#: where the daemon finds its actor, and this checkout
PATHS = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "actors")))}
FAKE = "tests.actors.fake_chassis:FakeChassis"
GUEST = ("--state-dir", "/nonexistent", "tool.wasm")


@contextlib.contextmanager
def daemon_in(state: Path, actors: str) -> Iterator[Path]:
    """A daemon with these actors besides the usual two."""
    try:
        find_etcd(), find_nats_server()
    except StartupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    (state / "c.yaml").write_text(f"http: {{port: 0}}\nactors: [coordinator, governor, {actors}]\n")
    log = (state / "daemon.log").open("wb")
    command = [sys.executable, "-m", "ifabric", "run", "-c", str(state / "c.yaml"), "--state-dir", str(state)]
    with log, subprocess.Popen(command, env=CLEAN | PATHS, stdout=log, stderr=log) as daemon:
        until = monotonic() + WAIT_S
        try:
            while endpoints.read(state) is None:
                assert daemon.poll() is None and monotonic() < until, (state / "daemon.log").read_text()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(0.02)
            yield state
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(WAIT_S) == 0
        finally:
            daemon.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a daemon whose chassis is a fake; a module "tool.wasm" is in it."""
    with daemon_in(tmp_path_factory.mktemp("fake"), f"'{FAKE}'") as state:
        (state / "tool.wasm").write_bytes(WASM)
        (state / "bad.wasm").write_bytes(WASM + b"bad")
        (state / "text.wat").write_text("(module)")
        assert main(["sandbox", "put", str(state / "tool.wasm"), "--state-dir", str(state)]) == 0
        yield state


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a daemon with a chassis."""
    with daemon_in(tmp_path_factory.mktemp("real"), "chassis") as state:
        yield state


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A command that finds the daemon, in its folder: in a thread of this process, where it has a loop of its own."""
    monkeypatch.chdir(folder)

    def ask(*words: str) -> Ran:
        first = words.index("--") if "--" in words else len(words)
        words = (*words[:first], "--state-dir", str(folder), *words[first:])
        with ThreadPoolExecutor(1) as thread:
            capsys.readouterr()
            code = thread.submit(main, words).result()
        return Ran(code, *capsys.readouterr())

    return ask


# -- without a daemon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", *GUEST, "--limit", "memry_mb=3"], "there is no limit memry_mb; did you mean memory_mb?"),
        (
            ["run", *GUEST, "--limit", "x=3"],
            "there are wall_s, cpu_percent, memory_bytes, fuel, output_bytes, memory_mb",
        ),
        (["run", *GUEST, "--limit", "fuel"], "write it as NAME=VALUE"),
        (["run", *GUEST, "--limit", "fuel=many"], "'many' is no number"),
        (["run", *GUEST, "--limit", "fuel=nan"], "'nan' is no number"),
        (["run", *GUEST, "--limit", "fuel=1.5"], "fuel=1.5: Expected int, got float"),
        (["run", *GUEST, "--limit", "wall_s=-1"], "wall_s=-1: Expected float > 0"),
        (["run", *GUEST, "--limit", "memory_bytes=3"], "memory_bytes=3: Expected int >= 65536"),
        (["run", *GUEST, "--limit", "memory_mb=1", "--limit", "memory_bytes=70000"], "is limited already"),
        (["run", *GUEST, "--env", "LANG"], "nothing of this shell's is passed on by itself"),
        (["run", *GUEST, "--env", "=x"], "write it as NAME=VALUE"),
        (["run", *GUEST, "--task", "T"], "--task is a session's: say whose, with --session"),
        (["run", *GUEST, "--hold", "h"], "--hold is a session's: say whose, with --session"),
        (["run", *GUEST, "--fence", "3", "--session", "x"], "--fence is a claim's: say of which task, with --task"),
        (["run", *GUEST, "--stdin", "@/nonexistent"], "/nonexistent: cannot be read: No such file"),
        (["run", *GUEST, "--stdin", "@/dev/zero"], "/dev/zero is larger than any run takes (16.0 MiB)"),
        (["run", *GUEST, "a\udcff"], "is not UTF-8"),
        (["run", *GUEST, "--env", "A=\udcff"], "is not UTF-8"),
        (["run", "--state-dir", "/nonexistent", "sha256:9f86"], "is no module's id: sha256: and 64 hexadecimal digits"),
        (["inspect", "--state-dir", "/nonexistent", "sha256:9f86"], "is no module's id"),
        (["list", "--state-dir", "/nonexistent", "--after", "x"], "is no module's id"),
        (["list", "--state-dir", "/nonexistent", "--limit", "0"], "limit"),
        (["put", "--state-dir", "/nonexistent"], "say which files"),
        (["run", "--state-dir", "/nonexistent"], "MODULE"),
        (["kill"], "RUN"),
    ],
)
def test_usage_errors_are_2_say_what_to_write_and_ask_nobody(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = in_process(capsys, "sandbox", *words)
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_help_of_the_verbs_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words, example in (
        (("run",), "ifabric sandbox run tool.wasm -- --count 3"),
        (("put",), "ifabric sandbox put build/*.wasm --json | jq"),
        (("list",), "ifabric sandbox list --json | jq"),
        (("inspect",), "ifabric sandbox inspect tool.wasm --json | jq .imports"),
        (("ps",), "ifabric sandbox ps"),
        (("kill",), "--why"),
    ):
        assert example in in_process(capsys, "sandbox", *words, "--help").out
    assert "2 for what is written wrong" in in_process(capsys, "sandbox", "run", "--help").out


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes_are_for_people(count: int, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1m00s"), (75.9, "1m15s"), (3599.9, "59m59s"), (3600, "1h00m")],
)
def test_times_are_for_people(seconds: float, said: str) -> None:
    assert _time(seconds) == said


@pytest.mark.parametrize(
    ("left", "says"),
    [(1.0, "████████████████ 100% left"), (0.5, "████████········ 50% left"), (0.0, "················ 0% left"),
     (-1.5, "················ overdrawn, -150%")],
)  # fmt: skip
def test_an_error_budget_is_drawn_as_far_as_there_is_one(
    left: float, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _service_level(
        wire.Slo(**{name: getattr(SLO, name) for name in SLO.__struct_fields__} | {"error_budget_left": left})
    )
    assert f"error budget {says}\n" in capsys.readouterr().out


def test_chassis_events_are_a_line() -> None:
    violation = wire.ViolationEvent(
        event="violation", at="now", run="r-1", session="alice", module=LINE.module, kind="limit: memory_bytes",
        message="it asked for more", task="T",
    )  # fmt: skip
    assert _said(violation) == (
        "r-1", " limit: memory_bytes by alice, sha256:9f9f9f9f9f9f for T  (it asked for more)",
    )  # fmt: skip
    missed = wire.SloEvent(event="slo", at="now", which="latency", met=False, value=12.345678, target=10, daemon="d-1")
    assert _said(missed) == ("latency", " is missed on d-1: 12.35 ms, and the target is 10 ms")
    met = wire.SloEvent(event="slo", at="now", which="availability", met=True, value=99.95, target=99.9)
    assert _said(met) == ("availability", " is met again: 99.95 %, and the target is 99.9 %")


# -- a run is the guest to the shell --------------------------------------------------------------------------------------


def test_the_guests_streams_and_exit_code_are_the_commands(cli: Cli) -> None:
    assert cli("sandbox", "run", "tool.wasm", "say", "a", "b") == Ran(0, "a b", "to stderr")
    assert cli("sandbox", "run", "tool.wasm", "exit", "3") == Ran(3, "", "first\nwhat went wrong\n")
    assert cli("sandbox", "run", named(WASM), "exit", "255").code == 255


def test_an_exit_code_that_no_process_can_have_is_never_0(cli: Cli) -> None:
    for code in ("256", "-1"):
        done = cli("sandbox", "run", "tool.wasm", "--", "exit", code)
        assert (done.code, f"exit code {code}" in done.err) == (255, True)


def test_what_follows_two_hyphens_is_the_guests(cli: Cli) -> None:
    done = cli("sandbox", "run", "tool.wasm", "--", "say", "--json", "--stdin", "-x", "--help")
    assert (done.code, done.out) == (0, "--json --stdin -x --help")
    trapped = cli("sandbox", "run", "tool.wasm", "--", "exit", "1", "--json")
    assert not trapped.out.startswith("{")
    refused = cli("sandbox", "run", "none.wasm", "--", "--json")
    assert (refused.code, refused.out) == (2, "")


def test_options_reach_the_run(cli: Cli) -> None:
    done = cli(
        *("sandbox", "run", "--env", "A=1", "--env", "B=x=y", "--limit", "memory_mb=64", "--limit", "wall_s=2.5"),
        *("--limit", "fuel=1_000", "--endpoint", "openai", "--endpoint", "search", "--entry", "main"),
        *("--session", "alice", "--task", "T", "--fence", "7", "--hold", "h", "tool.wasm", "seen"),
    )
    sent = json.loads(done.out)
    assert sent.pop("request_id")
    assert sent == {
        "module": named(WASM),
        "entry": "main",
        "args": ["seen"],
        "env": {"A": "1", "B": "x=y"},
        "limits": {"wall_s": 2.5, "memory_bytes": 64 << 20, "fuel": 1000},
        "endpoints": ["openai", "search"],
        "task": "T",
        "fence": 7,
        "hold": "h",
    }


def test_a_claims_fence_is_looked_up_when_it_is_not_given(cli: Cli, folder: Path) -> None:
    (folder / "b.md").write_text("- [ ] F.1 one\n")
    assert cli("board", "load", "b.md").code == 0
    fence = cli("task", "claim", "F.1", "--session", "alice", "--json").json["fence"]
    done = cli("sandbox", "run", "tool.wasm", "seen", "--task", "F.1", "--session", "alice")
    assert (json.loads(done.out)["task"], json.loads(done.out)["fence"]) == ("F.1", fence)
    assert cli("sandbox", "run", "tool.wasm", "seen", "--task", "F.9", "--session", "alice").code == 1


def test_standard_input_is_text_a_file_or_what_is_given(cli: Cli, folder: Path) -> None:
    assert cli("sandbox", "run", "tool.wasm", "--stdin", "some text").out == "some text"
    assert cli("sandbox", "run", "tool.wasm", "--stdin", "@text.wat").out == "(module)"
    assert cli("sandbox", "run", "tool.wasm", "--stdin", "").out == ""


def guest(folder: Path, *words: str, **given: Any) -> subprocess.CompletedProcess[bytes]:
    """`sandbox run tool.wasm` as a process, whose streams are bytes; without a standard input unless it is given."""
    command = [sys.executable, "-m", "ifabric", "sandbox", "run", "tool.wasm", *words, "--state-dir", str(folder)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **given}
    if "input" in given:
        del streams["stdin"]
    return subprocess.run(command, cwd=folder, env=CLEAN | PATHS, timeout=WAIT_S, check=False, **streams)


def test_a_pipe_goes_through_byte_for_byte(folder: Path) -> None:
    every = bytes(range(256)) * 3
    for words, comes in ((), every), (("--stdin", "-"), every), (("--stdin", "said"), b"said"):
        done = guest(folder, *words, input=every)
        assert (done.returncode, done.stdout, done.stderr) == (0, comes, b"")


def test_standard_input_is_taken_when_somebody_feeds_it_and_only_then(folder: Path) -> None:
    with (folder / "text.wat").open("rb") as file:
        assert guest(folder, stdin=file).stdout == b"(module)"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"through a socket")
        ours.shutdown(socket.SHUT_WR)
        assert guest(folder, stdin=theirs).stdout == b"through a socket"
    assert guest(folder).stdout == b""
    terminal, end = os.openpty()
    assert guest(folder, stdin=end).stdout == b"", "nobody is waited for at a terminal"
    os.close(terminal), os.close(end)


def test_a_reader_that_has_seen_enough_ends_it_quietly(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = guest(folder, "exit", "0", stdout=writer)
    assert (done.returncode, done.stderr) == (0, b"first\nwhat went wrong\n")
    done = guest(folder, "say", "x", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_what_a_run_took_is_said_on_a_line_of_its_own(cli: Cli) -> None:
    done = cli("sandbox", "run", "tool.wasm", "say", "hello", "--usage")
    assert done.out == "hello"
    assert done.err == (
        "to stderr\nusage: 0.012 s, 0.010 s of CPU, 1,234,567 fuel, 1.1 MiB of memory, 5 B written, 0.000007 USD\n"
    )


def test_what_did_not_fit_is_said(cli: Cli) -> None:
    done = cli("sandbox", "run", "tool.wasm", "too much")
    assert (done.code, done.out) == (0, "as far as")
    assert "it wrote more than output_bytes allows; the rest is not here" in done.err
    assert cli("sandbox", "run", "tool.wasm", "too much", "--json").json["truncated"] is True


def test_a_guest_that_was_ended_is_told_from_one_that_ended_with_1(cli: Cli, folder: Path) -> None:
    done = guest(folder, "trap")
    assert (done.returncode, done.stdout) == (1, b"until ")
    assert done.stderr == b"\xff\xff\nerror: the guest reached unreachable\n"
    trapped = cli("sandbox", "run", "tool.wasm", "trap", "--json")
    error = trapped.json["error"]
    assert (trapped.code, error["code"], error["kind"], error["stdout"]) == (1, "trap", "unreachable", "until ")
    ended = cli("sandbox", "run", "tool.wasm", "exit", "1", "--json")
    assert (ended.code, ended.json["exit_code"], ended.json["stderr"]) == (1, 1, "first\nwhat went wrong\n")
    assert ended.json["usage"]["fuel"] == USAGE.fuel


def test_refusals_say_what_to_do_next(cli: Cli, folder: Path) -> None:
    unknown = "sha256:" + "0" * 64
    done = cli("sandbox", "run", unknown)
    assert (done.code, done.out) == (1, "")
    assert f"no module {unknown} is kept; put it first: ifabric sandbox put TOOL.wasm" in done.err
    assert "text.wat is WebAssembly text: make a .wasm of it first" in cli("sandbox", "run", "text.wat").err
    assert ". is a directory" in cli("sandbox", "run", ".").err
    assert "none.wasm: cannot be read: No such file or directory" in cli("sandbox", "run", "none.wasm").err
    nobody = run("sandbox", "run", str(folder / "tool.wasm"), "--state-dir", "/nonexistent")
    assert (nobody.code, "ifabric run" in nobody.err) == (3, True)


def test_an_interrupted_run_says_that_the_guest_runs_on(folder: Path) -> None:
    with start("sandbox", "run", str(folder / "tool.wasm"), "wait", "--state-dir", str(folder)) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.close()
        until = monotonic() + WAIT_S
        while "a run waits" not in (folder / "daemon.log").read_text():
            assert monotonic() < until
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert "the guest runs on until its limits end it: ifabric sandbox ps" in process.stderr.read()


# -- modules --------------------------------------------------------------------------------------------------------------


def test_modules_are_put_and_the_ones_that_are_refused_are_named(cli: Cli, folder: Path) -> None:
    (folder / "odd.wasm").write_bytes(WASM + b"\0\x04\x03odd")
    done = cli("sandbox", "put", "odd.wasm", "bad.wasm", "tool.wasm", "text.wat")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].split() == ["FILE", "MODULE", "SIZE", "IMPORTS"]
    assert lines[1].split() == [
        *("odd.wasm", named(WASM + b"\0\x04\x03odd"), "14", "B"),
        *("wasi_snapshot_preview1", "(2),", "ifabric", "(1)"),
    ]
    assert lines[2].split()[0] == "tool.wasm" and lines[2].endswith("there already")
    assert "error: bad.wasm: the module imports evil.open" in done.err
    assert "ifabric sandbox inspect bad.wasm" in done.err
    assert "error: text.wat is WebAssembly text" in done.err
    found = cli("sandbox", "put", "bad.wasm", "odd.wasm", "none.wasm", "--json")
    assert found.code == 2
    bad, odd, none = found.json
    assert (bad["file"], bad["error"]["code"], bad["error"]["why"]) == ("bad.wasm", "module_refused", "import")
    assert (odd["module"], odd["again"], odd["size"]) == (named(WASM + b"\0\x04\x03odd"), True, 14)
    assert "cannot be read" in none["error"]["message"]


def test_modules_are_listed_by_pages(cli: Cli, folder: Path) -> None:
    (folder / "more.wasm").write_bytes(WASM + b"\0\x05\x04more")
    cli("sandbox", "put", "more.wasm")
    first = cli("sandbox", "list", "--limit", "1")
    module = first.out.splitlines()[1].split()[0]
    assert f"there are more: ifabric sandbox list --limit 1 --after {module}" in first.out
    rest = cli("sandbox", "list", "--after", module, "--json").json
    assert rest["after"] is None and module not in [line["module"] for line in rest["modules"]]
    assert cli("sandbox", "list").out.splitlines()[0].split() == ["MODULE", "SIZE", "SINCE"]


def test_a_module_is_looked_at_and_refused_with_exit_1(cli: Cli) -> None:
    done = cli("sandbox", "inspect", "tool.wasm")
    assert done.code == 0
    text = re.sub(r" +", " ", done.out)
    for line in (
        "✔ accepted tool.wasm 8 B",
        named(WASM),
        "imports wasi_snapshot_preview1.fd_write",
        "exports _start\n memory",
        "memory 64.0 KiB, no maximum",
        "defines 2 function(s), 0 table(s), 1 memory(s)",
        "code 2.9 KiB ████████████████",
    ):
        assert line in text
    assert cli("sandbox", "inspect", named(WASM)).code == 0
    bad = cli("sandbox", "inspect", "bad.wasm")
    assert bad.code == 1
    assert "✘ refused" in bad.out and "✘ it imports evil.open, which no sandbox has" in bad.out
    assert cli("sandbox", "inspect", "bad.wasm", "--json").json["accepted"] is False
    text_file = cli("sandbox", "inspect", "text.wat", "--json")
    assert (text_file.code, text_file.json["error"]["code"]) == (1, "not_wasm")
    assert "put it first" in cli("sandbox", "inspect", "sha256:" + "0" * 64).err


# -- operators ------------------------------------------------------------------------------------------------------------


def test_what_runs_the_workers_and_the_service_level_are_shown_and_a_run_is_ended(cli: Cli) -> None:
    done = cli("sandbox", "ps")
    lines = done.out.splitlines()
    assert lines[0].split() == ["RUN", "SESSION", "MODULE", "AGE", "LEFT", "TASK", "DAEMON"]
    assert lines[1].split() == ["r-1", "alice", short(LINE.module), "1m15s", "12.5", "s", "P0.1.5", "d-1"]
    assert "workers 2 busy, 1 idle, 4 waiting; 3 of at most 8" in re.sub(" +", " ", done.out)
    assert "overhead p95 1.25 ms (target 10), available 99.950 % (target 99.9); 120 run(s) within 1h00m" in done.out
    assert "50% left" in done.out
    assert cli("sandbox", "ps", "--json").json["slo"]["error_budget_left"] == 0.5
    for odd in ("r-7", "-odd"):
        unknown = cli("sandbox", "kill", odd)
        assert (unknown.code, "What runs: ifabric sandbox ps" in unknown.err) == (1, True)
    killed = cli("sandbox", "kill", "r-1", "--why", "it loops")
    assert (killed.code, killed.out) == (0, "✔ r-1, which alice had asked for, is ended\n")
    assert cli("sandbox", "kill", "r-1", "--json").json == {"run": "r-1", "session": "alice"}
    assert "nothing has run for longer than a second" in cli("sandbox", "ps").out


# -- with a chassis that has sandboxes --------------------------------------------------------------------------------------


def test_a_real_guest_from_the_shell(real: Path) -> None:
    """`status` and `watch` know of it, too."""
    (real / "tool.wasm").write_bytes(ECHOES)
    (real / "trap.wasm").write_bytes(TRAPS)
    every = bytes(range(256))
    done = guest(real, "--usage", input=every)
    assert (done.returncode, done.stdout) == (0, every)
    assert re.fullmatch(rb"usage: [^\n]* fuel, 64\.0 KiB of memory, 256 B written\n", done.stderr)
    (real / "tool.wasm").write_bytes(TRAPS)
    done = guest(real, "--stdin", "until then")
    assert (done.returncode, done.stdout) == (1, b"until then")
    assert re.fullmatch(rb"error: [^\n]*unreachable[^\n]*\n", done.stderr)
    (real / "tool.wasm").write_bytes(LOOPS)
    done = guest(real, "--limit", "fuel=1000", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"], error["which"]) == (1, "limit", "fuel")
    status = run("status", "--state-dir", str(real), "--json")
    assert (status.code, status.json["sandboxes"], status.json["sandbox_queue"]) == (0, 0, 0)
    assert "sandboxes 0 running, 0 waiting" in run("status", "--state-dir", str(real)).out
    with start("watch", "--about", "chassis", "--since-start", "--state-dir", str(real)) as watching:
        assert watching.stdout is not None
        line = watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
    assert re.search(rf" violation +\S+ limit: fuel by \S+, {short(named(LOOPS))}  \(", line)


def test_status_is_silent_about_sandboxes_where_there_are_none(cli: Cli) -> None:
    assert "sandboxes" not in cli("status").out
