"""What a backup is, without any server: names, manifests, which ones go, and an archive that is damaged anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyrage
import pytest
import zstandard

from ifabric.backup import incarnations, keys
from ifabric.backup.archive import Source, measure, read_archive, read_manifest, write_archive
from ifabric.backup.manifest import (
    BackupFailed,
    BackupRefused,
    Kept,
    Manifest,
    Member,
    Name,
    Sidecar,
    check_etcd,
    decode_manifest,
    expired,
    newest,
    parse_name,
)
from ifabric.backup.places import Folder, check_file, facts_path, read_facts
from ifabric.backup.snapshot import Status, order
from ifabric.errors import ConfigError

AT = datetime(2026, 11, 28, 18, 30, tzinfo=UTC)
KEY = pyrage.x25519.Identity.generate()
DB = bytes(range(256)) * 12


def made(folder: Path, *, format: int = 1, etcd: str = "3.5.30", recipients: list[Any] | None = None) -> Path:
    """A small backup."""
    db, stream, about = io.BytesIO(DB), io.BytesIO(b"stream" * 40), io.BytesIO(b'{"config":{}}')
    parts = [("etcd.db", db), ("streams/IF_EVENTS.json", about), ("streams/IF_EVENTS.snapshot", stream)]
    members = tuple(
        Member(name=name, size=found.size, sha256=found.sha256) for name, file in parts for found in (measure(file),)
    )
    manifest = Manifest(
        format=format,  # type: ignore[arg-type]
        ifabric="0.1.0",
        etcd=etcd,
        cluster_id="cdf8",
        revision=123456,
        incarnation=1,
        at=AT,
        keys={"tasks/": 3},
        members=members,
    )
    path = folder / str(Name(AT, 123456))
    write_archive(path, manifest, [Source(*part) for part in parts], recipients or [KEY.to_public()])
    return path


def facts_of(path: Path, **changes: Any) -> Sidecar:
    with path.open("rb") as file:
        written = measure(file)
    given = {
        "file": path.name,
        "size": written.size,
        "sha256": written.sha256,
        "at": AT,
        "revision": 123456,
        "incarnation": 1,
        "etcd": "3.5.30",
        "recipients": 1,
    }
    return Sidecar(**{**given, **changes})


# -- names and manifests ------------------------------------------------------------------------------------------------


def test_a_name_says_when_and_at_which_revision() -> None:
    assert str(Name(AT, 123456)) == "ifabric-20261128T183000Z-rev123456.tar.zst.age"
    assert parse_name("ifabric-20261128T183000Z-rev123456.tar.zst.age") == Name(AT, 123456)
    prepared = Name(AT, 7, prepared=True, incarnation=12)
    assert parse_name(str(prepared)) == prepared


@pytest.mark.parametrize(
    "name",
    ["", "ifabric.age", ".ifabric-20261128T183000Z-rev1.tar.zst.age.partial", "ifabric-20269928T183000Z-rev1.tar.zst.age",
     "ifabric-20261128T183000Z-rev1.tar.zst.age.json", "../ifabric-20261128T183000Z-rev1.tar.zst.age",
     "ifabric-20261128T183000Z-rev1.tar.zst.age\n"],
)  # fmt: skip
def test_what_is_not_called_like_a_backup_is_none(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize("members", [[], ["etcd.db", "../../etc/passwd"], ["etcd.db", "/etc/passwd"], ["streams/A.json"],
                                     ["etcd.db", "etcd.db"], ["etcd.db", "streams/../x.json"]])  # fmt: skip
def test_a_manifest_names_nothing_but_what_a_backup_has(members: list[str]) -> None:
    said = msgspec.json.encode(
        {"format": 1, "ifabric": "0", "etcd": "3.5.30", "cluster_id": "1", "revision": 1, "incarnation": 1, "at": AT, "keys": {},
         "members": [{"name": name, "size": 1, "sha256": "0" * 64} for name in members]}
    )  # fmt: skip
    with pytest.raises(BackupRefused, match="other members") as refused:
        decode_manifest(said)
    assert refused.value.facts["reason"] == "manifest"


@pytest.mark.parametrize(("version", "fits"), [("3.5.30", True), ("3.5.1", True), ("3.4.40", False), ("3.6.0", False), ("4.0.0", False),
                                               ("nonsense", False), ("", False)])  # fmt: skip
def test_a_snapshot_of_an_etcd_that_the_one_here_cannot_read_is_refused(version: str, *, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(BackupRefused, match="nothing was touched"):
        check_etcd(version, (3, 5, 30))


def test_an_etcd_takes_the_minor_version_before_its_own_and_no_older_one() -> None:
    check_etcd("3.5.30", (3, 6, 11))
    with pytest.raises(BackupRefused, match="version between"):
        check_etcd("3.5.30", (3, 7, 0))


# -- which ones go --------------------------------------------------------------------------------------------------------


def kept(days: float, *, good: bool = True, ours: bool = True) -> Kept:
    return Kept(f"{days}", AT - timedelta(days=days), good, ours)


@pytest.mark.parametrize(
    ("backups", "keep_min", "gone", "why"),
    [
        ([], 3, [], "there are none"),
        ([kept(1), kept(2)], 1, [], "none is old"),
        ([kept(1), kept(8), kept(9)], 1, ["9", "8"], "older than seven days, oldest first"),
        ([kept(8), kept(9), kept(10)], 2, ["10"], "the newest two stay whatever their age"),
        ([kept(8)], 1, [], "the last one stays"),
        ([kept(8), kept(9)], 0, ["9"], "and it does when none was asked to be kept"),
        ([kept(1, good=False), kept(8), kept(9)], 1, ["9"], "one that is cut short counts for nothing"),
        ([kept(8, good=False), kept(9, good=False)], 1, [], "while there is no good one, everything stays"),
        ([kept(1), kept(8, ours=False)], 1, [], "what we did not write is not ours to delete"),
        ([kept(1), kept(8, good=False)], 1, ["8"], "one that is cut short goes when it is old"),
        ([kept(-3), kept(-2)], 1, [], "a clock that went back deletes nothing"),
        ([kept(7)], 1, [], "exactly at the border it stays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_retention(backups: list[Kept], keep_min: int, gone: list[str], why: str) -> None:
    assert expired(backups, AT, retention_days=7, keep_min=keep_min) == gone, why


def test_the_newest_backup_is_the_one_to_restore_and_a_prepared_one_is_none(tmp_path: Path) -> None:
    path = made(tmp_path)
    old, new = facts_of(path, at=AT - timedelta(hours=1), revision=9), facts_of(path)
    assert newest([new, old, facts_of(path, file="prepared-x", at=AT + timedelta(days=1))]) == new
    assert newest([]) is None


# -- which endpoint -----------------------------------------------------------------------------------------------------


def test_a_follower_is_asked_before_the_leader_unless_it_is_far_behind() -> None:
    leader = Status("leader", revision=5000, leader=True)
    near, far = Status("near", revision=4990), Status("far", revision=10)
    assert [one.endpoint for one in order([leader, far, near])[0]] == ["near", "leader", "far"]


@pytest.mark.parametrize(
    ("status", "why"),
    [(Status("a", error="unavailable"), "unavailable"), (Status("a", alarms=("CORRUPT",)), "CORRUPT"),
     (Status("a", has_leader=False), "no leader"), (Status("a", learner=True), "learner")],
)  # fmt: skip
def test_an_endpoint_that_is_not_sound_is_not_asked(status: Status, why: str) -> None:
    fit, refused = order([status, Status("b")])
    assert [one.endpoint for one in fit] == ["b"]
    assert why in refused[0]


def test_an_etcd_without_room_still_gives_a_snapshot() -> None:
    assert order([Status("a", alarms=("NOSPACE",))])[0]


# -- the archive ----------------------------------------------------------------------------------------------------------


def test_a_backup_is_for_its_owners_eyes_and_opens_without_us(tmp_path: Path) -> None:
    path = made(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(pyrage.decrypt(path.read_bytes(), [KEY]))).read()
    (tmp_path / "plain.tar").write_bytes(plain)
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "plain.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed == ["manifest.json", "etcd.db", "streams/IF_EVENTS.json", "streams/IF_EVENTS.snapshot"]


def test_every_recipient_can_open_it_and_nobody_else(tmp_path: Path) -> None:
    other, stranger = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    path = made(tmp_path, recipients=[KEY.to_public(), other.to_public()])
    assert read_manifest(path, [KEY]) == read_manifest(path, [other])
    with pytest.raises(BackupRefused, match="not encrypted for this key") as refused:
        read_manifest(path, [stranger])
    assert refused.value.facts["reason"] == "key"


def test_a_backup_that_is_damaged_in_any_byte_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    whole = path.read_bytes()
    assert read_manifest(path, [KEY]).revision == 123456
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BackupRefused):
            read_manifest(path, [KEY])


def test_a_backup_that_is_cut_short_anywhere_or_goes_on_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at])
        with pytest.raises(BackupRefused):
            read_manifest(path, [KEY])
    path.write_bytes(whole + b"more")
    with pytest.raises(BackupRefused):
        read_manifest(path, [KEY])


def test_damage_far_behind_the_last_member_is_found_too(tmp_path: Path) -> None:
    """A reader that stops when it has what it wants would never come to it."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        data = manifest_of(members=[{"name": "etcd.db", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}])
        for name, content in (("manifest.json", data), ("etcd.db", b"abc")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sealed = pyrage.encrypt(zstandard.compress(plain.getvalue() + os.urandom(3 << 20)), [KEY.to_public()])
    path = tmp_path / "x.age"
    for tail, fits in ((sealed[-9:], True), (bytes(9), False), (b"", False)):
        path.write_bytes(sealed[:-9] + tail)
        with contextlib.nullcontext() if fits else pytest.raises(BackupRefused):
            read_manifest(path, [KEY])


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A file that somebody else has made, with our public key."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(pyrage.encrypt(zstandard.compress(plain.getvalue()), [KEY.to_public()]))
    return path


def manifest_of(**changes: Any) -> bytes:
    given = {"format": 1, "ifabric": "0", "etcd": "3.5.30", "cluster_id": "1", "revision": 1, "incarnation": 1, "at": AT, "keys": {},
             "members": [{"name": "etcd.db", "size": 3, "sha256": "0" * 64}]}  # fmt: skip
    return msgspec.json.encode({**given, **changes})


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("etcd.db", b"abc")], "manifest"),
        ([("manifest.json", b"{")], "manifest"),
        ([("manifest.json", manifest_of(format=2)), ("etcd.db", b"abc")], "format"),
        ([("manifest.json", manifest_of(format=0)), ("etcd.db", b"abc")], "format"),
        ([("manifest.json", manifest_of())], "corrupt"),
        ([("manifest.json", manifest_of()), ("etcd.db", b"abc")], "corrupt"),
        ([("manifest.json", manifest_of()), ("etcd.db", b"abcd")], "corrupt"),
        ([("manifest.json", manifest_of()), ("../evil", b"abc")], "corrupt"),
    ],
    ids=[
        "no manifest",
        "no JSON",
        "a newer format",
        "an older format",
        "nothing in it",
        "another digest",
        "another size",
        "a path",
    ],
)
def test_a_file_for_our_key_that_is_no_sound_backup_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    with pytest.raises(BackupRefused) as refused:
        read_manifest(packed(tmp_path / "x.age", members), [KEY])
    assert refused.value.facts["reason"] == reason


