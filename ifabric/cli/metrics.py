"""`ifabric metrics`: what the metrics of a daemon mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from ifabric.cli.options import Json
from ifabric.cli.output import out, plain, print_json, print_table
from ifabric.errors import FabricError
from ifabric.metrics import METRICS, Metric

#: how a name ends, and what is counted in
UNITS = {
    "_timestamp_seconds": "seconds since the epoch",
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_micro_usd": "micro-USD",
    "_percent": "percent",
    "_utilization": "ratio",
    "_score": "ratio",
    "_budget_left": "ratio",
}
COLUMNS = ("name", "type", "unit", "labels", "meaning")
HEAD = """\
# Metrics of a daemon

Made by `ifabric metrics --markdown`; a test holds the two together. They are served on the HTTP port at `/metrics`, and
on `metrics.port` of each component where one is set. Base units throughout: the names of the runbook that are in
milliseconds, percent or megabytes are recording rules, in `rules/`. No session, task or request is ever a label. In
brackets stand the values of a label that are there from the start, at 0.
"""


def metrics(
    name: Annotated[str | None, Parameter(help="Only metrics with this in their name.")] = None,
    /,
    *,
    markdown: Annotated[bool, Parameter(help="A document in Markdown.")] = False,
    json: Json = False,
) -> int:
    """Say what each metric of a daemon is: its type, unit, labels and meaning.

    For example:

        ifabric metrics
        ifabric metrics if_loop
        ifabric metrics --json | jq -r '.[].name'
    """
    found = [metric for metric in METRICS if name is None or name in metric.name]
    if not found:
        near = difflib.get_close_matches(name or "", [metric.name for metric in METRICS], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `ifabric metrics` lists them all"
        raise FabricError(f"no metric has {name} in its name{hint}")
    if json:
        print_json([described(metric) for metric in found])
    elif markdown:
        print(document(found), end="")
    elif len(found) == 1:
        _show(found[0])
    else:
        print_table(COLUMNS, [_row(metric) for metric in found])
    return 0


def described(metric: Metric) -> dict[str, Any]:
    """A metric as plain data. `known` are the values of its labels that are there from the start."""
    about: dict[str, Any] = {
        "name": metric.name,
        "type": metric.kind,
        "unit": unit(metric),
        "labels": list(metric.labels),
        "known": [dict(zip(metric.labels, values, strict=True)) for values in metric.born if metric.labels],
        "meaning": metric.help,
    }
    return {**about, "buckets": list(metric.buckets)} if metric.kind == "histogram" else about


def unit(metric: Metric) -> str:
    """What its values are in, as its name says; "" for a plain number."""
    name = metric.name.removesuffix("_total")
    return next((says for end, says in UNITS.items() if name.endswith(end)), "")


def document(found: Sequence[Metric] = METRICS) -> str:
    """All of them as a document."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for metric in found:
        cells = [f"`{metric.name}`", *_row(metric)[1:]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _row(metric: Metric) -> tuple[str, ...]:
    return metric.name, metric.kind, unit(metric), ", ".join(_labels(metric)), metric.help


def _labels(metric: Metric) -> list[str]:
    """Each label, with the values that are known of it."""
    told = []
    for at, label in enumerate(metric.labels):
        values = list(dict.fromkeys(born[at] for born in metric.born))
        told.append(f"{label} ({', '.join(values)})" if values else label)
    return told


def _show(metric: Metric) -> None:
    counted = unit(metric)
    out.print(f"[bold]{metric.name}[/]  {metric.kind}{f', in {counted}' if counted else ''}")
    out.print(f"  {plain(metric.help)}")
    for label in _labels(metric):
        out.print(f"  label   {plain(label)}")
    if metric.kind == "histogram":
        out.print(f"  buckets {', '.join(f'{bound:g}' for bound in metric.buckets)}")
