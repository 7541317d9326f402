"""What the verbs about backups share: where everything is, progress, and the backup that is meant."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ifabric.cli.output import err, plain
from ifabric.errors import ConfigError, Unreachable

if TYPE_CHECKING:
    from ifabric.backup.bucket import Bucket
    from ifabric.backup.making import Tell
    from ifabric.bus.nats import Nats
    from ifabric.config_ops import Backup
    from ifabric.store.channel import EtcdSettings

StateDir = Annotated[Path | None, Parameter(help="State directory of this machine's daemon.")]
Directory = Annotated[Path | None, Parameter(help="Where backups are. Default: backup.directory.")]
IdentityFile = Annotated[Path | None, Parameter(help="The age private key. Default: backup.identity_file.")]
Credentials = Annotated[
    Path | None,
    Parameter(help="A NATS credential with the role backup, where identities are on. [env: IFABRIC_CREDENTIALS]"),
]
LATEST = "latest"


@dataclass(frozen=True)
class Setting:
    """What the configuration says of backups, with everything found."""

    settings: Backup
    etcd: EtcdSettings
    directory: Path
    nats: Callable[[], contextlib.AbstractAsyncContextManager[Nats]]

    def bucket(self) -> Bucket | None:
        """Where they are uploaded to."""
        from ifabric.backup.bucket import Bucket

        return None if self.settings.s3 is None else Bucket(self.settings.s3)

    def identities(self, given: Path | None) -> list[Any]:
        """The private keys. `ConfigError` when none is configured or given."""
        from ifabric.backup.keys import read_identities

        path = given or self.settings.identity_file
        if path is None:
            raise ConfigError("no private key to open a backup with: give --identity-file, or set backup.identity_file")
        return read_identities(path)


def setting(
    config: tuple[Path, ...],
    state_dir: Path | None,
    directory: Path | None,
    credentials: Path | None = None,
    *,
    alone: bool = False,
) -> Setting:
    """Of a configuration, else of this machine's daemon. `alone`: files are enough, and nothing needs to be running."""
    from ifabric import endpoints
    from ifabric.care import places
    from ifabric.config_file import load
    from ifabric.references import for_a_verb
    from ifabric.store.channel import EtcdSettings

    loaded, _ = load(config, os.environ)
    loaded = for_a_verb(loaded)
    try:
        found = places.find(loaded, state_dir)
        etcd, urls, folder = found.etcd, found.nats, found.state_dir
    except Unreachable:
        if not alone:
            raise
        etcd, urls = EtcdSettings(endpoints=()), ()
        folder = state_dir or (Path(loaded.state_dir) if loaded.state_dir else endpoints.default_state_dir())
    named = directory or (Path(loaded.backup.directory) if loaded.backup.directory else folder / "backups")

    @contextlib.asynccontextmanager
    async def nats() -> AsyncIterator[Nats]:
        from ifabric.bus.nats import Nats
        from ifabric.clock import SystemClock

        bus = Nats(_nats_settings(loaded, urls, credentials), SystemClock())
        await bus.connect()
        try:
            yield bus
        finally:
            await bus.close()

    return Setting(loaded.backup, etcd, named.absolute(), nats)


def _nats_settings(loaded: Any, urls: tuple[str, ...], credentials: Path | None) -> Any:
    from ifabric.connecting import credential_of, settings_for
    from ifabric.settings import nats_settings

    nats = loaded.nats
    if not urls:
        raise Unreachable("no NATS is configured and no daemon runs here: give --config, or --state-dir")
    credential = credential_of(credentials)
    if credential is not None:
        made = settings_for(",".join(urls), credential.session, credential, nats.ca_cert, nats.connect_timeout_seconds)
        return replace(made, cert_file=nats.cert_file, key_file=nats.key_file)
    return replace(nats_settings(loaded, urls), name="ifabric backup")


@contextlib.contextmanager
def telling(*, json: bool) -> Iterator[Tell]:
    """Progress bars on a terminal: one for each thing that is done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=json or not err.is_terminal) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(plain(what), total=of or None)
            progress.update(bars[what], completed=done, total=of or None)

        yield tell


def locate(found: Setting, backup: str, tell: Tell) -> Path:
    """The backup that was asked for, brought here from S3 if it is only there. `BackupRefused` when there is none."""
    from ifabric.backup.manifest import BackupRefused, newest
    from ifabric.backup.places import Folder

    if backup != LATEST and Path(backup).is_file():
        return Path(backup)
    folder = Folder(found.directory)
    here = {one.path.name: one.facts for one in folder.backups() if one.whole and one.facts is not None}
    bucket = found.bucket()
    there = {facts.file: facts for facts in bucket.backups()} if bucket is not None else {}
    last = newest([*here.values(), *there.values()])
    name = backup if backup != LATEST else last.file if last is not None else ""
    if name in here or (name and (folder.path / name).is_file()):
        return folder.path / name
    if name not in there or bucket is None:
        where = " or ".join([str(folder.path), *([bucket.where] if bucket is not None else [])])
        what = "no backup" if backup == LATEST else f"no backup {backup}"
        raise BackupRefused(f"there is {what} in {where}; nothing was touched", reason="unreadable")
    folder.make()
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        tell(f"downloading {name}", done, there[name].size)

    path = bucket.download(there[name], folder.path, progress)
    folder.write_facts(there[name])
    return path


def age(seconds: float) -> str:
    """In the unit that fits."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
