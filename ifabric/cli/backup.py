"""`ifabric backup run`, `backup list` and `backup verify`."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.backing import (
    LATEST,
    Credentials,
    Directory,
    IdentityFile,
    Setting,
    StateDir,
    age,
    locate,
    setting,
    size,
    telling,
)
from ifabric.cli.options import Json
from ifabric.cli.output import check, complain, err, out, plain, print_json, print_json_line, print_table
from ifabric.cli.run import Configs
from ifabric.errors import FabricError

if TYPE_CHECKING:
    from ifabric.backup.making import Made
    from ifabric.backup.manifest import Sidecar


# -- run -------------------------------------------------------------------------------------------------------------


def run(
    *,
    config: Configs = (),
    state_dir: StateDir = None,
    directory: Directory = None,
    every: Annotated[
        float | None,
        Parameter(
            help="Go on, with so many seconds from start to start; 0: backup.interval_seconds.", validator=Number(gte=0)
        ),
    ] = None,
    no_upload: Annotated[bool, Parameter(help="Not to S3, though it is configured.")] = False,
    no_streams: Annotated[bool, Parameter(help="etcd alone.")] = False,
    credentials: Credentials = None,
    make_key: Annotated[
        Path | None, Parameter(help="Make an age key, say its public part, and do nothing else.")
    ] = None,
    json: Json = False,
) -> int:
    """Make a backup: etcd, the streams and the modules, compressed, encrypted,
    in one file, here and in S3 if that is configured; then let old ones go.

    Exit 1 when a part is missing in it or S3 did not take it. The file is there
    all the same, and the next run uploads what is missing.

    For example:

        ifabric backup run --make-key backup.age
        ifabric backup run --config /etc/infrafabric/fabric.yaml
        ifabric backup run --config fabric.yaml --every 300
    """
    if make_key is not None:
        return _make_key(make_key, json=json)
    from ifabric.backup.keys import recipients_of

    found = setting(config, state_dir, directory, credentials)
    recipients_of(found.settings.recipients)  # before anything is asked
    if every is None:
        return asyncio.run(_once(found, upload=not no_upload, streams=not no_streams, json=json))
    seconds = every or found.settings.interval_seconds
    return asyncio.run(_again_and_again(found, seconds, upload=not no_upload, streams=not no_streams, json=json))


def _make_key(path: Path, *, json: bool) -> int:
    from ifabric.backup.keys import make_key

    public = make_key(path)
    if json:
        print_json({"file": str(path), "recipient": public})
    else:
        out.print(f"[green]✔[/] the private key is in {plain(path)}: keep it where the backups are not")
        out.print(f"  backup.recipients: [{public}]", markup=False)
    return 0


async def _again_and_again(found: Setting, seconds: float, *, upload: bool, streams: bool, json: bool) -> int:
    """Until it is ended. A failure is said, and the next one tried."""
    from ifabric.clock import monotonic

    due = monotonic()
    while True:
        try:
            await _once(found, upload=upload, streams=streams, json=json, line=True)
        except FabricError as error:
            complain(error)
            if json:
                print_json_line(error.to_body())
        due = max(due + seconds, monotonic())  # a backup that took longer is not followed by two at once
        await asyncio.sleep(due - monotonic())


async def _once(found: Setting, *, upload: bool, streams: bool, json: bool, line: bool = False) -> int:
    from ifabric.backup.making import make_backup
    from ifabric.backup.manifest import BackupFailed
    from ifabric.backup.noting import note
    from ifabric.clock import SystemClock

    with telling(json=json) as tell:
        async with contextlib.AsyncExitStack() as closing:
            bus, why = None, "--no-streams"
            if streams:
                try:
                    bus = await closing.enter_async_context(found.nats())
                except FabricError as error:  # etcd alone is better than nothing
                    why = error.message
            try:
                async with asyncio.timeout(found.settings.timeout_seconds):
                    made = await make_backup(
                        found.settings,
                        found.etcd,
                        bus,
                        SystemClock(),
                        directory=found.directory,
                        without_streams=why,
                        wants_streams=streams,
                        bucket=found.bucket() if upload else None,
                        tell=tell,
                    )
            except TimeoutError:
                raise BackupFailed(
                    f"the backup was not done within backup.timeout_seconds ({found.settings.timeout_seconds:.0f} s)"
                ) from None
            if not made.complaints and not made.facts.missing:
                warning = await note(found.etcd, made.facts.at)
                made = made if warning is None else replace(made, warnings=(*made.warnings, warning))
    _say_made(made, json=json, line=line)
    return 1 if made.complaints else 0


def _say_made(made: Made, *, json: bool, line: bool) -> None:
    if json:
        said = {
            "backup": str(made.path),
            "endpoint": made.endpoint,
            "facts": made.facts,
            "uploaded": made.uploaded,
            "deleted": made.deleted,
            "warnings": made.warnings,
            "errors": [error.message for error in made.complaints],
        }
        (print_json_line if line else print_json)(said)
    else:
        facts = made.facts
        streams = f", streams {', '.join(facts.streams)}" if facts.streams else ""
        check(not made.complaints, f"{plain(made.path)}  {size(facts.size)}, revision {facts.revision}{plain(streams)}")
        for name in made.uploaded:
            out.print(f"  uploaded {plain(name)}")
        for name in made.deleted:
            out.print(f"  deleted {plain(name)}")
        for warning in made.warnings:
            err.print(f"[yellow]![/] {plain(warning)}")
    for error in made.complaints:
        complain(error)


# -- list ------------------------------------------------------------------------------------------------------------


def list_(*, config: Configs = (), state_dir: StateDir = None, directory: Directory = None, json: Json = False) -> int:
    """List the backups, here and in S3, newest first. No key is needed.

    For example:

        ifabric backup list --config fabric.yaml
        ifabric backup list --directory /var/backups/ifabric --json
    """
    from ifabric.backup.places import Folder

    found = setting(config, state_dir, directory, alone=True)
    rows: dict[str, dict[str, Any]] = {}
    for one in Folder(found.directory).backups():
        row = _row(one.facts) if one.facts else {"backup": one.path.name, "at": one.at, "revision": one.revision}
        state = "whole" if one.whole else "no facts beside it" if one.facts is None else "cut short"
        rows[one.path.name] = {**row, "size": one.size, "state": state, "here": True, "s3": False}
    failed: FabricError | None = None
    try:
        bucket = found.bucket()
        for facts in bucket.backups() if bucket is not None else ():
            rows.setdefault(facts.file, {**_row(facts), "state": "whole", "here": False})["s3"] = True
    except FabricError as error:
        failed = error
    listed = sorted(rows.values(), key=lambda row: row["at"], reverse=True)
    if json:
        print_json({"directory": str(found.directory), "backups": listed, "error": failed.message if failed else None})
    elif listed:
        _show(listed)
    else:
        out.print(f"no backups in {plain(found.directory)}; make one with `ifabric backup run`")
    if failed is not None:
        complain(failed)
    return 1 if failed is not None else 0


def _row(facts: Sidecar) -> dict[str, Any]:
    return {
        "backup": facts.file,
        "at": facts.at,
        "size": facts.size,
        "revision": facts.revision,
        "incarnation": facts.incarnation,
        "etcd": facts.etcd,
        "streams": facts.streams,
        "missing": facts.missing,
        "sha256": facts.sha256,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    now = datetime.now(UTC)
    print_table(
        ("BACKUP", "AGE", "SIZE", "INCARNATION", "STREAMS", "WHERE", "STATE"),
        (
            (
                row["backup"],
                age((now - row["at"]).total_seconds()),
                size(row["size"]),
                str(row.get("incarnation", "?")),
                ", ".join(row.get("streams", ())) or "-",
                " + ".join(name for name, key in (("here", "here"), ("S3", "s3")) if row[key]),
                "; ".join((row["state"], *(f"without {one}" for one in row.get("missing", ())))),
            )
            for row in rows
        ),
    )


# -- verify ----------------------------------------------------------------------------------------------------------


def verify(
    backup: Annotated[str, Parameter(help="A file, a name that `backup list` shows, or: latest.")] = LATEST,
    *,
    config: Configs = (),
    state_dir: StateDir = None,
    directory: Directory = None,
    identity_file: IdentityFile = None,
    deep: Annotated[bool, Parameter(help="Start an etcd on it, on loopback, and count its keys.")] = False,
    json: Json = False,
) -> int:
    """Read a backup to its end and say whether it can be restored. Exit 1 when
    it cannot, with the reason.

    For example:

        ifabric backup verify --config fabric.yaml --identity-file backup.age
        ifabric backup verify ifabric-20261128T183000Z-rev99.tar.zst.age --deep
    """
    from ifabric.backup import making
    from ifabric.clock import SystemClock

    found = setting(config, state_dir, directory, alone=True)
    identities = found.identities(identity_file)
    with telling(json=json) as tell:
        path = locate(found, backup, tell)
        seen = asyncio.run(making.verify(path, identities, SystemClock(), deep=deep, tell=tell))
    manifest = seen.manifest
    if json:
        print_json(
            {
                "backup": str(path),
                "good": True,
                "manifest": manifest,
                "warnings": seen.warnings,
                "restored_keys": seen.keys,
            }
        )
        return 0
    keys = ", ".join(f"{count} in {prefix}" for prefix, count in manifest.keys.items())
    check(
        passed=True,
        what=f"{plain(path.name)} is whole and can be restored" + (", and an etcd has started on it" if deep else ""),
    )
    out.print(
        f"  taken {manifest.at:%Y-%m-%d %H:%M:%S} UTC of etcd {plain(manifest.etcd)}, by ifabric {plain(manifest.ifabric)}"
    )
    out.print(f"  revision {manifest.revision}, incarnation {manifest.incarnation}, keys: {plain(keys) or 'none'}")
    for stream in manifest.streams:
        out.print(f"  stream {plain(stream.name)}: {stream.messages} messages, {stream.first_seq} to {stream.last_seq}")
    for warning in seen.warnings:
        err.print(f"[yellow]![/] {plain(warning)}")
    return 0
