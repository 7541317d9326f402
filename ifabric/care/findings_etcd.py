"""What the facts about etcd mean."""

from __future__ import annotations

from collections.abc import Iterator

from ifabric.care.facts import Etcd, Facts, Member
from ifabric.care.finding import Finding, critical, ok, percent, size, span, warning
from ifabric.programs import is_sound, parse_version

#: OpenShift's etcd operator: 75 % a warning, 85 % critical. At 100 % nothing is written any more.
QUOTA_WARNING, QUOTA_CRITICAL = 0.75, 0.85
#: etcd's own mixin: less than half of the file is in use, and it is worth the trouble: 100 MiB. Under a small quota a tenth of
#: it is worth the trouble, too.
FREE_SHARE_MAX, FREE_MIN_BYTES, FREE_MIN_SHARE_OF_QUOTA = 0.5, 100 << 20, 0.1
#: etcd keeps that many entries for followers (SnapshotCatchUpEntries); one that is further behind needs a whole snapshot. And
#: with so many that are committed and not applied, etcd refuses requests (maxGapBetweenApplyAndCommitIndex).
ENTRIES_BEHIND_MAX = 5000
#: etcd's hardware guide wants 10 ms at the 99th percentile; its mixin warns at 0.5 s, when elections are near
FSYNC_SLOW_S, FSYNC_WARNING_S = 0.010, 0.5
#: the runbook's limit for a commit to the database's file
COMMIT_WARNING_S = 0.1
#: what the daemons give one attempt (`attempt_timeout_seconds`)
ANSWER_WARNING_S = 0.5
PART = "etcd"


def judge(facts: Facts) -> Iterator[Finding]:
    """Of the cluster, then of each member."""
    etcd = facts.etcd
    if etcd is None:
        return
    if not etcd.answering:
        yield critical(
            PART,
            f"no member answers: {'; '.join(f'{one.called}: {one.error}' for one in etcd.members)}",
            do="start them; with one of three lost for good: `ifabric member list`; with two: `ifabric restore`",
            playbook="etcd-no-quorum",
        )
        return
    yield from _quorum(etcd, facts.words)
    yield from _alarms(etcd, facts.words)
    yield from _quota(etcd, facts.words)
    yield from _free_pages(etcd, facts.words)
    for member in etcd.answering:
        yield from _pace(member, etcd)
    yield from _versions(etcd, facts)


def _quorum(etcd: Etcd, words: str) -> Iterator[Finding]:
    voters = [member for member in etcd.members if not member.learner]
    needed = len(voters) // 2 + 1
    well = sum(not member.error for member in voters)
    leader = etcd.leader
    lost = etcd.read_error or leader is None or (not etcd.list_error and well < needed)
    replace = f"start it again; if its disk is lost: `ifabric member list{words}` shows how to replace it"
    for member in etcd.members:
        if member.error:
            yield (critical if lost else warning)(
                PART,
                f"{member.called} does not answer ({member.error})",
                figure=member.url,
                do=replace,
                playbook="etcd-down",
            )
    if lost:
        why = etcd.read_error or (
            f"{well} of {len(voters)} members answer, {needed} are needed" if leader else "no leader"
        )
        yield critical(
            PART,
            f"no quorum: nothing is granted, completed or paid ({why})",
            do="get a member back; see each above",
            playbook="etcd-no-quorum",
        )
    else:
        assert leader is not None, "there is a quorum"
        agreed = {member.leader for member in etcd.answering} == {leader.id}
        figure = ", ".join(sorted({member.version for member in etcd.answering}))
        says = f"{well} of {len(voters)} members answer, {leader.called} leads"
        yield (
            ok(PART, says, figure=figure)
            if agreed
            else warning(
                PART,
                f"{says}, and not all follow it",
                do="look again: an election may be under way; then see their logs",
            )
        )
    if etcd.list_error:
        yield warning(PART, f"the members are not known ({etcd.list_error}): these are the configured ones")
        return
    if not lost and len(voters) > 1 and well == needed < len(voters):
        yield warning(
            PART,
            "one more member lost, and there is no quorum",
            figure=f"{well} of {len(voters)}",
            playbook="etcd-down",
        )
    if len(voters) == 2 or (len(voters) > 2 and len(voters) % 2 == 0):
        yield warning(
            PART, "an even number of members bears no more losses than one fewer", figure=str(len(voters)),
            do="add one, or remove one",
        )  # fmt: skip
    if 0 < etcd.configured < len(voters):
        yield warning(
            PART,
            "coordinator.etcd.endpoints does not name all members: a daemon that starts may find none",
            figure=f"{etcd.configured} of {len(voters)}",
            do=f"endpoints: [{', '.join(member.url for member in voters)}]",
        )
    for member in etcd.members:
        if member.learner:
            yield warning(
                PART, f"{member.called} is a learner: it has no vote yet", do=f"etcdctl member promote {member.id:x}"
            )


