"""What the runtime's tests put around an actor: a bus that a test plays by hand, and numbers instead of metrics."""

from __future__ import annotations

import asyncio
from collections import Counter as Counts
from collections.abc import Mapping
from typing import Any, Self

import msgspec
import structlog

from ifabric.actor.base import Actor, Context
from ifabric.actor.pulse import Pulse
from ifabric.actor.runner import Runner
from ifabric.errors import TooLarge
from ifabric.testing.clock import VirtualClock

MAX_PAYLOAD_BYTES = 10_000


class Message:
    """A request. `answer` is done with ("ok" | status | "dropped", the body)."""

    def __init__(self, subject: str, data: bytes, headers: Mapping[str, str], reply: str = "_INBOX.test") -> None:
        self.subject, self.data, self.headers, self.reply = subject, data, headers, reply
        self.answer: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()

    def _end(self, outcome: Any, body: bytes = b"null") -> None:
        assert not self.answer.done(), "a message is answered once"
        self.answer.set_result((outcome, msgspec.json.decode(body)))

    async def respond(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        if len(data) > MAX_PAYLOAD_BYTES:
            raise TooLarge("the answer is too large")
        self._end("ok", data)

    async def respond_error(self, status: int, sentence: str, data: bytes) -> None:
        self._end(status, data)

    def drop(self) -> None:
        self._end("dropped")

    async def outcome(self) -> tuple[Any, Any]:
        async with asyncio.timeout(5):
            return await self.answer

    async def code(self) -> str:
        """The error's code."""
        return str((await self.outcome())[1]["error"]["code"])


class FakeService:
    id = "fake"

    def __init__(self, bus: FakeBus) -> None:
        self._bus = bus

    async def drain(self) -> None:
        self._bus.sinks = {}

    def statistics(self) -> Mapping[str, Any]:
        return {}


class FakeBus:
    """Its `send` calls an endpoint's sink, as the connection's read loop does."""

    def __init__(self) -> None:
        self.sinks: dict[str, Any] = {}
        self.metadata: dict[str, Mapping[str, str]] = {}
        self.served = 0

    async def serve(self, name: str, version: str, description: str, endpoints: Any) -> FakeService:
        await asyncio.sleep(0)
        self.sinks = {endpoint.subject: endpoint.sink for endpoint in endpoints}
        self.metadata = {endpoint.name: endpoint.metadata for endpoint in endpoints}
        self.served += 1
        return FakeService(self)

    def send(
        self, verb: str, body: object = None, *, session: str = "a-1", admin: bool = False, **options: Any
    ) -> Message:
        """Hands over one request. `options`: `headers`, `raw` (instead of `body`), `reply`."""
        head = f"if.v1.{'admin.' if admin else ''}probe.{verb}."
        data = options.pop("raw", None)
        message = Message(
            head + session,
            msgspec.json.encode(body if body is not None else {}) if data is None else data,
            options.pop("headers", {}),
            **options,
        )
        self.sinks[head + "*"](message)
        return message


class _Number:
    def __init__(self, counts: Counts[str], key: str) -> None:
        self._counts, self._key = counts, key

    def inc(self, amount: float = 1) -> None:
        self._counts[self._key] += int(amount)

    def set(self, value: float) -> None:
        self._counts[self._key] = int(value)

    def observe(self, value: float) -> None:
        self._counts[self._key] += 1


class FakeMetrics:
    """`counts["if_actor_dropped_total frozen"]`: the name and the last label's value."""

    def __init__(self) -> None:
        self.counts: Counts[str] = Counts()

    def counter(self, name: str, **labels: str) -> _Number:
        last = list(labels.values())[-1]
        return _Number(self.counts, f"{name} {last}")

    gauge = histogram = counter


class Stage:
    """A runner with everything around it, on a virtual clock."""

    def __init__(self, component: type[Actor], **limits: Any) -> None:
        self.clock = VirtualClock()
        self.bus = FakeBus()
        self.metrics = FakeMetrics()
        self.logged: list[Mapping[str, Any]] = []
        self.pulse = Pulse(self.clock)
        self.actors: list[Any] = []
        log = structlog.wrap_logger(None, processors=[self._keep])
        self.context = Context(
            store=None,  # type: ignore[arg-type]
            bus=self.bus,  # type: ignore[arg-type]
            committer=None,  # type: ignore[arg-type]
            clock=self.clock,
            metrics=self.metrics,  # type: ignore[arg-type]
            config=None,
            settings=None,
            log=log,
        )
        self._component = component
        self.runner = Runner(self._make, component, self.context, self.pulse, **limits)

    def _make(self, context: Context) -> Actor:
        self.actors.append(self._component(context))
        return self.actors[-1]

    def _keep(self, _: Any, level: str, event: Mapping[str, Any]) -> Any:
        self.logged.append({"level": level, **event})
        raise structlog.DropEvent

    @property
    def actor(self) -> Any:
        """The newest instance."""
        return self.actors[-1]

    async def __aenter__(self) -> Self:
        await self.pulse.start()
        await self.runner.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.clock.run(self.runner.stop())
        await self.pulse.stop()
