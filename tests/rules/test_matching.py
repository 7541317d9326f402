"""Who may take what, and how well it suits: cases, and what holds whatever is asked and offered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.config import Config
from ifabric.errors import Internal
from ifabric.metrics import Metrics
from ifabric.store.base import KV
from ifabric.testing.clock import VirtualClock
from ifabric.wire.coordinator import STATES, TaskSpec
from ifabric_actors.coordinator import records as tasks
from ifabric_actors.governor import matching
from ifabric_actors.governor.matcher import Matcher
from ifabric_actors.governor.matching import CLEAR, NONE, Cache, Demand, Offer, Terms, Weather
from ifabric_actors.governor.outages import Both, Outages
from ifabric_actors.governor.roster import Sessions, Tasks

TERMS = Terms()


def asks(needs: str = "", wants: str = "", labels: str = "") -> Demand:
    """One letter a name."""
    return matching.demand(tuple(needs), tuple(wants), tuple(labels))


def offers(capabilities: str = "", accepts: str = "") -> Offer:
    return Offer(frozenset(capabilities), frozenset(accepts))


def weather(blocked: str = "", unwell: str = "") -> Weather:
    return Weather(frozenset(blocked), frozenset(blocked + unwell))


# -- the table --------------------------------------------------------------------------------------------------------

CASES = [
    # demand, offer, weather, claims, score, would be offered
    ("nothing is asked", asks(), offers(), CLEAR, 0, 1.0, True),
    ("all that is needed is there", asks("ab"), offers("abc"), CLEAR, 0, 1.0, True),
    ("a need is missing, and all wishes are there", asks("a", "bcdefg"), offers("bcdefg"), CLEAR, 0, 0.0, False),
    ("a wish is met", asks("", "a"), offers("a"), CLEAR, 0, 1.0, True),
    ("the only wish is not", asks("", "a"), offers("b"), CLEAR, 0, 0.2, False),
    ("five eighths are exactly enough", asks("", "abcdefgh"), offers("abcde"), CLEAR, 0, 0.7, True),
    ("four eighths are not", asks("", "abcdefgh"), offers("abcd"), CLEAR, 0, 0.6, False),
    ("needs and wishes count alike", asks("ab", "cde"), offers("abc"), CLEAR, 0, 0.68, False),
    ("two needs and one wish of two", asks("ab", "cd"), offers("abc"), CLEAR, 0, 0.8, True),
    ("needed and wished for is asked once", asks("a", "a"), offers("a"), CLEAR, 0, 1.0, True),
    ("one claim", asks("a"), offers("a"), CLEAR, 1, 0.95, True),
    ("very many claims", asks("a"), offers("a"), CLEAR, 10**9, 0.9, True),
    ("below for its load alone", asks("", "abcdefgh"), offers("abcde"), CLEAR, 3, 0.625, True),
    ("a label that is accepted", asks(labels="xy"), offers("", "yz"), CLEAR, 0, 1.0, True),
    ("a label that is not", asks(labels="x"), offers("abc", "yz"), CLEAR, 0, 0.0, False),
    ("no label, and only some are accepted", asks(), offers("", "y"), CLEAR, 0, 0.0, False),
    ("who names no labels accepts any", asks(labels="x"), offers(), CLEAR, 0, 1.0, True),
    ("a need whose breaker is open", asks("ab"), offers("ab"), weather("b"), 0, 0.0, False),
    ("a need whose breaker awaits a probe", asks("ab"), offers("ab"), weather("", "b"), 0, 0.95, True),
    ("a wish whose breaker is open", asks("a", "b"), offers("ab"), weather("b"), 0, 0.95, True),
    ("a breaker that is no affair of the task's", asks("a"), offers("a"), weather("z", "y"), 0, 1.0, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "asked", "offer", "now", "claims", "score", "taken"), CASES, ids=[c[0] for c in CASES]
)
def test_the_table(
    what: str, asked: Demand, offer: Offer, now: Weather, claims: int, score: float, taken: bool
) -> None:
    assert matching.score(asked, offer, now, TERMS, claims) == pytest.approx(score, abs=1e-9), what
    assert matching.takes(asked, offer, now, TERMS) is taken, what
    weighed = matching.weigh(asked, offer, now, TERMS, claims)
    assert (weighed.score, weighed.able) == (matching.score(asked, offer, now, TERMS, claims), score > 0)


def test_switched_off_only_what_must_be_counts() -> None:
    off = Terms(enabled=False)
    assert matching.score(asks("a", "bcd"), offers("a"), weather("b"), off, claims=9) == 1.0
    assert matching.takes(asks("a", "bcd"), offers("a"), CLEAR, off)
    assert not matching.takes(asks("a"), offers("b"), CLEAR, off)
    assert not matching.takes(asks("a"), offers("a"), weather("a"), off)
    assert not matching.takes(asks("a", labels="x"), offers("a", "y"), CLEAR, off)


def test_the_reason_names_every_cause() -> None:
    worst = matching.weigh(asks("abc", labels="x"), offers("c", "yz"), weather("c"), TERMS, 2)
    sentence = matching.reason(worst, TERMS, 2)
    assert sentence == "Cannot take it: it lacks a, b; it accepts only y, z; the breaker of c is not closed."
    low = matching.weigh(asks("a", "bcd"), offers("a"), weather("", "ab"), TERMS, 1)
    sentence = matching.reason(low, TERMS, 1)
    assert sentence == (
        "Would not be offered it: 0.3 is below 0.7 "
        "(without b, c, d, which it wants; the breakers of a, b are not closed; holds 1 claim)."
    )
    busy = matching.weigh(asks("", "abcdefgh"), offers("abcde"), CLEAR, TERMS, 3)
    assert "its load, which `next` leaves out" in matching.reason(busy, TERMS, 3)
    assert "holds 3 claims" in matching.reason(busy, TERMS, 3)
    good = matching.weigh(asks("a"), offers("a"), CLEAR, TERMS)
    assert matching.reason(good, TERMS) == "Can take it, 1."


# -- why nothing matched ------------------------------------------------------------------------------------------------


def why(offer: Offer, *demands: Demand, now: Weather = CLEAR) -> matching.Obstacles | None:
    return matching.obstacles(((demand, offer) for demand in demands), now, TERMS)


def test_the_fewest_capabilities_that_would_open_a_task_are_named() -> None:
    found = why(offers("a"), asks("abc"), asks("ad"), asks("aef"))
    assert found is not None
    assert (found.missing, found.labels, found.breakers, found.best_score) == (("d",), (), (), None)
    assert found.kinds() == ("capability",)
    assert "missing: d" in found.sentence(3, 0.7)


def test_a_capability_that_would_still_leave_the_label_wrong_is_not_the_reason() -> None:
    found = why(offers("a", "y"), asks("b", labels="x"), asks("cde", labels="y"), asks("a", labels="z"))
    assert found is not None
    assert (found.missing, found.labels) == (("c", "d", "e"), ("z",))
    both = why(offers("a", "y"), asks("b", labels="x"))
    assert both is not None
    assert (both.missing, both.labels, both.kinds()) == (("b",), ("x",), ("capability", "label"))


def test_tasks_without_labels_are_named_as_such() -> None:
    found = why(offers("a", "y"), asks("a"))
    assert found is not None
    assert (found.labels, found.kinds()) == ((), ("label",))
    assert "no labels, and the session accepts only some" in found.sentence(1, 0.7)


def test_breakers_and_low_scores_are_named_where_they_are_the_reason() -> None:
    found = why(offers("a"), asks("a"), now=weather("a"))
    assert found is not None
    assert (found.breakers, found.missing, found.kinds()) == (("a",), (), ("breaker",))
    found = why(offers("a"), asks("", "ab"), asks("", "cd"), asks("z"))
    assert found is not None
    assert (found.best_score, found.wishes, found.kinds()) == (0.6, ("b",), ("capability", "score"))
    assert "the best scores 0.6 without b, and 0.7 is asked for" in found.sentence(3, 0.7)


def test_nothing_is_in_the_way_of_what_can_be_taken() -> None:
    assert why(offers("a"), asks("b"), asks("a")) is None
    assert why(offers("a")) is None


# -- what always holds --------------------------------------------------------------------------------------------------

names = st.frozensets(st.sampled_from("abcdef"), max_size=6)
demands = st.builds(lambda n, w, labels: matching.demand(tuple(n), tuple(w), tuple(labels)), names, names, names)
offered = st.builds(Offer, names, names)
weathers = st.builds(lambda blocked, more: Weather(blocked, blocked | more), names, names)
terms = st.builds(Terms, st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.9, 1.0]))
loads = st.integers(0, 1000)


@given(demands, offered, weathers, terms, loads)
def test_a_score_lies_between_0_and_1_and_is_0_exactly_when_something_is_missing_that_must_be(
    asked: Demand, offer: Offer, now: Weather, said: Terms, claims: int
) -> None:
    score = matching.score(asked, offer, now, said, claims)
    must = (
        asked.needs <= offer.capabilities
        and (not offer.accepts or bool(offer.accepts & asked.labels))
        and not (asked.needs & now.blocked)
    )
    assert 0.0 <= score <= 1.0
    assert (score > 0.0) is must
    assert matching.takes(asked, offer, now, said) is (
        must and matching.score(asked, offer, now, said) >= said.min_score
    )


@given(demands, offered, names, weathers, terms, loads)
def test_more_capabilities_never_lower_a_score(
    asked: Demand, offer: Offer, more: frozenset[str], now: Weather, said: Terms, claims: int
) -> None:
    richer = offer._replace(capabilities=offer.capabilities | more)
    assert matching.score(asked, richer, now, said, claims) >= matching.score(asked, offer, now, said, claims)


@given(demands, offered, weathers, names, terms, loads)
def test_more_load_and_more_trouble_never_raise_a_score(
    asked: Demand, offer: Offer, now: Weather, more: frozenset[str], said: Terms, claims: int
) -> None:
    score = matching.score(asked, offer, now, said, claims)
    assert matching.score(asked, offer, now, said, claims + 1) <= score
    worse = Weather(now.blocked | more, now.unwell | more)
    assert matching.score(asked, offer, worse, said, claims) <= score


@given(st.lists(demands, max_size=6), offered, weathers, terms)
def test_a_refusal_has_a_reason_exactly_when_nothing_can_be_taken(
    pending: list[Demand], offer: Offer, now: Weather, said: Terms
) -> None:
    found = matching.obstacles(((asked, offer) for asked in pending), now, said)
    anything = any(matching.takes(asked, offer, now, said) for asked in pending)
    assert (found is not None) is (bool(pending) and not anything)
    if found is not None:
        assert found.kinds()
        richer = offer._replace(capabilities=offer.capabilities | set(found.missing))
        if found.kinds() == ("capability",) and said.min_score <= 0.2:
            assert any(matching.takes(asked, richer, now, said) for asked in pending)


# -- the cache -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_for_its_time_and_its_version() -> None:
    now = [0.0]
    cache: Cache[str, int] = Cache(lambda: now[0], ttl_s=10, entries_max=9)
    cache.put("a", 1, 7)
    assert cache.get("a", 1) == 7
    now[0] = 9.9
    assert cache.get("a", 1) == 7
    assert cache.get("a", 2) is None, "another version"
    assert cache.get("a", 1) is None, "and the old one is forgotten with it"
    cache.put("a", 2, 8)
    now[0] = 19.9
    assert cache.get("a", 2) is None, "too old"
    assert (cache.hits.value, cache.misses.value) == (2, 3)


def test_the_cache_is_bounded_and_the_least_recently_used_goes_first() -> None:
    cache: Cache[str, int] = Cache(float, ttl_s=10, entries_max=2)
    cache.put("a", 0, 1)
    cache.put("b", 0, 2)
    assert cache.get("a", 0) == 1
    cache.put("c", 0, 3)
    assert [cache.get(key, 0) for key in "abc"] == [1, None, 3]
    assert len(cache) == 2


def test_a_cache_that_is_switched_off_keeps_and_counts_nothing() -> None:
    cache: Cache[str, int] = Cache(float, enabled=False)
    cache.put("a", 0, 1)
    assert cache.get("a", 0) is None
    assert (len(cache), cache.misses.value) == (0, 0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("weigh"), demands, offered),
            st.tuples(st.just("weather"), weathers, st.none()),
            st.tuples(st.just("wait"), st.floats(0, 20), st.none()),
        ),
        max_size=40,
    ),
    st.integers(1, 5),
)
def test_what_is_cached_is_what_would_be_computed(steps: list[tuple[str, object, object]], most: int) -> None:
    """Whatever is asked, offered, tripped and waited for in between."""
    now, clouds, version = [0.0], CLEAR, 0
    cache: Cache[tuple[Demand, Offer], matching.Weighed] = Cache(lambda: now[0], ttl_s=10, entries_max=most)
    for step, one, other in steps:
        if step == "wait":
            now[0] += one  # type: ignore[operator]
        elif step == "weather":
            clouds, version = one, version + 1  # type: ignore[assignment]
        else:
            assert isinstance(one, Demand)
            assert isinstance(other, Offer)
            computed = matching.weigh(one, other, clouds, TERMS)
            known = cache.get((one, other), version)
            assert known is None or known == computed
            if known is None:
                cache.put((one, other), version, computed)
        assert len(cache) <= most


# -- breakers, as matching knows them -----------------------------------------------------------------------------------


def record(**fields: object) -> bytes:
    return msgspec.json.encode(fields)


def test_an_open_breaker_blocks_until_a_probe_may_go() -> None:
    outages = Outages()
    outages.at(1_000)
    assert outages.record("a", record(state="open", until=5_000))
    assert outages.weather == Weather(frozenset("a"), frozenset("a"))
    assert (outages.probe_in_s("a"), outages.due_in_s) == (4.0, 4.0)
    assert not outages.at(4_999)
    assert outages.at(5_000), "its time has come"
    assert outages.weather == Weather(NONE, frozenset("a"))
    assert outages.due_in_s is None


def test_one_that_an_operator_holds_blocks_for_good() -> None:
    outages = Outages()
    outages.record("a", record(state="open"))
    assert not outages.at(10**15)
    assert outages.weather.blocked == {"a"}
    assert (outages.probe_in_s("a"), outages.due_in_s) == (None, None)
    assert outages.record("a", record(state="closed"))
    assert outages.weather == CLEAR


def test_one_that_is_half_open_blocks_while_a_probe_is_under_way() -> None:
    outages = Outages()
    outages.at(1_000)
    outages.record("a", record(state="half_open", probes=[["p", 3_000], ["q", 4_000]]))
    assert outages.weather.blocked == {"a"}
    outages.at(3_000)
    assert outages.weather == Weather(NONE, frozenset("a")), "the first has timed out: another may go"
    outages.record("a", record(state="half_open"))
    assert outages.weather == Weather(NONE, frozenset("a")), "somebody has to go, or it never closes"
    assert outages.forget("a")
    assert outages.weather == CLEAR


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"state": 5}', b"\xff", b"null", b'{"state": "ajar"}'])
def test_a_record_that_cannot_be_read_stops_no_work(value: bytes) -> None:
    outages = Outages()
    outages.record("a", record(state="open"))
    outages.record("a", value)
    assert outages.weather == CLEAR


def test_breakers_that_are_switched_off_block_nothing() -> None:
    outages = Outages(enabled=False)
    assert not outages.record("a", record(state="open"))
    assert outages.weather == CLEAR


def test_a_version_stands_for_one_weather() -> None:
    outages = Outages()
    seen = {outages.version: outages.weather}
    for step in range(6):
        if step % 2:
            outages.take(KV(b"governor/breakers/a", record(state="open", until=step * 1000), 1, 1, 1, 0))
        else:
            outages.gone(b"governor/breakers/a", 1)
        assert seen.setdefault(outages.version, outages.weather) == outages.weather
        assert list(outages.known()) == ([b"governor/breakers/a"] if step % 2 else [])
    assert len(seen) == 6


def test_two_takers_of_one_key_both_hear() -> None:
    first, second = Outages(), Outages()
    both = Both(first, second)
    both.take(KV(b"governor/breakers/a", record(state="open"), 1, 1, 1, 0))
    assert first.weather == second.weather != CLEAR
    assert list(both.known()) == [b"governor/breakers/a"]
    both.gone(b"governor/breakers/a", 2)
    assert first.weather == second.weather == CLEAR


# -- the roster ----------------------------------------------------------------------------------------------------------


def task_kv(task_id: str, revision: int, state: str, session: str = "", fence: int = 0, **spec: Any) -> KV:
    """A task's record as the coordinator stores it."""
    task: Any = tasks.Task(
        spec=TaskSpec(id=task_id, **spec), state=state, body="", session=session, fence=fence, lease=fence  # type: ignore[arg-type]
    )  # fmt: skip
    return KV(tasks.task_key(task_id), tasks.encode(task), 1, revision, 1, 0)


