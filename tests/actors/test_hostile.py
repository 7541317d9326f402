"""Whatever a stranger sends, to a real daemon over real NATS and etcd: an answer with the right code, and nothing else.

Every case is followed, at the end of its test, by the question whether the daemon has come to harm: a handler that
failed, an actor or a connection that was started again, an honest request that was not served.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifabric import errors
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric.wire.envelope import NESTING_MAX, PAYLOAD_MAX_BYTES, Request
from tests.conftest import emptied

from .stranger import Target, hpub, pub

#: a well-formed request of each verb, refused or harmless when it is carried out
GOOD: dict[type[Request], dict[str, Any]] = {
    wire.Hello: {"capabilities": ["a"], "account": "acme", "ttl_s": 60, "request_id": "r"},
    wire.Submit: {"tasks": [{"id": "there"}], "done": [], "request_id": "r"},
    wire.Claim: {"task": "nope", "hold_micro_usd": 0, "request_id": "r"},
    wire.Next: {"hold_micro_usd": 0, "wait_s": 0, "request_id": "r"},
    wire.Renew: {"claims": [{"task": "nope", "fence": 1}]},
    wire.Release: {"task": "nope", "fence": 1, "reason": "", "request_id": "r"},
    wire.Complete: {"task": "nope", "fence": 1, "result": 1, "cost_micro_usd": 0, "request_id": "r"},
    wire.Fail: {"task": "nope", "fence": 1, "error": "", "retry": True, "request_id": "r"},
    wire.Get: {"task": "nope"},
    wire.List: {"state": "done", "limit": 1, "after": "nope"},
    wire.Bye: {"request_id": "r"},
    wire.Cancel: {"task": "nope", "request_id": "r"},
    wire.Requeue: {"task": "nope", "request_id": "r"},
    wire.Purge: {"task": "nope", "request_id": "r"},
}
#: and of each task in a submission
SPEC: dict[str, Any] = {
    "id": "new", "title": "", "needs": ["a"], "wants": ["a"], "priority": 0, "depends_on": [], "max_attempts": 1,
    "deadline_s": 1, "budget_micro_usd": 0,
}  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, -1, 1.5, -0.5, 2**53, 2**63, -(2**63), 2**64, 10**40, 1e308, "", " ", "x" * 3_000, "ä", "a b",
    "a\n", "\n", "../..", "*", ">", "\x00", "\u202e", "💥", [], [[]], [None], [{}], ["a"] * 70, {}, {"a": 1}, {"": {}},
]  # fmt: skip
#: what is not JSON, or not one object of it
NOT_AN_OBJECT: list[bytes] = [
    b"\x00", b" ", b"{", b"}", b"[", b"]", b'"', b"{]", b"[}", b'{"task"', b'{"task":', b'{"task":}', b'{"task" "T"}',
    b'{task: "T"}', b"{'task': 'T'}", b'{"task":"T",}', b'{,"task":"T"}', b'{"task":"T"}}', b'{"task":"T"} x', b"{}{}",
    b'{"task":"T"}\x00', b'\xef\xbb\xbf{"task":"T"}', b'{"task":"T" /* */}', b'{"a":NaN}', b'{"a":Infinity}',
    b'{"a":-Infinity}', b'{"a":nan}', b'{"a":+1}', b'{"a":01}', b'{"a":.5}', b'{"a":1.}', b'{"a":1e}', b'{"a":0x10}',
    b'{"a":tru}', b'{"a":True}', b'{"a":None}', b"[]", b"null", b"true", b"1", b"1e999", b'"T"', b"[" * 100_000,
    b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"tasks":' + b"[" * 50_000 + b"]" * 50_000 + b"}", '{"task":"T"}'.encode("utf-16"), "{}".encode("utf-32"),
]  # fmt: skip
#: what is no text in a field that is read; in one that is ignored nobody looks
NOT_TEXT: list[bytes] = [
    b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\\ud800", b"\\udc00", b"\\ud800\\ud800",
    b"\\ud800x", b"\\u12", b"\\u12xx", b"\\x41", b"\\", b"\t", b"\n", b"\x00",
]  # fmt: skip
#: an answer to a request that is well formed
FOUND_WANTING = {
    "unknown_task", "session_lost", "claim_lost", "not_claimable", "no_task_matches", "conflict", "claim_taken",
    "cycle", "unknown_dependency", "capability_missing", "too_large", "bad_request",
}  # fmt: skip
#: values inside JSON that are beyond what some reader can take
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
generated = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
async def target(etcd: RealServer, nats: RealServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    """A daemon of its own process, and an honest agent beside the hostile one."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    async with emptied(etcd.url):
        pass
    daemon = await RealDaemon(folder, [etcd.url], [nats.url]).start()
    made = Target(daemon, nats.url)
    await made.open()
    yield made
    await made.close()
    await daemon.close()


