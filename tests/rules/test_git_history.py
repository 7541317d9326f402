"""What the history of a board says, what a row may change, and what goes from one world to the other."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.board import read_board
from ifabric.board.githistory import History, Version, message_of, said_in
from ifabric.board.gitmirror import MOVES, InFabric, InGit, Plan, plan, standing
from ifabric.board.markdown import read_markdown
from ifabric.board.places import Change, Scanner, lines_of, rewrite, without_marks
from ifabric.board.rows import Status
from ifabric.wire.coordinator import TaskLine
from tests.rules.test_board import LIST, TABLE, WILD

HOUR = 3600
NOW = 1_000 * HOUR
ROWS = "| ID | Task | Status | Claimed by |\n|---|---|---|---|\n"


def page(*rows: tuple[str, str, str]) -> str:
    return ROWS + "".join(f"| {task} | Do {task} | {status} | {holder} |\n" for task, status, holder in rows)


def told(*versions: tuple[str, str] | str, author: str = "bot", kind: str = "md") -> History:
    """A history of pages, an hour apart, each with its message; a text without a page is a commit that says it."""
    history = History(kind)  # type: ignore[arg-type]
    for number, one in enumerate(versions):
        text, message = one if isinstance(one, tuple) else (None, one)
        history.take(Version(f"c{number}", author, number * HOUR, message, text))
    return history


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "what", "words", "who"),
    [
        ("claim: P0.1.2 (session-3)", "claim", ("P0.1.2",), "session-3"),
        ("session-3: claim P0.1.2", "claim", ("P0.1.2",), "session-3"),
        ("session-3 claims P0.1.2", "claim", ("P0.1.2",), "session-3"),
        ("Claim P0.1, P0.2 for bob", "claim", ("P0.1", "P0.2"), "bob"),
        ("[claim] task P0.1 @bob", "claim", ("P0.1",), "bob"),
        ("chore(board): claim P0.1.2", "claim", ("P0.1.2",), ""),
        ("Squashed:\n\n* claim: P0.1 (ann)\n", "claim", ("P0.1",), "ann"),
        ("start P0.7", "claim", ("P0.7",), ""),
        ("unclaim: P0.1 (bob)", "release", ("P0.1",), "bob"),
        ("release P0.1", "release", ("P0.1",), ""),
        ("done: P0.1 by bob", "done", ("P0.1",), "bob"),
        ("claim: 7 (bob)", "claim", ("7",), "bob"),
    ],
)
def test_a_message_says_who_did_what_with_which_task(message: str, what: str, words: tuple[str, ...], who: str) -> None:
    assert [(one.what, one.words, one.who) for one in said_in(message)] == [(what, words, who)]


@pytest.mark.parametrize(
    "message", ["start the engine", "close 3 holes", "Merge branch 'claims'", "a claim that P0.1 is hard", "", "claim:"]
)
def test_prose_claims_nothing(message: str) -> None:
    assert not list(said_in(message))


@given(st.text(max_size=300))
def test_no_message_and_no_page_is_too_odd_to_be_read(text: str) -> None:
    for kind in ("md", "yaml", "json"):
        told((text, text), (page(("a1", "todo", "")), text), text, kind=kind)


# -- what has happened -------------------------------------------------------------------------------------------------


def test_a_task_is_created_claimed_and_done_and_by_whom() -> None:
    history = told(
        (page(("a1", "todo", "")), "the board"),
        (page(("a1", "in progress", "session-3")), "claim: a1 (session-3)"),
        (page(("a1", "done", "session-3")), "work"),
    )
    story = history.stories["a1"]
    assert [(one.what, one.by, one.commit) for one in story.events] == [
        ("created", "bot", "c0"),
        ("claimed", "session-3", "c1"),
        ("done", "session-3", "c2"),
    ]
    assert story.claim is None and story.done is not None and story.done.by == "session-3"
    assert history.versions == 3 and not history.doubles


@pytest.mark.parametrize(
    ("open_", "taken", "message", "by"),
    [
        (page(("a1", "todo", "")), page(("a1", "wip", "bob")), "x", "bob"),
        (page(("a1", "todo", "")), page(("a1", "todo", "bob")), "x", "bob"),
        (page(("a1", "todo", "")), page(("a1", "in progress: bob", "")), "x", "bob"),
        (page(("a1", "todo", "")), page(("a1", "🟡 In Progress (bob)", "")), "x", "bob"),
        (page(("a1", "todo", "")), page(("a1", "claimed by bob", "-")), "x", "bob"),
        (page(("a1", "todo", "")), page(("a1", "in progress (2026-11-03)", "")), "claim: a1 (bob)", "bob"),
        (page(("a1", "todo", "")), page(("a1", "in progress", "")), "x", "bot"),
        ("- [ ] a1 Do it\n", "- [ ] a1 Do it (claimed by @bob)\n", "x", "bob"),
        ("- [ ] a1 Do it {priority: 2}\n", "- [ ] a1 Do it (wip: bob) {priority: 2}\n", "x", "bob"),
        ("- [ ] a1 Do it\n", "- [~] a1 Do it\n", "a1", "bot"),
        ("- [ ] a1 Do it\n", "- [ ] a1 Do it\n", "bob: claim a1", "bob"),
    ],
)
def test_a_claim_is_where_people_write_it(open_: str, taken: str, message: str, by: str) -> None:
    claim = told((open_, "x"), (taken, message)).stories["a1"].claim
    assert claim is not None
    assert (claim.by, claim.at, claim.commit) == (by, HOUR, "c1")


def test_claims_in_yaml_and_json_are_read_as_they_are_written() -> None:
    yaml = "tasks:\n- {id: 1.10, status: claimed, claimed_by: bob}\n- {id: b, assignee: ann}\n- {id: c, done: true}\n"
    stories = told((yaml, "x"), kind="yaml").stories
    assert {task: (story.status, story.holder) for task, story in stories.items()} == {
        "1.10": ("started", "bob"), "b": ("started", "ann"), "c": ("done", ""),
    }  # fmt: skip
    assert [task.id for task in read_board(yaml, format="yaml").tasks] == ["1.10", "b", "c"]
    json = '[{"id": "a1", "status": "in progress", "owner": "bob"}]'
    assert told((json, "x"), kind="json").stories["a1"].holder == "bob"


def test_two_at_once_are_told_with_both_commits() -> None:
    history = told(
        (page(("a1", "todo", "")), "x"),
        (page(("a1", "in progress", "bob")), "claim: a1 (bob)"),
        (page(("a1", "in progress", "ann")), "claim: a1 (ann)"),
        (page(("a1", "done", "ann")), "x"),
    )
    (double,) = history.doubles
    assert (double.task, double.first.by, double.first.commit) == ("a1", "bob", "c1")
    assert (double.second.by, double.second.commit) == ("ann", "c2")


def test_two_at_once_are_found_on_branches_that_nobody_merged() -> None:
    history = told((page(("a1", "todo", "")), "x"), "claim: a1 (bob)", "claim: a1 (ann)")
    assert [(one.first.by, one.second.by) for one in history.doubles] == [("bob", "ann")]


@pytest.mark.parametrize(
    "later",
    [
        [(page(("a1", "todo", "")), "gave it back"), (page(("a1", "wip", "ann")), "x")],
        [(page(("a1", "done", "bob")), "x"), (page(("a1", "todo", "")), "x"), (page(("a1", "wip", "ann")), "x")],
        [(page(), "x"), (page(("a1", "wip", "ann")), "x")],
        [(page(("a1", "in progress", "Bob")), "said again")],
    ],
)
def test_one_after_the_other_is_no_double_claim(later: list[tuple[str, str]]) -> None:
    begin = [(page(("a1", "todo", "")), "x"), (page(("a1", "wip", "bob")), "x")]
    assert not told(*begin, *later).doubles


def test_a_name_that_comes_later_than_the_claim_is_no_second_claim() -> None:
    history = told(
        (page(("a1", "todo", "")), "x"), (page(("a1", "wip", "")), "x"), (page(("a1", "wip", "session-3")), "x")
    )
    claim = history.stories["a1"].claim
    assert not history.doubles
    assert claim is not None and (claim.by, claim.commit) == ("session-3", "c1")
    merged = told((page(("a1", "todo", "")), "x"), "claim: a1 (bob)")
    merged.take(Version("m", "maintainer", 9 * HOUR, "Merge branch", page(("a1", "wip", ""))))
    claim = merged.stories["a1"].claim
    assert claim is not None and claim.by == "bob" and not merged.doubles


def test_a_message_that_says_done_ends_nothing_before_the_page_does() -> None:
    history = told((page(("a1", "todo", "")), "x"), "claim: a1 (bob)", "done: a1 (bob)")
    story = history.stories["a1"]
    assert story.said_done is not None and story.said_done.by == "bob" and story.status == "open"
    assert standing(story, done=False, now_s=3 * HOUR, keep_s=24 * HOUR) == "fresh"
    released = told((page(("a1", "todo", "")), "x"), "claim: a1 (bob)", "release: a1 (bob)")
    assert released.stories["a1"].claim is None


def test_what_a_mirror_wrote_is_no_claim_of_git_and_stays_none_when_somebody_merges_it() -> None:
    taken, mirrors = page(("a1", "in progress", "alice")), message_of(["a1 claimed by alice"])
    story = told((page(("a1", "todo", "")), "x"), (taken, mirrors)).stories["a1"]
    assert story.claim is not None and story.claim.mirrored
    story = told((page(("a1", "todo", "")), "x"), mirrors, (taken, "Merge branch 'main'")).stories["a1"]
    assert story.claim is not None and story.claim.mirrored
    assert standing(story, done=False, now_s=0, keep_s=24 * HOUR) == "echo"


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [LIST, TABLE, WILD.removeprefix("\ufeff")])
def test_the_places_are_where_the_reader_has_its_tasks(text: str) -> None:
    rows = [(row.line, row.fields["id"], row.done) for row in read_markdown(text, [])]
    places = [(line, one.task, one.status == "done") for line, one in Scanner().scan(lines_of(text))]
    assert places == rows


def test_only_the_state_and_the_holder_of_a_row_change() -> None:
    text = (
        "# Board\r\n\r\n- [ ] a1 Build *it* {priority: 2}  \r\n\r\n"
        "| ID | Task | Status      | Owner | Notes |\r\n|---|---|---|---|---|\r\n"
        "| b1 | One  | todo        |       | a \\| b |\r\n| b2 | Two  | ✅ Done     | ann   | keep me |\r\n"
        "| b3 | Three | 🟡 In Progress | bob | |\r\n\r\nLast line, without an end"
    )
    changes = [Change("a1", "started", "alice"), Change("b1", "started", "alice"), Change("b3", "done", "bob")]
    new, refused = rewrite(text, changes)
    assert not refused
    assert new.split("\r\n") == [
        "# Board", "", "- [ ] a1 Build *it* (claimed by alice) {priority: 2}  ", "",
        "| ID | Task | Status      | Owner | Notes |", "|---|---|---|---|---|",
        "| b1 | One  | 🟡 In Progress | alice | a \\| b |", "| b2 | Two  | ✅ Done     | ann   | keep me |",
        "| b3 | Three | ✅ Done        | bob | |", "", "Last line, without an end",
    ]  # fmt: skip
    back, _ = rewrite(new, [Change("a1", "open"), Change("b1", "open")])
    assert lines_of(back)[2] == lines_of(text)[2]
    assert "| b1 | One  | todo" in back and "alice" not in back
    done, _ = rewrite(new, [Change("a1", "done", "alice")])
    assert "- [x] a1 Build *it* {priority: 2}" in done


def test_a_row_without_a_place_for_it_is_refused_and_the_others_are_not() -> None:
    text = "- [ ] a1 One\n\n| ID | Task | Priority |\n|---|---|---|\n| b1 | Two | 3 |\n"
    new, refused = rewrite(text, [Change("a1", "done"), Change("b1", "done"), Change("zz", "done")])
    assert new == text.replace("[ ] a1", "[x] a1")
    assert refused == {"b1": "its row has no place for that", "zz": "it has no row"}


def test_a_row_that_the_reader_does_not_take_for_one_is_left_alone() -> None:
    text = "- [ ] a1 One\n\n    - [ ] b1 in a block of code\n\n<div>\n- [ ] c1 in HTML\n</div>\n"
    new, refused = rewrite(text, [Change("a1", "done"), Change("c1", "done")])
    assert new == text.replace("[ ] a1", "[x] a1")
    assert set(refused) == {"c1"}


@given(
    st.lists(st.sampled_from([*lines_of(LIST + TABLE + WILD), "\n", "    code\n", "| x |\r\n"]), max_size=40),
    st.sampled_from(get_args(Status)[:3]),
)
def test_whatever_the_page_no_other_task_changes(lines: list[str], status: Status) -> None:
    text = "".join(lines)
    before = {row.line: (row.fields, row.done) for row in read_markdown(without_marks(text), [])}
    tasks = [str(fields["id"]) for fields, _ in before.values()]
    new, refused = rewrite(text, [Change(task, status, "alice") for task in tasks[:1]])
    after = {row.line: (row.fields, row.done) for row in read_markdown(without_marks(new), [])}
    changed = [line for line in before if before[line] != after.get(line)]
    assert before.keys() == after.keys()
    assert all(before[line][0] == after[line][0] and before[line][0]["id"] in tasks[:1] for line in changed)
    if refused:
        assert new == text


# -- both worlds -------------------------------------------------------------------------------------------------------


def test_every_pair_of_states_has_a_move() -> None:
    assert set(MOVES) == set(get_args(InGit))
    assert all(set(moves) == set(get_args(InFabric)) for moves in MOVES.values())


def decided(history: History, text: str, *lines: TaskLine, keep_s: int = 24 * HOUR, now_s: int = 2 * HOUR) -> Plan:
    board = read_board(without_marks(text), format="md")
    return plan(board, history, {line.task: line for line in lines}, now_s=now_s, keep_s=keep_s, ours="git-mirror")


def test_what_somebody_has_in_git_is_left_out_with_all_that_depends_on_it() -> None:
    text = (
        "- [ ] a1 One (claimed by bob)\n- [ ] a2 Two {depends: a1}\n- [x] a3 Three {depends: a2}\n"
        "- [ ] b1 Four\n- [x] b2 Five {depends: b1}\n"
    )
    history = told((text.replace(" (claimed by bob)", ""), "x"), (text, "x"))
    done = decided(history, text)
    assert [spec.id for spec in done.submit] == ["b1", "b2"] and done.arrive == {"b2"}
    assert [(one.task, one.because_of) for one in done.left_out] == [("a1", "a1"), ("a2", "a1"), ("a3", "a1")]
    everything = decided(history, text, keep_s=0)
    assert {spec.id for spec in everything.submit} == {"a1", "a2", "a3", "b1", "b2"}
    assert not everything.left_out
    assert decided(history, text, keep_s=0, now_s=0).submit == everything.submit  # a clock that is ahead of ours
    later = decided(history, text, now_s=26 * HOUR)
    assert "a1" in {spec.id for spec in later.submit}


def test_the_fabric_decides_and_the_contradiction_is_told() -> None:
    text = page(("a1", "in progress", "bob"), ("a2", "done", "bob"), ("a3", "todo", ""), ("a4", "done", ""))
    history = told((page(*((f"a{n}", "todo", "") for n in (1, 2, 3, 4))), "x"), (text, "x"))
    done = decided(
        history,
        text,
        TaskLine(task="a1", state="claimed", session="alice"),
        TaskLine(task="a2", state="claimed", session="carol"),
        TaskLine(task="a3", state="done"),
        TaskLine(task="a4", state="dead"),
    )
    assert done.write == (
        Change("a1", "started", "alice"), Change("a2", "started", "carol"), Change("a3", "done"),
    )  # fmt: skip
    assert [one.task for one in done.conflicts] == ["a1", "a2", "a4"]
    assert (
        done.conflicts[0].says == "git says claimed by bob in c1, the fabric says claimed by alice: the fabric decides"
    )


def test_a_row_that_says_it_already_is_not_written_again() -> None:
    text = page(("a1", "in progress", "alice"), ("a2", "done", "alice"))
    mirrored = message_of(["a1 claimed by alice", "a2 done by alice"])
    history = told((page(("a1", "todo", ""), ("a2", "todo", "")), "x"), (text, mirrored))
    alices = TaskLine(task="a1", state="claimed", session="alice")
    assert decided(history, text, alices, TaskLine(task="a2", state="done")) == Plan(
        (), frozenset(), (), (), (), (), (), ()
    )
    freed = decided(history, text, TaskLine(task="a1", state="pending"), TaskLine(task="a2", state="done"))
    assert freed.write == (Change("a1", "open"),) and not freed.conflicts


def test_what_git_takes_is_held_and_what_it_gives_back_is_given_back() -> None:
    text = page(("a1", "in progress", "bob"), ("a2", "todo", ""), ("a3", "done", "bob"))
    history = told((page(*((f"a{n}", "todo", "") for n in (1, 2, 3))), "x"), (text, "x"))
    done = decided(
        history,
        text,
        TaskLine(task="a1", state="pending"),
        TaskLine(task="a2", state="claimed", session="git-mirror"),
        TaskLine(task="a3", state="pending"),
    )
    assert (done.hold, done.give_back, done.finish) == (("a1",), ("a2",), ("a3",))
    assert not done.write and not done.conflicts
