"""The start/stop stress that everything supervised must pass: the contract of `Running`, as a function.

After River's `startstoptest`: whatever can be started is started and stopped many times, stopped twice, stopped before
it was started, and cancelled at every moment of its start; after each round nothing that it began may be left running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ifabric.actor.base import Actor
from ifabric.supervision.spec import Running

ROUNDS = 50
#: one start or stop that takes longer hangs, in seconds
PATIENCE_S = 10.0
#: after so many turns of the loop a start is either done or waits for the outside
CANCEL_TURNS = 12


class Lives:
    """An actor as a `Running`: every start makes a new instance, as its runner does."""

    def __init__(self, make: Callable[[], Actor]) -> None:
        self._make = make
        self._actor: Actor | None = None

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the present instance has crashed."""
        return self._actor.crashed if self._actor is not None else None

    async def start(self) -> None:
        """A new instance; when it cannot start it is stopped again."""
        self._actor = self._make()
        try:
            await self._actor.start()
        except BaseException:
            await self._actor.stop()
            raise

    async def stop(self) -> None:
        """Stops the instance; of none yet, one that was never started."""
        if self._actor is None:
            self._actor = self._make()
        await self._actor.stop()


async def stress(running: Running, *, rounds: int = ROUNDS) -> None:
    """Puts `running` through everything that its contract allows, and leaves it stopped.

    `AssertionError` names the step and what was left behind. What the thing needs must be there, and stay well: an end
    by itself is a failure here too.
    """
    before = asyncio.all_tasks()

    await _bounded(running.stop(), "stop before start")
    _nothing_left(before, "stop before start")

    for number in range(1, rounds + 1):
        await _bounded(running.start(), f"start {number}")
        lost = running.lost
        assert lost is None or not lost.done(), f"start {number}: lost at once: {lost}"
        await _bounded(running.stop(), f"stop {number}")
        _nothing_left(before, f"round {number}")

    await _bounded(running.stop(), "a second stop")
    _nothing_left(before, "a second stop")

    for turns in range(CANCEL_TURNS):
        await _cancelled_start(running, turns)
        await _bounded(running.stop(), f"stop after a start that was cancelled after {turns} turns")
        _nothing_left(before, f"a start that was cancelled after {turns} turns")

    await _bounded(running.start(), "start after all that")
    await _bounded(asyncio.gather(running.stop(), running.stop()), "two stops at once")
    _nothing_left(before, "two stops at once")


async def stress_actor(make: Callable[[], Actor], *, rounds: int = ROUNDS) -> None:
    """The same for an actor, of which every life is a new instance."""
    await stress(Lives(make), rounds=rounds)


async def _cancelled_start(running: Running, turns: int) -> None:
    starting = asyncio.ensure_future(running.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    try:
        await _bounded(starting, f"a start cancelled after {turns} turns")
    except asyncio.CancelledError:
        current = asyncio.current_task()
        assert current is None or not current.cancelling(), "the stress itself was cancelled"


async def _bounded(awaitable: Awaitable[object], step: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await awaitable
    except TimeoutError:
        raise AssertionError(f"{step}: not done after {PATIENCE_S:g} s") from None


def _nothing_left(before: set[asyncio.Task[object]], step: str) -> None:
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not left, f"{step} left running: {sorted(task.get_name() for task in left)}"
