"""The files of config/deploy as data, for tests: compose files merged, units read, what each NATS file is to say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ifabric.bus.serverconf import Routes, ServerConf, Tls

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "config/deploy"
COMPOSE = DEPLOY / "compose"
NATS = ("nats-1", "nats-2", "nats-3")
HEADER = """nats-1 of three, for a host without containers: what `ifabric bootstrap nats FOLDER` writes, without identities.
#
# To read, and for a network where whoever reaches NATS is believed. For production use the files that it writes."""


def nats_conf() -> str:
    """What config/deploy/nats/nats.conf says: a member of the cluster as `ifabric bootstrap nats` writes it, without keys."""
    certs = "/etc/infrafabric/certs"
    tls = Tls(cert_file=f"{certs}/nats-1.crt", key_file=f"{certs}/nats-1.key", ca_file=f"{certs}/ca.crt")
    conf = ServerConf(
        header=HEADER,
        name="nats-1",
        listen="0.0.0.0:4222",
        store_dir="/var/lib/nats",
        monitoring="127.0.0.1:8222",
        tls=tls,
        routes=Routes(
            cluster="ifabric",
            listen="0.0.0.0:6222",
            routes=[f"nats-route://{other}:6222" for other in NATS],
            tls=replace(tls, verify=True),
        ),
    )
    return conf.text()


def compose() -> dict[str, dict[str, Any]]:
    """Services, volumes, networks and secrets of compose.yaml and what it includes; a name given twice is an error."""
    merged: dict[str, dict[str, Any]] = {"services": {}, "volumes": {}, "networks": {}, "secrets": {}}
    for name in yaml.safe_load((COMPOSE / "compose.yaml").read_text())["include"]:
        document = yaml.safe_load((COMPOSE / name).read_text())
        assert "version" not in document, f"{name}: `version` is obsolete"
        for section, found in document.items():
            if section.startswith("x-"):
                continue
            assert not merged[section].keys() & found.keys(), f"{name}: given twice in {section}"
            merged[section] |= found
    return merged


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """A systemd unit: section, key, the values in their order."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in path.read_text().replace("\\\n", "").splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(header[1], {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found
