"""What the fabric knows: its board, its ledger and its journal, asked as any operator can, and laid beside what agents were told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from ifabric.client import Client
from ifabric.drill.agents import Charge, Done, Told
from ifabric.drill.verdict import Account, Charges, Fate, Limit
from ifabric.errors import UnknownAccount
from ifabric.wire import coordinator as wire
from ifabric.wire import replay, subjects
from ifabric.wire.governor import BudgetEvent, Line, path_of

_TASKS = subjects.event("task", "")
_CHARGES = (subjects.event("budget", "commit"), subjects.event(*replay.ACKNOWLEDGED))
_task_events = msgspec.json.Decoder(wire.TaskEvent)
_budget_events = msgspec.json.Decoder(BudgetEvent)
#: no charge of a drill is older
NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Journal(NamedTuple):
    """What the journal told until the loss: tasks submitted, (task, fence) completed, (session, hold) charged."""

    submitted: frozenset[str]
    completed: frozenset[tuple[str, int]]
    charged: frozenset[tuple[str, str]]


class Moments(NamedTuple):
    """When (monotonic seconds) the backup began, and the cluster was lost."""

    backup: float
    loss: float


async def read_journal(client: Client, after_seq: int, until_seq: int) -> Journal:
    """The events between two positions."""
    submitted: set[str] = set()
    completed: set[tuple[str, int]] = set()
    charged: set[tuple[str, str]] = set()
    if until_seq > after_seq:
        entries = (await client.journal()).read(after_seq=after_seq)
        async with contextlib.aclosing(entries) as each:  # type: ignore[type-var]
            async for entry in each:
                if entry.subject.startswith(_TASKS):
                    event = _task_events.decode(entry.data)
                    if event.event == "submitted":
                        submitted.add(event.task)
                    elif event.event == "completed":
                        completed.add((event.task, event.fence))
                elif entry.subject in _CHARGES:
                    commit = _budget_events.decode(entry.data)
                    if commit.event == "commit":
                        charged.add((commit.session, commit.hold))
                if entry.seq >= until_seq:
                    break
    return Journal(frozenset(submitted), frozenset(completed), frozenset(charged))


async def last_seq(client: Client) -> int:
    """The journal's last position; 0 when it is empty."""
    last = await (await client.journal()).last()
    return last.seq if last is not None else 0


async def read_board(client: Client) -> AsyncIterator[wire.TaskLine]:
    """Every task there is."""
    after: str | None = None
    while True:
        page = await client.list(limit=wire.LIST_MAX_TASKS, after=after)
        for line in page.tasks:
            yield line
        after = page.after
        if after is None:
            return


async def fates(
    client: Client, loaded: Iterable[str], told: Told, journal: Journal, when: Moments
) -> tuple[Fate, Fate]:
    """What became of tasks that were submitted, and of completions."""
    there: set[str] = set()
    done: set[tuple[str, int]] = set()
    async for line in read_board(client):
        there.add(line.task)
        if line.state == "done":
            done.add((line.task, line.fence))
    before = [*loaded, *(task for at, task in told.submitted if at < when.backup)]
    since = [task for at, task in told.submitted if when.backup <= at < when.loss]
    gone = [task for task in since if task not in there]
    submitted = Fate(
        len(before),
        tuple(task for task in before if task not in there),
        len(since),
        tuple(gone),
        tuple(task for task in gone if task not in journal.submitted),
    )
    early = [one for one in told.completed if one.at < when.backup]
    later = [one for one in told.completed if when.backup <= one.at < when.loss]
    lost = [one for one in later if _key(one) not in done]
    completed = Fate(
        len(early),
        tuple(one.task for one in early if _key(one) not in done),
        len(later),
        tuple(one.task for one in lost),
        tuple(one.task for one in lost if _key(one) not in journal.completed),
    )
    return submitted, completed


def _key(done: Done) -> tuple[str, int]:
    return done.task, done.fence


async def charges(client: Client, told: Told, journal: Journal, when: Moments) -> Charges:
    """Acknowledged charges, and those that the ledger does not know."""
    until = [one for one in told.charges if one.at < when.loss]
    since = [one for one in until if one.at >= when.backup]
    untold = [one for one in since if (one.session, one.hold) not in journal.charged]
    lost = await _unknown_to_the_ledger(client, told.charges)
    return Charges(len(until), _sum(until), len(since), _sum(since), len(untold), _sum(untold), len(lost), _sum(lost))


def _sum(charged: Iterable[Charge]) -> int:
    return sum(one.micro_usd for one in charged)


async def _unknown_to_the_ledger(client: Client, charged: Sequence[Charge]) -> list[Charge]:
    """Those of which the ledger has no record, or less than was acknowledged.

    It is asked with a replay that is only tried: what it would have to charge is what it does not know.
    """
    known: replay.RestoredReply = await client.call(replay.Restored())
    since = known.restored.revision if known.restored is not None else 0
    unknown: list[Charge] = []
    for at in range(0, len(charged), replay.ENTRIES_MAX):
        part = charged[at : at + replay.ENTRIES_MAX]
        entries = tuple(
            replay.ReplayEntry(
                session=one.session,
                hold=one.hold,
                account=one.account,
                fate="committed",
                at=NEVER,
                charged_micro_usd=one.micro_usd,
            )
            for one in part
        )
        answer: replay.ReplayReply = await client.call(
            replay.Replay(since_revision=since, entries=entries, dry_run=True)
        )
        unknown += (one for one, found in zip(part, answer.entries, strict=True) if found.done != "again")
    return unknown


async def accounts(client: Client, told: Told) -> tuple[Account, ...]:
    """Every account that was charged, with all above it: what was acknowledged beside what the ledger says."""
    acknowledged: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for one in told.charges:
        for name in path_of(one.account):
            acknowledged[name] = acknowledged.get(name, 0) + one.micro_usd
    for account, amount in told.unknown.items():
        for name in path_of(account):
            unknown[name] = unknown.get(name, 0) + amount
    found = []
    for name in sorted({*acknowledged, *unknown}, key=lambda name: (name.count("/"), name)):
        line = await line_of(client, name)
        found.append(Account(name, acknowledged.get(name, 0), unknown.get(name, 0), line.spent if line else 0))
    return tuple(found)


async def limits(client: Client, given: dict[str, int]) -> tuple[Limit, ...]:
    """The limits now, beside those that were set."""
    found = []
    for name, amount in given.items():
        line = await line_of(client, name)
        found.append(Limit(name, amount, line.limit if line else None))
    return tuple(found)


async def line_of(client: Client, name: str) -> Line | None:
    """An account as etcd knows it now; None when there is none."""
    try:
        return (await client.balance(name)).path[-1]
    except UnknownAccount:
        return None