def session_kv(session: str, revision: int, lease: int, capabilities: str, accepts: str = "") -> KV:
    found = tasks.Session(ttl_s=9, capabilities=tuple(capabilities), accepts=tuple(accepts))
    return KV(tasks.session_key(session), tasks.encode(found), 1, revision, 1, lease)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from([*STATES, "gone"]),
            st.sampled_from("rst"),
            st.integers(1, 4),
            st.sampled_from(["", "x", "xy"]),
        ),
        max_size=30,
    )
)
def test_the_roster_of_tasks_follows_any_history(history: list[tuple[str, str, str, int, str]]) -> None:
    """What is held, by how many, what is pending, and each claim's end, as a fresh look would have it."""
    made, ended = Tasks(), []
    made.on_ended = lambda task, fence: ended.append((task, fence))
    now: dict[str, tuple[str, str, int, str]] = {}
    for revision, (task, state, session, fence, needs) in enumerate(history, 1):
        before = now.pop(task, None)
        if state == "gone":
            made.gone(tasks.task_key(task), revision)
        else:
            held = (session, fence) if state == "claimed" else ("", fence)
            made.take(task_kv(task, revision, state, *held, needs=tuple(needs)))
            now[task] = state, held[0], fence, needs
        was_held = before is not None and before[0] == "claimed"
        if was_held and before is not None and (state != "claimed" or fence != before[2]):
            assert ended.pop() == (task, before[2])
        assert not ended
    claimed = {task: one for task, one in now.items() if one[0] == "claimed"}
    assert {task: (held.session, held.fence) for task, held in made.held.items()} == {
        task: (session, fence) for task, (_, session, fence, _) in claimed.items()
    }
    for session in "rst":
        assert made.claims_of(session) == sum(one[1] == session for one in claimed.values())
    pending = {task: asks(needs) for task, (state, _, _, needs) in now.items() if state == "pending"}
    assert {task: demand for demand, group in made.pending.items() for task in group} == pending
    assert all(made.pending.values())
    assert set(made.known()) == {tasks.task_key(task) for task in (*claimed, *pending)}


