"""Carries out `balance` and the admin verb `account`: looking at accounts, and setting their limits."""

from __future__ import annotations

from typing import Any

from ifabric.actor.base import Caller
from ifabric.clock import rfc3339
from ifabric.errors import Overloaded, UnknownAccount
from ifabric.store.base import TxnRefused
from ifabric.store.commit import Request
from ifabric.wire import governor as wire
from ifabric_actors.governor import ledger, records
from ifabric_actors.governor.books import TASK, Books
from ifabric_actors.governor.ledger import told
from ifabric_actors.governor.office import TRIES_MAX, Office, Replayed
from ifabric_actors.governor.records import Account
from ifabric_actors.governor.teller import Draft, Posting


class Budgets:
    """The clerk for accounts and their limits."""

    def __init__(self, office: Office) -> None:
        self._office, self._teller, self._holds, self._clock = office, office.teller, office.holds, office.clock

    async def balance(self, message: wire.Balance, caller: Caller) -> wire.BalanceReply:
        self._office.refuse_without_budgets()
        memory = self._teller.memory
        if message.account is None and message.tree:
            return self._reply((), self._below(""), self._holds_on(None))
        account = message.account
        if account is None:
            seat = await self._office.seat(caller.session)
            account = wire.account_of(seat.session.account, caller.session)
        names = wire.path_of(account)
        now_ms = await self._teller.fresh(names, owner=caller.session)
        lines = tuple(memory.line(name, now_ms) for name in names)
        below = self._below(account + "/") if message.tree else ()
        if message.account is not None and not memory.exists(lines[-1]) and not below:
            raise UnknownAccount(f"there is no account {account}", account=account)
        return self._reply(told(lines), below, self._holds_on(account))

    @staticmethod
    def _reply(
        path: tuple[wire.Line, ...], below: tuple[wire.Line, ...], holds: list[wire.HoldLine]
    ) -> wire.BalanceReply:
        shown = tuple(holds[: wire.HOLDS_SHOWN_MAX])
        return wire.BalanceReply(path=path, holds=shown, more=len(holds) > len(shown), below=below)

    def _below(self, prefix: str) -> tuple[wire.Line, ...]:
        now_ms, memory = self._clock.wall_ms(), self._teller.memory
        names = sorted(name for name in memory.names() if name.startswith(prefix) and not name.startswith(TASK))
        return tuple(memory.line(name, now_ms).told() for name in names)

    def _holds_on(self, account: str | None) -> list[wire.HoldLine]:
        """The open holds that stand on an account; on any, without one."""
        now_ms = self._clock.wall_ms()
        return [
            wire.HoldLine(
                hold=key.decode().rpartition("/")[2],
                session=hold.session,
                account=hold.account,
                amount=hold.amount,
                at=rfc3339(hold.at),
                task=hold.task or None,
                fence=hold.fence,
                expires_in_s=max(0, hold.expires_at - now_ms) / 1000 if hold.expires_at else None,
            )
            for key, (hold, _) in self._holds.open.items()
            if account is None or any(name == account for name, _ in hold.on)
        ]

    async def set_account(self, message: wire.SetAccount, caller: Caller) -> Any:
        self._office.refuse_without_budgets()
        names = wire.path_of(message.account)
        keys = self._office.keys(caller, message, records.account_key(message.account))
        for _ in range(TRIES_MAX):
            lease, _ended = await self._office.leases(message, ended=False)

            def make(books: Books, lease: int = lease) -> Draft:
                account = Account(
                    limit=message.limit_micro_usd, window=message.window, by=caller.session, at=books.now_ms
                )
                books.found(message.account, account)
                reply = wire.PathReply(path=told(books.path(message.account)))
                compares, puts = self._office.receipt(caller, message, reply, lease)
                return Draft(Request(compares, puts), reply)

            places = tuple((message.account, window) for window in self._windows_now())
            try:
                posted = await self._teller.post(Posting(names, places, keys, make, caller.session))
            except TxnRefused:
                self._office.retire()
                continue
            if posted.outcome.succeeded:
                self._office.log.info(
                    "account limit set",
                    account=message.account,
                    limit_micro_usd=message.limit_micro_usd,
                    window=message.window,
                    by=caller.session,
                )
                return posted.answer
            kv = await self._office.look(message, caller, records.account_key(message.account))
            if isinstance(kv, Replayed):
                return kv.reply
        raise Overloaded(f"{message.verb} lost {TRIES_MAX} races; nothing was done", what="contention")

    def _windows_now(self) -> tuple[str, ...]:
        now_ms = self._clock.wall_ms()
        return tuple(ledger.window_of(kind, now_ms) for kind in ("total", "day", "month"))
