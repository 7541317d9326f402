"""What is in a module, and which ones are run here."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric.errors import NotWasm, StartupError
from ifabric_actors.chassis import acceptance
from ifabric_actors.chassis.acceptance import Rules, facts, why_refused
from ifabric_actors.chassis.binary import Limits
from ifabric_actors.chassis.wasm import examine, module_id
from tests.guests.build import guest
from tests.guests.encoder import (
    CODE,
    COMPONENT,
    CUSTOM,
    DATA,
    ELEMENT,
    EXPORT,
    FUNCTION,
    GLOBAL,
    IMPORT,
    MAGIC,
    MEMORY,
    START,
    TABLE,
    TYPE,
    custom,
    name,
    section,
    unsigned,
    vector,
)

RULES = Rules(max_functions=1000, max_memory_bytes=16 << 20, max_tables=4, max_table_elements=20_000)
#: takes whatever wasmtime can be told to take, so that more is compared
EVERYTHING = wasmtime.Config()
EVERYTHING.wasm_memory64 = True
EVERYTHING.wasm_multi_memory = True
EVERYTHING.wasm_threads = True
EVERYTHING.wasm_tail_call = True
EVERYTHING.wasm_function_references = True
EVERYTHING.wasm_gc = True
EVERYTHING.wasm_exceptions = True
EVERYTHING.wasm_custom_page_sizes = True
ENGINE = wasmtime.Engine(EVERYTHING)


def teardown_module() -> None:
    ENGINE.close()  # at the interpreter's end it would be closed too late, and say so


COMMAND = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "ifabric" "http" (func $http (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2 16)
  (table 3 5 funcref)
  (global $g (mut i32) (i32.const 7))
  (elem (i32.const 0) $f $_start)
  (data (i32.const 8) "hello\\00\\n")
  (func $f (param i32) (result i32) (local i64 i64 f32) local.get 0)
  (func $_start (export "_start") (drop (call $f (i32.const 1))))
  (start $s) (func $s))"""
EMPTY = "(module)"
TEXTS = {
    "empty": EMPTY,
    "command": COMMAND,
    "64 bits": "(module (memory i64 1 2) (table i64 1 funcref))",
    "shared": "(module (memory 1 2 shared))",
    "memories": "(module (memory 1) (memory 2 3) (memory 0))",
    "small pages": "(module (memory 5 7 (pagesize 1)))",
    "imports": """(module (import "a" "f" (func)) (import "a" "t" (table 1 2 externref)) (import "a" "m" (memory 1))
        (import "a" "g" (global (mut f64))) (import "a" "x" (tag (param i32))) (import "é" "" (func)))""",
    "references": """(module (type $s (struct (field (mut i32)))) (import "a" "g" (global (ref null $s)))
        (import "a" "h" (global anyref)) (table 1 (ref null func)) (func (local (ref null $s)) (local structref)))""",
    "initialised": "(module (func $f) (table 2 (ref func) (ref.func $f)))",
    "passive": '(module (memory 1) (data "abc") (func (memory.init 0 (i32.const 0) (i32.const 0) (i32.const 1))))',
    "vector": "(module (global v128 (v128.const i64x2 1 2)) (func (result v128) global.get 0))",
}
SAMPLES = {key: bytes(wasmtime.wat2wasm(text)) for key, text in TEXTS.items()}
SAMPLES["compact"] = (
    MAGIC
    + section(TYPE, b"\1\x60\0\0")
    + section(
        IMPORT,
        vector(
            [
                name("a") + name("") + b"\x7f" + vector([name("f") + b"\0\0", name("m") + b"\2\0\1"]),
                name("b") + name("") + b"\x7e\0\0" + vector([name("g"), name("h"), name("")]),
                name("c") + name("") + b"\0\0",
                name("d") + name("") + b"\x7f\0",
            ]
        ),
    )
)
SAMPLES["custom"] = MAGIC + custom("n", b"x") + SAMPLES["command"][8:] + custom("n", b"yz") + custom("é", b"")


def made(*sections: bytes) -> bytes:
    return MAGIC + b"".join(sections)


