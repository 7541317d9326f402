"""Carries out the admin verb `sessions`: who is there, and what they hold."""

from __future__ import annotations

import asyncio
from heapq import nsmallest

from ifabric.wire import overview as wire
from ifabric_actors.coordinator.office import Office
from ifabric_actors.coordinator.paging import First, is_meant, pieces


class Overview:
    """The clerk for whoever looks at all sessions."""

    def __init__(self, office: Office) -> None:
        self._office, self._board, self._clock = office, office.board, office.clock
        #: one search at a time, as of tasks
        self._searching = asyncio.Lock()

    async def sessions(self, message: wire.Sessions) -> wire.SessionsReply:
        await self._office.feed.settle()
        board, needle = self._board, (message.match or "").casefold()
        first = First(message.limit + 1, message.after)
        async with self._searching:
            for names in pieces(list(board.sessions)):
                first.add(name for name in names if is_meant(name, board.sessions.get(name), needle))
                await self._clock.sleep(0)
        lines = [line for name in first.names[: message.limit] if (line := self._line(name)) is not None]
        shown = wire.fitting(lines)
        more = len(first.names) > message.limit or len(lines) > len(shown)
        after = shown[-1].session if more and shown else None
        return wire.SessionsReply(sessions=shown, after=after, total=len(board.sessions))

    def _line(self, name: str) -> wire.SessionLine | None:
        seat = self._board.sessions.get(name)
        if seat is None:
            return None  # it has gone since
        held = self._board.held.get(name, ())
        return wire.SessionLine(
            session=name,
            account=seat.session.account,
            capabilities=seat.session.capabilities,
            ttl_s=seat.session.ttl_s,
            claims=tuple(nsmallest(wire.CLAIMS_SHOWN_MAX, held)),
            held=len(held),
        )
