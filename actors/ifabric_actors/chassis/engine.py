"""wasmtime, set up the one way that guests are compiled and run here.

What is switched off is what nothing ordinary needs and what past advisories were about: threads and shared memory,
64-bit and several memories, components, garbage collection, exceptions, stack switching. Both the process that compiles
and those that run build their engine here: a compiled module only loads where the settings are the same, and
`fingerprint` names them.
"""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version

import wasmtime

#: an interrupt every so often: how fine the limits of wall clock and processor time are
TICK_S = 0.005


def build(stack_bytes: int) -> wasmtime.Engine:
    """An engine for guests whose stack is so large."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.consume_fuel = True
    config.max_wasm_stack = stack_bytes
    config.parallel_compilation = False
    config.cranelift_opt_level = "speed"
    config.wasm_threads = False
    config.shared_memory = False
    config.wasm_memory64 = False
    config.wasm_multi_memory = False
    config.wasm_component_model = False
    config.wasm_exceptions = False
    config.wasm_gc = False
    config.wasm_function_references = False
    config.wasm_stack_switching = False
    config.wasm_custom_page_sizes = False
    config.wasm_wide_arithmetic = False
    return wasmtime.Engine(config)


def fingerprint(engine: wasmtime.Engine, stack_bytes: int) -> str:
    """Names whatever a compiled module depends on: wasmtime, its settings, the processor."""
    probe = wasmtime.Module(engine, b"\0asm\x01\0\0\0").serialize()
    # an empty module, compiled, holds the settings and processor features that it was compiled with
    facts = f"{version('wasmtime')} {platform.machine()} {stack_bytes} ".encode() + bytes(probe)
    return hashlib.sha256(facts).hexdigest()[:32]
