"""Where everything is: from a configuration, or from what this machine's daemon says of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ifabric import endpoints
from ifabric.config import Config, smells
from ifabric.errors import Unreachable
from ifabric.store.channel import EtcdSettings


@dataclass(frozen=True, kw_only=True)
class Places:
    """What is looked at. `daemon` is the HTTP URL of this machine's daemon, if one runs."""

    etcd: EtcdSettings
    nats: tuple[str, ...]
    config: Config
    smells: tuple[str, ...] = ()
    state_dir: Path
    daemon: str | None = None
    embedded: bool = False
    #: the options that lead here again
    words: str = ""


def find(
    config: Config | None,
    state_dir: Path | None,
    *,
    words: str = "",
    cert_file: Path | None = None,
    key_file: Path | None = None,
) -> Places:
    """With a configuration, what it names; for servers that it does not name, and without one, what the daemon of this
    machine says. `cert_file` and `key_file` stand in for the configured ones: etcd's administrator, for example.

    Raises `Unreachable` when there is neither.
    """
    given = config or Config()
    folder = state_dir or (Path(given.state_dir) if given.state_dir else endpoints.default_state_dir())
    found = endpoints.read(folder)
    etcd = given.coordinator.etcd
    etcd_urls = etcd.endpoints or (found.etcd if found else ())
    nats_urls = given.nats.servers or (tuple(found.nats.split(",")) if found else ())
    if not etcd_urls and not nats_urls:
        raise Unreachable(
            f"no daemon runs here (none in {folder}), and no configuration says where etcd and NATS are: give --config, or --state-dir"
        )
    settings = EtcdSettings(
        endpoints=etcd_urls,
        timeout_s=etcd.timeout_seconds,
        attempt_timeout_s=etcd.attempt_timeout_seconds,
        ca_cert=etcd.ca_cert,
        cert_file=etcd.cert_file,
        key_file=etcd.key_file,
    )
    if cert_file is not None:
        settings = replace(settings, cert_file=str(cert_file), key_file=str(key_file) if key_file else None)
    return Places(
        etcd=settings,
        nats=nats_urls,
        config=msgspec.structs.replace(given, state_dir=str(folder)),
        smells=tuple(smells(given)) if config is not None else (),
        state_dir=folder,
        daemon=found.http if found else None,
        embedded=not etcd.endpoints,
        words=words,
    )
