"""A trace over real processes: an agent, two daemons that share its requests, and what a collector gets of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ifabric import sync
from ifabric.clock import monotonic
from ifabric.tracing.otel import STOP_S
from ifabric.wire import coordinator as wire
from tests.actors.collector import Collector, Got, named
from tests.system.conftest import Cluster, eventually


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def application(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[trace.Tracer]:
    """The agent's process traces for itself."""
    provider = TracerProvider(resource=Resource.create({"service.name": "agent"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(collector.url)))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider.get_tracer("the agent")
    provider.shutdown()


def tracing(url: str, ratio: float = 0.0) -> dict[str, object]:
    return {"tracing": {"enabled": True, "endpoint": url, "sample_ratio": ratio, "service_name": "fabric-under-test"}}


async def test_an_agents_work_is_one_trace_over_two_daemons(
    cluster: Cluster, collector: Collector, application: trace.Tracer
) -> None:
    config = tracing(collector.url)
    await asyncio.gather(*(cluster.daemon(config=config) for _ in range(2)))
    agent = await cluster.client("worker")
    tasks = [f"traced/{n}" for n in range(12)]
    await agent.submit([wire.TaskSpec(id=task) for task in tasks])
    with application.start_as_current_span("the agent's work") as work:
        for task in tasks:
            claim = await agent.claim(task)
            await claim.complete({"by": "worker"})
    ours = f"{work.get_span_context().trace_id:032x}"

    def whole(spans: list[Got]) -> list[Got] | None:
        of_it = [s for s in spans if s.trace == ours]
        served = [s for s in of_it if s.kind == "server" and s.name in ("coordinator.claim", "coordinator.complete")]
        commits = [s for s in of_it if s.name == "commit" and s.parent in {s.id for s in served}]
        return of_it if len(served) == 2 * len(tasks) and len({s.parent for s in commits}) == len(served) else None

    spans = await collector.until(whole)
    by_id = {span.id: span for span in spans}
    root = named(spans, "the agent's work")
    daemons = set()
    for verb in ("claim", "complete"):
        for served in (s for s in spans if (s.name, s.kind) == (f"coordinator.{verb}", "server")):
            asking = by_id[served.parent]
            assert (asking.kind, asking.name, asking.parent) == ("client", served.name, root.id)
            assert asking.attributes["ifabric.task"] == served.attributes["ifabric.task"]
            assert asking.attributes["ifabric.request_id"] == served.attributes["ifabric.request_id"]
            assert served.resource["service.name"] == "fabric-under-test"
            daemons.add(served.resource["service.instance.id"])
            (commit,) = [s for s in spans if s.parent == served.id and s.name == "commit"]
            assert commit.resource == served.resource
            assert served.began_ns <= commit.began_ns <= commit.ended_ns <= served.ended_ns
    assert len(daemons) == 2  # all on one of them: one time in eight million
    assert all(span.parent in by_id or span is root for span in spans)


async def test_a_program_without_a_loop_carries_its_trace_too(
    cluster: Cluster, collector: Collector, application: trace.Tracer
) -> None:
    await cluster.daemon(config=tracing(collector.url))

    def work() -> str:
        with sync.SyncClient(cluster.nats.url, session="plain") as agent:
            with application.start_as_current_span("plain work") as span:
                agent.list()
            return f"{span.get_span_context().trace_id:032x}"

    ours = await asyncio.to_thread(work)
    spans = await collector.until(
        lambda spans: (
            [s for s in spans if s.trace == ours and s.kind == "server"] and [s for s in spans if s.trace == ours]
        )
    )
    asking = next(s for s in spans if s.kind == "client")
    served = next(s for s in spans if s.kind == "server")
    assert (served.parent, asking.parent) == (asking.id, named(spans, "plain work").id)


async def test_the_last_spans_are_sent_when_a_daemon_ends(cluster: Cluster, collector: Collector) -> None:
    daemon = await cluster.daemon(config=tracing(collector.url, ratio=1.0))
    await cluster.ask("list", "last")
    assert await daemon.terminate() == 0
    assert [s.attributes["ifabric.session"] for s in collector.spans if s.name == "coordinator.list"] == ["last"]


async def test_a_collector_that_hangs_does_not_keep_a_daemon_from_serving_or_ending(cluster: Cluster) -> None:
    mute = Collector(mute=True)
    daemon = await cluster.daemon(config=tracing(mute.url, ratio=1.0))
    await cluster.ask("list", "a")
    await mute.asked(1)
    for _ in range(50):
        await cluster.ask("list", "a", timeout_s=1.0)
    assert (await daemon.ready())[0] == 200
    began = monotonic()
    daemon.signal(signal.SIGTERM)
    assert await daemon.wait() == 0
    assert monotonic() - began < STOP_S + 5
    mute.close()


async def test_what_becomes_of_the_spans_is_counted(cluster: Cluster, collector: Collector) -> None:
    daemon = await cluster.daemon(config=tracing(collector.url, ratio=1.0))
    assert await daemon.metric("if_tracing_spans_dropped_total") == 0
    await cluster.ask("list", "a")

    async def counted() -> bool:
        return await daemon.metric("if_tracing_spans_exported_total") >= 2

    await eventually(counted)
