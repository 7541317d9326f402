"""Logs: a line an entry, whatever is in it, and no failure of the log is a failure of the daemon."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifabric import log
from ifabric.errors import ConfigError
from ifabric.handling import CURRENT, Handling
from ifabric.log import output as outputs
from ifabric.log import repeats
from ifabric.log.output import LogFile, is_journal, prefixed
from ifabric.log.redacting import BEYOND, TEXT_MAX, TRACEBACK_MAX, clean, is_secret
from ifabric.log.repeats import Held, Repeats

HOSTILE = ['x\n{"event": "forged"}', "\r\nforged", "\x1b[2J\x1b[31mred", '"}\n{"', "a\u2028b", "a\x00b", "\ud800", "\\"]


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's logging is everybody's, and its files are closed."""
    monkeypatch.setattr(log, "_now", now := log._Now())
    root, nats = logging.getLogger(), logging.getLogger("nats")
    before = root.handlers[:], root.level, nats.level, structlog.get_config()
    yield
    root.handlers[:], root.level, nats.level = before[0], before[1], before[2]
    structlog.configure(**before[3])
    if isinstance(now.output, LogFile):
        now.output.close()


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[str]]:
    """The lines that a file gets when something is logged."""
    output = tmp_path / "deep" / "er" / "fabric.log"

    def run(act: Callable[[Any], object], *, level: str = "INFO", style: Any = "json", repeats: int = 0) -> list[str]:
        log.setup(level, style, str(output), repeats)
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
    assert "sk-canary" not in told, "neither as a value nor in the line of the source"


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


# -- whose message -------------------------------------------------------------------------------------------------------

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Message:
    request_id = "r-1"


def handling(**options: Any) -> Handling:
    made = Handling("governor", "reserve", "agent-7", 5.0, trace=f"00-{TRACE}-00f067aa0ba902b7-01", **options)
    made.message = Message()
    return made


def entries(lines: list[str]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines]
    for entry in found:
        del entry["timestamp"]
    return found


async def test_while_a_message_is_handled_each_line_says_whose_it_is(written: Callable[..., list[str]]) -> None:
    async def handle(logger: Any) -> None:
        CURRENT.set(handling())
        logger.info("one")
        log.get(session="another").info("two", verb="its own", trace="its own")
        logging.getLogger("library").warning("three")
        await asyncio.to_thread(logger.info, "in a thread")

    lines = written(lambda logger: None)
    logger = log.get()
    logger.info("before")
    await asyncio.create_task(handle(logger))
    logger.info("after")
    lines = Path(log._now.output._path).read_text().splitlines()  # type: ignore[union-attr]
    before, one, two, three, four, after = entries(lines)
    whose = {"actor": "governor", "verb": "reserve", "session": "agent-7", "request_id": "r-1", "trace": TRACE}
    assert one == {"event": "one", "level": "info", **whose}
    assert two == {
        "event": "two",
        "level": "info",
        **whose,
        "session": "another",
        "verb": "its own",
        "trace": "its own",
    }
    assert three == {"event": "three", "level": "warning", **whose}
    assert four == {"event": "in a thread", "level": "info", **whose}
    assert before == {"event": "before", "level": "info"}
    assert after == {"event": "after", "level": "info"}


async def test_a_task_that_outlives_its_message_says_nothing_of_it(written: Callable[..., list[str]]) -> None:
    message, over = handling(), asyncio.Event()

    async def linger(logger: Any) -> None:
        await over.wait()
        logger.info("a worker has died")

    async def handle(logger: Any) -> asyncio.Task[None]:
        CURRENT.set(message)
        return asyncio.create_task(linger(logger))

    written(lambda logger: None)
    lingering = await asyncio.create_task(handle(log.get()))
    message.ended = message.arrived + 0.5
    over.set()
    await lingering
    (line,) = Path(log._now.output._path).read_text().splitlines()  # type: ignore[union-attr]
    assert entries([line]) == [{"event": "a worker has died", "level": "info"}]


