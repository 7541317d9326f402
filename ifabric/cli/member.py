"""`ifabric member list`: who is in the etcd cluster, and how one that is lost is replaced."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ifabric.cli.cluster import Servers
from ifabric.cli.options import Json
from ifabric.cli.output import out, plain, print_json, print_table
from ifabric.errors import Unreachable

if TYPE_CHECKING:
    from ifabric.care.facts import Etcd
    from ifabric.store.channel import EtcdSettings


def list_(where: Servers | None = None, *, json: Json = False) -> int:
    """Show the members of the etcd cluster. Below, for one that does not
    answer, the commands that replace it. Nothing is changed.

    Exit 0 when all are well, 1 when one is not, 3 when none answers.

    For example:

        ifabric member list --config fabric.yaml
        ifabric member list --json | jq '.members[] | {name, error}'
    """
    from ifabric.care.cluster import Cluster
    from ifabric.care.finding import size
    from ifabric.care.replacing import guidance
    from ifabric.clock import SystemClock

    places = (where or Servers()).places()

    async def look() -> Etcd:
        async with Cluster(places.etcd, SystemClock()) as cluster:
            return await cluster.look()

    etcd = asyncio.run(look())
    steps = guidance(etcd, etcdctl_words(places.etcd), places.words)
    if json:
        print_json({"members": etcd.members, "list_error": etcd.list_error, "guidance": steps})
    else:
        leader = etcd.leader
        print_table(
            ("ID", "NAME", "CLIENT URL", "VERSION", "ROLE", "FILE", "HEALTH"),
            (
                (
                    f"{member.id:x}" if member.id else "-",
                    member.name or "-",
                    member.url or "-",
                    member.version or "-",
                    "learner" if member.learner else "leader" if leader and leader.id == member.id else "follower",
                    f"{size(member.used_bytes)} of {size(member.size_bytes)}" if member.size_bytes else "-",
                    member.error or ", ".join(member.alarms) or "well",
                )
                for member in etcd.members
            ),
        )
        if etcd.list_error:
            out.print(f"[yellow]![/] {plain(etcd.list_error)}; these are the configured endpoints")
        for line in steps:
            out.print(plain(line))
    if not etcd.answering:
        raise Unreachable("no member of etcd answers")
    return 1 if any(member.error or member.alarms for member in etcd.members) else 0


def etcdctl_words(settings: EtcdSettings) -> str:
    """Options of etcdctl that say who we are."""
    given = {"cacert": settings.ca_cert, "cert": settings.cert_file, "key": settings.key_file}
    return "".join(f" --{name} {value}" for name, value in given.items() if value)
