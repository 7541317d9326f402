"""Carries out what `ifabric.board.gitmirror` decides: one round between a board in git and the fabric, and rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ifabric.board.gitboard import GitBoard, Tick
from ifabric.board.gitmirror import LeftOut, Plan, plan
from ifabric.board.places import Change
from ifabric.board.repository import GitError, Moved
from ifabric.cli.board import chunks_of
from ifabric.clock import Clock
from ifabric.errors import BadRequest, CallerError, ConfigError, ServerError, Unreachable
from ifabric.wire import coordinator as wire

if TYPE_CHECKING:
    from ifabric.claims import Claim
    from ifabric.client import Client

#: how long what a mirror holds stays held when the mirror is gone: a restart finds it again
TTL_S = 300

What = Literal["created", "completed", "held", "given_back", "written", "left_out", "conflict", "problem"]


class Happened(NamedTuple):
    """One line of what a round did, or could not do."""

    event: What
    task: str
    says: str


class Round(NamedTuple):
    """What one round came to."""

    plan: Plan
    created: tuple[str, ...]
    #: tasks that were there before
    existing: int
    happened: tuple[Happened, ...]


class Mirror:
    """Brings a board of git over, again and again. `holding` says whether what is claimed in git is claimed here, and
    `writing` whether rows are written back: a single import does neither.
    """

    def __init__(
        self,
        client: Client,
        board: GitBoard,
        clock: Clock,
        *,
        keep_s: int,
        holding: bool = False,
        writing: bool = False,
    ) -> None:
        self._client, self._board, self._clock = client, board, clock
        self._keep_s, self._holding, self._writing = keep_s, holding, writing
        self._told: set[Happened] = set()
        self._left_out: dict[str, str] = {}

    async def round(self, tick: Tick | None = None) -> Round:
        """One round. Raises what git or the fabric refuses as a whole; what they refuse of a task is told."""
        await asyncio.to_thread(self._board.update, tick)
        board = self._board.board()
        lines = await everything(self._client)
        now_s = self._clock.wall_ms() // 1000
        decided = plan(board, self._board.history, lines, now_s=now_s, keep_s=self._keep_s, ours=self._client.session)
        happened: list[Happened] = []
        created: list[str] = []
        for chunk in chunks_of(decided.submit) if decided.submit else ():
            done = [spec.id for spec in chunk if spec.id in decided.arrive]
            created += (await self._client.submit(chunk, done=done)).created
        happened += (Happened("created", task, "done" if task in decided.arrive else "pending") for task in created)
        await self._end(decided, lines, happened)
        for task in decided.hold:
            await self._hold(task, lines[task], happened)
        if self._writing and decided.write:
            await self._write(decided.write, happened)
        happened += (Happened("conflict", one.task, one.says) for one in decided.conflicts)
        happened += self._waiting(decided.left_out)
        return Round(
            decided, tuple(created), len(board.tasks) - len(created) - len(decided.left_out), self._new(happened)
        )

    async def run(self, every_s: float, tell: Callable[[Happened], None]) -> None:
        """Rounds for ever. What is away for a while is told once, and waited for."""
        while True:
            await self._clock.sleep(every_s)
            try:
                done = await self.round()
            except (ServerError, Unreachable, GitError, BadRequest, ConfigError) as error:
                for one in self._new([Happened("problem", "", error.message)]):
                    tell(one)
            else:
                self._told = {one for one in self._told if one.event != "problem" or one.task}
                for one in done.happened:
                    tell(one)

    def _new(self, happened: list[Happened]) -> tuple[Happened, ...]:
        """What has not been told: a contradiction that lasts is told once."""
        new = [one for one in happened if one.event not in ("conflict", "problem", "left_out") or one not in self._told]
        self._told.update(happened)
        return tuple(dict.fromkeys(new))

    def _waiting(self, left_out: tuple[LeftOut, ...]) -> list[Happened]:
        return [Happened("left_out", one.task, self._why(one)) for one in left_out]

    def _why(self, one: LeftOut) -> str:
        story = self._board.history.stories.get(one.because_of)
        claim = story.claim if story is not None else None
        whose = f"claimed by {claim.by} in {claim.commit[:10]}" if claim else "said to be done, but not on the board"
        return f"{whose}" if one.task == one.because_of else f"waits for {one.because_of}, {whose}"

    # -- the fabric ----------------------------------------------------------------------------------------------------

    async def _end(self, decided: Plan, lines: Mapping[str, wire.TaskLine], happened: list[Happened]) -> None:
        for task in decided.finish:
            story = self._board.history.stories.get(task)
            done = story.done if story is not None else None
            by, commit = (done.by, done.commit) if done is not None else ("", self._board.tip)

            async def complete(claim: Claim, by: str = by, commit: str = commit) -> Any:
                return await claim.complete({"git": {"by": by, "commit": commit}})

            if await self._with_claim(task, lines[task], happened, complete):
                happened.append(Happened("completed", task, f"done in git by {by or 'somebody'}, {commit[:10]}"))
        for task in decided.give_back:

            async def release(claim: Claim) -> Any:
                return await claim.release("nobody has it in git any more")

            if await self._with_claim(task, lines[task], happened, release):
                happened.append(Happened("given_back", task, "nobody has it in git any more"))

    async def _hold(self, task: str, line: wire.TaskLine, happened: list[Happened]) -> None:
        if task in self._client.claims:
            return
        story = self._board.history.stories[task]
        who = story.claim.by if story.claim is not None else "somebody who said it is done"
        if not self._holding:
            says = f"claimed in git by {who} after it was imported, and pending here: two may work on it; --mirror prevents that"
            happened.append(Happened("conflict", task, says))
        elif await self._with_claim(task, line, happened):
            happened.append(Happened("held", task, f"for {who}, who claimed it in git"))

    async def _with_claim(
        self,
        task: str,
        line: wire.TaskLine,
        happened: list[Happened],
        act: Callable[[Claim], Awaitable[Any]] | None = None,
    ) -> bool:
        """Does something with a claim, that we hold or can get; a refusal of this one task is told."""
        client = self._client
        try:
            claim = client.claims.get(task)
            if claim is None:
                # only for this moment: a session that has all capabilities would hide that nobody can take a task
                if line.needs:
                    await client.hello()
                    await client.ask(wire.Hello(capabilities=line.needs))
                claim = await client.claim(task)
                if line.needs:
                    await client.ask(wire.Hello())
            if act is not None:
                await act(claim)
        except (ServerError, Unreachable):
            raise
        except CallerError as refused:
            happened.append(Happened("problem", task, refused.message))
            return False
        return True

    # -- git -----------------------------------------------------------------------------------------------------------

    async def _write(self, changes: tuple[Change, ...], happened: list[Happened]) -> None:
        told = [await self._with_who(change) for change in changes]
        data, refused = await asyncio.to_thread(self._board.rewritten, told)
        happened += (
            Happened("problem", task, f"the board does not say what the fabric says: {why}")
            for task, why in refused.items()
        )
        made = [change for change in told if change.task not in refused]
        if not made or not self._board.differs(data):
            return
        sessions = {change.who for change in made}
        author = sessions.pop() if len(sessions) == 1 else ""
        try:
            commit = await asyncio.to_thread(
                self._board.commit, data, [line_of(one) for one in made], author or "ifabric"
            )
        except Moved:
            return  # somebody was faster; the next round reads what he wrote, and comes back to it
        happened += (Happened("written", change.task, f"{_said(change)}, {commit[:10]}") for change in made)

    async def _with_who(self, change: Change) -> Change:
        """Who did what is done: the fabric's history knows."""
        if change.status != "done":
            return change
        history = (await self._client.get(change.task)).history
        return change._replace(who=next((line.session for line in reversed(history) if line.event == "completed"), ""))


def line_of(change: Change) -> str:
    """A change as the commit's message says it."""
    return f"{change.task} {_said(change)}"


def _said(change: Change) -> str:
    said = {"started": "claimed", "done": "done", "open": "open", "blocked": "blocked"}[change.status]
    return said + (f" by {change.who}" if change.who else "")


async def everything(client: Client) -> dict[str, wire.TaskLine]:
    """Every task of the fabric, by its id."""
    lines: dict[str, wire.TaskLine] = {}
    after: str | None = None
    while True:
        page = await client.list(limit=wire.LIST_MAX_TASKS, after=after)
        lines |= {line.task: line for line in page.tasks}
        after = page.after
        if after is None:
            return lines
