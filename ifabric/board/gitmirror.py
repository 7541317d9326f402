"""While a board lives in git and in the fabric: what of the one goes to the other. Pure.

**The same work is not to be done twice.** That two agents take one task is what people leave git for, and the days in
which both worlds run are when it would happen most. Hence:

- *What somebody has in git is not in the fabric yet.* A task whose claim in git is younger than `keep_s` is left out,
  and with it what depends on it (nobody could begin that anyhow). The fabric cannot hand out what it does not have:
  no lease has to be kept for somebody who does not know of it, and nothing is lost when the importer dies. The task
  comes when git is done with it, gives it back, or the claim has become old.
- *What is in the fabric already is claimed there* when somebody claims it in git, by the mirror, under its own name and
  a lease of its own, as long as it runs. When somebody in the fabric was first, git's claim is overruled.
- *The fabric decides.* git has no way to say no. What git says against it is told as a conflict, and the row is put
  right.

Every round compares what is so here with what is so there (`MOVES`), and nothing that happened in between is needed:
a mirror that was away, or died in the middle of a round, does the same as one that was there. The rows that a mirror
writes are known by their commits: they are the fabric's echo, and no claims of git.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from ifabric.board import Board
from ifabric.board.githistory import History, Story
from ifabric.board.places import Change
from ifabric.wire.coordinator import TaskLine, TaskSpec

InGit = Literal["open", "echo", "fresh", "stale", "done"]
InFabric = Literal["absent", "pending", "blocked", "ours", "theirs", "done", "ended"]
Move = Literal[
    "",
    "submit",  # put it there, pending
    "arrive",  # put it there, done
    "leave_out",
    "hold",  # claim it for who has it in git
    "finish",  # claim it and complete it
    "give_back",  # git is through with it
    "write",  # the row says what the fabric says
    "overrule",  # the same, against what git says
    "tell",  # they differ, and nothing can be done about it now
]

#: what is so in git -> what is so in the fabric -> what to do
MOVES: Mapping[InGit, Mapping[InFabric, Move]] = {
    "open": {
        "absent": "submit", "pending": "", "blocked": "", "ours": "give_back",
        "theirs": "write", "done": "write", "ended": "",
    },
    "echo": {
        "absent": "submit", "pending": "write", "blocked": "write", "ours": "give_back",
        "theirs": "write", "done": "write", "ended": "",
    },
    "fresh": {
        "absent": "leave_out", "pending": "hold", "blocked": "", "ours": "hold",
        "theirs": "overrule", "done": "overrule", "ended": "tell",
    },
    "stale": {
        "absent": "submit", "pending": "", "blocked": "", "ours": "give_back",
        "theirs": "write", "done": "write", "ended": "",
    },
    "done": {
        "absent": "arrive", "pending": "finish", "blocked": "tell", "ours": "finish",
        "theirs": "overrule", "done": "", "ended": "tell",
    },
}  # fmt: skip


class Conflict(NamedTuple):
    """Where git and the fabric contradict each other."""

    task: str
    says: str


class LeftOut(NamedTuple):
    """A task that is not brought over yet, and whose claim it is that it waits for."""

    task: str
    because_of: str


class Plan(NamedTuple):
    """What one round does. Tasks are in an order in which dependencies come first."""

    submit: tuple[TaskSpec, ...]
    #: ids among them that arrive done
    arrive: frozenset[str]
    left_out: tuple[LeftOut, ...]
    hold: tuple[str, ...]
    finish: tuple[str, ...]
    give_back: tuple[str, ...]
    #: what the rows are to say; who did what is done is for the caller to find out
    write: tuple[Change, ...]
    conflicts: tuple[Conflict, ...]


def standing(story: Story | None, *, done: bool, now_s: int, keep_s: int) -> InGit:
    """What is so in git. A message that says done where the page does not is a claim: the work may be on its way."""
    if done:
        return "done"
    if story is None:
        return "open"
    if story.claim is not None and story.claim.mirrored and story.said_done is None:
        return "echo"
    since = max(0 if story.claim is None else story.claim.at, 0 if story.said_done is None else story.said_done.at)
    if story.claim is None and story.said_done is None:
        return "open"
    return "fresh" if max(0, now_s - since) < keep_s else "stale"


def there(line: TaskLine | None, ours: str) -> InFabric:
    """What is so in the fabric, for the mirror's session `ours`."""
    if line is None:
        return "absent"
    if line.state == "claimed":
        return "ours" if line.session == ours else "theirs"
    if line.state == "dead" or line.state == "cancelled":  # noqa: PLR1714  # so that mypy sees what is left
        return "ended"
    return line.state


def plan(
    board: Board,
    history: History,
    fabric: Mapping[str, TaskLine],
    *,
    now_s: int,
    keep_s: int,
    ours: str,
) -> Plan:
    """What to do so that both say the same."""
    done = set(board.done)
    moves: dict[Move, list[str]] = {}
    submit: list[TaskSpec] = []
    absent: dict[str, str] = {}
    write: list[Change] = []
    conflicts: list[Conflict] = []
    for spec in board.tasks:
        task, story, line = spec.id, history.stories.get(spec.id), fabric.get(spec.id)
        git = standing(story, done=task in done, now_s=now_s, keep_s=keep_s)
        move = MOVES[git][there(line, ours)]
        if move in ("submit", "arrive", "leave_out"):
            waits = next((absent[other] for other in spec.depends_on if other in absent), "")
            if move == "leave_out" or waits:
                absent[task] = task if move == "leave_out" else waits
            else:
                submit.append(spec)
        elif move in ("write", "overrule") and line is not None:
            change = _row(line)
            if not _says_already(story, change, done=task in done):
                write.append(change)
                if move == "overrule" or _was_undone(story):
                    conflicts.append(Conflict(task, _against(git, story, line)))
        elif move == "tell" and line is not None:
            conflicts.append(Conflict(task, _against(git, story, line)))
        moves.setdefault(move, []).append(task)
    return Plan(
        tuple(submit),
        frozenset(spec.id for spec in submit if spec.id in done),
        tuple(LeftOut(task, because) for task, because in absent.items()),
        tuple(moves.get("hold", ())),
        tuple(moves.get("finish", ())),
        tuple(moves.get("give_back", ())),
        tuple(write),
        tuple(conflicts),
    )


def _row(line: TaskLine) -> Change:
    if line.state == "claimed":
        return Change(line.task, "started", line.session or "")
    return Change(line.task, "done" if line.state == "done" else "open")


def _says_already(story: Story | None, change: Change, *, done: bool) -> bool:
    if change.status == "done":
        return done
    if story is None or done:
        return False
    status = "open" if story.status == "blocked" else story.status
    return status == change.status and (change.status == "open" or story.holder == change.who)


def _was_undone(story: Story | None) -> bool:
    """Whether the last that happened in git was that somebody took back what the row said."""
    last = story.events[-1] if story is not None and story.events else None
    return last is not None and last.what in ("released", "reopened") and not last.mirrored


def _against(git: InGit, story: Story | None, line: TaskLine) -> str:
    claim = None if story is None else story.claim
    done = None if story is None else story.done or story.said_done
    said = {
        "done": f"done by {done.by} in {done.commit[:10]}" if done else "done",
        "fresh": f"claimed by {claim.by} in {claim.commit[:10]}" if claim else "said to be done",
    }.get(git, "open")
    here = f"claimed by {line.session}" if line.session else line.state
    wait = "; it will be completed when what it depends on is done" if (git, line.state) == ("done", "blocked") else ""
    return f"git says {said}, the fabric says {here}: the fabric decides{wait}"
