"""An actor that does what a test tells it."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from ifabric.actor.base import Actor, Caller, handles
from ifabric.errors import ClaimTaken
from ifabric.wire.envelope import Mutation, Reply, Request


class Echo(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Answers with what it knows of its caller."""

    component: ClassVar = "probe"
    verb: ClassVar = "echo"
    text: str = ""
    size: int = 0


class EchoReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    text: str
    session: str
    admin: bool
    trace: str
    life: int
    left_s: float | None = None


class Hold(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Is answered when the test opens the gate."""

    component: ClassVar = "probe"
    verb: ClassVar = "hold"


class Break(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Fails in the way named."""

    component: ClassVar = "probe"
    verb: ClassVar = "break"
    how: str


class Peek(Request, frozen=True, kw_only=True, omit_defaults=True):
    """For operators."""

    component: ClassVar = "probe"
    verb: ClassVar = "echo"
    admin: ClassVar = True


class Probe(Actor):
    component = "probe"
    description = "Does what a test tells it."
    lives = 0
    #: what the next instances do at their start: an error to raise each
    refuse_to_start: ClassVar[list[Exception]] = []

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        Probe.lives += 1
        self.life = Probe.lives
        self.gate = asyncio.Event()
        self.echoed: list[str] = []
        self.holding = 0
        self.stops = 0
        self.drained = False
        self.chore: asyncio.Task[None] | None = None
        self.chore_ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        await asyncio.sleep(0)
        if Probe.refuse_to_start:
            raise Probe.refuse_to_start.pop(0)
        self.chore = self.spawn(self._chore(), name="chore")

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()

    def draining(self) -> None:
        self.drained = True

    async def _chore(self) -> None:
        await self.chore_ends

    @handles
    async def echo(self, message: Echo, caller: Caller) -> EchoReply:
        self.echoed.append(message.text)
        left_s = None if caller.deadline is None else caller.deadline - self.context.clock.monotonic()
        return EchoReply(
            text=message.text + "x" * message.size,
            session=caller.session,
            admin=caller.admin,
            trace=caller.trace,
            life=self.life,
            left_s=left_s,
        )

    @handles
    async def peek(self, message: Peek, caller: Caller) -> EchoReply:
        return EchoReply(text="peek", session=caller.session, admin=caller.admin, trace="", life=self.life)

    @handles
    async def hold(self, message: Hold, caller: Caller) -> Reply:
        self.holding += 1
        try:
            await self.gate.wait()
        finally:
            self.holding -= 1
        return Reply()

    @handles
    async def fail(self, message: Break, caller: Caller) -> Any:
        match message.how:
            case "refuse":
                raise ClaimTaken(by="b-2", ttl_s=3)
            case "bug":
                raise KeyError("a bug")
            case "deep":
                return await self.fail(message, caller)
            case "assert":
                raise AssertionError("the sums do not match")
            case "cancel":
                raise asyncio.CancelledError
            case "not json":
                return object()
        return None
