"""What do 10,000 registered sessions cost that only renew? CPU of the daemon, of etcd and of nats-server, over half a
minute.
"""

from __future__ import annotations

import asyncio
import json

import nats

from bench.stand import children, cpu_s, rss_mb, stand

SESSIONS = 10_000
TTL_S = 30
SECONDS = 30


async def main() -> None:
    """Prints the share of one core that each process used while the sessions renewed at a third of their TTL."""
    async with stand() as where:
        nc = await nats.connect(where.nats)
        hello = json.dumps({"ttl_s": TTL_S}).encode()
        gate = asyncio.Semaphore(64)

        async def register(number: int) -> None:
            async with gate:
                await nc.request(f"if.v1.coordinator.hello.s{number}", hello, timeout=30)

        await asyncio.gather(*(register(n) for n in range(SESSIONS)))
        processes = {"daemon": where.pid, **children(where.pid)}
        lost = 0

        async def renew(number: int) -> None:
            nonlocal lost
            answer = await nc.request(f"if.v1.coordinator.renew.s{number}", b"{}", timeout=10)
            lost += answer.headers is not None

        before = {name: cpu_s(pid) for name, pid in processes.items()}
        loop = asyncio.get_running_loop()
        began = loop.time()
        rate = SESSIONS / (TTL_S / 3)
        tasks = set()
        for number in range(int(rate * SECONDS)):
            due = began + number / rate
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.ensure_future(renew(number % SESSIONS))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        took = loop.time() - began
        shares = {name: (cpu_s(pid) - before[name]) / took * 100 for name, pid in processes.items()}
        print(f"{SESSIONS:,} sessions, {rate:,.0f} renewals/s for {took:.0f} s, {lost} refused")
        for name, share in shares.items():
            print(f"  {name:>12}: {share:5.1f} % of a core, {rss_mb(processes[name]):.0f} MB")
        await nc.close()
