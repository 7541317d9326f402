"""`ifabric board import-git`: bring a board over from git, and keep both in step while both are used."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.connect import client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import err, out, plain, print_json, print_json_line, print_table
from ifabric.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from ifabric.board.gitboard import GitBoard
    from ifabric.board.githistory import Claim
    from ifabric.board.gitmirror import Plan
    from ifabric.cli.mirroring import Happened, Round

_AGE = re.compile(r"([0-9]{1,6})\s*([smhd])", re.IGNORECASE)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SHOWN_MAX = 50
NAME_MAX = 60


def import_git(
    repository: Annotated[Path, Parameter(allow_leading_hyphen=True, help="A git repository on this machine.")],
    *,
    board: Annotated[str | None, Parameter(help="The board's file. Default: the only one there is.")] = None,
    branch: Annotated[str | None, Parameter(help="Default: the one that is checked out.")] = None,
    keep_claims: Annotated[
        str, Parameter(help="Leave out what was claimed in git less than this ago: 90m, 24h, 2d; 0 leaves out nothing.")
    ] = "24h",
    dry_run: Annotated[bool, Parameter(help="Read the history, and send nothing.")] = False,
    mirror: Annotated[bool, Parameter(help="Keep both in step until Ctrl-C: claims and ends go both ways.")] = False,
    every: Annotated[
        float, Parameter(help="Seconds between two looks, with --mirror.", validator=Number(gte=0.1, lte=3600))
    ] = 5.0,
    push: Annotated[bool, Parameter(help="With --mirror: work on the remote's branch, by fetch and push.")] = False,
    remote: Annotated[str, Parameter(help="The remote, with --push.")] = "origin",
    session: Annotated[
        str | None, Parameter(name=["--session", "-s"], env_var="IFABRIC_SESSION", help="Who imports.")
    ] = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Import a task board from the git repository in which agents claimed tasks by
    commits.

    Read is every version of the board and every message that claims a task, on
    any branch: what is done, by whom and in which commit; who has what now, and
    since when; and what two had at once. What is done arrives done. Doing it
    again changes nothing, and brings over what has happened in git since.

    What somebody claimed in git within the last 24 hours is left out, with what
    depends on it, until git is done with it: the fabric cannot give to a second
    agent what it does not have. When nobody works from git any more, bring over
    everything with --keep-claims 0.

    With --mirror both are used side by side. What happens in the fabric is
    written into the board's rows, a commit a round, and what is claimed or done
    in git is so in the fabric; where they contradict each other, the fabric
    decides and it is told. Rows change in their state and their holder and in
    nothing else. Nobody's checkout is touched: the branch must not be checked
    out anywhere, or --push works on the remote's.

    For example:

        ifabric board import-git . --dry-run
        ifabric board import-git ~/project --board docs/TASK-BOARD.md --branch main
        ifabric board import-git . --mirror --push --every 10
    """
    from ifabric.board.gitboard import GitBoard
    from ifabric.board.repository import Repository

    keep_s = _age(keep_claims)
    if dry_run and mirror:
        raise ConfigError("--dry-run and --mirror exclude each other: a mirror writes")
    if push and not mirror:
        raise ConfigError("--push only goes with --mirror")
    git = GitBoard(Repository(repository), branch=branch, board=board, remote=remote if push else None)
    if mirror:
        _refuse_unwritable(git)
    try:
        if dry_run:
            return _rehearse(git, keep_s, json=json)
        return _import(git, keep_s, where, session, every if mirror else None, json=json)
    except BadRequest as refusal:
        if "\n" not in refusal.message and not refusal.message.startswith(f"{git.path}:"):
            raise
        problems = refusal.message.split("\n")
        if json:
            print_json({"ok": False, "errors": problems})
        for problem in problems:
            err.print(f"[red]✘[/] {plain(problem)}")
        err.print("nothing was imported")
        return 2


def _age(text: str) -> int:
    """Seconds."""
    found = _AGE.fullmatch(text.strip())
    if found is None and text.strip() != "0":
        raise ConfigError(f"--keep-claims {text!r}: say 90m, 24h or 2d, or 0")
    return int(found[1]) * _UNITS[found[2].lower()] if found else 0


