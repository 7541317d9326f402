"""The configuration: frozen, built once, passed down whole.

The keys under `coordinator` are the runbook's, so its file works as it is. What this version does not know is
refused: a limit that was misspelt and silently ignored is worse than a daemon that does not start. How files,
positions and the environment become these structs is in `ifabric.config_file`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from ifabric.config_base import USD_MAX, Count, Logging, MetricsPort, Name, Port, Positive, Section, Share
from ifabric.config_chassis import Chassis
from ifabric.config_ops import Audit, Backup, Http, Identity, Page, Tracing, Vault


class Etcd(Section, frozen=True, kw_only=True):
    """How to reach etcd. Without endpoints the daemon starts one of its own."""

    endpoints: tuple[Name, ...] = ()
    timeout_seconds: Positive = 5.0
    attempt_timeout_seconds: Positive = 0.5
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    pool_size: Count | None = None
    pool_recycle: Count | None = None
    allow_old_etcd: bool = False


class Coordinator(Section, frozen=True, kw_only=True):
    """The coordinator, and (for historical reasons: the runbook's) what all components share."""

    backend: Literal["etcd"] = "etcd"
    etcd: Etcd = Etcd()
    task_claim_ttl_seconds: Annotated[int, Meta(ge=2, le=3600)] = 60
    receipt_ttl_seconds: Annotated[int, Meta(ge=10, le=86_400)] = 900
    reconcile_interval_seconds: Positive = 5.0
    waiters_max: Count = 10_000
    metrics: MetricsPort = MetricsPort()
    logging: Logging = Logging()


class GovernorCoordinator(Section, frozen=True, kw_only=True):
    """The runbook's way to the coordinator. NATS finds it here: accepted and without effect."""

    url: str | None = None
    timeout_seconds: Positive = 5.0


class Budget(Section, frozen=True, kw_only=True):
    """Money. Amounts are US dollars, exact to the millionth; inside there are only whole micro-USD."""

    enabled: bool = True
    default_session_budget: Decimal = Decimal(40)
    cost_tracking_interval: Positive = 60.0
    hold_ttl_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 900
    ended_hold_ttl_seconds: Annotated[int, Meta(ge=60, le=90 * 86_400)] = 7 * 86_400
    account_ttl_seconds: Annotated[int, Meta(ge=86_400)] = 90 * 86_400

    def __post_init__(self) -> None:
        usd = self.default_session_budget
        if not (usd.is_finite() and 0 <= usd <= USD_MAX and usd * 1_000_000 % 1 == 0):
            raise ValueError(
                f"default_session_budget is an amount from 0 to {USD_MAX} USD, to the millionth, not {usd}"
            )

    @property
    def default_session_micro_usd(self) -> int:
        """The same as whole micro-USD."""
        return int(self.default_session_budget * 1_000_000)


class Matching(Section, frozen=True, kw_only=True):
    """Which session may take which task."""

    enabled: bool = True
    min_match_score: Share = 0.7
    cache_enabled: bool = True
    cache_ttl_seconds: Positive = 300.0
    cache_max_entries: Count = 10_000


class CircuitBreaker(Section, frozen=True, kw_only=True):
    """When a breaker opens, and how it closes again."""

    enabled: bool = True
    failure_threshold: Count = 5
    #: calls within the window before it is judged at all
    minimum_calls: Count = 5
    window_seconds: Positive = 60.0
    reset_timeout: Positive = 60.0
    #: open times double with each trip, up to this
    reset_timeout_max: Positive = 3600.0
    half_open_probes: Annotated[int, Meta(ge=1, le=100)] = 3
    probe_timeout_seconds: Positive = 30.0
    #: a success that took this long counts as a failure
    slow_call_seconds: Positive | None = None
    breakers_max: Count = 10_000


class Governor(Section, frozen=True, kw_only=True):
    """Budgets, breakers and matching."""

    coordinator: GovernorCoordinator = GovernorCoordinator()
    budget: Budget = Budget()
    capabilities: Matching = Matching()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    metrics: MetricsPort = MetricsPort()
    logging: Logging | None = None


class Nats(Section, frozen=True, kw_only=True):
    """How to reach NATS. Without servers the daemon starts one of its own."""

    servers: tuple[Name, ...] = ()
    connect_timeout_seconds: Positive = 5.0
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    nkey_seed_file: str | None = None
    credentials_file: str | None = None


class Events(Section, frozen=True, kw_only=True):
    """The stream that keeps the events."""

    max_age_seconds: Count = 7 * 86_400
    max_bytes: Count = 1 << 30
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1


class Embedded(Section, frozen=True, kw_only=True):
    """The servers that the daemon starts when none are configured. Port 0: any free one."""

    etcd_port: Port = 0
    nats_port: Port = 0


class Config(Section, frozen=True, kw_only=True):
    """Everything."""

    coordinator: Coordinator = Coordinator()
    governor: Governor = Governor()
    chassis: Chassis = Chassis()
    nats: Nats = Nats()
    http: Http = Http()
    page: Page = Page()
    events: Events = Events()
    embedded: Embedded = Embedded()
    identity: Identity = Identity()
    vault: Vault = Vault()
    backup: Backup = Backup()
    audit: Audit = Audit()
    tracing: Tracing = Tracing()
    #: installed names, or "module:Class"
    actors: tuple[Name, ...] = ("coordinator", "governor", "chassis")
    #: sections of residents that the fabric does not know, by component
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    state_dir: str | None = None
    drain_timeout_seconds: Positive = 10.0
    mailbox_max: Count = 8192
    in_flight_max: Count = 2048

    @property
    def hosted(self) -> tuple[str, ...]:
        """The actors that run here: those named, and who answers NATS's auth callout where the seeds for it are."""
        asked = self.identity.enabled and self.identity.issuer_seed_file  # empty: a later file takes it away
        return (*self.actors, "identity") if asked and "identity" not in self.actors else self.actors

    def section(self, component: str) -> Any:
        """The configuration of a component: its own section, or its `options`."""
        if component in ("coordinator", "governor", "chassis", "identity"):
            return getattr(self, component)
        return self.options.get(component, {})


def smells(config: Config) -> list[str]:
    """What is allowed and probably not meant: a sentence each."""
    found = []
    etcd = config.coordinator.etcd
    if etcd.pool_size is not None or etcd.pool_recycle is not None:
        found.append("coordinator.etcd.pool_size and pool_recycle do nothing: one connection to etcd carries all calls")
    if any(e.startswith("https://") for e in etcd.endpoints) and etcd.ca_cert is None:
        found.append(
            "coordinator.etcd: endpoints are https but there is no ca_cert: the system's certificates are trusted"
        )
    if any(not e.startswith("https://") and not _is_local(e) for e in etcd.endpoints):
        found.append(
            "coordinator.etcd: an endpoint on another machine without https: anybody between can read and write the board"
        )
    if any((etcd.ca_cert, etcd.cert_file)) and not any(e.startswith("https://") for e in etcd.endpoints):
        found.append("coordinator.etcd: certificates without an https endpoint do nothing")
    nats = config.nats
    if not (nats.ca_cert or nats.cert_file) and any(
        not s.startswith("tls://") and not _is_local(s) for s in nats.servers
    ):
        found.append("nats.servers: a server on another machine without TLS: anybody between can read and write it")
    if config.http.client_ca is not None and config.http.cert_file is None:
        found.append("http.client_ca does nothing without http.cert_file: client certificates are for https")
    if etcd.attempt_timeout_seconds > etcd.timeout_seconds:
        found.append(
            "coordinator.etcd: attempt_timeout_seconds is longer than timeout_seconds: there will be one attempt"
        )
    if config.coordinator.task_claim_ttl_seconds > 120:
        found.append(
            f"coordinator.task_claim_ttl_seconds: a dead agent's tasks wait up to {config.coordinator.task_claim_ttl_seconds} s, "
            "and twice that when etcd's leader changes"
        )
    governor = config.governor
    if governor.coordinator.url is not None:
        found.append("governor.coordinator does nothing: governor and coordinator meet in etcd")
    if governor.logging is not None and governor.logging != config.coordinator.logging:
        found.append("governor.logging does nothing: one process writes one log, as coordinator.logging says")
    if config.chassis.logging is not None and config.chassis.logging != config.coordinator.logging:
        found.append("chassis.logging does nothing: one process writes one log, as coordinator.logging says")
    for name, endpoint in config.chassis.endpoints.items():
        if endpoint.url.startswith("http://") and not _is_local(endpoint.url):
            found.append(f"chassis.endpoints.{name}: http to another machine: anybody between can read and write it")
        if endpoint.credential is not None and endpoint.url.startswith("http://"):
            found.append(f"chassis.endpoints.{name}: its credential travels without TLS")
    if governor.circuit_breaker.minimum_calls > governor.circuit_breaker.failure_threshold:
        found.append(
            "governor.circuit_breaker: minimum_calls is above failure_threshold: so many failures in a row will not open it"
        )
    if not _is_local(config.http.host) and config.http.cert_file is None:
        found.append(f"http.host: {config.http.host} is reachable from other machines, without TLS")
    if bool(etcd.endpoints) != bool(config.nats.servers):
        found.append("one of coordinator.etcd.endpoints and nats.servers is set: the other server is an embedded one")
    return found


def _is_local(host: str) -> bool:
    name = host.rpartition("://")[2]
    return name.startswith(("127.", "localhost", "[::1]", "::1"))
