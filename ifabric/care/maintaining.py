"""What maintenance may be done to a cluster, and in which order. Pure.

A member that is defragmented answers nothing until its whole file is written anew. So: one at a time, followers first, the
leader last; each only while the cluster can lose one more besides; and when the followers have shown that it takes longer
than a daemon waits for an answer, the leadership is handed over before the leader's turn. (Not always: a change of leader
gives every lease its full life again, and whoever waits for a dead agent's task waits longer.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ifabric.care.facts import Etcd, Member
from ifabric.care.findings_etcd import ENTRIES_BEHIND_MAX
from ifabric.errors import ConfigError, Unavailable

#: one attempt of a daemon (`attempt_timeout_seconds`)
HURTS_FROM_S = 0.5
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds(text: str) -> float:
    """Of `90s`, `10m`, `2h`, `1d`. `ConfigError` for anything else."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--keep: {text!r} is no length of time; write 0s, 90s, 10m, 2h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def well(member: Member, etcd: Etcd) -> bool:
    """Whether it answers, follows the leader that the others follow, has the same data and keeps up."""
    leader = etcd.leader
    if member.error or leader is None or member.leader != leader.id or "CORRUPT" in member.alarms:
        return False
    return max(one.index for one in etcd.answering) - member.applied <= ENTRIES_BEHIND_MAX


def why_not(etcd: Etcd, member: Member | None = None) -> str | None:
    """Why no member, or not this one, is to be defragmented now; None: it may be."""
    voters = [one for one in etcd.members if not one.learner]
    sick = [f"{one.called}: {one.error or ', '.join(one.alarms) or 'behind'}" for one in voters if not well(one, etcd)]
    needed = min(len(voters), len(voters) // 2 + 2)
    if etcd.read_error:
        return f"there is no quorum ({etcd.read_error})"
    if len(voters) - len(sick) < needed:
        return f"{len(voters) - len(sick)} of {len(voters)} members are well, {needed} have to be ({'; '.join(sick)})"
    if member is not None and not well(member, etcd):
        return f"{member.called} is not well"
    return None


def order(etcd: Etcd, names: Sequence[str] = ()) -> list[Member]:
    """The members to be defragmented, by name, id or URL (none: all), the leader last. `ConfigError` for a name that
    nobody has.
    """
    chosen = []
    for name in names:
        found = [one for one in etcd.members if name in (one.name, one.url, f"{one.id:x}")]
        if not found:
            raise ConfigError(
                f"--member: there is no {name}; there are {', '.join(one.called for one in etcd.members)}"
            )
        chosen += [one for one in found if one not in chosen]
    leader = etcd.leader
    return sorted(chosen or etcd.members, key=lambda one: leader is not None and one.id == leader.id)


def successor(etcd: Etcd, leader: Member) -> Member:
    """Who is to lead while the leader is away: the follower that is least behind. `Unavailable` when there is none."""
    others = [one for one in etcd.members if one.id != leader.id and not one.learner and well(one, etcd)]
    if not others:
        raise Unavailable("no other member could lead; nothing was done to the leader", what="etcd")
    return max(others, key=lambda one: one.applied)
