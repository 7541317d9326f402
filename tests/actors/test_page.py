"""The parts of the live page: its history, its tokens, its viewers, its sample of events, and what it says over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from ifabric.audit.refusals import Refusals
from ifabric.bus.base import JournalSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.config import Http, MetricsPort
from ifabric.config_ops import Page
from ifabric.errors import ConfigError, Forbidden, Overloaded, Unauthenticated, Unavailable
from ifabric.handling import Handling
from ifabric.http.health import Snapshot
from ifabric.http.page import LivePage
from ifabric.http.page import live as live_module
from ifabric.http.page.api import is_loopback, refuse_rebound
from ifabric.http.page.asking import Asker, unless_looking
from ifabric.http.page.events import EVENTS_MAX, Events
from ifabric.http.page.history import History, quantile
from ifabric.http.page.shell import POLICY, Shell
from ifabric.http.page.sse import QUEUE_MAX, Viewer, frame
from ifabric.http.page.tokens import FAILURES_MAX, FAILURES_WITHIN_S, Tokens
from ifabric.http.server import HttpServer
from ifabric.metrics import LATENCY_S, Metrics
from ifabric.testing.harness import no_tasks_left
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.wire import coordinator, subjects

CLOCK = SystemClock()
HEALTHY = Snapshot(
    status="healthy",
    etcd="connected",
    nats="connected",
    loop_lag_s=0.001,
    version="1.2.3",
    uptime_s=5.0,
    actors={"children": [{"name": "residents", "children": [{"name": "c", "state": "running", "restarts": 2}]}]},
)
OPERATOR, VIEWER = "o" * 32, "v" * 32


class Hand:
    """A clock that is moved by hand, for what only ever reads it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return int(self.now * 1000)


# -- history -----------------------------------------------------------------------------------------------------------


def test_a_point_is_what_happened_since_the_one_before() -> None:
    metrics, clock = Metrics(), Hand()
    history = History(metrics, clock, ("coordinator", "chassis"), 60, lambda: 0.004)  # type: ignore[arg-type]
    granted = metrics.counter("if_coordinator_claims_total", outcome="granted")
    metrics.counter("if_actor_messages_total", actor="coordinator", verb="claim", outcome="ok").inc(10)
    metrics.counter("if_actor_messages_total", actor="coordinator", verb="claim", outcome="refused").inc(4)
    granted.inc(6)
    for latency_s in (0.0004, 0.0015, 0.9):
        metrics.histogram("if_coordinator_claim_latency_seconds").observe(latency_s)
    clock.now += 2
    point = history.step()
    assert (point.claims_per_s, point.handled_per_s, point.refused_per_s, point.runs_per_s) == (3.0, 7.0, 2.0, 0.0)
    assert point.lag_ms == 4.0
    assert point.p50_ms is not None
    assert point.p99_ms is not None
    assert 1.0 <= point.p50_ms <= 2.0
    assert 500 < point.p99_ms <= 1000
    clock.now += 2
    idle = history.step()
    assert (idle.claims_per_s, idle.p50_ms, idle.p99_ms) == (0.0, None, None)
    assert list(history.points) == [point, idle]


def test_the_history_keeps_as_much_as_it_is_to_and_no_more() -> None:
    clock = Hand()
    history = History(Metrics(), clock, (), 60, lambda: 0.0)  # type: ignore[arg-type]
    for _ in range(100):
        clock.now += 2
        history.step()
    assert len(history.points) == 30
    assert history.points[-1].at == "1970-01-01T00:05:00.000Z"


def test_what_does_not_run_here_is_null_and_not_zero() -> None:
    clock = Hand()
    point = History(Metrics(), clock, ("governor",), 60, lambda: 0.0).step()  # type: ignore[arg-type]
    assert (point.claims_per_s, point.runs_per_s, point.handled_per_s) == (None, None, 0.0)


