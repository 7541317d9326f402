"""A stub of Vault over HTTP, for want of a real one here: it speaks only the paths that the chassis and its tests use.

What it has of Vault: tokens that are checked, end and are revoked with everything that was given under them; KV v2
with deleted secrets; AppRole with role-ids, secret-ids and their number of uses, service and batch tokens; leases that
are renewed up to a maximum and revoked; the statuses and bodies of its errors. What it has not: policies (a path can
be forbidden to all but root), mounts, namespaces, storage, a cluster. Its time is the `now` that it is given.

And what a test needs: it freezes, drips, is sealed, redirects, and remembers every request.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DENIED = (403, {"errors": ["permission denied"]})
ABSENT = (404, {"errors": []})


@dataclass
class Given:
    """A token or a lease."""

    until: float
    max_until: float
    renewable: bool
    ttl_s: float
    #: the token that it was given under
    parent: str = ""
    uses: int = 0


@dataclass
class Role:
    """An AppRole."""

    role_id: str
    ttl_s: float
    max_s: float
    batch: bool = False
    #: secret-id -> uses left
    secret_ids: dict[str, float] = field(default_factory=dict)


class VaultStub:
    """One server, on loopback, in threads of its own."""

    def __init__(self, now: Callable[[], float], *, root: str = "hvs.root", tls: ssl.SSLContext | None = None) -> None:
        self.now, self.root = now, root
        self.secrets: dict[str, dict[str, Any] | None] = {}
        self.tokens: dict[str, Given] = {root: Given(math.inf, math.inf, False, 0.0)}
        self.roles: dict[str, Role] = {}
        self.leases: dict[str, Given] = {}
        self.revoked: list[str] = []
        #: what a dynamic secret is given
        self.lease_s, self.lease_max_s, self.lease_renewable = 60.0, 3600.0, True
        #: paths that only root may use
        self.forbidden: set[str] = set()
        #: (method, path, status) of each request that was answered; status 0: on its way
        self.requests: list[tuple[str, str, int]] = []
        self.headers: list[dict[str, str]] = []
        #: answers everything: (status, body or bytes, headers)
        self.instead: tuple[int, Any, dict[str, str]] | None = None
        #: called for each request before it is answered
        self.before: Callable[[str, str], None] = lambda method, path: None
        #: bytes now and then, for ever
        self.drips = False
        self.waiting = 0
        self._running, self._ended = threading.Event(), threading.Event()
        self._running.set()
        self._lock = threading.RLock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda: stub.answer(self)
                raise AttributeError(name)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, request: Any, address: Any) -> None: ...

            def shutdown_request(self, request: Any) -> None:
                with contextlib.suppress(OSError):
                    super().shutdown_request(request)

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._running.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- what a test does to it -------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """It accepts, and answers nobody."""
        self._running.clear()

    def thaw(self) -> None:
        self._running.set()

    def asked(self, path: str = "", method: str = "") -> int:
        """How often something at or below the path was asked for."""
        return sum(p.startswith(path) and method in ("", m) for m, p, _ in self.requests)

    # -- HTTP -------------------------------------------------------------------------------------------------------------

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path, method = handler.path.removeprefix("/v1/"), handler.command
        self.headers.append(dict(handler.headers.items()))
        self.waiting += 1
        self._running.wait()
        self.before(method, path)
        self.waiting -= 1
        headers: dict[str, str] = {}
        if self.instead is not None:
            status, found, headers = self.instead
        else:
            with self._lock:
                status, found = self._found(method, path, handler.headers, json.loads(body) if body else {})
        self.requests.append((method, path, status))
        data = found if isinstance(found, bytes) else json.dumps(found).encode() if found is not None else b""
        head = f"HTTP/1.1 {status} said\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        whole = head.encode() + b"\r\n" + data
        with contextlib.suppress(OSError):
            if self.drips:
                self._drip(handler, whole)
            # in one write: two cost 40 ms of delayed acknowledgement
            handler.wfile.write(whole)
            return
        handler.close_connection = True

    def _drip(self, handler: BaseHTTPRequestHandler, whole: bytes) -> None:
        handler.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handler.wfile.write(whole[:20])
        while not self._ended.wait(0.02):
            handler.wfile.write(b"x")

    # -- Vault ------------------------------------------------------------------------------------------------------------

    def _found(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "sys/health":  # for everybody
            return 200, {"initialized": True, "sealed": False, "standby": False}
        if path == "auth/approle/login":
            return self._login(body)
        token = headers.get("X-Vault-Token") or ""
        given = self._valid(self.tokens, token)
        if given is None or (path in self.forbidden and token != self.root):
            return DENIED
        if headers.get("X-Vault-Request") != "true":
            return 412, {"errors": ["no X-Vault-Request"]}
        if path.startswith("secret/data/"):
            return self._kv(method, path, body)
        if path.startswith("database/creds/") and method == "GET":
            return self._dynamic(path, token)
        if path in ("sys/leases/renew", "sys/leases/revoke") and method == "PUT":
            return self._lease(path, body)
        if path.startswith("auth/token/"):
            return self._token(path, token, given, body)
        return self._admin(path, token, body)

    def _valid(self, among: dict[str, Given], name: str) -> Given | None:
        given = among.get(name)
        if given is not None and self.now() >= given.until:
            self._end(name)
            return None
        if given is not None and given.parent and self._valid(self.tokens, given.parent) is None:
            self._end(name)
            return None
        return given

    def _end(self, name: str) -> None:
        """With everything that was given under it."""
        for among in (self.tokens, self.leases):
            if among.pop(name, None) is not None:
                self.revoked.append(name)
            for child in [key for key, given in among.items() if given.parent == name]:
                self._end(child)

    def _login(self, body: dict[str, Any]) -> tuple[int, Any]:
        role = next((role for role in self.roles.values() if role.role_id == body.get("role_id")), None)
        if role is None or role.secret_ids.get(str(body.get("secret_id")), 0) < 1:
            return 400, {"errors": ["invalid role or secret ID"]}
        role.secret_ids[body["secret_id"]] -= 1
        return 200, {"auth": self._new_token(role.ttl_s, role.max_s, batch=role.batch)}

    def _new_token(self, ttl_s: float, max_s: float, *, batch: bool = False) -> dict[str, Any]:
        token = ("hvb." if batch else "hvs.") + secrets.token_urlsafe(24)
        now = self.now()
        self.tokens[token] = Given(now + ttl_s if ttl_s else math.inf, now + max_s, bool(ttl_s) and not batch, ttl_s)
        return {"client_token": token, "lease_duration": ttl_s, "renewable": self.tokens[token].renewable}

    def _renewed(self, given: Given, increment: float) -> float:
        given.until = min(self.now() + (increment or given.ttl_s), given.max_until)
        return given.until - self.now()

    def _token(self, path: str, token: str, given: Given, body: dict[str, Any]) -> tuple[int, Any]:
        match path.removeprefix("auth/token/"):
            case "lookup-self":
                left_s = 0 if math.isinf(given.until) else int(given.until - self.now())  # 0: it does not end
                return 200, {"data": {"id": token, "ttl": left_s}}
            case "renew-self":
                if not given.renewable:
                    return 400, {"errors": ["token is not renewable"]}
                ttl_s = int(self._renewed(given, 0))
                return 200, {"auth": {"client_token": token, "lease_duration": ttl_s, "renewable": True}}
            case "revoke-self":
                self._end(token)
                return 204, None
            case "create" if token == self.root:
                return 200, {"auth": self._new_token(float(str(body.get("ttl", "0")).rstrip("s")), math.inf)}
            case "revoke" if token == self.root:
                self._end(body["token"])
                return 204, None
        return DENIED

    def _kv(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if method == "POST":
            self.secrets[path] = body["data"]
            return 200, {"data": {"version": 1}}
        if method == "DELETE":
            self.secrets[path] = None
            return 204, None
        if path not in self.secrets:
            return ABSENT
        fields = self.secrets[path]
        metadata = {"version": 1, "deletion_time": "" if fields is not None else "2026-01-01T00:00:00Z"}
        answer = {
            "lease_id": "",
            "lease_duration": 0,
            "renewable": False,
            "data": {"data": fields, "metadata": metadata},
        }
        return 200 if fields is not None else 404, answer

    def _dynamic(self, path: str, token: str) -> tuple[int, Any]:
        lease, now = f"{path}/{secrets.token_urlsafe(18)}", self.now()
        self.leases[lease] = Given(
            now + self.lease_s, now + self.lease_max_s, self.lease_renewable, self.lease_s, parent=token
        )
        fields = {"username": f"v-{secrets.token_hex(4)}", "password": f"dynamic-canary-{secrets.token_urlsafe(18)}"}
        return 200, {
            "lease_id": lease, "lease_duration": self.lease_s, "renewable": self.lease_renewable, "data": fields
        }  # fmt: skip

    def _lease(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lease_id"]
        given = self._valid(self.leases, name)
        if path.endswith("revoke"):
            self._end(name)
            return 204, None
        if given is None or not given.renewable:
            return 400, {"errors": ["lease not found or lease is not renewable"]}
        left_s = int(self._renewed(given, float(body.get("increment") or 0)))
        return 200, {"lease_id": name, "lease_duration": left_s, "renewable": True}

    def _admin(self, path: str, token: str, body: dict[str, Any]) -> tuple[int, Any]:
        parts = path.split("/")
        if token != self.root:
            return DENIED
        if path.startswith(("sys/auth/", "sys/policies/acl/")):
            return 204, None
        if parts[:3] == ["auth", "approle", "role"]:
            role = self.roles.get(parts[3])
            match parts[4:]:
                case []:
                    ttl_s, max_s = (float(str(body[key]).rstrip("s")) for key in ("token_ttl", "token_max_ttl"))
                    batch = body.get("token_type") == "batch"
                    self.roles[parts[3]] = Role(secrets.token_urlsafe(18), ttl_s, max_s or math.inf, batch)
                    return 204, None
                case ["role-id"] if role is not None:
                    return 200, {"data": {"role_id": role.role_id}}
                case ["secret-id"] if role is not None:
                    made = secrets.token_urlsafe(18)
                    role.secret_ids[made] = body.get("num_uses") or math.inf
                    return 200, {"data": {"secret_id": made}}
        return ABSENT
