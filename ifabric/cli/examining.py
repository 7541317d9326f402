"""`ifabric audit verify`: whether the audit is as it was written."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from ifabric.audit import reading
from ifabric.audit.finding import Finding, Note, Report
from ifabric.audit.reading import Heads, NoAudit, Wanted
from ifabric.audit.verifying import Examination, no_stream
from ifabric.cli.auditing import CLOCK, Since, line, moment, progress
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json
from ifabric.errors import FabricError, Unreachable

if TYPE_CHECKING:
    from ifabric.bus.nats import NatsSettings
    from ifabric.care.places import Places

FINE, BROKEN, UNREACHABLE = 0, 1, 3
DAY_S = 86_400
#: how long what etcd knows of already is waited for
LATE_S, LOOK_S = 5.0, 0.5


class _Ends(NamedTuple):
    """What etcd says of where chains end. `heads` None: nobody could say, because of `why`."""

    heads: Heads | None
    why: str = ""
    #: etcd should have said, and did not
    failed: bool = False


def verify(
    *,
    since: Since = None,
    config: Annotated[
        tuple[Path, ...],
        Parameter(
            name=["--config", "-c"],
            negative="",
            help="A daemon's configuration: where etcd is, which knows how far each chain goes. Default: this machine's daemon.",
        ),
    ] = (),
    cert_file: Annotated[
        Path | None, Parameter(help="A client certificate for etcd in place of the configured one.")
    ] = None,
    key_file: Annotated[Path | None, Parameter(help="Its key.")] = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Read the whole audit and say whether it is as it was written: no record
    changed, left out, put in, moved, or cut off at the end. Of each chain (the life
    of a daemon) the first broken record is named, and what to do.

    Where a chain ends, only etcd knows: give --config, or be on a daemon's machine,
    or it says that the ends were not checked.

    Exit 0 when all is well, 1 when something is broken, 3 when NATS does not answer,
    or etcd does not that should have been asked.

    For example:

        ifabric audit verify
        ifabric audit verify --config /etc/infrafabric/fabric.yaml --credentials auditor.nk
        ifabric audit verify --since 24h --json | jq .findings
    """
    at = where or Where()
    places, none_why = _places(at, config, cert_file, key_file)
    settings = _settings(at, places) if config else None
    max_age_days = places.config.audit.max_age_days if places is not None and config else 90
    since_ms = moment(since, "since")
    with progress("reading", quiet=json) as told:
        report, ends = asyncio.run(_examined(at, settings, places, none_why, since_ms, max_age_days * DAY_S, told))
    if json:
        print_json({"exit": _code(report, ends), "ends": ends.why or "checked", **_fields(report)})
    else:
        _show(report, ends)
    return _code(report, ends)


def _code(report: Report, ends: _Ends) -> int:
    if report.broken:
        return BROKEN
    return UNREACHABLE if ends.failed else FINE


def _fields(report: Report) -> dict[str, object]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


# -- where -----------------------------------------------------------------------------------------------------------------


def _places(
    at: Where, config: tuple[Path, ...], cert_file: Path | None, key_file: Path | None
) -> tuple[Places | None, str]:
    """Where etcd is, or why that is not known. Never that of another fabric than the audit's."""
    from ifabric import endpoints
    from ifabric.cli.cluster import Servers

    nats = at.nats or os.environ.get("IFABRIC_NATS")
    if not config and nats:
        found = endpoints.read(at.state_dir or endpoints.default_state_dir())
        if found is None or found.nats != nats:
            return None, "where etcd is was not said: give a daemon's --config"
    try:
        return Servers(config, at.state_dir, cert_file, key_file).places(), ""
    except Unreachable:
        if config:
            raise
        return None, "no daemon runs here, and no --config says where etcd is"


def _settings(at: Where, places: Places | None) -> NatsSettings | None:
    """With a configuration: its NATS, as the auditor whose credential is given, else as the daemon."""
    from dataclasses import replace

    from ifabric.cli.cluster import nats_settings
    from ifabric.connecting import credential_of, settings_for

    assert places is not None, "a configuration was given"
    urls = at.nats or ",".join(places.nats)
    if not urls:
        raise Unreachable("no NATS is configured and no daemon runs here: give --nats, or --state-dir")
    credential = credential_of(at.credentials)
    if credential is None and at.nats is None:
        return nats_settings(places)
    nats = places.config.nats
    session = credential.session if credential is not None else f"auditor-{CLOCK.token()[:12]}"
    made = settings_for(urls, session, credential, at.ca or nats.ca_cert, at.timeout)
    return replace(made, cert_file=nats.cert_file, key_file=nats.key_file)


