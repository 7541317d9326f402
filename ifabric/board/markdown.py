"""Boards in Markdown: GitHub task lists and pipe tables. Code blocks and HTML comments are left alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ifabric.board.rows import FIELDS, STATUS_HINT, Errors, Row, name_of, status_notes, status_of
from ifabric.wire.subjects import TASK_ID

_BOX = re.compile(r"\[([ xX])\]\s+(\S.*)")
_BRACES = re.compile(r"\{([^{}]*)\}$")
_IN_BRACES = ("depends", "needs", "wants", "priority", "attempts", "deadline", "budget")


def read_markdown(text: str, errors: Errors) -> Iterator[Row]:
    """The tasks of every task list and every table of tasks, in the order of the page."""
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


def _plain(token: Token) -> str:
    """The text of a paragraph or cell, without emphasis, links and code marks, on one line."""
    said = (" " if child.type.endswith("break") else child.content for child in token.children or ())
    return " ".join("".join(said).split())


def _item(token: Token, errors: Errors) -> Row | None:
    """`[ ] ID Title {key: value; ...}`; None for a list item that is no task."""
    box = _BOX.fullmatch(_plain(token))
    if box is None:
        return None
    line = (token.map or [0])[0] + 1
    fields: dict[str, Any] = {}
    text = box[2]
    braces = _BRACES.search(text)
    if braces is not None:
        text = text[: braces.start()].strip()
        for part in filter(None, (part.strip() for part in braces[1].split(";"))):
            key, colon, value = part.partition(":")
            field = FIELDS.get(" ".join(key.lower().replace("_", " ").split()))
            if not colon or field not in _IN_BRACES:
                errors.append((line, f"in {{...}}: {part!r} is not `key: value` with a key of {', '.join(_IN_BRACES)}"))
            elif field in fields:
                errors.append((line, f"in {{...}}: {field} is given twice"))
            else:
                fields[field] = value.strip()
    task, title, notes = name_of(text)
    return Row(line, box[1] in "xX", fields | {"id": task, "title": title}, notes)


def _table(tokens: Sequence[Token], errors: Errors) -> Iterator[Row]:
    rows: list[tuple[int, list[str]]] = []
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append(((token.map or [0])[0] + 1, []))
        elif token.type == "inline" and tokens[at - 1].type in ("th_open", "td_open"):
            rows[-1][1].append(_plain(token))
    columns, unused = columns_of(rows[0][1]) if rows else ([], [])
    if not columns:
        return
    about: tuple[str, ...] = (f"the columns {', '.join(unused)} of its table are not used",) if unused else ()
    for line, cells in rows[1:]:
        if not any(cells):
            continue
        fields: dict[str, Any] = {
            name: cell for name, cell in zip(columns, cells, strict=False) if name and (cell or name == "status")
        }
        named = fields.get("id", "")
        if not named:
            errors.append((line, "a row without an id"))
            continue
        notes, about = about, ()
        if "title" not in columns and not re.search(TASK_ID, named):
            fields["id"], fields["title"], slugged = name_of(named)
            notes += slugged
        word = fields.pop("status", "")
        status = status_of(word)
        if status is None:
            errors.append((line, f"status {word!r} is unknown; {STATUS_HINT}"))
        yield Row(line, status == "done", fields, notes + status_notes(status or "open"))


def columns_of(header: Sequence[str]) -> tuple[list[str], list[str]]:
    """The field of each column ("" for none) and the titles of those that are none; empty when it is no board.

    It is one when it has a column for ids, and says that these are tasks: by calling it `Task`, or by another column
    that only tasks have. `Task` beside `ID` is the title.
    """
    words = [" ".join(cell.lower().replace("_", " ").split()).strip("?:") for cell in header]
    names = [FIELDS.get(word, "") for word in words]
    if names.count("id") > 1:
        names = ["title" if name == "id" and word == "task" else name for name, word in zip(names, words, strict=True)]
    others = set(words) & {"task", "task id", "title"} or set(names) - {"", "id", "title"}
    if "id" not in names or not others:
        return [], []
    seen: set[str] = set()
    columns = []
    for name in names:
        columns.append("" if name in seen else name)
        seen.add(name)
    return columns, [title for title, name in zip(header, columns, strict=True) if not name and title]
