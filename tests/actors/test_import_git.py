"""Boards that live in git, in real repositories, brought over by the real program to a real daemon."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ifabric.board.gitboard import GitBoard
from ifabric.board.repository import GitError, Moved, Repository
from ifabric.cli import main
from ifabric.cli.mirroring import Happened, Mirror, everything
from ifabric.client import Client
from ifabric.clock import SystemClock
from ifabric.errors import ConfigError
from ifabric.testing.servers import RealServer

from .conftest import World
from .sdk import client, state, tap, until_state

pytestmark = pytest.mark.skipif(shutil.which("git") is None and not os.environ.get("CI"), reason="there is no git")

CLOCK = SystemClock()
NOW_S = CLOCK.wall_ms() // 1000
HOUR = 3600
DAY = 24 * HOUR
BOARD = "docs/TASK-BOARD.md"
HEAD = "| ID | Task | Status | Claimed by | Depends |\n|---|---|---|---|---|\n"


def rows(**tasks: str) -> str:
    """A board: `a1="in progress bob"` is the status, and after it the holder."""
    made = ""
    for task, cells in tasks.items():
        status, _, holder = cells.rpartition(" ") if " " in cells else (cells, "", "")
        made += f"| {task} | Do {task} | {status} | {holder} |  |\n"
    return HEAD + made


class Git:
    """A repository to commit to, without any configuration of this machine's."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ".git").exists():
            self("init", "-q", "-b", "main", *words)

    def __call__(self, *words: str, data: bytes | None = None, **more: str) -> str:
        names = {f"GIT_{role}_{what}": "ann" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environ = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", **names, **more}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        done = subprocess.run(
            ["git", *words], cwd=self.folder, input=data, capture_output=True, env=kept | environ, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode(errors="replace").strip()

    def commit(
        self, text: str | bytes | None, message: str = "x", *, path: str = BOARD, ago_s: int = 0, author: str = "ann"
    ) -> str:
        """Commits the board, so long ago; the commit."""
        if text is not None:
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode() if isinstance(text, str) else text)
            self("add", "--", path)
        when = f"{NOW_S - ago_s} +0000"
        self(
            *("commit", "-q", "--allow-empty", "-m", message),
            GIT_AUTHOR_DATE=when, GIT_COMMITTER_DATE=when, GIT_AUTHOR_NAME=author,
        )  # fmt: skip
        return self("rev-parse", "HEAD")

    def page(self, branch: str = "main", path: str = BOARD) -> str:
        """The board as it is on a branch."""
        return subprocess.run(
            ["git", "show", f"{branch}:{path}"], cwd=self.folder, capture_output=True, check=True
        ).stdout.decode()


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of who runs the tests matters, and no hook's variables."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")


@pytest.fixture
def repo(tmp_path: Path) -> Git:
    return Git(tmp_path / "repo")


@pytest.fixture
async def fabric(etcd: RealServer, nats: RealServer) -> AsyncIterator[World]:
    """A daemon on real servers."""
    world = World(etcd.url, nats.url)
    await world.open()
    await world.daemon()
    yield world
    await world.close()


def board_of(git: Git, **options: Any) -> GitBoard:
    return GitBoard(Repository(git.folder), **{"branch": None, "board": None, "remote": None, **options})


async def imported(world: World, board: GitBoard, *, keep_s: int = DAY) -> list[Happened]:
    """One import; what happened."""
    async with client(world, "git-import") as connected:
        return list((await Mirror(connected, board, CLOCK, keep_s=keep_s).round()).happened)