def wrong_fields() -> Iterator[tuple[type[Request], bytes]]:
    """Every field of every request, and of every task, with everything that it cannot be."""
    for kind, good in GOOD.items():
        for field, value in itertools.product(get_fields(kind), JUNK):
            yield from refused(kind, {**good, field: value})
    for field, value in itertools.product(SPEC, JUNK):
        yield from refused(wire.Submit, {"tasks": [{**SPEC, field: value}]})
    for field, value in itertools.product(("task", "fence"), JUNK):
        yield from refused(wire.Renew, {"claims": [{"task": "T", "fence": 1, field: value}]})


def get_fields(kind: type[Request]) -> tuple[str, ...]:
    assert set(GOOD[kind]) <= set(get_type_hints(kind)), "the good request has fields of its kind"
    return kind.__struct_fields__


def refused(kind: type[Request], body: dict[str, Any]) -> Iterator[tuple[type[Request], bytes]]:
    try:
        data = msgspec.json.encode(body)
        msgspec.json.decode(data, type=kind)
    except (msgspec.ValidationError, OverflowError):
        yield kind, data


async def test_a_wrong_value_in_any_field_is_named_and_refused(target: Target) -> None:
    cases = list(wrong_fields())
    assert len(cases) >= 1_000
    # what decides which cases are wrong must not be the pattern under test alone
    assert (wire.Get, b'{"task":"a\\n"}') in cases
    for at in range(0, len(cases), 100):
        chunk = cases[at : at + 100]
        for (kind, data), answer in zip(chunk, await target.send_all(chunk), strict=True):
            assert answer.code == "bad_request", f"{kind.__name__} {data[:200]!r}: {answer}"
            assert "$" in answer.message or "Object missing" in answer.message, answer.message
    await target.unharmed()


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
async def test_what_is_not_a_json_object_is_refused_by_every_verb(target: Target, kind: type[Request]) -> None:
    read = next((field for field in ("task", "after", "request_id") if field in kind.__struct_fields__), None)
    texts = [b'{"%b":"%b"}' % (read.encode(), text) for text in NOT_TEXT] if read else []
    cases = [(kind, data) for data in (*NOT_AN_OBJECT, *texts)]
    for (_, data), answer in zip(cases, await target.send_all(cases), strict=True):
        assert answer.code == "bad_request", f"{data[:80]!r}: {answer}"
    await target.unharmed()


@generated
@given(kind=st.sampled_from(sorted(GOOD, key=lambda kind: kind.__name__)), data=st.binary(max_size=200))
async def test_bytes_are_refused(target: Target, kind: type[Request], data: bytes) -> None:
    answer = await target.send(kind, data)
    assert answer.code in FOUND_WANTING | {"ok"}, answer
    assert answer.code == "bad_request" or data.strip()[:1] in (b"", b"{"), answer


@generated
@given(kind=st.sampled_from(sorted(GOOD, key=lambda kind: kind.__name__)), value=json_values)
async def test_any_json_gets_an_answer_of_the_protocol(target: Target, kind: type[Request], value: Any) -> None:
    try:
        data = msgspec.json.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return
    answer = await target.send(kind, data)
    assert answer.code == "bad_request" or isinstance(value, dict), answer
    assert answer.code in FOUND_WANTING | {"ok"}, answer


@generated
@given(
    kind=st.sampled_from(sorted(GOOD, key=lambda kind: kind.__name__)),
    more=st.dictionaries(st.text(max_size=20).map(lambda name: f"x-{name}"), json_values, max_size=4),
)
async def test_unknown_fields_are_ignored(target: Target, kind: type[Request], more: dict[str, Any]) -> None:
    """An older daemon serves a newer client."""
    try:
        data = msgspec.json.encode({**more, **GOOD[kind], "request_id": None})
    except (OverflowError, UnicodeEncodeError):
        return
    answer = await target.send(kind, data)
    assert answer.code in ("ok", "unknown_task", "session_lost", "no_task_matches"), answer