def _refuse_unwritable(git: GitBoard) -> None:
    if git.kind != "md":
        raise ConfigError(
            f"{git.path}: --mirror writes Markdown boards; this one can be imported again and again without"
        )
    if git.remote is None:
        if not git.repository.resolve(f"refs/heads/{git.branch}"):
            raise ConfigError(f"--mirror needs a branch to write to, and {git.branch} is none of this repository")
        out_at = git.repository.checkouts(git.branch)
        if out_at:
            raise ConfigError(
                f"branch {git.branch} is checked out in {out_at[0]}, and a mirror would move it under somebody's hands. "
                "Work on the remote's with --push, or give a bare repository, or another --branch."
            )


# -- importing ---------------------------------------------------------------------------------------------------------


def _rehearse(git: GitBoard, keep_s: int, *, json: bool) -> int:
    """What an import into an empty fabric would do."""
    from ifabric.board.gitmirror import plan
    from ifabric.clock import SystemClock

    with _Bar(json=json) as bar:
        git.update(bar)
    now_s = SystemClock().wall_ms() // 1000
    decided = plan(git.board(), git.history, {}, now_s=now_s, keep_s=keep_s, ours="")
    told = _report(git, decided, now_s, json=json) | {"dry_run": True}
    if json:
        print_json(told)
    else:
        arrive = len(decided.arrive)
        out.print(f"[green]✔[/] {len(decided.submit)} task(s) would be imported, {arrive} of them done")
    return 0


