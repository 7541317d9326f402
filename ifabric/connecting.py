"""Whoever connects to the fabric's NATS: with which credential, as which session, trusting whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ifabric import credentials as files
from ifabric.credentials import Credential
from ifabric.errors import ConfigError
from ifabric.wire.permissions import inbox_prefix

if TYPE_CHECKING:
    from ifabric.bus.nats import NatsSettings


def credential_of(given: str | Path | None) -> Credential | None:
    """The credential in the file that is given, or that ``$IFABRIC_CREDENTIALS`` names. `ConfigError` says what is wrong."""
    path = given or os.environ.get("IFABRIC_CREDENTIALS")
    return files.read(path) if path else None


def session_of(given: str | None, credential: Credential | None) -> str | None:
    """The session: a credential's own, else the one given, else ``$IFABRIC_SESSION``.

    `ConfigError` when a credential is for another than the one given.
    """
    own = credential.session if credential is not None else ""
    if own and given and given != own:
        raise ConfigError(
            f"the credential is for the session {own}, and not for {given}: leave the session out, or use its own"
        )
    return own or given or os.environ.get("IFABRIC_SESSION") or None


def settings_for(
    urls: str, session: str, credential: Credential | None, ca: str | Path | None, timeout_s: float
) -> NatsSettings:
    """How that session connects. Its answers come to an inbox of its own, which is all that its permissions allow."""
    from ifabric.bus.nats import NatsSettings  # noqa: PLC0415  slow to load, and few verbs get here

    trusted = ca or os.environ.get("IFABRIC_CA")
    return NatsSettings(
        servers=tuple(urls.split(",")),
        name=f"ifabric {session}",
        connect_timeout_s=timeout_s,
        nkey_seed=credential.seed if credential is not None else None,
        ca_cert=str(trusted) if trusted else None,
        inbox_prefix=inbox_prefix(session),
    )
