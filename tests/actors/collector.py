"""A stand-in for an OpenTelemetry collector: it takes OTLP over HTTP, and keeps what it was sent as the protobuf says.

Not a collector: it has no pipeline, and forwards nothing. What it decodes with is the protocol's own generated code.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

WAIT_S = 20.0
KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


@dataclass(frozen=True)
class Got:
    """A span as it came."""

    name: str
    kind: str
    trace: str
    id: str
    #: "" for the first of a trace
    parent: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    #: 0 unset, 1 ok, 2 error
    status: int
    resource: dict[str, Any] = field(repr=False)


class Collector:
    """Listens on a free port. With `status`, it refuses everything with it; with `mute`, it takes requests and never
    answers.
    """

    def __init__(self, *, status: int = 200, mute: bool = False) -> None:
        self.spans: list[Got] = []
        self.requests = 0
        self.status = status
        self._muted = threading.Event()
        if not mute:
            self._muted.set()
        self._changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer._take(self.path, body)
                outer._muted.wait()
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._muted.set()
        self._server.shutdown()
        self._server.server_close()

    def _take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces", path
        request = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            self.requests += 1
            if self.status == 200:
                for of_resource in request.resource_spans:
                    resource = _values(of_resource.resource.attributes)
                    for scope in of_resource.scope_spans:
                        self.spans += [_got(span, resource) for span in scope.spans]
            self._changed.notify_all()

    async def until(self, true: Callable[[list[Got]], Any], within_s: float = WAIT_S) -> Any:
        """The first truthy answer about the spans that have come. `TimeoutError` names those that have."""

        def wait() -> Any:
            with self._changed:
                found = self._changed.wait_for(lambda: true(self.spans), within_s)
            if not found:
                raise TimeoutError(f"{len(self.spans)} spans have come: {self.spans}")
            return found

        return await asyncio.to_thread(wait)

    async def asked(self, times: int, within_s: float = WAIT_S) -> None:
        """Returns when it has been sent so many requests."""
        await self.until(lambda _: self.requests >= times, within_s)

    async def trace(self, *names: str, of: str | None = None) -> list[Got]:
        """The spans of one trace (`of`, or the only one) as soon as there is one of each name, oldest first."""

        def whole(spans: list[Got]) -> list[Got] | None:
            found = sorted((s for s in spans if of is None or s.trace == of), key=lambda s: s.began_ns)
            return found if {*names} <= {s.name for s in found} else None

        found: list[Got] = await self.until(whole)
        return found


def named(spans: list[Got], name: str) -> Got:
    """The only one of that name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def _got(span: Any, resource: dict[str, Any]) -> Got:
    return Got(
        name=span.name,
        kind=KINDS[span.kind],
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
        status=span.status.code,
        resource=resource,
    )
