"""Reads `GET /api/stream` of a daemon: server-sent events, as they come."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ifabric.cli.daemon import HttpTls, connection_to
from ifabric.endpoints import Endpoints
from ifabric.errors import FabricError, Forbidden, Unreachable

PATH = "/api/stream"
#: of one event; a daemon sends far less
EVENT_MAX_BYTES = 8 * 1024 * 1024
READ_BYTES = 65_536


class Parser:
    """Events out of bytes, however they are cut: (event, data) pairs. What is no event is left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[str, Any]]:
        """The events that are complete now. `FabricError` when one does not end."""
        *blocks, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > EVENT_MAX_BYTES:
            raise FabricError(f"the daemon sends an event of more than {EVENT_MAX_BYTES} bytes")
        found = []
        for block in blocks:
            name, lines = "message", []
            for line in block.split(b"\n"):
                key, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if key == b"event":
                    name = value.decode(errors="replace")
                elif key == b"data":
                    lines.append(value)
            if lines:
                try:
                    found.append((name, msgspec.json.decode(b"\n".join(lines))))
                except msgspec.DecodeError:
                    continue
        return found


def stream(
    found: Endpoints,
    timeout_s: float,
    tls: HttpTls | None,
    token: str | None,
    opened: Callable[[socket.socket], None] = lambda _: None,
) -> Iterator[tuple[str, Any]]:
    """The events until the connection ends, or until nothing came for `timeout_s`. `opened` is told the socket: who
    shuts it down from another thread ends the stream.

    Raises `Unreachable` when it cannot be opened or ends; `Forbidden` when a token is asked for; `FabricError` when
    there is no such page.
    """
    url = urlsplit(found.http)
    connection = connection_to(found, url.hostname or "", url.port, timeout_s, (tls or HttpTls()).files)
    headers: Mapping[str, str] = {"Accept": "text/event-stream"}
    if token is not None:
        headers = {**headers, "Authorization": f"Bearer {token}"}
    try:
        connection.connect()
        opened(connection.sock)
        connection.request("GET", PATH, headers=headers)
        with connection.getresponse() as answer:
            _accept(answer, found.http)
            parser = Parser()
            while data := answer.read1(READ_BYTES):
                yield from parser.feed(data)
    except TimeoutError:
        raise Unreachable(f"nothing came from {found.http} for {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{found.http} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()
    raise Unreachable(f"{found.http} has ended the connection")


def _accept(answer: http.client.HTTPResponse, where: str) -> None:
    if answer.status in (401, 403):
        raise Forbidden(f"{where} shows its page only with a token: give --token-file", where=where)
    if answer.status == 404:
        raise FabricError(f"{where} has no live page: page.enabled is false there, or the daemon is an older one")
    if answer.status != 200:
        raise Unreachable(f"{where}{PATH} answers {answer.status}")