def _alarms(etcd: Etcd, words: str) -> Iterator[Finding]:
    full = [member.called for member in etcd.members if "NOSPACE" in member.alarms]
    if full:
        yield critical(
            PART,
            f"full (NOSPACE on {', '.join(full)}): nothing is written any more",
            do=f"ifabric maintenance compact --keep 0s{words} && ifabric maintenance defrag --yes --disarm{words}\n"
            "if it is full again soon: `ifabric task purge` what is done, or raise --quota-backend-bytes",
            playbook="etcd-full",
        )
    for member in etcd.members:
        if "CORRUPT" in member.alarms:
            yield critical(
                PART,
                f"{member.called} has other data than the others (CORRUPT)",
                do=f"replace it: `ifabric member list{words}` shows how",
            )


def _quota(etcd: Etcd, words: str) -> Iterator[Finding]:
    """The members fill up side by side: one finding for all."""
    shares = {
        member: member.size_bytes / member.quota_bytes
        for member in etcd.answering
        if member.quota_bytes and "NOSPACE" not in member.alarms
    }
    filling = [member for member, share in shares.items() if share >= QUOTA_WARNING]
    if not filling:
        return
    fullest = max(filling, key=lambda member: shares[member])
    assert fullest.quota_bytes, "it has a share of it"
    names = ", ".join(member.called for member in filling)
    all_in_use = fullest.used_bytes >= QUOTA_WARNING * fullest.quota_bytes
    yield (critical if shares[fullest] >= QUOTA_CRITICAL else warning)(
        PART,
        f"{names} {'is' if len(filling) == 1 else 'are up to'} {percent(shares[fullest])} full",
        figure=f"{size(fullest.size_bytes)} of {size(fullest.quota_bytes)}, {size(fullest.used_bytes)} in use",
        do=f"ifabric maintenance compact{words} && ifabric maintenance defrag --yes{words}"
        + ("\nif most stays in use: purge what is done, or raise --quota-backend-bytes" if all_in_use else ""),
        playbook="etcd-full",
    )


def _free_pages(etcd: Etcd, words: str) -> Iterator[Finding]:
    loose = [member for member in etcd.answering if _is_loose(member)]
    if not loose:
        return
    loosest = max(loose, key=_free_bytes)
    share = percent(_free_bytes(loosest) / loosest.size_bytes)
    names = ", ".join(member.called for member in loose)
    yield warning(
        PART,
        f"{share} of the file of {names} is free pages"
        if len(loose) == 1
        else f"the files of {names} are up to {share} free pages",
        figure=f"{size(_free_bytes(loosest))} of {size(loosest.size_bytes)}",
        do=f"ifabric maintenance defrag --yes{words}",
    )


def _free_bytes(member: Member) -> int:
    return member.size_bytes - member.used_bytes


def _is_loose(member: Member) -> bool:
    free, quota = _free_bytes(member), member.quota_bytes
    worth = free >= FREE_MIN_BYTES or bool(quota and free >= FREE_MIN_SHARE_OF_QUOTA * quota)
    return bool(member.size_bytes) and free / member.size_bytes > FREE_SHARE_MAX and worth


def _pace(member: Member, etcd: Etcd) -> Iterator[Finding]:
    behind = max(one.index for one in etcd.answering) - member.index
    waiting = member.index - member.applied
    if behind > ENTRIES_BEHIND_MAX:
        yield warning(
            PART, f"{member.called} is behind the others", figure=f"{behind} entries", do="see its disk and network"
        )
    if waiting > ENTRIES_BEHIND_MAX:
        yield warning(
            PART,
            f"{member.called} does not keep up with what is committed",
            figure=f"{waiting} entries",
            do="see its disk",
        )
    if member.took_s >= ANSWER_WARNING_S:
        yield warning(
            PART,
            f"{member.called} takes long to answer",
            figure=span(member.took_s),
            do="see its load and network",
            playbook="etcd-slow",
        )
    fsync = member.fsync_p99_s
    if fsync is not None and fsync > FSYNC_WARNING_S:
        yield warning(
            PART,
            f"the disk of {member.called} is slow: one in a hundred fsyncs since it started",
            figure=f"over {FSYNC_WARNING_S:g} s; {FSYNC_SLOW_S * 1000:.0f} ms is what etcd wants",
            do="give etcd a disk of its own, an SSD",
            playbook="etcd-slow",
        )
    commit = member.commit_p99_s
    if commit is not None and commit > COMMIT_WARNING_S:
        yield warning(
            PART,
            f"{member.called} takes long to commit: one in a hundred since it started",
            figure=f"over {COMMIT_WARNING_S * 1000:.0f} ms",
            do="see its disk: `iostat -x 1 10` there; give it one of its own, an SSD",
            playbook="etcd-slow",
        )


def _versions(etcd: Etcd, facts: Facts) -> Iterator[Finding]:
    versions = sorted({member.version for member in etcd.answering}, key=parse_version)
    old = [version for version in versions if not is_sound(parse_version(version))]
    if old:
        tolerated = facts.embedded or facts.allow_old_etcd
        yield (warning if tolerated else critical)(
            PART,
            f"{', '.join(old)} can lose what it acknowledged when it is killed (etcd 13766, 14370), "
            "and lets nested transactions past its access control",
            do="use 3.5.30 or newer, or 3.6.11 or newer; one member at a time"
            + ("; here: `just etcd`" if facts.embedded else ""),
        )
    if len(versions) > 1:
        yield warning(
            PART, "its members are of different versions", figure=", ".join(versions), do="finish the upgrade"
        )
