"""The story of a breaker: why it opened, who said so, when it tries again, who is refused meanwhile."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from ifabric.explaining.happenings import of_breakers
from ifabric.explaining.merging import SLACK_S, merged, refusals
from ifabric.explaining.story import LINES_MAX, Sources, Story, ago, many, seconds, span, told
from ifabric.wire.governor import BreakerLine

FLAPPING_TRIPS = 3


class BreakerFacts(Struct, frozen=True, kw_only=True):
    """What was found of a breaker. `line` None: it is closed, and nobody has called through it lately."""

    breaker: str
    now: str
    line: BreakerLine | None = None
    sources: Sources = Sources()
    #: tasks that need it by name and are pending, as far as that was looked at
    waiting: int = 0


def breaker_story(facts: BreakerFacts, *, most: int = LINES_MAX) -> Story:
    """The story."""
    sources = facts.sources
    # each call that was admitted or reported is a command: what they come to is said below
    others = (entry for entry in sources.audit if entry.verb not in ("admit", "report") or entry.outcome != "ok")
    lines = merged(of_breakers(sources.breakers), others)
    now = [*_is(facts), *_reporters(facts), *_refused(facts)]
    if facts.waiting:
        now.append(f"{many(facts.waiting, 'pending task')} need it by name and wait.")
    return told("breaker", facts.breaker, lines, now=now, do=_do(facts), unread=sources.unread, most=most)


def _is(facts: BreakerFacts) -> list[str]:
    line = facts.line
    if line is None:
        return ["It is closed, and nothing was called through it lately."]
    counted = f"{line.failures} of {line.calls} calls failed lately, as the daemon that answers counts"
    if line.state == "closed":
        by = f", closed by {line.by}" if line.by else ""
        return [f"It is closed{by}: everything is let through. {counted}."]
    since = f" for {span(line.opened_ago_s)}" if line.opened_ago_s is not None else ""
    if line.state == "half_open":
        return [f"It is half open{since}: a few calls may try, and if they succeed it closes."]
    if line.by:
        why = f": {line.why}" if line.why else ""
        return [f"{line.by} holds it open{since}{why}. It stays open until somebody closes it."]
    probe = ""
    if line.probe_in_s is not None:
        probe = (
            " The next probe may go now."
            if line.probe_in_s <= 0
            else f" The next probe goes in {span(line.probe_in_s)}."
        )
    why = (
        f": {line.why}"
        if line.why
        else f": too many calls failed ({counted})"
        if line.calls
        else ": too many calls failed"
    )
    again = f" It has tripped {many(line.trips, 'time')} without a lasting recovery." if line.trips > 1 else ""
    return [f"It is open{since}{why}.{probe}{again}"]


def _reporters(facts: BreakerFacts) -> list[str]:
    """Who reported through it before it opened for the last time, as far as the audit tells."""
    opened = next((one.at for one in reversed(facts.sources.breakers) if one.event == "opened"), facts.now)
    reported = [
        one for one in facts.sources.audit
        if one.verb == "report" and one.outcome == "ok" and seconds(one.at) <= seconds(opened) + SLACK_S and one.subject in ("", "failure")
    ]  # fmt: skip
    if not reported:
        return []
    by = Counter(one.session for one in reported[-100:])
    what = "failures" if all(one.subject == "failure" for one in reported) else "calls"
    said = ", ".join(f"{session} {times}x" for session, times in by.most_common(5))
    return [f"Who reported {what} before it opened ({ago(reported[-1].at, facts.now)} for the last time): {said}."]


def _refused(facts: BreakerFacts) -> list[str]:
    who = Counter(entry.session for entry in refusals(facts.sources.audit) if entry.code == "breaker_open")
    if not who:
        return []
    said = ", ".join(f"{session} {times}x" for session, times in who.most_common(5))
    return [f"Refused because of it: {said}."]


def _do(facts: BreakerFacts) -> list[str]:
    line = facts.line
    if line is None or line.state == "closed":
        return []
    close = f"ifabric breaker close {facts.breaker}"
    if line.by:
        return [f"ask {line.by}; when the cause is gone: {close}"]
    do = []
    if line.trips >= FLAPPING_TRIPS:
        do.append("it opens again after each probe: ifabric playbook breaker-flapping")
    wait = "nothing, if the provider comes back: it probes by itself"
    do.append(f"{wait}; when you know that it is well: {close}")
    return do
