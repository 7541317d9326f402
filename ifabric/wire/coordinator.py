"""The coordinator's messages. One class a verb; the class names its reply."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from ifabric.wire.envelope import (
    Capabilities,
    Fence,
    MicroUsd,
    Mutation,
    Reply,
    Request,
    SessionId,
    TaskId,
    Text,
    Usage,
)

#: tasks in one `submit`: they are created in one etcd transaction, all or none
SUBMIT_MAX_TASKS = 100
LIST_MAX_TASKS = 1000
RENEW_MAX_CLAIMS = 1000
WAIT_MAX_S = 60.0
TTL_MIN_S, TTL_MAX_S = 2, 3600

State = Literal["blocked", "pending", "claimed", "done", "dead", "cancelled"]
STATES: tuple[State, ...] = ("blocked", "pending", "claimed", "done", "dead", "cancelled")

Account = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,7}$(?!\n)", examples=["acme/research"])
]
Ttl = Annotated[int, Meta(ge=TTL_MIN_S, le=TTL_MAX_S, description="seconds")]


class TaskSpec(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """What a task is, as submitted. It never changes."""

    id: TaskId
    title: Text = ""
    #: capabilities that the session must have, and those it had better have
    needs: Capabilities = ()
    wants: Capabilities = ()
    #: what kind of task it is, for sessions that accept only some
    labels: Capabilities = ()
    #: higher first
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0
    depends_on: Annotated[tuple[TaskId, ...], Meta(max_length=64)] = ()
    max_attempts: Annotated[int, Meta(ge=1, le=1000)] = 3
    #: how long one claim may last, however often it is renewed
    deadline_s: Annotated[int, Meta(ge=1, le=86_400 * 7)] | None = None
    #: what all its attempts together may hold and spend; an account `task:<id>` at the end of the path
    budget_micro_usd: MicroUsd | None = None
    #: any JSON, up to `PAYLOAD_MAX_BYTES`
    payload: Any = None


class Transition(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a task's history."""

    at: str
    event: str
    session: str = ""
    fence: int = 0
    note: str = ""


