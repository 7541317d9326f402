"""`ifabric reconcile`: charges what was spent after the backup from which etcd was restored.

A backup is minutes old, and the ledger that is restored from it has forgotten what was spent since. The journal
(JetStream's stream `IF_EVENTS`) has it: every hold, charge and limit, told by the etcd watch after it was committed. It
is read from the backup's revision on, folded into one entry a hold, and handed to the governor, which charges each
once, however often this is run, and whatever the limits say: what is over is overdraft.

**What is lost for good.** An event is appended a moment after its commit is acknowledged: the publisher gathers for 5 ms
and then waits for JetStream. While etcd's data lives that is nothing, for the publisher goes on where the journal ends.
When etcd loses its data, the watch ends before its last commits; but a daemon that lives on, if only to be stopped, tells
the journal what it had acknowledged. So what is lost is what a daemon acknowledged in the last moment before etcd and
that daemon died at the same instant: it is in neither the backup nor the journal, though an agent may have been told that
it was charged; and as much more as JetStream was behind or away for just then (`if_governor_event_lag_seconds`). A
JetStream whose machine loses power loses besides what it had not synced (`sync_interval`, two minutes unless it is set),
unless replicas elsewhere have it. What the journal says of itself is believed: a stream that begins after the backup, or
has a `resync` in it, has gaps, and then this says so and exits with 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.connect import with_client
from ifabric.cli.lost import Lost, Span, Told, moment
from ifabric.cli.options import Json, Where
from ifabric.cli.output import check, err, money, out, plain, print_json, print_table, usd
from ifabric.errors import ConfigError
from ifabric.wire import replay as wire
from ifabric.wire import subjects
from ifabric.wire.governor import BUDGET_EVENTS, BudgetEvent

if TYPE_CHECKING:
    from rich.progress import Progress

    from ifabric.bus.base import Entry, Journal
    from ifabric.client import Client

#: how long one request may take: a hundred entries
ATTEMPT_S = 30.0
SAYS: dict[wire.Act, str] = {
    "charged": "charged",
    "added": "charged, only what was missing",
    "freed": "holds freed",
    "kept": "holds remembered as ended",
    "again": "known already",
}
_events = msgspec.json.Decoder(BudgetEvent)


class Mark(msgspec.Struct):
    """What any event says of when it was."""

    at: str = ""
    revision: int = 0


_marks = msgspec.json.Decoder(Mark)


class Outcome(NamedTuple):
    """What was replayed."""

    done: Sequence[wire.ReplayedEntry]
    limits: Sequence[wire.ReplayedLimit]


class Found(NamedTuple):
    """What the journal tells, and why that is not all (nothing: it is)."""

    told: Told
    gaps: tuple[str, ...]


def reconcile(
    *,
    since_revision: Annotated[
        int | None,
        Parameter(help="The backup's revision. Default: as the restore has noted it.", validator=Number(gte=0)),
    ] = None,
    restored_at: Annotated[
        str | None,
        Parameter(help="When etcd was restored (UTC); only where `ifabric restore` did not do it."),
    ] = None,
    dry_run: Annotated[bool, Parameter(help="Only say what would be charged.")] = False,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Charge again what was spent after the backup that etcd was restored from, as the
    journal tells it. It can be interrupted and repeated: nothing is charged twice.
    Exits with 1 when the journal does not tell of all the time since the backup.

    For example:

        ifabric reconcile --dry-run
        ifabric reconcile
        ifabric reconcile --since-revision 48211 --restored-at 2026-11-25T09:30:00
    """

    async def act(c: Client) -> tuple[Span, Found, Outcome]:
        span = span_of(await c.call(wire.Restored()), since_revision, restored_at)
        with bars(json=json) as progress:
            found = await read(await c.journal(), span, progress)
            return span, found, await replay(c, span, found, progress, dry_run=dry_run)

    span, found, outcome = with_client(where, None, act)
    if json:
        print_json(_summary(span, found, outcome, dry_run=dry_run))
    else:
        _show(found, outcome, dry_run=dry_run)
    return 1 if found.gaps else 0


def span_of(known: wire.RestoredReply, since_revision: int | None, restored_at: str | None) -> Span:
    """The time that was lost, as the cluster knows it and as it was said. `ConfigError` when nobody says."""
    restored = known.restored
    try:
        said = moment(restored_at) if restored_at is not None else None
    except ValueError:
        raise ConfigError(f"--restored-at: {plain(restored_at)[:40]} is no date: write 2026-11-25T09:30:00") from None
    if restored is None:
        if since_revision is None or said is None:
            raise ConfigError(
                "this cluster does not know of a restore, so nothing is to be reconciled. If etcd was restored by other "
                "means, say --since-revision (of the snapshot) and --restored-at"
            )
        return Span(since_revision, 0, said)
    since = restored.revision if since_revision is None else since_revision
    return Span(since, known.began_revision, said or moment(restored.restored_at), moment(restored.at))


# -- reading -----------------------------------------------------------------------------------------------------------


async def read(journal: Journal, span: Span, progress: Progress) -> Found:
    """What the journal tells of the lost time, and why that is not all."""
    lost = Lost(span)
    names = [subjects.event("budget", what) for what in (*BUDGET_EVENTS, "resync")]
    last = max([entry.seq for name in names if (entry := await journal.last(name)) is not None], default=0)
    if last:
        bar = progress.add_task("reading the journal", total=last)
        await _add(lost, journal, subjects.event("budget", ">"), last, lambda seq: progress.update(bar, completed=seq))
    words = await journal.last(subjects.event(*wire.ACKNOWLEDGED))
    if words is not None:  # what daemons had acknowledged when etcd was gone: mostly told already, and then no more
        await _add(lost, journal, words.subject, words.seq, lambda _: None)
    told = lost.told()
    return Found(told, tuple(_gaps(await _first(journal), span, told)))


