"""Guests that call out, over real sockets and real TLS, to servers that behave and to servers that do not."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import msgspec
import pytest

from ifabric.clock import SystemClock
from ifabric.config_chassis import Credential, Endpoint
from ifabric.errors import (
    BadRequest,
    BreakerOpen,
    ClaimLost,
    ConfigError,
    EgressDenied,
    FabricError,
    SessionLost,
    Unavailable,
)
from ifabric.metrics import Metrics
from ifabric.testing.clock import VirtualClock
from ifabric_actors.chassis import dialing
from ifabric_actors.chassis import egress as egress_module
from ifabric_actors.chassis.breaking import GovernorBreakers
from ifabric_actors.chassis.egress import Egress, Outgoing
from ifabric_actors.chassis.scrub import forms_of
from tests.actors.conftest import World

SECRET = 'sk-canary/+"0123456789&<'
WHOLE = f"Bearer {SECRET}"
CREDENTIAL = Credential(vault_path="secret/data/x")


# -- a server, and what is said to it -----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A request as the server got it. Names of headers in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    head: bytes
    reader: asyncio.StreamReader


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


class Site:
    """A server on loopback that answers as a test says, rightly or not."""

    def __init__(self, answer: Answer | bytes, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self._answer, self._tls, self._host = says(answer) if isinstance(answer, bytes) else answer, tls, host
        self.seen: list[Seen] = []
        self.opened = self.ended = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://{self._host}:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                line, *lines = head.decode("latin-1").split("\r\n")[:-2]
                method, target, _ = line.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.seen.append(Seen(method, target, headers, body, head, reader))
                await self._answer(self.seen[-1], writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.ended += 1
            self._tasks.discard(task)
            writer.close()


def http(body: bytes = b"", status: str = "200 OK", *headers: str, length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def says(*parts: bytes, close: bool = False) -> Answer:
    """The same to everybody."""

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if close:
            writer.close()

    return answer


def by_path(**answers: bytes | Answer) -> Answer:
    """By the first word of the path; `rest` for others."""

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        found = answers.get(seen.target.strip("/").split("/")[0].split("?")[0]) or answers["rest"]
        await (says(found) if isinstance(found, bytes) else found)(seen, writer)

    return answer


async def for_ever(seen: Seen, writer: asyncio.StreamWriter, *, first: bytes, then: bytes, each_s: float = 0.0) -> None:
    """A response without an end."""
    writer.write(first)
    while not writer.is_closing():
        writer.write(then)
        await writer.drain()
        await asyncio.sleep(each_s)


def endless(first: bytes, then: bytes, each_s: float = 0.0) -> Answer:
    return lambda seen, writer: for_ever(seen, writer, first=first, then=then, each_s=each_s)


async def silent(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Until the other side has enough."""
    await seen.reader.read()


# -- what is around an egress -------------------------------------------------------------------------------------------


class FakeSecret:
    def __init__(self, whole: str, forms: tuple[bytes, ...]) -> None:
        self._whole, self._forms = whole, forms

    def reveal(self) -> str:
        return self._whole

    def forms(self) -> tuple[bytes, ...]:
        return self._forms


class Safe:
    """Secrets. `down`: there are none to be had."""

    def __init__(self, value: str = SECRET, whole: str = WHOLE) -> None:
        self.secret = FakeSecret(whole, forms_of(value, whole))
        self.asked: list[Any] = []
        self.down = False

    async def header(self, credential: Any) -> FakeSecret:
        self.asked.append(credential)
        if self.down:
            raise Unavailable("Vault is sealed", what="vault")
        return self.secret


class Gate:
    """Breakers. What is reported can be waited for."""

    def __init__(self, refusal: FabricError | None = None) -> None:
        self.refusal = refusal
        self.admitted: list[tuple[str, str]] = []
        self.reports: list[dict[str, Any]] = []

    async def admit(self, name: str, session: str) -> str:
        self.admitted.append((name, session))
        if self.refusal is not None:
            raise self.refusal
        return f"permit-{len(self.admitted)}"

    async def report(self, name: str, session: str, permit: str, outcome: str, **more: Any) -> None:
        self.reports.append({"name": name, "session": session, "permit": permit, "outcome": outcome, **more})

    async def said(self) -> dict[str, Any]:
        await eventually(lambda: len(self.reports) == len(self.admitted))
        return self.reports[-1]


async def eventually(true: Callable[[], Any], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.005)


class Desk:
    """Makes egresses, and ends them."""

    def __init__(self) -> None:
        self.clock, self.metrics = SystemClock(), Metrics()
        self.made: list[Egress] = []
        self.safe, self.gate = Safe(), Gate()

    def egress(self, site: Site | str, resolve: Any = None, clock: Any = None, **endpoint: Any) -> Egress:
        """One with an endpoint `api` at the site, and another that no run is given."""
        url = site if isinstance(site, str) else site.url
        settings = {"networks": ("127.0.0.0/8",), "methods": ("GET", "HEAD", "POST", "PUT"), **endpoint}
        endpoints = {"api": Endpoint(url=url, **settings), "other": Endpoint(url=url, **settings)}
        self.made.append(
            Egress(endpoints, self.safe, self.gate, clock or self.clock, self.metrics, *([resolve] if resolve else []))
        )
        return self.made[-1]

    def out(self, within_s: float = 30.0, **more: Any) -> Outgoing:
        given = {"task": None, "fence": None, "endpoints": frozenset({"api"}), **more}
        return Outgoing(run="run-1", session="s1", deadline=self.clock.monotonic() + within_s, **given)

    async def call(self, egress: Egress, out: Outgoing | None = None, **ask: Any) -> dict[str, Any]:
        data = json.dumps({"endpoint": "api", "path": "/x", **ask}).encode()
        answer: dict[str, Any] = json.loads(await egress.call(data, out or self.out()))
        return answer

    async def denied(self, egress: Egress, out: Outgoing | None = None, **ask: Any) -> EgressDenied:
        with pytest.raises(EgressDenied) as caught:
            await self.call(egress, out, **ask)
        return caught.value

    async def error(self, egress: Egress, out: Outgoing | None = None, **ask: Any) -> dict[str, Any]:
        answer = await self.call(egress, out, **ask)
        assert list(answer) == ["error"], answer
        found: dict[str, Any] = answer["error"]
        return found

    def counted(self, outcome: str) -> float:
        return self.metrics.counter("if_chassis_egress_calls_total", outcome=outcome).value


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    before = asyncio.all_tasks()
    made = Desk()
    yield made
    for egress in made.made:
        await egress.stop()
    await eventually(lambda: not [task for task in asyncio.all_tasks() - before if "chassis/" in repr(task)])


def leads_to(*answers: Sequence[str]) -> Any:
    """A resolver: the first answer first, the last one from then on. It counts in `.asked`."""

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        resolve.asked.append(host)  # type: ignore[attr-defined]
        found = answers[min(len(resolve.asked), len(answers)) - 1]  # type: ignore[attr-defined]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    resolve.asked = []  # type: ignore[attr-defined]
    return resolve


