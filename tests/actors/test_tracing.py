"""Traces: what is recorded of a request, what is not, and that a collector can do no harm."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ifabric import tracing
from ifabric.cli import connect
from ifabric.clock import SystemClock, monotonic
from ifabric.config_ops import Tracing
from ifabric.errors import ConfigError, UnknownTask
from ifabric.metrics import Metrics
from ifabric.tracing import otel
from ifabric.tracing.traceparent import Traceparent, parse, spell
from ifabric.wire import coordinator as wire
from ifabric.wire import governor, subjects
from tests.actors import test_chassis_egress as outside
from tests.actors.collector import Collector, Got, named
from tests.actors.conftest import World
from tests.actors.sdk import client
from tests.actors.test_egress import Site
from tests.actors.vault_stub import VaultStub
from tests.guests.build import guest

CLOCK = SystemClock()
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASKED = f"00-{TRACE}-{SPAN}-01"
provider, vault = outside.provider, outside.vault


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


Recorders = Callable[..., Awaitable[otel.OtelRecorder]]


@pytest.fixture
async def recorders() -> AsyncIterator[Recorders]:
    """Recorders that are started, and stopped with the test."""
    async with contextlib.AsyncExitStack() as closing:

        async def make(endpoint: str, *, ratio: float = 1.0, metrics: Metrics | None = None) -> otel.OtelRecorder:
            config = Tracing(enabled=True, endpoint=endpoint, sample_ratio=ratio)
            made = tracing.recorder(config, CLOCK, metrics or Metrics(), structlog.get_logger(), version="1.2.3")
            assert isinstance(made, otel.OtelRecorder)
            await made.start()
            closing.push_async_callback(made.stop)
            return made

        yield make


@pytest.fixture
def application(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[trace.Tracer]:
    """A process that traces for itself, as an agent's would: a global provider."""
    provider = TracerProvider(resource=Resource.create({"service.name": "agent"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(collector.url)))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider.get_tracer("the agent")
    provider.shutdown()


async def asked(world: World, verb: str, session: str, header: str | None = None, **body: Any) -> dict[str, Any]:
    """One request with that traceparent; the body of its answer."""
    from msgspec import json

    headers = {} if header is None else {"traceparent": header}
    subject = subjects.request("coordinator", verb, session)
    answer = await world.bus.request(subject, json.encode(body), timeout_s=5, headers=headers)
    found: dict[str, Any] = json.decode(answer.data)
    return found


# -- the header -------------------------------------------------------------------------------------------------------


def test_a_traceparent_is_read_as_it_is_written() -> None:
    read = Traceparent(int(TRACE, 16), int(SPAN, 16), sampled=True)
    assert parse(ASKED) == read
    assert spell(*read[:2], sampled=True) == ASKED
    assert spell(1, 2, sampled=False) == f"00-{1:032x}-{2:016x}-00"


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("ff", True)])
def test_only_the_sampled_bit_of_the_flags_counts(flags: str, sampled: bool) -> None:
    read = parse(f"00-{TRACE}-{SPAN}-{flags}")
    assert read is not None
    assert read.sampled is sampled


def test_a_later_version_may_say_more() -> None:
    assert parse(f"01-{TRACE}-{SPAN}-01-more") == parse(ASKED)
    assert parse(f"cc-{TRACE}-{SPAN}-01") == parse(ASKED)


MALFORMED = [
    "",
    "00",
    "00-ab-cd-01",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01 ",
    f"00-{TRACE}-{SPAN}-01\n",
    f"01-{TRACE}-{SPAN}-01more",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    f"01-{TRACE}-{SPAN}-01-" + "x" * 100_000,
]


@pytest.mark.parametrize("header", MALFORMED)
def test_what_is_no_traceparent_is_none(header: str) -> None:
    assert parse(header) is None


# -- one request ------------------------------------------------------------------------------------------------------


