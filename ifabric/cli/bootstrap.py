"""`ifabric bootstrap certs` and `ifabric bootstrap etcd`: who is who, and who may do what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from ifabric.cli.options import Json
from ifabric.cli.output import check, err, out, plain, print_json, print_table
from ifabric.errors import ConfigError

if TYPE_CHECKING:
    from ifabric.care.etcd_auth import Tried
    from ifabric.care.roles import Step, User
    from ifabric.store.channel import EtcdSettings

#: days from which an expiry is told in red
SOON_DAYS = 30


def certs(
    folder: Annotated[Path, Parameter(help="Where the files go; it is made.")],
    *,
    hosts: Annotated[
        tuple[str, ...],
        Parameter(help="NAME=HOST,HOST...: further hosts of a certificate, or of a new one.", consume_multiple=True),
    ] = (),
    days: Annotated[int, Parameter(help="How long they are good.", validator=Number(gte=1, lte=3650))] = 365,
    force: Annotated[bool, Parameter(help="Make all anew that are there; never the authority.")] = False,
    json: Json = False,
) -> int:
    """Make an authority, and certificates for etcd, NATS, the daemons and whoever
    speaks to etcd.

    What is there is kept: the second time it makes what is missing, with the same
    authority. A common name is a user of etcd (`ifabric bootstrap etcd`). For an
    installation with an authority of its own, this is the list of what it has to
    issue.

    For example:

        ifabric bootstrap certs ./certs
        ifabric bootstrap certs ./certs --hosts etcd-1=10.0.0.1 etcd-4=10.0.0.4,etcd-4.example.org
        ifabric bootstrap certs ./certs --force --days 90
    """
    from ifabric.care.certificates import make, wanted

    further = _hosts(hosts)
    made = make(folder, wanted(further), days=days, insist=further, force=force)
    if json:
        print_json([
            {
                "name": one.certificate.name,
                "common_name": one.facts.common_name,
                "use": one.certificate.use,
                "hosts": one.facts.hosts,
                "expires": one.facts.not_after,
                "made": one.fresh,
            }
            for one in made
        ])  # fmt: skip
        return 0
    rows = []
    for one in made:
        left = one.facts.days_left()
        until = Text(f"{one.facts.not_after:%Y-%m-%d} ({left:.0f} d)", style="red" if left < SOON_DAYS else "")
        state = Text("made", style="green") if one.fresh else Text("kept", style="dim")
        name = f"{one.certificate.name}.crt"
        rows.append((state, name, one.facts.common_name, until, ", ".join(one.facts.hosts), one.certificate.what))
    print_table(("", "FILE", "COMMON NAME", "EXPIRES", "HOSTS", "FOR"), rows)
    if (folder / "ca.key").exists():
        err.print(
            f"[yellow]![/] Keep {plain(folder / 'ca.key')} offline: whoever has it can be anybody, etcd's root too. "
            "It is needed again only to make further certificates."
        )
    return 0


def _hosts(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    import re

    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, _, listed = text.partition("=")
        hosts = tuple(host for host in listed.split(",") if host)
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name) or name == "ca" or not hosts:
            raise ConfigError(f"--hosts {text!r}: NAME=HOST,HOST is expected, as etcd-4=10.0.0.4,etcd-4.example.org")
        found[name] = (*found.get(name, ()), *hosts)
    return found


def etcd(
    *,
    config: Annotated[
        tuple[Path, ...], Parameter(name=["--config", "-c"], negative="", help="Where etcd is: a daemon's YAML files.")
    ] = (),
    endpoints: Annotated[str | None, Parameter(help="Where etcd is instead, separated by commas.")] = None,
    certs: Annotated[Path | None, Parameter(help="The folder of `ifabric bootstrap certs`.")] = None,
    ca_cert: Annotated[Path | None, Parameter(help="Default: ca.crt of --certs, or the configured one.")] = None,
    root_cert: Annotated[Path | None, Parameter(help="The certificate for root. Default: root.crt of --certs.")] = None,
    root_key: Annotated[Path | None, Parameter(help="Its key. Default: root.key of --certs.")] = None,
    dry_run: Annotated[bool, Parameter(help="Say what would be done.")] = False,
    json: Json = False,
) -> int:
    """Give etcd its users and roles, turn its access control on, and try it.

    Users are the common names of certificates; they have no passwords. It may be
    run again: it does what is missing. With --certs, everything that a user may
    and may not do is tried as that user, without leaving a trace. Daemons that are
    at work go on, if their certificates are for ifabric.

    For example:

        ifabric bootstrap etcd --config coordinator.production.yaml --certs ./certs --dry-run
        ifabric bootstrap etcd --endpoints https://etcd-1:2379 --certs ./certs
    """
    import asyncio

    settings = _settings(config, endpoints, certs, ca_cert, root_cert, root_key)
    steps, enabled, tried = asyncio.run(_bootstrap(settings, certs, dry_run=dry_run))
    wrong = [one for one in tried if not one.as_stated]
    if json:
        print_json({
            "dry_run": dry_run,
            "steps": [step.words for step in steps],
            "enabled": enabled,
            "attempts": [
                {
                    "user": one.user,
                    "kind": one.attempt.kind,
                    "prefix": one.attempt.prefix.decode(),
                    "allowed": one.allowed,
                    "as_stated": one.as_stated,
                }
                for one in tried
            ],
        })  # fmt: skip
        return 1 if wrong else 0
    verb = "would be made:" if dry_run else ""
    for step in steps:
        check(not dry_run, plain(f"{verb} {step.words}".strip()))
    if not steps:
        out.print("users and roles are as they should be")
    if dry_run:
        out.print("access control is on" if enabled else "access control is off, and would be turned on")
        return 0
    out.print("[green]✔[/] access control is on")
    _show(tried, certs)
    return 1 if wrong else 0


def _settings(
    config: Sequence[Path],
    endpoints: str | None,
    certs: Path | None,
    ca_cert: Path | None,
    root_cert: Path | None,
    root_key: Path | None,
) -> EtcdSettings:
    from ifabric.care.etcd_auth import refuse
    from ifabric.config_file import load
    from ifabric.references import for_a_verb
    from ifabric.store.channel import EtcdSettings

    loaded = for_a_verb(load(config, os.environ)[0]) if config or not endpoints else None
    etcd = loaded.coordinator.etcd if loaded is not None else None
    where = tuple(part for part in (endpoints or "").split(",") if part) or (etcd.endpoints if etcd else ())
    authority = ca_cert or (certs / "ca.crt" if certs else None)
    certificate = root_cert or (certs / "root.crt" if certs else None)
    key = root_key or (certs / "root.key" if certs else None)
    if certificate is None or key is None:
        raise ConfigError("whose certificate is root's? Give --certs, or --root-cert and --root-key")
    found = EtcdSettings(
        endpoints=where,
        ca_cert=str(authority) if authority else (etcd.ca_cert if etcd else None),
        cert_file=str(certificate),
        key_file=str(key),
    )
    refuse(found)
    return found


async def _bootstrap(
    settings: EtcdSettings, certs: Path | None, *, dry_run: bool
) -> tuple[list[Step], bool, list[Tried]]:
    """What was to do, whether access control was on before, or is now, and what was tried."""
    from ifabric.care.etcd_auth import Line, carry_out, enable, look
    from ifabric.care.roles import plan
    from ifabric.clock import SystemClock

    async with Line(settings) as line:
        found = await look(line)
        steps = plan(found)
        if dry_run:
            return steps, found.enabled, []
        await carry_out(line, steps)
        if not found.enabled:
            await enable(line, SystemClock())
    return steps, True, await _try(settings, certs)


async def _try(settings: EtcdSettings, certs: Path | None) -> list[Tried]:
    from ifabric.care.etcd_auth import try_as
    from ifabric.care.roles import ROOT, USERS

    assert settings.cert_file is not None
    assert settings.key_file is not None
    tried = []
    for user in USERS:
        files = _files(user, certs)
        if user.name == ROOT:
            files = Path(settings.cert_file), Path(settings.key_file)
        if files is not None:
            tried += await try_as(user, replace(settings), *files)
    return tried


def _files(user: User, certs: Path | None) -> tuple[Path, Path] | None:
    """Of a user's certificate and key; None when they are not there."""
    from ifabric.care.certificates import FILES

    if certs is None:
        return None
    files = certs / f"{FILES[user.name]}.crt", certs / f"{FILES[user.name]}.key"
    return files if all(path.exists() for path in files) else None


