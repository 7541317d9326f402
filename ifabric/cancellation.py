"""Ending a task for certain."""

from __future__ import annotations

import asyncio
from typing import Any

#: how long one cancellation may take to show before the next
AGAIN_S = 0.25


async def cancel_and_wait(*awaited: asyncio.Future[Any]) -> None:
    """Cancels tasks and returns when all have ended, however they ended.

    A cancellation can get lost: before Python 3.12 `asyncio.wait_for`, which the libraries below us use, swallows one
    that comes together with the result it waits for (cpython gh-81839). So it is repeated until it is heard.
    """
    left: set[asyncio.Future[Any]] = {task for task in awaited if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    await asyncio.gather(*awaited, return_exceptions=True)  # nobody else asks for what they raised
