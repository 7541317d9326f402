"""What a daemon tells of the fabric, and what that means: outage, latency, one part degraded."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from ifabric import playbooks
from ifabric.care.counted import counted, total
from ifabric.care.facts import Breaker, Counted, Facts, Unmatched
from ifabric.care.findings import judge
from ifabric.metrics import METRICS, Metrics

from .test_findings import BAD, DAEMON, WELL, etcd, member

QUIET = Counted(
    claims=100, claims_p95_s=0.005, sessions=10_000, unmatched=0, breakers_open=0, slow_consumers=0, event_lag_s=30.0, holds_overdue=0,
    audit_waiting=5, audit_lag_s=60.0, audit_dropped=0, restarts=(("coordinator", 2),),
)  # fmt: skip
OPEN = Breaker(name="openai/gpt-x", state="open", opened_ago_s=30.0, probe_in_s=25.0, why="5 of 5 calls failed")


def told(*, breakers: tuple[Breaker, ...] | None = (), **changes: Any) -> Facts:
    daemon = replace(DAEMON, counted=replace(QUIET, **changes), breakers=breakers)
    return replace(WELL, daemon=daemon)


#: facts, and of the finding: severity, words of what is so, of the figure, of what to do, and the page
ROWS: list[tuple[str, Facts, str, str, str, str, str]] = [
    ("dead", replace(WELL, daemon=replace(DAEMON, error="refused")), "critical", "does not answer", "", "start it", "outage"),
    ("not ready", replace(WELL, daemon=replace(DAEMON, not_ready=("etcd",))), "critical", "etcd", "", "ifabric status", "degraded"),
    ("slow claims", told(claims_p95_s=0.05), "warning", "claims are slow", "up to 50 ms, of 100", "ifabric top", "latency"),
    ("very slow claims", told(claims_p95_s=0.25), "critical", "claims are slow", "250 ms", "", "latency"),
    ("sessions", told(sessions=10_001), "warning", "very many sessions", "10001", "more daemons", "latency"),
    ("late events", told(event_lag_s=31.0), "warning", "events are published late", "31 s behind", "JetStream", "event-lag"),
    ("restarts", told(restarts=(("governor", 3),)), "warning", "actor governor", "3 times", "ifabric status", "actor-restarts"),
    ("slow consumer", told(slow_consumers=4), "warning", "did not keep up", "4", "ifabric top", "slow-consumer"),
    ("overdue holds", told(holds_overdue=2), "warning", "holds are open", "2", "budget holds", "hold-leak"),
    ("a breaker", told(breakers=(OPEN,)), "warning", "openai/gpt-x is open for 30 s (5 of 5 calls failed)", "probes in 25 s",
     "ifabric explain openai/gpt-x --breaker", "breaker"),
    ("a probe that is due", told(breakers=(replace(OPEN, probe_in_s=-1.0),)), "warning", "is open", "probes now", "", "breaker"),
    ("held open", told(breakers=(replace(OPEN, by="ann", why="invoice", probe_in_s=None),)), "warning", "by ann (invoice)", "", "", "breaker"),
    ("half open", told(breakers=(replace(OPEN, state="half_open"),)), "warning", "is half open", "", "", "breaker"),
    ("breakers without names", told(breakers=None, breakers_open=2), "warning", "breakers are open", "2", "breaker list", "breaker"),
    ("unmatched", told(unmatched=3), "warning", "can be taken by no session", "3 of them", "task list", "unmatched"),
    ("lost audit", told(audit_dropped=3), "critical", "were dropped", "3", "audit verify", "audit"),
    ("waiting audit", told(audit_lag_s=120.0), "warning", "wait on this machine's disk", "5 wait, the oldest for 2 min", "JetStream", "audit"),
    ("a slow commit", etcd(member(2, commit_p99_s=0.128)), "warning", "e2 takes long to commit", "over 100 ms", "iostat", "etcd-slow"),
    ("no quorum", etcd(member(2, error="x"), member(3, error="x")), "critical", "no quorum", "", "", "etcd-no-quorum"),
]  # fmt: skip
#: which capability is missing comes from the journal, that it is missing from the metrics
UNMATCHED = [
    (Unmatched(needs=("gpu", "rust"), missing=("gpu",), example="T3"), "nobody has gpu", "ifabric match explain T3"),
    (Unmatched(needs=("gpu", "rust")), "nobody has gpu, rust", "ifabric match explain TASK"),
    (None, "can be taken by no session", "ifabric match explain TASK"),
]


@pytest.mark.parametrize(
    ("facts", "severity", "what", "figure", "do", "page"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_an_incident_is_found_with_its_page(
    facts: Facts, severity: str, what: str, figure: str, do: str, page: str
) -> None:
    found = [one for one in judge(facts).findings if one.severity != "ok"]
    fitting = [
        one
        for one in found
        if one.severity == severity
        and what in one.what
        and figure in one.figure
        and do in one.do
        and one.playbook == page
    ]
    assert len(fitting) == 1, found


@pytest.mark.parametrize(("last", "what", "do"), UNMATCHED)
def test_what_is_missing_for_tasks_that_nobody_can_take_is_named(last: Unmatched | None, what: str, do: str) -> None:
    [found] = [one for one in judge(replace(told(unmatched=3), unmatched=last)).findings if one.severity != "ok"]
    assert what in found.what and do in found.do and (found.figure, found.playbook) == ("3 of them", "unmatched")


@pytest.mark.parametrize(
    "facts",
    [
        told(),
        told(claims_p95_s=0.010),
        told(claims_p95_s=5.0, claims=19),
        told(unmatched=0),
        told(breakers=(), breakers_open=7),
        replace(told(), unmatched=Unmatched(missing=("gpu",))),
        told(
            **dict.fromkeys(("sessions", "unmatched", "event_lag_s", "audit_lag_s", "audit_dropped", "holds_overdue"))
        ),
        etcd(member(2, commit_p99_s=0.064)),
    ],
)
def test_what_is_just_well_is_no_finding(facts: Facts) -> None:
    assert [one for one in judge(facts).findings if one.severity != "ok"] == []


def test_every_page_that_a_finding_names_is_there() -> None:
    every = [one for row in (*BAD, *ROWS) for one in judge(row[1]).findings]
    named = {one.playbook for one in every} - {""}
    assert named <= set(playbooks.names())
    assert named >= {
        "outage",
        "latency",
        "degraded",
        "breaker",
        "unmatched",
        "audit",
        "etcd-full",
        "nats-down",
        "certificates",
        "backup-age",
    }


# -- what a daemon counts ----------------------------------------------------------------------------------------------


def test_the_figures_are_those_that_a_daemon_renders() -> None:
    made = Metrics()
    before = made.render().decode()
    made.gauge("if_coordinator_active_sessions").set(12)
    made.gauge("if_governor_unmatched_tasks").set(3)
    made.gauge("if_governor_breakers", state="open").set(2)
    made.gauge("if_governor_breakers", state="half_open").set(7)
    made.counter("if_bus_slow_consumers_total").inc(4)
    made.gauge("if_coordinator_event_lag_seconds").set(1.5)
    made.gauge("if_governor_event_lag_seconds").set(40)
    made.counter("if_actor_restarts_total", actor="governor").inc(3)
    made.counter("if_actor_restarts_total", actor="chassis")
    latency = made.histogram("if_coordinator_claim_latency_seconds")
    for _ in range(90):
        latency.observe(0.0009)
    for _ in range(10):
        latency.observe(0.04)
    found = counted(before, made.render().decode())
    assert (found.sessions, found.unmatched, found.breakers_open, found.slow_consumers) == (12, 3, 2, 4)
    assert (found.event_lag_s, found.restarts) == (40.0, (("governor", 3),))
    assert (found.claims, found.claims_p95_s) == (100, 0.05)


def test_only_the_claims_between_the_two_looks_count() -> None:
    made = Metrics()
    latency = made.histogram("if_coordinator_claim_latency_seconds")
    for _ in range(1000):
        latency.observe(4.0)
    before = made.render().decode()
    assert (counted(before, before).claims, counted(before, before).claims_p95_s) == (0, None)
    latency.observe(0.0001)
    latency.observe(60.0)
    found = counted(before, made.render().decode())
    assert (found.claims, found.claims_p95_s) == (2, 5.0)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "if_coordinator_active_sessions NaN\n", "if_coordinator_claim_latency_seconds_bucket{} 1"]
)
def test_a_page_without_figures_has_none(text: str) -> None:
    assert counted("", text) == Counted()


def test_a_daemon_that_was_started_between_the_looks_counts_from_nothing() -> None:
    made = Metrics()
    made.histogram("if_coordinator_claim_latency_seconds").observe(0.001)
    assert counted(made.render().decode(), Metrics().render().decode()).claims_p95_s is None


def test_what_is_asked_for_is_counted_by_a_daemon() -> None:
    known = {metric.name for metric in METRICS}
    wanted = {
        "if_coordinator_active_sessions", "if_governor_unmatched_tasks", "if_governor_breakers", "if_bus_slow_consumers_total",
        "if_coordinator_event_lag_seconds", "if_governor_event_lag_seconds", "if_governor_holds_overdue", "if_audit_waiting",
        "if_audit_lag_seconds", "if_audit_dropped_total", "if_actor_restarts_total", "if_coordinator_claim_latency_seconds",
    }  # fmt: skip
    assert wanted <= known
    assert total('x{a="1",b="2"} 3\nx{a="2"} 4\n', "x", a="1") == 3
