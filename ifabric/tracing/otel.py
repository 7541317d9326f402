"""Spans of OpenTelemetry for what this daemon handles. The only module that imports it.

Whether a message is traced is decided here before anything is made: the SDK's own sampler would be asked with a span's
attributes at hand, and costs as much as a third of a span for each that is not recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from ifabric.clock import Clock, wall_ns
from ifabric.config_ops import Tracing
from ifabric.errors import FabricError
from ifabric.handling import Attributes, Handling
from ifabric.metrics import Metrics
from ifabric.tracing.traceparent import parse, spell
from ifabric.wire import subjects

#: spans that may wait for the collector; more are dropped. One is about 2 kB.
WAITING_MAX = 8192
#: spans in one request to the collector: to encode one takes 20 us of the interpreter that the event loop needs too
TOGETHER_MAX = 256
SEND_EVERY_S = 1.0
#: how long the collector may take over one request, with all tries
EXPORT_S = 5.0
#: how long the end of the daemon waits for the last spans to be taken
STOP_S = 3.0


class OtelSpan:
    """A span that is recorded. See `ifabric.handling.Span`."""

    __slots__ = ("_parent_of", "_tracer", "span")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self.span = tracer, span
        self._parent_of: otel_context.Context | None = None

    @property
    def traceparent(self) -> str:
        ours = self.span.get_span_context()
        return spell(ours.trace_id, ours.span_id, sampled=ours.trace_flags.sampled)

    def child(
        self, name: str, attributes: Attributes | None = None, *, outward: bool = False, at_ns: int | None = None
    ) -> OtelSpan:
        if self._parent_of is None:
            self._parent_of = trace.set_span_in_context(self.span, otel_context.Context())
        kind = trace.SpanKind.CLIENT if outward else trace.SpanKind.INTERNAL
        span = self._tracer.start_span(name, self._parent_of, kind, attributes, start_time=at_ns)
        return OtelSpan(self._tracer, span)

    def note(self, attributes: Attributes) -> None:
        if self.span.is_recording():
            self.span.set_attributes(dict(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        if self.span.is_recording():
            self.span.add_event(name, attributes)

    def end(self, error: BaseException | None = None) -> None:
        if not self.span.is_recording():
            return
        if error is not None:
            self.span.set_attribute("error.type", _type_of(error))
            if (
                not isinstance(error, FabricError) or error.status >= 500
            ):  # a refusal is an answer, and no fault of ours
                self.span.set_status(trace.StatusCode.ERROR, str(error)[:500])
        self.span.end()


def _type_of(error: BaseException) -> str:
    if isinstance(error, FabricError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__


class OtelRecorder:
    """Records the traces of one daemon, and has them sent."""

    def __init__(self, config: Tracing, clock: Clock, metrics: Metrics, log: Any, *, version: str) -> None:
        self._config, self._clock, self._log = config, clock, log
        self._resource = Resource.create(
            {
                "service.name": config.service_name,
                "service.version": version,
                "service.instance.id": clock.token(),
            }
        )
        self._provider: TracerProvider | None = None
        self._tracer: trace.Tracer | None = None
        self._sending: Sending | None = None
        self._counts = Counts()
        self._names: dict[tuple[str, str, bool], tuple[str, dict[str, Any]]] = {}
        self._exported = metrics.counter("if_tracing_spans_exported_total")
        self._full = metrics.counter("if_tracing_spans_dropped_total", why="queue_full")
        self._refused = metrics.counter("if_tracing_spans_dropped_total", why="collector")
        metrics.before_render.append(self._count)
        # it says the same of every batch; we say it once
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    async def start(self) -> None:
        """Begins to record."""
        if self._provider is not None:
            return
        loop = asyncio.get_running_loop()

        def told(works: bool) -> None:  # in the exporter's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._tell, works)

        self._sending = Sending(OTLPSpanExporter(self._config.endpoint, timeout=EXPORT_S), self._counts, told)
        self._provider = TracerProvider(ALWAYS_ON, self._resource, shutdown_on_exit=False)
        self._provider.add_span_processor(Queue(self._sending))
        self._tracer = self._provider.get_tracer("ifabric")

    async def stop(self) -> None:
        """Sends what waits, for `STOP_S` at the most: the threads that send do not keep the process."""
        provider, sending = self._provider, self._sending
        if provider is None or sending is None:
            return
        self._provider = self._tracer = None
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def over() -> None:
            if not done.done():
                done.set_result(None)

        def end() -> None:
            provider.shutdown()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(over)

        threading.Thread(target=end, name="traces: the last ones", daemon=True).start()
        try:
            async with asyncio.timeout(STOP_S):
                await done
        except TimeoutError:
            sending.shutdown()  # or it would go on trying
            self._log.warning("the last spans were not taken in time", collector=self._config.endpoint)
        self._count()

    # -- a message

    def begin(self, handling: Handling) -> None:
        """Gives it a span when its sender's trace is sampled, or when it is one of the few that begin a trace here."""
        tracer = self._tracer
        if tracer is None:
            return
        parent = parse(handling.trace) if handling.trace else None
        sampled = parent.sampled if parent is not None else self._clock.jitter(0.0, 1.0) < self._config.sample_ratio
        if not sampled:
            return
        name, told = self._named(handling)
        waited_s = self._clock.monotonic() - handling.arrived
        span = tracer.start_span(
            name,
            _nothing if parent is None else _remote(parent.trace_id, parent.span_id),
            trace.SpanKind.SERVER,
            {**told, "ifabric.session": handling.session},
            start_time=wall_ns() - int(waited_s * 1e9),
        )
        handling.span = OtelSpan(tracer, span)
        if parent is None:
            handling.trace = handling.span.traceparent

    def end(self, handling: Handling, *, answered: bool) -> None:
        """The end of its span, with what became of it."""
        whole = handling.span
        if not isinstance(whole, OtelSpan):
            return
        message, reply, error = handling.message, handling.reply, handling.error
        told: dict[str, Any] = {"ifabric.outcome": handling.outcome}
        if handling.request_id:
            told["ifabric.request_id"] = handling.request_id
        for attribute, field, kind in (("ifabric.task", "task", str), ("ifabric.fence", "fence", int)):
            for said in (message, reply):
                value = getattr(said, field, None)
                if isinstance(value, kind):
                    told[attribute] = value
        whole.note(told)
        if answered:
            decided_s = self._clock.monotonic() - handling.ended
            whole.child("reply", at_ns=wall_ns() - int(decided_s * 1e9)).end()
        whole.end(error if error is not None or answered else asyncio.CancelledError("its handler was cancelled"))

    def _named(self, handling: Handling) -> tuple[str, dict[str, Any]]:
        key = (handling.component, handling.verb, handling.admin)
        found = self._names.get(key)
        if found is None:
            component, verb, admin = key
            found = self._names[key] = (
                f"{component}.{verb}",
                {
                    "messaging.system": "nats",
                    "messaging.operation.type": "process",
                    "messaging.operation.name": verb,
                    "messaging.destination.name": subjects.endpoint(component, verb, admin=admin),
                },
            )
        return found

    # -- what became of the spans

    def _count(self) -> None:
        self._exported.raise_to(self._counts.exported)
        self._refused.raise_to(self._counts.refused)
        self._full.raise_to(self._counts.full)

    def _tell(self, works: bool) -> None:
        if works:
            self._log.info("the collector takes spans again", collector=self._config.endpoint)
        else:
            self._log.warning("the collector does not take spans: they are dropped", collector=self._config.endpoint)


