"""Somebody changes the audit: in NATS's files, and by its API. `ifabric audit verify` says so, and which record it was.

The audit is a real daemon's: it served agents and an operator, and ended. Whoever changes it has all rights in NATS, where
`deny_delete` and `deny_purge` do not keep a stream from being deleted and made again, and none in etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nats
import nats.js.errors
import pytest

from ifabric.audit import reading
from ifabric.audit.stored import Stored
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cli import main
from ifabric.client import Client
from ifabric.embedded import embedded_nats
from ifabric.errors import FabricError
from ifabric.programs import find_nats_server
from ifabric.scratch.servers import RealServer
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import etcd_server
from ifabric.wire import coordinator, subjects
from tests.chains import Entry, altered, fill, rechained
from tests.conftest import needed
from tests.system.conftest import CLOCK, eventually
from tests.system.highway import highway_64

#: real servers, stopped and started again
pytestmark = pytest.mark.slow


class Verified(NamedTuple):
    """What `ifabric audit verify --json` came to."""

    code: int
    said: dict[str, Any]

    @property
    def first(self) -> dict[str, Any]:
        """The first finding about a record."""
        found: dict[str, Any] = self.said["findings"][0]
        return found

    @property
    def kinds(self) -> list[str]:
        return [one["kind"] for one in self.said["findings"]]


@dataclass
class Place:
    """Where it all is."""

    folder: Path
    nats: RealServer
    config: str
    #: what the daemon has written, in the order of the stream
    written: list[Entry]
    chain: str

    async def verify(self, *words: str) -> Verified:
        words = ("audit", "verify", "--json", "--config", self.config, *words)
        said = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(said):  # a process of its own would cost a second each time
            code = await asyncio.to_thread(main, words)
        said.flush()
        return Verified(code, json.loads(said.buffer.getvalue()))

    async def with_stream(self, entries: list[Entry]) -> Verified:
        """The verdict when the stream was deleted, made again, and filled with these."""
        await fill(self.nats.url, entries)
        return await self.verify()

    def named(self, found: dict[str, Any], n: int, kind: str) -> None:
        """It is this chain's record of that number."""
        assert (found["kind"], found["chain"], found.get("n")) == (kind, self.chain, n), found


async def all_of(url: str) -> list[Stored]:
    bus = Nats(NatsSettings(servers=(url,)), CLOCK)
    await bus.connect()
    try:
        stream = await reading.facts(bus)
        return [one async for one in reading.messages(bus, CLOCK, until_seq=stream.last_seq)]
    finally:
        await bus.close()


async def live(url: str) -> None:
    """Agents and an operator at work, and some that are refused."""
    async with Client.connect(url, session="alice") as alice, Client.connect(url, session="bob") as bob:
        await alice.submit([{"id": f"P0.{n}"} for n in range(10)])
        for n in range(8):
            worker = alice if n % 2 else bob
            claim = await worker.claim(f"P0.{n}")
            await claim.complete({"n": n})
        for _ in range(2):
            with contextlib.suppress(FabricError):
                await bob.claim("P0.1")
        await alice.operate(coordinator.Cancel, "P0.9")


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """One audit for the module; each test begins with it as it was written, or fills the stream itself."""
    folder = tmp_path_factory.mktemp("audited")
    with needed("etcd and nats-server"):
        async with etcd_server() as etcd:
            server, url = embedded_nats(find_nats_server(), folder / "server", 0, CLOCK)
            real = RealServer(server, url)
            await server.start()
            daemon = RealDaemon(folder / "daemon", [etcd.url], [url], {"audit": {"enabled": True}})
            await daemon.start()
            await live(url)
            await daemon.close()
            config = folder / "fabric.yaml"
            config.write_text(
                json.dumps({"coordinator": {"etcd": {"endpoints": [etcd.url]}}, "nats": {"servers": [url]}})
            )
            messages = await all_of(url)
            written = [(one.subject, one.message_id, one.data) for one in messages]
            made = Place(folder, real, str(config), written, messages[0].message_id.partition(".")[0])
            yield made
            await real.stop()


def index_of(place: Place, verb: str, session: str) -> int:
    """Where the first such record is."""
    for at, (_, _, data) in enumerate(place.written):
        body = json.loads(data)
        if body["verb"] == verb and body.get("session") == session:
            return at
    raise AssertionError(f"{session} has done {verb}")


# -- as it was written -----------------------------------------------------------------------------------------------


