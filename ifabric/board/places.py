"""Where on a page a task's state and its holder stand, and how to change just these.

Read line by line: the history of a board is thousands of pages that differ in a line each, and a line that was read
once is known. What is a task, and what is not, `ifabric.board.markdown` decides; here it is only where. The two agree,
as a test says, and where they do not, `rewrite` changes nothing: it reads the page again, and what differs may be the
one task's state and no more.

An item has no place for a holder but its text: `- [ ] P0.1 Build it (claimed by alice)`. `without_marks` takes that
away before the page is read for its tasks, since who has a task is no part of its title.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ifabric.board.markdown import columns_of, read_markdown
from ifabric.board.rows import HOLDERS, Row, Status, name_of, status_of

Span = tuple[int, int]

#: columns whose name says that who stands there has it; an `owner` or `assignee` may have been told to, and not begun
_CLAIMING = ("holder", "claimed by", "claimed", "taken by", "session", "agent")
_WORDS: dict[Status, str] = {"done": "done", "started": "in progress", "open": "todo", "blocked": "blocked"}
_ITEM = re.compile(r"[ \t]*(?:[-*+]|[0-9]{1,9}[.)])[ \t]+\[([ xX~/>])\][ \t]+(\S.*)")
_BRACES = re.compile(r"\s*\{[^{}]*\}\s*$")
_MARK = re.compile(
    r"\s*[(\[](?:claimed|in progress|wip|doing|taken|started)\b(?:\s*by\b|:)?\s*@?([^()\[\]{}|]{0,64})[)\]]\s*$",
    re.IGNORECASE,
)
_SAID = re.compile(
    r"(?:claimed|in progress|wip|doing|started|active|in review|taken)\b\s*(?:by\b|[:@(\u2013\u2014-])\s*@?([^()|]{1,64})",
    re.IGNORECASE,
)
_DELIMITER = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_PIPE = re.compile(r"(?<!\\)\|")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_LINK = re.compile(r"\[([^\[\]]*)\]\([^()\s]*\)")
_NOBODY = ("", "-", "\u2013", "\u2014", "none", "n/a", "nobody", "unassigned", "tbd", "?")


class Place(NamedTuple):
    """One task on a page."""

    task: str
    status: Status
    holder: str
    #: in the line: the letter in the box or the status cell, and the mark or cell of the holder; None where there is none
    state_at: Span | None
    holder_at: Span | None
    boxed: bool


class Change(NamedTuple):
    """What a task's state on the page is to become; `who` has it, or did it."""

    task: str
    status: Status
    who: str = ""


def lines_of(text: str) -> list[str]:
    """The lines as Markdown counts them, with their ends: whatever they are, they stay."""
    return _LINE.findall(text)


class Scanner:
    """Finds the places of one page after the other, and remembers lines."""

    def __init__(self) -> None:
        self._items: dict[str, Place | None] = {}
        self._tables: dict[str, tuple[_Columns | None, dict[str, Place | None]]] = {}

    def scan(self, lines: Iterable[str]) -> Iterator[tuple[int, Place]]:
        """The line (from 1) and place of each task. Fenced code and HTML comments are passed over."""
        fence, comment, before = "", False, ""
        table: tuple[_Columns | None, dict[str, Place | None]] | None = None
        for number, whole in enumerate(lines, 1):
            line = whole.rstrip("\r\n")
            opened = _FENCE.match(line)
            if comment:
                comment = "-->" not in line
            elif fence:
                if opened and opened[1].startswith(fence) and not line[opened.end() :].strip():
                    fence = ""
            elif opened:
                fence, table = opened[1], None
            elif line.lstrip().startswith("<!--"):
                comment, table = "-->" not in line, None
            elif not line.strip():
                table = None
            elif table is not None:
                columns, known = table
                if columns is not None:
                    if line not in known:
                        known[line] = _cell(line, columns)
                    if (place := known[line]) is not None:
                        yield number, place
            elif "|" in line and "|" in before and _DELIMITER.fullmatch(line):
                if before not in self._tables:
                    self._tables[before] = (_columns(before), {})
                table = self._tables[before]
            else:
                if line not in self._items:
                    self._items[line] = _item(line)
                if (place := self._items[line]) is not None:
                    yield number, place
            before = line


