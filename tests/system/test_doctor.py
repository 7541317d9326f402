"""`ifabric doctor` and `ifabric member list` before real clusters that are broken in one way after the other."""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ifabric.backup.manifest import Name, Sidecar
from ifabric.backup.places import Folder
from ifabric.bus.base import JournalSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.care import probes
from ifabric.clock import SystemClock
from ifabric.pki import LEAF_DAYS
from ifabric.testing.clusters import HOSTS, Certificates, Members, etcd_cluster, nats_cluster
from ifabric.wire.subjects import EVENT_STREAM, EVENTS
from tests.actors.vault_stub import VaultStub
from tests.conftest import needed
from tests.system.conftest import eventually

#: clusters are broken one after the other
pytestmark = pytest.mark.slow

CLOCK = SystemClock()
WAIT_S = 60.0
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("IFABRIC")}


class Ran(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    def findings(self, severity: str) -> list[str]:
        """Of `doctor --json`: the part and what is so."""
        found = json.loads(self.out)["findings"]
        return [f"{one['part']}: {one['what']}" for one in found if one["severity"] == severity]


async def ifabric(*words: str, **environ: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "ifabric", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=CLEAN | environ,
    )
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


class House:
    """Three etcd and three nats-server with TLS, and a configuration that leads to them."""

    def __init__(self, folder: Path, certificates: Certificates, etcd: Members, nats: Members) -> None:
        self.folder, self.certificates, self.etcd, self.nats = folder, certificates, etcd, nats

    def config(self, **changes: Any) -> str:
        """The file's name."""
        made: dict[str, Any] = {
            "coordinator": {"etcd": {"endpoints": self.etcd.urls, **self.certificates.client()}},
            "nats": {"servers": self.nats.urls, "ca_cert": self.certificates.path("ca.crt")},
            "events": {"replicas": 3},
            "state_dir": str(self.folder / "state"),
            **changes,
        }
        path = self.folder / f"fabric-{CLOCK.token()[:6]}.yaml"
        path.write_text(json.dumps(made))
        return str(path)

    async def doctor(self, *words: str, **changes: Any) -> Ran:
        return await ifabric("doctor", "--config", self.config(**changes), *words)


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    certificates = Certificates(folder / "pki")
    with needed("etcd and nats-server"):
        async with (
            etcd_cluster(certificates=certificates, folder=folder / "etcd") as etcd,
            nats_cluster(certificates=certificates, folder=folder / "nats") as nats,
        ):
            settings = NatsSettings(servers=tuple(nats.urls), ca_cert=certificates.path("ca.crt"))
            bus = Nats(settings, CLOCK)
            await bus.connect()
            await bus.journal(
                JournalSpec(name=EVENT_STREAM, subjects=(EVENTS,), max_age_s=3600, max_bytes=1 << 20, replicas=3)
            )
            await bus.close()
            yield House(folder, certificates, etcd, nats)


async def test_what_is_well_is_said_to_be_part_by_part(house: House) -> None:
    async def well() -> Ran | None:
        ran = await house.doctor("--json")
        return ran if not any("IF_EVENTS" in one for one in ran.findings("warning")) else None

    ran = await eventually(well, WAIT_S)  # a stream's copies say that they are current a moment after it was made
    assert (ran.code, ran.err) == (0, "")
    assert ran.findings("critical") == []
    assert ran.findings("warning") == ["backups: none are made: backup.recipients is empty"]
    good = "\n".join(ran.findings("ok"))
    for words in (
        "3 of 3 members answer",
        "3 of 3 servers answer",
        "1 streams are whole",
        "agree with this machine's",
        "8 of 8",
    ):
        assert words in good
    facts = json.loads(ran.out)["facts"]
    assert {one["quota_bytes"] for one in facts["etcd"]["members"]} == {2 << 30}  # etcd's default, from its metrics
    assert all(abs(one["clock"]["most_s"]) < 3 for one in facts["etcd"]["members"])
    assert {one["leader"] for one in facts["nats"]["streams"]} <= {"nats-1", "nats-2", "nats-3"}


async def test_one_that_stands_still_and_one_that_has_gone_are_named_and_hide_nothing(house: House) -> None:
    gone, frozen = house.etcd.members[0], house.nats.members[1]
    await gone.stop()
    frozen.freeze()
    try:
        async with asyncio.timeout(90):  # JetStream has no leader for some seconds, when it was that one
            while "JetStream does not answer" in (ran := await house.doctor()).out:
                pass
        strict, members = await asyncio.gather(
            house.doctor("--strict", "--json"), ifabric("member", "list", "--config", house.config())
        )
    finally:
        frozen.thaw()
        await gone.start_again()
    assert ran.code == 0, ran.out
    assert f"! etcd-1 does not answer (connection refused)  {gone.url}" in ran.out
    assert "! one more member lost, and there is no quorum  2 of 3" in ran.out
    assert f"! {frozen.url} does not answer (no answer within 3 s)" in ran.out
    assert "● 2 of 3 members answer" in ran.out
    assert "● 2 of 3 servers answer" in ran.out
    assert strict.code == 1
    assert members.code == 1
    assert "etcd-1 does not answer: connection refused. If its disk is sound, start it again" in members.out
    others = ",".join(url for url in house.etcd.urls if url != gone.url)
    assert sorted(others.split(",")) == sorted(members.out.partition("--endpoints ")[2].split(" ")[0].split(","))


@pytest.mark.slow
async def test_what_is_printed_to_replace_a_member_replaces_it(house: House) -> None:
    """Every printed command is carried out as it stands; the member's own options are the test's part, as they are an
    operator's. Slow: a member is lost, and another one catches up.
    """
    etcdctl = Path(__file__).parent.parent.parent / ".tools/etcd/usr/bin/etcdctl"
    if not etcdctl.exists():
        pytest.skip("no etcdctl: `just etcd` brings one")
    lost = house.etcd.members[2]
    await lost.kill()
    printed = (await ifabric("member", "list", "--config", house.config())).out
    commands = [
        line.strip() for line in printed.splitlines() if line.startswith("  ") and not line.strip().startswith("#")
    ]
    remove, move, add, start, promote, again = commands
    assert (again.split()[:3], start.split()[:3]) == (
        ["ifabric", "member", "list"],
        ["etcd", "--initial-cluster-state", "existing"],
    )

    async def shell(command: str) -> tuple[int | None, str]:
        found = await asyncio.create_subprocess_shell(
            command, env=CLEAN | {"PATH": f"{etcdctl.parent}:{os.environ['PATH']}", "ETCDCTL_API": "3"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said = (await found.communicate())[0].decode()
        return found.returncode, said

    async def done(command: str) -> str:
        code, said = await shell(command)
        assert code == 0, f"{command}: {said}"
        return said

    await done(remove)
    await done(move.replace("DATA-DIR", str(house.etcd.folders[2])))

    async def admitted() -> str:
        code, said = await shell(add)
        assert code == 0 or "unhealthy cluster" in said, said  # as the comment above it says
        return said if code == 0 else ""

    added = await eventually(admitted, WAIT_S)
    lost._server._arguments = [
        *(one for one in lost._server._arguments if not one.startswith("--initial-cluster")),
        *("--initial-cluster-state=existing", f"--initial-cluster={start.split()[4]}"),
    ]
    await lost.start_again()
    promote = promote.replace("promote ID", f"promote {added.split()[1]}")

    async def promoted() -> bool:
        code, said = await shell(promote)
        assert code == 0 or "can only promote a learner member which is in sync with leader" in said, said
        return code == 0

    assert "learner" in (await ifabric(*again.split()[1:])).out
    await eventually(promoted, WAIT_S)
    ran = await ifabric("member", "list", "--config", house.config())
    assert (ran.code, ran.out.count("well")) == (0, 3), ran.out


def an_old_backup(folder: Path, age: dt.timedelta) -> str:
    at = dt.datetime.now(dt.UTC) - age
    name = str(Name(at=at, revision=7))
    (folder / name).write_bytes(b"x" * 10)
    Folder(folder).write_facts(
        Sidecar(file=name, at=at, size=10, revision=7, sha256="0" * 64, incarnation=1, etcd="3.5.30", recipients=1)
    )
    return name


async def test_files_vault_and_the_configuration_are_looked_at_too(house: House) -> None:
    pki, backups = house.certificates, house.folder / "backups"
    now = dt.datetime.now(dt.UTC)
    pki.authority.issue("soon", client=True, days=5).write(pki.folder, "soon")
    expired = pki.authority.issue("late", HOSTS, days=LEAF_DAYS, not_before=now - dt.timedelta(days=LEAF_DAYS + 2))
    expired.write(pki.folder, "late")
    (pki.folder / "soon.key").chmod(0o644)
    backups.mkdir()
    name = an_old_backup(backups, dt.timedelta(hours=7))
    stub, sealed = VaultStub(CLOCK.monotonic), VaultStub(CLOCK.monotonic)
    sealed.instead = (503, {"errors": ["Vault is sealed"]}, {})
    try:
        token = house.folder / "token"
        token.write_text("hvs.unknown")
        ran = await house.doctor(
            "--json",
            coordinator={"etcd": {"endpoints": house.etcd.urls, **pki.client("soon")}, "task_claim_ttl_seconds": 300},
            http={"cert_file": pki.path("late.crt"), "key_file": pki.path("late.key")},
            vault={"addr": sealed.url, "token_path": str(token)},
            chassis={"credentials": {"vault_addr": stub.url, "vault_token_path": str(token)}},
            backup={"directory": str(backups), "recipients": ["age1" + "q" * 58]},
        )
    finally:
        stub.close()
        sealed.close()
    assert ran.code == 1
    critical, warnings = "\n".join(ran.findings("critical")), "\n".join(ran.findings("warning"))
    assert f"certificates: coordinator.etcd.cert_file {pki.path('soon.crt')} (soon) expires" in critical
    assert f"certificates: http.cert_file {pki.path('late.crt')} (late) has expired" in critical
    assert f"Vault: vault.addr {sealed.url} is sealed" in critical
    assert f"Vault: chassis.credentials.vault_addr {stub.url}: the token is of no use: Vault answers 403" in critical
    assert f"backups: the newest is old: {name}" in warnings
    assert "can be read by others" in warnings
    assert "configuration: coordinator.task_claim_ttl_seconds" in warnings
    figures = {one["figure"] for one in json.loads(ran.out)["findings"]}
    assert {"in 5 days", "2 days ago", "7 h; every 5 min is wanted"} <= figures


async def test_where_nothing_answers_it_says_so_with_another_exit_code(tmp_path: Path) -> None:
    config = tmp_path / "fabric.yaml"
    config.write_text(
        json.dumps(
            {
                "coordinator": {"etcd": {"endpoints": ["http://127.0.0.1:9"]}},
                "nats": {"servers": ["nats://127.0.0.1:9"]},
            }
        )
    )
    ran = await ifabric("doctor", "--config", str(config), "--state-dir", str(tmp_path))
    assert ran.code == 3
    assert "✘ no member answers: http://127.0.0.1:9: connection refused" in ran.out
    assert "✘ no server answers: nats://127.0.0.1:9: connection refused" in ran.out
    nobody = await ifabric("doctor", "--state-dir", str(tmp_path))
    assert (nobody.code, "no daemon runs here" in nobody.err) == (3, True)
    members = await ifabric("member", "list", "--config", str(config))
    assert members.code == 3


async def test_a_source_that_cannot_be_asked_is_a_finding_and_hides_no_other(tmp_path: Path) -> None:
    config = tmp_path / "fabric.yaml"
    etcd = {"endpoints": ["https://127.0.0.1:9"], "ca_cert": str(tmp_path / "none.crt")}
    config.write_text(json.dumps({"coordinator": {"etcd": etcd}, "nats": {"servers": ["nats://127.0.0.1:9"]}}))
    ran = await ifabric("doctor", "--config", str(config), "--state-dir", str(tmp_path), "--json")
    assert ran.code == 3
    assert any(
        one.startswith("etcd: could not be looked at: coordinator.etcd.ca_cert: cannot read")
        for one in ran.findings("warning")
    )
    critical = "\n".join(ran.findings("critical"))
    assert "NATS: no server answers" in critical
    assert (
        f"certificates: coordinator.etcd.ca_cert {tmp_path}/none.crt: cannot be read: No such file or directory"
        in critical
    )


async def test_a_clock_is_read_from_an_answer_as_exactly_as_the_answer_tells_it() -> None:
    """A clock that is off cannot be had here, so an HTTP server tells another time than it is."""
    off_s = -120.0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        date = email.utils.formatdate(CLOCK.wall_ms() / 1000 + off_s, usegmt=True)
        writer.write(f"HTTP/1.1 200 OK\r\nDate: {date}\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as served:
        port = served.sockets[0].getsockname()[1]
        clock = (await probes.get(f"http://127.0.0.1:{port}/", CLOCK, timeout_s=WAIT_S)).clock
        assert clock is not None
        assert clock.least_s - 1.1 <= off_s <= clock.most_s + 1.1
        assert off_s - 30 < clock.surely_s < off_s + 30
        off_s = 0.0
        clock = (await probes.get(f"http://127.0.0.1:{port}/", CLOCK, timeout_s=WAIT_S)).clock
        assert clock is not None
        assert clock.surely_s == 0.0


@pytest.mark.slow
async def test_a_copy_that_has_gone_a_lost_quorum_and_a_server_with_an_expired_certificate(house: House) -> None:
    """Slow: NATS takes its time to call a server offline, etcd a leader lost."""
    pki, gone = house.certificates, house.nats.members[2]
    await gone.kill()

    async def missed() -> Ran | None:
        ran = await house.doctor("--json")
        return ran if any("the copy of IF_EVENTS on nats-3 is" in one for one in ran.findings("warning")) else None

    try:
        ran = await eventually(missed, WAIT_S * 2)
        assert f"NATS: {gone.url} does not answer (connection refused)" in ran.findings("warning")
    finally:
        await gone.start_again()
    shown = Path(pki.path("server.crt")), Path(pki.path("server.key"))
    kept = [path.read_bytes() for path in shown]
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=LEAF_DAYS + 1)
    pki.authority.issue("server", HOSTS, not_before=long_ago).write(
        pki.folder, "server"
    )  # etcd reads it at each handshake
    try:
        ran = await house.doctor("--json")
        assert ran.code == 1
        critical = ran.findings("critical")
        assert f"certificates: {house.etcd.urls[0]} presents (server) has expired" in critical
        assert any("no member answers" in one and "its certificate is not accepted" in one for one in critical), (
            critical
        )
    finally:
        for path, data in zip(shown, kept, strict=True):
            path.write_bytes(data)
    for member in house.etcd.members[:2]:
        member.freeze()
    try:
        ran = await house.doctor("--json")
        assert ran.code == 1
        assert any("etcd: no quorum" in one for one in ran.findings("critical"))
        guide = await ifabric("member", "list", "--config", house.config())
        assert "There is no quorum: 1 of 3 members are well" in guide.out
        assert "member remove" not in guide.out
    finally:
        for member in house.etcd.members[:2]:
            member.thaw()


@pytest.mark.slow
async def test_with_authentication_on_a_daemon_s_certificate_is_enough_to_look_and_root_s_to_act(
    tmp_path: Path,
) -> None:
    """Slow: a cluster of its own. etcd tells its status to root alone; its metrics say the same."""
    etcdctl = Path(__file__).parent.parent.parent / ".tools/etcd/usr/bin/etcdctl"
    if not etcdctl.exists():
        pytest.skip("no etcdctl: `just etcd` brings one")
    pki = Certificates(tmp_path / "pki")
    async with etcd_cluster(certificates=pki, folder=tmp_path / "etcd") as etcd:
        root = pki.client("root")
        for words in (
            "user add root --no-password",
            "user grant-role root root",
            "user add ifabric --no-password",
            "auth enable",
        ):
            given = (
                "--endpoints",
                etcd.urls[0],
                "--cacert",
                root["ca_cert"],
                "--cert",
                root["cert_file"],
                "--key",
                root["key_file"],
            )
            process = await asyncio.create_subprocess_exec(
                etcdctl, *given, *words.split(), stdout=asyncio.subprocess.DEVNULL
            )
            assert await process.wait() == 0
        config = tmp_path / "fabric.yaml"
        config.write_text(json.dumps({"coordinator": {"etcd": {"endpoints": etcd.urls, **pki.client()}}}))
        where = ("--config", str(config), "--state-dir", str(tmp_path))
        ran = await ifabric("doctor", "--json", *where)
        assert (ran.code, ran.findings("critical")) == (0, []), ran.out
        members = json.loads(ran.out)["facts"]["etcd"]["members"]
        assert all(
            one["version"] == members[0]["version"] != "" and one["size_bytes"] and one["quota_bytes"]
            for one in members
        )
        assert {one["leader"] for one in members} <= {one["id"] for one in members}
        refused = await ifabric("maintenance", "defrag", "--yes", *where)
        assert (refused.code, "give --cert-file and --key-file of root" in refused.err) == (1, True), refused.err
        admin = ("--cert-file", root["cert_file"], "--key-file", root["key_file"])
        done = await ifabric("maintenance", "defrag", "--yes", "--json", *where, *admin)
        assert (done.code, len(json.loads(done.out)["done"])) == (0, 3), done.err
