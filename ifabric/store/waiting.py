"""The room where requests wait for a batch of the group commit: who goes next, and with whom. Pure bookkeeping.

**Order.** Of the requests that write one key only the oldest is *ready*; each other one knows how many older ones it
is behind, and moves up when they are over. So two that write one key are never in one batch, nor in two batches at
once, and ten thousand that wait for one key cost no more than any others.

**Fairness.** Owners take turns, one request a turn: a batch is shared by all who wait, however much one of them wants.

**What may share a batch.** etcd evaluates all compares of nested transactions before it applies any of them. So that a
batch has the effect of its requests one after the other, a request that compares a key which the batch writes waits
for the next. One that is large, or would make the batch too long for etcd, begins the next too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ifabric.store.base import Get, Put

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from ifabric.handling import Span
    from ifabric.store.commit import Outcome, Request

#: requests in one transaction. etcd counts one for each plus the largest inside, and allows 128.
BATCH_MAX = 100
#: keys and values of one batch. etcd refuses a transaction of 1.5 MiB.
BATCH_MAX_BYTES = 1024 * 1024
#: operations (and compares) of a request that may share a batch
SHARED_OPS_MAX = 24


class Waiting:
    """A request that was accepted, until it is answered. `doubt`: an earlier attempt may have been carried out."""

    __slots__ = ("behind", "doubt", "followers", "future", "keys", "large", "request", "size_bytes", "span")

    def __init__(self, request: Request, future: asyncio.Future[Outcome]) -> None:
        self.request = request
        self.future = future
        self.keys = frozenset([op.key for op in request.then if type(op) is not Get])
        self.size_bytes = sum([len(op.key) + len(op.value) for op in request.then if type(op) is Put])
        self.large = max(len(request.then), len(request.compares), len(request.otherwise)) > SHARED_OPS_MAX
        self.doubt = False
        #: what is recorded of it; None where nothing is
        self.span: Span | None = None
        #: how many older requests for one of its keys are not over, and who waits for this one
        self.behind = 0
        self.followers: list[Waiting] = []


class WaitingRoom:
    """Requests from `add` until `over`."""

    def __init__(self) -> None:
        self._newest: dict[bytes, Waiting] = {}
        #: owners whose turn is to come, and what of theirs is ready
        self._ready: dict[str, deque[Waiting]] = {}
        self._waiting: dict[Waiting, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether somebody may go."""
        return bool(self._ready)

    def add(self, waiting: Waiting) -> None:
        """The newest request."""
        newest = self._newest
        for key in waiting.keys:
            older = newest.get(key)
            if older is not None:
                older.followers.append(waiting)
                waiting.behind += 1
            newest[key] = waiting
        self._waiting[waiting] = None
        if not waiting.behind:
            self._line_up(waiting)

    def take(self) -> list[Waiting]:
        """The next batch; [] when nobody is ready. Each of its requests is `over` when it was carried out."""
        batch: list[Waiting] = []
        written: set[bytes] = set()
        size_bytes = 0
        ready = self._ready
        while ready and len(batch) < BATCH_MAX:
            owner, line = next(iter(ready.items()))
            waiting = line[0]
            if not waiting.future.done():  # else its caller was cancelled
                size_bytes += waiting.size_bytes
                if batch and (waiting.large or size_bytes > BATCH_MAX_BYTES or _compares(waiting, written)):
                    break
                batch.append(waiting)
                written |= waiting.keys
            line.popleft()
            del ready[owner]
            if line:
                ready[owner] = line  # behind the other owners
            del self._waiting[waiting]
            if waiting.future.done():
                self.over(waiting)
            elif waiting.large:
                break
        return batch

    def over(self, waiting: Waiting) -> None:
        """Whoever waited for its keys moves up."""
        for key in waiting.keys:
            if self._newest.get(key) is waiting:
                del self._newest[key]
        followers, waiting.followers = waiting.followers, []
        for follower in followers:
            follower.behind -= 1
            if not follower.behind:
                self._line_up(follower)

    def _line_up(self, waiting: Waiting) -> None:
        owner = waiting.request.owner
        line = self._ready.get(owner)
        if line is None:
            self._ready[owner] = deque((waiting,))
        else:
            line.append(waiting)


def _compares(waiting: Waiting, written: set[bytes]) -> bool:
    return any(compare.key in written for compare in waiting.request.compares)
