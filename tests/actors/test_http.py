"""What the HTTP port says, over a real port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Self

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ifabric.cancellation import cancel_and_wait
from ifabric.config import Http, MetricsPort
from ifabric.embedded import free_port
from ifabric.errors import StartupError
from ifabric.http import server as http_server
from ifabric.http.health import Snapshot
from ifabric.http.server import HttpServer
from ifabric.metrics import Metrics
from ifabric.testing.harness import no_tasks_left

DEFAULT = MetricsPort()
HEALTHY = Snapshot(
    status="healthy", etcd="connected", nats="connected", loop_lag_s=0.001, version="1.2.3", uptime_s=5.0
)
STATES = {
    "starting": msgspec.structs.replace(HEALTHY, status="starting", not_ready=("bus is not running",)),
    "healthy": HEALTHY,
    "degraded": msgspec.structs.replace(HEALTHY, status="degraded", etcd="disconnected", not_ready=("etcd is gone",)),
    "draining": msgspec.structs.replace(HEALTHY, status="draining", not_ready=("draining",)),
}


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


class Told:
    """A status that a test sets."""

    def __init__(self) -> None:
        self.now = HEALTHY

    def snapshot(self) -> Snapshot:
        return self.now


class Served:
    """A server, its status and its metrics."""

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        metrics: MetricsPort = DEFAULT,
        governor: MetricsPort = DEFAULT,
    ) -> None:
        self.told = Told()
        self.metrics = Metrics()
        self.server = HttpServer(
            Http(host=host, port=port), {"coordinator": metrics, "governor": governor}, self.told, self.metrics
        )

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()

    async def ask(self, path: str, method: str = "GET", url: str = "") -> httpx.Response:
        # verify: it is http, and reading certificates takes longer than all the rest
        async with httpx.AsyncClient(base_url=url or self.server.url, trust_env=False, verify=False) as client:
            return await client.request(method, path)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served() as made:
        yield made


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("status", "livez", "readyz", "health"),
    [("starting", 200, 503, 503), ("healthy", 200, 200, 200), ("degraded", 200, 503, 200), ("draining", 200, 503, 503)],
)
async def test_each_state_has_its_codes(served: Served, status: str, livez: int, readyz: int, health: int) -> None:
    served.told.now = STATES[status]
    codes = [(await served.ask(path)).status_code for path in ("/livez", "/readyz", "/health", "/healthz", "/metrics")]
    assert codes == [livez, readyz, health, health, 200]


async def test_readyz_says_what_is_missing(served: Served) -> None:
    served.told.now = msgspec.structs.replace(HEALTHY, not_ready=("etcd is disconnected", "bus is not running"))
    answer = await served.ask("/readyz")
    assert answer.json() == {"ready": False, "not_ready": ["etcd is disconnected", "bus is not running"]}
    served.told.now = HEALTHY
    assert (await served.ask("/readyz")).json() == {"ready": True, "not_ready": []}


async def test_health_is_the_whole_state_as_json(served: Served) -> None:
    served.told.now = msgspec.structs.replace(HEALTHY, warnings=("old etcd",), actors={"name": "fabric"})
    for path in ("/health", "/healthz"):
        answer = await served.ask(path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.content == msgspec.json.encode(served.told.now)
        assert answer.json()["warnings"] == ["old etcd"]


async def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    served.metrics.gauge("if_bus_connected").set(1)
    answer = await served.ask("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["if_bus_connected"].samples[0].value == 1


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics"])
async def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    get, head = await served.ask(path), await served.ask(path, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", ["/", "/nothing", "/livez/deeper", "/metrics/../../etc/passwd", "/%00", "//"])
async def test_what_is_not_there_is_not_found(served: Served, path: str) -> None:
    assert (await served.ask(path)).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_nothing_can_be_done_over_http(served: Served, method: str) -> None:
    assert (await served.ask("/health", method)).status_code == 405


async def test_the_metrics_path_can_be_set_and_the_usual_one_stays() -> None:
    async with Served(metrics=MetricsPort(path="/probe/metrics")) as served:
        assert [(await served.ask(path)).status_code for path in ("/probe/metrics", "/metrics")] == [200, 200]


async def test_metrics_can_be_switched_off() -> None:
    async with Served(metrics=MetricsPort(enabled=False)) as served:
        assert [(await served.ask(path)).status_code for path in ("/metrics", "/livez")] == [404, 200]


async def test_metrics_can_have_a_port_of_their_own_and_nothing_else_is_on_it() -> None:
    port = free_port()
    async with Served(metrics=MetricsPort(port=port)) as served:
        own = f"http://127.0.0.1:{port}"
        codes = [(await served.ask(path, url=url)).status_code for url in (own, "") for path in ("/metrics", "/health")]
    assert codes == [200, 404, 200, 200]


async def test_each_component_can_have_a_port_for_the_same_metrics_and_one_port_may_be_both() -> None:
    port, other = free_port(), free_port()
    async with Served(metrics=MetricsPort(port=port), governor=MetricsPort(port=other, path="/gov")) as served:
        for path in ("/metrics", "/gov"):
            assert (await served.ask(path, url=f"http://127.0.0.1:{other}")).status_code == 200
        assert (await served.ask("/gov", url=f"http://127.0.0.1:{port}")).status_code == 404
    async with Served(metrics=MetricsPort(port=port), governor=MetricsPort(port=port)) as served:
        assert (await served.ask("/metrics", url=f"http://127.0.0.1:{port}")).status_code == 200
    async with Served(metrics=MetricsPort(enabled=False), governor=MetricsPort(port=other)) as served:
        assert (await served.ask("/metrics", url=f"http://127.0.0.1:{other}")).status_code == 200
        assert (await served.ask("/metrics")).status_code == 404


@pytest.mark.parametrize("key", ["http.port", "coordinator.metrics.port"])
async def test_a_port_that_is_taken_is_named_with_the_key_that_sets_it(taken: int, key: str) -> None:
    served = Served(port=taken) if key == "http.port" else Served(metrics=MetricsPort(port=taken))
    async with no_tasks_left():
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{taken}: .*in use\. Set {key} \(0"):
            await served.server.start()


async def test_a_host_that_is_not_here_is_named() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await Served(host="192.0.2.1").server.start()


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
async def test_an_address_of_ipv6_makes_a_url_that_works() -> None:
    async with Served(host="::1") as served:
        assert served.server.url.startswith("http://[::1]:")
        assert (await served.ask("/livez")).status_code == 200


async def test_after_stop_the_port_is_free_and_start_begins_again() -> None:
    port = free_port()
    served = Served(port=port)
    async with no_tasks_left():
        for _ in range(3):
            async with served:
                assert served.server.url == f"http://127.0.0.1:{port}"
                assert (await served.ask("/livez")).text == "ok\n"
            with pytest.raises(httpx.ConnectError):
                await served.ask("/livez")
        await served.server.stop()


async def test_a_client_that_says_nothing_does_not_hold_up_the_end() -> None:
    served = Served()
    async with no_tasks_left():
        await served.server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.server.url.rpartition(":")[2]))
        writer.write(b"GET /livez HTTP/1.1\r\nHost:")
        async with asyncio.timeout(10):
            await served.server.stop()
        writer.close()
        assert await reader.read() == b""


async def hung_up(reader: asyncio.StreamReader) -> bool:
    """Whether the server has ended the connection, within 5 s."""
    try:
        async with asyncio.timeout(5):
            return not await reader.read(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ", b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"],
)
async def test_a_peer_that_never_says_what_it_wants_is_hung_up_on(
    served: Served, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is no request: whoever opens connections and leaves them so would take every file of the daemon."""
    monkeypatch.setattr(http_server, "REQUEST_S", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.server.url.rpartition(":")[2]))
    writer.write(said)
    dribbling = asyncio.create_task(dribble(writer))
    try:
        if said.startswith(b"POST"):
            await reader.readuntil(b"\r\n\r\nNot Found")  # it is answered; its body goes on
        assert await hung_up(reader)
    finally:
        await cancel_and_wait(dribbling)
        await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the server was first
        await writer.wait_closed()


async def dribble(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(0.05)
        writer.write(b"a")


async def test_a_port_has_so_many_connections_and_who_asks_for_nothing_makes_room(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 5)
    port = int(served.server.url.rpartition(":")[2])
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
    silent = {asyncio.create_task(hung_up(reader)) for reader, _ in opened}
    try:
        for left in (4, 3, 2):  # one for each who comes
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.append((reader, writer))
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            ended, silent = await asyncio.wait(silent, return_when=asyncio.FIRST_COMPLETED)
            assert [one.result() for one in ended] == [True]
            assert len(silent) == left
    finally:
        await cancel_and_wait(*silent)
        for _, writer in opened:
            await closed(writer)


async def test_a_client_that_keeps_its_connection_may_ask_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 0.3)
    async with httpx.AsyncClient(
        base_url=served.server.url, trust_env=False, limits=httpx.Limits(max_connections=1)
    ) as one:
        first = (await one.get("/livez")).extensions["network_stream"].get_extra_info("client_addr")
        for _ in range(8):
            await asyncio.sleep(0.1)
            answer = await one.get("/livez")
            assert answer.extensions["network_stream"].get_extra_info("client_addr") == first
