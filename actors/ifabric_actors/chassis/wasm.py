"""What is in a WebAssembly module. Pure: bytes in, facts out; nothing is compiled.

Read are the sections that say what a module needs and has: imports, exports, tables, memories, how many there are of
everything else, and the locals that each function declares. Instructions, initialisers and data are passed over: the
compiler validates them, in a process of its own. So what is accepted here may still be no valid module, and what is
refused here is none.

**The bytes are hostile.** Nothing is read beyond the end of its section, nothing is as large as a number in the file
says, there is no recursion, and the time is linear: a count that cannot fit into the bytes that are left is an error at
once, and lists are read only as far as any rule allows them to be long.

Numbers of sections, kinds and types are those of the WebAssembly core specification, 3.0, chapter 5 (binary format).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ifabric.errors import NotWasm
from ifabric_actors.chassis.binary import Limits, Reader

MAGIC = b"\0asm"
CORE, COMPONENT = b"\x01\0\0\0", b"\x0d\0\x01\0"
PAGE_BYTES = 65_536
SECTIONS_MAX = 100_000
#: characters of a custom section's name that are kept
CUSTOM_NAME_MAX = 100

#: how far lists are read: longer ones are refused by their number
IMPORTS_READ, EXPORTS_READ = 1_000, 100_000
TABLES_READ, MEMORIES_READ = 100, 100
#: locals of one function, and "so many of this type" in all functions together
LOCALS_READ, LOCAL_GROUPS_READ = 50_000, 2_000_000

SECTIONS = (
    "custom", "type", "import", "function", "table", "memory", "global", "export", "start", "element", "code", "data",
    "data_count", "tag",
)  # fmt: skip
#: where each may stand; a custom section anywhere
ORDER = ("type", "import", "function", "table", "memory", "tag", "global", "export", "start", "element", "data_count",
         "code", "data")  # fmt: skip
#: stands before a table that has an initialiser of its own
INITIALISED = 0x40
#: in place of a kind: several imports of one module, with a type each or all of one (the compact imports proposal)
EACH, ALIKE = 0x7F, 0x7E


class Import(NamedTuple):
    """What a module wants from outside."""

    module: str
    name: str
    kind: str


@dataclass
class Module:
    """A module as its sections describe it."""

    #: "sha256:..."
    id: str
    size: int
    types: int = 0
    #: the first `IMPORTS_READ` of them, and how many there are
    imports: list[Import] = field(default_factory=list)
    import_count: int = 0
    #: the first `EXPORTS_READ` of them (name, kind), and how many there are
    exports: list[tuple[str, str]] = field(default_factory=list)
    export_count: int = 0
    #: what it has itself, without what it imports; of tables and memories the first ones, and how many there are
    functions: int = 0
    tables: list[Limits] = field(default_factory=list)
    table_count: int = 0
    has_initialised_table: bool = False
    memories: list[Limits] = field(default_factory=list)
    memory_count: int = 0
    tags: int = 0
    globals: int = 0
    elements: int = 0
    data: int = 0
    has_start: bool = False
    #: of the function that is largest in that respect
    body_max_bytes: int = 0
    locals_max: int = 0
    local_groups: int = 0
    #: bytes of each section; custom ones of one name together
    sections: dict[str, int] = field(default_factory=dict)


def module_id(data: bytes) -> str:
    """The name of a module: its digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def examine(data: bytes) -> Module:
    """What is in a module. Raises `NotWasm` with the offset at which it is not one, and why."""
    if data[:4] != MAGIC:
        raise NotWasm(f"a module begins with \\0asm, and this {_what_it_is(data)}; nothing was kept", offset=0)
    version = data[4:8]
    if version == COMPONENT or (len(version) == 4 and version[2:] == COMPONENT[2:]):
        raise NotWasm(
            "this is a component, and not a core module; build it for wasm32-wasip1; nothing was kept", offset=4
        )
    if version != CORE:
        raise NotWasm(f"byte 4: version 1 is known, and this is {version.hex(' ') or 'cut off'}", offset=4)
    reader = Reader(data, 8, len(data))
    module = Module(module_id(data), len(data))
    declared, last, count = 0, 0, 0
    while reader.at < reader.end:
        count += 1
        began = reader.at
        number, size = reader.byte("a section"), reader.u32("the size of a section")
        if count > SECTIONS_MAX:
            raise reader.wrong(f"more than {SECTIONS_MAX} sections", began)
        if number >= len(SECTIONS):
            raise reader.wrong(f"there is no section {number}", began)
        section = reader.part(size, f"the {SECTIONS[number]} section")
        if number == 0:
            name = f"custom:{section.name('the name of a custom section')[:CUSTOM_NAME_MAX]}"
            module.sections[name] = module.sections.get(name, 0) + size
            continue
        name = SECTIONS[number]
        place = ORDER.index(name) + 1
        if place <= last:
            raise reader.wrong(f"the {name} section is there twice, or after one that it has to precede", began)
        last = place
        module.sections[name] = size
        if name == "function":
            declared = section.count("functions", 1)
        elif name != "data_count":
            _READ[name](section, module)
    if declared != module.functions:
        raise NotWasm(
            f"{declared} functions are declared, and {module.functions} have a body; nothing was kept",
            offset=len(data),
        )
    return module


