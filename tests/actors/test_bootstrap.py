"""`ifabric bootstrap certs`: what it makes, what it keeps, and that it says what the rest of the house says."""

from __future__ import annotations

import json
import re
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from ifabric import pki
from ifabric.care.certificates import CERTIFICATES, FILES
from ifabric.care.roles import USERS
from ifabric.cli import main

ROOT = Path(__file__).parent.parent.parent


class Ran:
    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.code = main(("bootstrap", "certs", *words))
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return {one["name"]: one for one in json.loads(self.out)}


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_makes_one_of_each_and_says_until_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "certs"
    ran = Ran(capsys, str(folder), "--days", "90")
    assert ran.code == 0
    names = {"ca", *(one.name for one in CERTIFICATES)}
    assert set(everything(folder)) == {f"{name}.{kind}" for name in names for kind in ("crt", "key")}
    for name in names:
        assert f"{name}.crt" in ran.out
        assert stat.S_IMODE((folder / f"{name}.key").stat().st_mode) == 0o600
    assert "(90 d)" in ran.out
    assert re.search(r"ca\.key offline", ran.err)
    authority = certificate(folder, "ca")
    for one in CERTIFICATES:
        found = certificate(folder, one.name)
        found.verify_directly_issued_by(authority)
        uses = set(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
        assert uses == {"server": {server}, "client": {client}, "both": {server, client}}[one.use]
        assert set(pki.facts((folder / f"{one.name}.crt").read_bytes()).hosts) == set(one.hosts)


def test_only_the_clients_of_the_table_can_be_a_user_of_etcd() -> None:
    """A server's certificate by the name of a user would be that user, if it may be a client."""
    users = {user.name for user in USERS}
    assert {one.common_name for one in CERTIFICATES if one.use == "client"} - users == {"prometheus"}
    assert not users & {one.common_name for one in CERTIFICATES if one.use != "client"}
    by_name = {one.name: one for one in CERTIFICATES}
    assert set(FILES) == users
    assert all(by_name[file].common_name == user for user, file in FILES.items())


def test_what_the_configuration_and_the_deployment_name_is_what_is_made() -> None:
    """The runbook's names, compose's, systemd's and the production files': one list."""
    named = set()
    for path in [
        *(ROOT / "config").rglob("*.y*ml"),
        *(ROOT / "config").rglob("*.conf"),
        *(ROOT / "config").rglob("*.service"),
    ]:
        named |= set(re.findall(r"(?:\.\./|/etc/infrafabric/)certs/([a-z0-9-]+)\.(?:crt|key)", path.read_text()))
    assert {"ca", "coordinator-client", "etcd-1", "etcd-1-peer", "nats-3", "prometheus"} <= named
    assert named - {one.name for one in CERTIFICATES} - {"ca", "vault-ca"} == set()


def test_the_second_time_all_is_kept_and_what_is_missing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ran(capsys, str(tmp_path)).code == 0
    before = everything(tmp_path)
    ran = Ran(capsys, str(tmp_path), "--json")
    assert (ran.code, {one["made"] for one in ran.json.values()}) == (0, {False})
    assert everything(tmp_path) == before
    (tmp_path / "nats-2.crt").unlink()
    ran = Ran(capsys, str(tmp_path), "--json")
    assert [name for name, one in ran.json.items() if one["made"]] == ["nats-2"]
    after = everything(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"nats-2.crt", "nats-2.key"}


def test_further_hosts_are_made_with_the_authority_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ran(capsys, str(tmp_path), "--hosts", "etcd-1=10.0.0.1").code == 0
    assert "10.0.0.1" in pki.facts((tmp_path / "etcd-1.crt").read_bytes()).hosts
    before = everything(tmp_path)
    ran = Ran(
        capsys,
        str(tmp_path),
        "--json",
        "--hosts",
        "etcd-1=10.0.0.1",
        "etcd-4=10.0.0.4,etcd-4.example.org",
        "web=web.example.org",
    )
    assert ran.code == 0
    assert [name for name, one in ran.json.items() if one["made"]] == ["etcd-4", "web"]
    assert {"etcd-4", "10.0.0.4", "etcd-4.example.org", "127.0.0.1"} <= set(ran.json["etcd-4"]["hosts"])
    assert (ran.json["etcd-4"]["use"], ran.json["web"]["use"]) == ("both", "server")
    certificate(tmp_path, "etcd-4").verify_directly_issued_by(certificate(tmp_path, "ca"))
    assert all(everything(tmp_path)[name] == data for name, data in before.items())


def test_one_that_is_there_for_other_hosts_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ran(capsys, str(tmp_path)).code == 0
    before = everything(tmp_path)
    ran = Ran(capsys, str(tmp_path), "--hosts", "etcd-1=10.9.9.9", "etcd-4=10.0.0.4")
    assert ran.code == 2
    assert "etcd-1.crt is there" in ran.err and "nothing was made" in ran.err
    assert everything(tmp_path) == before
    assert Ran(capsys, str(tmp_path), "--hosts", "etcd-1=10.9.9.9", "--force").code == 0
    after = everything(tmp_path)
    assert "10.9.9.9" in pki.facts(after["etcd-1.crt"]).hosts
    assert {name for name in before if before[name] == after[name]} == {"ca.crt", "ca.key"}, "never the authority"


def test_an_authority_whose_key_is_kept_elsewhere_is_missed_only_when_it_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ran(capsys, str(tmp_path)).code == 0
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    ran = Ran(capsys, str(tmp_path))
    assert (ran.code, "offline" in ran.err) == (0, False)
    ran = Ran(capsys, str(tmp_path), "--hosts", "etcd-4=10.0.0.4")
    assert ran.code == 2 and "ca.key is not there" in ran.err
    (tmp_path / "ca.key").write_bytes(key)
    assert Ran(capsys, str(tmp_path), "--hosts", "etcd-4=10.0.0.4").code == 0


def test_certificates_of_another_authority_are_not_mixed_with_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pki.Authority.create().issue("root", client=True).write(tmp_path, "root")
    ran = Ran(capsys, str(tmp_path))
    assert ran.code == 2 and "has certificates (root.crt...) and no ca.crt" in ran.err
    (tmp_path / "root.crt").unlink()
    assert Ran(capsys, str(tmp_path)).code == 0
    pki.Authority.create().issue("root", client=True).write(tmp_path, "root")
    before = everything(tmp_path)
    ran = Ran(capsys, str(tmp_path), "--hosts", "etcd-4=10.0.0.4")
    assert ran.code == 2 and "root.crt is of another authority" in ran.err
    assert everything(tmp_path) == before
    (tmp_path / "root.crt").write_text("no PEM")
    assert "root.crt cannot be read" in Ran(capsys, str(tmp_path)).err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--hosts", "etcd-4"), "NAME=HOST,HOST is expected"),
        (("--hosts", "../etcd=a"), "NAME=HOST,HOST is expected"),
        (("--hosts", "ca=10.0.0.1"), "NAME=HOST,HOST is expected"),
        (("--hosts", "root=10.0.0.1"), "root is a client: it has no hosts"),
    ],
)
def test_hosts_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    ran = Ran(capsys, str(tmp_path / "certs"), *words)
    assert ran.code == 2 and says in ran.err
    assert not (tmp_path / "certs").exists()


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pki.Authority.create(days=30).pair.write(tmp_path, "ca")
    ran = Ran(capsys, str(tmp_path), "--days", "60")
    assert ran.code == 2 and "longer than the authority lives: 30 days" in ran.err
    assert set(everything(tmp_path)) == {"ca.crt", "ca.key"}


def test_a_browser_would_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenSSL's own judgement of the chain, by the strict rules."""
    assert Ran(capsys, str(tmp_path)).code == 0
    client = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "etcd-1.crt", tmp_path / "etcd-1.key")
    server.load_verify_locations(tmp_path / "ca.crt")
    server.verify_mode = ssl.CERT_REQUIRED
    client.load_cert_chain(tmp_path / "coordinator-client.crt", tmp_path / "coordinator-client.key")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(back, there, server_hostname="etcd-1.prod.infrafabric.io")
    other = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (one, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    peer = other.getpeercert()
    assert peer is not None
    assert dict(pair for part in peer["subject"] for pair in part)["commonName"] == "ifabric"