def bodies(*content: bytes) -> tuple[bytes, bytes]:
    """The function and code sections of functions without parameters."""
    return (
        section(FUNCTION, unsigned(len(content)) + b"\0" * len(content)),
        section(CODE, vector(unsigned(len(body)) + body for body in content)),
    )


def reasons(data: bytes, rules: Rules = RULES) -> tuple[str, ...]:
    return why_refused(examine(data), rules)


# -- what is in a module --------------------------------------------------------------------------------------------------


def test_a_module_is_described_by_its_sections() -> None:
    data = SAMPLES["command"]
    module = examine(data)
    assert module.id == module_id(data)
    assert (module.id[:7], len(module.id), module.size) == ("sha256:", 71, len(data))
    assert module.imports == [
        ("wasi_snapshot_preview1", "fd_write", "function"),
        ("ifabric", "http", "function"),
    ]
    assert module.exports == [("memory", "memory"), ("_start", "function")]
    assert (module.functions, module.globals, module.elements, module.data) == (3, 1, 1, 1)
    assert module.has_start
    assert module.memories == [Limits(2 * 65_536, 16 * 65_536, shared=False, is64=False)]
    assert module.tables == [Limits(3, 5, shared=False, is64=False)]
    assert (module.locals_max, module.local_groups) == (3, 2)
    assert set(module.sections) >= {
        "type",
        "import",
        "function",
        "table",
        "memory",
        "global",
        "export",
        "start",
        "code",
    }


def test_custom_sections_of_one_name_are_counted_together() -> None:
    sections = examine(SAMPLES["custom"]).sections
    assert (sections["custom:n"], sections["custom:é"]) == (3 + 4, 3)


def test_limits_are_read_with_all_their_flags() -> None:
    assert examine(SAMPLES["shared"]).memories == [Limits(65_536, 131_072, shared=True, is64=False)]
    assert examine(SAMPLES["64 bits"]).memories == [Limits(65_536, 131_072, shared=False, is64=True)]
    assert examine(SAMPLES["64 bits"]).tables == [Limits(1, None, shared=False, is64=True)]
    assert examine(SAMPLES["small pages"]).memories == [Limits(5, 7, shared=False, is64=False)]
    assert [memory.min for memory in examine(SAMPLES["memories"]).memories] == [65_536, 131_072, 0]


def test_imports_in_compact_form_are_read_one_by_one() -> None:
    assert [(one.module, one.name, one.kind[0]) for one in examine(SAMPLES["compact"]).imports] == [
        ("a", "f", "f"), ("a", "m", "m"), ("b", "g", "f"), ("b", "h", "f"), ("b", "", "f"), ("c", "", "f")
    ]  # fmt: skip
    assert agree(SAMPLES["compact"])
    names = vector([name("")] * 2_000)
    module = examine(made(section(IMPORT, b"\1" + name("env") + name("") + b"\x7e\0\0" + names)))
    assert (len(module.imports), module.import_count) == (1_000, 2_000)


def test_what_clang_builds_is_read() -> None:
    try:
        data = guest("hello")
    except StartupError as missing:
        pytest.skip(str(missing))
    assert reasons(data) == ()
    assert ("_start", "function") in examine(data).exports


