"""Every metric there is, and how it is counted.

`METRICS` is the one list: nothing else may be counted, and the documentation is made from it. Base units underneath
(seconds, bytes, ratios); the names of the runbook that are in other units are recording rules. No session, task or
request id is ever a label.

aioprometheus renders; it does not escape label values, so a hostile one could forge a metric: `SafeText` does.
Counting goes around its dictionaries (a label set is serialised on every call there): a child keeps its own numbers
and hands them over when they are read.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aioprometheus
import aioprometheus.histogram
from aioprometheus.formats.text import TextFormatter

from ifabric import __version__

Labels = tuple[tuple[str, str], ...]

LATENCY_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH = (1, 2, 5, 10, 20, 30, 50, 70, 100)
GENERATIONS = (("0",), ("1",), ("2",))
#: label sets of one metric; more is a bug that would eat Prometheus
CHILDREN_MAX = 500


@dataclass(frozen=True)
class Metric:
    """One line of the list. `born` are the label values that exist from the start, at 0: a rate needs a zero to grow
    from.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = LATENCY_S
    born: tuple[tuple[str, ...], ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("if_actor_messages_total", "counter", "Messages handled, by what became of them.", ("actor", "verb", "outcome")),
    Metric("if_actor_handling_seconds", "histogram", "From receiving a message to its answer.", ("actor", "verb")),
    Metric("if_identity_admitted_total", "counter", "Connections that NATS was told to let in."),
    Metric("if_identity_refused_total", "counter", "Connections that it was told not to.", ("why",),
           born=(("no key",), ("not proven",), ("unknown",), ("unavailable",), ("overloaded",))),
    Metric("if_identity_ended_total", "counter", "Connections that were ended, because their agent was revoked or has another key."),
    Metric("if_actor_restarts_total", "counter", "Times that an actor was started again.", ("actor",)),
    Metric("if_actor_mailbox_depth", "gauge", "Messages that wait to be handled.", ("actor",)),
    Metric("if_actor_mailbox_max", "gauge", "Messages that may wait to be handled.", ("actor",)),
    Metric("if_actor_in_flight", "gauge", "Messages being handled.", ("actor",)),
    Metric("if_actor_overloaded_total", "counter", "Messages turned away because the mailbox was full.", ("actor", "verb")),
    Metric("if_actor_dropped_total", "counter", "Messages that were not handled, by why.", ("actor", "why")),
    Metric("if_coordinator_claim_latency_seconds", "histogram",
           "From receiving claim or next to the grant; of a next that waited for a task, from when there was one."),
    Metric(
        "if_coordinator_claims_total", "counter", "Claims asked for, by what became of them.", ("outcome",),
        born=(("granted",), ("again",), ("taken",), ("none",), ("refused",), ("error",)),
    ),
    Metric("if_coordinator_cas_failures_total", "counter", "Commits that found something changed and were decided again."),
    Metric("if_coordinator_expired_total", "counter", "Claims that ended with their session, deadline or incarnation."),
    Metric("if_coordinator_active_tasks", "gauge", "Tasks that are claimed."),
    Metric("if_coordinator_active_sessions", "gauge", "Sessions with a live lease."),
    Metric("if_coordinator_tasks", "gauge", "Tasks on the board, by state.", ("state",),
           born=(("blocked",), ("pending",), ("claimed",), ("done",), ("dead",), ("cancelled",))),
    Metric("if_coordinator_waiters", "gauge", "Sessions that wait for a task in a long poll."),
    Metric("if_coordinator_event_bus_health", "gauge", "1 while etcd answers, else 0."),
    Metric("if_coordinator_events_published_total", "counter", "Events that this daemon appended to the journal."),
    Metric("if_coordinator_event_lag_seconds", "gauge", "How far the event publisher is behind the last commit it saw."),
    Metric(
        "if_governor_requests_total", "counter", "Money asked for, by verb and by what became of it.", ("verb", "outcome"),
        born=tuple((verb, outcome) for verb in ("reserve", "commit", "void", "spend", "claim", "complete")
                   for outcome in ("done", "short")),
    ),
    Metric("if_governor_posting_seconds", "histogram", "From asking for money to etcd's word on it."),
    Metric("if_governor_posting_batch_size", "histogram", "Postings that went in one transaction.", buckets=BATCH),
    Metric("if_governor_posting_races_total", "counter", "Transactions that found an account changed and were decided again."),
    Metric("if_governor_charged_micro_usd_total", "counter", "Micro-USD charged by this daemon, by purpose.", ("purpose",),
           born=(("work",), ("coordination",))),
    Metric("if_governor_overdraft_micro_usd_total", "counter", "Micro-USD charged by this daemon that were not available."),
    Metric("if_governor_late_commits_total", "counter", "Commits of holds that had ended already."),
    Metric("if_governor_holds_open", "gauge", "Holds that are open."),
    Metric("if_governor_holds_overdue", "gauge",
           "Holds that are open though their claim, session or time has ended, at the last two looks at all of them."),
    Metric("if_governor_holds_expired_total", "counter", "Holds that this daemon ended with their claim, session or time."),
    Metric("if_governor_budget_utilization", "gauge",
           "Spent and held of the limit, 0 to 1: of each account that an operator limited, and the fullest session's (@).",
           ("account",), born=(("@",),)),
    Metric("if_governor_cost_overhead_percent", "gauge",
           "Micro-USD charged for coordination, of all charged, over the last hour, in percent."),
    Metric("if_governor_events_published_total", "counter", "Events that this daemon appended to the journal."),
    Metric("if_governor_event_lag_seconds", "gauge", "How far the event publisher is behind the last commit it saw."),
    Metric("if_governor_circuit_breaker_open", "gauge", "1 while any breaker is open or half open, else 0."),
    Metric("if_governor_breakers", "gauge", "Breakers, by state; closed ones as far as this daemon counts for them.", ("state",),
           born=(("closed",), ("open",), ("half_open",))),
    Metric("if_governor_breaker_transitions_total", "counter", "Transitions that this daemon made.", ("to",),
           born=(("closed",), ("open",), ("half_open",))),
    Metric("if_governor_admits_total", "counter", "Calls asked for, by what became of it.", ("outcome",),
           born=(("closed",), ("probe",), ("refused",))),
    Metric("if_governor_reports_total", "counter", "Calls reported, by outcome.", ("outcome",),
           born=(("success",), ("failure",), ("ignored",), ("unknown",))),
    Metric("if_governor_capability_match_score", "histogram", "Scores of the tasks that were given out and of matches made.",
           buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    Metric("if_governor_capability_match_failures_total", "counter", "Sessions that found no task they can take, by why.", ("why",),
           born=(("capability",), ("label",), ("score",), ("breaker",))),
    Metric("if_governor_unmatched_tasks", "gauge", "Pending tasks that no live session can take."),
    Metric("if_governor_match_cache_total", "counter", "Scores looked up, by whether they were known.", ("outcome",),
           born=(("hit",), ("miss",))),
    Metric("if_chassis_runs_total", "counter", "Runs asked for, by what became of them.", ("outcome",),
           born=(("done",), ("trap",), ("limit",), ("egress_denied",), ("overloaded",), ("refused",), ("died",), ("killed",),
                 ("unavailable",))),
    Metric("if_chassis_run_seconds", "histogram", "From receiving a run to its answer, whatever the guest took."),
    Metric("if_chassis_overhead_seconds", "histogram", "The same less the guest's own time: what the chassis took."),
    Metric("if_chassis_queue_seconds", "histogram", "How long a run waited for a worker."),
    Metric("if_chassis_queue_depth", "gauge", "Runs that wait for a worker."),
    Metric("if_chassis_sandbox_count", "gauge", "Sandboxes that a guest runs in now."),
    Metric("if_chassis_workers", "gauge", "Worker processes, by state.", ("state",), born=(("idle",), ("busy",))),
    Metric("if_chassis_workers_started_total", "counter", "Worker processes started."),
    Metric("if_chassis_workers_ended_total", "counter", "Worker processes ended, by why.", ("why",),
           born=(("recycled",), ("idle",), ("killed",), ("died",), ("stopped",))),
    Metric("if_chassis_memory_bytes", "gauge", "Resident memory of the workers, without what they share."),
    Metric("if_chassis_memory_limit_bytes", "gauge", "What all workers may use at most: max_size times the limit of one."),
    Metric("if_chassis_sandbox_violations_total", "counter", "Times that a guest tried what it may not, by kind.", ("kind",),
           born=(("trap",), ("limit",), ("egress",), ("died",))),
    Metric("if_chassis_fuel_total", "counter", "WebAssembly instructions executed, as fuel counts them."),
    Metric("if_chassis_compile_seconds", "histogram", "Compiling one module.",
           buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)),
    Metric("if_chassis_cache_total", "counter", "Compiled modules looked up, by where they were found.", ("outcome",),
           born=(("memory",), ("disk",), ("compiled",), ("refused",))),
    Metric("if_chassis_egress_calls_total", "counter", "Calls of guests, by what became of them.", ("outcome",),
           born=(("done",), ("denied",), ("breaker_open",), ("rate",), ("failed",), ("claim_lost",))),
    Metric("if_chassis_egress_bytes_total", "counter", "Bytes of guests' requests and responses.", ("direction",),
           born=(("out",), ("in",))),
    Metric("if_chassis_egress_seconds", "histogram", "One call of a guest, from asking to its response."),
    Metric("if_chassis_vault_requests_total", "counter", "Requests to Vault, by what became of them.", ("outcome",),
           born=(("done",), ("failed",))),
    Metric("if_chassis_vault_leases", "gauge", "Leases of dynamic secrets that are kept alive."),
    Metric("if_chassis_slo_violations_total", "counter", "Times that the service level fell short of its target.", ("which",),
           born=(("latency",), ("availability",))),
    Metric("if_chassis_slo_error_budget_left", "gauge", "Of what may fail or be slow within the window, what has not: 1 to 0, and below."),
    Metric("if_audit_records_total", "counter", "Commands that the audit was told of, by what became of them.", ("outcome",),
           born=(("ok",), ("refused",), ("error",))),
    Metric("if_audit_stored_total", "counter", "Records that this daemon has brought into the stream IF_AUDIT."),
    Metric("if_audit_dropped_total", "counter", "Commands that the audit has no record of: there was no room, or no disk, for it."),
    Metric("if_audit_waiting", "gauge", "Records that the stream does not have yet."),
    Metric("if_audit_lag_seconds", "gauge", "How old the oldest of them is."),
    Metric("if_audit_spool_bytes", "gauge", "What records take on this machine's disk until the stream has them."),
    Metric("if_audit_stream_bytes", "gauge", "What is in the stream IF_AUDIT, as this daemon saw it last."),
    Metric("if_audit_stream_max_bytes", "gauge", "What may be in it."),
    Metric("if_store_commit_batch_size", "histogram", "Requests in one transaction of the group commit.", buckets=BATCH),
    Metric("if_store_commit_seconds", "histogram", "One transaction of the group commit."),
    Metric(
        "if_store_commit_retries_total", "counter", "Requests sent again, by why.", ("why",), born=(("unknown",), ("refused",))
    ),
    Metric("if_store_attempts_failed_total", "counter", "Calls that an etcd endpoint did not answer."),
    Metric("if_store_rotations_total", "counter", "Times that the daemon moved on to another etcd endpoint."),
    Metric("if_bus_connected", "gauge", "1 while connected to NATS, else 0."),
    Metric("if_bus_reconnects_total", "counter", "Times that the connection to NATS came back."),
    Metric("if_bus_slow_consumers_total", "counter", "Messages that a full subscription dropped."),
    Metric("if_bus_spoofed_replies_total", "counter", "Requests dropped because their reply subject is not an inbox of theirs."),
    Metric("if_certificate_expiry_timestamp_seconds", "gauge",
           "When a certificate in use expires, since the epoch: of each connection, and of its authority (_ca).", ("part",)),
    Metric("if_certificate_reloads_total", "counter", "Times that certificates were read again, by what became of it.",
           ("part", "outcome")),
    Metric("if_page_viewers", "gauge", "Browsers and terminals that the live page is streamed to."),
    Metric("if_page_viewers_dropped_total", "counter", "Viewers whose stream was ended because they did not keep up."),
    Metric("if_page_refused_total", "counter", "Requests to the live page without a good token, by why.", ("why",),
           born=(("missing",), ("wrong",), ("limited",))),
    Metric("if_ready", "gauge", "1 while requests can be served (/readyz), else 0."),
    Metric("if_backup_last_success_timestamp_seconds", "gauge",
           "When the newest whole backup was begun, since the epoch, as `ifabric backup run` noted in etcd; 0: never."),
    Metric("if_tracing_spans_exported_total", "counter", "Spans that the collector took."),
    Metric("if_tracing_spans_dropped_total", "counter", "Spans that were thrown away: too many waited, or the collector took none.",
           ("why",), born=(("queue_full",), ("collector",))),
    Metric("if_dependency_up", "gauge", "1 while what the daemon depends on can be had (the loop: while it is not late), else 0.",
           ("dependency",), born=(("etcd",), ("nats",), ("vault",), ("loop",))),
    Metric("if_log_entries_total", "counter", "Entries written to the log, by level.", ("level",),
           born=(("debug",), ("info",), ("warning",), ("error",))),
    Metric("if_log_held_back_total", "counter", "Entries of the log that were counted and not written, as repeats of others."),
    Metric("if_log_lost_total", "counter", "Entries of the log that could not be written."),
    Metric("if_metrics_dropped_total", "counter", "Times that something was not counted: its metric has too many label sets."),
    Metric("if_build_info", "gauge", "1, for the version of ifabric and of Python.", ("version", "python")),
    Metric("if_loop_lag_seconds", "gauge", "How late the event loop's last beat was."),
    Metric("if_loop_lag_max_seconds", "gauge", "How late the event loop's latest beat was at worst, over the last minute."),
    Metric("if_loop_late_seconds", "histogram", "How late each beat of the event loop was, four in a second."),
    Metric("process_cpu_seconds_total", "counter", "User and system CPU time spent."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
    Metric("process_virtual_memory_bytes", "gauge", "Virtual memory."),
    Metric("process_open_fds", "gauge", "Open file descriptors."),
    Metric("process_max_fds", "gauge", "Open file descriptors that there may be."),
    Metric("process_start_time_seconds", "gauge", "Start of the process since the epoch."),
    Metric("python_gc_collections_total", "counter", "Runs of Python's collector of circles.", ("generation",), born=GENERATIONS),
    Metric("python_gc_objects_collected_total", "counter", "Objects that it freed.", ("generation",), born=GENERATIONS),
    Metric("python_gc_objects_uncollectable_total", "counter", "Objects that it found and could not free.", ("generation",),
           born=GENERATIONS),
)  # fmt: skip


class SafeText(TextFormatter):  # type: ignore[misc]
    """aioprometheus's text format, with label values escaped as the format demands."""

    def _format_line(self, name: str, labels: Any, value: Any, const_labels: Any) -> str:
        escaped = {
            key: str(text).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
            for key, text in (labels or {}).items()
        }
        line: str = super()._format_line(name, escaped, value, const_labels)
        return line


class Counter:
    """Only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Adds `amount`, which is not negative."""
        self.value += amount

    def raise_to(self, total: float) -> None:
        """Takes over a total that is counted elsewhere."""
        self.value = max(self.value, total)


class Gauge:
    """Goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """Says what it is now."""
        self.value = value


class Histogram:
    """Counts observations by size."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def rendered(self) -> aioprometheus.histogram.Histogram:
        """As aioprometheus has it: cumulative."""
        made = aioprometheus.histogram.Histogram(*self._bounds)
        so_far = 0
        for bound, count in zip(made.buckets, self.counts, strict=True):
            so_far += count
            made.buckets[bound] = so_far
        made.observations, made.sum = so_far, self.total
        return made


Child = Counter | Gauge | Histogram
_KINDS = {"counter": aioprometheus.Counter, "gauge": aioprometheus.Gauge, "histogram": aioprometheus.Histogram}


@dataclass
class _Family:
    metric: Metric
    collector: Any
    children: dict[Labels, Child] = field(default_factory=dict)


class Metrics:
    """One registry. `before_render` are called before each reading, to bring gauges up to date."""

    def __init__(self) -> None:
        self._registry = aioprometheus.Registry()
        self._families: dict[str, _Family] = {}
        self.before_render: list[Callable[[], None]] = []
        for metric in METRICS:
            options = {"buckets": list(metric.buckets)} if metric.kind == "histogram" else {}
            collector = _KINDS[metric.kind](metric.name, metric.help, registry=self._registry, **options)
            self._families[metric.name] = _Family(metric, collector)
            for values in metric.born if metric.labels else ((),):
                self._child(metric.kind, metric.name, dict(zip(metric.labels, values, strict=True)))
        self.gauge("if_build_info", version=__version__, python=platform.python_version()).set(1)

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter with these labels. The caller keeps it: looking it up costs more than counting."""
        child = self._child("counter", name, labels)
        assert isinstance(child, Counter)
        return child

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge with these labels."""
        child = self._child("gauge", name, labels)
        assert isinstance(child, Gauge)
        return child

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram with these labels."""
        child = self._child("histogram", name, labels)
        assert isinstance(child, Histogram)
        return child

    def children(self, name: str) -> Mapping[Labels, Child]:
        """Those of one metric, by their labels: as they are, and those that are still to come."""
        return self._families[name].children

    def _child(self, kind: str, name: str, labels: Mapping[str, str]) -> Child:
        family = self._families.get(name)
        assert family is not None, f"{name} is not in METRICS"
        assert family.metric.kind == kind, f"{name} is a {family.metric.kind}"
        assert set(labels) == set(family.metric.labels), f"{name} has the labels {family.metric.labels}"
        key = tuple((label, labels[label]) for label in family.metric.labels)
        child = family.children.get(key)
        if child is None:
            child = (
                Histogram(family.metric.buckets) if kind == "histogram" else Counter() if kind == "counter" else Gauge()
            )
            if len(family.children) < CHILDREN_MAX:
                family.children[key] = child
            else:  # this child counts for nobody; a daemon that fell because of it would count nothing at all
                self.counter("if_metrics_dropped_total").inc()
        return child

    def render(self) -> bytes:
        """The text format, version 0.0.4."""
        self._read_process()
        for update in self.before_render:
            update()
        for family in self._families.values():
            for key, child in family.children.items():
                # +: the answer to "connected?" as a number; Prometheus refuses all of a page that says True
                value = child.rendered() if isinstance(child, Histogram) else +child.value
                family.collector.values[dict(key)] = value
        text: bytes = SafeText().marshall(self._registry)
        return text

    def _read_process(self) -> None:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        ticks = os.sysconf("SC_CLK_TCK")
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        self.counter("process_cpu_seconds_total").raise_to((int(fields[11]) + int(fields[12])) / ticks)
        self.gauge("process_start_time_seconds").set(int(boot.split()[1]) + int(fields[19]) / ticks)
        self.gauge("process_resident_memory_bytes").set(int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
        self.gauge("process_virtual_memory_bytes").set(int(fields[20]))
        self.gauge("process_open_fds").set(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        self.gauge("process_max_fds").set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for (generation,), stats in zip(GENERATIONS, gc.get_stats(), strict=True):
            runs = self.counter("python_gc_collections_total", generation=generation)
            freed = self.counter("python_gc_objects_collected_total", generation=generation)
            left = self.counter("python_gc_objects_uncollectable_total", generation=generation)
            runs.raise_to(stats["collections"])
            freed.raise_to(stats["collected"])
            left.raise_to(stats["uncollectable"])


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
