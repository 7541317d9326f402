"""TLS as an operator meets it: the daemon's process, its log, and `ifabric status`."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from ifabric import endpoints
from ifabric.embedded import free_port
from ifabric.pki import Authority
from ifabric.programs import find_etcd, find_nats_server
from ifabric.testing.clusters import HOSTS, Certificates, etcd_cluster, nats_cluster
from ifabric.testing.daemons import RealDaemon
from tests.conftest import needed
from tests.system.conftest import eventually

#: daemons of their own, exchanged certificates
pytestmark = pytest.mark.slow

DAY = dt.timedelta(days=1)


def long_ago() -> dt.datetime:
    return dt.datetime.now(dt.UTC) - 10 * DAY


class Secured:
    """A daemon with TLS on every side. The first endpoint of its etcd shows a certificate that has expired."""

    def __init__(
        self, folder: Path, certificates: Certificates, daemon: RealDaemon, expired: str, metrics: int
    ) -> None:
        self.folder, self.certificates, self.daemon = folder, certificates, daemon
        self.expired, self.metrics = expired, metrics

    async def status(self, state_dir: Path | None = None) -> tuple[int, str, str]:
        """What `ifabric status` of this daemon says: exit code, stdout, stderr. It is not told how to know the daemon."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("IFABRIC_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ifabric", "status", "--json", "--timeout", "30"),
            *("--state-dir", str(state_dir or self.folder)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**kept, "IFABRIC_CA": self.certificates.path("ca.crt")},  # NATS is known by its authority
        )
        said, complained = await process.communicate()
        return process.returncode or 0, said.decode(), complained.decode()


@pytest.fixture(scope="module")
async def secured(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Secured]:
    """One for the file."""
    base = tmp_path_factory.mktemp("daemon")
    certificates, folder, metrics = Certificates(base / "servers"), base / "state", free_port()
    late, key = certificates.authority.issue("late", HOSTS, days=1, not_before=long_ago()).write(base, "late")
    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shows.load_cert_chain(late, key)
    with needed("etcd and nats-server"):
        find_etcd(), find_nats_server()
    async with (
        etcd_cluster(1, certificates=certificates) as etcd,
        nats_cluster(1, certificates=certificates) as nats,
        await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=shows) as impostor,
    ):
        expired = f"https://127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
        certificates.authority.issue("http", HOSTS).write(base, "http")
        config = {
            "coordinator": {"etcd": certificates.client()},
            "governor": {"metrics": {"enabled": True, "port": metrics}},
            "nats": certificates.client(),
            "http": {"cert_file": str(base / "http.crt"), "key_file": str(base / "http.key")},
        }
        daemon = RealDaemon(folder, [expired, *etcd.urls], nats.urls, config)
        try:
            await daemon.start(within_s=60)
            yield Secured(folder, certificates, daemon, expired, metrics)
        finally:
            await daemon.close()


async def test_status_knows_an_https_daemon_by_the_pin_and_says_nothing_to_another(
    secured: Secured, tmp_path: Path
) -> None:
    """Also when the daemon has exchanged its certificate."""
    found = endpoints.read(secured.folder)
    assert found is not None
    assert found.http.startswith("https://")
    code, said, complained = await secured.status()
    assert (code, complained) == (0, "")
    assert msgspec.json.decode(said)["health"]["status"] == "healthy"

    endpoints.write(tmp_path, msgspec.structs.replace(found, http_pin="0" * 64))
    code, said, complained = await secured.status(tmp_path)
    assert code == 3
    assert "does not show the certificate that endpoints.json names" in said
    assert "healthy" not in said

    secured.certificates.authority.issue("http", HOSTS).write(secured.folder.parent, "http")
    secured.daemon.signal(signal.SIGHUP)

    async def another() -> bool:
        now = endpoints.read(secured.folder)
        return now is not None and now.http_pin != found.http_pin

    await eventually(another, 60)
    code, said, complained = await secured.status()
    assert (code, complained) == (0, ""), said