def _show(tried: Sequence[Tried], certs: Path | None) -> None:
    from ifabric.care.roles import USERS

    rows: list[tuple[Any, ...]] = []
    for user in USERS:
        theirs = [one for one in tried if one.user == user.name]
        if not theirs:
            rows.append((user.name, user.role, "", "", "", "", Text("not tried: no certificate here", style="dim")))
            continue
        reads, writes = (
            ", ".join(one.attempt.prefix.decode() for one in theirs if one.attempt.kind == kind and one.allowed)
            for kind in ("read", "write")
        )
        admin, snapshot = (
            "yes" if any(one.allowed for one in theirs if one.attempt.kind == kind) else "no"
            for kind in ("admin", "snapshot")
        )
        wrong = [one for one in theirs if not one.as_stated]
        result = Text(f"✔ {len(theirs)} of {len(theirs)} as stated", style="green")
        if wrong:
            first = wrong[0].attempt
            how = "refused" if first.allowed else "allowed"
            result = Text(f"✘ {len(wrong)} not as stated: {first.kind} {first.prefix.decode()} is {how}", style="red")
        rows.append((user.name, user.role, reads, writes, admin, snapshot, result))
    print_table(("USER", "ROLE", "READS", "WRITES", "ADMIN", "SNAPSHOT", "TRIED"), rows)
    if any(user.role == "root" and user.name != "root" for user in USERS):
        err.print(
            "[yellow]![/] The certificate for backup is as good as root's, since etcd gives a snapshot to nobody less: "
            "keep it only where backups are made."
        )
    if certs is None:
        err.print("[dim]With --certs DIR, the other users are tried too.[/]")
