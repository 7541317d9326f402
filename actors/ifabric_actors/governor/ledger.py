"""What the governor believes about money. Pure: no clock, no store, no waiting.

**Two phases, after TigerBeetle's pending, post and void.** Money is *held* before it is spent: an agent knows what a
call may cost before it knows what it did cost. `reserve` sets the estimate aside on every account of the path, from
the root down, or on none; `commit` charges what it was and frees the rest; `void` frees all of it. A `spend` is both
in one step. A hold ends exactly once (`TRANSITIONS`), and what is asked again is answered as before.

**The cap.** For an account with a limit, ``spent + held + available = limit``. A hold or a spend goes through only if
every account of the path has it available; so no number of spenders, and no order among them, gets past a limit. Two
things alone can take `available` below zero, and both are told: a *cost* that was more than its estimate, or that came
after its hold had ended (it was spent; to refuse it would be to forget it, so it is charged and its excess recorded as
`overdraft`), and an operator who lowers the limit. Until it is above zero again, nothing more goes through.

**A hold dies with its owner**: with the claim that it is for, else with its session, and at the latest at its own end.
Ending frees the money and not the truth: a commit that comes later is charged, and marked `late`.

**Windows.** A limit is for ever, for a day or for a month (UTC). The window is part of the tally's name, so that
midnight is no job that could fail: the next hold simply stands on a tally that does not exist yet. A hold is settled
where it was placed: what was held in November is charged to November, whenever the bill comes.

**The hot account.** Ten thousand sessions under one organisation all stand on its tally, and etcd has no increment: each
posting compares that the tally is what it was decided on. One at a time that would be a storm of lost races. So a
daemon decides many postings after another in memory and commits them in *one* transaction that compares and writes
each tally once (`teller`): the account's cost is one write a batch, however many postings are in it. Between daemons
the compare decides: one batch wins, the others are handed the new tallies by the very transaction that refused them,
decide again and try again; some daemon always gets through, and what waits meanwhile makes the next batch longer. A
single owner for each root account would save those lost rounds, and would cost a hop for every posting, an election
for every root, and a pause when an owner dies; slices of the limit granted to each daemon would save them too, and
would refuse an agent money that lies unused on another daemon. Neither is worth it while a lost round is a millisecond.

Amounts are whole micro-USD; there is no float in this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from msgspec.structs import replace

from ifabric.errors import BudgetShort, Conflict
from ifabric.wire import governor as wire
from ifabric.wire.envelope import Usage
from ifabric.wire.governor import HoldState, Window
from ifabric_actors.governor.records import Hold, Tally

Event = Literal["commit", "void", "expire"]

#: The whole life of a hold. What is not here is refused.
TRANSITIONS: Mapping[HoldState, Mapping[Event, HoldState]] = {
    "open": {"commit": "committed", "void": "voided", "expire": "expired"},
    "expired": {"commit": "late"},
    "committed": {},
    "voided": {},
    "late": {},
}


class BehindError(Exception):
    """More would be freed than is held: the hold, or the tally that it stands on, is no longer what it was taken for."""


class Line(NamedTuple):
    """One account in one window: its limit (None: none) and its tally."""

    account: str
    #: the window's name in the tally's key
    window: str
    limit: int | None
    tally: Tally
    kind: Window = "total"

    @property
    def available(self) -> int | None:
        """What a hold may still take; below zero after an overdraft. None: no limit."""
        return None if self.limit is None else self.limit - self.tally.spent - self.tally.held

    @property
    def over(self) -> int:
        """By how much the limit is exceeded."""
        available = self.available
        return 0 if available is None else max(0, -available)

    def told(self) -> wire.Line:
        """As it goes over the wire."""
        tally = self.tally
        return wire.Line(
            account=self.account,
            limit=self.limit,
            spent=tally.spent,
            held=tally.held,
            available=self.available,
            window=self.kind,
            overdraft=tally.overdraft,
        )


Path = tuple[Line, ...]


def window_of(kind: Window, now_ms: int) -> str:
    """The window that a moment (ms since the epoch) is in, as it stands in a tally's key."""
    if kind == "total":
        return "total"
    day = datetime.fromtimestamp(now_ms / 1000, UTC).date().isoformat()
    return day if kind == "day" else day[:7]


# -- amounts on a path ------------------------------------------------------------------------------------------------


def placed(path: Path, amount: int) -> Path:
    """The path with so much more held. `BudgetShort`, naming the account with the least, when it is not there."""
    _refuse_short(path, amount)
    after = _moved(path, held=amount)
    assert all(line.over <= before.over for line, before in zip(after, path, strict=True)), (
        "a hold is within its limits"
    )
    return after


def spent(path: Path, amount: int) -> Path:
    """The path with so much charged at once. `BudgetShort` when it is not there."""
    _refuse_short(path, amount)
    return _moved(path, spent=amount)


def freed(path: Path, amount: int) -> Path:
    """The path with so much less held."""
    return _moved(path, held=-amount)