def words_of(lines: list[str], places: Iterable[tuple[int, Place]]) -> dict[Status, str]:
    """The word that this board uses for each state, where it uses one."""
    seen: dict[Status, Counter[str]] = {}
    for number, place in places:
        if place.state_at is not None and not place.boxed:
            word = lines[number - 1][slice(*place.state_at)].strip()
            plain = word and not re.search(r"[0-9:@()]|\bby\b", word)
            if plain and (status := status_of(word)) is not None:
                seen.setdefault(status, Counter())[word] += 1
    return _WORDS | {status: found.most_common(1)[0][0] for status, found in seen.items()}


def without_marks(text: str) -> str:
    """The page with its lines, but without who has which item, and with `[~]` as `[ ]`."""
    if not re.search(r"\[[~/>]\]|[(\[](?:claimed|in progress|wip|doing|taken|started)\b", text, re.IGNORECASE):
        return text
    lines = lines_of(text)
    for number, place in Scanner().scan(lines):
        if place.boxed:
            line = lines[number - 1]
            if place.holder_at is not None:
                line = line[: place.holder_at[0]] + line[place.holder_at[1] :]
            if place.state_at is not None and line[slice(*place.state_at)] in "~/>":
                line = line[: place.state_at[0]] + " " + line[place.state_at[1] :]
            lines[number - 1] = line
    return "".join(lines)


def rewrite(text: str, changes: Iterable[Change]) -> tuple[str, dict[str, str]]:
    """The page with these changes, and why those that were not made were not, by their task.

    Nothing else changes: the page is read before and after, and must have the same tasks on the same lines.
    """
    mark, text = text[: text.startswith("\ufeff")], text.removeprefix("\ufeff")
    wanted = list(changes)
    lines = lines_of(text)
    found = list(Scanner().scan(lines))
    rows = list(read_markdown(without_marks(text), []))
    known = {(row.line, row.fields["id"]) for row in rows}
    at = {place.task: (number, place) for number, place in reversed(found) if (number, place.task) in known}
    words = words_of(lines, found)
    refused: dict[str, str] = {}
    made: list[tuple[Change, int, str]] = []
    for change in wanted:
        number, place = at.get(change.task, (0, None))
        new = None if place is None else rewritten(lines[number - 1], place, change, words)
        if new is None:
            refused[change.task] = "its row has no place for that" if place else "it has no row"
        else:
            made.append((change, number, new))
    result = _with(lines, made)
    if _differs(rows, result, [change for change, _, _ in made]):
        result = text
        for one in made:  # one of them would do harm: the others need not suffer
            tried = _with(lines_of(result), [one])
            if why := _differs(list(read_markdown(without_marks(result), [])), tried, [one[0]]):
                refused[one[0].task] = why
            else:
                result = tried
    return mark + result, refused


def rewritten(line: str, place: Place, change: Change, words: Mapping[Status, str]) -> str | None:
    """The line with the task's new state; None when it has no place for it."""
    if place.boxed:
        return _boxed(line, place, change)
    state, holder = place.state_at, place.holder_at
    if state is None and (holder is None or change.status == "done"):
        return None
    new: list[tuple[Span, str]] = []
    if state is not None:
        told = change.status == "started" and change.who and holder is None
        new.append((state, words[change.status] + (f": {change.who}" if told else "")))
    if holder is not None and (change.who or change.status != "done"):
        new.append((holder, change.who if change.status in ("started", "done") else ""))
    for (start, end), cell in sorted(new, reverse=True):
        line = line[:start] + _padded(line[start:end], cell) + line[end:]
    return line


def _boxed(line: str, place: Place, change: Change) -> str:
    assert place.state_at is not None, "a box is where its letter is"
    if place.holder_at is not None:
        line = line[: place.holder_at[0]] + line[place.holder_at[1] :]
    if change.status == "started" and change.who:
        end = line.rstrip("\r\n")
        braces = _BRACES.search(end)
        at = braces.start() if braces else len(end.rstrip())
        line = f"{line[:at]} (claimed by {change.who}){line[at:]}"
    return line[: place.state_at[0]] + ("x" if change.status == "done" else " ") + line[place.state_at[1] :]


def _padded(old: str, new: str) -> str:
    """The new text in the old one's space, so that columns stay under each other where they can."""
    if not old:
        return f" {new} "
    left = " " * max(1, len(old) - len(old.lstrip())) if old.strip() else " "
    return (left + new + " ").ljust(len(old))


