"""Which breakers are not closed, as their records in etcd say: what matching needs to know of them. Pure bookkeeping.

The records are the breakers' own (`circuit.Circuit`); here only three fields are read, and a record that cannot be read
stops no work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ifabric.actor.feed import Taker
from ifabric.store.base import KV
from ifabric_actors.governor import records
from ifabric_actors.governor.matching import CLEAR, Weather


class _Record(msgspec.Struct, frozen=True, gc=False):
    state: str = "closed"
    #: ms since the epoch: when the next probe may go; 0: when an operator says so
    until: int = 0
    #: (permit, when it frees itself)
    probes: tuple[tuple[str, int], ...] = ()


_records = msgspec.json.Decoder(_Record)


class Outages:
    """Breakers that are open or half open, and until when each lets no call through. A taker, too.

    Switched off, breakers stop nobody, and records that are left from before do not either.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        #: ms since the epoch; None: for good
        self._until: dict[str, int | None] = {}
        self._now_ms = 0
        self._due_ms: int | None = None
        self.weather: Weather = CLEAR
        #: another one with every other weather
        self.version = 0

    def at(self, now_ms: int) -> bool:
        """What was known is judged as of now; True when that changes the weather."""
        self._now_ms = now_ms
        return self._due_ms is not None and now_ms >= self._due_ms and self._judge()

    def probe_in_s(self, name: str) -> float | None:
        """When a blocked one lets a probe through; None: nobody knows."""
        until = self._until.get(name)
        return max(0, until - self._now_ms) / 1000 if until is not None else None

    @property
    def due_in_s(self) -> float | None:
        """When the weather changes by itself."""
        return max(0, self._due_ms - self._now_ms) / 1000 if self._due_ms is not None else None

    def record(self, name: str, value: bytes) -> bool:
        """A breaker is this now; True when that changes the weather."""
        try:
            found = _records.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found = _Record()
        if not self._enabled:
            return False
        if found.state == "open":
            self._until[name] = found.until or None
        elif found.state == "half_open":
            self._until[name] = min((end for _, end in found.probes), default=0)
        else:
            return self.forget(name)
        return self._judge()

    def forget(self, name: str) -> bool:
        """Its record is gone: closed."""
        if name not in self._until:
            return False
        del self._until[name]
        return self._judge()

    def _judge(self) -> bool:
        now = self._now_ms
        blocked = {name: until for name, until in self._until.items() if until is None or until > now}
        self._due_ms = min((until for until in blocked.values() if until is not None), default=None)
        weather = Weather(frozenset(blocked), frozenset(self._until))
        if weather == self.weather:
            return False
        self.weather = weather
        self.version += 1
        return True

    # -- as a taker -------------------------------------------------------------------------------------------------

    def take(self, kv: KV) -> None:
        self.record(kv.key[len(records.BREAKERS) :].decode(), kv.value)

    def gone(self, key: bytes, revision: int) -> None:
        self.forget(key[len(records.BREAKERS) :].decode())

    def known(self) -> Iterable[bytes]:
        return map(records.breaker_key, self._until)


class Both:
    """Two takers of the same keys. What the first one makes of a record is handed on."""

    def __init__(self, first: Taker, second: Taker) -> None:
        self._first, self._second = first, second

    def take(self, kv: KV) -> Any:
        self._second.take(kv)
        return self._first.take(kv)

    def gone(self, key: bytes, revision: int) -> None:
        self._second.gone(key, revision)
        self._first.gone(key, revision)

    def known(self) -> Iterable[bytes]:
        return {*self._first.known(), *self._second.known()}
