"""Carries out `match`, and reports tasks that nobody can take."""

from __future__ import annotations

from ifabric.actor.base import Caller, Context
from ifabric.wire import governor as wire
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.roster import Sessions, Tasks


class Matcher:
    """Weighs sessions against what a task asks for."""

    def __init__(self, context: Context, sessions: Sessions, tasks: Tasks, breakers: Breakers) -> None:
        self._context, self._sessions, self._tasks, self._breakers = context, sessions, tasks, breakers

    async def match(self, message: wire.Match, caller: Caller) -> wire.MatchReply:
        raise NotImplementedError

    def refresh(self) -> None: ...