@generated
@given(payload=json_values, seed=st.integers(0, 2**32))
async def test_any_payload_and_result_come_back_as_they_went(target: Target, payload: Any, seed: int) -> None:
    task = f"P{seed}"
    try:
        spec = msgspec.json.encode({"tasks": [{"id": task, "payload": payload}]})
    except (OverflowError, UnicodeEncodeError):
        return
    answer = await target.send(wire.Submit, spec, session="payer")
    if answer.code != "ok":
        assert answer.code in ("bad_request", "conflict"), answer
        return
    claim = (await target.send(wire.Claim, msgspec.json.encode({"task": task}), session=target.honest)).body
    assert claim["spec"].get("payload") == payload
    body = {"task": task, "fence": claim["fence"], "result": payload}
    assert (await target.send(wire.Complete, msgspec.json.encode(body), session=target.honest)).code == "ok"
    got = (await target.send(wire.Get, msgspec.json.encode({"task": task}))).body
    assert (got["spec"].get("payload"), got.get("result")) == (payload, payload)
    assert (await target.send(wire.Purge, msgspec.json.encode({"task": task}))).code == "ok"


@generated
@given(session=st.text(min_size=1, max_size=80).filter(lambda s: not set(s) & set(" \t\r\n.*>\x00")))
async def test_a_session_in_the_subject_is_well_formed_or_refused(target: Target, session: str) -> None:
    try:
        token = session.encode()
    except UnicodeEncodeError:
        return
    subject = b"if.v1.coordinator.get." + token
    answer = await target.stranger.ask(lambda reply: pub(subject, reply, b'{"task":"nope"}'))
    well_formed = subjects.SESSION.fullmatch(session) is not None
    assert answer.code == ("unknown_task" if well_formed else "bad_request"), answer


# -- numbers, sizes, depths ------------------------------------------------------------------------------------------------


async def test_a_fence_that_is_not_the_one_changes_nothing(target: Target) -> None:
    await target.honestly("submit", tasks=[{"id": "fenced"}])
    fence = (await target.honestly("claim", task="fenced"))["fence"]
    wrong = {0: "claim_lost", fence - 1: "claim_lost", fence + 1: "claim_lost", 2**53 - 1: "claim_lost"}
    malformed: list[Any] = [-1, -fence, 2**53, 2**63, 10**30, fence + 0.5, str(fence), True, None, [fence], {}]
    for given_fence, code in [*wrong.items(), *((m, "bad_request") for m in malformed)]:
        for kind in (wire.Complete, wire.Fail, wire.Release):
            body = msgspec.json.encode({"task": "fenced", "fence": given_fence, "error": "x"})
            answer = await target.send(kind, body, session=target.honest)
            assert answer.code == code, f"{given_fence!r}: {answer}"
        answer = await target.send(wire.Complete, msgspec.json.encode({"task": "fenced", "fence": fence}))
        assert answer.code == "claim_lost", "another session's fence is of no use"
    assert (await target.honestly("complete", task="fenced", fence=fence))["state"] == "done"
    await target.honestly("purge", task="fenced", admin=True)
    await target.unharmed()


async def test_numbers_beyond_a_double_are_kept_or_refused_and_never_bent(target: Target) -> None:
    for number in (b"1e999", b"-1e999", b"1" * 5_000):
        answer = await target.send(wire.Submit, b'{"tasks":[{"id":"big","payload":%b}]}' % number)
        assert answer.code == "bad_request", answer
    await target.send(wire.Submit, b'{"tasks":[{"id":"big","payload":[18446744073709551616,-9223372036854775809]}]}')
    got = await target.send(wire.Get, b'{"task":"big"}')
    assert got.body["spec"]["payload"] == [2**64, -(2**63) - 1]
    await target.honestly("cancel", task="big", admin=True)
    await target.honestly("purge", task="big", admin=True)
    assert (await target.send(wire.Get, b'{"task":"a","task":"nope"}')).code == "unknown_task"  # the last one counts
    await target.unharmed()


@pytest.mark.parametrize("over", [0, 1])
async def test_a_payload_and_a_result_may_be_as_large_as_the_limit_and_no_larger(target: Target, over: int) -> None:
    value = "x" * (PAYLOAD_MAX_BYTES - 2 + over)
    answer = await target.send(wire.Submit, msgspec.json.encode({"tasks": [{"id": "large", "payload": value}]}))
    assert answer.code == ("too_large" if over else "ok"), answer
    await target.honestly("submit", tasks=[{"id": "filled"}])
    fence = (await target.honestly("claim", task="filled"))["fence"]
    body = msgspec.json.encode({"task": "filled", "fence": fence, "result": value})
    answer = await target.send(wire.Complete, body, session=target.honest)
    assert answer.code == ("too_large" if over else "ok"), answer
    for task in ("large", "filled"):
        if (await target.send(wire.Get, msgspec.json.encode({"task": task}))).code == "ok":
            await target.send(wire.Cancel, msgspec.json.encode({"task": task}))
            await target.honestly("purge", task=task, admin=True)
    await target.unharmed()