@given(st.lists(st.integers(0, 50), min_size=len(LATENCY_S) + 1, max_size=len(LATENCY_S) + 1), st.floats(0.01, 1.0))
def test_a_percentile_lies_in_the_bucket_that_the_observations_are_in(counts: list[int], share: float) -> None:
    found = quantile(LATENCY_S, counts, share)
    if not sum(counts):
        assert found is None
        return
    assert found is not None
    below = sum(count for bound, count in zip(LATENCY_S, counts, strict=False) if bound <= found)
    upto = below + (counts[LATENCY_S.index(next(b for b in LATENCY_S if b > found))] if found < LATENCY_S[-1] else 0)
    assert found == LATENCY_S[-1] or upto >= share * sum(counts) - 1e-9


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_file(folder: Path, name: str, text: str, mode: int = 0o600) -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_a_token_says_who_acts_and_none_or_a_wrong_one_says_nobody(tmp_path: Path) -> None:
    files = {name: token_file(tmp_path, name, name[0] * 20 + "\nmore\n") for name in ("ann", "bob")}
    tokens = Tokens(Page(operators=files), CLOCK)
    assert tokens.act(bearer("a" * 20), "x") == "ann"
    assert tokens.act({"authorization": "bearer  " + "b" * 20}, "x") == "bob"
    for wrong in ("c" * 20, "a" * 19, "a" * 21, "é" * 20):
        with pytest.raises(Forbidden):
            tokens.act(bearer(wrong), "x")
    for missing in ({}, {"authorization": ""}, {"authorization": "Bearer "}, {"authorization": "Basic " + "a" * 20}):
        with pytest.raises(Unauthenticated):
            tokens.act(missing, "y")


def test_to_look_takes_the_viewer_s_token_or_an_operator_s(tmp_path: Path) -> None:
    page = Page(
        viewer_token_file=token_file(tmp_path, "v", VIEWER), operators={"ann": token_file(tmp_path, "o", OPERATOR)}
    )
    tokens = Tokens(page, CLOCK)
    tokens.look(bearer(VIEWER), "x")
    tokens.look(bearer(OPERATOR), "x")
    with pytest.raises(Forbidden):
        tokens.look(bearer("x" * 32), "x")
    with pytest.raises(Unauthenticated):
        tokens.look({}, "x")
    with pytest.raises(Forbidden):
        tokens.act(bearer(VIEWER), "x")
    Tokens(Page(), CLOCK).look({}, "x")


def test_a_token_is_replaced_and_taken_away_without_a_restart(tmp_path: Path) -> None:
    path = token_file(tmp_path, "ann", "a" * 20)
    tokens = Tokens(Page(operators={"ann": path}), CLOCK)
    Path(path).write_text("b" * 22)
    assert tokens.act(bearer("b" * 22), "x") == "ann"
    with pytest.raises(Forbidden):
        tokens.act(bearer("a" * 20), "x")
    Path(path).write_text("")
    assert "has 0 characters" in tokens.warnings[0]
    for token in ("b" * 22, ""):
        with pytest.raises((Forbidden, Unauthenticated)):
            tokens.act(bearer(token), "x")
    Path(path).unlink()
    with pytest.raises(Forbidden):
        tokens.act(bearer("b" * 22), "x")
    assert "cannot read" in tokens.warnings[0]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("ann", "short\n", "has 5 characters; it takes 16"),
        ("ann", "", "has 0 characters"),
        ("ann", "a" * 2000, "is no token"),
        ("ann", "ü" * 20, "is no token"),
        ("ann", "two words of a token", "is no token"),
        ("_page", "a" * 20, "a name of the fabric itself"),
    ],
)
def test_a_token_that_is_not_good_is_named_by_its_key(tmp_path: Path, name: str, text: str, why: str) -> None:
    path = token_file(tmp_path, "t", text)
    with pytest.raises(ConfigError, match=f"page.operators.{name}.*{why}"):
        Tokens(Page(operators={name: path}), CLOCK)


def test_a_token_file_that_is_missing_shared_or_open_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="page.viewer_token_file: cannot read"):
        Tokens(Page(viewer_token_file=str(tmp_path / "none")), CLOCK)
    one, other = (token_file(tmp_path, name, "a" * 20) for name in ("one", "other"))
    with pytest.raises(ConfigError, match="the same token"):
        Tokens(Page(operators={"ann": one, "bob": other}), CLOCK)
    Path(one).chmod(0o644)
    assert "chmod 600" in Tokens(Page(operators={"ann": one}), CLOCK).warnings[0]
    Path(one).chmod(0o400)
    assert Tokens(Page(operators={"ann": one}), CLOCK).warnings == ()


