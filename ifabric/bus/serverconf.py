"""The configuration of a nats-server that the fabric can live with, as text.

What is set away from the default, and why: pings every second, because a frozen member of a queue group keeps its share
of the requests until they go unanswered; two seconds to write, so that a slow reader costs nobody else; monitoring on
loopback; no listener that is not needed. With identities, agents and daemons share an account, the system account is
where the auth callout is asked, and who is not a daemon is whoever the callout says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ifabric.wire.permissions import SYSTEM, Permissions, daemon


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates in PEM. With `verify`, only clients with a certificate of `ca_file` are answered."""

    cert_file: str
    key_file: str
    ca_file: str
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class Routes:
    """A server's place in a cluster."""

    cluster: str
    listen: str
    routes: Sequence[str]
    tls: Tls | None = None


@dataclass(frozen=True, kw_only=True)
class Identities:
    """Public keys: who signs the callout's answers (an account key), and the daemons' two users.

    `static` are users that need no callout; with any, no callout is asked. `page_operators` are those in whose name a
    daemon may say what they do from its live page.
    """

    issuer: str
    daemon: str
    system: str
    account: str = "FABRIC"
    static: Mapping[str, Permissions] | None = None
    page_operators: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ServerConf:
    """One nats-server."""

    name: str
    listen: str
    store_dir: str | Path
    max_payload: str = "1MB"
    max_file_store: str = "16GB"
    monitoring: str | None = None
    tls: Tls | None = None
    routes: Routes | None = None
    identities: Identities | None = None
    header: str = "written by ifabric"

    def text(self) -> str:
        """As nats-server reads it."""
        lines = [
            f"# {self.header}",
            f'listen: "{self.listen}"',
            f'server_name: "{self.name}"',
            f"max_payload: {self.max_payload}",
            "# a frozen member of a queue group keeps its share of the requests until its pings go unanswered",
            'ping_interval: "1s"',
            "ping_max: 2",
            'write_deadline: "2s"',
            f'jetstream {{ store_dir: "{self.store_dir}", max_file_store: {self.max_file_store}, max_memory_store: 256MB }}',
        ]
        if self.monitoring is not None:
            lines.append(f'http: "{self.monitoring}"')
        if self.tls is not None:
            lines += ["tls {", *_tls(self.tls), "}"]
        if self.routes is not None:
            lines += _routes(self.routes)
        if self.identities is not None:
            lines += _identities(self.identities)
        return "\n".join(lines) + "\n"


def _tls(tls: Tls) -> list[str]:
    return [
        f'  cert_file: "{tls.cert_file}"',
        f'  key_file: "{tls.key_file}"',
        f'  ca_file: "{tls.ca_file}"',
        f"  verify: {str(tls.verify).lower()}",
        '  min_version: "1.3"',
        "  timeout: 5",
    ]


def _routes(routes: Routes) -> list[str]:
    lines = ["cluster {", f'  name: "{routes.cluster}"', f'  listen: "{routes.listen}"']
    if routes.tls is not None:
        lines += ["  tls {", *("  " + line for line in _tls(routes.tls)), "  }"]
    lines += ["  routes: [", *(f'    "{route}"' for route in routes.routes), "  ]", "}"]
    return lines


def _identities(found: Identities) -> list[str]:
    users = [
        _user(found.daemon, daemon(found.page_operators)),
        *(_user(key, may) for key, may in (found.static or {}).items()),
    ]
    lines = [
        "system_account: SYS",
        "accounts {",
        f"  SYS {{ users: [ {_user(found.system, SYSTEM)} ] }}",
        f"  {found.account} {{",
        "    jetstream: enabled",
        "    users: [",
        *(f"      {user}" for user in users),
        "    ]",
        "  }",
        "}",
    ]
    if found.static is None:
        lines += [
            "# whoever is not one of the two users above: a daemon says who that is, and what they may do",
            "authorization {",
            "  timeout: 5",
            f"  auth_callout {{ issuer: {found.issuer}, account: SYS, auth_users: [ {found.daemon}, {found.system} ] }}",
            "}",
        ]
    return lines


def _user(key: str, may: Permissions) -> str:
    return f"{{ nkey: {key}, permissions: {{ publish: {_list(may.publish)}, subscribe: {_list(may.subscribe)} }} }}"


def _list(subjects: Sequence[str]) -> str:
    return "{ allow: [" + ", ".join(f'"{subject}"' for subject in subjects) + "] }"
