"""What a member of etcd tells over HTTP to whoever has a certificate.

With access control on, its RPC `Status` answers root alone (since 3.5.28), and a daemon is not root. The version, and
whether the member is full, are on the same port without it: `/version`, and `/health`, which with `serializable` is no
proposal. An etcd that serves HTTP elsewhere (`--listen-client-http-urls`) tells neither here.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ifabric.errors import ConfigError
from ifabric.store.channel import EtcdSettings
from ifabric.tls import client_context

ANSWER_MAX_BYTES = 64 * 1024


async def version(endpoint: str, settings: EtcdSettings) -> str:
    """Of the member; "" when it does not tell."""
    return str((await _told(endpoint, "/version", settings)).get("etcdserver", ""))


async def alarms(endpoint: str, settings: EtcdSettings) -> tuple[str, ...]:
    """The names of its alarms, such as "NOSPACE"; none when it does not tell."""
    reason = str((await _told(endpoint, "/health?serializable=true", settings)).get("reason", ""))
    return (reason.removeprefix("ALARM "),) if reason.startswith("ALARM ") else ()


async def _told(endpoint: str, path: str, settings: EtcdSettings) -> dict[str, Any]:
    """The JSON that a GET brings; empty when there is none in time."""
    url = urlsplit(endpoint)
    try:
        # made anew each time: certificates are replaced while a daemon runs
        tls = client_context(settings.files) if url.scheme == "https" else None
        async with asyncio.timeout(settings.timeout_s):
            reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=tls)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {url.netloc}\r\n\r\n".encode())
                _, _, body = (await reader.read(ANSWER_MAX_BYTES)).partition(b"\r\n\r\n")
            finally:
                writer.close()
        found = msgspec.json.decode(body)
    except (ConfigError, OSError, ValueError, TimeoutError, msgspec.DecodeError):
        return {}
    return found if isinstance(found, dict) else {}
