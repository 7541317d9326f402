"""What a holder of one credential, or of none, can do to the others: nothing. And what happens to identities in bad weather."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import pytest

from ifabric import credentials, log
from ifabric.actor.base import Caller, Context
from ifabric.actor.receipts import Receipts
from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.client import Client
from ifabric.config import Config
from ifabric.config_ops import Identity
from ifabric.credentials import Credential
from ifabric.errors import (
    BadRequest,
    ClaimLost,
    Conflict,
    FabricError,
    Forbidden,
    SessionLost,
    Unavailable,
    UnknownHold,
    Unreachable,
)
from ifabric.metrics import Metrics
from ifabric.store.base import Put, Store, Txn
from ifabric.store.commit import Committer
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryStore
from ifabric.wire import callout, chassis, coordinator, governor
from ifabric.wire import identity as wire
from ifabric.wire.subjects import DAEMON_INBOX
from ifabric_actors.identity import gate, records
from ifabric_actors.identity.gate import Gate
from ifabric_actors.identity.register import Register
from tests.conftest import needed
from tests.system.conftest import CLOCK, eventually
from tests.system.town import Town, town

#: a town with identities under attack
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Town]:
    """One town for the module; tests take names of their own."""
    with needed("etcd and nats-server"):
        opening = town(tmp_path_factory.mktemp("town"), size=1, daemons=1, identity={"sweep_seconds": 3600.0})
        made = await opening.__aenter__()
    yield made
    await opening.__aexit__(None, None, None)


@contextlib.asynccontextmanager
async def hall(
    store: Store, bus: Bus, operators: dict[str, str] | None = None
) -> AsyncIterator[tuple[Context, Register]]:
    """What an identity actor stands on, without the actor."""
    settings = Config(identity=Identity(operators=operators or {}))
    committer = Committer(store, CLOCK, Metrics(), timeout_s=5.0)
    await committer.start()
    context = Context(
        store=store,
        bus=bus,
        committer=committer,
        clock=CLOCK,
        metrics=Metrics(),
        config=settings.identity,
        settings=settings,
        log=log.get(),
    )
    try:
        yield context, Register(context, Receipts(store, CLOCK, keep_s=600))
    finally:
        await committer.stop()


@contextlib.asynccontextmanager
async def a_gate(place: Town) -> AsyncIterator[tuple[Gate, Etcd]]:
    """The gate of a daemon in this process, which is asked nothing and may look at the connections."""
    store = Etcd(EtcdSettings(endpoints=(place.etcd.url,)), CLOCK)
    await store.connect()
    servers = tuple(place.nats.urls)
    system = Nats(
        NatsSettings(servers=servers, nkey_seed_file=place.path("system.nk"), inbox_prefix=DAEMON_INBOX), CLOCK
    )
    await system.connect()
    async with hall(store, system, {"ann": place.operator.public_key}) as (context, register):
        yield Gate(context, system, register, "no seed: it lets nobody in"), store
    await system.close()
    await store.close()


async def spoofed(place: Town) -> float:
    return sum([await daemon.metric("if_bus_spoofed_replies_total") for daemon in place.daemons])


async def holds_on(client: Client) -> bool:
    """Whether its session still lives, and nobody has said bye for it."""
    try:
        await client.call(coordinator.Renew())
    except SessionLost:
        return False
    return True


# -- JetStream as somebody's mouth -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "subject", "body", "reply"),
    [
        # its answer is a command, with everything in it that the command does not know
        ("operator", "$JS.API.STREAM.INFO.IF_EVENTS", {}, "if.v1.coordinator.bye.{victim}"),
        ("operator", "$JS.API.STREAM.MSG.GET.IF_EVENTS", {"seq": 1}, "if.v1.coordinator.bye.{victim}"),
        ("backup", "$JS.API.STREAM.NAMES", {}, "if.v1.coordinator.bye.{victim}"),
        ("backup", "$JS.API.STREAM.INFO.IF_EVENTS", {}, "if.v1.coordinator.bye.{victim}"),
    ],
)
async def test_jetstream_says_no_command_in_anybody_s_name(
    there: Town, who: str, subject: str, body: dict[str, Any], reply: str
) -> None:
    """The server lets its answers go to any subject: what comes so is not carried out."""
    token = credentials.make().public_key[-12:]
    victim = f"victim-{token}"
    bob, stranger = await there.create(victim), await there.create(f"{who}-{token}", role=who)
    async with there.client(bob) as client, there.raw(stranger) as mouth:
        await client.submit([{"id": f"t-{token}"}])  # so that there is an event to be delivered
        await client.call(coordinator.Hello())
        before = await spoofed(there)
        data = json.dumps(body).encode()
        assert await mouth.publish(subject, data, reply=reply.format(victim=victim)), "the server allows it"

        async def refused() -> bool:
            return await spoofed(there) > before

        await eventually(refused)
        assert await holds_on(client)


async def test_a_snapshot_that_is_delivered_to_a_command_commands_nothing(there: Town) -> None:
    bob, copies = await there.create("snapped"), await there.create("snaps", role="backup")
    async with there.client(bob) as client, there.raw(copies) as mouth:
        await client.call(coordinator.Hello())
        await client.submit([{"id": "snapped-1"}])
        before = await spoofed(there)
        asked = {"deliver_subject": "if.v1.coordinator.bye.snapped", "no_consumers": True, "chunk_size": 1024}
        assert await mouth.publish(
            "$JS.API.STREAM.SNAPSHOT.IF_EVENTS", json.dumps(asked).encode(), reply="_INBOX.snaps.x"
        )

        async def at_its_end() -> bool:
            return await spoofed(there) >= before + 2  # a part of it, and the word that it has ended

        await eventually(at_its_end, 30)
        assert await holds_on(client)


async def test_who_may_not_change_anything_may_not_ask_jetstream_either(there: Town) -> None:
    """Its answer would go among the events, for one."""
    observer, backup = await there.create("looking", role="observer"), await there.create("copying", role="backup")
    async with there.raw(observer) as stranger:
        for api in (
            *("INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.INFO.IF_EVENTS", "STREAM.MSG.GET.IF_EVENTS"),
            *("CONSUMER.CREATE.IF_EVENTS", "DIRECT.GET.IF_EVENTS", "STREAM.SNAPSHOT.IF_EVENTS"),
        ):
            assert not await stranger.publish(f"$JS.API.{api}", reply="if.v1.event.task.completed"), api
    async with there.raw(backup) as stranger:
        for stream in ("X", "KV_x", "IF_REQUESTS"):  # it could take in every request there is
            for verb in ("SNAPSHOT", "RESTORE", "INFO"):
                assert not await stranger.publish(f"$JS.API.STREAM.{verb}.{stream}"), stream


async def test_a_request_that_wants_no_answer_is_nobody_s(there: Town) -> None:
    """Only the inbox tells a session's own request from what JetStream was made to say."""
    quiet = await there.create("quiet")
    async with there.client(quiet) as client, there.raw(quiet) as stranger:
        await client.call(coordinator.Hello())
        before = await spoofed(there)
        assert await stranger.publish("if.v1.coordinator.bye.quiet")

        async def refused() -> bool:
            return await spoofed(there) > before

        await eventually(refused)
        assert await holds_on(client)


