"""What is being handled, by whom it was asked, and what became of it: for the log, the audit and the traces.

Each message is handled in a task of its own, so `CURRENT` is that message's, and that of everything that is done for
it. Who wants to know of every message is a *witness*: it is called once for each, when its fate is known and before
the sender is told, so what a witness has written down is there when the sender knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from ifabric.errors import FabricError

Outcome = Literal["ok", "refused", "error"]
Attributes = Mapping[str, str | int | float | bool]


class Span(Protocol):
    """A part of a trace that is being recorded: there is one only where its trace is sampled."""

    @property
    def traceparent(self) -> str:
        """What another process is told to go on with this trace."""

    def child(self, name: str, attributes: Attributes | None = None, *, outward: bool = False) -> Span:
        """A part of this one, begun now. `outward`: somebody else is asked."""

    def note(self, attributes: Attributes) -> None:
        """Says more of it."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something happened in it, now."""

    def end(self, error: BaseException | None = None) -> None:
        """It is over. Twice is harmless."""


class Tracer(Protocol):
    """Records traces of what is handled."""

    def begin(self, handling: Handling) -> None:
        """Gives it a span, if its sender or chance says that it is traced."""

    def end(self, handling: Handling, *, answered: bool) -> None:
        """Its sender was answered, or will not be from here."""


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
        #: W3C traceparent as the sender gave it, or "" (who traces puts one here that begins with this message)
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
        #: what is recorded of it; None where nothing is
        self.span: Span | None = None

    @property
    def request_id(self) -> str:
        """The id that a retry repeats, or ""."""
        return getattr(self.message, "request_id", None) or ""


Witness = Callable[[Handling], None]

#: None outside of any message
CURRENT: ContextVar[Handling | None] = ContextVar("handling", default=None)


@contextmanager
def step(name: str, attributes: Attributes | None = None) -> Iterator[Span | None]:
    """A part of what is done for the present message: a span where the message has one, else None and nothing."""
    handling = CURRENT.get()
    if handling is None or handling.span is None:
        yield None
        return
    span = handling.span.child(name, attributes)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise
    span.end()
