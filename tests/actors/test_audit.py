"""The auditor beside actors, over the twins and over real etcd and NATS: what it tells, and what holds it up."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from ifabric.audit.auditor import Auditor
from ifabric.audit.heads import PREFIX, Heads
from ifabric.audit.refusals import Refusals
from ifabric.audit.spool import Mark
from ifabric.bus.nats import Nats
from ifabric.clock import SystemClock
from ifabric.config_ops import Audit
from ifabric.errors import FabricError
from ifabric.handling import Handling
from ifabric.metrics import Metrics
from ifabric.store.base import Delete, Put, Txn, prefix_end
from ifabric.testing.clock import VirtualClock
from ifabric.testing.lifecycle import stress
from ifabric.testing.memory_bus import MemoryBus
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric.wire.audit import NONE_BEFORE, AuditRecord, Head, hash_of, heads, records
from tests.actors.conftest import World

CLOCK = SystemClock()


async def eventually(true: Callable[[], Any], within_s: float = 15.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


class Audited:
    """An auditor on the world's store and bus, with a stream of its own making."""

    def __init__(self, world: World, folder: Path, **settings: Any) -> None:
        self.world, self.folder = world, folder
        self.settings = Audit(**settings)
        self.metrics = Metrics()
        self.bus: Any = None
        self.store: Any = None
        self.auditor: Auditor

    async def open(self, *, bus: Any = None, store: Any = None) -> Audited:
        self.bus = bus or await self.world.connection()
        self.store = store or await self.world.store()
        self.auditor = Auditor(
            self.settings,
            self.folder,
            self.store,
            self.bus,
            CLOCK,
            self.metrics,
            structlog.get_logger(),
            version="1.2.3",
        )
        await self.auditor.start()
        return self

    def tell(self, number: int = 1, **fields: Any) -> None:
        for n in range(number):
            handling = Handling("coordinator", "claim", "s", CLOCK.monotonic())
            handling.message = wire.Claim(task=f"t{n}")
            for name, value in fields.items():
                setattr(handling, name, value)
            self.auditor.witness(handling)

    async def carried(self) -> list[AuditRecord]:
        """Once nothing waits: all of the stream, verified."""
        await eventually(lambda: self.auditor.waiting == 0)
        return await stream(self.bus)

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.counter(name, **labels).value


async def stream(bus: Any) -> list[AuditRecord]:
    """Every record of the stream; each chain fits together."""
    journal = await bus.journal(subjects.AUDIT_STREAM)
    last = await journal.last()
    found: list[AuditRecord] = []
    ends: dict[str, tuple[int, str]] = {}
    entries = journal.read()
    while last is not None:
        entry = await anext(entries)
        record = records.decode(entry.data)
        n, before = ends.get(record.chain, (0, NONE_BEFORE))
        assert (record.n, record.prev) == (n + 1, before)
        assert entry.subject == subjects.audit(record.component, record.verb)
        assert entry.headers["Nats-Msg-Id"] == f"{record.chain}.{record.n}"
        ends[record.chain] = (record.n, hash_of(entry.data))
        found.append(record)
        if entry.seq >= last.seq:
            break
    await entries.aclose()
    return found


async def told(store: Any) -> dict[str, Head]:
    got, _ = await store.range(PREFIX, prefix_end(PREFIX))
    return {kv.key.removeprefix(PREFIX).decode(): heads.decode(kv.value) for kv in got.kvs}


async def without_stream(world: World) -> None:
    """The session's server is everybody's: the stream of another test goes away."""
    if world.real:
        await world.bus.request(f"$JS.API.STREAM.DELETE.{subjects.AUDIT_STREAM}", b"", timeout_s=5)


@pytest.fixture
async def audited(world: World, tmp_path: Path) -> AsyncIterator[Audited]:
    await without_stream(world)
    made = Audited(world, tmp_path / "audit", max_bytes=64 << 20)
    yield made
    await made.auditor.stop()
    await without_stream(world)


