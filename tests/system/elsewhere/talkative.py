"""A resident that tells everything to anybody, and depends on something that its owner has."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

from ifabric.actor.base import Actor, Caller, handles
from ifabric.actor.dependencies import Dependencies
from ifabric.wire.envelope import Reply, Request


class Told(Reply, frozen=True, kw_only=True):
    pass


class Tell(Request, frozen=True, kw_only=True):
    """Logs it in every way that there is, so many times."""

    component: ClassVar = "talkative"
    verb: ClassVar = "tell"
    what: str
    times: int = 1


class Lean(Request, frozen=True, kw_only=True):
    """Says how what it depends on is."""

    component: ClassVar = "talkative"
    verb: ClassVar = "lean"
    on: str
    trouble: str | None = None


class Fall(Request, frozen=True, kw_only=True):
    """Crashes for that reason."""

    component: ClassVar = "talkative"
    verb: ClassVar = "fall"
    why: str


class Talkative(Actor):
    component = "talkative"

    @handles
    async def tell(self, message: Tell, caller: Caller) -> Told:
        log, what = self.context.log, message.what
        for _ in range(message.times):
            log.debug("telling", what=what, headers={"Authorization": what, "x": [(b"cookie", what.encode())]})
        log.info(what)
        logging.getLogger("library").warning("telling %s", what)
        try:
            raise ValueError(what)
        except ValueError:
            log.exception("told", token=what)
        # nobody awaits it: the loop's exception handler logs it
        asyncio.get_running_loop().call_exception_handler({"message": what, "exception": OSError(what)})
        raise RuntimeError(what)

    @handles
    async def lean(self, message: Lean, caller: Caller) -> Told:
        now = self.context.clock.monotonic()
        self.context.parts.get(Dependencies, Dependencies).report(message.on, message.trouble, now)
        return Told()

    @handles
    async def fall(self, message: Fall, caller: Caller) -> Told:
        self.crash(message.why)
        return Told()
