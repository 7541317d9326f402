"""From YAML files and the environment to a `Config`, with errors that name the file, the line and the path."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from ifabric.config import Config, smells
from ifabric.errors import ConfigError

PREFIX = "IFABRIC__"
#: limits of one document. Aliases of aliases make a gigabyte of a few lines, or a circle that has no end.
FILE_MAX_BYTES = 1 << 18
VALUES_MAX = 20_000
DEPTH_MAX = 50
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
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
        #: what could not be read, which has been said
        self.unread: set[Path_] = set()
        #: how many more values the document may have
        self.left = 0


class _TooMuch(Exception):
    """The document is larger, once its aliases are written out, than any configuration."""


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
    if config is not None and len(set(config.actors)) < len(config.actors):
        reading.errors.append(f"{reading.places[('actors',)]}: actors: one is named twice")
    if config is None or reading.errors:
        raise ConfigError("\n".join(reading.errors[:ERRORS_MAX]))
    return config, smells(config)


def _read(path: Path, reading: _Reading) -> None:
    try:
        with path.open("rb") as file:  # never more of it than that: it may be a pipe, or a device without an end
            data = file.read(FILE_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        reading.errors.append(f"{path}: cannot be read: {error.strerror}")
        return
    except UnicodeDecodeError:
        reading.errors.append(f"{path}: cannot be read: not UTF-8")
        return
    if len(data) > FILE_MAX_BYTES:
        reading.errors.append(f"{path}: larger than {FILE_MAX_BYTES} bytes; that is no configuration")
        return
    node = _compose(text, str(path), reading)
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        reading.errors.append(f"{path}:{node.start_mark.line + 1}: the file is to be a map of sections")
        return
    value = _plain(node, (), str(path), reading)
    if value is not None:
        _merge(reading.value, value)


def _compose(text: str, source: str, reading: _Reading) -> yaml.Node | None:
    """The document as nodes, which know their lines. None when there is none."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or getattr(error, "reason", None)
        if isinstance(error, RecursionError):
            why = "nested too deeply"
        line = mark.line + 1 if mark and not source.startswith("$") else 0
        reading.errors.append(f"{Place(source, line)}: not YAML: {why}")
        return None


def _plain(node: yaml.Node, at: Path_, source: str, reading: _Reading) -> Any:
    """A document as plain data; None, and an error, when it is too much."""
    reading.left = VALUES_MAX
    try:
        return _value(node, at, source, reading, 0)
    except _TooMuch as error:
        reading.errors.append(f"{error}")
        reading.unread.add(at)
        return None


def _value(node: yaml.Node, at: Path_, source: str, reading: _Reading, depth: int) -> Any:
    """A node as plain data; where each part stands goes to `places`."""
    reading.left -= 1
    place = reading.places[at] = _place(node, source)
    if depth > DEPTH_MAX:
        raise _TooMuch(f"{place}: {_dotted(at)[:60]}...: nested more than {DEPTH_MAX} deep")
    if reading.left < 0:
        raise _TooMuch(f"{place}: more than {VALUES_MAX} values; that is no configuration")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN_TAGS:
        reading.errors.append(f"{place}: {_dotted(at)}: the tag {node.tag[:60]} means nothing here")
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = _place(key_node, source)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                reading.errors.append(f"{line}: {_dotted(at)}: a key is a word, not a list, a map or a merge")
                continue
            key = str(key_node.value)
            if key in made:
                reading.errors.append(f"{line}: {_dotted((*at, key))} is given twice")
            made[key] = _value(value_node, (*at, key), source, reading, depth + 1)
            reading.places[(*at, key)] = line
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*at, number), source, reading, depth + 1) for number, child in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except Exception as error:  # PyYAML leaves some to int(), float() and datetime(), and they raise what they like
        reading.errors.append(f"{place}: {_dotted(at)}: {getattr(error, 'problem', None) or error}")
        reading.unread.add(at)
        return None


def _place(node: yaml.Node, source: str) -> Place:
    return Place(source, 0 if source.startswith("$") else node.start_mark.line + 1)


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
        if len(at) > DEPTH_MAX or len(text) > FILE_MAX_BYTES:
            reading.errors.append(f"${name}: longer than any key or value")
            continue
        said = len(reading.errors)
        node = _compose(text, f"${name}", reading)
        if len(reading.errors) > said:
            continue
        over: Any = None if node is None else _plain(node, at, f"${name}", reading)
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
            close = difflib.get_close_matches(key, fields, 1, cutoff=0.6)
            hint = f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(sorted(fields))}"
            reading.errors.append(f"{place}: unknown key {_dotted((*at, key))}{hint}")
        elif isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if value[key] is None:  # a section whose keys are all commented out
                value[key] = {}
            if isinstance(value[key], dict):
                _unknown(value[key], inner, (*at, key), reading)
        elif isinstance(value[key], dict):
            _unknown_within(value[key], inner, (*at, key), reading)


def _unknown_within(value: dict[Any, Any], kind: Any, at: Path_, reading: _Reading) -> None:
    """The same for a section that may be absent, and for sections under names of the operator's own."""
    inner = [part for part in typing.get_args(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct)]
    if not inner:
        return
    if typing.get_origin(kind) is not dict:
        _unknown(value, inner[0], at, reading)
        return
    for name, section in value.items():
        if isinstance(section, dict):
            _unknown(section, inner[0], (*at, name), reading)


def _convert(reading: _Reading) -> Config | None:
    """The structs. A value that does not fit is taken out and the rest tried again, so that all are found at once."""
    gone: dict[Path_, list[int]] = {}
    for _ in range(ERRORS_MAX):
        try:
            return msgspec.convert(reading.value, Config)
        except msgspec.ValidationError as error:
            what, _, path = str(error).partition(" - at `$")
            at: Path_ = tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]`]+", path) if part)
            written, within = _as_written(at, gone), ""
            while (
                written and written not in reading.places
            ):  # below a name of the operator's own, which msgspec does not tell
                within = f"{written[-1]}: {within}"
                at, written = at[:-1], written[:-1]
            place = reading.places.get(written, Place("?", 0))
            if written not in reading.unread:
                reading.errors.append(f"{place}: {_dotted(written)}: {within}{what[0].lower() + what[1:]}")
            if not _remove(reading.value, at):
                return None
            if isinstance(written[-1], int):
                gone.setdefault(written[:-1], []).append(written[-1])
    return None


def _as_written(at: Path_, gone: dict[Path_, list[int]]) -> Path_:
    """The path as it is in the file, whose lists are longer by what was taken out."""
    made: Path_ = ()
    for part in at:
        number = part
        if isinstance(number, int):
            for index in sorted(gone.get(made, ())):
                number += index <= number
        made = (*made, number)
    return made


def _remove(value: Any, at: Path_) -> bool:
    for part in at[:-1]:
        value = value[part]
    try:
        del value[at[-1]]
    except (IndexError, KeyError, TypeError):
        return False
    return True


def _dotted(at: Path_) -> str:
    return ".".join(str(part) or "''" for part in at) or "the file"