async def _ends(places: Places | None, none_why: str) -> _Ends:
    if places is None or not places.etcd.endpoints:
        return _Ends(None, none_why or "where etcd is was not said: give a daemon's --config")
    from ifabric.store.etcd import Etcd

    store = Etcd(places.etcd, CLOCK)
    try:
        await store.connect()
        return _Ends(await reading.heads(store))
    except (FabricError, OSError) as error:
        return _Ends(None, f"etcd was not heard: {error}", failed=True)
    finally:
        with contextlib.suppress(FabricError, OSError):
            await store.close()


# -- the examination -------------------------------------------------------------------------------------------------------


async def _examined(
    at: Where,
    settings: NatsSettings | None,
    places: Places | None,
    none_why: str,
    since_ms: int,
    max_age_s: float,
    told: Callable[[int, int], None],
) -> tuple[Report, _Ends]:
    ends = await _ends(places, none_why)  # before the stream: what etcd knows of now is stored by the time it is read
    by_chain = None if ends.heads is None else ends.heads.by_chain
    async with line(at, settings) as bus:
        try:
            stream = await reading.facts(bus)
        except NoAudit:
            findings = no_stream(by_chain or {})
            if not findings:
                raise
            return _nothing_there(findings, len(by_chain or {})), ends
        examination = Examination(stream, by_chain, whole=not since_ms)
        wanted = Wanted(since_ms=since_ms)
        last = 0
        waited_from = CLOCK.monotonic()
        while True:
            read = reading.messages(bus, CLOCK, after_seq=last, until_seq=stream.last_seq, wanted=wanted, progress=told)
            async with contextlib.aclosing(read):
                async for stored in read:
                    examination.add(stored)
            last = max(last, stream.last_seq)
            if not examination.ends_missing() or CLOCK.monotonic() - waited_from > LATE_S:
                break
            await CLOCK.sleep(LOOK_S)
            stream = await reading.facts(bus)
            examination.goes_on(stream)
        for name in ends.heads.unreadable if ends.heads is not None else ():
            examination.unreadable_head(name)
        return examination.report(CLOCK.wall_ms(), max_age_s=max_age_s, heads_why=ends.why), ends


def _nothing_there(findings: tuple[Finding, ...], heads: int) -> Report:
    return Report(
        broken=True,
        messages=0,
        records=0,
        chains=0,
        duplicates=0,
        first_seq=0,
        last_seq=0,
        since="",
        until="",
        heads=heads,
        findings=findings,
        notes=(),
    )


# -- what is said ----------------------------------------------------------------------------------------------------------


def _show(report: Report, ends: _Ends) -> None:
    if report.messages:
        span = f"sequence {report.first_seq} to {report.last_seq}, {report.since} to {report.until}"
        again = f", {report.duplicates} of them stored twice" if report.duplicates else ""
        out.print(f"{report.records} record(s) in {report.chains} chain(s), {plain(span)}{again}")
    for note in report.notes:
        if note.kind != "heads":
            _note(note)
    for finding in report.findings:
        _finding(finding)
    if report.untold:
        out.print(f"  [dim]and {report.untold} more of these[/]")
    if report.heads is None:
        out.print(f"  [yellow]![/] the ends of the chains were not checked: {plain(ends.why)}")
    if report.broken:
        out.print(f"[red]✘[/] the audit is broken: {len(report.findings) + report.untold} finding(s)")
    elif report.heads is None:
        out.print("[green]✔[/] nothing is changed, missing or put in, as far as the chains themselves tell")
    else:
        out.print(f"[green]✔[/] nothing is changed, missing or put in; {report.heads} end(s) are as etcd knows them")


def _note(note: Note) -> None:
    chain = f" chain {plain(note.chain)}" if note.chain else ""
    at = f" [dim]{plain(note.at)}[/]" if note.at else ""
    out.print(f"  [yellow]![/]{chain}{at} {plain(note.what)}")


def _finding(finding: Finding) -> None:
    places = []
    if finding.chain:
        places.append(f"chain {finding.chain}")
    if finding.n:
        places.append(f"record {finding.n}")
    if finding.seq:
        places.append(f"sequence {finding.seq}")
    if finding.at:
        places.append(finding.at)
    if finding.who or finding.verb:
        places.append(f"{finding.who or 'nobody'} {finding.verb}")
    where = f"[bold]{plain(', '.join(places))}[/]: " if places else ""
    more = f" [dim](and {finding.more} more in this chain)[/]" if finding.more else ""
    out.print(f"  [red]✘[/] {where}{plain(finding.what)}{more}")
    out.print(f"      → {plain(finding.do)}")
