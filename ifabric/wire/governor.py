"""The governor's messages: money, breakers, matching. One class a verb; the class names its reply."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from ifabric.wire.envelope import Capabilities, Fence, MicroUsd, Mutation, Reply, Request, SessionId, TaskId, Usage
from ifabric.wire.subjects import SESSION_ID

#: names in an account's path
DEPTH_MAX = 9
HOLD_TTL_MAX_S = 86_400
HOLDS_SHOWN_MAX = 1000
MATCH_SESSIONS_MAX = 10_000
RANKED_MAX = 1000
RETRY_AFTER_MAX_S = 86_400.0

Window = Literal["total", "day", "month"]
BreakerState = Literal["closed", "open", "half_open"]
Verdict = Literal["success", "failure", "ignored"]
HoldState = Literal["open", "committed", "voided", "expired", "late"]

#: names, from the root down, separated by slashes. The last one may be a session's own account: `@` and its id.
Account = Annotated[
    str,
    Meta(
        pattern=rf"^(@?[A-Za-z0-9_-]{{1,64}})(/@?[A-Za-z0-9_-]{{1,64}}){{0,{DEPTH_MAX - 1}}}$(?!\n)",
        description="names from the root down; @ marks a session's own",
        examples=["acme/research/@agent-7"],
    ),
]
HoldId = Annotated[
    str, Meta(pattern=SESSION_ID, description="the session's own name for it; holds and spend entries share the names")
]
BreakerName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,63}$(?!\n)", examples=["openai/gpt-x"])]


class Line(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """One account of a path, in the window that is now. Amounts are micro-USD."""

    account: str
    #: null: no limit, and then nothing is short here
    limit: int | None
    spent: int
    held: int
    #: limit - spent - held: below zero only after an overdraft or a lowered limit; null without a limit
    available: int | None
    window: Window = "total"
    #: charged although it was not available, in all
    overdraft: int = 0


class Reserve(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Sets an amount aside on every account of the path, or on none."""

    component: ClassVar = "governor"
    verb: ClassVar = "reserve"
    hold: HoldId
    amount_micro_usd: MicroUsd
    #: the session's own account (the default), or one below it
    account: Account | None = None
    ttl_s: Annotated[int, Meta(ge=1, le=HOLD_TTL_MAX_S)] | None = None
    #: the claim that it is for: the hold ends with it
    task: TaskId | None = None
    fence: Fence | None = None


class ReserveReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    hold: str
    expires_in_s: float
    path: tuple[Line, ...]


