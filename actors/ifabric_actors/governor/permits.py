"""Permits: what a caller that was admitted shows with its report. Any daemon can tell a real one without asking etcd.

    <kind><generation>.<nonce>.<checksum>     for example c12.mJ3vQxk0aB1f3.9f86d081884c7d659a2feaa0

The checksum is keyed with a secret that all daemons share, and covers the breaker and the session too, so a permit is
of use to nobody else and for nothing else. The nonce is a daemon's random name and a number: unique, which is all that
it has to be.

A daemon remembers which permits were reported to it, the last `SEEN_MAX` of them. One that is reported again elsewhere
or much later is no way around anything: it counts as one call, which whoever has it may have admitted anyway; and
a probe's permit is in the breaker's record until it is reported.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections import OrderedDict
from typing import Literal, NamedTuple

from ifabric.errors import UnknownPermit

Kind = Literal["c", "p"]
CLOSED: Kind = "c"
PROBE: Kind = "p"
#: bytes: nobody finds one by trying
CHECKSUM_SIZE = 12
SEEN_MAX = 65_536


class Permit(NamedTuple):
    """A permit that is real."""

    kind: Kind
    generation: int
    nonce: str


class Permits:
    """Writes and reads permits. `name` is unlike any other daemon's, and has no dot."""

    def __init__(self, secret: bytes, name: str) -> None:
        self._secret, self._name = secret, name
        self._numbers = itertools.count(1)
        self._seen: OrderedDict[str, None] = OrderedDict()

    def nonce(self) -> str:
        """One that was never given out."""
        return f"{self._name}{next(self._numbers):x}"

    def write(self, breaker: str, session: str, kind: Kind, generation: int, nonce: str) -> str:
        """The permit as text."""
        body = f"{kind}{generation}.{nonce}"
        return f"{body}.{self._checksum(breaker, session, body)}"

    def read(self, breaker: str, session: str, text: str) -> Permit:
        """The permit that the text stands for. `UnknownPermit` when it is not one for this breaker and session."""
        body, _, checksum = text.rpartition(".")
        if not hmac.compare_digest(checksum.encode(), self._checksum(breaker, session, body).encode()):
            raise UnknownPermit(breaker=breaker)
        head, _, nonce = body.partition(".")
        return Permit(PROBE if head[0] == PROBE else CLOSED, int(head[1:]), nonce)

    def use(self, permit: Permit) -> bool:
        """Remembers it as reported. False: it was already."""
        seen = self._seen
        if permit.nonce in seen:
            return False
        seen[permit.nonce] = None
        if len(seen) > SEEN_MAX:
            seen.popitem(last=False)
        return True

    def unuse(self, permit: Permit) -> None:
        """Forgets that it was reported: nothing came of it, and it may be reported again."""
        self._seen.pop(permit.nonce, None)

    def _checksum(self, breaker: str, session: str, body: str) -> str:
        # names of breakers and sessions have no spaces: no two triples read the same
        text = f"{breaker} {session} {body}".encode()
        return hashlib.blake2b(text, key=self._secret, digest_size=CHECKSUM_SIZE).hexdigest()
