"""One hostile module: its bytes, how it is run, and what must come back. `wat` writes a module that imports what it calls.

A bomb says which answers are right; after every one of them the pool must be as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import wasmtime

PAGE = 65_536
MIB = 1 << 20
#: what a bomb is run with, unless it says otherwise
PATIENT_S = 3.0
LIMITS: dict[str, Any] = {"wall_s": 0.2, "memory_bytes": 16 * MIB, "output_bytes": 10_000}

_I, _L = "i32", "i64"
#: every function of WASI preview 1: what it takes, and whether it gives an errno
WASI: dict[str, tuple[str, ...]] = {
    "args_get": (_I, _I),
    "args_sizes_get": (_I, _I),
    "environ_get": (_I, _I),
    "environ_sizes_get": (_I, _I),
    "clock_res_get": (_I, _I),
    "clock_time_get": (_I, _L, _I),
    "fd_advise": (_I, _L, _L, _I),
    "fd_allocate": (_I, _L, _L),
    "fd_close": (_I,),
    "fd_datasync": (_I,),
    "fd_fdstat_get": (_I, _I),
    "fd_fdstat_set_flags": (_I, _I),
    "fd_fdstat_set_rights": (_I, _L, _L),
    "fd_filestat_get": (_I, _I),
    "fd_filestat_set_size": (_I, _L),
    "fd_filestat_set_times": (_I, _L, _L, _I),
    "fd_pread": (_I, _I, _I, _L, _I),
    "fd_prestat_get": (_I, _I),
    "fd_prestat_dir_name": (_I, _I, _I),
    "fd_pwrite": (_I, _I, _I, _L, _I),
    "fd_read": (_I, _I, _I, _I),
    "fd_readdir": (_I, _I, _I, _L, _I),
    "fd_renumber": (_I, _I),
    "fd_seek": (_I, _L, _I, _I),
    "fd_sync": (_I,),
    "fd_tell": (_I, _I),
    "fd_write": (_I, _I, _I, _I),
    "path_create_directory": (_I, _I, _I),
    "path_filestat_get": (_I, _I, _I, _I, _I),
    "path_filestat_set_times": (_I, _I, _I, _I, _L, _L, _I),
    "path_link": (_I, _I, _I, _I, _I, _I, _I),
    "path_open": (_I, _I, _I, _I, _I, _L, _L, _I, _I),
    "path_readlink": (_I, _I, _I, _I, _I, _I),
    "path_remove_directory": (_I, _I, _I),
    "path_rename": (_I, _I, _I, _I, _I, _I),
    "path_symlink": (_I, _I, _I, _I, _I),
    "path_unlink_file": (_I, _I, _I),
    "poll_oneoff": (_I, _I, _I, _I),
    "proc_exit": (_I,),
    "random_get": (_I, _I),
    "sched_yield": (),
}
SOCKETS: dict[str, tuple[str, ...]] = {
    "sock_accept": (_I, _I, _I),
    "sock_recv": (_I, _I, _I, _I, _I, _I),
    "sock_send": (_I, _I, _I, _I, _I),
    "sock_shutdown": (_I, _I),
}


@dataclass(frozen=True)
class Answer:
    """One right answer. `code` is "ok" or an error's; `facts` are the fields that must be as given."""

    code: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bomb:
    """A module and how it is run. `answers` are to the run, or to `put` where that refuses it."""

    name: str
    make: Callable[[], bytes]
    answers: tuple[Answer, ...]
    run: dict[str, Any] = field(default_factory=dict)
    #: of all that lasts, at most so much may have gone by at its end; None: the wall clock's limit
    within_s: float | None = None

    @property
    def refused_at_put(self) -> bool:
        """No right answer is one to the run."""
        return all(answer.code in ("not_wasm", "module_refused", "too_large") for answer in self.answers)

    def limits(self) -> dict[str, Any]:
        """Of the run. One that is not to end by the clock has time enough on a busy machine, too."""
        by_clock = limit("wall_s").facts.items()
        wall = {} if any(by_clock <= answer.facts.items() for answer in self.answers) else {"wall_s": PATIENT_S}
        return {**LIMITS, **wall, **self.run.get("limits", {})}

    def request(self) -> dict[str, Any]:
        """The fields of `run` beside the module."""
        return {**self.run, "limits": self.limits()}


def ok(exit_code: int = 0, **facts: Any) -> Answer:
    return Answer("ok", {"exit_code": exit_code, **facts})


def limit(which: str, **facts: Any) -> Answer:
    return Answer("limit", {"which": which, **facts})


def trap(kind: str, **facts: Any) -> Answer:
    return Answer("trap", {"kind": kind, **facts})


REFUSED = Answer("module_refused")
NOT_WASM = Answer("not_wasm")
TOO_LARGE = Answer("too_large")
BAD_REQUEST = Answer("bad_request")


def of_text(text: str) -> Callable[[], bytes]:
    return lambda: bytes(wasmtime.wat2wasm(text))


def wat(
    code: str,
    *,
    memory: str | None = "1",
    data: str = "",
    rest: str = "",
    entry: str = "_start",
    export_memory: bool = True,
) -> str:
    """A module whose `entry` runs `code`. It imports the WASI functions that `code` and `rest` call by their names.

    `memory` is its limits in pages; `data` starts at address 1024; the locals $i, $j (i32) and $l (i64) are there.
    """
    called = sorted(set(re.findall(r"call \$(\w+)", code + rest)) & (WASI | SOCKETS).keys())
    parts = [
        f'(import "wasi_snapshot_preview1" "{one}" (func ${one}'
        f"{''.join(f' (param {p})' for p in (WASI | SOCKETS)[one])}{'' if one == 'proc_exit' else ' (result i32)'}))"
        for one in called
    ]
    if memory is not None:
        parts.append(('(memory (export "memory") ' if export_memory else "(memory ") + memory + ")")
    if data:
        parts.append(f'(data (i32.const 1024) "{data}")')
    parts += [rest, f'(func (export "{entry}") (local $i i32) (local $j i32) (local $l i64) {code})']
    return f"(module {' '.join(parts)})"


def bomb(name: str, text: str, *answers: Answer, within_s: float | None = None, **run: Any) -> Bomb:
    """A bomb from text."""
    return Bomb(name, of_text(text), answers, run, within_s)


def binary(name: str, make: Callable[[], bytes], *answers: Answer, within_s: float | None = None, **run: Any) -> Bomb:
    """A bomb from bytes."""
    return Bomb(name, make, answers, run, within_s)


def write(address: int, length: int, fd: int = 1) -> str:
    """Code that writes these bytes of the memory to a descriptor; it uses addresses 0 to 11."""
    return (
        f"(i32.store (i32.const 0) (i32.const {address})) (i32.store (i32.const 4) (i32.const {length}))"
        f"(drop (call $fd_write (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 8)))"
    )


def forever(code: str) -> str:
    return f"(loop $forever {code} (br $forever))"


def must(condition: str) -> str:
    """Code that ends with exit code 9 unless the condition holds."""
    return f"(if (i32.eqz {condition}) (then (call $proc_exit (i32.const 9))))"
