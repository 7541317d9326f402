"""Bombs that call the host with what it does not expect: pointers, descriptors, paths, names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.guests import encoder as e
from tests.guests.bomb import (
    MIB,
    REFUSED,
    SOCKETS,
    WASI,
    Answer,
    Bomb,
    binary,
    bomb,
    limit,
    must,
    of_text,
    ok,
    trap,
    wat,
    write,
)

ANYTHING = (Answer("ok"), Answer("trap"), Answer("limit"))
EBADF, EFAULT, EINVAL = 8, 21, 28
OUT = trap("memory_out_of_bounds")
DENIED = Answer("egress_denied")


def result(call: str) -> str:
    """Code that ends with the call's errno as its exit code."""
    return f"(call $proc_exit {call})"


def with_http(code: str, **more: Any) -> str:
    imported = '(import "ifabric" "http" (func $http (param i32 i32 i32 i32) (result i32)))'
    made = wat(code, **more)
    return made.replace("(module ", f"(module {imported} ", 1)


#: what each parameter of a call is set to, all at once; i32 as it is, i64 stretched
PATTERNS = (0, 1, 8, 65_528, 65_535, 65_536, 0x7FFFFFFF, -0x80000000, -8, -1)


def every_call() -> bytes:
    """Exports a function for each of WASI's and each pattern: it calls that with nothing but the pattern."""
    functions = [
        f'(func (export "{name} {at}") '
        + (f"(call ${name} " if name == "proc_exit" else f"(drop (call ${name} ")
        + " ".join(f"({kind}.const {value})" for kind in takes)
        + (")" if name == "proc_exit" else "))")
        + ")"
        for name, takes in WASI.items()
        for at, value in enumerate(PATTERNS)
    ]
    return of_text(wat("nop", rest=" ".join(functions)))()


def entries() -> Iterator[str]:
    """What `every_call` exports."""
    return (f"{name} {at}" for name in WASI for at in range(len(PATTERNS)))


def imports(module: str, name: str, kind: str = "(func)") -> str:
    return f'(module (import "{module}" "{name}" {kind}) (memory (export "memory") 1) (func (export "_start")))'


def many_imports() -> bytes:
    """Fifty thousand imports of one function."""
    one = e.name("wasi_snapshot_preview1") + e.name("sched_yield") + bytes([0, 1])
    many = e.section(e.IMPORT, e.vector([one] * 12_000))
    head = e.MAGIC + e.section(e.TYPE, e.vector([e.func_type(), e.func_type(results=bytes([e.I32]))]))
    tail = e.section(e.FUNCTION, e.vector([b"\0"])) + e.section(e.EXPORT, e.vector([e.export("_start", 0, 12_000)]))
    return head + many + tail + e.section(e.CODE, e.vector([e.body(b"")]))


def _fd_write(iovs: int, count: int, written: int, fd: int = 1) -> str:
    return f"(call $fd_write (i32.const {fd}) (i32.const {iovs}) (i32.const {count}) (i32.const {written}))"


_VECTOR = "(i32.store (i32.const 64) (i32.const {at})) (i32.store (i32.const 68) (i32.const {length}))"
_RIGHTS = "(i64.const -1) (i64.const -1)"

