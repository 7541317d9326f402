"""`ifabric breaker list|open|close`: what is left alone because it fails."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json, print_table

STYLE = {"closed": "green", "half_open": "yellow", "open": "red"}
Name = Annotated[str, Parameter(help="The resource, as openai/gpt-x.")]
Why = Annotated[str, Parameter(help="Why, in words; it is kept.")]


def list_(*, json: Json = False, where: Where | None = None) -> int:
    """List the breakers that are not closed, or that the daemon that answers counts
    for.

    For example:

        ifabric breaker list
        ifabric breaker list --json | jq '.[] | select(.state == "open").breaker'
    """
    found = with_client(where, None, lambda c: c.breakers())
    if json:
        print_json(found)
        return 0
    rows = [
        (
            line.breaker,
            Text(line.state.replace("_", " "), style=STYLE.get(line.state, "")),
            f"{line.failures} of {line.calls}",
            "" if line.opened_ago_s is None else f"{line.opened_ago_s:.0f} s ago",
            _probe(line.state, line.probe_in_s),
            line.trips or "",
            line.by,
            line.why,
        )
        for line in found
    ]
    print_table(("BREAKER", "STATE", "FAILED", "OPENED", "NEXT PROBE", "TRIPS", "BY", "WHY"), rows)
    if not rows:
        out.print("[dim]nothing has been called through a breaker lately[/]")
    return 0


def open_(name: Name, *, why: Why = "", json: Json = False, where: Where | None = None) -> int:
    """Let no call through to a resource until an operator closes its breaker.

    For example:

        ifabric breaker open openai/gpt-x --why "the invoice is wrong, ask Ann"
    """
    state = with_client(where, None, lambda c: c.set_breaker(name, "open", why=why))
    if json:
        print_json({"breaker": name, "state": state})
        return 0
    out.print(f"[green]✔[/] {plain(name)} is {state}: nothing is called until somebody closes it")
    out.print(f"[dim]  close it: ifabric breaker close {plain(name + (where or Where()).words())}[/]")
    return 0


def close(name: Name, *, why: Why = "", json: Json = False, where: Where | None = None) -> int:
    """Let calls through to a resource again, and forget how it failed.

    For example:

        ifabric breaker close openai/gpt-x
    """
    state = with_client(where, None, lambda c: c.set_breaker(name, "closed", why=why))
    if json:
        print_json({"breaker": name, "state": state})
    else:
        out.print(f"[green]✔[/] {plain(name)} is {state}")
    return 0


def _probe(state: str, probe_in_s: float | None) -> str:
    if probe_in_s is not None:
        return "now" if probe_in_s <= 0 else f"in {probe_in_s:.0f} s"
    return "when it is closed" if state == "open" else ""
