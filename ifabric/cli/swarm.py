"""The demo's agents: processes that know NATS and nothing else, and how they are started, killed and replaced.

They are forked from one server process that has imported what they need and runs no loop and no thread: twenty agents
cost one start of the interpreter, and no fork copies a running loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

from ifabric.client import Client
from ifabric.clock import monotonic, seeded
from ifabric.errors import ClaimLost, FabricError, NoTaskMatches

STOP_S = 5.0


class Swarm:
    """The agents' processes. `capabilities`, `ttl_s` and `work_s` (seconds a task, from and to) are everybody's."""

    def __init__(
        self, nats: str, folder: Path, *, capabilities: tuple[str, ...], ttl_s: int, work_s: tuple[float, float]
    ) -> None:
        self._latencies = folder / "latencies"
        self._given = (nats, capabilities, ttl_s, work_s, str(self._latencies))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ifabric.cli.swarm"])
        self._lives: dict[int, int] = {}
        self._processes: dict[str, tuple[int, BaseProcess]] = {}

    def __contains__(self, session: object) -> bool:
        return session in self._processes

    def start(self, number: int) -> None:
        """A new life of an agent, with a session of its own."""
        life = self._lives[number] = self._lives.get(number, 0) + 1
        session = f"agent-{number:03d}-{life}"
        process = self._context.Process(target=agent, args=(session, *self._given), daemon=True)
        process.start()
        self._processes[session] = (number, process)

    def freeze(self, session: str) -> None:
        """Stops an agent where it stands; `thaw` or `kill` comes next."""
        self._signal(session, signal.SIGSTOP)

    def thaw(self, session: str) -> None:
        """It goes on."""
        self._signal(session, signal.SIGCONT)

    def kill(self, session: str) -> None:
        """Ends an agent as a crash would, and starts its next life."""
        self._signal(session, signal.SIGKILL)
        number, process = self._processes.pop(session)
        process.join(STOP_S)
        self.start(number)

    def _signal(self, session: str, number: signal.Signals) -> None:
        pid = self._processes[session][1].pid
        assert pid is not None, "it was started"
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, number)

    def stop(self) -> None:
        """Asks all to end, and after a while makes them."""
        processes = [process for _, process in self._processes.values()]
        for session, (_, process) in self._processes.items():
            if process.is_alive():
                self.thaw(session)
                process.terminate()
        until = monotonic() + STOP_S
        for process in processes:
            process.join(max(0.0, until - monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()

    def latencies_ms(self) -> list[float]:
        """Of every claim that an agent asked for and got at once, sorted."""
        try:
            text = self._latencies.read_text()
        except FileNotFoundError:
            return []
        return sorted(float(line) * 1000 for line in text.split())


def agent(
    session: str, nats: str, capabilities: tuple[str, ...], ttl_s: int, work_s: tuple[float, float], latencies: str
) -> None:
    """One agent, until SIGTERM. Each claim's latency goes to the file `latencies`, a line each, in seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    asyncio.run(_work(session, nats, capabilities, ttl_s, work_s, latencies))


async def _work(
    session: str, nats: str, capabilities: tuple[str, ...], ttl_s: int, work_s: tuple[float, float], latencies: str
) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    log = os.open(latencies, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    chance = seeded(session)
    async with Client.connect(nats, session=session, capabilities=capabilities, ttl_s=ttl_s, timeout_s=10) as client:
        await client.hello()
        while not stop.is_set():
            began = monotonic()
            try:
                claim = await client.next()
            except NoTaskMatches:
                try:
                    claim = await client.next(wait_s=1.0)
                except FabricError:
                    continue
            else:
                os.write(log, b"%.6f\n" % (monotonic() - began))
            try:
                async with claim:
                    await asyncio.sleep(chance.uniform(*work_s))
                    await claim.complete({"by": session})
            except ClaimLost:
                continue
    os.close(log)