def test_guessing_is_slow_and_costs_nobody_else_anything(tmp_path: Path) -> None:
    clock = Hand()
    tokens = Tokens(Page(operators={"ann": token_file(tmp_path, "ann", OPERATOR)}), clock)  # type: ignore[arg-type]
    for _ in range(FAILURES_MAX):
        with pytest.raises(Forbidden):
            tokens.act(bearer("w" * 32), "guesser")
    with pytest.raises(Overloaded) as caught:
        tokens.act(bearer(OPERATOR), "guesser")
    assert 0 < caught.value.facts["retry_in_s"] <= FAILURES_WITHIN_S
    assert tokens.act(bearer(OPERATOR), "ann's") == "ann"
    clock.now += FAILURES_WITHIN_S
    assert tokens.act(bearer(OPERATOR), "guesser") == "ann"


# -- who may be listened to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:8080", "[::1]"])
def test_a_browser_that_calls_this_machine_by_its_own_name_is_answered(host: str) -> None:
    refuse_rebound(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "", "10.0.0.1", "localhost.evil.example", "[::2]"]
)
def test_a_name_that_was_made_to_lead_here_is_refused(host: str) -> None:
    with pytest.raises(Forbidden, match="viewer_token_file"):
        refuse_rebound(host)


def test_only_this_machine_reaches_a_loopback_address() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.1.1.1")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_what_the_page_reads_is_not_witnessed_and_what_else_is_done_under_its_name_is() -> None:
    seen: list[str] = []
    witness = unless_looking(lambda handling: seen.append(f"{handling.session} {handling.verb}"))
    for session in (subjects.PAGE_SESSION, "ann"):
        for verb, admin in (
            ("list", False),
            ("sessions", True),
            ("sessions", False),
            ("cancel", True),
            ("hello", False),
        ):
            witness(Handling("coordinator", verb, session, 0.0, admin=admin))
    assert seen == [
        "_page sessions",
        "_page cancel",
        "_page hello",
        *(f"ann {v}" for v in ("list", "sessions", "sessions", "cancel", "hello")),
    ]


# -- viewers -----------------------------------------------------------------------------------------------------------


async def test_a_viewer_that_does_not_keep_up_is_let_go() -> None:
    viewer = Viewer()
    for n in range(QUEUE_MAX):
        viewer.put(b"%d" % n)
    assert await viewer.next() == b"0"
    viewer.put(b"one more")
    assert not viewer.over
    viewer.put(b"too many")
    assert viewer.over
    assert await viewer.next() is None


def test_no_content_can_begin_another_event() -> None:
    hostile = "x\n\nevent: now\ndata: {}\r\n\u2028\n\n"
    told = frame("events", [{"task": hostile}])
    assert told.startswith(b"event: events\ndata: [")
    assert told.count(b"\n") == 3
    assert b"\r" not in told
    assert msgspec.json.decode(told[len(b"event: events\ndata: ") :]) == [{"task": hostile}]


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def buses() -> AsyncIterator[tuple[MemoryBus, MemoryBus]]:
    hub = MemoryHub()
    pair = (MemoryBus(hub), MemoryBus(hub))
    for bus in pair:
        await bus.connect()
    yield pair
    for bus in pair:
        await bus.close()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_more_events_than_are_shown_are_counted_and_not_listened_to(buses: tuple[MemoryBus, MemoryBus]) -> None:
    bus, other = buses
    journal = await other.journal(
        JournalSpec(subjects.EVENT_STREAM, (subjects.EVENTS,), max_age_s=60, max_bytes=1 << 20)
    )
    events = Events(bus)
    await events.open()
    entries = [
        (subjects.event("task", "claimed"), msgspec.json.encode({"task": f"T{n}"}), f"id-{n}") for n in range(200)
    ]
    await journal.append(entries[:60])
    await settled()
    await journal.append(entries[60:])
    await settled()
    first = events.take()
    assert [event["task"] for event in first[:EVENTS_MAX]] == [f"T{n}" for n in range(EVENTS_MAX)]
    await events.open()
    left_out = (first[EVENTS_MAX]["dropped"] if len(first) > EVENTS_MAX else 0) + sum(
        event["dropped"] for event in events.take()
    )
    assert left_out == 150
    await journal.append([(subjects.event("task", "done"), b'{"task": "after"}', "id-after")])
    await settled()
    assert events.take() == [{"task": "after", "subject": "if.v1.event.task.done"}]
    await events.close()


