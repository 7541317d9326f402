"""Reads task boards: Markdown (task lists and tables), YAML and JSON.

Pure: text in, tasks out, or one error that names every bad row by its line. Nothing is sent before everything is
understood.

    - [ ] P0.1.1 Build the parser {needs: rust, wasm; depends: P0.1.0; priority: 5}
    - [x] P0.1.0 Choose a parser

    | ID     | Title            | Status | Depends | Priority | Needs      |
    |--------|------------------|--------|---------|----------|------------|
    | P0.1.1 | Build the parser | todo   | P0.1.0  | 5        | rust, wasm |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ifabric.errors import BadRequest
from ifabric.wire.coordinator import TaskSpec
from ifabric.wire.subjects import TASK_ID

Format = Literal["md", "yaml", "json"]
ERRORS_MAX = 50
TASKS_MAX = 100_000

DONE = {"done", "complete", "completed", "finished", "closed", "x", "[x]", "✅", "✔", "✓", "☑", "yes"}
OPEN = {
    "", "todo", "to do", "open", "pending", "ready", "new", "planned", "not started", "available", "unclaimed", "blocked", "[ ]",
    "⬜", "☐", "🔵", "no", "in progress", "in-progress", "wip", "doing", "started", "claimed", "active", "🟡", "⏳", "🚧", "-",
}  # fmt: skip
COLUMNS = {
    "id": "id", "task": "id", "task id": "id", "key": "id", "#": "id",
    "title": "title", "description": "title", "name": "title", "summary": "title", "what": "title",
    "status": "status", "state": "status", "done": "status",
    "depends": "depends", "depends on": "depends", "dependencies": "depends", "dependency": "depends", "after": "depends",
    "blocked by": "depends",
    "priority": "priority", "prio": "priority",
    "needs": "needs", "requires": "needs", "skills": "needs", "capabilities": "needs",
    "wants": "wants", "prefers": "wants",
    "attempts": "attempts", "max attempts": "attempts",
    "deadline": "deadline", "budget": "budget",
}  # fmt: skip
PRIORITIES = {
    "lowest": -20,
    "low": -10,
    "normal": 0,
    "medium": 0,
    "high": 10,
    "highest": 20,
    "critical": 20,
    "urgent": 20,
}
_ID = re.compile(TASK_ID)
_IDLIKE = re.compile(r"^(?=[^\s]*[0-9])[A-Za-z0-9][A-Za-z0-9._/#-]*$")
_BRACES = re.compile(r"\{([^{}]*)\}\s*$")
_BOX = re.compile(r"^\[([ xX])\]\s+(.*)$", re.DOTALL)


class Row(NamedTuple):
    """One task as written: the line it stands on, whether it is done, and its fields as text or data."""

    line: int
    done: bool
    fields: dict[str, Any]


class Board(NamedTuple):
    """The tasks in an order in which every dependency comes first, and those that arrive done."""

    tasks: tuple[TaskSpec, ...]
    done: tuple[str, ...]


def read_board(text: str, *, format: Format, filename: str = "board") -> Board:
    """The board in `text`. `BadRequest`, with a line ``file:line: what`` for each bad row, when it is not one."""
    errors: list[tuple[int, str]] = []
    rows = list({"md": _markdown, "yaml": _yaml, "json": _json}[format](text, errors))
    if not rows and not errors:
        hint = (
            "a task list (`- [ ] ID Title`) or a table with an ID column"
            if format == "md"
            else "a list of tasks with ids"
        )
        errors.append((1, f"there are no tasks here; {hint} is what makes a board"))
    if len(rows) > TASKS_MAX:
        errors.append((1, f"{len(rows)} tasks; {TASKS_MAX} are allowed"))
    board = _checked(rows, errors)
    if errors:
        lines = [f"{filename}:{line}: {what}" for line, what in sorted(errors)]
        more = [f"(+{len(lines) - ERRORS_MAX} more)"] if len(lines) > ERRORS_MAX else []
        raise BadRequest("\n".join([*lines[:ERRORS_MAX], *more]))
    assert board is not None
    return board


def format_of(path: Path) -> Format | None:
    """The format that a file's name says."""
    formats: dict[str, Format] = {".md": "md", ".markdown": "md", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
    return formats.get(path.suffix.lower())


# -- Markdown --------------------------------------------------------------------------------------------------------


def _markdown(text: str, errors: list[tuple[int, str]]) -> Iterator[Row]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token.type == "table_open":
            end = next(i for i in range(at, len(tokens)) if tokens[i].type == "table_close")
            yield from _table(tokens[at:end], errors)
            at = end
        elif token.type == "inline" and at >= 2 and tokens[at - 2].type == "list_item_open":
            row = _item(token, errors)
            if row is not None:
                yield row
        at += 1


def _item(token: Token, errors: list[tuple[int, str]]) -> Row | None:
    """`[ ] ID Title {key: value; ...}`; None for a list item that is no task."""
    box = _BOX.match(token.content)
    if box is None:
        return None
    line = (token.map or [0])[0] + 1
    fields: dict[str, Any] = {}
    text = " ".join(box[2].split())
    braces = _BRACES.search(text)
    if braces is not None:
        text = text[: braces.start()].strip()
        for part in filter(None, (part.strip() for part in braces[1].split(";"))):
            key, colon, value = part.partition(":")
            field = COLUMNS.get(key.strip().lower())
            if not colon or field in (None, "id", "title", "status"):
                known = "needs, wants, depends, priority, attempts, deadline, budget"
                errors.append((line, f"in {{...}}: {part!r} is not `key: value` with a key of {known}"))
            else:
                fields[str(field)] = value.strip()
    text = re.sub(r"^(\*\*|__|`)(.+?)\1:?", r"\2", text)
    first, _, rest = text.partition(" ")
    if _IDLIKE.match(first.rstrip(":")):
        fields |= {"id": first.rstrip(":"), "title": rest.strip(" :-\u2013\u2014")}
    else:
        fields |= {"id": _slug(text), "title": text}
    return Row(line, box[1] in "xX", fields)


def _table(tokens: Sequence[Token], errors: list[tuple[int, str]]) -> Iterator[Row]:
    rows: list[tuple[int, list[str]]] = []
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append(((token.map or [0])[0] + 1, []))
        elif token.type == "inline" and tokens[at - 1].type in ("th_open", "td_open"):
            rows[-1][1].append(" ".join(token.content.split()))
    if not rows:
        return
    header = [COLUMNS.get(cell.strip("*_` ").lower()) for cell in rows[0][1]]
    if "id" not in header:
        return  # a table about something else
    if "title" not in header and header.count("id") == 2:
        header[len(header) - 1 - header[::-1].index("id")] = "title"  # | ID | Task | ... : the task's text
    for line, cells in rows[1:]:
        fields = {name: cell.strip("`") for name, cell in zip(header, cells, strict=False) if name and cell}
        if not fields.get("id"):
            errors.append((line, "a row without an id"))
            continue
        fields["id"] = fields["id"].strip("*_` ")
        status = fields.pop("status", "").strip("*_` ").lower()
        words = {status, status.split(" ")[0], re.sub(r"^[^\w\[]+\s*", "", status)}
        if not words & (DONE | OPEN):
            errors.append((line, f"status {status!r} is unknown; use todo, in progress, blocked or done"))
        yield Row(line, bool(words & DONE), fields)


def _slug(title: str) -> str:
    """A stable id for an item that names none."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:64] or "task"


# -- YAML and JSON ---------------------------------------------------------------------------------------------------


def _yaml(text: str, errors: list[tuple[int, str]]) -> Iterator[Row]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        errors.append((mark.line + 1 if mark else 1, f"not YAML: {getattr(error, 'problem', None) or error}"))
        return
    lines: list[int] = []
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "tasks"), None)
    if isinstance(node, yaml.SequenceNode):
        lines = [child.start_mark.line + 1 for child in node.value]
    yield from _listed(data, lines, errors)


def _json(text: str, errors: list[tuple[int, str]]) -> Iterator[Row]:
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        errors.append((1, f"not JSON: {error}"))
        return
    starts = [match.start() for match in re.finditer(r'"id"\s*:', text)]
    lines = [text.count("\n", 0, start) + 1 for start in starts]
    yield from _listed(data, lines, errors)


def _listed(data: Any, lines: list[int], errors: list[tuple[int, str]]) -> Iterator[Row]:
    tasks = data.get("tasks") if isinstance(data, dict) else data
    if not isinstance(tasks, list):
        errors.append((1, "a board is a list of tasks, or a map with `tasks`"))
        return
    for number, task in enumerate(tasks):
        line = lines[number] if number < len(lines) else 1
        if not isinstance(task, dict):
            errors.append((line, f"task {number + 1} is not a map"))
            continue
        fields = {str(key): value for key, value in task.items()}
        done = fields.pop("done", False)
        status = str(fields.pop("status", "")).lower()
        if status not in DONE | OPEN:
            errors.append((line, f"status {status!r} is unknown; use todo, in progress, blocked or done"))
        yield Row(line, done is True or status in DONE, fields)


# -- from rows to tasks ----------------------------------------------------------------------------------------------


def _checked(rows: list[Row], errors: list[tuple[int, str]]) -> Board | None:
    specs: dict[str, TaskSpec] = {}
    lines: dict[str, int] = {}
    done: list[str] = []
    for row in rows:
        try:
            spec = _spec(row.fields)
        except (ValueError, msgspec.ValidationError) as error:
            errors.append((row.line, str(error).replace(" - at `$.", " - at `")))
            continue
        if spec.id in lines:
            errors.append((row.line, f"task {spec.id} is there twice: also on line {lines[spec.id]}"))
            continue
        specs[spec.id], lines[spec.id] = spec, row.line
        if row.done:
            done.append(spec.id)
    for spec in specs.values():
        errors.extend(
            (lines[spec.id], f"task {spec.id} depends on {other}, which is not on this board")
            for other in spec.depends_on
            if other not in specs
        )
    if errors:
        return None
    return Board(tuple(_in_order(specs, lines, errors)), tuple(done))


def _spec(fields: dict[str, Any]) -> TaskSpec:
    """A task of fields that may be text (from Markdown) or data. `ValueError` or msgspec's error says what is wrong."""
    task: dict[str, Any] = {}
    for key, value in fields.items():
        match key:
            case "id":
                task["id"] = str(value)
                if not _ID.match(task["id"]):
                    raise ValueError(f"id {value!r} must match {TASK_ID}")
            case "needs" | "wants":
                task[key] = _words(value)
            case "depends" | "depends_on":
                task["depends_on"] = _words(value)
            case "priority":
                task[key] = _priority(value)
            case "attempts" | "max_attempts":
                task["max_attempts"] = _whole(key, value)
            case "deadline" | "deadline_s":
                task["deadline_s"] = _whole(key, value)
            case "budget":
                task["budget_micro_usd"] = _micro_usd(value)
            case _:
                task[key] = value
    return msgspec.convert(task, TaskSpec)


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(one) for one in value]
    words = re.split(r"[,\s]+", str(value).replace("`", ""))
    return [word for word in words if word and word not in ("-", "\u2013", "\u2014", "none", "None")]


