"""How a verb reaches the fabric: a client for one command."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from ifabric.cli.options import Where
from ifabric.connecting import credential_of, session_of
from ifabric.errors import ConfigError
from ifabric.wire.subjects import SESSION

if TYPE_CHECKING:
    from ifabric.client import Client

T = TypeVar("T")


def client(
    where: Where | None, session: str | None = None, *, ttl_s: int | None = None, capabilities: tuple[str, ...] = ()
) -> Client:
    """A client that says bye when it leaves; set `leave_on_exit` for one that does not."""
    from ifabric.client import Client

    at = where or Where()
    name = session_of(session, credential_of(at.credentials))
    if name is not None and not SESSION.fullmatch(name):
        raise ConfigError(f"the session {name!r} is none: it must match {SESSION.pattern}")
    made = Client.connect(
        at.nats,
        session=name,
        ttl_s=ttl_s,
        capabilities=capabilities,
        timeout_s=at.timeout,
        state_dir=at.state_dir,
        credentials=at.credentials,
        ca=at.ca,
    )
    made.trace = os.environ.get("TRACEPARENT", "")  # of the job or script that this command is a step of
    return made


def whose(session: str | None, where: Where | None) -> str:
    """The session that a verb is for. `ConfigError` when nothing says whose."""
    name = session_of(session, credential_of((where or Where()).credentials))
    if name is None:
        raise ConfigError("say whose it is: --session, $IFABRIC_SESSION, or a credential (--credentials)")
    return name


def with_client(
    where: Where | None,
    session: str | None,
    act: Callable[[Client], Awaitable[T]],
    *,
    ttl_s: int | None = None,
    capabilities: tuple[str, ...] = (),
) -> T:
    """Runs one thing with a client, to its end. What the session holds outlives it."""
    import asyncio

    async def run() -> T:
        async with client(where, session, ttl_s=ttl_s, capabilities=capabilities) as connected:
            connected.leave_on_exit = False
            return await act(connected)

    return asyncio.run(run())
