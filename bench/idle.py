"""What does a daemon cost that nobody uses, and how soon is it ready?"""

from __future__ import annotations

import asyncio
import statistics

from bench.stand import children, cpu_s, rss_mb, stand

ROUNDS = 5
SECONDS = 20


async def main() -> None:
    """Prints the time until ready (median of several starts), then CPU and memory of an idle daemon."""
    ready = []
    for _ in range(ROUNDS):
        async with stand() as where:
            ready.append(where.ready_s)
    print(
        f"ready after {statistics.median(ready):.2f} s (median of {ROUNDS}, worst {max(ready):.2f}), embedded servers included"
    )
    async with stand() as where:
        await asyncio.sleep(5)
        processes = {"daemon": where.pid, **children(where.pid)}
        before = {name: cpu_s(pid) for name, pid in processes.items()}
        await asyncio.sleep(SECONDS)
        for name, pid in processes.items():
            print(f"  {name:>12}: {(cpu_s(pid) - before[name]) / SECONDS * 100:5.2f} % of a core, {rss_mb(pid):.0f} MB")
