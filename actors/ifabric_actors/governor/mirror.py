"""Every breaker, as one daemon knows it: what the watch told, what its own writes made, and what it counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from ifabric.store.base import KV, record
from ifabric_actors.governor import records
from ifabric_actors.governor.circuit import UNKNOWN, Circuit, Window

_circuits = msgspec.json.Decoder(Circuit)


def circuit_of(kv: KV) -> Circuit:
    """The record at a breaker's key. `Internal`, naming the key, when it is not one of ours."""
    return record(_circuits, kv)


class Known(NamedTuple):
    """A breaker, and the modification of its key that this was (0: there was none)."""

    circuit: Circuit
    mod_revision: int


NOTHING = Known(UNKNOWN, 0)


class Mirror:
    """Records and windows, by the breaker's name. The taker of the records' keys."""

    def __init__(self, window_s: float, windows_max: int) -> None:
        self._window_s, self._windows_max = window_s, windows_max
        self._records: dict[str, Known] = {}
        self._open: set[str] = set()
        self._frozen: frozenset[str] | None = None
        #: the one that was reported to longest ago comes first
        self.windows: OrderedDict[str, Window] = OrderedDict()
        #: the record of a breaker, or None
        self.find = self._records.get

    @property
    def open(self) -> frozenset[str]:
        """The names of the breakers that are open or half open."""
        if self._frozen is None:
            self._frozen = frozenset(self._open)
        return self._frozen

    def get(self, name: str) -> Known:
        return self._records.get(name, NOTHING)

    def put(self, name: str, circuit: Circuit, revision: int) -> None:
        """It is this since that revision, unless something newer is known."""
        before = self.get(name)
        if revision <= before.mod_revision:
            return
        self._records[name] = Known(circuit, revision)
        if circuit.generation != before.circuit.generation:
            self.windows.pop(name, None)
        self._sort(name, is_open=circuit.state != "closed")

    def forget(self, name: str, revision: int) -> None:
        """Its key was gone at that revision."""
        known = self._records.get(name)
        if known is not None and known.mod_revision <= revision:
            del self._records[name]
            self._sort(name, is_open=False)

    def _sort(self, name: str, *, is_open: bool) -> None:
        if is_open != (name in self._open):
            (self._open.add if is_open else self._open.discard)(name)
            self._frozen = None

    # -- windows ------------------------------------------------------------------------------------------------------

    def window(self, name: str) -> Window:
        """What is counted for a breaker, from now on if nothing was."""
        window = self.windows.get(name)
        if window is None:
            window = self.windows[name] = Window(self._window_s)
            if len(self.windows) > self._windows_max:
                self.windows.popitem(last=False)
        else:
            self.windows.move_to_end(name)
        return window

    def roll(self, now: float) -> None:
        """Forgets windows that nothing is left in."""
        while self.windows:
            name, window = next(iter(self.windows.items()))
            window.roll(now)
            if window.calls:
                return
            del self.windows[name]

    # -- as a taker ---------------------------------------------------------------------------------------------------

    def take(self, kv: KV) -> Circuit:
        circuit = circuit_of(kv)
        self.put(kv.key[len(records.BREAKERS) :].decode(), circuit, kv.mod_revision)
        return circuit

    def gone(self, key: bytes, revision: int) -> None:
        self.forget(key[len(records.BREAKERS) :].decode(), revision)

    def known(self) -> Iterable[bytes]:
        return [records.breaker_key(name) for name in self._records]
