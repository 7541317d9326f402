"""What was seen of the servers, the daemon and the files: facts without an opinion. `findings` has the opinion."""

from __future__ import annotations

from msgspec import Struct


class Seen(Struct, frozen=True, kw_only=True):
    """What all of them are made of."""


class Offset(Seen, frozen=True, kw_only=True):
    """A clock held against ours: it is between `least_s` and `most_s` ahead (below zero: behind).

    It is an interval because an answer takes time, and because HTTP tells whole seconds.
    """

    least_s: float
    most_s: float

    @property
    def surely_s(self) -> float:
        """By how much it is off at the least; 0.0 while it may be right. With the sign."""
        if self.least_s > 0:
            return self.least_s
        return min(self.most_s, 0.0)


class Member(Seen, frozen=True, kw_only=True):
    """One etcd. Without an `error` it has answered; `alarms` are what is raised on it."""

    url: str
    id: int = 0
    name: str = ""
    peer_urls: tuple[str, ...] = ()
    error: str = ""
    version: str = ""
    leader: int = 0
    learner: bool = False
    term: int = 0
    index: int = 0
    applied: int = 0
    revision: int = 0
    size_bytes: int = 0
    used_bytes: int = 0
    #: None: it does not say
    quota_bytes: int | None = None
    fsync_p99_s: float | None = None
    commit_p99_s: float | None = None
    alarms: tuple[str, ...] = ()
    took_s: float = 0.0
    clock: Offset | None = None

    @property
    def called(self) -> str:
        """Its name, or where it listens while nobody has said its name."""
        return self.name or self.url


class Etcd(Seen, frozen=True, kw_only=True):
    """The members, as they list each other (`listed`) or else those of the configuration."""

    members: tuple[Member, ...]
    #: why the list of members is not known; empty: it is
    list_error: str = ""
    #: why a read that needs a quorum was not answered; empty: it was
    read_error: str = ""
    #: how many of the members the configuration names
    configured: int = 0

    @property
    def answering(self) -> tuple[Member, ...]:
        """The members that answer."""
        return tuple(member for member in self.members if not member.error)

    @property
    def leader(self) -> Member | None:
        """The one that most of those who answer follow; None when it is not among them, or there is none."""
        led = [member.leader for member in self.answering if member.leader]
        most = max(set(led), key=led.count, default=0)
        return next((member for member in self.members if member.id == most), None) if most else None


class NatsServer(Seen, frozen=True, kw_only=True):
    """One nats-server, by what it says to everybody, and by its monitoring where that was given."""

    url: str
    name: str = ""
    error: str = ""
    version: str = ""
    cluster: str = ""
    jetstream: bool = False
    clock: Offset | None = None
    #: from its monitoring; None: not asked
    ping_interval_s: float | None = None
    write_deadline_s: float | None = None
    slow_consumers: int | None = None
    routed_to: int | None = None
    meta_leader: str | None = None
    meta_size: int | None = None


class Peer(Seen, frozen=True, kw_only=True):
    """A follower of a stream's leader, as the leader sees it."""

    name: str
    current: bool
    offline: bool
    lag: int = 0
    #: since its leader heard from it
    silent_s: float = 0.0


class Stream(Seen, frozen=True, kw_only=True):
    """One stream of JetStream."""

    name: str
    replicas: int
    leader: str
    peers: tuple[Peer, ...] = ()
    messages: int = 0
    size_bytes: int = 0
    clock: Offset | None = None


class Nats(Seen, frozen=True, kw_only=True):
    """The servers, and JetStream as our credential is shown it."""

    servers: tuple[NatsServer, ...]
    #: why JetStream's API could not be asked; empty: it was
    jetstream_error: str = ""
    #: why our credential is not shown the streams; empty: it is
    hidden: str = ""
    stored_bytes: int = 0
    #: None: no limit is set for our account
    storage_max_bytes: int | None = None
    streams: tuple[Stream, ...] = ()

    @property
    def answering(self) -> tuple[NatsServer, ...]:
        """The servers that answer."""
        return tuple(server for server in self.servers if not server.error)


class Certificate(Seen, frozen=True, kw_only=True):
    """A certificate in a file, or one that a server presents."""

    where: str
    name: str = ""
    error: str = ""
    days_left: float = 0.0
    #: days until it is valid; below zero: it is
    days_to_begin: float = 0.0
    #: of its private key's file: others than its owner may read it
    key_is_open: bool = False


class Vault(Seen, frozen=True, kw_only=True):
    """One Vault. `status` is what `sys/health` answered; None: nothing."""

    where: str
    address: str
    error: str = ""
    status: int | None = None
    token_error: str = ""
    #: 0: it never ends; None: there is no token to look at (an AppRole, or none)
    token_ttl_s: float | None = None


class Breaker(Seen, frozen=True, kw_only=True):
    """One that is not closed."""

    name: str
    state: str
    opened_ago_s: float | None = None
    #: None: nobody knows, or an operator holds it open
    probe_in_s: float | None = None
    by: str = ""
    why: str = ""


class Unmatched(Seen, frozen=True, kw_only=True):
    """Pending tasks that nobody can take, as the journal told of them last."""

    needs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    example: str = ""


class Counted(Seen, frozen=True, kw_only=True):
    """What a daemon counts, since it started unless it says otherwise. None: it does not count that."""

    #: within the seconds of the look: claims that were granted, and how long 95 of 100 took at the most
    claims: int = 0
    claims_p95_s: float | None = None
    sessions: int | None = None
    unmatched: int | None = None
    breakers_open: int | None = None
    slow_consumers: int | None = None
    event_lag_s: float | None = None
    holds_overdue: int | None = None
    audit_waiting: int | None = None
    audit_lag_s: float | None = None
    audit_dropped: int | None = None
    #: of each actor that was started again
    restarts: tuple[tuple[str, int], ...] = ()


class Daemon(Seen, frozen=True, kw_only=True):
    """The daemon of this machine, by its /health, its /metrics and the breakers on its page."""

    url: str
    error: str = ""
    status: str = ""
    version: str = ""
    loop_lag_s: float = 0.0
    not_ready: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: None: its metrics are switched off, or on a port of their own
    counted: Counted | None = None
    #: those that are not closed; None: they could not be asked
    breakers: tuple[Breaker, ...] | None = None


class Backups(Seen, frozen=True, kw_only=True):
    """The folder of backups. `newest_age_s` None: there is no backup."""

    folder: str
    wanted: bool
    interval_s: float
    newest: str = ""
    newest_age_s: float | None = None
    #: whose size is not the one that was written, or whose facts are missing
    broken: tuple[str, ...] = ()
    error: str = ""


class Missed(Seen, frozen=True, kw_only=True):
    """A part that could not be looked at, and why."""

    part: str
    why: str


class Facts(Seen, frozen=True, kw_only=True):
    """All of it. A part that is None was not asked for, or is among the `missed`."""

    version: str
    etcd: Etcd | None = None
    nats: Nats | None = None
    certificates: tuple[Certificate, ...] = ()
    vaults: tuple[Vault, ...] = ()
    daemon: Daemon | None = None
    unmatched: Unmatched | None = None
    backups: Backups | None = None
    smells: tuple[str, ...] = ()
    missed: tuple[Missed, ...] = ()
    #: the servers are the daemon's own: good to try things out
    embedded: bool = False
    allow_old_etcd: bool = False
    #: options to be repeated in every command that is printed
    words: str = ""
    #: whether NATS's monitoring was asked
    monitored: bool = False
