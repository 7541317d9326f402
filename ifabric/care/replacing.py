"""How a lost member of etcd is replaced: the exact commands, and nothing that carries them out.

The lost one is removed before the new one is added, because the quorum counts members and not those who answer: four of
whom one is lost and one is empty bear no loss at all. The new one comes as a learner, which counts for nothing until it
has the data.
"""

from __future__ import annotations

from ifabric.care.facts import Etcd, Member


def guidance(etcd: Etcd, words: str, again: str = "") -> list[str]:
    """Lines for whoever has to do it; none when every member is well. `words`: etcdctl's options for TLS; `again`: ours."""
    ill = [member for member in etcd.members if member.error or "CORRUPT" in member.alarms]
    if not ill or etcd.list_error:
        return []
    voters = [member for member in etcd.members if not member.learner]
    well = [member for member in voters if member not in ill]
    if etcd.read_error or len(well) < len(voters) // 2 + 1:
        return [
            "",
            f"There is no quorum: {len(well)} of {len(voters)} members are well, {len(voters) // 2 + 1} are needed.",
            "Start the others again. With their disks lost, restore: `ifabric restore --help`.",
        ]
    endpoints = ",".join(member.url for member in well)
    lines = []
    for member in ill:
        lines += _replace(member, well, f"etcdctl --endpoints {endpoints}{words}", again)
    return lines


def _replace(member: Member, well: list[Member], etcdctl: str, again: str) -> list[str]:
    name = member.name or "NAME"
    peer = ",".join(member.peer_urls) or "https://HOST:2380"
    why = "has other data than the others" if not member.error else f"does not answer: {member.error}"
    initial = ",".join(f"{one.name}={url}" for one in well for url in one.peer_urls)
    return [
        "",
        f"{member.called} {why}. If its disk is sound, start it again: that is all.",
        "If it is lost, with the others running:",
        "",
        "  # 1. it goes first: the quorum counts members, not those who answer",
        f"  {etcdctl} member remove {member.id:x}",
        "  # 2. on its machine: stop it, and move its old data away",
        f"  mv DATA-DIR DATA-DIR.lost.{name}",
        "  # 3. the new one, as a learner: it gets the data and has no vote yet (unhealthy cluster: again, in some seconds)",
        f"  {etcdctl} member add {name} --learner --peer-urls={peer}",
        "  # 4. start it with its own options as before, but for these two",
        f"  etcd --initial-cluster-state existing --initial-cluster {initial},{name}={peer.split(',')[0]} ...",
        "  # 5. when it has caught up (etcd refuses before that), with the id that step 3 printed",
        f"  {etcdctl} member promote ID",
        "  # 6. see that all are well",
        f"  ifabric member list{again}",
    ]
