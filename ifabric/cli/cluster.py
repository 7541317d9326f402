"""How the verbs of the servers (`doctor`, `maintenance`, `member`) are told where those are."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ifabric.errors import ConfigError

if TYPE_CHECKING:
    from ifabric.bus.nats import NatsSettings
    from ifabric.care.places import Places


@Parameter(name="*")
@dataclass(frozen=True)
class Servers:
    """Where etcd and NATS are."""

    config: Annotated[
        tuple[Path, ...],
        Parameter(
            name=["--config", "-c"], negative="", help="The daemon's configuration. Default: this machine's daemon."
        ),
    ] = ()
    state_dir: Annotated[Path | None, Parameter(help="State directory of this machine's daemon.")] = None
    cert_file: Annotated[
        Path | None,
        Parameter(help="A client certificate for etcd in place of the configured one: root's, for example."),
    ] = None
    key_file: Annotated[Path | None, Parameter(help="Its key.")] = None

    def words(self) -> str:
        """These options again, for a command that is printed to be copied."""
        given: list[tuple[str, Path | None]] = [("config", path) for path in self.config]
        given += [("state-dir", self.state_dir), ("cert-file", self.cert_file), ("key-file", self.key_file)]
        return "".join(f" --{name} {value}" for name, value in given if value)

    def places(self) -> Places:
        """What they lead to. `ConfigError`, or `Unreachable` when there is neither a configuration nor a daemon."""
        from ifabric.care.places import find
        from ifabric.config_file import load
        from ifabric.references import for_a_verb

        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("--cert-file and --key-file go together")
        config = for_a_verb(load(self.config, os.environ)[0]) if self.config else None
        return find(config, self.state_dir, words=self.words(), cert_file=self.cert_file, key_file=self.key_file)


def nats_settings(places: Places) -> NatsSettings:
    """As the daemon connects, with its credential."""
    from ifabric import settings

    return replace(settings.nats_settings(places.config, places.nats), name="ifabric operator")
