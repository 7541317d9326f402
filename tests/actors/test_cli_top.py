"""`ifabric top`: what it draws, how it reads the stream, and what it does when that is cut. Against a stand-in of the page."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import queue
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ifabric.cli import main
from ifabric.cli.glance import Picture, draw, fitted, shown, sparkline
from ifabric.cli.streaming import EVENT_MAX_BYTES, Parser
from ifabric.clock import monotonic
from ifabric.errors import FabricError

from .test_cli import CLEAN, Ran

WAIT_S = 20.0
POINT = {
    "at": "2026-11-28T22:00:00.000Z", "claims_per_s": 120.0, "p50_ms": 1.0, "p95_ms": 4.5, "p99_ms": 9.0, "handled_per_s": 300.0,
    "refused_per_s": 2.0, "runs_per_s": 1.5, "lag_ms": 0.2,
}  # fmt: skip
NOW: dict[str, Any] = {
    "at": "2026-11-28T22:00:01.000Z",
    "daemon": "host:4711",
    "health": {
        "status": "degraded", "etcd": "connected", "nats": "connected", "loop_lag_s": 0.002, "version": "0.1.0", "uptime_s": 300.0,
        "not_ready": [], "warnings": ["the disk of etcd is slow"],
    },
    "counts": {"pending": 5, "claimed": 7, "blocked": 1, "done": 100, "dead": 2, "cancelled": 0},
    "sessions": 9, "active": 7, "waiters": 2, "unmatched": 3, "holds": 4,
    "breakers": [{"breaker": "openai/gpt-x", "state": "open", "failures": 5, "probe_in_s": 40.0}],
    "workers": {"idle": 1, "busy": 2}, "queue": 6, "overhead_percent": 1.5,
    "budget_fullest": {"acme": 0.95, "acme/research": 0.2},
    "actors": [
        {"actor": "coordinator", "state": "running", "restarts": 2, "mailbox": 3, "in_flight": 4, "handled": 1000, "refused": 5,
         "errors": 1},
    ],
    "audit": {"stored": 10, "waiting": 0, "dropped": 0}, "viewers": 1,
}  # fmt: skip
REFUSAL = {
    "at": "2026-11-28T22:00:00.500Z", "session": "alice", "component": "coordinator", "verb": "claim", "code": "claim_taken",
    "why": "bob has it", "task": "T1",
}  # fmt: skip
HAPPENED = {
    "subject": "of a task", "event": "claimed", "at": "2026-11-28T22:00:00.700Z", "task": "T7", "session": "bob", "note": "",
}  # fmt: skip


def picture(**changes: Any) -> Picture:
    made = Picture()
    made.take("history", {"step_s": 1, "points": [POINT] * 30}, 100.0)
    made.take("now", {**NOW, **changes}, 100.0)
    made.take("refusals", [REFUSAL], 100.0)
    made.take("events", [HAPPENED], 100.0)
    return made


def drawn(of: Picture, width: int = 160, height: int = 0, at: float = 100.0) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), legacy_windows=False)
    console.print(draw(of, width, height, at))
    return console.export_text()


# -- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "degraded", "host:4711", "the disk of etcd is slow", "pending 5", "dead 2", "9 sessions, 2 waiting", "3 pending task(s)",
        "120", "4.5 ms", "p99 9.0 ms", "95 % acme", "openai/gpt-x", "probe in 40 s", "2 running, 6 waiting", "started again 2x",
        "claim_taken bob has it", "T7 bob", "audit: 10 stored",
    ],
)  # fmt: skip
def test_the_picture_has_all_that_the_page_is_told(words: str) -> None:
    assert words in drawn(picture())
    assert words.partition(" bob")[0] in drawn(picture(), width=80)


def test_the_time_until_a_probe_runs_down_between_two_pictures() -> None:
    assert "probe in 25 s" in drawn(picture(), at=115.0)
    assert "probe now" in drawn(picture(), at=160.0)


@pytest.mark.parametrize(("width", "height"), [(160, 24), (80, 24), (110, 12), (60, 10), (20, 6), (1, 1)])
def test_the_picture_fits_into_any_terminal(width: int, height: int) -> None:
    crowded = picture(breakers=NOW["breakers"] * 50, budget_fullest={f"a{n}": 0.5 for n in range(50)})
    crowded.take("refusals", [REFUSAL] * 100, 100.0)
    lines = drawn(crowded, width, height).rstrip("\n").splitlines()
    assert all(len(line) <= width for line in lines)
    if height >= 10:
        assert len(lines) <= height


def test_a_section_is_cut_before_another_one_is_left_out() -> None:
    kept = "\n".join(map(str, fitted(draw_sections(), 10)))
    assert "short" in kept and "long" in kept


def draw_sections() -> list[list[Any]]:
    from rich.text import Text

    return [[Text("long"), *(Text(str(n)) for n in range(50))], [Text("short"), Text("1")]]


def test_what_an_agent_says_is_shown_and_not_obeyed() -> None:
    evil = {**REFUSAL, "session": "x\x1b]0;owned\x07", "why": "[bold red]\x1b[2J\u202egnp.exe\n\n"}
    made = picture(daemon="\x1b[31mred", breakers=[{"breaker": "\x9b2J", "state": "\x1b[0m", "failures": 1}])
    made.take("refusals", [evil], 100.0)
    text = drawn(made)
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert "[bold red]" in text and "\\x1b[2J" in text


@pytest.mark.parametrize(
    "strange", [{}, {"health": 7, "counts": [], "breakers": "x", "actors": [1, None], "workers": None}]
)
def test_a_picture_of_another_shape_is_drawn_as_far_as_it_goes(strange: dict[str, Any]) -> None:
    made = Picture()
    for event, data in (
        ("now", strange),
        ("history", []),
        ("point", 3),
        ("events", {}),
        ("refusals", ["x"]),
        ("else", 1),
    ):
        made.take(event, data, 0.0)
    assert "Board" in drawn(made)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [([], 10, ""), ([0.0, 0.0], 10, "▁▁"), ([1.0, 8.0], 10, "▁█"), ([1.0, 8.0, 2.0, 4.0], 2, "█▄"), ([5.0], 0, "")],
)
def test_a_sparkline_shows_the_highest_within_each_place(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_text_is_cut_at_its_limit() -> None:
    assert len(shown("x" * 10_000)) == 200


# -- how the stream is read ------------------------------------------------------------------------------------------


def test_events_are_found_however_the_bytes_are_cut() -> None:
    data = b'event: now\ndata: {"a":1}\n\n: a comment\n\nevent: point\r\ndata: [1,\r\ndata: 2]\r\n\r\ndata: 5\n\nevent: x\ndata: {\n\n'
    want = [("now", {"a": 1}), ("point", [1, 2]), ("message", 5)]
    assert Parser().feed(data) == want
    parser, found = Parser(), []
    for at in range(len(data)):
        found += parser.feed(data[at : at + 1])
    assert found == want


def test_an_event_without_an_end_is_refused() -> None:
    with pytest.raises(FabricError, match="more than"):
        Parser().feed(b"data: " + b"x" * EVENT_MAX_BYTES + b"y")


# -- the verb --------------------------------------------------------------------------------------------------------


class Page(ThreadingHTTPServer):
    """Sends what a daemon's page sends; `cut` ends the streams that are open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Stream)
        self.token = ""
        self.status = 200
        self.counts = 5
        self.open: list[queue.Queue[bytes | None]] = []
        self.asked = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def cut(self) -> None:
        streams, self.open = self.open, []
        for one in streams:
            one.put(None)