class Commit(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Charges what it cost, under or over what was held, and frees the rest. After its end a hold is charged late."""

    component: ClassVar = "governor"
    verb: ClassVar = "commit"
    hold: HoldId
    amount_micro_usd: MicroUsd
    usage: Usage | None = None


class CommitReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    charged: int
    #: the hold had ended already: it was charged all the same, for the money is spent
    late: bool
    #: how much of it was not available
    overdraft: int
    path: tuple[Line, ...]


class Void(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Frees all of a hold. Nothing was spent."""

    component: ClassVar = "governor"
    verb: ClassVar = "void"
    hold: HoldId


class VoidReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    released: int


class Spend(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """A hold and its commit in one step: charged if it is available, else refused."""

    component: ClassVar = "governor"
    verb: ClassVar = "spend"
    entry: HoldId
    amount_micro_usd: MicroUsd
    account: Account | None = None
    #: the claim that it is for: refused when that is lost
    task: TaskId | None = None
    fence: Fence | None = None
    usage: Usage | None = None


class Balance(Request, frozen=True, kw_only=True, omit_defaults=True):
    """An account with all above it, and the holds that are open on it."""

    component: ClassVar = "governor"
    verb: ClassVar = "balance"
    #: default: the session's own; with `tree`, every account
    account: Account | None = None
    #: the accounts below it too
    tree: bool = False


class HoldLine(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """An open hold."""

    hold: str
    session: str
    account: str
    amount: int
    at: str
    task: str | None = None
    fence: int = 0
    #: absent when it lives as long as its claim
    expires_in_s: float | None = None


class BalanceReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    path: tuple[Line, ...]
    holds: tuple[HoldLine, ...]
    #: there are more holds than are shown
    more: bool = False
    #: with `tree`: what is below the account, in the order of the names
    below: tuple[Line, ...] = ()


class SetAccount(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Sets an account's limit. One that is lower than what is spent and held lets nothing more through."""

    component: ClassVar = "governor"
    verb: ClassVar = "account"
    admin: ClassVar = True
    account: Account
    #: null: no limit
    limit_micro_usd: MicroUsd | None
    window: Window = "total"


class PathReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    path: tuple[Line, ...]


class Match(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Which sessions could take such a task, best first, and why the others cannot."""

    component: ClassVar = "governor"
    verb: ClassVar = "match"
    needs: Capabilities = ()
    wants: Capabilities = ()
    labels: Capabilities = ()
    #: only these (default: every live session)
    sessions: Annotated[tuple[SessionId, ...], Meta(max_length=MATCH_SESSIONS_MAX)] = ()


class Candidate(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """One session, weighed."""

    session: str
    #: from 0 to 1
    score: float
    missing: tuple[str, ...]
    #: a sentence
    reason: str
    #: it would be offered the task
    matches: bool = False


class MatchReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    ranked: tuple[Candidate, ...]
    min_score: float
    #: sessions looked at; `ranked` holds the best of them
    sessions: int


class Admit(Request, frozen=True, kw_only=True, omit_defaults=True):
    """May a call go to this resource? With the permit comes the duty to `report`."""

    component: ClassVar = "governor"
    verb: ClassVar = "admit"
    breaker: BreakerName


class AdmitReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    permit: str
    state: BreakerState
    #: seconds that a probe has before its permit is given to another; absent when the breaker is closed
    report_in_s: float | None = None


class Report(Request, frozen=True, kw_only=True, omit_defaults=True):
    """How the call went. `ignored`: it says nothing about the resource (the caller's own mistake)."""

    component: ClassVar = "governor"
    verb: ClassVar = "report"
    breaker: BreakerName
    permit: Annotated[str, Meta(max_length=128)]
    outcome: Verdict
    latency_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    #: what the resource asked for (Retry-After)
    retry_after_s: Annotated[float, Meta(ge=0, le=RETRY_AFTER_MAX_S)] | None = None


class BreakerReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    state: BreakerState


class Breakers(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Every breaker that is not closed, or that this daemon has counted for."""

    component: ClassVar = "governor"
    verb: ClassVar = "breakers"


class BreakerLine(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """One breaker."""

    breaker: str
    state: BreakerState
    #: within the window, as counted by the daemon that answers
    failures: int
    calls: int = 0
    opened_ago_s: float | None = None
    #: when the next probe may go; absent when it is closed, or held open by an operator
    probe_in_s: float | None = None
    #: times that it opened without a lasting recovery between
    trips: int = 0
    #: who holds it open or closed it last, when it was an operator
    by: str = ""
    why: str = ""


class BreakersReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    breakers: tuple[BreakerLine, ...]
    #: there are more than are shown; those that are not closed come first
    more: bool = False


class SetBreaker(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Opens a breaker until an operator closes it, or closes it."""

    component: ClassVar = "governor"
    verb: ClassVar = "breaker"
    admin: ClassVar = True
    breaker: BreakerName
    state: Literal["open", "closed"]
    why: Annotated[str, Meta(max_length=200)] = ""


REPLIES: dict[type[Request], type[Reply]] = {
    Reserve: ReserveReply,
    Commit: CommitReply,
    Void: VoidReply,
    Spend: CommitReply,
    Balance: BalanceReply,
    Match: MatchReply,
    Admit: AdmitReply,
    Report: BreakerReply,
    Breakers: BreakersReply,
    SetAccount: PathReply,
    SetBreaker: BreakerReply,
}
for _request, _reply in REPLIES.items():
    _request.reply = _reply

REQUESTS: tuple[type[Request], ...] = tuple(REPLIES)
#: each under ``if.v1.event.budget``; a `spend` is told as a `commit`
BUDGET_EVENTS = ("account", "hold", "commit", "void", "expired", "overdraft")
#: each under ``if.v1.event.breaker``
BREAKER_EVENTS = ("opened", "half_open", "closed")


#: each under ``if.v1.event.match``; not committed anywhere: a finding
MATCH_EVENTS = ("unmatched",)


class MatchEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Pending tasks that no live session can take, as published under ``if.v1.event.match``."""

    event: str
    at: str
    needs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    #: the fewest capabilities that would open them to a session that is there
    missing: tuple[str, ...] = ()
    #: how many tasks, and one of them
    tasks: int = 0
    example: str = ""


class BudgetEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was committed to an account or a hold, as published under ``if.v1.event.budget``."""

    event: str
    at: str
    revision: int
    account: str = ""
    hold: str = ""
    session: str = ""
    task: str | None = None
    fence: int = 0
    #: what was held, and what was charged
    amount: int = 0
    charged: int = 0
    overdraft: int = 0
    late: bool = False
    usage: Usage | None = None
    #: of an account: its limit now
    limit: int | None = None
    window: Window | None = None
    #: of a hold: those of its tallies, from the root down, and that of the task's own budget; empty: `total` on the path alone
    windows: tuple[str, ...] = ()
    note: str = ""


class BreakerEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a breaker, as published under ``if.v1.event.breaker``."""

    event: str
    at: str
    revision: int
    breaker: str = ""
    state: BreakerState | None = None
    trips: int = 0
    probe_in_s: float | None = None
    by: str = ""
    why: str = ""


def account_of(account: str | None, session: str) -> str:
    """The account of a session's own: below the one that it named when it said hello."""
    return f"{account}/@{session}" if account else f"@{session}"


def path_of(account: str) -> tuple[str, ...]:
    """An account and all above it, from the root down."""
    names = account.split("/")
    return tuple("/".join(names[: depth + 1]) for depth in range(len(names)))


def claim_hold(task: str, fence: int) -> str:
    """The name of a claim's own hold: the same for the same claim, and another one for the next."""
    return f"claim-{fence:x}-{hashlib.blake2b(task.encode(), digest_size=8).hexdigest()}"
