"""The leases that receipts hang on: a receipt is kept for a while, then etcd forgets it by itself.

One lease serves many receipts, but not too many: a lease that ends deletes all its keys in one step of etcd's, so a
lease is retired after `RECEIPTS_MAX` receipts or a minute. A receipt lives at least `keep_s` seconds, at most twice
that.
"""

from __future__ import annotations

import asyncio

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.store.base import Store

RECEIPTS_MAX = 2_000
RETIRE_S = 60.0


class ReceiptLeases:
    """Gives out the current lease; `current` costs nothing but once in `RECEIPTS_MAX` calls."""

    def __init__(self, store: Store, clock: Clock, *, keep_s: int) -> None:
        self._store = store
        self._clock = clock
        self._keep_s = keep_s
        self._lease = 0
        self._granted_at = 0.0
        self._left = 0
        self._granting: asyncio.Task[int] | None = None

    async def current(self) -> int:
        """A lease with at least `keep_s` seconds to live. Raises `Unavailable`."""
        age = self._clock.monotonic() - self._granted_at
        if self._left <= 0 or age > min(RETIRE_S, self._keep_s):
            if self._granting is None:
                self._granting = asyncio.create_task(self._grant(), name="receipt lease")
            granting = self._granting
            try:
                await asyncio.shield(granting)
            finally:
                if granting.done() and self._granting is granting:
                    self._granting = None
        self._left -= 1
        return self._lease

    async def _grant(self) -> int:
        asked = self._clock.monotonic()
        self._lease = await self._store.grant(2 * self._keep_s)
        self._granted_at, self._left = asked, RECEIPTS_MAX
        return self._lease

    async def stop(self) -> None:
        if self._granting is not None:
            await cancel_and_wait(self._granting)

    def retire(self) -> None:
        """The current lease is not to be used any more."""
        self._left = 0
