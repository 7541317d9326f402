"""What the facts about NATS mean."""

from __future__ import annotations

from collections.abc import Iterator

from ifabric.care.facts import Facts, Nats, NatsServer, Stream
from ifabric.care.finding import Finding, critical, ok, percent, size, span, warning
from ifabric.programs import parse_version

#: the oldest with what the fabric uses of JetStream and of micro services
NATS_MIN = (2, 10, 0)
#: as of etcd's quota: at 100 % a stream that keeps everything refuses what is new
STORAGE_WARNING, STORAGE_CRITICAL = 0.75, 0.85
#: messages that a follower may lack without being called behind: a moment's worth
LAG_MAX = 1000
#: README: a frozen daemon keeps its share of the requests until the server has missed its pings
PING_MAX_S, WRITE_DEADLINE_MAX_S = 5.0, 5.0
PART = "NATS"


def judge(facts: Facts) -> Iterator[Finding]:
    """Of the servers, then of JetStream."""
    nats = facts.nats
    if nats is None:
        return
    if not nats.answering:
        yield critical(
            PART,
            f"no server answers: {'; '.join(f'{one.url}: {one.error}' for one in nats.servers)}",
            do="start them: nobody can reach the daemons",
            playbook="nats-down",
        )
        return
    yield from _servers(nats)
    yield from _jetstream(nats, facts)


def _servers(nats: Nats) -> Iterator[Finding]:
    for server in nats.servers:
        if server.error:
            yield warning(
                PART, f"{server.url} does not answer ({server.error})", do="start it again", playbook="nats-down"
            )
    good = nats.answering
    versions = sorted({server.version for server in good}, key=parse_version)
    yield ok(PART, f"{len(good)} of {len(nats.servers)} servers answer", figure=", ".join(versions))
    old = [version for version in versions if parse_version(version) < NATS_MIN]
    if old:
        yield critical(PART, f"nats-server {', '.join(old)} is too old", do="use 2.10 or newer")
    if len(versions) > 1:
        yield warning(
            PART, "its servers are of different versions", figure=", ".join(versions), do="finish the upgrade"
        )
    names = {server.cluster for server in good}
    if len(good) > 1 and len(names) > 1:
        yield critical(
            PART,
            "the configured servers are not one cluster: daemons on one do not hear agents on the other",
            figure=", ".join(sorted(name or "none" for name in names)),
            do="give them the same cluster name and routes to each other",
        )
    sizes = {server.meta_size for server in good if server.meta_size}
    if len(nats.servers) == 2 or 2 in sizes:
        yield warning(PART, "two servers: JetStream stops when either does", do="three, or one")
    for server in good:
        yield from _monitored(server, len(nats.servers))


def _monitored(server: NatsServer, configured: int) -> Iterator[Finding]:
    name = server.name or server.url
    if server.ping_interval_s is not None and server.ping_interval_s > PING_MAX_S:
        yield warning(
            PART,
            f"{name} asks for a sign of life only every {span(server.ping_interval_s)}: so long a frozen daemon keeps its requests",
            do='ping_interval: "1s", ping_max: 2 in its configuration',
        )
    if server.write_deadline_s is not None and server.write_deadline_s > WRITE_DEADLINE_MAX_S:
        yield warning(
            PART,
            f"{name} waits {span(server.write_deadline_s)} for a client that does not read",
            do='write_deadline: "2s" in its configuration',
        )
    if server.slow_consumers:
        yield warning(
            PART,
            f"{name} has cut off slow consumers since it started",
            figure=str(server.slow_consumers),
            playbook="slow-consumer",
        )
    if server.routed_to is not None and server.routed_to < configured - 1:
        yield warning(
            PART,
            f"{name} is connected to fewer servers than there are",
            figure=f"{server.routed_to} of {configured - 1}",
            do="see its routes, and the firewall between them",
        )
    if server.meta_leader == "" and server.meta_size:
        yield critical(PART, f"{name} knows no leader of JetStream", do="get a majority of the servers back")


def _jetstream(nats: Nats, facts: Facts) -> Iterator[Finding]:
    without = [server.name or server.url for server in nats.answering if not server.jetstream]
    if without:
        yield critical(
            PART,
            f"no JetStream on {', '.join(without)}: events and modules have no place",
            do="jetstream { store_dir: ... }",
        )
        return
    if nats.jetstream_error:
        yield critical(
            PART,
            f"JetStream does not answer: {nats.jetstream_error}",
            do="with a majority of the servers gone it has no leader: start them",
            playbook="nats-down",
        )
        return
    if nats.hidden:
        yield warning(
            PART, f"the streams cannot be looked at: {nats.hidden}", do="give the daemon's configuration (--config)"
        )
        return
    most = nats.storage_max_bytes
    if most and nats.stored_bytes >= STORAGE_WARNING * most:
        yield (critical if nats.stored_bytes >= STORAGE_CRITICAL * most else warning)(
            PART,
            f"JetStream's storage is {percent(nats.stored_bytes / most)} full",
            figure=f"{size(nats.stored_bytes)} of {size(most)}",
            do="lower events.max_bytes or events.max_age_seconds, or raise max_file_store",
            playbook="event-lag",
        )
    sick = [found for stream in nats.streams for found in _stream(stream, nats, facts)]
    yield from sick
    if nats.streams and not sick:
        copies = sorted({stream.replicas for stream in nats.streams})
        yield ok(
            PART,
            f"{len(nats.streams)} streams are whole",
            figure=f"{size(nats.stored_bytes)}, {'/'.join(map(str, copies))} copies",
        )


def _stream(stream: Stream, nats: Nats, facts: Facts) -> Iterator[Finding]:
    clustered = len({server.name for server in nats.servers if server.cluster}) > 1
    if clustered and not stream.leader:
        yield critical(
            PART, f"the stream {stream.name} has no leader: nothing is kept in it", do="get its servers back"
        )
    for peer in stream.peers:
        if peer.offline:
            yield warning(PART, f"the copy of {stream.name} on {peer.name} is offline", do=f"start {peer.name} again")
        elif not peer.current or peer.lag > LAG_MAX:
            yield warning(
                PART,
                f"the copy of {stream.name} on {peer.name} is behind",
                figure=f"{peer.lag} messages" if peer.lag else f"silent for {span(peer.silent_s)}",
                do="it catches up by itself; if it does not, see that server's disk",
            )
    if clustered and stream.replicas == 1 and len(nats.servers) >= 3 and not facts.embedded:
        yield warning(
            PART,
            f"{stream.name} has one copy on a cluster of {len(nats.servers)}: with its server, it is gone",
            do="events.replicas: 3 and chassis.modules.replicas: 3 (the daemons raise them when they start)",
        )
