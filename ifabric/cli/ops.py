"""`ifabric status` and `ifabric asyncapi`."""

from __future__ import annotations

import json as stdlib_json
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric import endpoints
from ifabric.cli.connect import with_client
from ifabric.cli.daemon import HttpTls, ask
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json
from ifabric.cli.task import counts
from ifabric.errors import FabricError, Unreachable

#: what is shown of the metrics: name, and a label's value
NUMBERS = {
    "sessions": ("if_coordinator_active_sessions",),
    "holds": ("if_governor_holds_open",),
    "breakers_open": ("if_governor_breakers", 'state="open"'),
    "breakers_half_open": ("if_governor_breakers", 'state="half_open"'),
    "sandboxes": ("if_chassis_sandbox_count",),
    "sandbox_workers_idle": ("if_chassis_workers", 'state="idle"'),
    "sandbox_queue": ("if_chassis_queue_depth",),
}


def status(
    *,
    state_dir: Annotated[Path | None, Parameter(help="State directory of the daemon.")] = None,
    timeout: Annotated[float, Parameter(help="Seconds to try.", validator=Number(gt=0, lte=3600))] = 3.0,
    tls: HttpTls | None = None,
    json: Json = False,
) -> int:
    """Show the daemon of this machine: its health, its parts, its tasks. Exit 1
    unless it is healthy.

    For example:

        ifabric status
        ifabric status --json | jq .health.status
    """
    folder = state_dir or endpoints.default_state_dir()
    found = endpoints.read(folder)
    if found is None:
        raise Unreachable(f"no daemon runs here (none in {folder}); start one with `ifabric run`, or give --state-dir")
    health: dict[str, Any] = stdlib_json.loads(ask(found, "/health", timeout, tls))
    numbers = _numbers(found, timeout, tls)
    tasks: dict[str, int] | None = None
    try:
        tasks = with_client(Where(nats=found.nats, timeout=timeout), None, lambda c: c.list(limit=1)).counts
    except FabricError as error:  # a daemon that has lost its servers still says so itself
        health["warnings"] = [*health["warnings"], f"tasks cannot be counted: {error.message}"]
    healthy = health["status"] == "healthy" and tasks is not None
    if json:
        print_json({"endpoints": found, "health": health, "tasks": tasks, **numbers})
    else:
        _show(found, health, tasks, numbers)
    return 0 if healthy else 1


def _show(
    found: endpoints.Endpoints, health: dict[str, Any], tasks: dict[str, int] | None, numbers: dict[str, int | None]
) -> None:
    colour = {"healthy": "green", "degraded": "yellow"}.get(health["status"], "red")
    about = f"ifabric {found.version}, process {found.pid}, up {health['uptime_s']:.0f} s"
    out.print(f"[{colour}]●[/] {health['status']}  {about}")
    out.print(f"  etcd  {health['etcd']}  {plain(', '.join(found.etcd))}")
    out.print(f"  NATS  {health['nats']}  {plain(found.nats)}")
    out.print(f"  HTTP  {found.http}   loop lag {health['loop_lag_s'] * 1000:.1f} ms")
    _tree(health["actors"], 1)
    for sentence in (*health["not_ready"], *health["warnings"]):
        out.print(f"  [yellow]![/] {plain(sentence)}")
    if tasks is not None:
        out.print(f"  tasks     {counts(tasks)}")
    if numbers["sessions"] is not None:
        out.print(f"  sessions  {numbers['sessions']}")
    if numbers["holds"] is not None:
        out.print(f"  money     {numbers['holds']} hold(s) open")
    if numbers["breakers_open"] is not None:
        of = "red" if numbers["breakers_open"] else "green"
        out.print(
            f"  breakers  [{of}]{numbers['breakers_open']} open[/], {numbers['breakers_half_open'] or 0} half open"
        )
    if numbers["sandboxes"] is not None and _hosts(health["actors"], "chassis"):
        out.print(
            f"  sandboxes {numbers['sandboxes']} running, {numbers['sandbox_queue'] or 0} waiting, "
            f"{numbers['sandbox_workers_idle'] or 0} worker(s) idle"
        )


def _hosts(node: dict[str, Any], name: str) -> bool:
    return any(child["name"] == name or _hosts(child, name) for child in node.get("children", ()))


def _tree(node: dict[str, Any], depth: int) -> None:
    for child in node["children"]:
        mark = "[green]✔[/]" if child["state"] == "running" else "[red]✘[/]"
        again = f", started again {child['restarts']} times: {child.get('reason', '')}" if child["restarts"] else ""
        out.print(f"  {'  ' * depth}{mark} {child['name']}{plain(again)}")
        if "children" in child:
            _tree(child, depth + 1)


def _numbers(found: endpoints.Endpoints, timeout_s: float, tls: HttpTls | None) -> dict[str, int | None]:
    """What the daemon's metrics count; None for what they do not say."""
    try:
        metrics = ask(found, "/metrics", timeout_s, tls).decode()
    except Unreachable:
        metrics = ""  # they are switched off, or have a port of their own
    return {name: _number(metrics, *metric) for name, metric in NUMBERS.items()}


def _number(metrics: str, name: str, label: str = "") -> int | None:
    found = re.search(rf"^{name}(?:\{{[^}}]*{label}[^}}]*\}})? ([0-9.e+]+)$", metrics, re.MULTILINE)
    return int(float(found[1])) if found else None


def asyncapi(*, json: Json = False) -> int:
    """Print the wire protocol as an AsyncAPI 3 document, in YAML or (--json) JSON.

    For example:

        ifabric asyncapi > asyncapi.yaml
    """
    import yaml

    from ifabric.asyncapi import document

    made = document()
    if json:
        print_json(made)
    else:
        print(yaml.safe_dump(msgspec.to_builtins(made), sort_keys=False, allow_unicode=True), end="")
    return 0
