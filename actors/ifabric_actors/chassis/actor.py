"""The chassis: untrusted WebAssembly in sandboxes that it cannot leave, overrun or outlive.

`runs` takes a run from its request to its answer; `pool` gives it one of the worker processes, in which `worker` runs
the guest; `modules` keeps what can be run, and its compiled form, and `uploads` what is on its way there; `egress` is
the only way out, with `secrets` that no guest sees; `register` knows what is on. What this process itself never does is
to touch a guest's code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.actor.dependencies import Dependencies
from ifabric.clock import rfc3339
from ifabric.wire import chassis as wire
from ifabric_actors.chassis import confinement, frames, records
from ifabric_actors.chassis.breaking import GovernorBreakers
from ifabric_actors.chassis.cache import Cache
from ifabric_actors.chassis.egress import Egress
from ifabric_actors.chassis.events import Announcer
from ifabric_actors.chassis.limits import MIB
from ifabric_actors.chassis.modules import Modules
from ifabric_actors.chassis.pool import Pool
from ifabric_actors.chassis.processes import ForkServer
from ifabric_actors.chassis.register import Register
from ifabric_actors.chassis.runs import Runs
from ifabric_actors.chassis.secrets import Vault
from ifabric_actors.chassis.slo import ServiceLevel
from ifabric_actors.chassis.uploads import Uploads

REPORT_S = 1.0
#: private memory of a worker beside its guest's
OWN_BYTES = 96 * MIB
#: descriptors of a worker beside one for each loaded module
OWN_DESCRIPTORS = 32


class Chassis(Actor):
    """Modules and their runs."""

    component = "chassis"
    description = "Runs untrusted WebAssembly in sandboxes."

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config, clock, metrics, log = context.config, context.clock, context.metrics, context.log
        runtime = config.runtime
        self._server = ForkServer(
            frames.Settings(
                stack_bytes=runtime.max_stack_kb * 1024,
                run_memory_bytes=runtime.max_memory_mb * MIB + OWN_BYTES,
                compile_memory_bytes=config.modules.compile_memory_mb * MIB,
                compile_cpu_s=int(config.modules.compile_timeout_seconds) + 1,
                descriptors=config.modules.loaded_max + OWN_DESCRIPTORS,
            ),
            clock,
        )
        self.pool = Pool(self._server, config, clock, metrics, log)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._cache = Cache(self._folder(), config, metrics, log, compile=self.pool.compile)
        self.uploads = Uploads(context.bus, context.store, clock, config, log)
        self.modules = Modules(context.bus, clock, config, self._cache, self.uploads, log)
        self._vault = Vault(config.credentials, clock, metrics, log, context.parts.get(Dependencies, Dependencies))
        self._egress = Egress(config.endpoints, self._vault, GovernorBreakers(context.bus), clock, metrics)
        self.register = Register(context)
        self._announcer = Announcer(context)
        slo = config.slo
        self._level = ServiceLevel(
            slo.target_latency_p95_ms, slo.target_availability_percent, slo.window_seconds
        )  # fmt: skip
        self._runs = Runs(
            context, self.pool, self.modules, self._egress, self.register, self._announcer, self._level
        )  # fmt: skip

    def _folder(self) -> Path:
        """Where compiled modules are kept."""
        configured, state = self.context.config.modules.cache_dir, self.context.settings.state_dir
        if configured is not None:
            return Path(configured)
        if state is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="ifabric-")
            return Path(self._scratch.name) / "compiled"
        return Path(state) / "compiled"

    async def start(self) -> None:
        ready = await self.pool.start()
        await self._cache.start(ready.fingerprint)
        await self.modules.start()
        await self._vault.start()
        await self._egress.start()
        await self.register.start()
        self.spawn(self.pool.tend(), name="pool")
        self.spawn(self.register.keep(), name="register")
        self.spawn(self.register.follow(), name="kills")
        self.spawn(self._announcer.run(), name="events")
        self.spawn(self._vault.keep(), name="secrets")
        self.spawn(self.modules.sweep(), name="modules")
        self.spawn(self.uploads.sweep(), name="uploads")
        self.spawn(self._report(), name="report")
        self.context.log.info("sandboxes can be started", without=sorted(confinement.missing(*ready.confined)))

    async def stop(self) -> None:
        await self.pool.stop()
        await super().stop()
        await self.register.stop()
        await self._runs.stop()
        await self._egress.stop()
        await self._vault.stop()
        await self.modules.stop()
        await self.uploads.stop()
        if self._scratch is not None:
            self._scratch.cleanup()

    async def _report(self) -> None:
        """Never returns: brings the gauges up to date, and tells when the service level changes."""
        metrics, clock, config = self.context.metrics, self.context.clock, self.context.config
        metrics.gauge("if_chassis_memory_limit_bytes").set(
            config.sandbox_pool.max_size * config.runtime.max_memory_mb * MIB
        )
        running = metrics.gauge("if_chassis_sandbox_count")
        queued = metrics.gauge("if_chassis_queue_depth")
        memory = metrics.gauge("if_chassis_memory_bytes")
        budget = metrics.gauge("if_chassis_slo_error_budget_left")
        idle = metrics.gauge("if_chassis_workers", state="idle")
        busy = metrics.gauge("if_chassis_workers", state="busy")
        while True:
            running.set(self.pool.busy)
            queued.set(self.pool.queued)
            memory.set(sum(map(_private_bytes, self.pool.pids())))
            budget.set(self._level.view(clock.monotonic()).error_budget_left)
            idle.set(self.pool.idle)
            busy.set(self.pool.busy)
            for which, met, value, target in self._level.changes(clock.monotonic()):
                if not met:
                    metrics.counter("if_chassis_slo_violations_total", which=which).inc()
                self._announcer.tell(
                    "slo",
                    wire.SloEvent(
                        event="slo", at=rfc3339(clock.wall_ms()), which=which, met=met, value=value, target=target,
                        daemon=self.register.daemon,
                    ),
                )  # fmt: skip
            await clock.sleep(REPORT_S)

    # -- the verbs

    @handles
    async def upload(self, message: wire.Upload, caller: Caller) -> wire.UploadReply:
        return await self.uploads.add(message, caller.session)

    @handles
    async def put(self, message: wire.Put, caller: Caller) -> wire.PutReply:
        return await self.modules.put(message, caller.session)

    @handles
    async def inspect(self, message: wire.Inspect, caller: Caller) -> wire.InspectReply:
        return await self.modules.inspect(message, caller.session)

    @handles
    async def run(self, message: wire.Run, caller: Caller) -> Any:
        return await self._runs.run(message, caller)

    @handles
    async def list_modules(self, message: wire.Modules, caller: Caller) -> wire.ModulesReply:
        return await self.modules.page(message)

    @handles
    async def list_runs(self, message: wire.Runs, caller: Caller) -> wire.RunsReply:
        pool = self.pool
        counts = wire.Pool(
            workers=pool.idle + pool.busy, idle=pool.idle, busy=pool.busy, queued=pool.queued,
            max=self.context.config.sandbox_pool.max_size,
        )  # fmt: skip
        return wire.RunsReply(
            runs=await self.register.list(), pool=counts, slo=self._level.view(self.context.clock.monotonic())
        )

    @handles
    async def kill(self, message: wire.Kill, caller: Caller) -> wire.KillReply:
        found = await self.register.end(message.run, records.Kill(by=caller.session, why=message.why))
        return wire.KillReply(run=found.run, session=found.session)


def _private_bytes(pid: int) -> int:
    """What a process does not share with others; 0 when it has gone, or when nobody but root may look."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024
