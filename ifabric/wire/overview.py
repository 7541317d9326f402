"""The messages of whoever looks at the whole: every session, every account. An operator's or an observer's business.

A page ends at its limit, or earlier when it would grow too large for one message: what is left is after `after`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeVar

from msgspec import Meta

from ifabric.wire.envelope import Reply, Request, encode
from ifabric.wire.governor import Account, Window

PAGE_MAX = 1000
#: claims that are named with their session
CLAIMS_SHOWN_MAX = 50
#: of the lines of one page, as they travel: NATS takes a megabyte in one message
PAGE_BYTES_MAX = 512 * 1024

Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX)]
#: part of a name or a title, in capitals or not
Needle = Annotated[str, Meta(max_length=128)]


class Sessions(Request, frozen=True, kw_only=True, omit_defaults=True):
    """The live sessions in the order of their names, a page at a time, with what they hold."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "sessions"
    admin: ClassVar = True
    limit: Limit = 100
    after: Annotated[str, Meta(max_length=64)] | None = None
    #: only those with this in their name or account, in capitals or not
    match: Needle | None = None


class SessionLine(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A session in a list."""

    session: str
    account: str | None = None
    capabilities: tuple[str, ...]
    #: what it asked for, not what is left of it
    ttl_s: float
    #: the tasks that it holds, the first of them
    claims: tuple[str, ...]
    #: how many they are in all
    held: int = 0


class SessionsReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    sessions: tuple[SessionLine, ...]
    #: give it as `after` for the next page; absent on the last
    after: str | None = None
    #: live sessions, whatever was asked for
    total: int


class Accounts(Request, frozen=True, kw_only=True, omit_defaults=True):
    """The accounts right below one, or the top ones, in the order of their names, a page at a time."""

    component: ClassVar = "governor"
    verb: ClassVar = "accounts"
    admin: ClassVar = True
    parent: Account | None = None
    limit: Limit = 100
    after: Account | None = None


class AccountLine(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """An account in the window that is now."""

    account: str
    window: Window
    #: null: no limit
    limit_micro_usd: int | None
    spent_micro_usd: int
    held_micro_usd: int
    #: below zero only after an overdraft or a lowered limit; null without a limit
    available_micro_usd: int | None
    #: accounts right below it
    children: int


class AccountsReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    accounts: tuple[AccountLine, ...]
    #: give it as `after` for the next page; absent on the last
    after: str | None = None
    #: accounts at this place, on all pages
    total: int


L = TypeVar("L", bound=Reply)


def fitting(lines: Sequence[L]) -> tuple[L, ...]:
    """The lines that fit into one message, from the first on; at least one."""
    size = 0
    for at, line in enumerate(lines):
        size += len(encode(line)) + 1
        if size > PAGE_BYTES_MAX and at:
            return tuple(lines[:at])
    return tuple(lines)


REPLIES: dict[type[Request], type[Reply]] = {Sessions: SessionsReply, Accounts: AccountsReply}

for _request, _reply in REPLIES.items():
    _request.reply = _reply