# -- a call that goes well ----------------------------------------------------------------------------------------------


async def test_a_request_arrives_as_it_was_asked_with_what_the_guest_may_not_know(desk: Desk) -> None:
    async with Site(http(b"\xc3\xa9", "201 Created", "Content-Type: text/plain", "Set-Cookie: a=b")) as site:
        egress = desk.egress(site.url + "/v1", credential=CREDENTIAL)
        out = desk.out(task="t/1", fence=7)
        answer = await desk.call(
            egress, out, method="POST", path="/chat", query={"a": "b c"}, headers={"X-A": "1"}, body="hé"
        )
        assert answer == {"status": 201, "headers": {"content-type": "text/plain"}, "body": "é"}
        (seen,) = site.seen
        assert (seen.method, seen.target, seen.body) == ("POST", "/v1/chat?a=b%20c", "hé".encode())
        assert seen.headers == {
            "host": f"127.0.0.1:{site.port}",
            "x-a": "1",
            "accept-encoding": "identity",
            "user-agent": "ifabric",
            "x-ifabric-run": "run-1",
            "x-ifabric-task": "t%2F1",
            "x-ifabric-fence": "7",
            "content-length": "3",
            "authorization": WHOLE,
        }
        assert (out.calls, out.made) == (1, {"api": 1})
        # all that came, and all that went but the secret
        assert out.bytes_in == len(http(b"\xc3\xa9", "201 Created", "Content-Type: text/plain", "Set-Cookie: a=b"))
        assert len(seen.head) - 150 < out.bytes_out < len(seen.head) + 3
        assert desk.counted("done") == 1
        assert desk.metrics.counter("if_chassis_egress_bytes_total", direction="in").value == out.bytes_in
        assert desk.metrics.counter("if_chassis_egress_bytes_total", direction="out").value == out.bytes_out
        assert sum(desk.metrics.histogram("if_chassis_egress_seconds").counts) == 1


@pytest.mark.parametrize(
    ("method", "response", "answer"),
    [
        ("HEAD", http(b"", "200 OK", "Content-Length: 99999999", length=False), {"status": 200, "headers": {}, "body": ""}),
        ("GET", http(b"", "204 No Content", length=False), {"status": 204, "headers": {}, "body": ""}),
        ("GET", http(b"", "304 Not Modified", "ETag: x", length=False), {"status": 304, "headers": {"etag": "x"}, "body": ""}),
        ("GET", http(b"\xff\0"), {"status": 200, "headers": {}, "body_b64": "/wA="}),
        ("GET", http(b"no", "404 Not Found"), {"status": 404, "headers": {}, "body": "no"}),
        ("GET", http(b"oh", "500 Oops"), {"status": 500, "headers": {}, "body": "oh"}),
        ("GET", http(b"3\r\nabc\r\n0\r\n\r\n", "200 OK", "Transfer-Encoding: chunked", length=False),
         {"status": 200, "headers": {}, "body": "abc"}),
        ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(b"abc"), {"status": 200, "headers": {}, "body": "abc"}),
    ],
)  # fmt: skip
async def test_every_kind_of_response_is_told(desk: Desk, method: str, response: bytes, answer: dict[str, Any]) -> None:
    async with Site(response) as site:
        assert await desk.call(desk.egress(site), method=method) == answer


async def test_a_response_ends_with_its_connection_when_it_says_no_length(desk: Desk) -> None:
    async with Site(says(http(b"abc", length=False), close=True)) as site:
        assert (await desk.call(desk.egress(site)))["body"] == "abc"


async def test_a_connection_is_used_again(desk: Desk) -> None:
    async with Site(http(b"abc")) as site:
        egress = desk.egress(site)
        for _ in range(5):
            assert (await desk.call(egress))["body"] == "abc"
        assert (len(site.seen), site.opened) == (5, 1)


async def test_many_calls_go_at_once(desk: Desk) -> None:
    async with Site(by_path(rest=lambda seen, writer: says(http(seen.target.encode()))(seen, writer))) as site:
        egress = desk.egress(site, calls_per_second=1000.0)
        bodies = await asyncio.gather(*(desk.call(egress, path=f"/{number}") for number in range(100)))
        assert [answer["body"] for answer in bodies] == [f"/{number}" for number in range(100)]
        assert site.opened <= dialing.CONNECTIONS_MAX


async def test_ipv6_is_spoken(desk: Desk) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with Site(http(b"abc"), host="::1") as site:
        egress = desk.egress(f"http://[::1]:{site.port}", networks=("::1/128",))
        assert [(await desk.call(egress))["body"] for _ in range(2)] == ["abc", "abc"]
        assert (site.seen[0].headers["host"], site.opened) == (f"[::1]:{site.port}", 1)


