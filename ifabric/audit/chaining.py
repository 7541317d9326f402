"""One chain of the audit, record by record: what fits, and the first that does not. Pure, and of bounded memory.

**Which record is the broken one?** When record n does not have the hash of record n-1, either was changed. The next one
decides: if n+1 has the hash of n, then n is as it was, and n-1 is not. So is n-1 as it was when etcd's head vouches for
it. Until one of these is seen, both are in doubt.

**Again.** A daemon that did not hear that a record was stored sends it again, under the same message id. Past the
stream's window for duplicates it is stored twice, which harms nothing while it is the same, byte for byte.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ifabric.audit.finding import DO, Finding
from ifabric.audit.stored import Stored
from ifabric.wire.audit import ENDED, NONE_BEFORE, AuditRecord, Head, hash_of

#: hashes of a chain's last records that are kept, to know one that comes again
KEPT = 8192
_SIZE = 32
_MISSED = bytes(_SIZE)
Seen = Literal["new", "again", "wrong"]


class Place(NamedTuple):
    """Which record."""

    n: int
    seq: int
    at: str
    who: str
    verb: str


class Window:
    """The hashes of the last records, by number. Those that were missing have none."""

    __slots__ = ("_from", "_held")

    def __init__(self, first: int) -> None:
        self._from = first
        self._held = bytearray()

    def add(self, n: int, digest: bytes) -> None:
        """The next one; numbers in between were missing."""
        missing = n - self._from - len(self._held) // _SIZE
        if missing > KEPT:
            self._held.clear()
            self._from, missing = n, 0
        self._held += _MISSED * missing + digest
        if len(self._held) >= 2 * KEPT * _SIZE:
            del self._held[: -KEPT * _SIZE]
            self._from = n - KEPT + 1

    def get(self, n: int) -> bytes | None:
        """None: it is too long ago. Empty: it was missing."""
        at = (n - self._from) * _SIZE
        if at < 0:
            return None
        found = bytes(self._held[at : at + _SIZE])
        return b"" if found == _MISSED else found


class Chain:
    """What was seen of a chain up to its last record."""

    def __init__(self, record: AuditRecord, stored: Stored, head: Head | None) -> None:
        self.name = record.chain
        self.daemon = record.daemon
        self.head = head
        self.first = _place(record, stored)
        self.last = self.first
        self.digest = NONE_BEFORE
        self.ended = False
        #: None while others need the room
        self.window: Window | None = None
        self.broken: Finding | None = None
        self.more = 0
        self._doubt: tuple[Place, Place] | None = None
        if record.n == 1 and record.prev != NONE_BEFORE:
            self.find("changed", self.first, "it is the first of its chain, and says that one was before it")
        self._take(record, stored)

    def add(self, record: AuditRecord, stored: Stored) -> Seen:
        """The chain's next message."""
        if record.n <= self.last.n:
            return self._again(record, stored)
        place = _place(record, stored)
        if record.n > self.last.n + 1:
            self._undecided()
            self._missing(place)
        elif self._doubt is not None:
            before, doubted = self._doubt
            self._doubt = None
            if record.prev == self.digest:
                self.find("changed", before, f"it is not the one that record {doubted.n} was chained to")
            else:
                self.find("changed", doubted, f"it fits neither record {before.n} nor record {record.n}")
        elif record.prev != self.digest:
            if self.head is not None and (self.head.n, self.head.hash) == (self.last.n, self.digest):
                self.find("changed", place, f"it is not chained to record {self.last.n}, which etcd vouches for")
            else:
                self._doubt = (self.last, place)
        self._take(record, stored)
        return "new"

    def _take(self, record: AuditRecord, stored: Stored) -> None:
        self.digest = hash_of(stored.data)
        self.last = _place(record, stored)
        self.ended = (record.component, record.verb) == ("fabric", ENDED)
        if self.window is None:
            self.window = Window(record.n)
        self.window.add(record.n, bytes.fromhex(self.digest))
        head = self.head
        if head is not None and head.n == record.n:
            if head.hash == self.digest:
                self._vouched()
            else:
                self._undecided()
                why = "its daemon has told etcd another hash: it was changed, or one before it was and all hashes since"
                self.find("rewritten", self.last, why)

    def _vouched(self) -> None:
        """The last record is as it was: etcd says so."""
        if self._doubt is not None:
            before, doubted = self._doubt
            self._doubt = None
            why = f"it is not the one that record {doubted.n}, which etcd vouches for, was chained to"
            self.find("changed", before, why)

    def _undecided(self) -> None:
        """Nothing more will tell which of the two was changed."""
        if self._doubt is not None:
            before, doubted = self._doubt
            self._doubt = None
            why = f"it or record {doubted.n} (sequence {doubted.seq}) was changed: they do not fit together"
            self.find("changed", before, why)

    def _missing(self, after: Place) -> None:
        first, last = self.last.n + 1, after.n - 1
        which = f"record {first} is" if first == last else f"records {first} to {last} are"
        where = f"between sequence {self.last.seq} and {after.seq}, {self.last.at} and {after.at}"
        self.find("missing", Place(first, 0, "", "", ""), f"{which} missing {where}")

    def _again(self, record: AuditRecord, stored: Stored) -> Seen:
        known = None if self.window is None else self.window.get(record.n)
        if known and record.n >= self.first.n and known.hex() == hash_of(stored.data):
            return "again"
        place = _place(record, stored)
        if known and record.n >= self.first.n:
            self.find("twice", place, "there was another record of this number before it, and they differ")
        else:
            self.find("order", place, f"it comes after record {self.last.n} (sequence {self.last.seq})")
        return "wrong"

    def close(self) -> None:
        """No more comes."""
        self._undecided()

    def find(self, kind: str, place: Place, why: str) -> None:
        """Something is wrong; only the first is told in full."""
        if self.broken is not None:
            self.more += 1
            return
        self.broken = Finding(
            kind=kind,
            what=why,
            do=DO[kind],
            chain=self.name,
            n=place.n,
            seq=place.seq,
            at=place.at,
            who=place.who,
            verb=place.verb,
        )


def _place(record: AuditRecord, stored: Stored) -> Place:
    return Place(record.n, stored.seq, record.at, record.session, f"{record.component}.{record.verb}")
