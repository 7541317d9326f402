"""The governor's messages after a restore: what the backup did not know of money is charged again.

An entry is what became of one hold in the time that was lost, as the journal tells it. A cluster that was restored says
of which backup it was made (`fabric/restored`) and whether it was reconciled since (`fabric/reconciled`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from ifabric.wire.envelope import Fence, MicroUsd, Reply, Request, SessionId, TaskId, Usage
from ifabric.wire.governor import DEPTH_MAX, Account, HoldId, Window

#: entries of a request, and limits
ENTRIES_MAX = 100
#: told by a daemon of what it had acknowledged, when etcd was gone: a `BudgetEvent` for `ifabric reconcile` alone
ACKNOWLEDGED = ("ledger", "acknowledged")
#: what a hold's record says that a replay has written
REPLAYED = "replayed after a restore"

Moment = Annotated[datetime, Meta(tz=True, description="RFC 3339")]
Revision = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: in a tally's name: `total`, a month or a day
WindowName = Annotated[str, Meta(pattern=r"^(total|[0-9]{4}-[0-9]{2}(-[0-9]{2})?)$(?!\n)", examples=["2026-11"])]
#: what became of a hold; `open`: nothing that the journal knows of
Fate = Literal["open", "committed", "late", "voided", "expired"]
#: what was done with an entry: charged as it stands; `added`: only what was missing; `freed`; `kept`: remembered as ended,
#: so that a commit that comes later is charged and not refused as unknown; `again`: it had been done before
Act = Literal["charged", "added", "freed", "kept", "again"]


class ReplayEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a hold or a spend entry after the backup."""

    session: SessionId
    hold: HoldId
    account: Account
    fate: Fate
    #: when it was placed: it decides the windows when those are not given
    at: Moment
    ended_at: Moment | None = None
    #: what was held, and what was charged
    amount_micro_usd: MicroUsd = 0
    charged_micro_usd: MicroUsd = 0
    #: of the path's accounts from the root down; one more is that of the task's own budget
    windows: Annotated[tuple[WindowName, ...], Meta(min_length=1, max_length=DEPTH_MAX + 1)] | None = None
    task: TaskId | None = None
    fence: Fence = 0
    usage: Usage | None = None


class ReplayLimit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A limit that an operator set after the backup."""

    account: Account
    limit_micro_usd: MicroUsd | None
    window: Window = "total"
    by: SessionId
    at: Moment


class ReplaySummary(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the journal had, when all of it was replayed."""

    entries: Annotated[int, Meta(ge=0)]
    charged_micro_usd: MicroUsd
    #: the journal tells of the whole time that was lost
    complete: bool


class Replay(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Charges what was committed before a restore and is younger than the backup. Nothing is refused for a limit that is
    short: it was spent. It needs no request id: a hold's own record tells what was done, and a repetition is `again`.
    """

    component: ClassVar = "governor"
    verb: ClassVar = "replay"
    admin: ClassVar = True
    #: the backup's revision: all of `entries` is younger
    since_revision: Revision
    entries: Annotated[tuple[ReplayEntry, ...], Meta(max_length=ENTRIES_MAX)] = ()
    #: set before the entries are charged, where the account's own is older
    limits: Annotated[tuple[ReplayLimit, ...], Meta(max_length=ENTRIES_MAX)] = ()
    #: only say what would be done
    dry_run: bool = False
    #: there is no more: the cluster is reconciled
    finished: ReplaySummary | None = None


class ReplayedEntry(Reply, frozen=True, kw_only=True, omit_defaults=True):
    session: str
    hold: str
    done: Act
    #: by this request
    charged: int = 0
    #: how much of it was not available
    overdraft: int = 0
    again: bool = False


class ReplayedLimit(Reply, frozen=True, kw_only=True, omit_defaults=True):
    account: str
    #: the account's own is as young: nothing was set
    again: bool = False


class ReplayReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """In the order of the request."""

    entries: tuple[ReplayedEntry, ...]
    limits: tuple[ReplayedLimit, ...]


class Restore(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """Which backup the cluster was made of; `at` and `restored_at` are RFC 3339. As JSON it is `fabric/restored`."""

    revision: int
    at: str
    restored_at: str
    incarnation: int
    backup: str = ""


class Reconciled(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A replay that has begun, and ended if it says when. As JSON it is `fabric/reconciled`."""

    since_revision: int
    incarnation: int
    by: str
    began_at: str
    finished_at: str = ""
    entries: int = 0
    charged_micro_usd: int = 0
    #: the journal told of the whole time that was lost
    complete: bool = False


class Restored(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Which backup the cluster was restored from, if any, and whether its money was reconciled since."""

    component: ClassVar = "governor"
    verb: ClassVar = "restored"
    admin: ClassVar = True


class RestoredReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    restored: Restore | None
    #: etcd's revision at which the restored cluster began; 0 without one
    began_revision: int = 0
    #: of this restore; null: nobody has begun
    reconciled: Reconciled | None = None
    #: until then a replay may be repeated: the records that tell what was charged are kept so long. "": none has begun
    repeatable_until: str = ""


REPLIES: dict[type[Request], type[Reply]] = {Replay: ReplayReply, Restored: RestoredReply}
for _request, _reply in REPLIES.items():
    _request.reply = _reply
