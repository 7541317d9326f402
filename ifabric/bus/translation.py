"""From nats-py's errors to ours, and from ours to the headers of ADR-32."""

from __future__ import annotations

import nats.errors

from ifabric.bus.hardened import PermissionsViolation
from ifabric.errors import BadRequest, FabricError, Forbidden, TooLarge, Unavailable


def translate(error: Exception) -> FabricError:
    """The one table from nats-py's errors to ours."""
    if isinstance(error, PermissionsViolation):
        done = "it was not sent on" if error.what == "publish" else "nothing is heard on it"
        return Forbidden(f"{error}; {done}", what="nats", subject=error.subject)
    if isinstance(error, nats.errors.NoRespondersError):
        return Unavailable("nobody answers on this subject", what="nats", reason="no_responders")
    if isinstance(error, nats.errors.MaxPayloadError):
        return TooLarge("the message is larger than NATS carries; it was not sent")
    if isinstance(error, nats.errors.BadSubjectError | nats.errors.InvalidCallbackTypeError):
        return BadRequest(f"the subject is not one: {error}")
    if isinstance(error, nats.errors.TimeoutError | TimeoutError):
        return Unavailable("no answer in time; whether it was carried out is unknown", what="nats", reason="timeout")
    if isinstance(error, nats.errors.AuthorizationError):
        return Forbidden(f"NATS does not allow it: {error}", what="nats")
    return Unavailable(f"not connected to NATS ({error or type(error).__name__})", what="nats", reason="disconnected")


def shut_out(*, known: bool) -> Forbidden:
    """The server does not let this connection in, and would not later. `known`: it proves to be somebody."""
    who = "this credential" if known else "who has no credential"
    return Forbidden(
        f"NATS does not let {who} in{': it is unknown, revoked, or was given a new key' if known else ''}; nothing was sent. "
        "An operator makes one: `ifabric agent create NAME`",
        what="nats",
    )


def error_headers(status: int, sentence: str) -> dict[str, str]:
    """The headers of an error answer (ADR-32). A header is one line of text."""
    line = " ".join(sentence.split()).encode("ascii", "replace").decode()
    return {"Nats-Service-Error": line[:1000], "Nats-Service-Error-Code": str(status)}
