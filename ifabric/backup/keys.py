"""age keys: whom a backup is encrypted for, and who opens it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyrage

from ifabric.clock import SystemClock, rfc3339
from ifabric.errors import ConfigError

HOW = (
    "Make a key with `ifabric backup run --make-key FILE` (or `age-keygen -o FILE`), put the public key that it says under "
    "backup.recipients, and keep FILE somewhere else than the backups"
)
_PRIVATE = "AGE-SECRET-KEY-"


def recipients_of(keys: Sequence[str]) -> list[Any]:
    """Public keys as pyrage takes them. `ConfigError` when there is none, or one is none; it is shown in full."""
    if not keys:
        raise ConfigError(f"backup.recipients is empty, and nothing is written that is not encrypted. {HOW}.")
    found = []
    for key in keys:
        if _PRIVATE in key:
            raise ConfigError("backup.recipients: that is a private key, and does not belong there. Make another one.")
        try:
            found.append(pyrage.x25519.Recipient.from_str(key))
        except pyrage.RecipientError as error:
            raise ConfigError(f"backup.recipients: {key} is not an age public key (age1...): {error}") from None
    return found


def identities_of(text: str, source: str) -> list[Any]:
    """The private keys in the text of a key file, as `age-keygen` writes it. `ConfigError` shows nothing of it."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        try:
            found.append(pyrage.x25519.Identity.from_str(said))
        except pyrage.IdentityError:
            raise ConfigError(f"{source}: line {number} is not an age private key ({_PRIVATE}...)") from None
    if not found:
        raise ConfigError(f"{source}: there is no age private key in it")
    return found


def read_identities(path: str | Path) -> list[Any]:
    """Those of a file. `ConfigError` when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"cannot read the age key {path}: {why}") from None
    return identities_of(text, str(path))


def public_of(identities: Sequence[Any]) -> list[str]:
    """The public keys that belong to private ones."""
    return [str(identity.to_public()) for identity in identities]


def make_key(path: Path) -> str:
    """Writes a new private key for its owner's eyes; its public key. `ConfigError` when there is a file already."""
    identity = pyrage.x25519.Identity.generate()
    public = str(identity.to_public())
    text = f"# created: {rfc3339(SystemClock().wall_ms())}\n# public key: {public}\n{identity}\n"
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} is there already; no key was made, since backups may need that one") from None
    except OSError as error:
        raise ConfigError(f"cannot write the key {path}: {error.strerror}; no key was made") from None
    return public
