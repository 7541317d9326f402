"""Boards as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.board import ERRORS_MAX, Board, Format, read_board
from ifabric.board.rows import status_of
from ifabric.errors import BadRequest
from ifabric.wire.coordinator import TaskSpec

LIST = """\
# Sprint 7

Some prose, and a list that is no board:

- milk
- bread

## Tasks

- [x] P0.1.0 Choose a parser
- [ ] P0.1.1 Build the parser {needs: rust, wasm; depends: P0.1.0; priority: 5; attempts: 2; deadline: 600; budget: 1.50}
  - [ ] **P0.1.2**: Test the parser {depends: P0.1.1; wants: gpu}
* [X] Write the announcement
1. [ ] [P0.1.3](https://example.org/3) Ship *everything*
       to everybody {Depends_On: P0.1.1 and P0.1.2}
- [ ] [ABC-12] Tell `them` — soon
- []  not a task, its box is broken

```
- [ ] not.1 a task, but an example
```
<!--
- [ ] not.2 a task, but a remark
-->
"""

TABLE = """\
| Task ID | Task | Status | Depends On | Priority | Needs | Owner |
|---|---|---|---|---|---|---|
| `P0.2.1` | Lease a task | ✅ Done | - | P0 | | ann |
| [P0.2.2](#fence) | Fence it, with a \\| in it | 🟡 In Progress (bob) | P0.2.1 | high | python, etcd | bob |
| **P0.2.3** | Tell everybody | todo | P0.2.1, `P0.2.2` | 3 | | |
| | | | | | | |

| Colour | Meaning |
|---|---|
| red | stop |

| Key | Description |
|---|---|
| timeout_s | how long |
"""

#: as agents leave them behind: a table without ids, a front matter, emojis, umlauts, Windows line ends
WILD = (
    "\ufeff---\r\ntitle: Board\r\n---\r\n\r\n"
    "| # | Name | State | Blocked by |\r\n|:-:|:--|:--|:--|\r\n"
    "| 1 | Düngemittel kaufen | ✅ | none |\r\n| 2 | Beete | in progress | 1 |\r\n\r\n"
    "| Task | Done? |\r\n|---|---|\r\n| Größe prüfen | no |\r\n| 測試 | yes |\r\n| T-9: name it | ☐ |\r\n"
)

YAML = """\
defaults: &normal
  needs: [python, 3.11]
  priority: high
tasks:
  - id: 1.10
    title: 2024
    status: done
  - <<: *normal
    id: b
    depends: [1.10]
    budget: 0.10
    payload: {when: 2024-01-02, ratio: 0.5}
"""


def tasks_of(board: Board) -> dict[str, TaskSpec]:
    return {task.id: task for task in board.tasks}


def problems(text: str, format: Format = "md") -> list[str]:
    with pytest.raises(BadRequest) as refusal:
        read_board(text, format=format, filename="B")
    return refusal.value.message.split("\n")


def refusal_of(text: str, format: Format) -> str | None:
    try:
        found = read_board(text, format=format)
    except BadRequest as refusal:
        return refusal.message
    assert found.tasks
    return None


def test_a_github_task_list_is_a_board() -> None:
    found = read_board(LIST, format="md", filename="B")
    tasks = tasks_of(found)
    assert set(tasks) == {"P0.1.0", "P0.1.1", "P0.1.2", "P0.1.3", "ABC-12", "write-the-announcement"}
    assert found.done == ("P0.1.0", "write-the-announcement")
    one = tasks["P0.1.1"]
    assert (one.title, one.needs, one.depends_on, one.priority, one.max_attempts, one.deadline_s) == (
        "Build the parser", ("rust", "wasm"), ("P0.1.0",), 5, 2, 600,
    )  # fmt: skip
    assert one.budget_micro_usd == 1_500_000
    assert (tasks["P0.1.2"].title, tasks["P0.1.2"].wants) == ("Test the parser", ("gpu",))
    assert (tasks["P0.1.3"].title, tasks["P0.1.3"].depends_on) == ("Ship everything to everybody", ("P0.1.1", "P0.1.2"))
    assert tasks["ABC-12"].title == "Tell them — soon"
    assert found.notes == ("B:13: write-the-announcement has no id; it is loaded as write-the-announcement",)


def test_a_pipe_table_is_a_board_and_other_tables_are_left_alone() -> None:
    found = read_board(TABLE, format="md", filename="B")
    tasks = tasks_of(found)
    assert list(tasks) == ["P0.2.1", "P0.2.2", "P0.2.3"]
    assert found.done == ("P0.2.1",)
    assert tasks["P0.2.2"].title == "Fence it, with a | in it"
    assert tasks["P0.2.2"].needs == ("python", "etcd")
    assert [task.priority for task in found.tasks] == [30, 10, 3]
    assert tasks["P0.2.3"].depends_on == ("P0.2.1", "P0.2.2")
    assert found.notes == (
        "B:3: P0.2.1 the columns Owner of its table are not used",
        "B:4: P0.2.2 is in progress on the board: it is loaded as pending, for nobody holds it here",
    )


def test_a_board_from_the_wild_is_read_with_ids_that_are_the_same_every_time() -> None:
    first, again = (read_board(WILD, format="md") for _ in range(2))
    assert first == again
    tasks = tasks_of(first)
    assert (tasks["1"].title, tasks["2"].depends_on) == ("Düngemittel kaufen", ("1",))
    assert tasks["groe-prufen"].title == "Größe prüfen"
    assert tasks["T-9"].title == "name it"
    (chinese,) = (task for task in tasks.values() if task.title == "測試")
    assert chinese.id.startswith("task-")
    assert set(first.done) == {"1", chinese.id}


def test_yaml_is_taken_as_it_is_written_before_it_makes_numbers_of_it() -> None:
    found = read_board(YAML, format="yaml")
    assert found.done == ("1.10",)
    a, b = found.tasks
    assert (a.id, a.title) == ("1.10", "2024")
    assert (b.depends_on, b.needs, b.priority, b.budget_micro_usd) == (("1.10",), ("python", "3.11"), 10, 100_000)
    assert b.payload["ratio"] == 0.5


def test_json_says_the_same() -> None:
    text = '{"tasks": [{"id": "a", "done": true}, {"id": "b", "depends_on": ["a"], "budget": 0.00001, "title": null}]}'
    found = read_board(text, format="json")
    assert found.done == ("a",)
    assert [(task.id, task.depends_on, task.budget_micro_usd) for task in found.tasks] == [
        ("a", (), None),
        ("b", ("a",), 10),
    ]


def test_dependencies_come_first_whatever_the_order_on_the_page_and_named_twice_they_count_once() -> None:
    text = "- [ ] c1 {depends: b1, b1}\n- [ ] b1 {depends: a1}\n- [ ] a1\n"
    tasks = read_board(text, format="md").tasks
    assert [(task.id, task.depends_on) for task in tasks] == [("a1", ()), ("b1", ("a1",)), ("c1", ("b1",))]


def test_a_byte_order_mark_is_no_part_of_the_first_item() -> None:
    assert [task.id for task in read_board("\ufeff- [ ] a1\r\n- [ ] b1\r\n", format="md").tasks] == ["a1", "b1"]


@pytest.mark.parametrize(
    ("written", "micro_usd"),
    [("1.50", 1_500_000), ("$0.000001", 1), ("1,234.5 USD", 1_234_500_000), ("40", 40_000_000), ("0.10", 100_000)],
)
def test_a_budget_is_exact(written: str, micro_usd: int) -> None:
    (task,) = read_board(f"- [ ] a1 {{budget: {written}}}\n", format="md").tasks
    assert task.budget_micro_usd == micro_usd


@pytest.mark.parametrize("written", ["-1", "0.0000001", "inf", "NaN", "1e9", "1e999999999", "12,34", "one", ""])
def test_what_is_no_budget_is_refused(written: str) -> None:
    assert problems(f"- [ ] a1 {{budget: {written}}}\n")[0].startswith("B:1: budget")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Done", "done"), ("✅ Complete", "done"), ("[x]", "done"), ("done (2026-11-03)", "done"), ("Done 2026-11-03", "done"),
        ("closed by ann", "done"), ("✔️", "done"), ("🔵 Available", "open"), ("", "open"), ("To-Do", "open"),
        ("in_progress", "started"), ("In progress: bob", "started"), ("🚧", "started"), ("Blocked", "blocked"),
        ("not done", None), ("done it, almost", None), ("perhaps", None), ("cancelled", None), ("no longer needed", None),
    ],
)  # fmt: skip
def test_a_status_is_one_that_people_use_or_it_is_none(text: str, status: str | None) -> None:
    assert status_of(text) == status


@pytest.mark.parametrize(
    ("text", "format", "expected"),
    [
        ("- [ ] a1\n- [ ] a1\n", "md", ["B:2: task a1 is there twice: also on line 1"]),
        ("- [ ] Foo\n- [ ] foo!\n", "md", ["B:2: task foo is there twice: also on line 1"]),
        ("- [ ] a1 {depends: zz}\n", "md", ["B:1: task a1 depends on zz, which is not on this board"]),
        (
            "- [ ] P0.1.1\n- [ ] P0.1.2 {depends: P0.1.l}\n",
            "md",
            ["B:2: task P0.1.2 depends on P0.1.l, which is not on this board; did you mean P0.1.2?"],
        ),
        (
            "- [ ] a1 {depends: b1}\n- [ ] b1 {depends: a1}\n- [ ] c1 {depends: a1}\n- [ ] d1 {depends: d1}\n",
            "md",
            [
                "B:1: the tasks depend on each other in a circle: a1 (line 1) -> b1 (line 2) -> a1 (line 1)",
                "B:4: the tasks depend on each other in a circle: d1 (line 4) -> d1 (line 4)",
            ],
        ),
        (
            "- [ ] a1 {priority: soon; needs: x}\n- [ ] b1 {colour: red}\n- [ ] c1 {depends: a1; depends: b1}\n",
            "md",
            ["B:1: priority 'soon' is not a whole number", "B:2: in {...}: 'colour: red'", "B:3: in {...}: depends"],
        ),
        (
            "| ID | Status |\n|---|---|\n| a1 | perhaps |\n|  | todo |\n| b1 | todo |\n",
            "md",
            ["B:3: status 'perhaps' is unknown", "B:4: a row without"],
        ),
        ("| ID | Title |\n|---|---|\n| a b | x |\n", "md", ["B:3: id 'a b' is none"]),
        ("nothing here\n", "md", ["B:1: there are no tasks here"]),
        ("", "yaml", ["B:1: there are no tasks here"]),
        ("tasks: [{id: a, needs: 5x!}]\n", "yaml", ["B:1: Expected"]),
        ("- id: a\n- id: b\n  prioritty: 3\n", "yaml", ["B:2: unknown field 'prioritty'; did you mean 'priority'?"]),
        ("- id: a\n  id: b\n", "yaml", ["B:1: id is given twice"]),
        ("- title: a\n", "yaml", ["B:1: a task without an id"]),
        ("- id: a\n  depends: [b]\n  depends_on: [b]\n- id: b\n", "yaml", ["B:1: depends_on and depends_on say"]),
        ("- id: a\n  status: [x]\n", "yaml", ["B:1: status"]),
        ("- id: a\n  done: 7\n", "yaml", ["B:1: done 7 is neither"]),
        ("a: [\n", "yaml", ["B:2: not YAML"]),
        ("[" * 5000, "yaml", ["B:1: not YAML"]),
        ("{\n,", "json", ["B:2: not JSON"]),
        ("[1]", "json", ["B:1: task 1 is not a map"]),
        ('[\n{"id": "a"},\n{"id": "a", "payload": {"id": 7}},\n{"id": "b c"}]', "json", ["B:3: task a", "B:4: id"]),
        ('{"a": [{}],\n"tasks":\n[\n{"id": 1}, {"id": "x y"}\n]}', "json", ["B:4: id 'x y'"]),
        ('[{"id": "a", "payload": NaN}]', "json", ["B:1: not JSON: NaN"]),
        ('[{"id": "a", "title": "\\ud800"}]', "json", ["B:1: it cannot be sent as JSON"]),
        ('[{"id": "a", "payload": "' + "x" * 65_536 + '"}]', "json", ["B:1: the payload"]),
        ("[" * 100_000, "json", ["B:1: not JSON: nested too deeply"]),
    ],
)
def test_what_is_wrong_is_named_by_line_and_all_of_it_at_once(text: str, format: Format, expected: list[str]) -> None:
    found = problems(text, format)
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start), line


def test_a_bad_row_is_not_said_to_be_missing_by_those_that_depend_on_it() -> None:
    assert len(problems("- [ ] a1 {priority: soon}\n- [ ] b1 {depends: a1}\n")) == 1


def test_a_yaml_anchor_cannot_make_gigabytes_of_a_line() -> None:
    bomb = "x0: &x0 lol\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 10))
    assert problems(f"{bomb}tasks:\n- id: a\n  payload: *x9\n", "yaml")[0].startswith("B:12: the payload is larger")
    assert problems("- id: a\n  payload: &p [*p]\n", "yaml")


def test_a_hundred_mistakes_are_not_a_hundred_lines() -> None:
    found = problems("".join(f"- [ ] a{n} {{priority: soon}}\n" for n in range(100)))
    assert len(found) == ERRORS_MAX + 1
    assert found[-1] == "B: and 50 more"


@given(st.text(max_size=300), st.sampled_from(["md", "yaml", "json"]))
def test_any_text_is_a_board_or_a_refusal(text: str, kind: Format) -> None:
    why = refusal_of(text, kind)
    assert why is None or why.startswith("board:")


_CELL = st.text(st.sampled_from("ab1.-[x] {};:*`|\\✅done<>é\n"), max_size=20)


@given(st.lists(st.tuples(_CELL, _CELL), max_size=5))
def test_any_rows_are_a_board_or_a_refusal(cells: list[tuple[str, str]]) -> None:
    table = "| Task | Status |\n|---|---|\n" + "".join(f"| {one} | {other} |\n" for one, other in cells)
    items = "".join(f"- [ ] {one} {other}\n" for one, other in cells)
    for text in (table, items):
        why = refusal_of(text, "md")
        assert why is None or why.startswith("board:")