async def test_a_proxy_of_the_environment_is_not_used(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with Site(http(b"abc")) as site:
        assert (await desk.call(desk.egress(site)))["body"] == "abc"


# -- what ends the run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["other", "unknown", "", "api ", "x" * 1000, "\u202e"])
async def test_an_endpoint_that_the_run_was_not_given_ends_it(desk: Desk, name: str) -> None:
    async with Site(http()) as site:
        error = await desk.denied(desk.egress(site), endpoint=name)
        assert error.facts["host"] == name[:64]
        assert error.message.isascii() and len(error.message) < 200
        assert (site.opened, desk.counted("denied")) == (0, 1)


@pytest.mark.parametrize(
    "ask",
    [
        {"method": "DELETE"},
        {"path": "/../x"},
        {"path": "//evil"},
        {"headers": {"Host": "evil"}},
        {"headers": {"authorization": "x"}},
        {"headers": {"X-A": "a\r\nB: c"}},
        {"headers": {"Range": "bytes=0-1"}},
    ],
)
async def test_what_the_endpoint_does_not_allow_ends_the_run_before_anything_is_spent(desk: Desk, ask: Any) -> None:
    async with Site(http()) as site:
        egress = desk.egress(site, credential=CREDENTIAL, breaker="b")
        out = desk.out()
        error = await desk.denied(egress, out, **ask)
        assert error.facts["host"] == "127.0.0.1"
        assert (site.opened, desk.safe.asked, desk.gate.admitted, out.calls) == (0, [], [], 0)


async def test_more_calls_than_a_run_has_end_it_and_each_endpoint_counts_for_itself(desk: Desk) -> None:
    async with Site(http()) as site:
        egress = desk.egress(site, calls_per_run=3)
        out = desk.out(endpoints=frozenset({"api", "other"}))
        for _ in range(3):
            await desk.call(egress, out)
        assert "more than 3 calls" in (await desk.denied(egress, out)).facts["why"]
        assert (await desk.call(egress, out, endpoint="other"))["status"] == 200
        assert (await desk.call(egress))["status"] == 200, "another run has its own"
        assert (len(site.seen), out.calls) == (5, 4)


@pytest.mark.parametrize("lost", [ClaimLost(by="s2", fence=8), SessionLost()])
async def test_a_claim_that_is_lost_ends_the_run_and_nothing_is_sent(desk: Desk, lost: FabricError) -> None:
    async def claim() -> None:
        raise lost

    async with Site(http()) as site:
        egress = desk.egress(site, breaker="b")
        with pytest.raises(type(lost)) as caught:
            await desk.call(egress, desk.out(claim=claim))
        assert caught.value.facts == lost.facts
        assert site.seen == []
        assert desk.counted("claim_lost") == 1
        assert (await desk.gate.said())["outcome"] == "ignored"


async def test_the_claim_is_looked_at_last_when_all_that_takes_time_is_done(desk: Desk) -> None:
    resolve = leads_to(["127.0.0.1"])

    async def claim() -> None:
        if resolve.asked:  # lost while the name was looked up
            raise ClaimLost

    async with Site(http()) as site:
        egress = desk.egress(f"http://api.example:{site.port}", resolve)
        with pytest.raises(ClaimLost):
            await desk.call(egress, desk.out(claim=claim))
        assert site.seen == []


async def test_a_claim_that_cannot_be_looked_at_is_not_believed(desk: Desk) -> None:
    async def claim() -> None:
        raise Unavailable("etcd does not answer", what="etcd")

    async with Site(http()) as site:
        assert (await desk.error(desk.egress(site), desk.out(claim=claim)))["what"] == "etcd"
        assert site.seen == []


# -- addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0"])
async def test_loopback_is_refused_however_it_is_written(desk: Desk, host: str) -> None:
    async with Site(http()) as site:
        error = await desk.denied(desk.egress(f"http://{host}:{site.port}", networks=(), breaker="b"))
        assert "address" in error.facts["why"]
        assert site.opened == 0
        assert (await desk.gate.said())["outcome"] == "ignored", "it says nothing of the endpoint"


async def test_a_name_that_has_one_bad_address_is_refused_as_a_whole(desk: Desk) -> None:
    async with Site(http()) as site:
        for found in (
            ["127.0.0.1", "10.0.0.1"],
            ["10.0.0.1", "127.0.0.1"],
            [f"127.0.0.{last}" for last in range(1, 41)] + ["10.0.0.1"],
        ):
            egress = desk.egress(f"http://api.example:{site.port}", leads_to(found))
            assert "10.0.0.1 is private" in (await desk.denied(egress)).facts["why"]
        assert site.opened == 0


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(desk: Desk) -> None:
    """DNS that answers differently the second time (rebinding) is not asked a second time."""
    resolve = leads_to(["127.0.0.1"], ["10.0.0.1"])
    async with Site(says(http(b"abc"), close=True)) as site:
        egress = desk.egress(f"http://api.example:{site.port}", resolve)
        assert (await desk.call(egress))["body"] == "abc"
        assert resolve.asked == ["api.example"]
        assert site.seen[0].headers["host"] == f"api.example:{site.port}"
        assert "10.0.0.1 is private" in (await desk.denied(egress)).facts["why"]
        assert len(site.seen) == 1


async def test_metadata_is_refused_even_in_a_network_that_was_granted(desk: Desk) -> None:
    egress = desk.egress("http://api.example", leads_to(["169.254.169.254"]), networks=("169.254.0.0/16", "0.0.0.0/0"))
    assert "metadata" in (await desk.denied(egress)).facts["why"]


async def test_the_next_address_is_tried_when_one_does_not_connect(desk: Desk) -> None:
    async with Site(http(b"abc")) as site:
        egress = desk.egress(f"http://api.example:{site.port}", leads_to(["127.0.0.9", "127.0.0.1"]))
        assert (await desk.call(egress))["body"] == "abc"


async def test_names_that_are_slow_to_look_up_take_one_thread_and_hold_up_nobody_else(desk: Desk) -> None:
    answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    asked = []

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return await asyncio.shield(answer)

    async with Site(http()) as site:
        egress = desk.egress(f"http://api.example:{site.port}", resolve, timeout_seconds=5.0)
        calls = [asyncio.ensure_future(desk.call(egress)) for _ in range(20)]
        await eventually(lambda: asked)
        calls[0].cancel()
        assert (await desk.error(egress, desk.out(within_s=0.05)))["what"] == "deadline"
        answer.set_result([(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", site.port))])
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert all(isinstance(one, dict) and one["status"] == 200 for one in answers[1:])
        assert asked == ["api.example"]


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "not known"), UnicodeError("label too long")])
async def test_a_name_that_is_not_found_is_told(desk: Desk, failure: Exception) -> None:
    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        raise failure

    error = await desk.error(desk.egress("http://api.example", resolve, breaker="b"))
    assert (error["code"], error["what"], error["why"]) == ("unavailable", "endpoint", "name")
    assert (await desk.gate.said())["outcome"] == "failure"


async def test_a_name_that_leads_nowhere_is_told(desk: Desk) -> None:
    assert (await desk.error(desk.egress("http://api.example", leads_to([]))))["why"] == "connection"


# -- the secret ---------------------------------------------------------------------------------------------------------

ECHOES: dict[str, Callable[[str], bytes]] = {
    "as it is": lambda whole: whole.encode(),
    "the secret alone": lambda whole: whole.removeprefix("Bearer ").encode(),
    "base64": lambda whole: base64.b64encode(whole.encode()),
    "base64 of more": lambda whole: base64.b64encode(f"<a>{whole}</a>".encode()),
    "base64 of yet more": lambda whole: base64.b64encode(f"<ab>{whole}</ab>".encode()),
    "base64 for URLs": lambda whole: base64.urlsafe_b64encode(whole.encode()).rstrip(b"="),
    "percent": lambda whole: quote(whole, safe="").encode(),
    "JSON": lambda whole: json.dumps({"authorization": whole}).encode(),
    "JSON of PHP": lambda whole: json.dumps(whole).replace("/", "\\/").encode(),
    "between bytes": lambda whole: b"\xff\0" + whole.encode() + b"\xfe",
}


def leaks(text: str) -> bool:
    """Whether enough of the secret is there to know it by."""
    raw = base64.b64encode(SECRET.encode()).decode()
    return any(word in text for word in ("sk-canary", "0123456789", raw[4:20]))


@pytest.mark.parametrize("kind", ECHOES)
async def test_an_echo_of_the_secret_does_not_reach_the_guest(
    desk: Desk, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        said = ECHOES[kind](seen.headers["authorization"])
        headers = [] if b"\0" in said else [f"X-Echo: {said.decode()}"]
        head, body = http(b"", "200 OK", *headers, "Transfer-Encoding: chunked", length=False), b"<" + said + b">"
        writer.write(head)
        for byte in body:  # a chunk each, and a packet each
            writer.write(b"1\r\n%c\r\n" % byte)
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore.http11").setLevel(logging.NOTSET)
    async with Site(echo) as site:
        answer = await desk.call(desk.egress(site, credential=CREDENTIAL))
        assert leaks(site.seen[0].headers["authorization"])
        text = json.dumps(answer) + json.dumps(answer).replace('\\"', '"')
        body = base64.b64decode(answer["body_b64"]).decode("latin-1") if "body_b64" in answer else answer["body"]
        assert "[redacted]" in body
        assert not leaks(text + body)
        assert not leaks(caplog.text)


async def test_a_large_response_is_scrubbed_like_a_small_one(desk: Desk) -> None:
    padding = b"x" * egress_module.THREAD_FROM_BYTES

    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http(padding + seen.headers["authorization"].encode() + padding))

    async with Site(echo) as site:
        body = (await desk.call(desk.egress(site, credential=CREDENTIAL)))["body"]
        assert body == (padding + b"[redacted]" + padding).decode()


async def test_a_compressed_echo_is_refused_and_was_asked_not_to_come(desk: Desk) -> None:
    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http(gzip.compress(seen.headers["authorization"].encode()), "200 OK", "Content-Encoding: gzip"))

    async with Site(echo) as site:
        egress = desk.egress(site, credential=CREDENTIAL, breaker="b")
        error = await desk.error(egress, headers={"Accept-Encoding": "gzip"})
        assert (error["what"], error["why"]) == ("endpoint", "content-encoding")
        assert site.seen[0].headers["accept-encoding"] == "identity"
        assert (await desk.gate.said())["outcome"] == "success"


