"""Who belongs gets in as who they are, and nobody else, on real servers: a NATS cluster that asks, daemons that answer."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats.errors
import nkeys
import pytest
import wasmtime

from ifabric import credentials
from ifabric.audit import reading
from ifabric.audit.verifying import Examination
from ifabric.client import Client
from ifabric.errors import CapabilityMissing, Conflict, Forbidden, Unavailable, Unreachable
from ifabric.store.base import Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.wire import coordinator, protocol, subjects
from ifabric.wire import identity as wire
from ifabric_actors.identity import records
from tests.conftest import needed
from tests.system.conftest import CLOCK, eventually
from tests.system.town import Town, town

HELLO = '(module (memory (export "memory") 1) (func (export "_start")))'


@pytest.fixture(scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Town]:
    """One town for the module; tests take names of their own."""
    with needed("etcd and nats-server"):
        opening = town(tmp_path_factory.mktemp("town"))
        made = await opening.__aenter__()
    yield made
    await opening.__aexit__(None, None, None)


async def is_out(client: Client) -> bool:
    """Whether NATS has put it out. Any other refusal is none."""
    try:
        await client.call(wire.Whoami())
    except Forbidden as error:
        return "does not let this credential in" in error.message
    return False


async def test_an_agent_works_as_itself_with_nothing_but_its_credential(there: Town) -> None:
    alice = await there.create("worker", account="acme/research", capabilities=("rust",))
    async with there.client(alice) as client, client.subscribe() as events:
        assert client.session == "worker"
        await client.submit([{"id": "w1", "needs": ["rust"]}])
        claim = await client.claim("w1")
        await claim.complete({"done": True})
        async with asyncio.timeout(10):
            heard = {(await anext(events)).event for _ in range(3)}
        assert heard == {"submitted", "claimed", "completed"}
        assert (await client.call(wire.Whoami())).account == "acme/research"
        async with client.hold(1_000) as hold:  # which the chassis asks the governor about, in its name
            assert (await client.run_module(wasmtime.wat2wasm(HELLO), hold=hold)).exit_code == 0


async def test_the_account_and_the_capabilities_of_an_agent_are_what_it_was_given(there: Town) -> None:
    bound = await there.create("bound", account="acme/research", capabilities=("rust", "wasm"))
    free = await there.create("free")
    async with there.client(bound) as client:
        reply = await client.call(coordinator.Hello())
        assert reply.account == "acme/research", "its own, without a word"
        assert (await client.call(coordinator.Hello(account="acme/research/team"))).account == "acme/research/team"
        for account in ("acme", "acme/researchers", "rich"):
            with pytest.raises(Forbidden, match="may not spend"):
                await client.call(coordinator.Hello(account=account))
        with pytest.raises(Forbidden, match="was not given python"):
            await client.call(coordinator.Hello(capabilities=("rust", "python")))
    async with there.client(bound, capabilities=["rust"]) as client:
        await client.submit([{"id": "b1", "needs": ["wasm"]}])
        with pytest.raises(CapabilityMissing):
            await client.claim("b1")
    async with there.client(free) as client:
        with pytest.raises(Forbidden, match="has no account"):
            await client.call(coordinator.Hello(account="acme"))
        assert (await client.call(coordinator.Hello(capabilities=("anything",)))).account is None


async def test_a_denied_publish_is_a_clear_error_at_once_and_no_timeout(there: Town) -> None:
    mallory = await there.create("mallory")
    async with there.client(mallory, timeout_s=60) as client:
        async with asyncio.timeout(10):
            with pytest.raises(
                Forbidden, match=r"does not allow a publish to if\.v1\.admin\.coordinator\.cancel\.mallory"
            ):
                await client.call(coordinator.Cancel(task="w1"))
            with pytest.raises(Forbidden, match=r"subscription to if\.v1\.event\.budget"):
                async with client.subscribe("budget"):
                    pass
            with pytest.raises(Forbidden):
                await client.journal()


async def test_whoever_is_revoked_is_out_at_once_on_a_running_cluster(there: Town) -> None:
    gone, stays = await there.create("gone"), await there.create("stays")
    async with there.client(gone, timeout_s=20) as one, there.client(stays) as other:
        await one.call(coordinator.Hello())
        await other.call(coordinator.Hello())
        await there.ask(wire.RevokeAgent(agent="gone", why="a test"))

        await eventually(lambda: is_out(one))
        await other.call(coordinator.Hello())
    with pytest.raises(Forbidden, match="unknown, revoked"):
        async with there.client(gone):
            pass
    with pytest.raises(Conflict, match="was revoked"):
        await there.create("gone")


async def test_a_new_key_puts_the_old_one_out_after_its_grace(there: Town) -> None:
    old, new, newer = await there.create("turns"), credentials.make("turns"), credentials.make("turns")
    async with there.client(old, timeout_s=20) as before:
        await there.ask(wire.RotateAgent(agent="turns", public_key=new.public_key, grace_s=3600))
        assert (await before.call(wire.Whoami())).public_key == new.public_key, "it is let be while the grace lasts"
        async with there.client(old) as again, there.client(new) as after:
            assert (await again.call(wire.Whoami())).former_until
            assert (await after.call(wire.Whoami())).agent == "turns"
        await there.ask(wire.RotateAgent(agent="turns", public_key=newer.public_key))

        await eventually(lambda: is_out(before))
    for key in (old, new):
        with pytest.raises(Forbidden):
            async with there.client(key):
                pass


@pytest.mark.slow  # a town, or programs, of its own
async def test_a_connection_that_slipped_in_while_it_was_revoked_is_found(tmp_path: Path) -> None:
    """The daemon that revoked died before it could end anything: the record is all there is."""
    with needed("etcd and nats-server"):
        async with town(tmp_path, size=1, daemons=1, identity={"sweep_seconds": 0.5}) as place:
            slippery = await place.create("slippery")
            store = Etcd(EtcdSettings(endpoints=(place.etcd.url,)), CLOCK)
            await store.connect()
            async with place.client(slippery, timeout_s=20) as client:
                await client.call(wire.Whoami())
                kv = await store.get(records.agent_key("slippery"))
                assert kv is not None
                there = records.agent(kv)
                revoked = records.Agent(role=there.role, public_key=there.public_key, revoked_at=CLOCK.wall_ms())
                await store.txn(Txn((), (Put(kv.key, records.encode(revoked)),)))

                await eventually(lambda: is_out(client))
            await store.close()


@pytest.mark.slow  # a town, or programs, of its own
async def test_while_etcd_is_away_nobody_is_told_that_they_are_nobody(tmp_path: Path) -> None:
    """Not now is no no: whoever comes then waits, and is let in when it is back."""
    with needed("etcd and nats-server"):
        async with town(tmp_path, size=1, daemons=1) as place:
            alice = await place.create("alice")
            place.etcd.freeze()
            with pytest.raises(Unreachable):
                async with place.client(alice, timeout_s=3):
                    pass
            place.etcd.thaw()

            async def in_again() -> bool:
                try:
                    async with place.client(alice) as client:
                        await client.call(wire.Whoami())
                except (Unreachable, Unavailable):  # and never that it is nobody
                    return False
                return True

            await eventually(in_again, 30)


async def test_a_frozen_daemon_keeps_nobody_out_when_there_is_another(there: Town) -> None:
    alice = await there.create("patient")
    there.daemons[0].freeze()
    try:

        async def let_in() -> bool:
            try:
                async with there.client(alice, timeout_s=10) as client:
                    return (await client.call(wire.Whoami())).agent == "patient"
            except (Unreachable, Unavailable):
                return False

        await eventually(let_in, 30)
    finally:
        there.daemons[0].thaw()


# -- the matrix ------------------------------------------------------------------------------------------------------

JETSTREAM = (
    *("INFO", "STREAM.NAMES", "STREAM.LIST", "ACCOUNT.PURGE.FABRIC", "META.LEADER.STEPDOWN", "SERVER.REMOVE"),
    *(
        f"STREAM.{verb}.{stream}"
        for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "INFO", "MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE")
        for stream in ("IF_EVENTS", "IF_AUDIT", "OBJ_IF_MODULES")
    ),
    *("CONSUMER.CREATE.IF_EVENTS", "CONSUMER.CREATE.IF_EVENTS.x", "CONSUMER.DURABLE.CREATE.IF_EVENTS.x"),
    *(
        "CONSUMER.DELETE.IF_EVENTS.x",
        "CONSUMER.LIST.IF_EVENTS",
        "CONSUMER.MSG.NEXT.IF_EVENTS.x",
        "DIRECT.GET.IF_EVENTS",
    ),
)
SYSTEM = (
    *("$SYS.REQ.USER.AUTH", "$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.X.KICK"),
    *("$SYS.REQ.SERVER.X.LDM", "$SYS.REQ.SERVER.X.RELOAD", "$SYS.REQ.ACCOUNT.FABRIC.CONNZ", "$SYS.REQ.CLAIMS.UPDATE"),
    *("$SYS.REQ.CLAIMS.DELETE", "$SYS.ACCOUNT.FABRIC.CONNECT", "$SYS.SERVER.X.SHUTDOWN", "$SYS._INBOX.x.y"),
)


def forbidden_subjects(me: str, other: str) -> list[str]:
    """Where an agent named `me` must not publish."""
    verbs = [(r.component, r.verb, r.admin) for r in protocol.REQUESTS]
    return [
        *(subjects.request(component, verb, other, admin=admin) for component, verb, admin in verbs),
        *(subjects.request(component, verb, me, admin=True) for component, verb, _ in verbs),
        *(subjects.event(*about) for about in protocol.EVENTS),
        *(f"if.v1.audit.{component}.{verb}" for component, verb, _ in verbs),
        *(f"if.v1.{what}.x.{me}" for what in ("event", "audit", "admin", "fabric", "else")),
        *(f"if.v2.coordinator.claim.{me}", f"if.v1.coordinator.claim.x.{me}", f"if.v1.coordinator.{me}", me),
        *(f"_INBOX.{other}.x", "_INBOX.x", f"_INBOX.{me}", f"_INBOX.{me}x.y", "_IFABRIC.x", "_IFABRIC.x.y"),
        *(f"$JS.API.{what}" for what in JETSTREAM),
        *("$JS.ACK.IF_EVENTS.x.1.1.1.1.1", "$JS.FC.IF_EVENTS.x", "$O.IF_MODULES.M.x", "$O.IF_MODULES.C.x", "$KV.x.y"),
        *SYSTEM,
        *(
            f"$SRV.{what}{whom}"
            for what in ("PING", "INFO", "STATS")
            for whom in ("", ".coordinator", ".coordinator.x")
        ),
    ]


def forbidden_subscriptions(me: str, other: str) -> list[tuple[str, str]]:
    """What it must not hear, plainly or as a member of a queue group."""
    wide = (">", "*", "*.>", "if.>", "if.v1.>", "if.v1.*.>", "if.v1.*.*.*", f"if.v1.*.*.{me}", "if.v1.admin.>")
    near = (
        "_INBOX.>",
        "_INBOX.*",
        "_INBOX.*.>",
        f"_INBOX.{other}.>",
        f"_INBOX.{me}",
        "_IFABRIC.>",
        "$SYS.>",
        "$JS.>",
        "$O.>",
    )
    events = ("if.v1.event.>", "if.v1.event.*.*", "if.v1.event.budget.>", "if.v1.event.chassis.>", "if.v1.audit.>")
    verbs = [subjects.endpoint(r.component, r.verb, admin=r.admin) for r in protocol.REQUESTS]
    groups = [(verb, r.component) for verb, r in zip(verbs, protocol.REQUESTS, strict=True)]
    return [
        *((subject, "") for subject in (*wide, *near, *events, *verbs)),
        *groups,
        *((subject, "coordinator") for subject in (*wide, *near, *events)),
        *((f"$SRV.{what}", "q") for what in ("PING", "INFO", "STATS")),
    ]


async def test_of_more_than_three_hundred_attempts_to_be_more_than_itself_none_succeeds_and_all_are_logged(
    there: Town,
) -> None:
    eve, bob = await there.create("claimed"), await there.create("bob")  # a name that is also an event's
    done = 0
    async with (
        there.raw(eve) as stranger,
        there.raw(bob, server=1) as victim,
        there.raw(there.operator, server=2) as watch,
    ):
        assert await victim.subscribe("_INBOX.bob.>")
        assert await watch.subscribe("if.v1.event.>")
        for subject in forbidden_subjects("claimed", "bob"):
            assert not await stranger.publish(subject, b'{"task": "x"}'), f"published to {subject}"
            done += 1
        for subject, queue in forbidden_subscriptions("claimed", "bob"):
            assert not await stranger.subscribe(subject, queue), f"subscribed to {subject} {queue}"
            done += 1
        violations = there.nats_log().count("FABRIC/user:claimed@")
        assert violations >= done, "the servers log each one, with the name"
        spoofed = (
            "_INBOX.bob.x",
            "_INBOX.x",
            "if.v1.event.task.claimed",
            "if.v1.admin.coordinator.purge.ann",
        )
        before = [await daemon.metric("if_bus_spoofed_replies_total") for daemon in there.daemons]
        for reply in spoofed:
            for verb in ("hello", "get", "list", "renew"):
                assert await stranger.publish(f"if.v1.coordinator.{verb}.claimed", b'{"task": "x"}', reply=reply)
                done += 1

        async def refused() -> bool:
            now = [await daemon.metric("if_bus_spoofed_replies_total") for daemon in there.daemons]
            return sum(now) - sum(before) == 4 * len(spoofed)

        await eventually(refused)
        await victim.settle()
        assert [got for got in victim.got if got[0].startswith("_INBOX.bob.x")] == []
        assert not any(
            subject == "if.v1.event.task.claimed" and data == b'{"task": "x"}' for subject, data in watch.got
        )
        assert stranger.got == []
    assert done >= 350
    print(f"{done} attempts, all denied")


async def test_an_observer_changes_nothing_and_a_backup_reads_no_request(there: Town) -> None:
    observer = await there.create("looks", role="observer")
    backup = await there.create("copies", role="backup")
    async with there.raw(observer) as stranger:
        assert await stranger.publish("if.v1.coordinator.list.looks")
        assert await stranger.subscribe("if.v1.event.>")
        for verb in ("hello", "submit", "claim", "next", "complete"):
            assert not await stranger.publish(f"if.v1.coordinator.{verb}.looks")
        assert not await stranger.publish("if.v1.admin.coordinator.cancel.looks")
        assert not await stranger.publish("$JS.API.STREAM.PURGE.IF_EVENTS")
    async with there.raw(backup) as stranger:
        assert await stranger.publish("$JS.API.STREAM.SNAPSHOT.IF_EVENTS")
        for subject in (
            "if.v1.coordinator.list.copies",
            "$JS.API.STREAM.DELETE.IF_EVENTS",
            "$JS.API.STREAM.PURGE.IF_EVENTS",
        ):
            assert not await stranger.publish(subject)
        assert not await stranger.subscribe("if.v1.>")


def forbidden_to_auditors(me: str) -> list[str]:
    """Where an auditor must not publish: among commands, events and records, and to JetStream but to read."""
    reading = ("STREAM.INFO.", "STREAM.MSG.GET.", "CONSUMER.CREATE.", "CONSUMER.DELETE.")
    streams = [
        what
        for what in JETSTREAM
        if not (
            what.startswith(reading) and what.split(".")[-1 if what[-1] != "x" else -2] in ("IF_EVENTS", "IF_AUDIT")
        )
    ]
    verbs = [(r.component, r.verb, r.admin) for r in protocol.REQUESTS if r.verb != "whoami"]
    return [
        *(subjects.request(component, verb, me, admin=admin) for component, verb, admin in verbs),
        *(subjects.request(component, verb, "bob", admin=admin) for component, verb, admin in verbs),
        *(subjects.audit(component, verb) for component, verb, _ in verbs),
        *(subjects.event(*about) for about in protocol.EVENTS),
        *(f"$JS.API.{what}" for what in streams),
        *(
            f"$JS.API.STREAM.{verb}.IF_AUDIT"
            for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "MSG.DELETE", "RESTORE")
        ),
        *("_INBOX.bob.x", "_IFABRIC.x", "$O.IF_MODULES.M.x", "$SRV.PING", *SYSTEM),
    ]


async def test_an_auditor_reads_the_audit_and_changes_and_claims_nothing(there: Town) -> None:
    auditor = await there.create("checks", role="auditor")
    done = 0
    async with there.raw(auditor) as stranger:
        for subject in (
            *(
                "$JS.API.STREAM.INFO.IF_AUDIT",
                "$JS.API.STREAM.MSG.GET.IF_AUDIT",
                "$JS.API.CONSUMER.CREATE.IF_AUDIT.x.if.y",
            ),
            *("$JS.API.STREAM.INFO.IF_EVENTS", "$JS.API.CONSUMER.CREATE.IF_EVENTS.x", "if.v1.identity.whoami.checks"),
            *("$JS.FC.IF_AUDIT.x.y", "$JS.API.CONSUMER.DELETE.IF_AUDIT.x"),
        ):
            assert await stranger.publish(subject, reply="_INBOX.checks.x"), subject
        for subject in (subjects.AUDIT, subjects.EVENTS, "_INBOX.checks.>"):
            assert await stranger.subscribe(subject), subject
        for subject in forbidden_to_auditors("checks"):
            assert not await stranger.publish(subject), f"published to {subject}"
            done += 1
        allowed = (subjects.AUDIT, subjects.EVENTS, "if.v1.event.*.*", "if.v1.event.budget.>", "if.v1.event.chassis.>")
        for subject, queue in forbidden_subscriptions("checks", "bob"):
            if subject not in allowed:
                assert not await stranger.subscribe(subject, queue), f"subscribed to {subject} {queue}"
                done += 1
    assert done > 250
    print(f"{done} attempts of an auditor's, all denied")


@pytest.mark.parametrize("role", ["agent", "operator", "observer"])
async def test_nobody_but_an_auditor_reads_the_audit_and_is_told_what_to_do(there: Town, role: str) -> None:
    one = await there.create(f"curious-{role}", role=role)
    async with there.raw(one) as stranger:
        for api in (
            *("STREAM.INFO.IF_AUDIT", "STREAM.MSG.GET.IF_AUDIT", "STREAM.SNAPSHOT.IF_AUDIT", "DIRECT.GET.IF_AUDIT"),
            *("CONSUMER.CREATE.IF_AUDIT", "CONSUMER.CREATE.IF_AUDIT.x", "CONSUMER.CREATE.IF_AUDIT.x.if.v1.audit.>"),
        ):
            assert not await stranger.publish(f"$JS.API.{api}"), api
        assert not await stranger.subscribe(subjects.AUDIT)
        assert not await stranger.subscribe("if.v1.audit.coordinator.claim")
    async with there.bus(one) as bus:
        with pytest.raises(Forbidden, match="--role auditor"):
            await reading.facts(bus)


async def test_an_auditor_s_credential_is_enough_to_read_and_to_verify(there: Town) -> None:
    """Through the server's permissions, flow control and all."""
    auditor = await there.create("reads", role="auditor")
    async with there.client(await there.create("audited")) as client:
        await client.submit([{"id": "audited-1"}])
    async with there.bus(auditor) as bus:

        async def told() -> list[str]:
            stream = await reading.facts(bus)
            wanted = reading.Wanted(component="coordinator", verb="submit")
            read = reading.messages(bus, CLOCK, until_seq=stream.last_seq, wanted=wanted)
            return [one.subject async for one in read if wanted.has(one) and b'"audited"' in one.data]

        assert await eventually(told) == [subjects.audit("coordinator", "submit")]
        stream = await reading.facts(bus)
        examination = Examination(stream, None)
        async for one in reading.messages(bus, CLOCK, until_seq=stream.last_seq):
            examination.add(one)
        report = examination.report(CLOCK.wall_ms(), max_age_s=90 * 86_400)
        assert (report.broken, report.findings) == (False, ())
        assert report.chains >= 2


