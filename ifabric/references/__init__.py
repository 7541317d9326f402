"""Secrets of the configuration that are in Vault: `vault:PATH#FIELD` where a file is named.

    coordinator:
      etcd:
        key_file: vault:secret/data/ifabric#etcd_key
    vault:
      addr: https://vault.example:8200
      token_path: /etc/infrafabric/vault-token

What needs a key needs it as a file (gRPC, TLS, NATS), and reads it again when it has changed. So each reference is
looked up at start and again on SIGHUP, and written for this user's eyes into a folder: `$RUNTIME_DIRECTORY/secrets` when
systemd gave one (`RuntimeDirectory=`, which is memory and is gone with the service), else `secrets` below the state
directory. The configuration then names that file. All of them are read before any is written, and fields of one path
come of one answer, so that a certificate and its key are a pair. No value is logged, nor stands in an error.

An AppRole logs in each time, so its secret-id has to be good for more than one login; the token is revoked afterwards.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ifabric.config import Config
from ifabric.config_ops import Vault
from ifabric.errors import ConfigError

REFERENCE = re.compile(r"vault:([^#\s]+)#([^#\s]+)")
SCHEME = "vault:"


class Reference(NamedTuple):
    """A field of a secret, as `secret/data/ifabric` and `etcd_key`."""

    path: str
    field: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.path}#{self.field}"


class Secrets:
    """A configuration whose references are files. `config` is the one to work with."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._written = config
        self._folder = folder
        self._references = find(config)
        self.config: Config = config
        if self._references:
            self.refresh()
            self.config = _replaced(config, "", {key: str(self._file(key)) for key in self._references})

    def refresh(self) -> list[str]:
        """Looks them up again, and writes what has changed; the keys of the configuration whose files have. Blocks.

        `Unreachable` when Vault cannot be asked, `ConfigError` when it has not what is asked for; nothing is written then.
        """
        if not self._references:
            return []
        from ifabric.references.vault import read  # noqa: PLC0415  hvac takes longer to load than all else, and few need it

        found = read(self._written.vault, self._references)
        _make_private(self._folder)
        return [key for key, value in found.items() if _write(self._file(key), value)]

    def _file(self, key: str) -> Path:
        return self._folder / key


def resolve(config: Config, state_dir: Path, environ: Mapping[str, str]) -> Secrets:
    """For a daemon. Raises what `Secrets.refresh` raises."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Secrets(config, (Path(runtime) if runtime else state_dir) / "secrets")


def for_a_verb(config: Config) -> Config:
    """For a command: its files are in a folder of its own, and gone when it ends."""
    if not find(config):
        return config
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(tempfile.mkdtemp(prefix="ifabric-", dir=base if base and os.access(base, os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Secrets(config, folder).config


# -- in the configuration ---------------------------------------------------------------------------------------------


def find(config: Config) -> dict[str, Reference]:
    """Every reference by its key, as `coordinator.etcd.key_file`. `ConfigError` for one that is none, or stands where no
    file is named, and when there is no Vault to ask.
    """
    found, errors = {}, []
    for key, value in _texts(config, ""):
        if not value.startswith(SCHEME):
            continue
        reference = REFERENCE.fullmatch(value)
        if key.startswith("vault."):
            errors.append(f"{key}: what leads to Vault cannot be in it")
        elif not _is_file(key):
            errors.append(f"{key}: {SCHEME} is only understood where a file is named")
        elif reference is None:
            errors.append(f"{key}: a reference is written vault:PATH#FIELD, as vault:secret/data/ifabric#etcd_key")
        else:
            found[key] = Reference(reference[1], reference[2])
    if found and not errors:
        errors += _missing(config.vault, next(iter(found)))
    if errors:
        raise ConfigError("\n".join(errors))
    return found


def _missing(vault: Vault, key: str) -> list[str]:
    if vault.addr is None:
        return [f"{key} is a reference to Vault, and vault.addr does not say where that is"]
    if vault.token_path is None and (vault.role_id_path is None or vault.secret_id_path is None):
        return ["vault.addr is there: vault.token_path has to be, too, or vault.role_id_path and vault.secret_id_path"]
    return []


def _is_file(key: str) -> bool:
    last = key.rpartition(".")[2]
    return last.endswith(("_file", "_cert")) or last == "client_ca"


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield field, getattr(value, field)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield str(name), part
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield str(number), part


def _texts(value: object, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    for name, part in _parts(value):
        yield from _texts(part, f"{at}.{name}" if at else name)


def _replaced(value: Any, at: str, files: Mapping[str, str]) -> Any:
    """The same with other texts at these keys."""
    if isinstance(value, str):
        return files.get(at, value)
    if not any(key.startswith(at) for key in files) or isinstance(value, tuple | list):
        return value
    made = {name: _replaced(part, f"{at}.{name}" if at else name, files) for name, part in _parts(value)}
    return msgspec.structs.replace(value, **made) if isinstance(value, msgspec.Struct) else made or value


# -- in the file system -----------------------------------------------------------------------------------------------


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = folder.lstat()
        if not stat.S_ISDIR(is_ours.st_mode) or is_ours.st_uid != os.geteuid():
            raise ConfigError(f"{folder} is no folder of this user's: no secret was written there")
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot keep secrets in {folder}: {error.strerror}") from None


def _write(path: Path, value: bytes) -> bool:
    """Whole or not at all: somebody may be reading it. False when it was like that."""
    try:
        if path.is_file() and path.read_bytes() == value and stat.S_IMODE(path.stat().st_mode) == 0o600:
            return False
        fresh = path.with_name(f".{path.name}.new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(value)
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return True
