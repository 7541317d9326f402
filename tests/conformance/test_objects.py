"""One suite over the twin and the real object store: what `bus/base.py` says of `Objects`, sentence by sentence."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors
import pytest

from ifabric.bus import bucket as streams
from ifabric.bus.base import Bus, ObjectDamaged, Objects, ObjectSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.bus.objects import CHUNK, JetStreamObjects
from ifabric.clock import SystemClock
from ifabric.errors import BadRequest, StoreFull, TooLarge, Unavailable
from ifabric.testing.memory_bus import MemoryBus
from ifabric.testing.proxy import Proxy
from ifabric.testing.servers import RealServer, nats_server

CLOCK = SystemClock()
Pair = tuple[Bus, Bus]
MIB = 1 << 20
PATIENCE_S = 10.0


def spec(max_bytes: int = 16 * MIB) -> ObjectSpec:
    """A bucket that no other test has."""
    return ObjectSpec(f"T{CLOCK.token()}", max_bytes)


async def damage(bus: Bus, bucket: str, name: str) -> None:
    """Makes one byte of an object another."""
    if isinstance(bus, MemoryBus):
        bus.hub.buckets[bucket].damage(name)
        return
    about = await naming(bus, bucket, name)
    chunks = f"$O.{bucket}.C.{about['nuid']}"
    data = await (await bus.objects(bucket)).get(name)
    assert data
    context = bus._client.jetstream()  # type: ignore[attr-defined]
    await context.purge_stream(f"OBJ_{bucket}", subject=chunks)
    await context.publish(chunks, bytes([data[0] ^ 1]) + data[1:])


async def interrupted(bus: Bus, bucket: str, name: str, data: bytes, at: int = 1) -> None:
    """A put of which the connection breaks off before chunk number `at` is acknowledged."""
    objects = await bus.objects(bucket)
    if isinstance(bus, MemoryBus):
        bus.hub.buckets[bucket].interrupt_puts = 1
    else:
        break_off(objects, at)
    with pytest.raises(Unavailable):
        await objects.put(name, data)


def break_off(objects: Any, at: int) -> None:
    """From publication `at` on they are stored, and neither that nor anything else is heard of."""
    real, count = objects._bucket.publish, 0

    async def publish(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise nats.errors.ConnectionClosedError
        await real(*args)
        if count == at:
            raise nats.errors.TimeoutError

    async def purge(nuid: str) -> None:
        raise nats.errors.ConnectionClosedError

    objects._bucket.publish, objects._bucket.purge = publish, purge


async def stored_messages(bus: Any, bucket: str) -> int:
    return int((await bus._client.jetstream().stream_info(f"OBJ_{bucket}")).state.messages)


async def naming(bus: Any, bucket: str, name: str) -> dict[str, Any]:
    """The message about an object, as it is stored."""
    subject = f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"
    found: dict[str, Any] = json.loads((await bus._client.jetstream().get_last_msg(f"OBJ_{bucket}", subject)).data)
    return found


# -- both ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, MIB * 2 + 7])
async def test_what_was_put_is_read_whole(buses: Pair, size: int) -> None:
    one, two = buses
    made = spec()
    before = CLOCK.wall_ms()
    data = os.urandom(size)
    await (await one.objects(made)).put("a/b é", data, "what it is")
    other = await two.objects(made.name)
    assert await other.get("a/b é") == data
    info = await other.info("a/b é")
    assert info is not None
    assert (info.name, info.size, info.description) == ("a/b é", size, "what it is")
    assert before - 1000 <= info.modified_ms <= CLOCK.wall_ms() + 1000


async def test_a_put_takes_the_place_of_what_was_there_and_frees_its_room(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec(4 * MIB))
    for n in range(10):
        await objects.put("a", bytes([n]) * MIB)
    assert await objects.get("a") == bytes([9]) * MIB
    assert [info.name for info in await objects.page()] == ["a"]


async def test_what_is_not_there_is_none_and_nothing_to_delete(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    assert await objects.get("a") is None
    assert await objects.info("a") is None
    assert await objects.page() == []
    assert await objects.delete("a") is False
    await objects.put("a", b"x" * CHUNK)
    assert await objects.delete("a") is True
    assert await objects.get("a") is None
    assert await objects.page() == []
    assert await objects.delete("a") is False
    await objects.put("a", b"y")
    assert await objects.get("a") == b"y"


async def test_a_page_is_in_the_order_of_names_after_one_with_a_prefix(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    for n in (3, 1, 4, 2, 5):
        await objects.put(f"x/{n}", b"x" * n)
    await objects.put("y/1", b"")

    def brief(found: Any) -> list[tuple[str, int]]:
        return [(info.name, info.size) for info in found]

    assert brief(await objects.page()) == [("x/1", 1), ("x/2", 2), ("x/3", 3), ("x/4", 4), ("x/5", 5), ("y/1", 0)]
    assert brief(await objects.page(prefix="x/", after="x/2", limit=2)) == [("x/3", 3), ("x/4", 4)]
    assert brief(await objects.page(prefix="y/")) == [("y/1", 0)]
    assert brief(await objects.page(after="y/1")) == []


async def test_more_objects_than_are_asked_about_at_once_are_all_listed(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    count = streams.WINDOW * 2 + 3
    await asyncio.gather(*(objects.put(f"{n:04}", b"x") for n in range(count)))
    assert [info.name for info in await objects.page()] == [f"{n:04}" for n in range(count)]
    assert len(await objects.page(limit=streams.WINDOW + 1)) == streams.WINDOW + 1
    assert await objects.sweep(CLOCK.wall_ms() + 60_000) == 0
    for n in (0, streams.WINDOW, count - 1):
        assert await objects.get(f"{n:04}") == b"x"


async def test_a_full_bucket_says_so_and_keeps_what_it_has(buses: Pair) -> None:
    one, _ = buses
    made = spec(2 * MIB)
    objects = await one.objects(made)
    await objects.put("a", b"a" * MIB)
    for _ in range(3):
        with pytest.raises(StoreFull, match=made.name) as full:
            await objects.put("b", b"b" * (MIB + MIB // 2))
        assert full.value.facts["bucket"] == made.name
    assert await objects.get("a") == b"a" * MIB
    assert await objects.get("b") is None
    await objects.put("c", b"c" * (MIB // 2))  # what was refused has left nothing behind


async def test_more_than_the_reader_allows_is_not_read(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    await objects.put("a", b"x" * 1001)
    with pytest.raises(TooLarge, match="1001") as refused:
        await objects.get("a", max_bytes=1000)
    assert refused.value.facts == {"size": 1001, "max": 1000}
    assert await objects.get("a", max_bytes=1001) == b"x" * 1001


@pytest.mark.parametrize("name", ["", "x" * 513, "é" * 257])
async def test_a_name_is_of_some_length(buses: Pair, name: str) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    for call in (objects.put(name, b""), objects.get(name), objects.info(name), objects.delete(name)):
        with pytest.raises(BadRequest, match="512 bytes"):
            await call
    await objects.put("x" * 512, b"1")
    assert await objects.get("x" * 512) == b"1"


async def test_a_damaged_object_is_not_read_and_can_be_replaced_or_deleted(buses: Pair) -> None:
    one, two = buses
    made = spec()
    objects = await one.objects(made)
    for name in ("a", "b"):
        await objects.put(name, name.encode() * 1000)
        await damage(two, made.name, name)
        with pytest.raises(ObjectDamaged, match=name):
            await objects.get(name)
    await objects.put("a", b"whole")
    assert await objects.get("a") == b"whole"
    assert await objects.delete("b") is True
    assert await objects.get("b") is None


async def test_an_interrupted_put_leaves_what_was_there_and_is_swept(buses: Pair) -> None:
    one, two = buses
    made = spec()
    objects = await one.objects(made)
    await objects.put("a", b"first" * CHUNK)
    await interrupted(two, made.name, "a", b"second" * CHUNK)
    assert await objects.get("a") == b"first" * CHUNK
    assert await objects.sweep(CLOCK.wall_ms() - 60_000) == 0  # it might be under way
    assert await objects.sweep(CLOCK.wall_ms() + 60_000) == 1
    assert await objects.sweep(CLOCK.wall_ms() + 60_000) == 0
    assert await objects.get("a") == b"first" * CHUNK


async def test_a_reader_sees_one_version_or_another_however_often_it_is_replaced(buses: Pair) -> None:
    one, two = buses
    made = spec()
    writer, reader = await one.objects(made), await two.objects(made.name)
    versions = [bytes([n]) * (4 * CHUNK) for n in range(30)]
    await writer.put("a", versions[0])

    async def write() -> None:
        for version in versions[1:]:
            await writer.put("a", version)

    writing = asyncio.ensure_future(write())
    while not writing.done():
        data = await reader.get("a")
        assert data in versions
        await asyncio.sleep(0)
    await writing
    assert await reader.get("a") == versions[-1]


async def test_a_bucket_is_brought_up_to_date_and_found_by_its_name(buses: Pair) -> None:
    one, two = buses
    made = spec(2 * MIB)
    await (await one.objects(made)).put("a", b"1")
    wider = await two.objects(ObjectSpec(made.name, 8 * MIB))
    await wider.put("b", b"b" * 4 * MIB)
    assert await (await one.objects(made.name)).get("a") == b"1"
    with pytest.raises(Unavailable):
        await one.objects("NONE")


async def test_without_a_connection_every_call_says_so(buses: Pair) -> None:
    one, _ = buses
    objects = await one.objects(spec())
    await one.close()
    for call in (objects.put("a", b""), objects.get("a"), objects.info("a"), objects.page(), objects.delete("a")):
        with pytest.raises(Unavailable) as gone:
            await call
        assert gone.value.facts["what"] in ("jetstream", "nats")
    with pytest.raises(Unavailable):
        await one.objects(spec())
    with pytest.raises(Unavailable):
        await objects.sweep(0)


# -- the real one -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def bus(nats: RealServer) -> AsyncIterator[Any]:
    made = Nats(NatsSettings(servers=(nats.url,)), CLOCK)
    await made.connect()
    yield made
    await made.close()


async def test_nats_py_and_this_one_read_what_the_other_has_put(bus: Any) -> None:
    made = spec()
    ours: Objects = await bus.objects(made)
    theirs = await bus._client.jetstream().object_store(made.name)
    data = os.urandom(3 * CHUNK + 5)
    await ours.put("ours", data, "d")
    found = await theirs.get("ours")
    assert (found.data, found.info.size, found.info.description) == (data, len(data), "d")
    await theirs.put("theirs", data)
    assert await ours.get("theirs") == data
    await theirs.delete("ours")
    assert await ours.info("ours") is None
    assert [info.name for info in await ours.page()] == ["theirs"]
    assert await ours.delete("ours") is False
    assert await ours.delete("theirs") is True
    with pytest.raises(nats.js.errors.NotFoundError):
        await theirs.get("theirs")


async def test_nothing_is_left_of_an_object_that_was_replaced_or_deleted(bus: Any) -> None:
    """nats-py leaves a tombstone for each, and an upload is deleted after every use."""
    made = spec()
    objects = await bus.objects(made)
    for _ in range(3):
        await objects.put("a", b"x" * CHUNK)
    assert await stored_messages(bus, made.name) == 2
    await objects.delete("a")
    for n in range(20):
        await objects.put(f"{n}", b"x" * CHUNK)
        await objects.delete(f"{n}")
    assert await stored_messages(bus, made.name) == 0


async def test_a_missing_chunk_is_noticed_and_not_waited_for(bus: Any) -> None:
    made = spec()
    objects = await bus.objects(made)
    await objects.put("a", b"x" * (2 * CHUNK))
    about = await naming(bus, made.name, "a")
    await bus._client.jetstream().purge_stream(f"OBJ_{made.name}", subject=f"$O.{made.name}.C.{about['nuid']}")
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ObjectDamaged):
            await objects.get("a")


@pytest.mark.parametrize("extra", [b"", b"more"])
async def test_chunks_that_say_more_or_nothing_are_damage(bus: Any, extra: bytes) -> None:
    """An empty chunk would be read for ever, and one that is too long is not in the digest."""
    made = spec()
    objects = await bus.objects(made)
    await objects.put("a", b"x" * 10)
    about = await naming(bus, made.name, "a")
    context, chunks = bus._client.jetstream(), f"$O.{made.name}.C.{about['nuid']}"
    await context.purge_stream(f"OBJ_{made.name}", subject=chunks)
    await context.publish(chunks, extra)
    await context.publish(chunks, b"x" * 10)
    with pytest.raises(ObjectDamaged):
        await objects.get("a")


async def put_naming(bus: Any, bucket: str, name: str, about: Any) -> None:
    """As anybody could who may publish there."""
    body = about if isinstance(about, bytes) else json.dumps(about).encode()
    subject = f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"
    await bus._client.jetstream().publish(subject, body, headers={"Nats-Rollup": "sub"})


HOSTILE = {
    "everybody's chunks": {"name": "bad", "nuid": ">", "size": 1},
    "all of one level": {"name": "bad", "nuid": "*", "size": 1},
    "two words": {"name": "bad", "nuid": "a.b", "size": 1},
    "no word": {"name": "bad", "nuid": "", "size": 1},
    "a broken request": {"name": "bad", "nuid": "a b\r\nPUB x 0", "size": 1},
    "a size below zero": {"name": "bad", "nuid": "abc", "size": -1},
    "a link": {"name": "bad", "nuid": "abc", "size": 1, "options": {"link": {"bucket": "X", "name": "good"}}},
    "another name": {"name": "good", "nuid": "abc", "size": 0},
    "no object": [1, 2],
    "no JSON": b"\xff{",
    "nothing": b"",
    "a number too large": b'{"name":"bad","nuid":"abc","size":' + b"9" * 400 + b"}",
}


@pytest.mark.parametrize("which", HOSTILE)
async def test_a_naming_message_of_a_stranger_hurts_only_itself(bus: Any, which: str) -> None:
    made = spec()
    objects = await bus.objects(made)
    await objects.put("good", b"good")
    await put_naming(bus, made.name, "bad", HOSTILE[which])
    for call in (objects.get("bad"), objects.info("bad")):
        with pytest.raises(ObjectDamaged, match="bad"):
            await call
    assert [info.name for info in await objects.page()] == ["good"]
    await objects.sweep(CLOCK.wall_ms() + 60_000)
    assert await objects.delete("bad") is True
    await put_naming(bus, made.name, "bad", HOSTILE[which])
    await objects.put("bad", b"now it is good")
    assert await objects.get("bad") == b"now it is good"
    assert await objects.get("good") == b"good"


async def test_a_size_that_is_not_so_is_damage_and_no_memory(bus: Any) -> None:
    made = spec()
    objects = await bus.objects(made)
    await objects.put("a", b"x" * 1000)
    about = await naming(bus, made.name, "a")
    for size in (10, 1001, 1 << 40):
        await put_naming(bus, made.name, "a", {**about, "size": size})
        with pytest.raises(ObjectDamaged):
            await objects.get("a")


async def test_a_put_whose_acknowledgement_is_lost_may_have_been_stored_and_is_whole(bus: Any) -> None:
    """nats-py purges the chunks then, and the object is one that names nothing."""
    made = spec()
    sure: Objects = await bus.objects(made)
    await sure.put("a", b"1" * CHUNK)
    unsure = await bus.objects(made.name)
    break_off(unsure, at=2)  # one chunk, and then the message that names it
    del unsure._bucket.purge
    with pytest.raises(Unavailable):
        await unsure.put("a", b"2" * CHUNK)
    assert await sure.get("a") == b"2" * CHUNK


async def test_a_connection_that_dies_in_a_put_leaves_the_version_before(
    nats: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy("127.0.0.1", nats.port) as proxy:
        near = Nats(NatsSettings(servers=(f"nats://127.0.0.1:{proxy.port}",)), CLOCK)
        far = Nats(NatsSettings(servers=(nats.url,)), CLOCK)
        await near.connect()
        await far.connect()
        try:
            made = spec()
            objects, witness = await near.objects(made), await far.objects(made)
            await objects.put("a", b"1" * MIB)
            monkeypatch.setattr(streams, "ACK_S", 0.5)
            arrived = proxy.arrived["upstream"]
            putting = asyncio.ensure_future(objects.put("a", b"2" * (8 * MIB)))
            async with asyncio.timeout(PATIENCE_S):
                while proxy.arrived["upstream"] < arrived + 2 * MIB:
                    await asyncio.sleep(0)
            assert not putting.done()
            proxy.reset_peer()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(Unavailable):
                    await putting
            assert await witness.get("a") == b"1" * MIB
            await witness.sweep(CLOCK.wall_ms() + 60_000)  # nothing is left, had the put purged it after reconnecting
            assert await stored_messages(far, made.name) == 1 + 8  # the eight chunks of a megabyte, and their naming
            async with asyncio.timeout(PATIENCE_S):
                while not near.connected:
                    await asyncio.sleep(0.01)
            await objects.put("a", b"3")
            assert await witness.get("a") == b"3"
        finally:
            await near.close()
            await far.close()


async def test_a_frozen_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nats_server() as server:
        bus = Nats(NatsSettings(servers=(server.url,)), CLOCK)
        await bus.connect()
        try:
            objects: Any = await bus.objects(spec())
            await objects.put("a", b"1")
            monkeypatch.setattr(streams, "ACK_S", 0.2)
            monkeypatch.setattr(objects._bucket._context, "_timeout", 0.2)
            server.freeze()
            async with asyncio.timeout(PATIENCE_S):
                while Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                    await asyncio.sleep(0.001)  # a signal takes its time
            for call in (objects.put("a", b"2"), objects.get("a"), objects.page(), objects.delete("a")):
                async with asyncio.timeout(PATIENCE_S):
                    with pytest.raises(Unavailable):
                        await call
            server.thaw()
            async with asyncio.timeout(PATIENCE_S):
                while not bus.connected:
                    await asyncio.sleep(0.01)
            assert await objects.get("a") in (b"1", b"2", None)
        finally:
            server.thaw()
            await bus.close()


async def test_32_megabytes_are_read_in_less_than_a_second_of_the_processor(bus: Any) -> None:
    """nats-py takes more than two."""
    objects = await bus.objects(spec(64 * MIB))
    data = os.urandom(32 * MIB)
    await objects.put("a", data)
    began = time.thread_time()
    found = await objects.get("a")
    took = time.thread_time() - began
    assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()
    assert took < 1.0


async def test_a_bucket_that_has_gone_is_unavailable(bus: Any) -> None:
    made = spec()
    objects: JetStreamObjects = await bus.objects(made)
    await bus._client.jetstream().delete_stream(f"OBJ_{made.name}")
    for call in (objects.put("a", b""), objects.get("a"), objects.info("a"), objects.page(), objects.delete("a")):
        with pytest.raises(Unavailable):
            await call
