# ruff: noqa: INP001  # copied into the image, beside no package
"""Whether the daemon in this container is alive: exit 0 when /livez answers.

It finds the port in the daemon's own endpoints.json, and shows the daemon's own client certificate where one is asked for.
The standard library is enough: a health check runs every few seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

STATE = Path(os.environ.get("IFABRIC__STATE_DIR", "/var/lib/infrafabric"))
CERTS = Path(os.environ.get("LIVEZ_CERTS", "/etc/infrafabric/certs"))
TIMEOUT_S = 4.0


def main() -> int:
    """Asks, and says in a line what is wrong."""
    try:
        found = sorted(STATE.rglob("endpoints.json"))
        url = urlsplit(json.loads(found[0].read_bytes())["http"])
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection("127.0.0.1", url.port, timeout=TIMEOUT_S, context=_context())
        else:
            connection = http.client.HTTPConnection("127.0.0.1", url.port, timeout=TIMEOUT_S)
        connection.request("GET", "/livez")
        status = connection.getresponse().status
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        sys.stderr.write(f"not alive: {error!r}\n")
        return 1
    return 0 if status == http.client.OK else 1


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CERTS / "ca.crt")
    context.check_hostname = False  # the certificate has the name that others use; here it is itself, on loopback
    for certificate in sorted(CERTS.glob("*-client.crt")):
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


if __name__ == "__main__":
    sys.exit(main())
