"""Bombs that take space: memory, tables, stack, output."""

from __future__ import annotations

from tests.guests import encoder as e
from tests.guests.bomb import (
    BAD_REQUEST,
    MIB,
    REFUSED,
    Answer,
    Bomb,
    binary,
    bomb,
    forever,
    limit,
    must,
    ok,
    wat,
    write,
)

MEMORY = limit("memory_bytes")
STACK = limit("stack_bytes")
OUTPUT = limit("output_bytes")
#: of `LIMITS`: how many pages fit, and how much output
PAGES, OUTPUT_BYTES = 256, 10_000
#: of the configuration
TABLE_ELEMENTS = 20_000
EFAULT, EFBIG = 21, 22


def grown(step: int) -> str:
    """Grows by `step` pages until it may not, and ends well when that was at the limit."""
    return (
        f"(loop $more (br_if $more (i32.ne (memory.grow (i32.const {step})) (i32.const -1))))"
        + must(f"(i32.eq (memory.size) (i32.const {PAGES}))")
        + "(i32.store8 (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 1)) (i32.const 1))"
    )


def tables(count: int, size: int) -> str:
    return wat("nop", rest=f"(table {size} funcref)" * count)


def vectors(count: int, address: int, length: int) -> str:
    """Code that lays `count` io vectors of the same bytes from address 65536."""
    return (
        "(local.set $i (i32.const 0)) (loop $lay "
        f"(i32.store (i32.add (i32.const 65536) (i32.mul (local.get $i) (i32.const 8))) (i32.const {address}))"
        f"(i32.store (i32.add (i32.const 65540) (i32.mul (local.get $i) (i32.const 8))) (i32.const {length}))"
        "(local.set $i (i32.add (local.get $i) (i32.const 1)))"
        f"(br_if $lay (i32.lt_u (local.get $i) (i32.const {count}))))"
    )


def wide_frame() -> bytes:
    """A function of 10,000 locals that calls itself."""
    call = bytes([0x10, 0x00])
    return e.module(bodies=[e.body(call, [(10_000, e.I64)])])


def _flood(name: str, code: str, *answers: Answer, **run: object) -> Bomb:
    return bomb(name, wat(code, memory="200", data="a" * 64), *answers, **run)  # type: ignore[arg-type]


_A_16K = "(memory.fill (i32.const 1024) (i32.const 97) (i32.const 16384))"
_FIRST = "a" * OUTPUT_BYTES