async def test_a_claim_is_one_trace_from_the_agent_to_the_commit(
    world: World, collector: Collector, recorders: Recorders, application: trace.Tracer
) -> None:
    await world.daemon(tracer=await recorders(collector.url))
    async with client(world, "worker") as agent:
        await agent.submit([wire.TaskSpec(id="T-1")])
        await agent.hello()
        with application.start_as_current_span("the agent's work") as work:
            claim = await agent.claim("T-1")
            await claim.complete({"ok": True})
        ours = f"{work.get_span_context().trace_id:032x}"

        def whole(spans: list[Got]) -> list[Got] | None:
            of_it = [s for s in spans if s.trace == ours]
            return of_it if len([s for s in of_it if s.name == "reply"]) == 2 and len(of_it) == 9 else None

        spans = await collector.until(whole)
    root = named(spans, "the agent's work")
    for verb in ("claim", "complete"):
        asking, handling = (next(s for s in spans if (s.name, s.kind) == (f"coordinator.{verb}", kind))
                            for kind in ("client", "server"))  # fmt: skip
        assert (root.parent, asking.parent, handling.parent) == ("", root.id, asking.id)
        parts = sorted((s for s in spans if s.parent == handling.id), key=lambda s: s.began_ns)
        assert [part.name for part in parts] == ["commit", "reply"]
        commit, reply = parts
        assert asking.began_ns <= handling.began_ns <= commit.began_ns <= commit.ended_ns
        assert commit.ended_ns <= reply.ended_ns <= handling.ended_ns
        assert commit.attributes["ifabric.commit.succeeded"] is True
        assert commit.events == [("sent", {"ifabric.commit.batch_size": 1})]
        assert handling.resource["service.name"] == "ifabric"
        assert handling.resource["service.version"] == "1.2.3"
        assert len(handling.resource["service.instance.id"]) == 22
        assert asking.resource["service.name"] == "agent"
        told = handling.attributes
        assert told.pop("ifabric.request_id") == asking.attributes["ifabric.request_id"] != ""
        assert told == {
            "messaging.system": "nats",
            "messaging.operation.type": "process",
            "messaging.operation.name": verb,
            "messaging.destination.name": f"if.v1.coordinator.{verb}.*",
            "ifabric.session": "worker",
            "ifabric.outcome": "ok",
            "ifabric.task": "T-1",
            "ifabric.fence": claim.fence,
        }
        assert handling.status == 0