class Hello(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Registers the session, or brings its capabilities up to date."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "hello"
    capabilities: Capabilities = ()
    #: the session takes only tasks with one of these labels; empty: any task
    accepts: Capabilities = ()
    account: Account | None = None
    ttl_s: Ttl | None = None


class HelloReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    session: str
    ttl_s: float
    incarnation: int
    account: str | None = None


class Submit(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Creates tasks, all or none. A task that exists with the same body is left as it is."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "submit"
    tasks: Annotated[tuple[TaskSpec, ...], Meta(min_length=1, max_length=SUBMIT_MAX_TASKS)]
    #: ids among `tasks` that arrive done (a board's checked items)
    done: Annotated[tuple[TaskId, ...], Meta(max_length=SUBMIT_MAX_TASKS)] = ()


class SubmitReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    created: tuple[str, ...]
    existing: tuple[str, ...]


class Claim(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Takes one task by its id."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "claim"
    task: TaskId
    hold_micro_usd: MicroUsd | None = None


class ClaimReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    task: str
    fence: int
    attempt: int
    #: what is left of the session's lease, at most
    ttl_s: float
    spec: TaskSpec
    hold: str | None = None
    #: the session held it already
    again: bool = False


class Next(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Takes the best pending task that the session can do; with `wait_s`, waits for one."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "next"
    hold_micro_usd: MicroUsd | None = None
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] = 0.0


class HeldClaim(Struct, frozen=True):
    """A claim as its holder knows it."""

    task: TaskId
    fence: Fence


class Renew(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Keeps the session's lease, and with it every claim of the session."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "renew"
    claims: Annotated[tuple[HeldClaim, ...], Meta(max_length=RENEW_MAX_CLAIMS)] = ()


class RenewReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    ttl_s: float
    lost: tuple[HeldClaim, ...]
    cancelled: tuple[HeldClaim, ...]
    #: held, but not in `claims`: a claim whose reply was lost
    unnamed: tuple[HeldClaim, ...]


class Release(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Gives the task back. It costs no attempt."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "release"
    task: TaskId
    fence: Fence
    reason: Text = ""


class StateReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    state: State


class Complete(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """The work is done. Tasks that waited for it alone become pending in the same transaction."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "complete"
    task: TaskId
    fence: Fence
    result: Any = None
    #: charged in the same transaction, to the claim's hold or without one; absent: the hold is freed and nothing charged
    cost_micro_usd: MicroUsd | None = None
    usage: Usage | None = None


class CompleteReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    state: State
    unblocked: tuple[str, ...]
    #: micro-USD, when a cost was told; and how much of it was not available
    charged: int | None = None
    overdraft: int = 0


class Fail(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """The attempt failed. With attempts left (and `retry`) the task is pending again, else it is dead."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "fail"
    task: TaskId
    fence: Fence
    error: Text
    retry: bool = True
    #: as in `complete`: an attempt that failed may have cost something
    cost_micro_usd: MicroUsd | None = None
    usage: Usage | None = None


class FailReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    state: State
    attempt: int
    max_attempts: int
    charged: int | None = None
    overdraft: int = 0


class Get(Request, frozen=True, kw_only=True, omit_defaults=True):
    """One task, as committed."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "get"
    task: TaskId


class GetReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    task: str
    state: State
    attempt: int
    fence: int = 0
    session: str | None = None
    spec: TaskSpec
    result: Any = None
    error: str = ""
    #: dependencies that are not done yet
    waiting_for: tuple[str, ...] = ()
    history: tuple[Transition, ...]
    revision: int


class List(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Tasks in the order of their ids, a page at a time, with the count of each state.

    A page ends at its limit, or earlier when it would grow too large for one message.
    """

    component: ClassVar = "coordinator"
    verb: ClassVar = "list"
    state: State | None = None
    limit: Annotated[int, Meta(ge=1, le=LIST_MAX_TASKS)] = 100
    after: TaskId | None = None
    #: only those with this in their id or title, in capitals or not
    match: Annotated[str, Meta(max_length=128)] | None = None


class TaskLine(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A task in a list."""

    task: str
    state: State
    title: str = ""
    priority: int = 0
    needs: tuple[str, ...] = ()
    session: str | None = None
    attempt: int = 0
    max_attempts: int = 0
    fence: int = 0


class ListReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    tasks: tuple[TaskLine, ...]
    #: give it as `after` for the next page; absent on the last
    after: str | None = None
    counts: dict[str, int]


class Bye(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Ends the session and releases what it holds."""

    component: ClassVar = "coordinator"
    verb: ClassVar = "bye"


class ByeReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    released: tuple[str, ...]


class _Admin(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    component: ClassVar = "coordinator"
    admin: ClassVar = True
    task: TaskId


class Cancel(_Admin, frozen=True, kw_only=True, omit_defaults=True):
    """Takes the task off the board; a holder is told at its next renewal."""

    verb: ClassVar = "cancel"


class Requeue(_Admin, frozen=True, kw_only=True, omit_defaults=True):
    """Puts a dead or cancelled task back, with all its attempts."""

    verb: ClassVar = "requeue"


class Purge(_Admin, frozen=True, kw_only=True, omit_defaults=True):
    """Deletes a task that is done, dead or cancelled, with its payload and result."""

    verb: ClassVar = "purge"


REPLIES: dict[type[Request], type[Reply]] = {
    Hello: HelloReply,
    Submit: SubmitReply,
    Claim: ClaimReply,
    Next: ClaimReply,
    Renew: RenewReply,
    Release: StateReply,
    Complete: CompleteReply,
    Fail: FailReply,
    Get: GetReply,
    List: ListReply,
    Bye: ByeReply,
    Cancel: StateReply,
    Requeue: StateReply,
    Purge: StateReply,
}
for _request, _reply in REPLIES.items():
    _request.reply = _reply

REQUESTS: tuple[type[Request], ...] = tuple(REPLIES)
#: the events of protocol 1 that the coordinator causes, each under ``if.v1.event.task``
EVENTS = (
    "submitted", "claimed", "renew_lost", "released", "expired", "completed", "failed", "dead", "unblocked", "cancelled",
)  # fmt: skip
#: and what protocol 1 gained since: put back by an operator, deleted, and "events were lost, list the board"
FURTHER_EVENTS = ("requeued", "purged", "resync")


class TaskEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was committed to a task, as published under ``if.v1.event.task``."""

    event: str
    at: str
    revision: int
    #: absent on `resync` only
    task: str = ""
    #: the state after it; absent when the task is gone
    state: State | None = None
    session: SessionId | None = None
    fence: int = 0
    attempt: int = 0
    note: str = ""
