"""Modules in parts: which are taken, what they make, whose they are, and what is left of those that nobody goes on with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import wasmtime

import ifabric.sandboxing
from ifabric.bus.base import JournalSpec, ObjectSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.bus.serverconf import Identities
from ifabric.client import Client
from ifabric.config_chassis import Chassis
from ifabric.credentials import make
from ifabric.errors import (
    BadRequest,
    Conflict,
    FabricError,
    Forbidden,
    Overloaded,
    StoreFull,
    TooLarge,
    Unavailable,
)
from ifabric.testing.clock import VirtualClock
from ifabric.testing.clusters import nats_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.harness import Daemon as Whole
from ifabric.testing.memory_bus import MemoryBus
from ifabric.testing.servers import RealServer, nats_server
from ifabric.wire import chassis as wire
from ifabric.wire.chassis import UPLOADS_BUCKET, Inspect, Put, Upload
from ifabric.wire.permissions import DAEMON_INBOX, inbox_prefix, permissions
from ifabric_actors.chassis import parts as rules
from ifabric_actors.chassis import uploads as source
from ifabric_actors.chassis.actor import Chassis as ChassisActor
from ifabric_actors.chassis.uploads import Uploads
from ifabric_actors.chassis.wasm import module_id
from tests.actors.conftest import CLOCK, World
from tests.actors.test_cache import Log
from tests.actors.test_client_sandbox import ECHOES, padded
from tests.actors.test_modules import COMMAND, LARGE, MIB, REFUSED, Daemon, b64
from tests.conformance.test_objects import damage
from tests.conftest import needed

MODULE = COMMAND + b"\0\x84\x80\x80\x01\x01n" + os.urandom((1 << 21) + 2)
PART = 600_000
#: the daemons of the test that runs
BOTH: list[Daemon] = []


@pytest.fixture(scope="module")
def engine() -> Iterator[wasmtime.Engine]:
    with wasmtime.Engine() as made:
        yield made


@pytest.fixture
async def two(world: World, tmp_path: Path, engine: wasmtime.Engine) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """Two daemons on one cluster."""
    if world.real:  # other tests share the server
        for bucket in (wire.MODULES_BUCKET, UPLOADS_BUCKET):
            with contextlib.suppress(Exception):
                await world.bus._client.jetstream().delete_stream(f"OBJ_{bucket}")  # type: ignore[attr-defined]
    made = [
        await Daemon(
            await world.connection(), tmp_path / str(n), engine, store=await world.store(), compile_memory_mb=64
        ).start()
        for n in range(2)
    ]
    BOTH[:] = made
    yield made[0], made[1]
    BOTH.clear()
    for one in made:
        await one.modules.stop()
        await one.uploads.stop()


def part(number: int, data: bytes = MODULE, *, size: int = PART, upload: str = "u", **fields: Any) -> Upload:
    """One of the parts that `data` is cut into."""
    count = -(-len(data) // size)
    fields = {"last": True, **fields} if number == count - 1 else fields
    return Upload(upload=upload, part=number, data=b64(data[number * size : (number + 1) * size]), **fields)


async def uploaded(daemon: Daemon, data: bytes = MODULE, session: str = "s", upload: str = "u") -> None:
    for number in range(-(-len(data) // PART)):
        await daemon.uploads.add(part(number, data, upload=upload), session)


async def stored(daemon: Daemon) -> list[str]:
    """The parts whose bytes are kept, as "session/upload/part", when what is being deleted has gone."""
    for one in BOTH:
        await asyncio.gather(*one.uploads._freeing)
    with contextlib.suppress(Unavailable):
        page = await (await daemon.bus.objects(UPLOADS_BUCKET)).page()
        return sorted(info.name.partition("-")[0] for info in page)
    return []


async def refused(call: Any) -> FabricError:
    with pytest.raises(FabricError) as caught:
        async with asyncio.timeout(15):
            await call
    return caught.value


# -- parts ----------------------------------------------------------------------------------------------------------------


async def test_parts_in_any_order_over_two_daemons_make_the_module_and_are_gone_afterwards(
    two: tuple[Daemon, Daemon],
) -> None:
    size = 0
    for n, number in enumerate([3, 0, 2, 1]):
        reply = await two[n % 2].uploads.add(part(number), "s")
        size += len(MODULE[number * PART : (number + 1) * PART])
        assert (reply.upload, reply.part, reply.parts, reply.size, reply.again) == ("u", number, n + 1, size, False)
    assert await stored(two[0]) == ["s/u/0", "s/u/1", "s/u/2", "s/u/3"]
    reply = await two[1].modules.put(Put(upload="u"), "s")
    assert (reply.module, reply.size, reply.again) == (module_id(MODULE), len(MODULE), False)
    assert await two[0].modules.get(reply.module) == MODULE
    assert await stored(two[0]) == []


async def test_a_put_that_is_repeated_is_answered_by_any_daemon_as_the_first(two: tuple[Daemon, Daemon]) -> None:
    """Its first answer was lost, and the parts are gone."""
    await uploaded(two[0])
    await two[0].modules.put(Put(upload="u"), "s")
    for daemon in two:
        reply = await daemon.modules.put(Put(upload="u"), "s")
        assert (reply.module, reply.again) == (module_id(MODULE), True)
        assert (await daemon.modules.inspect(Inspect(upload="u"), "s")).module == module_id(MODULE)
    assert two[1].compiled == []
    late = await refused(two[1].uploads.add(part(1), "s"))
    assert isinstance(late, Conflict) and "put already" in late.message
    assert await stored(two[0]) == []


async def test_two_puts_of_one_upload_at_once_both_get_the_module(two: tuple[Daemon, Daemon]) -> None:
    await uploaded(two[0])
    replies = await asyncio.gather(*(daemon.modules.put(Put(upload="u"), "s") for daemon in two))
    assert {reply.module for reply in replies} == {module_id(MODULE)}
    assert await stored(two[0]) == []


async def test_parts_that_did_not_come_are_named(two: tuple[Daemon, Daemon]) -> None:
    daemon = two[0]
    none = await refused(daemon.modules.put(Put(upload="u"), "s"))
    assert isinstance(none, BadRequest) and "uploaded nothing as u" in none.message
    await daemon.uploads.add(part(2), "s")
    some = await refused(daemon.modules.put(Put(upload="u"), "s"))
    assert "part 0, part 1, the one that is marked as the last did not come" in some.message
    await daemon.uploads.add(part(3), "s")
    some = await refused(two[1].modules.inspect(Inspect(upload="u"), "s"))
    assert (some.facts["missing"], some.facts["last"]) == ([0, 1], 3)
    for number in (0, 1):
        await two[1].uploads.add(part(number), "s")
    assert (await daemon.modules.put(Put(upload="u"), "s")).module == module_id(MODULE)


async def test_a_part_that_comes_twice_is_one_part_and_another_in_its_place_is_a_conflict(
    two: tuple[Daemon, Daemon],
) -> None:
    for daemon in (*two, *two):
        reply = await daemon.uploads.add(part(0), "s")
    assert (reply.parts, reply.size, reply.again) == (1, PART, True)
    for other in (part(0, MODULE[1:]), part(0, b"x")):
        error = await refused(two[1].uploads.add(other, "s"))
        assert isinstance(error, Conflict) and "part 0 of upload u came before, with other data" in error.message
    assert await stored(two[0]) == ["s/u/0"]
    await uploaded(two[0])
    assert (await two[0].modules.put(Put(upload="u"), "s")).module == module_id(MODULE)


async def test_two_daemons_that_get_one_part_at_once_keep_it_once(two: tuple[Daemon, Daemon]) -> None:
    replies = await asyncio.gather(*(daemon.uploads.add(part(1), "s") for daemon in (*two, *two)))
    assert sorted(reply.again for reply in replies) == [False, True, True, True]
    assert await stored(two[0]) == ["s/u/1"]


async def test_two_daemons_that_get_other_data_for_one_place_at_once_take_one_of_them(
    two: tuple[Daemon, Daemon],
) -> None:
    calls = [daemon.uploads.add(part(0, bytes([n]) * 9), "s") for n, daemon in enumerate((*two, *two))]
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(one, Conflict) for one in done) == 3
    assert len(await stored(two[0])) == 1
    (winner,) = (n for n, one in enumerate(done) if isinstance(one, wire.UploadReply))
    assert await two[0].uploads.whole("s", "u") == bytes([winner]) * 9


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "data is empty"),
        ("AGFzbQ", "not base64"),
        ("AGFz\nbQE=", "not base64"),
        ("AA==AA==", "not base64"),
        ("é" * 4, "not base64"),
        ("\0" * 100_000, "not base64"),
        ("-_-_", "not base64"),
        ("====", "not base64"),
    ],
)
async def test_what_is_not_base64_is_said_and_not_kept(two: tuple[Daemon, Daemon], data: str, says: str) -> None:
    error = await refused(two[0].uploads.add(Upload(upload="u", part=0, data=data), "s"))
    assert isinstance(error, BadRequest) and says in error.message
    assert await stored(two[0]) == []


async def test_parts_that_do_not_go_together_are_refused(two: tuple[Daemon, Daemon]) -> None:
    add = two[0].uploads.add
    sums = ["a" * 64, "b" * 64]
    await add(part(2, sha256=sums[0]), "s")
    assert isinstance(await refused(add(part(1, sha256=sums[1]), "s")), Conflict)
    assert "there is a part 2" in (await refused(add(part(1, last=True), "s"))).message
    await add(part(3), "s")
    assert isinstance(await refused(add(part(2, last=True), "s")), Conflict)
    assert "there is a part 4" in (await refused(add(Upload(upload="u", part=4, data="AA=="), "s"))).message
    assert await stored(two[0]) == ["s/u/2", "s/u/3"]


async def test_parts_that_make_another_module_than_was_announced_are_forgotten(two: tuple[Daemon, Daemon]) -> None:
    await two[0].uploads.add(part(0, COMMAND, sha256="a" * 64), "s")
    error = await refused(two[1].modules.put(Put(upload="u"), "s"))
    assert isinstance(error, BadRequest) and "make another module than was announced, sha256:aaa" in error.message
    assert await stored(two[0]) == [] and two[1].compiled == []
    await two[0].uploads.add(part(0, COMMAND, sha256=module_id(COMMAND).removeprefix("sha256:")), "s")
    assert (await two[1].modules.put(Put(upload="u"), "s")).module == module_id(COMMAND)


# -- whose they are -------------------------------------------------------------------------------------------------------


async def test_an_upload_of_another_session_is_none(two: tuple[Daemon, Daemon]) -> None:
    await uploaded(two[0], MODULE, "alice")
    for message in (Put(upload="u"), Put(upload="alice/u")):
        error = await refused(two[0].modules.put(message, "bob"))
        assert isinstance(error, BadRequest) and "uploaded nothing" in error.message
    await uploaded(two[0], LARGE, "bob")  # under the same name
    assert (await two[1].modules.put(Put(upload="u"), "bob")).module == module_id(LARGE)
    assert (await two[1].modules.put(Put(upload="u"), "alice")).module == module_id(MODULE)


# -- limits ---------------------------------------------------------------------------------------------------------------


async def test_a_module_over_the_limit_is_refused_at_the_part_that_is_over_it(two: tuple[Daemon, Daemon]) -> None:
    """8 MiB are allowed here."""
    for number in range(8):
        await two[number % 2].uploads.add(Upload(upload="u", part=number, data=b64(bytes(MIB))), "s")
    error = await refused(two[0].uploads.add(Upload(upload="u", part=8, data="AA=="), "s"))
    assert isinstance(error, TooLarge)
    assert (error.facts["size"], error.facts["max"]) == (8 * MIB + 1, 8 * MIB)
    alone = await refused(two[0].uploads.add(Upload(upload="v", part=0, data="!" * 12 * MIB), "s"))
    assert isinstance(alone, TooLarge) and "part 0 alone" in alone.message
    assert len(await stored(two[0])) == 8


async def test_a_session_has_room_for_one_module_and_what_is_idle_gives_way(two: tuple[Daemon, Daemon]) -> None:
    one, other = two
    await one.uploads.add(Upload(upload="a", part=0, data=b64(bytes(6 * MIB))), "s")
    await one.uploads.add(Upload(upload="a", part=0, data="AA=="), "t")
    second = Upload(upload="b", part=0, data=b64(bytes(3 * MIB)))
    error = await refused(other.uploads.add(second, "s"))
    assert isinstance(error, Overloaded) and error.retryable and error.facts["max_bytes"] == 8 * MIB
    assert await stored(one) == ["s/a/0", "t/a/0"]
    other.clock.more_ms = rules.GIVES_WAY_MS + 1000
    await other.uploads.add(second, "s")
    assert await stored(one) == ["s/b/0", "t/a/0"]
    assert isinstance(await refused(one.modules.put(Put(upload="a"), "s")), BadRequest)


async def test_a_session_uploads_a_few_modules_at_once_and_no_more(two: tuple[Daemon, Daemon]) -> None:
    def begin(n: int) -> Any:
        return two[n % 2].uploads.add(Upload(upload=f"u{n}", part=0, data="AA=="), "s")

    done = await asyncio.gather(*map(begin, range(8)), return_exceptions=True)
    assert sum(isinstance(one, Overloaded) for one in done) == 8 - rules.OPEN_MAX
    assert len(await stored(two[0])) == rules.OPEN_MAX


async def test_what_one_session_has_in_hand_at_once_is_limited(two: tuple[Daemon, Daemon]) -> None:
    daemon = two[0]
    daemon.gate.clear()
    for name in "abc":
        await daemon.uploads.add(part(0, COMMAND + name.encode() * 0, upload=name), "s")
    await daemon.uploads.add(part(0, COMMAND), "t")
    putting = [asyncio.ensure_future(daemon.modules.put(Put(upload=name), "s")) for name in "ab"]
    async with asyncio.timeout(10):
        while daemon.uploads._in_hand["s", "whole"] < 2:
            await asyncio.sleep(0.001)
    assert isinstance(await refused(daemon.modules.put(Put(upload="c"), "s")), Overloaded)
    assert isinstance(await refused(daemon.modules.inspect(Inspect(upload="c"), "s")), Overloaded)
    other = asyncio.ensure_future(daemon.modules.put(Put(upload="u"), "t"))
    daemon.gate.set()
    await asyncio.gather(*putting, other)
    parts = [daemon.uploads.add(Upload(upload="d", part=n, data="AA=="), "s") for n in range(40)]
    done = await asyncio.gather(*parts, return_exceptions=True)
    assert sum(isinstance(one, Overloaded) for one in done) == 40 - source.PARTS_AT_ONCE
    assert daemon.uploads._in_hand == {}, "nothing is left behind"


async def test_a_full_store_says_so_and_has_room_again_when_a_module_is_made(
    world: World, tmp_path: Path, engine: wasmtime.Engine
) -> None:
    """It has room for eight modules of the largest size."""
    if world.real:
        with contextlib.suppress(Exception):
            await world.bus._client.jetstream().delete_stream(f"OBJ_{UPLOADS_BUCKET}")  # type: ignore[attr-defined]
    daemon = await Daemon(world.bus, tmp_path, engine, store=await world.store(), max_bytes=200_000).start()
    small = COMMAND + b"\0\x84\x80\x80\x00\x01n\0\0"
    filler = Upload(upload="f", part=0, data=b64(bytes(190_000)), last=True)
    await daemon.uploads.add(part(0, small), "s")
    for n in range(7):
        await daemon.uploads.add(filler, f"t{n}")
    for n in range(7, 9):
        done = await asyncio.gather(daemon.uploads.add(filler, f"t{n}"), return_exceptions=True)
    assert isinstance(done[0], StoreFull) and done[0].retryable and UPLOADS_BUCKET in done[0].message
    assert isinstance(await refused(daemon.modules.put(Put(upload="f"), "t8")), BadRequest), "nothing was named"
    await refused(daemon.modules.put(Put(upload="f"), "t1"))  # it is no module, and so it goes
    await asyncio.gather(*daemon.uploads._freeing)
    assert not (await daemon.uploads.add(filler, "t8")).again
    assert (await daemon.modules.put(Put(upload="u"), "s")).module == module_id(small)
    await daemon.modules.stop()


# -- what fails ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [REFUSED, b"no module"])
async def test_an_upload_that_is_refused_is_forgotten(two: tuple[Daemon, Daemon], data: bytes) -> None:
    await uploaded(two[0], data)
    assert not isinstance(await refused(two[1].modules.put(Put(upload="u"), "s")), Unavailable)
    assert await stored(two[0]) == []
    assert "uploaded nothing" in (await refused(two[0].modules.put(Put(upload="u"), "s"))).message
    await uploaded(two[0], REFUSED)
    assert not (await two[1].modules.inspect(Inspect(upload="u"), "s")).accepted
    assert await stored(two[0]) == []


async def test_an_upload_stays_when_its_put_may_be_tried_again(two: tuple[Daemon, Daemon]) -> None:
    await uploaded(two[0])
    two[0].fails = Unavailable("no worker could be started", what="chassis")
    assert isinstance(await refused(two[0].modules.put(Put(upload="u"), "s")), Unavailable)
    assert (await two[1].modules.put(Put(upload="u"), "s")).module == module_id(MODULE)


async def test_a_part_whose_bytes_were_lost_is_named_and_can_be_sent_again(two: tuple[Daemon, Daemon]) -> None:
    await uploaded(two[0])
    objects = await two[0].bus.objects(UPLOADS_BUCKET)
    names = {info.name.partition("-")[0]: info.name for info in await objects.page()}
    await objects.delete(names["s/u/1"])
    await damage(two[0].bus, UPLOADS_BUCKET, names["s/u/2"])
    error = await refused(two[1].modules.put(Put(upload="u"), "s"))
    assert isinstance(error, BadRequest) and error.facts["missing"] == [1, 2]
    for number in (1, 2):
        assert not (await two[0].uploads.add(part(number), "s")).again
    assert (await two[1].modules.put(Put(upload="u"), "s")).module == module_id(MODULE)


async def test_a_daemon_that_dies_before_it_has_named_a_part_leaves_what_is_swept(two: tuple[Daemon, Daemon]) -> None:
    one, other = two
    kept = asyncio.Event()
    real = one.uploads._change

    async def dies(*args: Any) -> Any:
        kept.set()
        await asyncio.Event().wait()

    one.uploads._change = dies  # type: ignore[method-assign]
    adding = asyncio.ensure_future(one.uploads.add(part(0), "s"))
    await kept.wait()
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    one.uploads._change = real  # type: ignore[method-assign]
    assert await stored(other) == ["s/u/0"]
    assert "uploaded nothing" in (await refused(other.modules.put(Put(upload="u"), "s"))).message
    await uploaded(other)
    assert await stored(other) == ["s/u/0", "s/u/0", "s/u/1", "s/u/2", "s/u/3"]
    assert (await other.modules.put(Put(upload="u"), "s")).module == module_id(MODULE)
    assert await stored(other) == ["s/u/0"]
    assert await other.uploads.sweep_once() == 0
    other.clock.more_ms = rules.IDLE_MS + 60_000
    assert await other.uploads.sweep_once() == 1
    assert await stored(other) == []


# -- what nobody goes on with -------------------------------------------------------------------------------------------------


async def test_an_upload_that_nobody_goes_on_with_is_deleted_and_one_that_is_on_is_not(
    two: tuple[Daemon, Daemon],
) -> None:
    one, other = two
    await one.uploads.add(part(0), "idle")
    await one.uploads.add(part(0), "slow")
    await uploaded(one, COMMAND, "kept")
    await one.modules.put(Put(upload="u"), "kept")
    assert await stored(one) == ["idle/u/0", "slow/u/0"]
    for daemon in two:
        daemon.clock.more_ms = rules.IDLE_MS - 60_000
    await one.uploads.add(part(1), "slow")
    assert await other.uploads.sweep_once() == 0
    for daemon in two:
        daemon.clock.more_ms = rules.IDLE_MS + 60_000
    assert await other.uploads.sweep_once() == 1
    assert await stored(one) == ["slow/u/0", "slow/u/1"]
    assert "did not go on with it" in (await refused(one.modules.put(Put(upload="u"), "idle"))).message
    await one.uploads.add(part(2), "slow")
    await one.uploads.add(part(3), "slow")
    assert (await other.modules.put(Put(upload="u"), "slow")).module == module_id(MODULE)
    assert (await other.modules.put(Put(upload="u"), "kept")).again, "which is remembered for an hour"


async def test_only_so_many_uploads_that_were_kept_are_remembered(two: tuple[Daemon, Daemon]) -> None:
    daemon = two[0]
    for n in range(rules.KEPT_MAX + 3):
        daemon.clock.more_ms += 10
        await daemon.uploads.add(part(0, COMMAND, upload=f"u{n}"), "s")
        await daemon.modules.put(Put(upload=f"u{n}"), "s")
    assert "uploaded nothing" in (await refused(daemon.modules.put(Put(upload="u0"), "s"))).message
    assert (await daemon.modules.put(Put(upload=f"u{rules.KEPT_MAX + 2}"), "s")).again
    record, _ = await daemon.uploads._read("s")
    assert len(record.uploads) <= rules.KEPT_MAX + 1


@pytest.mark.parametrize("world", ["memory"], indirect=True)  # NATS has a clock of its own
async def test_sweeping_goes_on_whatever_happens(world: World) -> None:
    clock, bus = VirtualClock(), MemoryBus(world.hub)
    await bus.connect()
    log = Log()
    uploads = Uploads(bus, await world.store(), clock, Chassis(), log)
    await uploads.add(part(0), "s")
    world.hub.buckets[UPLOADS_BUCKET].clock = clock
    await uploads.add(part(1), "s")
    sweeping = asyncio.ensure_future(uploads.sweep())
    bus.disconnect()
    await clock.advance(source.SWEEP_S)
    assert any("another time" in event for _, event, _ in log.said)
    bus.disconnect(connected=True)
    await clock.advance(2 * source.SWEEP_S)
    assert not any(info.name.startswith("s/u/1") for info in await (await bus.objects(UPLOADS_BUCKET)).page())
    assert not sweeping.done()
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    await uploads.stop()
    await bus.close()


# -- over the wire ----------------------------------------------------------------------------------------------------------------


async def test_the_session_is_the_subjects_and_what_is_no_request_is_refused(world: World) -> None:
    await world.daemon(chassis={})
    module = padded(ECHOES, 1000)
    say: dict[str, Any] = {"component": "chassis", "timeout_s": 30.0}
    first = await world.ask("upload", "alice", upload="u", part=0, data=b64(module[:500]), request_id="r", **say)
    assert first == {"upload": "u", "part": 0, "parts": 1, "size": 500}
    again = await world.ask("upload", "alice", upload="u", part=0, data=b64(module[:500]), request_id="r", **say)
    assert again == {**first, "again": True}
    await world.ask("upload", "alice", upload="u", part=1, data=b64(module[500:]), last=True, **say)
    assert isinstance(await world.refusal("put", "bob", upload="u", **say), BadRequest)
    assert (await world.ask("inspect", "alice", upload="u", **say))["accepted"]
    for fields in (
        {"upload": "a/b"}, {"upload": "uploads/x"}, {"upload": "u\n"}, {"upload": ""}, {"part": -1}, {"part": 1024},
        {"part": 0.5}, {"data": None}, {"sha256": "A" * 64}, {"upload": "../bob/u"},
    ):  # fmt: skip
        body = {"upload": "u", "part": 0, "data": "AA==", **fields}
        assert isinstance(await world.refusal("upload", "alice", **body, **say), BadRequest)


@pytest.mark.slow  # starts two daemons as processes, and waits for an answer that does not come
@pytest.mark.parametrize("world", ["real"], indirect=True)
async def test_an_upload_survives_the_daemon_that_takes_it(
    world: World, etcd: RealServer, nats: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ifabric.sandboxing, "PART_S", 2.0)
    config = {"chassis": {"sandbox_pool": {"min_size": 0}}}
    daemons = [RealDaemon(tmp_path / str(n), [etcd.url], [nats.url], config) for n in range(2)]
    await asyncio.gather(*(daemon.start() for daemon in daemons))
    victim = daemons[0]
    module = padded(ECHOES, 12_000_000)
    dead: list[int] = []

    def come(there: int, of: int) -> None:
        if there > of // 4 and not dead:
            assert victim._process is not None
            dead.append(there)
            os.kill(victim._process.pid, signal.SIGKILL)

    try:
        async with asyncio.timeout(60), Client.connect(nats.url, session="me", timeout_s=1.0) as c:
            assert await c.put_module(module, progress=come) == module_id(module)
            assert dead
            assert (await c.run_module(module_id(module), stdin="there")).text == "there"
    finally:
        await asyncio.gather(*(daemon.close() for daemon in daemons))


async def test_an_agent_that_may_use_nothing_but_its_own_verbs_uploads_and_is_told_what_it_may_not(
    etcd: RealServer,
) -> None:
    daemon, agent, issuer, system = (make(kind=kind) for kind in ("user", "user", "account", "user"))
    may = permissions("agent", "alice", ("coordinator", "governor", "chassis"))
    identities = Identities(
        issuer=issuer.public_key,
        daemon=daemon.public_key,
        system=system.public_key,
        static={agent.public_key: may},
    )
    with needed("nats-server"):
        serving = nats_cluster(1, identities=identities)
        members = await serving.__aenter__()
    made = World(etcd.url, members.urls[0])
    try:
        for seed, prefix in ((daemon.seed, DAEMON_INBOX), (agent.seed, inbox_prefix("alice"))):
            bus = Nats(NatsSettings(servers=tuple(members.urls), nkey_seed=seed, inbox_prefix=prefix), CLOCK)
            await bus.connect()
            made._closing.append(bus)
        theirs, mine = made._closing
        store = await made.store()
        whole = Whole([ChassisActor], store, theirs, chassis={})
        made.daemons.append(await whole.start())
        c = Client(mine, CLOCK, session="alice", where="the test")
        module = padded(ECHOES, 1_500_000)
        assert await c.put_module(module) == module_id(module)
        assert (await c.run_module(module_id(module), stdin="mine")).text == "mine"
        async with asyncio.timeout(4):
            with pytest.raises(Forbidden, match="may not use the stream IF_EVENTS"):
                await c.journal()
            with pytest.raises(Forbidden, match="an agent hears the events"):
                await anext(c.events(after_seq=0))
            with pytest.raises(Forbidden, match="IF_UPLOADS"):
                await mine.objects(UPLOADS_BUCKET)
    finally:
        await made.close()
        await serving.__aexit__(None, None, None)


async def test_a_stream_that_takes_most_of_the_room_is_opened_again_and_again() -> None:
    """JetStream reserves once more what it is asked to add, and refuses when that is not free: 8 GiB are."""
    gib = 1 << 30
    with needed("nats-server"):
        serving = nats_server()
        server = await serving.__aenter__()
    try:
        bus = Nats(NatsSettings(servers=(server.url,)), CLOCK)
        await bus.connect()
        for _ in range(3):
            await (await bus.objects(ObjectSpec("X", 3 * gib))).put("a", b"b")
            await bus.journal(JournalSpec("J", ("j.>",), 60, 3 * gib))
        await bus.objects(ObjectSpec("X", 4 * gib))
        info = await bus._client.jetstream().stream_info("OBJ_X")
        assert info.config.max_bytes == 4 * gib, "and brought up to date"
        await bus.close()
    finally:
        await serving.__aexit__(None, None, None)
