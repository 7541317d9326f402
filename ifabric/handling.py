"""What is being handled, by whom it was asked, and what became of it: for the log, the audit and the traces.

Each message is handled in a task of its own, so `CURRENT` is that message's, and that of everything that is done for
it. Who wants to know of every message is a *witness*: it is called once for each, when its fate is known and before
the sender is told, so what a witness has written down is there when the sender knows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ifabric.errors import FabricError

Outcome = Literal["ok", "refused", "error"]


class Handling:
    """One message, from its arrival to its fate. `arrived` and `ended` are on the clock's monotonic scale, in seconds."""

    __slots__ = (
        "admin",
        "arrived",
        "component",
        "ended",
        "error",
        "message",
        "outcome",
        "reply",
        "session",
        "span",
        "trace",
        "verb",
    )

    def __init__(
        self, component: str, verb: str, session: str, arrived: float, *, admin: bool = False, trace: str = ""
    ) -> None:
        self.component = component
        self.verb = verb
        self.admin = admin
        #: who asks; "" when the subject says nobody that could be
        self.session = session
        #: W3C traceparent as the sender gave it, or ""
        self.trace = trace
        self.arrived = arrived
        self.ended = arrived
        #: the decoded request; None when it could not be read
        self.message: Any = None
        #: what the handler returned; None unless `outcome` is ok
        self.reply: Any = None
        #: what the sender is refused with; None when `outcome` is ok
        self.error: FabricError | None = None
        self.outcome: Outcome = "ok"
        #: kept by whoever traces
        self.span: Any = None

    @property
    def request_id(self) -> str:
        """The id that a retry repeats, or ""."""
        return getattr(self.message, "request_id", None) or ""


Witness = Callable[[Handling], None]

#: None outside of any message
CURRENT: ContextVar[Handling | None] = ContextVar("handling", default=None)