async def test_a_submission_that_grows_when_it_is_stored_is_refused_not_broken(target: Target) -> None:
    """`1e15` takes four bytes on the wire and eighteen in the store: together more than etcd takes at once."""
    payload = b"[" + b",".join([b"1e15"] * 3_300) + b"]"
    specs = b",".join(b'{"id":"G%d","payload":%b}' % (n, payload) for n in range(60))
    answer = await target.send(wire.Submit, b'{"tasks":[%b]}' % specs)
    assert answer.code == "too_large", answer
    assert (await target.send(wire.Get, b'{"task":"G0"}')).code == "unknown_task"
    await target.unharmed()


async def test_nesting_is_refused_at_its_own_limit_and_not_where_a_stack_ends(target: Target) -> None:
    """What just fits where it is received must not be stored: it would not fit where it is read again."""
    for depth in (NESTING_MAX - 3, NESTING_MAX - 2, *range(900, 1_000, 7), 5_000):
        payload = b"[" * depth + b"]" * depth
        answer = await target.send(wire.Submit, b'{"tasks":[{"id":"deep","payload":%b}]}' % payload)
        assert answer.code == ("ok" if depth <= NESTING_MAX - 3 else "bad_request"), f"{depth}: {answer}"
    text = msgspec.json.encode({"tasks": [{"id": "flat", "payload": "[{" * 900, "title": '"[{\\"' * 90}]})
    assert (await target.send(wire.Submit, text)).code == "ok"
    for task in ("deep", "flat"):
        assert (await target.send(wire.Get, msgspec.json.encode({"task": task}))).code == "ok"
        assert (await target.honestly("claim", task=task))["task"] == task
        await target.honestly("cancel", task=task, admin=True)
        await target.honestly("purge", task=task, admin=True)
    await target.unharmed()


# -- headers, replies and the connection itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["x", "-1", "1.5", "1e3", " ", "٣", "9" * 13, "9" * 5_000, "1; drop", "0x10", "NaN", "\\r\\n"]
)
async def test_a_deadline_that_is_none_is_refused(target: Target, value: str) -> None:
    answer = await target.send(wire.List, b"{}", headers={"If-Deadline-Ms": value})
    assert answer.code == ("bad_request" if value.strip() else "ok"), answer
    await target.unharmed()


async def test_a_deadline_that_has_passed_is_told_so(target: Target) -> None:
    assert (await target.send(wire.List, b"{}", headers={"If-Deadline-Ms": "0"})).code == "deadline_exceeded"
    assert (await target.send(wire.List, b"{}", headers={"If-Deadline-Ms": "999999999999"})).code == "ok"


#: bytes of a header block -> whether the request behind it is carried out as if it had none
HEADERS: dict[str, bytes] = {
    "nothing but a letter": b"N",
    "no end of line": b"NATS/1.0",
    "one line": b"NATS/1.0\r\n",
    "empty": b"NATS/1.0\r\n\r\n",
    "a status that is no text": b"NATS/1.0 \xff\xff\xff x\r\n\r\n",
    "a status of the server's own": b"NATS/1.0 503\r\n\r\n",
    "a status without end": b"NATS/1.0 1",
    "another protocol": b"HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": b"\xff\xfe\x00noise\r\n\r\n",
    "no colon": b"NATS/1.0\r\nnothing\r\n\r\n",
    "no name": b"NATS/1.0\r\n: x\r\n\r\n",
    "no text": b"NATS/1.0\r\nA: \xff\xfe\r\n\xff: b\r\n\r\n",
    "twenty thousand": b"NATS/1.0\r\n" + b"".join(b"H%d: v\r\n" % n for n in range(20_000)) + b"\r\n",
    "the same one a thousand times": b"NATS/1.0\r\n" + b"A: b\r\n" * 1_000 + b"\r\n",
    "a very long one": b"NATS/1.0\r\nA: " + b"x" * 500_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADERS)
async def test_broken_headers_cost_only_themselves(target: Target, name: str) -> None:
    """One such message used to make the daemon deaf for three seconds."""
    for _ in range(5):
        answer = await target.stranger.ask(
            lambda reply: hpub(b"if.v1.coordinator.get.me", reply, HEADERS[name], b'{"task":"nope"}')
        )
        assert answer.code == "unknown_task", answer
    await target.unharmed()


