"""Traces, by OpenTelemetry: which parts a request has, on every daemon that it meets, and how long each takes.

**What is recorded.** A request's span lasts from its arrival to its answer, and goes on with the trace that the
sender names in its `traceparent` header (W3C Trace Context). Within it: `commit`, one for each request although one
transaction carries many (its event `sent` tells when, and with how many others); `posting` for what moves money; `run`
for the time in a sandbox, with an `egress` for each call of the guest; `reply`. A commit says its `ifabric.revision`,
which the events that come of it say too.

**What is not.** A sender decides for its own traces, by the sampled flag; of those that begin here, `sample_ratio` are
recorded. For all others there is no span at all: nothing is made and thrown away. A malformed `traceparent` is ignored,
as the standard demands. A message that no handler saw (a full mailbox, a standstill) has no span.

**What it may cost.** Spans are sent by a thread of their own, from a queue with a limit: a collector that is slow or
down costs spans, which are counted, and never a request. Without `tracing.enabled` this package imports nothing of
OpenTelemetry, which is an extra: `pip install 'ifabric[otel]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ifabric.errors import ConfigError
from ifabric.handling import Tracer

if TYPE_CHECKING:
    from ifabric.clock import Clock
    from ifabric.config_ops import Tracing
    from ifabric.metrics import Metrics


class Recorder(Tracer, Protocol):
    """A tracer with a life: it records between `start` and `stop`."""

    async def start(self) -> None:
        """Begins to record; whether anybody takes the spans shows later."""

    async def stop(self) -> None:
        """Sends what waits, as far as a few seconds allow."""


def recorder(config: Tracing, clock: Clock, metrics: Metrics, log: Any, *, version: str) -> Recorder | None:
    """What records this daemon's traces; None when they are not wanted. `ConfigError` when they cannot be had."""
    if not config.enabled:
        return None
    url = urlsplit(config.endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(
            f"tracing.endpoint: {config.endpoint!r} is no http or https URL; a collector's is http://HOST:4318/v1/traces"
        )
    try:
        from ifabric.tracing.otel import OtelRecorder  # noqa: PLC0415  only where it is wanted
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise ConfigError(
            "tracing.enabled: OpenTelemetry is not installed here. Install it with `pip install 'ifabric[otel]'`, "
            "or set tracing.enabled: false."
        ) from None
    return OtelRecorder(config, clock, metrics, log, version=version)
