"""Each source, read into one shape: what happened, to what, by whom, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ifabric.explaining.story import Tone, usd
from ifabric.wire.coordinator import TaskEvent, Transition
from ifabric.wire.governor import BreakerEvent, BudgetEvent, MatchEvent

#: events of a task, in words; what is told of it (a reason, an error) follows
_TASK: dict[str, tuple[str, Tone]] = {
    "submitted": ("submitted", "plain"),
    "claimed": ("claimed", "plain"),
    "renew_lost": ("told that the claim is lost", "bad"),
    "released": ("given back", "plain"),
    "expired": ("its claim ended without a word from its holder", "bad"),
    "completed": ("completed", "good"),
    "failed": ("failed", "bad"),
    "dead": ("dead: no attempt is left", "bad"),
    "unblocked": ("open: what it waited for is done", "good"),
    "cancelled": ("taken off the board", "bad"),
    "requeued": ("put back, with all its attempts", "plain"),
    "purged": ("deleted", "plain"),
}
_BREAKER: dict[str, tuple[str, Tone]] = {
    "opened": ("opened: nothing is let through", "bad"),
    "half_open": ("half open: a few calls may try", "plain"),
    "closed": ("closed: everything is let through", "good"),
}


class Happened(NamedTuple):
    """One thing that was committed. `key` is the same whoever tells of it."""

    at: str
    about: str
    event: str
    what: str
    tone: Tone
    session: str = ""
    task: str = ""
    fence: int = 0
    account: str = ""
    hold: str = ""
    breaker: str = ""
    sources: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """By which the same is known in another source."""
        return (
            self.at,
            self.about,
            self.event,
            self.session,
            self.task,
            self.fence,
            self.account,
            self.hold,
            self.breaker,
        )


def of_history(task: str, history: Iterable[Transition]) -> Iterator[Happened]:
    """What a task's own record remembers."""
    for line in history:
        yield _task(line.at, line.event, line.session, task, line.fence, line.note, "record")


def of_tasks(events: Iterable[TaskEvent]) -> Iterator[Happened]:
    """What the journal tells of tasks."""
    for event in events:
        if event.event != "resync":
            yield _task(event.at, event.event, event.session or "", event.task, event.fence, event.note, "event")


def _task(at: str, event: str, session: str, task: str, fence: int, note: str, source: str) -> Happened:
    what, tone = _TASK.get(event, (event.replace("_", " "), "plain"))
    under = f" under fence {fence}" if event == "claimed" and fence else ""
    said = "" if event in ("cancelled", "requeued") and note == "by an operator" else note
    return Happened(at, "task", event, f"{what}{under}{_note(said)}", tone, session, task, fence, sources=(source,))


def of_budgets(events: Iterable[BudgetEvent]) -> Iterator[Happened]:
    """What the journal tells of money; that more was charged than there was is told with the charge."""
    for event in events:
        if event.event in ("overdraft", "resync"):
            continue
        what, tone = _money(event)
        yield Happened(
            event.at, "budget", event.event, what + _note("" if event.event == "account" else event.note), tone,
            event.session, event.task or "", event.fence, event.account, event.hold, sources=("event",),
        )  # fmt: skip


def _money(event: BudgetEvent) -> tuple[str, Tone]:
    of = f" of {event.account}" if event.account else ""
    if event.event == "account":
        per = "" if event.window in (None, "total") else f" a {event.window}"
        limit = "no limit" if event.limit is None else f"a limit of {usd(event.limit)}{per}"
        return f"{event.account} has {limit} ({event.note})", "plain"
    if event.event == "hold":
        return f"{usd(event.amount)}{of} held", "plain"
    if event.event == "commit":
        late = ", late: its hold had ended" if event.late else ""
        over = f", {usd(event.overdraft)} of it not available" if event.overdraft else ""
        return f"{usd(event.charged)}{of} charged{late}{over}", "bad" if event.late or event.overdraft else "plain"
    if event.event == "void":
        return f"{usd(event.amount)}{of} freed, nothing charged", "plain"
    if event.event == "expired":
        return f"the hold of {usd(event.amount)}{of} ended by itself, nothing charged", "plain"
    return f"{event.event}: {usd(event.amount)}{of}", "plain"


def of_breakers(events: Iterable[BreakerEvent]) -> Iterator[Happened]:
    """What the journal tells of breakers."""
    for event in events:
        what, tone = _BREAKER.get(event.event, (event.event.replace("_", " "), "plain"))
        trip = f", trip {event.trips}" if event.trips > 1 else ""
        probe = f", next probe after {event.probe_in_s:.0f} s" if event.probe_in_s is not None else ""
        yield Happened(
            event.at, "breaker", event.event, f"{what}{trip}{probe}{_note(event.why)}", tone, event.by,
            breaker=event.breaker, sources=("event",),
        )  # fmt: skip


def of_matches(events: Iterable[MatchEvent]) -> Iterator[Happened]:
    """What the journal tells of tasks that nobody can take."""
    for event in events:
        missing = f": {', '.join(event.missing)} would do" if event.missing else ""
        yield Happened(
            event.at, "match", event.event, f"nobody can take it and {event.tasks - 1} like it{missing}"
            if event.tasks > 1 else f"nobody can take it{missing}", "bad", task=event.example, sources=("event",),
        )  # fmt: skip


def _note(text: str) -> str:
    return f" ({text})" if text else ""