async def daemon(audited: Audited, **limits: Any) -> Refusals:
    """A coordinator and a governor whose messages the auditor and the last refusals are told of."""
    refusals = Refusals(CLOCK)
    world = audited.world
    made = await world.daemon(governor={})
    await made.stop()
    made.runners.clear()
    made.actors.clear()
    made.runner = None
    made.witnesses = (audited.auditor.witness, refusals.witness)
    await made.start(**limits)
    return refusals


# -- what it tells ----------------------------------------------------------------------------------------------------


async def test_every_command_has_a_record_whatever_became_of_it(audited: Audited) -> None:
    await audited.open()
    refusals = await daemon(audited)
    world = audited.world
    await world.ask("hello", "a", capabilities=["SECRET"], account="acme")
    await world.ask("submit", "a", request_id="r1", tasks=[{"id": "t1", "payload": "SECRET", "title": "SECRET"}])
    claim = await world.ask("claim", "a", task="t1", request_id="r2")
    await world.ask("claim", "a", task="t1", request_id="r2")
    await world.refusal("claim", "b", task="t1")
    with pytest.raises(FabricError):
        await world.ask_raw("claim", "b", b'{"task": "SECRET \xff"}')
    await world.ask("renew", "a")  # the two that idle agents say all day leave none
    await world.refusal("next", "a")
    await world.refusal("renew", "nobody")
    await world.ask("complete", "a", task="t1", fence=claim["fence"], result={"x": "SECRET"}, cost_micro_usd=0)
    await world.ask("purge", "op", admin=True, task="t1")
    await world.ask("account", "op", admin=True, component="governor", account="acme", limit_micro_usd=9_000_000)
    found = await audited.carried()
    said = [
        (one.component, one.verb, one.session, one.outcome, one.code, one.request_id, one.task, one.fence, one.admin)
        for one in found
    ]
    fence = claim["fence"]
    assert said == [
        ("fabric", "begun", "", "ok", "", "", "", 0, False),
        ("coordinator", "hello", "a", "ok", "", "", "", 0, False),
        ("coordinator", "submit", "a", "ok", "", "r1", "", 0, False),
        ("coordinator", "claim", "a", "ok", "", "r2", "t1", fence, False),
        ("coordinator", "claim", "a", "ok", "", "r2", "t1", fence, False),
        ("coordinator", "claim", "b", "refused", "session_lost", "", "t1", 0, False),
        ("coordinator", "claim", "b", "refused", "bad_request", "", "", 0, False),
        ("coordinator", "renew", "nobody", "refused", "session_lost", "", "", 0, False),
        ("coordinator", "complete", "a", "ok", "", "", "t1", fence, False),
        ("coordinator", "purge", "op", "ok", "", "", "t1", 0, True),
        ("governor", "account", "op", "ok", "", "", "", 0, True),
    ]
    assert found[0].why == "ifabric 1.2.3"
    assert (found[-1].account, found[-1].amount_micro_usd) == ("acme", 9_000_000)
    assert all(one.took_ms > 0 and one.daemon == f"{os.uname().nodename}:{os.getpid()}" for one in found[1:])
    assert [one.code for one in refusals.last] == ["session_lost", "bad_request", "session_lost"]
    journal = await audited.bus.journal(subjects.AUDIT_STREAM)
    entries = journal.read()
    for _ in found:
        assert b"SECRET" not in (await anext(entries)).data
    await entries.aclose()
    assert audited.counted("if_audit_records_total", outcome="ok") == 7
    assert audited.counted("if_audit_records_total", outcome="refused") == 3
    assert audited.counted("if_audit_stored_total") == len(found)


async def test_what_is_turned_away_unread_has_a_record_too(audited: Audited) -> None:
    await audited.open()
    await daemon(audited, mailbox_max=1, in_flight_max=1)
    world = audited.world
    await world.ask("hello", "a")
    answers = await asyncio.gather(*(world.ask("next", f"s{n}", wait_s=0) for n in range(20)), return_exceptions=True)
    turned_away = [one for one in answers if isinstance(one, FabricError) and one.code == "overloaded"]
    assert turned_away
    found = await audited.carried()
    assert len([one for one in found if one.code == "overloaded"]) == len(turned_away)
    assert len([one for one in found if one.verb == "next"]) == 20
    assert len({one.session for one in found if one.verb == "next"}) == 20