# -- what is none -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "offset", "says"),
    [
        (b"", 0, "is empty"),
        (b"\x7fELF\2\1\1", 0, "put the .wasm that it was made from"),
        (b"  (module)", 0, "text"),
        (b"\0as", 0, "begins with 00 61 73"),
        (MAGIC[:6], 4, "01 00"),
        (MAGIC[:4], 4, "cut off"),
        (MAGIC[:4] + b"\2\0\0\0", 4, "02 00 00 00"),
        (COMPONENT, 4, "a component, and not a core module"),
        (MAGIC + b"\1", 9, "ends within the size of a section"),
        (MAGIC + b"\1\x80", 9, "ends within the size of a section"),
        (MAGIC + b"\1\x80\x80\x80\x80\x80\0", 9, "more than 32 bits"),
        (MAGIC + b"\1\xff\xff\xff\xff\x1f", 9, "more than 32 bits"),
        (MAGIC + b"\1\xff\xff\xff\xff\x0f", 14, "4294967295 bytes, and 0 are left"),
        (MAGIC + b"\x0e\0", 8, "no section 14"),
        (made(section(TYPE, b"\0"), section(TYPE, b"\0")), 11, "twice, or after one"),
        (made(section(IMPORT, b"\0"), section(TYPE, b"\0")), 11, "twice, or after one"),
        (made(section(EXPORT, unsigned(2**32 - 1) + b"\0" * 6)), 15, "4294967295 exports do not fit into the 6 bytes"),
        (made(section(EXPORT, b"\0\0")), 11, "1 bytes too many in the export section"),
        (made(section(IMPORT, b"\0\0")), 11, "1 bytes too many in the import section"),
        (made(section(MEMORY, b"\0\0")), 11, "too many in the memory section"),
        (made(section(TABLE, b"\0\0")), 11, "too many in the table section"),
        (made(section(START, b"\0\0")), 11, "too many in the start section"),
        (made(section(FUNCTION, b"\1\0"), section(CODE, b"\1\2\0\x0b\0")), 18, "too many in the code section"),
        (made(section(EXPORT, b"\1" + name("x") + b"\5\0")), 13, "of no kind (5)"),
        (made(section(EXPORT, b"\1\1\xff\0\0")), 11, "not UTF-8"),
        (made(section(EXPORT, b"\1\x0a\0\0\0")), 12, "an export's name has 10 bytes, and 3 are left"),
        (made(section(CUSTOM, b"\1\xff")), 10, "not UTF-8"),
        (made(section(TABLE, b"\1\x01\0\0")), 11, "0x01 is no type"),
        (made(section(MEMORY, b"\1\x10\0")), 11, "unknown flags 0x10"),
        (made(section(MEMORY, b"\1\x08\0\x11")), 14, "a page of 2^17 bytes"),
        (made(section(MEMORY, b"\1\0" + unsigned(65_537))), 15, "a memory of more than 4294967296 bytes"),
        (made(section(FUNCTION, b"\1\0")), 12, "1 functions are declared, and 0 have a body"),
        (made(section(FUNCTION, b"\1\0"), section(CODE, b"\1\x09\0\x0b")), 16, "a body of 9 bytes"),
        (made(*bodies(unsigned(2**32 - 1) + b"\x0b")), 21, "4294967295 groups of locals do not fit"),
        (made(*bodies(b"\1\x80", b"\1\1\x7f\x0b")), 18, "locals do not fit"),
        (made(*bodies(b"\1\x80\x80", b"\x7f" * 16)), 0, "do not end with their body"),
        (made(section(FUNCTION, b"\1\0"), section(CODE, b"\1\0\0\0")), 0, "locals do not fit into the body"),
        (made(section(EXPORT, unsigned(1_000_001) + b"\0" * 4_000_000)), 0, "no engine takes more than 1000000"),
        (made(*[section(CUSTOM, b"\0")] * 100_001), 0, "more than 100000 sections"),
        (made(section(CUSTOM, unsigned(100_001) + b"x" * 100_001)), 0, "has 100001 bytes"),
    ],
)
def test_what_is_no_module_is_said_with_its_place(data: bytes, offset: int, says: str) -> None:
    with pytest.raises(NotWasm) as refused:
        examine(data)
    assert says in refused.value.message
    assert refused.value.message.endswith("nothing was kept") or "byte 4" in refused.value.message
    if offset:
        assert refused.value.facts["offset"] == offset


@pytest.mark.parametrize("which", SAMPLES)
def test_a_module_cut_off_anywhere_is_read_or_refused_and_nothing_else(which: str) -> None:
    data = SAMPLES[which]
    for size in range(len(data)):
        agree(data[:size])


@pytest.mark.parametrize("which", SAMPLES)
def test_a_module_with_any_byte_another_is_read_or_refused_and_nothing_else(which: str) -> None:
    data = SAMPLES[which]
    for at in range(8, len(data)):
        for byte in (0, 1, 0x0B, 0x40, 0x7F, 0x80, 0xFF, data[at] ^ 1):
            agree(data[:at] + bytes([byte]) + data[at + 1 :])


