"""A cancellation that gets lost is repeated."""

from __future__ import annotations

import asyncio
import sys

from ifabric import cancellation
from ifabric.cancellation import cancel_and_wait, heard


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


async def test_a_cancellation_that_the_awaited_swallows_is_heard_all_the_same() -> None:
    async def asked(answer: asyncio.Future[str], *, heeded: bool) -> str:
        waiting = asyncio.wait_for(answer, 10)
        return await (heard(waiting) if heeded else waiting)

    async def cancelled_with_the_answer(*, heeded: bool) -> asyncio.Task[str]:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(asked(answer, heeded=heeded))
        await asyncio.sleep(0)
        answer.set_result("here")
        await asyncio.sleep(0)  # the answer is on its way to the task
        task.cancel()
        await asyncio.wait({task})
        return task

    if sys.version_info < (3, 12):
        assert (await cancelled_with_the_answer(heeded=False)).result() == "here", "the library swallows it"
    assert (await cancelled_with_the_answer(heeded=True)).cancelled()


async def test_what_is_heard_gives_its_result_and_its_error_when_nobody_cancels() -> None:
    async def gives() -> int:
        return 1

    async def fails() -> int:
        raise ValueError

    assert await heard(gives()) == 1
    failed = (await asyncio.gather(heard(fails()), return_exceptions=True))[0]
    assert isinstance(failed, ValueError)
