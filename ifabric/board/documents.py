"""Boards as data: YAML and JSON, a list of tasks or a map with `tasks`.

Ids, amounts and the other short fields are taken as they are written, before YAML or JSON makes numbers of them:
`id: 1.10` is not task 1.1, and no float touches a budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ifabric.board.rows import HOLDERS, STATUS_HINT, Errors, Row, status_notes, status_of

#: fields whose text counts, not what YAML takes it for
_AS_WRITTEN = {"id", "title", "depends", "depends_on", "needs", "wants", "priority", "attempts", "max_attempts"} | {
    "deadline",
    "deadline_s",
    "budget",
    "status",
}
_SHAPE = "a board is a list of tasks, or a map with `tasks`"


def read_yaml(text: str, errors: Errors) -> Iterator[Row]:
    """The tasks of a YAML document; anchors and merge keys may be used."""
    loader: Any = yaml.SafeLoader("")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == "tasks"), None)
        if not isinstance(node, yaml.SequenceNode):
            if node is not None or text.strip():
                errors.append((1, _SHAPE))
            return
        for number, child in enumerate(node.value):
            line = child.start_mark.line + 1
            if isinstance(child, yaml.MappingNode):
                yield from _row(line, _task(child, loader, errors), errors)
            else:
                errors.append((line, f"task {number + 1} is not a map"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or ("nested too deeply" if isinstance(error, RecursionError) else error)
        errors.append((mark.line + 1 if mark else 1, f"not YAML: {why}"))


def _task(node: yaml.MappingNode, loader: Any, errors: Errors) -> dict[str, Any]:
    written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = sorted({key for key in written if written.count(key) > 1})
    errors.extend((node.start_mark.line + 1, f"{key} is given twice") for key in twice)
    loader.flatten_mapping(node)  # `<<: *defaults`
    fields: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value)
        if name in _AS_WRITTEN and isinstance(value, yaml.ScalarNode):
            if not value.tag.endswith(":null"):
                fields[name] = value.value
        elif name in _AS_WRITTEN and isinstance(value, yaml.SequenceNode):
            fields[name] = [str(one.value) for one in value.value]
        else:
            fields[name] = loader.construct_object(value, deep=True)
    return fields


def read_json(text: str, errors: Errors) -> Iterator[Row]:
    """The tasks of a JSON document."""
    try:
        data = json.loads(text, parse_constant=_refuse)
        written = json.loads(text, parse_float=str)
    except json.JSONDecodeError as error:
        errors.append((error.lineno, f"not JSON: {error.msg} (column {error.colno})"))
        return
    except (ValueError, RecursionError) as error:
        errors.append((1, f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"))
        return
    if isinstance(data, dict):
        data, written = data.get("tasks"), written.get("tasks")
    if not isinstance(data, list):
        errors.append((1, _SHAPE))
        return
    lines = _lines_of_objects(text)
    for number, (task, as_written) in enumerate(zip(data, written, strict=True)):
        line = lines[number] if number < len(lines) else 1
        if isinstance(task, dict):
            fields = {key: as_written[key] if key in _AS_WRITTEN else value for key, value in task.items()}
            yield from _row(line, {key: value for key, value in fields.items() if value is not None}, errors)
        else:
            errors.append((line, f"task {number + 1} is not a map"))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _lines_of_objects(text: str) -> list[int]:
    """The lines where the elements of the list begin: the tasks of a map, or the outer list."""
    found: list[int] = []
    line, at = 1, 0
    open_: list[str] = []
    key = ""
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s,:\[\]{}"]+', text):
        line += text.count("\n", at, match.start())
        at = match.start()
        part = match[0]
        if open_ == ["["] or (open_ == ["{", "["] and key == '"tasks"'):
            if part != "]":
                found.append(line)
        elif open_ == ["{"] and part[0] == '"':
            key = part
        if part in "[{":
            open_.append(part)
        elif part in "]}":
            open_.pop()
    return found


def _row(line: int, fields: dict[str, Any], errors: Errors) -> Iterator[Row]:
    for key in [key for key in fields if str(key).lower().replace("_", " ") in HOLDERS]:
        del fields[key]
    done = fields.pop("done", False)
    word = fields.pop("status", "")
    status = status_of(word) if isinstance(word, str) else None
    if status is None:
        errors.append((line, f"status {word!r} is unknown; {STATUS_HINT}"))
    if not isinstance(done, bool):
        errors.append((line, f"done {done!r} is neither true nor false"))
    yield Row(line, done is True or status == "done", fields, status_notes(status or "open"))