async def test_its_end_is_told_to_etcd_and_a_new_life_is_another_chain(audited: Audited) -> None:
    await audited.open()
    audited.tell(3)
    await audited.auditor.stop()
    await audited.auditor.stop()
    first = await stream(audited.bus)
    assert [one.verb for one in first] == ["begun", "claim", "claim", "claim", "ended"]
    head = (await told(audited.store))[first[0].chain]
    assert (head.n, head.ended, head.daemon) == (5, True, first[0].daemon)
    assert list(audited.folder.iterdir()) == [], "nothing is left to be brought"
    audited.tell(2)
    assert audited.counted("if_audit_dropped_total") == 2, "between two lives nobody writes"
    await audited.auditor.start()
    audited.tell(1)
    found = await audited.carried()
    assert [one.verb for one in found[5:]] == ["begun", "dropped", "claim"]
    assert (found[6].count, "was not running" in found[6].why) == (2, True)
    assert len({one.chain for one in found}) == 2
    ends = await told(audited.store)
    assert ends[found[-1].chain].ended is False


# -- what holds it up -------------------------------------------------------------------------------------------------


async def test_records_wait_on_disk_while_the_stream_is_away_and_come_in_order(audited: Audited) -> None:
    """The twin is disconnected; the real one finds its stream deleted, and a server that has no room for a new one."""
    await audited.open()
    audited.tell(5)
    await audited.carried()
    carrier = audited.auditor._carrier
    assert carrier is not None
    if isinstance(audited.bus, MemoryBus):
        audited.bus.disconnect()
    else:
        await audited.world.bus.request(f"$JS.API.STREAM.DELETE.{subjects.AUDIT_STREAM}", b"", timeout_s=5)
        carrier._spec = replace(carrier._spec, max_bytes=1 << 50)
    audited.tell(700)
    await asyncio.sleep(0.1)
    assert audited.auditor.waiting >= 695
    audited.auditor._measure()
    assert audited.metrics.gauge("if_audit_waiting").value >= 695
    assert audited.metrics.gauge("if_audit_spool_bytes").value > 100_000
    assert audited.metrics.gauge("if_audit_lag_seconds").value > 0.05
    if isinstance(audited.bus, MemoryBus):
        audited.bus.disconnect(connected=True)
        found = await audited.carried()
        assert len(found) == 706
    else:
        await eventually(lambda: carrier._trouble is not None and "has not the room" in carrier._trouble[0])
        carrier._spec = replace(carrier._spec, max_bytes=1 << 24)
        await eventually(lambda: audited.auditor.waiting == 0)
        assert audited.counted("if_audit_stored_total") == 706
    audited.auditor._measure()
    assert audited.metrics.gauge("if_audit_lag_seconds").value == 0


async def test_what_a_killed_life_has_left_is_brought_first(audited: Audited) -> None:
    """The first life never had a stream; it ends without a word."""
    away = await audited.world.connection()
    await away.close()
    await audited.open(bus=away)
    audited.tell(600)
    audited.auditor.flush()
    killed = audited.auditor
    chain = killed._chain
    assert chain is not None
    for task in killed._carrier._tasks:  # type: ignore[union-attr]
        task.cancel()
    await audited.open()
    assert audited.auditor.waiting > 600
    audited.tell(1)
    found = await audited.carried()
    assert [one.chain for one in found[:601]] == [chain.chain] * 601
    assert [one.verb for one in found[601:]] == ["begun", "claim"]
    await eventually(lambda: not any(file.name.startswith(chain.chain) for file in audited.folder.iterdir()))
    head = (await told(audited.store))[chain.chain]
    assert (head.n, head.hash, head.ended) == (601, chain.hash, True)


