"""The demo's agents: processes that know NATS and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal

from ifabric.client import Client
from ifabric.clock import monotonic, seeded
from ifabric.errors import ClaimLost, FabricError, NoTaskMatches


def agent(
    nats: str, session: str, capabilities: tuple[str, ...], ttl_s: int, work_s: tuple[float, float], latencies: str
) -> None:
    """One agent, until SIGTERM. Each claim's latency goes to the file `latencies`, a line each, in seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    asyncio.run(_work(nats, session, capabilities, ttl_s, work_s, latencies))


async def _work(
    nats: str, session: str, capabilities: tuple[str, ...], ttl_s: int, work_s: tuple[float, float], latencies: str
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