@pytest.mark.parametrize("trace", ["", "nonsense", "00-" + "x" * 32 + "-00f067aa0ba902b7-01", "\n", TRACE])
def test_what_is_no_trace_is_not_logged_as_one(written: Callable[..., list[str]], trace: str) -> None:
    message = handling()
    message.trace, message.session, message.message = trace, "", None
    token = CURRENT.set(message)
    try:
        (line,) = written(lambda logger: logger.info("x"))
    finally:
        CURRENT.reset(token)
    assert entries([line]) == [{"event": "x", "level": "info", "actor": "coordinator", "verb": "reserve"}]


# -- secrets -------------------------------------------------------------------------------------------------------------

SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIrYcanary\n-----END EC PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlLWNhbmFyeQ"
#: what is planted, and the part of it that may be nowhere
PLANTED = {
    SEED: SEED[4:],
    SEED.replace("SU", "SA", 1): SEED[4:],
    SEED.replace("SU", "SO", 1): SEED[4:],
    "AGE-SECRET-KEY-1QCANARYCANARY": "CANARY",
    "hvs.CAESIcanary_canary-canary": "canary",
    "s.abcdefghcanary0123456789": "canary",
    "Bearer xyzcanary": "xyz",
    "bearer canary.canary": "canary",
    "sk-proj-canary0123456789": "canary",
    "ghp_canarycanarycanary0123": "canary",
    JWT: "c2lnbmF0dXJl",
    PEM: "MHcC",
    "nats://user:canary@10.0.0.1:4222": "canary",
    "nats://canary@10.0.0.1:4222": "canary",
    "https://x.example/?access_token=canary&n=1": "canary",
    "VAULT_TOKEN=canary": "canary",
    "{'password': 'can\\'zary'}": "zary",
    '{"api_key":"canary"}': "canary",
    '{\\"secret\\": \\"canary\\"}': "canary",
    "Authorization: Basic Y2FuYXJ5": "Y2Fu",
    "X-Vault-Token: canary": "canary",
}


def planted(secret: str) -> dict[str, Callable[[Any], object]]:
    """Every way into the log."""

    def raised(logger: Any) -> None:
        try:
            raise ValueError(f"refused: {secret}")
        except ValueError:
            logger.exception("failed")

    def chained(logger: Any) -> None:
        try:
            try:
                raise ValueError(secret)
            except ValueError as error:
                raise KeyError("outer") from error
        except KeyError as error:
            logger.exception("failed", error=error)

    def library(_: Any) -> None:
        try:
            raise OSError(secret)
        except OSError:
            logging.getLogger("library").exception("with %s", secret)

    class Shown:
        def __str__(self) -> str:
            return secret

    said = f"said {secret}, and more"
    return {
        "event": lambda logger: logger.warning(said),
        "field": lambda logger: logger.info("x", why=f"<{secret}>"),
        "bound": lambda logger: logger.bind(about=secret).info("x"),
        "nested": lambda logger: logger.info("x", a={"b": [{"c": (secret, 1)}], secret: 1}),
        "bytes": lambda logger: logger.info("x", a=secret.encode(), b=[secret.encode()]),
        "object": lambda logger: logger.info("x", a=Shown(), b=ValueError(secret), c={Shown()}),
        "raised": raised,
        "chained": chained,
        "library": library,
        "stack": lambda logger: logger.info(secret, stack_info=True),
    }


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("secret", PLANTED, ids=lambda secret: secret[:20])
def test_what_has_the_form_of_a_secret_is_written_nowhere(
    written: Callable[..., list[str]], secret: str, style: str
) -> None:
    for way, act in planted(secret).items():
        told = "\n".join(written(act, style=style, level="DEBUG"))
        assert PLANTED[secret] not in told, (way, told)
        assert "[redacted]" in told, (way, told)


