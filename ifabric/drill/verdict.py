"""Judges a drill by what was measured: which promises held, and what was lost that nobody promised to keep. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: seconds from the loss to the first claim, and how old a backup may be
RTO_GOAL_S, RPO_GOAL_S = 60.0, 300.0
NAMED_MAX = 5


class Grant(NamedTuple):
    """A claim that an agent was told it has, in the order in which they were told."""

    task: str
    fence: int


class Fate(NamedTuple):
    """What became of things that were acknowledged (tasks submitted, tasks completed)."""

    #: acknowledged before the backup began, and which of them are missing now
    before: int
    missing: tuple[str, ...]
    #: acknowledged between that and the loss; which of them are lost, and which of the lost the journal does not name
    since: int
    lost: tuple[str, ...]
    unnamed: tuple[str, ...]


class Account(NamedTuple):
    """An account's money (micro-USD): acknowledged to agents, asked for without an answer, and in the ledger now."""

    name: str
    acknowledged: int
    unknown: int
    spent: int

    @property
    def lost(self) -> int:
        """Acknowledged, and not in the ledger."""
        return max(0, self.acknowledged - self.spent)

    @property
    def twice(self) -> int:
        """In the ledger, and asked for by nobody."""
        return max(0, self.spent - self.acknowledged - self.unknown)


class Stale(NamedTuple):
    """A request under a fence of before the loss, and the code that it was answered with; "": it was accepted."""

    what: str
    code: str


class Limit(NamedTuple):
    """An account's limit (micro-USD) as it was set, and now."""

    account: str
    set: int
    now: int | None


class Charges(NamedTuple):
    """Acknowledged charges: how many, and how much (micro-USD)."""

    #: until the loss
    number: int
    micro_usd: int
    #: of those, since the backup began
    since: int
    since_micro_usd: int
    #: of those, which no event told of when the last daemon had ended
    untold: int
    untold_micro_usd: int
    #: of all, before and after the loss, those that the ledger does not know in the end
    lost: int
    lost_micro_usd: int


class Reconciled(NamedTuple):
    """What `ifabric reconcile` said. `complete`: the journal tells of the whole time since the backup."""

    complete: bool
    entries: int
    charged_micro_usd: int
    gaps: tuple[str, ...] = ()


class Facts(NamedTuple):
    """All that was measured. Durations in seconds, money in micro-USD."""

    #: NATS was lost too
    everything: bool
    #: from the loss to the first claim that an agent was granted; None: none was
    rto_s: float | None
    #: the parts of it, in their order, and what followed
    phases: tuple[tuple[str, float], ...]
    backup_age_s: float
    backup_s: float
    submitted: Fate
    completed: Fate
    charges: Charges
    #: the root first
    accounts: tuple[Account, ...]
    limits: tuple[Limit, ...]
    #: before the loss, and after it
    incarnations: tuple[int, int]
    grants: tuple[Grant, ...]
    stale: tuple[Stale, ...]
    #: None: it was not run
    reconciled: Reconciled | None


class Promise(NamedTuple):
    """One line of the verdict. `held` None: a figure, and no promise."""

    what: str
    measured: str
    goal: str
    held: bool | None


class Verdict(NamedTuple):
    """What is to be thought of it."""

    promises: tuple[Promise, ...]

    @property
    def held(self) -> bool:
        """Whether every promise was kept."""
        return all(promise.held is not False for promise in self.promises)


def judge(facts: Facts) -> Verdict:
    """Holds what was measured against what is promised.

    With NATS lost too there is no journal of the time since the backup: what was spent then is lost, and is told
    instead of promised; so is what was lost of tasks.
    """
    return Verdict((*_time(facts), *_fences(facts), *_tasks(facts), *_money(facts)))


