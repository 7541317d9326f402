"""From rows to tasks: every field checked, every id there once, every dependency known and none in a circle."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from ifabric.board.rows import Errors, Row
from ifabric.wire.coordinator import TaskSpec
from ifabric.wire.envelope import PAYLOAD_MAX_BYTES, encode
from ifabric.wire.subjects import TASK_ID

PRIORITIES = {
    "lowest": -20, "low": -10, "normal": 0, "medium": 0, "high": 10, "highest": 20, "critical": 20, "urgent": 20,
}  # fmt: skip
_NONE = {"", "-", "\u2013", "\u2014", "none", "n/a", "nothing"}
_USD = re.compile(r"\$?\s*([0-9]{1,10}|[0-9]{1,3}(?:,[0-9]{3}){1,3})(?:\.([0-9]{1,6})0*)?(?:\s*USD)?")
_NAMES = {
    "depends": "depends_on", "attempts": "max_attempts", "deadline": "deadline_s", "budget": "budget_micro_usd",
}  # fmt: skip
#: what a task in a YAML or JSON board may have
KNOWN = tuple(sorted({*TaskSpec.__struct_fields__, *_NAMES, "status", "done"} - {"budget_micro_usd"}))


def specs_of(rows: Sequence[Row], errors: Errors) -> tuple[dict[str, TaskSpec], dict[str, int]]:
    """The tasks by their id, and the line of each."""
    specs: dict[str, TaskSpec] = {}
    lines: dict[str, int] = {}
    for row in rows:
        try:
            spec = spec_of(row.fields)
        except (ValueError, msgspec.ValidationError) as error:
            errors.append((row.line, str(error)))
            lines.setdefault(str(row.fields.get("id", "")), row.line)  # it is there, if bad: others may depend on it
            continue
        if spec.id in lines:
            errors.append((row.line, f"task {spec.id} is there twice: also on line {lines[spec.id]}"))
            continue
        specs[spec.id], lines[spec.id] = spec, row.line
    return specs, lines


def spec_of(fields: dict[str, Any]) -> TaskSpec:
    """A task of fields that may be text (from Markdown) or data. `ValueError` or msgspec's error says what is wrong."""
    task: dict[str, Any] = {}
    for key, value in fields.items():
        name = _NAMES.get(key, key)
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, 1, cutoff=0.6)
            raise ValueError(f"unknown field {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if name in task:
            raise ValueError(f"{key} and {name} say the same; give one")
        task[name] = _READERS[name](value) if name in _READERS else value
    if "id" not in task:
        raise ValueError("a task without an id")
    spec = msgspec.convert(task, TaskSpec)
    _refuse_heavy(spec)
    return spec


def _refuse_heavy(spec: TaskSpec) -> None:
    """Refuses what cannot be sent, before anything is: a payload too large, or not JSON."""
    left = PAYLOAD_MAX_BYTES
    waiting = [spec.payload]
    while waiting:  # counted first: a YAML anchor can make gigabytes of a line, or hold itself
        value = waiting.pop()
        left -= len(value) if isinstance(value, str | bytes) else 1
        if left < 0:
            raise ValueError(f"the payload is larger than {PAYLOAD_MAX_BYTES} bytes of JSON")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    try:
        size = len(encode(spec.payload))
        encode(spec)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"it cannot be sent as JSON: {error}") from None
    if size > PAYLOAD_MAX_BYTES:
        raise ValueError(f"the payload has {size} bytes of JSON; {PAYLOAD_MAX_BYTES} are allowed")


# -- fields as people write them -------------------------------------------------------------------------------------


def _id(value: Any) -> str:
    if not re.fullmatch(TASK_ID, str(value)) or str(value).endswith("\n"):
        raise ValueError(
            f"id {value!r} is none: 1 to 128 of letters, digits and . _ : / @ # + -, a letter or digit first"
        )
    return str(value)


def _ids(value: Any) -> list[str]:
    """Separated by commas, semicolons, spaces or `and`."""
    words = value if isinstance(value, list) else re.split(r"[,;\s]+|\s+and\s+", str(value))
    return list(dict.fromkeys(str(word) for word in words if str(word).lower() not in _NONE | {"and", "&"}))


def _capabilities(value: Any) -> list[str]:
    """Separated by commas, or by spaces where there is no comma."""
    text = str(value)
    words = value if isinstance(value, list) else text.split(",") if "," in text else text.split()
    return list(dict.fromkeys(str(w).strip() for w in words if str(w).strip().lower() not in _NONE))


def _priority(value: Any) -> int:
    word = str(value).strip().lower()
    if word in PRIORITIES:
        return PRIORITIES[word]
    if re.fullmatch(r"p[0-9]", word):  # P0 is the most urgent
        return 10 * (3 - int(word[1]))
    return _whole("priority", value)


def _whole(key: str, value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,9}", text, re.ASCII):
        raise ValueError(f"{key} {value!r} is not a whole number")
    return int(text)


def _micro_usd(value: Any) -> int:
    """US dollars as written, in integer micro-USD. No float touches it."""
    amount = _USD.fullmatch(str(value).strip())
    if isinstance(value, bool) or amount is None:
        raise ValueError(f"budget {value!r} is not an amount in USD such as 1.50, of at most six decimals")
    return int(amount[1].replace(",", "")) * 1_000_000 + int((amount[2] or "").ljust(6, "0"))


_READERS: dict[str, Callable[[Any], Any]] = {
    "id": _id,
    "depends_on": _ids,
    "needs": _capabilities,
    "wants": _capabilities,
    "priority": _priority,
    "max_attempts": lambda value: _whole("attempts", value),
    "deadline_s": lambda value: _whole("deadline", value),
    "budget_micro_usd": _micro_usd,
}


# -- the order -------------------------------------------------------------------------------------------------------


def in_order(specs: dict[str, TaskSpec], lines: dict[str, int], errors: Errors) -> list[TaskSpec]:
    """Every task after those it depends on, else as written. Unknown dependencies and circles become errors."""
    waiting: dict[str, set[str]] = {}
    dependents: dict[str, list[str]] = {}
    for task, spec in specs.items():
        known = {other for other in spec.depends_on if other in specs}
        waiting[task] = known
        for other in known:
            dependents.setdefault(other, []).append(task)
        for other in spec.depends_on:
            if other not in lines:
                close = difflib.get_close_matches(other, specs, 1, cutoff=0.7) if len(specs) <= 1000 else []
                hint = f"; did you mean {close[0]}?" if close else ""
                errors.append((lines[task], f"task {task} depends on {other}, which is not on this board{hint}"))
    order: list[TaskSpec] = []
    ready = [task for task, others in waiting.items() if not others]
    for task in ready:  # grows while it is walked
        order.append(specs[task])
        for dependent in dependents.get(task, ()):
            waiting[dependent].discard(task)
            if not waiting[dependent]:
                ready.append(dependent)
    for circle in _circles({task: others for task, others in waiting.items() if others}):
        path = " -> ".join(f"{task} (line {lines[task]})" for task in (*circle, circle[0]))
        errors.append((lines[circle[0]], f"the tasks depend on each other in a circle: {path}"))
    return order


def _circles(waiting: dict[str, set[str]]) -> Iterator[list[str]]:
    """The circles that one finds by going from each stuck task to one that it waits for; each of them once."""
    walked: set[str] = set()
    for start in waiting:
        path: dict[str, None] = {}
        task = start
        while task not in walked:
            walked.add(task)
            path[task] = None
            task = min(waiting[task])
        if task in path:
            steps = list(path)
            yield steps[steps.index(task) :]
