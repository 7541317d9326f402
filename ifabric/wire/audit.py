"""The audit on the wire: what is in a record of the stream IF_AUDIT, and how records are chained.

A daemon's life is one *chain*. Its records are numbered from 1, and each has the SHA-256 of the one before it, over
the bytes that were stored: changing, leaving out or putting in between is seen by the next record. What the last one
is, the daemon writes to etcd again and again (`Head`): cutting the end off is seen there.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from msgspec import Struct
from msgspec.json import Decoder

#: `prev` of a chain's first record
NONE_BEFORE = "0" * 64
#: the verbs under ``if.v1.audit.fabric`` that are the audit's own: a life began, ended, and records that had to be dropped
BEGUN, ENDED, DROPPED = "begun", "ended", "dropped"


class AuditRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One command and its fate, under ``if.v1.audit.<component>.<verb>``; its message id is ``<chain>.<n>``."""

    #: when its fate was known, RFC 3339, by the daemon's clock
    at: str
    chain: str
    n: int
    prev: str
    component: str
    verb: str
    #: ok: carried out. refused: its sender was told no, `code` says why; it was not carried out, unless `why` says that it
    #: may have been (etcd did not answer in time, for instance). error: a bug of ours; it may have been carried out
    outcome: Literal["ok", "refused", "error"] = "ok"
    #: asked under ``if.v1.admin``
    admin: bool = False
    #: who asked, as the subject proves it; "" when it named nobody that could be
    session: str = ""
    #: of the refusal: the code of `ifabric.errors`, and its sentence
    code: str = ""
    why: str = ""
    request_id: str = ""
    #: what it was about, as far as it was about one thing
    task: str = ""
    fence: int = 0
    account: str = ""
    hold: str = ""
    breaker: str = ""
    module: str = ""
    #: an agent, a run, or whatever else the component names
    subject: str = ""
    amount_micro_usd: int | None = None
    #: how many things, when it was about several
    count: int | None = None
    #: W3C traceparent of the sender
    trace: str = ""
    took_ms: float = 0.0
    #: the daemon: host and process
    daemon: str = ""


class Head(Struct, frozen=True, kw_only=True):
    """How far a chain is, as its daemon has told etcd under ``audit/<chain>``."""

    chain: str
    n: int
    #: the SHA-256 of record `n`
    hash: str
    at: str
    daemon: str = ""
    ended: bool = False


records = Decoder(AuditRecord)
heads = Decoder(Head)


def hash_of(data: bytes) -> str:
    """What the next record has as `prev`."""
    return hashlib.sha256(data).hexdigest()


def message_id(chain: str, n: int) -> str:
    """By which the stream knows a record that it has already."""
    return f"{chain}.{n}"
