"""Who is there and what they hold, as the governor needs to know it: two takers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ifabric.store.base import KV
from ifabric_actors.coordinator.records import Seat


class Held(NamedTuple):
    """A live claim: whose, under which fence and session lease, and at which modification of the task's record."""

    session: str
    fence: int
    lease: int
    mod_revision: int


class Sessions:
    """Live sessions. `on_gone` is told (session, its lease) when one ends or comes back with another lease."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self.on_gone: Callable[[str, int], None] = lambda session, lease: None

    def take(self, kv: KV) -> Any: ...

    def gone(self, key: bytes, revision: int) -> None: ...

    def known(self) -> Iterable[bytes]:
        return ()


class Tasks:
    """Claims and pending tasks. `on_ended` is told (task, fence) when a claim has ended."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.on_ended: Callable[[str, int], None] = lambda task, fence: None

    def claims_of(self, session: str) -> int:
        return 0

    def take(self, kv: KV) -> Any: ...

    def gone(self, key: bytes, revision: int) -> None: ...

    def known(self) -> Iterable[bytes]:
        return ()
