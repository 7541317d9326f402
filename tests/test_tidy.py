"""The house rules, as a test. Each message says what to do instead."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "ifabric").rglob("*.py"), *(ROOT / "actors").rglob("*.py")])

#: a module may import from its own rank and below; the first prefix that fits counts
RANKS: tuple[tuple[str, int], ...] = (
    ("ifabric.errors", 0),
    ("ifabric.clock", 0),
    ("ifabric.cancellation", 0),
    ("ifabric.handling", 0),
    ("ifabric.tracing", 3),
    ("ifabric.audit", 4),
    ("ifabric.explaining", 5),
    ("ifabric.playbooks", 5),
    ("ifabric.wire", 1),
    ("ifabric.config_file", 2),
    ("ifabric.config_base", 1),
    ("ifabric.config_chassis", 1),
    ("ifabric.config_ops", 1),
    ("ifabric.pki", 1),
    ("ifabric.credentials", 1),
    ("ifabric.notify", 1),
    ("ifabric.tls", 2),
    ("ifabric.references", 2),
    ("ifabric.backup", 5),
    ("ifabric.care", 5),
    ("ifabric.config", 1),
    ("ifabric.programs", 1),
    ("ifabric.endpoints", 1),
    ("ifabric.metrics", 1),
    ("ifabric.log", 1),
    ("ifabric.board", 1),
    ("ifabric.asyncapi", 1),
    ("ifabric.bus.base", 2),
    ("ifabric.store.base", 2),
    ("ifabric.bus", 3),
    ("ifabric.store", 3),
    ("ifabric.actor", 4),
    ("ifabric.supervision", 4),
    ("ifabric.calling", 4),
    ("ifabric.connecting", 4),
    ("ifabric.listening", 4),
    ("ifabric.spending", 4),
    ("ifabric.breaking", 4),
    ("ifabric.governing", 4),
    ("ifabric.sandboxing", 4),
    ("ifabric.client", 4),
    ("ifabric.claims", 4),
    ("ifabric.renewal", 4),
    ("ifabric.blocking", 4),
    ("ifabric.sync", 4),
    ("ifabric.loader", 5),
    ("ifabric.embedded", 5),
    ("ifabric.http", 5),
    ("ifabric.scratch", 5),
    ("ifabric.drill", 6),
    ("ifabric.settings", 6),
    ("ifabric.fabric", 6),
    ("ifabric.testing", 9),
    ("ifabric.cli", 7),
    ("ifabric.__main__", 8),
    ("ifabric", 0),
)
#: what a resident may know of the fabric
FOR_RESIDENTS = (
    "ifabric.actor",
    "ifabric.wire",
    "ifabric.bus.base",
    "ifabric.store.base",
    "ifabric.store.session",
    "ifabric.store.commit",
    "ifabric.errors",
    "ifabric.clock",
    "ifabric.cancellation",
    "ifabric.handling",
    "ifabric.metrics",
)
#: who may name a concrete backend
COMPOSERS = (
    "ifabric.fabric",
    "ifabric.settings",
    "ifabric.embedded",
    "ifabric.client",
    "ifabric.connecting",
    "ifabric.cli",
    "ifabric.testing",
)
CONCRETE = ("ifabric.bus.nats", "ifabric.store.etcd")
#: modules that decide and never wait
PURE = (
    "rules",
    "ledger",
    "replay",
    "circuit",
    "matching",
    "limits",
    "wasm",
    "slo",
    "addresses",
    "outbound",
    "acceptance",
    "binary",
    "scrub",
    "routes",
    "policy",
    "board",
    "verdict",
    "permissions",
    "findings",
    "findings_daemon",
    "findings_etcd",
    "findings_nats",
    "maintaining",
    "replacing",
    "scraped",
    "stored",
    "finding",
    "chaining",
    "verifying",
    "exporting",
)
#: lines of a file. A ratchet: raise nothing here, split the file instead.
LINES_MAX = 400
LINE_MAX = 140
FUNCTION_MAX = 80


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[1:] if parts[0] == "actors" else parts)
    return name.removesuffix(".__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, runtime_only: bool = False) -> Iterator[str]:
    """The modules that a file imports, as full names; `from a import b` counts as a.b where that is a module."""
    known = {module(f) for f in FILES}

    def of(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if runtime_only and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield full if full in known else child.module
            yield from of(child)

    yield from of(tree(path))


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rank(name: str) -> int:
    return next(number for prefix, number in RANKS if under(name, prefix))


PATHS = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@PATHS
def test_imports_point_one_way(path: Path) -> None:
    name = module(path)
    if name == "ifabric":
        return  # its names are loaded when they are used
    for other in imports(path):
        if not under(other, "ifabric") and not under(other, "ifabric_actors"):
            continue
        if under(name, "ifabric_actors"):
            assert under(other, "ifabric_actors", *FOR_RESIDENTS), (
                f"a resident may not import {other}: see FOR_RESIDENTS"
            )
            continue
        assert not under(other, "ifabric_actors"), "the fabric never imports a resident: name it in the config"
        assert rank(other) <= rank(name) or other == "ifabric", (
            f"{name} (rank {rank(name)}) imports {other}, which is above it"
        )
        if not under(name, *COMPOSERS):
            assert not under(other, *CONCRETE) or name == other, f"{name} names {other}: take the protocol instead"
        if not under(name, "ifabric.testing"):
            assert not under(other, "ifabric.testing"), (
                "the twins are for tests: production code never imports ifabric.testing"
            )


def test_there_is_no_import_cycle() -> None:
    graph = {
        module(path): {o for o in imports(path, runtime_only=True) if under(o, "ifabric", "ifabric_actors")}
        for path in FILES
    }
    for name, others in graph.items():
        others.discard(name)
        others.discard("ifabric")
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"a circle of imports among {sorted(graph)}: move what both need below them"
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}


def test_no_file_is_there_that_nobody_imports() -> None:
    reached = {o for path in FILES for o in imports(path)}
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        reached |= set(imports(path))
    texts = (ROOT / "pyproject.toml").read_text() + "".join(p.read_text() for p in (ROOT / "ifabric").rglob("*.py"))
    texts += (ROOT / "actors/ifabric_actors/chassis/processes.py").read_text()  # starts a program by its module's name
    for path in FILES:
        name = module(path)
        if path.name in ("__init__.py", "__main__.py"):
            continue
        assert name in reached or name in texts, f"{name} is imported by nobody: use it or delete it"


@PATHS
def test_time_and_chance_come_from_the_clock(path: Path) -> None:
    if module(path) == "ifabric.clock":
        return
    taken = {"time", "random", "secrets"} & set(imports(path))
    assert not taken, f"{taken} only in ifabric/clock.py: take a Clock"


@PATHS
def test_subjects_are_built_in_one_place(path: Path) -> None:
    if module(path) == "ifabric.wire.subjects":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            assert not re.match(r"if\.v1\.", node.value), (
                f"line {node.lineno}: build subjects with ifabric.wire.subjects"
            )


@PATHS
def test_decisions_do_not_wait(path: Path) -> None:
    if path.stem not in PURE or module(path) == "ifabric.cli.board":
        return
    banned = [
        o for o in imports(path) if under(o, "asyncio", "ifabric.bus", "ifabric.store.etcd", "ifabric.store.commit")
    ]
    assert not banned, f"{path.stem} decides: {banned} belong to who carries it out"
    assert not any(isinstance(n, ast.AsyncFunctionDef) for n in ast.walk(tree(path))), "a decision has no await"


@PATHS
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_MAX, f"{len(lines)} lines: split it by noun"
    for number, line in enumerate(lines, 1):
        assert len(line) <= LINE_MAX, f"line {number} has {len(line)} characters"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno
            assert length <= FUNCTION_MAX, f"{node.name} has {length} lines: name its steps"


@PATHS
def test_modules_and_public_classes_say_what_they_are(path: Path) -> None:
    body = tree(path)
    if path.read_text().strip():
        assert ast.get_docstring(body), "a module starts with what it is for"
    for node in body.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not under(module(path), "ifabric.wire"):
            assert ast.get_docstring(node) or "Protocol" in ast.unparse(node), f"class {node.name}: say what it is"


@PATHS
def test_no_failure_is_swallowed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            silent = all(isinstance(n, ast.Pass | ast.Continue) for n in node.body)
            broad = caught in ("everything", "Exception", "BaseException")
            assert not (broad and silent), f"line {node.lineno}: catches {caught} and says nothing"


@PATHS
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text()), "do it, or write it in the issue"
    assert path.stem not in ("utils", "util", "common", "helpers", "misc"), "a helper lives with its noun"


def test_the_top_level_holds_what_the_design_names() -> None:
    allowed = {
        "ifabric",
        "actors",
        "config",
        "bench",
        "tests",
        "pyproject.toml",
        "justfile",
        "README.md",
        "uv.lock",
        "LICENSE",
    }
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    extra = {name.split("/")[0] for name in listed if name and not name.startswith(".")} - allowed
    assert not extra, f"{extra} at the top level: the design names what may be there"
