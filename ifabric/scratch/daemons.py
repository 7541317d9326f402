"""Daemons: `python -m ifabric run` as a process that can be frozen, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from ifabric import endpoints
from ifabric.embedded import die_with_parent
from ifabric.errors import StartupError

READY_S = 30.0
STOP_S = 30.0
#: what stands in every daemon's configuration unless something else is said
BASE: dict[str, Any] = {
    "http": {"port": 0},
    "coordinator": {"reconcile_interval_seconds": 1, "logging": {"format": "json"}},
}


class Daemon:
    """One daemon process, with a state directory that a restart keeps.

    `config` is merged into what it is given anyway: where etcd and NATS are, and any free HTTP port. `environment` is
    set besides this process's own.
    """

    def __init__(
        self,
        folder: Path,
        etcd: Sequence[str],
        nats: Sequence[str],
        config: dict[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IFABRIC__")}
        self._environment = {**kept, **(environment or {})}
        given = {"coordinator": {"etcd": {"endpoints": list(etcd)}}, "nats": {"servers": list(nats)}}
        self._config = _merged(_merged(BASE, given), config or {})
        self._process: asyncio.subprocess.Process | None = None
        self.found: endpoints.Endpoints | None = None

    async def start(self, *, ready: bool = True, within_s: float = READY_S) -> Self:
        """Starts it, and with `ready` returns when it has said where it listens. `StartupError` shows its log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "fabric.yaml"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(self._config)))  # JSON is YAML
        with (self._folder / "daemon.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "ifabric", "run", "--config", str(file), "--state-dir", str(self._folder)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        if ready:
            try:
                async with asyncio.timeout(within_s):
                    while (found := endpoints.read(self._folder)) is None or found.pid != self.pid:
                        if self._process.returncode is not None:
                            raise TimeoutError
                        await asyncio.sleep(0.01)
            except TimeoutError:
                await self.kill()
                raise StartupError(f"the daemon did not start; its log ends:\n{self.log_text()[-3000:]}") from None
            self.found = found
        return self

    # -- its process -------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it was started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.returncode is None

    def freeze(self) -> None:
        """SIGSTOP: its connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """Its exit code. `TimeoutError` when it does not end."""
        assert self._process is not None, "it was started"
        async with asyncio.timeout(STOP_S):
            return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL, and waits for the end. Harmless when it has ended."""
        assert self._process is not None, "it was started"
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def terminate(self) -> int:
        """SIGTERM, and waits for the end; the exit code."""
        self.signal(signal.SIGTERM)
        return await self.wait()

    async def close(self) -> None:
        """Ends it however it stands: orderly, by force when that does not work. Twice is harmless."""
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self.thaw()
            await self.terminate()
        await self.kill()

    def log_text(self) -> str:
        """All that it wrote, over all its lives."""
        return (self._folder / "daemon.log").read_text(errors="replace")


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The other's keys over the one's."""
    found = dict(one)
    for key, value in other.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return found
