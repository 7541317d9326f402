"""Ways to end: exit codes, traps, entries that are not there, and words that are not text."""

from __future__ import annotations

from typing import Any

from tests.guests.bomb import REFUSED, Answer, Bomb, bomb, limit, must, ok, trap, wat, write

NO_ENTRY = (Answer("bad_request"), REFUSED)
_WORD = "w" * 4000


def exits(code: int, told: int) -> Bomb:
    return bomb(f"exit code {code}", wat(f"(call $proc_exit (i32.const {code}))"), ok(told))


def traps(name: str, code: str, kind: str, **more: Any) -> Bomb:
    return bomb(name, wat(code, **more), trap(kind))


#: looks for the length of its arguments or variables: (count, bytes) at 0 and 4
def sized(call: str, count: int) -> str:
    return must(f"(i32.eqz (call ${call} (i32.const 0) (i32.const 4)))") + must(
        f"(i32.eq (i32.load (i32.const 0)) (i32.const {count}))"
    )


BOMBS: tuple[Bomb, ...] = (
    *(exits(code, code) for code in (0, 1, 3, 125, 126, 255, 256)),
    exits(-1, 0xFFFFFFFF),
    exits(-0x80000000, 0x80000000),
    bomb(
        "an end in the start function",
        '(module (import "wasi_snapshot_preview1" "proc_exit" (func $x (param i32))) (memory (export "memory") 1) (func $s (call $x (i32.const 5))) (start $s) (func (export "_start") unreachable))',
        ok(5),
    ),
    bomb(
        "a trap in the start function",
        '(module (func $s unreachable) (start $s) (func (export "_start")))',
        trap("unreachable"),
        trap("start"),
    ),
    bomb(
        "output before a trap", wat(write(1024, 5) + "unreachable", data="hello"), trap("unreachable", stdout="hello")
    ),
    traps("unreachable", "unreachable", "unreachable"),
    traps("a division by zero", "(drop (i32.div_s (i32.const 1) (local.get $i)))", "integer_division_by_zero"),
    traps("a division that overflows", "(drop (i32.div_s (i32.const 0x80000000) (i32.const -1)))", "integer_overflow"),
    traps("a conversion of no number", "(drop (i32.trunc_f32_s (f32.const nan)))", "bad_conversion_to_integer"),
    traps("a conversion that overflows", "(drop (i32.trunc_f64_s (f64.const 1e300)))", "integer_overflow"),
    traps("a load beyond the memory", "(drop (i32.load (i32.const 65533)))", "memory_out_of_bounds"),
    traps(
        "a load from the end of the address space",
        "(drop (i64.load offset=0xffffffff (i32.const -1)))",
        "memory_out_of_bounds",
    ),
    traps("a store beyond the memory", "(i64.store (i32.const -1) (i64.const 1))", "memory_out_of_bounds"),
    traps(
        "a fill beyond the memory", "(memory.fill (i32.const 0) (i32.const 0) (i32.const -1))", "memory_out_of_bounds"
    ),
    traps(
        "a copy from beyond the memory",
        "(memory.copy (i32.const 0) (i32.const -1) (i32.const 2))",
        "memory_out_of_bounds",
    ),
    traps(
        "data that was dropped",
        "(data.drop $d) (memory.init $d (i32.const 0) (i32.const 0) (i32.const 1))",
        "memory_out_of_bounds",
        rest='(data $d "x")',
    ),
    traps(
        "an element beyond the table",
        "(drop (table.get 0 (i32.const 5)))",
        "table_out_of_bounds",
        rest="(table 1 funcref)",
    ),
    traps("a call beyond the table", "(call_indirect (i32.const 5))", "table_out_of_bounds", rest="(table 1 funcref)"),
    traps("a call of null", "(call_indirect (i32.const 0))", "indirect_call_to_null", rest="(table 1 funcref)"),
    traps(
        "a call with another type",
        "(call_indirect (i32.const 0))",
        "bad_signature",
        rest="(table 1 funcref) (elem (i32.const 0) $f) (func $f (param i32))",
    ),
    traps(
        "elements beyond the table",
        "nop",
        "table_out_of_bounds",
        rest="(table 1 funcref) (elem (i32.const 9) $f) (func $f)",
    ),
    bomb("no entry", wat("nop", entry="main"), *NO_ENTRY),
    bomb("an entry that was asked for", wat("nop", entry="main"), ok(), entry="main"),
    bomb("an entry that takes something", '(module (func (export "_start") (param i32)))', *NO_ENTRY),
    bomb("an entry that returns something", '(module (func (export "_start") (result i32) (i32.const 1)))', *NO_ENTRY),
    bomb("an entry that is a memory", '(module (memory (export "_start") 1))', *NO_ENTRY),
    bomb("an entry that is a global", '(module (global (export "_start") i32 (i32.const 0)))', *NO_ENTRY),
    bomb("an entry with a name of any kind", wat("nop", entry="\\01\\f0\\9f\\92\\a3"), ok(), entry="\x01💣"),
    bomb("no exports", "(module)", *NO_ENTRY),
    bomb("output that is not text", wat(write(1024, 4), data="a\\ff\\fe\\80"), ok(stdout="", stdout_b64="Yf/+gA==")),
    bomb("errors that are not text", wat(write(1024, 1, fd=2), data="\\ff"), ok(stderr="", stderr_b64="/w==")),
    bomb("output of zeros", wat(write(1024, 3), data="\\00\\00\\00"), ok(stdout="", stdout_b64="AAAA")),
    bomb("output for a terminal", wat(write(1024, 8), data="\\1b]0;pwn\\07"), ok(stdout="", stdout_b64="G10wO3B3bgc=")),
    bomb("half a letter", wat(write(1024, 1), data="\\c3\\a9"), ok(stdout="", stdout_b64="ww==")),
    bomb(
        "a letter that is cut by the limit",
        wat(write(1024, 2), data="\\c3\\a9"),
        ok(stdout="", stdout_b64="ww==", truncated=True),
        limits={"output_bytes": 1},
    ),
    bomb("many arguments", wat(sized("args_sizes_get", 51)), ok(), args=[_WORD] * 50),
    bomb("many variables", wat(sized("environ_sizes_get", 50)), ok(), env={f"V{i}": _WORD for i in range(50)}),
    bomb("no arguments but its own name", wat(sized("args_sizes_get", 1)), ok()),
    bomb("no variables", wat(sized("environ_sizes_get", 0)), ok()),
    bomb(
        "arguments that do not fit",
        wat("(call $proc_exit (call $args_get (i32.const 0) (i32.const 65000)))"),
        ok(21),
        trap("memory_out_of_bounds"),
        trap("other"),
        args=[_WORD] * 50,
    ),
    bomb(
        "variables that do not fit",
        wat("(call $proc_exit (call $environ_get (i32.const 65000) (i32.const 0)))"),
        ok(21),
        trap("memory_out_of_bounds"),
        trap("other"),
        env={f"V{i}": _WORD for i in range(50)},
    ),
    bomb("an argument with a zero in it", wat("nop"), Answer("bad_request"), args=["a\0b"]),
    bomb("a variable with an equals sign in its name", wat("nop"), Answer("bad_request"), env={"A=B": "c"}),
    bomb("a variable with a zero in it", wat("nop"), Answer("bad_request"), env={"A": "b\0c"}),
    bomb(
        "a job of some fuel",
        wat(
            "(local.set $i (i32.const 100000)) (loop $f (br_if $f (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))"
        ),
        ok(),
        limits={"fuel": 1_000_000},
    ),
    bomb(
        "a job of too much fuel",
        wat(
            "(local.set $i (i32.const 1000000)) (loop $f (br_if $f (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))"
        ),
        limit("fuel"),
        limits={"fuel": 100_000},
    ),
)
