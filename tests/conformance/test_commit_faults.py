"""Group commit when the store loses, refuses, hangs or forgets: what a request is told, and what happened."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from ifabric.clock import SystemClock
from ifabric.errors import FabricError, StoreFull, Unavailable
from ifabric.metrics import Metrics
from ifabric.store.base import Delete, Get, Put, Store, Txn, TxnRefused, absent, present
from ifabric.store.commit import INCARNATION_KEY, Committer, Outcome, Request
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.servers import etcd_server
from tests.conformance.faulty import Faulty, written
from tests.conformance.test_commit import Group, create, group, put

__all__ = ["group"]
CLOCK = SystemClock()
SEED = int(os.environ.get("IFABRIC_SEED", "0"))


def witnessed(key: bytes, value: bytes = b"mine") -> Request:
    mine = Put(key, value)
    return Request((absent(key),), (mine,), (Get(b"else"),), witness=mine)


async def impatient(store: Store, timeout_s: float = 0.3) -> Group:
    faulty, metrics = Faulty(store), Metrics()
    committer = Committer(faulty, CLOCK, metrics, timeout_s=timeout_s)  # type: ignore[arg-type]
    await committer.start()
    faulty.sent.clear()
    return Group(committer, faulty, metrics)


async def back(group: Group) -> None:
    """Returns when the probe has found the store again."""
    async with asyncio.timeout(10):
        while group.committer.down is not None:
            await asyncio.sleep(0.01)


# -- the reply that got lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["lose reply", "lose request"])
@pytest.mark.parametrize("mates", [0, 5])
async def test_what_was_lost_on_the_way_is_told_as_it_happened(group: Group, lost: str, mates: int) -> None:
    group.store.next = [lost]
    requests = [witnessed(b"%d" % n) for n in range(1 + mates)]
    outcomes = await group.commit(*requests)
    assert {outcome.succeeded for outcome in outcomes} == {True}
    for n, outcome in enumerate(outcomes):
        kv = await group.store.get(b"%d" % n)
        assert (kv.version, kv.mod_revision) == (1, outcome.revision)
    assert group.metrics.counter("if_store_commit_retries_total", why="unknown").value == 1 + mates


@pytest.mark.parametrize("lost", ["lose reply", "lose request"])
async def test_in_doubt_a_loser_is_still_told_that_it_lost(group: Group, lost: str) -> None:
    await group.commit(put(b"k", b"theirs"))
    group.store.next = [lost]
    loser, winner = await group.commit(witnessed(b"k"), witnessed(b"other"))
    assert (loser.succeeded, winner.succeeded) == (False, True)
    assert len(loser.answers) == 1  # what it asked for, without the witness


async def test_the_same_words_under_anothers_lease_are_no_witness(group: Group) -> None:
    mine, theirs = await group.store.grant(60), await group.store.grant(60)
    await group.commit(Request((), (Put(b"k", b"same", theirs),)))
    witness = Put(b"k", b"same", mine)
    group.store.next = ["lose request"]
    (outcome,) = await group.commit(Request((absent(b"k"),), (witness,), witness=witness))
    assert outcome.succeeded is False


async def test_a_lost_reply_without_a_witness_is_unknown(group: Group) -> None:
    group.store.next = ["lose reply"]
    (outcome,) = await group.commit(create(b"k"))
    assert isinstance(outcome, Unavailable)
    assert await group.value(b"k") == b"v"


async def test_in_doubt_a_read_is_simply_read_again(group: Group) -> None:
    group.store.next = ["lose reply"]
    (outcome,) = await group.commit(Request((present(b"none"),), (), (Get(b"else"),)))
    assert outcome.succeeded is False
    assert len(outcome.answers) == 1


@pytest.mark.parametrize("lost", ["lose reply", "lose request"])
@pytest.mark.parametrize("mates", [0, 5])
async def test_a_store_that_fills_up_between_two_attempts_does_not_hide_the_first(
    group: Group, lost: str, mates: int
) -> None:
    """The second attempt is refused, and says nothing about the first: the witness does."""
    if lost == "lose reply":
        group.store.after_loss = lambda: setattr(group.store, "full", True)
        group.store.next = [lost]
    else:
        group.store.next = [lost, "lose request"]
    outcomes = await group.commit(*(witnessed(b"%d" % n) for n in range(1 + mates)))
    assert all(isinstance(outcome, Outcome) and outcome.succeeded for outcome in outcomes)
    assert [(await group.store.get(b"%d" % n)).version for n in range(1 + mates)] == [1] * (1 + mates)


async def test_a_refusal_after_a_lost_request_is_a_refusal(group: Group) -> None:
    mine = Put(b"w", b"mine")
    group.store.next = ["lose request"]
    (outcome,) = await group.commit(Request((), (mine, Put(b"k", b"", 4242)), witness=mine))
    assert isinstance(outcome, TxnRefused)
    group.store.next = ["lose request"]
    (outcome,) = await group.commit(Request((), (mine, Put(b"k", b"", 4242))))
    assert isinstance(outcome, Unavailable)  # without a witness nobody knows what became of the first attempt


# -- the store that is gone -------------------------------------------------------------------------------------------------


async def test_a_store_that_is_gone_is_unavailable_and_new_requests_are_refused_at_once(store: Store) -> None:
    group = await impatient(store)
    group.store.down = True
    outcomes = await group.commit(*(put(b"%d" % n) for n in range(500)))
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 500, "one exception raised by all keeps all their frames"
    assert len({key for txn in group.store.sent for key in written(txn)}) == 100, "what waits behind is not tried"
    sent = len(group.store.sent)
    assert all(isinstance(outcome, Unavailable) for outcome in await group.commit(*(put(b"x") for _ in range(10))))
    assert len(group.store.sent) == sent
    group.store.down = False
    await back(group)
    assert (await group.commit(put(b"x")))[0].succeeded
    await group.committer.stop()


async def test_a_store_that_hangs_is_unavailable_too_and_comes_back(store: Store) -> None:
    group = await impatient(store)
    group.store.hanging = True
    async with asyncio.timeout(10):
        outcomes = await group.commit(*(put(b"%d" % n) for n in range(300)))
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        assert isinstance((await group.commit(put(b"x")))[0], Unavailable)
    group.store.let_go()
    await back(group)
    assert (await group.commit(put(b"x")))[0].succeeded
    await group.committer.stop()


async def test_a_short_absence_is_not_noticed(store: Store) -> None:
    group = await impatient(store, timeout_s=5)
    group.store.down = True
    commits = group.start(witnessed(b"k"))
    await group.store.has_sent(3)
    group.store.down = False
    assert (await commits[0]).succeeded
    await group.committer.stop()


async def test_a_frozen_etcd_is_unavailable_and_comes_back() -> None:
    async with etcd_server() as server:
        store = Etcd(EtcdSettings(endpoints=(server.url,), attempt_timeout_s=0.2), CLOCK)
        await store.connect()
        group = await impatient(store, timeout_s=0.5)
        server.freeze()
        async with asyncio.timeout(10):
            assert isinstance((await group.commit(witnessed(b"k")))[0], Unavailable)
            assert isinstance((await group.commit(witnessed(b"l")))[0], Unavailable)
        server.thaw()
        await back(group)
        assert (await group.commit(witnessed(b"m")))[0].succeeded
        await group.committer.stop()
        await store.close()


async def test_a_full_store_refuses_what_puts_and_carries_out_the_rest(group: Group) -> None:
    await group.commit(put(b"old"), put(b"kept"))
    group.store.full = True
    puts, deletes, gets = await group.commit(put(b"k"), Request((), (Delete(b"old"),)), Request((), (Get(b"kept"),)))
    assert isinstance(puts, StoreFull)
    assert deletes.succeeded
    assert gets.answers[0].kvs[0].value == b"v"
    assert (await group.value(b"old"), await group.value(b"k")) == (None, None)
    assert group.committer.down is None
    group.store.full = False
    assert (await group.commit(put(b"k")))[0].succeeded


# -- the cluster that was restored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("value", [b"2", None])
async def test_after_a_restore_nothing_is_written_and_the_daemon_is_told(
    group: Group, count: int, value: bytes | None
) -> None:
    change = Put(INCARNATION_KEY, value) if value is not None else Delete(INCARNATION_KEY)
    await group.store._store.txn(Txn((), (change,)))
    outcomes = await group.commit(*(put(b"k/%d" % n) for n in range(count)))
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert "restored" in group.committer.lost.result()
    assert (await group.store.range(b"k/", b"k0"))[0].total == 0
    await group.committer.stop()
    await group.committer.start()
    assert group.committer.incarnation == int(value or b"1")
    assert (await group.commit(put(b"k/0")))[0].succeeded


# -- ending ----------------------------------------------------------------------------------------------------------------------


async def test_stopping_lets_what_was_accepted_finish_and_refuses_the_rest(group: Group) -> None:
    commits = group.start(*(put(b"k%d" % (n % 7), b"%d" % n) for n in range(300)))
    stopping = asyncio.ensure_future(group.committer.stop())  # in the same turn: accepted, and not sent yet
    await asyncio.sleep(0)
    assert isinstance((await group.commit(put(b"late")))[0], Unavailable)
    await stopping
    assert all(commit.done() for commit in commits)
    assert {commit.result().succeeded for commit in commits} == {True}
    assert await group.value(b"late") is None
    await group.committer.stop()


async def test_a_caller_who_goes_away_does_no_harm(group: Group) -> None:
    held = await group.slot_held()
    commits = group.start(*(put(b"k%d" % (n % 3), b"%d" % n) for n in range(30)))
    await asyncio.sleep(0)
    for gone in (held[0], *commits[::2]):
        gone.cancel()
    group.store.let_go()
    outcomes = await asyncio.gather(*held, *commits, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 16
    assert {outcome.succeeded for outcome in outcomes if isinstance(outcome, Outcome)} == {True}
    sent = {op.value for txn in group.store.sent for op in _puts(txn)}
    assert not sent & {b"%d" % n for n in range(0, 30, 2)}, "who went away before it was sent is not sent"
    assert await group.value(b"held") == b"v"


def _puts(txn: Txn) -> list[Put]:
    nested = [put for op in txn.then if isinstance(op, Txn) for put in _puts(op)]
    return [op for op in txn.then if isinstance(op, Put)] + nested


async def test_a_bug_below_ends_the_committer_and_leaves_nobody_waiting(group: Group) -> None:
    group.store.next = ["bug"]
    outcomes = await group.commit(put(b"k"), put(b"x"))
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert "a bug" in await group.committer.lost


# -- anything, in any order ---------------------------------------------------------------------------------------------------------


class Model:
    """Random requests under random faults. What one was told is compared with what is in the store at the end."""

    def __init__(self, group: Group, seed: int) -> None:
        self._group = group
        self._chance = random.Random(seed)
        self._seed = seed
        self._told: list[tuple[Request, bytes, bytes, Outcome | BaseException]] = []

    async def run(self, count: int) -> None:
        calls = []
        for n in range(count):
            calls.append(asyncio.ensure_future(self._one(n)))
            if self._chance.random() < 0.1:
                await asyncio.sleep(0)
            if self._chance.random() < 0.03:
                calls[self._chance.randrange(len(calls))].cancel()
            if self._chance.random() < 0.05:
                self._group.store.next.append(self._chance.choice(["ok", "ok", "lose reply", "lose request"]))
            if self._chance.random() < 0.005:
                self._group.store.full = not self._group.store.full
        self._group.store.full = False
        await asyncio.gather(*calls, return_exceptions=True)
        await self._check()

    def _request(self, n: int) -> tuple[Request, bytes, bytes]:
        """A mark that is put once, a key that many put, and whether etcd will have it."""
        chance = self._chance
        mark, shared = b"m/%06d" % n, b"s/%d" % chance.randrange(6)
        witness = Put(mark, b"%d" % n)
        then: tuple[Any, ...] = (witness, Put(shared, b"%06d" % n))
        compares = [absent(mark)]
        kind = chance.random()
        if kind < 0.1:
            compares.append(present(b"never"))
        elif kind < 0.15:
            then = (*then, Put(b"dead", b"", 4242))
        elif kind < 0.2:
            then = (*then, *(Put(b"m/%06d/%d" % (n, extra), b"") for extra in range(30)))
        owner = str(chance.randrange(4))
        known = witness if chance.random() < 0.8 else None
        return Request(tuple(compares), then, (Get(shared),), owner, known), mark, shared

    async def _one(self, n: int) -> None:
        request, mark, shared = self._request(n)
        told: Outcome | BaseException
        try:
            told = await self._group.committer.commit(request)
        except (FabricError, asyncio.CancelledError) as error:
            told = error
        self._told.append((request, mark, shared, told))

    async def _check(self) -> None:
        replay = f"replay with IFABRIC_SEED={self._seed}"
        got, _ = await self._group.store.range(b"m/", b"m0")
        marks = {kv.key: kv for kv in got.kvs}
        writers: dict[bytes, list[tuple[int, bytes]]] = {}
        for _, mark, shared, told in self._told:
            kv = marks.get(mark)
            assert kv is None or kv.version == 1, f"{mark!r} was carried out {kv.version} times: {replay}"
            if isinstance(told, Outcome):
                assert told.succeeded == (kv is not None), f"{mark!r} was told {told}: {replay}"
                assert kv is None or kv.mod_revision == told.revision, f"{mark!r} was told {told}: {replay}"
            elif isinstance(told, TxnRefused | StoreFull):
                assert kv is None, f"{mark!r} was told {told!r}: {replay}"
            if kv is not None:
                writers.setdefault(shared, []).append((kv.mod_revision, mark[2:]))
        for shared, those in writers.items():
            revisions = [revision for revision, _ in those]
            assert len(set(revisions)) == len(revisions), f"{shared!r} was written twice in one batch: {replay}"
            assert await self._group.value(shared) == max(those)[1], f"{shared!r} is not its last writer's: {replay}"
            in_order = [number for _, number in sorted(those)]
            assert in_order == sorted(in_order), f"{shared!r} was written out of order: {replay}"


@pytest.mark.parametrize("seed", [SEED] if SEED else range(1, 9))
async def test_each_request_happens_once_if_and_only_if_it_is_told_so(group: Group, seed: int) -> None:
    await Model(group, seed).run(300)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(2))
async def test_each_request_happens_once_over_many_seeds(group: Group, hundred: int) -> None:
    for seed in range(100 + 100 * hundred, 200 + 100 * hundred):
        await group.store._store.txn(Txn((), (Delete(b"m/", b"m0"), Delete(b"s/", b"s0"))))
        await Model(group, seed).run(500)