def _what_it_is(data: bytes) -> str:
    if not data:
        return "is empty"
    if data.startswith(b"\x7fELF"):
        return "is compiled for one kind of machine (.cwasm?): put the .wasm that it was made from"
    if data.lstrip()[:1] == b"(":
        return "seems to be WebAssembly text: make a .wasm of it first"
    return f"begins with {data[:4].hex(' ')}"


# -- the sections -------------------------------------------------------------------------------------------------------


def _imports(section: Reader, module: Module) -> None:
    entries = module.import_count = section.count("imports", 4)
    for _ in range(entries):
        if len(module.imports) == IMPORTS_READ:
            return
        where, name = section.name("an import's module"), section.name("an import's name")
        form = section.peek()
        if name or form not in (EACH, ALIKE):
            module.imports.append(Import(where, name, _imported(section)))
            continue
        section.byte("the form of imports")
        kind = _imported(section) if form == ALIKE else ""
        many = section.count("imports", 1)
        module.import_count += many - 1
        for _ in range(many):
            if len(module.imports) == IMPORTS_READ:
                return
            name = section.name("an import's name")
            module.imports.append(Import(where, name, kind or _imported(section)))
    section.over("import")


def _imported(section: Reader) -> str:
    """The kind of an import; its type is passed over."""
    kind = section.kind("an import")
    if kind == "function":
        section.u32("a type's index")
    elif kind == "table":
        section.type()
        section.limits(1)
    elif kind == "memory":
        _memory(section)
    elif kind == "global":
        section.type()
        section.byte("mutability")
    else:
        section.byte("a tag's attribute")
        section.u32("a type's index")
    return kind


def _exports(section: Reader, module: Module) -> None:
    module.export_count = section.count("exports", 3)
    for _ in range(min(module.export_count, EXPORTS_READ)):
        name = section.name("an export's name")
        module.exports.append((name, section.kind("an export")))
        section.u32("an export's index")
    if module.export_count <= EXPORTS_READ:
        section.over("export")


def _memories(section: Reader, module: Module) -> None:
    module.memory_count = section.count("memories", 2)
    for _ in range(min(module.memory_count, MEMORIES_READ)):
        module.memories.append(_memory(section))
    if module.memory_count <= MEMORIES_READ:
        section.over("memory")


def _memory(section: Reader) -> Limits:
    limits = section.limits(PAGE_BYTES)
    most = 1 << (64 if limits.is64 else 32)
    if limits.min > most or (limits.max or 0) > most:
        raise section.wrong(f"a memory of more than {most} bytes")
    return limits


def _tables(section: Reader, module: Module) -> None:
    module.table_count = section.count("tables", 2)
    for _ in range(min(module.table_count, TABLES_READ)):
        if section.peek() == INITIALISED:
            module.has_initialised_table = True
            return  # an expression follows the limits, and only a compiler knows where it ends
        section.type()
        module.tables.append(section.limits(1))
    if module.table_count <= TABLES_READ:
        section.over("table")


def _start(section: Reader, module: Module) -> None:
    module.has_start = True
    section.u32("the start function")
    section.over("start")


def _code(section: Reader, module: Module) -> None:
    module.functions = section.count("bodies", 3)
    for _ in range(module.functions):
        size = section.u32("the size of a body")
        after = section.at + size
        if after > section.end:
            raise section.wrong(f"a body of {size} bytes, and the section ends before it does")
        module.body_max_bytes = max(module.body_max_bytes, size)
        if module.local_groups <= LOCAL_GROUPS_READ:
            _locals(section, module, after)
        section.at = after
    section.over("code")


def _locals(section: Reader, module: Module, after: int) -> None:
    """The declarations at the beginning of a body: pairs of how many and of which type."""
    groups = section.u32("how many groups of locals")
    if groups * 2 > after - section.at:
        raise section.wrong(f"{groups} groups of locals do not fit into the body")
    module.local_groups += groups
    total = 0
    for _ in range(min(groups, LOCALS_READ)):
        total += section.u32("how many locals")
        section.type()
    if section.at > after:
        raise section.wrong("locals that do not end with their body")
    module.locals_max = max(module.locals_max, total, groups if groups > LOCALS_READ else 0)


def _counted(field_name: str, what: str, least: int) -> Callable[[Reader, Module], None]:
    """A section of which only the number of its items matters; each has at least so many bytes."""

    def read(section: Reader, module: Module) -> None:
        setattr(module, field_name, section.count(what, least))

    return read


_READ: dict[str, Callable[[Reader, Module], None]] = {
    "type": _counted("types", "types", 2),
    "import": _imports,
    "table": _tables,
    "memory": _memories,
    "tag": _counted("tags", "tags", 2),
    "global": _counted("globals", "globals", 3),
    "export": _exports,
    "start": _start,
    "element": _counted("elements", "element segments", 2),
    "code": _code,
    "data": _counted("data", "data segments", 2),
}