def _import(
    git: GitBoard, keep_s: int, where: Where | None, session: str | None, every_s: float | None, *, json: bool
) -> int:
    from ifabric.cli.mirroring import TTL_S, Mirror
    from ifabric.clock import SystemClock

    clock = SystemClock()
    mirroring = every_s is not None

    async def run() -> None:
        if mirroring:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _cancel, asyncio.current_task())
        name = session or ("git-mirror" if mirroring else "git-import")
        async with client(where, name, ttl_s=TTL_S) as connected:
            connected.leave_on_exit = not mirroring  # what a mirror holds outlives a restart
            mirror = Mirror(connected, git, clock, keep_s=keep_s, holding=mirroring, writing=mirroring)
            with _Bar(json=json) as bar:
                first = await mirror.round(bar)
            _say_import(git, first, clock.wall_ms() // 1000, json=json, line=mirroring)
            if every_s is not None:
                await mirror.run(every_s, lambda one: _tell(one, json=json))

    # a mirror is ended, and an import is interrupted
    with contextlib.suppress(*((KeyboardInterrupt, asyncio.CancelledError) if mirroring else ())):
        asyncio.run(run())
    return 0


def _cancel(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()


class _Bar:
    """The progress of reading versions, on a terminal."""

    def __init__(self, *, json: bool) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=err, transient=True, disable=json or not err.is_terminal)
        self._bar = self._progress.add_task("reading versions", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, read: int, of: int) -> None:
        self._progress.update(self._bar, completed=read, total=of)


# -- telling -----------------------------------------------------------------------------------------------------------


def _say_import(git: GitBoard, done: Round, now_s: int, *, json: bool, line: bool) -> None:
    told = _report(git, done.plan, now_s, json=json)
    if json:
        more = {
            "created": list(done.created),
            "existing": done.existing,
            "happened": [one._asdict() for one in done.happened if one.event not in ("created", "left_out")],
        }
        (print_json_line if line else print_json)(told | more)
        return
    for one in done.happened:
        if one.event not in ("created", "left_out"):
            _tell(one, json=False)
    arrived = sum(task in done.plan.arrive for task in done.created)
    out.print(
        f"[green]✔[/] {len(done.created)} task(s) imported, {arrived} of them done; {done.existing} there already; "
        f"{len(done.plan.left_out)} left out"
    )


def _report(git: GitBoard, decided: Plan, now_s: int, *, json: bool) -> dict[str, Any]:
    """What the history says, printed for people, or to be printed as JSON."""
    stories, board, history = git.history.stories, git.board(), git.history
    done = [(task, stories[task].done if task in stories else None) for task in board.done]
    claims = [(spec.id, story.claim) for spec in board.tasks if (story := stories.get(spec.id)) and story.claim]
    claims = [(task, claim) for task, claim in claims if not claim.mirrored]
    out_because = {one.task: one.because_of for one in decided.left_out}
    said = [
        (spec.id, stories[spec.id].said_done)
        for spec in board.tasks
        if spec.id in stories and stories[spec.id].said_done
    ]
    notes = list(board.notes)
    if git.repository.shallow:
        notes.append("the clone is shallow: what was claimed and done before its first commit looks as if done there")
    if git.skipped:
        notes.append(
            f"{git.skipped} version(s) of the board could not be read: a link, too large, or not in this clone"
        )
    notes += [
        f"{task} is said to be done in {event.commit[:10]} by {event.by}, and is not on the board"
        for task, event in said
        if event is not None
    ]
    if json:
        return {
            "ok": True,
            "board": git.path,
            "branch": git.branch,
            "commit": git.tip,
            "versions": history.versions,
            "shallow": git.repository.shallow,
            "tasks": len(board.tasks),
            "done": [
                {"task": task, "by": event.by if event else "", "commit": event.commit if event else ""}
                for task, event in done
            ],
            "claimed": [_claim(task, claim, now_s) | {"left_out": task in out_because} for task, claim in claims],
            "left_out": [one._asdict() for one in decided.left_out],
            "double_claims": [
                {
                    "task": one.task,
                    "first": _claim(one.task, one.first, now_s),
                    "second": _claim(one.task, one.second, now_s),
                }
                for one in history.doubles
            ],
            "notes": notes,
        }
    _say_history(git, len(board.tasks), len(done), claims, out_because, now_s)
    for note in notes[:SHOWN_MAX]:
        err.print(f"[dim]{plain(note)}[/]")
    return {}


def _claim(task: str, claim: Claim, now_s: int) -> dict[str, Any]:
    return {"task": task, "by": claim.by, "commit": claim.commit, "age_s": max(0, now_s - claim.at)}


def _say_history(
    git: GitBoard, tasks: int, done: int, claims: list[tuple[str, Claim]], left_out: dict[str, str], now_s: int
) -> None:
    doubles = git.history.doubles
    out.print(
        f"[bold]{plain(git.path)}[/] on {plain(git.branch)} at {git.tip[:10]}: {git.history.versions} version(s), {tasks} task(s), "
        f"{done} done, {len(claims)} claimed in git"
    )
    if claims:
        rows = [
            (
                task,
                _name(claim.by),
                _ago(now_s - claim.at),
                claim.commit[:10],
                "left out" if task in left_out else "comes over",
            )
            for task, claim in claims[:SHOWN_MAX]
        ]
        print_table(("TASK", "CLAIMED BY", "AGO", "IN COMMIT", ""), rows)
        if len(claims) > SHOWN_MAX:
            out.print(f"[dim]and {len(claims) - SHOWN_MAX} more (--json has them all)[/]")
    waiting = [task for task, because in left_out.items() if task != because]
    if waiting:
        shown = ", ".join(waiting[:10]) + (" ..." if len(waiting) > 10 else "")
        out.print(f"left out with them, for they depend on them: {plain(shown)}")
    if doubles:
        out.print(f"[yellow]{len(doubles)} time(s) two had the same task:[/]")
        twice = [
            (
                one.task,
                f"{_name(one.first.by)} in {one.first.commit[:10]}",
                f"{_name(one.second.by)} in {one.second.commit[:10]}",
                _ago(one.second.at - one.first.at),
            )
            for one in doubles[-SHOWN_MAX:]
        ]
        print_table(("TASK", "FIRST", "THEN", "LATER BY"), twice)


def _name(text: str) -> str:
    return text if len(text) <= NAME_MAX else text[: NAME_MAX - 3] + "..."


def _ago(seconds: int) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{max(0, seconds)} s"


_STYLE = {"conflict": "yellow", "problem": "red", "completed": "green", "written": "cyan", "held": "magenta"}


def _tell(one: Happened, *, json: bool) -> None:
    if json:
        print_json_line(one._asdict())
    else:
        style = _STYLE.get(one.event, "white")
        out.print(f"[{style}]{one.event.replace('_', ' '):<10}[/] [bold]{plain(one.task)}[/] {plain(one.says)}")
