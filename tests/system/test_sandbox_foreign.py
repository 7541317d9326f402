"""Programs that other people compiled, with real input: QuickJS and resvg, over real servers and the SDK."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from ifabric.client import Client
from ifabric.errors import LimitReached, ModuleRefused, Trap
from ifabric.sandboxing import ExitStatus
from ifabric.testing.servers import RealServer
from tests.actors.conftest import World
from tests.actors.sdk import client
from tests.conftest import needed
from tests.guests import foreign
from tests.guests.bomb import SOCKETS
from tests.guests.foreign import Foreign

GUESTS = Path(foreign.__file__).parent
README = Path(__file__).parent.parent.parent / "README.md"
MIB = 1 << 20


@pytest.fixture(scope="module")
async def world(etcd: RealServer, nats: RealServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A daemon on real servers; modules of megabytes are uploaded in parts."""
    made = World(etcd.url, nats.url)
    await made.open()
    await made.daemon(
        chassis={"runtime": {"max_cpu_percent": 100.0}, "modules": {"compile_timeout_seconds": 60.0}},
        state_dir=tmp_path_factory.mktemp("foreign"),
    )
    yield made
    await made.close()


@pytest.fixture
async def agent(world: World) -> AsyncIterator[Client]:
    async with client(world) as made:
        yield made


def file_of(wanted: Foreign) -> Path:
    with needed(wanted.package):
        return foreign.fetched(wanted)


async def test_javascript_runs_on_a_foreign_interpreter(agent: Client) -> None:
    quickjs = file_of(foreign.QUICKJS)
    text = README.read_text() + "žluťoučký kůň 馬 🐴"
    source = (GUESTS / "digest.js").read_text()
    done = await agent.run_module(quickjs, "--std", "-e", source, stdin=text, wall_s=20, check=True)
    told = msgspec.json.decode(done.stdout)
    assert told["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert told["counts"] == Counter(re.findall(r"[^\W\d_]+", text))
    assert await agent.put_module(quickjs) == f"sha256:{foreign.QUICKJS.sha256}"


async def test_an_interpreter_is_held_by_the_same_limits(agent: Client) -> None:
    module = await agent.put_module(file_of(foreign.QUICKJS))
    with pytest.raises(LimitReached) as caught:
        await agent.run_module(module, "-e", "for (;;);", wall_s=0.3)
    assert caught.value.facts["which"] == "wall_s"
    with pytest.raises(LimitReached) as caught:
        await agent.run_module(module, "-e", "for (;;) console.log('x'.repeat(1000))", output_bytes=10_000)
    assert caught.value.facts["which"] == "output_bytes"
    greedy = (
        "let all = []; try { for (;;) all.push(new Uint8Array(1 << 20).fill(1)) } catch (e) { console.log(all.length) }"
    )
    done = await agent.run_module(module, "-e", greedy, memory_bytes=32 * MIB, wall_s=20)
    assert 20 <= int(done.text) < 32
    files = "const f = std.open('/etc/passwd', 'r'); console.log(f === null); console.log(os.readdir('/')[1] !== 0)"
    assert (await agent.run_module(module, "--std", "-e", files, wall_s=20)).text == "true\ntrue\n"
    with pytest.raises((LimitReached, Trap)):  # the stack that it keeps in its memory may end before ours
        await agent.run_module(module, "-e", "function f() { return 1 + f() }; f()", wall_s=20)
    with pytest.raises(ExitStatus) as ended:
        await agent.run_module(module, "-e", "throw new Error('on purpose')", check=True)
    assert b"on purpose" in ended.value.result.stderr


async def test_a_picture_is_drawn_by_a_foreign_renderer(agent: Client) -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"><rect width="30" height="40" fill="#ff0000"/>'
        '<rect x="30" width="30" height="40" fill="#0000ff"/></svg>'
    )
    done = await agent.run_module(file_of(foreign.RESVG), "-", "-c", stdin=svg, wall_s=20, check=True)
    width, rows = pixels(done.stdout[done.stdout.index(b"\x89PNG") :])
    assert (width, len(rows)) == (60, 40)
    assert all(row == b"\xff\x00\x00\xff" * 30 + b"\x00\x00\xff\xff" * 30 for row in rows)


def pixels(png: bytes) -> tuple[int, list[bytes]]:
    """Width, and the rows of an RGBA picture. https://www.w3.org/TR/png-3/#9Filters"""
    at, packed, width = 8, b"", 0
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        content = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width = int.from_bytes(content[:4], "big")
            assert content[8:10] == b"\x08\x06", "8 bits, RGBA"
        packed += content if kind == b"IDAT" else b""
        at += 12 + length
    raw, step = zlib.decompress(packed), width * 4
    rows, above = [], bytes(step)
    for start in range(0, len(raw), step + 1):
        row = bytearray(raw[start + 1 : start + 1 + step])
        for i in range(step):
            left = row[i - 4] if i >= 4 else 0
            corner = above[i - 4] if i >= 4 else 0
            row[i] = (row[i] + predicted(raw[start], left, above[i], corner)) & 0xFF
        above = bytes(row)
        rows.append(above)
    return width, rows


def predicted(kind: int, left: int, above: int, corner: int) -> int:
    """What a PNG filter takes a byte to be, from its neighbours."""
    guess = left + above - corner
    paeth = min((left, above, corner), key=lambda one: abs(guess - one))
    return (0, left, above, (left + above) // 2, paeth)[kind]


async def test_a_program_that_wants_sockets_is_refused_by_their_names(agent: Client) -> None:
    with pytest.raises(ModuleRefused) as caught:
        await agent.put_module(file_of(foreign.CPYTHON))
    told = " ".join(caught.value.facts["why"])
    assert all(f"wasi_snapshot_preview1.{name}" in told for name in SOCKETS)