async def test_an_error_does_not_tell_the_secret_either(desk: Desk) -> None:
    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        whole = seen.headers["authorization"]
        match seen.target:
            case "/line":
                writer.write(whole.encode() + b"\r\n\r\n")
            case "/header":
                writer.write(b"HTTP/1.1 200 OK\r\n" + whole.encode() + b"\r\n\r\n")
            case "/redirect":
                writer.write(http(b"", "302 Found", f"Location: https://{quote(whole, safe='')}/"))
            case "/path":
                writer.write(http(b"", "302 Found", f"Location: //x/{quote(whole, safe='')}/"))
            case "/down":
                writer.write(http(b"", "302 Found", f"Location: ../{quote(whole, safe='')}/"))
        writer.close()

    async with Site(echo) as site:
        egress = desk.egress(site, credential=CREDENTIAL, redirects_max=2, paths=("/line", "/header", "/redirect", "/path", "/down"))  # fmt: skip
        for path in ("/line", "/header"):
            assert not leaks(json.dumps(await desk.error(egress, path=path)))
        for path in ("/redirect", "/path", "/down"):
            error = await desk.denied(egress, path=path)
            assert not leaks(json.dumps(error.to_body()) + str(error))
            assert "redirect" in error.facts["why"]
            assert error.__cause__ is None and error.__suppress_context__


@pytest.mark.parametrize("whole", ["Bearer sk-canary\r\nX: y", "Bearer sk-canary\n", "sk-canaryé", "", " sk-canary"])
async def test_a_secret_that_is_no_headers_value_is_not_sent(desk: Desk, whole: str) -> None:
    desk.safe = Safe(whole or "x", whole)
    async with Site(http()) as site:
        error = await desk.error(desk.egress(site, credential=CREDENTIAL))
        assert error["what"] == "vault"
        assert "canary" not in json.dumps(error)
        assert site.opened == 0


async def test_without_a_credential_none_is_asked_for_or_sent(desk: Desk) -> None:
    async with Site(http()) as site:
        await desk.call(desk.egress(site))
        assert (desk.safe.asked, "authorization" in site.seen[0].headers) == ([], False)


async def test_before_a_run_its_endpoints_are_known_and_their_secrets_there(desk: Desk) -> None:
    egress = desk.egress("http://127.0.0.1:1", credential=CREDENTIAL)
    await egress.prepare(desk.out())
    assert desk.safe.asked == [CREDENTIAL]
    with pytest.raises(BadRequest, match=r"there is no endpoint nope; there is api, other"):
        await egress.prepare(desk.out(endpoints=frozenset({"api", "nope"})))
    desk.safe.down = True
    with pytest.raises(Unavailable) as caught:
        await egress.prepare(desk.out())
    assert caught.value.facts["what"] == "vault"
    await egress.prepare(desk.out(endpoints=frozenset()))


async def test_without_vault_a_run_with_a_credential_is_refused(desk: Desk) -> None:
    egress = Egress({"api": Endpoint(url="http://x", credential=CREDENTIAL)}, None, desk.gate, desk.clock, desk.metrics)
    with pytest.raises(Unavailable) as caught:
        await egress.prepare(desk.out())
    assert caught.value.facts["what"] == "vault"


async def test_a_secret_that_is_gone_by_the_time_of_the_call_is_told(desk: Desk) -> None:
    desk.safe.down = True
    async with Site(http()) as site:
        egress = desk.egress(site, credential=CREDENTIAL, breaker="b")
        assert (await desk.error(egress))["what"] == "vault"
        assert (site.opened, desk.gate.admitted, desk.counted("failed")) == (0, [], 1)


# -- redirects ----------------------------------------------------------------------------------------------------------


def redirect(location: str, status: str = "302 Found") -> bytes:
    return http(b"", status, f"Location: {location}")


async def test_a_redirect_within_the_endpoint_is_followed_with_all_that_the_first_request_had(desk: Desk) -> None:
    looks = 0

    async def claim() -> None:
        nonlocal looks
        looks += 1

    async with Site(by_path(x=redirect("/y?a=b"), y=redirect("z", "307 Again"), z=http(b"done"))) as site:
        egress = desk.egress(site, credential=CREDENTIAL, redirects_max=2)
        out = desk.out(task="t", fence=7, claim=claim)
        assert (await desk.call(egress, out, headers={"X-A": "1"}))["body"] == "done"
        assert [seen.target for seen in site.seen] == ["/x", "/y?a=b", "/z"]
        for seen in site.seen:
            assert (seen.headers["authorization"], seen.headers["x-a"], seen.headers["x-ifabric-fence"]) == (
                WHOLE,
                "1",
                "7",
            )
        assert (out.calls, looks) == (1, 3)


async def test_after_so_many_redirects_the_next_one_is_the_response(desk: Desk) -> None:
    async with Site(redirect("/x")) as site:
        for most in (0, 1, 3):
            site.seen.clear()
            answer = await desk.call(desk.egress(site, redirects_max=most))
            assert (answer["status"], answer["headers"]["location"], len(site.seen)) == (302, "/x", most + 1)
    async with Site(redirect("https://elsewhere.example/")) as site:  # nobody goes there
        assert (await desk.call(desk.egress(site)))["headers"]["location"] == "https://elsewhere.example/"


@pytest.mark.parametrize("to", ["http://127.0.0.1:{other}/x", "//localhost:{own}/x", "https://127.0.0.1:{own}/x"])
async def test_a_redirect_away_ends_the_run_and_nobody_else_hears_of_it(desk: Desk, to: str) -> None:
    async with Site(http()) as other:

        async def away(seen: Seen, writer: asyncio.StreamWriter) -> None:
            writer.write(redirect(to.format(other=other.port, own=site.port)))

        async with Site(away) as site:
            egress = desk.egress(site, credential=CREDENTIAL, redirects_max=3, breaker="b")
            assert (await desk.denied(egress)).facts["why"].startswith("redirect to ")
            assert (len(site.seen), other.opened) == (1, 0)
            assert (await desk.gate.said())["outcome"] == "success"


