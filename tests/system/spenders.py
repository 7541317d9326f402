"""Agents that spend, in every way that there is, over the bare bus: within a test, or as a process to be killed.

A spender sends each request of one thing that it wants with the same ids until it is answered, every tenth one twice at
once, and remembers what it asked for and what it was told. It retries as the SDK does, but with a shorter patience and
without the SDK's help: what is proved is the fabric.

    python -m tests.system.spenders NATS FIRST NUMBER   spends as that many sessions until it is killed, and tells on
                                                        its output what it asks for, and then what it was told
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import SystemClock, monotonic
from ifabric.errors import FabricError, from_body
from ifabric.wire import subjects
from tests.system.auditor import Said

ORG = "org"
TEAMS = 8
TTL_S = 5
ATTEMPT_S = 1.0
ATTEMPTS_MAX = 60
#: a hold's estimate is much more than its cost: so what binds is what is held, from the first second on
HOLD = (50_000, 150_000)
COST = (0, 100)
OVER = (0, 5_000)
#: seconds that a hold lives which nobody ends
SHORT_TTL_S = 2
#: fields that may differ between two answers to the same request: how long is left
PASSING = ("ttl_s", "expires_in_s")

Tell = Callable[[tuple[str, int], Said], None]


class Asked(Exception):
    """What became of a request that was not answered with "ok"."""

    def __init__(self, outcome: str, facts: dict[str, Any], *, in_doubt: bool) -> None:
        self.outcome, self.facts = outcome, facts
        #: another attempt of the same request may still be carried out, or have been
        self.in_doubt = in_doubt


class Spender:
    """One session at work."""

    def __init__(self, bus: Bus, session: str, number: int, tell: Tell) -> None:
        self._bus, self.session, self._tell = bus, session, tell
        self.account = f"{ORG}/team{number % TEAMS}"
        self._chance = random.Random(session)
        self._numbers = 0
        self._requests = 0
        self._late: list[tuple[str, float]] = []
        self.counts: Counter[str] = Counter()
        #: answers to the same request that said different things, and errors that should not be
        self.wrong: list[str] = []

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(self, verb: str, component: str = "governor", /, **body: Any) -> dict[str, Any]:
        """The reply to a request, sent until it is answered; every tenth one twice at once. Raises `Asked`.

        Of those about a hold, every other one comes from two lives of a process, so to speak: the hold's id is the same
        and the request's is not.
        """
        self._requests += 1
        twice = self._requests % 10 == 0
        two_lives = self._requests % 20 == 0 and component == "governor"
        names = [f"r{self._requests}", f"r{self._requests}b" if two_lives else f"r{self._requests}"]
        copies = [msgspec.json.encode({"request_id": name, **body}) for name in names[: 1 + twice]]
        subject = subjects.request(component, verb, self.session)
        in_doubt = twice
        for _ in range(ATTEMPTS_MAX):
            answers = await asyncio.gather(*(self._once(subject, data) for data in copies))
            good = [answer for answer in answers if isinstance(answer, dict)]
            if len(good) == 2:
                self.counts["answered twice"] += 1
                passing = (*PASSING, *(("path",) if two_lives else ()))
                first, second = ({k: v for k, v in one.items() if k not in passing} for one in good)
                if first != second and verb != "renew":  # which changes nothing, and tells how things are
                    self.wrong.append(f"{verb} {body}: {first} and {second}")
            if good:
                return good[0]
            final = [answer for answer in answers if not answer.retryable]
            if final:
                if final[0].status >= 500:
                    self.wrong.append(f"{verb} {body}: {final[0]!r}")
                raise Asked(final[0].code, final[0].facts, in_doubt=in_doubt)
            in_doubt = True
            self.counts["sent again"] += 1
            await asyncio.sleep(0.05)  # as the SDK does
        raise Asked("unknown", {}, in_doubt=True)

    async def _once(self, subject: str, data: bytes) -> dict[str, Any] | FabricError:
        try:
            answer = await self._bus.request(subject, data, timeout_s=ATTEMPT_S)
        except FabricError as error:
            return error
        body: dict[str, Any] = msgspec.json.decode(answer.data)
        return from_body(body) if "error" in body else body

    async def hello(self) -> None:
        await self.ask("hello", "coordinator", account=self.account, ttl_s=TTL_S, capabilities=[self.session])

    async def stay(self) -> None:
        """Never returns: renews the session."""
        while True:
            try:
                await self.ask("renew", "coordinator")
            except Asked as error:
                if error.outcome != "session_lost":
                    raise
                self.counts["session lost"] += 1
                await self.hello()
            await asyncio.sleep(TTL_S / 4)

    async def _money(self, verb: str, hold: str, amount: int, /, **body: Any) -> dict[str, Any] | None:
        """One request about money: what was asked and told is remembered. None: it was refused."""
        self._numbers += 1
        at = (self.session, self._numbers)
        kind = "claim" if verb == "next" else verb
        self._tell(at, Said(kind, self.session, hold, amount, "unknown"))
        component = "coordinator" if verb in ("claim", "next", "complete") else "governor"
        try:
            reply = await self.ask(verb, component, **body)
        except Asked as error:
            self._tell(at, Said(kind, self.session, hold, amount, "unknown" if error.in_doubt else error.outcome))
            self.counts[f"{kind}: {error.outcome}"] += 1
            if error.outcome == "budget_short":
                self._check(error.facts, amount)
            return None
        self.counts[f"{kind}: {'late' if reply.get('late') else 'ok'}"] += 1
        self._tell(at, Said(kind, self.session, reply.get("hold") or hold, amount, "ok", reply.get("charged")))
        return reply

    def _check(self, facts: dict[str, Any], need: int) -> None:
        """A refusal names an account of the path that really is short."""
        account = facts["account"]
        path = (ORG, self.account, f"{self.account}/@{self.session}")
        if account not in path or facts["need"] != need or facts["have"] >= need:
            self.wrong.append(f"refused {need} with {facts}")
        self.counts[f"short: {'org' if account == ORG else 'team' if account == self.account else 'session'}"] += 1

    # -- spending -----------------------------------------------------------------------------------------------------

    async def work(self, goes_on: Callable[[], bool]) -> None:
        """One thing after the other."""
        await self.hello()
        staying = asyncio.create_task(self.stay())
        ways = (self._commits, self._voids, self._dies, self._spends, self._claims, self._overruns)
        try:
            while goes_on():
                if staying.done():
                    staying.result()
                (way,) = self._chance.choices(ways, (60, 12, 4, 10, 10, 2))
                if not await way():
                    await asyncio.sleep(0.02)  # the money is elsewhere
        finally:
            await cancel_and_wait(staying)

    async def _reserve(self, amounts: tuple[int, int] = HOLD, **body: Any) -> tuple[str, int] | None:
        name, amount = f"h{self._numbers}", self._chance.randint(*amounts)
        reply = await self._money("reserve", name, amount, hold=name, amount_micro_usd=amount, **body)
        return (name, amount) if reply is not None else None

    async def _commit(self, name: str, cost: int) -> bool:
        return await self._money("commit", name, cost, hold=name, amount_micro_usd=cost) is not None

    async def _commits(self) -> bool:
        held = await self._reserve()
        return held is not None and await self._commit(held[0], self._chance.randint(*COST))

    async def _overruns(self) -> bool:
        """A cost that was more than the estimate."""
        held = await self._reserve(COST)
        return held is not None and await self._commit(held[0], held[1] + self._chance.randint(*OVER))

    async def _voids(self) -> bool:
        held = await self._reserve()
        return held is not None and await self._money("void", held[0], 0, hold=held[0]) is not None

    async def _dies(self) -> bool:
        """A hold that nobody ends; one in two is charged all the same, long after."""
        held = await self._reserve(ttl_s=SHORT_TTL_S)
        if held is not None and self._chance.random() < 0.5:
            self._late.append((held[0], monotonic() + SHORT_TTL_S + 1.0))
        if self._late and monotonic() > self._late[0][1]:
            await self._commit(self._late.pop(0)[0], self._chance.randint(1, COST[1]))
        return held is not None

    async def _spends(self) -> bool:
        name, amount = f"e{self._numbers}", self._chance.randint(*COST)
        return await self._money("spend", name, amount, entry=name, amount_micro_usd=amount) is not None

    async def _claims(self) -> bool:
        """A task of its own, claimed with a hold; and what may become of it."""
        task, amount = f"{self.session}.{self._numbers}", self._chance.randint(*HOLD)
        await self.ask("submit", "coordinator", tasks=[{"id": task, "needs": [self.session], "max_attempts": 100}])
        if self._chance.random() < 0.5:
            claim = await self._money("claim", "", amount, task=task, hold_micro_usd=amount)
        else:
            claim = await self._money("next", "", amount, hold_micro_usd=amount)
        if claim is None:
            return False
        held = {"task": claim["task"], "fence": claim["fence"]}
        cost, end = self._chance.randint(*COST), self._chance.randrange(6)
        try:
            if end == 0:
                await self.ask("release", "coordinator", **held)
            elif end == 1:
                await self.ask("fail", "coordinator", **held, error="it did not work")
            elif end == 2:  # it charges the hold by itself, and is done afterwards
                await self._commit(claim["hold"], cost)
                await self.ask("complete", "coordinator", **held)
            elif end == 3:  # and one hold more, which dies with the claim
                await self._reserve(**held)
                await self._money("complete", claim["hold"], cost, **held, cost_micro_usd=cost)
            else:
                await self._money("complete", claim["hold"], cost, **held, cost_micro_usd=cost)
        except Asked as error:
            self.counts[f"claim's end: {error.outcome}"] += 1
        return True

    async def overspend(self, before: Callable[[], Awaitable[None]], by: int) -> bool:
        """Holds a little, lets others spend all there is, and then comes with a cost that was more."""
        held = await self._reserve(COST)
        await before()
        return held is not None and await self._commit(held[0], held[1] + by)

    async def take_the_rest(self, most: int) -> None:
        """Spends whatever there is, to the last micro-USD."""
        amount = most
        while amount:
            self._numbers += 1
            name = f"z{self._numbers}"
            if await self._money("spend", name, amount, entry=name, amount_micro_usd=amount) is None:
                amount //= 2


async def run(nats: str, first: int, number: int) -> None:
    """Spends until somebody ends it, and tells about it on its output."""
    bus = Nats(NatsSettings(servers=(nats,)), SystemClock())
    await bus.connect()

    def tell(at: tuple[str, int], said: Said) -> None:
        sys.stdout.buffer.write(msgspec.json.encode((at, said)) + b"\n")
        sys.stdout.buffer.flush()

    spenders = [Spender(bus, f"a{first + n}", first + n, tell) for n in range(number)]
    await asyncio.gather(*(spender.work(lambda: True) for spender in spenders))


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
