"""Judges the money: every revision that etcd went through, and what callers were told, against what the ledger promises.

Nothing here asks the ledger how it decides; it is told what was written and does its own sums.

**At every revision.** What a tally says is held is the sum of the open holds that stand on it, and what it says is
spent is the sum of what was charged to it, to the micro-USD. No account goes further over its limit but by a cost that
was more than what was held for it, and by no more than the tally and the hold admit as overdraft (or by an operator who
lowered the limit). A hold begins once, ends once, and never changes what it is. A claim's own hold begins in the
revision of the claim, and is not open any more in the revision that ends it.

**At the end.** What was acknowledged is there as it was acknowledged; what was refused for good is not; all that is
spent was charged by a request that somebody sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ifabric.store.base import KV
from ifabric.wire.governor import path_of
from ifabric_actors.coordinator import records as board
from ifabric_actors.coordinator.records import Task
from ifabric_actors.governor import records
from ifabric_actors.governor.records import Account, Hold, Tally

TASK = "task:"
#: state before -> states after. None: there was none.
LIVES: Mapping[str | None, frozenset[str]] = {
    None: frozenset({"open", "committed"}),
    "open": frozenset({"committed", "voided", "expired"}),
    "expired": frozenset({"late"}),
}
CHARGED = ("committed", "late")
#: (account, window), as a hold names where it stands
Place = tuple[str, str]


class Change(NamedTuple):
    """One key, written (with its value) or deleted (None)."""

    key: bytes
    value: bytes | None


class Said(NamedTuple):
    """What a caller asked of one hold or spend entry, and what it was told in the end: "ok", an error's code, or
    "unknown".
    """

    verb: str
    session: str
    hold: str
    amount: int
    outcome: str
    #: of a `commit`, a `spend` or a `complete`: what the reply said was charged
    charged: int | None = None


class Auditor:
    """Takes revisions in their order; `found` are the violations, as sentences."""

    def __init__(self, *, default_session_micro_usd: int) -> None:
        self._default = default_session_micro_usd
        self.found: list[str] = []
        self.accounts: dict[str, Account] = {}
        self.tallies: dict[Place, Tally] = {}
        self.holds: dict[str, Hold] = {}
        self.tasks: dict[str, Task] = {}
        #: what the holds make of it
        self._held: defaultdict[Place, int] = defaultdict(int)
        self._spent: defaultdict[Place, int] = defaultdict(int)
        self.revision = 0
        self.revisions = 0
        #: the most that was spent and held, of each limited place's limit
        self.fullest: dict[str, float] = {}
        self._endings: defaultdict[str, int] = defaultdict(int)
        #: the holds that a task was ever claimed with
        self._claims: defaultdict[str, list[str]] = defaultdict(list)

    # -- revision by revision -----------------------------------------------------------------------------------------

    def take(self, revision: int, changes: Iterable[Change]) -> None:
        """All that changed in one revision."""
        if revision <= self.revision:
            self._say(f"revision {revision} came after {self.revision}")
        self.revision = revision
        self.revisions += 1
        before = dict[Place, Tally | None]()
        limits: dict[str, Account | None] = {}
        charges: list[tuple[Hold | None, Hold]] = []
        moved: set[Place] = set()
        claims: set[str] = set()
        for key, value in sorted(changes):
            kv = KV(key, value or b"", 0, revision, 1, 0)
            name = key.decode()
            if key.startswith(records.ACCOUNTS):
                account = name[len(records.ACCOUNTS) :]
                limits[account] = self.accounts.get(account)
                self._account(account, records.account(kv) if value is not None else None)
            elif key.startswith(records.TALLIES):
                window, _, account = name[len(records.TALLIES) :].partition("/")
                place = (account, window)
                before[place] = self.tallies.get(place)
                moved.add(place)
                self._tally(place, records.tally(kv) if value is not None else None)
            elif key.startswith(records.HOLDS):
                charges += self._hold(
                    name[len(records.HOLDS) :], records.hold(kv) if value is not None else None, moved
                )
            elif key.startswith(board.TASKS):
                task = name[len(board.TASKS) :]
                claims.add(task)
                self._task(task, board.stored(kv).task if value is not None else None)
        moved |= {place for place in self.tallies if place[0] in limits}
        for place in sorted(moved):
            self._sums(place)
            self._limit(place, before.get(place, self.tallies.get(place)), charges)
        for task in claims | {hold.task for _, hold in charges if hold.body == "claim"}:
            self._claim(task)

    def _account(self, name: str, account: Account | None) -> None:
        if account is None:
            self._say(f"account {name} was deleted")
            self.accounts.pop(name, None)
            return
        self.accounts[name] = account

    def _tally(self, place: Place, tally: Tally | None) -> None:
        known = self.tallies.get(place)
        if tally is None:
            self._say(f"tally {place} was deleted")
            self.tallies.pop(place, None)
            return
        if min(tally.spent, tally.held, tally.overdraft) < 0:
            self._say(f"tally {place} is below zero: {tally}")
        if known is not None and (tally.spent < known.spent or tally.overdraft < known.overdraft):
            self._say(f"tally {place} forgot what was spent: {known} -> {tally}")
        self.tallies[place] = tally

    def _hold(self, name: str, hold: Hold | None, moved: set[Place]) -> Iterable[tuple[Hold | None, Hold]]:
        known = self.holds.get(name)
        if hold is None:
            if known is not None and known.state == "open":
                self._say(f"hold {name} was deleted while it was open")
            return
        if hold.state not in LIVES.get(known.state if known is not None else None, ()):
            self._say(f"hold {name} went from {known.state if known is not None else None} to {hold.state}")
        if known is not None and _identity(known) != _identity(hold):
            self._say(f"hold {name} became another one: {known} -> {hold}")
        if known is None and not _stands_on_its_path(hold):
            self._say(f"hold {name} of account {hold.account} stands on {hold.on}")
        if hold.state in CHARGED:
            self._endings[name] += 1
        elif hold.charged:
            self._say(f"hold {name} is {hold.state} and charged {hold.charged}")
        was_held = known.amount if known is not None and known.state == "open" else 0
        was_charged = known.charged if known is not None else 0
        for place in hold.on:
            self._held[place] += (hold.amount if hold.state == "open" else 0) - was_held
            self._spent[place] += hold.charged - was_charged
            moved.add(place)
        uncovered = max(0, hold.charged - (was_held or (hold.amount if known is None else 0)))
        if hold.overdraft > uncovered:
            self._say(f"hold {name} has an overdraft of {hold.overdraft}, of {uncovered} that was not held for it")
        if known is None and hold.body == "claim":
            self._claims[hold.task].append(name)
        self.holds[name] = hold
        yield known, hold

    def _task(self, name: str, task: Task | None) -> None:
        if task is None:
            self.tasks.pop(name, None)
        else:
            self.tasks[name] = task

    def _sums(self, place: Place) -> None:
        tally = self.tallies.get(place, Tally())
        if (tally.held, tally.spent) != (self._held[place], self._spent[place]):
            self._say(
                f"tally {place} says {tally.held} held and {tally.spent} spent; its holds make {self._held[place]} "
                f"and {self._spent[place]}"
            )

    def _limit(self, place: Place, before: Tally | None, charges: list[tuple[Hold | None, Hold]]) -> None:
        limit = self._limit_of(place)
        if limit is None:
            return
        was, now = before or Tally(), self.tallies.get(place, Tally())
        self.fullest[place[0]] = max(self.fullest.get(place[0], 0.0), (now.spent + now.held) / max(1, limit))
        grown = max(0, now.spent + now.held - limit) - max(0, was.spent + was.held - limit)
        admitted = now.overdraft - was.overdraft
        if grown > admitted:
            self._say(
                f"OVERSPENT: {place} is {grown} further over its limit of {limit} ({was} -> {now}), "
                f"and admits an overdraft of {admitted}"
            )
        explained = sum(hold.overdraft for _, hold in charges if place in hold.on)
        if admitted > explained:
            self._say(f"tally {place} has an overdraft of {admitted} more; the holds charged to it explain {explained}")

    def _limit_of(self, place: Place) -> int | None:
        name, window = place
        if name.startswith(TASK):
            task = self.tasks.get(name[len(TASK) :])
            return task.spec.budget_micro_usd if task is not None else None
        account = self.accounts.get(name)
        if account is None:
            account = Account(limit=self._default if name.rpartition("/")[2].startswith("@") else None)
        kind = "total" if window == "total" else "month" if len(window) == len("2026-11") else "day"
        return account.limit if kind == account.window else None

    def _claim(self, name: str) -> None:
        """A claim with a hold and its hold: both or neither."""
        task = self.tasks.get(name)
        claimed = task is not None and task.state == "claimed" and task.hold is not None
        if task is not None and task.hold is not None and claimed:
            key = f"{task.session}/{task.hold.name}"
            hold = self.holds.get(key)
            if hold is None:
                self._say(f"task {name} is claimed with hold {key}, which there is not")
            elif (hold.task, hold.fence, hold.amount) != (name, task.fence, task.hold.amount):
                self._say(f"task {name} is claimed under {task.fence} with {task.hold}; its hold is {hold}")
        for key, hold in self._open_of(name):
            if task is None or not claimed or (task.session, task.fence) != (hold.session, hold.fence):
                self._say(f"hold {key} is open for a claim of {name} that is over")

    def _open_of(self, task: str) -> list[tuple[str, Hold]]:
        """Claims' own holds for this task that are open."""
        keys = self._claims.get(task, ())
        return [(key, self.holds[key]) for key in keys if self.holds[key].state == "open"]

    # -- at the end ---------------------------------------------------------------------------------------------------

    def at_rest(self) -> None:
        """Nobody works any more, and every session's time is over: nothing is held."""
        leaked = sorted(name for name, hold in self.holds.items() if hold.state == "open")
        if leaked:
            self._say(f"{len(leaked)} holds leaked: {leaked[:5]}")
        for place, tally in sorted(self.tallies.items()):
            if tally.held:
                self._say(f"{tally.held} are still held on {place}")

    def compare(self, told: Iterable[Said]) -> None:
        """What callers were told, against what there is. Every hold that there is was asked for by one of them."""
        begun: dict[str, Said] = {}
        asked: set[str] = set()
        in_doubt: set[str] = set()
        for said in told:
            if said.verb == "claim" and not said.hold:  # the reply with the hold's name never came
                in_doubt.add(said.session)
                continue
            name = f"{said.session}/{said.hold}"
            asked.add(name)
            hold = self.holds.get(name)
            if said.verb in ("reserve", "spend", "claim"):
                if name in begun and begun[name] != said:
                    self._say(f"the proof is wrong: {name} was begun twice")
                begun[name] = said
                self._begun(name, said, hold)
            else:
                self._ended(name, said, hold)
        for name in sorted(self.holds.keys() - asked):
            if self.holds[name].body == "claim" and self.holds[name].session in in_doubt:
                continue
            self._say(f"nobody asked for hold {name}: {self.holds[name]}")
        for name, times in sorted(self._endings.items()):
            if times > 1:
                self._say(f"hold {name} was charged {times} times")

    def _begun(self, name: str, said: Said, hold: Hold | None) -> None:
        if said.outcome == "ok":
            if hold is None:
                self._say(f"acknowledged and lost: {said}")
            elif hold.amount != said.amount:
                self._say(f"acknowledged with {said.amount}, kept with {hold.amount}: {name}")
            elif said.verb == "spend" and (hold.state, hold.charged) != ("committed", said.amount):
                self._say(f"acknowledged {said} and kept {hold}")
        elif said.outcome != "unknown" and hold is not None:
            self._say(f"refused with {said.outcome}, and yet there is {name}: {hold}")

    def _ended(self, name: str, said: Said, hold: Hold | None) -> None:
        if said.outcome != "ok":
            return
        if hold is None:
            self._say(f"acknowledged and lost: {said}")
        elif said.verb in ("commit", "complete"):
            if hold.state not in CHARGED or hold.charged != said.amount:
                self._say(f"acknowledged {said} and kept {hold}")
        elif hold.state not in ("voided", "expired"):
            self._say(f"acknowledged {said} and kept {hold}")
        if hold is not None and said.charged is not None and said.charged != hold.charged:
            self._say(f"told that {said.charged} were charged, kept {hold.charged}: {name}")

    def charged_in_all(self, root: str) -> int:
        """What is spent on an account, over all its windows."""
        return sum(tally.spent for (name, _), tally in self.tallies.items() if name == root)

    def _say(self, sentence: str) -> None:
        self.found.append(f"@{self.revision}: {sentence}")


def _identity(hold: Hold) -> tuple[Any, ...]:
    return hold.session, hold.account, hold.amount, hold.on, hold.at, hold.lease, hold.task, hold.fence, hold.body


def _stands_on_its_path(hold: Hold) -> bool:
    names = tuple(name for name, _ in hold.on)
    task = (TASK + hold.task,) if hold.task else ()
    return names in (path_of(hold.account), path_of(hold.account) + task)