async def test_the_audit_of_a_real_daemon_tells_who_did_what_and_is_whole(place: Place) -> None:
    bodies = [json.loads(data) for _, _, data in place.written]
    assert [(one["component"], one["verb"]) for one in (bodies[0], bodies[-1])] == [
        ("fabric", "begun"),
        ("fabric", "ended"),
    ]
    refused = [one for one in bodies if one.get("outcome") == "refused"]
    assert {(one["session"], one["code"]) for one in refused} >= {("bob", "not_claimable")}
    assert any(one["verb"] == "cancel" and one.get("admin") for one in bodies)
    assert sum(one["verb"] == "complete" for one in bodies) == 8
    again = await place.with_stream(place.written)
    assert again.code == 0, again.said
    assert (again.said["records"], again.said["chains"], again.said["heads"]) == (len(bodies), 1, 1)
    assert again.said["notes"] == []


# -- by the API ------------------------------------------------------------------------------------------------------


async def test_the_stream_s_own_locks_hold_against_less_than_deleting_it(place: Place) -> None:
    """A real daemon has set them; who would take one record out has to make the stream again."""
    await fill(place.nats.url, place.written)
    client = await nats.connect(place.nats.url)
    context = client.jetstream()
    with pytest.raises(nats.js.errors.APIError):
        await context.delete_msg(subjects.AUDIT_STREAM, 3)
    with pytest.raises(nats.js.errors.APIError):
        await context.purge_stream(subjects.AUDIT_STREAM)
    await client.close()


async def test_one_record_that_was_changed_is_named(place: Place) -> None:
    at = index_of(place, "claim", "bob")
    entries = list(place.written)
    entries[at] = altered(entries[at], session="alice")
    found = await place.with_stream(entries)
    assert found.code == 1
    assert len(found.said["findings"]) == 1
    place.named(found.first, at + 1, "changed")
    assert (found.first["who"], found.first["verb"], found.first["seq"]) == ("alice", "coordinator.claim", at + 1)
    assert "ifabric audit export" in found.first["do"]


async def test_one_record_that_was_left_out_is_named(place: Place) -> None:
    at = index_of(place, "cancel", "alice")
    found = await place.with_stream(place.written[:at] + place.written[at + 1 :])
    assert found.code == 1
    place.named(found.first, at + 1, "missing")


async def test_the_first_record_that_was_left_out_is_missed(place: Place) -> None:
    found = await place.with_stream(place.written[1:])
    assert found.code == 1
    place.named(found.first, 2, "beginning")


async def test_two_records_in_the_other_order_are_named(place: Place) -> None:
    entries = list(place.written)
    entries[5], entries[6] = entries[6], entries[5]
    found = await place.with_stream(entries)
    assert found.code == 1
    place.named(found.first, 6, "missing")


@pytest.mark.parametrize("number", [1, 4])
async def test_an_end_that_was_cut_off_is_seen(place: Place, number: int) -> None:
    found = await place.with_stream(place.written[:-number])
    assert found.code == 1
    place.named(found.first, len(place.written) - number, "end")
    assert f"there are {len(place.written)}" in found.first["what"]


async def test_a_chain_with_all_its_hashes_computed_again_is_caught_by_what_etcd_knows(place: Place) -> None:
    at = index_of(place, "claim", "bob")
    entries = list(place.written)
    entries[at] = altered(entries[at], session="alice")
    found = await place.with_stream(rechained(entries))
    assert found.code == 1
    place.named(found.first, len(entries), "rewritten")
    without = rechained([one for one in entries if one is not entries[at]])
    left_out = await place.with_stream(without)
    assert left_out.code == 1
    assert left_out.first["chain"] == place.chain


async def test_a_stream_that_was_deleted_or_emptied_is_missed(place: Place) -> None:
    empty = await place.with_stream([])
    assert (empty.code, empty.kinds) == (1, ["chain_missing"])
    client = await nats.connect(place.nats.url)
    await client.jetstream().delete_stream(subjects.AUDIT_STREAM)
    await client.close()
    gone = await place.verify()
    assert (gone.code, gone.kinds) == (1, ["chain_missing"])


async def test_a_stream_that_begins_later_is_no_excuse_while_it_is_young(place: Place) -> None:
    """The server lets a stream be made whose first message has any number, as if older ones had been dropped by age."""
    await fill(place.nats.url, place.written[4:], first_seq=1000)
    found = await place.verify()
    assert found.code == 1
    place.named(found.first, 5, "beginning")
    assert "the stream was made" in found.first["what"]


# -- in the files ----------------------------------------------------------------------------------------------------


