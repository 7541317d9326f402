"""Bombs that are to hurt whoever reads or compiles them."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import wasmtime

from tests.guests import encoder as e
from tests.guests.bomb import NOT_WASM, REFUSED, TOO_LARGE, Answer, Bomb, binary, bomb, ok, wat

#: what the suite's daemon is configured with
MODULE_MAX_BYTES, FUNCTIONS_MAX = 450_000, 4000
_EMPTY = e.module()
_MANY_LOCALS = 1_000_000


def compiled() -> bytes:
    """The machine code of a module: an ELF file, that wasmtime would load without a question."""
    return bytes(wasmtime.Module(wasmtime.Engine(), _EMPTY).serialize())


def functions(count: int, code: bytes = b"") -> Callable[[], bytes]:
    return lambda: e.module(functions=[0] * count, bodies=[e.body(code)] * count)


def nested(depth: int) -> bytes:
    """Blocks within blocks."""
    return e.module(bodies=[e.body(b"\x02\x40" * depth + b"\x0b" * depth)])


def nested_ifs(depth: int) -> bytes:
    return e.module(bodies=[e.body(b"\x41\x01\x04\x40" * depth + b"\x0b" * depth)])


def branches(count: int) -> bytes:
    """One br_table with so many targets, which are all the same block."""
    table = b"\x02\x40\x41\x00\x0e" + e.vector([b"\0"] * count) + b"\0" + b"\x0b"
    return e.module(bodies=[e.body(table)])


def branches_everywhere(blocks: int) -> bytes:
    """A br_table out of every depth of many blocks: as many edges as targets."""
    table = b"\x41\x00\x0e" + e.vector([e.unsigned(i) for i in range(blocks)]) + b"\0"
    return e.module(bodies=[e.body(b"\x02\x40" * blocks + table + b"\x0b" * blocks)])


def web(values: int, blocks: int) -> bytes:
    """Many locals, each set in every one of many branches: what makes register allocation slow."""
    sets = b"".join(b"\x20" + e.unsigned(i) + b"\x41\x01\x6a\x21" + e.unsigned(i) for i in range(values))
    block = b"\x20\x00\x04\x40" + sets + b"\x05" + sets + b"\x0b"
    return e.module(bodies=[e.body(b"\x03\x40" + block * blocks + b"\x0b", [(values, e.I32)])])


def expression(length: int) -> bytes:
    """One expression: a long sum of products that all stay on the stack until the end."""
    return e.module(bodies=[e.body(b"\x41\x01" * length + b"\x6a" * (length - 1) + b"\x1a")])


def of_locals(count: int) -> bytes:
    return e.module(bodies=[e.body(b"", [(count, e.I64)])])


def locals_that_overflow() -> bytes:
    return e.module(bodies=[e.body(b"", [(0xFFFFFFFF, e.I64)] * 3)])


def types(count: int) -> bytes:
    kinds = [e.func_type(bytes([e.I32] * (i % 5)), bytes([e.I64] * (i % 2))) for i in range(count)]
    return e.module(types=[e.func_type(), *kinds])


def parameters(count: int) -> bytes:
    return e.module(types=[e.func_type(), e.func_type(bytes([e.I32] * count))])


def exports(count: int) -> bytes:
    return e.module(exports=[e.export("_start", 0, 0), *(e.export(f"e{i}", 0, 0) for i in range(count))])


def long_name(length: int) -> bytes:
    return e.module(exports=[e.export("_start", 0, 0), e.export("n" * length, 0, 0)])


def globals_(count: int) -> bytes:
    one = bytes([e.I64, 1, 0x42, 0, e.END])
    made = e.module()
    at = made.index(e.section(e.EXPORT, e.vector([e.export("_start", 0, 0)])))
    return made[:at] + e.section(e.GLOBAL, e.vector([one] * count)) + made[at:]


def data(length: int, offset: int, pages: int) -> bytes:
    """A segment of data, at an address."""
    segment = b"\0\x41" + e.signed(offset) + bytes([e.END]) + e.vector([b"\x7f"] * length)
    return e.module(memories=b"\x01\0" + e.unsigned(pages), data=b"\x01" + segment)


def segments(count: int) -> bytes:
    one = b"\0\x41\0" + bytes([e.END]) + b"\x01\x7f"
    return e.module(memories=b"\x01\0\x01", data=e.vector([one] * count))


def elements(count: int) -> bytes:
    one = b"\0\x41\0" + bytes([e.END]) + e.vector([b"\0"])
    return e.module(tables=b"\x01\x70\0\x01", elements=e.vector([one] * count))


def lying(kind: int, size: int) -> bytes:
    """A section that says it is longer than the module."""
    return e.MAGIC + bytes([kind]) + e.unsigned(size)


def names(depth: int) -> bytes:
    """A name section that is garbage: tools read it, the specification does not care."""
    return _EMPTY + e.custom("name", b"\x01\xff\xff\xff\xff\x0f" * depth)


def refused(name: str, make: Callable[[], bytes] | bytes, *answers: Answer) -> Bomb:
    return binary(name, make if callable(make) else lambda: make, *(answers or (NOT_WASM, REFUSED)))


BOMBS: tuple[Bomb, ...] = (
    refused("nothing at all", b"", NOT_WASM, Answer("bad_request")),
    refused("text", b"(module)", NOT_WASM),
    refused("zeros", bytes(1000), NOT_WASM),
    refused("half a magic", b"\0as", NOT_WASM),
    refused("only a magic", b"\0asm", NOT_WASM),
    refused("a version that is to come", b"\0asm\2\0\0\0", NOT_WASM),
    refused("an ELF program", b"\x7fELF\2\1\1" + bytes(1000), NOT_WASM),
    refused("machine code of wasmtime", compiled, NOT_WASM),
    refused("a component", e.COMPONENT, NOT_WASM, REFUSED),
    refused("a compressed module", lambda: gzip.compress(_EMPTY), NOT_WASM),
    refused("a module that was cut", lambda: _EMPTY[:-3]),
    refused("a module, and then more", _EMPTY + b"garbage"),
    refused("sections out of order", e.MAGIC + e.section(e.CODE, b"\0") + e.section(e.TYPE, b"\0")),
    refused("a section twice", e.MAGIC + e.section(e.TYPE, b"\0") * 2),
    refused("an unknown section", _EMPTY + e.section(77, b"")),
    *(refused(f"section {kind} with a lie about its size", lying(kind, 0xFFFFFFFF)) for kind in range(13)),
    refused("a number without an end", e.MAGIC + b"\x01" + b"\x80" * 1000),
    refused("a vector of four billion", e.MAGIC + e.section(e.TYPE, e.unsigned(0xFFFFFFFF))),
    refused(
        "functions without code",
        e.MAGIC + e.section(e.TYPE, e.vector([e.func_type()])) + e.section(e.FUNCTION, e.vector([b"\0"])),
    ),
    refused("code of another type", e.module(types=[e.func_type(results=bytes([e.I32]))])),
    refused("a call of nobody", e.module(bodies=[e.body(b"\x10\x99\x01")])),
    refused("an unknown instruction", e.module(bodies=[e.body(b"\xff\xff")])),
    refused("an export twice", e.module(exports=[e.export("_start", 0, 0)] * 2)),
    refused("an export of nobody", e.module(exports=[e.export("_start", 0, 9)])),
    refused("a start function that takes something", e.module(types=[e.func_type(bytes([e.I32]))], start=0)),
    refused("a name that is not text", e.module(exports=[e.export("_start", 0, 0), b"\x02\xff\xfe\0\0"])),
    refused("a module over the limit", lambda: e.module(after=e.custom("pad", bytes(MODULE_MAX_BYTES))), TOO_LARGE),
    refused("more functions than may be", functions(FUNCTIONS_MAX + 1), REFUSED),
    refused("a hundred thousand functions", functions(100_000), REFUSED),
    binary("as many functions as may be", functions(FUNCTIONS_MAX), ok()),
    refused("a million locals", lambda: of_locals(_MANY_LOCALS)),
    refused("locals that overflow", locals_that_overflow),
    binary(
        "fifty thousand locals", lambda: of_locals(50_000), ok(), REFUSED, Answer("limit", {"which": "stack_bytes"})
    ),
    binary("blocks, fifty thousand deep", lambda: nested(50_000), ok(), REFUSED),
    binary("conditions, three thousand deep", lambda: nested_ifs(3000), ok(), REFUSED),
    refused("conditions, forty thousand deep", lambda: nested_ifs(40_000), REFUSED),
    binary("a branch with 60,000 targets", lambda: branches(60_000), ok(), REFUSED),
    refused("a branch with 400,000 targets", lambda: branches(400_000), REFUSED, NOT_WASM, ok()),
    binary("a branch to 20,000 places", lambda: branches_everywhere(20_000), ok(), REFUSED),
    binary("a web of locals", lambda: web(150, 60), ok(), REFUSED),
    binary("an expression of forty thousand terms", lambda: expression(40_000), ok(), REFUSED),
    binary("fifty thousand types", lambda: types(50_000), ok(), REFUSED),
    refused("a function of two thousand parameters", lambda: parameters(2000)),
    binary("twenty thousand exports", lambda: exports(20_000), ok(), REFUSED),
    binary("a name of fifty kilobytes", lambda: long_name(50_000), ok(), REFUSED),
    refused("a name of two hundred kilobytes", lambda: long_name(200_000)),
    binary("fifty thousand globals", lambda: globals_(50_000), ok(), REFUSED),
    binary("much data", lambda: data(400_000, 0, 16), ok()),
    binary(
        "data that does not fit",
        lambda: data(100, 65_500, 1),
        Answer("trap", {"kind": "memory_out_of_bounds"}),
        Answer("trap", {"kind": "start"}),
    ),
    binary(
        "data at a negative address",
        lambda: data(100, -50, 1),
        Answer("trap", {"kind": "memory_out_of_bounds"}),
        Answer("trap", {"kind": "start"}),
    ),
    binary("fifty thousand segments", lambda: segments(50_000), ok(), REFUSED),
    binary("fifty thousand tables' segments", lambda: elements(50_000), ok(), REFUSED),
    binary("a large custom section", lambda: e.module(after=e.custom("pad", bytes(400_000))), ok()),
    binary("a hundred thousand custom sections", lambda: e.module(after=e.custom("", b"") * 100_000), NOT_WASM),
    binary("names that are garbage", lambda: names(1000), ok(), REFUSED),
    binary(
        "hints that are garbage",
        lambda: e.module(before=e.custom("metadata.code.branch_hint", b"\xff" * 100)),
        ok(),
        REFUSED,
        NOT_WASM,
    ),
    binary(
        "debugging data that is garbage", lambda: e.module(after=e.custom(".debug_info", b"\xff" * 1000)), ok(), REFUSED
    ),
    bomb("vectors of the processor", wat("(drop (i32x4.splat (local.get $i)))"), ok()),
)
