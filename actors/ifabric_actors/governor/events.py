"""Events about money and breakers, made from what was committed: the state of a record tells what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ifabric.actor.publisher import Entry, Source
from ifabric.clock import rfc3339
from ifabric.store.base import KV
from ifabric.wire import subjects
from ifabric.wire.envelope import encode
from ifabric.wire.governor import BREAKER_EVENTS, BUDGET_EVENTS, BudgetEvent, HoldState
from ifabric_actors.governor import records
from ifabric_actors.governor.records import Account, Hold

#: what a hold's new state is called
_EVENTS: dict[HoldState, str] = {
    "open": "hold",
    "committed": "commit",
    "late": "commit",
    "voided": "void",
    "expired": "expired",
}


def source(read_breaker: Callable[[KV], Any], tell_breaker: Callable[[KV, Any], list[Entry]]) -> Source:
    """What the governor publishes."""

    def read(kv: KV) -> Any:
        if kv.key.startswith(records.HOLDS):
            return records.hold(kv)
        if kv.key.startswith(records.ACCOUNTS):
            return records.account(kv)
        return read_breaker(kv) if kv.key.startswith(records.BREAKERS) else None

    def tell(kv: KV, record: Any) -> list[Entry]:
        if record is None:
            return []
        if kv.key.startswith(records.BREAKERS):
            return tell_breaker(kv, record)
        if kv.key.startswith(records.HOLDS):
            return _hold(kv, record)
        return _account(kv, record) if kv.key.startswith(records.ACCOUNTS) else []

    told = [
        *(subjects.event("budget", what) for what in BUDGET_EVENTS),
        *(subjects.event("breaker", what) for what in BREAKER_EVENTS),
    ]
    return Source(
        key=records.PUBLISHER_KEY,
        prefix=records.GOVERNOR,
        read=read,
        tell=tell,
        subjects=tuple(told),
        resync_subject=subjects.event("budget", "resync"),
    )


def _hold(kv: KV, hold: Hold) -> list[Entry]:
    whose, revision = kv.key[len(records.HOLDS) :].decode(), kv.mod_revision
    what = _EVENTS[hold.state]
    event = BudgetEvent(
        event=what,
        at=rfc3339(hold.ended_at or hold.at),
        revision=revision,
        account=hold.account,
        hold=whose.rpartition("/")[2],
        session=hold.session,
        task=hold.task or None,
        fence=hold.fence,
        amount=hold.amount,
        charged=hold.charged,
        overdraft=hold.overdraft,
        late=hold.state == "late",
        usage=hold.usage,
        windows=_windows(hold),
        note=hold.note,
    )
    found = [(subjects.event("budget", what), encode(event), f"holds/{whose}@{revision}")]
    if hold.overdraft and what == "commit":
        over = BudgetEvent(
            event="overdraft",
            at=event.at,
            revision=revision,
            account=hold.account,
            hold=event.hold,
            session=hold.session,
            charged=hold.charged,
            overdraft=hold.overdraft,
            late=event.late,
        )
        found.append((subjects.event("budget", "overdraft"), encode(over), f"holds/{whose}@{revision}.overdraft"))
    return found


def _windows(hold: Hold) -> tuple[str, ...]:
    """Where a hold stands, for who charges it again after a restore: short in the common case."""
    plain = len(hold.on) == hold.account.count("/") + 1 and all(window == "total" for _, window in hold.on)
    return () if plain else tuple(window for _, window in hold.on)


def _account(kv: KV, account: Account) -> list[Entry]:
    name, revision = kv.key[len(records.ACCOUNTS) :].decode(), kv.mod_revision
    event = BudgetEvent(
        event="account",
        at=rfc3339(account.at),
        revision=revision,
        account=name,
        limit=account.limit,
        window=account.window,
        note=f"set by {account.by}" if account.by else "made on first use",
    )
    return [(subjects.event("budget", "account"), encode(event), f"accounts/{name}@{revision}")]
