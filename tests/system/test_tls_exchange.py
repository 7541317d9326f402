"""Certificates that are exchanged while they are in use: what cannot be used changes nothing, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from cryptography import x509

from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.errors import FabricError, Unreachable
from ifabric.pki import Authority, Pair
from ifabric.programs import find_etcd, find_nats_server
from ifabric.store.base import Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.clusters import HOSTS, Certificates, Members, etcd_cluster, nats_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.wire import subjects
from tests.conftest import needed
from tests.system.conftest import eventually

CLOCK = SystemClock()
#: how long the certificates last that expire under load: longer than their exchange takes
SHORT = dt.timedelta(seconds=40)


class Servers:
    """An etcd and a nats-server that want client certificates."""

    def __init__(self, certificates: Certificates, etcd: Members, nats: Members) -> None:
        self.certificates, self.etcd, self.nats = certificates, etcd, nats

    def own(self, folder: Path) -> dict[str, str]:
        """A client's files, which may be exchanged without anybody else noticing."""
        self.certificates.authority.pair.write(folder, "ca")
        self.certificates.authority.issue("ifabric", client=True).write(folder, "ifabric")
        return {
            "ca_cert": str(folder / "ca.crt"),
            "cert_file": str(folder / "ifabric.crt"),
            "key_file": str(folder / "ifabric.key"),
        }


@pytest.fixture(scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """One of each for the file; who restarts one leaves it running."""
    certificates = Certificates(tmp_path_factory.mktemp("servers"))
    with needed("etcd and nats-server"):
        find_etcd(), find_nats_server()
    async with (
        etcd_cluster(1, certificates=certificates) as etcd,
        nats_cluster(1, certificates=certificates, verify=True) as nats,
    ):
        yield Servers(certificates, etcd, nats)


async def test_certificates_that_etcd_refuses_are_not_taken_up_and_the_old_channels_serve(
    servers: Servers, tmp_path: Path
) -> None:
    """Whole files, of an authority that etcd does not know: only asking it tells."""
    etcd = Etcd(EtcdSettings(endpoints=tuple(servers.etcd.urls), **servers.own(tmp_path)), CLOCK)  # type: ignore[arg-type]
    await etcd.connect()
    before = etcd.channel
    Authority.create("Other CA").issue("ifabric", client=True).write(tmp_path, "ifabric")
    with pytest.raises(Unreachable, match=r"refused our certificate \S+ \(ifabric, signed by Other CA"):
        await etcd.reload()
    assert etcd.channel is before
    assert (await etcd.txn(Txn((), (Put(b"tls/old", b"1"),)))).succeeded
    servers.own(tmp_path)
    await etcd.reload()
    assert etcd.channel is not before
    assert await etcd.get(b"tls/old") is not None
    etcd.rotate(before)  # what a stream does whose channel has ended
    assert etcd.connected, "the channel in use has answered"
    await etcd.close()


async def test_what_is_under_way_ends_on_the_old_channels(servers: Servers, tmp_path: Path) -> None:
    """Transactions are sent once: one that lost its channel would be an error."""
    etcd = Etcd(EtcdSettings(endpoints=tuple(servers.etcd.urls), timeout_s=20, attempt_timeout_s=10, **servers.own(tmp_path)), CLOCK)  # type: ignore[arg-type]  # fmt: skip
    await etcd.connect()
    exchanged, done = asyncio.Event(), [0]

    async def write(key: bytes) -> None:
        while not exchanged.is_set():
            await etcd.txn(Txn((), (Put(key, b"1"),)))
            done[0] += 1

    writers = [asyncio.create_task(write(b"tls/%d" % number)) for number in range(50)]
    for _ in range(3):
        goal = done[0] + 200
        await eventually(lambda goal=goal: asyncio.sleep(0, done[0] >= goal or any(w.done() for w in writers)), 60)
        await etcd.reload()
    exchanged.set()
    await asyncio.gather(*writers)
    await etcd.close()


async def test_certificates_that_nats_refuses_are_not_taken_up_and_the_old_ones_reconnect(
    servers: Servers, tmp_path: Path
) -> None:
    settings = NatsSettings(servers=tuple(servers.nats.urls), **servers.own(tmp_path))  # type: ignore[arg-type]
    bus = Nats(settings, CLOCK)
    await bus.connect()
    Authority.create("Other CA").issue("ifabric", client=True).write(tmp_path, "ifabric")
    with pytest.raises(Unreachable, match=r"refused our certificate \S+ \(ifabric, signed by Other CA"):
        await bus.reload()
    await servers.nats.stop()
    await servers.nats.start()
    await eventually(lambda: asyncio.sleep(0, bus.reconnects == 1 and bus.connected), 30)
    await bus.close()


class Callers:
    """Sessions that each put a task on the board, claim it and complete it, until told to stop. Nothing is retried."""

    def __init__(self, bus: Nats, name: str, number: int = 64) -> None:
        self._bus = bus
        self._stopping = False
        self.done = 0
        self._tasks = [asyncio.create_task(self._work(f"{name}-{n}")) for n in range(number)]

    async def more(self, requests: int) -> None:
        """Returns when so many more have been answered."""
        until = self.done + requests
        async with asyncio.timeout(60):
            while self.done < until:
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Raises the first error that any of them met."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _work(self, session: str) -> None:
        await self._ask("hello", session)
        number = 0
        while not self._stopping:
            number += 1
            task = f"tls/{session}.{number}"
            await self._ask("submit", session, tasks=[{"id": task}])
            claim = await self._ask("claim", session, task=task)
            await self._ask("complete", session, task=task, fence=claim["fence"])

    async def _ask(self, verb: str, session: str, **body: object) -> dict[str, Any]:
        answer = await self._bus.request(
            subjects.request("coordinator", verb, session),
            msgspec.json.encode({"request_id": CLOCK.token(), **body}),
            timeout_s=10,
        )
        assert "Nats-Service-Error-Code" not in answer.headers, answer.data
        self.done += 1
        reply: dict[str, Any] = msgspec.json.decode(answer.data)
        return reply


async def shown(url: str) -> int:
    """The serial number of the certificate that a port shows."""
    at = urlsplit(url)
    pem = await asyncio.to_thread(ssl.get_server_certificate, (at.hostname or "", at.port or 443))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.certificate).serial_number


