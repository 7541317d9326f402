"""The story of a task: where it came from, who had it, why it stands where it stands."""

from __future__ import annotations

from msgspec import Struct

from ifabric.explaining.happenings import of_budgets, of_history, of_matches, of_tasks
from ifabric.explaining.merging import merged
from ifabric.explaining.story import LINES_MAX, Sources, Story, ago, many, seconds, some, span, told, usd
from ifabric.wire.coordinator import GetReply
from ifabric.wire.governor import HoldLine, MatchReply
from ifabric.wire.overview import SessionLine


class Dependency(Struct, frozen=True, kw_only=True):
    """A task that another waits for. `state` "" when it could not be read."""

    task: str
    state: str = ""


class TaskFacts(Struct, frozen=True, kw_only=True):
    """What was found of a task. `record` None: there is none any more, only what the journal tells of it."""

    task: str
    #: RFC 3339
    now: str
    record: GetReply | None = None
    sources: Sources = Sources()
    dependencies: tuple[Dependency, ...] = ()
    #: who could take it, when it is pending, and what `match explain` says of that
    matched: MatchReply | None = None
    advice: str = ""
    #: names of breakers that are not closed
    open_breakers: tuple[str, ...] = ()
    #: the holder; None when it is not there any more, or sessions could not be read (`sessions_read`)
    holder: SessionLine | None = None
    sessions_read: bool = True
    holds: tuple[HoldLine, ...] = ()


def task_story(facts: TaskFacts, *, most: int = LINES_MAX) -> Story:
    """The story."""
    found, sources = facts.record, facts.sources
    lines = merged(
        (
            *(of_history(facts.task, found.history) if found else ()),
            *of_tasks(sources.tasks),
            *of_budgets(sources.budgets),
            *of_matches(sources.matches),
        ),
        sources.audit,
    )
    now, do = _gone(facts) if found is None else _NOW[found.state](facts, found)
    return told(
        "task",
        facts.task,
        lines,
        title=found.spec.title if found else "",
        now=(*now, *_money(facts)),
        do=do,
        unread=sources.unread,
        most=most,
    )


Said = tuple[list[str], list[str]]


def _gone(facts: TaskFacts) -> Said:
    last = facts.sources.tasks[-1] if facts.sources.tasks else None
    when = f": the last that is known of it is `{last.event}`, {ago(last.at, facts.now)}" if last else ""
    return [f"It is not on the board any more{when}."], []


def _pending(facts: TaskFacts, found: GetReply) -> Said:
    now = [
        f"It is pending{_since(found, facts.now)}: attempt {found.attempt + 1} of {found.spec.max_attempts} is next."
    ]
    now += _ended(found)
    matched = facts.matched
    if matched is None:
        return now, [f"ifabric match explain {found.task}"]
    now.append(facts.advice)
    if any(one.matches for one in matched.ranked):
        busy = "nothing: it goes to the first able session that asks. If none asks, their agents hang: see their logs"
        return now, [busy]
    shut = [name for name in found.spec.needs if name in facts.open_breakers]
    if shut:
        now.append(f"The breaker {some(shut)} is not closed, and it needs that.")
        return now, [f"ifabric explain {name} --breaker" for name in shut]
    do = [f"ifabric match explain {found.task}"]
    if found.spec.needs or not matched.sessions:
        such = f" with the capabilities {', '.join(found.spec.needs)}" if found.spec.needs else ""
        do.insert(0, f"start an agent{such}")
    return now, do


def _blocked(facts: TaskFacts, found: GetReply) -> Said:
    now = [f"It is blocked: it waits for {many(len(found.waiting_for), 'task')}."]
    do = []
    for one in facts.dependencies:
        now.append(f"{one.task} is {one.state or 'not readable'}.")
        if one.state in ("dead", "cancelled"):
            do.append(f"ifabric task requeue {one.task}")
        elif one.state in ("pending", "blocked", ""):
            do.append(f"ifabric explain {one.task} --task")
    left = len(found.waiting_for) - len(facts.dependencies)
    if left > 0:
        now.append(f"And it waits for {left} more: ifabric task show {found.task}")
    return now, do