async def test_an_event_that_is_none_is_told_by_its_subject(buses: tuple[MemoryBus, MemoryBus]) -> None:
    bus, other = buses
    events = Events(bus)
    await events.open()
    for data in (b"not json", b"[1]", b'"' + b"x" * 5000 + b'"', b"\xff", b"[" * 100_000, b'{"subject": "forged"}'):
        await other.publish(subjects.event("task", "odd"), data)
    await settled()
    assert events.take() == [{"subject": "if.v1.event.task.odd"}] * 6
    await events.close()


async def test_events_are_listened_to_again_on_a_new_connection(buses: tuple[MemoryBus, MemoryBus]) -> None:
    bus, other = buses
    events = Events(bus)
    await events.open()
    await bus.close()
    with pytest.raises(Unavailable):
        await events.open()
    await bus.connect()
    await events.open()
    await other.publish(subjects.event("task", "x"), b"{}")
    await settled()
    assert events.take() == [{"subject": "if.v1.event.task.x"}]
    await events.close()


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Status:
    def snapshot(self) -> Snapshot:
        return HEALTHY


class Served:
    """A page on a port of its own, with nobody behind it."""

    def __init__(self, page: Page | None = None, host: str = "127.0.0.1") -> None:
        self.metrics = Metrics()
        self.bus = MemoryBus(MemoryHub())
        self.refusals = Refusals(CLOCK)
        http = Http(host=host, port=0)
        self.page = LivePage(
            page or Page(),
            http,
            bus=self.bus,
            metrics=self.metrics,
            status=Status(),
            clock=CLOCK,
            log=structlog.get_logger(),
            hosted={"c": "coordinator"},
            daemon="here:1",
            refusals=self.refusals,
            lag_s=lambda: 0.001,
            witnesses=(self.refusals.witness,),
        )
        self.server = HttpServer(http, {"coordinator": MetricsPort()}, Status(), self.metrics, self.page.routes)

    async def __aenter__(self) -> Self:
        await self.bus.connect()
        await self.server.start()
        await self.page.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.page.stop()
        await self.server.stop()
        await self.bus.close()

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.server.url, trust_env=False, verify=False, headers=headers, timeout=httpx.Timeout(20)
        )


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served() as made:
        yield made


async def of_stream(lines: AsyncIterator[str], event: str) -> Any:
    """The data of the next event of that name."""
    name = ""
    async with asyncio.timeout(10):
        async for line in lines:
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name == event:
                return msgspec.json.decode(value)
    raise AssertionError(f"the stream ended without {event}")