async def test_an_endpoint_with_a_bad_certificate_is_a_warning_in_the_log_and_in_the_health(secured: Secured) -> None:
    sentence = f"etcd {secured.expired}: its certificate (late) expired on {long_ago() + DAY:%Y-%m-%d}"
    warned = [line for line in secured.daemon.log() if line["event"].startswith(sentence)]
    assert [line["level"] for line in warned] == ["warning"]
    assert any(warning.startswith(sentence) for warning in (await secured.daemon.health())["warnings"])


async def test_a_components_own_metrics_port_is_https_as_well(secured: Secured) -> None:
    trusts = ssl.create_default_context(cafile=secured.certificates.path("ca.crt"))
    assert b"if_" in await asyncio.to_thread(answered, secured.metrics, b"GET /metrics HTTP/1.0\r\n\r\n", trusts)
    assert b"if_" not in await asyncio.to_thread(answered, secured.metrics, b"GET /metrics HTTP/1.0\r\n\r\n", None)


def answered(port: int, said: bytes, tls: ssl.SSLContext | None) -> bytes:
    """All that comes back until the connection ends or breaks. By hand: the loop keeps a broken handshake open."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain, contextlib.suppress(OSError):
        connection = tls.wrap_socket(plain, server_hostname="127.0.0.1") if tls is not None else plain
        with connection:
            connection.sendall(said)
            while more := connection.recv(65_536):
                found += more
    return found


async def test_strangers_at_the_https_port_fill_no_log(secured: Secured) -> None:
    """Plain HTTP, noise, half a handshake, TLS 1.2, who does not trust the certificate, who hangs up in the middle."""
    assert secured.daemon.found is not None
    port = int(secured.daemon.found.http.rpartition(":")[2])
    before, request = secured.daemon.log_text(), b"GET /livez HTTP/1.0\r\n\r\n"
    old = ssl.create_default_context(cafile=secured.certificates.path("ca.crt"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for said, tls in (
        (request, None),
        (b"\x16\x03\x01\xff\xff noise" * 50, None),
        (request, old),
        (request, ssl.create_default_context()),
    ):
        assert await asyncio.to_thread(answered, port, said, tls) == b""
    for half in (b"", b"\x16\x03\x01\x02\x00\x01"):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(half)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
    assert b"ok" in await asyncio.to_thread(answered, port, request, secured.daemon.http_tls)
    assert secured.daemon.log_text() == before


async def test_a_daemon_with_certificate_files_that_cannot_be_used_exits_2_and_names_them(tmp_path: Path) -> None:
    """Before it connects to anything: there are no servers here."""
    good, bad = Certificates(tmp_path), tmp_path / "bad"
    good.authority.issue("late", client=True, days=1, not_before=long_ago()).write(bad, "late")
    Authority.create("Other CA").issue("http", HOSTS).write(bad, "http")
    late = {"cert_file": str(bad / "late.crt"), "key_file": str(bad / "late.key")}
    etcd, nats = [f"https://127.0.0.1:{free_port()}"], [f"tls://127.0.0.1:{free_port()}"]
    dates = f"(late) expired on {long_ago() + DAY:%Y-%m-%d %H:%M} UTC, and it is {dt.datetime.now(dt.UTC):%Y-%m-%d}"

    async def refused(name: str, config: dict[str, object]) -> str:
        daemon = RealDaemon(tmp_path / name, etcd, nats, config)
        await daemon.start(ready=False)
        assert await daemon.wait() == 2, daemon.log_text()
        assert "Traceback" not in daemon.log_text()
        return daemon.log_text()

    of_etcd, of_nats, of_http = await asyncio.gather(
        refused("etcd", {"coordinator": {"etcd": {**good.client(), **late}}}),
        refused("nats", {"nats": {**good.client(), "ca_cert": str(bad / "nothing.crt")}}),
        refused("http", {"http": {"cert_file": good.path("server.crt"), "key_file": str(bad / "http.key")}}),
    )
    assert f"coordinator.etcd.cert_file: the certificate in {bad}/late.crt {dates}" in of_etcd
    assert f"nats.ca_cert: cannot read {bad}/nothing.crt: No such file" in of_nats
    assert f"http.key_file: the key in {bad}/http.key does not belong to the certificate in {good.path('server.crt')}" in of_http  # fmt: skip