@pytest.mark.parametrize("name", ["a b", "*", "a.>", "", "a\\r\\nPING"])
async def test_a_spool_that_was_damaged_costs_what_is_damaged_and_stops_nothing(audited: Audited, name: str) -> None:
    """What is there names a subject. One that is none would end the connection, again and again."""
    audited.folder.mkdir(parents=True)
    life = '{"at":"2026-01-01T00:00:00.000Z","chain":"old","n":%d,"prev":"%s","component":"coordinator","verb":"%s"}\n'
    lines = [life % (1, NONE_BEFORE, name), life % (2, NONE_BEFORE, "claim"), "\x00 no record\n"]
    (audited.folder / "old.000001.spool").write_text("".join(lines))
    await audited.open()
    await eventually(lambda: audited.auditor.waiting == 0)
    journal = await audited.bus.journal(subjects.AUDIT_STREAM)
    entries = journal.read()
    found = [records.decode((await anext(entries)).data) for _ in range(2)]
    await entries.aclose()
    assert (found[0].chain, found[0].n, found[0].verb) == ("old", 2, "claim")
    assert found[1].verb == "begun"


async def test_a_full_spool_drops_and_says_so_when_there_is_room_again(world: World, tmp_path: Path) -> None:
    await without_stream(world)
    audited = Audited(world, tmp_path / "audit", spool_max_bytes=1 << 16, max_bytes=16 << 20)
    away = await audited.world.connection()
    await away.close()
    await audited.open(bus=away)
    audited.tell(1000)
    audited.auditor.flush()
    dropped = audited.counted("if_audit_dropped_total")
    assert 700 < dropped < 1000
    assert sum(file.stat().st_size for file in audited.folder.iterdir()) < 1 << 16
    (warning,) = audited.auditor.warnings()
    assert warning.startswith(f"{dropped:.0f} records of the audit were dropped since ")
    await away.connect()
    await eventually(lambda: audited.auditor.waiting == 0)
    audited.tell(1)
    found = await audited.carried()
    assert len(found) == 1 + (1000 - dropped) + 2
    assert [one.verb for one in found[-2:]] == ["dropped", "claim"]
    assert (found[-2].component, found[-2].count) == ("fabric", dropped)
    assert "the spool was full" in found[-2].why
    assert audited.auditor.warnings() == ()
    await audited.auditor.stop()
    await without_stream(world)


WRITE = os.write


