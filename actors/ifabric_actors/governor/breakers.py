"""Carries out `admit`, `report`, `breakers` and the admin verb `breaker`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ifabric.actor.base import Caller, Context
from ifabric.actor.publisher import Entry
from ifabric.actor.receipts import Receipts
from ifabric.store.base import KV
from ifabric.wire import governor as wire


class Breakers:
    """Every breaker, as this daemon knows it; the taker of their keys."""

    def __init__(self, context: Context, receipts: Receipts) -> None:
        self._context, self._receipts = context, receipts

    def take(self, kv: KV) -> Any: ...

    def gone(self, key: bytes, revision: int) -> None: ...

    def known(self) -> Iterable[bytes]:
        return ()

    def tell(self, kv: KV, record: Any) -> list[Entry]:
        return []

    async def admit(self, message: wire.Admit, caller: Caller) -> wire.AdmitReply:
        raise NotImplementedError

    async def report(self, message: wire.Report, caller: Caller) -> wire.BreakerReply:
        raise NotImplementedError

    async def list(self, message: wire.Breakers, caller: Caller) -> wire.BreakersReply:
        raise NotImplementedError

    async def set(self, message: wire.SetBreaker, caller: Caller) -> Any:
        raise NotImplementedError

    def refresh(self) -> None: ...
