"""How the board learns from etcd: a taker for tasks, one for sessions, one for the deadlines of claims, one for the
governor's breakers (a task that needs what fails is not given out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ifabric.actor.feed import Feed, Taker
from ifabric.store.base import KV, Store
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.board import Board
from ifabric_actors.coordinator.records import Stored, Task
from ifabric_actors.governor.records import BREAKERS, breaker_key

WATCHED = (records.TASKS, records.SESSIONS, records.DEADLINES, BREAKERS)


class Tasks:
    """Tasks, into the board."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def take(self, kv: KV) -> Task:
        task_id = kv.key[len(records.TASKS) :].decode()
        known = self._board.tasks.get(task_id)
        if known is not None and known.mod_revision == kv.mod_revision:
            mine: Task = known.task
            return mine  # our own commit, which is known already
        expected = self._board.expected.get(task_id)
        if expected is not None and expected[0] == kv.value:
            stored = Stored(expected[1], kv.mod_revision, kv.create_revision)
        else:
            stored = records.stored(kv)
        self._board.put(task_id, stored)
        return stored.task

    def gone(self, key: bytes, revision: int) -> None:
        self._board.forget(key[len(records.TASKS) :].decode(), revision)

    def known(self) -> Iterable[bytes]:
        return map(records.task_key, self._board.tasks)


class Sessions:
    """Sessions, into the board."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def take(self, kv: KV) -> None:
        self._board.seat(kv.key[len(records.SESSIONS) :].decode(), records.seat(kv))

    def gone(self, key: bytes, revision: int) -> None:
        self._board.unseat(key[len(records.SESSIONS) :].decode(), revision)

    def known(self) -> Iterable[bytes]:
        return map(records.session_key, self._board.sessions)


class Deadlines:
    """The claims' own deadlines: task -> lease, while that lives."""

    def __init__(self, deadlines: dict[str, int], passed: Callable[[str], None]) -> None:
        self._deadlines = deadlines
        self._passed = passed

    def take(self, kv: KV) -> None:
        self._deadlines[kv.key[len(records.DEADLINES) :].decode()] = kv.lease

    def gone(self, key: bytes, revision: int) -> None:
        """A deadline has passed, or is no longer needed."""
        task_id = key[len(records.DEADLINES) :].decode()
        self._deadlines.pop(task_id, None)
        self._passed(task_id)

    def known(self) -> Iterable[bytes]:
        return map(records.deadline_key, self._deadlines)


class Breakers:
    """Breakers that are not closed, into the board."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def take(self, kv: KV) -> None:
        self._board.breaker(kv.key[len(BREAKERS) :].decode(), kv.value)

    def gone(self, key: bytes, revision: int) -> None:
        self._board.breaker(key[len(BREAKERS) :].decode(), None)

    def known(self) -> Iterable[bytes]:
        return map(breaker_key, self._board.breakers)


def feed_of(store: Store, board: Board, deadlines: dict[str, int], passed: Callable[[str], None]) -> Feed:
    """The coordinator's feed. `passed` is told of the task of a claim whose own deadline has gone."""
    takers: dict[bytes, Taker] = {
        records.TASKS: Tasks(board),
        records.SESSIONS: Sessions(board),
        records.DEADLINES: Deadlines(deadlines, passed),
        BREAKERS: Breakers(board),
    }
    return Feed(store, WATCHED, takers)
