"""What the journal tells of the time that a restore has lost: its events, folded into one entry a hold. Pure.

The journal's order is the order: after a restore the revisions begin anew, far above the old ones or below them. A lost
event is younger than the backup's revision, and older than the restored cluster: of a revision before its first one, or
of a time before the restore.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec

from ifabric.wire.governor import BudgetEvent, path_of
from ifabric.wire.replay import Fate, ReplayEntry, ReplayLimit

SET_BY = "set by "
#: a backup's time is not as exact as its revision
EXACT = timedelta(minutes=1)
T = TypeVar("T")


class Span(NamedTuple):
    """The time that was lost."""

    #: the backup knows all up to this revision
    since_revision: int
    #: the first revision of the restored cluster; 0: not known
    began_revision: int
    restored_at: datetime
    #: when the backup was made; None: not known
    backup_at: datetime | None = None

    def has(self, revision: int, at: str) -> bool:
        """Whether an event is of that time. `ValueError` when `at` is no moment."""
        return revision > self.since_revision and (revision < self.began_revision or moment(at) < self.restored_at)

    def reached_by(self, revision: int, at: str) -> bool:
        """Whether a journal that begins with this event tells of the whole time."""
        before = self.backup_at is not None and moment(at) < self.backup_at - EXACT
        return before or 0 < revision <= self.since_revision


class Told(NamedTuple):
    """What the journal tells of the lost time."""

    #: one for each hold, in the order of its first event
    entries: tuple[ReplayEntry, ...]
    #: the last one that an operator set for each account
    limits: tuple[ReplayLimit, ...]
    events: int
    last_at: str
    #: when the journal says that it has lost events itself
    resyncs: tuple[str, ...]
    #: messages that are no events, or name what no hold can have: no daemon has told them
    unreadable: int


class _Life:
    """What the journal tells of one hold."""

    __slots__ = ("charge", "end", "placed")

    def __init__(self) -> None:
        self.placed: BudgetEvent | None = None
        self.end: BudgetEvent | None = None
        self.charge: BudgetEvent | None = None


class Lost:
    """Events of the lost time, as they are added."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.events = 0
        self.last_at = ""
        self.resyncs: list[str] = []
        self.unreadable = 0
        self._lives: dict[tuple[str, str], _Life] = {}
        self._limits: dict[str, BudgetEvent] = {}

    def add(self, event: BudgetEvent) -> None:
        """The next event about budgets, in the journal's order."""
        try:
            if not self.span.has(event.revision, event.at):
                return
        except ValueError:
            self.unreadable += 1
            return
        self.events += 1
        self.last_at = event.at
        if event.event == "resync":
            self.resyncs.append(event.at)
        elif event.event == "account":
            # a publisher that died may have told an older one again
            known = self._limits.get(event.account)
            if event.note.startswith(SET_BY) and (known is None or moment(known.at) <= moment(event.at)):
                self._limits[event.account] = event
        elif event.event in ("hold", "commit", "void", "expired"):
            life = self._lives.setdefault((event.session, event.hold), _Life())
            if event.event == "hold":
                life.placed = event
            elif event.event != "commit":
                life.end = event
            elif life.charge is None or life.charge.charged <= event.charged:
                life.charge = event

    def told(self) -> Told:
        """All that was added, as entries and limits."""
        entries = [_made(_entry(life), ReplayEntry) for life in self._lives.values()]
        limits = [_made(_limit(event), ReplayLimit) for event in self._limits.values()]
        return Told(
            tuple(one for one in entries if one is not None),
            tuple(one for one in limits if one is not None),
            self.events,
            self.last_at,
            tuple(self.resyncs),
            self.unreadable + entries.count(None) + limits.count(None),
        )


def _made(fields: dict[str, object], kind: type[T]) -> T | None:
    """None: it names what no hold can have, so no daemon has told it."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError:
        return None


def _entry(life: _Life) -> dict[str, object]:
    last = life.charge or life.end or life.placed
    assert last is not None, "a life begins with an event"
    fate: Fate = "open"
    if life.charge is not None:
        fate = "late" if life.charge.late else "committed"
    elif life.end is not None:
        fate = "voided" if life.end.event == "void" else "expired"
    return {
        "session": last.session,
        "hold": last.hold,
        "account": last.account,
        "fate": fate,
        "at": (life.placed or last).at,
        "ended_at": None if fate == "open" else last.at,
        "amount_micro_usd": last.amount,
        "charged_micro_usd": last.charged,
        "windows": last.windows or ("total",) * len(path_of(last.account)),
        "task": last.task,
        "fence": last.fence,
        "usage": last.usage,
    }


def _limit(event: BudgetEvent) -> dict[str, object]:
    return {
        "account": event.account,
        "limit_micro_usd": event.limit,
        "window": event.window or "total",
        "by": event.note.removeprefix(SET_BY),
        "at": event.at,
    }


def moment(text: str) -> datetime:
    """RFC 3339 as a moment; in UTC when it does not say. `ValueError`."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
