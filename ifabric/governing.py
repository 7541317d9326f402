"""What a session asks the governor: money, breakers, and who suits a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ifabric.breaking import Breaker, Classify
from ifabric.calling import Line
from ifabric.spending import Hold, whole
from ifabric.wire import governor as wire
from ifabric.wire.envelope import Usage


class Governed(Line):
    """Spends, holds, asks breakers and matches. Amounts are whole micro-USD; see `ifabric.micro_usd`."""

    async def spend(
        self, amount_micro_usd: int, *, entry: str | None = None, account: str | None = None, usage: Usage | None = None
    ) -> wire.CommitReply:
        """Charges at once what is available, or raises `BudgetShort`.

        entry: its id in the session, to charge once what may be done again. account: the session's own (the default)
        or one below it.
        """
        message = wire.Spend(
            entry=entry or self._clock.token(), amount_micro_usd=whole(amount_micro_usd), account=account, usage=usage
        )
        reply: wire.CommitReply = await self.ask(message)
        return reply

    def hold(
        self,
        amount_micro_usd: int,
        *,
        name: str | None = None,
        account: str | None = None,
        ttl_s: int | None = None,
        task: str | None = None,
        fence: int | None = None,
        step: str | None = None,
    ) -> Hold:
        """An amount set aside for the length of an `async with` block; see `ifabric.spending`.

        It ends with the session, and after `ttl_s` seconds (default: the daemon's). For work under a claim there is
        `claim.hold`, which gives `task`, `fence` and `step`: it ends with the claim.
        """
        message = wire.Reserve(
            hold=name or self._clock.token(),
            amount_micro_usd=amount_micro_usd,
            account=account,
            ttl_s=ttl_s,
            task=task,
            fence=fence,
        )
        return Hold(self, message, step=step)

    async def balance(self, account: str | None = None, *, tree: bool = False) -> wire.BalanceReply:
        """An account (default: the session's own) with all above it, and its open holds; with `tree`, all below it
        too (without an account: every account there is). Raises `UnknownAccount`.
        """
        message = wire.Balance(account=account, tree=tree)
        own = account is None and not tree
        reply: wire.BalanceReply = await (self.ask(message) if own else self.call(message))
        return reply

    async def set_account(
        self, account: str, limit_micro_usd: int | None, *, window: wire.Window = "total"
    ) -> wire.PathReply:
        """Sets an account's limit (None: no limit) for ever, for each day or for each month. For operators."""
        limit = None if limit_micro_usd is None else whole(limit_micro_usd, "limit_micro_usd")
        reply: wire.PathReply = await self.call(wire.SetAccount(account=account, limit_micro_usd=limit, window=window))
        return reply

    def breaker(self, name: str, *, classify: Classify | None = None, wait_s: float = 0.0) -> Breaker:
        """A call to that resource through its breaker: an `async with` block, or a decorator; see `ifabric.breaking`.

        classify: what an exception says about the resource; None: what it would say anyway. wait_s: how long to wait
        for an open breaker's next probe instead of raising `BreakerOpen`.
        """
        return Breaker(self, self._clock, name, classify=classify, wait_s=wait_s)

    async def breakers(self) -> tuple[wire.BreakerLine, ...]:
        """Every breaker that is not closed, or that the daemon that answers has counted for."""
        reply: wire.BreakersReply = await self.call(wire.Breakers())
        return reply.breakers

    async def set_breaker(self, name: str, state: Literal["open", "closed"], *, why: str = "") -> wire.BreakerState:
        """Opens a breaker until it is closed, or closes it. For operators."""
        reply: wire.BreakerReply = await self.call(wire.SetBreaker(breaker=name, state=state, why=why))
        return reply.state

    async def match(
        self,
        needs: Iterable[str] = (),
        wants: Iterable[str] = (),
        labels: Iterable[str] = (),
        sessions: Iterable[str] = (),
    ) -> wire.MatchReply:
        """Which sessions (default: all that are there) could take such a task, best first, and why others cannot."""
        message = wire.Match(needs=tuple(needs), wants=tuple(wants), labels=tuple(labels), sessions=tuple(sessions))
        reply: wire.MatchReply = await self.call(message)
        return reply
