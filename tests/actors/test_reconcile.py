"""What money survives a restore, over the twins and over real etcd and NATS: the ledger is put back to an older state,
and the journal tells it what it has forgotten.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ifabric.bus.base import Entry, Journal
from ifabric.cli.lost import Span
from ifabric.cli.reconcile import Found, Outcome, bars, read, replay, span_of
from ifabric.client import Client
from ifabric.clock import SystemClock, rfc3339
from ifabric.errors import BadRequest, BudgetShort, Conflict, FabricError, Unavailable, UnknownHold
from ifabric.store.base import KV, Delete, Put, Txn, prefix_end
from ifabric.wire import governor as money
from ifabric.wire import replay as wire
from ifabric.wire import subjects
from ifabric_actors.governor import records
from tests.actors.conftest import World
from tests.actors.test_money import ask, budget_event, limit, line, stored_hold, sums

CLOCK = SystemClock()
#: what a restore puts back: all but receipts, which hang on leases of daemons that are gone
KEPT = (b"fabric/", b"governor/", b"sessions/", b"tasks/")
DAY = rfc3339(CLOCK.wall_ms())[:10]


class Backup:
    """The keys of a cluster as they were, and how to go back to them."""

    def __init__(self, world: World, revision: int, kvs: list[KV]) -> None:
        self._world, self.revision, self._kvs = world, revision, kvs
        self.at = rfc3339(CLOCK.wall_ms())

    @staticmethod
    async def take(world: World) -> Backup:
        store = await world.store()
        _, revision = await store.range(b"nothing", b"nothinh")
        kvs = []
        for prefix in KEPT:
            got, _ = await store.range(prefix, prefix_end(prefix), revision=revision)
            kvs += got.kvs
        return Backup(world, revision, kvs)

    async def restore(self, *, marked: bool = True) -> None:
        """Ends the daemons, puts everything back under a new incarnation, and starts another daemon."""
        world = self._world
        incarnation = 0
        for daemon in world.daemons:
            incarnation = max(incarnation, daemon.committer.incarnation)
            await daemon.stop()
        world.daemons.clear()
        store = await world.store()
        kept = {kv.key: kv for kv in self._kvs}
        for prefix in KEPT:
            got, _ = await store.range(prefix, prefix_end(prefix))
            for kv in got.kvs:
                if kv.key not in kept or kv.key == records.PUBLISHER_KEY:
                    await store.txn(Txn((), (Delete(kv.key),)))
                elif kv.value != kept[kv.key].value:
                    await store.txn(Txn((), (Put(kv.key, kept[kv.key].value, kv.lease),)))
        await store.txn(Txn((), (Put(b"fabric/incarnation", b"%d" % (incarnation + 1)),)))
        if marked:
            mark = wire.Restore(
                revision=self.revision,
                at=self.at,
                restored_at=rfc3339(CLOCK.wall_ms()),
                incarnation=incarnation + 1,
                backup="test",
            )
            await store.txn(Txn((), (Put(records.RESTORED_KEY, records.encode(mark)),)))
        await world.daemon(governor={})


@pytest.fixture
async def op(world: World) -> Client:
    """An operator's client, on the world's bus."""
    return Client(world.bus, CLOCK, session="op", timeout_s=30)


async def told(world: World, after: int, *names: str) -> int:
    """Returns when the journal tells of all of these: `<session>/<hold> <event>`; the position of the last one."""
    bus = await world.connection()
    missing = set(names)
    async with asyncio.timeout(15):
        journal = await bus.journal(subjects.EVENT_STREAM)
        reading = journal.read(after_seq=0)
        async for entry in reading:
            for event in budget_event(entry.data):
                if event.revision > after:
                    missing.discard(f"{event.session}/{event.hold} {event.event}")
                    missing.discard(f"{event.account} {event.event}")
            if not missing:
                break
        await reading.aclose()  # type: ignore[attr-defined]
    return entry.seq


class Cut:
    """A journal whose beginning was thrown away."""

    def __init__(self, journal: Journal, before_seq: int) -> None:
        self._journal, self._after = journal, before_seq - 1

    async def last(self, subject: str | None = None) -> Entry | None:
        found = await self._journal.last(subject)
        return found if found is not None and found.seq > self._after else None

    def read(self, *, after_seq: int = 0, subject: str | None = None) -> Any:
        return self._journal.read(after_seq=max(after_seq, self._after), subject=subject)


async def reconciled(op: Client, *, dry_run: bool = False, before_seq: int = 0) -> tuple[Span, Found, Outcome]:
    """As `ifabric reconcile` does it; with `before_seq`, from a journal that begins there."""
    known: wire.RestoredReply = await op.call(wire.Restored())
    span = span_of(known, None, None)
    journal: Any = Cut(await op.journal(), before_seq) if before_seq else await op.journal()
    with bars(json=True) as progress:
        found = await read(journal, span, progress)
        return span, found, await replay(op, span, found, progress, dry_run=dry_run)


def acts(outcome: Outcome) -> dict[str, str]:
    """What was done. Whether the restored ledger has let a hold pass by its own time before, is chance."""
    return {one.hold: one.done.replace("added", "charged") for one in outcome.done if not one.again}


async def spent(world: World, *accounts: str) -> dict[str, tuple[int, int]]:
    return {account: await sums(world, account) for account in accounts}


ACCOUNTS = ("acme", "acme/day", "acme/day/@a", "acme/@b")


async def used(world: World) -> Backup:
    """A cluster in which money is spent in every way, before a backup and after it; the sums after it are these.

    acme: 3 + 5 + 7 + 11 + 13 + 17, and 100 of it before.
    """
    await world.daemon(governor={})
    await limit(world, "acme", 1_000)
    await limit(world, "acme/day", 500, window="day")
    await world.ask("hello", "a", account="acme/day")
    await world.ask("hello", "b", account="acme")
    await ask(world, "spend", "a", entry="before", amount_micro_usd=100)
    for name in ("committed", "voided", "expired", "late", "stays"):
        await ask(world, "reserve", "a", hold=name, amount_micro_usd=20, ttl_s=900)
    await ask(world, "reserve", "a", hold="passes", amount_micro_usd=20, ttl_s=1)
    backup = await Backup.take(world)
    await ask(world, "commit", "a", hold="committed", amount_micro_usd=3)
    await ask(world, "void", "a", hold="voided")
    await ask(world, "spend", "a", entry="spent", amount_micro_usd=5)
    await ask(world, "spend", "b", entry="spent", amount_micro_usd=7)
    await ask(world, "reserve", "b", hold="new", amount_micro_usd=30)
    await ask(world, "commit", "b", hold="new", amount_micro_usd=11)
    await ask(world, "reserve", "b", hold="pending", amount_micro_usd=30)
    await ask(world, "reserve", "a", hold="sub", amount_micro_usd=30, account="acme/day/@a/sub")
    await ask(world, "commit", "a", hold="sub", amount_micro_usd=13)
    await told(world, backup.revision, "a/passes expired")
    await ask(world, "commit", "a", hold="passes", amount_micro_usd=17)
    ended = ("a/committed commit", "a/voided void", "a/spent commit", "b/spent commit", "b/new commit")
    await told(world, backup.revision, *ended, "b/pending hold", "a/sub commit", "a/passes commit")
    return backup


async def test_what_was_spent_after_the_backup_is_charged_again_once_and_where_it_was(world: World, op: Client) -> None:
    backup = await used(world)
    before = await spent(world, *ACCOUNTS)
    assert before["acme"] == (156, 90), "the holds that stay open, two placed before the backup and one after it"
    await backup.restore()
    assert (await sums(world, "acme"))[0] == 100
    _, found, outcome = await reconciled(op)
    assert found.gaps == ()
    assert acts(outcome) == {
        "committed": "charged",
        "voided": "freed",
        "spent": "charged",
        "new": "charged",
        "pending": "kept",
        "sub": "charged",
        "passes": "charged",
    }
    assert sum(one.charged for one in outcome.done) == 56
    after = await spent(world, *ACCOUNTS)
    assert {name: one for name, (one, _) in after.items()} == {name: one for name, (one, _) in before.items()}
    assert after["acme"] == (156, 60), "what was placed after the backup is not held again"
    assert (await line(world, "acme/day"))["window"] == "day"
    kv = await stored_hold(world, "a", "sub")
    assert records.hold(kv).on[1] == ("acme/day", DAY) and kv.lease, "it is forgotten some day, as any that has ended"
    _, _, second = await reconciled(op)
    assert len(second.done) >= 8 and acts(second) == {} and sum(one.charged for one in second.done) == 0
    assert await spent(world, *ACCOUNTS) == after


async def test_a_dry_run_says_the_same_and_does_nothing(world: World, op: Client) -> None:
    backup = await used(world)
    await backup.restore()
    _, _, dry = await reconciled(op, dry_run=True)
    assert (await sums(world, "acme"))[0] == 100 and await stored_hold(world, "b", "new") is None
    assert (await op.call(wire.Restored())).reconciled is None
    _, _, wet = await reconciled(op)
    assert acts(dry) == acts(wet)
    assert [one.charged for one in dry.done] == [one.charged for one in wet.done]


async def test_a_run_that_ends_in_the_middle_is_completed_by_the_next_and_two_at_once_charge_once(
    world: World, op: Client
) -> None:
    backup = await used(world)
    before = {name: one for name, (one, _) in (await spent(world, *ACCOUNTS)).items()}
    await backup.restore()
    await world.daemon(governor={})
    span = span_of(await op.call(wire.Restored()), None, None)
    with bars(json=True) as progress:
        found = await read(await op.journal(), span, progress)
    half = found.told.entries[:3]
    await op.call(wire.Replay(since_revision=span.since_revision, entries=half))
    begun: wire.RestoredReply = await op.call(wire.Restored())
    assert begun.reconciled is not None and begun.reconciled.finished_at == ""
    twice = (*found.told.entries, *found.told.entries)
    message = wire.Replay(since_revision=span.since_revision, entries=twice)
    replies = await asyncio.gather(*(op.call(message, attempt_s=20) for _ in range(4)))
    assert sum(one.charged for reply in replies for one in reply.entries) < 56
    assert {name: one for name, (one, _) in (await spent(world, *ACCOUNTS)).items()} == before
    await reconciled(op)
    done: wire.RestoredReply = await op.call(wire.Restored())
    assert done.reconciled is not None and done.reconciled.began_at == begun.reconciled.began_at
    assert done.reconciled.finished_at and done.reconciled.complete
    assert (done.reconciled.entries, done.reconciled.charged_micro_usd) == (8, 56)


async def test_money_that_is_spent_is_charged_over_a_limit_and_nothing_more_goes_through(
    world: World, op: Client
) -> None:
    backup = await used(world)
    await backup.restore()
    await limit(world, "acme", 110)
    _, _, outcome = await reconciled(op)
    found = await line(world, "acme")
    assert found["spent"] == 156 and found["available"] < 0
    assert found["overdraft"] > 0 and sum(one.overdraft for one in outcome.done) >= found["overdraft"]
    with pytest.raises(BudgetShort):
        await ask(world, "spend", "b", entry="more", amount_micro_usd=1)


async def test_whoever_asks_again_after_the_replay_is_answered_as_before_it(world: World, op: Client) -> None:
    backup = await used(world)
    await backup.restore()
    with pytest.raises(UnknownHold):
        await ask(world, "commit", "b", hold="pending", amount_micro_usd=9)
    await reconciled(op)
    assert (await ask(world, "spend", "a", entry="spent", amount_micro_usd=5))["charged"] == 5
    assert (await ask(world, "commit", "a", hold="committed", amount_micro_usd=3))["charged"] == 3
    assert await ask(world, "void", "a", hold="voided") == {"released": 20}
    assert (await ask(world, "reserve", "b", hold="new", amount_micro_usd=30))["expires_in_s"] == 0
    assert (await sums(world, "acme"))[0] == 156
    for verb, body in (("spend", {"entry": "spent"}), ("reserve", {"hold": "spent"})):
        with pytest.raises(Conflict):
            await ask(world, verb, "a", amount_micro_usd=6, **body)
    late = await ask(world, "commit", "b", hold="pending", amount_micro_usd=9)
    assert (late["charged"], late["late"]) == (9, True)
    assert (await sums(world, "acme"))[0] == 165


async def test_what_was_done_again_before_the_replay_is_not_charged_twice(world: World, op: Client) -> None:
    backup = await used(world)
    await backup.restore()
    await ask(world, "spend", "a", entry="spent", amount_micro_usd=5)  # its answer had been lost
    await ask(world, "void", "a", hold="committed")  # an agent that knows nothing of what it committed
    await ask(world, "spend", "b", entry="spent", amount_micro_usd=2)  # and one that asks for less than it did
    _, _, outcome = await reconciled(op)
    done = {(one.session, one.hold): (one.done, one.charged) for one in outcome.done}
    assert done["a", "spent"] == ("again", 0)
    assert done["a", "committed"] == ("added", 3)
    assert done["b", "spent"] == ("added", 5)
    assert (await sums(world, "acme"))[0] == 156
    hold = records.hold(await stored_hold(world, "a", "committed"))
    assert (hold.state, hold.charged, hold.note) == ("late", 3, wire.REPLAYED)


async def test_a_limit_that_was_set_after_the_backup_is_set_again_unless_there_is_a_younger_one(
    world: World, op: Client
) -> None:
    await world.daemon(governor={})
    for account in ("acme", "other"):
        await limit(world, account, 100)
    backup = await Backup.take(world)
    for account in ("acme", "other", "new"):
        await limit(world, account, 200, window="month")
    await world.ask("hello", "a", account="acme")
    await ask(world, "spend", "a", entry="e", amount_micro_usd=4)
    await told(world, backup.revision, "new account", "a/e commit")
    await backup.restore()
    await limit(world, "other", 300)
    _, _, dry = await reconciled(op, dry_run=True)
    _, _, outcome = await reconciled(op)
    assert dry.limits == outcome.limits
    assert {one.account: one.again for one in outcome.limits} == {"acme": False, "other": True, "new": False}
    assert (await line(world, "other"))["limit"] == 300
    found = await line(world, "acme")
    assert (found["limit"], found["window"], found["spent"]) == (200, "month", 4)
    account = records.account(await (await world.store()).get(records.account_key("acme")))
    assert account.by == "op" and rfc3339(account.at) < rfc3339(CLOCK.wall_ms())
    _, _, second = await reconciled(op)
    assert all(one.again for one in second.limits)


async def test_a_task_s_own_budget_is_charged_again_too(world: World, op: Client) -> None:
    await world.daemon(governor={})
    await world.ask("hello", "a", account="acme")
    await world.ask("submit", "a", tasks=[{"id": "T", "budget_micro_usd": 50}])
    backup = await Backup.take(world)
    claim = await world.ask("claim", "a", task="T")
    await ask(world, "spend", "a", entry="e", amount_micro_usd=8, task="T", fence=claim["fence"])
    await told(world, backup.revision, "a/e commit")
    await backup.restore()
    await reconciled(op)
    tally = records.tally(await (await world.store()).get(records.tally_key("task:T", "total")))
    assert tally.spent == 8
    hold = records.hold(await stored_hold(world, "a", "e"))
    assert (hold.task, hold.fence) == ("T", claim["fence"])


def entry(hold: str = "h", **fields: Any) -> dict[str, Any]:
    given = {"session": "a", "hold": hold, "account": "acme/@a", "fate": "committed", "charged_micro_usd": 5}
    return {**given, "at": "2026-11-30T23:59:59.999Z", **fields}


async def refusal(world: World, admin: bool = True, **body: Any) -> FabricError:
    with pytest.raises(FabricError) as caught:
        await ask(world, "replay", "op", admin=admin, **{"since_revision": 1, **body})
    return caught.value


async def test_an_entry_without_windows_is_charged_where_its_time_was(world: World) -> None:
    await world.daemon(governor={})
    await limit(world, "acme", 100, window="month")
    await limit(world, "acme/@a", 100, window="day")
    done = await ask(world, "replay", "op", admin=True, since_revision=1, entries=[entry()])
    assert done["entries"] == [{"session": "a", "hold": "h", "done": "charged", "charged": 5}]
    again = await ask(world, "replay", "op", admin=True, since_revision=1, entries=[entry()])
    assert again["entries"] == [{"session": "a", "hold": "h", "done": "again", "again": True}]
    store = await world.store()
    for window, account in (("2026-11", "acme"), ("2026-11-30", "acme/@a")):
        assert records.tally(await store.get(records.tally_key(account, window))).spent == 5


async def test_a_request_that_makes_no_sense_charges_nothing(world: World) -> None:
    await world.daemon(governor={})
    assert isinstance(await refusal(world, admin=False, entries=[entry()]), Unavailable), "no agent's verb"
    for bad in (
        {"entries": [entry(str(n)) for n in range(wire.ENTRIES_MAX + 1)]},
        {"entries": [entry(charged_micro_usd=-1)]},
        {"entries": [entry(at="2026-11-30T23:59:59")]},
        {"entries": [entry(account="acme//x")]},
        {"entries": [entry(windows=["for ever", "total"])]},
        {"entries": [entry("fine"), entry(windows=["total"])]},
        {"entries": [entry(windows=["total"] * 3)]},
        {"since_revision": -1},
    ):
        assert isinstance(await refusal(world, **bad), BadRequest), bad
    assert await stored_hold(world, "a", "fine") is None


async def test_a_replay_of_what_the_backup_knows_and_one_that_cannot_tell_any_more_are_refused(
    world: World, op: Client
) -> None:
    backup = await used(world)
    await backup.restore()
    early = await refusal(world, since_revision=backup.revision - 1, entries=[entry("early")])
    assert isinstance(early, BadRequest) and early.facts == {"revision": backup.revision}
    await reconciled(op)
    store = await world.store()
    began = records.reconciled(await store.get(records.RECONCILED_KEY))
    assert began.by == "op"
    eight_days = 8 * 86_400_000
    old = wire.Reconciled(
        since_revision=began.since_revision,
        incarnation=began.incarnation,
        by="op",
        began_at=rfc3339(CLOCK.wall_ms() - eight_days),
    )
    await store.txn(Txn((), (Put(records.RECONCILED_KEY, records.encode(old)),)))
    for since in (backup.revision, backup.revision + 1):
        assert isinstance(await refusal(world, since_revision=since, entries=[entry("old")]), Conflict)
    assert await stored_hold(world, "a", "early") is None and await stored_hold(world, "a", "old") is None
    await backup.restore()  # another restore has a replay of its own
    assert (await op.call(wire.Restored())).reconciled is None
    _, _, outcome = await reconciled(op)
    assert "charged" in acts(outcome).values()


async def test_a_cluster_that_was_not_restored_says_so_and_an_older_mark_is_none(world: World, op: Client) -> None:
    backup = await used(world)
    assert await op.call(wire.Restored()) == wire.RestoredReply(restored=None)
    await backup.restore()
    known: wire.RestoredReply = await op.call(wire.Restored())
    assert known.restored is not None and known.restored.backup == "test"
    assert known.began_revision > backup.revision
    later = await Backup.take(world)
    await later.restore(marked=False)
    assert (await op.call(wire.Restored())).restored is None


async def test_what_a_replay_writes_is_told_as_events_and_the_next_restore_replays_it(world: World, op: Client) -> None:
    backup = await used(world)
    await backup.restore()
    span, _, _ = await reconciled(op)
    assert span.began_revision
    await told(world, span.began_revision, "a/committed commit", "b/new commit", "a/sub commit", "b/pending expired")
    await ask(world, "spend", "b", entry="third", amount_micro_usd=100)
    await told(world, span.began_revision, "b/third commit")
    await backup.restore()  # from the same backup once more
    _, found, _ = await reconciled(op)
    assert found.gaps == ()
    assert (await sums(world, "acme"))[0] == 256


async def test_a_journal_that_begins_after_the_backup_is_told_apart(world: World, op: Client) -> None:
    backup = await used(world)
    await backup.restore()
    seq = await told(world, backup.revision, "a/committed commit")
    _, found, outcome = await reconciled(op, before_seq=seq)
    assert len(found.gaps) == 1 and "after the backup" in found.gaps[0]
    assert outcome.done, "what is there is charged all the same"
    known: wire.RestoredReply = await op.call(wire.Restored())
    assert known.reconciled is not None and known.reconciled.finished_at and not known.reconciled.complete
    _, found, _ = await reconciled(op)
    known = await op.call(wire.Restored())
    assert found.gaps == () and known.reconciled is not None and known.reconciled.complete
    assert (await sums(world, "acme"))[0] == 156


async def test_while_budgets_are_switched_off_nothing_is_replayed(world: World) -> None:
    await world.daemon(governor={"budget": {"enabled": False}})
    off = await refusal(world, entries=[entry()])
    assert isinstance(off, Unavailable) and off.facts["what"] == "governor"


def test_every_event_of_a_hold_is_one_that_is_folded() -> None:
    assert set(money.BUDGET_EVENTS) == {"account", "hold", "commit", "void", "expired", "overdraft"}
