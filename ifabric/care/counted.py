"""What a daemon tells in its /metrics, read twice: what grew between is what happens now."""

from __future__ import annotations

import math
import re

from ifabric.care.facts import Counted

LATENCY = "if_coordinator_claim_latency_seconds"


def counted(before: str, after: str) -> Counted:
    """The figures of `after`; of claims, those that were granted since `before`."""
    claims, p95 = _claims(before, after)
    lags = [
        lag for part in ("coordinator", "governor") if (lag := total(after, f"if_{part}_event_lag_seconds")) is not None
    ]
    return Counted(
        claims=claims,
        claims_p95_s=p95,
        sessions=_whole(after, "if_coordinator_active_sessions"),
        unmatched=_whole(after, "if_governor_unmatched_tasks"),
        breakers_open=_whole(after, "if_governor_breakers", state="open"),
        slow_consumers=_whole(after, "if_bus_slow_consumers_total"),
        event_lag_s=max(lags, default=None),
        holds_overdue=_whole(after, "if_governor_holds_overdue"),
        audit_waiting=_whole(after, "if_audit_waiting"),
        audit_lag_s=total(after, "if_audit_lag_seconds"),
        audit_dropped=_whole(after, "if_audit_dropped_total"),
        restarts=tuple(
            (actor, int(float(value)))
            for actor, value in re.findall(r'^if_actor_restarts_total\{actor="([^"]+)"\} (\S+)$', after, re.MULTILINE)
            if float(value)
        ),
    )


def total(text: str, name: str, **labels: str) -> float | None:
    """The value of a metric, summed over every label that is not named; None when it is not counted."""
    found = [
        float(value)
        for told, value in re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        if all(f'{label}="{wanted}"' in told for label, wanted in labels.items())
    ]
    return sum(found) if found else None


def _whole(text: str, name: str, **labels: str) -> int | None:
    value = total(text, name, **labels)
    return int(value) if value is not None and math.isfinite(value) else None


def _claims(before: str, after: str) -> tuple[int, float | None]:
    """How many, and the upper bound of the bucket in which the 95th percentile is; above the last, that one."""
    was, now = _buckets(before), _buckets(after)
    grown = sorted((bound, count - was.get(bound, 0.0)) for bound, count in now.items())
    if not grown or grown[-1][1] <= 0:
        return 0, None
    claims = grown[-1][1]
    bound = next(bound for bound, count in grown if count >= 0.95 * claims)
    if math.isinf(bound):
        bound = max((one for one, _ in grown if not math.isinf(one)), default=0.0)
    return int(claims), bound


def _buckets(text: str) -> dict[float, float]:
    return {
        float(bound): float(count)
        for bound, count in re.findall(rf'^{LATENCY}_bucket\{{le="([^"]+)"\}} (\S+)$', text, re.MULTILINE)
    }