# -- an agent against another ----------------------------------------------------------------------------------------


async def test_a_trace_goes_nowhere_that_its_sender_may_not_publish(there: Town) -> None:
    """The server tells where a message went to whatever subject its header names; it did so without asking, once."""
    eve, bob = await there.create("tracer"), await there.create("traced")
    async with there.raw(eve) as stranger, there.raw(bob) as victim, there.raw(there.operator) as watch:
        assert await victim.subscribe("_INBOX.traced.>")
        assert await watch.subscribe("if.v1.event.>")
        for to in ("_INBOX.traced.x", "if.v1.event.task.claimed", "if.v1.coordinator.bye.traced", "$SYS.REQ.USER.AUTH"):
            for more in ({}, {"Nats-Trace-Only": "true"}):
                headers = {"Nats-Trace-Dest": to, **more}
                await stranger.client.publish("if.v1.coordinator.get.tracer", reply="_INBOX.tracer.x", headers=headers)
        await stranger.settle()
        assert len(stranger.errors) == 8, "each is denied"
        await victim.settle()
        await watch.settle()
        assert victim.got == []
        assert not any(b"trace" in data for _, data in watch.got)


async def test_what_another_holds_is_not_touched_by_who_knows_its_names(there: Town) -> None:
    """A fence and the name of a hold are no secrets, and no rights."""
    alice, eve = await there.create("holder", account="acme"), await there.create("grabber", account="acme")
    async with there.client(alice) as mine, there.client(eve) as other:
        await mine.submit([{"id": "held-1"}])
        claim = await mine.claim("held-1")
        await mine.ask(governor.Reserve(hold="h1", amount_micro_usd=1000))
        await other.hello()
        lost: list[Any] = [
            coordinator.Complete(task="held-1", fence=claim.fence),
            coordinator.Fail(task="held-1", fence=claim.fence, error="x"),
            coordinator.Release(task="held-1", fence=claim.fence),
            governor.Reserve(hold="h2", amount_micro_usd=1, task="held-1", fence=claim.fence),
            governor.Spend(entry="e1", amount_micro_usd=1, task="held-1", fence=claim.fence),
        ]
        for message in lost:
            with pytest.raises(ClaimLost):
                await other.call(message)
        for ending in (governor.Commit(hold="h1", amount_micro_usd=1), governor.Void(hold="h1")):
            with pytest.raises(UnknownHold):
                await other.call(ending)
        for account in ("acme", "acme/@holder", "@holder", "acme/@holder/@grabber"):
            with pytest.raises(Forbidden):
                await other.call(governor.Spend(entry="e2", amount_micro_usd=1, account=account))
        reply = await other.call(coordinator.Renew(claims=(coordinator.HeldClaim("held-1", claim.fence),)))
        assert [one.task for one in reply.lost] == ["held-1"], "its own view of it"
        with pytest.raises(FabricError):
            await other.call(chassis.Run(module="sha256:" + "0" * 64, task="held-1", fence=claim.fence))
        assert (await mine.get("held-1")).session == "holder"
        await claim.complete({})


