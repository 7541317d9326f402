"""The configuration of what a production has besides its components: certificates on the HTTP port, identities, secrets
from Vault, backups.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from ifabric.config_base import Count, Name, Port, Positive, Section

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
