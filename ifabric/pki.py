"""Certificates: an authority of one's own, for examples, tests and small deployments, and what is in a certificate.

Keys are on P-256, because every TLS 1.3 implementation takes those. A certificate is for one host or one client: its
common name is what etcd takes for the user's name.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ifabric.errors import ConfigError

#: certificates begin a little in the past: clocks differ
SKEW = dt.timedelta(minutes=5)
AUTHORITY_DAYS, LEAF_DAYS = 3650, 365


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """As `name.crt` and `name.key`, the key for its owner's eyes; the two paths."""
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        for path, data, mode in ((certificate, self.certificate, 0o644), (key, self.key, 0o600)):
            fresh = path.with_name(f".{path.name}.new")
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
                file.write(data)
            fresh.replace(path)  # whole or not at all: a daemon may be reading it
        return certificate, key


class Authority:
    """Signs certificates."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, name: str = "InfraFabric example CA", *, days: int = AUTHORITY_DAYS) -> Self:
        """A new one, with a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        begins = _now() - SKEW
        ends = begins + dt.timedelta(days=days)
        builder = _begun(_subject(name), _subject(name), key.public_key(), begins, ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(authority=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def read(cls, certificate: Path, key: Path) -> Self:
        """One that was written before. `ConfigError` names a file that cannot be read."""
        try:
            private = serialization.load_pem_private_key(key.read_bytes(), None)
            found = x509.load_pem_x509_certificate(certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the authority of {certificate} and {key}: {error}") from None
        assert isinstance(private, ec.EllipticCurvePrivateKey), "we only make such keys"
        return cls(found, private)

    @property
    def pair(self) -> Pair:
        """Its own certificate and key."""
        return _pair(self._certificate, self._key)

    def issue(
        self,
        name: str,
        hosts: Iterable[str] = (),
        *,
        days: int = LEAF_DAYS,
        not_before: dt.datetime | None = None,
        not_after: dt.datetime | None = None,
        server: bool = False,
        client: bool = False,
    ) -> Pair:
        """A certificate with the common name `name` for `hosts` (DNS names and IP addresses).

        With neither `server` nor `client` it is for both. It is good for `days`, or until `not_after`.
        """
        begins = not_before or _now() - SKEW
        ends = not_after or begins + dt.timedelta(days=days)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _begun(_subject(name), self._certificate.subject, key.public_key(), begins, ends)
        uses = [
            *([ExtendedKeyUsageOID.SERVER_AUTH] if server or not client else []),
            *([ExtendedKeyUsageOID.CLIENT_AUTH] if client or not server else []),
        ]
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(authority=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        names = [_general(host) for host in hosts]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return _pair(builder.sign(self._key, hashes.SHA256()), key)


@dataclass(frozen=True)
class Facts:
    """What is in a certificate."""

    common_name: str
    issuer: str
    hosts: tuple[str, ...]
    not_before: dt.datetime
    not_after: dt.datetime

    def days_left(self, now: dt.datetime | None = None) -> float:
        """Days until it expires; negative when it has."""
        return (self.not_after - (now or _now())).total_seconds() / 86_400


def facts(pem: bytes) -> Facts:
    """Of the first certificate in a PEM. `ValueError` when there is none."""
    return facts_of(x509.load_pem_x509_certificate(pem))


def facts_of(found: x509.Certificate) -> Facts:
    """What is in a certificate that was read."""
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))
    except x509.ExtensionNotFound:
        hosts = ()
    return Facts(
        _common_name(found.subject),
        _common_name(found.issuer),
        tuple(hosts),
        found.not_valid_before_utc,
        found.not_valid_after_utc,
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    not_before: dt.datetime,
    not_after: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
