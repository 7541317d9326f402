"""The live page, on the daemon's HTTP port.

GET  /                        the page; its scripts and style below /page
GET  /api/stream              server-sent events: history, then what is new, every second
GET  /api/tasks, /api/task, /api/sessions, /api/accounts, /api/account, /api/breakers, /api/sandboxes, /api/modules
POST /api/actions/...         cancel, requeue, open, close, limit, kill

It is read-only but for who shows an operator's token. It asks over the bus and has no way of its own to what is true,
so it may be looked at on any daemon, whatever runs there; only its charts are that one daemon's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ifabric.audit.refusals import Refusals
from ifabric.bus.base import Bus
from ifabric.clock import Clock
from ifabric.config_ops import Http, Page
from ifabric.errors import FabricError, Forbidden, Internal, Overloaded, Unauthenticated
from ifabric.handling import Handling, Witness
from ifabric.http.health import Status
from ifabric.http.page.actions import ACTIONS, command_of
from ifabric.http.page.api import FRESH, QUESTIONS, answer, is_loopback, question, refusal, refuse_rebound, unknown
from ifabric.http.page.asking import ACTION_S, Asker
from ifabric.http.page.events import Events
from ifabric.http.page.history import History
from ifabric.http.page.live import Live
from ifabric.http.page.overview import Overview
from ifabric.http.page.shell import Shell
from ifabric.http.page.sse import Stream
from ifabric.http.page.tokens import Tokens
from ifabric.metrics import Metrics
from ifabric.wire.chassis import Kill

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: why somebody was not let in, as the metric has it
_WHY: Mapping[type[FabricError], str] = {Unauthenticated: "missing", Forbidden: "wrong", Overloaded: "limited"}


class LivePage:
    """A part of the daemon, whose life does not end by itself. `ConfigError` names the key of a token that is not good.

    `hosted`: what the configuration calls a resident -> its component. `waiting`: how many records of the audit wait;
    None where nothing is audited.
    """

    lost: asyncio.Future[str] | None = None

    def __init__(
        self,
        page: Page,
        http: Http,
        *,
        bus: Bus,
        metrics: Metrics,
        status: Status,
        clock: Clock,
        log: Any,
        hosted: Mapping[str, str],
        daemon: str,
        refusals: Refusals,
        lag_s: Callable[[], float],
        waiting: Callable[[], int] | None = None,
        witnesses: Sequence[Witness] = (),
    ) -> None:
        self._bus, self._clock, self._log, self._witnesses = bus, clock, log, witnesses
        self._tokens = Tokens(page, clock)
        #: a page of elsewhere cannot show a token, whatever name it has
        self._only_local = is_loopback(http.host) and not self._tokens.guarded
        self._asker = Asker(bus, clock)
        self._refused = {why: metrics.counter("if_page_refused_total", why=why) for why in _WHY.values()}
        history = History(metrics, clock, frozenset(hosted.values()), page.history_seconds, lag_s)
        overview = Overview(self._asker, metrics, status, clock, hosted, daemon, waiting)
        self._live = Live(history, overview, Events(bus), refusals, metrics, clock, log)
        self._shell = Shell()

    async def start(self) -> None:
        """Begins to keep the history."""
        await self._live.start()

    async def stop(self) -> None:
        """Ends every stream."""
        await self._live.stop()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the files of the tokens, as sentences."""
        return self._tokens.warnings

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """What the HTTP port serves of it."""
        return (
            *(Route(path, self._shell.serve) for path in self._shell.paths),
            Route("/api/stream", self._looked(self._stream)),
            *(Route(f"/api/{name}", self._looked(partial(self._ask, name))) for name in QUESTIONS),
            *(Route(f"/api/actions/{name}", partial(self._act, name), methods=["POST"]) for name in ACTIONS),
            Route("/api/{rest:path}", unknown, methods=list(METHODS)),
        )

    # -- looking ------------------------------------------------------------------------------------------------------

    def _looked(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """For who may look."""

        async def serve(request: Request) -> Response:
            try:
                if self._only_local:
                    refuse_rebound(request.headers.get("host", ""))
                try:
                    self._tokens.look(request.headers, _address(request))
                except FabricError as error:
                    self._not_let_in("view", error)
                    raise
                return await endpoint(request)
            except FabricError as error:
                return refusal(error)
            except Exception:
                self._log.exception("the live page has failed", path=request.url.path)
                return refusal(Internal("The page has a bug; nothing was done. It is logged.", what="page"))

        return serve

    async def _stream(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers=dict(FRESH))
        viewer = self._live.join()
        headers = {**FRESH, "Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        return Stream(viewer, self._live.leave, headers)

    async def _ask(self, name: str, request: Request) -> Response:
        return answer(await question(name, self._asker, request.query_params))

    # -- acting -------------------------------------------------------------------------------------------------------

    async def _act(self, name: str, request: Request) -> Response:
        try:
            try:
                operator = self._tokens.act(request.headers, _address(request))
            except FabricError as error:
                self._not_let_in(name, error)
                raise
            command = await command_of(name, request)
            waits = isinstance(command, Kill)  # until the run has ended
            asker = Asker(self._bus, self._clock, operator, ACTION_S)
            reply = await asker.ask(command, attempt_s=ACTION_S if waits else None)
            self._log.info("an operator acted from the page", action=name, operator=operator)
            return answer(reply)
        except FabricError as error:
            return refusal(error)
        except Exception:
            self._log.exception("the live page has failed", path=request.url.path)
            return refusal(Internal("The page has a bug; whether it was done is unknown. It is logged.", what="page"))

    def _not_let_in(self, verb: str, error: FabricError) -> None:
        """Counts it, and tells the witnesses: but for who has failed so often that nobody listens to them any more."""
        why = _WHY[type(error)]
        self._refused[why].inc()
        if why == "limited":
            return
        now = self._clock.monotonic()
        handling = Handling("page", verb, "", now, admin=verb != "view")
        handling.outcome, handling.error = "refused", error
        for witness in self._witnesses:
            witness(handling)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""