def test_a_session_that_goes_or_comes_back_with_another_lease_is_told_as_gone() -> None:
    made, gone = Sessions(), []
    made.on_gone = lambda session, lease: gone.append((session, lease))
    made.take(session_kv("a", 1, 5, "x"))
    made.take(session_kv("b", 2, 6, "x"))
    made.take(session_kv("a", 3, 5, "xy"))
    assert ([*map(len, (group.sessions for group in made.offers.values()))], gone) == ([1, 1], [])
    made.take(session_kv("a", 4, 7, "xy"))
    assert gone == [("a", 5)]
    made.gone(tasks.session_key("a"), 5)
    made.gone(tasks.session_key("a"), 5)
    assert gone == [("a", 5), ("a", 7)]
    assert list(made.known()) == [tasks.session_key("b")]
    assert list(made.offers) == [offers("x")]


def test_a_damaged_task_is_named() -> None:
    with pytest.raises(Internal, match="tasks/T is damaged"):
        Tasks().take(KV(b"tasks/T", b"{", 1, 1, 1, 0))


# -- tasks that nobody can take -----------------------------------------------------------------------------------------

arrivals = st.one_of(
    st.tuples(st.just("task"), st.sampled_from("abcd"), st.tuples(names, names, names)),
    st.tuples(st.just("taken"), st.sampled_from("abcd"), st.none()),
    st.tuples(st.just("session"), st.sampled_from("rst"), st.tuples(names, names)),
    st.tuples(st.just("left"), st.sampled_from("rst"), st.none()),
    st.tuples(st.just("breaker"), st.sampled_from("abcdef"), st.sampled_from([b'{"state":"open"}', b"{}"])),
    st.tuples(st.just("look"), st.none(), st.none()),
)


