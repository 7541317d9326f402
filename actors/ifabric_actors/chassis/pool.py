"""The pool: as many workers as the load needs and the configuration allows, and a fair line in front of them.

A run that finds an idle worker starts at once, on the one that was idle last and has the module loaded if there is one;
else on a new worker while there may be more; else it waits its turn, for a bounded time. The daemon keeps its own clock
on every run: a worker that is still busy `GRACE_S` after its end (stopped, or stuck where no limit reaches) is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import FabricError, LimitReached, ModuleRefused, Overloaded, SandboxDied, Unavailable
from ifabric_actors.chassis import frames
from ifabric_actors.chassis.queue import FairQueue

if TYPE_CHECKING:
    from ifabric.clock import Clock
    from ifabric.metrics import Metrics
    from ifabric_actors.chassis.processes import ForkServer, Worker

GRACE_S = 0.25
#: how often idle workers are looked at
TEND_S = 1.0
#: how long after a worker could not be started it is tried again
AGAIN_S = (0.1, 0.5)
#: what a guest's call is answered with: bytes, or an exception that ends the run
Answer = Callable[[bytes], Awaitable[bytes]]


class Code(Protocol):
    """A compiled module: a number of its own in this process, and a descriptor that it can be read from."""

    number: int
    fd: int


class Outcome(NamedTuple):
    """How a run ended: by what its worker says, if it lived to say it, and by what it was ended with from here."""

    done: frames.Done | None
    why: FabricError | None
    #: as the daemon saw it
    wall_s: float


class Job:
    """One run, from waiting to its end. `start` names the run and the module by the pool's and the code's numbers."""

    def __init__(self, session: str, start: frames.Start, code: Code, answer: Answer) -> None:
        self.session, self.start, self.code, self.answer = session, start, code, answer
        loop = asyncio.get_running_loop()
        self.turn: asyncio.Future[Worker] = loop.create_future()
        #: None: the worker went away
        self.done: asyncio.Future[frames.Done | None] = loop.create_future()
        self.worker: Worker | None = None
        #: on the clock's scale: then it is killed
        self.until = 0.0
        #: the guest's call that is under way
        self.calling: asyncio.Task[None] | None = None
        #: why it is ended from here
        self.why: FabricError | None = None

    def end(self, why: FabricError) -> None:
        """Ends it now, wherever it is; its caller gets the reason."""
        self.why = self.why or why
        if self.worker is not None:
            self.worker.kill()
        elif not self.turn.done():
            self.turn.set_exception(why)

    def overran(self) -> None:
        """Its time is over and its worker has not said so."""
        wall_s = self.start.wall_s
        told = f"the run was still busy {GRACE_S:g} s after its {wall_s:g} s were over, and was killed"
        self.end(LimitReached(told, which="wall_s", allowed=wall_s))

    def settle(self, done: frames.Done | None) -> None:
        """The first word on how it ended counts."""
        if not self.done.done():
            self.done.set_result(done)


class Pool:
    """The workers of one daemon."""

    def __init__(self, server: ForkServer, config: Any, clock: Clock, metrics: Metrics, log: Any) -> None:
        self._server, self._config, self._clock, self._log = server, config, clock, log
        self._idle: list[Worker] = []
        self._busy: dict[int, Worker] = {}
        self._starting = 0
        self._queue: FairQueue[Job] = FairQueue()
        self._runs = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._started = metrics.counter("if_chassis_workers_started_total")
        self._ended = {
            why: metrics.counter("if_chassis_workers_ended_total", why=why)
            for why in ("recycled", "idle", "killed", "died", "stopped")
        }
        self._waited = metrics.histogram("if_chassis_queue_seconds")
        self._compiled = metrics.histogram("if_chassis_compile_seconds")
        self._compiling = asyncio.Semaphore(1)

    # -- what there is

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._busy)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [worker.pid for worker in (*self._idle, *self._busy.values())]

    async def start(self) -> frames.Ready:
        """Starts the fork server and the least number of workers."""
        ready = await self._server.start()
        self._replenish()
        return ready

    async def stop(self) -> None:
        """Ends all workers; who runs or waits is told `unavailable`."""
        self._stopping = True
        gone = Unavailable("the chassis stops; the run was ended", what="chassis")
        while len(self._queue):
            self._queue.take().end(gone)
        await cancel_and_wait(*self._tasks)
        await self._server.stop()

    async def tend(self) -> None:
        """Never returns: ends workers that have been idle for long, and keeps as many as there should be."""
        pool = self._config.sandbox_pool
        while True:
            await self._clock.sleep(TEND_S)
            now = self._clock.monotonic()
            self._bury()
            above = max(0, len(self._idle) + len(self._busy) - pool.min_size)
            for worker in self._idle[:above]:  # the first ones have been idle the longest
                if now - worker.idle_since > pool.idle_seconds:
                    self._idle.remove(worker)
                    self._dismiss(worker, "idle")
            self._replenish()

    # -- a run

    def number(self) -> int:
        """A name for a run, between daemon and worker."""
        return next(self._runs)

    async def run(self, job: Job) -> Outcome:
        """Runs it. Raises what kept it from starting: `Overloaded` (the line is full, or the wait was too long),
        `Unavailable`, or what it was ended with while it waited.
        """
        worker = await self._turn(job)
        job.worker, began = worker, self._clock.monotonic()
        job.until = began + job.start.wall_s + GRACE_S
        worker.listener = lambda frame: self._heard(job, frame)
        deadline = asyncio.get_running_loop().call_later(job.start.wall_s + GRACE_S, job.overran)
        self._send(worker, job)
        try:
            await asyncio.wait({job.done})
            done = job.done.result()
            if done is None and job.why is None:
                job.why = _died(await worker.status())
            return Outcome(done, job.why, self._clock.monotonic() - began)
        finally:
            deadline.cancel()
            if not job.done.done():  # the caller has gone
                worker.kill()
            if job.calling is not None:
                await cancel_and_wait(job.calling)
            self._release(worker)

    def _send(self, worker: Worker, job: Job) -> None:
        code = job.code
        sent: list[frames.Frame] = []
        fds: tuple[int, ...] = ()
        if code.number in worker.loaded:
            del worker.loaded[code.number]
        else:
            if len(worker.loaded) >= self._config.modules.loaded_max:
                oldest = next(iter(worker.loaded))
                del worker.loaded[oldest]
                sent.append(frames.Drop(oldest))
            sent.append(frames.Load(code.number))
            fds = (code.fd,)
        worker.loaded[code.number] = None
        worker.runs += 1
        worker.channel.send(*sent, job.start, fds=fds)

    def _heard(self, job: Job, frame: frames.Frame | None) -> None:
        """What the worker says while it has this run."""
        match frame:
            case frames.Done() if frame.run == job.start.run:
                job.settle(frame)
            case frames.Http() if frame.run == job.start.run and job.calling is None:
                job.calling = asyncio.create_task(self._call(job, frame.data), name="chassis call")
            case frames.Refused():
                job.why = ModuleRefused(f"the module could not be loaded: {frame.why}", why=[frame.why])
                job.settle(None)
            case None:
                job.settle(None)
            case _:
                job.end(SandboxDied("the sandbox said what no sandbox of ours says, and was killed", signal="SIGKILL"))

    async def _call(self, job: Job, data: bytes) -> None:
        """The guest's call of `ifabric.http`: its answer goes back, and an error ends the run."""
        worker, run = job.worker, job.start.run
        assert worker is not None, "it runs"
        try:
            sent: frames.Frame = frames.Response(run, await job.answer(data))
        except FabricError as error:
            job.why = error
            sent = frames.Stop(run)
        job.calling = None
        worker.channel.send(sent)

    # -- whose turn it is

    async def _turn(self, job: Job) -> Worker:
        if self._stopping:
            raise Unavailable("the chassis stops; the run was not started", what="chassis")
        worker = self._take_idle(job.code.number) if not len(self._queue) else None
        if worker is not None:
            self._waited.observe(0.0)
            return worker
        if len(self._queue) >= self._config.sandbox_pool.queue_max:
            raise Overloaded(f"{len(self._queue)} runs wait for a sandbox already; it was not started", why="queue")
        self._queue.put(job.session, job)
        self._grow()
        began = self._clock.monotonic()
        patience_s = self._config.sandbox_pool.queue_wait_seconds
        try:
            await asyncio.wait({job.turn}, timeout=patience_s)
        except asyncio.CancelledError:
            if not self._queue.remove(job.session, job) and job.turn.exception() is None:
                self._release(job.turn.result())
            raise
        self._waited.observe(self._clock.monotonic() - began)
        if self._queue.remove(job.session, job) and not job.turn.done():
            raise Overloaded(f"no sandbox was free within {patience_s:g} s; the run was not started", why="wait")
        return job.turn.result()

    def _take_idle(self, module: int) -> Worker | None:
        """The worker that was idle last and has the module; else the one that was idle last."""
        self._bury()
        if not self._idle:
            return None
        at = next((i for i in range(len(self._idle) - 1, -1, -1) if module in self._idle[i].loaded), -1)
        worker = self._idle.pop(at)
        self._busy[worker.number] = worker
        return worker

    def _bury(self) -> None:
        """Takes out idle workers that have died."""
        if any(worker.gone for worker in self._idle):
            for worker in [worker for worker in self._idle if worker.gone]:
                self._idle.remove(worker)
                self._count_end(worker)

    def _release(self, worker: Worker) -> None:
        """A worker has no run any more: it takes the next one, idles, or is replaced."""
        self._busy.pop(worker.number, None)
        worker.listener = None
        pool = self._config.sandbox_pool
        if worker.gone:
            self._count_end(worker)
        elif not pool.enabled or worker.runs >= pool.max_runs:
            self._dismiss(worker, "recycled")
        else:
            worker.idle_since = self._clock.monotonic()
            self._idle.append(worker)
        self._serve()
        self._replenish()

    def _serve(self) -> None:
        """Gives idle workers to who waits."""
        while len(self._queue) and not self._stopping:
            worker = self._take_idle(-1)
            if worker is None:
                self._grow()
                return
            job = self._queue.take()
            if job.turn.done():  # ended while it waited
                self._busy.pop(worker.number)
                self._idle.append(worker)
            else:
                job.turn.set_result(worker)

    def _grow(self) -> None:
        """One more worker for who waits, if there may be one."""
        pool = self._config.sandbox_pool
        total = len(self._idle) + len(self._busy) + self._starting
        if len(self._queue) > self._starting and total < pool.max_size and not self._stopping:
            self._spawn()

    def _replenish(self) -> None:
        pool = self._config.sandbox_pool
        while len(self._idle) + len(self._busy) + self._starting < pool.min_size and not self._stopping:
            self._spawn()

    def _spawn(self) -> None:
        self._starting += 1
        task = asyncio.create_task(self._start_one(), name="chassis worker")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_one(self) -> None:
        worker = None
        try:
            worker = await self._server.fork()
        except FabricError as error:
            self._log.warning("no worker could be started; it is tried again", why=str(error))
            await self._clock.sleep(self._clock.jitter(*AGAIN_S))
        finally:
            self._starting -= 1
        if worker is None:
            self._grow()
            self._replenish()
            return
        self._started.inc()
        worker.idle_since = self._clock.monotonic()
        self._idle.append(worker)
        self._serve()

    def _dismiss(self, worker: Worker, why: str) -> None:
        worker.dismiss()
        self._ended[why].inc()

    def _count_end(self, worker: Worker) -> None:
        self._ended["killed" if worker.killed else "died"].inc()

    # -- compiling

    async def compile(self, wasm: bytes) -> bytes:
        """The compiled form of a module, made by a worker that does nothing else; one at a time.

        Raises `ModuleRefused`: it is not valid, or its compilation took more time or memory than is allowed.
        """
        modules = self._config.modules
        async with self._compiling:
            worker = await self._server.fork(compiles=True)
            heard: asyncio.Future[frames.Frame | None] = asyncio.get_running_loop().create_future()
            worker.listener = lambda frame: None if heard.done() else heard.set_result(frame)
            began = self._clock.monotonic()
            try:
                worker.channel.send(frames.Compile(wasm))
                await asyncio.wait({heard}, timeout=modules.compile_timeout_seconds)
            finally:
                worker.kill()
            self._compiled.observe(self._clock.monotonic() - began)
            match heard.result() if heard.done() else worker:
                case frames.Compiled(code):
                    return code
                case frames.Refused(why):
                    reason = why
                case None if await worker.status() == -24:
                    reason = f"compiling it took more than {modules.compile_timeout_seconds:g} s of processor time"
                case None:
                    reason = f"compiling it took more than {modules.compile_memory_mb} MB, or crashed the compiler"
                case _:
                    reason = f"compiling it took more than {modules.compile_timeout_seconds:g} s"
            raise ModuleRefused(f"the module was not compiled: {reason}", why=[reason])


def _died(status: int | None) -> SandboxDied:
    if status is None:
        name = ""
    else:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
    return SandboxDied(f"the sandbox died under the run ({name or 'it is not known how'})", signal=name)
