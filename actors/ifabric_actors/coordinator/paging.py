"""A page of what is there, found piece by piece: looking at all of a large board at once would keep others waiting.

Nothing here waits; who looks lets others go first between two pieces. What changes meanwhile is seen or not, as if the
question had come a moment earlier or later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import nsmallest
from itertools import chain
from typing import NamedTuple

from sortedcontainers import SortedDict

from ifabric.wire.coordinator import State
from ifabric_actors.coordinator.records import Seat, Stored

#: tasks or names that are looked at in one piece: about a millisecond
PIECE = 1_000


class Piece(NamedTuple):
    """What a look at some of the tasks found, the id of the last one that was looked at, and whether it was the last."""

    found: list[tuple[str, Stored]]
    after: str | None
    end: bool


def look(
    tasks: SortedDict[str, Stored],
    state: State | None,
    needle: str,
    after: str | None,
    want: int,
    most: int = PIECE,
) -> Piece:
    """Up to `want` tasks in the order of their ids, of the next `most` after `after`: those in that state (None: any)
    that have `needle`, which is case-folded, in their id or title.
    """
    found: list[tuple[str, Stored]] = []
    looked = 0
    for task_id in tasks.irange(minimum=after, inclusive=(False, True)):
        if looked == most or len(found) == want:
            return Piece(found, after, end=False)
        looked, after = looked + 1, task_id
        stored: Stored = tasks[task_id]
        if state is not None and stored.task.state != state:
            continue
        if needle and needle not in task_id.casefold() and needle not in stored.task.spec.title.casefold():
            continue
        found.append((task_id, stored))
    return Piece(found, after, end=True)


def is_meant(name: str, seat: Seat | None, needle: str) -> bool:
    """Whether a session has `needle`, which is case-folded, in its name or its account."""
    return seat is not None and (needle in name.casefold() or needle in (seat.session.account or "").casefold())


class First:
    """The first `count` after `after` of names that come in any order."""

    def __init__(self, count: int, after: str | None) -> None:
        self._count = count
        self._after = after or ""
        self.names: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        """These are there too."""
        self.names = nsmallest(self._count, chain(self.names, (name for name in names if name > self._after)))


def pieces(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """The names, `PIECE` at a time."""
    return (names[at : at + PIECE] for at in range(0, len(names), PIECE))
