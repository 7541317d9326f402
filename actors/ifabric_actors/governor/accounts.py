"""The accounts as etcd tells them, into the teller's memory; and what the gauges say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ifabric.clock import Clock
from ifabric.metrics import Metrics
from ifabric.store.base import KV, Delete, unchanged
from ifabric.store.commit import Committer, Request
from ifabric_actors.governor import records
from ifabric_actors.governor.books import Memory, is_session
from ifabric_actors.governor.records import Account, Tally

#: accounts that have a gauge of their own; more would be too much for Prometheus
GAUGES_MAX = 200
SESSIONS = "@"
OWNER = " accounts"
FORGET_AT_ONCE = 50
#: accounts that are looked at before requests are let through
SLICE = 2_000


class Accounts:
    """The taker of accounts and tallies."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        #: accounts whose gauge says something
        self._shown: set[str] = set()
        memory.mirrors = True

    def take(self, kv: KV) -> Account | Tally | None:
        return self._memory.heard(kv)

    def gone(self, key: bytes, revision: int) -> None:
        self._memory.forget(key, revision)

    def known(self) -> Iterable[bytes]:
        return self._memory.keys()

    async def refresh(self, metrics: Metrics, clock: Clock) -> None:
        """How full the accounts are that an operator limited, and the fullest session's."""
        now_ms, shown, fullest = clock.wall_ms(), set[str](), 0.0
        for at, name in enumerate(self._memory.names()):
            if at % SLICE == SLICE - 1:
                await clock.sleep(0)
            line = self._memory.line(name, now_ms)
            if line.limit is None:
                continue
            used = line.tally.spent + line.tally.held
            share = used / line.limit if line.limit else float(used > 0)
            if is_session(name):
                fullest = max(fullest, share)
            elif len(shown) < GAUGES_MAX and len(self._shown | shown | {name}) <= GAUGES_MAX:
                shown.add(name)
                metrics.gauge("if_governor_budget_utilization", account=name).set(share)
        for name in self._shown - shown:  # its limit was lifted, or it is gone: nothing of it is used
            metrics.gauge("if_governor_budget_utilization", account=name).set(0)
        self._shown |= shown
        metrics.gauge("if_governor_budget_utilization", account=SESSIONS).set(fullest)

    async def forget_idle(self, committer: Committer, clock: Clock, ttl_s: int) -> int:
        """Deletes the accounts of sessions and tasks that are long over, and windows that are long past; how many.

        Each only if it is as it was: who moves money on it meanwhile keeps it.
        """
        idle = list(self._memory.idle(clock.wall_ms() - ttl_s * 1000))
        for at in range(0, len(idle), FORGET_AT_ONCE):
            some = idle[at : at + FORGET_AT_ONCE]
            await asyncio.gather(*(self._forget(committer, *one) for one in some))
        return len(idle)

    async def _forget(self, committer: Committer, name: str, window: str, revision: int, limit_revision: int) -> None:
        tally = records.tally_key(name, window)
        compares, deletes = [unchanged(tally, revision)], [Delete(tally)]
        if limit_revision:
            account = records.account_key(name)
            compares.append(unchanged(account, limit_revision))
            deletes.append(Delete(account))
        await committer.commit(Request(tuple(compares), tuple(deletes), (), OWNER))
