"""What a story is made of, and how times and amounts are said in it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from msgspec import Struct

from ifabric.wire.audit import AuditRecord
from ifabric.wire.coordinator import TaskEvent
from ifabric.wire.governor import BreakerEvent, BudgetEvent, MatchEvent

Kind = Literal["task", "session", "account", "breaker"]
Tone = Literal["plain", "good", "bad"]
#: lines that a story tells unless more are asked for: the last ones
LINES_MAX = 60
NOTHING = "nothing"


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened. `sources` says who tells of it: record, event, audit."""

    at: str
    what: str
    who: str = ""
    tone: Tone = "plain"
    #: how long the command took that did it, and which request it was, when the audit tells
    took_ms: float | None = None
    request_id: str = ""
    #: so many of the same kind, up to `until`
    times: int = 1
    until: str = ""
    sources: tuple[str, ...] = ()


class Story(Struct, frozen=True, kw_only=True):
    """All that is to be said about one thing, in order."""

    kind: Kind
    name: str
    #: the thing in a few words: a task's title, for instance
    title: str
    #: earlier lines that are not told
    left_out: int
    lines: tuple[Line, ...]
    now: tuple[str, ...]
    #: what to do, the next command to type within it; or `nothing`
    do: tuple[str, ...]
    #: what could not be read, why, and how to get it
    unread: tuple[str, ...] = ()


class Sources(Struct, frozen=True, kw_only=True):
    """What the journal and the audit tell, as far as they could be read. Those that name the thing, in their order."""

    tasks: tuple[TaskEvent, ...] = ()
    budgets: tuple[BudgetEvent, ...] = ()
    breakers: tuple[BreakerEvent, ...] = ()
    matches: tuple[MatchEvent, ...] = ()
    audit: tuple[AuditRecord, ...] = ()
    unread: tuple[str, ...] = ()
    #: whether events and audit were read at all, so that their silence means something
    events_read: bool = True
    audit_read: bool = True


def told(
    kind: Kind,
    name: str,
    lines: Iterable[Line],
    *,
    now: Iterable[str],
    do: Iterable[str] = (),
    title: str = "",
    unread: Iterable[str] = (),
    most: int = LINES_MAX,
) -> Story:
    """The story, with the last `most` of its lines."""
    every = sorted(lines, key=lambda line: line.at)
    kept = every[-most:] if most else []
    return Story(
        kind=kind,
        name=name,
        title=title,
        left_out=len(every) - len(kept),
        lines=tuple(kept),
        now=tuple(now),
        do=tuple(do) or (NOTHING,),
        unread=tuple(unread),
    )


def seconds(at: str) -> float:
    """An RFC 3339 time as seconds since the epoch; 0.0 when it is none."""
    try:
        found = datetime.fromisoformat(at)
    except ValueError:
        return 0.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def usd(micro_usd: int) -> str:
    """An amount, exact."""
    whole, rest = divmod(abs(micro_usd), 1_000_000)
    return f"{'-' if micro_usd < 0 else ''}{whole}.{f'{rest:06}'.rstrip('0').ljust(2, '0')} USD"


def span(length_s: float) -> str:
    """A length of time, in the unit that fits."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if length_s >= 2 * length:
            return f"{length_s / length:.0f} {unit}"
    return f"{max(0.0, length_s):.0f} s"


def ago(at: str, now: str) -> str:
    """How long ago that was."""
    return f"{span(seconds(now) - seconds(at))} ago"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of them, and how many more."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def many(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
