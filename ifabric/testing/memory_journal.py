"""The journal's twin: a stream in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from ifabric.bus.base import Entry, Headers, JournalSize, JournalSpec
from ifabric.errors import Unavailable
from ifabric.wire.envelope import MSG_ID_HEADER

#: of a stored message, in bytes, besides its data and its subject
OVERHEAD = 64


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription's pattern takes a subject: `*` is one token, `>` the rest."""
    wanted, given = pattern.split("."), subject.split(".")
    for at, want in enumerate(wanted):
        if want == ">":
            return len(given) > at
        if at >= len(given) or want not in ("*", given[at]):
            return False
    return len(wanted) == len(given)


class MemoryJournal:
    """A stream. A message id is stored once, whenever it comes: the window never closes here. Nothing can be deleted
    from it anyhow.
    """

    def __init__(self, spec: JournalSpec, publish: Callable[[str, bytes, Headers, str], object]) -> None:
        self.spec = spec
        self._publish = publish
        self.entries: deque[Entry] = deque()
        self.bytes = 0
        self._newest = 0
        #: of every message that was ever stored
        self._numbers: dict[str, int] = {}
        self._more = asyncio.Event()

    def offer(self, subject: str, data: bytes, headers: Headers) -> None:
        """Stores a message when its subject is one of the stream's."""
        if not any(matches(pattern, subject) for pattern in self.spec.subjects):
            return
        ident = headers.get(MSG_ID_HEADER)
        if ident is not None and ident in self._numbers:
            return
        fresh = Entry(subject, data, dict(headers), self._newest + 1)
        if self.spec.discard == "new" and self.bytes + _bytes_of(fresh) > self.spec.max_bytes:
            return
        self._newest = fresh.seq
        if ident is not None:
            self._numbers[ident] = fresh.seq
        self.entries.append(fresh)
        self.bytes += _bytes_of(fresh)
        while self.bytes > self.spec.max_bytes:
            self.bytes -= _bytes_of(self.entries.popleft())
        self._more.set()
        self._more = asyncio.Event()

    async def append(self, entries: Sequence[tuple[str, bytes, str]], *, strictly: bool = False) -> None:
        for subject, data, ident in entries:  # whoever is subscribed gets it too
            self._publish(subject, data, {MSG_ID_HEADER: ident}, "")
            if ident not in self._numbers:
                raise Unavailable(
                    f"the stream {self.spec.name} is full and takes nothing new", what="jetstream", reason="full"
                )

    async def size(self) -> JournalSize:
        return JournalSize(len(self.entries), self.bytes, self.spec.max_bytes)

    async def last(self, subject: str | None = None) -> Entry | None:
        return next((e for e in reversed(self.entries) if subject is None or e.subject == subject), None)

    async def read(self, *, after_seq: int = 0, subject: str | None = None) -> AsyncIterator[Entry]:
        while True:
            more = self._more
            for entry in [one for one in self.entries if one.seq > after_seq]:
                after_seq = entry.seq
                if subject is None or matches(subject, entry.subject):
                    yield entry
            if more is self._more:
                await more.wait()


class ConnectedJournal:
    """A stream as one connection sees it: while there is none, `check` raises `Unavailable`."""

    def __init__(self, journal: MemoryJournal, check: Callable[[], None]) -> None:
        self._journal, self._check = journal, check

    async def append(self, entries: Sequence[tuple[str, bytes, str]], *, strictly: bool = False) -> None:
        self._check()
        await self._journal.append(entries, strictly=strictly)

    async def size(self) -> JournalSize:
        self._check()
        return await self._journal.size()

    async def last(self, subject: str | None = None) -> Entry | None:
        self._check()
        return await self._journal.last(subject)

    def read(self, *, after_seq: int = 0, subject: str | None = None) -> AsyncIterator[Entry]:
        return self._journal.read(after_seq=after_seq, subject=subject)


def _bytes_of(entry: Entry) -> int:
    return len(entry.data) + len(entry.subject) + OVERHEAD
