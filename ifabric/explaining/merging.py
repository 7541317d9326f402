"""One line for one thing, whoever tells of it.

A task's record and the journal tell of a transition with the same time, since both have it from one write. The audit
tells of the *command*: it belongs to what it caused by the verb, the session, the fence and the time. The daemon that
decides also writes the audit, so the times are of one clock; a retry that another daemon answers from the receipt is
known by its request id. What was refused caused nothing, and is a line of its own; a refusal again and again is one
line with a count.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from ifabric.explaining.happenings import Happened
from ifabric.explaining.story import Line, seconds, usd
from ifabric.wire.audit import AuditRecord
from ifabric.wire.permissions import READING

#: what a verb commits: (about, event)
CAUSES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("coordinator", "submit"): (("task", "submitted"),),
    ("coordinator", "claim"): (("task", "claimed"), ("budget", "hold")),
    ("coordinator", "next"): (("task", "claimed"), ("budget", "hold")),
    ("coordinator", "release"): (("task", "released"), ("budget", "void")),
    ("coordinator", "complete"): (("task", "completed"), ("budget", "commit"), ("budget", "void")),
    ("coordinator", "fail"): (("task", "failed"), ("task", "dead"), ("budget", "commit"), ("budget", "void")),
    ("coordinator", "bye"): (("task", "released"), ("budget", "void")),
    ("coordinator", "cancel"): (("task", "cancelled"),),
    ("coordinator", "requeue"): (("task", "requeued"),),
    ("coordinator", "purge"): (("task", "purged"),),
    ("governor", "reserve"): (("budget", "hold"),),
    ("governor", "commit"): (("budget", "commit"),),
    ("governor", "void"): (("budget", "void"),),
    ("governor", "spend"): (("budget", "commit"),),
    ("governor", "account"): (("budget", "account"),),
    ("governor", "breaker"): (("breaker", "opened"), ("breaker", "closed")),
}
Key = tuple[str, ...]
#: between what was decided and the record of it, besides the time that the command took
SLACK_S = 2.0
#: looking leaves no trace in a story
_LOOKS = {(component, verb) for component, verbs in READING.items() for verb in verbs}
_LOOKS |= {("coordinator", "sessions"), ("governor", "accounts"), ("chassis", "runs"), ("identity", "list")}
_RENEWAL = ("coordinator", "renew")


def merged(happened: Iterable[Happened], audit: Iterable[AuditRecord]) -> list[Line]:
    """The lines, in order of time."""
    known: dict[tuple[object, ...], Happened] = {}
    for one in happened:
        there = known.get(one.key)
        sources = dict.fromkeys((*there.sources, *one.sources)) if there else dict.fromkeys(one.sources)
        known[one.key] = one._replace(sources=tuple(sources))
    events = list(known.values())
    lines = [Line(at=one.at, who=one.session, what=one.what, tone=one.tone, sources=one.sources) for one in events]
    others: list[tuple[Line, Key]] = []
    answered: set[tuple[str, str, str]] = set()
    timeline = _Timeline(events)
    for entry in sorted(audit, key=lambda entry: entry.at):
        if is_look(entry):
            continue
        again = (entry.session, entry.verb, entry.request_id)
        if entry.outcome == "ok" and entry.request_id and again in answered:
            continue  # a retry, told the first answer
        caused = timeline.caused(entry) if entry.outcome == "ok" else []
        for place in caused:
            lines[place] = _told_of(lines[place], entry)
        if not caused:
            others.append((_alone(entry), (entry.session, entry.component, entry.verb, entry.code, _about(entry))))
        if entry.outcome == "ok":
            answered.add(again)
    return _counted(sorted((*((line, None) for line in lines), *others), key=lambda pair: pair[0].at))


def is_look(entry: AuditRecord) -> bool:
    """Somebody has looked, or renewed, and nothing was changed. That it was forbidden is worth telling."""
    verb = (entry.component, entry.verb)
    return (verb in _LOOKS and entry.code != "forbidden") or (verb == _RENEWAL and entry.outcome == "ok")


class _Timeline:
    """The events of each kind in the order of time: a command's are looked for near it, and among those of its task when
    it names one, however many others there are.
    """

    def __init__(self, events: Sequence[Happened]) -> None:
        self._events = events
        self._at = [seconds(one.at) for one in events]
        #: (about, event, task), and with None those of every task -> when, and which
        self._kinds: dict[tuple[str, str, str | None], tuple[list[float], list[int]]] = {}
        for place in sorted(range(len(events)), key=self._at.__getitem__):
            one = events[place]
            for task in (None, one.task):
                times, places = self._kinds.setdefault((one.about, one.event, task), ([], []))
                times.append(self._at[place])
                places.append(place)

    def caused(self, entry: AuditRecord) -> list[int]:
        """Which of the events this command made."""
        at = seconds(entry.at)
        begin, end = at - SLACK_S - entry.took_ms / 1000, at + SLACK_S
        found: list[int] = []
        for about, event in CAUSES.get((entry.component, entry.verb), ()):
            for task in (entry.task, "") if entry.task else (None,):
                times, places = self._kinds.get((about, event, task), ([], []))
                near = places[bisect_left(times, begin) : bisect_right(times, end)]
                found += [place for place in near if _fits(entry, self._events[place])]
        if entry.fence or entry.verb in ("submit", "bye"):
            return sorted(found)
        # without a fence there may be two of a kind within the slack: the nearest of each kind
        nearest: dict[tuple[str, str], int] = {}
        for place in sorted(found, key=lambda place: (abs(self._at[place] - at), place)):
            nearest.setdefault((self._events[place].about, self._events[place].event), place)
        return sorted(nearest.values())


def _fits(entry: AuditRecord, one: Happened) -> bool:
    """Nothing that both name differs."""
    pairs = (
        (entry.session, one.session),
        (entry.task, one.task),
        (entry.account, one.account if one.event == "account" else ""),
        (entry.hold, one.hold if entry.component == "governor" else ""),
        (entry.breaker, one.breaker),
        (entry.fence, one.fence),
    )
    return all(not here or not there or here == there for here, there in pairs)


def _told_of(line: Line, entry: AuditRecord) -> Line:
    return replace(
        line,
        who=line.who or entry.session,
        took_ms=entry.took_ms,
        request_id=entry.request_id,
        sources=tuple(dict.fromkeys((*line.sources, "audit"))),
    )


def _alone(entry: AuditRecord) -> Line:
    """A command that no event is known of: refused, or its event is not kept."""
    verb = f"{entry.component} {entry.verb}"
    about = f" {_about(entry)}" if _about(entry) else ""
    amount = f", {usd(entry.amount_micro_usd)}" if entry.amount_micro_usd is not None else ""
    if entry.outcome == "refused":
        what, tone = f"asked for {verb}{about}{amount}, refused: {entry.code}: {entry.why}", "bad"
    elif entry.outcome == "error":
        what, tone = f"asked for {verb}{about}{amount}, and the daemon failed: {entry.why or entry.code}", "bad"
    else:
        what, tone = f"{verb}{about}{amount}", "plain"
    return Line(
        at=entry.at,
        who=entry.session,
        what=what,
        tone="bad" if tone == "bad" else "plain",
        took_ms=entry.took_ms,
        request_id=entry.request_id,
        sources=("audit",),
    )


def _about(entry: AuditRecord) -> str:
    """The one thing that it was about."""
    return next((name for name in (entry.task, entry.breaker, entry.account, entry.hold, entry.subject) if name), "")


def _counted(lines: Iterable[tuple[Line, Key | None]]) -> list[Line]:
    """The same command with the same fate, again and again, is one line; it tells the first one's sentence."""
    found: list[Line] = []
    last: Key | None = None
    for line, key in lines:
        if key is not None and key == last:
            found[-1] = replace(found[-1], times=found[-1].times + 1, until=line.at)
        else:
            found.append(line)
        last = key
    return found


def refusals(audit: Iterable[AuditRecord]) -> Iterator[AuditRecord]:
    """The commands that were refused."""
    return (entry for entry in audit if entry.outcome == "refused" and not is_look(entry))
