"""The fabric that is lost: an etcd cluster, a NATS cluster and daemons in one folder, and the verbs of an operator."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from ifabric.backup.keys import make_key
from ifabric.errors import FabricError
from ifabric.scratch.clusters import Members, etcd_cluster, nats_cluster
from ifabric.scratch.daemons import Daemon

#: a daemon reads the whole board before it answers
READY_S = 120.0
#: variables of this process that a verb may see: which programs to use, and nothing that says where a fabric is
KEPT = ("IFABRIC_ETCD", "IFABRIC_NATS_SERVER", "IFABRIC_DEBUG")
#: more than any backup of a drill takes
VERB_S = 600.0


class DrillFailed(FabricError):
    """A step of the drill did not work; the drill ended there."""


class Town:
    """One fabric in a folder. Use `town`."""

    def __init__(self, folder: Path, etcd: Members, nats: Members, daemons: int) -> None:
        self.folder = folder
        self.etcd, self.nats = etcd, nats
        self.backups = folder / "backups"
        self.key = folder / "backup.age"
        self.config = folder / "fabric.yaml"
        settings = self._settings(make_key(self.key))
        self.config.write_bytes(msgspec.json.format(msgspec.json.encode(settings)))  # JSON is YAML
        self.daemons = [
            Daemon(folder / f"daemon-{number}", etcd.urls, nats.urls, settings, self.environment)
            for number in range(1, daemons + 1)
        ]

    def _settings(self, recipient: str) -> dict[str, Any]:
        return {
            "actors": ["coordinator", "governor"],
            "coordinator": {
                "etcd": {"endpoints": self.etcd.urls, "allow_old_etcd": True},
                "logging": {"format": "json"},
            },
            "nats": {"servers": self.nats.urls},
            "events": {"replicas": len(self.nats.members)},
            "http": {"port": 0},
            "backup": {
                "directory": str(self.backups),
                "recipients": [recipient],
                "identity_file": str(self.key),
            },
        }

    @property
    def urls(self) -> str:
        """Where agents find NATS."""
        return ",".join(self.nats.urls)

    @property
    def environment(self) -> dict[str, str]:
        """What the processes of the drill see of this one's: no fabric but this one can be found with it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IFABRIC") or name in KEPT}
        return {**kept, "XDG_STATE_HOME": str(self.folder / "state")}

    async def start_daemons(self) -> None:
        """Returns when all are ready."""
        await asyncio.gather(*(daemon.start(within_s=READY_S) for daemon in self.daemons))

    async def stop_daemons(self) -> None:
        """Orderly, as an operator does before a restore; by force when that does not work."""
        await asyncio.gather(*(daemon.close() for daemon in self.daemons))

    async def lose(self, *, everything: bool) -> None:
        """SIGKILL for every etcd at once (with `everything`, for every nats-server too), and their data is deleted."""
        doomed = (self.etcd, self.nats) if everything else (self.etcd,)
        await asyncio.gather(*(members.destroy() for members in doomed))

    async def verb(self, *words: str, expected: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """`ifabric WORDS --json` as a process of its own: what it said. `DrillFailed` with any exit code but `expected`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ifabric", *words, "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
        )
        try:
            async with asyncio.timeout(VERB_S):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode not in expected:
            said = err.decode(errors="replace").strip()[-2000:]
            raise DrillFailed(f"`ifabric {' '.join(words)}` ended with {process.returncode}: {said}")
        try:
            said_json: dict[str, Any] = msgspec.json.decode(out)
        except msgspec.DecodeError:
            raise DrillFailed(f"`ifabric {' '.join(words)}` said no JSON: {out[:500]!r}") from None
        return said_json

    async def restore(self, *, everything: bool) -> dict[str, Any]:
        """New members of the newest backup, where the old ones were; with `everything`, its streams too."""
        members = []
        for folder, peer in zip(self.etcd.folders, self.etcd.peers, strict=True):
            members += ["--member", f"{folder.name}={peer}={folder}"]
        streams = ("--streams", "--replicas", str(len(self.nats.members))) if everything else ()
        return await self.verb("restore", "latest", "--config", str(self.config), "--yes", *members, *streams)


@contextlib.asynccontextmanager
async def town(folder: Path, *, nodes: int, daemons: int) -> AsyncIterator[Town]:
    """A fabric of `nodes` etcd, `nodes` nats-servers and `daemons`, all running; everything ends with the block."""
    async with contextlib.AsyncExitStack() as closing:
        etcd, nats = await asyncio.gather(
            closing.enter_async_context(etcd_cluster(nodes, name="drill", folder=folder / "etcd")),
            closing.enter_async_context(nats_cluster(nodes, folder=folder / "nats")),
        )
        made = Town(folder, etcd, nats, daemons)
        closing.push_async_callback(made.stop_daemons)
        await made.start_daemons()
        yield made
