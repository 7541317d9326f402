"""WebAssembly's binary form, written by hand: for modules that no assembler writes, or that would be too large as text.

https://webassembly.github.io/spec/core/binary/modules.html
"""

from __future__ import annotations

from collections.abc import Iterable

MAGIC = b"\0asm\1\0\0\0"
#: what a component starts with: the same magic, version 13 of layer 1
COMPONENT = b"\0asm\x0d\0\1\0"
I32 = 0x7F
I64 = 0x7E
FUNCREF = 0x70
CUSTOM, TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, CODE, DATA = range(12)
FUNC_TYPE = 0x60
END = 0x0B


def unsigned(value: int) -> bytes:
    """LEB128 of a number that is not negative."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def signed(value: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        done = value == (-1 if low & 0x40 else 0)
        out.append(low | (0 if done else 0x80))
        if done:
            return bytes(out)


def vector(items: Iterable[bytes]) -> bytes:
    parts = list(items)
    return unsigned(len(parts)) + b"".join(parts)


def name(text: str) -> bytes:
    return unsigned(len(text.encode())) + text.encode()


def section(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + unsigned(len(content)) + content


def custom(title: str, content: bytes) -> bytes:
    return section(CUSTOM, name(title) + content)


def func_type(parameters: bytes = b"", results: bytes = b"") -> bytes:
    return bytes([FUNC_TYPE]) + vector(bytes([p]) for p in parameters) + vector(bytes([r]) for r in results)


def body(code: bytes, local_runs: Iterable[tuple[int, int]] = ()) -> bytes:
    """One function's code; the end is added. `local_runs` are (how many, type)."""
    content = vector(unsigned(count) + bytes([kind]) for count, kind in local_runs) + code + bytes([END])
    return unsigned(len(content)) + content


def export(title: str, kind: int, index: int) -> bytes:
    return name(title) + bytes([kind]) + unsigned(index)


def module(
    *,
    types: Iterable[bytes] = (func_type(),),
    functions: Iterable[int] = (0,),
    bodies: Iterable[bytes] | None = None,
    exports: Iterable[bytes] = (export("_start", 0, 0),),
    tables: bytes = b"",
    memories: bytes = b"",
    start: int | None = None,
    elements: bytes = b"",
    data: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A module of these sections, those that are empty left out. `before` and `after` are further ones, as they are.

    Without `bodies` every function is empty.
    """
    indexes = [unsigned(index) for index in functions]
    code = list(bodies) if bodies is not None else [body(b"")] * len(indexes)
    return b"".join(
        [
            MAGIC,
            before,
            section(TYPE, vector(types)),
            section(FUNCTION, vector(indexes)),
            section(TABLE, tables) if tables else b"",
            section(MEMORY, memories) if memories else b"",
            section(EXPORT, vector(exports)),
            section(START, unsigned(start)) if start is not None else b"",
            section(ELEMENT, elements) if elements else b"",
            section(CODE, vector(code)),
            section(DATA, data) if data else b"",
            after,
        ]
    )
