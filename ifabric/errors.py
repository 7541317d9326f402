"""One tree of errors: what went wrong, whose fault it is, and whether to try again.

Every refusal of the fabric is an exception here, and travels over NATS as the two headers of ADR-32 plus a JSON body
(`to_body`, `from_body`). A subclass sets `code` (the word on the wire), `status` (the ADR-32 number) and `retryable`
(the same request may succeed later, unchanged). Its docstring is the default message: a complete sentence that says
what was not done. `facts` are the machine-readable part: `claim_taken` names the holder, `budget_short` the account.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

_BY_CODE: dict[str, type[FabricError]] = {}


class FabricError(Exception):
    """The fabric refused the request."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    #: the docstring, as one text
    default_message: ClassVar[str] = "The fabric refused the request."

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.default_message = inspect.cleandoc(cls.__doc__ or "") or cls.default_message
        if "code" in cls.__dict__:
            if cls.code in _BY_CODE:
                raise TypeError(f"error code {cls.code!r} is taken by {_BY_CODE[cls.code].__name__}")
            _BY_CODE[cls.code] = cls

    def __init__(self, message: str | None = None, **facts: Any) -> None:
        self.message = message or self.default_message
        self.facts = facts
        super().__init__(self.message)

    def to_body(self) -> dict[str, Any]:
        """The JSON body of an error reply: ``{"error": {"code", "message", "retryable", **facts}}``."""
        return {"error": {"code": self.code, "message": self.message, "retryable": self.retryable, **self.facts}}


class CallerError(FabricError):
    """The request cannot be carried out as it stands."""


class ServerError(FabricError):
    """The fabric could not carry out the request."""


def from_body(body: Any) -> FabricError:
    """The exception that a reply body stands for; an unknown code (a newer server) becomes a plain `FabricError`."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return FabricError(f"the reply is not an error body: {body!r}"[:300])
    facts = {k: v for k, v in error.items() if k not in ("code", "message", "retryable")}
    code = str(error.get("code"))
    kind = _BY_CODE.get(code)
    found = (kind or FabricError)(str(error.get("message") or code), **facts)
    if kind is None:
        found.facts["code"] = code
    return found


def all_codes() -> dict[str, type[FabricError]]:
    """Every error by its code, for the documentation."""
    return dict(_BY_CODE)


# -- the caller's fault: 400, 401, 403, 404, 409 ------------------------------------------------------------------


class BadRequest(CallerError):
    """The request is malformed; nothing was done."""

    code, status = "bad_request", 400


class TooLarge(CallerError):
    """The request is over a limit; nothing was done."""

    code, status = "too_large", 400


class Cycle(CallerError):
    """The tasks depend on each other in a circle; nothing was submitted."""

    code, status = "cycle", 400


class UnknownDependency(CallerError):
    """A task depends on one that does not exist; nothing was submitted."""

    code, status = "unknown_dependency", 400


class Unauthenticated(CallerError):
    """Who asks has not said who that is; nothing was done."""

    code, status = "unauthenticated", 401


class Forbidden(CallerError):
    """This session may not do that; nothing was done."""

    code, status = "forbidden", 403


class CapabilityMissing(CallerError):
    """The session lacks a capability that the task needs; nothing was claimed."""

    code, status = "capability_missing", 403


class UnknownTask(CallerError):
    """There is no task with this id."""

    code, status = "unknown_task", 404


class NoTaskMatches(CallerError):
    """No pending task can be taken by this session now; try again later or wait for one."""

    code, status, retryable = "no_task_matches", 404, True


class SessionLost(CallerError):
    """The session is not registered, or its lease has lapsed and its claims with it; say hello first."""

    code, status = "session_lost", 404


class ClaimTaken(CallerError):
    """Another session holds the task; nothing was claimed."""

    code, status = "claim_taken", 409


class ClaimLost(CallerError):
    """The claim with this fence is no longer held; nothing was changed. Stop working on the task."""

    code, status = "claim_lost", 409


class NotClaimable(CallerError):
    """The task is not in a state that allows this; nothing was changed."""

    code, status = "not_claimable", 409


class Conflict(CallerError):
    """The same id was used before with another body; nothing was done."""

    code, status = "conflict", 409


class UnknownAccount(CallerError):
    """There is no account of this name: nobody has set a limit for it or spent anything below it."""

    code, status = "unknown_account", 404


class UnknownAgent(CallerError):
    """There is no such agent."""

    code, status = "unknown_agent", 404


class UnknownHold(CallerError):
    """The session has no hold of this name, or it ended so long ago that it is forgotten; nothing was charged."""

    code, status = "unknown_hold", 404


class UnknownPermit(CallerError):
    """The permit was not given out by this fabric, was reported already, or timed out; the report was not counted."""

    code, status = "unknown_permit", 404


class BudgetShort(CallerError):
    """An account of the path has less than was asked for; nothing was held or charged."""

    code, status = "budget_short", 403


class UnknownModule(CallerError):
    """There is no module with this digest; put it first."""

    code, status = "unknown_module", 404


class UnknownRun(CallerError):
    """No run with this id has lasted longer than a second; nothing was ended."""

    code, status = "unknown_run", 404


class NotWasm(CallerError):
    """These bytes are not a WebAssembly module; nothing was kept."""

    code, status = "not_wasm", 400


class ModuleRefused(CallerError):
    """The module is one that no sandbox here runs; nothing was kept."""

    code, status = "module_refused", 400


class Trap(CallerError):
    """The guest did something that WebAssembly does not allow, and was ended there."""

    code, status = "trap", 400


class LimitReached(CallerError):
    """The run reached one of its limits and was ended there."""

    code, status = "limit", 403


class EgressDenied(CallerError):
    """The guest asked for what no endpoint of its run allows; nothing was sent, and the run was ended."""

    code, status = "egress_denied", 403


class Killed(CallerError):
    """An operator ended the run."""

    code, status = "killed", 409


class BreakerOpen(ServerError):
    """The resource has failed too often and is left alone for a while; nothing was admitted."""

    code, status, retryable = "breaker_open", 503, True


# -- a limit, or the server's side: 429, 500, 503 -----------------------------------------------------------------


class Overloaded(ServerError):
    """The fabric has as much work as it accepts; the request was not started. Try again later."""

    code, status, retryable = "overloaded", 429, True


class SandboxDied(ServerError):
    """The process that the guest ran in died with it; only this run is affected."""

    code, status = "sandbox_died", 500


class DeadlineExceeded(ServerError):
    """The work could not be finished before the caller's deadline; it was not started."""

    code, status, retryable = "deadline_exceeded", 503, True


class Unavailable(ServerError):
    """A part that the request needs cannot be reached; whether it was carried out is unknown. Retry with the same id."""

    code, status, retryable = "unavailable", 503, True


class StoreFull(ServerError):
    """etcd has reached its space quota; nothing new is accepted until it is compacted or given more room."""

    code, status, retryable = "store_full", 503, True


class Internal(ServerError):
    """The fabric has a bug; the request was not completed. It is logged with the request id."""

    code, status = "internal", 500


# -- not on the wire: the process and its operator ------------------------------------------------------------------


class ConfigError(FabricError):
    """The configuration is not usable; nothing was started."""


class StartupError(FabricError):
    """The process could not start."""


class Unreachable(FabricError):
    """No daemon, NATS or etcd answers at the given address."""
