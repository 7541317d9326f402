"""What the daemon's parts are given of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ifabric.actor.base import System
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import Clock
from ifabric.config import Config
from ifabric.config_base import MetricsPort
from ifabric.credentials import read_seed
from ifabric.errors import ConfigError
from ifabric.store.etcd import EtcdSettings
from ifabric.wire.subjects import DAEMON_INBOX


def metrics_ports(config: Config) -> dict[str, MetricsPort]:
    """Where each component that runs here is scraped, all with the same metrics."""
    further: dict[str, MetricsPort] = {
        name: config.section(name).metrics for name in ("governor", "chassis") if name in config.actors
    }
    return {"coordinator": config.coordinator.metrics, **further}


def etcd_settings(config: Config, urls: tuple[str, ...]) -> EtcdSettings:
    """How the daemon reaches etcd."""
    etcd = config.coordinator.etcd
    return EtcdSettings(
        endpoints=urls,
        timeout_s=etcd.timeout_seconds,
        attempt_timeout_s=etcd.attempt_timeout_seconds,
        ca_cert=etcd.ca_cert,
        cert_file=etcd.cert_file,
        key_file=etcd.key_file,
    )


def system_of(
    config: Config, urls: tuple[str, ...], clock: Clock, on_error: Callable[[str, Exception], None]
) -> System | None:
    """The second connection, where NATS's auth callout is answered here. `ConfigError` names a seed that is none."""
    identity = config.identity
    if not identity.enabled or not identity.issuer_seed_file:
        return None
    if not identity.system_seed_file:
        raise ConfigError("identity.issuer_seed_file without identity.system_seed_file: nobody would be asked")
    settings = replace(nats_settings(config, urls), name="ifabric system", nkey_seed_file=identity.system_seed_file)
    return System(Nats(settings, clock, on_error), read_seed(identity.issuer_seed_file))


def nats_settings(config: Config, urls: tuple[str, ...]) -> NatsSettings:
    """How the daemon reaches NATS."""
    nats = config.nats
    return NatsSettings(
        servers=urls,
        name="ifabric daemon",
        inbox_prefix=DAEMON_INBOX,
        private_inboxes=config.identity.enabled,
        connect_timeout_s=nats.connect_timeout_seconds,
        nkey_seed_file=nats.nkey_seed_file,
        credentials_file=nats.credentials_file,
        ca_cert=nats.ca_cert,
        cert_file=nats.cert_file,
        key_file=nats.key_file,
    )
