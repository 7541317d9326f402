"""What every format of a board comes down to: rows, and the words that people use for their parts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any, Literal, NamedTuple

#: (line, what is wrong there)
Errors = list[tuple[int, str]]
Status = Literal["done", "open", "started", "blocked"]

#: names of a task's parts, as columns and keys
FIELDS = {
    "id": "id", "task": "id", "task id": "id", "key": "id", "#": "id",
    "title": "title", "name": "title", "summary": "title", "description": "title", "what": "title",
    "status": "status", "state": "status", "done": "status",
    "depends": "depends", "depends on": "depends", "dependencies": "depends", "dependency": "depends",
    "after": "depends", "blocked by": "depends",
    "priority": "priority", "prio": "priority",
    "needs": "needs", "requires": "needs", "skills": "needs", "capabilities": "needs",
    "wants": "wants", "prefers": "wants",
    "attempts": "attempts", "max attempts": "attempts",
    "deadline": "deadline", "budget": "budget",
}  # fmt: skip
#: names of the column or key that says who has a task: nobody's claim here, but a board's history is read by them
HOLDERS = (
    "holder", "claimed by", "claimed", "taken by", "session", "agent",
    "owner", "assignee", "assigned to", "assigned", "who",
)  # fmt: skip
_STATUS: dict[str, Status] = {
    **dict.fromkeys(("done", "complete", "completed", "finished", "closed", "merged", "x", "[x]", "yes"), "done"),
    **dict.fromkeys(("✅", "✔", "✓", "☑", "🟢"), "done"),
    **dict.fromkeys(("", "-", "–", "—", "todo", "to do", "open", "pending", "ready", "new"), "open"),  # noqa: RUF001
    **dict.fromkeys(
        ("planned", "not started", "available", "unclaimed", "backlog", "no", "[ ]", "⬜", "☐", "🔵"), "open"
    ),
    **dict.fromkeys(("in progress", "wip", "doing", "started", "claimed", "active", "in review"), "started"),
    **dict.fromkeys(("🟡", "⏳", "🚧", "🔄"), "started"),
    **dict.fromkeys(("blocked", "waiting", "on hold"), "blocked"),
}
STATUS_HINT = "use todo, in progress, blocked or done"
#: `Done`, `✅ Done`, `Done (2026-11-03)`, `in progress: alice`; not "done it, almost" or "not done"
_STATUS_WORDS = re.compile(r"[^\w\[(]*([a-z][a-z ]*?)\s*(?:[(@:,;\d–—-].*|\b(?:by|on|since)\b.*)?")  # noqa: RUF001
#: a first word that is an id: P0.1, ABC-12, a1; not a plain word, and not a plain number
IDLIKE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z._/#-])[A-Za-z0-9][A-Za-z0-9._/#-]*")
_DASHES = " :-\u2013\u2014"


class Row(NamedTuple):
    """One task as written: the line it stands on, whether it is done, and its fields as text or data."""

    line: int
    done: bool
    fields: dict[str, Any]
    #: what the reader decided that the writer may want to know
    notes: tuple[str, ...] = ()


def status_of(text: str) -> Status | None:
    """What a status word means; None when it is not one."""
    plain = re.sub(r"[_\ufe0f]|(?<=\w)-(?=\w)", " ", text.lower().replace("\ufe0f", ""))
    plain = " ".join(plain.split())
    if plain in _STATUS:
        return _STATUS[plain]
    words = _STATUS_WORDS.fullmatch(plain)
    return _STATUS.get(words[1]) if words else None


def status_notes(status: Status) -> tuple[str, ...]:
    """What happens to a status that the fabric decides for itself."""
    if status == "started":
        return ("is in progress on the board: it is loaded as pending, for nobody holds it here",)
    if status == "blocked":
        return ("is blocked on the board: here only a task's dependencies can block it",)
    return ()


def name_of(text: str) -> tuple[str, str, tuple[str, ...]]:
    """The id, the title and a note of a task's text. Without an id in front it gets one made from its words."""
    text = re.sub(r"^\[([^\]\s]+)\]:?(?=\s|$)", r"\1", text)
    first, _, rest = text.partition(" ")
    first = first.rstrip(":")
    if IDLIKE.fullmatch(first):
        return first, rest.strip(_DASHES), ()
    made = slug(text)
    return made, text, (f"has no id; it is loaded as {made}",)


def slug(title: str) -> str:
    """An id from a title, the same every time. A title without any Latin letter or digit gets its digest."""
    latin = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", latin.lower()).strip("-")[:64].rstrip("-")
    return words or f"task-{hashlib.sha256(title.encode('utf-8', 'replace')).hexdigest()[:8]}"