def test_a_disk_that_is_full_while_reading_is_not_called_a_damaged_backup(tmp_path: Path) -> None:
    class Full:
        def write(self, data: bytes, /) -> object:
            raise OSError(28, "No space left on device")

    with pytest.raises(BackupRefused, match="No space left") as refused:
        read_archive(made(tmp_path), [KEY], lambda _, __: contextlib.nullcontext(Full()))
    assert refused.value.facts["reason"] == "room"


def test_a_backup_never_takes_anothers_place(tmp_path: Path) -> None:
    path = made(tmp_path)
    before = path.read_bytes()
    with pytest.raises(BackupFailed, match="there already"):
        made(tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# -- a folder of them -------------------------------------------------------------------------------------------------------


def test_what_an_interrupted_run_has_left_is_not_listed_and_cleared_away_by_the_next(tmp_path: Path) -> None:
    path = made(tmp_path)
    half = tmp_path / f".{Name(AT, 99)}.partial"
    half.write_bytes(b"half")
    folder = Folder(tmp_path)
    folder.write_facts(facts_of(path))
    assert [one.path for one in folder.backups()] == [path]
    with folder.alone():
        assert not half.exists()


def test_two_runs_do_not_meet_in_one_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with folder.alone(), pytest.raises(BackupFailed, match="another backup"), folder.alone():
        pass


def test_a_backup_is_held_against_its_facts_without_a_key(tmp_path: Path) -> None:
    path = made(tmp_path)
    Folder(tmp_path).write_facts(facts_of(path))
    facts = read_facts(path)
    assert facts is not None
    check_file(path, facts)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BackupRefused, match="digest"):
        check_file(path, facts)
    path.write_bytes(b"x")
    with pytest.raises(BackupRefused, match="bytes"):
        check_file(path, facts)
    assert not Folder(tmp_path).backups()[0].whole