async def test_a_redirect_to_a_path_that_is_not_allowed_ends_the_run(desk: Desk) -> None:
    async with Site(redirect("/secret")) as site:
        egress = desk.egress(site, paths=("/x",), redirects_max=3)
        assert "redirect: path '/secret'" in (await desk.denied(egress)).facts["why"]


async def test_a_claim_that_is_lost_between_two_hops_ends_the_run_there(desk: Desk) -> None:
    async def claim() -> None:
        if site.seen:
            raise ClaimLost

    async with Site(redirect("/y")) as site:
        with pytest.raises(ClaimLost):
            await desk.call(desk.egress(site, redirects_max=3), desk.out(claim=claim))
        assert len(site.seen) == 1


async def test_a_post_becomes_a_get_without_its_body(desk: Desk) -> None:
    async with Site(by_path(x=redirect("/y", "303 See Other"), y=http(b"done"))) as site:
        ask = {"method": "POST", "body": "data", "headers": {"Content-Type": "text/plain"}}
        assert (await desk.call(desk.egress(site, redirects_max=1), **ask))["body"] == "done"
        assert (site.seen[1].method, site.seen[1].body) == ("GET", b"")
        assert not {"content-type", "content-length"} & set(site.seen[1].headers)


# -- time ---------------------------------------------------------------------------------------------------------------

SLOW: dict[str, Answer] = {
    "never": silent,
    "headers one at a time": endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.01),
    "body one byte at a time": endless(http(b"", "200 OK", "Content-Length: 100000", length=False), b"x", 0.01),
    "chunks one at a time": endless(
        http(b"", "200 OK", "Transfer-Encoding: chunked", length=False), b"1\r\nx\r\n", 0.01
    ),
    "a body without an end": endless(http(length=False), b"x", 0.01),
}


@pytest.mark.parametrize("kind", SLOW)
async def test_all_of_a_call_has_one_timeout_whatever_trickles(desk: Desk, kind: str) -> None:
    async with Site(SLOW[kind]) as site:
        egress = desk.egress(site, timeout_seconds=0.2, breaker="b")
        out = desk.out()
        began = time.monotonic()
        error = await desk.error(egress, out)
        assert 0.19 < time.monotonic() - began < 0.6
        assert (error["code"], error["what"], error["why"]) == ("unavailable", "endpoint", "timeout")
        assert (await desk.gate.said())["outcome"] == "failure"
        await eventually(lambda: site.ended == 1)
        assert out.bytes_out > 0 and (out.bytes_in > 0) == (kind != "never")


async def test_a_run_that_ends_first_takes_its_call_with_it_and_the_endpoint_is_not_blamed(desk: Desk) -> None:
    async with Site(silent) as site:
        egress = desk.egress(site, timeout_seconds=20.0, breaker="b")
        began = time.monotonic()
        assert (await desk.error(egress, desk.out(within_s=0.1)))["what"] == "deadline"
        assert time.monotonic() - began < 0.5
        assert (await desk.gate.said())["outcome"] == "ignored"
        await eventually(lambda: site.ended == 1)


async def test_a_run_without_time_calls_nobody(desk: Desk) -> None:
    async with Site(http()) as site:
        assert (await desk.error(desk.egress(site, breaker="b"), desk.out(within_s=-1.0)))["what"] == "deadline"
        assert (site.opened, desk.gate.admitted) == (0, [])


@pytest.mark.parametrize("answer", [silent, endless(http(length=False), b"x", 0.01)])
async def test_a_call_that_is_cancelled_closes_its_connection_and_says_nothing_of_the_endpoint(
    desk: Desk, answer: Answer
) -> None:
    async with Site(answer) as site:
        egress = desk.egress(site, breaker="b")
        out = desk.out()
        call = asyncio.ensure_future(desk.call(egress, out))
        await eventually(lambda: site.seen)
        if answer is not silent:
            (connection,) = egress._places["api"].dialer._open
            await eventually(lambda: connection.taken > 50)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await desk.gate.said())["outcome"] == "ignored"
        await eventually(lambda: site.ended == 1)
        assert desk.counted("failed") == 1