def lost_micro_usd(facts: Facts) -> int:
    """Acknowledged spend that the ledger does not know.

    Counted twice, and the worse is believed: charge by charge, and by account. There the worst one counts, since a charge
    stands on every account of its path.
    """
    return max([facts.charges.lost_micro_usd, *(account.lost for account in facts.accounts)])


def regranted(grants: Sequence[Grant]) -> tuple[str, ...]:
    """Tasks whose fence was given out twice, or fell: each grant's must be above all that the task had before."""
    newest: dict[str, int] = {}
    found: dict[str, None] = {}
    for grant in grants:
        if grant.fence <= newest.get(grant.task, 0):
            found[grant.task] = None
        newest[grant.task] = max(grant.fence, newest.get(grant.task, 0))
    return tuple(found)


def _time(facts: Facts) -> Iterable[Promise]:
    rto = "no claim was granted" if facts.rto_s is None else f"{facts.rto_s:.1f} s"
    yield Promise(
        "RTO: from the loss to the first claim",
        rto,
        f"< {RTO_GOAL_S:.0f} s",
        facts.rto_s is not None and facts.rto_s < RTO_GOAL_S,
    )
    yield Promise(
        "RPO: the backup's age at the loss",
        f"{facts.backup_age_s:.1f} s",
        f"< {RPO_GOAL_S:.0f} s",
        facts.backup_age_s < RPO_GOAL_S,
    )


def _fences(facts: Facts) -> Iterable[Promise]:
    before, after = facts.incarnations
    yield Promise("the incarnation is a new one", f"{before}, then {after}", "it grows", after > before)
    again = regranted(facts.grants)
    yield Promise(
        f"fences that were given out twice, or fell, of {len(facts.grants)}", _named(again), "none", held=not again
    )
    accepted = tuple(f"{one.what}: {one.code or 'accepted'}" for one in facts.stale if one.code != "claim_lost")
    yield Promise(
        f"old holders that were not refused, of {len(facts.stale)}",
        _named(accepted),
        "none",
        bool(facts.stale) and not accepted,
    )


def _tasks(facts: Facts) -> Iterable[Promise]:
    for what, fate in (("submitted", facts.submitted), ("completed", facts.completed)):
        yield Promise(
            f"tasks {what} before the backup and missing, of {fate.before}",
            _named(fate.missing),
            "none",
            held=not fate.missing,
        )
    yield Promise(
        "tasks submitted since the backup that are gone",
        f"{len(facts.submitted.lost)} of {facts.submitted.since}",
        "told",
        held=None,
    )
    yield Promise(
        "tasks completed since the backup that are pending again",
        f"{len(facts.completed.lost)} of {facts.completed.since}",
        "told",
        held=None,
    )
    unnamed = (*facts.submitted.unnamed, *facts.completed.unnamed)
    yield Promise("of those, not named by the journal", _named(unnamed), "told", held=None)


def _money(facts: Facts) -> Iterable[Promise]:
    lost, since = lost_micro_usd(facts), facts.charges.since_micro_usd
    told = f"{lost} micro-USD of {since} since the backup"
    if facts.everything:
        yield Promise("spend lost: there is no journal of it", told, f"<= {since}", lost <= since)
    else:
        yield Promise("spend lost", told, "0", held=lost == 0)
    twice = max((account.twice for account in facts.accounts), default=0)
    yield Promise("spend charged twice", f"{twice} micro-USD", "0", held=twice == 0)
    other = tuple(f"{one.account}: {one.set}, now {one.now}" for one in facts.limits if one.set != one.now)
    yield Promise(
        f"limits that are not what they were, of {len(facts.limits)}",
        _named(other),
        "none",
        bool(facts.limits) and not other,
    )
    if not facts.everything:
        known = facts.reconciled
        said = "it was not run" if known is None else "yes" if known.complete else _named(known.gaps)
        yield Promise("the journal tells of the whole time", said, "yes", held=known is not None and known.complete)


def _named(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return f"{len(names)}: {', '.join(names[:NAMED_MAX])}{more}"
