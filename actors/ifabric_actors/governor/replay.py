"""What becomes of the ledger when the time that a restore has lost is told to it again. Pure, as `ledger` is.

A backup of etcd is minutes old. Restored from it, the ledger has forgotten what was spent since; the journal has not.
Each entry of it says what became of one hold, and the hold's own record says what the ledger knows of that: `MOVES` is
all there is to decide. So an entry may come twice, in any order, and after a run that was interrupted.

**What is spent is spent.** A charge is never refused: what is not available is overdraft, as with a cost that was more
than its estimate. It goes to the windows that the hold stood on then, however late it is told.

**Charged once.** A name is used once for one cost, before a restore and after it: an agent that had no answer asks
again. So when something else was charged under the name in the restored cluster, only what is missing is added, and the
hold is `late`: the dearer of the two is what it cost. Who uses a name again for other work after a restore, and before
the replay, pays the dearer one only; names that nobody makes twice, as the SDK's are, have no such case.

**What was held.** A hold that the journal knows as voided or expired, and that is open in the restored ledger, is freed:
its owner believes so, and will not say it again. One that was placed later than it ended is another life of the name,
and is left alone. A hold that was placed after the backup is not held again: its owner may be gone, its claim certainly
is (the incarnation ended it), and to hold without asking could go over a limit for nothing. It is *kept*, as expired:
its name is known, so that the owner's commit is charged, late, and not refused as unknown.

**Leases.** A snapshot has the leases in it. An open hold keeps the one of its session: an agent that survived goes on
renewing that very lease, one that did not lets it expire, after a whole TTL counted from the restore, and the hold is
then freed as ever. What is written here has ended, so it hangs on no session. Receipts of the lost time are gone: a
request that is sent again meets the hold's record, which answers as it did, or is `again` for the replay that follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from msgspec.structs import replace

from ifabric.wire.governor import HoldState, Window, path_of
from ifabric.wire.replay import REPLAYED, Act, Fate, ReplayEntry, ReplayLimit
from ifabric_actors.governor import ledger, records
from ifabric_actors.governor.books import TASK, Place
from ifabric_actors.governor.ledger import Path
from ifabric_actors.governor.records import Account, Hold

#: where a hold stands: tallies from the root down
Places = tuple[Place, ...]

_NOTHING_MORE: Mapping[Fate, Act] = {
    "open": "again",
    "committed": "added",
    "late": "added",
    "voided": "again",
    "expired": "again",
}
#: by what stands at the hold's key (None: nothing) and what the journal says became of it
MOVES: Mapping[HoldState | None, Mapping[Fate, Act]] = {
    None: {"open": "kept", "committed": "charged", "late": "charged", "voided": "kept", "expired": "kept"},
    "open": {"open": "again", "committed": "charged", "late": "charged", "voided": "freed", "expired": "freed"},
    "committed": _NOTHING_MORE,
    "late": _NOTHING_MORE,
    "voided": _NOTHING_MORE,
    "expired": _NOTHING_MORE,
}


class Replayed(NamedTuple):
    """A hold's record after an entry was replayed, its accounts, and what this has charged."""

    done: Act
    hold: Hold
    path: Path
    charged: int = 0
    #: of what this has charged
    overdraft: int = 0


def act_of(entry: ReplayEntry, hold: Hold | None) -> Act:
    """What is to be done with an entry; `again`: nothing."""
    act = MOVES[hold.state if hold is not None else None][entry.fate]
    if hold is None:
        return act
    if act == "added" and hold.charged >= entry.charged_micro_usd:
        return "again"
    if act == "freed" and entry.ended_at is not None and hold.at > ms_of(entry.ended_at):
        return "again"
    return act


def missing(entry: ReplayEntry, hold: Hold | None) -> int:
    """What an entry would charge (micro-USD)."""
    act = act_of(entry, hold)
    if act not in ("charged", "added"):
        return 0
    return entry.charged_micro_usd - (hold.charged if hold is not None else 0)


def replayed(entry: ReplayEntry, hold: Hold | None, on: Places, path: Path) -> Replayed:
    """The hold (None: there is no record) and its accounts after the entry. `path` is the lines of `on`."""
    act = act_of(entry, hold)
    was = hold if hold is not None else _unknown(entry, on)
    if act == "again":
        return Replayed(act, was, path)
    ended_at = ms_of(entry.ended_at or entry.at)
    if act == "kept":
        state: HoldState = "voided" if entry.fate == "voided" else "expired"
        return Replayed(act, replace(was, state=state, ended_at=ended_at, note=REPLAYED), path)
    if act == "freed":
        after = replace(was, state=entry.fate, ended_at=ended_at, note=REPLAYED)
        return Replayed(act, after, ledger.freed(path, was.amount))
    cost = missing(entry, hold)
    held = was.amount if hold is not None and hold.state == "open" else 0
    moved, overdraft = ledger.charged(path, cost, held=held)
    after = replace(
        was,
        state="late" if act == "added" or entry.fate == "late" else "committed",
        charged=entry.charged_micro_usd,
        overdraft=was.overdraft + overdraft,
        usage=entry.usage,
        ended_at=ended_at,
        note=REPLAYED,
    )
    return Replayed(act, after, moved, cost, overdraft)


def _unknown(entry: ReplayEntry, on: Places) -> Hold:
    """The record of a hold that the backup did not know."""
    return Hold(
        state="open",
        session=entry.session,
        account=entry.account,
        amount=entry.amount_micro_usd,
        on=on,
        at=ms_of(entry.at),
        task=entry.task or "",
        fence=entry.fence,
        body=records.REPLAYED_BODY,
    )


def places_of(entry: ReplayEntry, kinds: Mapping[str, Window]) -> Places:
    """Where a hold stood: as the journal says, else in the windows of when it was placed (`kinds`: of the accounts now)."""
    names = path_of(entry.account)
    if entry.windows is None:
        return tuple((name, ledger.window_of(kinds[name], ms_of(entry.at))) for name in names)
    if len(entry.windows) > len(names) and entry.task is not None:
        names = (*names, TASK + entry.task)
    return tuple(zip(names, entry.windows, strict=False))


def fits(entry: ReplayEntry) -> bool:
    """Whether an entry names a window for each account of its path, and at most one more, for its task."""
    if entry.windows is None:
        return True
    more = len(entry.windows) - len(path_of(entry.account))
    return more == 0 or (more == 1 and entry.task is not None)


def is_newer(limit: ReplayLimit, account: Account) -> bool:
    """Whether a limit is younger than the account's own. One that was made on first use is no operator's word."""
    return not account.by or account.at < ms_of(limit.at)


def ms_of(moment: datetime) -> int:
    """Milliseconds since the epoch."""
    return round(moment.timestamp() * 1000)
