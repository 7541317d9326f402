"""The bus's twin: core NATS and a journal in memory, with faults on demand.

Several `MemoryBus` connections share one `MemoryHub`. `tests/conformance/test_bus.py` holds it to what NATS does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ifabric.bus.base import (
    Answer,
    Endpoint,
    Headers,
    Incoming,
    Journal,
    JournalSpec,
    Objects,
    ObjectSpec,
    Service,
    Subscription,
)
from ifabric.clock import seeded
from ifabric.errors import TooLarge, Unavailable
from ifabric.testing.memory_journal import ConnectedJournal, MemoryJournal, matches
from ifabric.testing.memory_objects import MemoryBucket, MemoryObjects
from ifabric.wire import subjects
from ifabric.wire.envelope import ERROR_CODE_HEADER, ERROR_HEADER, encode

PAYLOAD_MAX = 1024 * 1024


@dataclass(eq=False)
class _Interest:
    bus: MemoryBus
    pattern: str
    queue: str
    take: Callable[[MemoryMessage], None]


class MemoryMessage:
    """A delivered message."""

    def __init__(self, bus: MemoryBus, subject: str, data: bytes, headers: Headers, reply: str) -> None:
        self._bus = bus
        self._done = False
        self._answered: Callable[[str | None], None] | None = None
        self.subject = subject
        self.data = data
        self.headers = headers
        self.reply = reply

    async def respond(self, data: bytes, headers: Headers | None = None) -> None:
        if len(data) > PAYLOAD_MAX:
            raise TooLarge(f"the answer has {len(data)} bytes, more than NATS carries")
        self._end(None)
        if self.reply:
            await self._bus.publish(self.reply, data, headers)

    async def respond_error(self, status: int, sentence: str, data: bytes) -> None:
        self._end(f"{status}:{sentence}")
        if self.reply:
            await self._bus.publish(self.reply, data, {ERROR_HEADER: sentence, ERROR_CODE_HEADER: str(status)})

    def drop(self) -> None:
        self._end(None)

    def counted_by(self, answered: Callable[[str | None], None]) -> MemoryMessage:
        """Tells an endpoint's statistics of the answer."""
        self._answered = answered
        return self

    def _end(self, error: str | None) -> None:
        assert not self._done, "a message is answered once"
        self._done = True
        if self._answered is not None:
            self._answered(error)


class MemoryHub:
    """What the connections share: interests, journals, and a seed for who of a queue group gets what."""

    def __init__(self, seed: int = 0) -> None:
        self.interests: list[_Interest] = []
        self.journals: dict[str, MemoryJournal] = {}
        self.buckets: dict[str, MemoryBucket] = {}
        self.chance = seeded(seed)
        self.inboxes = 0
        self.services = 0
        #: faults: that many next answers to requests are lost
        self.lose_replies = 0

    def deliver(self, subject: str, data: bytes, headers: Headers, reply: str) -> int:
        """To every plain interest, and to one member of each queue group; how many got it."""
        if len(data) > PAYLOAD_MAX:
            raise TooLarge("the message is larger than NATS carries; it was not sent")
        if self.lose_replies and subject.startswith(subjects.INBOX):
            self.lose_replies -= 1
            return 1
        for journal in self.journals.values():
            journal.offer(subject, data, headers)
        groups: dict[str, list[_Interest]] = {}
        chosen: list[_Interest] = []
        for interest in self.interests:
            if matches(interest.pattern, subject):
                if interest.queue:
                    groups.setdefault(interest.queue, []).append(interest)
                else:
                    chosen.append(interest)
        chosen += [self.chance.choice(members) for members in groups.values()]
        for interest in chosen:
            interest.take(MemoryMessage(interest.bus, subject, data, headers, reply))
        return len(chosen)


