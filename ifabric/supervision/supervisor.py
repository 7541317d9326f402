"""Carries out what the policy decides: starts, stops and starts again the children of one branch.

A supervisor is itself `Running`, so branches nest. It reads its own mailbox, in which the ends of its children arrive
and also its own "try again": between two tries it can be told to stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ifabric.clock import Clock
from ifabric.errors import FabricError
from ifabric.supervision.policy import Again, Escalate, Forget, after_exit, within
from ifabric.supervision.spec import Branch, Child, Running

#: told of every restart: (branch, child, reason)
OnRestart = Callable[[str, str, str], None]


@dataclass
class _Node:
    spec: Child | Branch
    running: Running
    state: str = "stopped"
    since: float = 0.0
    restarts: int = 0
    reason: str = ""
    watcher: asyncio.Task[None] | None = None


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
        self._mailbox: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
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
        """Stops the children in reverse."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
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

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _start(self, node: _Node) -> None:
        node.state, node.since = "starting", self._clock.monotonic()
        try:
            await node.running.start()
        except BaseException:
            node.state = "failed"
            raise
        node.state, node.since = "running", self._clock.monotonic()
        if (lost := node.running.lost) is not None:
            node.watcher = asyncio.create_task(self._watch(node, lost), name=f"watch {node.spec.name}")

    async def _watch(self, node: _Node, lost: asyncio.Future[str]) -> None:
        reason = await asyncio.shield(lost)
        self._mailbox.put_nowait((node.spec.name, reason))

    async def _stop(self, node: _Node) -> None:
        if node.watcher is not None:
            node.watcher.cancel()
            await asyncio.gather(node.watcher, return_exceptions=True)
            node.watcher = None
        if node.state == "stopped":
            return
        node.state = "stopping"  # also one that failed to start: it may have left something behind
        try:
            async with asyncio.timeout(node.spec.shutdown_s):
                await node.running.stop()
        except TimeoutError:
            node.reason = f"did not stop within {node.spec.shutdown_s:g} s and was abandoned"
        node.state, node.since = "stopped", self._clock.monotonic()

    async def _stop_all(self) -> None:
        for node in reversed(self._nodes.values()):
            await self._stop(node)

    async def _run(self) -> None:
        while True:
            name, reason = await self._mailbox.get()
            node = self._nodes[name]
            node.state, node.reason = "failed", reason
            decision = after_exit(self._branch, name, reason, self._history, self._clock.monotonic())
            match decision:
                case Forget():
                    await self._stop(node)
                case Escalate(why):
                    assert self._lost is not None
                    if not self._lost.done():
                        self._lost.set_result(why)
                    return
                case Again(names, delay_s):
                    if self._on_restart is not None:
                        self._on_restart(self._branch.name, name, reason)
                    for other in reversed(names):
                        await self._stop(self._nodes[other])
                    await self._clock.sleep(delay_s)
                    await self._again(names)

    async def _again(self, names: tuple[str, ...]) -> None:
        """Starts them in order. One that cannot is an end like any other; those after it wait for its next try."""
        now = self._clock.monotonic()
        self._history = [*within(self._branch, self._history, now), now]
        self._drop_ends(names)
        for name in names:
            node = self._nodes[name]
            node.restarts += 1
            try:
                await self._start(node)
            except FabricError as error:
                self._mailbox.put_nowait((name, f"could not start again: {error}"))
                return
            except Exception as error:
                self._mailbox.put_nowait((name, f"could not start again: {error!r}"))
                return

    def _drop_ends(self, names: tuple[str, ...]) -> None:
        """Ends that were reported before these children were stopped are about lives that are over."""
        kept = []
        while not self._mailbox.empty():
            end = self._mailbox.get_nowait()
            if end[0] not in names:
                kept.append(end)
        for end in kept:
            self._mailbox.put_nowait(end)
