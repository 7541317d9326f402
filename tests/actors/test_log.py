"""Logs: a line an entry, whatever is in it, and no failure of the log is a failure of the daemon."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifabric import log
from ifabric.errors import ConfigError

HOSTILE = ['x\n{"event": "forged"}', "\r\nforged", "\x1b[2J\x1b[31mred", '"}\n{"', "a\u2028b", "a\x00b", "\ud800", "\\"]


class Unfailing(contextlib.closing[Any]):
    """Closes a file, also one on a full disk."""

    def __enter__(self) -> Any:
        return self.thing

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.thing.close()


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's logging is everybody's, and its files are closed."""
    opened = contextlib.ExitStack()
    original = log._open

    def opens(output: str) -> Any:
        stream = original(output)
        return stream if output in ("stderr", "stdout") else opened.enter_context(Unfailing(stream))

    monkeypatch.setattr(log, "_open", opens)
    root, nats = logging.getLogger(), logging.getLogger("nats")
    before = root.handlers[:], root.level, nats.level, structlog.get_config()
    yield
    root.handlers[:], root.level, nats.level = before[0], before[1], before[2]
    structlog.configure(**before[3])
    opened.close()


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[str]]:
    """The lines that a file gets when something is logged."""
    output = tmp_path / "deep" / "er" / "fabric.log"

    def run(act: Callable[[Any], object], *, level: str = "INFO", style: Any = "json") -> list[str]:
        log.setup(level, style, str(output))
        before = output.read_text("utf-8")
        act(log.get(actor="coordinator"))
        return output.read_text("utf-8").removeprefix(before).split("\n")[:-1]

    return run


def fail(logger: Any) -> None:
    try:
        raise ValueError("bad\nforged line")
    except ValueError:
        logger.exception("handler failed", verb="claim")


def test_an_entry_is_one_json_object_with_its_time_level_and_words(written: Callable[..., list[str]]) -> None:
    (line,) = written(lambda logger: logger.warning("starting again", branch="residents", tries=3))
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry.pop("timestamp"))
    assert entry == {
        "event": "starting again",
        "level": "warning",
        "actor": "coordinator",
        "branch": "residents",
        "tries": 3,
    }


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_traceback_does_not_tell_what_was_in_a_variable(written: Callable[..., list[str]], style: str) -> None:
    def act(logger: Any) -> None:
        headers = {"Authorization": "Bearer sk-canary"}
        try:
            raise ValueError(f"{len(headers)} headers were refused")
        except ValueError:
            logger.exception("a call failed")

    told = "\n".join(written(act, style=style))
    assert "1 headers were refused" in told
    assert "sk-canary" not in told.replace('"Bearer sk-canary"}', "")  # the line of the source itself is no value


def test_below_its_level_nothing_is_logged(written: Callable[..., list[str]]) -> None:
    def all_levels(logger: Any) -> None:
        for name in ("debug", "info", "warning", "error"):
            getattr(logger, name)("x")

    counts = {level: len(written(all_levels, level=level)) for level in log.LEVELS}
    assert counts == {"DEBUG": 4, "INFO": 3, "WARNING": 2, "ERROR": 1}


def test_an_exception_is_in_the_entry_with_its_traceback(written: Callable[..., list[str]]) -> None:
    (line,) = written(fail)
    entry = json.loads(line)
    assert entry["exception"].startswith("Traceback (most recent call last)")
    assert "ValueError: bad\nforged line" in entry["exception"]


def test_text_is_a_line_for_people(written: Callable[..., list[str]]) -> None:
    (line,) = written(lambda logger: logger.info("ready", nats="nats://127.0.0.1:4222"), style="text")
    assert "ready" in line
    assert "nats://127.0.0.1:4222" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_begins_no_line_of_its_own(written: Callable[..., list[str]], text: str, style: str) -> None:
    def act(logger: Any) -> None:
        logger.info("refused", subject=text, nested={"why": [text]})
        logger.warning(text)

    lines = written(act, style=style)
    assert len(lines) == 2
    assert not any(re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]", line) for line in lines)
    if style == "json":
        entries = [json.loads(line) for line in lines]
        assert [entry["level"] for entry in entries] == ["info", "warning"]
        assert text == "\ud800" or entries[0]["subject"] == text
    else:
        # structlog colours its own words; what an agent wrote commands no terminal
        assert not any("\x1b[2J" in line for line in lines)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.floats(), max_size=4))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_make_one_line_of_json(written: Callable[..., list[str]], words: dict[str, Any]) -> None:
    (line,) = written(lambda logger: logger.bind(about=words).info("x"))
    assert json.loads(line)["event"] == "x"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __repr__(self) -> str:
        return "<broken>"


def test_what_json_has_no_word_for_is_logged_all_the_same(written: Callable[..., list[str]]) -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (Broken(), circle, 1 << 80, {1: object()}, b"\xff", "\udcff", ValueError("x")):
        (line,) = written(lambda logger, value=value: logger.info("odd", value=value))
        assert "odd" in json.loads(line)["event"]


def test_libraries_log_in_the_same_form_and_only_what_is_worth_a_warning(written: Callable[..., list[str]]) -> None:
    def act(_: Any) -> None:
        library = logging.getLogger("some.package")
        library.info("chatter")
        library.warning("careful: %s", "a\nb")
        logging.getLogger("nats.aio.client").error("told to the error callback already")

    lines = written(act)
    assert [json.loads(line)["event"] for line in lines] == ["careful: a\nb"]
    (text,) = written(act, style="text")
    assert "careful: a" in text


def test_a_file_is_appended_to_and_its_folders_are_made(written: Callable[..., list[str]], tmp_path: Path) -> None:
    written(lambda logger: logger.info("one"))
    written(lambda logger: logger.info("two"))
    lines = (tmp_path / "deep" / "er" / "fabric.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["one", "two"]


@pytest.mark.parametrize(("name", "why"), [("", "Is a directory"), ("file/under", "Not a directory|File exists")])
def test_a_file_that_cannot_be_written_is_a_config_error(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"logging.output: cannot write .*: ({why})"):
        log.setup(output=str(tmp_path / name))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", ["stderr", "stdout"])
def test_auto_is_text_on_a_terminal_and_json_elsewhere(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    for stream, is_json in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, output, stream)
        log.setup("INFO", "auto", output)
        log.get().info("x")
        assert stream.getvalue().startswith("{") == is_json


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_takes_the_log_away_and_not_the_daemon() -> None:
    log.setup("INFO", "json", "/dev/full")
    log.get().error("the disk is full")
    logging.getLogger("library").error("here too")


def test_a_closed_pipe_takes_the_log_away_and_not_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(io.FileIO(writing, "w"), write_through=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log.setup("INFO", "json", "stderr")
        log.get().error("nobody reads this")
