"""One suite over the twin and the real NATS: what `bus/base.py` says, sentence by sentence."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from ifabric.bus.base import Bus, Endpoint, Incoming, JournalSpec
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.clock import SystemClock
from ifabric.errors import TooLarge, Unavailable, Unreachable
from ifabric.testing.servers import RealServer, nats_server

CLOCK = SystemClock()
Pair = tuple[Bus, Bus]
PATIENCE_S = 5.0


class Box:
    """Messages as they arrive, to be waited for."""

    def __init__(self) -> None:
        self.got: list[Incoming] = []
        self._more = asyncio.Event()

    def __call__(self, incoming: Incoming) -> None:
        self.got.append(incoming)
        self._more.set()

    async def wait(self, count: int) -> list[Incoming]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.got) < count:
                self._more.clear()
                await self._more.wait()
        return self.got


def answering(tasks: set[asyncio.Task[None]], work: asyncio.Event | None = None) -> Any:
    """A sink that answers each message in a task of its own, once `work` is set."""

    def sink(incoming: Incoming) -> None:
        async def answer() -> None:
            if work is not None:
                await work.wait()
            if incoming.data == b"refuse":
                await incoming.respond_error(409, "it is taken", b'{"error":{"code":"claim_taken"}}')
            else:
                await incoming.respond(b"re:" + incoming.data)

        task = asyncio.ensure_future(answer())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return sink


async def test_a_message_reaches_those_who_listen_and_nobody_else(buses: Pair) -> None:
    one, two = buses
    exact, star, rest, other = Box(), Box(), Box(), Box()
    for pattern, box in (("t1.a.b", exact), ("t1.*.b", star), ("t1.>", rest), ("t1.a", other)):
        await two.subscribe(pattern, box)
    await one.publish("t1.a.b", b"x", {"H": "v"})
    for box in (exact, star, rest):
        (message,) = await box.wait(1)
        assert (message.subject, message.data, message.reply) == ("t1.a.b", b"x", "")
        assert message.headers["H"] == "v"
    assert other.got == []


async def test_a_queue_group_shares_and_an_unsubscribed_one_hears_nothing(buses: Pair) -> None:
    one, two = buses
    a, b, fence = Box(), Box(), Box()
    first = await one.subscribe("t2.q", a, queue="g")
    await two.subscribe("t2.q", b, queue="g")
    await two.subscribe("t2.fence", fence)
    for _ in range(50):
        await one.publish("t2.q", b"")
    await one.publish("t2.fence", b"")
    await fence.wait(1)
    async with asyncio.timeout(PATIENCE_S):
        while len(a.got) + len(b.got) < 50:
            await asyncio.sleep(0)
    assert a.got
    assert b.got
    await first.unsubscribe()
    await first.unsubscribe()
    before = len(a.got)
    await one.publish("t2.q", b"")
    await b.wait(51 - before)
    assert len(a.got) == before


async def test_a_request_is_answered_refused_or_nobody_is_there(buses: Pair) -> None:
    one, two = buses
    tasks: set[asyncio.Task[None]] = set()
    service = await two.serve("t3", "1.0.0", "", [Endpoint("e", "t3.e.*", answering(tasks))])
    answer = await one.request("t3.e.s", b"hi", timeout_s=2)
    assert answer.data == b"re:hi"
    refusal = await one.request("t3.e.s", b"refuse", timeout_s=2)
    assert refusal.headers["Nats-Service-Error"] == "it is taken"
    assert refusal.headers["Nats-Service-Error-Code"] == "409"
    with pytest.raises(Unavailable) as nobody:
        await one.request("t3.none", b"", timeout_s=2)
    assert nobody.value.facts["reason"] == "no_responders"
    await one.subscribe("t3.silent", Box())
    with pytest.raises(Unavailable) as late:
        await two.request("t3.silent", b"", timeout_s=0.05)
    assert late.value.facts["reason"] == "timeout"
    await service.drain()


async def test_requests_do_not_wait_for_each_other(buses: Pair) -> None:
    one, two = buses
    tasks: set[asyncio.Task[None]] = set()
    work = asyncio.Event()
    service = await two.serve("t4", "1.0.0", "", [Endpoint("e", "t4.e", answering(tasks, work))])
    asking = [asyncio.ensure_future(one.request("t4.e", b"%d" % n, timeout_s=5)) for n in range(100)]
    async with asyncio.timeout(PATIENCE_S):
        while len(tasks) < 100:
            await asyncio.sleep(0.001)
    work.set()
    assert sorted(a.data for a in await asyncio.gather(*asking)) == sorted(b"re:%d" % n for n in range(100))
    await service.drain()


async def test_draining_loses_nothing_that_was_sent(buses: Pair) -> None:
    one, two = buses
    tasks: set[asyncio.Task[None]] = set()
    work = asyncio.Event()
    service = await two.serve("t5", "1.0.0", "", [Endpoint("e", "t5.e", answering(tasks, work))])
    await one.request("$SRV.PING.t5", b"", timeout_s=PATIENCE_S)
    line = two._client._transport._io_writer.transport if isinstance(two, Nats) else None
    if line is not None:  # so that all of them are still on their way when the draining begins
        line.pause_reading()
    asking = [asyncio.ensure_future(one.request("t5.e", b"x", timeout_s=PATIENCE_S)) for _ in range(50)]
    await asyncio.sleep(0)
    # The server's own word to a question behind them says that it has all of them: what it has not is not "sent".
    with pytest.raises(Unavailable):
        await one.request("t5.nobody", b"", timeout_s=PATIENCE_S)
    draining = asyncio.ensure_future(service.drain())
    await asyncio.sleep(0)
    if line is not None:
        assert not tasks
        line.resume_reading()
    await draining
    await service.drain()
    work.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [a for a in answers if isinstance(a, BaseException)] == []
    with pytest.raises(Unavailable):
        await one.request("t5.e", b"x", timeout_s=1)


async def test_a_service_is_discovered_and_counted(buses: Pair) -> None:
    one, two = buses
    tasks: set[asyncio.Task[None]] = set()
    service = await two.serve("t6", "1.2.3", "says re:", [Endpoint("e", "t6.e", answering(tasks), {"schema": "E"})])
    await one.request("t6.e", b"x", timeout_s=2)
    await one.request("t6.e", b"refuse", timeout_s=2)
    ping = json.loads((await one.request("$SRV.PING.t6", b"", timeout_s=2)).data)
    assert (ping["name"], ping["version"], ping["id"]) == ("t6", "1.2.3", service.id)
    info = json.loads((await one.request("$SRV.INFO.t6", b"", timeout_s=2)).data)
    (endpoint,) = info["endpoints"]
    assert (endpoint["subject"], endpoint["queue_group"], endpoint["metadata"]) == ("t6.e", "t6", {"schema": "E"})
    stats = json.loads((await one.request(f"$SRV.STATS.t6.{service.id}", b"", timeout_s=2)).data)
    (endpoint,) = stats["endpoints"]
    assert (endpoint["num_requests"], endpoint["num_errors"], endpoint["last_error"]) == (2, 1, "409:it is taken")
    assert service.statistics()["endpoints"][0]["num_requests"] == 2
    await service.drain()


async def test_a_reply_subject_outside_an_inbox_gets_nothing(buses: Pair) -> None:
    """An agent could otherwise make the daemon publish a command in its name."""
    one, two = buses
    handed, victim = Box(), Box()
    service = await two.serve("t7", "1.0.0", "", [Endpoint("e", "t7.e", handed)])
    await one.subscribe("t7.victim.>", victim)
    for reply in ("t7.victim.cancel", "_INBOX", "_INBOX.", "_INBOX.*", "_INBOX.>", "$JS.API.STREAM.DELETE.X"):
        await one.publish("t7.e", b"spoof", reply=reply)  # type: ignore[call-arg]
    await one.publish("t7.e", b"honest", reply="_INBOX.me.1")  # type: ignore[call-arg]
    await one.publish("t7.e", b"no reply")
    first, second = await handed.wait(2)
    assert (first.data, second.data) == (b"honest", b"no reply")
    assert two.spoofed == 6  # type: ignore[attr-defined]
    await second.respond(b"goes nowhere")
    first.drop()
    await one.publish("t7.victim.fence", b"fence")
    assert [m.data for m in await victim.wait(1)] == [b"fence"]
    await service.drain()


async def test_a_message_is_answered_once_and_never_too_large(buses: Pair) -> None:
    one, two = buses
    box = Box()
    service = await two.serve("t8", "1.0.0", "", [Endpoint("e", "t8.e", box)])
    asking = asyncio.ensure_future(one.request("t8.e", b"", timeout_s=2))
    (message,) = await box.wait(1)
    with pytest.raises(TooLarge):
        await message.respond(b"x" * (1024 * 1024 + 1))
    await message.respond(b"ok")
    with pytest.raises(AssertionError):
        await message.respond(b"again")
    assert (await asking).data == b"ok"
    with pytest.raises(TooLarge):
        await one.publish("t8.e", b"x" * (1024 * 1024 + 1))
    await service.drain()


async def test_the_journal_keeps_dedupes_and_resumes(buses: Pair) -> None:
    one, two = buses
    spec = JournalSpec(f"J{CLOCK.token()[:8]}".replace("-", "_"), ("j9.>",), max_age_s=60, max_bytes=1 << 20)
    journal = await one.journal(spec)
    assert await journal.last() is None
    await journal.append([(f"j9.{n % 2}", b"%d" % n, f"id{n}") for n in range(10)])
    await journal.append([("j9.0", b"again", "id3"), ("j9.1", b"10", "id10")])
    await journal.append([])
    last, zero = await journal.last(), await journal.last("j9.0")
    assert last is not None
    assert zero is not None
    assert (last.seq, last.data, last.headers["Nats-Msg-Id"], zero.data) == (11, b"10", "id10", b"8")
    assert await journal.last("j9.none") is None
    same = await two.journal(spec.name)
    seen = []
    entries = same.read(after_seq=7)
    async with asyncio.timeout(PATIENCE_S):
        async for entry in entries:
            seen.append((entry.seq, entry.data))
            if entry.seq == 11:
                await journal.append([("j9.1", b"live", "id11")])
            if entry.data == b"live":
                break
    assert seen == [(8, b"7"), (9, b"8"), (10, b"9"), (11, b"10"), (12, b"live")]
    await entries.aclose()  # type: ignore[attr-defined]
    only = same.read(subject="j9.0")
    assert [(await anext(only)).data for _ in range(3)] == [b"0", b"2", b"4"]
    await only.aclose()  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        await two.journal("NONE")


async def test_a_full_journal_forgets_the_oldest_or_refuses_the_new(buses: Pair) -> None:
    one, _ = buses
    for discard in ("old", "new"):
        name = f"F{CLOCK.token()[:8]}".replace("-", "_")
        subject = f"j10.{name}"
        journal = await one.journal(JournalSpec(name, (subject,), max_age_s=60, max_bytes=64 << 10, discard=discard))
        assert (await journal.size()).messages == 0
        taken = 0
        with contextlib.suppress(Unavailable) if discard == "new" else contextlib.nullcontext():
            for n in range(100):
                await journal.append([(subject, b"x" * 4000, f"id{n}")], strictly=True)
                taken += 1
        size = await journal.size()
        assert size.max_bytes == 64 << 10
        assert 50_000 < size.bytes <= size.max_bytes
        assert (taken == 100) == (discard == "old")
        last = await journal.last()
        assert last is not None
        assert (last.seq, last.headers["Nats-Msg-Id"]) == (taken, f"id{taken - 1}")
        assert 12 <= size.messages <= 16
        with contextlib.nullcontext() if discard == "old" else pytest.raises(Unavailable, match="full") as full:
            await journal.append([(subject, b"y" * 4000, f"more{n}") for n in range(3)], strictly=True)
        assert full is None or full.value.facts["reason"] == "full"
        if discard == "new":  # what would still fit does not come in after what did not
            batch = [
                (subject, b"", "small"),
                (subject, b"y" * 4000, "large"),
                (subject, b"", "after"),
                (subject, b"", "z"),
            ]
            with pytest.raises(Unavailable):
                await journal.append(batch, strictly=True)
            assert (await journal.size()).messages == taken + 1


async def test_strictly_there_is_no_hole_and_no_disorder_whoever_else_writes(buses: Pair) -> None:
    one, two = buses
    name = f"S{CLOCK.token()[:8]}".replace("-", "_")
    spec = JournalSpec(name, (f"j11.{name}.*",), max_age_s=60, max_bytes=16 << 20)
    journals = [await one.journal(spec), await two.journal(spec)]

    async def write(who: int) -> None:
        for batch in range(20):
            numbers = range(batch * 30, batch * 30 + 30)
            entries = [(f"j11.{name}.{who}", b"%d" % n, f"{who}.{n}") for n in numbers]
            await journals[who].append(entries, strictly=True)
            if batch % 5 == 0:
                await journals[who].append(entries[10:], strictly=True)  # again: nobody heard that they are stored

    await asyncio.gather(write(0), write(1))
    for who in (0, 1):
        entries = journals[who].read(subject=f"j11.{name}.{who}")
        async with asyncio.timeout(PATIENCE_S):
            assert [int((await anext(entries)).data) for _ in range(600)] == list(range(600))
        await entries.aclose()  # type: ignore[attr-defined]
    assert (await journals[0].size()).messages == 1200


async def test_what_is_closed_is_lost_and_refuses(buses: Pair) -> None:
    one, _ = buses
    await one.close()
    await one.close()
    assert await one.lost == "closed"
    assert not one.connected
    with pytest.raises(Unavailable):
        await one.publish("t", b"")
    await one.connect()
    assert one.connected
    assert not one.lost.done()


async def test_nobody_deletes_from_an_immutable_journal_or_makes_it_mutable(nats: RealServer) -> None:
    async with connected(nats) as bus:
        name = f"I{CLOCK.token()[:8]}".replace("-", "_")
        spec = JournalSpec(name, (f"j12.{name}",), max_age_s=60, max_bytes=1 << 20)
        await (await bus.journal(spec)).append([(f"j12.{name}", b"%d" % n, f"id{n}") for n in range(3)])
        immutable = replace(spec, immutable=True)
        journal = await bus.journal(immutable)
        api = "$JS.API.STREAM"
        for subject, body in (
            (f"{api}.MSG.DELETE.{name}", b'{"seq":2}'),
            (f"{api}.PURGE.{name}", b""),
            (f"{api}.PURGE.{name}", b'{"keep":1}'),
        ):
            answer = await bus.request(subject, body, timeout_s=5)
            assert b"not permitted" in answer.data, answer.data
        info = json.loads((await bus.request(f"{api}.INFO.{name}", b"", timeout_s=5)).data)["config"]
        assert (info["deny_delete"], info["deny_purge"]) == (True, True)
        for field in ("deny_delete", "deny_purge"):
            changed = json.dumps({**info, field: False}).encode()
            assert b"error" in (await bus.request(f"{api}.UPDATE.{name}", changed, timeout_s=5)).data
        assert (await journal.size()).messages == 3


# -- the real one ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connected(server: RealServer, **settings: Any) -> AsyncIterator[Nats]:
    bus = Nats(NatsSettings(servers=(server.url,), **settings), CLOCK)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


async def test_nobody_there_is_said_within_the_time() -> None:
    with pytest.raises(Unreachable, match="127.0.0.1:1"):
        await Nats(NatsSettings(servers=("nats://127.0.0.1:1",), connect_timeout_s=0.5), CLOCK).connect()


async def test_nothing_is_kept_to_be_sent_after_an_outage() -> None:
    async with nats_server() as server, connected(server) as one, connected(server) as two:
        box = Box()
        await two.subscribe("t", box)
        await server.kill()
        async with asyncio.timeout(PATIENCE_S):
            while one.connected or two.connected:
                await asyncio.sleep(0.01)
        with pytest.raises(Unavailable) as refusal:
            await one.publish("t", b"stale")
        assert refusal.value.facts["reason"] == "disconnected"
        await server.start_again()
        async with asyncio.timeout(PATIENCE_S):
            while not (one.connected and two.connected):
                await asyncio.sleep(0.01)
        await one.publish("t", b"fresh")
        assert [m.data for m in await box.wait(1)] == [b"fresh"]
        assert one.reconnects == 1


async def test_a_frozen_server_is_noticed() -> None:
    async with nats_server() as server, connected(server) as one:
        server.freeze()
        async with asyncio.timeout(10):
            while one.connected:
                await asyncio.sleep(0.05)
        server.thaw()
        async with asyncio.timeout(10):
            while not one.connected:
                await asyncio.sleep(0.05)


async def test_a_slow_subscription_is_counted_and_the_connection_lives(nats: RealServer) -> None:
    gate = asyncio.Event()

    async def slow(incoming: Incoming) -> None:
        await gate.wait()

    async with connected(nats, pending_msgs_max=10) as one, connected(nats) as two:
        await one.subscribe("slow", slow)
        for _ in range(100):
            await two.publish("slow", b"x")
        async with asyncio.timeout(PATIENCE_S):
            while one.slow_consumers < 80:
                await asyncio.sleep(0.01)
        gate.set()
        assert one.connected
