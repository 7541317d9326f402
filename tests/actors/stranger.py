"""A hostile agent with a socket of its own, an honest one beside it, and the daemon that has to stand both."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from ifabric import errors
from ifabric.bus.base import Answer, Incoming
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import subjects
from ifabric.wire.envelope import ERROR_CODE_HEADER, ERROR_HEADER, Request

PATIENCE_S = 10.0


class Said(NamedTuple):
    """An answer: "ok" or the error's code, what it says, and the body."""

    code: str
    message: str
    body: dict[str, Any]


def read(answer: Answer) -> Said:
    """An answer, once header and body have been found to say the same."""
    body = msgspec.json.decode(answer.data)
    assert isinstance(body, dict), body
    status = answer.headers.get(ERROR_CODE_HEADER)
    assert (status is not None) == ("error" in body and set(body) == {"error"}), (answer.headers, body)
    if status is None:
        return Said("ok", "", body)
    error = body["error"]
    assert error["code"] in errors.all_codes(), error
    assert str(errors.all_codes()[error["code"]].status) == status, (status, error)
    assert error["message"], error
    assert isinstance(error["retryable"], bool), error
    assert answer.headers[ERROR_HEADER], answer.headers
    return Said(error["code"], error["message"], error)


def pub(subject: bytes, reply: bytes, data: bytes) -> bytes:
    """NATS's PUB, whatever is in it."""
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data)


def hpub(subject: bytes, reply: bytes, headers: bytes, data: bytes) -> bytes:
    """NATS's HPUB, with a header block of any bytes."""
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
        subject, reply, len(headers), len(headers) + len(data), headers, data,
    )  # fmt: skip


class Stranger:
    """A bare socket to NATS, which sends what no client library would."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._numbers = itertools.count()
        self._waiting: dict[bytes, asyncio.Future[Answer]] = {}
        self._pong: asyncio.Future[None] | None = None

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        self.write(b'CONNECT {"verbose":false,"headers":true,"pedantic":false}\r\nSUB _INBOX.stranger.* 1\r\n')
        self._reading = asyncio.create_task(self._read(), name="stranger")
        await self.flushed()

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        await self._writer.wait_closed()

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def flushed(self) -> None:
        """The server has taken all of it."""
        self._pong = asyncio.get_running_loop().create_future()
        self.write(b"PING\r\n")
        async with asyncio.timeout(PATIENCE_S):
            await self._pong

    async def ask(self, make: Callable[[bytes], bytes]) -> Said:
        """Sends what `make` makes of a reply subject, and waits for the answer there."""
        reply = b"_INBOX.stranger.%d" % next(self._numbers)
        future = self._waiting[reply] = asyncio.get_running_loop().create_future()
        self.write(make(reply))
        async with asyncio.timeout(PATIENCE_S):
            return read(await future)

    async def _read(self) -> None:
        while line := await self._reader.readline():
            words = line.split()
            if words[0] == b"PING":
                self.write(b"PONG\r\n")
            elif words[0] == b"PONG":
                if self._pong is not None and not self._pong.done():
                    self._pong.set_result(None)
            elif words[0] in (b"MSG", b"HMSG"):
                data = (await self._reader.readexactly(int(words[-1]) + 2))[:-2]
                head = int(words[-2]) if words[0] == b"HMSG" else 0
                lines = data[:head].decode().split("\r\n")[1:]
                headers = {name: value.strip() for name, _, value in (one.partition(":") for one in lines) if name}
                waiting = self._waiting.pop(words[1], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(Answer(data[head:], headers))


class Target:
    """The daemon, and who speaks to it."""

    honest = "honest"

    def __init__(self, daemon: RealDaemon, nats: str) -> None:
        self.daemon = daemon
        self.stranger = Stranger(nats)
        self._bus = Nats(NatsSettings(servers=(nats,)), SystemClock())
        self._numbers = itertools.count()

    async def open(self) -> None:
        await self._bus.connect()
        await self.stranger.open()
        await self.honestly("hello", ttl_s=600)

    async def close(self) -> None:
        await self.stranger.close()
        await self._bus.close()

    async def send(
        self, kind: type[Request], data: bytes, *, session: str = "me", headers: dict[str, str] | None = None
    ) -> Said:
        """One request of that verb, with any bytes in it."""
        subject = subjects.request("coordinator", kind.verb, session, admin=kind.admin)
        return read(await self._bus.request(subject, data, timeout_s=PATIENCE_S, headers=headers))

    async def send_all(self, cases: Sequence[tuple[type[Request], bytes]]) -> list[Said]:
        """Many at once, with an honest task taken and done in their midst."""
        *answers, _ = await asyncio.gather(*(self.send(kind, data) for kind, data in cases), self._honest_work())
        return answers

    async def honestly(self, verb: str, *, admin: bool = False, **body: Any) -> dict[str, Any]:
        """An honest request, which is served."""
        subject = subjects.request("coordinator", verb, self.honest, admin=admin)
        said = read(await self._bus.request(subject, msgspec.json.encode(body), timeout_s=PATIENCE_S))
        assert said.code == "ok", said
        return said.body

    async def _honest_work(self) -> None:
        task = f"honest-{next(self._numbers)}"
        await self.honestly("submit", tasks=[{"id": task}])
        fence = (await self.honestly("claim", task=task))["fence"]
        assert (await self.honestly("complete", task=task, fence=fence))["state"] == "done"
        await self.honestly("purge", task=task, admin=True)

    async def unharmed(self) -> None:
        """Everything sent has arrived, and the daemon is what it was."""
        await self.stranger.flushed()
        await self._honest_work()
        metric = self.daemon.metric
        assert await metric("if_actor_restarts_total") == 0
        assert await metric("if_bus_reconnects_total") == 0
        assert await metric("if_actor_messages_total", outcome="error") == 0
        log = self.daemon.log_text()
        assert "handler failed" not in log
        assert "Traceback" not in log

    async def restarted(self) -> None:
        """A new daemon in place of the old one."""
        await self.daemon.terminate()
        await self.daemon.start()

    async def next_event(self, what: str) -> dict[str, Any]:
        """The event of an honest task, published by the daemon."""
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        subscription = await self._bus.subscribe(
            subjects.event("task", what), lambda message: heard.put_nowait(message.data)
        )
        await self._honest_work()
        async with asyncio.timeout(PATIENCE_S):
            data = await heard.get()
        await subscription.unsubscribe()
        found: dict[str, Any] = msgspec.json.decode(data)
        return found

    async def overhear(self) -> Callable[[], Awaitable[list[str]]]:
        """Listens to what nobody but a misled daemon would publish; the function says what was heard."""
        heard: list[str] = []
        end = asyncio.Event()

        def listen(message: Incoming) -> None:
            if message.subject == "_INBOX.end":
                end.set()
            else:
                heard.append(message.subject)

        patterns = ("_INBOX", "_INBOX.>", f"if.v1.coordinator.bye.{self.honest}", "$JS.API.STREAM.DELETE.IF_EVENTS")
        listening = [await self._bus.subscribe(pattern, listen) for pattern in (*patterns, "if.v1.event.task.victim")]

        async def told() -> list[str]:
            await self._bus.publish("_INBOX.end", b"")
            async with asyncio.timeout(PATIENCE_S):
                await end.wait()
            for one in listening:
                await one.unsubscribe()
            return heard

        return told