def _claimed(facts: TaskFacts, found: GetReply) -> Said:
    claimed = next((line.at for line in reversed(found.history) if line.event == "claimed"), "")
    for_s = seconds(facts.now) - seconds(claimed) if claimed else 0.0
    attempt = f"attempt {found.attempt} of {found.spec.max_attempts}"
    now = [f"{found.session} holds it, under fence {found.fence}, for {span(for_s)} now ({attempt})."]
    if found.spec.deadline_s:
        left = found.spec.deadline_s - for_s
        now.append(f"Its claim ends in {span(left)}, at its deadline of {span(found.spec.deadline_s)}.")
    now += _ended(found)
    if not facts.sessions_read:
        return now, ["nothing, while its holder works: ifabric task list --state claimed"]
    if facts.holder is None:
        now.append(f"{found.session} is not there any more: the task is pending again within seconds.")
        return now, []
    now.append(
        f"{found.session} renews its session within every {span(facts.holder.ttl_s)}; when it stops, the task is free"
        f" {span(facts.holder.ttl_s)} after its last renewal."
    )
    return now, [f"nothing, while it works. If it hangs: ifabric explain {found.session} --session"]


def _done(facts: TaskFacts, found: GetReply) -> Said:
    last = next((line for line in reversed(found.history) if line.event == "completed"), None)
    by = f", by {last.session} {ago(last.at, facts.now)}" if last and last.session else ""
    return [f"It is done{by}, with attempt {max(1, found.attempt)} of {found.spec.max_attempts}."], []


def _dead(_: TaskFacts, found: GetReply) -> Said:
    errors = list(dict.fromkeys(line.note for line in found.history if line.event == "failed" and line.note))
    if found.error and not any(error and found.error.startswith(error) for error in errors):
        errors.append(found.error)
    now = [f"It is dead: all of its {many(found.spec.max_attempts, 'attempt')} are spent, or it was failed for good."]
    now += [f"It failed with: {error}" for error in errors[-3:]]
    do = []
    expired = sum(line.event == "expired" for line in found.history)
    if expired:
        now.append(
            f"Its claim ended {many(expired, 'time')} without a word: its holders died, or stalled for their TTL."
        )
        do.append(
            "see the logs of its holders; agents that stall for long need a longer ttl_s, or the task a longer deadline_s"
        )
    do.append(f"when the cause is mended: ifabric task requeue {found.task}")
    return now, do


def _cancelled(facts: TaskFacts, found: GetReply) -> Said:
    last = next((line for line in reversed(found.history) if line.event == "cancelled"), None)
    by = f" by {last.session} {ago(last.at, facts.now)}" if last else ""
    return [f"It was taken off the board{by}."], [
        f"nothing; or put it back: ifabric task requeue {found.task}; or forget it: ifabric task purge {found.task}"
    ]


_NOW = {
    "pending": _pending,
    "blocked": _blocked,
    "claimed": _claimed,
    "done": _done,
    "dead": _dead,
    "cancelled": _cancelled,
}


def _since(found: GetReply, now: str) -> str:
    last = found.history[-1] if found.history else None
    return f" for {span(seconds(now) - seconds(last.at))}" if last else ""


def _ended(found: GetReply) -> list[str]:
    """How its earlier attempts ended."""
    said = []
    expired = sum(line.event == "expired" for line in found.history)
    if expired:
        said.append(f"Claims of it ended {many(expired, 'time')} without a word from the holder.")
    failed = [line for line in found.history if line.event == "failed"]
    if failed:
        said.append(f"It failed {many(len(failed), 'time')}, at last with: {failed[-1].note or 'no reason given'}")
    return said


def _money(facts: TaskFacts) -> list[str]:
    said = []
    for hold in facts.holds:
        until = f"for {span(hold.expires_in_s)} more" if hold.expires_in_s is not None else "as long as its claim"
        said.append(f"{usd(hold.amount)} of {hold.account} are held for it, {until} ({hold.hold}).")
    commits = {(one.session, one.hold): one for one in facts.sources.budgets if one.event == "commit"}
    if commits:
        said.append(f"It has cost {usd(sum(one.charged for one in commits.values()))}, as far as the journal tells.")
    elif facts.record is not None and facts.record.state == "done" and facts.sources.events_read:
        said.append("No cost was told.")
    return said
