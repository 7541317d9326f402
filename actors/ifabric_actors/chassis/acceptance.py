"""Which modules are run here, and what is said of one. Pure.

A rule looks at what `wasm.examine` has counted. What only a compiler can tell, it tells, in a process with limits of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ifabric.wire.chassis import InspectReply
from ifabric_actors.chassis.wasm import EXPORTS_READ, IMPORTS_READ, LOCAL_GROUPS_READ, LOCALS_READ, Import, Module

#: what a module may have, whatever is configured
TYPES_MAX = 10_000
IMPORTS_MAX, EXPORTS_MAX = IMPORTS_READ, EXPORTS_READ
GLOBALS_MAX = 100_000
SEGMENTS_MAX = 100_000
LOCALS_MAX, LOCAL_GROUPS_MAX = LOCALS_READ, LOCAL_GROUPS_READ
#: of one function: what compiling it takes grows faster than it does
BODY_MAX_BYTES = 2 << 20

WASI = "wasi_snapshot_preview1"
_AREAS = {
    "args": "get sizes_get",
    "clock": "res_get time_get",
    "environ": "get sizes_get",
    "fd": "advise allocate close datasync fdstat_get fdstat_set_flags fdstat_set_rights filestat_get filestat_set_size"
    " filestat_set_times pread prestat_dir_name prestat_get pwrite read readdir renumber seek sync tell write",
    "path": "create_directory filestat_get filestat_set_times link open readlink remove_directory rename symlink"
    " unlink_file",
    "poll": "oneoff",
    "proc": "exit raise",
    "random": "get",
    "sched": "yield",
}
WASI_FUNCTIONS = frozenset(f"{area}_{name}" for area, names in _AREAS.items() for name in names.split())
SOCKETS = frozenset({"sock_accept", "sock_recv", "sock_send", "sock_shutdown"})
OURS, OUR_FUNCTIONS = "ifabric", frozenset({"http"})

#: names and sections that a reply can carry, characters of a name, and reasons of one kind
SHOWN_MAX, SECTIONS_SHOWN_MAX = 1_000, 100
SHOWN_NAME_MAX = 100
REASONS_MAX = 10
#: what every JSON reader takes
INTEGER_MAX = 2**53 - 1


class Rules(NamedTuple):
    """What the configuration says of modules."""

    max_functions: int
    max_memory_bytes: int
    max_tables: int
    max_table_elements: int


def why_refused(module: Module, rules: Rules) -> tuple[str, ...]:
    """Every reason for which no sandbox here runs it; none: it may be compiled."""
    return (*_too_much_of(module, rules), *_memory(module, rules), *_not_provided(module.imports, module.import_count))


def _too_much_of(module: Module, rules: Rules) -> Iterator[str]:
    for has, most, what in (
        (module.functions, rules.max_functions, "functions"),
        (module.table_count, rules.max_tables, "tables"),
        (module.types, TYPES_MAX, "types"),
        (module.import_count, IMPORTS_MAX, "imports"),
        (module.export_count, EXPORTS_MAX, "exports"),
        (module.globals, GLOBALS_MAX, "globals"),
        (module.elements, SEGMENTS_MAX, "element segments"),
        (module.data, SEGMENTS_MAX, "data segments"),
        (module.body_max_bytes, BODY_MAX_BYTES, "bytes in one function"),
        (module.locals_max, LOCALS_MAX, "locals in one function"),
        (module.local_groups, LOCAL_GROUPS_MAX, "declarations of locals"),
    ):
        if has > most:
            yield f"it has {has} {what}, and {most} are allowed"
    if module.has_initialised_table:
        yield "a table has an initialiser of its own, and no engine here takes that"
    for table in module.tables[:REASONS_MAX]:
        if table.min > rules.max_table_elements:
            yield f"a table begins with {table.min} elements, and {rules.max_table_elements} are allowed"
        if table.is64 or table.shared:
            yield "a table is shared or has 64-bit indexes, and no engine here takes that"


def _memory(module: Module, rules: Rules) -> Iterator[str]:
    if module.memory_count > 1:
        yield f"it has {module.memory_count} memories, and one is allowed"
    for memory in module.memories[:1]:
        if memory.shared:
            yield "its memory is shared with threads, and a guest has one thread"
        if memory.is64:
            yield "its memory has 64-bit addresses, and no engine here takes that"
        if memory.min > rules.max_memory_bytes:
            yield f"its memory begins with {memory.min} bytes, and {rules.max_memory_bytes} are allowed"


def _not_provided(imports: Sequence[Import], count: int) -> Iterator[str]:
    reasons = [reason for one in imports if (reason := _why_not(one))]
    yield from reasons[:REASONS_MAX]
    more = max(0, len(reasons) - REASONS_MAX) + count - len(imports)
    if more > 0:
        yield f"and {more} more imports that are not provided or were not looked at"


def _why_not(one: Import) -> str:
    """Why an import cannot be given to it; "" when it can."""
    if one.kind != "function":
        return f"it imports the {one.kind} {_import(one)}, and only functions are provided"
    if one.module == WASI:
        if one.name in SOCKETS:
            return f"it imports {_import(one)}, and a guest has no sockets: it calls out with {OURS}.http"
        return "" if one.name in WASI_FUNCTIONS else f"it imports {_import(one)}, which WASI preview 1 does not have"
    if one.module == "wasi_unstable":
        return f"it imports {_import(one)}: that is WASI preview 0, and preview 1 is provided; build it anew"
    if one.module == OURS:
        return (
            ""
            if one.name in OUR_FUNCTIONS
            else f"it imports {_import(one)}, and {OURS} has {', '.join(OUR_FUNCTIONS)} only"
        )
    return f"it imports {_import(one)}, and {WASI} and {OURS} are all that is provided"


# -- the facts ----------------------------------------------------------------------------------------------------------


def facts(module: Module, why: Sequence[str] = ()) -> InspectReply:
    """The module as `inspect` describes it, shortened to what a reply can carry."""
    memory = module.memories[0] if module.memories else None
    return InspectReply(
        module=module.id,
        size=module.size,
        imports=imports_shown(module),
        exports=exports_shown(module),
        accepted=not why,
        why=tuple(why),
        functions=module.functions,
        tables=module.table_count,
        memories=module.memory_count,
        memory_min_bytes=min(memory.min, INTEGER_MAX) if memory else 0,
        memory_max_bytes=min(memory.max, INTEGER_MAX) if memory and memory.max is not None else None,
        sections=_sections_shown(module.sections),
    )


def imports_shown(module: Module) -> tuple[str, ...]:
    """As a reply names them."""
    return _shown([_import(one) for one in module.imports[:SHOWN_MAX]], module.import_count)


def exports_shown(module: Module) -> tuple[str, ...]:
    """As a reply names them."""
    return _shown([_short(name) for name, _ in module.exports[:SHOWN_MAX]], module.export_count)


def _shown(names: list[str], count: int) -> tuple[str, ...]:
    return (*names, f"... and {count - len(names)} more") if count > len(names) else tuple(names)


def _sections_shown(sections: dict[str, int]) -> dict[str, int]:
    names = list(sections)
    shown = {name: sections[name] for name in names[:SECTIONS_SHOWN_MAX]}
    rest = names[SECTIONS_SHOWN_MAX:]
    return {**shown, f"... and {len(rest)} more": sum(sections[name] for name in rest)} if rest else shown


def _short(name: str) -> str:
    return name if len(name) <= SHOWN_NAME_MAX else name[: SHOWN_NAME_MAX - 1] + "…"


def _import(one: Import) -> str:
    return f"{_short(one.module)}.{_short(one.name)}"
