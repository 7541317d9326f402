"""`ifabric restore`: new members and streams of a backup."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.backing import (
    Credentials,
    Directory,
    IdentityFile,
    Setting,
    StateDir,
    locate,
    setting,
    telling,
)
from ifabric.cli.options import Json
from ifabric.cli.output import check, err, out, plain, print_json, print_table
from ifabric.cli.run import Configs
from ifabric.errors import ConfigError, FabricError

if TYPE_CHECKING:
    from ifabric.backup.etcdutl import Peer
    from ifabric.backup.making import Tell
    from ifabric.backup.restoring import Opened, Ready, Target
    from ifabric.backup.streams import Put


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be made."""

    targets: list[Target]
    cluster: list[Peer]
    token: str | None
    prepare: Path | None
    streams: bool
    replicas: int | None
    incarnation: int | None
    credentials: Path | None
    yes: bool


@dataclass
class Report:
    """What was done, and what was not."""

    opened: Opened
    ready: Ready | None = None
    token: str = ""
    prepared: Path | None = None
    streams: list[Put] = field(default_factory=list)
    not_recovered: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something that was asked for was not made."""
        return any(put.outcome == "failed" for put in self.streams)


def restore(
    backup: Annotated[str, Parameter(help="A file, a name that `backup list` shows, or: latest.")],
    *,
    member: Annotated[
        tuple[str, ...], Parameter(help="A member to make here: NAME=PEER-URL=DATA-DIR. Several.", negative="")
    ] = (),
    initial_cluster: Annotated[
        str | None, Parameter(help="All members, NAME=PEER-URL,... Default: those made here.")
    ] = None,
    token: Annotated[str | None, Parameter(help="The cluster's token. Default: the prepared snapshot's.")] = None,
    prepare: Annotated[
        Path | None, Parameter(help="Write the prepared snapshot there, a folder or file, for members on other hosts.")
    ] = None,
    streams: Annotated[bool, Parameter(help="Put the streams back into NATS, where they are not there.")] = False,
    replicas: Annotated[
        int | None, Parameter(help="Keep the streams on so many servers.", validator=Number(gte=1, lte=5))
    ] = None,
    incarnation: Annotated[
        int | None, Parameter(help="The new one, if this place cannot know all that were.", validator=Number(gte=1))
    ] = None,
    config: Configs = (),
    state_dir: StateDir = None,
    directory: Directory = None,
    identity_file: IdentityFile = None,
    credentials: Credentials = None,
    dry_run: Annotated[bool, Parameter(help="Check everything, touch nothing. The default without --yes.")] = False,
    yes: Annotated[bool, Parameter(help="Do it.")] = False,
    json: Json = False,
) -> int:
    """Make new etcd members of a backup, in a new incarnation, and put the
    streams back. Everything is checked before anything is touched.

    Stop all daemons first. What came after the backup is lost, but for what was
    spent: `ifabric reconcile` charges that again.

    With members on several hosts, prepare once and use that file on each:

        ifabric restore latest --prepare /mnt/share --yes
        ifabric restore /mnt/share/prepared-... --yes
            --member etcd-1=https://10.0.0.1:2380=/var/lib/etcd
            --initial-cluster etcd-1=https://10.0.0.1:2380,etcd-2=https://...

    For example:

        ifabric restore latest --config fabric.yaml --yes --streams
            --member etcd-1=http://127.0.0.1:2380=/var/lib/etcd
    """
    from ifabric.backup.etcdutl import Peer
    from ifabric.backup.restoring import check_targets

    targets = [_target(text) for text in member]
    peers = [Peer(one.name, one.url) for one in targets]
    asked = Asked(
        targets=targets,
        cluster=_cluster(initial_cluster) if initial_cluster else peers,
        token=token,
        prepare=prepare,
        streams=streams,
        replicas=replicas,
        incarnation=incarnation,
        credentials=credentials,
        yes=yes and not dry_run,
    )
    if not (targets or prepare or streams):
        raise ConfigError("say what to make of the backup: --member, --prepare or --streams")
    found = setting(config, state_dir, directory, credentials, alone=True)
    identities = found.identities(identity_file)
    check_targets(targets, asked.cluster)
    with telling(json=json) as tell:
        path = locate(found, backup, tell)
        report = asyncio.run(_restore(found, path, identities, asked, tell))
    _say(report, asked, json=json)
    return 1 if report.failed else 0


def _target(text: str) -> Target:
    from ifabric.backup.restoring import Target

    name, _, rest = text.partition("=")
    url, _, folder = rest.partition("=")
    if not (name and url.startswith(("http://", "https://")) and folder):
        raise ConfigError(
            f"--member {text}: it is written NAME=PEER-URL=DATA-DIR, as etcd-1=https://10.0.0.1:2380=/var/lib/etcd"
        )
    return Target(name, url.rstrip("/"), Path(folder).absolute())


def _cluster(text: str) -> list[Peer]:
    from ifabric.backup.etcdutl import Peer

    found = []
    for part in text.split(","):
        name, _, url = part.strip().partition("=")
        if not (name and url.startswith(("http://", "https://"))):
            raise ConfigError(f"--initial-cluster {text}: it is written NAME=PEER-URL,NAME=PEER-URL")
        found.append(Peer(name, url.rstrip("/")))
    return found


async def _restore(found: Setting, path: Path, identities: list[Any], asked: Asked, tell: Tell) -> Report:
    from ifabric.backup import restoring
    from ifabric.clock import SystemClock

    clock = SystemClock()
    with tempfile.TemporaryDirectory(prefix=".ifabric-restore-", dir=_near(asked)) as folder:
        opened = await restoring.check(path, identities, Path(folder), clock, tell=tell)
        report = Report(opened, not_recovered=list(opened.manifest.missing))
        if not asked.yes:
            return report
        if asked.targets or asked.prepare:
            number = 0 if opened.manifest.prepared else await _incarnation(found, path, opened, asked)
            report.ready = await restoring.prepare(opened, number, clock, tell=tell)
        if asked.prepare and report.ready is not None:
            report.prepared = await restoring.write_prepared(report.ready, asked.prepare, identities)
        if asked.targets and report.ready is not None:
            report.token = await restoring.make_members(
                opened, report.ready, asked.targets, asked.cluster, asked.token, tell
            )
        if asked.streams:
            async with found.nats() as bus:
                report.streams = await restoring.restore_streams(bus, opened, replicas=asked.replicas, tell=tell)
        return report


def _near(asked: Asked) -> Path | None:
    """Where a decrypted backup may lie for a while: on the disk that its data goes to, readable for us alone."""
    wanted = [one.data_dir for one in asked.targets[:1]] + ([asked.prepare.absolute()] if asked.prepare else [])
    return next((parent for one in wanted for parent in one.parents if parent.exists()), None)


def _place_of(found: Setting, path: Path) -> Path:
    """Where incarnations are written down: among the backups."""
    return found.directory if found.directory.is_dir() else path.absolute().parent


async def _incarnation(found: Setting, path: Path, opened: Opened, asked: Asked) -> int:
    """Takes a new one, above all that there is a sign of."""
    from ifabric.backup import incarnations
    from ifabric.backup.places import Folder

    bucket = found.bucket()
    folder = _place_of(found, path)
    seen = [one.facts for one in Folder(folder).backups() if one.facts is not None]
    if bucket is not None:
        seen += await asyncio.to_thread(bucket.backups)
    others = [incarnations.taken(folder), await incarnations.of_etcd(found.etcd)]
    try:
        async with found.nats() as bus:
            others.append(await incarnations.of_events(bus))
    except FabricError as error:
        err.print(f"[yellow]![/] NATS was not asked which incarnations there were: {plain(error.message)}")
    above = incarnations.highest(opened.manifest.incarnation, seen, *others)
    return await asyncio.to_thread(
        lambda: incarnations.take(above, folder, bucket, path.name, exactly=asked.incarnation)
    )


# -- the report ------------------------------------------------------------------------------------------------------


def _say(report: Report, asked: Asked, *, json: bool) -> None:
    manifest, ready = report.opened.manifest, report.ready
    lost = _lost(report, asked)
    if json:
        print_json(
            {
                "done": asked.yes,
                "backup": report.opened.path.name,
                "at": manifest.at,
                "revision": manifest.revision,
                "incarnation": ready.manifest.incarnation if ready else None,
                "bumped": ready.manifest.prepared.bumped if ready and ready.manifest.prepared else 0,
                "keys": {"backup": manifest.keys, "restored": ready.keys if ready else None},
                "members": [one._asdict() for one in asked.targets] if report.token else [],
                "token": report.token,
                "prepared": str(report.prepared) if report.prepared else None,
                "streams": [put._asdict() for put in report.streams],
                "not_recovered": lost,
                "warnings": ready.warnings if ready else (),
            }
        )
        return
    if not asked.yes:
        check(
            passed=True,
            what=f"{plain(report.opened.path.name)} is whole and fits; nothing was touched. Add --yes to restore it.",
        )
    else:
        check(
            not report.failed,
            f"restored {plain(report.opened.path.name)}" if not report.failed else "not all was restored",
        )
    _table(report)
    if report.prepared:
        out.print(f"prepared: {plain(report.prepared)}, for every member, within a day")
    if report.token:
        cluster = ",".join(f"{peer.name}={peer.url}" for peer in asked.cluster)
        out.print("start each member with:", markup=False)
        out.print(f"  --initial-cluster={cluster} --initial-cluster-token={report.token}", markup=False)
    out.print("[yellow]not recovered[/]")
    for sentence in lost:
        out.print(f"  - {plain(sentence)}")
    for warning in ready.warnings if ready else ():
        err.print(f"[yellow]![/] {plain(warning)}")


def _table(report: Report) -> None:
    from ifabric.backup.manifest import by_prefix

    manifest, ready = report.opened.manifest, report.ready
    restored = ready.keys if ready else {}
    rows: list[tuple[str, str, str]] = [
        ("taken at", f"{manifest.at:%Y-%m-%d %H:%M:%S} UTC", ""),
        ("revision", str(manifest.revision), ""),
        ("incarnation", str(manifest.incarnation), str(ready.manifest.incarnation) if ready else ""),
    ]
    for prefix, before, after in by_prefix(manifest.keys, restored):
        rows.append((f"keys in {prefix}", str(before), str(after) if ready else ""))
    became = {put.name: put for put in report.streams}
    for stream in manifest.streams:
        put = became.get(stream.name)
        now = "" if put is None else ": ".join(part for part in (put.outcome, put.why) if part)
        rows.append((f"stream {stream.name}", f"{stream.messages} messages", now))
    print_table(("", "IN THE BACKUP", "RESTORED"), rows)


def _lost(report: Report, asked: Asked) -> list[str]:
    manifest = report.opened.manifest
    after = (
        f"whatever was written to etcd after {manifest.at:%Y-%m-%d %H:%M:%S} UTC (revision {manifest.revision}): tasks, "
        "claims, limits. What was spent since can be charged again from the journal: `ifabric reconcile`"
    )
    claims = "claims: every fence from before is refused, and the tasks that were claimed are pending again"
    found = [after, claims]
    if manifest.streams and not asked.streams:
        found.append("the streams, since --streams was not said: " + ", ".join(one.name for one in manifest.streams))
    found += [f"{put.name}: {put.why}" for put in report.streams if put.outcome == "failed"]
    return found + [f"not in the backup: {one}" for one in report.not_recovered]
