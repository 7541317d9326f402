"""Agents of a simulation: they work as the SDK does, and worse. What each was told is kept for the checker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ifabric.errors import Unavailable
from ifabric.testing.memory_bus import MemoryBus
from ifabric.wire import subjects
from tests.simulation.money import ORG, Purse
from tests.simulation.network import Weather

TTL_S = 3
PATIENCE_S = 1.0
#: codes after which the same request is sent again
AGAIN = ("unavailable", "overloaded", "internal")


@dataclass
class Attempt:
    """One sending of a request, and what came back: `code` is "ok", an error's, or "" when nothing did."""

    sent: int
    code: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    answered: int = 0


@dataclass
class Call:
    """A request with all its attempts. Two with the same id are one call."""

    session: str
    verb: str
    request_id: str
    body: dict[str, Any]
    component: str = "coordinator"
    attempts: list[Attempt] = field(default_factory=list)


class Ledger:
    """What everybody asked and was told, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._moment = 0

    def moment(self) -> int:
        self._moment += 1
        return self._moment


class Agent:
    """One session. `calm`: it works and finishes, and no longer experiments."""

    def __init__(self, name: str, weather: Weather, bus: MemoryBus, ledger: Ledger, task_ids: list[str]) -> None:
        self.name = name
        self.calm = False
        self._weather, self._bus, self._ledger, self._task_ids = weather, bus, ledger, task_ids
        self._clock, self._chance = weather.clock, weather.chance
        self._requests = 0
        self._seated = False
        self._renewed_at = 0.0
        self._held: dict[str, int] = {}
        self._old: list[tuple[str, int]] = []
        self._mine: list[Call] = []
        self._purse = Purse(self)

    # -- asking -------------------------------------------------------------------------------------------------------

    def _call(self, verb: str, component: str, body: dict[str, Any]) -> Call:
        self._requests += 1
        call = Call(self.name, verb, f"{self.name}-{self._requests}", body, component)
        self._ledger.calls.append(call)
        self._mine.append(call)
        return call

    def a_claim(self) -> tuple[str, int] | None:
        """A claim that it believes to hold, or did."""
        held = [*self._held.items(), *self._old[-2:]]
        return self._chance.choice(held) if held else None

    async def ask(self, verb: str, component: str = "coordinator", **body: Any) -> Attempt:
        """The answer to a new request, sent again with the same id until there is one, or patience ends."""
        call = self._call(verb, component, body)
        for _ in range(8):
            attempt = await self._send(call)
            if attempt.code not in ("", *AGAIN):
                return attempt
            await self._clock.sleep(self._chance.uniform(0.05, 0.4))
        return attempt

    async def _send(self, call: Call) -> Attempt:
        attempt = Attempt(self._ledger.moment())
        call.attempts.append(attempt)
        body = dict(call.body) if call.verb == "renew" else {**call.body, "request_id": call.request_id}
        subject = subjects.request(call.component, call.verb, self.name, admin=call.verb == "account")
        asked = asyncio.ensure_future(self._bus.request(subject, msgspec.json.encode(body), timeout_s=1e6))
        timer = asyncio.ensure_future(self._clock.sleep(PATIENCE_S))
        try:
            await asyncio.wait({asked, timer}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                answer = asked.result()
                attempt.body = msgspec.json.decode(answer.data)
                attempt.code = attempt.body["error"]["code"] if "error" in attempt.body else "ok"
                attempt.answered = self._ledger.moment()
        except Unavailable:
            attempt.code = "unavailable"
        finally:
            asked.cancel()
            timer.cancel()
            await asyncio.gather(asked, timer, return_exceptions=True)
        if attempt.code == "session_lost":
            self._lose_everything()
        return attempt

    def _lose(self, task_id: str) -> None:
        fence = self._held.pop(task_id, None)
        if fence is not None:
            self._old.append((task_id, fence))

    def _lose_everything(self) -> None:
        self._seated = False
        for task_id in list(self._held):
            self._lose(task_id)

    # -- living ---------------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Never returns."""
        while True:
            await self._step()
            await self._clock.sleep(self._chance.uniform(0.01, 0.2))

    async def _step(self) -> None:
        chance = self._chance.random
        if not self._seated:
            self._seated = (await self.ask("hello", ttl_s=TTL_S, account=ORG)).code == "ok"
            self._renewed_at = self._clock.monotonic()
            return
        if self._clock.monotonic() - self._renewed_at > TTL_S / 3:
            await self._renew()
        if not self.calm:
            if chance() < 0.06:
                await self._clock.sleep(self._chance.uniform(0.5, 2.5) * TTL_S)
            if chance() < 0.25:
                await self._experiment()
            if chance() < 0.5:
                await self._purse.step(self._chance)
            if chance() < 0.02:
                await self.ask("bye")
                self._lose_everything()
                return
        if len(self._held) < 2:
            await self._take()
        if self._held and chance() < 0.6:
            await self._finish(self._chance.choice(sorted(self._held)))

    async def _renew(self) -> None:
        answer = await self.ask("renew", claims=[{"task": t, "fence": f} for t, f in self._held.items()])
        if answer.code != "ok":
            return
        self._renewed_at = self._clock.monotonic()
        for gone in (*answer.body.get("lost", ()), *answer.body.get("cancelled", ())):
            self._lose(gone["task"])
        for unnamed in answer.body.get("unnamed", ()):
            await self.ask("release", task=unnamed["task"], fence=unnamed["fence"])

    async def _take(self) -> None:
        hold = {} if self.calm else self._purse.hold_for_claim(self._chance)
        if self._chance.random() < 0.5:
            answer = await self.ask("claim", task=self._chance.choice(self._task_ids), **hold)
        else:
            answer = await self.ask("next", **hold)
        if answer.code == "ok":
            self._held[answer.body["task"]] = answer.body["fence"]

    async def _finish(self, task_id: str) -> None:
        fence = self._held[task_id]
        drawn = 0.0 if self.calm else self._chance.random()
        cost = {} if self.calm else self._purse.cost(self._chance)
        if drawn < 0.1:
            answer = await self.ask("complete", task=task_id, fence=fence, result={"by": self.name}, **cost)
        elif drawn < 0.35:
            answer = await self.ask("fail", task=task_id, fence=fence, error="it broke", **cost)
        elif drawn < 0.7:
            answer = await self.ask("release", task=task_id, fence=fence)
        else:
            return  # it goes on working
        if answer.code not in ("", *AGAIN):
            self._lose(task_id)

    async def _experiment(self) -> None:
        """What a broken agent does: old fences, and requests sent again long after they were answered."""
        again = [claim for claim in self._old if claim[0] in self._held] or self._old
        if again and self._chance.random() < 0.6:
            task_id, fence = self._chance.choice(again)
            verb = self._chance.choice(["complete", "complete", "fail", "release"])
            await self.ask(verb, task=task_id, fence=fence, **({"error": "late"} if verb == "fail" else {}))
        elif self._mine:
            call = self._chance.choice(self._mine[-12:])
            await asyncio.gather(self._send(call), self._send(call))
