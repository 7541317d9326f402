"""Certificate files: what is wrong with them is said at start, with the key, the file and the dates."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from ifabric.clock import SystemClock
from ifabric.errors import ConfigError, Unreachable
from ifabric.metrics import Metrics
from ifabric.pki import Authority
from ifabric.testing.clusters import Certificates
from ifabric.tls import Files, check_files
from ifabric.tls.reload import Reloader, Used

DAY = dt.timedelta(days=1)


def now() -> dt.datetime:
    """Asked when it is needed: a test may run half an hour after it was collected."""
    return dt.datetime.now(dt.UTC)


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def files(made: Certificates, **changed: str | None) -> Files:
    return Files(section="nats", **{**made.client(), **changed})  # type: ignore[arg-type]


def test_good_files_are_told_by_what_is_in_them(made: Certificates) -> None:
    checked = check_files(files(made))
    assert checked.own is not None
    assert checked.authority is not None
    assert (checked.own.common_name, checked.authority.common_name) == ("ifabric", "InfraFabric test CA")
    assert check_files(Files()).own is None


@pytest.mark.parametrize("name", ["ca_cert", "cert_file", "key_file"])
def test_a_file_that_is_not_there_or_no_pem_is_named_with_its_key(made: Certificates, name: str) -> None:
    path = made.path("nothing.pem")
    with pytest.raises(ConfigError, match=rf"^nats\.{name}: cannot read {path}: No such file"):
        check_files(files(made, **{name: path}))
    Path(path).write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=rf"^nats\.{name}: {path} is not a (certificate|private key) in PEM"):
        check_files(files(made, **{name: path}))


def test_a_key_of_another_certificate_and_one_alone_are_refused(made: Certificates) -> None:
    with pytest.raises(ConfigError, match=r"^nats\.key_file: the key in \S+ does not belong to the certificate in"):
        check_files(files(made, key_file=made.path("server.key")))
    with pytest.raises(ConfigError, match=r"^nats\.cert_file is set without nats\.key_file"):
        check_files(files(made, key_file=None))
    with pytest.raises(ConfigError, match=r"^nats\.key_file is set without nats\.cert_file"):
        check_files(files(made, cert_file=None))


def test_an_encrypted_key_is_refused_as_such(made: Certificates) -> None:
    key = serialization.load_pem_private_key(Path(made.path("ifabric.key")).read_bytes(), None)
    Path(made.path("ifabric.key")).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="is encrypted"):
        check_files(files(made))


def test_a_certificate_out_of_its_time_is_named_with_the_dates(made: Certificates) -> None:
    made.authority.issue("late", days=1, not_before=now() - 10 * DAY).write(made.folder, "ifabric")
    with pytest.raises(
        ConfigError, match=rf"\(late\) expired on {now() - 9 * DAY:%Y-%m-%d}.* and it is {now():%Y-%m-%d}"
    ):
        check_files(files(made), now=now())
    made.authority.issue("early", not_before=now() + 7 * DAY).write(made.folder, "ifabric")
    with pytest.raises(ConfigError, match=rf"\(early\) is not valid before {now() + 7 * DAY:%Y-%m-%d}"):
        check_files(files(made), now=now())


def test_a_bundle_is_good_while_one_authority_in_it_is(made: Certificates) -> None:
    later = Authority.create("Later CA", days=9000).pair.certificate
    ca = Path(made.path("ca.crt"))
    ca.write_bytes(ca.read_bytes() + later)
    checked = check_files(files(made, cert_file=None, key_file=None), now=now() + 4000 * DAY)
    assert checked.authority is not None
    assert checked.authority.common_name == "Later CA"


class Reads:
    """Counts how often files were taken up, and refuses when told to."""

    def __init__(self) -> None:
        self.times = 0
        self.refuses = False

    async def apply(self) -> None:
        if self.refuses:
            raise Unreachable("nobody answers")
        self.times += 1


async def test_changed_files_are_taken_up_when_they_look_the_same_twice(made: Certificates) -> None:
    """Also when a link is made to lead elsewhere, as Kubernetes does it; and anyway on SIGHUP."""
    reads, metrics = Reads(), Metrics()
    given = Path(made.path("given"))
    given.symlink_to(made.folder)
    there = {name: str(given / Path(path).name) for name, path in made.client().items()}
    reloader = Reloader([Used("nats", Files(**there), reads.apply)], SystemClock(), metrics)
    reloader.check()
    await reloader.look()
    await reloader.look()
    assert reads.times == 0
    other = Certificates(made.folder / "other")
    fresh = made.folder / "fresh"
    fresh.symlink_to(other.folder)
    fresh.replace(given)
    await reloader.look()
    assert reads.times == 0
    await reloader.look()
    await reloader.look()
    assert reads.times == 1
    await reloader.look(anyway=True)
    assert reads.times == 2


async def test_files_that_cannot_be_used_change_nothing_are_counted_and_tried_again(made: Certificates) -> None:
    reads, metrics = Reads(), Metrics()
    reloader = Reloader([Used("nats", files(made), reads.apply)], SystemClock(), metrics)
    reloader.check()
    failed = metrics.counter("if_certificate_reloads_total", part="nats", outcome="failed")
    good = Path(made.path("ifabric.key")).read_bytes()
    Path(made.path("ifabric.key")).write_bytes(b"half")
    await reloader.look()
    await reloader.look()
    assert (reads.times, failed.value) == (0, 1)
    assert "were not exchanged, the old ones stay in use" in reloader.warnings()[0]
    reads.refuses = True
    Path(made.path("ifabric.key")).write_bytes(good)
    await reloader.look()
    await reloader.look()
    assert failed.value >= 2
    reads.refuses = False
    await reloader.look()
    assert (reads.times, reloader.warnings()) == (1, [])


async def test_a_certificate_that_expires_soon_is_warned_of_and_its_end_is_a_metric(made: Certificates) -> None:
    made.authority.issue("soon", days=3).write(made.folder, "ifabric")
    metrics = Metrics()
    reloader = Reloader([Used("nats", files(made), Reads().apply)], SystemClock(), metrics)
    reloader.check()
    assert "expires in 3.0 days" in reloader.warnings()[0] or "expires in 2." in reloader.warnings()[0]
    left_s = metrics.gauge("if_certificate_expiry_timestamp_seconds", part="nats").value - now().timestamp()
    assert 2 * 86_400 < left_s <= 3 * 86_400