def matcher_of(there: Sessions, board: Tasks) -> Matcher:
    context: Any = SimpleNamespace(settings=Config(), metrics=Metrics(), clock=VirtualClock())
    unused: Any = None
    return Matcher(context, there, board, unused)


def look(made: Matcher) -> None:
    """So few are looked through without a pause."""
    looking = made._look()
    with pytest.raises(StopIteration):
        looking.send(None)


def test_a_breaker_that_trips_or_closes_is_a_reason_to_look_again() -> None:
    there, board = Sessions(), Tasks()
    made = matcher_of(there, board)
    there.take(session_kv("a", 1, 1, "x"))
    board.take(task_kv("T", 2, "pending", needs=("x",)))
    for value, unmatched in ((b"{}", 0), (b'{"state":"open"}', 1), (b"{}", 0)):
        made.outages.record("x", value)
        look(made)
        assert len(made._unmatched) == unmatched


@given(st.lists(arrivals, max_size=40))
def test_what_is_unmatched_is_what_a_fresh_look_would_find(history: list[tuple[str, Any, Any]]) -> None:
    """The matcher remembers who could take what, and looks only at what may have changed."""
    there, board = Sessions(), Tasks()
    made = matcher_of(there, board)
    for revision, (what, name, told) in enumerate([*history, ("look", None, None)], 1):
        if what == "task":
            spec = dict(zip(("needs", "wants", "labels"), map(tuple, told), strict=True))
            board.take(task_kv(name, revision, "pending", **spec))
        elif what == "taken":
            board.take(task_kv(name, revision, "claimed", "r", revision))
        elif what == "session":
            there.take(session_kv(name, revision, 1, *("".join(part) for part in told)))
        elif what == "left":
            there.gone(tasks.session_key(name), revision)
        elif what == "breaker":
            made.outages.record(name, told)
        else:
            look(made)
            fresh = {
                demand
                for demand in board.pending
                if not any(matching.takes(demand, offer, made.outages.weather, TERMS) for offer in there.offers)
            }
            assert set(made._unmatched) == fresh
            assert set(made._takers) == set(board.pending) - fresh
