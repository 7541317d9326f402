"""`ifabric doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ifabric.cli.cluster import Servers, nats_settings
from ifabric.cli.options import Json
from ifabric.cli.output import out, plain, print_json

if TYPE_CHECKING:
    from ifabric.care.finding import Finding
    from ifabric.care.findings import Report

FINE, CRITICAL, NOTHING = 0, 1, 3
MARKS = {"ok": "[green]●[/]", "warning": "[yellow]![/]", "critical": "[red]✘[/]"}


def doctor(
    where: Servers | None = None,
    *,
    nats_monitoring: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="HTTP URL of a nats-server's monitoring; may be given several times."),
    ] = (),
    strict: Annotated[bool, Parameter(help="Exit 1 for warnings, too.")] = False,
    json: Json = False,
) -> int:
    """Look at everything the fabric stands on, and say what is wrong or soon
    will be, and what to do about it.

    etcd's members, their alarms, space and versions; NATS and its streams; the
    daemon of this machine; clocks, certificates, Vault, backups and the
    configuration. Each is asked within its own time, and what does not answer
    hides nothing else. Nothing is changed.

    Exit 0 when nothing is critical, 1 when something is, 3 when neither etcd
    nor NATS nor a daemon answers.

    For example:

        ifabric doctor
        ifabric doctor --config /etc/infrafabric/fabric.yaml
        ifabric doctor --config fabric.yaml --nats-monitoring http://nats-1:8222
        ifabric doctor --strict --json | jq '.findings[] | select(.severity != "ok")'
    """
    import uvloop

    from ifabric.bus.nats import Nats
    from ifabric.care.findings import judge
    from ifabric.care.looking import look
    from ifabric.clock import SystemClock

    places, clock = (where or Servers()).places(), SystemClock()
    settings = nats_settings(places)
    facts = uvloop.run(look(places, clock, lambda: Nats(settings, clock), monitoring=nats_monitoring))
    report = judge(facts)
    if json:
        print_json({"worst": report.worst(), "findings": report.findings, "facts": facts})
    else:
        _show(report)
    if not report.reached:
        return NOTHING
    bad = ("critical", "warning") if strict else ("critical",)
    return CRITICAL if report.worst() in bad else FINE


def _show(report: Report) -> None:
    part = ""
    for finding in report.findings:
        if finding.part != part:
            part = finding.part
            out.print(f"[bold]{part}[/]")
        _line(finding)
    counts = {kind: sum(one.severity == kind for one in report.findings) for kind in ("critical", "warning")}
    mark = MARKS[report.worst()]
    out.print(f"{mark} {counts['critical']} critical, {counts['warning']} warning(s)")


def _line(finding: Finding) -> None:
    figure = f"  [dim]{plain(finding.figure)}[/]" if finding.figure else ""
    out.print(f"  {MARKS[finding.severity]} {plain(finding.what)}{figure}")
    for line in finding.do.splitlines():
        out.print(f"      → {plain(line)}")
    if finding.playbook:
        out.print(f"      [dim]more: ifabric playbook {finding.playbook}[/]")
