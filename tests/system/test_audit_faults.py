"""The audit while things break: daemons that are killed, a JetStream that is away, a spool and a stream that are full."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric import credentials
from ifabric.errors import FabricError, Forbidden
from ifabric.store.base import prefix_end
from ifabric.wire import subjects
from ifabric.wire.audit import NONE_BEFORE, AuditRecord, Head, hash_of, heads, message_id, records
from tests.system.conftest import Cluster, eventually
from tests.system.town import town

PREFIX = b"audit/"


class Stored:
    """All that the stream has, by chain, and how it is stored."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.data: dict[str, list[bytes]] = {}

    @property
    def keys(self) -> list[tuple[str, int]]:
        return [(record.chain, record.n) for record in self.records]

    def verify(self) -> None:
        """Each record once, in order, each with the hash of the one before."""
        assert len(set(self.keys)) == len(self.keys), "each record is there once"
        for chain, stored in self.data.items():
            before = NONE_BEFORE
            for n, data in enumerate(stored, 1):
                record = records.decode(data)
                assert (record.chain, record.n, record.prev) == (chain, n, before)
                before = hash_of(data)

    def of(self, **wanted: object) -> list[AuditRecord]:
        return [one for one in self.records if all(getattr(one, name) == value for name, value in wanted.items())]


async def stored(cluster: Cluster) -> Stored:
    """Reads the whole stream."""
    found = Stored()
    journal = await cluster.bus.journal(subjects.AUDIT_STREAM)
    last = await journal.last()
    if last is None:
        return found
    async with contextlib.aclosing(journal.read()) as entries:  # type: ignore[type-var]
        async for entry in entries:
            record = records.decode(entry.data)
            assert entry.subject == subjects.audit(record.component, record.verb)
            assert entry.headers["Nats-Msg-Id"] == message_id(record.chain, record.n)
            found.records.append(record)
            found.data.setdefault(record.chain, []).append(entry.data)
            if entry.seq >= last.seq:
                return found
    raise AssertionError("the stream ended")


async def told(cluster: Cluster) -> dict[str, Head]:
    """The heads in etcd."""
    got, _ = await cluster.store.range(PREFIX, prefix_end(PREFIX))
    return {kv.key.removeprefix(PREFIX).decode(): heads.decode(kv.value) for kv in got.kvs}


async def nothing_waits(daemon: Any) -> None:
    async def none() -> bool:
        return bool(await daemon.metric("if_audit_waiting") == 0)

    await eventually(none, 20.0)


async def warnings(daemon: Any) -> list[str]:
    """Those about the audit."""
    return [one for one in (await daemon.health())["warnings"] if "audit" in one]


class Swarm:
    """Sessions that submit and claim, each request without a retry, and what they were answered."""

    def __init__(self, cluster: Cluster, sessions: int) -> None:
        self._cluster, self._sessions = cluster, sessions
        self.answered: set[tuple[str, str]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def _ask(self, session: str, verb: str, **body: Any) -> None:
        ident = f"{session}-{verb}-{len(self.answered)}-{body.get('task', '').replace('/', '_')}"[:64]
        try:
            await self._cluster.ask(verb, session, request_id=ident, **body)
        except FabricError as error:
            if error.code == "unavailable" and error.facts.get("what") == "nats":
                raise
        self.answered.add((session, ident))

    async def _work(self, number: int) -> None:
        session = f"swarm-{number}"
        with contextlib.suppress(FabricError):
            await self._ask(session, "hello")
            for n in range(10_000):
                await self._ask(session, "submit", tasks=[{"id": f"{session}/{n}", "payload": "SECRET"}])
                await self._ask(session, "claim", task=f"{session}/{n}")
                await self._ask(session, "claim", task=f"swarm-{(number + 1) % self._sessions}/{n}")

    def start(self) -> Swarm:
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(self._sessions)]
        return self

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reached(self, answers: int) -> None:
        async def many() -> bool:
            return len(self.answered) >= answers

        await eventually(many, 60.0)


@pytest.mark.slow
async def test_a_daemon_that_is_killed_under_load_loses_no_record_of_what_it_answered(fragile: Cluster) -> None:
    """SIGKILL at once after some hundred answers: the next life of the state directory brings the rest."""
    daemon = await fragile.daemon()
    killed = set()
    for round_ in range(1, 3):
        swarm = Swarm(fragile, 16).start()
        await swarm.reached(500)
        await daemon.kill()
        await swarm.stop()
        killed |= swarm.answered
        await daemon.start()
        await nothing_waits(daemon)
        found = await stored(fragile)
        found.verify()
        recorded = {(one.session, one.request_id) for one in found.records}
        assert killed <= recorded, f"answered, and not recorded: {sorted(killed - recorded)[:5]}"
        assert len(found.data) == round_ + 1
    assert found.of(component="coordinator", verb="claim", outcome="ok")
    assert found.of(component="coordinator", verb="claim", code="claim_taken")
    assert b"SECRET" not in b"".join(data for chain in found.data.values() for data in chain)
    now = found.records[-1].chain

    async def heads_are_there() -> bool:
        ends = await told(fragile)
        return all(
            (
                chain in ends
                and ends[chain].n == len(lines)
                and ends[chain].hash == hash_of(lines[-1])
                and ends[chain].ended
            )
            for chain, lines in found.data.items()
            if chain != now
        )

    await eventually(heads_are_there)
    assert await warnings(daemon) == []


