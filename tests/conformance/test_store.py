"""One suite over the twin and the real etcd: what `store/base.py` says, sentence by sentence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifabric.clock import SystemClock, monotonic
from ifabric.errors import Unavailable, Unreachable
from ifabric.store.base import (
    Batch,
    Compare,
    Delete,
    Get,
    Got,
    Op,
    Put,
    Store,
    Target,
    Txn,
    TxnRefused,
    TxnResult,
    absent,
    leased,
    present,
    unchanged,
)
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.store.session import Session, elect
from ifabric.testing.memory_store import MemoryStore
from ifabric.testing.servers import etcd_server

CLOCK = SystemClock()


async def put(store: Store, key: bytes, value: bytes = b"v", lease: int = 0) -> int:
    return (await store.txn(Txn((), (Put(key, value, lease),)))).revision


async def take(batches: AsyncIterator[Batch], until: int) -> list[tuple[bytes, bytes, bool]]:
    """What the watch says, until it is at that revision: (key, value, deleted)."""
    seen: list[tuple[bytes, bytes, bool]] = []
    async with asyncio.timeout(10):
        async for batch in batches:
            seen += [(event.kv.key, event.kv.value, event.deleted) for event in batch.events]
            if batch.revision >= until or (batch.events and batch.events[-1].kv.mod_revision >= until):
                break
    return seen


async def test_a_transaction_runs_the_branch_that_its_compares_choose(store: Store) -> None:
    txn = Txn((absent(b"a"),), (Put(b"a", b"1"),), (Get(b"a"),))
    first, second = await store.txn(txn), await store.txn(txn)
    assert (first.succeeded, second.succeeded) == (True, False)
    got = second.answers[0]
    assert isinstance(got, Got)
    assert (got.kvs[0].value, got.kvs[0].mod_revision) == (b"1", first.revision)


async def test_every_kind_of_compare(store: Store) -> None:
    lease = await store.grant(60)
    at = await put(store, b"k", b"v", lease)
    holds = [
        present(b"k"),
        absent(b"none"),
        unchanged(b"k", at),
        unchanged(b"none", 0),
        leased(b"k", lease),
        Compare(b"k", Target.VALUE, Op.EQUAL, b"v"),
        Compare(b"k", Target.VERSION, Op.LESS, 2),
        Compare(b"k", Target.CREATE, Op.GREATER, at - 1),
        Compare(b"none", Target.LEASE, Op.NOT_EQUAL, lease),
    ]
    fails = [
        absent(b"k"),
        unchanged(b"k", at + 1),
        leased(b"k", lease + 1),
        leased(b"none", lease),
        Compare(b"none", Target.VALUE, Op.EQUAL, b"v"),
        Compare(b"none", Target.VALUE, Op.NOT_EQUAL, b"v"),
    ]
    assert [(await store.txn(Txn((c,), ()))).succeeded for c in holds] == [True] * len(holds)
    assert [(await store.txn(Txn((c,), ()))).succeeded for c in fails] == [False] * len(fails)


async def test_a_nested_transaction_fails_alone(store: Store) -> None:
    await put(store, b"taken")
    result = await store.txn(
        Txn(
            (),
            (
                Txn((absent(b"taken"),), (Put(b"taken", b"x"),), (Get(b"taken"),)),
                Txn((absent(b"free"),), (Put(b"free", b"y"),)),
            ),
        )
    )
    inner = [one for one in result.answers if isinstance(one, TxnResult)]
    assert [one.succeeded for one in inner] == [False, True]
    assert {one.revision for one in inner} == {result.revision}
    kv = await store.get(b"taken")
    assert kv is not None
    assert kv.value == b"v"


async def test_nested_compares_look_at_the_state_before_the_transaction(store: Store) -> None:
    result = await store.txn(Txn((), (Put(b"a", b"1"), Txn((present(b"a"),), (Put(b"b", b"2"),), (Put(b"c", b"3"),)))))
    assert result.answers[1].succeeded is False  # type: ignore[union-attr]
    assert await store.get(b"b") is None
    assert await store.get(b"c") is not None


@pytest.mark.parametrize(
    "txn",
    [
        Txn((), (Put(b"a", b"1"), Put(b"a", b"2"))),
        Txn((), (Txn((), (Put(b"a", b"1"),)), Txn((), (Put(b"a", b"2"),)))),
        Txn((), (Put(b"a", b"1"), Delete(b"a"))),
        Txn((), (Put(b"a", b"1", 4242),)),
        Txn((), (Put(b"b", b"1"), Txn((), (Put(b"a", b"1", 4242),)))),
        Txn((), tuple(Put(b"%d" % n, b"") for n in range(129))),
        Txn((), tuple(Txn((), (Put(b"%d" % n, b""),)) for n in range(128))),
        Txn(tuple(absent(b"%d" % n) for n in range(129)), ()),
    ],
    ids=[
        "twice",
        "twice nested",
        "put and delete",
        "no lease",
        "no lease nested",
        "129 puts",
        "128 nested",
        "129 compares",
    ],
)
async def test_what_etcd_will_never_accept_is_refused_whole(store: Store, txn: Txn) -> None:
    with pytest.raises(TxnRefused):
        await store.txn(txn)
    assert (await store.range(b"\x00", b"\xff"))[0].total == 0


async def test_127_nested_transactions_are_accepted(store: Store) -> None:
    result = await store.txn(Txn((), tuple(Txn((), (Put(b"%d" % n, b""),)) for n in range(127))))
    assert len(result.answers) == 127


async def test_ranges_are_in_order_limited_counted_and_of_any_revision(store: Store) -> None:
    for key in (b"p/b", b"p/a", b"p/c", b"q"):
        await put(store, key)
    got, revision = await store.range(b"p/", b"p0", limit=2)
    assert ([kv.key for kv in got.kvs], got.total) == ([b"p/a", b"p/b"], 3)
    await store.txn(Txn((), (Delete(b"p/", b"p0"),)))
    assert (await store.range(b"p/", b"p0"))[0].total == 0
    assert (await store.range(b"p/", b"p0", revision=revision))[0].total == 3


async def test_versions_and_revisions_count_as_etcd_counts(store: Store) -> None:
    first = await put(store, b"a")
    second = await put(store, b"a", b"w")
    kv = await store.get(b"a")
    assert kv is not None
    assert (kv.create_revision, kv.mod_revision, kv.version, second - first) == (first, second, 2, 1)
    nothing = await store.txn(Txn((), (Delete(b"none"),)))
    assert nothing.revision == second


async def test_a_lease_that_ends_takes_its_keys_along(store: Store) -> None:
    lease = await store.grant(60)
    await put(store, b"a", b"v", lease)
    await put(store, b"b", b"v", lease)
    await put(store, b"b", b"v")  # no longer the lease's
    assert await store.keep_alive(lease) == 60
    await store.revoke(lease)
    await store.revoke(lease)
    assert await store.get(b"a") is None
    assert await store.get(b"b") is not None
    assert await store.keep_alive(lease) == 0.0


async def test_what_a_lease_has_left_is_told_without_renewing_it(store: Store) -> None:
    lease = await store.grant(60)
    assert 57 <= await store.left(lease) <= 60
    await store.revoke(lease)
    assert await store.left(lease) == 0.0
    assert await store.left(12345) == 0.0


async def test_many_keep_alives_at_once_are_each_answered(store: Store) -> None:
    leases = [await store.grant(30 + n) for n in range(20)]
    answers = await asyncio.gather(*(store.keep_alive(lease) for lease in leases * 3))
    assert answers == [30.0 + n for n in range(20)] * 3


async def test_a_lease_expires_and_the_watch_says_so(store: Store) -> None:
    lease = await store.grant(2)
    at = await put(store, b"s/x", b"v", lease)
    batches = store.watch((b"s/",), after_revision=at)
    assert await take(batches, at + 1) == [(b"s/x", b"", True)]
    await batches.aclose()  # type: ignore[attr-defined]


async def test_the_watch_begins_after_a_revision_and_misses_nothing(store: Store) -> None:
    start = await put(store, b"t/0")
    for n in range(1, 4):
        await put(store, b"t/%d" % n)
    await put(store, b"other")
    last = (await store.txn(Txn((), (Delete(b"t/1"),)))).revision
    batches = store.watch((b"t/", b"u/"), after_revision=start)
    seen = await take(batches, last)
    assert seen == [(b"t/1", b"v", False), (b"t/2", b"v", False), (b"t/3", b"v", False), (b"t/1", b"", True)]
    later = await put(store, b"u/9")
    assert await take(batches, later) == [(b"u/9", b"v", False)]
    await batches.aclose()  # type: ignore[attr-defined]


async def test_progress_moves_the_watch_past_what_it_does_not_watch(store: Store) -> None:
    start = await put(store, b"t/0")
    batches = store.watch((b"t/", b"u/"), after_revision=start - 1)
    await take(batches, start)
    last = await put(store, b"elsewhere")
    asked = asyncio.create_task(_ask_until_done(store))
    try:
        assert await take(batches, last) == []
    finally:
        asked.cancel()
    await batches.aclose()  # type: ignore[attr-defined]


async def _ask_until_done(store: Store) -> None:
    while True:
        await store.progress()
        await asyncio.sleep(0.02)


async def test_events_say_what_was_created(store: Store) -> None:
    first = await put(store, b"t/a")
    last = await put(store, b"t/a", b"w")
    created = []
    batches = store.watch((b"t/",), after_revision=first - 1)
    async with asyncio.timeout(10):
        async for batch in batches:
            created += [event.created for event in batch.events]
            if batch.events and batch.events[-1].kv.mod_revision >= last:
                break
    assert created == [True, False]
    await batches.aclose()  # type: ignore[attr-defined]


async def test_a_watch_from_a_compacted_revision_lists_the_present_and_says_so(store: Store) -> None:
    await put(store, b"t/gone")
    await put(store, b"t/kept", b"1")
    await store.txn(Txn((), (Delete(b"t/gone"),)))
    last = await put(store, b"t/kept", b"2")
    await compact(store, last)
    batches = store.watch((b"t/",), after_revision=1)
    async with asyncio.timeout(10):
        batch = await anext(batches)
    assert batch.resync
    assert [(e.kv.key, e.kv.value) for e in batch.events] == [(b"t/kept", b"2")]
    later = await put(store, b"t/new")
    assert await take(batches, later) == [(b"t/new", b"v", False)]
    await batches.aclose()  # type: ignore[attr-defined]


async def compact(store: Store, revision: int) -> None:
    if isinstance(store, MemoryStore):
        store.etcd.compact(revision)
        return
    from aetcd import rpc

    assert isinstance(store, Etcd)
    await rpc.KVStub(store.channel._channel).Compact(rpc.CompactionRequest(revision=revision))


async def test_a_session_keeps_its_lease_and_gives_it_back(store: Store) -> None:
    async with Session.open(store, CLOCK, 3) as session:
        lease = session.lease
        await put(store, b"mine", b"v", lease)
        assert not session.lost.done()
    assert session.lost.done()
    assert await store.get(b"mine") is None


async def test_a_session_whose_lease_is_taken_away_is_told(store: Store) -> None:
    async with Session.open(store, CLOCK, 2) as session:
        await store.revoke(session.lease)
        async with asyncio.timeout(5):
            assert "gone" in await session.lost


async def test_one_of_the_candidates_is_elected_and_then_the_next(store: Store) -> None:
    async with Session.open(store, CLOCK, 5) as one, Session.open(store, CLOCK, 5) as two:
        await elect(store, one, b"office", b"one")
        await elect(store, one, b"office", b"one")  # it has it already
        waiting = asyncio.create_task(elect(store, two, b"office", b"two"))
        await asyncio.sleep(0)
        assert not waiting.done()
        await one.close()
        async with asyncio.timeout(5):
            await waiting
        kv = await store.get(b"office")
        assert kv is not None
        assert kv.value == b"two"


# -- the same on both ---------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([b"a", b"b", b"c/1", b"c/2"])
OPS = st.one_of(
    st.builds(Put, KEYS, st.sampled_from([b"", b"1", b"2"]), st.just(0)),
    st.builds(Delete, KEYS, st.just(b"")),
    st.just(Delete(b"c/", b"c0")),
    st.builds(Get, KEYS, st.just(b""), st.just(0)),
    st.just(Get(b"c/", b"c0", 1)),
)
COMPARES = st.one_of(
    st.builds(absent, KEYS),
    st.builds(present, KEYS),
    st.builds(Compare, KEYS, st.just(Target.VALUE), st.sampled_from(Op), st.sampled_from([b"", b"1"])),
    st.builds(Compare, KEYS, st.just(Target.VERSION), st.sampled_from(Op), st.integers(0, 3)),
)
BRANCH = st.lists(OPS, max_size=3).map(tuple)
SIMPLE = st.builds(Txn, st.lists(COMPARES, max_size=2).map(tuple), BRANCH, BRANCH)
NESTED = st.builds(
    Txn,
    st.lists(COMPARES, max_size=2).map(tuple),
    st.lists(OPS | SIMPLE, max_size=3).map(tuple),
    st.lists(OPS | SIMPLE, max_size=3).map(tuple),
)


def relative(answer: Any, base: int) -> Any:
    """The same answer, with revisions counted from the start of the sequence."""
    if isinstance(answer, TxnResult):
        return (answer.succeeded, answer.revision - base, tuple(relative(one, base) for one in answer.answers))
    if isinstance(answer, Got):
        return tuple(
            (kv.key, kv.value, kv.create_revision - base, kv.mod_revision - base, kv.version) for kv in answer.kvs
        ), answer.total
    return answer


async def outcomes(store: Store, txns: list[Txn]) -> list[Any]:
    base = (await store.txn(Txn((), (Put(b"zero", b""), Delete(b"a", b"d"))))).revision
    found: list[Any] = []
    for txn in txns:
        try:
            found.append(relative(await store.txn(txn), base))
        except TxnRefused:
            found.append("refused")
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(txns=st.lists(SIMPLE | NESTED, min_size=1, max_size=6))
async def test_the_twin_does_what_etcd_does(txns: list[Txn], real_store: Etcd) -> None:
    twin = MemoryStore(CLOCK)
    await twin.connect()
    try:
        assert await outcomes(twin, txns) == await outcomes(real_store, txns)
    finally:
        await twin.close()


# -- real faults --------------------------------------------------------------------------------------------------------


async def test_a_frozen_etcd_is_unavailable_within_moments_and_comes_back() -> None:
    async with etcd_server() as server, connected(server.url) as store:
        await put(store, b"a")
        server.freeze()
        began = monotonic()
        with pytest.raises(Unavailable) as refusal:
            await put(store, b"a")
        assert monotonic() - began < 2
        assert refusal.value.facts["maybe_done"] is True
        server.thaw()
        kv = await store.get(b"a")
        assert kv is not None


async def test_a_watch_outlives_the_server() -> None:
    async with etcd_server() as server, connected(server.url) as store:
        start = await put(store, b"t/1")
        batches = store.watch((b"t/",), after_revision=start - 1)
        assert await take(batches, start) == [(b"t/1", b"v", False)]
        await server.kill()
        await server.start_again()
        await store.get(b"t/1")
        last = await put(store, b"t/2")
        assert await take(batches, last) == [(b"t/2", b"v", False)]
        await batches.aclose()


async def test_a_killed_etcd_keeps_what_it_acknowledged() -> None:
    async with etcd_server() as server, connected(server.url) as store:
        for n in range(50):
            await put(store, b"k/%02d" % n)
        await server.kill()
        await server.start_again()
        got, _ = await store.range(b"k/", b"k0")
        assert got.total == 50


async def test_a_dead_endpoint_is_named_and_the_next_one_used(etcd: Any) -> None:
    with pytest.raises(Unreachable, match="127.0.0.1:1"):
        await Etcd(EtcdSettings(endpoints=("127.0.0.1:1",), timeout_s=1), CLOCK).connect()
    async with connected("127.0.0.1:1", etcd.url) as store:
        assert (await store.health()).version


@contextlib.asynccontextmanager
async def connected(*urls: str) -> AsyncIterator[Etcd]:
    store = Etcd(EtcdSettings(endpoints=urls), CLOCK)
    await store.connect()
    try:
        yield store
    finally:
        await store.close()