async def test_an_event_says_the_revision_that_its_commit_says(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    await world.daemon(tracer=await recorders(collector.url))
    async with client(world, "worker") as agent:
        agent.trace = ASKED
        await agent.submit([wire.TaskSpec(id="T-2")])
        claim = await agent.claim("T-2")
        spans = await collector.until(
            lambda spans: (
                [s for s in spans if s.name == "commit" and "ifabric.revision" in s.attributes][2:]
                and [s for s in spans if s.name == "coordinator.claim"]
                and spans
            )
        )
        handled = named(spans, "coordinator.claim")
        (commit,) = [s for s in spans if s.parent == handled.id and s.name == "commit"]
        async with asyncio.timeout(10):
            async for event in agent.events(after_seq=0):
                if event.event == "claimed" and event.task == "T-2":
                    break
        assert (event.revision, event.fence) == (commit.attributes["ifabric.revision"], claim.fence)


async def test_requests_of_one_transaction_have_a_commit_each_that_says_how_many_went_together(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    await world.daemon(tracer=await recorders(collector.url, ratio=0.0))
    names = [f"s{n}" for n in range(20)]
    for name in names:
        await asked(world, "hello", name)
    await asked(world, "submit", "s0", tasks=[{"id": f"B-{name}"} for name in names])
    traces = {name: spell(n + 1, n + 1, sampled=True) for n, name in enumerate(names)}
    await asyncio.gather(*(asked(world, "claim", name, traces[name], task=f"B-{name}") for name in names))
    spans = await collector.until(
        lambda spans: len([s for s in spans if s.name == "coordinator.claim"]) == 20 and list(spans)
    )
    commits = [s for s in spans if s.name == "commit"]
    assert {s.trace for s in commits} == {header.split("-")[1] for header in traces.values()}
    by_revision: dict[int, int] = {}
    for commit in commits:
        revision = commit.attributes["ifabric.revision"]
        by_revision[revision] = by_revision.get(revision, 0) + 1
    sizes = {c.attributes["ifabric.revision"]: c.events[0][1]["ifabric.commit.batch_size"] for c in commits}
    assert sizes == by_revision
    assert max(sizes.values()) > 1


async def test_a_refusal_is_named_and_is_no_error_of_the_daemons(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    await world.daemon(tracer=await recorders(collector.url))
    await asked(world, "claim", "me", ASKED, task="not-there")
    await asked(world, "claim", "me", spell(7, 7, sampled=True), task=17)
    refused, unread = [
        named(await collector.trace("coordinator.claim", "reply", of=of), "coordinator.claim")
        for of in (TRACE, f"{7:032x}")
    ]
    assert refused.attributes["ifabric.outcome"] == unread.attributes["ifabric.outcome"] == "refused"
    assert refused.attributes["error.type"] == "session_lost"
    assert unread.attributes["error.type"] == "bad_request"
    assert (refused.status, unread.status) == (0, 0)
    assert (refused.parent, refused.trace) == (SPAN, TRACE)


async def test_a_failing_client_span_names_the_refusal(
    world: World, collector: Collector, recorders: Recorders, application: trace.Tracer
) -> None:
    await world.daemon(tracer=await recorders(collector.url))
    async with client(world, "worker") as agent:
        with pytest.raises(UnknownTask):
            await agent.get("nowhere")
    asking = await collector.until(
        lambda spans: [s for s in spans if (s.name, s.kind) == ("coordinator.get", "client")]
    )
    assert (asking[0].attributes["error.type"], asking[0].status) == ("unknown_task", 2)


# -- what is not recorded ---------------------------------------------------------------------------------------------


async def test_the_senders_sampled_flag_is_followed_and_the_ratio_is_for_new_traces(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    recorder = await recorders(collector.url, ratio=1.0)
    await world.daemon(tracer=recorder)
    await asked(world, "list", "me", spell(5, 5, sampled=False))
    await asked(world, "list", "me")
    await asked(world, "list", "me", ASKED)
    await recorder.stop()
    roots = [s for s in collector.spans if s.name == "coordinator.list"]
    assert [(s.trace == TRACE, s.parent) for s in roots] == [(False, ""), (True, SPAN)]
    assert f"{5:032x}" not in {s.trace for s in roots}


async def test_a_ratio_of_nothing_records_only_what_others_began(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    recorder = await recorders(collector.url, ratio=0.0)
    await world.daemon(tracer=recorder)
    for _ in range(50):
        await asked(world, "list", "me")
    await asked(world, "list", "me", ASKED)
    await recorder.stop()
    assert {s.trace for s in collector.spans} == {TRACE}


async def test_a_ratio_in_between_records_about_so_many(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    recorder = await recorders(collector.url, ratio=0.3)
    await world.daemon(tracer=recorder)
    for _ in range(10):
        await asyncio.gather(*(asked(world, "list", "me") for _ in range(40)))
    await recorder.stop()
    assert 60 <= len([s for s in collector.spans if s.name == "coordinator.list"]) <= 180  # 120, give or take 6.5 sigma


async def test_a_malformed_traceparent_is_as_none(world: World, collector: Collector, recorders: Recorders) -> None:
    recorder = await recorders(collector.url)
    await world.daemon(tracer=recorder)
    carried = [header for header in MALFORMED if header.isascii() and len(header) < 1000 and not header[-1:].isspace()]
    for header in carried:  # the others no connection carries as they are
        assert "tasks" in await asked(world, "list", "me", header)
    await recorder.stop()
    roots = [s for s in collector.spans if s.name == "coordinator.list"]
    assert [s.parent for s in roots] == [""] * len(carried)
    assert len({s.trace for s in roots}) == len(carried)


# -- money, sandboxes -------------------------------------------------------------------------------------------------


async def test_money_is_posted_in_a_part_of_its_own(world: World, collector: Collector, recorders: Recorders) -> None:
    await world.daemon(governor={}, tracer=await recorders(collector.url, ratio=0.0))
    async with client(world, "payer") as agent:
        await agent.hello()
        agent.trace = ASKED
        await agent.call(governor.Reserve(hold="h-1", amount_micro_usd=5))
    spans = await collector.trace("governor.reserve", "posting")
    posting = named(spans, "posting")
    assert posting.parent == named(spans, "governor.reserve").id
    assert posting.attributes["ifabric.commit.succeeded"] is True
    assert posting.events[-1] == ("sent", {"ifabric.commit.batch_size": 1})
    teller = [s for s in spans if s.name == "commit" and s.parent == named(spans, "governor.reserve").id]
    assert all(s.ended_ns <= posting.began_ns for s in teller)  # the transaction is for many, and no one's child


async def test_a_run_is_told_with_its_calls_to_the_outside_and_what_they_ask_of_others(
    world: World,
    collector: Collector,
    recorders: Recorders,
    provider: Site,
    vault: VaultStub,
    tmp_path: Path,
) -> None:
    chassis = outside.section(provider, vault, tmp_path, breaker="llm")
    recorder = await recorders(collector.url, ratio=0.0)
    await world.daemon(actors=(), governor={}, chassis=chassis, state_dir=tmp_path, tracer=recorder)
    async with client(world, "runner") as agent:
        module = await agent.put_module(guest("fetch"))
        agent.trace = ASKED
        result = await agent.run_module(module, "llm", "GET", "/rest", endpoints=["llm"])
        assert result.exit_code == 0, result
    spans = await collector.trace("chassis.run", "run", "egress", "governor.admit", "governor.report")
    run, call = named(spans, "run"), named(spans, "egress")
    asking = named(spans, "chassis.run")
    assert (asking.parent, run.parent, call.parent) == (SPAN, asking.id, run.id)
    assert run.attributes["ifabric.run.end"] == "exit"
    assert run.attributes["process.exit.code"] == 0
    assert run.attributes["ifabric.run.fuel"] > 0
    assert run.attributes["ifabric.module"] == module
    assert (call.kind, call.attributes) == (
        "client",
        {"ifabric.endpoint": "llm", "http.request.method": "GET", "http.response.status_code": 200},
    )
    assert named(spans, "governor.admit").parent == asking.id


# -- the SDK ----------------------------------------------------------------------------------------------------------


async def test_without_a_provider_the_current_span_goes_along(
    world: World, collector: Collector, recorders: Recorders
) -> None:
    await world.daemon(tracer=await recorders(collector.url, ratio=0.0))
    somebody = trace.NonRecordingSpan(
        trace.SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=False, trace_flags=trace.TraceFlags(1))
    )
    async with client(world, "worker") as agent:
        with trace.use_span(somebody):
            await agent.list()
    spans = await collector.trace("coordinator.list")
    assert [(s.parent, s.kind) for s in spans if s.name == "coordinator.list"] == [(SPAN, "server")]


async def test_renewals_go_on_after_the_work_that_began_them_and_are_no_part_of_its_trace(
    world: World, collector: Collector, recorders: Recorders, application: trace.Tracer
) -> None:
    await world.daemon(tracer=await recorders(collector.url, ratio=0.0))
    async with client(world, "worker", ttl_s=3) as agent:
        with application.start_as_current_span("the agent's work") as work:
            await agent.hello()
        (renewal, *_) = await collector.until(
            lambda spans: [s for s in spans if (s.name, s.kind) == ("coordinator.renew", "client")]
        )
    assert renewal.parent == ""
    assert renewal.trace != f"{work.get_span_context().trace_id:032x}"


async def test_a_command_goes_on_with_the_trace_that_its_environment_names(
    world: World, collector: Collector, recorders: Recorders, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.daemon(tracer=await recorders(collector.url, ratio=0.0))
    monkeypatch.setenv("TRACEPARENT", ASKED)
    monkeypatch.setenv("IFABRIC_NATS", world._nats_url or "nats://127.0.0.1:1")
    command = connect.client(None, session="operator")
    assert command.trace == ASKED
    async with client(world, "operator") as agent:
        agent.trace = command.trace
        await agent.list()
    assert named(await collector.trace("coordinator.list"), "coordinator.list").parent == SPAN


# -- the collector ----------------------------------------------------------------------------------------------------


async def test_a_collector_that_refuses_costs_spans_and_no_request(
    world: World, recorders: Recorders, caplog: pytest.LogCaptureFixture
) -> None:
    refusing, metrics = Collector(status=400), Metrics()
    recorder = await recorders(refusing.url, metrics=metrics)
    with structlog.testing.capture_logs() as said:
        recorder._log = structlog.get_logger()
        await world.daemon(tracer=recorder)
        for _ in range(3):
            seen = refusing.requests
            assert "tasks" in await asked(world, "list", "me")
            await refusing.asked(seen + 1)
        await recorder.stop()
        await asyncio.sleep(0)
    refusing.close()
    metrics.render()
    assert (
        metrics.counter("if_tracing_spans_dropped_total", why="collector").value == 6
    )  # the request's and the reply's
    assert metrics.counter("if_tracing_spans_exported_total").value == 0
    assert [line["event"] for line in said if "collector" in line["event"]] == [
        "the collector does not take spans: they are dropped"
    ]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


async def test_a_collector_that_is_not_there_costs_spans_and_no_request(world: World, recorders: Recorders) -> None:
    gone, metrics = Collector(), Metrics()
    gone.close()
    recorder = await recorders(gone.url, metrics=metrics)
    await world.daemon(tracer=recorder)
    assert "tasks" in await asked(world, "list", "me")
    began = monotonic()
    await recorder.stop()
    assert monotonic() - began < otel.STOP_S + 1
    metrics.render()
    assert metrics.counter("if_tracing_spans_exported_total").value == 0


async def test_a_collector_that_never_answers_holds_up_neither_the_loop_nor_the_end(
    world: World, recorders: Recorders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "WAITING_MAX", 300)
    mute, metrics = Collector(mute=True), Metrics()
    recorder = await recorders(mute.url, metrics=metrics)
    await world.daemon(tracer=recorder)
    await asked(world, "list", "me")
    await mute.asked(1)  # the thread waits for it now
    for _ in range(10):
        await asyncio.gather(*(asked(world, "list", "me") for _ in range(40)))  # 800 spans, and room for 300
    metrics.render()
    dropped = metrics.counter("if_tracing_spans_dropped_total", why="queue_full").value
    assert dropped == 800 - 300
    began = monotonic()
    await recorder.stop()
    took_s = monotonic() - began
    assert otel.STOP_S - 0.1 < took_s < otel.STOP_S + 1
    mute.close()


async def test_spans_are_sent_again_when_the_collector_is_back(world: World, recorders: Recorders) -> None:
    collector, metrics = Collector(status=400), Metrics()
    recorder = await recorders(collector.url, metrics=metrics)
    await world.daemon(tracer=recorder)
    await asked(world, "list", "me")
    await collector.asked(1)
    collector.status = 200
    await asked(world, "list", "me", ASKED)
    assert named(await collector.trace("coordinator.list"), "coordinator.list").trace == TRACE
    collector.close()


async def test_a_recorder_can_be_started_again(world: World, collector: Collector, recorders: Recorders) -> None:
    metrics = Metrics()
    recorder = await recorders(collector.url, metrics=metrics)
    await world.daemon(tracer=recorder)
    for _ in range(2):
        await recorder.start()
        await recorder.start()
        await asked(world, "list", "me")
        await recorder.stop()
        await recorder.stop()
    await asked(world, "list", "me")  # nobody records, and it is answered
    metrics.render()
    assert metrics.counter("if_tracing_spans_exported_total").value == len(collector.spans) == 4


# -- off, or not installed --------------------------------------------------------------------------------------------


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    for endpoint in ("127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://"):
        with pytest.raises(ConfigError, match=r"tracing\.endpoint: .* is no http or https URL"):
            tracing.recorder(Tracing(enabled=True, endpoint=endpoint), CLOCK, Metrics(), None, version="1")


OFF = """
import sys, pathlib, tempfile, asyncio
from ifabric.config import Config, Coordinator, Etcd, Nats
from ifabric.clock import SystemClock
from ifabric.fabric import Fabric
from ifabric import client, sync, loader, tracing
for name in ("coordinator", "governor", "chassis", "identity"):
    loader.load(name)
async def make():
    config = Config(coordinator=Coordinator(etcd=Etcd(endpoints=("http://127.0.0.1:1",))), nats=Nats(servers=("nats://127.0.0.1:1",)))
    Fabric(config, pathlib.Path(tempfile.mkdtemp()), SystemClock())
asyncio.run(make())
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry"])
"""


def test_without_traces_nothing_of_opentelemetry_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


MISSING = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from ifabric.cli import main
sys.argv = ["ifabric", "run", "--config", sys.argv[1], "--state-dir", sys.argv[2]]
sys.exit(main())
"""


def test_traces_without_opentelemetry_are_a_mistake_that_says_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "fabric.yaml"
    config.write_text("tracing: {enabled: true}\n")
    command = [sys.executable, "-c", MISSING, str(config), str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'ifabric[otel]'" in " ".join(done.stderr.split())
