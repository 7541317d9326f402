"""Where a message waits until there is room to handle it.

Bounded: a queue without a limit only hides that the work is not getting done, until its sender has long given up. Above
`mailbox_max` the sender is told so at once.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ifabric.bus.base import Incoming

if TYPE_CHECKING:
    from ifabric.actor.runner import Verb
    from ifabric.metrics import Gauge


class Letter:
    """A message that was accepted. `arrived` is on the clock's monotonic scale, in seconds."""

    __slots__ = ("answered", "arrived", "incoming", "verb")

    def __init__(self, verb: Verb, incoming: Incoming, arrived: float) -> None:
        self.verb = verb
        self.incoming = incoming
        self.arrived = arrived
        #: an answer was sent, or begun, or there will be none
        self.answered = False


class Mailbox:
    """First in, first out, at most `most` letters."""

    def __init__(self, most: int, depth: Gauge) -> None:
        self.most = most
        self._letters: deque[Letter] = deque()
        self._depth = depth

    def __len__(self) -> int:
        return len(self._letters)

    def put(self, letter: Letter) -> bool:
        """Keeps the letter; False when there is no room."""
        if len(self._letters) >= self.most:
            return False
        self._letters.append(letter)
        self._depth.set(len(self._letters))
        return True

    def take(self) -> Letter:
        """The oldest letter. `IndexError` when there is none."""
        letter = self._letters.popleft()
        self._depth.set(len(self._letters))
        return letter
