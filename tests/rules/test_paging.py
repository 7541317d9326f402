"""Pages of a large board: found piece by piece, in order, whole, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from ifabric.wire import overview as wire
from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator.paging import PIECE, First, is_meant, look, pieces
from ifabric_actors.coordinator.records import Seat, Session, Stored, Task
from ifabric_actors.governor.levels import Level

NAMES = st.sets(st.text("abX/@", min_size=1, max_size=5), max_size=60)


def board(**titles: str) -> SortedDict[str, Stored]:
    return SortedDict(
        {
            name: Stored(Task(spec=TaskSpec(id=name, title=title), state="pending", body=""), 1, 1)
            for name, title in titles.items()
        }
    )


@given(NAMES, st.sampled_from(["", "a", "x", "/", "ab"]), st.integers(1, 7), st.integers(1, 9))
def test_pieces_of_any_size_find_what_one_look_finds(names: set[str], needle: str, most: int, want: int) -> None:
    tasks = board(**dict.fromkeys(names, ""))
    expected = sorted(name for name in names if needle in name.casefold())
    found: list[str] = []
    after, end = None, False
    while not end:
        piece, after, end = look(tasks, None, needle, after, want, most)
        assert len(piece) <= want
        found += [name for name, _ in piece]
    assert found == expected


def test_a_title_is_searched_like_an_id_and_in_any_case() -> None:
    tasks = board(one="Der Maßstab", two="MASSSTAB", three="else")
    assert [name for name, _ in look(tasks, None, "massstab", None, 9).found] == ["one", "two"]
    assert [name for name, _ in look(tasks, None, "thre", None, 9).found] == ["three"]


def test_a_session_is_meant_by_its_name_or_its_account() -> None:
    seat = Seat(Session(ttl_s=5, account="Acme/research"), 1, 1, frozenset())
    assert is_meant("worker-1", seat, "acme")
    assert is_meant("Worker-1", seat, "worker")
    assert not is_meant("worker-1", seat, "other")
    assert not is_meant("worker-1", None, "")


@given(NAMES, st.integers(1, 9), st.text("abX/@", max_size=3))
def test_the_first_names_are_those_of_the_whole(names: set[str], count: int, after: str) -> None:
    first = First(count, after)
    for some in ([name] for name in names):
        first.add(some)
    assert first.names == sorted(name for name in names if name > after)[:count]


def test_pieces_leave_nothing_out() -> None:
    names = [str(n) for n in range(2 * PIECE + 1)]
    assert [len(some) for some in pieces(names)] == [PIECE, PIECE, 1]
    assert [name for some in pieces(names) for name in some] == names


def test_an_account_is_a_child_of_the_one_above_it_whether_that_has_a_record_or_not() -> None:
    names = ["acme/research/@a", "acme/research/@b", "acme/ops", "zed", "acmeX/y", "task:acme/z"]
    top, acme, leaf = Level(None), Level("acme"), Level("zed")
    for level in (top, acme, leaf):
        level.add(names)
    assert sorted(top.children) == ["acme", "acmeX", "zed"]
    assert (top.below("acme"), top.below("zed")) == (2, 0)
    assert sorted(acme.children) == ["acme/ops", "acme/research"]
    assert (acme.below("acme/research"), acme.below("acme/ops")) == (2, 0)
    assert leaf.children == {}


def test_a_page_fits_into_a_message() -> None:
    line = wire.SessionLine(session="s", capabilities=("x" * 60,) * 64, ttl_s=1.0, claims=("\x00" * 100,) * 50)
    shown = wire.fitting([line] * 1000)
    assert 1 < len(shown) < 1000
    assert len(shown) * len(wire.encode(line)) <= wire.PAGE_BYTES_MAX
    assert wire.fitting([]) == ()
    huge = wire.SessionLine(session="s", capabilities=("x" * wire.PAGE_BYTES_MAX,), ttl_s=1.0, claims=())
    assert wire.fitting([huge, huge]) == (huge,)