async def test_two_daemons_write_two_chains_that_both_fit(fragile: Cluster) -> None:
    """Side by side, into one stream, under load; each ends its own in order."""
    daemons = await fragile.many(2)
    swarm = Swarm(fragile, 16).start()
    await swarm.reached(500)
    await swarm.stop()
    assert [await daemon.terminate() for daemon in daemons] == [0, 0]
    found = await stored(fragile)
    found.verify()
    assert len(found.data) == 2
    assert swarm.answered <= {(one.session, one.request_id) for one in found.records}
    ends = await told(fragile)
    for chain, lines in found.data.items():
        last = records.decode(lines[-1])
        assert (records.decode(lines[0]).verb, last.verb) == ("begun", "ended")
        assert (ends[chain].n, ends[chain].hash, ends[chain].ended) == (last.n, hash_of(lines[-1]), True)
    for folder in fragile._folder.glob("daemon-*/audit"):
        assert list(folder.iterdir()) == [], "nothing is left to be brought"


async def test_nobody_deletes_what_is_in_the_stream(fragile: Cluster) -> None:
    daemon = await fragile.daemon()
    await fragile.ask("hello", "a")
    await nothing_waits(daemon)
    api, name = "$JS.API.STREAM", subjects.AUDIT_STREAM
    for subject, body in (
        (f"{api}.MSG.DELETE.{name}", b'{"seq":1}'),
        (f"{api}.MSG.DELETE.{name}", b'{"seq":1,"no_erase":true}'),
        (f"{api}.PURGE.{name}", b""),
    ):
        assert b"not permitted" in (await fragile.bus.request(subject, body, timeout_s=5)).data
    config = msgspec.json.decode((await fragile.bus.request(f"{api}.INFO.{name}", b"", timeout_s=5)).data)["config"]
    assert (config["deny_delete"], config["deny_purge"], config["discard"]) == (True, True, "new")
    assert (config["max_age"], config["max_bytes"]) == (90 * 86_400 * 10**9, 8 << 30)
    (await stored(fragile)).verify()


@pytest.mark.slow
async def test_what_was_done_while_nats_came_and_went_is_told_afterwards(fragile: Cluster) -> None:
    """NATS is killed under load, twice, with a daemon that goes on: every answer has its record, once."""
    daemon = await fragile.daemon()
    answered = set()
    for _ in range(2):
        swarm = Swarm(fragile, 16).start()
        await swarm.reached(300)
        await fragile.nats.kill()
        await swarm.stop()
        answered |= swarm.answered
        await fragile.nats.start_again()

        async def back() -> bool:
            return fragile.bus.connected and (await daemon.health())["nats"] == "connected"

        await eventually(back)
    await nothing_waits(daemon)
    found = await stored(fragile)
    found.verify()
    assert answered <= {(one.session, one.request_id) for one in found.records}
    assert await daemon.metric("if_audit_dropped_total") == 0
    assert await daemon.metric("if_audit_lag_seconds") == 0


@pytest.mark.slow
async def test_a_stream_that_is_full_keeps_what_it_has_and_commands_go_on(fragile: Cluster) -> None:
    """Records wait on disk, `/health` says so, and a stream that is given more room takes them."""
    daemon = await fragile.daemon(config={"audit": {"max_bytes": 1 << 20}})
    swarm = Swarm(fragile, 16).start()

    async def waits() -> bool:
        return bool(await daemon.metric("if_audit_waiting") > 500)

    await eventually(waits, 60.0)
    before = len(swarm.answered)
    await swarm.reached(before + 100)
    await swarm.stop()

    async def says_so() -> bool:
        return any("is full and takes nothing new" in one for one in await warnings(daemon))

    await eventually(says_so)
    first = await stored(fragile)
    assert first.records[0].verb == "begun", "nothing was forgotten"
    await daemon.terminate()
    assert list((fragile._folder / "daemon-0" / "audit").iterdir())
    again = fragile.daemons[0]
    again._config["audit"]["max_bytes"] = 64 << 20
    await again.start()
    await nothing_waits(again)
    found = await stored(fragile)
    found.verify()
    assert len(found.data) == 2
    assert swarm.answered <= {(one.session, one.request_id) for one in found.records}
    assert await warnings(again) == []


async def test_without_an_audit_there_is_none(fragile: Cluster) -> None:
    daemon = await fragile.daemon(config={"audit": {"enabled": False}})
    await fragile.ask("hello", "a")
    await daemon.terminate()
    answer = await fragile.bus.request(f"$JS.API.STREAM.INFO.{subjects.AUDIT_STREAM}", b"", timeout_s=5)
    assert b"stream not found" in answer.data
    assert await told(fragile) == {}
    assert not (fragile._folder / "daemon-0" / "audit").exists()


@pytest.mark.slow
async def test_who_comes_in_and_who_is_not_let_in_is_told(tmp_path: Path) -> None:
    async with town(tmp_path, size=1, daemons=1) as place:
        judge = await place.create("judge", role="auditor")
        with pytest.raises(Forbidden):
            async with place.client(credentials.make("mallory")):
                pass
        await nothing_waits(place.daemons[0])
        async with place.bus(judge) as bus:
            found: list[AuditRecord] = []
            journal = await bus.journal(subjects.AUDIT_STREAM)
            entries = journal.read()
            async with asyncio.timeout(20):
                while not any(one.session == "judge" for one in found):
                    found.append(records.decode((await anext(entries)).data))
            await entries.aclose()  # type: ignore[attr-defined]
        came = [(one.session, one.outcome, one.code, one.subject) for one in found if one.verb == "connect"]
        assert ("ann", "ok", "", "127.0.0.1") in came
        assert ("judge", "ok", "", "127.0.0.1") in came
        assert ("", "refused", "forbidden", "127.0.0.1") in came
        assert any("nobody has this key" in one.why for one in found)
        made = next(one for one in found if one.verb == "create")
        assert (made.session, made.admin, made.subject) == ("ann", True, "judge")