BOMBS: tuple[Bomb, ...] = (
    bomb("memory, a page at a time", wat(grown(1)), ok()),
    bomb("memory, all that there could be", wat(must("(i32.eq (memory.grow (i32.const 65535)) (i32.const -1))")), ok()),
    bomb("memory, a negative growth", wat(must("(i32.eq (memory.grow (i32.const -1)) (i32.const -1))")), ok()),
    bomb("memory, just the limit", wat("nop", memory=str(PAGES)), ok(usage={"memory_peak_bytes": 16 * MIB})),
    bomb("memory, a page over the limit", wat("nop", memory=str(PAGES + 1)), MEMORY),
    bomb("memory, four gigabytes at once", wat("nop", memory="65536"), MEMORY, REFUSED),
    bomb("memory with a huge maximum", wat("nop", memory="1 65536"), ok()),
    bomb(
        "memory that is touched to its end",
        wat(f"(memory.fill (i32.const 0) (i32.const 1) (i32.const {16 * MIB}))", memory=str(PAGES)),
        ok(),
    ),
    bomb("many memories", wat("nop", rest="(memory 100)" * 8), REFUSED),
    bomb("two memories", wat("nop", rest="(memory 1)"), REFUSED),
    bomb("no memory", wat("nop", memory=None), ok()),
    bomb("memory64", wat("nop", memory="i64 1"), REFUSED),
    bomb("shared memory", wat("nop", memory="1 2 shared"), REFUSED),
    bomb("a page of one byte", '(module (memory (export "memory") 1 (pagesize 1)) (func (export "_start")))', REFUSED),
    bomb(
        "a table, ten at a time",
        wat(
            "(loop $more (br_if $more (i32.ne (table.grow 0 (ref.null func) (i32.const 10)) (i32.const -1))))"
            + must(f"(i32.eq (table.size 0) (i32.const {TABLE_ELEMENTS}))"),
            rest="(table 0 funcref)",
        ),
        ok(),
    ),
    bomb(
        "a table, all at once",
        wat(must("(i32.eq (table.grow 0 (ref.null func) (i32.const -1)) (i32.const -1))"), rest="(table 1 funcref)"),
        ok(),
    ),
    bomb("a table of ten million", tables(1, 10_000_000), limit("table_elements"), REFUSED),
    bomb("a table, one element over the limit", tables(1, TABLE_ELEMENTS + 1), limit("table_elements"), REFUSED),
    bomb("as many tables as may be", tables(4, 1000), ok()),
    bomb("one table too many", tables(5, 1), limit("tables"), REFUSED),
    bomb("a hundred tables", tables(100, TABLE_ELEMENTS), limit("tables"), limit("table_elements"), REFUSED),
    bomb("table64", wat("nop", rest="(table i64 1 funcref)"), REFUSED),
    bomb("references to the host", wat("nop", rest="(table 10000 externref)"), ok(), REFUSED),
    bomb(
        "arrays of the collector",
        '(module (type $a (array (mut i64))) (global $g (mut (ref null $a)) (ref.null $a)) (func (export "_start") (loop $f (global.set $g (array.new_default $a (i32.const 10000000))) (br $f))))',
        REFUSED,
    ),
    bomb(
        "structs of the collector",
        '(module (type $s (struct (field (ref null $s)))) (func (export "_start") (local $x (ref null $s)) (loop $f (local.set $x (struct.new $s (local.get $x))) (br $f))))',
        REFUSED,
    ),
    bomb(
        "exceptions, thrown for ever",
        '(module (tag $t) (func (export "_start") (loop $f (block $h (try_table (catch_all $h) (throw $t))) (br $f))))',
        REFUSED,
        limit("wall_s"),
    ),
    bomb("recursion", wat("(call $f)", rest="(func $f (call $f))"), STACK),
    bomb(
        "recursion that leaves no tail",
        wat(
            "(drop (call $f (i64.const 1)))",
            rest="(func $f (param i64) (result i64) (i64.add (i64.const 1) (call $f (i64.add (local.get 0) (i64.const 1)))))",
        ),
        STACK,
    ),
    bomb(
        "recursion through a table",
        wat("(call $f)", rest="(table 1 funcref) (elem (i32.const 0) $f) (func $f (call_indirect (i32.const 0)))"),
        STACK,
    ),
    bomb("recursion of two", wat("(call $f)", rest="(func $f (call $g)) (func $g (call $f))"), STACK),
    bomb(
        "recursion that calls the host", wat("(call $f)", rest="(func $f (drop (call $sched_yield)) (call $f))"), STACK
    ),
    binary("recursion with wide frames", wide_frame, STACK, REFUSED),
    bomb("recursion in the start function", '(module (func $s (call $s)) (start $s) (func (export "_start")))', STACK),
    _flood("output, for ever", _A_16K + forever(write(1024, 16384)), limit("output_bytes", stdout=_FIRST)),
    _flood(
        "output, a byte at a time",
        forever(write(1024, 1)),
        limit("output_bytes", stdout="a" * 1000),
        limits={"output_bytes": 1000},
    ),
    _flood("errors, for ever", _A_16K + forever(write(1024, 16384, fd=2)), limit("output_bytes", stderr=_FIRST)),
    _flood("output and errors, for ever", forever(write(1024, 64) + write(1024, 64, fd=2)), OUTPUT),
    _flood("output, one write too large", _A_16K + write(1024, 16384), ok(stdout=_FIRST, truncated=True)),
    _flood("output, exactly what fits", _A_16K + write(1024, OUTPUT_BYTES), ok(stdout=_FIRST)),
    _flood(
        "output, what fits, and no more writes than one too many",
        _A_16K + write(1024, OUTPUT_BYTES) + write(1024, 1),
        ok(stdout=_FIRST, truncated=True),
    ),
    _flood(
        "output that is told that it was cut",
        _A_16K
        + "(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 16384)) (call $proc_exit (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))",
        ok(EFBIG, stdout=_FIRST, truncated=True),
    ),
    _flood(
        "output of a huge vector",
        "(memory.fill (i32.const 0) (i32.const 97) (i32.const 13000000))" + write(65536, 12_000_000),
        ok(stdout=_FIRST, truncated=True),
    ),
    _flood(
        "output of many vectors",
        vectors(100_000, 1024, 1)
        + "(call $proc_exit (call $fd_write (i32.const 1) (i32.const 65536) (i32.const 100000) (i32.const 8)))",
        ok(EFAULT, stdout="", truncated=False),
    ),
    _flood(
        "output of many vectors on the same bytes",
        vectors(1000, 1024, 12_000_000)
        + "(drop (call $fd_write (i32.const 1) (i32.const 65536) (i32.const 1000) (i32.const 8)))",
        ok(truncated=True),
    ),
    _flood("output, when there may be none", write(1024, 1), ok(stdout="", truncated=True), limits={"output_bytes": 0}),
    _flood("less memory than a page", "nop", BAD_REQUEST, limits={"memory_bytes": 1}),
    _flood(
        "more memory than is configured",
        "nop",
        MEMORY,
        limits={"memory_bytes": 4096 * MIB, "wall_s": 2},
    ),
)
