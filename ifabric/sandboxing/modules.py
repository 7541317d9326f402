"""WebAssembly modules as people have them, in files and in memory: read, named by their digest, and looked at before
anything is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path

from ifabric.errors import NotWasm, TooLarge

#: the largest module that any chassis can be told to accept
MODULE_MAX_BYTES = 256 << 20
MAGIC = b"\0asm"
_ID = re.compile(r"sha256:[0-9a-f]{64}")
#: WebAssembly text begins with these, after comments and space
_TEXT = re.compile(rb"(?:\s+|;;[^\n]*\n|\(;.*?;\))*+\(\s*(module|component)\b", re.DOTALL)

#: a module by its id, as bytes or in a file
Module = str | bytes | Path


async def read(wasm: bytes | Path) -> bytes:
    """The module's bytes, which look like one. A file is read on a thread: it may be on a slow disk."""
    if isinstance(wasm, Path):
        name, data = str(wasm), await asyncio.to_thread(_file, wasm)
    elif isinstance(wasm, bytes | bytearray | memoryview):
        name, data = "this", bytes(wasm)
    else:
        raise TypeError(f"a module is bytes or a Path, and not {wasm!r:.80}: for a file write Path({str(wasm)!r:.80})")
    if len(data) > MODULE_MAX_BYTES:
        raise TooLarge(f"{name} is larger than any module may be ({MODULE_MAX_BYTES} bytes); nothing was sent")
    if not data.startswith(MAGIC):
        raise NotWasm(f"{name} {_what_it_is(data)}; nothing was sent")
    return data


def _file(path: Path) -> bytes:
    if path.is_dir():
        raise NotWasm(f"{path} is a directory, and a module is a file; nothing was sent")
    with path.open("rb") as file:  # never more of it than that: it may be a pipe, or a device without an end
        return file.read(MODULE_MAX_BYTES + 1)


def _what_it_is(data: bytes) -> str:
    """Of bytes that are no module: what they seem to be, and what to do about it."""
    if not data:
        return "is empty: a module begins with \\0asm"
    if data.startswith(b"\x7fELF"):
        return "is compiled for one kind of machine (.cwasm?): put the .wasm that it was made from"
    if _TEXT.match(data[:65_536]):
        return "is WebAssembly text: make a .wasm of it first, for example with `wat2wasm`"
    return f"is not WebAssembly: it begins with {data[:8]!r}, and a module with \\0asm"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def id_of(module: str) -> str:
    if not _ID.fullmatch(module):
        raise ValueError(f"{module[:80]!r} is no module's id (sha256:...): for a file write Path({module[:80]!r})")
    return module
