"""What does security cost? Claims in the clear, over TLS, and over TLS as agents that are somebody; and how many agents a
second are let in.

Three stands in one run, each an etcd, a nats-server and a daemon of their own: nothing; TLS to both servers with client
certificates at etcd; the same with identities. In turn, `ROUNDS` times.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.stand import closed_loop, percentile
from ifabric import credentials
from ifabric.bus.nats import Nats
from ifabric.bus.serverconf import Identities
from ifabric.clock import SystemClock, monotonic
from ifabric.connecting import settings_for
from ifabric.credentials import Credential
from ifabric.testing.clusters import Certificates, etcd_cluster, nats_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.wire.envelope import encode

CALLERS = 32
ROUNDS = 3
ALONE, CLOSED = 600, 6_000
COMING = 400
CLOCK = SystemClock()


class Secured:
    """A stand, and a connection of one session to it."""

    def __init__(self, urls: str, credential: Credential | None, ca: str | None) -> None:
        self.urls, self.credential, self.ca = urls, credential, ca
        self.session = credential.session if credential else "bench"
        self.bus = self.another()
        self._numbers = itertools.count()

    def another(self) -> Nats:
        """One more connection of the same."""
        return Nats(settings_for(self.urls, self.session, self.credential, self.ca, 10.0), CLOCK)

    async def ask(self, verb: str, body: Any) -> None:
        answer = await self.bus.request(f"if.v1.coordinator.{verb}.{self.session}", encode(body), timeout_s=30)
        if b'"error"' in answer.data[:10]:
            raise SystemExit(f"{verb}: {answer.data.decode()}")

    async def supply(self, count: int) -> range:
        """So many new tasks, by their numbers."""
        first = next(self._numbers)
        numbers = range(first, first + count)
        for _ in range(count - 1):
            next(self._numbers)
        for at in range(0, count, 100):
            await self.ask("submit", {"tasks": [{"id": f"T{n}"} for n in numbers[at : at + 100]]})
        return numbers

    async def claim(self, number: int) -> None:
        await self.ask("claim", {"task": f"T{number}", "request_id": f"r{number}"})


@contextlib.asynccontextmanager
async def secured(folder: Path, *, tls: bool, identities: bool) -> AsyncIterator[Secured]:
    """A stand with as much security."""
    certificates = Certificates(folder / "certs") if tls else None
    config: dict[str, Any] = {"coordinator": {"logging": {"level": "WARNING"}, "etcd": {}}, "nats": {}}
    if certificates is not None:
        config["coordinator"]["etcd"] = certificates.client()
        config["nats"] = {"ca_cert": certificates.path("ca.crt")}
    operator, keys = None, None
    if identities:
        made = {
            "issuer": credentials.make(kind="account"),
            "daemon": credentials.make(),
            "system": credentials.make(),
        }
        for name, one in made.items():
            one.write(folder / f"{name}.nk")
        operator = credentials.make("bench")
        keys = Identities(**{name: one.public_key for name, one in made.items()})
        config["nats"]["nkey_seed_file"] = str(folder / "daemon.nk")
        config["identity"] = {
            "enabled": True,
            "issuer_seed_file": str(folder / "issuer.nk"),
            "system_seed_file": str(folder / "system.nk"),
            "operators": {"bench": operator.public_key},
        }
    async with (
        etcd_cluster(1, certificates=certificates) as etcd,
        nats_cluster(1, certificates=certificates, identities=keys) as nats,
    ):
        daemon = await RealDaemon(folder / "daemon", etcd.urls, nats.urls, config).start()
        try:
            made_here = Secured(nats.urls[0], operator, certificates.path("ca.crt") if certificates else None)
            await made_here.bus.connect()
            await made_here.ask("hello", {"ttl_s": 600})
            yield made_here
            await made_here.bus.close()
        finally:
            await daemon.close()


async def coming_in(where: Secured) -> float:
    """Connections a second, sixteen at a time, each closed again."""
    began = monotonic()

    async def come(_: int) -> None:
        bus = where.another()
        await bus.connect()
        await bus.close()

    await closed_loop(come, iter(range(COMING)), 16)
    return COMING / (monotonic() - began)


async def main() -> None:
    """Prints a line for each stand."""
    kinds = {"in the clear": (False, False), "TLS": (True, False), "TLS, identities": (True, True)}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    async with contextlib.AsyncExitStack() as stands:
        made = {}
        for kind, (tls, identities) in kinds.items():
            folder = stands.enter_context(tempfile.TemporaryDirectory(prefix="ifabric-bench-"))
            made[kind] = await stands.enter_async_context(secured(Path(folder), tls=tls, identities=identities))
        for _ in range(ROUNDS):
            for kind, where in made.items():
                alone = await closed_loop(where.claim, iter(await where.supply(ALONE)), 1)
                numbers = await where.supply(CLOSED)
                began = monotonic()
                await closed_loop(where.claim, iter(numbers), CALLERS)
                rate = CLOSED / (monotonic() - began)
                figures[kind].append((percentile(alone, 0.5) * 1000, rate, await coming_in(where)))
                await asyncio.sleep(1)  # what the round has left for the other processes is done before the next
    print(f"{'':>16}  one alone, p50   {CALLERS} callers   connections")
    for kind, rounds in figures.items():
        alone_ms, rate, coming = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{kind:>16}  {alone_ms:11.2f} ms  {rate:8,.0f}/s  {coming:8,.0f}/s")