# -- and wasmtime ----------------------------------------------------------------------------------------------------------


def agree(data: bytes) -> bool:
    """What wasmtime takes is read, with the same imports and exports. Whether it takes it."""
    try:
        wasmtime.Module.validate(ENGINE, data)
    except wasmtime.WasmtimeError:
        with contextlib.suppress(NotWasm):
            examine(data)
        return False
    module = examine(data)
    try:
        theirs = wasmtime.Module(ENGINE, data)
    except wasmtime.WasmtimeError as error:
        if "compact imports" not in str(error):  # `validate` takes them, and the compiler does not
            raise
        return True
    assert [(i.module, i.name) for i in theirs.imports] == [(i.module, i.name) for i in module.imports]
    assert [export.name for export in theirs.exports] == [name for name, _ in module.exports]
    assert (module.import_count, module.export_count) == (len(module.imports), len(module.exports))
    memories = [limits_of(e.type) for e in theirs.exports if isinstance(e.type, wasmtime.MemoryType)]
    assert all(limits in [(m.min, m.max) for m in module.memories] for limits in memories) or module.imports
    return True


def limits_of(memory: Any) -> tuple[int, int | None]:
    page = 65_536
    return memory.limits.min * page, None if memory.limits.max is None else memory.limits.max * page


@pytest.mark.parametrize("which", SAMPLES)
def test_what_wasmtime_takes_is_read_the_same_way(which: str) -> None:
    assert agree(SAMPLES[which])


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(
        st.tuples(
            st.sampled_from(["put", "add", "cut", "copy"]), st.integers(8, 400), st.binary(min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_no_mutation_makes_them_differ(which: str, changes: list[tuple[str, int, bytes]]) -> None:
    data = SAMPLES[which]
    for how, place, extra in changes:
        at = min(place, len(data))
        if how == "put":
            data = data[:at] + extra + data[at + len(extra) :]
        elif how == "add":
            data = data[:at] + extra + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + len(extra) :]
        else:
            data += data[at : at + 10 * len(extra)]
    agree(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.binary(max_size=30)), max_size=6))
def test_no_sections_of_any_bytes_are_another_exception(sections: list[tuple[int, bytes]]) -> None:
    agree(made(*(section(kind, content) for kind, content in sections)))


# -- time and memory -------------------------------------------------------------------------------------------------------

MANY = 1 << 20
HUGE = {
    "functions": made(section(FUNCTION, unsigned(100_000) + b"\0" * 100_000), section(CODE, unsigned(100_000) + b"\2\0\x0b" * 100_000)),
    "locals": made(section(FUNCTION, b"\1\0"), section(CODE, b"\1" + unsigned(4 + 2 * MANY * 4) + unsigned(MANY * 4) + b"\0\x7f" * MANY * 4)),
    "exports": made(section(EXPORT, unsigned(1_000_000) + b"\0\0\0" * 1_000_000)),
    "imports": made(section(IMPORT, unsigned(1_000_000) + b"\0\0\0\0" * 1_000_000)),
    "custom sections": made(*[section(CUSTOM, b"\0")] * 100_000),
    "data": made(section(DATA, unsigned(1_000_000) + b"\1\0" * 1_000_000)),
    "a number that does not end": made(b"\0" + b"\x80" * 8 * MANY),
}  # fmt: skip


@pytest.mark.parametrize("which", HUGE)
def test_no_module_takes_long(which: str) -> None:
    """Each is of a kind that took seconds, or memory without bound, when it was read to its end."""
    began = time.thread_time()
    with contextlib.suppress(NotWasm):
        examine(HUGE[which])
    assert time.thread_time() - began < 1.0


def test_time_grows_as_the_module_does() -> None:
    def took(functions: int) -> float:
        data = made(*bodies(*[b"\1\1\x7f\x0b"] * functions))
        best = 10.0
        for _ in range(3):
            began = time.thread_time()
            assert examine(data).functions == functions
            best = min(best, time.thread_time() - began)
        return best

    assert took(40_000) < 4 * 3 * took(10_000)


