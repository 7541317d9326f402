"""/playbooks/ and /playbooks/<name>: what to do when something is wrong. Alerts lead here.

They hold nothing of this fabric's own, so no token is asked for: whoever is on call reads them on whatever is at hand.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ifabric import playbooks

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """For the HTTP port."""
    return [
        Route("/playbooks.css", _css),
        Route("/playbooks/", _index),
        Route("/playbooks/{name}", _page),
    ]


async def _css(_: Request) -> Response:
    return Response(playbooks.CSS, media_type="text/css", headers=HEADERS)


async def _index(_: Request) -> Response:
    return Response(playbooks.index_html(), media_type="text/html", headers=HEADERS)


async def _page(request: Request) -> Response:
    try:
        return Response(playbooks.html(request.path_params["name"]), media_type="text/html", headers=HEADERS)
    except KeyError:
        return Response(playbooks.missing_html(), 404, media_type="text/html", headers=HEADERS)
