"""What the facts about this machine's daemon mean: itself, and what it counts of the fabric."""

from __future__ import annotations

from collections.abc import Iterator

from ifabric.care.facts import Breaker, Counted, Daemon, Facts, Unmatched
from ifabric.care.finding import Finding, critical, ok, span, warning

#: a loop that is late by that much answers late by that much
LAG_WARNING_S = 0.1
#: the target of a claim, and where the runbook speaks of a P2; with fewer claims than that a percentile says nothing
CLAIM_WARNING_S, CLAIM_CRITICAL_S, CLAIMS_MIN = 0.010, 0.100, 20
#: the runbook's: above it, more daemons
SESSIONS_MAX = 10_000
#: as the alerts have them
RESTARTS_MAX, EVENT_LAG_S, AUDIT_LAG_S = 2, 30.0, 60.0
PART = "daemon"


def judge(facts: Facts) -> Iterator[Finding]:
    """Of the daemon, then of what it tells about the fabric."""
    daemon = facts.daemon
    if daemon is None:
        return
    if daemon.error:
        yield critical(
            PART,
            f"does not answer at {daemon.url}: {daemon.error}",
            do="see its log, and start it again",
            playbook="outage",
        )
        return
    yield from _itself(daemon, facts.version)
    if daemon.counted is not None:
        yield from _pace(daemon.counted)
        yield from _parts(daemon, daemon.counted)
        yield from _matching(daemon.counted, facts.unmatched)
        yield from _audit(daemon.counted)
    if not daemon.not_ready:
        yield ok(PART, f"{daemon.status} at {daemon.url}", figure=daemon.version)


def _itself(daemon: Daemon, version: str) -> Iterator[Finding]:
    if daemon.not_ready:
        yield critical(
            PART,
            f"is {daemon.status}: {', '.join(daemon.not_ready)}",
            do="`ifabric status`, and its log",
            playbook="degraded",
        )
    if daemon.version != version:
        yield warning(
            PART,
            "is of another version than this command",
            figure=f"{daemon.version}, {version}",
            do="upgrade the daemons one by one: stop one (it drains), start the new one, wait for its /readyz",
        )
    if daemon.loop_lag_s >= LAG_WARNING_S:
        yield warning(
            PART,
            "its event loop is late",
            figure=f"{daemon.loop_lag_s * 1000:.0f} ms",
            do="start another daemon beside it, or move the chassis to a host of its own (`--actors`)",
            playbook="loop-lag",
        )
    for sentence in daemon.warnings:
        yield warning(PART, sentence)


def _pace(counted: Counted) -> Iterator[Finding]:
    p95 = counted.claims_p95_s
    if p95 is not None and p95 > CLAIM_WARNING_S and counted.claims >= CLAIMS_MIN:
        yield (critical if p95 > CLAIM_CRITICAL_S else warning)(
            PART,
            "claims are slow: one in twenty, of those just now",
            figure=f"over {CLAIM_WARNING_S * 1000:.0f} ms, up to {p95 * 1000:.0f} ms, of {counted.claims} claims",
            do="etcd's disk and this loop first; then another daemon: `ifabric top` shows which it is",
            playbook="latency",
        )
    if counted.sessions is not None and counted.sessions > SESSIONS_MAX:
        yield warning(
            PART,
            "there are very many sessions, and each keeps a lease alive",
            figure=f"{counted.sessions}, over {SESSIONS_MAX}",
            do="start more daemons; have agents live longer between renewals (ttl_s)",
            playbook="latency",
        )
    if counted.event_lag_s is not None and counted.event_lag_s > EVENT_LAG_S:
        yield warning(
            PART,
            "events are published late",
            figure=f"{span(counted.event_lag_s)} behind",
            do="see JetStream above: its leader, its disk; nothing is lost meanwhile",
            playbook="event-lag",
        )


def _parts(daemon: Daemon, counted: Counted) -> Iterator[Finding]:
    for actor, times in counted.restarts:
        if times > RESTARTS_MAX:
            yield warning(
                PART,
                f"the actor {actor} was started again and again",
                figure=f"{times} times since the daemon started",
                do="`ifabric status` has the last reason, the log has all",
                playbook="actor-restarts",
            )
    if counted.slow_consumers:
        yield warning(
            PART,
            "it did not keep up with NATS, and messages were dropped",
            figure=f"{counted.slow_consumers} since it started",
            do="see its loop and load: `ifabric top`; another daemon takes a share",
            playbook="slow-consumer",
        )
    if counted.holds_overdue:
        yield warning(
            PART,
            "holds are open though their owner or their time has ended",
            figure=str(counted.holds_overdue),
            do="`ifabric budget holds`; a governor has to run, and etcd to be quick",
            playbook="hold-leak",
        )
    if daemon.breakers is not None:
        yield from (_breaker(breaker) for breaker in daemon.breakers)
    elif counted.breakers_open:
        yield warning(
            PART,
            "breakers are open",
            figure=str(counted.breakers_open),
            do="`ifabric breaker list` shows which",
            playbook="breaker",
        )


def _breaker(breaker: Breaker) -> Finding:
    since = f" for {span(breaker.opened_ago_s)}" if breaker.opened_ago_s is not None else ""
    who = f", by {breaker.by}" if breaker.by else ""
    probe = ""
    if breaker.probe_in_s is not None:
        probe = "probes now" if breaker.probe_in_s <= 0 else f"probes in {span(breaker.probe_in_s)}"
    why = f" ({breaker.why})" if breaker.why else ""
    return warning(
        PART,
        f"the breaker {breaker.name} is {breaker.state.replace('_', ' ')}{since}{who}{why}",
        figure=probe,
        do=f"`ifabric explain {breaker.name} --breaker`: who reported the failures, who is refused meanwhile",
        playbook="breaker",
    )


def _matching(counted: Counted, told: Unmatched | None) -> Iterator[Finding]:
    if not counted.unmatched:
        return
    missing = ""
    do = "`ifabric task list --state pending`, and of one of them: `ifabric match explain TASK`"
    if told is not None:
        lacking = told.missing or told.needs
        missing = f": nobody has {', '.join(lacking)}" if lacking else ""
        do = f"start an agent that has it; `ifabric match explain {told.example}`" if told.example else do
    yield warning(
        PART,
        f"pending tasks can be taken by no session{missing}",
        figure=f"{counted.unmatched} of them",
        do=do,
        playbook="unmatched",
    )


def _audit(counted: Counted) -> Iterator[Finding]:
    if counted.audit_dropped:
        yield critical(
            PART,
            "records of the audit were dropped: who did what then cannot be proven",
            figure=f"{counted.audit_dropped} since it started",
            do="make room where they wait and in the stream; `ifabric audit verify` names the gap",
            playbook="audit",
        )
    if counted.audit_lag_s is not None and counted.audit_lag_s > AUDIT_LAG_S:
        waiting = f"{counted.audit_waiting} wait, " if counted.audit_waiting is not None else ""
        yield warning(
            PART,
            "records of the audit wait on this machine's disk",
            figure=f"{waiting}the oldest for {span(counted.audit_lag_s)}",
            do="see JetStream above; they are stored when it takes them",
            playbook="audit",
        )
