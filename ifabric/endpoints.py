"""`endpoints.json`: how the tools on this machine find a running daemon."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

NAME = "endpoints.json"


class Endpoints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a daemon and its servers listen."""

    nats: str
    etcd: tuple[str, ...]
    http: str
    #: the SHA-256 of the HTTP port's certificate, in hex: this file is for its owner's eyes, so whoever can read it needs
    #: no authority to know the daemon. "" without TLS.
    http_pin: str = ""
    pid: int
    version: str


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/ifabric``, or ``~/.local/state/ifabric``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ifabric"


def write(state_dir: Path, endpoints: Endpoints) -> None:
    """Whole or not at all; for its owner's eyes."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = state_dir / f".{NAME}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(endpoints)) + b"\n")
    fresh.replace(state_dir / NAME)


def replace_http(endpoints: Endpoints, url: str, pin: str = "") -> Endpoints:
    """The same, with the HTTP port that was found, and the certificate that it shows."""
    return msgspec.structs.replace(endpoints, http=url, http_pin=pin)


def read(state_dir: Path) -> Endpoints | None:
    """What a live daemon wrote there; None when there is none."""
    try:
        found = msgspec.json.decode((state_dir / NAME).read_bytes(), type=Endpoints)
    except (OSError, msgspec.MsgspecError):
        return None
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return found  # somebody else's, but alive
    return found


def remove(state_dir: Path) -> None:
    """The daemon has gone. Only its own file is taken away."""
    found = read(state_dir)
    if found is not None and found.pid == os.getpid():
        (state_dir / NAME).unlink(missing_ok=True)
