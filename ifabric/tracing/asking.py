"""The client's side: a request is part of the trace that its caller is in, when the caller's process has one.

Nothing here imports OpenTelemetry: a process that traces has done so itself. Where it has set up a tracer provider, a
request is a CLIENT span of the caller's; where it only has a current span (of a provider that is not the global one),
the request goes on with that one.
"""

from __future__ import annotations

import sys
from typing import Any

from ifabric.errors import FabricError
from ifabric.tracing.traceparent import parse, spell
from ifabric.wire import subjects
from ifabric.wire.envelope import Request

#: the provider that was asked last, and its tracer: to make one for each request costs as much as a span
_known: tuple[Any, Any] = (None, None)


class Asking:
    """A request on its way. `traceparent` is what goes with it, or ""."""

    __slots__ = ("_span", "_trace", "traceparent")

    def __init__(self, trace: Any, span: Any, traceparent: str) -> None:
        self._trace, self._span, self.traceparent = trace, span, traceparent

    def end(self, error: BaseException | None = None) -> None:
        """It was answered, or nobody waits any more."""
        span = self._span
        if span is None:
            return
        if error is not None:
            code = error.code if isinstance(error, FabricError) else type(error).__name__
            span.set_attribute("error.type", code)
            span.set_status(self._trace.StatusCode.ERROR, str(error)[:500])
        span.end()


def asks(message: Request, session: str, given: str = "") -> Asking | None:
    """A request begins; None when it is in no trace. `given` is the caller's own traceparent, for when OpenTelemetry
    has none.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not hasattr(trace, "get_tracer_provider"):  # not there, or just being imported
        return Asking(None, None, given) if given else None
    here = trace.get_current_span().get_span_context()
    tracer = _tracer(trace)
    if tracer is None:
        carried = spell(here.trace_id, here.span_id, sampled=here.trace_flags.sampled) if here.is_valid else given
        return Asking(None, None, carried) if carried else None
    span = tracer.start_span(
        f"{message.component}.{message.verb}",
        context=None if here.is_valid else _remote(trace, given),
        kind=trace.SpanKind.CLIENT,
        attributes=_attributes(message, session),
    )
    ours = span.get_span_context()
    if not ours.is_valid:
        return Asking(None, None, given) if given else None
    return Asking(trace, span, spell(ours.trace_id, ours.span_id, sampled=ours.trace_flags.sampled))


def _tracer(trace: Any) -> Any:
    """The tracer of the global provider; None while there is none but the API's stand-in."""
    global _known
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        return None
    if _known[0] is not provider:
        _known = (provider, trace.get_tracer("ifabric", tracer_provider=provider))
    return _known[1]


def _remote(trace: Any, given: str) -> Any:
    parent = parse(given) if given else None
    if parent is None:
        return None
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT)
    context = trace.SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(context))


def _attributes(message: Request, session: str) -> dict[str, str]:
    told = {
        "messaging.system": "nats",
        "messaging.operation.type": "send",
        "messaging.operation.name": message.verb,
        "messaging.destination.name": subjects.endpoint(message.component, message.verb, admin=message.admin),
        "ifabric.session": session,
    }
    for attribute, field in (("ifabric.request_id", "request_id"), ("ifabric.task", "task")):
        value = getattr(message, field, None)
        if isinstance(value, str):
            told[attribute] = value
    return told
