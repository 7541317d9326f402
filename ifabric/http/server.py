"""The HTTP port: uvicorn and starlette, inside the daemon's loop; https when it is given a certificate.

/livez              200 while the event loop turns
/readyz             200 when requests can be served, else 503 with what is missing
/health, /healthz   the whole state; 503 unless healthy or merely degraded
/metrics            for Prometheus
/playbooks/         what to do when something is wrong
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence

import uvicorn
from msgspec.json import encode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ifabric.config_base import MetricsPort
from ifabric.config_ops import Http
from ifabric.errors import StartupError
from ifabric.http import playbooks
from ifabric.http.health import Status
from ifabric.metrics import CONTENT_TYPE, Metrics
from ifabric.tls import Files, ServerTls, fingerprint

JSON = "application/json"
#: a peer that takes nothing of what it is sent for so long is given up, in milliseconds
STALLED_MS = 20_000
#: connections of one port. When one more comes, who has waited longest without asking for something is hung up on: what
#: a process may open is not for them alone, and whoever asks for the daemon's health is to be answered.
CONNECTIONS_MAX = 512
#: who has not said by then what they want is hung up on, in seconds
REQUEST_S = 15.0


class HttpServer:
    """Serves health and metrics; the same metrics on each component's `metrics.port` as well. The coordinator's settings
    are those of the HTTP port.
    """

    def __init__(
        self,
        http: Http,
        ports: Mapping[str, MetricsPort],
        status: Status,
        metrics: Metrics,
        more: Sequence[BaseRoute] = (),
    ) -> None:
        self._http = http
        self._more = more
        self._ports = ports
        self._status = status
        self._metrics = metrics
        self._servers: list[tuple[_Server, asyncio.Task[None]]] = []
        self._tls: ServerTls | None = None
        #: where it listens, once started
        self.url = ""
        #: the SHA-256 of its certificate, in hex; "" without TLS
        self.pin = ""

    async def start(self) -> None:
        """Listens. `StartupError` names an address that is taken, `ConfigError` a certificate that is none."""
        if self._http.cert_file is not None:
            self._tls = ServerTls(self.files)
            self.pin = fingerprint(self._http.cert_file)
        routes: list[BaseRoute] = [
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/health", self._health),
            Route("/healthz", self._health),
            *playbooks.routes(),
        ]
        shared = self._ports["coordinator"]
        port = await self._listen(self._http.port, [*routes, *self._scraped(shared), *self._more])
        host = self._http.host
        scheme = "https" if self._tls is not None else "http"
        self.url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        taken = {self._http.port}
        for component, wanted in self._ports.items():
            if wanted.enabled and wanted.port is not None and (wanted.port == 0 or wanted.port not in taken):
                taken.add(wanted.port)
                await self._listen(wanted.port, self._scraped(wanted), f"{component}.metrics.port")

    @property
    def files(self) -> Files:
        """Its certificates."""
        http = self._http
        return Files(
            section="http",
            ca_cert=http.client_ca,
            cert_file=http.cert_file,
            key_file=http.key_file,
            ca_key="client_ca",
        )

    async def reload(self) -> None:
        """The certificates as they are now, for new connections. Raises `ConfigError`, and nothing has changed then."""
        if self._tls is not None and self._http.cert_file is not None:
            pin = fingerprint(self._http.cert_file)
            self._tls.reload()
            self.pin = pin

    def _scraped(self, wanted: MetricsPort) -> list[Route]:
        return [Route(path, self._scrape) for path in {"/metrics", wanted.path}] if wanted.enabled else []

    async def _listen(self, port: int, routes: Sequence[BaseRoute], key: str = "http.port") -> int:
        host = self._http.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            await self.stop()
            raise StartupError(
                f"cannot listen on {host}:{port}: {error.strerror}. Set {key} (0: any free one) or stop who has it."
            ) from None
        tls = self._tls
        config = uvicorn.Config(
            Starlette(routes=routes),
            lifespan="off",
            log_config=None,
            access_log=False,
            http=_Connection,
            ws="none",
            timeout_graceful_shutdown=1,
            ssl_context_factory=None if tls is None else lambda *_: tls.context,
        )
        server = _Server(config)
        task = asyncio.create_task(server.serve([listener]), name="http")
        self._servers.append((server, task))
        while not server.started and not task.done():
            await asyncio.sleep(0.002)
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Lets requests under way finish, for a second."""
        servers, self._servers = self._servers, []
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in servers), return_exceptions=True)

    async def _livez(self, _: Request) -> Response:
        return Response(b"ok\n", media_type="text/plain")

    async def _readyz(self, _: Request) -> Response:
        missing = self._status.snapshot().not_ready
        body = encode({"ready": not missing, "not_ready": missing})
        return Response(body, 503 if missing else 200, media_type=JSON)

    async def _health(self, _: Request) -> Response:
        snapshot = self._status.snapshot()
        return Response(encode(snapshot), 200 if snapshot.status in ("healthy", "degraded") else 503, media_type=JSON)

    async def _scrape(self, _: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)


class _Server(uvicorn.Server):
    """uvicorn, but the signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """uvicorn's, for peers that may be hostile. It takes this one and no faster one that may be installed, since this
    one's requests have a greatest size.
    """

    waits_since = 0.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        self._due = self.loop.call_later(REQUEST_S, self._look)
        if len(self.connections) > CONNECTIONS_MAX:
            idle = [one for one in self.connections if isinstance(one, _Connection) and one.is_idle]
            min(idle, key=lambda one: (one is self, one.waits_since)).transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether a request is waited for, and none is being answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def on_response_complete(self) -> None:
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Whether a request is being answered, or how long one is waited for."""
        waited_s = self.loop.time() - self.waits_since
        if self.is_idle and waited_s >= REQUEST_S:
            self.transport.abort()
            return
        self._due = self.loop.call_later(REQUEST_S - waited_s if self.is_idle else REQUEST_S, self._look)