async def connect_by_hand(
    url: str, connect: dict[str, object], seed: str | None = None
) -> tuple[str, dict[str, object]]:
    """What the server says to a CONNECT, after its ping was answered; and the CONNECT as it was sent."""
    host, port = url.rpartition("//")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        nonce = json.loads((await reader.readline())[5:])["nonce"]
        if seed is not None:
            signature = nkeys.from_seed(bytearray(seed.encode())).sign(nonce.encode())
            connect = {**connect, "sig": base64.b64encode(signature).decode()}
        writer.write(
            b"CONNECT "
            + json.dumps({"lang": "x", "version": "1", "verbose": False, **connect}).encode()
            + b"\r\nPING\r\n"
        )
        async with asyncio.timeout(10):
            while (line := (await reader.readline()).decode().strip()) == "PING":
                writer.write(b"PONG\r\n")
    finally:
        writer.close()
    return line, connect


async def test_a_credential_cannot_be_replayed_borrowed_or_made_up(there: Town) -> None:
    alice, eve = await there.create("alice"), await there.create("evil")
    url = there.nats.urls[0]
    said, used = await connect_by_hand(url, {"nkey": alice.public_key}, alice.seed)
    assert said == "PONG", "it is a good one"
    signature = str(used["sig"])
    stranger = credentials.make("alice")
    attempts: list[tuple[str, dict[str, object], str | None]] = [
        ("the same proof again", used, None),
        ("her key, another's signature", {"nkey": alice.public_key}, eve.seed),
        ("another's key, her old signature", {"nkey": eve.public_key, "sig": signature}, None),
        ("a key that nobody was given", {"nkey": stranger.public_key}, stranger.seed),
        ("a key without a proof", {"nkey": alice.public_key}, None),
        ("an empty proof", {"nkey": alice.public_key, "sig": ""}, None),
        ("a proof that is no base64", {"nkey": alice.public_key, "sig": "%%%"}, None),
        ("half a key", {"nkey": alice.public_key[:30]}, alice.seed),
        ("nothing", {}, None),
        ("a password", {"user": "alice", "pass": "alice"}, None),
        ("the daemon's name", {"user": there.operator.public_key, "pass": ""}, None),
        ("a token", {"auth_token": alice.public_key}, None),
        ("a token of the web", {"jwt": "e30.e30.e30", "sig": signature}, None),
        ("the key as a name", {"user": alice.public_key, "sig": signature}, None),
    ]
    for what, connect, seed in attempts:
        said, _ = await connect_by_hand(url, connect, seed)
        assert "Authorization Violation" in said, f"{what}: {said}"
    log = "".join(daemon.log_text() for daemon in there.daemons)
    for why in ("not proven", "unknown: nobody has this key", "no key"):
        assert why in log
    assert alice.seed not in log + there.nats_log()


