"""A resident of another repository: it needs `ifabric` and nothing else, and does what a test tells it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.wire.envelope import Reply, Request


class Life(Reply, frozen=True, kw_only=True):
    """How often the actor was started, and what its section of the configuration says."""

    life: int
    motto: str


class Say(Request, frozen=True, kw_only=True):
    component: ClassVar = "neighbour"
    verb: ClassVar = "say"


class Hold(Request, frozen=True, kw_only=True):
    """Is answered when the file of that name is there."""

    component: ClassVar = "neighbour"
    verb: ClassVar = "hold"
    until: str


class Break(Request, frozen=True, kw_only=True):
    component: ClassVar = "neighbour"
    verb: ClassVar = "break"


class Neighbour(Actor):
    component = "neighbour"
    lives = 0

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.section: dict[str, Any] = context.config

    async def start(self) -> None:
        type(self).lives += 1
        self.life = self.lives
        if self.life > self.section.get("lives_max", 1000):
            raise RuntimeError(f"there is no life {self.life}")

    @handles
    async def say(self, message: Say, caller: Caller) -> Life:
        return Life(life=self.life, motto=self.section.get("motto", ""))

    @handles
    async def hold(self, message: Hold, caller: Caller) -> Life:
        while not Path(message.until).exists():
            await asyncio.sleep(0.01)
        return Life(life=self.life, motto="held")

    @handles
    async def fail(self, message: Break, caller: Caller) -> Life:
        assert message is None, "the sums do not match"
        return Life(life=self.life, motto="")


class AskOther(Request, frozen=True, kw_only=True):
    component: ClassVar = "other"
    verb: ClassVar = "say"


class Other(Actor):
    """Lives next door to the neighbour."""

    component = "other"
    lives = 0

    async def start(self) -> None:
        type(self).lives += 1

    @handles
    async def say(self, message: AskOther, caller: Caller) -> Life:
        return Life(life=self.lives, motto="")
