"""Whether the audit is as it was written: the chains, and what each way of tampering with them looks like."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric.audit import chaining, verifying
from ifabric.audit.exporting import cef_line, json_line, severity
from ifabric.audit.finding import DO, Report
from ifabric.audit.reading import Wanted
from ifabric.audit.stored import Stored, StreamFacts, Unreadable, beginning, read
from ifabric.audit.verifying import Examination, examine, flaws
from ifabric.clock import rfc3339
from ifabric.wire import subjects
from ifabric.wire.audit import DROPPED, ENDED, NONE_BEFORE, AuditRecord, Head, hash_of
from ifabric.wire.envelope import encode
from tests.chains import NOW, Life, altered, chain, rechained, stream_of
from tests.rules.cef import parse

DAYS_90_S = 90 * 86_400
DAY_MS = 86_400_000


def facts(messages: list[Stored], **fields: Any) -> StreamFacts:
    """A stream as it should be, with these messages, made a year ago."""
    known: dict[str, Any] = {
        "name": "IF_AUDIT",
        "subjects": (subjects.AUDIT,),
        "first_seq": messages[0].seq if messages else 1,
        "last_seq": messages[-1].seq if messages else 0,
        "messages": len(messages),
        "bytes": 0,
        "created_ms": NOW - 365 * DAY_MS,
        "first_ms": messages[0].stored_ms if messages else 0,
        "max_age_s": float(DAYS_90_S),
        "max_bytes": 8 << 30,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "deny_delete": True,
        "deny_purge": True,
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "foreign": False,
    }
    return StreamFacts(**(known | fields))


def look(entries: list[tuple[str, str, bytes]], heads: dict[str, Head] | None = None, **fields: Any) -> Report:
    messages = stream_of(entries)
    return examine(messages, facts(messages, **fields), heads, NOW, max_age_s=DAYS_90_S)


def only(report: Report) -> Any:
    """The one finding."""
    assert report.broken
    assert len(report.findings) == 1, report.findings
    assert report.findings[0].do == DO[report.findings[0].kind]
    return report.findings[0]


# -- whole -----------------------------------------------------------------------------------------------------------


def test_an_audit_that_nobody_touched_is_whole() -> None:
    one, first = chain("c1")
    other, second = chain("c2", 5)
    mixed = [entry for pair in zip(first[:5], second, strict=True) for entry in pair] + first[5:]
    report = look(mixed, {"c1": one.head(), "c2": other.head()})
    assert (report.broken, report.findings, report.notes) == (False, (), ())
    assert (report.records, report.chains, report.duplicates, report.heads) == (14, 2, 0, 2)
    assert (report.first_seq, report.last_seq) == (1, 14)


def test_without_heads_it_says_that_ends_were_not_checked() -> None:
    messages = stream_of(chain()[1])
    examination = Examination(facts(messages), None)
    for message in messages:
        examination.add(message)
    report = examination.report(NOW, max_age_s=DAYS_90_S, heads_why="nobody said where etcd is")
    assert not report.broken
    assert report.heads is None
    assert [(note.kind, note.what) for note in report.notes] == [
        ("heads", "the ends of the chains were not checked: nobody said where etcd is")
    ]


def test_records_that_were_stored_twice_are_counted_and_harm_nothing() -> None:
    life, entries = chain(number=20)
    report = look([*entries[:15], *entries[10:15], *entries[15:], entries[0]], {"c1": life.head()})
    assert (report.broken, report.duplicates, report.records) == (False, 6, 26)


def test_a_chain_that_goes_on_after_its_head_is_whole() -> None:
    """The head is told now and then, not for each record."""
    life, entries = chain()
    head = life.head()
    entries += [life.next() for _ in range(5)]
    assert not look(entries, {"c1": head}).broken


def test_a_daemon_that_ended_without_a_word_is_told_and_breaks_nothing() -> None:
    killed, ended = Life("killed", NOW - DAY_MS), Life("ended", NOW - DAY_MS)
    running, entries = chain("running")
    entries = [*entries, killed.next(), ended.next(), ended.next("fabric", ENDED)]
    heads = {life.chain: life.head(ended=life is ended) for life in (killed, ended, running)}
    report = look(entries, heads)
    assert not report.broken
    assert [(note.kind, note.chain) for note in report.notes] == [("no_end", "killed")]


def test_records_that_had_to_be_dropped_are_told() -> None:
    life, entries = chain()
    entries.append(life.next("fabric", DROPPED, count=42, why="the disk was full"))
    (note,) = look(entries, {"c1": life.head()}).notes
    assert note.kind == "dropped"
    assert "42 record(s) were dropped" in note.what
    assert "the disk was full" in note.what


# -- tampered with ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(8))
def test_a_record_that_was_changed_is_the_one_that_is_named(at: int) -> None:
    _, entries = chain()
    entries[at] = altered(entries[at], session="somebody else")
    found = only(look(entries))
    assert (found.kind, found.chain, found.n, found.seq) == ("changed", "c1", at + 1, at + 1)
    assert found.who == "somebody else"
    assert found.at == json.loads(entries[at][2])["at"]
    assert found.more == 0


def test_the_last_record_has_nobody_but_etcd_to_tell_that_it_was_changed() -> None:
    life, entries = chain()
    head = life.head()
    entries[-1] = altered(entries[-1], session="somebody else")
    assert not look(entries).broken, "this is what the chain alone cannot see"
    found = only(look(entries, {"c1": head}))
    assert (found.kind, found.n, found.who) == ("rewritten", 9, "somebody else")


def test_the_last_but_one_is_in_doubt_with_the_last_until_etcd_vouches() -> None:
    life, entries = chain()
    entries[-2] = altered(entries[-2], task="another")
    alone = only(look(entries))
    assert (alone.kind, alone.n) == ("changed", 8)
    assert "it or record 9" in alone.what
    vouched = only(look(entries, {"c1": life.head()}))
    assert (vouched.kind, vouched.n) == ("changed", 8)
    assert "which etcd vouches for" in vouched.what


def test_a_record_whose_hash_of_the_one_before_was_changed_is_named_and_not_that_one() -> None:
    _, entries = chain()
    entries[4] = altered(entries[4], prev="f" * 64)
    found = only(look(entries))
    assert (found.kind, found.n) == ("changed", 5)


def test_a_record_behind_one_that_etcd_vouches_for_is_the_changed_one() -> None:
    life, entries = chain(number=6)
    head = life.head()
    entries.append(altered(life.next(), prev="f" * 64))
    found = only(look(entries, {"c1": head}))
    assert (found.kind, found.n) == ("changed", 7)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_record_that_was_left_out_is_named_with_its_neighbours(at: int) -> None:
    life, entries = chain()
    del entries[at]
    found = only(look(entries, {"c1": life.head()}))
    assert (found.kind, found.n) == ("missing", at + 1)
    assert f"record {at + 1} is missing between sequence {at} and {at + 1}" in found.what


def test_the_first_record_is_not_missed_unless_it_can_have_been_dropped_by_age() -> None:
    life, entries = chain()
    found = only(look(entries[1:], {"c1": life.head()}))
    assert (found.kind, found.n) == ("beginning", 2)
    assert "has dropped 0 message(s)" in found.what


def test_what_age_has_dropped_is_told_and_breaks_nothing() -> None:
    life, entries = chain()
    messages = stream_of(entries[4:], first_seq=5)
    report = examine(messages, facts(messages), {"c1": life.head()}, NOW, max_age_s=DAYS_90_S)
    assert not report.broken
    assert [note.what for note in report.notes] == ["begins at record 5: older ones have been dropped by age"]


@pytest.mark.parametrize(
    ("first_seq", "fields", "why"),
    [
        (4, {}, "has dropped 3 message"),
        (5, {"created_ms": NOW - 3 * DAY_MS}, "the stream was made"),
        (5, {"max_age_s": 0.0}, "drops nothing"),
    ],
)
def test_age_is_no_excuse_where_it_cannot_be(first_seq: int, fields: dict[str, Any], why: str) -> None:
    life, entries = chain()
    messages = stream_of(entries[4:], first_seq=first_seq)
    report = examine(messages, facts(messages, **fields), {"c1": life.head()}, NOW, max_age_s=DAYS_90_S)
    found = next(one for one in report.findings if one.kind == "beginning")
    assert (found.n, found.chain) == (5, "c1")
    assert why in found.what


def test_a_stream_that_came_out_of_a_backup_may_be_younger_than_what_is_in_it() -> None:
    life, entries = chain()
    messages = stream_of(entries[4:], first_seq=5)
    restored = facts(messages, created_ms=NOW, first_ms=NOW - 89 * DAY_MS)
    assert not examine(messages, restored, {"c1": life.head()}, NOW, max_age_s=DAYS_90_S).broken


def test_a_record_that_was_moved_is_missed_at_its_place_and_too_late_at_the_other() -> None:
    _, entries = chain()
    entries.insert(6, entries.pop(3))
    found = only(look(entries))
    assert (found.kind, found.n) == ("missing", 4)
    assert found.more == 1


def test_two_records_that_changed_places_are_found() -> None:
    _, entries = chain()
    entries[3], entries[4] = entries[4], entries[3]
    found = only(look(entries))
    assert (found.kind, found.n) == ("missing", 4)
    assert found.more >= 1


def test_an_end_that_was_cut_off_is_seen_by_etcd_s_head() -> None:
    life, entries = chain()
    found = only(look(entries[:6], {"c1": life.head()}))
    assert (found.kind, found.n, found.who) == ("end", 6, "agent-4")
    assert "that there are 9" in found.what
    assert not look(entries[:6]).broken, "the chain alone cannot see it"


def test_a_whole_chain_that_is_gone_is_seen_by_its_head() -> None:
    life, entries = chain()
    gone = Life("gone")
    gone.next()
    found = only(look(entries, {"c1": life.head(), "gone": gone.head(daemon="host-7")}))
    assert (found.kind, found.chain) == ("chain_missing", "gone")
    assert "host-7" in found.what
    (alone,) = verifying.no_stream({"gone": gone.head()})
    assert (alone.kind, alone.chain) == ("chain_missing", "gone")


def test_a_chain_that_age_has_dropped_is_not_missed() -> None:
    life, entries = chain()
    old = Life("old", NOW - 100 * DAY_MS)
    old.next()
    messages = stream_of(entries, first_seq=50)
    report = examine(messages, facts(messages), {"c1": life.head(), "old": old.head()}, NOW, max_age_s=DAYS_90_S)
    assert not report.broken
    assert only(look(entries, {"c1": life.head(), "old": old.head()})).kind == "chain_missing", "nothing was dropped"


@pytest.mark.parametrize("at", range(9))
def test_a_chain_that_was_rewritten_with_all_its_hashes_is_caught_by_the_head(at: int) -> None:
    life, entries = chain()
    entries[at] = altered(entries[at], session="nobody")
    forged = rechained(entries)
    assert not look(forged).broken, "the chain alone cannot see it"
    found = only(look(forged, {"c1": life.head()}))
    assert (found.kind, found.n) == ("rewritten", 9)


def test_a_record_that_was_put_in_is_found() -> None:
    _, entries = chain()
    forged = altered(entries[4], session="forger")
    found = only(look([*entries[:7], forged, *entries[7:]]))
    assert (found.kind, found.n, found.who, found.seq) == ("twice", 5, "forger", 8)


def test_a_record_under_another_subject_or_message_id_is_found() -> None:
    _, entries = chain()
    subject, name, data = entries[3]
    moved = only(look([*entries[:3], (subjects.audit("governor", "spend"), name, data), *entries[4:]]))
    assert (moved.kind, moved.n) == ("subject", 4)
    for other in ("", "c1.5", "x" * 500):
        renamed = only(look([*entries[:3], (subject, other, data), *entries[4:]]))
        assert (renamed.kind, renamed.n) == ("message_id", 4)


def test_messages_that_were_deleted_leave_a_hole_in_the_stream() -> None:
    _, entries = chain()
    messages = stream_of(entries)
    last = examine(messages[:-1], facts(messages), None, NOW, max_age_s=DAYS_90_S)
    assert [(one.kind, one.seq) for one in last.findings] == [("deleted", 9)]
    middle = examine([*messages[:3], *messages[5:]], facts(messages), None, NOW, max_age_s=DAYS_90_S)
    assert [(one.kind, one.seq or one.n) for one in middle.findings] == [("deleted", 4), ("missing", 4)]


def test_only_the_first_of_a_chain_is_told_in_full_and_every_chain_has_its_own() -> None:
    _, first = chain("c1")
    _, second = chain("c2")
    for entries, at in ((first, 2), (first, 6), (second, 4)):
        entries[at] = altered(entries[at], session="x")
    report = look([*first, *second])
    assert [(one.chain, one.n, one.more) for one in report.findings] == [("c1", 3, 1), ("c2", 5, 0)]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_with_heads_no_single_change_to_the_stream_goes_unseen(data: st.DataObject) -> None:
    """Whatever one message is changed to, dropped, doubled with other bytes, or exchanged with."""
    one, first = chain("c1", 7)
    other, second = chain("c2", 7)
    entries = [entry for pair in zip(first, second, strict=True) for entry in pair]
    heads = {"c1": one.head(), "c2": other.head()}
    at = data.draw(st.integers(0, len(entries) - 1))
    how = data.draw(st.sampled_from(("byte", "drop", "forge", "exchange", "junk")))
    subject, name, body = entries[at]
    if how == "byte":
        where = data.draw(st.integers(0, len(body) - 1))
        entries[at] = (
            subject,
            name,
            body[:where] + bytes((body[where] ^ data.draw(st.integers(1, 255)),)) + body[where + 1 :],
        )
    elif how == "drop":
        del entries[at]
    elif how == "forge":
        entries.insert(at, altered(entries[at], account="forged"))
    elif how == "exchange":
        to = data.draw(st.integers(0, len(entries) - 1).filter(lambda to: (to - at) % 2 == 0 and to != at))
        entries[at], entries[to] = entries[to], entries[at]
    else:
        entries.insert(at, (subject, name, data.draw(st.binary(max_size=60))))
    assert look(entries, heads).broken


# -- what strangers put there ----------------------------------------------------------------------------------------

HOSTILE = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe\x00",
    b'{"at": "\xed\xa0\x80"}',
    b"[" * 100_000,
    b"\x1b[2J[red]no[/]\r\n",
    *(
        encode({"at": at, "chain": chain, "n": n, "prev": prev, "component": "x", "verb": "y"})
        for at, chain, n, prev in (
            ("never", "c", 1, NONE_BEFORE),
            ("2026-11-28T10:00:00", "c", 1, NONE_BEFORE),
            ("2026-11-28T10:00:00Z", "c\n[red]", 1, NONE_BEFORE),
            ("2026-11-28T10:00:00Z", "", 1, NONE_BEFORE),
            ("2026-11-28T10:00:00Z", "c", 0, NONE_BEFORE),
            ("2026-11-28T10:00:00Z", "c", -1, NONE_BEFORE),
            ("2026-11-28T10:00:00Z", "c", 1, "g" * 64),
            ("2026-11-28T10:00:00Z", "c", 1, "0" * 63),
            ("2026-11-28T10:00:00Z", "c", 1, "\x1b" * 64),
        )
    ),
    b'{"at":"2026-11-28T10:00:00Z","chain":"c","n":1e99,"prev":"","component":"x","verb":"y"}',
)


@pytest.mark.parametrize("data", HOSTILE)
def test_what_is_no_record_is_a_finding_and_harms_nothing_else(data: bytes) -> None:
    life, entries = chain()
    entries.insert(4, (subjects.audit("x", "y"), "", data))
    found = only(look(entries, {"c1": life.head()}))
    assert (found.kind, found.seq) == ("unreadable", 5)
    assert len(found.what) < 500


@given(st.binary(max_size=400))
def test_any_bytes_can_be_looked_at_shown_and_exported(data: bytes) -> None:
    stored = Stored(7, "if.v1.audit.x.y", "\n", data, NOW)
    read(stored)
    Wanted(session="x", text="\x00", since_ms=1).has(stored)
    assert len(beginning(data)) <= 121
    assert b"\n" not in json_line(stored)
    json.loads(json_line(stored))
    assert b"\n" not in cef_line(stored, "1")
    parse(cef_line(stored, "1").decode())


def test_a_flood_of_junk_is_counted_and_not_kept() -> None:
    messages = stream_of([("x", "", b"junk")] * 5000)
    examination = Examination(facts(messages), {})
    for message in messages:
        examination.add(message)
    assert len(examination._findings) == verifying.TOLD_MAX
    report = examination.report(NOW, max_age_s=DAYS_90_S)
    assert len(report.findings) == verifying.TOLD_MAX
    assert report.untold == 5000 - verifying.TOLD_MAX


# -- the stream itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"deny_delete": False}, "deny_delete"),
        ({"deny_purge": False}, "deny_purge"),
        ({"max_age_s": 86_400.0}, "keeps records for 1 days, and should for 90 days"),
        ({"max_msgs": 10}, "when there are many"),
        ({"max_msgs_per_subject": 10}, "when there are many"),
        ({"retention": "interest"}, "when they were read"),
        ({"storage": "memory"}, "not on disk"),
        ({"foreign": True}, "other things"),
        ({"subjects": (subjects.AUDIT, "x")}, "other things"),
    ],
)
def test_a_stream_that_lets_records_go_is_a_finding(fields: dict[str, Any], why: str) -> None:
    _, entries = chain()
    found = only(look(entries, **fields))
    assert found.kind == "stream"
    assert why in found.what


def test_a_stream_that_keeps_for_ever_or_longer_is_none() -> None:
    assert flaws(facts([], max_age_s=0.0), DAYS_90_S) == []
    assert flaws(facts([], max_age_s=DAYS_90_S * 2.0), DAYS_90_S) == []


# -- how much it keeps in mind ---------------------------------------------------------------------------------------


def test_a_record_that_comes_again_later_than_what_is_kept_cannot_be_vouched_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chaining, "KEPT", 4)
    _, entries = chain(number=40)
    assert look([*entries, *entries[-4:]]).duplicates == 4
    found = only(look([*entries, entries[3]]))
    assert (found.kind, found.n) == ("order", 4)


def test_the_window_knows_what_was_missing_from_what_is_too_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaining, "KEPT", 4)
    window = chaining.Window(1)
    for n in (1, 2, 5, 6, 7, 8, 9):
        window.add(n, bytes((n,)) * 32)
    assert window.get(1) is None
    assert window.get(6) == b"\x06" * 32
    window.add(500, b"\x01" * 32)
    assert window.get(9) is None
    assert window.get(500) == b"\x01" * 32
    window.add(503, b"\x03" * 32)
    assert window.get(501) == b""
    assert window.get(504) == b""


def test_a_long_audit_is_read_in_the_memory_of_a_short_one() -> None:
    def peak(number: int) -> int:
        life = Life("long")
        examination = Examination(facts([], last_seq=number), None)
        tracemalloc.start()
        for seq in range(1, number + 1):
            examination.add(Stored(seq, *life.next(session="s"), NOW))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert examination.report(NOW, max_age_s=0).records == number
        return most

    assert peak(60_000) < peak(20_000) * 1.2


# -- which are meant -------------------------------------------------------------------------------------------------


def test_filters_mean_what_they_say() -> None:
    life = Life("c1")
    entry = life.next(
        session="alice",
        outcome="refused",
        task="P0.1",
        account="acme",
        request_id="r1",
        trace="00-abc-def-01",
        why="No!",
    )
    stored = stream_of([entry])[0]
    at_ms = life.at_ms
    for good in (
        {},
        {"session": "alice", "outcome": "refused", "task": "P0.1", "account": "acme", "request_id": "r1"},
        {"trace": "abc"},
        {"text": "no!"},
        {"since_ms": at_ms, "until_ms": at_ms + 1},
    ):
        assert Wanted(**good).has(stored), good
    for bad in (
        {"session": "alic"},
        {"outcome": "ok"},
        {"task": "P0"},
        {"account": "acme/x"},
        {"request_id": "r2"},
        {"trace": "abd"},
        {"text": "yes"},
        {"since_ms": at_ms + 1},
        {"until_ms": at_ms},
    ):
        assert not Wanted(**bad).has(stored), bad
    assert Wanted(component="governor").subject == subjects.audit("governor", "*")
    assert Wanted(verb="claim").subject == subjects.audit("*", "claim")
    assert Wanted(session="x").subject == ""


# -- exports ---------------------------------------------------------------------------------------------------------


def test_a_line_of_json_has_the_stored_bytes_and_their_hash() -> None:
    _, entries = chain()
    lines = [json_line(stored) for stored in stream_of(entries)]
    for (_, name, data), line, after in zip(entries, lines, [*lines[1:], None], strict=True):
        assert data in line, "byte for byte"
        made = json.loads(line)
        assert (made["id"], made["sha256"]) == (name, hash_of(data))
        if after is not None:
            assert json.loads(after)["record"]["prev"] == made["sha256"]


def test_json_on_several_lines_is_one_line_of_an_export() -> None:
    for data in (b'{"a":\n1}', b'{"a":\r1}'):
        made = json.loads(json_line(Stored(1, "x", "", data, NOW)))
        assert "record" not in made
        assert base64.b64decode(made["data_b64"]) == data


def test_an_event_in_cef_says_who_did_what_and_parses_strictly() -> None:
    life = Life("c1")
    nasty = "a|b=c\\d\ne\rf\x1b[2J\u2028 suser=root"
    entry = life.next(
        "identity",
        "create",
        admin=True,
        session="ann",
        outcome="refused",
        code="conflict",
        why=nasty,
        request_id="r=1|",
        task="t\\",
        fence=7,
        amount_micro_usd=0,
        count=3,
    )
    line = cef_line(stream_of([entry])[0], "1.0|x\\")
    header, extension = parse(line.decode())
    assert header == ["InfraFabric", "ifabric", "1.0|x\\", "identity.create", "admin identity create refused", "7"]
    assert extension["suser"] == "ann"
    assert extension["act"] == "identity.create"
    assert (extension["outcome"], extension["reason"], extension["spriv"]) == ("refused", "conflict", "Administrator")
    assert extension["msg"] == "a|b=c\\d\ne\rf [2J  suser=root"
    assert (extension["cs1Label"], extension["cs1"]) == ("requestId", "r=1|")
    assert (extension["cs2Label"], extension["cs2"]) == ("task", "t\\")
    assert (extension["cn1Label"], extension["cn1"], extension["cn3"], extension["cnt"]) == ("fence", "7", "0", "3")
    assert (extension["externalId"], extension["cs6"]) == ("c1.1", hash_of(entry[2]))
    assert int(extension["rt"]) == life.at_ms


TEXTS = st.text(max_size=80)


@given(session=TEXTS, why=TEXTS, task=TEXTS, verb=TEXTS, code=TEXTS)
def test_whatever_is_in_a_record_a_strict_parser_of_cef_reads_it_back(
    session: str, why: str, task: str, verb: str, code: str
) -> None:
    record = AuditRecord(
        at=rfc3339(NOW),
        chain="c",
        n=1,
        prev=NONE_BEFORE,
        component="x",
        verb=verb,
        session=session,
        why=why,
        task=task,
        code=code,
    )
    header, extension = parse(cef_line(Stored(1, "s", "c.1", msgspec.json.encode(record), NOW), "1").decode())
    assert len(header) == 6
    assert extension["outcome"] == "ok"
    assert extension["externalId"] == "c.1"
    if task:
        assert set(extension["cs2"]) - set(task) <= {" "}


def test_how_bad_an_event_is_grows_with_what_it_was() -> None:
    def of(outcome: Any, admin: bool, code: str = "") -> int:
        return severity(
            AuditRecord(
                at="", chain="c", n=1, prev="", component="x", verb="y", outcome=outcome, admin=admin, code=code
            )
        )

    assert of("ok", False) < of("ok", True) < of("refused", False) < of("refused", True) < of("error", False)
    assert of("refused", False, "forbidden") > of("refused", True)


def test_what_cannot_be_read_is_said_so_in_every_format() -> None:
    stored = Stored(3, "if.v1.audit.x.y", "", b"\x00junk\n", NOW)
    assert isinstance(read(stored), Unreadable)
    header, extension = parse(cef_line(stored, "1").decode())
    assert header[3:] == ["audit.unreadable", "a message in the audit that is no record", "10"]
    assert extension["outcome"] == "unreadable"
    assert json.loads(json_line(stored))["data_b64"] == "AGp1bmsK"