@pytest.mark.slow  # the old certificates expire under load, and the daemon looks at its files every 5 s
async def test_certificates_and_authority_are_exchanged_under_load_without_one_error(tmp_path: Path) -> None:
    """From one authority to another, through a file that holds both; by SIGHUP, and by the change of the files alone.

    The certificates in between expire under load. At the end the servers are started again with the new authority alone:
    only the new certificates connect, and the daemon writes.
    """
    certificates, new = Certificates(tmp_path / "servers"), Authority.create("New CA")
    old, old_ca, new_ca = certificates.authority, certificates.authority.pair.certificate, new.pair.certificate
    trusted, own, caller = certificates.folder / "ca.crt", tmp_path / "daemon", tmp_path / "caller"
    own.mkdir()
    trusted.write_bytes(old_ca + new_ca)  # the servers take both from the start
    (own / "ca.crt").write_bytes(old_ca)
    old.issue("ifabric", client=True).write(own, "ifabric")
    old.issue("http", HOSTS).write(own, "http")
    files = {"ca_cert": f"{own}/ca.crt", "cert_file": f"{own}/ifabric.crt", "key_file": f"{own}/ifabric.key"}
    config = {
        "coordinator": {"etcd": files},
        "nats": files,
        "http": {"cert_file": f"{own}/http.crt", "key_file": f"{own}/http.key"},
    }
    async with contextlib.AsyncExitStack() as closing:
        with needed("etcd and nats-server"):
            find_etcd(), find_nats_server()
        etcd = await closing.enter_async_context(etcd_cluster(1, certificates=certificates))
        nats = await closing.enter_async_context(nats_cluster(1, certificates=certificates, verify=True))
        daemon = RealDaemon(tmp_path / "state", etcd.urls, nats.urls, config)
        closing.push_async_callback(daemon.close)
        await daemon.start()
        assert daemon.found is not None

        async def connected(**files: str) -> Nats:
            bus = Nats(NatsSettings(servers=tuple(nats.urls), **files), CLOCK)  # type: ignore[arg-type]
            await bus.connect()
            closing.push_async_callback(bus.close)
            return bus

        async def counted(part: str, times: float, outcome: str = "done") -> None:
            async with asyncio.timeout(60):
                while await daemon.metric("if_certificate_reloads_total", part=part, outcome=outcome) < times:
                    await asyncio.sleep(0.05)

        async def hup(times: float) -> None:
            daemon.signal(signal.SIGHUP)
            for part in ("etcd", "nats", "http"):
                await counted(part, times)
            await callers.more(300)

        bus = await connected(**certificates.client())
        callers = Callers(bus, "before")
        await callers.more(500)

        # both authorities are trusted, and what is shown expires soon
        expiring = dt.datetime.now(dt.UTC) + SHORT
        (own / "ca.crt").write_bytes(old_ca + new_ca)
        short = old.issue("ifabric", client=True, not_after=expiring)
        short.write(own, "ifabric")
        short.write(caller, "short")
        old.issue("http", HOSTS, not_after=expiring).write(own, "http")
        old.issue("server", HOSTS, not_after=expiring).write(certificates.folder, "server")
        await hup(1)

        # certificates of the new authority, before the short ones expire, and while they do
        new.issue("server", HOSTS).write(certificates.folder, "server")  # etcd shows it from now on
        os.kill(nats.members[0].pid, signal.SIGHUP)  # and NATS when it is told
        fresh = new.issue("http", HOSTS)
        new.issue("ifabric", client=True).write(own, "ifabric")
        fresh.write(own, "http")
        await hup(2)
        assert await shown(daemon.found.http) == serial(fresh)
        while dt.datetime.now(dt.UTC) <= expiring:
            await callers.more(100)
        await callers.more(300)

        # what cannot be used changes nothing
        (own / "http.key").write_bytes(b"half a key")
        daemon.signal(signal.SIGHUP)
        await counted("http", 1, "failed")
        assert await shown(daemon.found.http) == serial(fresh)

        # the new authority alone, and nobody tells the daemon
        before = await daemon.metric("if_certificate_reloads_total", part="etcd", outcome="done")
        fresh = new.issue("http", HOSTS)
        fresh.write(own, "http")
        (own / "ca.crt").write_bytes(new_ca)
        for part in ("etcd", "nats"):
            await counted(part, before + 1)
        await callers.more(300)
        await callers.stop()
        async with asyncio.timeout(60):
            while await shown(daemon.found.http) != serial(fresh):
                await asyncio.sleep(0.05)

        # so do the servers, and forget all that they knew
        trusted.write_bytes(new_ca)
        await bus.close()
        for members in (etcd, nats):
            await members.stop()
            await members.start()
        async with asyncio.timeout(60):
            while (await daemon.ready())[0] != 200:
                await asyncio.sleep(0.05)
        new.issue("caller", client=True).write(caller, "caller")
        theirs = {"ca_cert": str(trusted), "cert_file": f"{caller}/caller.crt", "key_file": f"{caller}/caller.key"}
        callers = Callers(await connected(**theirs), "after", 8)
        await callers.more(200)
        await callers.stop()
        gone = {**theirs, "cert_file": f"{caller}/short.crt", "key_file": f"{caller}/short.key"}
        for refused in (
            Etcd(EtcdSettings(endpoints=tuple(etcd.urls), **gone), CLOCK),  # type: ignore[arg-type]
            Nats(NatsSettings(servers=tuple(nats.urls), **gone), CLOCK),  # type: ignore[arg-type]
        ):
            with pytest.raises(FabricError, match=f"refused our certificate .*valid until {expiring:%Y-%m-%d %H:%M}"):
                await refused.connect()
        assert "Traceback" not in daemon.log_text()
