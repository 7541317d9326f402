"""The page itself: its HTML, its scripts and its style, as files beside this package; and what every answer says.

Nothing is loaded from elsewhere and nothing is written into the HTML, so the browser is told to allow only what comes
from here. The files are read once: a daemon shows the page that it was installed with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent.parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
#: on everything that the page is made of, data as well
SAFE: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Shell:
    """The page's own files, by the path that they are asked for."""

    def __init__(self, folder: Path = FOLDER) -> None:
        wanted = {"/": folder / "page.html", "/page.js": folder / "page.js", "/page.css": folder / "page.css"}
        wanted |= {f"/page/{script.name}": script for script in sorted((folder / "page").glob("*.js"))}
        self._files = {path: file for path, file in wanted.items() if file.is_file()}
        self._read: dict[str, bytes] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        """All that can be asked for."""
        return tuple(self._files)

    async def serve(self, request: Request) -> Response:
        """One of them; 304 when the browser has it already."""
        path = request.url.path
        file = self._files[path]
        body = self._read.get(path)
        if body is None:
            body = self._read[path] = file.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {
            **SAFE,
            "Content-Security-Policy": POLICY,
            "Cross-Origin-Opener-Policy": "same-origin",
            "X-Frame-Options": "DENY",
            "Cache-Control": "no-cache",
            "ETag": tag,
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=TYPES[file.suffix])