class MemoryBus:
    """One connection."""

    def __init__(self, hub: MemoryHub) -> None:
        self.hub = hub
        self._connected = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self.spoofed = 0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self._connected = True

    async def close(self) -> None:
        self._connected = False
        self.hub.interests = [one for one in self.hub.interests if one.bus is not self]
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.lost.done():
            self.lost.set_result("closed")

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def max_payload_bytes(self) -> int:
        """As NATS's own default."""
        return 1 << 20

    def disconnect(self, *, connected: bool = False) -> None:
        """A fault: the connection is gone, or (`connected`) back."""
        self._connected = connected

    def _check(self) -> None:
        if not self._connected:
            raise Unavailable("not connected to NATS", what="nats", reason="disconnected")

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        self._check()
        self.hub.deliver(subject, data, headers or {}, reply)

    async def request(self, subject: str, data: bytes, *, timeout_s: float, headers: Headers | None = None) -> Answer:
        self._check()
        self.hub.inboxes += 1
        inbox = f"_INBOX.memory.{self.hub.inboxes}"
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def take(message: MemoryMessage) -> None:
            if not future.done():
                future.set_result(Answer(message.data, message.headers))

        interest = _Interest(self, inbox, "", take)
        self.hub.interests.append(interest)
        try:
            if not self.hub.deliver(subject, data, headers or {}, inbox):
                raise Unavailable("nobody answers on this subject", what="nats", reason="no_responders")
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise Unavailable("no answer in time", what="nats", reason="timeout") from None
        finally:
            if interest in self.hub.interests:
                self.hub.interests.remove(interest)

    async def ask_all(self, subject: str, data: bytes, *, within_s: float, answers_max: int = 10_000) -> list[Answer]:
        self.hub.inboxes += 1
        inbox = f"_INBOX.memory.{self.hub.inboxes}"
        answers: list[Answer] = []

        def take(message: Incoming) -> None:
            if len(answers) < answers_max:
                answers.append(Answer(message.data, message.headers))

        subscription = await self.subscribe(inbox, take)
        try:
            if self.hub.deliver(subject, data, {}, inbox):
                await asyncio.sleep(within_s)
        finally:
            await subscription.unsubscribe()
        return answers

    async def subscribe(
        self, subject: str, handler: Callable[[Incoming], Awaitable[None] | None], *, queue: str = ""
    ) -> Subscription:
        self._check()
        waiting: asyncio.Queue[MemoryMessage] = asyncio.Queue()

        async def run() -> None:
            while True:
                outcome = handler(await waiting.get())
                if inspect.isawaitable(outcome):
                    await outcome

        task = asyncio.create_task(run(), name=f"memory subscription {subject}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        interest = _Interest(self, subject, queue, waiting.put_nowait)
        self.hub.interests.append(interest)
        return _Subscription(self.hub, interest, task)

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Service:
        self._check()
        self.hub.services += 1
        service = MemoryService(self, f"memory{self.hub.services}", name, version, description)
        for endpoint in endpoints:
            service.add(endpoint)
        return service

    async def journal(self, spec: JournalSpec | str) -> Journal:
        self._check()
        name = spec if isinstance(spec, str) else spec.name
        if name not in self.hub.journals:
            if isinstance(spec, str):
                raise Unavailable(f"JetStream does not answer: there is no stream {name}", what="jetstream")
            self.hub.journals[name] = MemoryJournal(spec, self.hub.deliver)
        return ConnectedJournal(self.hub.journals[name], self._check)

    async def objects(self, spec: ObjectSpec | str) -> Objects:
        self._check()
        name = spec if isinstance(spec, str) else spec.name
        if isinstance(spec, ObjectSpec):
            self.hub.buckets.setdefault(name, MemoryBucket(spec)).spec = spec
        elif name not in self.hub.buckets:
            raise Unavailable(f"JetStream does not answer: there is no bucket {name}", what="jetstream")
        return MemoryObjects(self.hub.buckets[name], self._check)


class _Subscription:
    def __init__(self, hub: MemoryHub, interest: _Interest, task: asyncio.Task[None]) -> None:
        self._hub, self._interest, self._task = hub, interest, task

    async def unsubscribe(self) -> None:
        if self._interest in self._hub.interests:
            self._hub.interests.remove(self._interest)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@dataclass
class _Count:
    endpoint: Endpoint
    requests: int = 0
    errors: int = 0
    last_error: str = ""


class MemoryService:
    """A micro service, discoverable as ADR-32 has it."""

    def __init__(self, bus: MemoryBus, ident: str, name: str, version: str, description: str) -> None:
        self.id = ident
        self._bus = bus
        self._about = {"name": name, "id": ident, "version": version, "metadata": {}}
        self._description = description
        self._counts: list[_Count] = []
        self._interests: list[_Interest] = []
        for verb in ("PING", "INFO", "STATS"):
            for pattern in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{ident}"):
                self._listen(pattern, "", self._discovery(verb))

    def add(self, endpoint: Endpoint) -> None:
        """Starts an endpoint."""
        count = _Count(endpoint)
        self._counts.append(count)

        def answered(error: str | None) -> None:
            if error is not None:
                count.errors += 1
                count.last_error = error

        def take(message: MemoryMessage) -> None:
            if message.reply and not subjects.may_answer(message.reply):
                self._bus.spoofed += 1
                return
            count.requests += 1
            endpoint.sink(message.counted_by(answered))

        self._listen(endpoint.subject, str(self._about["name"]), take)

    def _listen(self, pattern: str, queue: str, take: Callable[[MemoryMessage], None]) -> None:
        interest = _Interest(self._bus, pattern, queue, take)
        self._interests.append(interest)
        self._bus.hub.interests.append(interest)

    def _discovery(self, verb: str) -> Callable[[MemoryMessage], None]:
        def take(message: MemoryMessage) -> None:
            if subjects.may_answer(message.reply):
                self._bus.hub.deliver(message.reply, encode(self._answer(verb)), {}, "")

        return take

    def _answer(self, verb: str) -> Mapping[str, Any]:
        kind = {"PING": "ping", "INFO": "info", "STATS": "stats"}[verb]
        body: dict[str, Any] = {**self._about, "type": f"io.nats.micro.v1.{kind}_response"}
        if verb == "INFO":
            body["description"] = self._description
        if verb != "PING":
            body["endpoints"] = [
                {
                    "name": count.endpoint.name,
                    "subject": count.endpoint.subject,
                    "queue_group": self._about["name"],
                    "metadata": dict(count.endpoint.metadata),
                    **({} if verb == "INFO" else self._numbers(count)),
                }
                for count in self._counts
            ]
        return body

    @staticmethod
    def _numbers(count: _Count) -> dict[str, Any]:
        return {"num_requests": count.requests, "num_errors": count.errors, "last_error": count.last_error}

    async def drain(self) -> None:
        self._bus.hub.interests = [one for one in self._bus.hub.interests if one not in self._interests]

    def statistics(self) -> Mapping[str, Any]:
        return self._answer("STATS")