def says(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """A rehearsal: its exit code, its JSON and its stderr."""
    code = main(["board", "import-git", *words, "--dry-run", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


# -- reading a repository ----------------------------------------------------------------------------------------------


def test_a_history_with_merges_renames_and_branches_is_read_to_its_beginning(
    repo: Git, capsys: pytest.CaptureFixture[str]
) -> None:
    repo.commit(rows(a1="todo", a2="todo", a3="todo"), "the board", path="BOARD.md", ago_s=9 * HOUR)
    repo("checkout", "-q", "-b", "agent/bob")
    mine = repo.commit(
        rows(a1="in progress bob", a2="todo", a3="todo"), "claim: a1 (bob)", path="BOARD.md", ago_s=8 * HOUR
    )
    repo("checkout", "-q", "main")
    repo.commit("x", path="other", ago_s=7 * HOUR)
    repo("merge", "-q", "--no-ff", "agent/bob", "-m", "Merge", GIT_AUTHOR_DATE=f"{NOW_S - 6 * HOUR} +0000")
    (repo.folder / "docs").mkdir()
    repo("mv", "BOARD.md", BOARD)
    repo.commit(None, "move it", ago_s=5 * HOUR)
    done = repo.commit(rows(a1="done bob", a2="in progress eve", a3="todo"), "work", ago_s=3 * HOUR)
    repo("checkout", "-q", "-b", "agent/carol")
    repo.commit(None, "claim: a3 (carol)", ago_s=2 * HOUR)
    repo("checkout", "-q", "-b", "agent/dave", "main")
    repo.commit(None, "claim: a3 (dave)", ago_s=HOUR)
    repo("checkout", "-q", "main")

    code, found, _ = says(capsys, str(repo.folder))
    assert code == 0
    assert (found["board"], found["branch"], found["versions"], found["tasks"]) == (BOARD, "main", 4, 3)
    assert found["done"] == [{"task": "a1", "by": "bob", "commit": done}]
    assert [(one["task"], one["by"], one["age_s"] // HOUR) for one in found["claimed"]] == [
        ("a2", "eve", 3),
        ("a3", "dave", 1),
    ]
    (double,) = found["double_claims"]
    assert (double["task"], double["first"]["by"], double["second"]["by"]) == ("a3", "carol", "dave")
    board = board_of(repo)
    board.update()
    assert board.history.stories["a1"].events[1].commit == mine


def test_a_board_is_found_when_there_is_one_and_asked_for_when_there_are_more(
    repo: Git, capsys: pytest.CaptureFixture[str]
) -> None:
    repo.commit("- [ ] r1 a release checklist\n", path="RELEASE.md")
    assert says(capsys, str(repo.folder))[1]["board"] == "RELEASE.md"
    repo.commit(rows(a1="todo"))
    assert says(capsys, str(repo.folder))[1]["board"] == BOARD
    repo.commit("- [ ] t1 another\n", path="TODO.md")
    code, _, err = says(capsys, str(repo.folder))
    assert code == 2 and f"say --board with one of: TODO.md, {BOARD}" in err
    assert says(capsys, str(repo.folder / "docs"), "--board", "TASK-BOARD.md")[1]["tasks"] == 1
    code, _, err = says(capsys, str(repo.folder), "--board", "task-board.md")
    assert code == 2 and f"did you mean {BOARD}?" in err


@pytest.mark.parametrize(
    "name", ["-x.md", "two\nlines TASKS.md", ":(glob)*.md", "q\"uo'te$(touch x)TASKS.md", "ä TASKS.md"]
)
def test_a_hostile_file_name_is_a_file_name(repo: Git, name: str) -> None:
    repo.commit(rows(a1="todo"), path=name)
    repo.commit(rows(a1="done bob"), path=name)
    board = board_of(repo, board=name)
    board.update()
    assert board.history.versions == 2 and board.board().done == ("a1",)


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        ("nothing", [], "there are no commits here"),
        ("no repository", [], "not a git repository"),
        ("no folder", [], "there is no such folder"),
        ("no board", [], "there is no task board on main; say where it is with --board"),
        ("a board", ["--board", "nosuch.md"], "there is no such file on main"),
        ("a board", ["--board", "../elsewhere.md"], "not a file in"),
        ("a board", ["--board", "/etc/passwd"], "not in"),
        ("a board", ["--branch", "nosuch"], "there is no branch 'nosuch'; there are: main"),
        ("a board", ["--branch=--output=x"], "is no name of a branch"),
        ("a board", ["--keep-claims", "soon"], "say 90m, 24h or 2d"),
        ("a board", ["--push"], "--push only goes with --mirror"),
        ("a link", ["--board", BOARD], "a link or a submodule"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, prepare: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    if prepare == "no repository":
        folder.mkdir()
    elif prepare != "no folder":
        git = Git(folder)
        if prepare == "a board":
            git.commit(rows(a1="todo"))
        elif prepare == "no board":
            git.commit("prose\n", path="README.md")
        elif prepare == "a link":
            (folder / "docs").mkdir()
            (folder / BOARD).symlink_to("/etc/passwd")
            git("add", ".")
            git.commit(None)
    code, _, err = says(capsys, str(folder), *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_without_git_it_says_what_is_missing(
    repo: Git, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repo.commit(rows(a1="todo"))
    monkeypatch.setenv("PATH", str(repo.folder))
    assert main(["board", "import-git", str(repo.folder), "--dry-run"]) == 1
    assert "there is no git on this machine" in capsys.readouterr().err


def test_a_bad_row_is_named_by_its_line_and_nothing_is_imported(repo: Git, capsys: pytest.CaptureFixture[str]) -> None:
    repo.commit("- [ ] a1 One {priority: soon}\n- [ ] a1 Two\n")
    code, found, err = says(capsys, str(repo.folder))
    assert code == 2 and [line.split(": ")[0] for line in found["errors"]] == [f"{BOARD}:1"] * 1 + [f"{BOARD}:2"] * 1
    assert "nothing was imported" in err


def test_a_shallow_clone_says_so_and_a_claim_of_unknown_age_is_kept(repo: Git, tmp_path: Path, capsys: Any) -> None:
    repo.commit(rows(a1="in progress bob"), ago_s=9 * DAY)
    repo.commit("x", path="other")
    Git(tmp_path / "unused")("clone", "-q", "--depth", "1", f"file://{repo.folder}", str(tmp_path / "shallow"))
    code, found, _ = says(capsys, str(tmp_path / "shallow"))
    assert code == 0 and found["shallow"] and any("shallow" in note for note in found["notes"])
    assert [one["task"] for one in found["left_out"]] == ["a1"]
    assert not says(capsys, str(repo.folder))[1]["left_out"]


def test_bytes_that_are_not_utf8_and_commits_without_an_author_are_read(repo: Git) -> None:
    repo.commit(rows(a1="todo").encode() + b"| a2 | caf\xe9 \x1b[31m | todo | | |\r\n")
    tree, parent = repo("rev-parse", "HEAD^{tree}"), repo("rev-parse", "HEAD")
    blob = repo("hash-object", "-w", "--stdin", data=rows(a1="wip").encode() + b"| a2 | caf\xe9 | todo | | |\n")
    tree = repo("mktree", data=f"100644 blob {blob}\tTASK-BOARD.md\n".encode())
    tree = repo("mktree", data=f"040000 tree {tree}\tdocs\n".encode())
    raw = f"tree {tree}\nparent {parent}\nauthor  <> 0 +0000\ncommitter c <c> {NOW_S} +0000\n\nx\n"
    repo(
        "update-ref",
        "refs/heads/main",
        repo("hash-object", "-t", "commit", "-w", "--literally", "--stdin", data=raw.encode()),
    )
    board = board_of(repo)
    board.update()
    claim = board.history.stories["a1"].claim
    assert claim is not None and (claim.by, claim.at) == ("somebody", NOW_S)
    assert board.board().tasks[1].title == "caf\ufffd"


def test_a_board_of_ten_megabytes_is_read(repo: Git) -> None:
    prose = ("Prose that is no task, and a lot of it. " * 20 + "\n\n") * 12_500
    repo.commit(prose + rows(a1="todo"))
    repo.commit(prose + rows(a1="in progress bob"))
    board = board_of(repo, board=BOARD)
    board.update()
    assert len(board.text) > 10_000_000
    assert board.history.stories["a1"].holder == "bob"


def test_nothing_that_the_repository_brings_along_is_run(repo: Git, tmp_path: Path) -> None:
    script, ran = tmp_path / "evil", tmp_path / "ran"
    script.write_text(f"#!/bin/sh\ntouch {ran}\n")
    script.chmod(0o755)
    for hook in (
        "pre-commit",
        "post-commit",
        "reference-transaction",
        "post-checkout",
        "commit-msg",
        "post-index-change",
    ):
        shutil.copy(script, repo.folder / ".git/hooks" / hook)
        (repo.folder / ".git/hooks" / hook).chmod(0o644)
    repo.commit(rows(a1="todo"))
    (repo.folder / ".gitattributes").write_text("* filter=evil diff=evil\n")
    repo("add", ".gitattributes")
    repo.commit(rows(a1="in progress bob"))
    for hook in (repo.folder / ".git/hooks").iterdir():
        hook.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "diff.evil.textconv", "filter.evil.clean", "filter.evil.smudge",
                "filter.evil.process", "core.pager", "gpg.program", "core.sshCommand", "core.askPass"):  # fmt: skip
        repo("config", key, str(script))
    repo("config", "log.showSignature", "true")
    repo("config", "commit.gpgSign", "true")
    board = board_of(repo)
    board.update()
    new = board.repository.commit(board.tip, BOARD, board.mode, rows(a1="done").encode(), "m", ("a", "a@x"))
    board.repository.move("main", new, board.tip)
    assert repo.page() == rows(a1="done")
    assert not ran.exists()


# -- importing ---------------------------------------------------------------------------------------------------------


async def test_done_arrives_done_claimed_is_left_out_and_importing_twice_changes_nothing(
    fabric: World, repo: Git
) -> None:
    repo.commit(rows(a1="todo", a2="todo", a3="todo", a4="todo"), ago_s=9 * DAY)
    repo.commit(rows(a1="done bob", a2="in progress bob", a3="todo", a4="todo"), ago_s=5 * HOUR)
    repo.commit(
        rows(a1="done bob", a2="in progress bob", a3="todo", a4="todo") + "| a5 | Five | todo |  | a2 |\n", ago_s=HOUR
    )
    board = board_of(repo)
    first = await imported(fabric, board)
    assert {(one.event, one.task) for one in first} == {
        ("created", "a1"), ("created", "a3"), ("created", "a4"), ("left_out", "a2"), ("left_out", "a5"),
    }  # fmt: skip
    assert [await state(fabric, task) for task in ("a1", "a3", "a4")] == ["done", "pending", "pending"]
    reader = client(fabric, "reader")
    async with reader:
        before = await everything(reader)
        again = await imported(fabric, board_of(repo))
        assert {one.event for one in again} == {"left_out"}
        assert await everything(reader) == before
        # git goes on, and importing again brings that over
        repo.commit(rows(a1="done bob", a2="done bob", a3="done eve", a4="todo") + "| a5 | Five | todo |  | a2 |\n")
        later = await imported(fabric, board_of(repo))
        assert {(one.event, one.task) for one in later} == {("created", "a2"), ("created", "a5"), ("completed", "a3")}
        found = await reader.get("a3")
        assert found.state == "done" and found.result["git"]["by"] == "eve"
    assert await state(fabric, "a5") == "pending"


async def test_everything_comes_over_when_nobody_works_from_git_any_more(fabric: World, repo: Git) -> None:
    repo.commit(rows(a1="todo"), ago_s=HOUR)
    repo.commit(rows(a1="in progress bob"))
    assert [one.event for one in await imported(fabric, board_of(repo), keep_s=0)] == ["created"]
    assert await state(fabric, "a1") == "pending"


async def test_what_git_claims_after_its_import_is_told_as_a_danger(fabric: World, repo: Git) -> None:
    repo.commit(rows(a1="todo"))
    await imported(fabric, board_of(repo))
    repo.commit(rows(a1="in progress bob"))
    (danger,) = await imported(fabric, board_of(repo))
    assert danger.event == "conflict" and "claimed in git by bob after it was imported" in danger.says
    assert await state(fabric, "a1") == "pending"


async def test_a_task_with_needs_is_completed_and_the_importer_keeps_no_capability(fabric: World, repo: Git) -> None:
    text = "- [ ] a1 One {needs: rust, gpu}\n- [ ] a2 Two {needs: python}\n"
    repo.commit(text)
    await imported(fabric, board_of(repo))
    repo.commit(text.replace("[ ]", "[x]"))
    line = tap(fabric)
    async with client(fabric, "git-import", over=line) as connected:
        await Mirror(connected, board_of(repo), CLOCK, keep_s=DAY).round()
    assert await state(fabric, "a1") == await state(fabric, "a2") == "done"
    # a session that had them all the time would hide that nobody can take a task
    had = [body.get("capabilities", []) for body in line.bodies("hello")]
    assert had[-1] == [] and ["rust", "gpu"] in had and ["python"] in had


# -- both worlds -------------------------------------------------------------------------------------------------------


async def test_what_happens_in_the_fabric_is_written_into_the_rows_and_nowhere_else(fabric: World, repo: Git) -> None:
    text = "# Ours\r\n\r\n" + rows(a1="todo", a2="todo", a3="todo").replace("\n", "\r\n") + "\r\ncaf\xe9\r\n"
    repo.commit(text.encode("latin-1"))
    repo.commit("other", path="src/other.txt")
    repo("checkout", "-q", "-b", "mine")
    (repo.folder / "unsaved").write_text("work in progress")
    async with client(fabric, "git-mirror") as mirrors, client(fabric, "alice") as alice:
        mirror = Mirror(mirrors, board_of(repo, branch="main"), CLOCK, keep_s=DAY, holding=True, writing=True)
        await mirror.round()
        one, two = await alice.claim("a1"), await alice.claim("a2")
        await one.complete()
        written = (await mirror.round()).happened
        assert [(one.event, one.task) for one in written] == [("written", "a1"), ("written", "a2")]
        assert not (await mirror.round()).happened  # it knows its own commit
        data = subprocess.run(["git", "show", f"main:{BOARD}"], cwd=repo.folder, capture_output=True, check=True).stdout
        assert data.decode("latin-1") == (
            text.replace("| a1 | Do a1 | todo |  |", "| a1 | Do a1 | done | alice |")
            .replace("| a2 | Do a2 | todo |  |", "| a2 | Do a2 | in progress | alice |")
        )  # fmt: skip
        assert repo("log", "-1", "--format=%an <%ae> %cn", "main") == "alice <alice@ifabric.invalid> ifabric mirror"
        assert repo("log", "-1", "--format=%s", "main") == "board: a1 done by alice; a2 claimed by alice"
        assert repo("diff", "--name-only", "main~1", "main") == BOARD
        assert (repo("status", "--porcelain"), repo("rev-parse", "--abbrev-ref", "HEAD")) == ("?? unsaved", "mine")
        await two.release()
        await mirror.round()
        data = subprocess.run(["git", "show", f"main:{BOARD}"], cwd=repo.folder, capture_output=True, check=True).stdout
        assert b"| a2 | Do a2 | todo        |" in data


async def test_what_people_do_in_git_is_so_in_the_fabric(fabric: World, repo: Git) -> None:
    repo.commit(rows(a1="todo", a2="todo", a3="todo"))
    repo("checkout", "-q", "--detach")

    def on_main(text: str, message: str = "x") -> None:
        repo.commit(text, message)
        repo("update-ref", "refs/heads/main", "HEAD")

    async with client(fabric, "git-mirror") as mirrors:
        mirror = Mirror(mirrors, board_of(repo, branch="main"), CLOCK, keep_s=DAY, holding=True, writing=True)
        await mirror.round()
        on_main(rows(a1="in progress bob", a2="done eve", a3="todo"))
        happened = (await mirror.round()).happened
        assert {(one.event, one.task) for one in happened} == {("held", "a1"), ("completed", "a2")}
        taken = await fabric.refusal("claim", "alice", task="a1") if await fabric.ask("hello", "alice") else None
        assert taken is not None and taken.code == "claim_taken" and taken.facts["by"] == "git-mirror"
        on_main(rows(a1="todo", a2="done eve", a3="todo"))
        assert [(one.event, one.task) for one in (await mirror.round()).happened] == [("given_back", "a1")]
        on_main(rows(a1="in progress bob", a2="done eve", a3="todo"))
        await mirror.round()
        on_main(rows(a1="done bob", a2="done eve", a3="todo"))
        assert [(one.event, one.task) for one in (await mirror.round()).happened] == [("completed", "a1")]
    assert [await state(fabric, task) for task in ("a1", "a2", "a3")] == ["done", "done", "pending"]
    assert repo.page() == rows(a1="done bob", a2="done eve", a3="todo")  # nothing was written over it


async def test_the_fabric_decides_and_says_so(fabric: World, repo: Git) -> None:
    repo.commit(rows(a1="todo"))
    repo("checkout", "-q", "--detach")
    async with client(fabric, "git-mirror") as mirrors, client(fabric, "alice") as alice:
        mirror = Mirror(mirrors, board_of(repo, branch="main"), CLOCK, keep_s=DAY, holding=True, writing=True)
        await mirror.round()
        claim = await alice.claim("a1")
        repo.commit(rows(a1="in progress bob"), "claim: a1 (bob)")
        repo("update-ref", "refs/heads/main", "HEAD")
        happened = (await mirror.round()).happened
        assert [one.event for one in happened] == ["written", "conflict"]
        assert "git says claimed by bob" in happened[1].says and "the fabric says claimed by alice" in happened[1].says
        assert repo.page() == rows(a1="in progress alice")
        await claim.complete()


async def test_a_restarted_mirror_holds_what_it_held_and_takes_its_own_rows_for_no_claims(
    fabric: World, repo: Git
) -> None:
    repo.commit(rows(a1="todo", a2="todo"))
    repo("checkout", "-q", "--detach")

    async def life(connected: Client, rounds: int) -> None:
        connected.leave_on_exit = False
        async with connected:
            board = board_of(repo, branch="main")
            mirror = Mirror(connected, board, CLOCK, keep_s=DAY, holding=True, writing=True)
            for _ in range(rounds):
                await mirror.round()

    async with client(fabric, "alice") as alice:
        await life(client(fabric, "git-mirror"), 1)
        claim = await alice.claim("a2")
        repo.commit(rows(a1="in progress bob", a2="todo"))
        repo("update-ref", "refs/heads/main", "HEAD")
        await life(client(fabric, "git-mirror"), 2)
        assert repo.page() == rows(a1="in progress bob", a2="in progress alice")
        held = await fabric.ask("get", "op", task="a1")
        await claim.release()
        await life(client(fabric, "git-mirror"), 2)
        assert await fabric.ask("get", "op", task="a1") == held
        assert "| a2 | Do a2 | todo" in repo.page()
        assert await state(fabric, "a2") == "pending"


async def test_somebody_who_is_faster_loses_nothing(fabric: World, repo: Git, tmp_path: Path) -> None:
    repo.commit(rows(a1="todo"))
    repo("clone", "-q", "--bare", ".", str(tmp_path / "hub.git"))
    repo("remote", "add", "origin", str(tmp_path / "hub.git"))
    other = Git(tmp_path / "unused")
    other("clone", "-q", str(tmp_path / "hub.git"), str(tmp_path / "other"))
    other = Git(tmp_path / "other")
    board = board_of(repo, remote="origin")
    board.update()
    other.commit(rows(a1="todo") + "\nTheir words.\n")
    other("push", "-q", "origin", "main")
    with pytest.raises(Moved):
        board.commit(rows(a1="done").encode(), ["a1 done"], "alice")
    async with client(fabric, "git-mirror") as mirrors, client(fabric, "alice") as alice:
        mirror = Mirror(mirrors, board, CLOCK, keep_s=DAY, holding=True, writing=True)
        await mirror.round()
        async with await alice.claim("a1"):
            pass
        await mirror.round()
    other("pull", "-q", "--ff-only")
    assert other.page() == rows(a1="done alice") + "\nTheir words.\n"
    assert repo.page() == rows(a1="todo")  # the user's own branch and files are where they were
    assert repo("status", "--porcelain") == ""


def test_a_branch_that_is_checked_out_is_not_moved(repo: Git, capsys: pytest.CaptureFixture[str]) -> None:
    repo.commit(rows(a1="todo"))
    assert main(["board", "import-git", str(repo.folder), "--mirror"]) == 2
    assert "branch main is checked out in" in capsys.readouterr().err
    board = board_of(repo)
    board.update()
    with pytest.raises(GitError, match="checked out"):
        board.commit(b"x", ["x"], "alice")
    repo("checkout", "-q", "--detach")
    repo.commit(rows(a1="todo") + "\nTheir words.\n")
    repo("update-ref", "refs/heads/main", "HEAD")
    with pytest.raises(Moved):
        board.commit(b"x", ["x"], "alice")
    assert "Their words." in repo.page()
    repo("checkout", "-q", "main")
    repo.commit("tasks: [{id: a1}]\n", path="board.yaml")
    assert main(["board", "import-git", str(repo.folder), "--mirror", "--board", "board.yaml"]) == 2
    assert "--mirror writes Markdown boards" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no such folder"):
        Repository(repo.folder / "-x")


async def test_the_verb_imports_and_mirrors_until_it_is_ended(
    fabric: World, nats: RealServer, repo: Git, capsys: pytest.CaptureFixture[str]
) -> None:
    repo.commit(rows(a1="done bob", a2="todo"))
    repo("checkout", "-q", "--detach")
    words = ["board", "import-git", str(repo.folder), "--branch", "main", "--nats", nats.url]
    assert await asyncio.to_thread(main, [*words, "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["created"]) == ["a1", "a2"]
    assert await asyncio.to_thread(main, words) == 0
    assert "0 task(s) imported, 0 of them done; 2 there already; 0 left out" in capsys.readouterr().out
    async with asyncio.timeout(60):
        mirror = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ifabric", *words, "--mirror", "--every", "0.1", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert mirror.stdout is not None
        assert json.loads(await mirror.stdout.readline())["existing"] == 2
        async with client(fabric, "alice") as alice, await alice.claim("a2"):
            told = json.loads(await mirror.stdout.readline())
            assert (told["event"], told["task"]) == ("written", "a2")
        assert json.loads(await mirror.stdout.readline())["says"].startswith("done by alice, ")
        mirror.send_signal(signal.SIGTERM)
        _, err = await mirror.communicate()
        assert (mirror.returncode, err) == (0, b"")
    assert repo.page().splitlines()[-1].split("|")[3:5] == [" done        ", " alice "]
    await until_state(fabric, "a2", "done")
