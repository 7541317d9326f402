"""Logs: JSON lines for machines, or a coloured form for people; to stderr, stdout or a file.

An entry is a line, whatever an agent has put into it. And logging never fails: a full disk or a closed pipe takes the
log away, not the daemon.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import structlog

from ifabric.errors import ConfigError

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def setup(level: str = "INFO", style: Literal["json", "text", "auto"] = "auto", output: str = "stderr") -> None:
    """Configures the process's logging, once. `auto`: text when the output is a terminal. `ConfigError` when a file
    cannot be opened.
    """
    stream = _open(output)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    # tracebacks without the values of their variables: one of them may be a header with a secret in it
    console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = console if as_text else structlog.processors.JSONRenderer(serializer=_json)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    shared.append(_one_line if as_text else structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(_Unfailing(stream)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[_drop_meta, renderer], foreign_pre_chain=shared)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.WARNING))  # libraries: what is worth a warning
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # nats-py tells our error callback, and the log besides


class _Unfailing:
    """A stream that loses what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes, if it can be done."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed, or not to be encoded
            self._stream.write(text)

    def flush(self) -> None:
        """Flushes, if it can be done."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _open(output: str) -> TextIO:
    if output in ("stderr", "stdout"):
        stream: TextIO = getattr(sys, output)
        return stream
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        return Path(output).open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"logging.output: cannot write {output}: {error.strerror}") from None


def _json(event: MutableMapping[str, Any], **_: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except Exception:  # half a surrogate, a circle, a `__str__` that raises
        plain = (str, int, float)
        return json.dumps({str(k): v if isinstance(v, plain) else ascii(v)[:2000] for k, v in event.items()})


def _one_line(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What would begin another line, or command the terminal, is shown and not obeyed."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return event


def _drop_meta(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(_, __, event)


def get(**bound: Any) -> Any:
    """A logger with these words on every line."""
    return structlog.get_logger().bind(**bound)
