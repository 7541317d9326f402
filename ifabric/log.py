"""Logs: JSON lines for machines, or a coloured form for people; to stderr, stdout or a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import structlog

from ifabric.errors import ConfigError

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}


def setup(level: str = "INFO", style: Literal["json", "text", "auto"] = "auto", output: str = "stderr") -> None:
    """Configures the process's logging, once. `auto`: text when the output is a terminal. `ConfigError` when a file
    cannot be opened.
    """
    stream = _open(output)
    as_text = style == "text" or (style == "auto" and stream.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if as_text else structlog.processors.JSONRenderer(serializer=_json)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not as_text:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(stream),
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


def _open(output: str) -> TextIO:
    if output in ("stderr", "stdout"):
        stream: TextIO = getattr(sys, output)
        return stream
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        return Path(output).open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"logging.output: cannot write {output}: {error.strerror}") from None


def _json(event: MutableMapping[str, Any], **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


def _drop_meta(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(_, __, event)


def get(**bound: Any) -> Any:
    """A logger with these words on every line."""
    return structlog.get_logger().bind(**bound)
