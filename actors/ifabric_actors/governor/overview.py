"""Carries out the admin verb `accounts`: the tree of accounts, a level and a page at a time."""

from __future__ import annotations

import asyncio

from ifabric.wire import overview as wire
from ifabric_actors.coordinator.paging import First, pieces
from ifabric_actors.governor.levels import Level
from ifabric_actors.governor.office import Office


class Overview:
    """The clerk for whoever looks at all accounts."""

    def __init__(self, office: Office) -> None:
        self._office, self._memory, self._clock = office, office.teller.memory, office.clock
        #: one search at a time: between two pieces of it, others wait for one piece and not for many
        self._searching = asyncio.Lock()

    async def accounts(self, message: wire.Accounts) -> wire.AccountsReply:
        self._office.refuse_without_budgets()
        level, first = Level(message.parent), First(message.limit + 1, message.after)
        async with self._searching:
            for names in pieces(list(self._memory.names())):
                level.add(names)
                await self._clock.sleep(0)
            for names in pieces(list(level.children)):
                first.add(names)
                await self._clock.sleep(0)
        lines = [self._line(name, level) for name in first.names[: message.limit]]
        shown = wire.fitting(lines)
        after = shown[-1].account if len(first.names) > len(shown) else None
        return wire.AccountsReply(accounts=shown, after=after, total=len(level.children))

    def _line(self, name: str, level: Level) -> wire.AccountLine:
        line = self._memory.line(name, self._clock.wall_ms())
        return wire.AccountLine(
            account=name,
            window=line.kind,
            limit_micro_usd=line.limit,
            spent_micro_usd=line.tally.spent,
            held_micro_usd=line.tally.held,
            available_micro_usd=line.available,
            children=level.below(name),
        )
