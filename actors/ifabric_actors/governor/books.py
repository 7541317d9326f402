"""The accounts as one daemon knows them, and as a transaction in the making would leave them.

What is known may be a moment old: every transaction compares the tallies that it was decided on. An account's limit
has no compare of its own but where a tally is begun; whoever changes a limit rewrites the tally of the window, so that
a decision made on the old one loses its race. That holds for a limit which was still so when the tally was written: a
limit that was read first and a tally that was read later may have a change between them, which no compare would show.
So memory keeps as of which revision each limit is known, and a tally that is newer sends the reader back for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from ifabric.store.base import KV, Compare, Get, Put, unchanged
from ifabric.wire.governor import Window, path_of
from ifabric_actors.governor import records
from ifabric_actors.governor.ledger import Line, Path, window_of
from ifabric_actors.governor.records import Account, Tally

#: what a daemon without a governor remembers, at least a quarter of it; else it is read from etcd when it is asked for
REMEMBERED_MAX = 50_000
#: the account that a task's own budget makes, at the end of the path of what is held for it
TASK = "task:"
#: (account, window)
Place = tuple[str, str]


class _Limit(NamedTuple):
    """An account's record as last seen; None: it has none."""

    account: Account | None
    mod_revision: int


class _Sum(NamedTuple):
    """A tally as last seen."""

    tally: Tally
    mod_revision: int


_UNLIMITED, _EMPTY = Account(), Tally()


K = TypeVar("K")
V = TypeVar("V", _Limit, _Sum)


