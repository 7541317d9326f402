"""TLS to etcd, NATS and the HTTP port: each thing that can be wrong has words of its own, in time."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cli.daemon import HttpTls, ask
from ifabric.clock import SystemClock, monotonic
from ifabric.config_base import MetricsPort
from ifabric.config_ops import Http
from ifabric.endpoints import Endpoints
from ifabric.errors import FabricError, Unreachable
from ifabric.http.health import Snapshot
from ifabric.http.server import HttpServer
from ifabric.metrics import Metrics
from ifabric.pki import Authority, Pair
from ifabric.programs import find_etcd, find_nats_server
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.clusters import HOSTS, Certificates, etcd_cluster, nats_cluster
from ifabric.testing.servers import RealServer, etcd_server, nats_server
from tests.conftest import needed

CLOCK = SystemClock()
#: the timeout to connect; what has certainly failed says so far earlier
CONNECT_S = 20.0
DAY = dt.timedelta(days=1)


def long_ago() -> dt.datetime:
    return dt.datetime.now(dt.UTC) - 10 * DAY


def in_a_week() -> dt.datetime:
    return dt.datetime.now(dt.UTC) + 7 * DAY


@dataclass
class Side:
    """One kind of server: how it is given another certificate, and what connecting to it raises."""

    certificates: Certificates
    url: str
    connect: Callable[[dict[str, str]], object]
    renew: Callable[[], object]

    async def serves(self, pair: Pair) -> None:
        pair.write(self.certificates.folder, "server")
        await self.renew()  # type: ignore[misc]

    async def said(self, files: dict[str, str]) -> str:
        """The error of connecting with these files, which must come before the connect timeout."""
        began = monotonic()
        with pytest.raises(Unreachable) as caught:
            async with asyncio.timeout(2 * CONNECT_S):  # some failures would never end
                await self.connect(files)  # type: ignore[misc]
        assert monotonic() - began < CONNECT_S
        return str(caught.value)


async def nothing() -> None:
    """etcd reads its certificate at every handshake."""


@contextlib.asynccontextmanager
async def etcd_side(certificates: Certificates) -> AsyncIterator[Side]:
    with needed("etcd"):
        find_etcd()
    async with etcd_cluster(1, certificates=certificates) as members:
        yield Side(certificates, members.urls[0], to_etcd(members.urls[0]), nothing)


def to_etcd(*urls: str) -> Callable[[dict[str, str]], object]:
    async def connect(files: dict[str, str]) -> None:
        etcd = Etcd(EtcdSettings(endpoints=urls, timeout_s=CONNECT_S, **files), CLOCK)  # type: ignore[arg-type]
        try:
            await etcd.connect()
            await etcd.health()
        finally:
            await etcd.close()

    return connect


@contextlib.asynccontextmanager
async def nats_side(certificates: Certificates) -> AsyncIterator[Side]:
    with needed("nats-server"):
        find_nats_server()
    async with nats_cluster(1, certificates=certificates, verify=True) as members:
        server = members.members[0]

        async def again() -> None:
            await server.stop()
            await server.start_again()

        yield Side(certificates, members.urls[0], to_nats(members.urls[0]), again)


def to_nats(*urls: str) -> Callable[[dict[str, str]], object]:
    async def connect(files: dict[str, str]) -> None:
        bus = Nats(NatsSettings(servers=urls, connect_timeout_s=CONNECT_S, **files), CLOCK)  # type: ignore[arg-type]
        await bus.connect()
        await bus.close()

    return connect


class Fine:
    """A daemon that is well."""

    def snapshot(self) -> Snapshot:
        return Snapshot(status="healthy", etcd="connected", nats="connected", loop_lag_s=0, version="1", uptime_s=1)


@contextlib.asynccontextmanager
async def http_side(certificates: Certificates) -> AsyncIterator[Side]:
    files = {"cert_file": certificates.path("server.crt"), "key_file": certificates.path("server.key")}
    http = Http(host="127.0.0.1", port=0, client_ca=certificates.path("ca.crt"), **files)
    server = HttpServer(http, {"coordinator": MetricsPort()}, Fine(), Metrics())
    await server.start()
    try:
        yield Side(certificates, server.url, to_http(server.url), server.reload)
    finally:
        await server.stop()


def to_http(url: str, pin: str = "") -> Callable[[dict[str, str]], object]:
    found = Endpoints(nats="", etcd=(), http=url, http_pin=pin, pid=1, version="1")

    async def connect(files: dict[str, str]) -> None:
        tls = HttpTls(files.get("ca_cert"), files.get("cert_file"), files.get("key_file"))
        assert await asyncio.to_thread(ask, found, "/livez", CONNECT_S, tls) == b"ok\n"

    return connect


SIDES = {"etcd": etcd_side, "nats": nats_side, "http": http_side}


@pytest.fixture(scope="module", params=SIDES)
async def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Side]:
    """One server of each kind for the whole file."""
    async with SIDES[request.param](Certificates(tmp_path_factory.mktemp(request.param))) as made:
        yield made


@pytest.fixture
async def side(running: Side) -> Side:
    """It, with its own certificate, which whoever has taken it away brings back."""
    await running.connect(running.certificates.client())  # type: ignore[misc]
    return running


async def test_what_is_wrong_with_a_servers_certificate_is_named(side: Side) -> None:
    """Expired, not yet valid, for another host, of another authority, and one for clients."""
    files, authority = side.certificates.client(), side.certificates.authority
    await side.serves(authority.issue("server", HOSTS, days=1, not_before=long_ago()))
    assert f"its certificate (server) expired on {long_ago() + DAY:%Y-%m-%d}" in await side.said(files)
    await side.serves(authority.issue("server", HOSTS, not_before=in_a_week()))
    assert f"its certificate (server) is not valid before {in_a_week():%Y-%m-%d}" in await side.said(files)
    await side.serves(authority.issue("server", ["elsewhere.test", "192.0.2.7"]))
    assert "is for elsewhere.test, 192.0.2.7 and not for 127.0.0.1" in await side.said(files)
    await side.serves(authority.issue("127.0.0.1"))
    assert "is for no host (its common name does not count) and not for 127.0.0.1" in await side.said(files)
    await side.serves(Authority.create("Other CA").issue("server", HOSTS))
    assert f"is signed by Other CA, and not by an authority that {files['ca_cert']} has" in await side.said(files)
    await side.serves(Authority.create("InfraFabric test CA").issue("server", HOSTS))  # the same name, another key
    assert "is signed by InfraFabric test CA, and not by an authority that" in await side.said(files)
    await side.serves(authority.issue("server", HOSTS, client=True))
    assert "is one for clients and not for servers" in await side.said(files)
    await side.serves(authority.issue("server", HOSTS))
    await side.connect(files)  # type: ignore[misc]


async def test_what_a_server_has_against_a_clients_certificate_is_named(side: Side) -> None:
    """None, one of another authority, one that has expired, and one for servers."""
    certificates, files = side.certificates, side.certificates.client()
    assert "demands a client certificate, and none is configured" in await side.said({"ca_cert": files["ca_cert"]})

    async def said(pair: Pair) -> str:
        one, key = pair.write(certificates.folder, "given")
        return await side.said({**files, "cert_file": str(one), "key_file": str(key)})

    refused = f"refused our certificate {certificates.path('given.crt')} "
    sentence = await said(Authority.create("Other CA").issue("ifabric", client=True))
    assert f"{refused}(ifabric, signed by Other CA, valid until" in sentence
    assert "not" in sentence.partition("valid until")[2]
    assert "one that the server trusts" in sentence
    sentence = await said(certificates.authority.issue("ifabric", client=True, days=1, not_before=long_ago()))
    assert f"{refused}(ifabric" in sentence
    assert f"valid until {long_ago() + DAY:%Y-%m-%d}" in sentence
    assert refused in await said(certificates.authority.issue("ifabric", HOSTS, server=True))


async def test_a_certificate_of_nobody_known_is_signed_by_none_of_the_systems_authorities(side: Side) -> None:
    """Without ca_cert. On the HTTP port the certificate itself is known, by endpoints.json."""
    if side.url.startswith("https") and side.renew is not nothing:
        assert "does not show the certificate that endpoints.json names" in await side.said({})
        return
    assert (
        "is signed by InfraFabric test CA, which is none of the system's authorities: set ca_cert"
        in await side.said({})
    )


async def test_plain_and_tls_do_not_meet_in_silence(side: Side) -> None:
    """A plain client at a port with TLS, unless the port says so itself, as NATS does."""
    plain = side.url.replace("https://", "http://")
    if plain == side.url:
        assert "system's authorities" in await Side(
            side.certificates, plain, to_nats(plain.replace("tls://", "nats://")), nothing
        ).said({})
        return
    connect = to_http(plain) if side.renew is not nothing else to_etcd(plain)
    assert f"speaks TLS on port {plain.rpartition(':')[2]}: write https:// instead of http://" in await Side(
        side.certificates, plain, connect, nothing
    ).said({})


async def test_a_port_without_tls_is_named_and_nothing_is_sent_in_the_clear(tmp_path: Path) -> None:
    files = Certificates(tmp_path).client()
    async with contextlib.AsyncExitStack() as closing:
        with needed("etcd and nats-server"):
            etcd: RealServer = await closing.enter_async_context(etcd_server())
            nats: RealServer = await closing.enter_async_context(nats_server())
        server = HttpServer(Http(host="127.0.0.1", port=0), {"coordinator": MetricsPort()}, Fine(), Metrics())
        await server.start()
        closing.push_async_callback(server.stop)
        https = server.url.replace("http://", "https://")
        for url, connect in (
            (etcd.url.replace("http://", "https://"), to_etcd),
            (nats.url.replace("nats://", "tls://"), to_nats),
            (nats.url, to_nats),  # certificates are given: that is a wish for TLS
            (https, to_http),
        ):
            sentence = await Side(Certificates(tmp_path), url, connect(url), nothing).said(files)
            assert f"speaks no TLS on port {url.rpartition(':')[2]}" in sentence


async def test_tls_before_1_3_is_not_spoken(tmp_path: Path) -> None:
    """gRPC would take 1.2 by itself, and nats-py too."""
    certificates = Certificates(tmp_path)
    with needed("etcd and nats-server"):
        find_etcd(), find_nats_server()
    old = ("--tls-min-version=TLS1.2", "--tls-max-version=TLS1.2")
    async with etcd_cluster(1, certificates=certificates, arguments=old) as members:
        sentence = await Side(certificates, "", to_etcd(*members.urls), nothing).said(certificates.client())
        assert "does not offer TLS 1.3" in sentence
    for greeting, scheme, connect in ((b'INFO {"tls_required":true}\r\n', "tls", to_nats), (b"", "https", to_http)):
        with speaking_tls_1_2(certificates, greeting) as port:
            url = f"{scheme}://127.0.0.1:{port}"
            sentence = await Side(certificates, url, connect(url), nothing).said(certificates.client())
            assert "does not offer TLS 1.3" in sentence


@contextlib.contextmanager
def speaking_tls_1_2(certificates: Certificates, greeting: bytes) -> Iterator[int]:
    """The port of a server that speaks nothing newer, and answers nothing: only handshakes count."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.path("server.crt"), certificates.path("server.key"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the test is over
            with connection, contextlib.suppress(OSError):
                connection.sendall(greeting)
                context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        serving.join()


