"""What facts mean: each finding, from the facts that make it and from those that just do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from ifabric.care.facts import (
    Backups,
    Certificate,
    Daemon,
    Etcd,
    Facts,
    Member,
    Missed,
    Nats,
    NatsServer,
    Offset,
    Peer,
    Stream,
    Vault,
)
from ifabric.care.finding import size, span
from ifabric.care.findings import judge
from ifabric.care.maintaining import order, seconds, successor, why_not
from ifabric.care.nats_servers import _seconds
from ifabric.care.replacing import guidance
from ifabric.care.scraped import p99
from ifabric.errors import ConfigError, Unavailable

MIB, GIB = 1 << 20, 1 << 30
RIGHT = Offset(least_s=-0.6, most_s=0.6)


def member(number: int, **changes: Any) -> Member:
    made = Member(
        url=f"https://e{number}:2379",
        id=number,
        name=f"e{number}",
        peer_urls=(f"https://e{number}:2380",),
        version="3.5.30",
        leader=1,
        term=3,
        index=90_000,
        applied=90_000,
        revision=50_000,
        size_bytes=100 * MIB,
        used_bytes=90 * MIB,
        quota_bytes=8 * GIB,
        fsync_p99_s=0.008,
        took_s=0.01,
        clock=RIGHT,
    )
    return replace(made, **changes)


def members(*numbered: Member) -> tuple[Member, ...]:
    """Three, with these in their places."""
    given = {one.id: one for one in numbered}
    return tuple(given.get(number, member(number)) for number in (1, 2, 3))


def server(number: int, **changes: Any) -> NatsServer:
    made = NatsServer(
        url=f"tls://n{number}:4222", name=f"n{number}", version="2.15.1", cluster="c", jetstream=True, clock=RIGHT,
        ping_interval_s=1.0, write_deadline_s=2.0, slow_consumers=0, routed_to=2, meta_leader="n1", meta_size=3,
    )  # fmt: skip
    return replace(made, **changes)


EVENTS = Stream(
    name="IF_EVENTS",
    replicas=3,
    leader="n1",
    peers=(Peer(name="n2", current=True, offline=False), Peer(name="n3", current=True, offline=False)),
)
ETCD = Etcd(members=members(), configured=3)
NATS = Nats(servers=(server(1), server(2), server(3)), stored_bytes=10 * MIB, streams=(EVENTS,))
DAEMON = Daemon(url="http://127.0.0.1:8080", status="healthy", version="0.1.0", loop_lag_s=0.001)
WELL = Facts(
    version="0.1.0",
    etcd=ETCD,
    nats=NATS,
    daemon=DAEMON,
    certificates=(
        Certificate(
            where="coordinator.etcd.cert_file /pki/ifabric.crt", name="ifabric", days_left=200, days_to_begin=-1
        ),
    ),
    vaults=(Vault(where="vault.addr", address="https://v:8200", status=200, token_ttl_s=86_400.0),),
    backups=Backups(folder="/b", wanted=True, interval_s=300, newest="ifabric-x.age", newest_age_s=200),
    words=" --config f.yaml",
)


def etcd(*numbered: Member, **changes: Any) -> Facts:
    return replace(WELL, etcd=replace(ETCD, members=members(*numbered), **changes))


def nats(**changes: Any) -> Facts:
    return replace(WELL, nats=replace(NATS, **changes))


def stream(*peers: Peer, **changes: Any) -> Facts:
    return nats(streams=(replace(EVENTS, peers=peers or EVENTS.peers, **changes),))


def certificate(**changes: Any) -> Facts:
    return replace(WELL, certificates=(replace(WELL.certificates[0], **changes),))


def vault(**changes: Any) -> Facts:
    return replace(WELL, vaults=(replace(WELL.vaults[0], **changes),))


def backups(**changes: Any) -> Facts:
    assert WELL.backups is not None
    return replace(WELL, backups=replace(WELL.backups, **changes))


def daemon(**changes: Any) -> Facts:
    return replace(WELL, daemon=replace(DAEMON, **changes))


DOWN = "connection refused"
#: facts, and of the finding: severity, part, words of what is so, words of the figure, words of what to do
BAD: list[tuple[str, Facts, str, str, str, str, str]] = [
    # who answers
    ("a member is down", etcd(member(2, error=DOWN)), "warning", "etcd", "e2 does not answer", "https://e2:2379", "ifabric member list --config f.yaml"),
    ("none to spare", etcd(member(2, error=DOWN)), "warning", "etcd", "one more member lost", "2 of 3", ""),
    ("no quorum", etcd(member(2, error=DOWN), member(3, error=DOWN)), "critical", "etcd", "no quorum", "", "get a member back"),
    ("no quorum names who", etcd(member(2, error=DOWN), member(3, error=DOWN)), "critical", "etcd", "e3 does not answer", "", ""),
    ("no read", etcd(read_error="deadline exceeded"), "critical", "etcd", "no quorum", "", ""),
    ("no leader", etcd(*(member(n, leader=0) for n in (1, 2, 3))), "critical", "etcd", "no leader", "", ""),
    ("nobody", etcd(*(member(n, error=DOWN) for n in (1, 2, 3))), "critical", "etcd", "no member answers: e1: connection refused", "", "ifabric restore"),
    ("two leaders", etcd(member(3, leader=2)), "warning", "etcd", "not all follow it", "", "election"),
    ("unknown list", etcd(list_error="permission denied"), "warning", "etcd", "members are not known (permission denied)", "", ""),
    ("even", replace(WELL, etcd=replace(ETCD, members=(member(1), member(2)))), "warning", "etcd", "even number", "2", "add one"),
    ("endpoints", etcd(configured=1), "warning", "etcd", "does not name all", "1 of 3", "https://e3:2379"),
    ("a learner", etcd(member(3, learner=True)), "warning", "etcd", "e3 is a learner", "", "etcdctl member promote 3"),
    # the space of etcd
    ("full", etcd(member(2, alarms=("NOSPACE",))), "critical", "etcd", "full (NOSPACE on e2)", "", "ifabric maintenance defrag --yes --disarm --config f.yaml"),
    ("corrupt", etcd(member(2, alarms=("CORRUPT",))), "critical", "etcd", "e2 has other data", "", "ifabric member list"),
    ("filling", etcd(member(2, size_bytes=6 * GIB, used_bytes=5 * GIB)), "warning", "etcd", "e2 is 75 % full", "6.0 GiB of 8.0 GiB", "maintenance compact"),
    ("nearly full", etcd(member(2, size_bytes=7 * GIB, used_bytes=5 * GIB)), "critical", "etcd", "e2 is 88 % full", "", "maintenance defrag"),
    ("full of use", etcd(member(2, size_bytes=7 * GIB, used_bytes=7 * GIB)), "critical", "etcd", "e2 is 88 % full", "", "raise --quota-backend-bytes"),
    ("free pages", etcd(member(2, size_bytes=300 * MIB, used_bytes=100 * MIB)), "warning", "etcd", "67 % of the file of e2", "200 MiB of 300 MiB", "maintenance defrag --yes"),
    ("all filling", etcd(*(member(n, size_bytes=(5 + n) * GIB, used_bytes=5 * GIB) for n in (1, 2, 3))), "critical", "etcd", "e1, e2, e3 are up to 100 % full", "8.0 GiB of 8.0 GiB", ""),
    ("all loose", etcd(*(member(n, size_bytes=300 * MIB, used_bytes=100 * MIB) for n in (1, 2, 3))), "warning", "etcd", "files of e1, e2, e3 are up to 67 % free", "", ""),
    ("free pages, small quota", etcd(member(2, size_bytes=30 * MIB, used_bytes=10 * MIB, quota_bytes=64 * MIB)), "warning", "etcd", "67 % of the file", "", ""),
    # pace and versions of etcd
    ("a lagging member", etcd(member(2, index=80_000, applied=80_000)), "warning", "etcd", "e2 is behind", "10000 entries", "disk"),
    ("a slow apply", etcd(member(2, applied=80_000)), "warning", "etcd", "e2 does not keep up", "10000", ""),
    ("a slow answer", etcd(member(2, took_s=0.8)), "warning", "etcd", "e2 takes long", "0.8 s", ""),
    ("a slow disk", etcd(member(2, fsync_p99_s=1.024)), "warning", "etcd", "disk of e2 is slow", "10 ms", "SSD"),
    ("an old etcd", etcd(*(member(n, version="3.5.1") for n in (1, 2, 3))), "critical", "etcd", "3.5.1 can lose", "", "3.5.30"),
    ("an old etcd 3.6", etcd(*(member(n, version="3.6.4") for n in (1, 2, 3))), "critical", "etcd", "3.6.4 can lose", "", ""),
    ("an old embedded etcd", replace(etcd(member(1, version="3.5.1")), embedded=True), "warning", "etcd", "3.5.1 can lose", "", "just etcd"),
    ("an old etcd, allowed", replace(etcd(member(1, version="3.5.1")), allow_old_etcd=True), "warning", "etcd", "3.5.1 can lose", "", ""),
    ("mixed versions", etcd(member(1, version="3.6.11")), "warning", "etcd", "different versions", "3.5.30, 3.6.11", ""),
    # NATS
    ("a server is down", nats(servers=(server(1), server(2, error=DOWN), server(3))), "warning", "NATS", "tls://n2:4222 does not answer", "", "start it"),
    ("no server", nats(servers=(server(1, error=DOWN),)), "critical", "NATS", "no server answers", "", ""),
    ("an old server", nats(servers=(server(1, version="2.9.10"),)), "critical", "NATS", "2.9.10 is too old", "", "2.10"),
    ("mixed servers", nats(servers=(server(1, version="2.14.0"), server(2), server(3))), "warning", "NATS", "different versions", "2.14.0, 2.15.1", ""),
    ("two clusters", nats(servers=(server(1, cluster="a"), server(2), server(3))), "critical", "NATS", "not one cluster", "a, c", ""),
    ("two servers", nats(servers=(server(1), server(2))), "warning", "NATS", "two servers", "", "three, or one"),
    ("default pings", nats(servers=(server(1, ping_interval_s=120.0),)), "warning", "NATS", "only every 2 min", "", 'ping_interval: "1s"'),
    ("default deadline", nats(servers=(server(1, write_deadline_s=10.0),)), "warning", "NATS", "waits 10 s for a client", "", "write_deadline"),
    ("slow consumers", nats(servers=(server(1, slow_consumers=4),)), "warning", "NATS", "slow consumers", "4", ""),
    ("a missing route", nats(servers=(server(1, routed_to=1), server(2), server(3))), "warning", "NATS", "n1 is connected to fewer", "1 of 2", ""),
    ("no meta leader", nats(servers=(server(1, meta_leader=""), server(2), server(3))), "critical", "NATS", "n1 knows no leader", "", ""),
    ("no JetStream", nats(servers=(server(1, jetstream=False),)), "critical", "NATS", "no JetStream on n1", "", "store_dir"),
    ("a silent JetStream", nats(jetstream_error="no answer within 3 s"), "critical", "NATS", "JetStream does not answer: no answer", "", ""),
    ("hidden streams", nats(hidden="permissions violation"), "warning", "NATS", "cannot be looked at", "", "--config"),
    ("storage", nats(stored_bytes=8 * GIB, storage_max_bytes=10 * GIB), "warning", "NATS", "80 % full", "8.0 GiB of 10 GiB", "events.max_bytes"),
    ("storage, nearly full", nats(stored_bytes=9 * GIB, storage_max_bytes=10 * GIB), "critical", "NATS", "90 % full", "", ""),
    ("a stream without a leader", stream(leader=""), "critical", "NATS", "IF_EVENTS has no leader", "", ""),
    ("an offline copy", stream(Peer(name="n2", current=False, offline=True)), "warning", "NATS", "on n2 is offline", "", "start n2"),
    ("a copy behind", stream(Peer(name="n2", current=False, offline=False, lag=7)), "warning", "NATS", "on n2 is behind", "7 messages", ""),
    ("a silent copy", stream(Peer(name="n2", current=False, offline=False, silent_s=14)), "warning", "NATS", "on n2 is behind", "silent for 14 s", ""),
    ("a copy far behind", stream(Peer(name="n2", current=True, offline=False, lag=5000)), "warning", "NATS", "on n2 is behind", "5000 messages", ""),
    ("one copy", stream(replicas=1), "warning", "NATS", "IF_EVENTS has one copy", "", "events.replicas: 3"),
    # the daemon
    ("a dead daemon", daemon(error=DOWN), "critical", "daemon", "does not answer at http://127.0.0.1:8080", "", "its log"),
    ("a degraded daemon", daemon(status="degraded", not_ready=("etcd is full",)), "critical", "daemon", "is degraded: etcd is full", "", ""),
    ("another version", daemon(version="0.0.9"), "warning", "daemon", "another version", "0.0.9, 0.1.0", "one by one"),
    ("a late loop", daemon(loop_lag_s=0.25), "warning", "daemon", "loop is late", "250 ms", "another daemon"),
    ("its warnings", daemon(warnings=("mind the gap",)), "warning", "daemon", "mind the gap", "", ""),
    # clocks
    ("a clock behind", etcd(member(2, clock=Offset(least_s=-9.0, most_s=-8.0))), "warning", "clocks", "e2 is behind", "8.0 s at the least", "chronyc"),
    ("a clock far ahead", etcd(member(2, clock=Offset(least_s=400, most_s=401))), "critical", "clocks", "e2 is ahead of", "7 min", ""),
    ("NATS's clock", nats(servers=(server(1, clock=Offset(least_s=2, most_s=2.1)),)), "warning", "clocks", "n1 is ahead", "2.0 s", ""),
    ("a stream leader's clock", nats(servers=(server(1, clock=None),), streams=(replace(EVENTS, clock=Offset(least_s=3, most_s=3.1)),)), "warning", "clocks", "n1 is ahead", "", ""),
    # certificates
    ("expired", certificate(days_left=-2), "critical", "certificates", "ifabric.crt (ifabric) has expired", "2 days ago", "renew"),
    ("five days", certificate(days_left=5), "critical", "certificates", "expires", "in 5 days", "renew"),
    ("five hours", certificate(days_left=5 / 24), "critical", "certificates", "expires", "in 5 hours", ""),
    ("a month", certificate(days_left=29), "warning", "certificates", "expires", "in 29 days", ""),
    ("to come", certificate(days_to_begin=3), "critical", "certificates", "is not valid yet", "3 days", "clocks"),
    ("no file", certificate(error="cannot be read: No such file or directory"), "critical", "certificates", "No such file", "", ""),
    ("an open key", certificate(key_is_open=True), "warning", "certificates", "can be read by others", "", "chmod"),
    # Vault
    ("sealed", vault(status=503), "critical", "Vault", "is sealed", "", "vault operator unseal"),
    ("uninitialised", vault(status=501), "critical", "Vault", "is not initialised", "", "vault operator init"),
    ("a secondary", vault(status=472), "warning", "Vault", "secondary", "", ""),
    ("a broken Vault", vault(status=500), "critical", "Vault", "answers 500", "", ""),
    ("a silent Vault", vault(status=None, error=DOWN), "critical", "Vault", "does not answer: connection refused", "", ""),
    ("a revoked token", vault(token_error="Vault answers 403"), "critical", "Vault", "the token is of no use", "", "fresh"),
    ("a token that ends", vault(token_ttl_s=600.0), "warning", "Vault", "the token ends", "in 10 min", ""),
    # backups, the configuration, what could not be seen
    ("no backups wanted", backups(wanted=False), "warning", "backups", "none are made", "", "age public key"),
    ("no backup", backups(newest_age_s=None), "critical", "backups", "there is none in /b", "", "ifabric backup run --config f.yaml"),
    ("old backups", backups(newest_age_s=901), "warning", "backups", "the newest is old", "15 min", "does not run"),
    ("a broken backup", backups(broken=("ifabric-y.age",)), "warning", "backups", "ifabric-y.age is not whole", "", "backup verify"),
    ("a closed folder", backups(error="cannot be read: Permission denied"), "critical", "backups", "Permission denied", "", ""),
    ("a smell", replace(WELL, smells=("x does nothing",)), "warning", "configuration", "x does nothing", "", "check-config"),
    ("a missed source", replace(WELL, missed=(Missed(part="etcd", why="it broke"),)), "warning", "etcd", "could not be looked at: it broke", "", ""),
]  # fmt: skip


def test_what_is_well_has_no_finding_but_that_it_is_well() -> None:
    report = judge(WELL)
    assert (report.worst(), report.reached) == ("ok", True)
    assert {one.part for one in report.findings} == {
        "etcd",
        "NATS",
        "daemon",
        "clocks",
        "certificates",
        "Vault",
        "backups",
    }
    assert {one.severity for one in report.findings} == {"ok"}


@pytest.mark.parametrize(
    ("facts", "severity", "part", "what", "figure", "do"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_a_fault_is_found_and_named_with_what_to_do(
    facts: Facts, severity: str, part: str, what: str, figure: str, do: str
) -> None:
    found = [one for one in judge(facts).findings if one.severity != "ok"]
    fitting = [
        one
        for one in found
        if (one.severity, one.part) == (severity, part) and what in one.what and figure in one.figure and do in one.do
    ]
    assert len(fitting) == 1, found


GOOD: list[tuple[str, Facts]] = [
    ("a learner is no voter that is missing", etcd(configured=3)),
    ("just below the quota's share", etcd(member(2, size_bytes=int(5.9 * GIB), used_bytes=5 * GIB))),
    ("free pages that are worth nothing", etcd(member(2, size_bytes=90 * MIB, used_bytes=5 * MIB))),
    ("half free", etcd(member(2, size_bytes=400 * MIB, used_bytes=200 * MIB))),
    ("a member a little behind", etcd(member(2, index=86_000, applied=86_000))),
    ("a clock that may be right", etcd(member(2, clock=Offset(least_s=-0.2, most_s=1.4)))),
    ("no monitoring", nats(servers=tuple(server(n, ping_interval_s=None, routed_to=None, meta_size=None, meta_leader=None) for n in (1, 2, 3)))),
    ("a follower with a moment's lag", stream(Peer(name="n2", current=True, offline=False, lag=900))),
    ("a single server with one copy", nats(servers=(server(1, cluster="", routed_to=0, meta_leader=None, meta_size=None),), streams=(replace(EVENTS, replicas=1, peers=(), leader=""),))),
    ("thirty days", certificate(days_left=30)),
    ("a standby", vault(status=429)),
    ("a token for ever", vault(token_ttl_s=0.0)),
    ("three intervals", backups(newest_age_s=900)),
    ("an embedded daemon without backups", replace(backups(wanted=False), embedded=True)),
    ("a single etcd", replace(WELL, etcd=Etcd(members=(member(1),), configured=1))),
]  # fmt: skip


@pytest.mark.parametrize("facts", [row[1] for row in GOOD], ids=[row[0] for row in GOOD])
def test_what_is_on_the_right_side_of_a_threshold_is_no_finding(facts: Facts) -> None:
    assert [one for one in judge(facts).findings if one.severity != "ok"] == []


def test_nothing_reached_is_told_apart_from_something_bad() -> None:
    dead = etcd(*(member(n, error=DOWN) for n in (1, 2, 3)))
    assert judge(dead).reached  # NATS is there
    assert not judge(replace(dead, nats=None, daemon=None)).reached
    assert not judge(
        replace(dead, nats=nats(servers=(server(1, error=DOWN),)).nats, daemon=replace(DAEMON, error=DOWN))
    ).reached


def test_the_worst_of_a_part_comes_first_and_the_parts_in_their_order() -> None:
    facts = etcd(member(2, alarms=("NOSPACE",)), member(3, took_s=2.0))
    found = judge(replace(facts, smells=("s",))).findings
    assert [one.severity for one in found if one.part == "etcd"] == ["critical", "warning", "ok"]
    assert [one.part for one in found][-1] == "configuration"


# -- maintenance ---------------------------------------------------------------------------------------------------------


def test_the_leader_is_the_last_to_be_defragmented() -> None:
    assert [one.name for one in order(ETCD)] == ["e2", "e3", "e1"]
    assert [one.name for one in order(ETCD, ["e1", "3"])] == ["e3", "e1"]
    with pytest.raises(ConfigError, match="there is no e9; there are e1, e2, e3"):
        order(ETCD, ["e9"])


FIVE = Etcd(members=tuple(member(n) for n in range(1, 6)), configured=5)


def without(etcd_: Etcd, *numbers: int, **changes: Any) -> Etcd:
    changes = changes or {"error": DOWN}
    return replace(etcd_, members=tuple(replace(m, **changes) if m.id in numbers else m for m in etcd_.members))


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (ETCD, None),
        (without(ETCD, 2), "2 of 3 members are well, 3 have to be"),
        (without(FIVE, 2), None),
        (without(FIVE, 2, 3), "3 of 5 members are well, 4 have to be"),
        (without(ETCD, 2, leader=3), "2 of 3"),
        (without(ETCD, 2, applied=80_000), "2 of 3"),
        (without(ETCD, 2, alarms=("CORRUPT",)), "2 of 3"),
        (without(ETCD, 2, alarms=("NOSPACE",)), None),
        (replace(ETCD, read_error="deadline"), "no quorum"),
        (Etcd(members=(member(1),)), None),
    ],
)
def test_nothing_is_defragmented_unless_one_more_could_be_lost(found: Etcd, refused: str | None) -> None:
    why = why_not(found)
    assert why is None if refused is None else refused in str(why)


def test_a_member_that_is_ill_itself_is_not_defragmented() -> None:
    assert "e2 is not well" in str(why_not(without(FIVE, 2), replace(FIVE.members[1], error=DOWN)))


def test_the_follower_that_is_least_behind_leads_meanwhile() -> None:
    found = without(without(ETCD, 2, applied=89_990), 3, applied=89_999)
    assert successor(found, found.members[0]).name == "e3"
    with pytest.raises(Unavailable, match="no other member could lead"):
        successor(without(ETCD, 2, 3), ETCD.members[0])


@pytest.mark.parametrize(("text", "length"), [("0s", 0), ("90s", 90), ("10m", 600), ("2h", 7200), ("1.5d", 129_600)])
def test_lengths_of_time_are_read(text: str, length: float) -> None:
    assert seconds(text) == length


@pytest.mark.parametrize("text", ["", "10", "m", "-1s", "10 parsecs", "1h30m"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write 0s, 90s, 10m, 2h or 1d"):
        seconds(text)


# -- guidance ------------------------------------------------------------------------------------------------------------


def test_the_guidance_removes_first_and_adds_a_learner_with_the_right_ids_and_endpoints() -> None:
    lines = guidance(without(ETCD, 2), " --cacert ca.crt", " --config f.yaml")
    commands = [line.strip() for line in lines if line.startswith("  ") and not line.strip().startswith("#")]
    ctl = "etcdctl --endpoints https://e1:2379,https://e3:2379 --cacert ca.crt"
    assert commands == [
        f"{ctl} member remove 2",
        "mv DATA-DIR DATA-DIR.lost.e2",
        f"{ctl} member add e2 --learner --peer-urls=https://e2:2380",
        "etcd --initial-cluster-state existing --initial-cluster e1=https://e1:2380,e3=https://e3:2380,e2=https://e2:2380 ...",
        f"{ctl} member promote ID",
        "ifabric member list --config f.yaml",
    ]


@pytest.mark.parametrize("found", [ETCD, replace(without(ETCD, 2), list_error="denied")])
def test_there_is_no_guidance_without_a_reason_or_without_knowing_the_members(found: Etcd) -> None:
    assert guidance(found, "") == []


def test_without_a_quorum_no_member_is_to_be_removed() -> None:
    lines = guidance(without(ETCD, 2, 3), "")
    assert not any("member remove" in line for line in lines)
    assert any("There is no quorum: 1 of 3" in line for line in lines)


# -- figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "value", "said"),
    [
        (size, 900, "900 B"), (size, 1536, "1.5 KiB"), (size, 20 * MIB, "20 MiB"), (size, 3000 * GIB, "3000 GiB"),
        (span, 0.25, "0.2 s"), (span, 90, "90 s"), (span, 600, "10 min"), (span, 7200, "2 h"), (span, 200_000, "2 d"),
    ],
)  # fmt: skip
def test_figures_are_said_in_the_unit_that_fits(make: Callable[[float], str], value: float, said: str) -> None:
    assert make(value) == said


@pytest.mark.parametrize(
    ("told", "length"),
    [(120_000_000_000, 120.0), ("2m0s", 120.0), ("1.5s", 1.5), ("300ms", 0.3), (None, None), ("?", None)],
)
def test_go_s_lengths_of_time_are_read(told: object, length: float | None) -> None:
    assert _seconds(told) == (pytest.approx(length) if length is not None else None)


def test_a_percentile_is_the_bound_of_its_bucket() -> None:
    lines = [f'x_bucket{{le="{bound}"}} {count}' for bound, count in (("0.001", 90), ("0.016", 99), ("+Inf", 100))]
    assert p99("\n".join(lines), "x") == 0.016
    assert p99("", "x") is None
    assert p99('x_bucket{le="+Inf"} 0', "x") is None


@pytest.mark.parametrize(("offset", "surely"), [((-1, 1), 0.0), ((0.5, 1.5), 0.5), ((-3, -2), -2), ((0.0, 1.0), 0.0)])
def test_a_clock_is_off_by_what_the_interval_leaves_no_doubt_of(offset: tuple[float, float], surely: float) -> None:
    assert Offset(least_s=offset[0], most_s=offset[1]).surely_s == surely