NAMED = ("token", "secret", "password", "authorization", "seed", "api_key", "apiKey", "credential", "credentials", "vault_token",
         "X-Vault-Token", "Set-Cookie", "secret_id", "access-key", "issuer_seed", "PASSWORD")  # fmt: skip


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("name", NAMED)
def test_what_has_the_name_of_a_secret_is_not_written(written: Callable[..., list[str]], name: str, style: str) -> None:
    ways = {
        "field": {name: "canary"},
        "bytes": {name: b"canary"},
        "list": {name: ["canary"]},
        "nested": {"about": {"deep": [{name: "canary"}]}},
        "pair": {"headers": [(name, "canary")]},
        "asgi": {"headers": [(name.encode(), b"canary")]},
        "object": {name: ValueError("canary")},
    }
    for way, words in ways.items():
        told = "".join(written(lambda logger, words=words: logger.info("x", **words), style=style))
        assert "canary" not in told and "[redacted]" in told, (way, told)


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "token_file", "vault_token_path", "seed_s", "tokens_total", "secretary", "key", "task", "", "event"],
)
def test_a_harmless_name_is_no_secrets(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer", "task-1/sk-learn", "the bearer of bad news", "SUPERVISOR", "SAMPLE_SIZE", "secrets looked up", "hvac",
        "https://etcd-1.prod.example:2379,https://etcd-2:2379", "nats://127.0.0.1:4222", "max_tokens=500", "e.g. s.th. else",
        "mailto:ann@example.org", "vault:secret/data/ifabric#etcd_key", "0123456789abcdef" * 4, "tokens: 12",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----", "UACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY",
    ],
)  # fmt: skip
def test_harmless_words_stay_readable(written: Callable[..., list[str]], text: str) -> None:
    (line,) = written(lambda logger: logger.info(text, task=text, max_tokens=500, token=True, nested=[{"a": text}]))
    (entry,) = entries([line])
    assert entry == {
        "event": text, "level": "info", "actor": "coordinator", "task": text, "max_tokens": 500, "token": True,
        "nested": [{"a": text}],
    }  # fmt: skip


@pytest.mark.parametrize("before", [0, TEXT_MAX - 30, TEXT_MAX - 1, TEXT_MAX + BEYOND - 30])
def test_a_long_text_is_cut_and_no_secret_is_cut_in_half(written: Callable[..., list[str]], before: int) -> None:
    text = " " * before + SEED + " " * (2 * TEXT_MAX)
    (line,) = written(lambda logger: logger.info("x", why=text))
    (entry,) = entries([line])
    assert len(entry["why"]) < TEXT_MAX + 100
    assert SEED[:10] not in line


