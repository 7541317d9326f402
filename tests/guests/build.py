"""Guests in C, built by clang with wasi-libc, and kept by what they were built from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from ifabric.errors import StartupError

HERE = Path(__file__).parent
#: git-ignored; a guest is built again when its source, the header, the flags or the compiler differ
BUILT = HERE.parent.parent / ".tools" / "guests"
FLAGS = ("--target=wasm32-wasi", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-s", f"-I{HERE}")
#: what has to be installed, on Debian
PACKAGES = "clang lld wasi-libc libclang-rt-dev-wasm32"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.c")))


@cache
def compiler() -> tuple[str, str]:
    """The program and its version. Raises `StartupError` when it, its linker or the library is not there."""
    clang = shutil.which("clang")
    if clang is None or shutil.which("wasm-ld") is None:
        raise StartupError(f"no clang with wasm-ld on PATH: apt-get install {PACKAGES}")
    return clang, subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout


@cache
def guest(name: str) -> bytes:
    """The module built from `name`.c. Raises `StartupError` when there is no compiler, or it refuses the source."""
    clang, version = compiler()
    source = HERE / f"{name}.c"
    parts = [version.encode(), repr(FLAGS).encode(), (HERE / "ifabric.h").read_bytes(), source.read_bytes()]
    kept = BUILT / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.wasm"
    if not kept.is_file():
        BUILT.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        built = subprocess.run([clang, *FLAGS, "-o", fresh, source], capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise StartupError(f"{source.name} does not build ({PACKAGES}):\n{built.stderr}")
        fresh.replace(kept)
    return kept.read_bytes()
