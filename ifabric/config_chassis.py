"""The section `chassis`: what a guest may take, which modules run, what they may call, and with whose secret."""

from __future__ import annotations

import ipaddress
from decimal import Decimal
from typing import Annotated, Literal

from msgspec import Meta, field

from ifabric.config_base import Count, Logging, MetricsPort, Name, Positive, Section


class Runtime(Section, frozen=True, kw_only=True):
    """What one guest may take. A caller may tighten these and never loosen them."""

    engine: Literal["wasmtime"] = "wasmtime"
    max_memory_mb: Annotated[int, Meta(ge=1, le=4096)] = 512
    max_cpu_percent: Annotated[float, Meta(gt=0, le=100)] = 50.0
    max_execution_time_seconds: Positive = 300.0
    #: about one unit an instruction
    max_fuel: Annotated[int, Meta(ge=1, le=2**53 - 1)] = 10**12
    max_stack_kb: Annotated[int, Meta(ge=16, le=4096)] = 512
    max_tables: Annotated[int, Meta(ge=1, le=100)] = 4
    max_table_elements: Annotated[int, Meta(ge=1, le=10_000_000)] = 20_000
    max_output_bytes: Annotated[int, Meta(ge=1, le=512 * 1024)] = 256 * 1024
    max_runs_per_session: Count = 16


class ModuleStore(Section, frozen=True, kw_only=True):
    """Which modules are accepted, and where they and their compiled form are kept."""

    #: of one module, and of what a session uploads at once; the parts of all sessions have room for eight of these
    max_bytes: Annotated[int, Meta(ge=1024, le=256 << 20)] = 32 << 20
    max_functions: Count = 100_000
    compile_timeout_seconds: Positive = 30.0
    compile_memory_mb: Annotated[int, Meta(ge=64, le=65_536)] = 2048
    #: of all modules together, in the object store
    store_max_bytes: Count = 1 << 30
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    #: None: below the state directory
    cache_dir: str | None = None
    cache_max_mb: Count = 1024
    #: compiled modules that the daemon and each worker have at hand
    loaded_max: Annotated[int, Meta(ge=1, le=1000)] = 32


class SandboxPool(Section, frozen=True, kw_only=True):
    """The worker processes that guests run in, one at a time in each. What is pooled is never an instance."""

    #: False: each run has a process of its own
    enabled: bool = True
    min_size: Annotated[int, Meta(ge=0, le=1000)] = 1
    max_size: Annotated[int, Meta(ge=1, le=1000)] = 8
    #: after so many runs a worker is replaced
    max_runs: Count = 10_000
    #: after so long without a run, workers above min_size end
    idle_seconds: Positive = 60.0
    queue_max: Count = 1000
    queue_wait_seconds: Positive = 10.0

    def __post_init__(self) -> None:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size is {self.min_size}, above max_size, which is {self.max_size}")


class Credential(Section, frozen=True, kw_only=True):
    """A secret of Vault's and the header that carries it. The guest sees neither."""

    #: of KV v2 "secret/data/openai"; of a dynamic secret "database/creds/reader"
    vault_path: Name
    field: Name = "value"
    header: Annotated[str, Meta(pattern=r"^[A-Za-z0-9-]{1,64}$")] = "Authorization"
    #: the header's value; {} stands for the secret
    format: Annotated[str, Meta(pattern=r"^[^{}\r\n]*\{\}[^{}\r\n]*$")] = "Bearer {}"


