"""Real daemons for tests: those of `ifabric.scratch`, which can be asked how they are."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ifabric.scratch.daemons import BASE, Daemon

__all__ = ["BASE", "RealDaemon"]

ASK_S = 3.0


class RealDaemon(Daemon):
    """One daemon process, with a state directory that a restart keeps; and what it says about itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: for asking an https port; by itself it takes whoever answers for the daemon
        self.http_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.http_tls.check_hostname, self.http_tls.verify_mode = False, ssl.CERT_NONE

    def log(self) -> list[dict[str, Any]]:
        """The same, line by line, as far as the lines are JSON."""
        lines = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                decoded = msgspec.json.decode(line)
                lines += [decoded] if isinstance(decoded, dict) else []
        return lines

    async def http(self, path: str) -> tuple[int, str]:
        """The status and the body of a GET."""
        assert self.found is not None, "it is ready"
        url = urlsplit(self.found.http)
        async with asyncio.timeout(ASK_S):
            tls = self.http_tls if url.scheme == "https" else None
            reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=tls)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return int(head.split(b" ", 2)[1]), body.decode()

    async def ready(self) -> tuple[int, list[str]]:
        """What `/readyz` says: the status, and what is missing."""
        status, body = await self.http("/readyz")
        return status, msgspec.json.decode(body)["not_ready"]

    async def health(self) -> dict[str, Any]:
        """What `/health` says."""
        found: dict[str, Any] = msgspec.json.decode((await self.http("/health"))[1])
        return found

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, summed over every label that is not named."""
        total = 0.0
        for line in (await self.http("/metrics"))[1].splitlines():
            found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total