def test_every_file_of_the_page_is_served_by_its_own_path_alone(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    for name in ("page.html", "page.js", "page.css", "page/part.js", "page/notes.txt", "secret.html"):
        (tmp_path / name).write_text(name)
    assert Shell(tmp_path).paths == ("/", "/page.js", "/page.css", "/page/part.js")


async def test_the_page_may_load_and_send_nothing_elsewhere(served: Served) -> None:
    async with served.client() as client:
        for path in Shell().paths:
            reply = await client.get(path)
            assert reply.status_code == 200, path
            assert reply.headers["content-security-policy"] == POLICY
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert reply.headers["cache-control"] == "no-cache"
            again = await client.get(path, headers={"if-none-match": reply.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (await client.get("/page/..%2f..%2fserver.py")).status_code == 404
        data = await client.get("/api/tasks")
        assert data.headers["cache-control"] == "no-store"
        assert data.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in data.headers


async def test_a_component_that_runs_nowhere_is_said_to_and_is_no_empty_list(served: Served) -> None:
    async with served.client() as client:
        reply = await client.get("/api/tasks")
        assert reply.status_code == 503
        error = reply.json()["error"]
        assert (error["code"], error["what"], error["reason"]) == ("unavailable", "coordinator", "no_responders")
        async with client.stream("GET", "/api/stream") as stream:
            now = await of_stream(stream.aiter_lines(), "now")
    assert now["counts"] is None
    assert (
        now["breakers"]
        is now["workers"]
        is now["queue"]
        is now["holds"]
        is now["budget_fullest"]
        is now["audit"]
        is None
    )
    assert now["waiters"] == 0, "what this daemon's own coordinator counts is known"
    assert "no daemon that is connected runs one" in now["missing"]["coordinator.list"]
    assert now["actors"] == [
        {"actor": "coordinator", "state": "running", "restarts": 2}
        | dict.fromkeys(("mailbox", "in_flight", "handled", "refused", "errors"), 0)
    ]


async def test_before_nats_is_there_the_page_says_so() -> None:
    nowhere = Nats(NatsSettings(servers=("nats://127.0.0.1:1",)), CLOCK)
    for message in (coordinator.List(), coordinator.Cancel(task="T")):
        with pytest.raises(Unavailable, match="not connected to NATS"):
            await Asker(nowhere, CLOCK).ask(message)
    with pytest.raises(Unavailable):
        await Events(nowhere).open()


async def test_one_who_comes_is_told_what_was_and_then_what_is_new(served: Served) -> None:
    def refuse(task: str) -> None:
        handling = Handling("coordinator", "claim", "w", 0.0)
        handling.outcome, handling.error = "refused", Overloaded(task)
        served.refusals.witness(handling)

    refuse("before")
    async with served.client() as client, client.stream("GET", "/api/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        history = await of_stream(lines, "history")
        assert history["step_s"] == 2
        (told,) = await of_stream(lines, "refusals")
        assert (told["session"], told["component"], told["verb"], told["code"]) == (
            "w",
            "coordinator",
            "claim",
            "overloaded",
        )
        refuse("new")
        assert [one["why"] for one in await of_stream(lines, "refusals")] == ["new"]
        point = await of_stream(lines, "point")
        assert set(point) >= {"at", "claims_per_s", "p50_ms", "handled_per_s", "lag_ms"}
        assert served.metrics.gauge("if_page_viewers").value == 1


async def test_nobody_is_asked_and_nothing_is_heard_while_nobody_looks(served: Served, monkeypatch: Any) -> None:
    asked: list[str] = []
    listened: list[str] = []
    request, subscribe = served.bus.request, served.bus.subscribe

    async def counted(subject: str, data: bytes, **options: Any) -> Any:
        asked.append(subject)
        return await request(subject, data, **options)

    async def heard(subject: str, handler: Any, **options: Any) -> Any:
        listened.append(subject)
        return await subscribe(subject, handler, **options)

    monkeypatch.setattr(served.bus, "request", counted)
    monkeypatch.setattr(served.bus, "subscribe", heard)
    await asyncio.sleep(1.2)
    assert (asked, listened) == ([], [])
    async with served.client() as client:
        async with client.stream("GET", "/api/stream") as stream:
            await of_stream(stream.aiter_lines(), "now")
        assert asked
        assert listened == [subjects.EVERY_EVENT]
        async with asyncio.timeout(5):
            while served.metrics.gauge("if_page_viewers").value:
                await asyncio.sleep(0.01)
    await asyncio.sleep(1.2)  # one that was under way may still be asked
    before = len(asked)
    await asyncio.sleep(1.5)
    assert len(asked) == before


async def test_as_many_look_as_may_and_one_more_is_told_so(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(live_module, "VIEWERS_MAX", 2)
    async with (
        served.client() as client,
        client.stream("GET", "/api/stream") as one,
        client.stream("GET", "/api/stream") as two,
    ):
        assert (one.status_code, two.status_code) == (200, 200)
        async with client.stream("GET", "/api/stream") as third:
            assert third.status_code == 503
            assert b"look at this daemon's page already" in await third.aread()


async def test_streams_end_when_the_page_does_and_the_port_does_not_wait_for_them() -> None:
    async with (
        no_tasks_left(),
        Served() as served,
        served.client() as client,
        client.stream("GET", "/api/stream") as stream,
    ):
        lines = stream.aiter_lines()
        await of_stream(lines, "history")
        began = CLOCK.monotonic()
        await served.page.stop()
        await served.server.stop()
        assert [line async for line in lines if line.startswith("event: never")] == []
        assert CLOCK.monotonic() - began < 3


async def test_a_peer_that_reads_nothing_is_let_go_and_the_others_are_not_held_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(live_module, "TICK_S", 0.05)
    async with Served() as served:
        port = int(served.server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with served.client() as client, client.stream("GET", "/api/stream") as stream:
            lines = stream.aiter_lines()
            await of_stream(lines, "now")
            filler = "x" * 200
            dropped = served.metrics.counter("if_page_viewers_dropped_total")
            async with asyncio.timeout(20):
                while not dropped.value:
                    for n in range(100):
                        handling = Handling("coordinator", "claim", f"w{n}", 0.0)
                        handling.outcome, handling.error = "refused", Overloaded(filler)
                        served.refusals.witness(handling)
                    await of_stream(lines, "now")
        assert dropped.value == 1
        writer.close()
        del reader


async def test_another_site_s_name_for_this_machine_is_refused_data_and_not_the_shell(served: Served) -> None:
    async with served.client(host="evil.example") as client:
        for path in ("/api/tasks", "/api/stream"):
            reply = await client.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")


async def test_with_a_token_to_look_the_name_does_not_matter(tmp_path: Path) -> None:
    page = Page(viewer_token_file=token_file(tmp_path, "v", VIEWER))
    async with Served(page) as served, served.client(host="fabric.example") as client:
        for path in ("/api/tasks", "/api/stream"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer("w" * 32))).status_code == 403
        assert (await client.get("/api/tasks", headers=bearer(VIEWER))).status_code == 503, "nobody is behind it"
        async with client.stream("GET", "/api/stream", headers=bearer(VIEWER)) as stream:
            assert stream.status_code == 200
        for path in Shell().paths:
            assert (await client.get(path)).status_code == 200
    assert {(r.component, r.verb, r.code) for r in served.refusals.last} == {
        ("page", "view", "unauthenticated"),
        ("page", "view", "forbidden"),
    }
    counted = [served.metrics.counter("if_page_refused_total", why=why).value for why in ("missing", "wrong")]
    assert counted == [2, 2]


async def test_an_action_takes_json_and_an_operator_and_no_more_than_its_fields(tmp_path: Path) -> None:
    page = Page(operators={"ann": token_file(tmp_path, "ann", OPERATOR)})
    async with Served(page) as served, served.client() as client:
        task = {"task": "T"}
        for action in ("cancel", "requeue", "open", "close", "limit", "kill"):
            assert (await client.get(f"/api/actions/{action}")).status_code in (404, 405)
            assert (await client.post(f"/api/actions/{action}", json=task)).status_code == 401
            if action in ("cancel", "open"):
                wrong = await client.post(f"/api/actions/{action}", json=task, headers=bearer("w" * 32))
                assert wrong.status_code == 403
        assert {(r.component, r.verb, r.code) for r in served.refusals.last} >= {
            ("page", "kill", "unauthenticated"),
            ("page", "open", "forbidden"),
        }
        client.headers.update(bearer(OPERATOR))
        for content in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            reply = await client.post("/api/actions/cancel", content=b'{"task":"T"}', headers={"content-type": content})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        json = {"content-type": "application/json; charset=utf-8"}
        for body, why in (
            (b"", "task"),
            (b"[]", "object"),
            (b"{", "not JSON"),
            (b'{"task":"T","force":true}', "force"),
            (b'{"task":"a\\nb"}', r"\$.task"),
            (b'{"task":' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
        ):
            reply = await client.post("/api/actions/cancel", content=body, headers=json)
            assert reply.status_code == 400, body[:40]
            assert why.replace("\\", "") in reply.json()["error"]["message"]
        limit = await client.post("/api/actions/limit", content=b'{"account":"acme"}', headers=json)
        assert "limit_micro_usd" in limit.json()["error"]["message"], "no limit is not taken for one by a slip"
        large = b'{"task":"' + b"x" * 70_000 + b'"}'

        async def chunked() -> AsyncIterator[bytes]:
            for at in range(0, len(large), 1000):
                yield large[at : at + 1000]

        for content in (large, chunked()):
            reply = await client.post("/api/actions/cancel", content=content, headers=json)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_large")
        nobody = await client.post("/api/actions/cancel", content=b'{"task":"T"}', headers=json)
        assert (nobody.status_code, nobody.json()["error"]["what"]) == (503, "coordinator")


async def test_what_is_not_there_is_an_error_of_the_wire(served: Served) -> None:
    async with served.client() as client:
        for method, path in (
            ("GET", "/api/nothing"),
            ("PUT", "/api/tasks"),
            ("POST", "/api/actions/purge"),
            ("OPTIONS", "/api/actions/cancel"),
        ):
            reply = await client.request(method, path)
            assert reply.status_code in (404, 405), (method, path)
            assert "access-control-allow-origin" not in reply.headers
        for query in ("limit=0", "limit=1001", "limit=x", "state=gone", "after=%0a", "match=" + "x" * 200):
            reply = await client.get(f"/api/tasks?{query}")
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request"), query
        assert (await client.get("/api/task")).status_code == 400
        assert (await client.get("/api/account")).status_code == 400
        assert (await client.head("/api/stream")).status_code == 200