# -- what is checked ---------------------------------------------------------------------------------------------------


def _with(lines: list[str], made: Iterable[tuple[Change, int, str]]) -> str:
    new = list(lines)
    for _, number, line in made:
        new[number - 1] = line
    return "".join(new)


def _differs(old: list[Row], after: str, changes: list[Change]) -> str:
    """What would have changed besides the states that were to; "" when nothing would."""
    done = {change.task: change.status == "done" for change in changes}
    new = list(read_markdown(without_marks(after), []))
    if len(old) != len(new):
        return "its row cannot be read any more with that"
    for one, other in zip(old, new, strict=True):
        if (one.line, one.fields) != (other.line, other.fields):
            return "more than its state would change"
        if other.done != done.get(str(one.fields.get("id")), one.done) and not _twice(old, one):
            return "its state would not be what it should"
    states = {place.task: place.status for _, place in Scanner().scan(lines_of(after))}
    if any(states.get(change.task) != change.status for change in changes):
        return "its state would not be what it should"
    return ""


def _twice(rows: list[Row], row: Row) -> bool:
    return sum(1 for other in rows if other.fields.get("id") == row.fields.get("id")) > 1


# -- lines -------------------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Where a table has what; None where it has not."""

    id: int
    title: int | None
    status: int | None
    holder: int | None
    #: who stands under the holder has it, whatever the status says
    claiming: bool


def _columns(header: str) -> _Columns | None:
    cells = [_plain(header[start:end]) for start, end in _cells(header)]
    fields, _ = columns_of(cells)
    if not fields:
        return None
    words = [" ".join(cell.lower().replace("_", " ").split()).strip("?:") for cell in cells]
    holder = next((words.index(name) for name in HOLDERS if name in words and not fields[words.index(name)]), None)
    return _Columns(
        fields.index("id"),
        fields.index("title") if "title" in fields else None,
        fields.index("status") if "status" in fields else None,
        holder,
        claiming=holder is not None and words[holder] in _CLAIMING,
    )


def _cell(line: str, columns: _Columns) -> Place | None:
    spans = _cells(line)
    if columns.id >= len(spans):
        return None

    def span(column: int | None) -> Span | None:
        return spans[column] if column is not None and column < len(spans) else None

    def text(at: Span | None) -> str:
        return "" if at is None else _plain(line[slice(*at)])

    named = text(spans[columns.id])
    if not named:
        return None
    task = named if columns.title is not None else name_of(named)[0]
    word = text(span(columns.status))
    holder = text(span(columns.holder))
    holder = "" if holder.lower() in _NOBODY else holder.lstrip("@")
    status = status_of(word) or "open"
    if status == "open" and holder and (columns.claiming or columns.status is None):
        status = "started"
    said = _SAID.search(word) if status == "started" and not holder else None
    if said is not None and re.search(r"[A-Za-z]", said[1]):
        holder = said[1].strip()
    return Place(task, status, holder[:64], span(columns.status), span(columns.holder), boxed=False)


def _cells(line: str) -> list[Span]:
    """The spans of a row's cells, between its pipes."""
    at = [found.start() for found in _PIPE.finditer(line)]
    first, last = len(line) - len(line.lstrip()), len(line.rstrip())
    starts = at if at and at[0] == first else [-1, *at]
    ends = at if at and at[-1] == last - 1 else [*at, last]
    return [(start + 1, end) for start, end in zip(starts, (end for end in ends if end > starts[0]), strict=False)]


def _item(line: str) -> Place | None:
    box = _ITEM.fullmatch(line)
    if box is None:
        return None
    text = line[box.start(2) :]
    braces = _BRACES.search(text)
    end = braces.start() if braces else len(text)
    mark = _MARK.search(text[:end])
    title = _plain(text[: mark.start() if mark else end])
    if not title:
        return None
    started = mark is not None or box[1] in "~/>"
    status: Status = "done" if box[1] in "xX" else "started" if started else "open"
    at = (box.start(2) + mark.start(), box.start(2) + mark.end()) if mark else None
    holder = mark[1].strip() if mark else ""
    return Place(name_of(title)[0], status, holder, box.span(1), at, boxed=True)


def _plain(text: str) -> str:
    """A cell's or item's text without emphasis, links and code marks, as far as a line shows them."""
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"\*+|`+|~~", "", text)
    return " ".join(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text).split())