class Endpoint(Section, frozen=True, kw_only=True):
    """One place that guests may call, by its name."""

    #: "https://api.openai.com/v1": what a guest asks for is below it
    url: Annotated[str, Meta(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")]
    methods: tuple[Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], ...] = ("GET",)
    #: below `url`; a prefix ends at a slash
    paths: tuple[Annotated[str, Meta(pattern="^/")], ...] = ("/",)
    request_max_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 256 * 1024
    response_max_bytes: Annotated[int, Meta(ge=1, le=16 << 20)] = 1 << 20
    timeout_seconds: Positive = 30.0
    #: of one daemon, all runs together
    calls_per_second: Annotated[float, Meta(gt=0, le=100_000)] = 50.0
    calls_per_run: Count = 100
    redirects_max: Annotated[int, Meta(ge=0, le=10)] = 0
    #: loopback, private and link-local addresses are refused unless they are in one of these networks ("10.1.0.0/16")
    networks: tuple[Name, ...] = ()
    #: the breaker in front of it; None: none
    breaker: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,63}$")] | None = None
    credential: Credential | None = None
    ca_cert: str | None = None

    def __post_init__(self) -> None:
        for network in self.networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"networks: {error}; write one as 10.1.0.0/16") from None
            if "/" not in network:
                raise ValueError(f"networks: {network} is to say how much of it, as in 10.1.0.0/16")


class Credentials(Section, frozen=True, kw_only=True):
    """How to reach Vault: with a token that somebody keeps fresh in a file, or with an AppRole."""

    vault_addr: Annotated[str, Meta(pattern=r"^https?://[^/@\s]+(/[^@\s]*)?$")] | None = None
    vault_token_path: str | None = None
    vault_role_id_path: str | None = None
    vault_secret_id_path: str | None = None
    vault_namespace: str | None = None
    ca_cert: str | None = None
    timeout_seconds: Positive = 5.0
    #: how long a secret without a lease is believed
    cache_seconds: Positive = 60.0

    def __post_init__(self) -> None:
        token, role = self.vault_token_path, self.vault_role_id_path
        if self.vault_addr is not None and (token is None) == (role is None):
            raise ValueError("vault_addr is there: one of vault_token_path and vault_role_id_path has to be, too")
        if (role is None) != (self.vault_secret_id_path is None):
            raise ValueError("vault_role_id_path and vault_secret_id_path go together")


class SloTargets(Section, frozen=True, kw_only=True):
    """What the chassis promises: its own part of a run's time, and that a run does not fail by its fault."""

    target_latency_p95_ms: Annotated[float, Meta(gt=0, le=60_000)] = 10.0
    target_availability_percent: Annotated[float, Meta(gt=0, lt=100)] = 99.9
    window_seconds: Positive = 3600.0


class Price(Section, frozen=True, kw_only=True):
    """What a run costs its hold, in US dollars."""

    per_billion_fuel_usd: Decimal = Decimal(0)
    per_gb_second_usd: Decimal = Decimal(0)
    per_egress_mb_usd: Decimal = Decimal(0)
    #: True: a run without a hold is refused
    hold_required: bool = False

    def __post_init__(self) -> None:
        for name in ("per_billion_fuel_usd", "per_gb_second_usd", "per_egress_mb_usd"):
            usd = getattr(self, name)
            if not (usd.is_finite() and 0 <= usd <= 1_000_000):
                raise ValueError(f"{name} is an amount from 0 to 1000000 USD, not {usd}")


class Chassis(Section, frozen=True, kw_only=True):
    """Sandboxes for untrusted WebAssembly."""

    runtime: Runtime = Runtime()
    modules: ModuleStore = ModuleStore()
    sandbox_pool: SandboxPool = SandboxPool()
    endpoints: dict[Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], Endpoint] = field(
        default_factory=dict
    )
    credentials: Credentials = Credentials()
    slo: SloTargets = SloTargets()
    price: Price = Price()
    metrics: MetricsPort = MetricsPort()
    logging: Logging | None = None

    def __post_init__(self) -> None:
        secret = [name for name, endpoint in self.endpoints.items() if endpoint.credential is not None]
        if secret and self.credentials.vault_addr is None:
            raise ValueError(
                f"endpoints.{secret[0]} has a credential; credentials.vault_addr has to say where Vault is"
            )
