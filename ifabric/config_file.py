"""From YAML files and the environment to a `Config`, with errors that name the file, the line and the path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from ifabric.config import Config, smells
from ifabric.errors import ConfigError

PREFIX = "IFABRIC__"
FILE_MAX_BYTES = 1 << 20
#: sections of the runbook whose components this version does not have
NOT_YET = ("governor", "chassis")
ERRORS_MAX = 50

Path_ = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class _Reading:
    """What was read so far: the merged value, where each part came from, and what is wrong."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.places: dict[Path_, Place] = {}
        self.errors: list[str] = []


def load(paths: Sequence[Path], environ: Mapping[str, str]) -> tuple[Config, list[str]]:
    """The configuration of the files, later ones over earlier ones, then of the environment; and what smells.

    Maps are merged, lists and scalars replaced. ``IFABRIC__COORDINATOR__ETCD__TIMEOUT_SECONDS=3`` sets one key; its
    value is YAML. `COORDINATOR_CONFIG` names a file to read first, as in the runbook's unit. Raises `ConfigError`
    with every error on a line of its own.
    """
    reading = _Reading()
    first = environ.get("COORDINATOR_CONFIG")
    for path in [*([Path(first)] if first else []), *paths]:
        _read(path, reading)
    _environment(environ, reading)
    _unknown(reading.value, Config, (), reading)
    config = _convert(reading)
    if config is None or reading.errors:
        raise ConfigError("\n".join(reading.errors[:ERRORS_MAX]))
    return config, smells(config)


def _read(path: Path, reading: _Reading) -> None:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            reading.errors.append(f"{path}: larger than {FILE_MAX_BYTES} bytes; that is no configuration")
            return
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        reading.errors.append(f"{path}: cannot be read: {why}")
        return
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reading.errors.append(f"{where}: not YAML: {getattr(error, 'problem', None) or type(error).__name__}")
        return
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        reading.errors.append(f"{path}:{node.start_mark.line + 1}: the file is to be a map of sections")
        return
    value = _value(node, (), str(path), reading)
    _merge(reading.value, value)


def _value(node: yaml.Node, at: Path_, source: str, reading: _Reading) -> Any:
    """A node as plain data; where each part stands goes to `places`."""
    reading.places[at] = Place(source, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in made:
                reading.errors.append(f"{source}:{line}: {_dotted((*at, key))} is given twice")
            made[key] = _value(value_node, (*at, key), source, reading)
            reading.places[(*at, key)] = Place(source, line)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*at, number), source, reading) for number, child in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except yaml.YAMLError as error:
        reading.errors.append(f"{source}:{node.start_mark.line + 1}: {_dotted(at)}: {getattr(error, 'problem', error)}")
        return None


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        elif value is not None or key not in under:  # an empty section in a later file takes nothing away
            under[key] = value


def _environment(environ: Mapping[str, str], reading: _Reading) -> None:
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        at: Path_ = tuple(part.lower() for part in name.removeprefix(PREFIX).split("__"))
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            reading.errors.append(f"${name}: the value is not YAML")
            continue
        over: Any = value
        for depth in range(len(at) - 1, -1, -1):
            over = {at[depth]: over}
            reading.places[at[: depth + 1]] = Place(f"${name}", 0)
        _merge(reading.value, over)


def _unknown(value: Any, struct: type[msgspec.Struct], at: Path_, reading: _Reading) -> None:
    """Takes out what no struct has a field for, and says so."""
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key in list(value):
        inner = fields.get(key)
        if key not in fields:
            del value[key]
            place = reading.places.get((*at, key), Place("?", 0))
            if not at and key in NOT_YET:
                hint = f": this version has no {key}; take the section out"
            else:
                close = difflib.get_close_matches(key, fields, 1, cutoff=0.6)
                hint = f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(sorted(fields))}"
            reading.errors.append(f"{place}: unknown key {_dotted((*at, key))}{hint}")
        elif isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if value[key] is None:  # a section whose keys are all commented out
                value[key] = {}
            if isinstance(value[key], dict):
                _unknown(value[key], inner, (*at, key), reading)


def _convert(reading: _Reading) -> Config | None:
    """The structs. A value that does not fit is taken out and the rest tried again, so that all are found at once."""
    for _ in range(ERRORS_MAX):
        try:
            return msgspec.convert(reading.value, Config)
        except msgspec.ValidationError as error:
            what, _, path = str(error).partition(" - at `$")
            at: Path_ = tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]`]+", path) if part)
            while at and at not in reading.places:
                at = at[:-1]
            reading.errors.append(
                f"{reading.places.get(at, Place('?', 0))}: {_dotted(at)}: {what[0].lower() + what[1:]}"
            )
            if not _remove(reading.value, at):
                return None
    return None


def _remove(value: Any, at: Path_) -> bool:
    for part in at[:-1]:
        value = value[part]
    try:
        del value[at[-1]]
    except (IndexError, KeyError, TypeError):
        return False
    return True


def _dotted(at: Path_) -> str:
    return ".".join(str(part) for part in at) or "the file"