async def test_a_client_of_the_http_port_speaks_tls_1_3_or_nothing(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    async with http_side(certificates) as side:
        context = ssl.create_default_context(cafile=certificates.path("ca.crt"))
        context.load_cert_chain(certificates.path("ifabric.crt"), certificates.path("ifabric.key"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        url = urlsplit(side.url)

        def shake_hands() -> None:
            with socket.create_connection((url.hostname, url.port), timeout=CONNECT_S) as plain:
                context.wrap_socket(plain, server_hostname=url.hostname).close()

        with pytest.raises(OSError, match="(?i)alert|eof|reset"):
            await asyncio.to_thread(shake_hands)


async def test_a_tls_connection_to_nats_ends_in_silence(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Whoever hangs up: the loop would warn that the stream wants to go on, in every log and at every verb's end."""
    certificates = Certificates(tmp_path)
    async with nats_side(certificates) as side:
        bus = Nats(NatsSettings(servers=(side.url,), **certificates.client()), CLOCK)  # type: ignore[arg-type]
        await bus.connect()
        await side.renew()  # type: ignore[misc]
        async with asyncio.timeout(CONNECT_S):
            while not bus.reconnects:
                await asyncio.sleep(0.02)
        await bus.close()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_one_endpoint_with_a_bad_certificate_is_warned_of_and_the_others_serve(tmp_path: Path) -> None:
    good, bad = Certificates(tmp_path / "good"), Certificates(tmp_path / "bad")
    for name in ("ca.crt", "ca.key"):
        shutil.copy(good.folder / name, bad.folder / name)
    bad.authority = good.authority
    bad.authority.issue("server", HOSTS, days=1, not_before=long_ago()).write(bad.folder, "server")
    with needed("etcd"):
        find_etcd()
    async with etcd_cluster(1, certificates=good) as one, etcd_cluster(1, certificates=bad) as other:
        settings = EtcdSettings(endpoints=(*other.urls, *one.urls), timeout_s=CONNECT_S, **good.client())  # type: ignore[arg-type]
        etcd = Etcd(settings, CLOCK)
        await etcd.connect()
        assert etcd.channel.endpoint == one.urls[0]
        sentences = await etcd.examine()
        await etcd.close()
    assert len(sentences) == 1
    assert f"etcd {other.urls[0]}: its certificate (server) expired on" in sentences[0]


async def test_a_common_name_that_is_no_user_of_etcd_is_named(tmp_path: Path) -> None:
    """For NATS and HTTP a common name means nothing: who has a certificate of the authority is let in."""
    certificates = Certificates(tmp_path)
    async with etcd_side(certificates) as side:
        await etcdctl(certificates, side.url, "user", "add", "root", "--no-password")
        await etcdctl(certificates, side.url, "user", "grant-role", "root", "root")
        await etcdctl(certificates, side.url, "auth", "enable")
        with pytest.raises(FabricError, match="stranger") as caught:
            await side.connect(certificates.client("stranger"))  # type: ignore[misc]
        assert caught.value.code == "forbidden"
        await side.connect(certificates.client("root"))  # type: ignore[misc]
    for made in (nats_side, http_side):
        async with made(certificates) as side:
            await side.connect(certificates.client("stranger"))  # type: ignore[misc]


async def etcdctl(certificates: Certificates, url: str, *words: str) -> None:
    program = Path(find_etcd().path).with_name("etcdctl")
    files = certificates.client("root")
    process = await asyncio.create_subprocess_exec(
        str(program),
        f"--endpoints={url}",
        f"--cacert={files['ca_cert']}",
        f"--cert={files['cert_file']}",
        f"--key={files['key_file']}",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said
