"""What a record says of a message, and how it is chained to the one before it.

A record tells who asked for what, and what became of it; of the content it has names and numbers alone. Never a payload,
a result, a module, a header or a secret: which fields of a message are told is one table, and a class of messages is
held against it once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from ifabric.clock import rfc3339
from ifabric.errors import FabricError
from ifabric.handling import Handling, Outcome
from ifabric.wire.audit import NONE_BEFORE, AuditRecord, hash_of
from ifabric.wire.envelope import Mutation, encode

#: characters of the sentence of a refusal
WHY_MAX = 200
#: after the sentence when the command may have been carried out all the same
MAYBE = " (it may have been carried out)"
#: of a name: those of our own messages are shorter
NAME_MAX = 640
#: what one record takes, with the line's end: every field is bounded
RECORD_MAX_BYTES = 8192
#: a message's field -> the record's, the first that is there counts
_NAMES = (
    ("task", "task"), ("account", "account"), ("parent", "account"), ("hold", "hold"), ("breaker", "breaker"),
    ("module", "module"), ("run", "subject"), ("agent", "subject"), ("name", "subject"), ("upload", "subject"),
    ("subject", "subject"),
)  # fmt: skip
_AMOUNTS = ("amount_micro_usd", "hold_micro_usd", "cost_micro_usd", "limit_micro_usd")
#: what there may be several of
_SEVERAL = ("tasks", "claims", "entries", "count")
#: what a reply tells that its request could not: whatever was chosen or numbered
_REPLIED = (
    ("task", "task"), ("fence", "fence"), ("hold", "hold"), ("module", "module"), ("run", "subject"),
)  # fmt: skip
#: refusals that may show a part of what was sent, in quotes
_SHOWING = frozenset(("bad_request",))
_SHOWN = re.compile(r"['\"].*['\"]|(?<=unknown field )`.*`(?= - at )|(?<=unknown field )`.*`", re.DOTALL)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class _Brief(msgspec.Struct):
    """Of a reply that stands as it was first sent: only what a record tells."""

    task: str | None = None
    fence: int | None = None
    hold: str | None = None
    module: str | None = None
    run: str | None = None


_briefs = msgspec.json.Decoder(_Brief)


class _Plan(NamedTuple):
    """What is told of one class of messages: (field of the message, field of the record)."""

    names: tuple[tuple[str, str], ...]
    fence: bool
    amount: str | None
    several: str | None
    replied: tuple[tuple[str, str], ...]


def _plan(kind: type) -> _Plan:
    fields = frozenset(getattr(kind, "__struct_fields__", ()))
    names: dict[str, str] = {}
    for name, told in _NAMES:
        if name in fields:
            names.setdefault(told, name)
    if {"entry", "amount_micro_usd"} <= fields:  # holds and spend entries share their names
        names.setdefault("hold", "entry")
    if {"breaker", "state"} <= fields:  # what an operator has put it to
        names.setdefault("subject", "state")
    reply = getattr(kind, "reply", None)
    answered = frozenset(getattr(reply, "__struct_fields__", ())) if issubclass(kind, Mutation) else frozenset()
    taken = {*names, *(("fence",) if "fence" in fields else ())}
    return _Plan(
        tuple((name, told) for told, name in names.items()),
        "fence" in fields,
        next((name for name in _AMOUNTS if name in fields), None),
        next((name for name in _SEVERAL if name in fields), None),
        tuple((name, told) for name, told in _REPLIED if name in answered and told not in taken),
    )


_plans: dict[type, _Plan] = {}


def about(handling: Handling) -> dict[str, Any]:
    """The fields of its record that are the message's own."""
    told: dict[str, Any] = {}
    message = handling.message
    if message is not None:
        kind = type(message)
        plan = _plans.get(kind) or _plans.setdefault(kind, _plan(kind))
        for name, field in plan.names:
            if isinstance(value := getattr(message, name), str):
                told[field] = value if len(value) <= NAME_MAX else value[:NAME_MAX]
        if plan.fence and (fence := message.fence):
            told["fence"] = fence
        if plan.amount is not None:
            told["amount_micro_usd"] = getattr(message, plan.amount)
        if plan.several is not None:
            several = getattr(message, plan.several)
            told["count"] = several if several is None or isinstance(several, int) else len(several)
        if plan.replied and handling.reply is not None:
            _tell_replied(told, plan.replied, handling.reply)
        if request_id := handling.request_id:
            told["request_id"] = request_id
    if (error := handling.error) is not None:
        told["code"] = error.code
        told["why"] = reason(error)
    if handling.trace and _TRACEPARENT.fullmatch(handling.trace):
        told["trace"] = handling.trace
    return told


