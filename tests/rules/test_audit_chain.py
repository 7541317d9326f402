"""Records of the audit alone: what they tell of each message, how they are chained, and the files they wait in."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.audit.chain import RECORD_MAX_BYTES, WHY_MAX, Chain, key_of, why
from ifabric.audit.refusals import KEPT, Refusals
from ifabric.audit.spool import Mark, Row, left_behind
from ifabric.errors import BadRequest, ClaimTaken, Unavailable, all_codes
from ifabric.handling import Handling
from ifabric.testing.clock import VirtualClock
from ifabric.wire import chassis, coordinator, governor, identity, replay
from ifabric.wire.audit import NONE_BEFORE, AuditRecord, hash_of, records
from ifabric.wire.envelope import Mutation, Request, decode, encode

AT = 1_795_000_000_000
REQUESTS: tuple[type[Request], ...] = tuple(
    kind for module in (coordinator, governor, chassis, identity, replay) for kind in module.REPLIES
)
#: the only fields of any message that a record may tell
TOLD = {
    "task", "fence", "account", "parent", "hold", "entry", "breaker", "state", "module", "run", "agent", "name", "upload",
    "amount_micro_usd", "hold_micro_usd", "cost_micro_usd", "limit_micro_usd", "request_id",
}  # fmt: skip


def handled(message: Any = None, reply: Any = None, *, took_s: float = 0.0125, **fields: Any) -> Handling:
    handling = Handling("coordinator", "claim", "agent-1", 100.0)
    handling.message, handling.reply, handling.ended = message, reply, 100.0 + took_s
    for name, value in fields.items():
        setattr(handling, name, value)
    return handling


def record(handling: Handling) -> AuditRecord:
    return records.decode(Chain("c", "host:1").of(handling, AT))


# -- what is told -----------------------------------------------------------------------------------------------------


def test_a_claim_is_told_with_the_fence_and_the_hold_of_its_reply() -> None:
    message = coordinator.Claim(task="a/b.1", request_id="r1", hold_micro_usd=500)
    spec = coordinator.TaskSpec(id="a/b.1", payload={"secret": 1})
    reply = coordinator.ClaimReply(task="a/b.1", fence=7, attempt=1, ttl_s=60, spec=spec, hold="claim-7-x")
    first = record(handled(message, reply, trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01", admin=True))
    assert first == AuditRecord(
        at="2026-11-18T11:06:40.000Z", chain="c", n=1, prev=NONE_BEFORE, component="coordinator", verb="claim", admin=True,
        session="agent-1", request_id="r1", task="a/b.1", fence=7, hold="claim-7-x", amount_micro_usd=500,
        trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01", took_ms=12.5, daemon="host:1",
    )  # fmt: skip
    receipt = handled(message, msgspec.Raw(encode(reply)))
    assert record(receipt) == msgspec.structs.replace(first, admin=False, trace=""), (
        "a first answer that is given again"
    )


def test_what_was_chosen_for_the_sender_is_told_from_the_reply() -> None:
    spec = coordinator.TaskSpec(id="t")
    taken = record(
        handled(coordinator.Next(), coordinator.ClaimReply(task="t", fence=3, attempt=1, ttl_s=1, spec=spec, hold="h"))
    )
    assert (taken.task, taken.fence, taken.hold) == ("t", 3, "h")
    put = record(
        handled(chassis.Put(wasm="AGFzbQ=="), chassis.PutReply(module="sha256:1", size=8, imports=(), exports=()))
    )
    assert put.module == "sha256:1"
    got = record(handled(coordinator.Get(task="t"), msgspec.Raw(b"")))
    assert got.task == "t"


def test_one_field_of_each_kind_of_thing() -> None:
    def told(message: Any) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(record(handled(message)))
        names = ("task", "fence", "account", "hold", "breaker", "module", "subject", "amount_micro_usd", "count")
        return {name: found[name] for name in names if name in found}

    assert told(coordinator.Submit(tasks=(coordinator.TaskSpec(id="a"), coordinator.TaskSpec(id="b")))) == {"count": 2}
    assert told(coordinator.Complete(task="a", fence=4, result={"x": 1}, cost_micro_usd=0)) == {
        "task": "a", "fence": 4, "amount_micro_usd": 0,
    }  # fmt: skip
    assert told(governor.Spend(entry="e", amount_micro_usd=5, account="a/b")) == {
        "hold": "e", "amount_micro_usd": 5, "account": "a/b",
    }  # fmt: skip
    assert told(governor.SetAccount(account="a", limit_micro_usd=None)) == {"account": "a"}
    assert told(governor.SetBreaker(breaker="b", state="open", why="w")) == {"breaker": "b", "subject": "open"}
    assert told(chassis.Run(module="sha256:1", entry="_start")) == {"module": "sha256:1"}
    assert told(chassis.Kill(run="r", why="w")) == {"subject": "r"}
    assert told(identity.RevokeAgent(agent="mallory")) == {"subject": "mallory"}


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: f"{kind.component}.{kind.verb}")
def test_nothing_else_of_any_message_is_told(kind: type[Request]) -> None:
    """Whatever is not a name or a number of the table holds a marker, and so does whatever the reply has."""
    fields = {
        name: ("n" if name in TOLD else ("SECRET",) if name in ("tasks", "claims", "entries") else "SECRET")
        for name in kind.__struct_fields__
    }
    replied = {
        name: "n" if name in ("task", "fence", "hold", "module", "run") else "SECRET"
        for name in kind.reply.__struct_fields__
    }
    reply = kind.reply(**replied)
    for answer in (reply, msgspec.Raw(encode({**replied, "fence": 1}))):
        handling = handled(kind(**fields), answer, component=kind.component, verb=kind.verb, trace="SECRET")
        data = Chain("c", "d").of(handling, AT)
        assert b"SECRET" not in data
        assert len(data) < RECORD_MAX_BYTES
        assert issubclass(kind, Mutation) == (b'"request_id":"n"' in data)


def test_names_of_any_length_and_replies_of_any_kind_make_a_record_of_a_bounded_size() -> None:
    class Odd(Mutation, frozen=True, kw_only=True):
        component = "odd"
        verb = "odd"
        reply = coordinator.ClaimReply
        task: Any = None
        account: Any = None

    long = record(handled(Odd(task="x" * 100_000, account=["not", "text"]), msgspec.Raw(b"\xff not JSON")))
    assert (len(long.task), long.account, long.fence) == (640, "", 0)


def test_a_refusal_is_told_with_its_code_and_a_sentence_that_is_not_too_long() -> None:
    error = ClaimTaken("é" * 500, by="somebody")
    told = record(handled(coordinator.Claim(task="t"), outcome="refused", error=error))
    assert (told.outcome, told.code, len(told.why), told.task, told.fence) == (
        "refused",
        "claim_taken",
        WHY_MAX,
        "t",
        0,
    )


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (coordinator.List, b'{"state": "SECRET"}'),
        (coordinator.List, b'{"state": "a\' and \\"SECRET"}'),
        (coordinator.List, b'{"limit": "SECRET"}'),
        (coordinator.Submit, b'{"tasks": [{"id": "a", "SECRET": 1}]}'),
        (coordinator.Submit, b'{"tasks": [{"id": "a", "` - SECRET": 1}]}'),
        (coordinator.Claim, b'{"task": {"SECRET": 1}}'),
        (coordinator.Claim, b"SECRET"),
        (coordinator.Claim, b'{"task": "SECRET\xff"}'),
        (coordinator.Claim, b'{"task": "SECRET !"}'),
        (governor.SetBreaker, b'{"breaker": "b", "state": "SECRET"}'),
    ],
)
def test_a_message_that_cannot_be_read_is_told_without_what_was_in_it(kind: type[Request], data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        decode(msgspec.json.Decoder(kind), data)
    told = Chain("c", "d").of(handled(outcome="refused", error=caught.value), AT)
    assert b"SECRET" not in told
    assert b'"code":"bad_request"' in told


def test_other_refusals_keep_their_words() -> None:
    for code, kind in all_codes().items():
        if code != "bad_request":
            assert why(code, kind("it's 'so'").message) == "it's 'so'"
    assert why("bad_request", "If-Deadline-Ms is a number of milliseconds, not 'x'") == (
        "If-Deadline-Ms is a number of milliseconds, not …"
    )


# -- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", ["etcd does not answer in time", "x" * 500])
def test_a_refusal_that_may_be_none_says_so(sentence: str) -> None:
    """A commit that etcd did not answer may be there: who reads the record must not take it for one that is not."""
    message = coordinator.Claim(task="T", request_id="r")
    told = record(handled(message, outcome="refused", error=Unavailable(sentence, what="etcd", maybe_done=True)))
    assert told.why.startswith(sentence[:100])
    assert told.why.endswith(" (it may have been carried out)")
    assert len(told.why) <= WHY_MAX
    for facts in ({}, {"maybe_done": False}):
        assert "may have been" not in record(handled(message, outcome="refused", error=Unavailable("x", **facts))).why


@given(st.lists(st.sampled_from(["ok", "refused", "own"]), max_size=30))
def test_every_record_has_the_hash_of_the_one_before(kinds: list[str]) -> None:
    chain, before = Chain("chain", "d"), NONE_BEFORE
    for n, kind in enumerate(kinds, 1):
        handling = handled(coordinator.Claim(task=f"t{n}"))
        if kind == "refused":
            handling.outcome, handling.error = "refused", ClaimTaken()
        data = chain.own("dropped", AT, why="x", count=n) if kind == "own" else chain.of(handling, AT)
        found = records.decode(data)
        assert (found.chain, found.n, found.prev) == ("chain", n, before)
        assert b"\n" not in data
        key = key_of(data)
        assert key and (key.component, key.verb, key.n) == (found.component, found.verb, n)
        before = hash_of(data)
    assert (chain.n, chain.hash) == (len(kinds), before)


def test_what_fails_to_become_a_record_leaves_the_chain_as_it_was() -> None:
    chain = Chain("c", "d")
    chain.own("begun", AT)
    before = (chain.n, chain.hash)
    with pytest.raises(TypeError):
        chain.of(handled(session=object()), AT)
    assert (chain.n, chain.hash) == before


# -- the spool --------------------------------------------------------------------------------------------------------


def lines(first: int, last: int, chain: Chain) -> list[bytes]:
    return [chain.own("begun", AT, why="w" * 100) for _ in range(first, last)]


def read_all(row: Row) -> list[bytes]:
    found = []
    while ahead := row.ahead(1000):
        found += ahead
        row.pass_over(sum(len(line) + 1 for line in ahead))
        row.sweep()
    return found


def test_what_is_written_is_read_in_order_and_its_files_go_away(tmp_path: Path) -> None:
    row = Row(tmp_path / "audit", "c", segment_bytes=2000)
    made = lines(0, 50, Chain("c", "d"))
    for at in range(0, 50, 3):
        row.append(b"\n".join(made[at : at + 3]) + b"\n")
    files = sorted((tmp_path / "audit").iterdir())
    assert len(files) > 5
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert row.size == sum(file.stat().st_size for file in files)
    assert read_all(row) == made
    assert list((tmp_path / "audit").iterdir()) == files[-1:], "the one that is written to stays"
    row.append(made[0] + b"\n")
    assert read_all(row) == made[:1]
    row.note(Mark(51, "x"))
    row.remove()
    assert list((tmp_path / "audit").iterdir()) == []


def test_another_life_finds_what_was_left_and_how_far_it_had_come(tmp_path: Path) -> None:
    row = Row(tmp_path, "one", segment_bytes=2000)
    made = lines(0, 20, Chain("one", "d"))
    row.append(b"".join(line + b"\n" for line in made))
    row.note(Mark(7, "seven"))
    row.close()
    later = Row(tmp_path, "two")
    later.append(lines(0, 1, Chain("two", "d"))[0] + b"\n")
    os.utime(tmp_path / "two.000001.spool", (1, 1))
    (tmp_path / "notes.txt").touch()
    found = left_behind(tmp_path)
    assert [one.chain for one in found] == ["two", "one"], "the oldest first"
    assert (found[1].mark, found[1].newest()) == (Mark(7, "seven"), (20, "2026-11-18T11:06:40.000Z"))
    assert read_all(found[1]) == made
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("one")] == ["one.stored"]


def test_a_line_that_a_machine_died_in_is_passed_over(tmp_path: Path) -> None:
    row = Row(tmp_path, "c")
    made = lines(0, 3, Chain("c", "d"))
    row.append(b"".join(line + b"\n" for line in made))
    row.close()
    with (tmp_path / "c.000001.spool").open("ab") as file:
        file.write(b'{"at":"2026-')
    (found,) = left_behind(tmp_path)
    assert found.newest()[0] == 3
    assert read_all(found) == made
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_a_part_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, chain = Row(tmp_path, "c"), Chain("c", "d")
    made = lines(0, 3, chain)
    row.append(made[0] + b"\n")
    write, room = os.write, [10]

    def full(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: room.pop()])

    monkeypatch.setattr(os, "write", full)
    for left in ([10], []):
        room[:] = left
        with pytest.raises(OSError, match="No space"):
            row.append(made[1] + b"\n")
        assert (tmp_path / "c.000001.spool").stat().st_size == row.size == len(made[0]) + 1
    monkeypatch.setattr(os, "write", write)
    row.append(made[1] + b"\n" + made[2] + b"\n")
    assert read_all(row) == made


# -- the last refusals ------------------------------------------------------------------------------------------------


def test_the_last_refusals_are_kept_and_can_be_asked_for_from_where_one_was() -> None:
    kept = Refusals(VirtualClock())
    kept.witness(handled())
    assert (kept.total, list(kept.last)) == (0, [])
    for n in range(KEPT + 20):
        kept.witness(handled(coordinator.Claim(task=f"t{n}"), outcome="refused", error=ClaimTaken("taken")))
    assert (kept.total, len(kept.last)) == (KEPT + 20, KEPT)
    assert [one.task for one in kept.since(KEPT + 18)] == [f"t{KEPT + 18}", f"t{KEPT + 19}"]
    assert len(kept.since(0)) == KEPT
    assert kept.since(kept.total) == []
    newest = kept.last[-1]
    assert (newest.component, newest.verb, newest.session, newest.code, newest.why) == (
        "coordinator", "claim", "agent-1", "claim_taken", "taken",
    )  # fmt: skip
