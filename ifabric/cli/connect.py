"""How a verb reaches the fabric: the options that all of them share, and a client for one command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from cyclopts import Parameter

from ifabric.client import Client

T = TypeVar("T")


@Parameter(name="*")
@dataclass(frozen=True)
class Where:
    """Where the fabric is."""

    nats: Annotated[
        str | None, Parameter(help="NATS URLs, comma-separated. Default: $IFABRIC_NATS, or this machine's daemon.")
    ] = None
    state_dir: Annotated[Path | None, Parameter(help="State directory of the local daemon.")] = None
    timeout: Annotated[float, Parameter(help="Seconds to try.")] = 5.0


def client(
    where: Where | None, session: str | None = None, *, ttl_s: int | None = None, capabilities: tuple[str, ...] = ()
) -> Client:
    """A client that says bye when it leaves; set `leave_on_exit` for one that does not."""
    at = where or Where()
    return Client.connect(
        at.nats,
        session=session,
        ttl_s=ttl_s,
        capabilities=capabilities,
        timeout_s=at.timeout,
        state_dir=at.state_dir,
    )


def with_client(where: Where | None, session: str | None, act: Callable[[Client], Awaitable[T]]) -> T:
    """Runs one thing with a client, to its end."""
    import asyncio

    async def run() -> T:
        async with client(where, session) as connected:
            connected.leave_on_exit = False
            return await act(connected)

    return asyncio.run(run())
