"""Bombs that take time: loops, sleeps, and calls of the host that never end."""

from __future__ import annotations

from typing import Any

from tests.guests.bomb import MIB, REFUSED, Bomb, bomb, forever, limit, must, ok, trap, wat, write

WALL = limit("wall_s")
#: one subscription at 64: clock 1 (monotonic), as `timeout` and `flags` say
_HOUR_NS = 3_600_000_000_000
HUGE_NS = (1 << 64) - 1


def subscription(timeout_ns: int, *, absolute: bool = False, clock: int = 1, at: int = 64) -> str:
    """Code that puts a clock's subscription there."""
    return (
        f"(i64.store (i32.const {at}) (i64.const 7)) (i32.store8 (i32.const {at + 8}) (i32.const 0))"
        f"(i32.store (i32.const {at + 16}) (i32.const {clock}))"
        f"(i64.store (i32.const {at + 24}) (i64.const {timeout_ns})) (i64.store (i32.const {at + 32}) (i64.const 0))"
        f"(i32.store16 (i32.const {at + 40}) (i32.const {int(absolute)}))"
    )


def poll(count: int = 1, events: int = 512, nevents: int = 500) -> str:
    return f"(call $poll_oneoff (i32.const 64) (i32.const {events}) (i32.const {count}) (i32.const {nevents}))"


def filled(count: int, timeout_ns: int) -> str:
    """Code that makes `count` subscriptions from address 64, and leaves room for as many events after them."""
    return (
        f"(local.set $i (i32.const 0)) (loop $fill "
        f"(i64.store (i32.add (i32.const 88) (i32.mul (local.get $i) (i32.const 48))) (i64.const {timeout_ns}))"
        f"(i32.store (i32.add (i32.const 80) (i32.mul (local.get $i) (i32.const 48))) (i32.const 1))"
        f"(local.set $i (i32.add (local.get $i) (i32.const 1)))"
        f"(br_if $fill (i32.lt_u (local.get $i) (i32.const {count}))))"
    )


def host_loop(name: str, call: str, **more: Any) -> Bomb:
    return bomb(f"loop of {name}", wat(forever(f"(drop {call})"), **more), WALL)


#: subscriptions that fit into the memory, each with its event; the host takes a thousand at a time
MANY, MANY_PAGES = 200_000, 256
EINVAL = 28
_STDIN_SUBSCRIPTION = "(i64.store (i32.const 64) (i64.const 5)) (i32.store8 (i32.const 72) (i32.const 1)) (i32.store (i32.const 80) (i32.const 0))"

