"""An actor is found by its name, and a wrong name is explained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ifabric import loader
from ifabric.actor.base import Actor
from ifabric.errors import ConfigError


class Mine(Actor):
    component = "mine"


class _Entry:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def __lt__(self, other: _Entry) -> bool:
        return self.name < other.name


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes modules that can be imported, and are forgotten again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which actors are installed."""

    def install(**actors: str) -> None:
        entries = [_Entry(name, value) for name, value in actors.items()]
        monkeypatch.setattr(loader, "entry_points", lambda *, group: entries if group == loader.GROUP else [])

    return install


ACTOR = "from ifabric.actor.base import Actor\nclass Good(Actor):\n    component = 'good'\nnumber = 7\n"


def test_an_installed_actor_is_found_by_its_name() -> None:
    found = loader.load("coordinator")
    assert found.component == "coordinator"
    assert ("claim", False) in found.handlers


def test_an_actor_that_is_not_installed_is_found_by_its_module(modules: Any) -> None:
    modules("loader_good", ACTOR)
    assert loader.load("loader_good:Good").component == "good"


def test_an_unknown_name_lists_the_installed_ones_and_guesses_what_was_meant(installed: Any) -> None:
    installed(coordinator="x:Y", governor="x:Z")
    with pytest.raises(ConfigError, match=r"did you mean 'coordinator'\?.*coordinator, governor"):
        loader.load("cordinator")
    with pytest.raises(ConfigError, match=r"no actor 'zzz'\. Installed are: coordinator, governor"):
        loader.load("zzz")


def test_with_nothing_installed_it_says_so(installed: Any) -> None:
    installed()
    with pytest.raises(ConfigError, match="Installed are: none"):
        loader.load("coordinator")


@pytest.mark.parametrize("name", [":", ":Good", "loader_good:", ".relative:Good", "a b:Good", "x:a.b", "x:y:z"])
def test_a_malformed_name_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="not of the form module:Class"):
        loader.load(name)


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ConfigError, match="no module 'loader_absent'"):
        loader.load("loader_absent.actor:Good")


def test_an_installed_actor_whose_module_is_missing_is_a_config_error(installed: Any) -> None:
    installed(broken="loader_absent:Good")
    with pytest.raises(ConfigError, match="no module 'loader_absent', which 'broken' needs"):
        loader.load("broken")


def test_a_missing_class_is_named(modules: Any) -> None:
    modules("loader_good", ACTOR)
    with pytest.raises(ConfigError, match="module 'loader_good' has no 'Bad'"):
        loader.load("loader_good:Bad")


def test_a_module_that_lacks_something_itself_is_not_taken_for_missing(modules: Any) -> None:
    modules("loader_lacking", "import loader_absent\n")
    with pytest.raises(ModuleNotFoundError, match="loader_absent"):
        loader.load("loader_lacking:Good")


def test_an_actor_that_fails_to_import_raises_its_own_error(modules: Any) -> None:
    modules("loader_failing", "raise RuntimeError('a bug of its own')\n")
    with pytest.raises(RuntimeError, match="a bug of its own"):
        loader.load("loader_failing:Good")


@pytest.mark.parametrize("what", ["number", "Path"])
def test_what_is_not_an_actor_is_refused(modules: Any, what: str) -> None:
    modules("loader_good", ACTOR + "from pathlib import Path\n")
    with pytest.raises(ConfigError, match=r"not a subclass of ifabric\.actor\.base\.Actor"):
        loader.load(f"loader_good:{what}")
