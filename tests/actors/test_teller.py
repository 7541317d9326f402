"""The teller between others and a store that hurts: what goes together, who is handed back, and what a lost reply is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from ifabric.clock import SystemClock
from ifabric.errors import BudgetShort, Overloaded, Unavailable
from ifabric.metrics import Metrics
from ifabric.store.base import Put, Store, Txn, absent, unchanged
from ifabric.store.commit import Committer, Request
from ifabric.wire.governor import path_of
from ifabric_actors.governor import ledger, records, teller
from ifabric_actors.governor.books import Books
from ifabric_actors.governor.records import Account, Hold, Tally
from ifabric_actors.governor.teller import Draft, Posted, Posting, Teller
from tests.conformance.faulty import Faulty, written

CLOCK = SystemClock()


class Bank:
    """One store, and as many tellers as there would be daemons."""

    def __init__(self, store: Store) -> None:
        self.store = Faulty(store)
        self.metrics = Metrics()
        self._committers: list[Committer] = []

    async def teller(self, store: Any = None) -> Teller:
        committer = Committer(store or self.store, CLOCK, self.metrics, timeout_s=2.0)
        await committer.start()
        self._committers.append(committer)
        return Teller(committer, CLOCK, self.metrics, 1_000)

    async def limit(self, account: str, micro_usd: int) -> None:
        put = Put(records.account_key(account), records.encode(Account(limit=micro_usd)))
        await self.store.txn(Txn((), (put,)))

    async def tally(self, account: str) -> Tally:
        kv = await self.store.get(records.tally_key(account, "total"))
        return replace(records.tally(kv), at=0) if kv is not None else Tally()

    def races(self) -> float:
        return self.metrics.counter("if_governor_posting_races_total").value

    async def close(self) -> None:
        self.store.let_go()
        for committer in self._committers:
            await committer.stop()


@pytest.fixture
async def bank(store: Store) -> AsyncIterator[Bank]:
    made = Bank(store)
    yield made
    await made.close()


def hold(name: str, account: str, amount: int, *, also: tuple[Any, ...] = ()) -> Posting:
    """A hold, decided by the ledger. `also` are further conditions of its own."""
    key = records.hold_key("s", name)

    def make(books: Books) -> Draft:
        path = books.path(account)
        on = tuple((line.account, line.window) for line in path)
        made = Hold(state="open", session="s", account=account, amount=amount, on=on, at=books.now_ms)
        settled = ledger.reserved(made, path)
        books.put(settled.path)
        return Draft(Request((absent(key), *also), (Put(key, records.encode(made)),)), settled.path)

    return Posting(path_of(account), (), (key,), make, "s")


async def all_posted(teller: Teller, *postings: Posting) -> list[Posted | BaseException]:
    return await asyncio.gather(*(teller.post(posting) for posting in postings), return_exceptions=True)


def posting_txns(bank: Bank) -> list[list[bytes]]:
    """The holds that each transaction wrote."""
    found = [[key for key in written(txn) if key.startswith(records.HOLDS)] for txn in bank.store.sent]
    return [keys for keys in found if keys]


async def test_what_gathers_while_one_is_in_flight_goes_in_one_transaction_with_each_account_written_once(
    bank: Bank,
) -> None:
    teller = await bank.teller()
    await teller.post(hold("first", "acme/x", 1))
    bank.store.sent.clear()
    posted = await all_posted(teller, *(hold(f"h{n}", "acme/x", 1) for n in range(20)))
    assert all(isinstance(one, Posted) and one.outcome.succeeded for one in posted)
    txns = posting_txns(bank)
    assert sum(map(len, txns)) == 20
    assert len(txns) <= 2
    for txn in bank.store.sent:
        assert len(written(txn)) == len(set(written(txn)))
    assert await bank.tally("acme") == await bank.tally("acme/x") == Tally(held=21)


async def test_each_is_decided_on_the_accounts_as_the_one_before_leaves_them(bank: Bank) -> None:
    await bank.limit("acme", 10)
    teller = await bank.teller()
    posted = await all_posted(teller, *(hold(f"h{n}", "acme", 4) for n in range(5)))
    assert [isinstance(one, BudgetShort) for one in posted] == [False, False, True, True, True]
    assert [one.answer[0].tally.held for one in posted[:2] if isinstance(one, Posted)] == [4, 8]
    assert posted[2].facts["have"] == 2  # type: ignore[union-attr]
    assert await bank.tally("acme") == Tally(held=8)


async def test_more_than_fits_goes_in_more_transactions_and_none_is_too_large(bank: Bank) -> None:
    teller = await bank.teller()
    posted = await all_posted(teller, *(hold(f"h{n}", f"acme/t{n % 40}/@s{n}", 1) for n in range(300)))
    assert all(isinstance(one, Posted) and one.outcome.succeeded for one in posted)
    assert await bank.tally("acme") == Tally(held=300)


async def test_accounts_of_different_roots_do_not_wait_for_each_other(bank: Bank) -> None:
    teller = await bank.teller()
    await all_posted(teller, hold("a", "one", 1), hold("b", "two", 1))
    bank.store.hold(lambda txn: records.hold_key("s", "c") in written(txn))
    waiting = asyncio.create_task(teller.post(hold("c", "one", 1)))
    async with asyncio.timeout(5):
        while not any(records.hold_key("s", "c") in written(txn) for txn in bank.store.sent):
            await asyncio.sleep(0)
    other = await bank.teller(bank.store._store)
    async with asyncio.timeout(5):
        assert (await other.post(hold("d", "two", 1))).outcome.succeeded
    assert not waiting.done()
    bank.store.let_go()
    assert (await waiting).outcome.succeeded


async def test_one_whose_own_condition_fails_is_handed_back_and_the_others_go_through(bank: Bank) -> None:
    await bank.store.txn(Txn((), (Put(records.hold_key("s", "taken"), b"{}"),)))
    teller = await bank.teller()
    never = unchanged(b"tasks/gone", 42)
    posted = await all_posted(
        teller,
        hold("a", "acme", 1),
        hold("taken", "acme", 2),
        hold("b", "acme", 4),
        hold("c", "acme", 8, also=(never,)),
    )
    assert [one.outcome.succeeded for one in posted if isinstance(one, Posted)] == [True, False, True, False]
    assert await bank.tally("acme") == Tally(held=5)


async def test_two_that_write_one_key_are_never_in_one_transaction(bank: Bank) -> None:
    teller = await bank.teller()
    posted = await all_posted(teller, *(hold("same", "acme", 1) for _ in range(5)))
    assert [one.outcome.succeeded for one in posted if isinstance(one, Posted)] == [True] + [False] * 4
    assert await bank.tally("acme") == Tally(held=1)


async def test_tellers_that_race_for_an_account_both_get_through_and_nothing_is_counted_twice(bank: Bank) -> None:
    tellers = [await bank.teller() for _ in range(3)]
    postings = [hold(f"h{n}", "acme/x", 1) for n in range(90)]
    posted = await asyncio.gather(
        *(all_posted(teller, *postings[at::3]) for at, teller in enumerate(tellers)),
    )
    assert all(isinstance(one, Posted) and one.outcome.succeeded for some in posted for one in some)
    assert bank.races() > 0
    assert await bank.tally("acme") == Tally(held=90)


async def test_a_refusal_on_old_knowledge_is_not_spoken(bank: Bank) -> None:
    await bank.limit("acme", 10)
    one, other = await bank.teller(), await bank.teller()
    await one.post(hold("a", "acme", 10))  # it knows that nothing is left
    kv = await bank.store.get(records.tally_key("acme", "total"))
    assert kv is not None
    await bank.store.txn(Txn((), (Put(kv.key, records.encode(Tally())),)))  # as when another daemon frees it
    assert (await one.post(hold("b", "acme", 10))).outcome.succeeded
    with pytest.raises(BudgetShort):
        await other.post(hold("c", "acme", 1))


@pytest.mark.parametrize("fault", ["lose request", "lose reply"])
async def test_a_lost_reply_is_recognised_and_not_posted_again(bank: Bank, fault: str) -> None:
    teller = await bank.teller()
    await teller.post(hold("warm", "acme", 1))
    bank.store.next = [fault]
    posted = await teller.post(hold("a", "acme", 5))
    assert posted.outcome.succeeded
    assert posted.answer[0].tally.held == 6
    assert await bank.tally("acme") == Tally(held=6)
    await teller.post(hold("b", "acme", 1))
    assert await bank.tally("acme") == Tally(held=7)


async def test_a_lost_reply_is_recognised_even_when_the_account_has_moved_on_since(bank: Bank) -> None:
    teller, other = await bank.teller(), await bank.teller(bank.store._store)
    await teller.post(hold("warm", "acme", 1))
    bank.store.next = ["lose reply"]
    bank.store.after_loss = bank.store.hold
    waiting = asyncio.create_task(teller.post(hold("a", "acme", 5)))
    async with asyncio.timeout(5):
        while (await bank.tally("acme")).held != 6:
            await asyncio.sleep(0)
    assert (await other.post(hold("b", "acme", 10))).outcome.succeeded
    bank.store.let_go()
    assert (await waiting).outcome.succeeded
    assert await bank.tally("acme") == Tally(held=16)


async def test_a_store_that_is_gone_is_told_to_everyone_who_waits(bank: Bank) -> None:
    teller = await bank.teller()
    await teller.post(hold("warm", "acme", 1))
    bank.store.down = True
    posted = await all_posted(teller, *(hold(f"h{n}", "acme", 1) for n in range(10)))
    assert all(isinstance(one, Unavailable) for one in posted)
    cold = await all_posted(teller, hold("cold", "elsewhere", 1))
    assert isinstance(cold[0], Unavailable)
    bank.store.down = False
    async with asyncio.timeout(5):
        while True:
            try:
                await teller.post(hold("again", "acme", 1))
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                break
    tally = await bank.tally("acme")
    assert tally.held >= 2


async def test_a_bug_in_one_posting_is_its_own(bank: Bank) -> None:
    teller = await bank.teller()

    def broken(books: Books) -> Draft:
        books.put(ledger.placed(books.path("acme"), 100))
        raise ZeroDivisionError

    bad = Posting(("acme",), (), (b"bad",), broken, "s")
    posted = await all_posted(teller, hold("a", "acme", 1), bad, hold("b", "acme", 2))
    assert [type(one) for one in posted] == [Posted, ZeroDivisionError, Posted]
    assert await bank.tally("acme") == Tally(held=3)


async def test_a_caller_that_is_cancelled_while_it_waits_posts_nothing(bank: Bank) -> None:
    teller = await bank.teller()
    await teller.post(hold("warm", "acme", 1))
    bank.store.hold()
    first = asyncio.create_task(teller.post(hold("first", "acme", 1)))
    count = len(bank.store.sent)
    await bank.store.has_sent(count + 1)
    second = asyncio.create_task(teller.post(hold("second", "acme", 1)))
    await asyncio.sleep(0)
    second.cancel()
    bank.store.let_go()
    await first
    await teller.post(hold("third", "acme", 1))
    assert await bank.store.get(records.hold_key("s", "second")) is None
    assert await bank.tally("acme") == Tally(held=3)


async def test_one_that_loses_every_race_is_told_so(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teller, "ROUNDS_MAX", 3)
    slow = await bank.teller()
    await slow.post(hold("warm", "acme", 1))
    send = bank.store.txn

    async def overtaken(txn: Txn) -> Any:
        if records.hold_key("s", "slow") in written(txn):
            kv = await bank.store.get(records.tally_key("acme", "total"))
            assert kv is not None
            await send(Txn((), (Put(kv.key, kv.value),)))
        return await send(txn)

    bank.store.txn = overtaken  # type: ignore[method-assign]
    with pytest.raises(Overloaded):
        await slow.post(hold("slow", "acme", 1))
    assert await bank.tally("acme") == Tally(held=1)


async def test_a_forgetful_memory_asks_etcd_again(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    from ifabric_actors.governor import books

    monkeypatch.setattr(books, "REMEMBERED_MAX", 4)
    teller = await bank.teller()
    teller.memory._trim_at = 4
    for number in range(30):
        posted = await teller.post(hold(f"h{number}", f"acme/t{number % 10}", 1))
        assert posted.outcome.succeeded
    assert len(teller.memory._sums) < 15
    assert await bank.tally("acme") == Tally(held=30)
    assert await bank.tally("acme/t3") == Tally(held=3)


async def test_a_crowd_that_is_refused_with_accounts_of_its_own_is_answered_in_transactions_that_are_not_too_large(
    bank: Bank,
) -> None:
    await bank.limit("acme", 5)
    teller = await bank.teller()
    posted = await all_posted(teller, *(hold(f"h{n}", f"acme/t{n}/@s{n}", 6) for n in range(150)))
    assert all(isinstance(one, BudgetShort) for one in posted)


async def test_a_posting_with_many_keys_of_its_own_finds_room_among_others(bank: Bank) -> None:
    teller = await bank.teller()
    many = tuple(absent(b"tasks/%d" % n) for n in range(60))
    wide = hold("wide", "acme/a/b/c/d/e/f/g/@s", 1, also=many)
    wide = wide._replace(keys=(*wide.keys, *(compare.key for compare in many)))
    crowd = [hold(f"h{n}", f"acme/t{n % 7}", 1) for n in range(60)]
    posted = await all_posted(teller, *crowd[:30], wide, *crowd[30:])
    assert all(isinstance(one, Posted) and one.outcome.succeeded for one in posted)
    assert await bank.tally("acme") == Tally(held=61)


async def test_a_bug_while_a_transaction_is_carried_out_is_told_to_everyone_in_it(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await bank.teller()
    await one.post(hold("warm", "acme", 1))
    raised: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, about: raised.append(str(about.get("exception"))))

    def broken(self: Any, *seen: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(teller.Teller, "_request", broken)
    async with asyncio.timeout(5):
        posted = await all_posted(one, *(hold(f"h{n}", "acme", 1) for n in range(3)))
    assert [type(what) for what in posted] == [RuntimeError] * 3
    monkeypatch.undo()
    assert (await one.post(hold("after", "acme", 1))).outcome.succeeded
    asyncio.get_running_loop().set_exception_handler(None)


def limiting(account: str, limit: int | None, window: Any = "total") -> Posting:
    """An operator sets a limit."""
    key = records.account_key(account)

    def make(books: Books) -> Draft:
        books.found(account, Account(limit=limit, window=window, by="op"))
        return Draft(Request((), ()))

    now_ms = CLOCK.wall_ms()
    windows: tuple[Any, ...] = ("total", "day", "month")
    places = tuple((account, ledger.window_of(kind, now_ms)) for kind in windows)
    return Posting(path_of(account), places, (key,), make, "op")


async def test_a_limit_and_what_is_decided_around_it_in_one_transaction_see_each_other(bank: Bank) -> None:
    one = await bank.teller()
    await one.post(hold("warm", "acme", 1))
    posted = await all_posted(
        one, hold("a", "acme", 4), limiting("acme", 8), hold("b", "acme", 4), hold("c", "acme", 3)
    )
    assert [type(what) for what in posted] == [Posted, Posted, BudgetShort, Posted]
    assert await bank.tally("acme") == Tally(held=8)


async def test_a_limit_of_another_kind_of_window_stops_who_still_counts_by_the_old_one(bank: Bank) -> None:
    await bank.limit("acme", 100)
    one, other = await bank.teller(), await bank.teller()
    await one.post(hold("a", "acme", 1))
    await other.post(limiting("acme", 5, "month"))
    with pytest.raises(BudgetShort) as short:
        await one.post(hold("b", "acme", 6))
    assert (short.value.facts["limit"], short.value.facts["held"]) == (5, 0)


class Tomorrow(SystemClock):
    """A clock that a test moves on by days."""

    days = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.days * 86_400_000


async def test_a_day_begins_under_the_limit_of_now_and_not_under_one_that_was_known_yesterday(bank: Bank) -> None:
    clock = Tomorrow()
    committers = [Committer(bank.store, clock, bank.metrics, timeout_s=2.0) for _ in range(2)]
    for committer in committers:
        await committer.start()
    one, other = (Teller(committer, clock, bank.metrics, 1_000) for committer in committers)
    await one.post(limiting("acme", 100, "day"))
    await one.post(hold("a", "acme", 90))
    with pytest.raises(BudgetShort):
        await one.post(hold("b", "acme", 20))
    await other.post(limiting("acme", 10, "day"))
    clock.days = 1
    with pytest.raises(BudgetShort) as short:
        await one.post(hold("c", "acme", 20))
    assert (short.value.facts["limit"], short.value.facts["held"]) == (10, 0)
    assert (await one.post(hold("d", "acme", 10))).outcome.succeeded
    for committer in committers:
        await committer.stop()


async def test_a_tasks_budget_counts_also_when_somebody_who_does_not_know_it_looked_at_its_account_first(
    bank: Bank,
) -> None:
    one = await bank.teller()
    place = ("task:T", "total")

    def held_for_the_task(name: str, amount: int) -> Posting:
        key = records.hold_key("s", name)

        def make(books: Books) -> Draft:
            books.put(ledger.placed(books.path("acme", task="T", budget_micro_usd=10), amount))
            return Draft(Request((absent(key),), (Put(key, b"{}"),)))

        return Posting(("acme",), (place,), (key,), make, "s")

    def freed(books: Books) -> Draft:
        books.put(ledger.freed(books.at((("acme", "total"), place)), 2))
        return Draft(Request((), ()))

    await one.post(held_for_the_task("a", 6))
    away = Posting(("acme",), (("acme", "total"), place), (b"freed",), freed, "s")
    posted = await all_posted(one, away, held_for_the_task("b", 7), held_for_the_task("c", 6))
    assert [type(what) for what in posted] == [Posted, BudgetShort, Posted]
    assert posted[1].facts["account"] == "task:T"  # type: ignore[union-attr]
