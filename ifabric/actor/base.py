"""What an actor is.

An actor owns one component's verbs. Its handlers are methods marked `@handles`; the annotation of the message is the
wire schema, so the table of handlers *is* the decoder. Handlers run concurrently on one event loop: between two
`await`s nobody else runs, so a decision made there needs no lock.

**The lifecycle.** `start` rebuilds everything from the store; when it returns the actor is ready. `stop` is called
once, after the last message was taken, and ends what the actor spawned. Both tolerate being called twice, `stop`
without `start`, and being cancelled. An instance is never started again: a restart makes a new one.

**Failing.** A `FabricError` from a handler is an answer. Any other exception is a bug: the caller is told `internal`,
it is logged and counted, and the actor goes on, because one poisonous message must not take the others' actor down.
Two things crash the actor, and its supervisor starts a new one from the store: a failed `assert` (its state is not to
be trusted), and the end of a task it spawned. Requests in flight then are answered `unavailable`; whether they were
carried out is found by a retry.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import msgspec

from ifabric.bus.base import Bus
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.handling import Handling, Tracer, Witness
from ifabric.store.base import Store
from ifabric.wire.envelope import Request

if TYPE_CHECKING:
    from ifabric.metrics import Metrics
    from ifabric.store.commit import Committer


P = TypeVar("P")


class Caller(NamedTuple):
    """Who asks: as proven by the subject, never by the payload."""

    session: str
    admin: bool = False
    #: on the clock's monotonic scale; None when the caller did not say
    deadline: float | None = None
    #: W3C traceparent, or ""
    trace: str = ""


class Parts:
    """What the residents of one process have in common: one of each kind, made by whoever asks first.

    Only for what outlives any of them, has no tasks of its own, and can be thrown away at any time.
    """

    def __init__(self) -> None:
        self._made: dict[type, Any] = {}

    def get(self, kind: type[P], make: Callable[[], P]) -> P:
        """The one there is, or a new one."""
        if kind not in self._made:
            self._made[kind] = make()
        found: P = self._made[kind]
        return found


@dataclass(frozen=True)
class System:
    """A daemon's way into NATS's system account, and the seed that signs what its auth callout is answered."""

    bus: Bus
    issuer_seed: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything an actor is given."""

    store: Store
    bus: Bus
    committer: Committer
    clock: Clock
    metrics: Metrics
    #: the actor's own section of the configuration, and the whole of it
    config: Any
    settings: Any
    log: Any
    parts: Parts = field(default_factory=Parts)
    #: only where NATS's auth callout is answered
    system: System | None = None
    #: told of every message that was handled, before its sender is
    witnesses: tuple[Witness, ...] = ()
    #: records spans of what is handled; None where nothing is traced
    tracer: Tracer | None = None

    def tell(self, handling: Handling) -> None:
        """Tells the witnesses: the runner of every message, and an actor of what came to it in another way."""
        for witness in self.witnesses:
            witness(handling)


class Handler(NamedTuple):
    """A verb: what its message is, how it is decoded, and who handles it."""

    message: type[Request]
    decoder: msgspec.json.Decoder[Any]
    function: Callable[[Any, Any, Caller], Awaitable[Any]]


F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def handles(function: F) -> F:
    """Marks a method as the handler of the message that its second parameter is annotated with."""
    function.__handles__ = True  # type: ignore[attr-defined]
    return function


class Actor:
    """The base of every actor. See the module's text for the contract."""

    component: ClassVar[str]
    version: ClassVar[str] = "1.0.0"
    description: ClassVar[str] = ""
    #: (verb, admin) -> handler
    handlers: ClassVar[Mapping[tuple[str, bool], Handler]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        table: dict[tuple[str, bool], Handler] = dict(cls.handlers)
        for name, function in vars(cls).items():
            if not getattr(function, "__handles__", False):
                continue
            message = _message_of(cls, name, function)
            key = (message.verb, message.admin)
            if key in table:
                taken = table[key].function.__qualname__
                raise TypeError(f"{cls.__name__}.{name}: {message.verb} has a handler already, {taken}")
            if message.component != getattr(cls, "component", None):
                raise TypeError(f"{cls.__name__}.{name}: {message.__name__} belongs to {message.component}")
            table[key] = Handler(message, msgspec.json.Decoder(message), function)
        cls.handlers = table

    def __init__(self, context: Context) -> None:
        self.context = context
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        #: done, with the reason, when the actor can no longer be trusted
        self.crashed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Rebuilds what the actor knows, and returns when it is ready."""

    async def stop(self) -> None:
        """Ends what the actor spawned. An override calls this too."""
        self._stopping = True
        await cancel_and_wait(*self._tasks)

    def draining(self) -> None:
        """No new message will come: whoever waits for something is to be answered now."""

    def crash(self, reason: str) -> None:
        """Ends this life of the actor; its supervisor starts the next."""
        if not self.crashed.done():
            self.crashed.set_result(reason)

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """A task of the actor's own that runs as long as it does. Its end, however it ends, is the actor's crash."""
        task = asyncio.create_task(coroutine, name=f"{self.component} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._stopping:
            return
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.context.log.error("a task of the actor failed", task=task.get_name(), exc_info=error)
        self.crash(f"{task.get_name()} ended: {error!r}" if error is not None else f"{task.get_name()} ended")


def _message_of(cls: type[Actor], name: str, function: Callable[..., Any]) -> type[Request]:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"{cls.__name__}.{name}: a handler is an `async def`")
    parameters = list(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function)
    message = hints.get(parameters[1]) if len(parameters) > 1 else None
    if not (isinstance(message, type) and issubclass(message, Request)):
        raise TypeError(f"{cls.__name__}.{name}: annotate the message with its class, a subclass of Request")
    return message