async def test_a_guest_whose_time_is_up_leaves_nothing_behind_at_whichever_moment(desk: Desk) -> None:
    """Forty calls are cancelled at forty moments; then there is a place for everybody, and the next call is well."""
    async with Site(by_path(slow=endless(http(length=False), b"x", 0.001), rest=http(b"abc"))) as site:
        egress = desk.egress(site, calls_per_second=1000.0)
        for turns in range(40):
            call = asyncio.ensure_future(desk.call(egress, path="/slow"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert (await desk.call(egress, path="/x"))["body"] == "abc"
        await eventually(lambda: site.ended == site.opened - 1)
        assert egress._places["api"].dialer.slots._value == dialing.CONNECTIONS_MAX
        assert len(egress._places["api"].dialer._open) == 1


async def test_when_no_connection_is_free_a_call_waits_and_then_is_told(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(dialing, "CONNECTIONS_MAX", 1)
    async with Site(by_path(slow=silent, rest=http())) as site:
        egress = desk.egress(site, timeout_seconds=0.3, breaker="b")
        first = asyncio.ensure_future(desk.call(egress, path="/slow"))
        await eventually(lambda: site.seen)
        error = await desk.error(egress, desk.out(within_s=0.1))
        assert (error["code"], error["what"]) == ("overloaded", "endpoint")
        await eventually(lambda: desk.gate.reports)
        assert desk.gate.reports[0]["outcome"] == "ignored"
        third = asyncio.ensure_future(desk.call(egress))
        assert (await first)["error"]["why"] == "timeout"
        assert (await third)["status"] == 200


# -- responses that are no responses ------------------------------------------------------------------------------------

CHUNKED = http(b"", "200 OK", "Transfer-Encoding: chunked", length=False)
BOMBS: dict[str, tuple[Answer, str]] = {
    "a length over the limit": (says(http(b"x" * 1025)), "too_large"),
    "a length far over it": (says(http(b"", "200 OK", "Content-Length: 9999999999999", length=False) + b"x"), "too_large"),
    "no length": (endless(http(length=False), b"x" * 1000), "too_large"),
    "chunks": (endless(CHUNKED, b"400\r\n" + b"x" * 1024 + b"\r\n"), "too_large"),
    "chunks with long names": (endless(CHUNKED, b"1;" + b"e" * 15_000 + b"\r\nx\r\n"), "too_large"),
    "1xx without an end": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "too_large"),
    "a header without an end": (endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"a" * 1000), "unavailable"),
    "headers without an end": (endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 100), "unavailable"),
    "a line without an end": (endless(b"HTTP/1.1 200 ", b"O" * 1000), "unavailable"),
    "trailers without an end": (endless(CHUNKED + b"0\r\n", b"X-A: b\r\n" * 100), "unavailable"),
    "a chunk's length without an end": (endless(CHUNKED, b"1" * 1000), "unavailable"),
    "not HTTP": (says(b"\x16\x03\x01 hello\r\n\r\n"), "unavailable"),
    "HTTP/0.9": (says(b"<html>\r\n\r\n", close=True), "unavailable"),
    "HTTP/2": (says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "unavailable"),
    "nothing": (says(close=True), "unavailable"),
    "half a head": (says(b"HTTP/1.1 200 OK\r\nX-A", close=True), "unavailable"),
    "half a body": (says(http(b"", "200 OK", "Content-Length: 10", length=False) + b"x", close=True), "unavailable"),
    "half a chunk": (says(CHUNKED + b"5\r\nab", close=True), "unavailable"),
    "two lengths": (says(http(b"ab", "200 OK", "Content-Length: 1")), "unavailable"),
    "a negative length": (says(http(b"", "200 OK", "Content-Length: -1", length=False)), "unavailable"),
    "a coding that hides the length": (says(http(b"", "200 OK", "Transfer-Encoding: gzip, chunked", length=False)), "unavailable"),
    "a switch of protocols": (says(http(b"", "101 Switching", "Upgrade: x", "Connection: upgrade", length=False)), "unavailable"),
    "a header that is folded": (says(b"HTTP/1.1 200 OK\r\nX-A: b\0c\r\n\r\n"), "unavailable"),
    "a status that is none": (says(b"HTTP/1.1 99 Odd\r\n\r\n"), "unavailable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
async def test_a_response_that_is_none_or_has_no_end_is_an_error_and_soon(desk: Desk, kind: str) -> None:
    answer, code = BOMBS[kind]
    async with Site(answer) as site:
        egress = desk.egress(site, response_max_bytes=1024, timeout_seconds=5.0)
        out = desk.out()
        began = time.monotonic()
        assert (await desk.error(egress, out, method="POST"))["code"] == code
        assert time.monotonic() - began < 2.0
        # what was read is bounded, and counted
        assert out.bytes_in <= dialing.PROLOGUE_MAX_BYTES + dialing.WIRE_BYTES + 1024 * dialing.WIRE_FACTOR + 16 * 1024
        await eventually(lambda: site.ended == 1)
        assert len(site.seen) == 1


async def test_a_response_of_just_the_limit_is_no_bomb(desk: Desk) -> None:
    async with Site(
        by_path(
            rest=http(b"x" * 1024),
            chunked=CHUNKED + b"1\r\nx\r\n" * 1024 + b"0\r\n\r\n",
            over=CHUNKED + b"1\r\nx\r\n" * 1025 + b"0\r\n\r\n",
        )
    ) as site:
        egress = desk.egress(site, response_max_bytes=1024)
        assert len((await desk.call(egress))["body"]) == 1024
        assert len((await desk.call(egress, path="/chunked"))["body"]) == 1024
        assert (await desk.error(egress, path="/over"))["code"] == "too_large"


async def test_chunks_have_a_limit_in_number_and_leave_others_their_turn(desk: Desk) -> None:
    most = dialing.CHUNKS_MAX
    async with Site(
        by_path(x=CHUNKED + b"1\r\nx\r\n" * most + b"0\r\n\r\n", y=CHUNKED + b"1\r\nx\r\n" * (most + 1))
    ) as site:
        egress = desk.egress(site)
        call = asyncio.ensure_future(desk.call(egress))
        turns = 0
        while not call.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(call.result()["body"]) == most
        assert turns > most // dialing.CHUNKS_AT_ONCE
        assert (await desk.error(egress, path="/y"))["code"] == "too_large"


async def test_a_server_that_takes_nothing_has_the_same_timeout(desk: Desk) -> None:
    ended = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ended.wait()
        writer.transport.abort()

    server = await asyncio.start_server(stall, "127.0.0.1", 0, limit=1024)
    port = server.sockets[0].getsockname()[1]
    egress = desk.egress(f"http://127.0.0.1:{port}", request_max_bytes=1 << 20, timeout_seconds=0.2)
    for _ in range(2):
        assert (await desk.error(egress, method="POST", body="x" * (1 << 20)))["why"] == "timeout"
    assert not egress._places["api"].dialer._open
    ended.set()
    server.close()


async def test_a_connection_that_is_reset_is_told(desk: Desk) -> None:
    async def reset(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"", "200 OK", "Content-Length: 10", length=False) + b"x")
        await writer.drain()
        writer.transport.abort()

    async with Site(reset) as site:
        egress = desk.egress(site, breaker="b")
        error = await desk.error(egress)
        assert (error["code"], error["retryable"]) == ("unavailable", True)
        assert (await desk.gate.said())["outcome"] == "failure"


async def test_a_connection_that_is_refused_is_told(desk: Desk) -> None:
    async with Site(http()) as site:
        pass
    error = await desk.error(desk.egress(site, breaker="b"))
    assert (error["what"], error["why"]) == ("endpoint", "connection")
    assert (await desk.gate.said())["outcome"] == "failure"


async def test_an_answer_that_comes_before_the_body_was_taken_is_heard(desk: Desk) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(b"no", "413 Too Large", "Connection: close"))
        await writer.drain()
        await reader.read(100)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    egress = desk.egress(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", request_max_bytes=1 << 20)
    answer = await desk.call(egress, method="POST", body="x" * (1 << 20))
    server.close()
    assert answer.get("status", 413) == 413


# -- a response for another ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_second_response_to_one_request_is_nobodys(desk: Desk, at_once: bool) -> None:
    poison = http(b"poison")

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/trap":
            writer.write(http(b"first") + (poison if at_once else b""))
            await writer.drain()
            if not at_once:
                await trapped.wait()
                writer.write(poison)
        else:
            writer.write(http(b"right"))

    trapped = asyncio.Event()
    async with Site(answer) as site:
        egress = desk.egress(site)
        assert (await desk.call(egress, path="/trap"))["body"] == "first"
        trapped.set()
        if not at_once:
            (connection,) = egress._places["api"].dialer._open
            await eventually(lambda: not connection._stream.quiet)
        assert (await desk.call(egress))["body"] == "right"
        assert site.opened == 2


async def test_a_connection_that_was_closed_meanwhile_is_not_used(desk: Desk) -> None:
    async with Site(says(http(b"abc"), close=True)) as site:
        egress = desk.egress(site)
        for number in range(1, 4):
            assert (await desk.call(egress, method="POST"))["body"] == "abc"
            await eventually(lambda number=number: site.ended == number)
        assert site.opened == 3


@pytest.mark.parametrize(("method", "again"), [("GET", True), ("PUT", True), ("HEAD", True), ("POST", False)])
async def test_over_a_connection_that_was_just_closed_only_what_may_be_repeated_is(
    desk: Desk, method: str, again: bool
) -> None:
    async def once(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if [one.target for one in site.seen].count("/x") == 1 and seen.target == "/x":
            writer.close()  # it took the request, and says nothing
        else:
            writer.write(http())

    async with Site(once) as site:
        egress = desk.egress(site, breaker="b")
        await desk.call(egress, path="/first")
        answer = await desk.call(egress, method=method)
        assert answer.get("status") == (200 if again else None)
        assert len(site.seen) == (3 if again else 2)
        assert (await desk.gate.said())["outcome"] == ("success" if again else "failure")


async def test_a_new_connection_that_is_closed_is_not_tried_again(desk: Desk) -> None:
    async with Site(says(close=True)) as site:
        assert (await desk.error(desk.egress(site)))["why"] in ("protocol", "connection")
        assert len(site.seen) == 1


# -- breakers and rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "outcome", "retry_after_s"),
    [
        (http(), "success", None),
        (http(b"", "302 Found", "Location: /y"), "success", None),
        (http(b"", "404 Not Found"), "ignored", None),
        (http(b"", "401 Unauthorized", "Retry-After: 9"), "ignored", None),
        (http(b"", "429 Slow", "Retry-After: 9"), "failure", 9.0),
        (http(b"", "503 Busy", "Retry-After: 7"), "failure", 7.0),
        (http(b"", "500 Oops"), "failure", None),
        (http(b"x" * 3000), "success", None),
    ],
)
async def test_the_breaker_is_told_how_each_call_went(
    desk: Desk, response: bytes, outcome: str, retry_after_s: float | None
) -> None:
    async with Site(response) as site:
        await desk.call(desk.egress(site, breaker="b/1", response_max_bytes=2000))
        said = await desk.gate.said()
        assert desk.gate.admitted == [("b/1", "s1")]
        assert 0.0 <= said.pop("latency_s") < 1.0
        assert said == {"name": "b/1", "session": "s1", "permit": "permit-1", "outcome": outcome, "retry_after_s": retry_after_s}  # fmt: skip


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (BreakerOpen(breaker="b", probe_in_s=3.0), "breaker_open"),
        (Unavailable("the governor does not answer", what="governor"), "failed"),
    ],
)
async def test_without_a_permit_nothing_is_sent_and_the_guest_knows_why(
    desk: Desk, refusal: FabricError, outcome: str
) -> None:
    desk.gate.refusal = refusal
    async with Site(http()) as site:
        egress = desk.egress(site, breaker="b")
        assert await desk.error(egress) == refusal.to_body()["error"]
        assert (site.opened, desk.counted(outcome), desk.gate.reports) == (0, 1, [])


