"""`ifabric status` and `ifabric asyncapi`."""

from __future__ import annotations

import json as stdlib_json
import urllib.error
import urllib.request
from typing import Any, get_args

import yaml
from rich.markup import escape

from ifabric import endpoints
from ifabric.cli.connect import Where, with_client
from ifabric.cli.output import out, print_json, state
from ifabric.errors import Unreachable
from ifabric.wire import coordinator as wire

TIMEOUT_S = 3.0


def status(*, json: bool = False, where: Where | None = None) -> int:
    """Show the daemon of this machine: its health, its parts, its tasks. Exit 1 unless it is healthy.

    Examples:
        ifabric status
        ifabric status --json | jq .health.status
    """
    at = where or Where()
    folder = at.state_dir or endpoints.default_state_dir()
    found = endpoints.read(folder)
    if found is None:
        raise Unreachable(f"no daemon runs here (none in {folder}). Start one with `ifabric run`, or give --state-dir.")
    health = _get(found.http + "/health")
    page = with_client(Where(nats=found.nats, timeout=at.timeout), None, lambda c: c.list(limit=1))
    if json:
        print_json({"endpoints": found, "health": health, "tasks": page.counts})
        return 0 if health["status"] == "healthy" else 1
    colour = {"healthy": "green", "degraded": "yellow"}.get(health["status"], "red")
    out.print(
        f"[{colour}]●[/] {health['status']}  ifabric {found.version}, process {found.pid}, up {health['uptime_s']:.0f} s"
    )
    out.print(f"  etcd  {health['etcd']}  {', '.join(found.etcd)}")
    out.print(f"  NATS  {health['nats']}  {found.nats}")
    out.print(f"  HTTP  {found.http}   loop lag {health['loop_lag_s'] * 1000:.1f} ms")
    _tree(health["actors"], 1)
    for sentence in (*health["not_ready"], *health["warnings"]):
        out.print(f"  [yellow]![/] {escape(sentence)}")
    out.print("  tasks " + "  ".join(f"{state(name)} {page.counts.get(name, 0)}" for name in get_args(wire.State)))
    return 0 if health["status"] == "healthy" else 1


def asyncapi(*, json: bool = False) -> int:
    """Print the wire protocol as an AsyncAPI 3 document, in YAML or (--json) JSON."""
    from ifabric.asyncapi import document

    made = document()
    if json:
        print_json(made)
    else:
        print(yaml.safe_dump(stdlib_json.loads(stdlib_json.dumps(made)), sort_keys=False, allow_unicode=True), end="")
    return 0


def _tree(node: dict[str, Any], depth: int) -> None:
    for child in node["children"]:
        mark = "[green]✔[/]" if child["state"] == "running" else "[red]✘[/]"
        again = f", started again {child['restarts']} times: {child.get('reason', '')}" if child["restarts"] else ""
        out.print(f"  {'  ' * depth}{mark} {child['name']} {escape(again)}")
        if "children" in child:
            _tree(child, depth + 1)


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            body: dict[str, Any] = stdlib_json.load(answer)
    except urllib.error.HTTPError as error:
        body = stdlib_json.load(error)
    except OSError as error:
        raise Unreachable(f"the daemon's HTTP port does not answer at {url}: {error}") from None
    return body