#: neither a parent of ours nor what the process may have as its current span
_nothing = otel_context.Context()
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)


def _remote(trace_id: int, span_id: int) -> otel_context.Context:
    parent = trace.NonRecordingSpan(trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED))
    return trace.set_span_in_context(parent, _nothing)


class Counts:
    """What became of this daemon's spans."""

    def __init__(self) -> None:
        #: by the thread that sends
        self.exported = self.refused = 0
        #: by who ends spans
        self.full = 0


class Sending(SpanExporter):
    """An exporter whose successes and failures are counted, and told when one follows the other."""

    def __init__(self, exporter: SpanExporter, counts: Counts, tell: Callable[[bool], None]) -> None:
        self._exporter, self.counts, self._tell = exporter, counts, tell
        self._works = True
        #: by the thread that sends
        self.taken = 0
        #: by who ends spans
        self.ended = 0

    @property
    def waiting(self) -> int:
        """Spans that were ended and not yet taken from the queue; what is being taken counts as waiting."""
        return self.ended - self.taken

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """In the thread that sends."""
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception:
            self._count(len(spans), works=False)
            raise
        self._count(len(spans), works=result is SpanExportResult.SUCCESS)
        return result

    def _count(self, number: int, *, works: bool) -> None:
        if works:
            self.counts.exported += number
        else:
            self.counts.refused += number
        if works is not self._works:
            self._works = works
            self._tell(works)

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Queue(BatchSpanProcessor):
    """The SDK's queue and thread. It drops by itself when it is full, and says so in the log for each span: what comes
    then is not handed to it, and counted.
    """

    def __init__(self, sending: Sending) -> None:
        super().__init__(
            sending,
            max_queue_size=WAITING_MAX,
            schedule_delay_millis=SEND_EVERY_S * 1000,
            max_export_batch_size=TOGETHER_MAX,
        )
        self._sending = sending

    def on_end(self, span: ReadableSpan) -> None:
        if self._sending.waiting >= WAITING_MAX:
            self._sending.counts.full += 1
            return
        self._sending.ended += 1
        super().on_end(span)