async def _add(lost: Lost, journal: Journal, subject: str, until_seq: int, reached: Callable[[int], None]) -> None:
    """All on a subject, up to a message that is there."""
    async with _closing(journal.read(after_seq=0, subject=subject)) as entries:
        async for entry in entries:
            try:
                lost.add(_events.decode(entry.data))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                lost.unreadable += 1
            reached(entry.seq)
            if entry.seq >= until_seq:
                break


def _gaps(first: Mark | None, span: Span, told: Told) -> list[str]:
    """What is unknown, in sentences."""
    gaps = [f"the journal has lost events before {at}: what was spent there is unknown" for at in told.resyncs]
    if first is None:
        return ["the journal is empty: what was spent after the backup is unknown"]
    try:
        reached = span.reached_by(first.revision, first.at)
    except ValueError:
        reached = False
    if not reached:
        since = f"begins at {first.at}" if first.at else "does not say when it begins"
        gaps.insert(0, f"the journal {since}, after the backup: what was spent between them is unknown")
    return gaps


async def _first(journal: Journal) -> Mark | None:
    """What the journal's first message says of when it was; None: there is none."""
    if await journal.last() is None:
        return None
    async with _closing(journal.read(after_seq=0)) as entries:
        async for entry in entries:
            try:
                return _marks.decode(entry.data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return Mark()
    return None


@contextlib.asynccontextmanager
async def _closing(entries: AsyncIterator[Entry]) -> AsyncIterator[AsyncIterator[Entry]]:
    """The entries, and the end of reading them."""
    try:
        yield entries
    finally:
        assert isinstance(entries, AsyncGenerator), "a journal is read by a generator"
        await entries.aclose()


# -- replaying ---------------------------------------------------------------------------------------------------------


async def replay(client: Client, span: Span, found: Found, progress: Progress, *, dry_run: bool) -> Outcome:
    """Hands all of it to the governor: limits first, for they count for what is charged; then the end is remembered."""
    told, most = found.told, wire.ENTRIES_MAX
    bar = progress.add_task("replaying", total=len(told.entries))
    done: list[wire.ReplayedEntry] = []
    limits: list[wire.ReplayedLimit] = []

    async def send(**parts: Any) -> wire.ReplayReply:
        message = wire.Replay(since_revision=span.since_revision, dry_run=dry_run, **parts)
        reply: wire.ReplayReply = await client.call(message, attempt_s=ATTEMPT_S)
        return reply

    for at in range(0, len(told.limits), most):
        limits += (await send(limits=told.limits[at : at + most])).limits
    for at in range(0, len(told.entries), most):
        done += (await send(entries=told.entries[at : at + most])).entries
        progress.update(bar, completed=len(done))
    charged = sum(entry.charged_micro_usd for entry in told.entries)
    await send(
        finished=wire.ReplaySummary(entries=len(told.entries), charged_micro_usd=charged, complete=not found.gaps)
    )
    return Outcome(done, limits)


def bars(*, json: bool) -> Progress:
    """Progress on a terminal, and nothing elsewhere."""
    from rich.progress import Progress

    return Progress(console=err, transient=True, disable=json or not err.is_terminal)


# -- telling -----------------------------------------------------------------------------------------------------------


def _summary(span: Span, found: Found, outcome: Outcome, *, dry_run: bool) -> dict[str, Any]:
    told = found.told
    return {
        "dry_run": dry_run,
        "since_revision": span.since_revision,
        "backup_at": span.backup_at,
        "restored_at": span.restored_at,
        "journal": {
            "complete": not found.gaps,
            "gaps": found.gaps,
            "events": told.events,
            "last_at": told.last_at,
            "unreadable": told.unreadable,
            "charged_micro_usd": sum(entry.charged_micro_usd for entry in told.entries),
        },
        "entries": len(outcome.done),
        "done": {act: sum(one.done == act for one in outcome.done) for act in SAYS},
        "charged_micro_usd": sum(one.charged for one in outcome.done),
        "overdraft_micro_usd": sum(one.overdraft for one in outcome.done),
        "limits": outcome.limits,
    }


def _show(found: Found, outcome: Outcome, *, dry_run: bool) -> None:
    told, done = found.told, outcome.done
    rows: list[tuple[Any, ...]] = []
    for act, says in SAYS.items():
        mine = [one for one in done if one.done == act]
        if mine:
            over = sum(one.overdraft for one in mine)
            charged = sum(one.charged for one in mine)
            rows.append((says, str(len(mine)), money(charged), money(over, "yellow") if over else ""))
    if rows:
        print_table(("WHAT", "ENTRIES", "CHARGED", "OVERDRAFT"), rows)
    for limit in outcome.limits:
        set_ = "has a younger limit already" if limit.again else "has the limit again that was set after the backup"
        out.print(f"  {plain(limit.account)} {set_}")
    if told.unreadable:
        err.print(f"[yellow]![/] {told.unreadable} message(s) in the journal are no events, and were left out")
    spent = usd(sum(one.charged for one in done))
    known = usd(sum(entry.charged_micro_usd for entry in told.entries))
    said = f"{spent} would be charged" if dry_run else f"{spent} charged"
    last = f"; the last event is of {plain(told.last_at)}" if told.last_at else ""
    check(not found.gaps, f"{said} of {known} that the journal has of {len(done)} holds since the backup{last}")
    for gap in found.gaps:
        err.print(f"[red]![/] {plain(gap)}")