@pytest.mark.parametrize(
    "piece",
    [
        "-eyJ",
        "-eyJaaaaaaaa.",
        "_ghp_",
        "://a:",
        "token=",
        '"token": "',
        "cookie: ",
        "-----BEGIN A PRIVATE KEY",
        "bearer -.",
    ],
)
def test_no_text_takes_long_to_look_through(piece: str) -> None:
    """An agent may choose what a line says; a quadratic pattern would stop the loop for seconds."""
    text = piece * (2 * TRACEBACK_MAX // len(piece))
    begun = time.process_time()
    clean({"event": "x", "exception": text})
    assert time.process_time() - begun < 0.5


@given(
    st.recursive(
        st.text() | st.binary() | st.none() | st.floats(),
        lambda kids: st.lists(kids) | st.dictionaries(st.text(), kids),
    )
)
@settings(max_examples=100, deadline=None)
def test_redacting_never_fails_and_never_shows_what_is_in_it(value: Any) -> None:
    told = json.dumps(clean({"event": "x", "a": value, "b": [value, SEED], "c": {"token": value}}))
    assert SEED not in told


# -- again and again -----------------------------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_same_entry_is_written_so_often_a_minute_and_then_counted() -> None:
    time, told = Time(), list[Held]()
    counted = Repeats(3, time, told.append)

    def say(where: str = "a:1", event: str = "x") -> bool:
        return counted.may_say(where, event, "warning", "chassis")

    assert [say() for _ in range(5)] == [True] * 3 + [False] * 2
    assert say("a:2") and say(event="y"), "another place, another event"
    time.now += 59.9
    assert not say() and told == []
    time.now += 0.1
    assert say("b:1"), "any line tells of the minutes that are over"
    assert [(held.place, held.times, held.level, held.actor) for held in told] == [
        (("a:1", "x"), 3, "warning", "chassis")
    ]
    assert [say() for _ in range(4)] == [True] * 3 + [False], "the next minute"
    assert counted.held == 4
    counted.tell_ended(all_of_them=True)
    assert [held.times for held in told] == [3, 1]


def test_with_0_everything_is_written(written: Callable[..., list[str]]) -> None:
    def act(logger: Any) -> None:
        for _ in range(500):
            logger.info("x")

    assert len(written(act, repeats=0)) == 500
    assert len(written(act, repeats=60)) == 60


def test_places_without_end_are_counted_within_bounds() -> None:
    time = Time()
    counted = Repeats(2, time, lambda held: None)
    said = sum(counted.may_say("a:1", str(number), "info", "") for number in range(repeats.PLACES_MAX + 500))
    assert said == repeats.PLACES_MAX + 2, "then all events of a place are one"
    assert len(counted._windows) <= repeats.PLACES_MAX + 1
    time.now += repeats.WINDOW_S
    assert counted.may_say("a:1", "fresh", "info", "")


async def test_a_flood_ends_with_one_line_that_counts_it_even_when_nothing_follows(
    written: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of it has another request and another exception: that is the same event, from the same place."""
    time = Time()  # stands still while the flood lasts, however long this machine takes for it
    monkeypatch.setattr(log, "monotonic", time)
    monkeypatch.setattr(repeats, "WINDOW_S", 0.2)

    def act(logger: Any) -> None:
        for number in range(10):
            try:
                raise ValueError(f"reason {number}")
            except ValueError:
                logger.exception("handler failed", request_id=str(number))
            logging.getLogger("library").warning("slow: %s", number)

    lines = written(act, repeats=4)
    assert [entry["event"] for entry in entries(lines)].count("handler failed") == 4
    assert len(lines) == 8
    assert log.figures().held_back == 12
    time.now += 0.2
    path = Path(log._now.output._path)  # type: ignore[union-attr]
    async with asyncio.timeout(10):
        while len(told := path.read_text().splitlines()) < 10:
            await asyncio.sleep(0.01)
    one, other = entries(told[8:])
    assert one.pop("within_s") == other.pop("within_s") == 0.2
    assert one.pop("from").startswith("tests.actors.test_log:")
    assert one == {"event": "said again", "of": "handler failed", "times": 6, "level": "error", "actor": "coordinator"}
    assert (other["of"], other["times"], other["level"]) == ("slow: %s", 6, "warning")


def test_what_is_held_back_at_the_end_of_the_process_is_told(written: Callable[..., list[str]]) -> None:
    def act(logger: Any) -> None:
        for _ in range(5):
            logger.info("x")
        log._at_the_end()

    assert [entry.get("times") for entry in entries(written(act, repeats=2))] == [None, None, 3]


# -- files that are moved away -------------------------------------------------------------------------------------------


def events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_a_file_that_was_moved_away_is_opened_again_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "fabric.log"
    log.setup("INFO", "json", str(path))
    log.get().info("one")
    path.rename(tmp_path / "fabric.log.1")
    log.get().info("two")
    log.reopen()
    assert path.exists(), "at once, also when nothing is written"
    log.get().info("three")
    assert (events(tmp_path / "fabric.log.1"), events(path)) == (["one", "two"], ["three"])


def test_a_file_that_was_moved_away_or_deleted_is_opened_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr(outputs, "monotonic", time)
    path = tmp_path / "logs" / "fabric.log"
    log.setup("INFO", "json", str(path))
    path.rename(tmp_path / "moved")
    log.get().info("one")
    assert events(tmp_path / "moved") == ["one"], "it is looked at once a second, and until then nothing is lost"
    time.now += 1.0
    log.get().info("two")
    path.unlink()
    path.parent.rmdir()
    time.now += 1.0
    log.get().info("three")
    assert events(path) == ["three"]
    path.write_text("")  # truncated in place, as copytruncate does
    log.get().info("four")
    assert events(path) == ["four"]


def test_looking_for_the_file_costs_one_look_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time, looks = Time(), list[int]()
    monkeypatch.setattr(outputs, "monotonic", time)
    log.setup("INFO", "json", str(tmp_path / "fabric.log"), 0)
    moved = LogFile._moved

    def counting(self: LogFile) -> bool:
        looks.append(1)
        return moved(self)

    monkeypatch.setattr(LogFile, "_moved", counting)
    for _ in range(100):
        log.get().info("x")
        time.now += 0.05
    assert 4 <= len(looks) <= 5


def test_a_file_that_cannot_be_opened_again_stays_in_use_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr(outputs, "monotonic", time)
    folder = tmp_path / "logs"
    path = folder / "fabric.log"
    log.setup("INFO", "json", str(path))
    folder.rename(tmp_path / "moved")
    folder.write_text("in the way")
    log.reopen()
    time.now += 5.0
    log.get().info("two")
    old = tmp_path / "moved" / "fabric.log"
    first, *others = [json.loads(line) for line in old.read_text().splitlines()]
    assert first["event"] == "the log stays in the file that it was in"
    assert f"{path} cannot be opened again: " in first["why"]
    assert others[-1]["event"] == "two"
    folder.unlink()
    log.reopen()
    log.get().info("three")
    assert events(path) == ["three"]


def test_a_line_that_was_cut_off_by_a_full_disk_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fabric.log"
    log.setup("INFO", "json", str(path))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
    log.get().info("cut")
    monkeypatch.setattr(os, "write", real)
    log.get().info("whole")
    cut, whole = path.read_text().splitlines()
    assert len(cut) == 10 and json.loads(whole)["event"] == "whole"
    assert log.figures().lost == 1


def test_a_log_is_not_for_everybody_to_read(tmp_path: Path) -> None:
    path = tmp_path / "fabric.log"
    log.setup("INFO", "json", str(path))
    assert path.stat().st_mode & 0o007 == 0


# -- the journal ---------------------------------------------------------------------------------------------------------


def stream_of(file: io.TextIOWrapper) -> str:
    found = os.fstat(file.fileno())
    return f"{found.st_dev}:{found.st_ino}"


@pytest.mark.parametrize("style", ["json", "text"])
def test_in_the_journal_each_line_begins_with_its_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: Any
) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        monkeypatch.setattr(sys, "stderr", journal)
        monkeypatch.setenv("JOURNAL_STREAM", stream_of(journal))
        log.setup("DEBUG", style, "stderr")
        for level in ("debug", "info", "warning", "error"):
            getattr(log.get(), level)(level)
        fail(log.get())
        logging.getLogger("library").critical("down")
        journal.flush()
        lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in lines[:4]] == ["<7>", "<6>", "<4>", "<3>"]
    assert lines[-1].startswith("<2>")
    assert all(line.startswith("<3>") for line in lines[4:-1]), "a traceback of several lines, too"
    assert style == "text" or json.loads(lines[1][3:])["event"] == "info"


@pytest.mark.parametrize("said", ["", "1:2", "x:y", ":", "8:", "-1:-1", "\u00b2:\u00b2"])
def test_elsewhere_there_is_no_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    with (tmp_path / "other").open("w+") as other:
        monkeypatch.setattr(sys, "stderr", other)
        monkeypatch.setenv("JOURNAL_STREAM", said)
        log.setup("INFO", "json", "stderr")
        log.get().info("x")
        other.flush()
        assert (tmp_path / "other").read_text().startswith("{")
        assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": stream_of(other)})
        assert not is_journal(None, {"JOURNAL_STREAM": stream_of(other)})


def test_a_level_that_nobody_knows_is_information() -> None:
    assert prefixed("a\nb", "odd") == "<6>a\n<6>b"