#: the end of a subject; a vertical tab and a form feed once parted words, and 7 was then another subscription
ODD = [b"\xff", b"\xc0\x80", b"\x0b7", b"\x0c7", b"a\x0b7\x0b7", b"\x00", b"\x1b[31m", "ä".encode(), b"x" * 3_000]


@pytest.mark.parametrize("odd", ODD)
async def test_an_odd_subject_is_a_bad_request(target: Target, odd: bytes) -> None:
    for _ in range(5):
        answer = await target.stranger.ask(
            lambda reply: pub(b"if.v1.coordinator.get.a" + odd, reply, b'{"task":"nope"}')
        )
        assert answer.code == "bad_request", answer
    await target.unharmed()


async def test_an_answer_goes_to_an_inbox_or_nowhere(target: Target) -> None:
    replies = [
        b"", b"_INBOX", b"_INBOX.", b"if.v1.coordinator.bye." + target.honest.encode(), b"$JS.API.STREAM.DELETE.IF_EVENTS",
        *(b"_INBOX.x" + odd for odd in ODD[:-1]), b"if.v1.event.task.victim", b"_INBOX.x\x0b7\x0b7",
    ]  # fmt: skip
    overheard = await target.overhear()
    for reply in replies:
        for subject in (b"if.v1.coordinator.get.me", b"$SRV.PING", b"$SRV.INFO.coordinator", b"$SRV.STATS.coordinator"):
            target.stranger.write(pub(subject, reply, b'{"task":"nope"}'))
    await target.unharmed()
    heard = [subject for subject in await overheard() if not subject.startswith("_INBOX.")]
    assert heard == [], "the daemon published where a stranger told it to"


async def test_a_message_without_a_reply_is_carried_out_and_a_bad_one_forgotten(target: Target) -> None:
    for data in (*NOT_AN_OBJECT, b'{"tasks":[{"id":"quiet"}]}'):
        target.stranger.write(pub(b"if.v1.coordinator.submit.me", b"", data))
    await target.stranger.flushed()
    async with asyncio.timeout(10):
        while (await target.send(wire.Get, b'{"task":"quiet"}')).code != "ok":
            await asyncio.sleep(0.01)
    await target.honestly("cancel", task="quiet", admin=True)
    await target.honestly("purge", task="quiet", admin=True)
    await target.unharmed()


async def test_memory_stays_flat_under_a_flood(target: Target) -> None:
    """Its peak in the last half against that in the first, which fills caches, pools and the interpreter's free lists."""
    chance = random.Random(7)
    fields = list(wrong_fields())
    small = [data for data in NOT_AN_OBJECT if len(data) < 1_000]

    async def round_of_it() -> None:
        for _ in range(6):
            cases = chance.sample(fields, 150) + [(kind, data) for kind in GOOD for data in chance.sample(small, 10)]
            for _, answer in zip(cases, await target.send_all(cases), strict=True):
                assert answer.code == "bad_request"
        deep = [(kind, data) for kind in GOOD for data in NOT_AN_OBJECT[-8:]]
        await target.send_all(deep)
        await asyncio.gather(
            *(target.send(wire.Hello, b'{"ttl_s":2}', session=f"s{chance.randrange(50)}") for _ in range(100))
        )

    used = []
    for _ in range(20):
        await round_of_it()
        used.append(await target.daemon.metric("process_resident_memory_bytes"))
    grown = max(used[10:]) - max(used[:10])
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MB more after as much again"
    await target.unharmed()


async def test_words_in_the_journal_that_are_no_events_crash_no_daemon(target: Target) -> None:
    """A daemon that starts reads there how far its predecessor came. One such message used to end every one of them."""
    for what in ("submitted", "claimed", "completed", "purged"):
        for data in (b"", b"junk", b'{"revision":"x"}', b'{"revision":-7}', b'{"revision":1e99}', b"[" * 100_000):
            target.stranger.write(pub(f"if.v1.event.task.{what}".encode(), b"", data))
    await target.stranger.flushed()
    await target.restarted()
    await target.unharmed()
    assert (await target.next_event("submitted"))["task"]


async def test_no_error_of_the_protocol_goes_by_two_statuses() -> None:
    for code, kind in errors.all_codes().items():
        assert kind.status in (400, 401, 403, 404, 409, 429, 500, 503), code
