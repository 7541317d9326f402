"""`ifabric budget statement`: what an account was charged, entry by entry, until the sum that etcd knows.

The entries are the events in the journal; the sum is etcd's. The journal forgets what is old, so a statement begins
with what is carried forward: the sum less the entries shown, whole micro-USD all the way. A charge is told a moment
after it is committed; so it is read again until the sum and the journal have stood still for a moment.
"""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.budget import Account
from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import err, money, out, plain, print_json, print_table, usd
from ifabric.clock import SystemClock, rfc3339
from ifabric.errors import ConfigError
from ifabric.wire import governor as wire
from ifabric.wire import subjects
from ifabric.wire.replay import REPLAYED

if TYPE_CHECKING:
    from ifabric.client import Client

#: for how long nothing may change, and how often that is tried
STILL_S, LOOKS_MAX = 0.3, 10
COMMITS = subjects.event("budget", "commit")
COLUMNS = (
    "at",
    "account",
    "session",
    "hold",
    "task",
    "charged_micro_usd",
    "late",
    "overdraft_micro_usd",
    "balance_micro_usd",
)
CARRIED = "carried forward"


class Entry(NamedTuple):
    """A charge, and what was spent with it."""

    at: str
    account: str
    session: str
    hold: str
    task: str
    charged: int
    late: bool
    overdraft: int
    balance: int


class Statement(NamedTuple):
    """`carried` + every charge = `spent`."""

    account: str
    window: str
    carried: int
    entries: tuple[Entry, ...]
    spent: int
    #: money was being spent all the while: an entry may be missing, and stand in `carried`
    moving: bool = False


def statement(
    account: Account,
    *,
    csv: Annotated[bool, Parameter(help="CSV on stdout, in whole micro-USD.")] = False,
    since: Annotated[str | None, Parameter(help="Only entries from then on: 2026-11-25, or with a time (UTC).")] = None,
    limit: Annotated[int, Parameter(help="The last entries, at most.", validator=Number(gte=1, lte=1_000_000))] = 1000,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Show what an account and all below it were charged in the window that is now.
    It begins with what is carried forward and ends with what etcd says is spent.

    For example:

        ifabric budget statement acme/research
        ifabric budget statement acme --since 2026-11-01 --csv > november.csv
    """
    begin = _moment(since) if since is not None else None
    made = with_client(where, None, lambda c: _read(c, account, begin, limit))
    if made.moving:
        err.print("[yellow]![/] money is being spent just now: an entry may stand in what is carried forward")
    if json:
        entries = [entry._asdict() for entry in made.entries]
        print_json({**made._asdict(), "entries": entries})
    elif csv:
        _csv(made)
    else:
        _show(made)
    return 0


async def _read(client: Client, account: str, since: str | None, limit: int) -> Statement:
    for _ in range(LOOKS_MAX):
        line, last = (await client.balance(account)).path[-1], await _last(client)
        events = await _events(client, account, last)
        await asyncio.sleep(STILL_S)
        if (line, last) == ((await client.balance(account)).path[-1], await _last(client)):
            return _made(line, events, since, limit)
    return _made(line, events, since, limit, moving=True)


async def _last(client: Client) -> int:
    entry = await (await client.journal()).last(COMMITS)
    return entry.seq if entry is not None else 0


async def _events(client: Client, account: str, until_seq: int) -> list[wire.BudgetEvent]:
    """The charges to the account and those below it, each once: a publisher that died may have told one again."""
    if not until_seq:
        return []
    found: dict[tuple[int, str, str], wire.BudgetEvent] = {}
    async for event in client.events("budget", after_seq=0, until_seq=until_seq):
        if event.event == "commit" and (event.account == account or event.account.startswith(account + "/")):
            found.setdefault((event.revision, event.session, event.hold), event)
    return once([found[key] for key in sorted(found)])


def once(charges: Sequence[wire.BudgetEvent]) -> list[wire.BudgetEvent]:
    """The charges that the ledger knows, of those that the journal tells in the order of their revisions.

    What was charged again after a restore is told twice, and the ledger knows the second time.
    """
    again = {(charge.session, charge.hold): charge for charge in charges if charge.note == REPLAYED}
    return [charge for charge in charges if again.get((charge.session, charge.hold), charge) is charge]


def _made(
    line: wire.Line, events: Sequence[wire.BudgetEvent], since: str | None, limit: int, *, moving: bool = False
) -> Statement:
    """The statement over the window that is now."""
    today = rfc3339(SystemClock().wall_ms())[:10]
    window = {"total": "", "month": today[:7], "day": today}[line.window]
    shown = [event for event in events if event.at.startswith(window) and (since is None or event.at >= since)][-limit:]
    carried = balance = line.spent - sum(event.charged for event in shown)
    entries = []
    for event in shown:
        balance += event.charged
        entries.append(
            Entry(
                event.at,
                event.account,
                event.session,
                event.hold,
                event.task or "",
                event.charged,
                event.late,
                event.overdraft,
                balance,
            )
        )
    return Statement(line.account, window or "total", carried, tuple(entries), line.spent, moving)


def _moment(text: str) -> str:
    """A moment as events write it, in UTC; they compare as they stand."""
    try:
        found = datetime.fromisoformat(text)
        return rfc3339(int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000))
    except (ValueError, OverflowError):
        raise ConfigError(f"--since: {text[:40]!r} is no date: write 2026-11-25, or 2026-11-25T09:30:00") from None


def _csv(made: Statement) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow(("", made.account, "", CARRIED, "", "", "", "", made.carried))
    for entry in made.entries:
        writer.writerow((*entry[:6], "late" if entry.late else "", *entry[7:]))


def _show(made: Statement) -> None:
    head = ("AT", "ACCOUNT", "SESSION", "HOLD", "TASK", "CHARGED", "LATE", "OVERDRAFT", "BALANCE")
    rows: list[tuple[Any, ...]] = [("", made.account, "", CARRIED, "", "", "", "", money(made.carried))]
    for entry in made.entries:
        over = money(entry.overdraft) if entry.overdraft else ""
        late = "late" if entry.late else ""
        rows.append((*entry[:5], money(entry.charged), late, over, money(entry.balance)))
    print_table(head, rows)
    window = "" if made.window == "total" else f" in {made.window}"
    out.print(f"{plain(made.account)} has spent {usd(made.spent)}{window}; {len(made.entries)} entries")