def _priority(value: Any) -> int:
    word = str(value).strip().lower()
    if word in PRIORITIES:
        return PRIORITIES[word]
    if re.fullmatch(r"p[0-9]", word):  # P0 is the most urgent
        return 10 * (3 - int(word[1]))
    return _whole("priority", value)


def _whole(name: str, value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise ValueError(f"{name} {value!r} is not a whole number")
    return int(text)


def _micro_usd(value: Any) -> int:
    """US dollars as written, in integer micro-USD. No float touches it."""
    try:
        amount = Decimal(str(value).strip().removeprefix("$").removesuffix("USD").strip()) * 1_000_000
    except InvalidOperation:
        raise ValueError(f"budget {value!r} is not an amount in USD") from None
    if amount != amount.to_integral_value() or amount < 0:
        raise ValueError(f"budget {value!r} is not a positive amount of whole micro-USD")
    return int(amount)


def _in_order(specs: dict[str, TaskSpec], lines: dict[str, int], errors: list[tuple[int, str]]) -> list[TaskSpec]:
    """Every task after those it depends on, else as written."""
    waiting = {task: set(spec.depends_on) for task, spec in specs.items()}
    dependents: dict[str, list[str]] = {}
    for task, spec in specs.items():
        for other in spec.depends_on:
            dependents.setdefault(other, []).append(task)
    order: list[TaskSpec] = []
    ready = [task for task, others in waiting.items() if not others]
    for task in ready:  # grows while it is walked
        order.append(specs[task])
        for dependent in dependents.get(task, ()):
            waiting[dependent].discard(task)
            if not waiting[dependent]:
                ready.append(dependent)
    stuck = [task for task, others in waiting.items() if others]
    if stuck:
        circle, seen = stuck[0], [stuck[0]]
        while (circle := next(iter(sorted(waiting[circle])))) not in seen:
            seen.append(circle)
        path = [*seen[seen.index(circle) :], circle]
        errors.append((lines[circle], f"the tasks depend on each other in a circle: {' -> '.join(path)}"))
    return order
