"""Group commit over the twin and the real etcd: who travels together, in which order, and whom a fault concerns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from ifabric.clock import SystemClock
from ifabric.metrics import Metrics
from ifabric.store.base import Delete, Get, Got, Put, Store, Txn, TxnRefused, absent, present
from ifabric.store.commit import REQUEST_OPS_MAX, Committer, Outcome, Request
from ifabric.store.waiting import BATCH_MAX, SHARED_OPS_MAX
from ifabric.testing.memory_store import MemoryStore
from tests.conformance.faulty import Faulty, written

CLOCK = SystemClock()
KIB = 1024


class Group(NamedTuple):
    """A committer, and the store that it thinks it has."""

    committer: Committer
    store: Faulty
    metrics: Metrics

    async def commit(self, *requests: Request) -> list[Any]:
        """All at once; outcomes and refusals, in the order of the requests."""
        return await asyncio.gather(*map(self.committer.commit, requests), return_exceptions=True)

    def start(self, *requests: Request) -> list[asyncio.Task[Outcome]]:
        return [asyncio.ensure_future(self.committer.commit(request)) for request in requests]

    async def value(self, key: bytes) -> bytes | None:
        kv = await self.store.get(key)
        return None if kv is None else bytes(kv.value)

    async def slot_held(self) -> list[asyncio.Task[Outcome]]:
        """A transaction is in flight, and stays there until `let_go`."""
        self.store.hold()
        held = self.start(put(b"held"))
        await self.store.has_sent(1)
        return held


@pytest.fixture
async def group(store: Store) -> AsyncIterator[Group]:
    faulty, metrics = Faulty(store), Metrics()
    committer = Committer(faulty, CLOCK, metrics, timeout_s=10.0)  # type: ignore[arg-type]
    await committer.start()
    faulty.sent.clear()
    yield Group(committer, faulty, metrics)
    await committer.stop()
    assert faulty.overlapping == []


def put(key: bytes, value: bytes = b"v", *, owner: str = "") -> Request:
    return Request((), (Put(key, value),), owner=owner)


def create(key: bytes, value: bytes = b"v") -> Request:
    return Request((absent(key),), (Put(key, value),), (Get(key),))


# -- together -----------------------------------------------------------------------------------------------------------


async def test_requests_that_come_together_go_in_one_transaction(group: Group) -> None:
    outcomes = await group.commit(*(create(b"%d" % n) for n in range(50)))
    assert len(group.store.sent) == 1
    assert {outcome.succeeded for outcome in outcomes} == {True}
    assert len({outcome.revision for outcome in outcomes}) == 1


async def test_more_than_a_batch_holds_goes_in_as_few_batches_as_it_can(group: Group) -> None:
    await group.commit(*(create(b"%d" % n) for n in range(5 * BATCH_MAX)))
    sizes = [len(written(txn)) for txn in group.store.sent]
    assert sizes == [BATCH_MAX] * 5
    seen = group.metrics.histogram("if_store_commit_batch_size")
    assert seen.total == 5 * BATCH_MAX
    assert sum(seen.counts) == 5


async def test_what_comes_while_a_commit_is_in_flight_waits_and_goes_together(group: Group) -> None:
    held = await group.slot_held()
    later = []
    for n in range(20):  # each in a turn of its own
        later += group.start(put(b"%d" % n))
        await asyncio.sleep(0)
    assert len(group.store.sent) == 1
    group.store.let_go()
    await asyncio.gather(*held, *later)
    assert len(group.store.sent) == 2


async def test_a_loser_does_not_fail_the_others_and_reads_what_is_there(group: Group) -> None:
    await group.commit(put(b"taken", b"theirs"))
    outcomes = await group.commit(*(create(b"%d" % n) for n in range(20)), create(b"taken"))
    assert [outcome.succeeded for outcome in outcomes] == [True] * 20 + [False]
    got = outcomes[-1].answers[0]
    assert isinstance(got, Got)
    assert got.kvs[0].value == b"theirs"


async def test_answers_are_in_the_order_of_the_operations(group: Group) -> None:
    reading = Request((), (Put(b"a", b"1"), Get(b"a"), Delete(b"b"), Get(b"none")))
    for together in ((), (put(b"x"), put(b"y"))):
        answers = (await group.commit(reading, *together))[0].answers
        assert [None if a is None else [kv.value for kv in a.kvs] for a in answers] == [None, [b"1"], None, []]


async def test_requests_that_compare_what_the_other_writes_cannot_both_succeed(group: Group) -> None:
    """etcd evaluates all the compares of a transaction before it applies any of it: both would have succeeded."""
    one = Request((absent(b"x"),), (Put(b"y", b"1"),))
    other = Request((absent(b"y"),), (Put(b"x", b"1"),))
    outcomes = await group.commit(one, other)
    assert sorted(outcome.succeeded for outcome in outcomes) == [False, True]


# -- one key after the other ----------------------------------------------------------------------------------------------


async def test_two_requests_for_one_key_never_share_a_batch_and_keep_their_order(group: Group) -> None:
    chance = random.Random(7)
    requests = [put(b"k%d" % chance.randrange(5), b"%04d" % n, owner=str(chance.randrange(3))) for n in range(300)]
    outcomes = await group.commit(*requests)
    order: dict[bytes, list[bytes]] = {}
    for txn in group.store.sent:
        keys = written(txn)
        assert len(keys) == len(set(keys))
    for number in sorted(range(300), key=lambda n: outcomes[n].revision):
        op = requests[number].then[0]
        assert isinstance(op, Put)
        order.setdefault(op.key, []).append(op.value)
    assert all(values == sorted(values) for values in order.values())
    assert [await group.value(key) for key in order] == [values[-1] for values in order.values()]


async def test_a_key_stays_its_writers_until_a_batch_that_fell_apart_is_over(group: Group) -> None:
    """A refused batch is carried out one by one; a request for a key of it must not overtake, nor be overtaken."""
    group.store.hold(lambda txn: written(txn) in ([b"slow"], [b"k"]) and b"first" not in str(txn).encode())
    apart = group.start(put(b"k", b"first"), put(b"slow"), Request((), (Put(b"p", b""), Put(b"p", b""))))
    await group.store.has_sent(4)  # the batch, and each of the three alone
    await apart[0]
    second = group.start(put(b"k", b"second"))
    for _ in range(5):
        await asyncio.sleep(0)
    group.store.hold(lambda txn: b"second" in str(txn).encode())
    await asyncio.gather(*apart, return_exceptions=True)
    third = group.start(put(b"k", b"third"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(b"third" in str(txn).encode() for txn in group.store.sent)
    group.store.let_go()
    await asyncio.gather(*second, *third)
    assert await group.value(b"k") == b"third"


async def test_ten_thousand_requests_for_one_key_do_not_stop_the_daemon() -> None:
    """Looking at all that wait, for each batch, took a minute of this."""
    twin = MemoryStore(CLOCK)
    await twin.connect()
    committer = Committer(twin, CLOCK, Metrics())
    await committer.start()
    async with asyncio.timeout(30):
        await asyncio.gather(*(committer.commit(put(b"hot", b"%d" % n)) for n in range(10_000)))
    kv = await twin.get(b"hot")
    assert kv is not None
    assert (kv.value, kv.version) == (b"9999", 10_000)
    await committer.stop()
    await twin.close()


# -- fairness ------------------------------------------------------------------------------------------------------------


async def test_no_owner_fills_a_batch_while_others_wait(group: Group) -> None:
    held = await group.slot_held()
    flood = group.start(*(put(b"f/%d" % n, owner="flood") for n in range(2_000)))
    others = group.start(*(put(b"o/%d" % n, owner=f"other {n}") for n in range(10)))
    await asyncio.sleep(0)
    group.store.let_go()
    await asyncio.gather(*held, *flood, *others)
    first = written(group.store.sent[1])
    assert len(first) == BATCH_MAX
    assert {key for key in first if key.startswith(b"o/")} == {b"o/%d" % n for n in range(10)}


async def test_a_large_request_does_not_wait_for_a_flood_to_end(group: Group) -> None:
    held = await group.slot_held()
    flood = group.start(*(put(b"f/%d" % n, owner="flood") for n in range(1_000)))
    large = group.start(Request((), tuple(Put(b"l/%d" % n, b"") for n in range(100)), owner="large"))
    await asyncio.sleep(0)
    group.store.let_go()
    await asyncio.gather(*held, *flood, *large)
    assert any(written(txn)[0].startswith(b"l/") for txn in group.store.sent[1:3])


# -- what is large ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [SHARED_OPS_MAX, SHARED_OPS_MAX + 1, 129, REQUEST_OPS_MAX])
async def test_a_request_of_many_operations_is_carried_out_whole_or_not_at_all(group: Group, count: int) -> None:
    gets = tuple(Get(b"r/%d" % n) for n in range(40))
    puts = tuple(Put(b"k/%03d" % n, b"") for n in range(count - 1))
    winner, loser, small = await group.commit(
        Request((absent(b"w"),), (*puts, Put(b"w", b"")), gets),
        Request((present(b"w"), present(b"none")), (*puts, Put(b"x", b"")), (*gets, Get(b"w"))),
        put(b"small"),
    )
    assert (winner.succeeded, loser.succeeded, small.succeeded) == (True, False, True)
    assert len(loser.answers) == 41
    assert loser.answers[-1].kvs[0].key == b"w"
    assert (await group.store.range(b"k/", b"k0"))[0].total == count - 1
    assert await group.value(b"x") is None


async def test_a_request_over_the_limit_of_operations_is_our_bug_and_harms_nobody(group: Group) -> None:
    many = tuple(Put(b"k/%d" % n, b"") for n in range(REQUEST_OPS_MAX + 1))
    guilty, innocent = await group.commit(Request((), many), put(b"a"))
    assert isinstance(guilty, AssertionError)
    assert innocent.succeeded


async def test_large_values_are_spread_over_batches_that_etcd_accepts(group: Group) -> None:
    """A hundred results of 64 KiB in one transaction are four times what etcd takes, and three times what gRPC does."""
    outcomes = await group.commit(*(put(b"%d" % n, bytes(64 * KIB)) for n in range(100)))
    assert {outcome.succeeded for outcome in outcomes} == {True}
    assert group.metrics.counter("if_store_commit_retries_total", why="refused").value == 0


# -- poison ---------------------------------------------------------------------------------------------------------------

POISONS = {
    "under a dead lease": Request((), (Put(b"p", b"", 4242),)),
    "a key twice": Request((), (Put(b"p", b"1"), Put(b"p", b"2"))),
    "put and deleted": Request((), (Put(b"p", b"1"), Delete(b"p"))),
    "larger than etcd takes": Request((), (Put(b"p", bytes(1700 * KIB)),)),
    "larger than gRPC takes": Request((), (Put(b"p", bytes(2500 * KIB)),)),
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("place", [0, 10, 20])
async def test_a_poisoned_request_fails_alone(group: Group, poison: Request, place: int) -> None:
    innocent = [create(b"%d" % n) for n in range(20)]
    outcomes = await group.commit(*innocent[:place], poison, *innocent[place:])
    guilty = outcomes.pop(place)
    assert isinstance(guilty, TxnRefused)
    assert [outcome.succeeded for outcome in outcomes] == [True] * 20
    assert await group.value(b"p") is None
    assert group.committer.down is None


async def poison(group: Group, rounds: int) -> None:
    """Batches with up to three poisoned requests among up to thirty innocent ones."""
    chance = random.Random(11)
    for round_number in range(rounds):
        requests: list[tuple[bool, Request]] = [
            (True, create(b"%d/%d" % (round_number, n))) for n in range(chance.randint(1, 30))
        ]
        for n in range(chance.randint(1, 3)):
            name = b"%d/poison%d" % (round_number, n)
            bad = chance.choice(
                [(Put(name, b"", 4242),), (Put(name, b""), Put(name, b"")), (Put(name, b""), Delete(name))]
            )
            requests.insert(chance.randrange(len(requests) + 1), (False, Request((), bad)))
        outcomes = await group.commit(*(request for _, request in requests))
        for (innocent, _), outcome in zip(requests, outcomes, strict=True):
            if innocent:
                assert outcome.succeeded
            else:
                assert isinstance(outcome, TxnRefused)


async def test_thirty_poisoned_batches_harm_no_innocent(group: Group) -> None:
    await poison(group, 30)


@pytest.mark.slow
async def test_a_thousand_poisoned_batches_harm_no_innocent(group: Group) -> None:
    await poison(group, 1_000)


async def test_a_refused_transaction_is_not_sent_again_whole(group: Group) -> None:
    await group.commit(put(b"a"), put(b"b"), POISONS["a key twice"])
    assert [len(written(txn)) for txn in group.store.sent] == [4, 1, 1, 2]
    assert group.metrics.counter("if_store_commit_retries_total", why="refused").value == 3
    assert all(isinstance(txn, Txn) for txn in group.store.sent)
