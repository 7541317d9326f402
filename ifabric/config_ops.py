"""The configuration of what a production has besides its components: the HTTP port and its page, identities, secrets
from Vault, backups, the audit, traces.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from ifabric.config_base import Count, Name, Port, Positive, Section, Share

PublicKey = Annotated[str, Meta(pattern=r"^U[A-Z2-7]{55}$(?!\n)")]
AgentName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]


class Http(Section, frozen=True, kw_only=True):
    """Health and metrics. Port 0: any free one, told in endpoints.json."""

    host: Name = "127.0.0.1"
    port: Port = 8080
    #: https with these; read again on SIGHUP and when the files change
    cert_file: str | None = None
    key_file: str | None = None
    #: only who has a certificate of this authority is answered
    client_ca: str | None = None


class Page(Section, frozen=True, kw_only=True):
    """The live page on the HTTP port. What it shows can be read by whoever reaches the port, unless a token is asked for."""

    enabled: bool = True
    #: whose first line is the token to look with; without one, none is needed
    viewer_token_file: str | None = None
    #: who may act from the page: name -> the file whose first line is their token
    operators: dict[AgentName, Name] = field(default_factory=dict)
    #: how much past its charts show
    history_seconds: Annotated[int, Meta(ge=60, le=3600)] = 900


class Audit(Section, frozen=True, kw_only=True):
    """The record of every command: the stream IF_AUDIT."""

    enabled: bool = True
    max_age_days: Annotated[int, Meta(ge=1, le=3650)] = 90
    max_bytes: Annotated[int, Meta(ge=1 << 20)] = 8 << 30
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    #: when the stream is full: refuse new records (and keep them in the spool), or drop the oldest
    when_full: Literal["refuse", "drop_oldest"] = "refuse"
    #: what leaves no record: component.verb when it is carried out, component.verb:code when it is refused with that.
    #: By default what idle and waiting agents say all day long.
    skip: tuple[Name, ...] = ("coordinator.renew", "coordinator.next:no_task_matches")
    #: what may wait on this machine's disk for the stream to take it
    spool_max_bytes: Annotated[int, Meta(ge=1 << 16)] = 256 << 20


class Tracing(Section, frozen=True, kw_only=True):
    """OpenTelemetry: spans of requests, commits and runs. Needs `pip install ifabric[otel]`."""

    enabled: bool = False
    #: OTLP over HTTP
    endpoint: Name = "http://127.0.0.1:4318/v1/traces"
    #: of the traces that begin here; one that a sender has begun is followed as the sender says
    sample_ratio: Share = 0.01
    service_name: Name = "ifabric"


class Identity(Section, frozen=True, kw_only=True):
    """Who may do what on NATS. Needs a nats-server whose configuration asks an auth callout (`ifabric bootstrap nats`)."""

    enabled: bool = False
    #: the seed of the account key that signs answers to the auth callout. A daemon that has it answers.
    issuer_seed_file: str | None = None
    #: the seed of the daemon's user in NATS's system account, where the callout is asked and connections are ended
    system_seed_file: str | None = None
    #: the NATS account that agents and daemons share
    account: Name = "FABRIC"
    #: whose verbs agents may call
    components: tuple[Name, ...] = ("coordinator", "governor", "chassis")
    #: operators who are known without a record, so that there is a first one: name -> public key
    operators: dict[AgentName, PublicKey] = field(default_factory=dict)
    #: how often every connection is held against the records, besides when one changes
    sweep_seconds: Positive = 30.0


class Vault(Section, frozen=True, kw_only=True):
    """Where `vault:PATH#FIELD` in this configuration is looked up: a token file, or an AppRole."""

    addr: str | None = None
    token_path: str | None = None
    role_id_path: str | None = None
    secret_id_path: str | None = None
    namespace: str | None = None
    ca_cert: str | None = None
    timeout_seconds: Positive = 5.0


class S3(Section, frozen=True, kw_only=True):
    """S3-compatible storage. Without key files the usual sources of boto3 are asked."""

    bucket: Name
    prefix: str = "ifabric/"
    endpoint_url: str | None = None
    region: str | None = None
    access_key_file: str | None = None
    secret_key_file: str | None = None


class Backup(Section, frozen=True, kw_only=True):
    """Backups of etcd, the streams and the modules, each one file."""

    #: default: `backups` below the state directory
    directory: str | None = None
    #: age public keys; without any, nothing is written
    recipients: tuple[Name, ...] = ()
    #: the age private key, for `verify` and `restore`; not needed to make backups
    identity_file: str | None = None
    retention_days: Count = 7
    #: so many are kept whatever their age
    keep_min: Count = 3
    #: for `backup run --every`, and the age from which `doctor` warns is three times this
    interval_seconds: Positive = 300.0
    timeout_seconds: Positive = 600.0
    s3: S3 | None = None
