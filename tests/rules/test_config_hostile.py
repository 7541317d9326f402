"""Whatever stands in a configuration file, reading it ends soon, in a `Config` or a `ConfigError`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifabric.config import Config
from ifabric.config_file import DEPTH_MAX, FILE_MAX_BYTES, VALUES_MAX, load
from ifabric.errors import ConfigError
from tests.rules.test_config import Files, structs


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_file_that_is_too_large_is_refused_unread(files: Files) -> None:
    assert files.refusals("#" * (FILE_MAX_BYTES + 1)) == [
        f"c.yaml: larger than {FILE_MAX_BYTES} bytes; that is no configuration"
    ]
    assert files.read("#" * FILE_MAX_BYTES) == Config()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_device_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load([Path("/dev/zero")], {})


def laughs(depth: int = 9, width: int = 9) -> str:
    """A billion laughs: a few lines that stand for width to the depth values."""
    names = "abcdefghijklmnop"[: depth + 1]
    first = f"  a: &a [{','.join('x' * width)}]\n"
    return (
        "options:\n"
        + first
        + "".join(f"  {name}: &{name} [{','.join([f'*{under}'] * width)}]\n" for under, name in pairwise(names))
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (laughs(), f"more than {VALUES_MAX} values"),
        (laughs(depth=15, width=2), f"more than {VALUES_MAX} values"),
        ("options: &a [*a]\n", f"nested more than {DEPTH_MAX} deep"),
        ("options: &a {x: {y: *a}}\n", f"nested more than {DEPTH_MAX} deep"),
        ("options: " + "[" * 100_000, "not YAML: nested too deeply"),
        ("options: " + "{a: " * 10_000, "not YAML: nested too deeply"),
        ("options: " + "- " * 50_000 + "a", "not YAML: sequence entries are not allowed here"),
        ("options: " + "[" * 60 + "]" * 60, f"nested more than {DEPTH_MAX} deep"),
        ("options: {a: [" + "1," * (VALUES_MAX + 1) + "]}", f"more than {VALUES_MAX} values"),
        ("?\n" * 20_000, "'' is given twice"),
        ("? &a [*a, *a]\n: 1\n", "a key is a word"),
        ("http: {port: " + "9" * 5000 + "}", "http.port: Exceeds the limit"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_bomb_is_an_error_and_neither_a_hang_nor_a_gigabyte(files: Files, text: str, why: str) -> None:
    assert why in files.refusals(text)[0]


def test_aliases_that_are_not_a_bomb_are_read(files: Files) -> None:
    config = files.read("options: {a: &x {k: [1]}, b: *x}\n")
    assert config.section("a") == config.section("b") == {"k": [1]}


YAMLISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=9)
    | st.sampled_from(["!!int x", "!!binary é", "0b_", "1:99:99", "=", "<<", "~", "*a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from([f.name for _, s in structs() for f in msgspec.structs.fields(s)]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=30,
)


def only_config_errors(files: Files, text: str, **environ: str) -> None:
    path = files.write(text.encode("utf-8", "replace"))
    try:
        config, warnings = load([path], environ)
    except ConfigError as refused:
        said = refused.message
        assert said
        assert "?:" not in said  # every error has a place
    else:
        assert isinstance(config, Config)
        assert all(isinstance(warning, str) for warning in warnings)


SETTINGS = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.text(alphabet=st.sampled_from(list("ab: -[]{}&*!|>'\"%@`,?#\n\t01._~<=ébinhtp")), max_size=80))
@SETTINGS
def test_no_text_whatever_raises_anything_but_a_config_error(files: Files, text: str) -> None:
    only_config_errors(files, text)
    only_config_errors(files, "", IFABRIC__HTTP__PORT=text, IFABRIC__OPTIONS=text)


@given(YAMLISH)
@SETTINGS
def test_no_yaml_whatever_raises_anything_but_a_config_error(files: Files, value: object) -> None:
    only_config_errors(files, yaml.safe_dump(value, allow_unicode=True))
    only_config_errors(files, yaml.safe_dump({"coordinator": value, "http": value, "options": {"a": value}}))
