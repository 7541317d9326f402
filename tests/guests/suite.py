"""How bombs are thrown: a daemon set up for them, a module put and run, and what must be so after each."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from ifabric.errors import FabricError
from ifabric.wire import chassis as wire
from tests.actors.conftest import CLOCK, World
from tests.guests.bomb import Answer, Bomb
from tests.guests.bombs_modules import FUNCTIONS_MAX, MODULE_MAX_BYTES
from tests.guests.bombs_space import TABLE_ELEMENTS
from tests.guests.build import guest

#: the sizes that the bombs were written for
CONFIG: dict[str, Any] = {
    "runtime": {
        "max_cpu_percent": 100.0,
        "max_execution_time_seconds": 10.0,
        "max_memory_mb": 64,
        "max_tables": 4,
        "max_table_elements": TABLE_ELEMENTS,
        "max_runs_per_session": 64,
    },
    "modules": {"max_bytes": MODULE_MAX_BYTES, "max_functions": FUNCTIONS_MAX, "compile_timeout_seconds": 2.5},
    "sandbox_pool": {"min_size": 2, "max_size": 2},
}
#: beyond the wall clock's limit: a tenth, and what the daemon waits before it kills
GRACE_S = 0.25
#: of a request that has nothing to compute, on a machine that has other work
REPLY_S = 2.0
_names = itertools.count()


async def ask(world: World, verb: str, session: str = "tenant", **body: Any) -> dict[str, Any]:
    return await world.ask(verb, session, component="chassis", timeout_s=30.0, **body)


async def put(world: World, wasm: bytes, session: str = "tenant") -> str:
    """The module's name."""
    kept = await ask(world, "put", session, wasm=base64.b64encode(wasm).decode())
    name: str = kept["module"]
    return name


async def run(world: World, module: str, session: str = "tenant", **request: Any) -> dict[str, Any]:
    return await ask(world, "run", session, module=module, **request)


async def answer(world: World, verb: str, session: str = "tenant", **body: Any) -> dict[str, Any]:
    """Whatever comes back, as one shape: a reply with the code "ok", or a refusal's code, message and facts."""
    try:
        return {"code": "ok", **await ask(world, verb, session, **body)}
    except FabricError as error:
        return {"code": error.code, "message": error.message, **error.facts}


async def says_hello(world: World, times: int = 2) -> None:
    """As many guests at once as there are workers say what they were told to, each its own."""
    module = await put(world, guest("hello"))
    names = [f"n{next(_names)}" for _ in range(times)]
    replies = await asyncio.gather(*(run(world, module, f"good{i}", args=[name]) for i, name in enumerate(names)))
    assert [reply["stdout"] for reply in replies] == [f"hello {name}\n" for name in names]


async def eventually(true: Callable[[], Awaitable[Any]], within_s: float = 5.0) -> Any:
    async with asyncio.timeout(within_s):
        while not (found := await true()):
            await asyncio.sleep(0.01)
    return found


async def pool(world: World) -> wire.Pool:
    """The pool of the daemon that answers; an empty one when none does."""
    came = await answer(world, "runs", "operator")
    empty = {"workers": 0, "idle": 0, "busy": 0, "queued": 0, "max": 0}
    return msgspec.convert(came.get("pool", empty), wire.Pool)


async def is_idle(world: World, workers: int = 2) -> bool:
    """Nobody runs, and as many workers wait as there should be."""
    found = await pool(world)
    return (found.idle, found.busy, found.queued) == (workers, 0, 0)


async def throw(world: World, bomb: Bomb, session: str = "tenant") -> tuple[dict[str, Any], float]:
    """What came back, in the form of an `Answer`: its code and its facts; and how long the run took, in seconds."""
    kept = await answer(world, "put", session, wasm=base64.b64encode(bomb.make()).decode())
    if kept["code"] != "ok":
        return kept, 0.0
    assert not bomb.refused_at_put, f"{bomb.name}: it was put, and should not have been"
    began = CLOCK.monotonic()
    came = await answer(world, "run", session, module=kept["module"], **bomb.request())
    blank = {"stdout": "", "stderr": "", "truncated": False} if came["code"] == "ok" else {}
    return {**blank, **came}, CLOCK.monotonic() - began


def fits(answer: Answer, came: dict[str, Any]) -> bool:
    """Whether what came back is this answer: all of its facts are there, as they are told."""

    def has(found: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict) and isinstance(found, dict):
            return all(has(found.get(key), value) for key, value in wanted.items())
        return bool(found == wanted)

    return came["code"] == answer.code and has(came, answer.facts)


def judge(bomb: Bomb, came: dict[str, Any], took_s: float) -> None:
    """Fails when that is not one of the bomb's answers, or came too late."""
    short = {key: value if len(repr(value)) < 200 else repr(value)[:200] for key, value in came.items()}
    assert any(fits(answer, came) for answer in bomb.answers), f"{bomb.name}: {short}; right were {bomb.answers}"
    output = len(came.get("stdout") or "") + len(came.get("stderr") or "")
    assert output <= bomb.limits()["output_bytes"], f"{bomb.name}: {output} characters came out"
    if bomb.refused_at_put:
        return
    limit_s = bomb.within_s if bomb.within_s is not None else bomb.limits()["wall_s"] * 1.1 + GRACE_S
    assert took_s <= limit_s + REPLY_S, f"{bomb.name}: took {took_s:.3f} s, and {limit_s:.3f} s are allowed"


# -- processes, as the kernel knows them


def stat(pid: int) -> list[str]:
    """The fields of a process after its name: state, parent, ...; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(of: int) -> list[int]:
    """Living processes and zombies that a process is the parent of."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return sorted(pid for pid in pids if stat(pid)[1:2] == [str(of)])


def fork_servers() -> list[int]:
    """Of all daemons in this process."""
    mine = children(os.getpid())
    return [pid for pid in mine if b"chassis.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def workers() -> list[int]:
    """Of all daemons in this process, zombies too."""
    return [pid for server in fork_servers() for pid in children(server)]


def state(pid: int) -> str:
    """R, S, T (stopped), Z (a zombie)...; empty when it is gone."""
    found = stat(pid)
    return found[0] if found else ""


def ticks(pid: int) -> int:
    """Of processor time that it has had."""
    found = stat(pid)
    return int(found[11]) + int(found[12]) if found else 0


def descriptors(pid: int | None = None) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid or os.getpid()}/fd").iterdir()))


async def whole(world: World, count: int = 2) -> bool:
    """As many living workers as there should be, all idle, and no zombie or compiler beside them."""
    return await is_idle(world, count) and len(workers()) == count and "Z" not in map(state, workers())


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
