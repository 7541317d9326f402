"""What the coordinator stores in etcd, and under which keys.

    tasks/<task>                     the task's record: one key a task, so that counting them counts tasks
    payloads/<task>  results/<task>  what was submitted with it, and what came of it (JSON)
    sessions/<session>               a live session; hangs on the session's lease and dies with it
    deadlines/<task>                 a claim with a time limit of its own; hangs on a lease of that length

Values are JSON, for `etcdctl get` to show. The record of a task says who did the last thing to it, under which fence
and with which request id: it is the truth that events and audit are made from.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from ifabric.store.base import KV, Compare, record, unchanged
from ifabric.wire.coordinator import State, TaskSpec
from ifabric_actors.governor.matching import Offer

TASKS, PAYLOADS, RESULTS = b"tasks/", b"payloads/", b"results/"
SESSIONS, DEADLINES = b"sessions/", b"deadlines/"
PUBLISHER_KEY = b"fabric/event-publisher"

#: lines of history that a record keeps
HISTORY_MAX = 8


class Entry(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """One transition: when (ms since the epoch), what, by which session, under which fence, why, for which request."""

    at: int
    event: str
    session: str = ""
    fence: int = 0
    note: str = ""
    request: str = ""


class TaskHold(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The money that is held for a claim: the hold's name, its account and amount (micro-USD), the tallies that it stands
    on, as (account, window) from the root down, and since when (ms since the epoch).
    """

    name: str
    account: str
    amount: int
    on: tuple[tuple[str, str], ...]
    at: int


class Task(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A task's record. `spec.payload` is always None here: the payload has a key of its own."""

    spec: TaskSpec
    state: State
    #: sha256 of the spec as submitted, to tell a resubmission from another task of the same name
    body: str
    #: position in its submission; with the key's create revision, the order of the board
    order: int = 0
    #: of the last grant: its number for this task, and what the holder was told
    generation: int = 0
    fence: int = 0
    attempt: int = 0
    #: the holder, the lease that its session had, and that of the claim's own deadline
    session: str = ""
    lease: int = 0
    deadline_lease: int = 0
    hold: TaskHold | None = None
    payload: bool = False
    result: bool = False
    error: str = ""
    history: tuple[Entry, ...] = ()
    #: how many lines of the history this write added
    fresh: int = 1


class Session(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A live session. Its lease is that of its key."""

    ttl_s: int
    capabilities: tuple[str, ...] = ()
    #: labels; empty: any task
    accepts: tuple[str, ...] = ()
    account: str | None = None
    at: int = 0


class Stored(NamedTuple):
    """A task as the daemon knows it, and at which modification."""

    task: Task
    mod_revision: int
    create_revision: int


class Seat(NamedTuple):
    """A session as the daemon knows it. It is alive as long as its key hangs on this lease."""

    session: Session
    lease: int
    mod_revision: int
    capabilities: frozenset[str]

    @property
    def offer(self) -> Offer:
        """What matching weighs."""
        return Offer(self.capabilities, frozenset(self.session.accepts))


encode = msgspec.json.Encoder().encode
_tasks = msgspec.json.Decoder(Task)
_sessions = msgspec.json.Decoder(Session)


def stored(kv: KV) -> Stored:
    """The task at a key. `Internal`, naming the key, when it is not one of ours."""
    return Stored(record(_tasks, kv), kv.mod_revision, kv.create_revision)


def seat(kv: KV) -> Seat:
    """The session at a key."""
    session = record(_sessions, kv)
    return Seat(session, kv.lease, kv.mod_revision, frozenset(session.capabilities))


def as_seen(key: bytes, seen: Stored) -> Compare:
    """The task is as it was when it was read."""
    return unchanged(key, seen.mod_revision)


def task_key(task: str) -> bytes:
    return TASKS + task.encode()


def session_key(session: str) -> bytes:
    return SESSIONS + session.encode()


def deadline_key(task: str) -> bytes:
    return DEADLINES + task.encode()


def body_digest(spec: TaskSpec) -> str:
    """Tells a task's body from another's, whatever the order of the payload's keys."""
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()[:32]
