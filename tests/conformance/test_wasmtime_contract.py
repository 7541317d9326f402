"""What the chassis needs of wasmtime-py that it does not promise: private names, and words that it tells limits by.

Each monthly release is tried against this before it is taken.
"""

from __future__ import annotations

import ctypes
from typing import get_args

import pytest
import wasmtime
from wasmtime import _bindings as ffi
from wasmtime import _extern

from ifabric.wire.chassis import TrapKind
from ifabric_actors.chassis import engine
from ifabric_actors.chassis.worker import _LIMIT_WORDS, _TRAPS


def test_the_private_names_that_a_worker_uses_are_there() -> None:
    for name in (
        "wasmtime_store_epoch_deadline_callback",
        "wasmtime_update_deadline_kind_t",
        "wasmtime_error_new",
        "wasmtime_instance_export_get",
        "wasmtime_extern_t",
        "wasmtime_context_t",
    ):
        assert hasattr(ffi, name), name
    assert callable(_extern.wrap_extern)
    built = engine.build(64 * 1024)
    store = wasmtime.Store(built)
    assert isinstance(store._context(), ctypes._Pointer)
    module = wasmtime.Module(built, wasmtime.wat2wasm("(module)"))
    instance = wasmtime.Linker(built).instantiate_pre(module).instantiate(store)
    assert isinstance(instance._instance, ffi.wasmtime_instance_t)


@pytest.mark.parametrize(
    ("wat", "limits", "which"),
    [
        ("(module (memory 2))", {"memory_size": 65_536}, "memory_bytes"),
        ("(module (table 5 funcref))", {"table_elements": 4}, "table_elements"),
        ("(module (memory 1))", {"memories": 0}, "memories"),
        ("(module (table 1 funcref))", {"tables": 0}, "tables"),
        ("(module)", {"instances": 0}, "instances"),
    ],
)
def test_wasmtime_tells_each_limit_in_the_words_that_a_worker_knows(
    wat: str, limits: dict[str, int], which: str
) -> None:
    built = engine.build(64 * 1024)
    store = wasmtime.Store(built)
    store.set_limits(**limits)
    module = wasmtime.Linker(built).instantiate_pre(wasmtime.Module(built, wasmtime.wat2wasm(wat)))
    with pytest.raises(wasmtime.WasmtimeError) as error:
        module.instantiate(store)
    assert [name for words, name in _LIMIT_WORDS if words in str(error.value)] == [which]


def test_every_trap_that_a_worker_names_is_one_of_the_wires() -> None:
    assert set(_TRAPS.values()) | {"other"} == set(get_args(TrapKind))


@pytest.mark.parametrize(
    "wat",
    [
        "(module (memory i64 1))",
        '(module (memory 1) (memory (export "m") 1))',
        "(module (memory 1 2 shared))",
        "(module (type (struct)))",
        "(module (tag (param i32)))",
        "(component)",
    ],
)
def test_what_the_engine_has_switched_off_is_not_compiled(wat: str) -> None:
    with pytest.raises(wasmtime.WasmtimeError):
        wasmtime.Module(engine.build(64 * 1024), bytes(wasmtime.wat2wasm(wat)))


def test_the_fingerprint_names_the_settings_and_is_the_same_in_every_process() -> None:
    first, again = engine.build(64 * 1024), engine.build(64 * 1024)
    assert engine.fingerprint(first, 64 * 1024) == engine.fingerprint(again, 64 * 1024)
    assert engine.fingerprint(engine.build(128 * 1024), 128 * 1024) != engine.fingerprint(first, 64 * 1024)