def _tell_replied(told: dict[str, Any], fields: Sequence[tuple[str, str]], reply: Any) -> None:
    if isinstance(reply, msgspec.Raw):  # a receipt: the first answer, given again
        try:
            reply = _briefs.decode(reply)
        except msgspec.MsgspecError:
            return
    for name, field in fields:
        value = getattr(reply, name, None)
        if value is not None:
            told[field] = value


def reason(error: FabricError) -> str:
    """What a record says of a refusal: also that it is not known to be one, as when etcd did not answer a commit."""
    told = why(error.code, error.message)
    return f"{told[: WHY_MAX - len(MAYBE)]}{MAYBE}" if error.facts.get("maybe_done") else told


def why(code: str, sentence: str) -> str:
    """The sentence of a refusal without what it shows of the message, and not longer than a record has room for."""
    if code in _SHOWING:
        sentence = _SHOWN.sub("…", sentence)
    return sentence if len(sentence) <= WHY_MAX else sentence[: WHY_MAX - 1] + "…"


class Chain:
    """One life's records, from the first on. What it gives out is to be kept: the next one has its hash."""

    def __init__(self, chain: str, daemon: str) -> None:
        self.chain = chain
        self._daemon = daemon
        #: the number and the hash of the newest
        self.n = 0
        self.hash = NONE_BEFORE

    def of(self, handling: Handling, wall_ms: int) -> bytes:
        """The next record: of a message, known at that moment."""
        return self._next(
            wall_ms,
            handling.component,
            handling.verb,
            handling.outcome,
            handling.admin,
            handling.session,
            round((handling.ended - handling.arrived) * 1000, 3),
            about(handling),
        )

    def own(self, verb: str, wall_ms: int, *, why: str = "", count: int | None = None) -> bytes:
        """The next record: the audit's own (`ifabric.wire.audit` names the verbs)."""
        return self._next(wall_ms, "fabric", verb, "ok", False, "", 0.0, {"why": why[:WHY_MAX], "count": count})

    def _next(
        self,
        wall_ms: int,
        component: str,
        verb: str,
        outcome: Outcome,
        admin: bool,
        session: str,
        took_ms: float,
        told: dict[str, Any],
    ) -> bytes:
        n = self.n + 1
        data = encode(
            AuditRecord(
                at=rfc3339(wall_ms),
                chain=self.chain,
                n=n,
                prev=self.hash,
                component=component,
                verb=verb,
                outcome=outcome,
                admin=admin,
                session=session,
                took_ms=took_ms,
                daemon=self._daemon,
                **told,
            )
        )
        self.n, self.hash = n, hash_of(data)
        return data


class Key(msgspec.Struct, frozen=True):
    """Of a record that was written: what says where it belongs."""

    component: str
    verb: str
    chain: str
    n: int
    at: str
    daemon: str = ""


_keys = msgspec.json.Decoder(Key)
_WORD = re.compile(r"[A-Za-z0-9_-]+")


def key_of(data: bytes) -> Key | Literal[False]:
    """Where a record belongs; False when it is none, also when what it names could not be in a subject."""
    try:
        key = _keys.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return key if _WORD.fullmatch(key.component) and _WORD.fullmatch(key.verb) else False
