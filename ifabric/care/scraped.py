"""What a member of etcd tells in its /metrics: more than its status in parts, and to everybody.

With authentication on, etcd gives its status to root alone; its metrics it gives to every client certificate. So the
daemon's own certificate is enough to see how the members are.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from ifabric.care.facts import Member

#: stands for the id of a leader that the metrics do not name: somebody leads
SOMEBODY = -1


def told(member: Member, text: str) -> Member:
    """The member with what only the metrics say: the quota, and how long its disk takes."""
    quota = number(text, "etcd_server_quota_backend_bytes")
    return replace(
        member,
        quota_bytes=int(quota) if quota is not None else None,
        fsync_p99_s=p99(text, "etcd_disk_wal_fsync_duration_seconds"),
        commit_p99_s=p99(text, "etcd_disk_backend_commit_duration_seconds"),
    )


def status(member: Member, text: str) -> Member:
    """The member with what its status would say, from its metrics; `leader` is `SOMEBODY` unless it leads itself."""
    version = re.search(r'^etcd_server_version\{server_version="([^"]+)"\} 1$', text, re.MULTILINE)
    leads, follows = number(text, "etcd_server_is_leader"), number(text, "etcd_server_has_leader")
    return replace(
        member,
        error="",
        version=version[1] if version else "",
        leader=member.id if leads else SOMEBODY if follows else 0,
        index=int(number(text, "etcd_server_proposals_committed_total") or 0),
        applied=int(number(text, "etcd_server_proposals_applied_total") or 0),
        revision=int(number(text, "etcd_debugging_mvcc_current_revision") or 0),
        size_bytes=int(number(text, "etcd_mvcc_db_total_size_in_bytes") or 0),
        used_bytes=int(number(text, "etcd_mvcc_db_total_size_in_use_in_bytes") or 0),
    )


def with_leader(members: list[Member]) -> list[Member]:
    """The same, with the id of the one that leads where only `SOMEBODY` was known."""
    leader = next((member.id for member in members if member.leader == member.id and member.id), 0)
    return [replace(member, leader=leader) if member.leader == SOMEBODY else member for member in members]


def number(text: str, name: str) -> float | None:
    """The value of a metric without labels."""
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def p99(text: str, name: str) -> float | None:
    """The upper bound of the bucket in which the 99th percentile of a histogram is; None without any."""
    buckets = [
        (float(bound), float(count))
        for bound, count in re.findall(rf'^{name}_bucket{{le="([^"]+)"}} (\S+)$', text, re.MULTILINE)
    ]
    if not buckets or not (total := max(count for _, count in buckets)):
        return None
    return next(bound for bound, count in sorted(buckets) if count >= 0.99 * total)
