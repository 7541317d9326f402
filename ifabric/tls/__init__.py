"""TLS 1.3, for clients and for the HTTP port: the files of a section of the configuration, and what is made of them.

`check_files` finds at start what would otherwise fail in the middle of a handshake, in words of OpenSSL. Why a handshake
failed is in `ifabric.tls.diagnosis`, and reading the files again in `ifabric.tls.reload`.
"""

from __future__ import annotations

import datetime as dt
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from ifabric import pki
from ifabric.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Files:
    """The PEM files of one section. `section` is its key in the configuration, "" outside one; `ca_key` is what the
    authorities are called there.
    """

    section: str = ""
    ca_cert: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    ca_key: str = "ca_cert"

    def key(self, name: str) -> str:
        """The whole key, for an error."""
        return f"{self.section}.{name}" if self.section else name

    @property
    def paths(self) -> tuple[str, ...]:
        """All that are given."""
        return tuple(path for path in (self.ca_cert, self.cert_file, self.key_file) if path is not None)


@dataclass(frozen=True)
class Checked:
    """What is in a section's certificates: our own, and the authority that lasts longest."""

    own: pki.Facts | None = None
    authority: pki.Facts | None = None


def check_files(files: Files, *, now: dt.datetime | None = None) -> Checked:
    """Raises `ConfigError`, with the key, the file and the dates, for a file that cannot be read, is not PEM, is of
    another certificate's key, or is not valid at `now`.
    """
    at = now or dt.datetime.now(dt.UTC)
    for one, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
        if getattr(files, one) is not None and getattr(files, other) is None:
            raise ConfigError(f"{files.key(one)} is set without {files.key(other)}: a certificate goes with its key")
    authority = None
    if files.ca_cert is not None:
        known = [pki.facts_of(found) for found in _certificates(files, files.ca_key, files.ca_cert)]
        authority = max(known, key=lambda facts: facts.not_after)
        _valid(files.key(files.ca_key), files.ca_cert, authority, at)
    if files.cert_file is None or files.key_file is None:
        return Checked(None, authority)
    certificate = _certificates(files, "cert_file", files.cert_file)[0]
    own = pki.facts_of(certificate)
    if _public(_private_key(files)) != _public(certificate):
        raise ConfigError(
            f"{files.key('key_file')}: the key in {files.key_file} does not belong to the certificate in {files.cert_file} "
            f"({own.common_name}): give the key that it was issued with"
        )
    _valid(files.key("cert_file"), files.cert_file, own, at)
    return Checked(own, authority)


def client_context(files: Files) -> ssl.SSLContext:
    """For connections to servers: host names verified, and the system's authorities trusted when none are given."""
    try:
        context = ssl.create_default_context(cafile=files.ca_cert)
    except OSError as error:
        raise ConfigError(f"{files.key(files.ca_key)}: cannot use {files.ca_cert}: {_why(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_own(context, files)
    return context


def server_context(files: Files) -> ssl.SSLContext:
    """For a port; with authorities, only clients that have a certificate of theirs are answered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # no session is resumed: one that began before the authorities were changed would get past the new ones
    context.num_tickets = 0
    _load_own(context, files)
    if files.ca_cert is not None:
        try:
            context.load_verify_locations(files.ca_cert)
        except OSError as error:
            raise ConfigError(f"{files.key(files.ca_key)}: cannot use {files.ca_cert}: {_why(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class ServerTls:
    """The context of a listening socket, which cannot be exchanged, and behind it the one that serves, which can.

    OpenSSL asks for the context when it has read a client's first message, also when that names no host; connections
    that are there already keep theirs. (Loading new files into the context in use would leave it with a certificate and
    another one's key, if the second file is bad.)
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.context = self._serving = server_context(files)
        self.context.sni_callback = self._choose

    def reload(self) -> None:
        """With the files as they are now. Raises `ConfigError`, and nothing has changed then."""
        self._serving = server_context(self._files)

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._serving


def fingerprint(path: str) -> str:
    """The SHA-256 of the first certificate in a file, in hex. Raises `ConfigError`."""
    found = _certificates(Files(section="http"), "cert_file", path)[0]
    return found.fingerprint(hashes.SHA256()).hex()


def day(when: dt.datetime) -> str:
    """A moment in an error: `2026-11-28 18:00 UTC`."""
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _load_own(context: ssl.SSLContext, files: Files) -> None:
    if files.cert_file is None:
        return
    try:
        context.load_cert_chain(files.cert_file, files.key_file)
    except OSError as error:
        raise ConfigError(
            f"{files.key('cert_file')}: cannot use {files.cert_file} with {files.key_file}: {_why(error)}"
        ) from None


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def _read(files: Files, name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{files.key(name)}: cannot read {path}: {error.strerror}") from None


def _certificates(files: Files, name: str, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(files, name, path))
    except ValueError:
        raise ConfigError(f"{files.key(name)}: {path} is not a certificate in PEM") from None


def _private_key(files: Files) -> PrivateKeyTypes:
    assert files.key_file is not None
    try:
        found = serialization.load_pem_private_key(_read(files, "key_file", files.key_file), None)
    except TypeError:
        raise ConfigError(
            f"{files.key('key_file')}: the key in {files.key_file} is encrypted, and nobody is there to type a passphrase: "
            "give it in the clear, for its owner's eyes"
        ) from None
    except ValueError:
        raise ConfigError(f"{files.key('key_file')}: {files.key_file} is not a private key in PEM") from None
    return found


def _public(of: x509.Certificate | PrivateKeyTypes) -> bytes:
    key = of.public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _valid(key: str, path: str, facts: pki.Facts, at: dt.datetime) -> None:
    if facts.not_after < at:
        raise ConfigError(
            f"{key}: the certificate in {path} ({facts.common_name}) expired on {day(facts.not_after)}, "
            f"and it is {day(at)}: issue a new one"
        )
    if facts.not_before > at:
        raise ConfigError(
            f"{key}: the certificate in {path} ({facts.common_name}) is not valid before {day(facts.not_before)}, "
            f"and it is {day(at)}: wait, issue another, or set the clock right"
        )
