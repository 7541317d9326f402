"""Who somebody is on NATS: an nkey seed in a file, with the session that it is for.

The file is one that `nats --nkey FILE` takes as well: comments, and the seed on a line of its own.

    # InfraFabric credential. Whoever has this file is alice.
    # session: alice
    SUAIBDPBAUTWCWBKIO6XHQNINK5FWJW4OHLXC3HQ2KFE4PEJUA44CNHTC4
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import nkeys

from ifabric.errors import ConfigError
from ifabric.wire.subjects import SESSION

_SEED = re.compile(r"^\s*(S[UA][A-Z2-7]{56})\s*$", re.MULTILINE)
_SESSION = re.compile(r"^#\s*session:\s*(\S+)\s*$", re.MULTILINE)
_PREFIXES = {"user": nkeys.PREFIX_BYTE_USER, "account": nkeys.PREFIX_BYTE_ACCOUNT}


@dataclass(frozen=True)
class Credential:
    """A key pair, and the session that it proves ("" when the file does not say)."""

    session: str
    seed: str = field(repr=False)
    public_key: str

    def write(self, path: Path, about: str = "") -> None:
        """For its owner's eyes. `ConfigError` when the file is there already: a key is not to be lost by a slip."""
        text = f"# InfraFabric credential.{' ' + about if about else ''}\n"
        text += f"# session: {self.session}\n" if self.session else ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(f"{text}{self.seed}\n")
        except FileExistsError:
            raise ConfigError(
                f"{path} is there already; nothing was written. Name another file, or move it away."
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def make(session: str = "", kind: Literal["user", "account"] = "user") -> Credential:
    """A new key pair, from the operating system's randomness."""
    seed = nkeys.encode_seed(os.urandom(32), _PREFIXES[kind]).decode()
    return Credential(session, seed, public_key_of(seed))


def public_key_of(seed: str) -> str:
    """The public half. `ConfigError` when the seed is none."""
    try:
        raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        if nkeys.crc16(raw[:-2]) != int.from_bytes(raw[-2:], "little"):  # which nkeys does not look at
            raise ConfigError("this is no nkey seed: its checksum is wrong (a letter was lost or changed)")
        return str(nkeys.from_seed(bytearray(seed.encode())).public_key.decode())
    except (nkeys.NkeysError, ValueError) as error:
        raise ConfigError(f"this is no nkey seed ({type(error).__name__})") from None


def read(path: str | Path) -> Credential:
    """The credential in a file. `ConfigError` names the file and what is wrong with it."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the credential {path}: {getattr(error, 'strerror', None) or 'not a text'}"
        ) from None
    seeds = _SEED.findall(text)
    if len(seeds) != 1:
        raise ConfigError(f"{path} is no credential: it has {len(seeds)} lines with an nkey seed (SU...), and not one")
    session = found[1] if (found := _SESSION.search(text)) else ""
    if session and not SESSION.fullmatch(session):
        raise ConfigError(f"{path}: the session {session!r} is none: it must match {SESSION.pattern}")
    try:
        return Credential(session, seeds[0], public_key_of(seeds[0]))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def read_seed(path: str | Path) -> str:
    """The seed in a file. `ConfigError` as `read`."""
    return read(path).seed