async def test_the_money_of_another_session_is_no_account_below_one_s_own(there: Town) -> None:
    eve = await there.create("thrifty", account="acme/research")
    async with there.client(eve) as client:
        for account in ("acme/research/@holder", "acme/research/team/@holder", "acme/research/@thrifty"):
            with pytest.raises(BadRequest):
                await client.call(coordinator.Hello(account=account))


@pytest.mark.parametrize("name", ["-", "_", "--help", "-x", "a" * 64, "event", "admin", "identity", "ANN", "Quiet"])
async def test_a_strange_name_is_a_name_like_any_other(there: Town, name: str) -> None:
    """Its inbox is its own, also when another name begins or is spelt alike."""
    made = await there.create(name)
    async with there.client(made) as client, there.raw(made) as stranger:
        assert (await client.call(wire.Whoami())).agent == name
        await client.call(coordinator.Hello())
        assert await stranger.subscribe(f"_INBOX.{name}.>")
        for other in (f"{name}x", name[:-1] or "z", name.swapcase() if name.swapcase() != name else "y"):
            assert not await stranger.subscribe(f"_INBOX.{other}.>")
            assert not await stranger.publish(f"if.v1.coordinator.bye.{other}")


async def test_a_record_that_the_configuration_names_as_an_operator_lets_nobody_in(there: Town) -> None:
    """He was an agent once, with another key: that one must not be he, nor bind what he may spend."""
    former = credentials.make("ann")
    async with a_gate(there) as (_, store):
        record = records.Agent(role="agent", public_key=former.public_key, account="acme", capabilities=("rust",))
        writes = (
            Put(records.agent_key("ann"), records.encode(record)),
            Put(records.owner_key(former.public_key), b"ann"),
        )
        await store.txn(Txn((), writes))
    with pytest.raises(Forbidden):
        async with there.client(former):
            pass
    async with there.client(there.operator) as ann:
        assert (await ann.call(coordinator.Hello(account="other", capabilities=("any",)))).account == "other"


async def test_two_daemons_do_not_give_one_key_to_two_names() -> None:
    """That nobody has it is read before the transaction, and has to hold in it."""
    store = MemoryStore(CLOCK)
    await store.connect()
    key = credentials.make().public_key

    async with hall(store, MemoryBus(MemoryHub())) as (context, register):

        async def rival_comes_between() -> None:
            record = records.Agent(role="operator", public_key=key)
            puts = (Put(records.agent_key("rival"), records.encode(record)), Put(records.owner_key(key), b"rival"))
            await store.txn(Txn((), puts))

        class Slow(Receipts):
            async def current(self) -> int:
                if await store.get(records.owner_key(key)) is None:
                    await rival_comes_between()
                return await super().current()

        slow = Register(context, Slow(store, CLOCK, keep_s=600))
        message = wire.CreateAgent(agent="me", public_key=key, request_id="r1")

        def decide(_: Any) -> records.Agent:
            return records.Agent(role="agent", public_key=key)

        def reply_of(agent: records.Agent) -> wire.AgentReply:
            return wire.AgentReply(agent="me", role=agent.role, public_key=agent.public_key)

        with pytest.raises(Conflict, match="is rival's"):
            await slow.change(message, Caller("ann", True), decide, reply_of)
        assert await register.owner_of(key) == "rival"
        assert await register.get("me") is None
    await store.close()


