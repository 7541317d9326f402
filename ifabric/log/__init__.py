"""Logs: JSON lines for machines, or a coloured form for people; to stderr, stdout or a file.

An entry is a line, whatever an agent has put into it. It says whose message was being handled when it was written. It
holds no secret (`redacting`), the same entry is not written a million times (`repeats`), and logging never fails: a
full disk or a closed pipe takes the log away, not the daemon (`output`).
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import structlog

from ifabric.clock import monotonic
from ifabric.handling import CURRENT
from ifabric.log.output import LogFile, Output, is_journal, open_output, prefixed
from ifabric.log.redacting import REDACTED, clean, redact
from ifabric.log.repeats import Held, Repeats

__all__ = ["LEVELS", "REDACTED", "figures", "get", "redact", "reopen", "setup"]

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
REPEATS_PER_MINUTE = 60
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_LEVELS = tuple(name.lower() for name in LEVELS)
Entry = MutableMapping[str, Any]


@dataclass
class _Now:
    """What this process's logging is."""

    output: Output | None = None
    repeats: Repeats | None = None
    counts: dict[str, int] | None = None


_now = _Now()


@dataclass(frozen=True)
class Figures:
    """Of this process since `setup`: entries by level, those held back as repeats, and those that could not be written."""

    written: dict[str, int]
    held_back: int
    lost: int
    #: why the log is not in the file that it should be in; None when it is
    trouble: str | None = None


def setup(
    level: str = "INFO",
    style: Literal["json", "text", "auto"] = "auto",
    output: str = "stderr",
    repeats_per_minute: int = REPEATS_PER_MINUTE,
) -> None:
    """Configures the process's logging, once. `auto`: text when the output is a terminal. `repeats_per_minute` is how
    often the same entry is written, 0: always. `ConfigError` when a file cannot be opened.
    """
    stream = getattr(sys, output) if output in ("stderr", "stdout") else None
    opened = open_output(output, stream)
    as_text = style == "text" or (style == "auto" and opened.isatty())
    counts = dict.fromkeys(_LEVELS, 0)
    repeats = Repeats(repeats_per_minute, monotonic, _say_again)
    before, _now.output, _now.repeats, _now.counts = _now.output, opened, repeats, counts
    if isinstance(before, LogFile):
        before.close()
    first: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    stamp: list[Any] = [
        _of_the_message,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last = _rendered(as_text=as_text, in_journal=is_journal(stream, os.environ), counts=counts)
    structlog.configure(
        processors=[*first, _not_too_often(repeats), *stamp, last],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(opened),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(opened)
    handler.addFilter(_library_not_too_often(repeats))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[_drop_meta, last], foreign_pre_chain=[*first, *stamp])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.WARNING))  # libraries: what is worth a warning
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # nats-py tells our error callback, and the log besides


def get(**bound: Any) -> Any:
    """A logger with these words on every line."""
    return structlog.get_logger().bind(**bound)


def reopen() -> None:
    """Opens the file again, after it was moved away (SIGHUP). When that fails the old one stays in use, which is told."""
    if _now.output is None:
        return
    trouble = _now.output.reopen()
    if trouble is not None:
        get().error("the log stays in the file that it was in", why=trouble)


def figures() -> Figures:
    """How much was written, held back and lost."""
    output, repeats = _now.output, _now.repeats
    return Figures(
        dict(_now.counts or {}),
        repeats.held if repeats is not None else 0,
        output.lost if output is not None else 0,
        output.trouble if output is not None else None,
    )


@atexit.register
def _at_the_end() -> None:
    if _now.repeats is not None:
        _now.repeats.tell_ended(all_of_them=True)


# -- what an entry passes through ---------------------------------------------------------------------------------------


def _of_the_message(_: Any, __: str, event: Entry) -> Entry:
    """Whose message is being handled, if one is. What the entry says itself stays. A task that outlives its message
    says nothing of it: it may live for days.
    """
    handling = CURRENT.get()
    if handling is None or handling.ended != handling.arrived:
        return event
    add = event.setdefault
    add("actor", handling.component)
    add("verb", handling.verb)
    if handling.session:
        add("session", handling.session)
    if request_id := handling.request_id:
        add("request_id", request_id)
    if handling.trace and (found := _TRACEPARENT.fullmatch(handling.trace)):
        add("trace", found[1])
    return event


def _not_too_often(repeats: Repeats) -> Callable[[Any, str, Entry], Entry]:
    def judge(_: Any, __: str, event: Entry) -> Entry:
        if not event.pop(_ANYWAY, False):
            words = str(event.get("event", ""))[:500]
            if not repeats.may_say(_where(), words, event["level"], str(event.get("actor", ""))):
                raise structlog.DropEvent
        return event

    return judge


def _library_not_too_often(repeats: Repeats) -> Callable[[logging.LogRecord], bool]:
    def judge(record: logging.LogRecord) -> bool:
        where = f"{record.name}:{record.lineno}"
        return repeats.may_say(where, str(record.msg)[:500], record.levelname.lower(), "")

    return judge


#: on an entry that is never held back
_ANYWAY = "_anyway"
_OURS = (__name__, "structlog")


def _where() -> str:
    """The file and line that the entry comes from."""
    frame = inspect.currentframe()
    assert frame is not None  # CPython has them
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def _say_again(held: Held) -> None:
    words: dict[str, Any] = {
        "of": held.place.event,
        "times": held.times,
        "within_s": held.within_s,
        "from": held.place.where,
    }
    if held.actor:
        words["actor"] = held.actor
    level = held.level if held.level in _LEVELS else "warning"
    getattr(structlog.get_logger(), level)("said again", **words, **{_ANYWAY: True})


def _rendered(*, as_text: bool, in_journal: bool, counts: dict[str, int]) -> Callable[[Any, str, Entry], str]:
    """The entry without secrets, as a line."""
    # tracebacks without the values of their variables: one of them may be a header with a secret in it
    console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = console if as_text else structlog.processors.JSONRenderer(serializer=_json)

    def render(logger: Any, name: str, event: Entry) -> str:
        level = str(event.get("level", name))
        counts[level if level in counts else "error"] += 1
        cleaned = clean(event)
        text: str = renderer(logger, name, _one_line(cleaned) if as_text else cleaned)
        return prefixed(text, level) if in_journal else text

    return render


def _json(event: Entry, **_: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except Exception:  # half a surrogate, a number that is too large
        plain = (str, int, float)
        return json.dumps({str(k): v if isinstance(v, plain) else ascii(v)[:2000] for k, v in event.items()})


def _one_line(event: dict[str, Any]) -> dict[str, Any]:
    """What would begin another line, or command the terminal, is shown and not obeyed. A traceback keeps its lines."""
    for key, value in event.items():
        if isinstance(value, str):
            which = _CONTROL_IN_LINES if key in ("exception", "stack") else _CONTROL
            event[key] = which.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return event


def _drop_meta(_: Any, __: str, event: Entry) -> Entry:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(_, __, event)
