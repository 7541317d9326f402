"""Boards as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.board import Format, read_board
from ifabric.errors import BadRequest

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

```
- [ ] not.1 a task, but an example
```
"""

TABLE = """\
| Task ID | Task | Status | Depends On | Priority | Needs |
|---|---|---|---|---|---|
| `P0.2.1` | Lease a task | ✅ Done | - | P0 | |
| P0.2.2 | Fence it, with a \\| in it | 🟡 In Progress | P0.2.1 | high | python, etcd |
| P0.2.3 | Tell everybody | todo | P0.2.1, P0.2.2 | 3 | |

| Colour | Meaning |
|---|---|
| red | stop |
"""


def board(text: str, format: Format = "md") -> dict[str, object]:
    found = read_board(text, format=format)
    return {task.id: task for task in found.tasks} | {"done": found.done}


def problems(text: str, format: Format = "md") -> list[str]:
    with pytest.raises(BadRequest) as refusal:
        read_board(text, format=format, filename="B")
    return refusal.value.message.split("\n")


def test_a_github_task_list_is_a_board() -> None:
    found = read_board(LIST, format="md")
    tasks = {task.id: task for task in found.tasks}
    assert set(tasks) == {"P0.1.0", "P0.1.1", "P0.1.2", "write-the-announcement"}
    assert found.done == ("P0.1.0", "write-the-announcement")
    one = tasks["P0.1.1"]
    assert (one.title, one.needs, one.depends_on, one.priority) == (
        "Build the parser",
        ("rust", "wasm"),
        ("P0.1.0",),
        5,
    )
    assert (one.max_attempts, one.deadline_s, one.budget_micro_usd) == (2, 600, 1_500_000)
    assert (tasks["P0.1.2"].title, tasks["P0.1.2"].wants) == ("Test the parser", ("gpu",))


def test_a_pipe_table_is_a_board_and_other_tables_are_left_alone() -> None:
    found = read_board(TABLE, format="md")
    tasks = {task.id: task for task in found.tasks}
    assert found.done == ("P0.2.1",)
    assert tasks["P0.2.2"].title == "Fence it, with a | in it"
    assert tasks["P0.2.2"].needs == ("python", "etcd")
    assert [tasks[f"P0.2.{n}"].priority for n in (1, 2, 3)] == [30, 10, 3]
    assert tasks["P0.2.3"].depends_on == ("P0.2.1", "P0.2.2")


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("tasks:\n  - id: a\n    status: done\n  - id: b\n    depends: [a]\n    needs: x, y\n", "yaml"),
        ('{"tasks": [{"id": "a", "done": true}, {"id": "b", "depends_on": ["a"], "needs": ["x", "y"]}]}', "json"),
    ],
)
def test_yaml_and_json_say_the_same(text: str, format: Format) -> None:
    found = read_board(text, format=format)
    assert found.done == ("a",)
    assert [(t.id, t.depends_on, t.needs) for t in found.tasks] == [("a", (), ()), ("b", ("a",), ("x", "y"))]


def test_dependencies_come_first_whatever_the_order_on_the_page() -> None:
    assert [
        t.id for t in read_board("- [ ] c1 {depends: b1}\n- [ ] b1 {depends: a1}\n- [ ] a1\n", format="md").tasks
    ] == [
        "a1",
        "b1",
        "c1",
    ]


@pytest.mark.parametrize(
    ("text", "format", "expected"),
    [
        ("- [ ] a1\n- [ ] a1\n", "md", ["B:2: task a1 is there twice: also on line 1"]),
        ("- [ ] a1 {depends: zz}\n", "md", ["B:1: task a1 depends on zz, which is not on this board"]),
        (
            "- [ ] a1 {depends: b1}\n- [ ] b1 {depends: a1}\n",
            "md",
            ["B:1: the tasks depend on each other in a circle: a1 -> b1 -> a1"],
        ),
        (
            "- [ ] a1 {priority: soon}\n- [ ] b1 {colour: red}\n",
            "md",
            ["B:1: priority 'soon' is not a whole number", "B:2: in {...}"],
        ),
        (
            "| ID | Status |\n|---|---|\n| a1 | perhaps |\n|  | todo |\n",
            "md",
            ["B:3: status 'perhaps' is unknown", "B:4: a row without"],
        ),
        ("- [ ] a1 {budget: 0.0000001}\n", "md", ["B:1: budget '0.0000001' is not a positive amount"]),
        ("nothing here\n", "md", ["B:1: there are no tasks here"]),
        ("tasks: [{id: a, needs: 5x!}]\n", "yaml", ["B:1: "]),
        ("- id: a\n- id: b\n  colour: red\n", "yaml", ["B:2: Object contains unknown field `colour`"]),
        ("- id: 'sp ace'\n", "yaml", ["B:1: id 'sp ace' must match"]),
        ("a: [\n", "yaml", ["B:2: not YAML"]),
        ("{", "json", ["B:1: not JSON"]),
        ("[1]", "json", ["B:1: task 1 is not a map"]),
        ("[" * 100_000, "json", ["B:1: not JSON"]),
    ],
)
def test_what_is_wrong_is_named_by_line_and_all_of_it_at_once(text: str, format: Format, expected: list[str]) -> None:
    found = problems(text, format)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@given(st.text(max_size=300), st.sampled_from(["md", "yaml", "json"]))
def test_any_text_is_a_board_or_a_refusal(text: str, kind: Format) -> None:
    try:
        found = read_board(text, format=kind)
    except BadRequest as refusal:
        why = refusal.message
    else:
        why = ""
        assert found.tasks
    assert not why or why.startswith("board:")