class Block:
    """The file that holds the stream's messages: each is `length seq time subject-length subject [headers-length headers]
    data hash`. Source: nats-server, server/filestore.go.
    """

    def __init__(self, place: Place) -> None:
        (self.path,) = place.folder.glob("server/**/streams/IF_AUDIT/msgs/*.blk")
        self.index = int(self.path.stem)
        self.data = bytearray(self.path.read_bytes())

    def where(self, needle: bytes) -> tuple[int, int]:
        """Beginning and length of the record that has these bytes."""
        at = 0
        while at < len(self.data):
            length = struct.unpack_from("<I", self.data, at)[0] & 0x7FFFFFFF
            if needle in self.data[at : at + length]:
                return at, length
            at += length
        raise AssertionError(f"{needle!r} is in the block")

    def hash_of(self, at: int, length: int) -> bytes:
        """As the server computes it: the key is the stream's name, so whoever can write the file can do it as well."""
        key = hashlib.sha256(f"IF_AUDIT-{self.index}".encode()).digest()
        size = struct.unpack_from("<H", self.data, at + 20)[0]
        body = at + 22
        hashed = self.data[at + 4 : at + 20] + self.data[body : body + size]
        after = body + size
        if struct.unpack_from("<I", self.data, at)[0] & 0x80000000:
            headers = struct.unpack_from("<I", self.data, after)[0]
            hashed += self.data[after + 4 : after + 4 + headers]
            after += 4 + headers
        return highway_64(key, bytes(hashed + self.data[after : at + length - 8]))

    def write(self) -> None:
        self.path.write_bytes(self.data)


async def tampered(place: Place, change: Callable[[Block], None], *, keep_index: bool) -> Verified:
    """The verdict after the server was stopped, its file changed, and the server started again."""
    await fill(place.nats.url, place.written)
    await place.nats.stop()
    block = Block(place)
    change(block)
    block.write()
    if not keep_index:
        for path in block.path.parent.glob("index.db"):
            path.unlink()
    await place.nats.start_again()

    async def back() -> bool:
        client = await nats.connect(place.nats.url)
        try:
            await client.jetstream().stream_info(subjects.AUDIT_STREAM)
        except (nats.errors.Error, nats.js.errors.APIError):
            return False
        finally:
            await client.close()
        return True

    await eventually(back, 20)
    return await place.verify()


def flipped(place: Place, at: int) -> Callable[[Block], None]:
    """Changes a bit of one record, and nothing else."""

    def flip(block: Block) -> None:
        start, length = block.where(place.written[at][2])
        assert bytes(block.data[start + length - 8 : start + length]) == block.hash_of(start, length)
        block.data[block.data.index(b'"session":"bob"', start) + 12] ^= 0x01

    return flip


async def test_a_flipped_bit_in_the_store_costs_the_record_and_leaves_a_hole_that_is_named(place: Place) -> None:
    """The server refuses to hand it out, and says nothing of it."""
    at = index_of(place, "claim", "bob")
    found = await tampered(place, flipped(place, at), keep_index=True)
    assert found.code == 1
    assert found.said["records"] == len(place.written) - 1
    assert [(one["kind"], one.get("seq") or one["n"]) for one in found.said["findings"]] == [
        ("deleted", at + 1),
        ("missing", at + 1),
    ]


async def test_a_flipped_bit_can_cost_all_that_comes_after_it_and_etcd_knows(place: Place) -> None:
    """Without its index, as after a crash, the server cuts the block off there, and takes the rest for never written."""
    at = index_of(place, "claim", "bob")
    found = await tampered(place, flipped(place, at), keep_index=False)
    assert found.code == 1
    assert found.said["records"] == at
    place.named(found.first, at, "end")
    assert f"there are {len(place.written)}" in found.first["what"]


@pytest.mark.parametrize("keep_index", [True, False])
async def test_a_record_that_was_changed_with_the_server_s_checksum_is_named(place: Place, keep_index: bool) -> None:
    """To the server all is well."""
    at = index_of(place, "claim", "bob")

    def change(block: Block) -> None:
        start, length = block.where(place.written[at][2])
        where = block.data.index(b'"session":"bob"', start) + len(b'"session":"')
        block.data[where : where + 3] = b"eve"
        block.data[start + length - 8 : start + length] = block.hash_of(start, length)

    found = await tampered(place, change, keep_index=keep_index)
    assert found.code == 1
    assert found.said["records"] == len(place.written)
    place.named(found.first, at + 1, "changed")
    assert found.first["who"] == "eve"