BOMBS: tuple[Bomb, ...] = (
    bomb("endless loop", wat(forever("")), WALL),
    bomb("endless loop, fuel", wat(forever("")), limit("fuel"), limits={"fuel": 1_000_000, "wall_s": 5}),
    bomb("one unit of fuel", wat("nop"), limit("fuel"), limits={"fuel": 1}),
    bomb(
        "tight br_table loop",
        wat(
            "(loop $a (loop $b (loop $c (br_table $a $b $c $a (local.tee $i (i32.add (local.get $i) (i32.const 1)))))))"
        ),
        WALL,
    ),
    bomb(
        "loop of indirect calls",
        wat(forever("(call_indirect (i32.const 0))"), rest="(table 1 funcref) (elem (i32.const 0) $f) (func $f)"),
        WALL,
    ),
    bomb("endless tail calls", wat("(return_call $f)", rest="(func $f (return_call $f))"), WALL),
    bomb("loop of divisions", wat(forever("(local.set $l (i64.rem_u (i64.const -1) (i64.const 3)))")), WALL),
    bomb(
        "loop in the start function",
        '(module (func $s (loop $f (br $f))) (start $s) (func (export "_start")))',
        WALL,
    ),
    bomb(
        "fill of all the memory, for ever",
        wat(forever(f"(memory.fill (i32.const 0) (i32.const 1) (i32.const {15 * MIB}))"), memory="240"),
        WALL,
    ),
    bomb(
        "copy of all the memory, for ever",
        wat(forever(f"(memory.copy (i32.const 8) (i32.const 0) (i32.const {15 * MIB - 8}))"), memory="240"),
        WALL,
    ),
    bomb(
        "fill of a table, for ever",
        wat(forever("(table.fill 0 (i32.const 0) (ref.null func) (i32.const 20000))"), rest="(table 20000 funcref)"),
        WALL,
    ),
    bomb(
        "copy of a table, for ever",
        wat(forever("(table.copy 0 0 (i32.const 1) (i32.const 0) (i32.const 19999))"), rest="(table 20000 funcref)"),
        WALL,
    ),
    bomb("growing by nothing, for ever", wat(forever("(drop (memory.grow (i32.const 0)))")), WALL),
    bomb("growing in vain, for ever", wat(forever("(drop (memory.grow (i32.const 65535)))")), WALL),
    bomb(
        "waiting on an atomic",
        wat("(drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))", memory="1 1"),
        REFUSED,
    ),
    host_loop("writes of nothing", "(call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 8))"),
    host_loop("empty vectors", "(call $fd_write (i32.const 1) (i32.const 64) (i32.const 100) (i32.const 8))"),
    host_loop("clock_time_get", "(call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 8))"),
    host_loop("random_get", "(call $random_get (i32.const 0) (i32.const 64))"),
    host_loop("big random_get", f"(call $random_get (i32.const 0) (i32.const {15 * MIB}))", memory="240"),
    host_loop("sched_yield", "(call $sched_yield)"),
    host_loop("args_get", "(call $args_get (i32.const 0) (i32.const 4096))"),
    host_loop("failing calls", "(call $fd_close (i32.const 77))"),
    host_loop(
        "reads at the end",
        "(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 64)) (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))",
    ),
    host_loop(
        "path_open",
        "(call $path_open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 8))",
        data="/etc",
    ),
    bomb("sleep of an hour", wat(subscription(_HOUR_NS) + f"(drop {poll()})"), WALL, within_s=0.2),
    bomb(
        "sleep of an hour by the wall clock",
        wat(subscription(_HOUR_NS, clock=0) + f"(drop {poll()})"),
        WALL,
        within_s=0.2,
    ),
    bomb("sleep for ever", wat(subscription(HUGE_NS) + f"(drop {poll()})"), WALL, within_s=0.2),
    bomb(
        "sleep until the end of time",
        wat(subscription(HUGE_NS, absolute=True) + f"(drop {poll()})"),
        WALL,
        within_s=0.2,
    ),
    bomb("a long row of short sleeps", wat(subscription(10_000_000) + forever(f"(drop {poll()})")), WALL),
    bomb("a row of polls that do not wait", wat(subscription(0) + forever(f"(drop {poll()})")), WALL),
    bomb(
        "many sleepers",
        wat(filled(MANY, _HOUR_NS) + f"(call $proc_exit {poll(MANY, events=64 + 48 * MANY)})", memory=str(MANY_PAGES)),
        ok(EINVAL),
        within_s=0.3,
    ),
    bomb(
        "many sleepers that are due, for ever",
        wat(filled(MANY, 0) + forever(f"(drop {poll(MANY, events=64 + 48 * MANY)})"), memory=str(MANY_PAGES)),
        WALL,
    ),
    bomb("poll of nothing", wat(f"(call $proc_exit {poll(0)})"), ok(EINVAL), within_s=0.2),
    bomb(
        "poll of too many to be true",
        wat(f"(call $proc_exit {poll(-1)})"),
        ok(EINVAL),
    ),
    bomb("poll of an unknown clock", wat(subscription(0, clock=77) + f"(drop {poll()})"), ok(), trap("other")),
    bomb(
        "poll of an unknown kind",
        wat("(i32.store8 (i32.const 72) (i32.const 99))" + f"(drop {poll()})"),
        ok(),
        trap("other"),
    ),
    bomb("poll on stdin", wat(_STDIN_SUBSCRIPTION + f"(drop {poll()})"), ok(), within_s=0.2),
    bomb("a short sleep", wat(subscription(30_000_000) + f"(call $proc_exit {poll()})"), ok(0)),
    bomb("a sleep into the past", wat(subscription(0, absolute=True) + f"(call $proc_exit {poll()})"), ok(0)),
    bomb(
        "output, then a loop",
        wat(write(1024, 5) + forever(""), data="hello"),
        limit("wall_s", stdout="hello"),
    ),
    bomb(
        "a clock that does not exist",
        wat(must("(call $clock_time_get (i32.const 99) (i64.const 0) (i32.const 0))")),
        ok(),
        trap("other"),
    ),
)