@pytest.mark.slow  # a town, or programs, of its own
async def test_a_daemon_without_the_callout_s_keys_serves_agents_that_another_lets_in(there: Town) -> None:
    alice = await there.create("served")
    plain = await there.daemon(identity={"enabled": True})
    try:
        async with there.client(alice) as client:
            await client.call(coordinator.Hello())
        with pytest.raises(nats.errors.Error):
            async with there.raw(None):
                pass
    finally:
        await plain.close()
        there.daemons.remove(plain)


@pytest.mark.slow  # a town, or programs, of its own
async def test_the_command_line_makes_lists_and_revokes_credentials(there: Town, tmp_path: Path) -> None:
    there.operator.write(tmp_path / "ann.nk")

    async def run(*words: str, credential: str = "ann.nk") -> tuple[int, str, str]:
        environment = {**os.environ, "IFABRIC_CREDENTIALS": credential, "IFABRIC_NATS": there.urls}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ifabric", *words),
            cwd=tmp_path,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    code, out, err = await run("agent", "create", "cli", "--account", "acme", "--capabilities", "rust", "wasm")
    assert (code, err) == (0, "")
    assert "cli.nk" in out
    assert (tmp_path / "cli.nk").stat().st_mode & 0o777 == 0o600
    code, out, err = await run("agent", "create", "cli")
    assert code == 2, "a key is not written over"
    assert "is there already" in err
    code, out, err = await run("agent", "create", "cli", "--out", "other.nk")
    assert code == 1
    assert "another key" in err
    assert not (tmp_path / "other.nk").exists(), "what is not let in is not left lying about"
    code, out, _ = await run("agent", "list", "--json")
    assert next(one for one in json.loads(out) if one["agent"] == "cli")["capabilities"] == ["rust", "wasm"]
    code, out, err = await run("task", "claim", "no-such", credential="cli.nk")
    assert code == 1
    assert "there is no task no-such" in err, "whose it is, the credential says"
    code, out, err = await run("agent", "list", credential="cli.nk")
    assert code == 1
    assert "does not allow a publish" in err
    code, out, err = await run("agent", "revoke", "cli", "--why", "a test")
    assert code == 0
    code, out, err = await run("task", "list", credential="cli.nk")
    assert code == 1
    assert "revoked" in err


async def test_an_operator_of_the_configuration_is_not_changed_by_a_verb(there: Town) -> None:
    for message in (
        wire.RevokeAgent(agent="ann"),
        wire.CreateAgent(agent="ann", public_key=credentials.make().public_key),
    ):
        with pytest.raises(Conflict, match=r"identity\.operators"):
            await there.ask(message)
    taken = await there.create("owner")
    with pytest.raises(Conflict, match="is owner's"):
        await there.ask(wire.CreateAgent(agent="thief", public_key=taken.public_key))


async def test_without_a_credential_the_client_is_told_what_to_do(there: Town) -> None:
    with pytest.raises(Forbidden, match="ifabric agent create"):
        async with Client.connect(there.urls, session="x"):
            pass
