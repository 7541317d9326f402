"""`vault:PATH#FIELD` in the configuration: found, looked up by the real hvac, written for one user's eyes, never told.

Vault is a stub (`vault_stub`), and also a real server when IFABRIC_VAULT_ADDR and IFABRIC_VAULT_TOKEN (of one with root's
rights, KV v2 mounted at `secret`) are set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from ifabric.clock import monotonic
from ifabric.config import Config
from ifabric.errors import ConfigError, FabricError, Unreachable
from ifabric.pki import Authority
from ifabric.references import Reference, find, for_a_verb, resolve
from ifabric.testing.clusters import HOSTS
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from tests.actors.vault_stub import Role, VaultStub

REAL = os.environ.get("IFABRIC_VAULT_ADDR"), os.environ.get("IFABRIC_VAULT_TOKEN")
CANARY = "canary-4711"
PATH = "secret/data/ifabric"


def config(vault: dict[str, Any] | None = None, **sections: Any) -> Config:
    return msgspec.convert({"vault": vault or {}, **sections}, Config)


class At:
    """A Vault with one secret, and how to ask it."""

    def __init__(self, url: str, root: str, folder: Path) -> None:
        self.url, self._root, self.folder = url, root, folder
        (folder / "token").write_text(root + "\n")
        self.section: dict[str, Any] = {"addr": url, "token_path": str(folder / "token"), "timeout_seconds": 2.0}

    def write(self, path: str = PATH, **fields: Any) -> None:
        headers = {"X-Vault-Token": self._root, "X-Vault-Request": "true"}
        with httpx.Client(trust_env=False) as http:
            answer = http.post(f"{self.url}/v1/{path}", json={"data": fields}, headers=headers)
        assert answer.is_success, answer.text


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[VaultStub]:
    made = VaultStub(monotonic)
    yield made
    made.close()


@pytest.fixture
def at(stub: VaultStub, tmp_path: Path) -> At:
    return At(stub.url, stub.root, tmp_path)


@pytest.fixture(params=["stub", "real"])
def vault_at(request: pytest.FixtureRequest, stub: VaultStub, tmp_path: Path) -> At:
    if request.param == "stub":
        return At(stub.url, stub.root, tmp_path)
    if REAL[0] is None or REAL[1] is None:
        pytest.skip("no real Vault: IFABRIC_VAULT_ADDR and IFABRIC_VAULT_TOKEN name one")
    return At(REAL[0], REAL[1], tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for name in ("", "urllib3", "requests", "hvac", "urllib3.connectionpool"):
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    assert CANARY not in caplog.text
    assert "hvs.root" not in caplog.text


def refused(kind: type[FabricError], made: Config, folder: Path) -> str:
    """What is said; and nothing was written, and no secret is in it."""
    with pytest.raises(kind) as error:
        resolve(made, folder, {})
    assert not list(folder.glob("secrets/*"))
    text = f"{error.value!r} {error.value.facts}"
    assert CANARY not in text and "hvs." not in text
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__
    return error.value.message


# -- finding -----------------------------------------------------------------------------------------------------------


def test_references_are_found_wherever_a_file_is_named() -> None:
    made = config(
        {"addr": "http://v", "token_path": "/t"},
        coordinator={"etcd": {"key_file": "vault:a#1", "cert_file": "vault:a#2", "ca_cert": "/ca.crt"}},
        nats={"nkey_seed_file": "vault:b/c#seed"},
        http={"client_ca": "vault:a#3"},
        identity={"issuer_seed_file": "vault:i#1", "system_seed_file": "vault:i#2"},
        backup={"identity_file": "vault:age#key", "s3": {"bucket": "b", "access_key_file": "vault:s3#id", "secret_key_file": "vault:s3#key"}},
        chassis={"endpoints": {"x": {"url": "https://x", "ca_cert": "vault:x#ca"}}},
        options={"mine": {"key_file": "vault:mine#key"}},
    )  # fmt: skip
    assert find(made) == {
        "coordinator.etcd.key_file": Reference("a", "1"),
        "coordinator.etcd.cert_file": Reference("a", "2"),
        "nats.nkey_seed_file": Reference("b/c", "seed"),
        "http.client_ca": Reference("a", "3"),
        "identity.issuer_seed_file": Reference("i", "1"),
        "identity.system_seed_file": Reference("i", "2"),
        "backup.identity_file": Reference("age", "key"),
        "backup.s3.access_key_file": Reference("s3", "id"),
        "backup.s3.secret_key_file": Reference("s3", "key"),
        "chassis.endpoints.x.ca_cert": Reference("x", "ca"),
        "options.mine.key_file": Reference("mine", "key"),
    }


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"nats": {"servers": ["vault:a#b"]}}, "nats.servers.0: vault: is only understood where a file is named"),
        ({"nats": {"nkey_seed_file": "vault:a"}}, "nats.nkey_seed_file: a reference is written vault:PATH#FIELD"),
        ({"nats": {"nkey_seed_file": "vault:a#b#c"}}, "a reference is written"),
        ({"vault": {"ca_cert": "vault:a#b"}}, "vault.ca_cert: what leads to Vault cannot be in it"),
        ({"nats": {"nkey_seed_file": "vault:a#b"}}, "vault.addr does not say where that is"),
        ({"nats": {"nkey_seed_file": "vault:a#b"}, "vault": {"addr": "http://v"}}, "vault.token_path has to be, too"),
        (
            {"nats": {"nkey_seed_file": "vault:a#b"}, "vault": {"addr": "http://v", "role_id_path": "r"}},
            "vault.secret_id_path",
        ),
    ],
)
def test_what_is_no_reference_or_leads_nowhere_is_refused_by_its_key(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(config(**sections))
    assert says in error.value.message


def test_without_a_reference_nothing_is_asked_and_nothing_changes(tmp_path: Path) -> None:
    made = config({"addr": "http://127.0.0.1:1", "token_path": "/none"}, nats={"nkey_seed_file": "/seed"})
    secrets = resolve(made, tmp_path, {})
    assert secrets.config is made
    assert secrets.refresh() == []
    assert for_a_verb(made) is made
    assert list(tmp_path.iterdir()) == []


# -- looking up --------------------------------------------------------------------------------------------------------


def etcd_of(at: At, key: str = f"vault:{PATH}#key", certificate: str = f"vault:{PATH}#cert") -> Config:
    return config(at.section, coordinator={"etcd": {"key_file": key, "cert_file": certificate}})


def test_what_is_in_vault_is_in_files_for_this_users_eyes(vault_at: At) -> None:
    vault_at.write(key=CANARY, cert="the certificate")
    secrets = resolve(etcd_of(vault_at), vault_at.folder, {})
    etcd = secrets.config.coordinator.etcd
    folder = vault_at.folder / "secrets"
    assert etcd.key_file == str(folder / "coordinator.etcd.key_file")
    assert Path(etcd.key_file or "").read_text() == CANARY
    assert Path(etcd.cert_file or "").read_text() == "the certificate"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 2, "no half-written file is left"


def test_they_are_looked_up_again_and_only_what_has_changed_is_written(vault_at: At) -> None:
    vault_at.write(key=CANARY, cert="one")
    secrets = resolve(etcd_of(vault_at), vault_at.folder, {})
    key = Path(secrets.config.coordinator.etcd.key_file or "")
    before = key.stat().st_mtime_ns, key.stat().st_ino
    vault_at.write(key=CANARY, cert="two")
    assert secrets.refresh() == ["coordinator.etcd.cert_file"]
    assert Path(secrets.config.coordinator.etcd.cert_file or "").read_text() == "two"
    assert (key.stat().st_mtime_ns, key.stat().st_ino) == before


def test_fields_of_one_path_come_of_one_answer(at: At, stub: VaultStub) -> None:
    """A certificate and its key are a pair, even when they are replaced between two reads."""
    at.write(key=CANARY, cert="one")
    resolve(etcd_of(at), at.folder, {})
    assert stub.asked(PATH, "GET") == 1


def test_systemds_folder_is_taken_when_there_is_one(at: At, tmp_path: Path) -> None:
    at.write(key=CANARY, cert="c")
    runtime = tmp_path / "run"
    runtime.mkdir()
    secrets = resolve(etcd_of(at), tmp_path / "state", {"RUNTIME_DIRECTORY": f"{runtime}:/run/other"})
    assert secrets.config.coordinator.etcd.key_file == str(runtime / "secrets" / "coordinator.etcd.key_file")
    assert not (tmp_path / "state").exists()


def test_an_approle_logs_in_and_its_token_is_revoked_afterwards(at: At, stub: VaultStub) -> None:
    at.write(key=CANARY, cert="c")
    stub.roles["fabric"] = Role("role-1", 60.0, 600.0, secret_ids={"secret-1": 2})
    (at.folder / "role").write_text("role-1\n")
    (at.folder / "secret").write_text("secret-1\n")
    section = {"addr": at.url, "role_id_path": str(at.folder / "role"), "secret_id_path": str(at.folder / "secret")}
    made = config(section, coordinator={"etcd": {"key_file": f"vault:{PATH}#key", "cert_file": "/c"}})
    secrets = resolve(made, at.folder, {})
    assert len(stub.revoked) == 1 and set(stub.tokens) == {stub.root}
    secrets.refresh()
    with pytest.raises(ConfigError, match="does not let the AppRole in") as error:
        secrets.refresh()
    assert "secret-1" not in error.value.message
    assert Path(secrets.config.coordinator.etcd.key_file or "").read_text() == CANARY, "the old one stays"


def test_another_kind_of_secret_has_its_fields_at_once(at: At, stub: VaultStub) -> None:
    stub.secrets["secret/data/plain"] = None
    stub.instead = (200, {"data": {"key": CANARY, "cert": "c"}}, {})
    secrets = resolve(etcd_of(at), at.folder, {})
    assert Path(secrets.config.coordinator.etcd.key_file or "").read_text() == CANARY


# -- when it goes wrong ------------------------------------------------------------------------------------------------


def test_a_wrong_path_and_a_wrong_field_are_named(vault_at: At) -> None:
    vault_at.write(key=CANARY, cert="c")
    state = vault_at.folder / "state"
    said = refused(ConfigError, etcd_of(vault_at, "vault:secret/data/other#key"), state)
    assert said.startswith("coordinator.etcd.key_file: Vault at ") and "has no secret at secret/data/other" in said
    said = refused(ConfigError, etcd_of(vault_at, f"vault:{PATH}#kee"), state)
    assert f"has no field kee in {PATH}; the fields there: cert, key" in said


def test_a_value_that_is_no_text_is_refused(at: At) -> None:
    for wrong in ({"a": 1}, 7, "", "x" * 300_000):
        at.write(key=wrong, cert="c")
        assert "is no text of 1 to" in refused(ConfigError, etcd_of(at), at.folder / "state")


def test_a_token_that_is_refused_and_one_that_is_not_there_are_told_apart(at: At, stub: VaultStub) -> None:
    at.write(key=CANARY, cert="c")
    (at.folder / "token").write_text("hvs.other")
    assert f"does not let this token read {PATH}" in refused(ConfigError, etcd_of(at), at.folder / "state")
    (at.folder / "token").unlink()
    said = refused(ConfigError, etcd_of(at), at.folder / "state")
    assert "vault.token_path: cannot read" in said and "coordinator.etcd.key_file" in said
    (at.folder / "token").write_text("two words")
    assert "one line without spaces" in refused(ConfigError, etcd_of(at), at.folder / "state")


@pytest.mark.parametrize("how", ["down", "sealed", "frozen", "dripping", "redirecting", "plain"])
def test_a_vault_that_cannot_be_asked_is_named_with_what_could_not_be_read(at: At, stub: VaultStub, how: str) -> None:
    at.write(key=CANARY, cert="c")
    at.section["timeout_seconds"] = 0.3
    match how:
        case "down":
            at.section["addr"] = "http://127.0.0.1:1"
        case "sealed":
            stub.instead = (503, {"errors": ["Vault is sealed"]}, {})
        case "frozen":
            stub.freeze()
        case "dripping":
            stub.drips = True
        case "redirecting":
            stub.instead = (307, {}, {"Location": "http://127.0.0.1:1/"})
        case "plain":
            at.section["addr"] = stub.url.replace("http:", "https:")
    said = refused(Unreachable, etcd_of(at), at.folder / "state")
    assert "Vault at 127.0.0.1" in said
    assert "coordinator.etcd.key_file" in said


def test_what_fails_the_second_time_leaves_all_files_as_they_were(at: At, stub: VaultStub) -> None:
    at.write(key=CANARY, cert="one")
    secrets = resolve(etcd_of(at), at.folder, {})
    at.write(key="other")
    with pytest.raises(ConfigError, match="no field cert"):
        secrets.refresh()
    assert Path(secrets.config.coordinator.etcd.key_file or "").read_text() == CANARY


def test_a_folder_of_somebody_else_gets_no_secret(at: At, tmp_path: Path) -> None:
    at.write(key=CANARY, cert="c")
    state = tmp_path / "state"
    state.mkdir()
    (tmp_path / "trap").mkdir()
    (state / "secrets").symlink_to(tmp_path / "trap")
    with pytest.raises(ConfigError, match="is no folder of this user's"):
        resolve(etcd_of(at), state, {})
    assert list((tmp_path / "trap").iterdir()) == []


def test_a_vault_behind_tls_is_trusted_by_its_authority_only(at: At, tmp_path: Path) -> None:
    authority = Authority.create()
    authority.pair.write(tmp_path, "vault-ca")
    certificate, key = authority.issue("vault", HOSTS).write(tmp_path, "vault")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = VaultStub(monotonic, tls=context)
    try:
        secure.secrets[PATH] = {"key": CANARY, "cert": "c"}
        at.section["addr"] = secure.url
        assert "not trusted" in refused(Unreachable, etcd_of(at), tmp_path / "state")
        at.section["ca_cert"] = str(tmp_path / "vault-ca.crt")
        assert resolve(etcd_of(at), tmp_path / "state", {}).config.coordinator.etcd.key_file
    finally:
        secure.close()


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_commands_files_are_gone_when_it_ends(at: At, tmp_path: Path) -> None:
    at.write(key=CANARY, cert="c")
    program = (
        "import sys, msgspec; from ifabric.config import Config; from ifabric.references import for_a_verb\n"
        "made = for_a_verb(msgspec.json.decode(sys.stdin.buffer.read(), type=Config))\n"
        "path = made.coordinator.etcd.key_file; print(path); print(open(path).read())"
    )
    document = {"vault": at.section, "coordinator": {"etcd": {"key_file": f"vault:{PATH}#key", "cert_file": "/c"}}}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=msgspec.json.encode(document),
        capture_output=True,
        check=True,
        timeout=60,
    )
    path, value = done.stdout.decode().split()
    assert value == CANARY
    assert not Path(path).exists() and not Path(path).parent.exists()


def test_a_daemon_does_not_start_without_its_secrets_and_says_which(at: At, tmp_path: Path) -> None:
    at.section["addr"] = "http://127.0.0.1:1"
    file = tmp_path / "c.yaml"
    file.write_bytes(msgspec.json.encode({"vault": at.section, "nats": {"nkey_seed_file": f"vault:{PATH}#seed"}}))
    words = [sys.executable, "-m", "ifabric", "run", "--config", str(file), "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert "cannot be reached" in done.stderr and "nats.nkey_seed_file" in done.stderr
    file.write_bytes(msgspec.json.encode({"vault": at.section, "nats": {"nkey_seed_file": "vault:x"}}))
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "a reference is written vault:PATH#FIELD" in done.stderr


async def test_a_daemon_takes_its_certificate_from_vault_and_a_new_one_on_sighup(
    at: At, tmp_path: Path, etcd: RealServer, nats: RealServer
) -> None:
    """Of its HTTP port, because who connects there can see which it is."""
    import signal

    authority = Authority.create()
    authority.pair.write(tmp_path, "ca")

    def put(name: str) -> None:
        pair = authority.issue(name, HOSTS)
        at.write(cert=pair.certificate.decode(), key=pair.key.decode())

    put("first")
    http = {"port": 0, "cert_file": f"vault:{PATH}#cert", "key_file": f"vault:{PATH}#key"}
    daemon = RealDaemon(
        tmp_path / "daemon", [etcd.url], [nats.url], {"http": http, "vault": at.section, "actors": ["coordinator"]}
    )
    try:
        await daemon.start()
        assert daemon.found is not None
        port = int(daemon.found.http.rpartition(":")[2])
        assert await shown(port, tmp_path / "ca.crt") == "first"
        put("second")
        daemon.signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while await shown(port, tmp_path / "ca.crt") != "second":
                await asyncio.sleep(0.1)
        (at.folder / "token").write_text("hvs.other")
        daemon.signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while "the old ones stay in use" not in daemon.log_text():
                await asyncio.sleep(0.1)
        assert await shown(port, tmp_path / "ca.crt") == "second"
    finally:
        await daemon.close()
    assert "PRIVATE KEY" not in daemon.log_text() and "hvs." not in daemon.log_text()


async def shown(port: int, authority: Path) -> str:
    """The common name of the certificate that a port shows."""
    from ifabric import pki

    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=ssl.create_default_context(cafile=authority), server_hostname="localhost"
    )
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return pki.facts(ssl.DER_cert_to_PEM_cert(der).encode()).common_name
