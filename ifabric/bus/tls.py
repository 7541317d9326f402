"""What TLS has against NATS servers, of each, in words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ifabric.errors import Unreachable
from ifabric.tls import Files
from ifabric.tls.diagnosis import NATS, Trouble, diagnose


async def troubles(servers: Sequence[str], files: Files, *, tls: bool, timeout_s: float) -> list[Trouble | None]:
    """One of each server; None for one that TLS has nothing against."""
    asked = (diagnose(server, files, NATS, tls=tls, timeout_s=timeout_s) for server in servers)
    return list(await asyncio.gather(*asked))


async def explained(servers: Sequence[str], files: Files, *, tls: bool, timeout_s: float) -> str:
    """Why none of them can be connected to; "" when that is not for TLS."""
    found = await troubles(servers, files, tls=tls, timeout_s=timeout_s)
    return _in_words(servers, found) if any(trouble is not None and trouble.certain for trouble in found) else ""


async def usable(servers: Sequence[str], files: Files, *, tls: bool, timeout_s: float) -> None:
    """Raises `Unreachable` when TLS has something against every one of them. One that does not answer may yet."""
    found = await troubles(servers, files, tls=tls, timeout_s=timeout_s)
    if all(trouble is not None and trouble.certain for trouble in found):
        raise Unreachable(f"no NATS answers: {_in_words(servers, found)}")


def _in_words(servers: Sequence[str], found: Sequence[Trouble | None]) -> str:
    # without the credentials that a URL may carry
    pairs = [(server.rpartition("@")[2], trouble) for server, trouble in zip(servers, found, strict=True)]
    return "; ".join(f"{server}: {trouble.sentence}" for server, trouble in pairs if trouble is not None)