# -- the rules -------------------------------------------------------------------------------------------------------------


def importing(*imports: tuple[str, str]) -> bytes:
    lines = " ".join(f'(import "{where}" "{what}" (func))' for where, what in imports)
    return wasmtime.wat2wasm(f"(module {lines})")


def test_an_ordinary_command_is_accepted_with_or_without_an_entry() -> None:
    assert reasons(SAMPLES["command"]) == ()
    assert reasons(SAMPLES["empty"]) == ()


def test_every_function_of_wasi_is_accepted_that_wasmtime_provides_and_no_socket() -> None:
    linker, store = wasmtime.Linker(ENGINE), wasmtime.Store(ENGINE)
    linker.define_wasi()
    for function in acceptance.WASI_FUNCTIONS:
        assert linker.get(store, acceptance.WASI, function) is not None
    assert len(acceptance.WASI_FUNCTIONS) == 46 - 4
    assert reasons(importing(*((acceptance.WASI, one) for one in sorted(acceptance.WASI_FUNCTIONS)))) == ()
    for one in acceptance.SOCKETS:
        assert linker.get(store, acceptance.WASI, one) is not None
        (reason,) = reasons(importing((acceptance.WASI, one)))
        assert one in reason
        assert "no sockets" in reason


@pytest.mark.parametrize(
    ("where", "what", "says"),
    [
        ("wasi_snapshot_preview1", "fd_wrote", "which WASI preview 1 does not have"),
        ("wasi_unstable", "fd_write", "preview 0"),
        ("env", "printf", "imports env.printf, and wasi_snapshot_preview1 and ifabric are all"),
        ("ifabric", "spend", "ifabric has http only"),
        ("", "", "imports ., and"),
    ],
)
def test_an_import_that_nobody_provides_is_named(where: str, what: str, says: str) -> None:
    (reason,) = reasons(importing((where, what)))
    assert says in reason


def test_only_functions_can_be_imported() -> None:
    found = reasons(SAMPLES["imports"])
    for kind in ("table a.t", "memory a.m", "global a.g", "tag a.x"):
        assert any(f"imports the {kind}, and only functions" in reason for reason in found)
    assert any("imports a.f" in reason for reason in found)
    assert reasons(wasmtime.wat2wasm('(module (import "wasi_snapshot_preview1" "fd_write" (memory 1)))')) != ()


def test_ten_imports_are_named_and_the_others_counted() -> None:
    found = reasons(importing(*(("env", f"f{n:02}") for n in range(13))))
    assert len(found) == 11
    assert "env.f09" in found[9]
    assert found[10].startswith("and 3 more imports")


def test_a_long_name_is_shortened() -> None:
    (reason,) = reasons(importing(("env", "x" * 50_000)))
    assert len(reason) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(module (memory 257))", "begins with 16842752 bytes, and 16777216 are allowed"),
        ("(module (memory 1 2 shared))", "shared with threads"),
        ("(module (memory i64 1))", "64-bit addresses"),
        ("(module (memory 1) (memory 1))", "2 memories, and one is allowed"),
        (f"(module {'(table 1 funcref)' * 5})", "5 tables, and 4 are allowed"),
        ("(module (table 20001 funcref))", "begins with 20001 elements, and 20000 are allowed"),
        ("(module (table i64 1 funcref))", "64-bit indexes"),
        ("(module (func $f) (table 2 (ref func) (ref.func $f)))", "has an initialiser"),
        (f"(module {'(func)' * 1001})", "1001 functions, and 1000 are allowed"),
        (f"(module {'(type (func))' * 10_001})", "10001 types, and 10000 are allowed"),
    ],
)
def test_what_is_over_a_limit_is_refused(text: str, says: str) -> None:
    (reason,) = reasons(wasmtime.wat2wasm(text))
    assert says in reason