class _Stream(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        page = self.server
        status = 401 if page.token and self.headers["Authorization"] != f"Bearer {page.token}" else page.status
        self.send_response(status if self.path == "/api/stream" else 404)
        self.end_headers()
        if status != 200:
            return
        mine: queue.Queue[bytes | None] = queue.Queue()
        page.open.append(mine)
        for event, data in (
            ("history", {"step_s": 1, "points": [POINT]}),
            ("now", {**NOW, "counts": {**NOW["counts"], "pending": page.counts}}),
            ("refusals", [REFUSAL]),
            ("events", [HAPPENED]),
        ):
            mine.put(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())
        page.asked.release()
        with contextlib.suppress(OSError):
            while (data := mine.get()) is not None:
                self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def page() -> Iterator[Page]:
    made = Page()
    yield made
    made.cut()
    made.shutdown()
    made.server_close()


def top(capsys: pytest.CaptureFixture[str], *words: str) -> Ran:
    code = main(["top", *words])
    return Ran(code, *capsys.readouterr())


def test_off_a_terminal_one_picture_is_printed(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    done = top(capsys, "--http", page.url)
    assert done.code == 0, done.err
    assert "degraded" in done.out and "claim_taken" in done.out and "\x1b" not in done.out


def test_json_is_the_state_as_the_daemon_tells_it(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    assert top(capsys, "--http", page.url, "--json").json == NOW


def test_a_token_is_sent_and_asked_for(page: Page, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page.token = "sesame"
    refused = top(capsys, "--http", page.url, "--once")
    assert refused.code == 1 and "--token-file" in refused.err
    (tmp_path / "token").write_text("sesame\n")
    assert top(capsys, "--http", page.url, "--once", "--token-file", str(tmp_path / "token")).code == 0


@pytest.mark.parametrize("first_line", ["", "two\x00", "é"])
def test_a_file_without_a_token_is_a_usage_error(
    page: Page, capsys: pytest.CaptureFixture[str], tmp_path: Path, first_line: str
) -> None:
    (tmp_path / "token").write_text(first_line)
    assert top(capsys, "--http", page.url, "--token-file", str(tmp_path / "token")).code == 2


def test_a_daemon_without_a_page_says_so(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.status = 404
    done = top(capsys, "--http", page.url)
    assert done.code == 1 and "page.enabled" in done.err


def test_nobody_at_all_is_unreachable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert top(capsys, "--state-dir", str(tmp_path)).code == 3
    assert top(capsys, "--http", "http://127.0.0.1:1", "--timeout", "1").code == 3


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "https://127.0.0.1:1"])
def test_an_address_that_is_none_is_a_usage_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert top(capsys, "--http", url).code == 2


class Terminal:
    """`ifabric top` on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._mine, theirs = pty.openpty()
        self.resize(40, 150, theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ifabric", "top", *words],
            stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env={**CLEAN, "TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        self._theirs = theirs
        self.text = ""

    def resize(self, rows: int, columns: int, terminal: int | None = None) -> None:
        fcntl.ioctl(
            self._mine if terminal is None else terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0)
        )

    def see(self, words: str) -> None:
        """Returns when that has been drawn from now on."""
        self.text, until = "", monotonic() + WAIT_S
        while words not in self.text:
            assert monotonic() < until, f"{words!r} is not to be seen: {self.text[-3000:]!r}"
            if select.select([self._mine], [], [], 0.2)[0]:
                self.text += os.read(self._mine, 65_536).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def end(self) -> int:
        until = monotonic() + WAIT_S
        while self.process.poll() is None and monotonic() < until:
            if select.select([self._mine], [], [], 0.1)[0]:
                os.read(self._mine, 65_536)
        return self.process.wait(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._mine)
        os.close(self._theirs)


@pytest.fixture
def terminal(page: Page) -> Iterator[Terminal]:
    made = Terminal("--http", page.url, "--timeout", "30")
    yield made
    made.close()


def test_on_a_terminal_it_takes_the_whole_of_it_until_q(terminal: Terminal) -> None:
    terminal.see("\x1b[?1049h")
    terminal.see("claim_taken")
    terminal.type("q")
    assert terminal.end() == 0


def test_control_c_ends_it_without_a_complaint(terminal: Terminal) -> None:
    terminal.see("claim_taken")
    terminal.process.send_signal(2)
    assert terminal.end() == 0


def test_a_lost_connection_is_told_and_tried_again(page: Page, terminal: Terminal) -> None:
    terminal.see("claim_taken")
    page.status, page.counts = 503, 31_337
    page.cut()
    terminal.see("connection lost")
    assert terminal.process.poll() is None
    page.status = 200
    terminal.see("31337")
    terminal.type("q")
    assert terminal.end() == 0


def test_it_follows_the_size_of_the_terminal(terminal: Terminal) -> None:
    terminal.see("claim_taken")
    terminal.resize(40, 70)
    terminal.see("Latest events")
    lines = terminal.text.split("\n")
    assert any("Board" in line and "Actors" not in line for line in lines)
