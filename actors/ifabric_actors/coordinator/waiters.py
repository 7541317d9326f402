"""Sessions that wait for a task: long polls of `next`.

They are kept by what they can do, oldest first. A task that becomes pending wakes the oldest one that can take it,
and that one only: waking all would make them race for it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from ifabric.errors import Overloaded, Unavailable
from ifabric_actors.governor.matching import Demand, Offer


class Waiter(NamedTuple):
    """A place in the queue."""

    number: int
    offer: Offer
    woken: asyncio.Future[None]


class Waiters:
    """Parks long polls, at most `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._numbers = 0
        self._groups: dict[Offer, OrderedDict[int, Waiter]] = {}
        self._closed = False

    def __len__(self) -> int:
        return self._count

    def park(self, offer: Offer) -> Waiter:
        """A place in the queue; `woken` is done when a task may be there. Raises `Overloaded`, `Unavailable` when
        draining.
        """
        if self._closed:
            raise Unavailable("The daemon is stopping; ask again, another one will answer.", what="draining")
        if self._count >= self._most:
            raise Overloaded(what="waiting sessions", waiters_max=self._most)
        self._numbers += 1
        waiter = Waiter(self._numbers, offer, asyncio.get_running_loop().create_future())
        self._groups.setdefault(offer, OrderedDict())[waiter.number] = waiter
        self._count += 1
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Gives the place up; harmless when it was woken."""
        group = self._groups.get(waiter.offer)
        if group is not None and group.pop(waiter.number, None) is not None:
            self._count -= 1
            if not group:
                del self._groups[waiter.offer]

    def offer(self, demand: Demand, takes: Callable[[Offer, Demand], bool]) -> bool:
        """Such a task is to be given out: wakes the session that has waited longest of those that would take it. False
        when there is none.
        """
        oldest: Waiter | None = None
        for offer, group in self._groups.items():
            first = next(iter(group.values()))
            if (oldest is None or first.number < oldest.number) and takes(offer, demand):
                oldest = first
        if oldest is None:
            return False
        self.leave(oldest)
        if not oldest.woken.done():
            oldest.woken.set_result(None)
        return True

    def close(self) -> None:
        """Nobody waits any more: everyone is told that the daemon is stopping."""
        self._closed = True
        for group in list(self._groups.values()):
            for waiter in list(group.values()):
                self.leave(waiter)
                if not waiter.woken.done():
                    waiter.woken.set_exception(
                        Unavailable("The daemon is stopping; ask again, another one will answer.", what="draining")
                    )
