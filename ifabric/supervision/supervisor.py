"""Carries out what the policy decides: starts, stops and starts again the children of one branch.

A supervisor is itself `Running`, so branches nest. It reads its own mailbox, in which the ends of its children arrive
and also its own "try again": while a child waits for its next try, the others are looked after, and the branch can be
told to stop.

An end belongs to a *life* of a child: it is counted up whenever the child is stopped, so that a late word about a life
that is over is not taken for the end of the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.supervision.policy import Again, Escalate, Forget, after_exit, within
from ifabric.supervision.spec import Branch, Child, Resumable, Running

#: told of every restart: (branch, child, reason)
OnRestart = Callable[[str, str, str], None]


@dataclass
class _Node:
    spec: Child | Branch
    running: Running
    #: stopped, starting, running, stopping, failed, or waiting: for its next try
    state: str = "stopped"
    since: float = 0.0
    restarts: int = 0
    reason: str = ""
    life: int = 0


@dataclass(frozen=True)
class _End:
    """A life of a child has ended by itself, or could not begin."""

    name: str
    life: int
    reason: str


@dataclass(frozen=True, eq=False)
class _Try:
    """These are to be started again, because the first of them, or `name` among them, has ended."""

    name: str
    children: tuple[str, ...]


class Supervisor:
    """One branch, running."""

    def __init__(self, branch: Branch, clock: Clock, on_restart: OnRestart | None = None) -> None:
        self._branch = branch
        self._clock = clock
        self._on_restart = on_restart
        self._nodes = {
            spec.name: _Node(spec, Supervisor(spec, clock, on_restart) if isinstance(spec, Branch) else spec.running)
            for spec in branch.children
        }
        self._history: list[float] = []
        self._mailbox: asyncio.Queue[_End | _Try] = asyncio.Queue()
        #: the tries that are still meant, by the child that ended, and what waits out their delays
        self._tries: dict[str, _Try] = {}
        self._delays: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done, with the reason, when the branch has failed."""
        return self._lost

    async def start(self) -> None:
        """Starts the children in order. When one cannot, those before it are stopped again and its error is raised."""
        self._lost = asyncio.get_running_loop().create_future()
        self._history.clear()
        self._mailbox = asyncio.Queue()
        try:
            for node in self._nodes.values():
                await self._start(node)
        except BaseException:
            await self._stop_all()
            raise
        self._loop = asyncio.create_task(self._run(), name=f"supervisor {self._branch.name}")

    async def stop(self) -> None:
        """Stops the children in reverse, at once: also while one waits for its next try, or is being started."""
        loop, self._loop = self._loop, None
        tasks = [*self._delays, loop] if loop is not None else [*self._delays]
        await cancel_and_wait(*tasks)
        self._tries.clear()
        await self._stop_all()

    def describe(self) -> dict[str, Any]:
        """The branch as plain data: its children, their state, how often they were started again, and why last."""
        now = self._clock.monotonic()
        children = []
        for node in self._nodes.values():
            about = node.running.describe() if isinstance(node.running, Supervisor) else {"name": node.spec.name}
            about |= {"state": node.state, "restarts": node.restarts, "for_s": round(now - node.since, 1)}
            if node.reason:
                about["reason"] = node.reason
            children.append(about)
        return {"name": self._branch.name, "strategy": self._branch.strategy.value, "children": children}

    # -- one child ----------------------------------------------------------------------------------------------------

    async def _start(self, node: _Node) -> None:
        self._turn(node, "starting")
        try:
            await node.running.start()
        except BaseException:
            self._turn(node, "failed")
            raise
        self._turn(node, "running")
        if (lost := node.running.lost) is not None:
            lost.add_done_callback(partial(self._ended, node, node.life))

    def _ended(self, node: _Node, life: int, lost: asyncio.Future[str]) -> None:
        if lost.cancelled():
            return
        error = lost.exception()
        self._mailbox.put_nowait(_End(node.spec.name, life, lost.result() if error is None else repr(error)))

    async def _stop(self, node: _Node, *, clear: bool = False) -> None:
        """Stops the child, or with `clear` what is left of its life. A stop that fails must not keep the others up."""
        node.life += 1
        if node.state == "stopped":
            return
        running = node.running
        resumes = clear and isinstance(running, Resumable)
        self._turn(node, "stopping")  # also one that failed to start: it may have left something behind
        try:
            async with asyncio.timeout(node.spec.shutdown_s):
                await (running.clear() if clear and isinstance(running, Resumable) else running.stop())
        except TimeoutError:
            node.reason = f"did not stop within {node.spec.shutdown_s:g} s and was abandoned"
        except Exception as error:
            node.reason = f"could not be stopped: {error!r}"
            _report(f"{self._branch.name}: {node.spec.name} {node.reason}", error)
        self._turn(node, "waiting" if resumes else "stopped")

    async def _stop_all(self) -> None:
        for node in reversed(self._nodes.values()):
            await self._stop(node)

    def _turn(self, node: _Node, state: str) -> None:
        node.state, node.since = state, self._clock.monotonic()

    # -- the branch ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Until the branch is stopped, or has failed."""
        try:
            while True:
                match await self._mailbox.get():
                    case _End(name, life, reason) if life == self._nodes[name].life:
                        await self._decide(self._nodes[name], reason)
                    case _Try() as due if self._tries.get(due.name) is due:
                        del self._tries[due.name]
                        await self._again(due.children)
                    case _:
                        continue  # about a life that is over, or taken back
                if self._lost is not None and self._lost.done():
                    return
        except Exception as error:  # a bug here would leave the children unsupervised, and nobody would know
            _report(f"{self._branch.name}: its supervisor failed", error)
            self._fail(f"{self._branch.name}: its supervisor failed: {error!r}")

    def _fail(self, reason: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

    async def _decide(self, node: _Node, reason: str) -> None:
        name, now = node.spec.name, self._clock.monotonic()
        node.reason = reason
        self._turn(node, "failed")
        match after_exit(self._branch, name, reason, self._history, now):
            case Forget():
                await self._stop(node)
            case Escalate(why):
                self._fail(why)
            case Again(names, delay_s):
                self._history = [*within(self._branch, self._history, now), now]
                if self._on_restart is not None:
                    self._on_restart(self._branch.name, name, reason)
                for other in reversed(names):
                    self._tries.pop(other, None)  # this try takes theirs in
                    await self._stop(self._nodes[other], clear=other == name)
                    self._turn(self._nodes[other], "waiting")
                self._try_after(delay_s, _Try(name, names))

    def _try_after(self, delay_s: float, due: _Try) -> None:
        self._tries[due.name] = due
        if delay_s <= 0:
            self._mailbox.put_nowait(due)
            return

        async def wait() -> None:
            await self._clock.sleep(delay_s)
            self._mailbox.put_nowait(due)

        delay = asyncio.create_task(wait(), name=f"supervisor {self._branch.name} delay")
        self._delays.add(delay)
        delay.add_done_callback(self._delays.discard)

    async def _again(self, names: tuple[str, ...]) -> None:
        """Starts them in order. One that cannot is an end like any other; those after it wait for its next try."""
        for name in names:
            node = self._nodes[name]
            node.restarts += 1
            try:
                await self._start(node)
            except Exception as error:
                why = error.message if isinstance(error, FabricError) else repr(error)
                self._mailbox.put_nowait(_End(name, node.life, f"could not start again: {why}"))
                return


def _report(message: str, error: Exception) -> None:
    """To whoever listens for what nobody awaits: the loop's exception handler, which logs it."""
    asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
