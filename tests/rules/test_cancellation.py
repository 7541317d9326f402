"""A cancellation that gets lost is repeated."""

from __future__ import annotations

import asyncio

from ifabric import cancellation
from ifabric.cancellation import cancel_and_wait


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again(monkeypatch) -> None:
    monkeypatch.setattr(cancellation, "AGAIN_S", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await cancel_and_wait(task)
    assert task.cancelled()
    assert swallowed == 3


async def test_ended_tasks_and_their_errors_are_taken_as_they_are() -> None:
    async def fails() -> None:
        raise ValueError

    failed = asyncio.create_task(fails())
    await asyncio.wait({failed})
    await cancel_and_wait(failed)
    await cancel_and_wait()
    assert isinstance(failed.exception(), ValueError)
