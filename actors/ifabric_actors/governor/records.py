"""What the governor stores in etcd, and under which keys. What others follow stands under one prefix,
so that one watch tells it in order.

    governor/accounts/<account>           an account's limit; a session's own is made on first use
    governor/tallies/<window>/<account>   what was spent and is held in a window: `total`, `2026-11` or `2026-11-25`
    governor/holds/<session>/<id>         a hold or a spend entry; once ended it hangs on a lease, and is then forgotten
    governor/breakers/<name>              a breaker that is not closed, or was not lately
    governor/secrets/permits              what permits are sealed with; whoever can read it can forge them
    posted/<teller>/<slot>                the last attempt of one daemon's teller: how a lost reply is recognised
    fabric/restored                       of which backup the cluster was made; written by the restore
    fabric/reconciled                     that what was spent after that backup was charged again, or is being charged

Amounts are whole micro-USD. Values are JSON, for `etcdctl get` to show.
"""

from __future__ import annotations

import msgspec

from ifabric.store.base import KV, record
from ifabric.wire.envelope import Usage
from ifabric.wire.governor import HoldState, Window
from ifabric.wire.replay import Reconciled, Restore

GOVERNOR = b"governor/"
ACCOUNTS, TALLIES, HOLDS = b"governor/accounts/", b"governor/tallies/", b"governor/holds/"
BREAKERS, POSTED = b"governor/breakers/", b"posted/"
PUBLISHER_KEY = b"fabric/governor-publisher"
RESTORED_KEY, RECONCILED_KEY = b"fabric/restored", b"fabric/reconciled"
#: in place of a digest: what was asked when a hold was made is not known of one that a replay has made
REPLAYED_BODY = "replayed"


class Account(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An account's limit. An account without a record has none."""

    #: micro-USD; None: no limit
    limit: int | None = None
    window: Window = "total"
    #: the operator who set it; "" when it was made on first use
    by: str = ""
    at: int = 0


class Tally(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What was spent and is held on an account within one window."""

    spent: int = 0
    held: int = 0
    #: charged although it was not available
    overdraft: int = 0
    #: when it moved last, ms since the epoch
    at: int = 0


class Hold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An amount set aside, and what became of it. A spend entry is a hold that was committed at once."""

    state: HoldState
    session: str
    account: str
    amount: int
    #: the tallies that it stands on, from the root down: (account, window)
    on: tuple[tuple[str, str], ...]
    #: ms since the epoch
    at: int
    #: the session's lease: the hold ends with it
    lease: int = 0
    #: the claim that it is for: the hold ends with it
    task: str = ""
    fence: int = 0
    #: ms since the epoch; 0: it lives as long as its claim
    expires_at: int = 0
    #: what was asked when it was made, to tell a repetition from another request of the same name
    body: str = ""
    charged: int = 0
    overdraft: int = 0
    usage: Usage | None = None
    #: ms since the epoch; 0: it is open
    ended_at: int = 0
    #: why it ended, and for which request
    note: str = ""
    request: str = ""


encode = msgspec.json.Encoder().encode
_accounts = msgspec.json.Decoder(Account)
_tallies = msgspec.json.Decoder(Tally)
_holds = msgspec.json.Decoder(Hold)
_restores = msgspec.json.Decoder(Restore)
_reconciliations = msgspec.json.Decoder(Reconciled)


def account(kv: KV) -> Account:
    return record(_accounts, kv)


def tally(kv: KV) -> Tally:
    return record(_tallies, kv)


def hold(kv: KV) -> Hold:
    return record(_holds, kv)


def restore(kv: KV) -> Restore:
    return record(_restores, kv)


def reconciled(kv: KV) -> Reconciled:
    return record(_reconciliations, kv)


def account_key(name: str) -> bytes:
    return ACCOUNTS + name.encode()


def tally_key(name: str, window: str) -> bytes:
    return b"%s%s/%s" % (TALLIES, window.encode(), name.encode())


def hold_key(session: str, name: str) -> bytes:
    return b"%s%s/%s" % (HOLDS, session.encode(), name.encode())


def breaker_key(name: str) -> bytes:
    return BREAKERS + name.encode()