async def test_calls_over_the_endpoints_rate_are_told_and_are_not_the_runs(desk: Desk) -> None:
    clock = VirtualClock()
    async with Site(http()) as site:
        egress = desk.egress(site, clock=clock, calls_per_second=2.0, calls_per_run=3)
        out = Outgoing("r", "s", None, None, frozenset({"api"}), clock.monotonic() + 100)
        assert [(await desk.call(egress, out)).get("status") for _ in range(2)] == [200, 200]
        error = await desk.error(egress, out)
        assert (error["code"], error["what"], error["again_in_s"]) == ("overloaded", "endpoint", 0.5)
        assert (out.calls, desk.counted("rate"), len(site.seen)) == (2, 1, 2)
        await clock.advance(0.5)
        assert (await desk.call(egress, out))["status"] == 200


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "bad_request"), (b"{", "bad_request"), (b'{"endpoint": "api", "path": "/x", "method": "POST", "body": "%s"}' % (b"x" * 3000), "too_large")],
)  # fmt: skip
async def test_what_is_malformed_or_too_long_is_told(desk: Desk, data: bytes, code: str) -> None:
    egress = desk.egress("http://127.0.0.1:1", request_max_bytes=2000)
    answer = json.loads(await egress.call(data, desk.out()))
    assert answer["error"]["code"] == code
    assert desk.counted("failed") == 1


# -- TLS ----------------------------------------------------------------------------------------------------------------