BOMBS: tuple[Bomb, ...] = (
    bomb(
        "a vector beyond the memory",
        wat(_VECTOR.format(at=65_000, length=1000) + result(_fd_write(64, 1, 8))),
        ok(EFAULT, stdout=""),
    ),
    bomb(
        "a vector that wraps around",
        wat(_VECTOR.format(at=-16, length=32) + result(_fd_write(64, 1, 8))),
        ok(EFAULT, stdout=""),
    ),
    bomb(
        "a vector of four gigabytes",
        wat(_VECTOR.format(at=0, length=-1) + result(_fd_write(64, 1, 8))),
        ok(EFAULT, stdout=""),
    ),
    bomb("vectors beyond the memory", wat(result(_fd_write(65_530, 1, 8))), ok(EFAULT)),
    bomb("vectors at a negative address", wat(result(_fd_write(-8, 1, 8))), ok(EFAULT)),
    bomb("half a billion vectors", wat(result(_fd_write(0, 1 << 29, 8))), ok(EFAULT), ok(EINVAL)),
    bomb("minus one vectors", wat(result(_fd_write(0, -1, 8))), ok(EFAULT), ok(EINVAL)),
    bomb(
        "nowhere to write how much was written",
        wat(_VECTOR.format(at=1024, length=5) + result(_fd_write(64, 1, -1)), data="hello"),
        ok(EFAULT, stdout=""),
    ),
    bomb(
        "a read onto its own vectors",
        wat(
            "(i32.store (i32.const 64) (i32.const 64)) (i32.store (i32.const 68) (i32.const 16)) (i32.store (i32.const 72) (i32.const 64)) (i32.store (i32.const 76) (i32.const 16)) (call $proc_exit (call $fd_read (i32.const 0) (i32.const 64) (i32.const 2) (i32.const 64)))"
        ),
        ok(0),
        stdin="x" * 64,
    ),
    bomb(
        "a read beyond the end",
        wat(
            _VECTOR.format(at=1024, length=10_000)
            + must("(i32.eqz (call $fd_read (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 8)))")
            + must("(i32.eq (i32.load (i32.const 8)) (i32.const 5))")
            + must("(i32.eqz (call $fd_read (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 8)))")
            + must("(i32.eqz (i32.load (i32.const 8)))")
        ),
        ok(),
        stdin="abcde",
    ),
    bomb(
        "a read of what is not readable",
        wat(
            _VECTOR.format(at=1024, length=10)
            + result("(call $fd_read (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 8))")
        ),
        ok(EBADF),
    ),
    bomb(
        "a read to beyond the memory",
        wat(
            _VECTOR.format(at=-4, length=10)
            + result("(call $fd_read (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 8))")
        ),
        ok(EFAULT),
        stdin="abc",
    ),
    bomb("a write to stdin", wat(result(_fd_write(64, 1, 8, fd=0))), ok(EBADF)),
    bomb(
        "a write to a descriptor of the worker",
        wat(
            "(loop $next "
            + must("(call $fd_write (local.get $i) (i32.const 64) (i32.const 1) (i32.const 8))")
            .replace("i32.eqz (call", "i32.and (i32.gt_u (local.get $i) (i32.const 2)) (i32.eqz (call", 1)
            .replace("))) (then", ")))) (then", 1)
            + "(local.set $i (i32.add (local.get $i) (i32.const 1))) (br_if $next (i32.lt_u (local.get $i) (i32.const 1000))))"
        ),
        ok(),
    ),
    bomb("stdin that is never read", wat("nop"), ok(), stdin="x" * 100_000),
    bomb(
        "a positioned write",
        wat(
            _VECTOR.format(at=1024, length=5)
            + "(drop (call $fd_pwrite (i32.const 1) (i32.const 64) (i32.const 1) (i64.const 1000000000) (i32.const 8)))",
            data="hello",
        ),
        ok(stdout=""),
    ),
    bomb(
        "a hundred megabytes of chance",
        wat(result(f"(call $random_get (i32.const 0) (i32.const {100 * MIB}))")),
        ok(EFAULT),
        ok(EINVAL),
        trap("other"),
        OUT,
    ),
    bomb(
        "chance, as much as fits",
        wat(result(f"(call $random_get (i32.const 0) (i32.const {15 * MIB}))"), memory="240"),
        ok(0),
        limits={"wall_s": 2},
    ),
    bomb(
        "a path with all rights",
        wat(
            f"(drop (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 11) (i32.const 1) {_RIGHTS} (i32.const 0) (i32.const 8)))",
            data="/etc/passwd",
        ),
        ok(),
        trap("other"),
    ),
    bomb(
        "a path of a megabyte",
        wat(
            result(
                "(call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 1000000) (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 8))"
            ),
            memory="20",
        ),
        ok(EBADF),
        ok(37),
        trap("other"),
    ),
    bomb(
        "a path that is not text",
        wat(
            "(drop (call $path_open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 3) (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 8)))",
            data="\\ff\\fe\\00",
        ),
        ok(),
        trap("other"),
    ),
    bomb(
        "flags that do not exist",
        wat(
            "(drop (call $path_open (i32.const 3) (i32.const -1) (i32.const 1024) (i32.const 1) (i32.const -1) (i64.const 2) (i64.const 2) (i32.const -1) (i32.const 8)))"
        ),
        ok(),
        trap("other"),
    ),
    bomb(
        "a link over descriptors that are not there",
        wat(
            "(drop (call $path_symlink (i32.const 1024) (i32.const 11) (i32.const 3) (i32.const 1024) (i32.const 11)))",
            data="/etc/passwd",
        ),
        ok(),
    ),
    bomb(
        "a call without a memory",
        wat("(drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))", memory=None),
        trap("other"),
        ok(),
        REFUSED,
    ),
    bomb(
        "a call with a memory of another name",
        '(module (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32))) (memory (export "mem") 1) (func (export "_start") (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))',
        trap("other"),
        ok(),
        REFUSED,
    ),
    bomb(
        "a function for a memory",
        '(module (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32))) (memory 1) (func (export "memory")) (func (export "_start") (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))',
        trap("other"),
        ok(),
        REFUSED,
    ),
    bomb(
        "chance without a memory",
        wat("(drop (call $random_get (i32.const 0) (i32.const 8)))", memory=None),
        trap("other"),
        ok(),
        REFUSED,
    ),
    bomb(
        "a call of an endpoint that was not given",
        with_http(
            "(drop (call $http (i32.const 1024) (i32.const 42) (i32.const 2048) (i32.const 1000)))",
            data='{\\"endpoint\\":\\"x\\",\\"method\\":\\"GET\\",\\"path\\":\\"/\\"}',
        ),
        DENIED,
    ),
    bomb(
        "a request that is no request",
        with_http(
            "(drop (call $http (i32.const 1024) (i32.const 4) (i32.const 2048) (i32.const 1000)))", data="\\ff{]["
        ),
        DENIED,
        ok(),
    ),
    bomb(
        "a request of nested brackets",
        with_http(
            "(memory.fill (i32.const 1024) (i32.const 91) (i32.const 60000)) (drop (call $http (i32.const 1024) (i32.const 60000) (i32.const 0) (i32.const 1000)))"
        ),
        DENIED,
        ok(),
    ),
    bomb(
        "a request from beyond the memory",
        with_http("(drop (call $http (i32.const 65000) (i32.const 1000) (i32.const 0) (i32.const 100)))"),
        OUT,
    ),
    bomb(
        "a request of minus one bytes",
        with_http("(drop (call $http (i32.const 0) (i32.const -1) (i32.const 0) (i32.const 100)))"),
        OUT,
        trap("other"),
    ),
    bomb(
        "a response to beyond the memory",
        with_http("(drop (call $http (i32.const 1024) (i32.const 4) (i32.const 65000) (i32.const 1000)))"),
        OUT,
    ),
    bomb(
        "a response of minus one bytes",
        with_http("(drop (call $http (i32.const 0) (i32.const 0) (i32.const 16) (i32.const -1)))"),
        OUT,
    ),
    bomb(
        "a response that nobody asked for",
        with_http("(drop (call $http (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 100)))"),
        ok(),
        trap("other"),
    ),
    bomb(
        "a request larger than any",
        with_http(
            f"(drop (call $http (i32.const 0) (i32.const {12 * MIB}) (i32.const 0) (i32.const 100)))", memory="240"
        ),
        DENIED,
        ok(),
        trap("other"),
    ),
    bomb("an import of the host's environment", imports("env", "system"), REFUSED),
    bomb(
        "an import of an older WASI",
        imports("wasi_unstable", "fd_write", "(func (param i32 i32 i32 i32) (result i32))"),
        REFUSED,
    ),
    bomb(
        "an import of a WASI that is to come",
        imports("wasi:filesystem/types@0.2.0", "[method]descriptor.read"),
        REFUSED,
    ),
    bomb("an import that WASI does not have", imports("wasi_snapshot_preview1", "sock_open"), REFUSED),
    bomb("an import of another of ours", imports("ifabric", "spawn"), REFUSED),
    bomb("an import with another type", imports("wasi_snapshot_preview1", "fd_write", "(func (param i64))"), REFUSED),
    bomb("http with another type", imports("ifabric", "http", "(func (param i64 i64) (result i64))"), REFUSED),
    bomb(
        "an imported memory",
        imports("env", "memory", "(memory 1)").replace('(memory (export "memory") 1)', ""),
        REFUSED,
    ),
    bomb("an imported table", imports("env", "table", "(table 1 funcref)"), REFUSED),
    bomb("an imported global", imports("env", "g", "(global i32)"), REFUSED),
    bomb("an import for threads", imports("wasi", "thread-spawn", "(func (param i32) (result i32))"), REFUSED),
    *(
        bomb(
            f"a socket: {name}",
            imports("wasi_snapshot_preview1", name, f"(func {' '.join(f'(param {p})' for p in takes)} (result i32))"),
            REFUSED,
            ok(),
        )
        for name, takes in SOCKETS.items()
    ),
    binary("an import twelve thousand times", many_imports, ok(), REFUSED),
    bomb(
        "output that is cut, then nothing, then more",
        wat(
            "(memory.fill (i32.const 1024) (i32.const 97) (i32.const 16384))"
            f"(loop $f {write(1024, 16384)} {write(1024, 0)} (br $f))"
        ),
        limit("output_bytes", stdout="a" * 10_000),
    ),
    bomb(
        "output that is cut, then nothing",
        wat("(memory.fill (i32.const 1024) (i32.const 97) (i32.const 16384))" + write(1024, 16384) + write(1024, 0)),
        ok(truncated=True, stdout="a" * 10_000),
    ),
)