@pytest.mark.parametrize(
    "text",
    [
        "(module (memory 256 65536))",
        f"(module {'(table 1 funcref)' * 4})",
        "(module (table 20000 90000 funcref))",
        f"(module {'(func)' * 1000})",
        f"(module {'(type (func))' * 10_000})",
        "(module (start $f) (func $f))",
    ],
)
def test_what_is_at_a_limit_is_accepted(text: str) -> None:
    assert reasons(wasmtime.wat2wasm(text)) == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (made(section(GLOBAL, unsigned(100_001) + b"\x7f\0\x0b" * 100_001)), "100001 globals, and 100000"),
        (made(section(ELEMENT, unsigned(100_001) + b"\0" * 300_003)), "100001 element segments, and 100000"),
        (made(section(DATA, unsigned(100_001) + b"\1\0" * 100_001)), "100001 data segments, and 100000"),
        (made(section(EXPORT, unsigned(100_001) + b"\0\0\0" * 100_001)), "100001 exports, and 100000"),
        (made(*bodies(b"\1\xd1\x86\x03\x7f\x0b")), "50001 locals in one function, and 50000"),
        (made(*bodies(unsigned(50_001) + b"\0\x7f" * 50_001)), "50001 locals in one function, and 50000"),
        (made(*bodies(b"\0" * (2 << 20) + b"\x0b")), "2097153 bytes in one function, and 2097152"),
        (made(*bodies(*[unsigned(50_000) + b"\0\x7f" * 50_000] * 45)), "2050000 declarations of locals, and 2000000"),
    ],
)
def test_a_bomb_is_refused_by_its_numbers(data: bytes, says: str) -> None:
    assert any(says in reason for reason in reasons(data))


def test_locals_are_counted_in_the_function_that_has_most() -> None:
    assert reasons(made(*bodies(b"\1\xd0\x86\x03\x7f\x0b", b"\0\x0b"))) == ()
    module = examine(made(*bodies(b"\0\x0b", b"\2\7\x7f\3\x7e\x0b", b"\1\2\x7f\x0b")))
    assert (module.locals_max, module.local_groups) == (10, 3)


def test_lists_are_read_only_as_far_as_a_rule_allows_them_to_be_long() -> None:
    module = examine(HUGE["exports"])
    assert (len(module.exports), module.export_count) == (100_000, 1_000_000)
    module = examine(HUGE["imports"])
    assert (len(module.imports), module.import_count) == (1_000, 1_000_000)


def test_many_imports_are_refused_by_their_number() -> None:
    found = reasons(importing(*(("ifabric", "http") for _ in range(1001))))
    assert found == (
        "it has 1001 imports, and 1000 are allowed",
        "and 1 more imports that are not provided or were not looked at",
    )


# -- the facts -------------------------------------------------------------------------------------------------------------


def test_facts_are_what_inspect_answers() -> None:
    module = examine(SAMPLES["command"])
    reply = facts(module)
    assert (reply.module, reply.size, reply.accepted, reply.why) == (module.id, module.size, True, ())
    assert reply.imports == ("wasi_snapshot_preview1.fd_write", "ifabric.http")
    assert reply.exports == ("memory", "_start")
    assert (reply.functions, reply.tables, reply.memories) == (3, 1, 1)
    assert (reply.memory_min_bytes, reply.memory_max_bytes) == (131_072, 1_048_576)
    assert reply.sections == module.sections
    refused = facts(module, ("it is so",))
    assert (refused.accepted, refused.why) == (False, ("it is so",))


def test_facts_fit_into_a_reply_whatever_the_module_is() -> None:
    long = b"".join(name("x" * 300) + b"\0\0" for _ in range(20_000))
    customs = [custom(f"{n}" + "y" * 200, b"") for n in range(5_000)]
    data = made(section(MEMORY, b"\1\4" + unsigned(1 << 48)), section(EXPORT, unsigned(20_000) + long), *customs)
    reply = facts(examine(data))
    assert len(msgspec.json.encode(reply)) < 200_000
    assert (len(reply.exports), reply.exports[-1]) == (1001, "... and 19000 more")
    assert len(reply.sections) == 101
    assert sum(reply.sections.values()) == sum(examine(data).sections.values())
    assert reply.memory_min_bytes == 2**53 - 1
