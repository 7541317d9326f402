"""`ifabric match explain`: who can take a task, why the others cannot, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Task, Where
from ifabric.cli.output import check, out, plain, print_json, state
from ifabric.wire import coordinator
from ifabric.wire import governor as wire

if TYPE_CHECKING:
    from ifabric.client import Client


def explain(task: Task, *, json: Json = False, where: Where | None = None) -> int:
    """Show which of the sessions that are there can take a task, best first, why the
    others cannot, and what to do.

    For example:

        ifabric match explain P0.1.5
    """

    async def ask(c: Client) -> tuple[coordinator.GetReply, wire.MatchReply]:
        found = await c.get(task)
        return found, await c.match(found.spec.needs, found.spec.wants, found.spec.labels)

    found, matched = with_client(where, None, ask)
    advice = advise(found, matched)
    if json:
        asked = {"needs": found.spec.needs, "wants": found.spec.wants, "labels": found.spec.labels}
        print_json({"task": found.task, "state": found.state, **asked, "match": matched, "advice": advice})
        return 0
    out.print(f"[bold]{plain(found.task)}[/] {state(found.state)}  {plain(found.spec.title)}")
    for name, words in (("needs", found.spec.needs), ("wants", found.spec.wants), ("labels", found.spec.labels)):
        if words:
            out.print(f"  {name:<8}{plain(', '.join(words))}")
    for one in matched.ranked:
        check(one.matches, f"[bold]{plain(one.session)}[/] {one.score:.2f}  {plain(one.reason)}")
    if len(matched.ranked) < matched.sessions:
        out.print(f"[dim]  and {matched.sessions - len(matched.ranked)} more[/]")
    out.print(plain(advice))
    return 0


def advise(found: coordinator.GetReply, matched: wire.MatchReply) -> str:
    """What to do, in a sentence."""
    if found.state == "blocked":
        return f"It waits for {', '.join(found.waiting_for)}: nobody can take it before those are done."
    if found.state == "claimed":
        return f"{found.session} is at work on it, under fence {found.fence}."
    if found.state == "done":
        return "It is done: there is nothing to do."
    if found.state != "pending":
        return f"It is {found.state}: `ifabric task requeue {found.task}` puts it back."
    able = [one.session for one in matched.ranked if one.matches]
    if able:
        return f"{_count(len(able), matched.sessions)} can take it: {able[0]} before others; it goes to the first that asks."
    needs = found.spec.needs
    such = f" with {', '.join(needs)}" if needs else ""
    if found.spec.labels:
        such += f" that accepts {' or '.join(found.spec.labels)}"
    if not matched.sessions:
        return f"No session is there: start an agent{such}."
    whole = [one for one in matched.ranked if not one.missing]
    if whole:
        best = max(whole, key=lambda one: one.score)
        wants = f", with more of what it wants ({', '.join(found.spec.wants)})" if found.spec.wants else ""
        return (
            f"Nobody takes it now. {best.session} is nearest, with {best.score:.2f} where {matched.min_score:.2f} are asked for "
            f"({best.reason.rstrip('.')}). Start an agent{such}{wants}, or wait until one is less busy."
        )
    nearest = min(matched.ranked, key=lambda one: len(one.missing))
    return f"Nobody can take it. {nearest.session} is nearest and lacks {', '.join(nearest.missing)}. Start an agent{such}."


def _count(able: int, of: int) -> str:
    sessions: Sequence[str] = ("session", "sessions")
    return f"{able} of {of} {sessions[of != 1]}"