def charged(path: Path, cost: int, *, held: int) -> tuple[Path, int]:
    """The path with `cost` charged in place of what was `held`, and how much of it was not available.

    It is never refused: the money has been spent.
    """
    moved = _moved(path, spent=cost, held=-held)
    overdraft = 0
    after = []
    for line, before in zip(moved, path, strict=True):
        over = max(0, line.over - before.over)
        overdraft = max(overdraft, over)
        after.append(line._replace(tally=replace(line.tally, overdraft=line.tally.overdraft + over)))
    return tuple(after), overdraft


def _refuse_short(path: Path, amount: int) -> None:
    assert amount >= 0, "an amount is not negative"
    short = [line for line in path if line.available is not None and line.available < amount]
    if short:
        least = min(short, key=_room)
        raise BudgetShort(
            f"account {least.account} has {_usd(max(0, _room(least)))} USD available of {_usd(least.limit or 0)}, "
            f"{_usd(amount)} are needed; {_usd(least.tally.spent)} are spent and {_usd(least.tally.held)} held. "
            "Nothing was held or charged.",
            account=least.account,
            have=_room(least),
            need=amount,
            held=least.tally.held,
            spent=least.tally.spent,
            limit=least.limit,
        )


def _room(line: Line) -> int:
    available = line.available
    assert available is not None, "only a limited account is short"
    return available


def _moved(path: Path, *, spent: int = 0, held: int = 0) -> Path:
    after = tuple(
        line._replace(tally=replace(line.tally, spent=line.tally.spent + spent, held=line.tally.held + held))
        for line in path
    )
    for line in after:
        assert line.tally.spent >= 0, f"{line.account} would have spent less than nothing"
        if line.tally.held < 0:
            raise BehindError(line.account)
    return after


# -- the life of a hold -----------------------------------------------------------------------------------------------


class Settled(NamedTuple):
    """A hold after it ended, and what became of its accounts. `path` is the same when nothing moved."""

    hold: Hold
    path: Path
    #: it had been done before: nothing is to be written
    again: bool = False


def reserved(hold: Hold, path: Path) -> Settled:
    """A new hold in its place."""
    assert hold.state == "open", "a new hold is open"
    return Settled(hold, placed(path, hold.amount))


def entered(hold: Hold, path: Path, *, usage: Usage | None, now: int) -> Settled:
    """A spend entry: held and charged in one step, or `BudgetShort`."""
    after = replace(hold, state="committed", charged=hold.amount, usage=usage, ended_at=now)
    return Settled(after, spent(path, hold.amount))


def costed(hold: Hold, path: Path, cost: int, *, usage: Usage | None, now: int) -> Settled:
    """A cost without a hold, told when the work is done: charged whatever the limits say."""
    after, overdraft = charged(path, cost, held=0)
    return Settled(
        replace(hold, state="committed", amount=0, charged=cost, overdraft=overdraft, usage=usage, ended_at=now), after
    )


def committed(hold: Hold, path: Path, cost: int, *, usage: Usage | None, now: int, request: str = "") -> Settled:
    """The hold, charged; `late` when it had ended with its owner. `Conflict` when it ended in another way."""
    if hold.state in ("committed", "late") and (hold.charged, hold.usage) == (cost, usage):
        return Settled(hold, path, again=True)
    state = _next(hold, "commit")
    after, overdraft = charged(path, cost, held=hold.amount if hold.state == "open" else 0)
    return Settled(
        replace(hold, state=state, charged=cost, overdraft=overdraft, usage=usage, ended_at=now, request=request), after
    )


def voided(hold: Hold, path: Path, *, now: int, request: str = "") -> Settled:
    """The hold, freed on request. One that expired has been freed already."""
    if hold.state in ("voided", "expired"):
        return Settled(hold, path, again=True)
    return Settled(replace(hold, state=_next(hold, "void"), ended_at=now, request=request), freed(path, hold.amount))


def expired(hold: Hold, path: Path, *, why: str, now: int) -> Settled:
    """The hold, freed because its owner or its time has ended."""
    return Settled(replace(hold, state=_next(hold, "expire"), note=why, ended_at=now), freed(path, hold.amount))


def _next(hold: Hold, event: Event) -> HoldState:
    state = TRANSITIONS[hold.state].get(event)
    if state is None:
        how = f"was committed at {_usd(hold.charged)} USD" if hold.state in ("committed", "late") else "was voided"
        raise Conflict(
            f"the hold {how}; it cannot be ended again in another way. Nothing was charged or freed.",
            state=hold.state,
            charged=hold.charged,
        )
    return state


def _usd(micro_usd: int) -> str:
    whole, rest = divmod(micro_usd, 1_000_000)
    return f"{whole}.{f'{rest:06}'.rstrip('0').ljust(2, '0')}"


def told(path: Sequence[Line]) -> tuple[wire.Line, ...]:
    """A path as it goes over the wire."""
    return tuple(line.told() for line in path)
