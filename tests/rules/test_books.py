"""What a daemon knows of accounts, and what it has to read again before it decides."""

from __future__ import annotations

from ifabric.store.base import KV
from ifabric_actors.governor import records
from ifabric_actors.governor.books import TASK, Books, Memory
from ifabric_actors.governor.records import Account, Tally

ORG, TOTAL = "org", ("org", "total")
LIMIT, SUM = records.account_key(ORG), records.tally_key(ORG, "total")


def kv(key: bytes, record: Account | Tally, mod_revision: int) -> KV:
    return KV(key, records.encode(record), 1, mod_revision, 1, 0)


def asked(memory: Memory, *names: str, places: tuple[tuple[str, str], ...] = ()) -> set[bytes]:
    return {get.key for get in memory.unknown(names, places, 0)}


def read(revision: int, limit: int, spent: int, since: int) -> Memory:
    """A memory that has read an account and its tally together."""
    memory = Memory(40)
    memory.learn(LIMIT, kv(LIMIT, Account(limit=limit), since), revision)
    memory.learn(SUM, kv(SUM, Tally(spent=spent), since), revision)
    return memory


def test_what_was_read_together_is_decided_on() -> None:
    memory = Memory(40)
    assert asked(memory, ORG) == {LIMIT, SUM}
    assert asked(read(10, 100, 5, 9), ORG) == set()


def test_a_tally_that_is_newer_than_what_is_known_of_its_limit_sends_the_reader_back_for_both() -> None:
    memory = read(10, 1200, 5, 9)
    memory.learn(SUM, kv(SUM, Tally(spent=153), 12), 13)  # with 12, somebody set the limit to 100
    assert asked(memory, ORG) == asked(memory, places=(TOTAL,)) == {LIMIT, SUM}
    memory.learn(LIMIT, kv(LIMIT, Account(limit=100), 12), 14)
    memory.learn(SUM, kv(SUM, Tally(spent=153), 12), 14)
    assert asked(memory, ORG) == set()
    assert memory.line(ORG, 0).available == -53


def test_the_watch_tells_in_order_so_what_it_tells_of_a_tally_confirms_the_limit() -> None:
    memory = read(10, 1200, 5, 9)
    memory.heard(kv(SUM, Tally(spent=6), 11))
    assert asked(memory, ORG) == set()


def test_a_commit_that_went_through_confirms_the_limits_that_it_was_decided_on() -> None:
    memory = read(10, 1200, 5, 9)
    books = Books(memory, 0)
    (line,) = books.path(ORG)
    books.put((line._replace(tally=Tally(spent=6)),))
    books.committed(15)
    assert asked(memory, ORG) == set()


def test_an_old_answer_that_nothing_is_there_does_not_undo_what_was_heard_since() -> None:
    memory = read(10, 100, 5, 9)
    memory.learn(LIMIT, None, 8)
    memory.learn(SUM, None, 8)
    assert memory.line(ORG, 0).available == 95
    memory.learn(LIMIT, None, 11)
    memory.learn(SUM, None, 11)
    assert memory.line(ORG, 0).limit is None
    assert memory.revision_of(TOTAL) == 0


def test_a_tasks_own_account_has_no_record_to_be_read() -> None:
    memory = Memory(40)
    name = TASK + "t"
    key = records.tally_key(name, "total")
    assert asked(memory, places=((name, "total"),)) == {key}
    memory.learn(key, kv(key, Tally(spent=1), 5), 6)
    assert asked(memory, places=((name, "total"),)) == set()
