"""The stand a benchmark runs on: etcd, nats-server and one daemon, each a process of its own, in a folder that is
thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ifabric.clock import monotonic

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stand:
    """Where everything is."""

    nats: str
    etcd: str
    http: str
    pid: int
    folder: Path
    ready_s: float


@contextlib.asynccontextmanager
async def stand(*, settings: str = "", program: str = "ifabric", **environ: str) -> AsyncIterator[Stand]:
    """A daemon with embedded servers, ready. `settings` are more lines of its configuration; `program` is the module
    that is run instead of `ifabric`.
    """
    with tempfile.TemporaryDirectory(prefix="ifabric-bench-") as name:
        folder = Path(name)
        config = folder / "bench.yaml"
        config.write_text("http: {port: 0}\ncoordinator: {logging: {level: WARNING}}\n" + settings)
        started = monotonic()
        daemon = subprocess.Popen(
            [sys.executable, "-m", program, "run", "--config", str(config), "--state-dir", name],
            env={**os.environ, **environ},
        )
        try:
            endpoints = folder / "endpoints.json"
            while not endpoints.exists():
                if daemon.poll() is not None:
                    raise SystemExit("the daemon did not start")
                await asyncio.sleep(0.005)
            ready_s = monotonic() - started
            found = json.loads(endpoints.read_text())
            yield Stand(found["nats"], found["etcd"][0], found["http"], daemon.pid, folder, ready_s)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def cpu_s(pid: int) -> float:
    """User and system seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> dict[str, int]:
    """The processes that a process started, by name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            if int(rest.split()[1]) == pid:
                found[name] = int(stat.parent.name)
    return found


def percentile(values: list[float], share: float) -> float:
    """Of sorted values, the one below which that share lies."""
    return values[min(len(values) - 1, int(len(values) * share))]


async def closed_loop(act: Callable[[int], Awaitable[None]], numbers: Iterator[int], callers: int) -> list[float]:
    """`callers` at once, each starting its next act when its last one is answered. The latencies, sorted, in seconds."""
    taken: list[float] = []

    async def caller() -> None:
        for number in numbers:
            began = monotonic()
            await act(number)
            taken.append(monotonic() - began)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return sorted(taken)


async def open_loop(
    act: Callable[[int], Awaitable[None]], numbers: Iterator[int], rate: float, seconds: float
) -> list[float]:
    """Acts that are due at a steady rate, whatever becomes of the earlier ones. Latency counts from when an act was
    *due*.
    """
    taken: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    began = monotonic()

    async def one(number: int, due: float) -> None:
        await act(number)
        taken.append(monotonic() - due)

    total = int(rate * seconds)
    done = 0
    while done < total:
        now = monotonic() - began
        while done < total and done / rate <= now:
            task = asyncio.ensure_future(one(next(numbers), began + done / rate))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            done += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    return sorted(taken)