# -- whoever knocks --------------------------------------------------------------------------------------------------


async def knock(
    place: Town, connect: dict[str, Any] | bytes, *, one: Credential | None = None, wait: bool = True
) -> tuple[bytes, asyncio.StreamWriter, asyncio.StreamReader]:
    """What the server says to a CONNECT; pings are answered."""
    host, port = place.nats.urls[0].rpartition("//")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    nonce = json.loads((await reader.readline())[5:])["nonce"]
    if isinstance(connect, dict):
        if one is not None:
            signature = nkeys.from_seed(bytearray(one.seed.encode())).sign(nonce.encode())
            connect = {"nkey": one.public_key, "sig": base64.b64encode(signature).decode(), **connect}
        connect = json.dumps({"lang": "x", "version": "1", "verbose": False, **connect}).encode()
    writer.write(b"CONNECT " + connect + b"\r\nPING\r\n")
    line = b""
    async with asyncio.timeout(20):
        while wait and (line := await reader.readline()) == b"PING\r\n":
            writer.write(b"PONG\r\n")
    return line.strip(), writer, reader


HOSTILE: dict[str, dict[str, Any] | bytes] = {
    "lines and colours": {"name": "\x1b[2J\r\n{}\n\u2028\x00"},
    "a long name": {"name": "n" * 3500},
    "a long key": {"nkey": "U" * 3500, "sig": "x"},
    "a long proof": {"nkey": "U" + "A" * 55, "sig": "A" * 3000},
    "more than a control line": {"nkey": "U" * 1_000_000},
    "no text": b'{"name":"\xff\xfe\xc3","nkey":"\xff\xff","sig":"\xed\xa0\x80","lang":"\xff"}',
    "half a letter": b'{"name":"\\ud800","nkey":"\\udfff"}',
    "deep": b'{"name":' + b"[" * 1500 + b"]" * 1500 + b"}",
    "other kinds": b'{"name":{"a":1},"nkey":7,"sig":[]}',
    "no object": b"[]",
    "a key of zeros": {"nkey": "UAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAF", "sig": "A" * 86},
    "everything at once": {"user": "ann", "pass": "x", "auth_token": "y", "jwt": "a.b.c", "nkey": "U", "sig": "="},
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_whatever_a_stranger_says_of_itself_the_gate_goes_on(there: Town, what: str) -> None:
    daemon = there.daemons[0]
    restarts = await daemon.metric("if_actor_restarts_total")
    with contextlib.suppress(ConnectionError):
        said, writer, _ = await knock(there, HOSTILE[what])
        writer.close()
        assert not said.startswith(b"PONG"), said
    made = await there.create(f"after-{list(HOSTILE).index(what)}")
    async with there.client(made) as client:
        await client.call(wire.Whoami())
    assert await daemon.metric("if_actor_restarts_total") == restarts
    lines = daemon.log_text().rstrip("\n").split("\n")
    assert all(isinstance(json.loads(line), dict) for line in lines), "an entry is a line"
    assert max(map(len, lines)) < 4000


async def test_of_a_flood_of_strangers_the_log_tells_of_some_and_counts_the_rest(there: Town) -> None:
    daemon, alice = there.daemons[0], await there.create("amidst")
    before = [line for line in daemon.log() if line["event"] == "not let in"]
    refused = await daemon.metric("if_identity_refused_total")

    async def knocks(number: int) -> None:
        with contextlib.suppress(ConnectionError):
            one = credentials.make() if number % 2 else None
            _, writer, _ = await knock(there, {"name": "flood"}, one=one)
            writer.close()

    async with asyncio.TaskGroup() as flood:
        for number in range(200):
            flood.create_task(knocks(number))
        async with there.client(alice, timeout_s=20) as client:
            await client.call(wire.Whoami())
    assert await daemon.metric("if_identity_refused_total") - refused > 100
    told = [line for line in daemon.log() if line["event"] == "not let in"][len(before) :]
    assert 0 < len(told) < 100
    await eventually(lambda: _says_how_many(there, len(before)))


async def _says_how_many(place: Town, before: int) -> bool:
    """One more is refused; whether the log says by now how many were left out."""
    _, writer, _ = await knock(place, {"name": "one more"})
    writer.close()
    told = [line for line in place.daemons[0].log() if line["event"] == "not let in"][before:]
    return any(line.get("not_logged_before", 0) > 0 for line in told)


def question() -> bytes:
    """What a server asks about a connection that names no key."""
    body = {"server_id": {"id": "N"}, "user_nkey": "U", "type": "authorization_request"}
    return b"e30." + base64.urlsafe_b64encode(json.dumps({"nats": body}).encode()).rstrip(b"=") + b".c2ln"


async def test_a_gate_that_is_closed_or_asked_too_long_ago_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash of its actor there is a new gate, and a server that has given up hears no answer any more."""
    bus, store = MemoryBus(MemoryHub()), MemoryStore(CLOCK)
    await store.connect()
    await bus.connect()

    async def answered() -> bool:
        try:
            return bool((await bus.request(callout.SUBJECT, question(), timeout_s=0.2)).data)
        except Unavailable:
            return False

    async with hall(store, bus) as (context, register):
        door = Gate(context, bus, register, credentials.make(kind="account").seed)
        await door.open()
        assert await answered()
        with monkeypatch.context() as late:
            late.setattr(gate, "LATE_S", -1.0)
            assert not await answered()
        with monkeypatch.context() as full:
            full.setattr(gate, "WAITING_MAX", 0)
            assert not await answered()
        assert await answered()
        await door.close()
        await door.close()
        assert not await answered()
    await bus.close()
    await store.close()


# -- those that are there --------------------------------------------------------------------------------------------


async def is_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Returns when the server has ended the connection."""
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
    writer.close()


async def test_more_connections_than_a_page_holds_are_all_found_and_a_damaged_record_keeps_none_from_it(
    there: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "PAGE", 10)
    monkeypatch.setattr(gate, "GATHER_S", 1.0)  # a loaded machine may take its time
    many, hurt = await there.create("many"), await there.create("hurt")
    async with a_gate(there) as (looking, store):
        lines = [(await knock(there, {"name": "n" * 2000}, one=many))[1:] for _ in range(25)]
        harmed = (await knock(there, {}, one=hurt))[1:]
        stay = [asyncio.create_task(is_closed(reader, writer)) for writer, reader in (*lines, harmed)]
        kv = await store.get(records.agent_key("many"))
        assert kv is not None
        gone = replace_agent(records.agent(kv), revoked_at=CLOCK.wall_ms())
        writes = (Put(kv.key, records.encode(gone)), Put(records.agent_key("hurt"), b'{"role": "king"}'))
        await store.txn(Txn((), writes))
        assert await looking.sweep() == 25, "in one go"
        await asyncio.gather(*stay[:-1])
        assert not stay[-1].done(), "who it is cannot be known, and so not that it is nobody"
        harmed[0].close()
        await stay[-1]


def replace_agent(agent: records.Agent, **changes: Any) -> records.Agent:
    found: records.Agent = msgspec.structs.replace(agent, **changes)
    return found


async def test_a_client_that_is_shut_out_says_so_at_once_wherever_it_waits(there: Town) -> None:
    """Not when the long poll that it was in the middle of would have ended."""
    uses: dict[str, Callable[[Client], Awaitable[Any]]] = {
        "tasks": lambda client: anext(client.tasks(wait_s=30)),
        "work": lambda client: client.work(_nothing, concurrency=3),
        "call": lambda client: client.call(coordinator.Next(wait_s=30), attempt_s=31),
        "events": _events,
    }
    for name, use in uses.items():
        made = await there.create(f"shut-{name}")
        client = there.client(made, timeout_s=60, accepts=("nothing-that-is-there",))
        client.leave_on_exit = True
        before = asyncio.all_tasks()
        async with asyncio.timeout(20), client:
            await client.hello()
            using = asyncio.ensure_future(use(client))
            await client.call(wire.Whoami())  # what it waits for has been asked by now
            await there.ask(wire.RevokeAgent(agent=f"shut-{name}"))
            with pytest.raises((Forbidden, Unavailable, BaseExceptionGroup)) as caught:
                await using
        assert "let this credential in" in repr(caught.value) + str(getattr(caught.value, "exceptions", "")), name
        assert {task for task in asyncio.all_tasks() - before if not task.done()} == set(), name


async def _nothing(_: Any) -> None:
    """Works on nothing."""


async def _events(client: Client) -> None:
    async with client.subscribe() as events:
        async for _ in events:
            pass


# -- bad weather -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a town of its own, and servers that are away for a while
async def test_while_etcd_says_nothing_in_time_nobody_is_told_that_they_are_nobody(tmp_path: Path) -> None:
    """The gate itself gives up on etcd here, long before the server gives up on the gate."""
    with needed("etcd and nats-server"):
        short = {"etcd": {"timeout_seconds": 1.0, "attempt_timeout_seconds": 0.4}}
        async with town(tmp_path, size=1, daemons=1, coordinator=short) as place:
            alice = await place.create("alice")
            place.etcd.freeze()
            with pytest.raises(Unreachable):
                async with place.client(alice, timeout_s=5):
                    pass
            assert await place.daemons[0].metric("if_identity_refused_total", why="unavailable") > 0
            place.etcd.thaw()
            await eventually(lambda: gets_in(place, alice), 60)


async def gets_in(place: Town, one: Credential) -> bool:
    """Whether it is let in by now. That it is nobody is no answer."""
    try:
        async with place.client(one) as client:
            await client.call(wire.Whoami())
    except (Unreachable, Unavailable):
        return False
    return True


@pytest.mark.slow  # a town of its own, and servers that are away for a while
async def test_while_no_daemon_is_there_nobody_is_told_that_they_are_nobody(tmp_path: Path) -> None:
    """After a power cut the agents are often back before the daemons."""
    with needed("etcd and nats-server"):
        async with town(tmp_path, size=1, daemons=1) as place:
            alice, bob = await place.create("alice"), await place.create("bob")
            async with place.client(bob, timeout_s=60) as client:
                await client.call(wire.Whoami())
                await place.daemons[0].kill()
                server = place.nats.members[0]
                await server.kill()
                await server.start_again()
                with pytest.raises(Unreachable):
                    async with place.client(alice, timeout_s=8):
                        pass
                await place.daemons[0].start()
                await eventually(lambda: gets_in(place, alice), 60)
                assert (await client.call(wire.Whoami())).agent == "bob", "it came back by itself"


@pytest.mark.slow  # a town of its own, and two hundred clients
async def test_two_hundred_agents_are_back_after_a_restart_of_nats_and_one_that_was_revoked_meanwhile_is_not(
    tmp_path: Path,
) -> None:
    with needed("etcd and nats-server"):
        async with town(tmp_path, size=3, daemons=2) as place, contextlib.AsyncExitStack() as all_of_them:
            made = [credentials.make(f"a{number}") for number in range(200)]
            async with place.client(place.operator) as operator:
                for one in made:
                    await operator.call(wire.CreateAgent(agent=one.session, public_key=one.public_key))
            clients = [await all_of_them.enter_async_context(place.client(one, timeout_s=60)) for one in made]
            store = Etcd(EtcdSettings(endpoints=(place.etcd.url,)), CLOCK)
            await store.connect()
            await asyncio.gather(*(server.kill() for server in place.nats.members))
            kv = await store.get(records.agent_key("a0"))
            assert kv is not None
            revoked = replace_agent(records.agent(kv), revoked_at=CLOCK.wall_ms())
            await store.txn(Txn((), (Put(kv.key, records.encode(revoked)),)))
            await store.close()
            await place.nats.start()

            async def back(client: Client) -> bool:
                try:
                    return bool((await client.call(wire.Whoami())).agent)
                except (Unreachable, Unavailable):
                    return False

            gone, *others = clients
            await asyncio.gather(*(eventually(partial(back, client), 60) for client in others))
            with pytest.raises(Forbidden, match="let this credential in"):
                await eventually(partial(back, gone), 60)


@pytest.mark.slow  # a town of its own, and a server that goes
async def test_a_revocation_while_a_server_restarts_holds_everywhere(tmp_path: Path) -> None:
    with needed("etcd and nats-server"):
        async with town(tmp_path, size=3, daemons=2, identity={"sweep_seconds": 1.0}) as place:
            made = await place.create("everywhere")
            clients = [place.client(made, timeout_s=60) for _ in range(9)]
            async with contextlib.AsyncExitStack() as all_of_them:
                for client in clients:
                    await all_of_them.enter_async_context(client)
                going = asyncio.create_task(place.nats.members[1].kill())
                async with place.client(place.operator, timeout_s=30) as operator:
                    await operator.call(wire.RevokeAgent(agent="everywhere"))
                await going
                await place.nats.members[1].start_again()

                async def out(client: Client) -> bool:
                    try:
                        await client.call(wire.Whoami())
                    except Forbidden:
                        return True
                    except (Unreachable, Unavailable):
                        return False
                    return False

                for client in clients:
                    await eventually(partial(out, client), 60)
