"""Whatever a stranger sends about money, breakers and matching: an answer with the right code, and not a micro-USD moved.

As `test_hostile` does for the coordinator, to a daemon of its own. What etcd keeps of the governor is read before and
after each onslaught and must be the same, byte for byte.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.store.base import prefix_end
from ifabric.store.etcd import Etcd
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire import coordinator, subjects
from ifabric.wire import governor as wire
from ifabric.wire.envelope import NESTING_MAX, Request
from ifabric_actors.governor import records
from tests.conftest import emptied

from .stranger import PATIENCE_S, Said, Target, pub, read
from .test_hostile import JUNK, NOT_AN_OBJECT, NOT_TEXT, generated, json_values, refused

#: a well-formed request of each verb, refused or harmless when it is carried out
GOOD: dict[type[Request], dict[str, Any]] = {
    wire.Reserve: {"hold": "no", "amount_micro_usd": 2**53 - 1, "account": "acme/@me", "ttl_s": 1, "task": "nope",
                   "fence": 1, "request_id": "r"},
    wire.Commit: {"hold": "no", "amount_micro_usd": 0, "usage": {"tokens_in": 0}, "request_id": "r"},
    wire.Void: {"hold": "no", "request_id": "r"},
    wire.Spend: {"entry": "no", "amount_micro_usd": 2**53 - 1, "account": "acme/@me", "task": "nope", "fence": 1,
                 "usage": {"tokens_out": 0, "purpose": "work"}, "request_id": "r"},
    wire.Balance: {"account": "acme/@me", "tree": True},
    wire.SetAccount: {"account": "acme", "limit_micro_usd": 1_000_000, "window": "total", "request_id": "set"},
    wire.Match: {"needs": ["a"], "wants": ["a"], "labels": ["a"], "sessions": ["me"]},
    wire.Admit: {"breaker": "quiet"},
    wire.Report: {"breaker": "quiet", "permit": "nope", "outcome": "ignored", "latency_s": 0.1, "retry_after_s": 0},
    wire.Breakers: {},
    wire.SetBreaker: {"breaker": "quiet", "state": "closed", "why": "", "request_id": "close"},
}  # fmt: skip
KINDS = sorted(GOOD, key=lambda kind: kind.__name__)
#: those that change nothing even when they are carried out
HARMLESS = [kind for kind in KINDS if kind not in (wire.SetAccount, wire.SetBreaker)]
USAGE = {"tokens_in": 1, "tokens_out": 1, "purpose": "work"}
#: an answer to a request that is well formed
FOUND_WANTING = {
    "bad_request", "budget_short", "claim_lost", "conflict", "forbidden", "session_lost", "unknown_account",
    "unknown_hold", "unknown_permit", "too_large",
}  # fmt: skip
#: what is no whole number of micro-USD from 0 to 2**53 - 1
NO_AMOUNT = [
    b"-1", b"-0.5", b"0.5", b"99.99", b"1e-1", b"7.0", b"1e3", b"9E0", b"-0.0", b"1e308", b"1e400", b"-1e400", b"NaN", b"Infinity", b"-Infinity", b"nan",
    b"true", b"false", b'"100"', b'"1e2"', b'""', b"[100]", b"{}", b"9007199254740992", b"9223372036854775808",
    b"-9223372036854775809", b"18446744073709551616", b"1" * 400, b"1_000", b"0x10", b"010", b"+1", b"1.", b".5", b"1e",
]  # fmt: skip
ME, LIMIT = "me", 1_000_000


class Governed(Target):
    """The same target, of whom other components are asked too."""

    store: Etcd

    async def send(
        self, kind: type[Request], data: bytes, *, session: str = ME, headers: dict[str, str] | None = None
    ) -> Said:
        subject = subjects.request(kind.component, kind.verb, session, admin=kind.admin)
        return read(await self._bus.request(subject, data, timeout_s=PATIENCE_S, headers=headers))

    async def tell(self, kind: type[Request], *, session: str = ME, **body: Any) -> Said:
        return await self.send(kind, msgspec.json.encode(body), session=session)

    async def well(self, kind: type[Request], *, session: str = ME, **body: Any) -> dict[str, Any]:
        """A request that is served."""
        said = await self.tell(kind, session=session, **body)
        assert said.code == "ok", said
        return said.body

    async def books(self) -> dict[bytes, tuple[bytes, int]]:
        """All that etcd keeps of the governor, and in which version."""
        got, _ = await self.store.range(records.GOVERNOR, prefix_end(records.GOVERNOR))
        return {kv.key: (kv.value, kv.version) for kv in got.kvs}

    async def line(self, account: str) -> tuple[int, int]:
        """What is spent and held on an account."""
        line = (await self.well(wire.Balance, session=self.honest, account=account))["path"][-1]
        return line["spent"], line["held"]

    async def unharmed_and_solvent(self, before: dict[bytes, tuple[bytes, int]]) -> None:
        """The daemon is what it was, and so is the money."""
        assert await self.books() == before
        await self.unharmed()
        assert await self.metric_of_errors() == 0

    async def metric_of_errors(self) -> float:
        return await self.daemon.metric("if_actor_messages_total", actor="governor", outcome="error")


@pytest.fixture(scope="module")
async def target(
    etcd: RealServer, nats: RealServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Governed]:
    """A daemon of its own process; the stranger has a session and an account with something spent and held on it."""
    async with emptied(etcd.url) as store:
        daemon = await RealDaemon(tmp_path_factory.mktemp("hostile"), [etcd.url], [nats.url]).start()
        made = Governed(daemon, nats.url)
        made.store = store
        await made.open()
        await made.well(coordinator.Hello, account="acme", ttl_s=3600)
        await made.well(wire.SetAccount, account="acme", limit_micro_usd=LIMIT)
        await made.well(wire.Reserve, hold="standing", amount_micro_usd=1_000, ttl_s=3600)
        await made.well(wire.Spend, entry="spent", amount_micro_usd=234)
        yield made
        await made.close()
        await daemon.close()


# -- what is malformed ----------------------------------------------------------------------------------------------------


def wrong_fields() -> Iterator[tuple[type[Request], bytes]]:
    """Every field of every request with everything that it cannot be."""
    for kind, good in GOOD.items():
        for field, value in itertools.product(kind.__struct_fields__, JUNK):
            yield from refused(kind, {**good, field: value})
    for field, value in itertools.product(USAGE, JUNK):
        for kind in (wire.Commit, wire.Spend):
            yield from refused(kind, {**GOOD[kind], "usage": {**USAGE, field: value}})


def test_there_is_a_good_request_of_every_verb() -> None:
    assert set(GOOD) == set(wire.REQUESTS)


async def test_a_wrong_value_in_any_field_is_named_and_refused(target: Governed) -> None:
    cases = list(wrong_fields())
    assert len(cases) >= 800
    before = await target.books()
    for at in range(0, len(cases), 100):
        chunk = cases[at : at + 100]
        for (kind, data), answer in zip(chunk, await target.send_all(chunk), strict=True):
            assert answer.code == "bad_request", f"{kind.__name__} {data[:200]!r}: {answer}"
            assert "$" in answer.message or "Object missing" in answer.message, answer.message
    await target.unharmed_and_solvent(before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_what_is_not_a_json_object_is_refused_by_every_verb(target: Governed, kind: type[Request]) -> None:
    before = await target.books()
    known = kind.__struct_fields__
    read = next((f for f in ("hold", "entry", "account", "breaker", "request_id", "labels") if f in known), None)
    texts = [b'{"%b":"%b"}' % (read.encode(), text) for text in NOT_TEXT] if read else []
    cases = [(kind, data) for data in (*NOT_AN_OBJECT, *texts)]
    for (_, data), answer in zip(cases, await target.send_all(cases), strict=True):
        assert answer.code == "bad_request", f"{data[:80]!r}: {answer}"
    await target.unharmed_and_solvent(before)


@generated
@given(kind=st.sampled_from(KINDS), value=json_values)
async def test_any_json_gets_an_answer_of_the_protocol(target: Governed, kind: type[Request], value: Any) -> None:
    try:
        data = msgspec.json.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return
    answer = await target.send(kind, data)
    assert answer.code == "bad_request" or isinstance(value, dict), answer
    assert answer.code in FOUND_WANTING | {"ok"}, answer


@generated
@given(
    kind=st.sampled_from(HARMLESS),
    more=st.dictionaries(st.text(max_size=20).map(lambda name: f"x-{name}"), json_values, max_size=4),
)
async def test_unknown_fields_are_ignored(target: Governed, kind: type[Request], more: dict[str, Any]) -> None:
    """An older daemon serves a newer client."""
    try:
        data = msgspec.json.encode({**more, **GOOD[kind], "request_id": None})
    except (OverflowError, UnicodeEncodeError):
        return
    assert (await target.send(kind, data)).code in FOUND_WANTING - {"bad_request"} | {"ok"}


async def test_nesting_and_size_are_refused_at_their_own_limits(target: Governed) -> None:
    before = await target.books()
    for kind in KINDS:
        for depth in (NESTING_MAX, NESTING_MAX + 1, 900, 100_000):
            data = b'{"x":%b}' % (b"[" * depth + b"]" * depth)
            assert (await target.send(kind, data)).code == "bad_request", depth
        for name in ("hold", "entry", "account", "breaker", "permit", "request_id", "task", "why"):
            if name in kind.__struct_fields__:
                assert (await target.tell(kind, **{**GOOD[kind], name: "x" * 900_000})).code == "bad_request", name
    for field, most in (("sessions", wire.MATCH_SESSIONS_MAX), ("needs", 64), ("wants", 64), ("labels", 64)):
        for over in (0, 1):
            answer = await target.tell(wire.Match, **{field: [f"a{n}" for n in range(most + over)]})
            assert answer.code == ("bad_request" if over else "ok"), (field, answer)
    await target.unharmed_and_solvent(before)


# -- amounts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", NO_AMOUNT)
async def test_what_is_no_amount_of_whole_micro_usd_is_refused_wherever_it_stands(
    target: Governed, amount: bytes
) -> None:
    before = await target.books()
    cases: list[tuple[type[Request], bytes]] = [
        (wire.Reserve, b'{"hold":"n","amount_micro_usd":%b}'),
        (wire.Commit, b'{"hold":"standing","amount_micro_usd":%b}'),
        (wire.Spend, b'{"entry":"n","amount_micro_usd":%b}'),
        (wire.SetAccount, b'{"account":"acme","limit_micro_usd":%b}'),
        (wire.Commit, b'{"hold":"standing","amount_micro_usd":1,"usage":{"tokens_in":%b}}'),
        (coordinator.Claim, b'{"task":"nope","hold_micro_usd":%b}'),
        (coordinator.Next, b'{"hold_micro_usd":%b}'),
        (coordinator.Complete, b'{"task":"nope","fence":1,"cost_micro_usd":%b}'),
        (coordinator.Submit, b'{"tasks":[{"id":"priced","budget_micro_usd":%b}]}'),
    ]
    for kind, data in cases:
        answer = await target.send(kind, data % amount)
        assert answer.code == "bad_request", f"{kind.__name__} {data % amount!r}: {answer}"
    await target.unharmed_and_solvent(before)


async def test_the_largest_amounts_add_up_exactly_or_are_refused(target: Governed) -> None:
    """A cost is charged whatever the limit says: a stranger may tell of 2,100 times 2**53 - 1 micro-USD."""
    most = 2**53 - 1
    await target.well(coordinator.Hello, session="rich", account="vault", ttl_s=600)
    holds = [f"h{number}" for number in range(2_100)]
    for kind, amount in ((wire.Reserve, 0), (wire.Commit, most)):
        answers: list[Said] = []
        for at in range(0, len(holds), 100):
            asked = [
                target.tell(kind, session="rich", hold=hold, amount_micro_usd=amount) for hold in holds[at : at + 100]
            ]
            answers += await asyncio.gather(*asked)
    assert {answer.code for answer in answers} <= {"ok", "bad_request", "too_large"}, answers[-1]
    charged = most * sum(answer.code == "ok" for answer in answers)
    short = await target.tell(wire.Reserve, session="rich", hold="h", amount_micro_usd=1)
    assert (short.code, short.body["account"]) == ("budget_short", "vault/@rich")
    assert await target.line("vault") == (charged, 0)
    await target.unharmed()


async def test_an_amount_that_is_not_there_is_refused_with_the_facts_and_not_in_part(target: Governed) -> None:
    before = await target.books()
    for kind, name in ((wire.Reserve, "hold"), (wire.Spend, "entry")):
        for need in (LIMIT - 1_234 + 1, LIMIT, 2**53 - 1):
            answer = await target.tell(kind, **{name: "much", "amount_micro_usd": need})
            facts = {key: answer.body.get(key) for key in ("account", "have", "need", "held")}
            assert answer.code == "budget_short", answer
            assert facts == {"account": "acme", "have": LIMIT - 1_234, "need": need, "held": 1_000}
    await target.unharmed_and_solvent(before)


# -- accounts -------------------------------------------------------------------------------------------------------------

NO_ACCOUNT = [
    "", "/", "acme/", "/acme", "acme//x", ".", "..", "acme/..", "acme/../@me", "acme/@me/", "acme/@", "@", "@@me", "a@b",
    "acme/ @me", "acme/@me ", "acme/@me\n", "acme\\@me", "acme/@m\u00e9", "acme/\u202e", "\x00", "*", ">", "acme.x", "task:t",
    "acme/task:t", "x" * 65, "/".join("abcdefghij"),
]  # fmt: skip


@pytest.mark.parametrize("account", NO_ACCOUNT)
async def test_what_is_no_account_is_refused_by_every_verb(target: Governed, account: str) -> None:
    before = await target.books()
    for kind in (wire.Reserve, wire.Spend, wire.Balance, wire.SetAccount):
        answer = await target.tell(kind, **{**GOOD[kind], "account": account})
        assert answer.code == "bad_request", answer
    answer = await target.tell(coordinator.Hello, session="x", account=account)
    assert answer.code == "bad_request", answer
    await target.unharmed_and_solvent(before)


@pytest.mark.parametrize(
    "account",
    ["acme", "acme/@honest", "@honest", "@me", "other", "acme/@me2", "acme/@mee/x", "acme/x/@me", "a/acme/@me"],
)
async def test_nobody_draws_on_what_is_not_his(target: Governed, account: str) -> None:
    before = await target.books()
    for kind, name in ((wire.Reserve, "hold"), (wire.Spend, "entry")):
        answer = await target.tell(kind, **{name: "theirs", "amount_micro_usd": 1, "account": account})
        assert (answer.code, answer.body.get("account")) == ("forbidden", "acme/@me"), answer
    await target.unharmed_and_solvent(before)


async def test_an_account_that_nobody_knows_is_said_to_be_unknown(target: Governed) -> None:
    before = await target.books()
    for account in ("nobody", "acme/nobody", "acme/@nobody", "/".join("abcdefghi")):
        assert (await target.tell(wire.Balance, account=account)).code == "unknown_account", account
    assert (await target.tell(wire.Reserve, session="ghost", hold="h", amount_micro_usd=1)).code == "session_lost"
    assert (await target.tell(wire.Spend, session="ghost", entry="h", amount_micro_usd=1)).code == "session_lost"
    await target.unharmed_and_solvent(before)


async def test_a_path_may_be_as_deep_as_the_limit_and_no_deeper(target: Governed) -> None:
    deep = "/".join("abcdefgh")
    await target.well(coordinator.Hello, session="deep", account=deep, ttl_s=600)
    reply = await target.well(wire.Spend, session="deep", entry="e", amount_micro_usd=5)
    assert [line["account"] for line in reply["path"]][-1] == f"{deep}/@deep"
    assert len(reply["path"]) == wire.DEPTH_MAX
    before = await target.books()
    below = await target.tell(wire.Spend, session="deep", entry="f", amount_micro_usd=5, account=f"{deep}/@deep/x")
    assert below.code == "bad_request", below
    too_deep = await target.tell(coordinator.Hello, session="deeper", account=f"{deep}/i")
    assert too_deep.code == "bad_request", too_deep
    await target.unharmed_and_solvent(before)


@pytest.mark.parametrize("account", ["a/b/a", "a/a/a/a", "@r1/@r1"])
async def test_there_are_no_circles_a_name_may_come_twice_in_a_path(target: Governed, account: str) -> None:
    """An account is a place in a tree and not a link to one: a/b/a is the account a of a/b, and no way back to a."""
    session = "r" + str(account.count("/"))
    if account.startswith("@"):  # a session's name is for its own account alone
        assert (await target.tell(coordinator.Hello, session=session, account=account)).code == "bad_request"
        return
    await target.well(coordinator.Hello, session=session, account=account, ttl_s=600)
    path = wire.path_of(f"{account}/@{session}")
    spent = [(await target.line(name))[0] if await known(target, name) else 0 for name in path]
    await target.well(wire.Reserve, session=session, hold="h", amount_micro_usd=10)
    reply = await target.well(wire.Commit, session=session, hold="h", amount_micro_usd=7)
    assert [line["account"] for line in reply["path"]] == list(path)
    assert [await target.line(name) for name in path] == [(before + 7, 0) for before in spent]
    await target.unharmed()


async def known(target: Governed, account: str) -> bool:
    return (await target.tell(wire.Balance, account=account)).code == "ok"


# -- ids that are used again ------------------------------------------------------------------------------------------------


async def test_an_id_that_meant_one_thing_never_means_another(target: Governed) -> None:
    fresh = {"session": "again"}
    await target.well(coordinator.Hello, account="ids", ttl_s=600, **fresh)
    await target.well(wire.Reserve, hold="open", amount_micro_usd=100, **fresh)
    await target.well(wire.Reserve, hold="done", amount_micro_usd=100, **fresh)
    await target.well(wire.Commit, hold="done", amount_micro_usd=40, **fresh)
    await target.well(wire.Reserve, hold="void", amount_micro_usd=100, **fresh)
    await target.well(wire.Void, hold="void", **fresh)
    await target.well(wire.Spend, entry="entry", amount_micro_usd=5, **fresh)
    before = await target.books()
    for name in ("open", "done", "void", "entry"):
        for amount in (0, 99, 101):
            assert (await target.tell(wire.Reserve, hold=name, amount_micro_usd=amount, **fresh)).code == "conflict"
            assert (await target.tell(wire.Spend, entry=name, amount_micro_usd=amount, **fresh)).code == "conflict"
        if name != "open":
            for amount in (1, 41, 2**53 - 1):
                answer = await target.tell(wire.Commit, hold=name, amount_micro_usd=amount, **fresh)
                assert answer.code == "conflict", (name, amount, answer)
        if name != "void":
            below = "ids/@again/below"
            kind, field, amount = (wire.Spend, "entry", 5) if name == "entry" else (wire.Reserve, "hold", 100)
            body = {field: name, "amount_micro_usd": amount, "account": below}
            assert (await target.tell(kind, **body, **fresh)).code == "conflict", name
    for name in ("done", "entry"):
        assert (await target.tell(wire.Void, hold=name, **fresh)).code == "conflict", name
    assert (await target.tell(wire.Spend, entry="open", amount_micro_usd=100, **fresh)).code == "conflict"
    assert (await target.tell(wire.Reserve, hold="entry", amount_micro_usd=5, **fresh)).code == "conflict"
    # what is the same is answered as before, and moves nothing
    assert (await target.well(wire.Commit, hold="done", amount_micro_usd=40, **fresh))["charged"] == 40
    assert (await target.well(wire.Commit, hold="entry", amount_micro_usd=5, **fresh))["charged"] == 5
    assert (await target.well(wire.Spend, entry="entry", amount_micro_usd=5, **fresh))["charged"] == 5
    assert (await target.well(wire.Void, hold="void", **fresh))["released"] == 100
    for name in ("open", "done", "void"):
        await target.well(wire.Reserve, hold=name, amount_micro_usd=100, **fresh)
    await target.unharmed_and_solvent(before)


async def test_a_hold_is_its_sessions_own(target: Governed) -> None:
    before = await target.books()
    for session in ("me2", "honest", "ME"):
        answer = await target.tell(wire.Commit, session=session, hold="standing", amount_micro_usd=1)
        assert answer.code == "unknown_hold", answer
        assert (await target.tell(wire.Void, session=session, hold="standing")).code == "unknown_hold"
    for hold in ("standin", "standing2", "@me", "STANDING"):
        answer = await target.tell(wire.Commit, hold=hold, amount_micro_usd=1)
        assert answer.code in ("unknown_hold", "bad_request"), answer
    await target.unharmed_and_solvent(before)


async def test_a_request_id_belongs_to_one_request_of_one_session(target: Governed) -> None:
    for session in ("ra", "rb"):
        await target.well(coordinator.Hello, session=session, account="rid", ttl_s=600, request_id="hi")
    first = await target.well(wire.Reserve, session="ra", hold="h", amount_micro_usd=10, request_id="r1")
    assert await target.well(wire.Reserve, session="ra", hold="h", amount_micro_usd=10, request_id="r1") == first
    before = await target.books()
    same: list[tuple[type[Request], dict[str, Any]]] = [
        (wire.Reserve, {"hold": "h", "amount_micro_usd": 11}),
        (wire.Reserve, {"hold": "g", "amount_micro_usd": 10}),
        (wire.Commit, {"hold": "h", "amount_micro_usd": 10}),
        (wire.Void, {"hold": "h"}),
        (wire.Spend, {"entry": "h", "amount_micro_usd": 10}),
        (wire.Spend, {"entry": "g", "amount_micro_usd": 10}),
        (wire.SetAccount, {"account": "rid", "limit_micro_usd": 10}),
        (wire.SetBreaker, {"breaker": "quiet", "state": "open"}),
        (coordinator.Submit, {"tasks": [{"id": "rid"}]}),
        (coordinator.Next, {}),
    ]
    for kind, body in same:
        answer = await target.tell(kind, session="ra", **body, request_id="r1")
        assert answer.code == "conflict", (kind.__name__, body, answer)
    await target.unharmed_and_solvent(before)
    # another session's request of the same id is another request
    await target.well(wire.Reserve, session="rb", hold="h", amount_micro_usd=20, request_id="r1")
    assert await target.line("rid") == (0, 30)


async def test_a_hold_for_a_claim_needs_that_claim(target: Governed) -> None:
    await target.well(coordinator.Submit, session=target.honest, tasks=[{"id": "owned"}])
    fence = (await target.well(coordinator.Claim, session=target.honest, task="owned"))["fence"]
    before = await target.books()
    for kind, name in ((wire.Reserve, "hold"), (wire.Spend, "entry")):
        body = {name: "for", "amount_micro_usd": 1}
        for half in ({"task": "owned"}, {"fence": fence}):
            assert (await target.tell(kind, **body, **half)).code == "bad_request"
        for task, given_fence in (("owned", fence), ("owned", 0), ("owned", fence + 1), ("nope", fence)):
            answer = await target.tell(kind, **body, task=task, fence=given_fence)
            assert answer.code == "claim_lost", answer
        answer = await target.tell(kind, session=target.honest, **body, task="owned", fence=fence + 1)
        assert answer.code == "claim_lost", answer
    await target.unharmed_and_solvent(before)
    await target.well(coordinator.Complete, session=target.honest, task="owned", fence=fence)


# -- many at once ---------------------------------------------------------------------------------------------------------


async def test_two_hundred_of_the_same_at_once_are_charged_once(target: Governed) -> None:
    await target.well(coordinator.Hello, session="echo", account="echo", ttl_s=600)
    same = [
        target.tell(wire.Spend, session="echo", entry="e", amount_micro_usd=7, request_id=f"s{n}") for n in range(200)
    ]
    assert {said.code for said in await asyncio.gather(*same)} == {"ok"}
    assert await target.line("echo") == (7, 0)
    await target.well(wire.Reserve, session="echo", hold="h", amount_micro_usd=1_000)
    ends = [
        target.tell(wire.Commit, session="echo", hold="h", amount_micro_usd=n) if n % 4 else
        target.tell(wire.Void, session="echo", hold="h")
        for n in range(200)
    ]  # fmt: skip
    answers = await asyncio.gather(*ends)
    won = {n if n % 4 else 0 for n, said in enumerate(answers) if said.code == "ok"}
    assert len(won) == 1, won
    assert {said.code for said in answers} == {"ok", "conflict"}
    assert await target.line("echo") == (7 + won.pop(), 0)
    await target.unharmed()


async def test_a_crowd_that_is_refused_at_once_is_told_so_by_transactions_that_etcd_takes(target: Governed) -> None:
    """A refusal is confirmed by comparing what it was decided on: of ninety accounts that is too much for one."""
    crowd = [f"crowd{n}" for n in range(90)]
    await target.well(wire.SetAccount, account="crowd", limit_micro_usd=999)
    for session in crowd:
        await target.well(coordinator.Hello, session=session, account=f"crowd/{session}", ttl_s=600)
    asked = [target.tell(wire.Reserve, session=session, hold="h", amount_micro_usd=1_000) for session in crowd]
    assert {answer.code for answer in await asyncio.gather(*asked)} == {"budget_short"}
    await target.unharmed()


async def test_a_completion_that_opens_many_tasks_shares_its_transaction_with_no_more_than_fits(
    target: Governed,
) -> None:
    crowd = [f"many{n}" for n in range(60)]
    for session in crowd:
        await target.well(coordinator.Hello, session=session, account=f"many/{session}", ttl_s=600)
    first = crowd[0]
    opened = [{"id": f"opened{n}", "depends_on": ["opener"], "needs": ["nobody"]} for n in range(60)]
    await target.well(coordinator.Submit, session=first, tasks=[{"id": "opener"}, *opened])
    claim = await target.well(coordinator.Claim, session=first, task="opener", hold_micro_usd=5)
    done = {"task": "opener", "fence": claim["fence"], "cost_micro_usd": 3}
    asked = [target.tell(wire.Spend, session=session, entry="e", amount_micro_usd=1) for session in crowd]
    asked.insert(40, target.tell(coordinator.Complete, session=first, **done))
    assert {answer.code for answer in await asyncio.gather(*asked)} == {"ok"}
    assert await target.line("many") == (60 + 3, 0)
    await target.unharmed()


async def test_a_message_without_a_reply_is_carried_out_and_a_bad_one_forgotten(target: Governed) -> None:
    await target.well(coordinator.Hello, session="mute", account="mute", ttl_s=600)
    for data in (*NOT_AN_OBJECT, b'{"entry":"e","amount_micro_usd":3}'):
        target.stranger.write(pub(b"if.v1.governor.spend.mute", b"", data))
    await target.stranger.flushed()
    async with asyncio.timeout(10):
        while not await known(target, "mute/@mute"):
            await asyncio.sleep(0.01)
    assert await target.line("mute/@mute") == (3, 0)
    await target.unharmed()


async def test_after_all_of_it_the_sums_are_right(target: Governed) -> None:
    """Every tally is the sum of the holds on it; the stranger's own account is what it was in the beginning."""
    assert await target.line("acme/@me") == (234, 1_000)
    held: dict[tuple[str, str], int] = {}
    spent: dict[tuple[str, str], int] = {}
    tallies: dict[tuple[str, str], tuple[int, int]] = {}
    got, _ = await target.store.range(records.GOVERNOR, prefix_end(records.GOVERNOR))
    for kv in got.kvs:
        if kv.key.startswith(records.HOLDS):
            hold = records.hold(kv)
            for place in hold.on:
                held[place] = held.get(place, 0) + (hold.amount if hold.state == "open" else 0)
                spent[place] = spent.get(place, 0) + hold.charged
        elif kv.key.startswith(records.TALLIES):
            window, _, account = kv.key[len(records.TALLIES) :].decode().partition("/")
            tally = records.tally(kv)
            tallies[account, window] = (tally.spent, tally.held)
    assert {place: sums for place, sums in tallies.items() if sums != (0, 0)} == {
        place: (spent[place], held[place]) for place in spent if (spent[place], held[place]) != (0, 0)
    }
    await target.unharmed()
