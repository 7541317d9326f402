"""Modules that are too large for a message, on their way to the fabric: in parts, each a request like any other.

The parts of a module are sent `WINDOW` at a time, whichever daemon takes them; the fabric knows which have come. How
large a part may be is said by the server, whose limit is for a message as a whole: in base64 three bytes become four.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import FabricError, TooLarge
from ifabric.wire import chassis as wire

#: parts that are under way at once
WINDOW = 4
#: of a message, what is not the module: the other fields, and the headers
AROUND_BYTES = 4096
#: how long the answer to one part is waited for, before it is sent once more: long enough for a slow line
PART_S = 10.0

#: is told how many bytes have come, of how many
Progress = Callable[[int, int], None]


def part_bytes(max_payload_bytes: int) -> int:
    """How much of a module goes into one message."""
    return max(1, min(wire.INLINE_MAX_BYTES, (max_payload_bytes - AROUND_BYTES) // 4 * 3))


async def in_parts(
    send: Callable[[wire.Upload], Awaitable[Any]], name: str, data: bytes, most: int, progress: Progress | None
) -> None:
    """Sends a module as the upload `name`, in parts of at most `most` bytes, each answered when this returns.

    Raises what the first part that is refused was refused with, when no other is under way any more.
    """
    count = -(-len(data) // most)
    if count > wire.PARTS_MAX:
        raise TooLarge(
            f"the module has {len(data)} bytes: {count} parts of at most {most} bytes each, which is what this NATS "
            f"carries in a message, and {wire.PARTS_MAX} parts are allowed; nothing was sent",
            size=len(data),
            max=most * wire.PARTS_MAX,
        )
    whole = hashlib.sha256(data).hexdigest()
    numbers = iter(range(count))
    come = 0

    async def work() -> None:
        nonlocal come
        for number in numbers:  # shared: each takes the next one
            part = data[number * most : (number + 1) * most]
            encoded = base64.b64encode(part).decode()
            await send(wire.Upload(upload=name, part=number, data=encoded, last=number == count - 1, sha256=whole))
            come += len(part)
            if progress is not None:
                progress(come, len(data))

    if progress is not None:
        progress(0, len(data))
    workers = [asyncio.ensure_future(work()) for _ in range(min(WINDOW, count))]
    try:
        await asyncio.gather(*workers)
    except FabricError as error:
        raise type(error)(f"the module could not be uploaded: {error.message}", **error.facts) from None
    finally:
        await cancel_and_wait(*workers)
