"""Ending a task for certain.

A cancellation can get lost: before Python 3.12 `asyncio.wait_for`, which the libraries below us use, swallows one that
comes together with the result it waits for (cpython gh-81839).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

#: how long one cancellation may take to show before the next
AGAIN_S = 0.25


async def cancel_and_wait(*awaited: asyncio.Future[Any]) -> None:
    """Cancels tasks and returns when all have ended, however they ended.

    Since one can get lost, it is repeated until it is heard.
    """
    left: set[asyncio.Future[Any]] = {task for task in awaited if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    await asyncio.gather(*awaited, return_exceptions=True)  # nobody else asks for what they raised


async def heard(awaited: Awaitable[T]) -> T:
    """What it gives; but `CancelledError` when the caller was cancelled meanwhile and it has swallowed that."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await awaited
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