class Authority:
    """Certificates, made with openssl."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory
        self._run("req", "-x509", *self._key("ca"), "-days", "2", "-subj", "/CN=ca", "-out", str(directory / "ca.crt"))
        self.ca = str(directory / "ca.crt")

    def _key(self, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        return [*curve, "-keyout", str(self._dir / f"{name}.key")]

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    def server(self, name: str, alternative: str | None, *, signed: bool = True, days: int = 2) -> ssl.SSLContext:
        """How a server shows a certificate for these names."""
        crt, csr = str(self._dir / f"{name}.crt"), str(self._dir / f"{name}.csr")
        more = ["-addext", f"subjectAltName={alternative}"] if alternative else []
        subject = ["-subj", "/CN=localhost"]
        if signed:
            self._run("req", "-new", *self._key(name), *subject, *more, "-out", csr)
            self._run("x509", "-req", "-in", csr, "-CA", self.ca, "-CAkey", str(self._dir / "ca.key"), "-days", str(days),
                      "-copy_extensions", "copy", "-out", crt)  # fmt: skip
        else:
            self._run("req", "-x509", *self._key(name), *subject, *more, "-days", "2", "-out", crt)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(crt, str(self._dir / f"{name}.key"))
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_an_endpoint_proves_who_it_is_by_the_name_in_its_url(desk: Desk, authority: Authority) -> None:
    tls = authority.server("good", "DNS:api.example,IP:127.0.0.1")
    names = []
    tls.sni_callback = lambda _, name, __: names.append(name)
    async with Site(http(b"abc"), tls) as site:
        named = desk.egress(f"https://api.example:{site.port}", leads_to(["127.0.0.1"]), ca_cert=authority.ca)
        assert (await desk.call(named))["body"] == "abc"
        assert (await desk.call(named))["body"] == "abc"
        assert names == ["api.example"], "and the second call used the first one's connection"
        assert (await desk.call(desk.egress(site, ca_cert=authority.ca)))["body"] == "abc"


@pytest.mark.parametrize(
    ("alternative", "signed", "days", "trusted", "why"),
    [
        ("DNS:other.example", True, 2, True, "hostname|Hostname"),
        ("DNS:*.api.example", True, 2, True, "hostname|Hostname"),
        ("IP:127.0.0.1", True, 2, True, "hostname|Hostname"),
        (None, True, 2, True, "hostname|Hostname"),  # a name in CN alone
        ("DNS:localhost", False, 2, True, "self-signed"),
        ("DNS:localhost", True, 2, False, "local issuer|self-signed"),
        ("DNS:localhost", True, -1, True, "expired"),
    ],
)
async def test_whoever_cannot_prove_it_gets_no_request(
    desk: Desk, authority: Authority, alternative: str | None, signed: bool, days: int, trusted: bool, why: str
) -> None:
    tls = authority.server("bad", alternative, signed=signed, days=days)
    async with Site(http(b"abc"), tls) as site:
        egress = desk.egress(
            f"https://localhost:{site.port}",
            leads_to(["127.0.0.1"]),
            ca_cert=authority.ca if trusted else None,
            credential=CREDENTIAL,
            breaker="b",
        )
        error = await desk.error(egress)
        assert (error["code"], error["what"], error["why"]) == ("unavailable", "endpoint", "tls")
        assert any(word in error["message"] for word in why.split("|")), error["message"]
        assert site.seen == []
        assert (await desk.gate.said())["outcome"] == "failure"


async def test_tls_below_1_2_is_refused(authority: Authority) -> None:
    made = dialing.contexts([egress_module.route("a", Endpoint(url="https://x", ca_cert=authority.ca))])["a"]
    assert made is not None
    assert made.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)


async def test_a_server_that_speaks_no_tls_gets_no_request(desk: Desk, authority: Authority) -> None:
    async with Site(http(b"abc")) as site:
        egress = desk.egress(f"https://127.0.0.1:{site.port}", ca_cert=authority.ca, timeout_seconds=0.2)

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            await reader.read()
            writer.close()

        assert (await desk.error(egress))["code"] == "unavailable"
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        egress = desk.egress(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", ca_cert=authority.ca)
        assert (await desk.error(egress))["why"] == "tls"
        server.close()
        assert site.seen == []


async def test_a_handshake_that_does_not_end_has_the_same_timeout(desk: Desk, authority: Authority) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100_000)
        await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    egress = desk.egress(f"https://127.0.0.1:{port}", ca_cert=authority.ca, timeout_seconds=0.2)
    began = time.monotonic()
    assert (await desk.error(egress))["why"] == "timeout"
    assert time.monotonic() - began < 0.6
    await asyncio.wait_for(ended.wait(), 5)
    server.close()


@pytest.mark.parametrize("content", [None, "not a certificate"])
async def test_a_ca_cert_that_cannot_be_used_is_refused_at_the_start(desk: Desk, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "ca.crt"
    if content:
        path.write_text(content)
    with pytest.raises(ConfigError, match="ca.crt"):
        desk.egress("https://x", ca_cert=str(path))


# -- its life -----------------------------------------------------------------------------------------------------------


async def test_stop_ends_what_is_kept_and_what_is_under_way(desk: Desk) -> None:
    async with Site(by_path(slow=silent, rest=http())) as site:
        egress = desk.egress(site, breaker="b")
        await egress.start()
        await egress.start()
        await desk.call(egress)
        under_way = asyncio.ensure_future(desk.call(egress, path="/slow"))
        await eventually(lambda: len(site.seen) == 2)
        await desk.call(egress)
        await egress.stop()
        await egress.stop()
        assert (await under_way)["error"]["code"] == "unavailable"
        await eventually(lambda: site.ended == site.opened == 2)
        assert (await desk.gate.said())["outcome"] == "ignored", "it is us who hung up"
        assert (await desk.error(egress))["what"] == "egress"
        assert (site.opened, len(desk.gate.admitted)) == (2, 3)
        await egress.start()  # nothing begins again


async def test_a_connection_that_is_made_while_it_stops_is_closed(desk: Desk, monkeypatch: Any) -> None:
    made, go_on = asyncio.Event(), asyncio.Event()
    connect = dialing.Dialer._connect

    async def slow(self: Any, address: str) -> Any:
        stream = await connect(self, address)
        made.set()
        await go_on.wait()
        return stream

    monkeypatch.setattr(dialing.Dialer, "_connect", slow)
    async with Site(http()) as site:
        egress = desk.egress(site)
        call = asyncio.ensure_future(desk.call(egress))
        await made.wait()
        await egress.stop()
        go_on.set()
        assert (await call)["error"]["what"] == "egress"
        await eventually(lambda: site.ended == 1)
        assert site.seen == []


async def test_reading_what_has_come_already_leaves_others_their_turn() -> None:
    reader = dialing._Reader(limit=1000)
    stream = dialing._Stream(None, reader, None)  # type: ignore[arg-type]
    stream.left = 1000
    reader.feed_data(b"x" * 100)
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    assert await stream.read(10) == b"x" * 10
    assert turns == [1]


async def test_a_report_that_nobody_takes_does_not_hold_up_the_end(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(egress_module, "STOP_S", 0.05)

    async def report(*_: Any, **__: Any) -> None:
        await asyncio.get_running_loop().create_future()

    desk.gate.report = report  # type: ignore[method-assign]
    async with Site(http()) as site:
        egress = desk.egress(site, breaker="b")
        await desk.call(egress)
        await egress.stop()


async def test_a_connection_that_nobody_uses_is_closed(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(dialing, "KEEPALIVE_S", 0.05)
    clock = VirtualClock()
    async with Site(http()) as site:
        egress = desk.egress(site, clock=clock)
        await egress.start()
        out = Outgoing("r", "s", None, None, frozenset({"api"}), clock.monotonic() + 100)
        await desk.call(egress, out)
        (connection,) = egress._places["api"].dialer._open
        await eventually(connection.has_expired)
        assert site.ended == 0
        await clock.advance(egress_module.KEEPALIVE_S)
        await eventually(lambda: site.ended == 1)
        assert not egress._places["api"].dialer._open


# -- the governor -------------------------------------------------------------------------------------------------------


async def test_the_governors_breaker_opens_after_so_many_failures_of_the_endpoint(world: World, desk: Desk) -> None:
    await world.daemon(governor={"circuit_breaker": {"failure_threshold": 3, "minimum_calls": 3, "reset_timeout": 30}})
    desk.gate = GovernorBreakers(world.bus)  # type: ignore[assignment]
    async with Site(by_path(bad=http(b"", "503 Busy", "Retry-After: 90"), rest=http())) as site:
        egress = desk.egress(site, breaker="api/1", calls_per_second=10_000.0)
        assert (await desk.call(egress))["status"] == 200
        for number in range(3):
            assert (await desk.call(egress, path="/bad"))["status"] == 503
            assert len(site.seen) == number + 2

        async def is_open() -> bool:
            return (await desk.call(egress)).get("error", {}).get("code") == "breaker_open"

        async with asyncio.timeout(5):
            while not await is_open():
                pass
        error = await desk.error(egress)
        assert 60 < error["probe_in_s"] <= 90, "as the endpoint asked"
        assert desk.counted("breaker_open") >= 2


async def test_without_a_governor_nothing_goes_out(world: World, desk: Desk) -> None:
    desk.gate = GovernorBreakers(world.bus)  # type: ignore[assignment]
    async with Site(http()) as site:
        error = await desk.error(desk.egress(site, breaker="api/1"))
        assert (error["code"], error["what"]) == ("unavailable", "governor")
        assert site.opened == 0
        await desk.gate.report("api/1", "s1", "nonsense", "success", latency_s=1.0)


async def test_what_the_governor_refuses_for_another_reason_is_no_fault_of_the_guests(world: World) -> None:
    await world.daemon(governor={})
    breakers = GovernorBreakers(world.bus)
    with pytest.raises(Unavailable) as caught:
        await breakers.admit("no name!", "s1")
    assert (caught.value.facts["what"], caught.value.facts["why"]) == ("governor", "bad_request")
    permit = await breakers.admit("api/2", "s1")
    await breakers.report("api/2", "s1", permit, "success", latency_s=-1.0)
    await breakers.report("api/2", "s1", permit, "success", latency_s=1.0)  # it was reported, and nobody minds
    lines = await world.ask("breakers", "s1", component="governor")
    assert [(line["breaker"], line["calls"]) for line in lines["breakers"]] == [("api/2", 1)]
    assert msgspec.json.encode(permit)
