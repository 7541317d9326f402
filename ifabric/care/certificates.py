"""The certificates of an installation, by the names of their files: what `ifabric bootstrap certs` makes.

One table, which the files of `config/` agree with. A certificate's common name is etcd's user (`ifabric.care.roles`), and
a name that is no user there has no rights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from ifabric import pki
from ifabric.errors import ConfigError

DOMAIN = "prod.infrafabric.io"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AUTHORITY = "ca"
Use = Literal["server", "client", "both"]


class Certificate(NamedTuple):
    """One to be made, as `name.crt` and `name.key`."""

    name: str
    common_name: str
    use: Use
    hosts: tuple[str, ...]
    what: str


class Made(NamedTuple):
    """One that is there. `fresh`: it was made just now."""

    certificate: Certificate
    facts: pki.Facts
    fresh: bool


def _server(name: str, use: Use, what: str, host: str = "") -> Certificate:
    at = host or name
    return Certificate(name, at, use, (at, f"{at}.{DOMAIN}", *LOOPBACK), what)


def _client(name: str, common_name: str, what: str) -> Certificate:
    return Certificate(name, common_name, "client", (), what)


CERTIFICATES: tuple[Certificate, ...] = (
    *(_server(f"etcd-{n}", "both", "a member of etcd, to its clients; no user of etcd") for n in (1, 2, 3)),
    *(_server(f"etcd-{n}-peer", "both", "the same, to the other members", f"etcd-{n}") for n in (1, 2, 3)),
    *(_server(f"nats-{n}", "both", "a nats-server, to its clients and to the others") for n in (1, 2, 3)),
    *(_server(name, "server", "the HTTP port of a daemon") for name in ("coordinator", "governor", "chassis")),
    _server("http", "server", "the HTTP port of a daemon that runs everything")._replace(
        hosts=("ifabric", f"ifabric.{DOMAIN}", *LOOPBACK)
    ),
    _client("root", "root", "etcd's administrator: bootstrap, maintenance, members"),
    _client("coordinator-client", "ifabric", "a daemon, to etcd and NATS"),
    _client("governor-client", "ifabric", "a daemon, to etcd and NATS"),
    _client("nats-client", "ifabric", "a daemon, to NATS, where it is to have another than to etcd"),
    _client("chassis-client", "ifabric-chassis", "a daemon that only runs guests: it can forge no task and no money"),
    _client("backup-client", "backup", "backups; etcd has it as good as root's"),
    _client("client", "observer", "a person who looks with etcdctl"),
    _client("prometheus", "prometheus", "scrapes etcd's and the daemons' metrics; no user of etcd"),
)
#: the file of each of etcd's users
FILES = {"root": "root", "ifabric": "coordinator-client", "ifabric-chassis": "chassis-client", "backup": "backup-client",
         "observer": "client"}  # fmt: skip


def wanted(further: Mapping[str, tuple[str, ...]]) -> tuple[Certificate, ...]:
    """The table, with further hosts: for a name in it, besides its own; another name is a server's.

    One that begins with `etcd-` or `nats-` is a member, which is a client of the others too.
    """
    known = {certificate.name: certificate for certificate in CERTIFICATES}
    made = []
    for certificate in CERTIFICATES:
        more = further.get(certificate.name, ())
        made.append(certificate._replace(hosts=tuple(dict.fromkeys((*certificate.hosts, *more)))))
    for name, hosts in further.items():
        if name not in known:
            use: Use = "both" if name.startswith(("etcd-", "nats-")) else "server"
            of = _server(name, use, "added by --hosts", name.removesuffix("-peer"))
            made.append(of._replace(hosts=tuple(dict.fromkeys((*of.hosts, *hosts)))))
    for name in further:
        if known.get(name, made[-1]).use == "client":
            raise ConfigError(f"--hosts: {name} is a client: it has no hosts")
    return tuple(made)


def make(
    folder: Path, want: Iterable[Certificate], *, days: int, insist: Iterable[str] = (), force: bool = False
) -> list[Made]:
    """Makes what is not there yet, with the authority of the folder, or a new one when the folder has none.

    `insist`: names that are to be made with these hosts; one that is there with others is refused. `force`: make all
    but the authority anew. `ConfigError` before anything was written.
    """
    there = {certificate.name: _read(folder, certificate.name) for certificate in want}
    todo = [certificate for certificate in want if force or there[certificate.name] is None]
    for name in insist:
        found, hosts = there[name], next(c.hosts for c in want if c.name == name)
        if found is not None and not set(hosts) <= set(found.hosts) and not force:
            raise ConfigError(
                f"{folder / name}.crt is there, for {', '.join(found.hosts)}: nothing was made. --force makes all certificates anew"
            )
    authority, fresh = _authority(folder, bool(todo))
    issuer = pki.facts(authority.pair.certificate) if authority is not None else _read(folder, AUTHORITY)
    assert issuer is not None, "there is one, or it was just made"
    if todo and days > issuer.days_left():
        raise ConfigError(f"--days {days} is longer than the authority lives: {issuer.days_left():.0f} days")
    if not fresh:
        _of_one_authority(folder, [certificate.name for certificate in want if certificate not in todo])
    if fresh and authority is not None:
        authority.pair.write(folder, AUTHORITY)
    for certificate in todo:
        assert authority is not None, "it was read, or made, because there is something to sign"
        client, server = certificate.use == "client", certificate.use == "server"
        authority.issue(certificate.common_name, certificate.hosts, days=days, client=client, server=server).write(
            folder, certificate.name
        )
    of_authority = Certificate(AUTHORITY, issuer.common_name, "both", (), "signs the others; keep ca.key offline")
    made = [Made(of_authority, issuer, fresh)]
    for certificate in want:
        facts = _read(folder, certificate.name)
        assert facts is not None, "it was there, or has been made"
        made.append(Made(certificate, facts, certificate in todo))
    return made


def _authority(folder: Path, needed: bool) -> tuple[pki.Authority | None, bool]:
    """The folder's, or a new one; None when there is nothing to sign and its key is kept elsewhere."""
    certificate, key = folder / f"{AUTHORITY}.crt", folder / f"{AUTHORITY}.key"
    if not certificate.exists():
        leftover = sorted(path.name for path in folder.glob("*.crt")) if folder.is_dir() else []
        if leftover:
            raise ConfigError(f"{folder} has certificates ({leftover[0]}...) and no ca.crt; nothing was made")
        return pki.Authority.create(), True
    if key.exists():
        return pki.Authority.read(certificate, key), False
    if needed:
        raise ConfigError(f"{key} is not there, and there is something to sign; put it there for as long as this takes")
    return None, False


def _of_one_authority(folder: Path, names: Iterable[str]) -> None:
    authority = x509.load_pem_x509_certificate((folder / f"{AUTHORITY}.crt").read_bytes())
    for name in names:
        path = folder / f"{name}.crt"
        try:
            x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise ConfigError(
                f"{path} is of another authority than {AUTHORITY}.crt beside it; nothing was made"
            ) from None


def _read(folder: Path, name: str) -> pki.Facts | None:
    path = folder / f"{name}.crt"
    try:
        return pki.facts(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; nothing was made") from None
