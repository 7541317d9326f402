"""A production as an SRE makes it, by the verbs of the README alone: certificates, etcd's users, NATS's keys, a daemon,
agents, a backup, and whether all is well.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifabric import credentials
from ifabric.bus.serverconf import Identities, Tls
from ifabric.testing.clusters import etcd_cluster, nats_cluster
from ifabric.testing.daemons import RealDaemon
from tests.conftest import needed


class Bootstrapped:
    """The certificates that `ifabric bootstrap certs` has made, as the clusters of the tests want them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> str:
        """Of a file; any member's may stand for all, since each is for loopback too."""
        return str(self._folder / name.replace("server.", "etcd-1."))

    def tls(self, *, verify: bool = False) -> Tls:
        """For a nats-server."""
        at = self._folder
        return Tls(
            cert_file=str(at / "nats-1.crt"), key_file=str(at / "nats-1.key"), ca_file=str(at / "ca.crt"), verify=verify
        )


class Shell:
    """The command line, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IFABRIC")}
        self.environment = {**kept, "XDG_STATE_HOME": str(folder / "state-home")}

    async def run(self, *words: str, fails: bool = False, **environment: str) -> str:
        """What a verb says on stdout. The test fails when the verb does."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ifabric", *words),
            cwd=self.folder,
            env=self.environment | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert (process.returncode != 0) is fails, f"ifabric {' '.join(words)}: {err.decode()}\n{out.decode()}"
        return out.decode()


@pytest.mark.slow  # two clusters with TLS, and a dozen programs one after the other: a minute
async def test_a_production_is_made_checked_and_backed_up_by_the_verbs_of_the_readme(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    await shell.run("bootstrap", "certs", "certs")
    await shell.run("bootstrap", "nats", "nats", "--operator", "ann")
    keys = {
        name: credentials.read(tmp_path / "nats" / f"{name}.nk").public_key for name in ("issuer", "daemon", "system")
    }
    certificates: Any = Bootstrapped(tmp_path / "certs")
    with needed("etcd and nats-server"):
        async with (
            etcd_cluster(certificates=certificates) as etcd,
            nats_cluster(certificates=certificates, identities=Identities(**keys)) as nats,
        ):
            at = tmp_path / "certs"
            config: dict[str, Any] = {
                "coordinator": {
                    "etcd": {
                        "endpoints": etcd.urls,
                        "ca_cert": str(at / "ca.crt"),
                        "cert_file": str(at / "coordinator-client.crt"),
                        "key_file": str(at / "coordinator-client.key"),
                    }
                },
                "nats": {"servers": nats.urls, "ca_cert": str(at / "ca.crt")},
                "http": {"port": 0, "cert_file": str(at / "http.crt"), "key_file": str(at / "http.key")},
                "events": {"replicas": 3},
                "chassis": {"modules": {"replicas": 3}},
                "backup": {"directory": str(tmp_path / "backups")},
            }
            identity = yaml.safe_load((tmp_path / "nats" / "ifabric-identity.yaml").read_text())
            config["nats"] |= identity["nats"]
            config["identity"] = identity["identity"]
            (tmp_path / "fabric.yaml").write_text(json.dumps(config))
            said = await shell.run("bootstrap", "etcd", "--config", "fabric.yaml", "--certs", "certs")
            assert "access control is on" in said
            daemon = await RealDaemon(tmp_path / "daemon", etcd.urls, nats.urls, config).start()
            try:
                shell.environment |= {
                    "IFABRIC_NATS": ",".join(nats.urls),
                    "IFABRIC_CA": str(at / "ca.crt"),
                    "IFABRIC_CREDENTIALS": str(tmp_path / "nats" / "ann.nk"),
                }
                await shell.run("agent", "create", "alice", "--account", "acme/research")
                await shell.run("task", "list", IFABRIC_CREDENTIALS="alice.nk")
                await shell.run("agent", "list", IFABRIC_CREDENTIALS="alice.nk", fails=True)
                status = json.loads(await shell.run("status", "--state-dir", "daemon", "--json"))
                assert status["health"]["status"] == "healthy"
                await self_made_backup(shell, config)
                report = json.loads(
                    await shell.run("doctor", "--config", "fabric.yaml", "--state-dir", "daemon", "--json")
                )
                assert not [one for one in report["findings"] if one["severity"] == "critical"], report
            finally:
                await daemon.close()


async def self_made_backup(shell: Shell, config: dict[str, Any]) -> None:
    """Makes a key and a backup by a user that may, reads it to its end, and says what a restore would do."""
    said = await shell.run("backup", "run", "--make-key", "backup.age")
    recipient = re.search(r"age1[a-z0-9]+", said)
    assert recipient is not None
    config["backup"]["recipients"] = [recipient[0]]
    etcd = config["coordinator"]["etcd"]
    mine = {name: etcd[name].replace("coordinator-client", "backup-client") for name in ("cert_file", "key_file")}
    (shell.folder / "backup.yaml").write_text(
        json.dumps({**config, "coordinator": {"etcd": {**etcd, **mine}}, "nats": config["nats"]})
    )
    await shell.run("agent", "create", "copier", "--role", "backup")
    await shell.run("backup", "run", "--config", "backup.yaml", IFABRIC_CREDENTIALS="copier.nk")
    with_key = ("--config", "backup.yaml", "--identity-file", "backup.age")
    await shell.run("backup", "verify", *with_key, "--deep")
    member = f"etcd-1=https://127.0.0.1:1={shell.folder / 'new'}"
    said = await shell.run("restore", "latest", *with_key, "--member", member)
    assert "nothing was touched" in said
    assert not (shell.folder / "new").exists()
