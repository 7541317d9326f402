"""The whole process on one screen: connect, build the tree, start, wait, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ifabric import __version__, endpoints, log, programs, tracing
from ifabric.actor.base import Context, Parts
from ifabric.actor.pulse import Pulse
from ifabric.actor.runner import Runner
from ifabric.audit.auditor import Auditor
from ifabric.audit.refusals import Refusals
from ifabric.bus.nats import Nats
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock, SystemClock
from ifabric.config import Config
from ifabric.embedded import Server, StateLock, embedded_etcd, embedded_nats, writing
from ifabric.errors import FabricError, Unreachable
from ifabric.handling import Witness
from ifabric.http.health import Phase, Signs, Snapshot
from ifabric.http.page import LivePage
from ifabric.http.page.asking import unless_looking
from ifabric.http.server import HttpServer
from ifabric.loader import load
from ifabric.metrics import Metrics
from ifabric.notify import Notifier
from ifabric.settings import etcd_settings, metrics_ports, nats_settings, system_of
from ifabric.store.commit import Committer
from ifabric.store.etcd import Etcd
from ifabric.store.vitals import Vitals
from ifabric.supervision.spec import Branch, Budget, Child, Part, Strategy
from ifabric.supervision.supervisor import Supervisor
from ifabric.tls import Files
from ifabric.tls.reload import Refresh, Reloader, Used

DONE, FAILED, UNREACHABLE = 0, 1, 3


class Fabric:
    """One daemon."""

    def __init__(self, config: Config, state_dir: Path, clock: Clock, refresh: Refresh | None = None) -> None:
        self._config = msgspec.structs.replace(config, state_dir=str(state_dir))
        self._state_dir = state_dir
        self._clock = clock
        self._log = log.get()
        self._metrics = Metrics()
        self._tracer = tracing.recorder(config.tracing, clock, self._metrics, self._log, version=__version__)
        self._notify = Notifier.of(os.environ, clock)  # before there is a child that could inherit it
        self._announced = self._draining = False
        self.warnings: list[str] = []
        self._servers, etcd_urls, nats_urls = self._embedded()
        self._etcd = Etcd(etcd_settings(config, etcd_urls), clock)
        self._nats = Nats(nats_settings(config, nats_urls), clock, self._on_bus_error)
        self._system = system_of(config, nats_urls, clock, self._on_bus_error)
        self._committer = Committer(self._etcd, clock, self._metrics, timeout_s=config.coordinator.etcd.timeout_seconds)
        self._refusals = Refusals(clock)
        self._auditor = self._audit()
        self._parts = Parts()
        self._pulse = Pulse(clock)
        self._vitals = Vitals(self._etcd, clock)
        self._page = self._live_page() if config.page.enabled else None
        routes = self._page.routes if self._page is not None else ()
        self._http = HttpServer(config.http, metrics_ports(config), self, self._metrics, routes)
        etcd, of_nats = etcd_settings(config, etcd_urls), nats_settings(config, nats_urls).files
        uses = (
            Used("etcd", etcd.files if etcd.secured else Files(), self._etcd.reload),
            Used("nats", replace(of_nats, section="nats"), self._reload_nats),
            Used("http", self._http.files, self._reload_http),
        )
        self._certificates = Reloader(uses, clock, self._metrics, self._reloading, refresh)
        self._certificates.check()
        self._signs = Signs(
            self._etcd,
            self._nats,
            self._committer,
            self._vitals,
            self._pulse,
            self._parts,
            clock,
            self._metrics,
            version=__version__,
            asks_vault="chassis" in config.hosted and config.chassis.credentials.vault_addr is not None,
        )
        self._metrics.before_render.append(lambda: self._signs.count(ready=not self.snapshot().not_ready))
        self._found = endpoints.Endpoints(
            nats=",".join(nats_urls), etcd=etcd_urls, http="", pid=os.getpid(), version=__version__
        )
        self.tree = Supervisor(self._tree(), clock, self._on_restart)

    def _tree(self) -> Branch:
        """The supervision tree. What stands further down depends on what stands above it."""
        return Branch("fabric", Strategy.REST_FOR_ONE, Budget(5, 60.0), (
            # above what it tells about: it is there while the rest starts, starts again and drains
            Child("http", Part(self._http.start, self._http.stop)),
            *(() if self._page is None else (Child("page", self._page),)),
            *(() if self._tracer is None else (Child("traces", Part(self._tracer.start, self._tracer.stop)),)),
            Branch("servers", Strategy.ONE_FOR_ONE, Budget(5, 60.0), tuple(
                Child(name, server) for name, server in self._servers.items()
            )),
            Child("store", Part(self._connect_store, self._etcd.close)),
            Child("vitals", self._vitals),
            Child("pulse", self._pulse),
            Child("bus", Part(self._nats.connect, self._nats.close, lambda: self._nats.lost)),
            *(() if self._auditor is None else (Child("audit", self._auditor),)),
            *self._system_bus(),
            Child("certificates", self._certificates),
            Child("commit", Part(self._committer.start, self._committer.stop, lambda: self._committer.lost)),
            Branch("residents", Strategy.ONE_FOR_ONE, Budget(5, 30.0), tuple(
                Child(name, self._runner(name), shutdown_s=self._config.drain_timeout_seconds + 10)
                for name in self._config.hosted
            )),
        ))  # fmt: skip

    def _audit(self) -> Auditor | None:
        """What it has of a command is written before a word of the answer leaves."""
        if not self._config.audit.enabled:
            return None
        auditor = Auditor(
            self._config.audit, self._state_dir / "audit", self._etcd, self._nats, self._clock, self._metrics, self._log,
            version=__version__,
        )  # fmt: skip
        for bus in (self._nats, self._system and self._system.bus):
            if isinstance(bus, Nats):
                bus.before_sending = auditor.flush
        return auditor

    @property
    def _witnesses(self) -> tuple[Witness, ...]:
        every = (self._refusals.witness, *(() if self._auditor is None else (self._auditor.witness,)))
        return tuple(unless_looking(witness) for witness in every)

    def _live_page(self) -> LivePage:
        auditor = self._auditor
        return LivePage(
            self._config.page, self._config.http, bus=self._nats, metrics=self._metrics, status=self, clock=self._clock,
            log=log.get(actor="page"), hosted={name: load(name).component for name in self._config.hosted},
            daemon=f"{socket.gethostname()}:{os.getpid()}", refusals=self._refusals, witnesses=self._witnesses,
            lag_s=lambda: self._pulse.lag_s, waiting=None if auditor is None else lambda: auditor.waiting,
        )  # fmt: skip

    def _system_bus(self) -> tuple[Child, ...]:
        if self._system is None:
            return ()
        bus = self._system.bus
        return (Child("system bus", Part(bus.connect, bus.close, lambda: bus.lost)),)

    async def run(self) -> int:
        """Until SIGTERM or SIGINT (0), or until the tree has failed (1)."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        starting = asyncio.create_task(self.tree.start())
        stopping = asyncio.create_task(stop.wait())
        beating = asyncio.create_task(self._notify.beat(self._alive, self._in_a_line), name="notify")
        try:
            await _either(starting, stopping)
            if not starting.done():
                await cancel_and_wait(starting)
                return DONE
            await starting
            _spare_the_collector()
            self._announce()
            self._notify.ready(self._in_a_line())
            failed = self.tree.lost
            assert failed is not None
            await _either(stopping, failed)
            self._draining = True
            if failed.done():
                self._log.error("the fabric has failed", reason=failed.result())
                return FAILED
            self._log.info("draining")
            return DONE
        finally:
            stopping.cancel()
            self._notify.stopping()
            endpoints.remove(self._state_dir)
            await self.tree.stop()
            await cancel_and_wait(beating)  # the last: a drain that hangs is for the watchdog, too
            self._notify.close()
            self._log.info("stopped")

    def _hung_up(self) -> None:
        log.reopen()
        self._certificates.ask()

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _embedded(self) -> tuple[dict[str, Server], tuple[str, ...], tuple[str, ...]]:
        """The servers to start, and where the fabric's servers are, started or given."""
        config, folder = self._config, self._state_dir
        servers: dict[str, Server] = {}
        etcd_urls, nats_urls = config.coordinator.etcd.endpoints, config.nats.servers
        if not etcd_urls:
            program = programs.find_etcd()
            servers["etcd"], url = embedded_etcd(program, folder, config.embedded.etcd_port, self._clock)
            etcd_urls = (url,)
            self._log.info("starting an etcd of our own", program=str(program), data=str(folder / "etcd"))
        if not nats_urls:
            program = programs.find_nats_server()
            servers["nats"], url = embedded_nats(program, folder, config.embedded.nats_port, self._clock)
            nats_urls = (url,)
            self._log.info("starting a nats-server of our own", program=str(program), data=str(folder / "nats"))
        return servers, etcd_urls, nats_urls

    async def _connect_store(self) -> None:
        await self._etcd.connect()
        warning = programs.judge_etcd(
            (await self._etcd.health()).version,
            embedded="etcd" in self._servers,
            allow_old=self._config.coordinator.etcd.allow_old_etcd,
        )
        for sentence in (*((warning,) if warning is not None else ()), *await self._etcd.examine()):
            if sentence not in self.warnings:
                self.warnings.append(sentence)
                self._log.warning(sentence)

    def _runner(self, name: str) -> Runner:
        actor = load(name)
        self._metrics.counter("if_actor_restarts_total", actor=name)  # there from the start, at 0
        context = Context(
            store=self._etcd,
            bus=self._nats,
            committer=self._committer,
            clock=self._clock,
            metrics=self._metrics,
            config=self._config.section(actor.component),
            settings=self._config,
            log=log.get(actor=actor.component),
            parts=self._parts,
            system=self._system,
            tracer=self._tracer,
            witnesses=self._witnesses,
        )
        return Runner(
            actor,
            actor,
            context,
            self._pulse,
            mailbox_max=self._config.mailbox_max,
            in_flight_max=self._config.in_flight_max,
            drain_timeout_s=self._config.drain_timeout_seconds,
        )

    def _announce(self) -> None:
        self._write_endpoints()
        self._announced = True
        self._log.info(
            "ready",
            nats=self._found.nats,
            etcd=",".join(self._found.etcd),
            http=self._http.url,
            actors=",".join(self._config.actors),
        )

    def _write_endpoints(self) -> None:
        with writing(self._state_dir):
            endpoints.write(self._state_dir, endpoints.replace_http(self._found, self._http.url, self._http.pin))

    async def _reload_nats(self) -> None:
        for bus in (self._nats, self._system and self._system.bus):
            if isinstance(bus, Nats):
                await bus.reload()

    async def _reload_http(self) -> None:
        await self._http.reload()
        if self._announced:
            self._write_endpoints()

    @contextlib.contextmanager
    def _reloading(self) -> Iterator[None]:
        if self._announced and not self._draining:
            self._notify.reloading()
        try:
            yield
        finally:
            if self._announced and not self._draining:
                self._notify.ready(self._in_a_line())

    # -- what is told ------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What `/health` says."""
        phase: Phase = "draining" if self._draining else "serving" if self._announced else "starting"
        audit = () if self._auditor is None else self._auditor.warnings()
        page = () if self._page is None else self._page.warnings
        warnings = (*self.warnings, *self._certificates.warnings(), *audit, *page)
        return self._signs.snapshot(self.tree.describe(), phase, warnings)

    def _alive(self) -> bool:
        return self.tree.lost is None or not self.tree.lost.done()

    def _in_a_line(self) -> str:
        state = self.snapshot()
        why = ", ".join(what for what in state.not_ready if what != state.status)
        return f"{state.status}: {why}" if why else state.status

    def _on_restart(self, branch: str, child: str, reason: str) -> None:
        self._log.warning("starting again", branch=branch, child=child, reason=reason)
        if branch == "residents":
            self._metrics.counter("if_actor_restarts_total", actor=child).inc()

    def _on_bus_error(self, where: str, error: Exception) -> None:
        self._log.warning("bus error", where=where, error=str(error) or type(error).__name__)

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        self._log.error("unhandled error", message=about.get("message"), exc_info=about.get("exception"))


async def serve(config: Config, *, state_dir: Path, refresh: Refresh | None = None) -> int:
    """Runs a daemon to its end; the exit code. `FabricError` when it could not start. SIGHUP calls `refresh` first."""
    lock = StateLock(state_dir)
    lock.take()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(lock.give_back)
        return await Fabric(config, state_dir, SystemClock(), refresh).run()


async def _either(one: asyncio.Future[Any], other: asyncio.Future[Any]) -> None:
    await asyncio.wait([one, other], return_when=asyncio.FIRST_COMPLETED)


def _spare_the_collector() -> None:
    """What was loaded stays, and the board's records hold no circles: full collections over them are pauses for
    nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def exit_code(error: FabricError) -> int:
    """What the process ends with when it could not start."""
    return UNREACHABLE if isinstance(error, Unreachable) else FAILED