def full(file: int, data: bytes) -> int:
    """In its place, on a disk that takes nothing."""
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_disk_that_takes_nothing_stops_no_command_and_loses_nothing_that_fits_into_memory(
    audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    await audited.open()
    await audited.carried()
    monkeypatch.setattr(os, "write", full)
    audited.tell(10)
    audited.auditor.flush()
    (warning,) = audited.auditor.warnings()
    assert "No space left on device" in warning
    audited.tell(5000)
    assert audited.counted("if_audit_dropped_total") > 100
    monkeypatch.setattr(os, "write", WRITE)
    await eventually(lambda: not audited.auditor._unwritable)
    audited.tell(1)
    found = await audited.carried()
    assert [one.verb for one in found[-2:]] == ["dropped", "claim"]
    assert found[-2].count == audited.counted("if_audit_dropped_total")
    assert len(found) + found[-2].count == 1 + 5010 + 2
    assert audited.auditor.warnings() == ()


async def test_what_a_full_disk_takes_along_at_the_end_is_counted_and_told(
    audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who asked were answered; that their records never reach the stream must not be a secret."""
    await audited.open()
    await audited.carried()
    monkeypatch.setattr(os, "write", full)
    audited.tell(10)
    await audited.auditor.stop()
    assert audited.counted("if_audit_dropped_total") == 10
    assert audited.auditor.warnings()[-1].startswith("10 records of the audit were dropped since ")
    monkeypatch.setattr(os, "write", WRITE)
    await audited.auditor.start()
    audited.tell(1)
    found = await audited.carried()
    assert [one.verb for one in found[-3:]] == ["begun", "dropped", "claim"]
    assert found[-2].count == 10
    assert "No space left on device" in found[-2].why


async def test_a_folder_that_cannot_be_made_keeps_nobody_from_starting(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    audited = await Audited(world, tmp_path / "file" / "audit").open()
    audited.tell(1)
    audited.auditor.flush()
    assert any("cannot be written" in one for one in audited.auditor.warnings())
    await audited.auditor.stop()


async def test_an_etcd_that_is_away_holds_up_no_record(audited: Audited) -> None:
    store = await audited.world.store()
    await store.close()
    await audited.open(store=store)
    audited.tell(10)
    assert len(await audited.carried()) == 11
    assert audited.auditor.warnings() == ()


async def test_what_goes_wrong_in_it_reaches_nobody_who_asks(audited: Audited) -> None:
    await audited.open()
    audited.tell(1, session=object())
    audited.tell(1)
    found = await audited.carried()
    assert [(one.n, one.verb) for one in found] == [(1, "begun"), (2, "claim")]
    assert audited.counted("if_audit_dropped_total") == 1


async def test_heads_that_are_older_than_the_stream_are_forgotten(world: World) -> None:
    store, clock = await world.store(), VirtualClock()
    heads = Heads(store, clock, "d")
    await store.txn(Txn((), (Put(PREFIX + b"odd", b"not a head"),)))
    for n in range(3):
        await heads.tell(f"c{n}", Mark(n + 1, "h"))
        await clock.advance(100)
    assert await heads.forget(150) == 2
    got, _ = await store.range(PREFIX, prefix_end(PREFIX))
    assert [kv.key for kv in got.kvs] == [PREFIX + b"c2", PREFIX + b"odd"]
    await store.txn(Txn((), (Delete(PREFIX, prefix_end(PREFIX)),)))


# -- before the sender is told ----------------------------------------------------------------------------------------


async def test_nothing_leaves_before_its_record_is_written(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that leave together, answers that leave while others are being made: at each, nothing is set aside."""
    await audited.open()
    await daemon(audited)
    world = audited.world
    serving = next(made.bus for made in world.daemons)
    if not isinstance(serving, Nats):
        pytest.skip("the twin has no connection")
    serving.before_sending = audited.auditor.flush
    line = serving._client._transport
    kind: Any = type(line).__mro__[1]
    send, early, sent = kind.writelines, [], []

    def checked(self: Any, payload: list[bytes]) -> None:
        if self is line:
            sent.append(len(payload))
            early.extend(audited.auditor._pending)
        send(self, payload)

    monkeypatch.setattr(kind, "writelines", checked)
    await world.ask("hello", "a")
    await asyncio.gather(
        *(world.ask("submit", "a", tasks=[{"id": f"t{n}"}]) for n in range(300)),
        *(world.ask("get", "a", task=f"none{n}") for n in range(300)),
        return_exceptions=True,
    )
    assert max(sent) > 3, "some left together"
    assert early == []
    assert len(await audited.carried()) == 602


async def test_an_answer_that_leaves_with_somebody_elses_word_has_its_record_already(audited: Audited) -> None:
    """The connection was about to send something else when the answer was given: it takes it along in the same turn."""
    await audited.open()
    await audited.carried()
    if not isinstance(audited.bus, Nats):
        pytest.skip("the twin has no connection")
    await audited.bus.publish("t.other", b"")
    await asyncio.sleep(0.1)  # nobody else is about to send
    files = list(audited.folder.glob("*.spool"))
    line, written = audited.bus._client._transport, []
    send = line._io_writer.writelines

    def sending(payload: list[bytes]) -> None:
        if any(b"t.answer" in one for one in payload):
            written.append(any(b'"the-answer"' in file.read_bytes() for file in files))
        send(payload)

    line._io_writer.writelines = sending
    audited.bus.before_sending = audited.auditor.flush

    async def answer() -> None:
        audited.tell(1, session="the-answer")
        await audited.bus.publish("t.answer", b"")

    task = asyncio.create_task(answer())
    await audited.bus.publish("t.other", b"")  # whoever sends it comes right after the task
    await task
    await eventually(lambda: written)
    assert written == [True]


# -- its life ---------------------------------------------------------------------------------------------------------


async def test_it_keeps_the_lifecycle_contract(world: World, tmp_path: Path) -> None:
    await without_stream(world)
    bus, store = await world.connection(), await world.store()
    auditor = Auditor(
        Audit(max_bytes=16 << 20), tmp_path, store, bus, CLOCK, Metrics(), structlog.get_logger(), version="1"
    )
    await auditor.start()
    await eventually(lambda: auditor.waiting == 0)  # the connection begins tasks of its own when it is first used
    await stress(auditor, rounds=10)
    await without_stream(world)