def test_only_what_is_old_and_ours_is_deleted_from_a_folder(tmp_path: Path) -> None:
    old = made(tmp_path)
    folder = Folder(tmp_path)
    folder.write_facts(facts_of(old))
    new = tmp_path / str(Name(AT + timedelta(days=30), 200000))
    new.write_bytes(old.read_bytes())
    folder.write_facts(facts_of(new, at=AT + timedelta(days=30)))
    theirs = tmp_path / str(Name(AT, 1))
    theirs.write_bytes(b"somebody else's")
    assert folder.delete_expired(AT + timedelta(days=30), retention_days=7, keep_min=1) == [old.name]
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {new.name, facts_path(new).name, theirs.name}


# -- keys, incarnations ---------------------------------------------------------------------------------------------------


def test_a_key_that_was_made_opens_what_its_public_part_was_given_for(tmp_path: Path) -> None:
    public = keys.make_key(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    path = made(tmp_path, recipients=keys.recipients_of([public]))
    assert read_manifest(path, keys.read_identities(tmp_path / "key")).incarnation == 1
    with pytest.raises(ConfigError, match="there already"):
        keys.make_key(tmp_path / "key")


def test_without_a_recipient_nothing_is_written_and_a_private_key_is_not_taken_for_one() -> None:
    with pytest.raises(ConfigError, match="--make-key"):
        keys.recipients_of([])
    with pytest.raises(ConfigError, match="private key") as refused:
        keys.recipients_of([str(KEY)])
    assert str(KEY) not in refused.value.message
    with pytest.raises(ConfigError, match="not an age public key"):
        keys.recipients_of(["age1nonsense"])


def test_no_two_restores_of_one_backup_get_the_same_incarnation(tmp_path: Path) -> None:
    assert [incarnations.take(1, tmp_path, None, "a backup") for _ in range(3)] == [2, 3, 4]
    assert incarnations.taken(tmp_path) == 4
    assert incarnations.take(4, tmp_path, None, "a backup", exactly=9) == 9
    for number, why in ((9, "taken by another"), (4, "not between"), (1 << 13, "not between")):
        with pytest.raises(BackupRefused, match=why):
            incarnations.take(4, tmp_path, None, "a backup", exactly=number)


def test_an_incarnation_is_above_every_one_that_left_a_sign(tmp_path: Path) -> None:
    path = made(tmp_path)
    assert incarnations.highest(1, [facts_of(path, incarnation=5)], 3, 0) == 5
    with pytest.raises(BackupRefused, match="no incarnation left"):
        incarnations.take(incarnations.INCARNATION_MAX, tmp_path, None, "x")


def test_an_incarnation_that_cannot_be_written_down_is_not_given_out(tmp_path: Path) -> None:
    (tmp_path / "incarnations").write_text("a file where the folder has to be")
    with pytest.raises(BackupRefused, match="cannot be written down"):
        incarnations.take(1, tmp_path, None, "x")
