"""Whose turn it is: sessions in turn, each session's runs in order.

A session that asks for a thousand runs at once waits for its own, and another session's one run goes next but for one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out within a session, and round robin among sessions."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, session: str, item: T) -> None:
        """At the end of its session's line; a session that had none goes last."""
        self._sessions.setdefault(session, deque()).append(item)
        self._count += 1

    def take(self) -> T:
        """The next one. `IndexError` when there is none."""
        if not self._sessions:
            raise IndexError("nobody waits")
        session, line = next(iter(self._sessions.items()))
        item = line.popleft()
        self._count -= 1
        if line:
            self._sessions.move_to_end(session)
        else:
            del self._sessions[session]
        return item

    def remove(self, session: str, item: T) -> bool:
        """Takes one out that will not wait any longer; whether it was there."""
        line = self._sessions.get(session)
        if line is None or item not in line:
            return False
        line.remove(item)
        self._count -= 1
        if not line:
            del self._sessions[session]
        return True