class Memory:
    """Limits and tallies, as last seen."""

    def __init__(self, default_session_micro_usd: int) -> None:
        self._default = Account(limit=default_session_micro_usd)
        self._limits: dict[str, _Limit] = {}
        self._sums: dict[Place, _Sum] = {}
        #: the revision as of which each limit is known to be so
        self._confirmed: dict[str, int] = {}
        #: a governor's feed brings every account: nothing is forgotten then
        self.mirrors = False
        self._trim_at = REMEMBERED_MAX

    # -- learning ---------------------------------------------------------------------------------------------------

    def learn_limit(self, name: str, account: Account | None, mod_revision: int) -> None:
        """The account is this, or (None) has no record, as of that revision."""
        known = self._limits.get(name)
        if known is None or known.mod_revision < mod_revision:
            self._limits[name] = _Limit(account, mod_revision)

    def learn_sum(self, place: Place, tally: Tally | None, mod_revision: int) -> None:
        """The tally is this, or (None) does not exist."""
        known = self._sums.get(place)
        if known is None or known.mod_revision < mod_revision:
            self._sums[place] = _Sum(tally or _EMPTY, mod_revision)

    def confirm(self, name: str, revision: int) -> None:
        """The account's limit was still what is known of it at that revision."""
        if self._confirmed.get(name, -1) < revision:
            self._confirmed[name] = revision

    def learn(self, key: bytes, kv: KV | None, revision: int) -> Account | Tally | None:
        """What was read at a key of accounts or tallies at that revision; None: nothing was there."""
        if key.startswith(records.ACCOUNTS):
            name = key[len(records.ACCOUNTS) :].decode()
            limit = self._limits.get(name)
            if kv is None:
                if limit is None or limit.mod_revision <= revision:
                    self._limits[name] = _Limit(None, 0)
                    self.confirm(name, revision)
                return None
            account = records.account(kv)
            self.learn_limit(name, account, kv.mod_revision)
            self.confirm(name, revision)
            return account
        place = place_of(key)
        known = self._sums.get(place)
        if kv is None:
            if known is None or known.mod_revision <= revision:
                self._sums[place] = _Sum(_EMPTY, 0)
            return None
        if known is not None and known.mod_revision == kv.mod_revision:
            return known.tally  # most of what the watch tells was committed here
        tally = records.tally(kv)
        self.learn_sum(place, tally, kv.mod_revision)
        return tally

    def heard(self, kv: KV) -> Account | Tally | None:
        """What the watch tells, in the order of the revisions: of the limit, all that was before a tally is known with it."""
        if kv.key.startswith(records.TALLIES):
            self.confirm(place_of(kv.key)[0], kv.mod_revision)
        return self.learn(kv.key, kv, kv.mod_revision)

    def forget(self, key: bytes, revision: int) -> None:
        """The key was deleted at that revision."""
        if key.startswith(records.ACCOUNTS):
            name = key[len(records.ACCOUNTS) :].decode()
            if (limit := self._limits.get(name)) is not None and limit.mod_revision <= revision:
                del self._limits[name]
        elif (known := self._sums.get(place_of(key))) is not None and known.mod_revision <= revision:
            del self._sums[place_of(key)]

    def trim(self) -> None:
        """Forgets what is too much, oldest first; a mirror, only what is not there. Not while somebody decides."""
        if len(self._limits) + len(self._sums) > self._trim_at:
            self._limits = self._trimmed(self._limits)
            self._sums = self._trimmed(self._sums)
            self._confirmed = {name: at for name, at in self._confirmed.items() if name in self._limits}
            self._trim_at = len(self._limits) + len(self._sums) + REMEMBERED_MAX

    def _trimmed(self, remembered: dict[K, V]) -> dict[K, V]:
        droppable = [k for k, known in remembered.items() if not (self.mirrors and known.mod_revision)]
        dropped = set(droppable[: max(0, len(droppable) - REMEMBERED_MAX // 4)])
        return {key: known for key, known in remembered.items() if key not in dropped}

    # -- asking -------------------------------------------------------------------------------------------------------

    def limit(self, name: str) -> Account:
        """The account's limit; a session's own has the default until it has a record."""
        known = self._limits.get(name)
        if known is not None and known.account is not None:
            return known.account
        return self._default if is_session(name) else _UNLIMITED

    def exists(self, line: Line) -> bool:
        """Whether the account has a limit, or moved in this window."""
        known = self._sums.get((line.account, line.window))
        return self.has_record(line.account) or (known is not None and known.mod_revision > 0)

    def line(self, name: str, now_ms: int) -> Line:
        """The account in the window that is now."""
        account = self.limit(name)
        return self.line_at((name, window_of(account.window, now_ms)), account)

    def line_at(self, place: Place, account: Account) -> Line:
        """A tally under a limit, which counts for the windows of its own kind."""
        known = self._sums.get(place)
        limit = account.limit if kind_of(place[1]) == account.window else None
        return Line(*place, limit, known.tally if known is not None else _EMPTY, kind_of(place[1]))

    def idle(self, before_ms: int) -> Iterator[tuple[str, str, int, int]]:
        """What may be forgotten: (account, window, its modification, that of the account's record or 0) of tallies on which
        nothing is held or has moved since, other than the sums for ever of what is no session's and no task's.
        """
        for (name, window), (tally, revision) in self._sums.items():
            passing = is_session(name) or name.startswith(TASK)
            if revision and not tally.held and tally.at < before_ms and (passing or window != "total"):
                known = self._limits.get(name)
                made = passing and known is not None and known.account is not None and not known.account.by
                yield name, window, revision, known.mod_revision if made and known is not None else 0

    def names(self) -> set[str]:
        """Every account that is known to have a record or a tally."""
        names = {name for name, known in self._limits.items() if known.account is not None}
        return names | {account for (account, _), known in self._sums.items() if known.mod_revision}

    def keys(self) -> Iterator[bytes]:
        """The key of every record that is known to exist."""
        yield from (records.account_key(name) for name, known in self._limits.items() if known.account is not None)
        yield from (records.tally_key(*place) for place, known in self._sums.items() if known.mod_revision)

    def unknown(self, names: Iterable[str], places: Iterable[Place], now_ms: int) -> list[Get]:
        """What is to be read before a decision about these accounts, and these tallies besides.

        An account is read together with the tally that it most probably has: only a window other than the present
        guess takes a second look.
        """
        found: dict[bytes, None] = {}
        wanted = [(name, window_of(self.limit(name).window, now_ms)) for name in names]
        for place in dict.fromkeys((*wanted, *places)):
            name, known = place[0], self._sums.get(place)
            has_limit = not name.startswith(TASK)
            behind = has_limit and known is not None and known.mod_revision > self._confirmed.get(name, -1)
            if has_limit and (behind or name not in self._limits):
                found[records.account_key(name)] = None
            if behind or known is None:
                found[records.tally_key(*place)] = None
        return [Get(key) for key in found]

    def revision_of(self, place: Place) -> int:
        """The modification of a tally that is known."""
        return self._sums[place].mod_revision

    def revision_of_limit(self, name: str) -> int:
        """The modification of an account's record; 0: it has none."""
        known = self._limits.get(name)
        return known.mod_revision if known is not None else 0

    def has_record(self, name: str) -> bool:
        known = self._limits.get(name)
        return known is not None and known.account is not None


class Books:
    """One attempt: the lines that were looked at, as they would be after it."""

    def __init__(self, memory: Memory, now_ms: int) -> None:
        self._memory = memory
        self.now_ms = now_ms
        self._lines: dict[Place, Line] = {}
        self._written: dict[Place, None] = {}
        #: accounts whose record this attempt writes
        self._founded: dict[str, Account] = {}
        #: the modifications that were decided on: of tallies, and of accounts' records
        self._seen: dict[Place, int] = {}
        self._limits_seen: dict[str, int] = {}
        #: about how many compares there will be
        self.size = 0

    def path(self, account: str, *, task: str = "", budget_micro_usd: int | None = None) -> Path:
        """The account with all above it, now. With a budget, the task's own account at the end."""
        lines = [self._now(name) for name in path_of(account)]
        if task and budget_micro_usd is not None:
            place = (TASK + task, "total")
            line = self._line(place, Account(limit=budget_micro_usd))
            if line.limit != budget_micro_usd:  # it was looked at by somebody who does not know the task
                line = self._lines[place] = line._replace(limit=budget_micro_usd)
            lines.append(line)
        return tuple(lines)

    def at(self, places: Iterable[Place]) -> Path:
        """These tallies, under the limits of now: where a hold stands."""
        return tuple(self._line(place, self._limit(place[0])) for place in places)

    def put(self, path: Path) -> None:
        """What these lines are after a decision. A session's account gets its record with its first one."""
        for line in path:
            place = (line.account, line.window)
            if self._lines[place] is not line:
                self._lines[place] = line
                self._written[place] = None
                name = line.account
                if is_session(name) and name not in self._founded and not self._memory.has_record(name):
                    self._founded[name] = replace(self._memory.limit(name), at=self.now_ms)

    def found(self, name: str, account: Account) -> None:
        """The account's limit from now on. Its tallies, under the old limit and the new one, are written with it: what
        somebody else decides on the old limit loses its race.
        """
        before = self._now(name)
        self._founded[name] = account
        after = self._line((name, window_of(account.window, self.now_ms)), account)
        for line in (before, after):
            place = (line.account, line.window)
            limit = account.limit if line.kind == account.window else None
            self._lines[place] = line._replace(limit=limit)
            self._written[place] = None

    def _limit(self, name: str) -> Account:
        return self._founded.get(name) or self._memory.limit(name)

    def _now(self, name: str) -> Line:
        account = self._limit(name)
        return self._line((name, window_of(account.window, self.now_ms)), account)

    def _line(self, place: Place, account: Account) -> Line:
        line = self._lines.get(place)
        if line is None:
            line = self._lines[place] = self._memory.line_at(place, account)
            revision = self._seen[place] = self._memory.revision_of(place)
            self._limits_seen[place[0]] = self._memory.revision_of_limit(place[0])
            self.size += 1 if revision else 2
        return line

    def names(self) -> list[str]:
        """The accounts that were looked at."""
        return [name for name in self._limits_seen if not name.startswith(TASK)]

    def unseen(self, names: Iterable[str], places: Iterable[Place]) -> int:
        """How many more compares there will be, at the most, once these were looked at: a tally's and its limit's."""
        lines = self._lines
        new = {(name, window_of(self._limit(name).window, self.now_ms)) for name in names} | set(places)
        return 2 * sum(place not in lines for place in new)

    # -- the transaction ----------------------------------------------------------------------------------------------

    def compares(self) -> list[Compare]:
        """Everything that was looked at is as it was; and where a tally is begun, so is the limit that it is under."""
        found, limits = [], dict.fromkeys(self._founded)
        for place, revision in self._seen.items():
            found.append(unchanged(records.tally_key(*place), revision))
            if revision == 0 and not place[0].startswith(TASK):
                limits[place[0]] = None
        return found + [unchanged(records.account_key(name), self._limits_seen[name]) for name in limits]

    def puts(self) -> list[Put]:
        """Everything that was written."""
        encode = records.encode
        return [
            *(Put(records.tally_key(*place), encode(self._tally(place))) for place in self._written),
            *(Put(records.account_key(name), encode(account)) for name, account in self._founded.items()),
        ]

    def _tally(self, place: Place) -> Tally:
        return replace(self._lines[place].tally, at=self.now_ms)

    def committed(self, revision: int) -> None:
        """The transaction went through: this is how things are."""
        for place in self._written:
            self._memory.learn_sum(place, self._tally(place), revision)
        for name, account in self._founded.items():
            self._memory.learn_limit(name, account, revision)
        for name in self.names():  # had one of them been changed, the transaction would not have gone through
            self._memory.confirm(name, revision)


def is_session(name: str) -> bool:
    """Whether it is a session's own account."""
    return name.rpartition("/")[2].startswith("@")


def kind_of(window: str) -> Window:
    """Which kind of window this is the name of."""
    return "total" if window == "total" else "month" if len(window) == len("2026-11") else "day"


def place_of(key: bytes) -> Place:
    """The account and the window in a tally's key."""
    window, _, name = key[len(records.TALLIES) :].decode().partition("/")
    return name, window
