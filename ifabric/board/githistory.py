"""What the history of a board in git says: who claimed what and when, what got done, and what two took at once.

Pure: versions of the page in, the tasks' stories out. Nothing here runs git.

**How agents claim over git** is a matter of habit, and these are read, the first that names somebody first:

| where | for example |
|---|---|
| a column | `Claimed by`, `Holder`, `Session`, `Agent`; `Owner`, `Assignee` where the status says that it was begun |
| the status | `in progress: alice`, `🟡 In Progress (bob)`, `claimed by session-3` |
| the item | `- [ ] P0.1 Build it (claimed by alice)`, `- [~] P0.1 Build it` |
| a commit's message, on any branch | `claim: P0.1.2 (session-3)`, `session-3: claim P0.1.2`, `claim P0.1, P0.2 for bob` |
| the commit itself | its author, when nothing else says who |

A claim ends when the row says done or open again, when the row goes, or by `release: P0.1.2 (session-3)`. A message
that says `done: P0.1.2` ends nothing: what is done is decided by the page, which people read, and work that is done
but not yet merged must not be begun by somebody else.

**Two at once.** A second name on a task that nobody had given back is a double claim, told with both commits. A name
that the first one's author gave later to what he had claimed without one is none.

**A claim's age** counts from the later of the commit's two dates: a rebase, or a clock that is slow, must not make a
claim look abandoned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import yaml

from ifabric.board.places import Scanner, lines_of
from ifabric.board.rows import HOLDERS, Status, status_of

What = Literal["created", "claimed", "released", "done", "reopened", "removed"]

#: of a task's story, so many of the last events are kept
EVENTS_MAX = 50
DOUBLES_MAX = 10_000
#: of a commit's message, so much is read
MESSAGE_LINES_MAX, MESSAGE_LINE_MAX = 200, 500
SUBJECT_MAX = 72
#: at the end of the messages of our own commits: what they say is the fabric's word, and no claim made in git
TRAILER = "Ifabric-Mirror"

_VERBS: tuple[tuple[Literal["claim", "release", "done"], str], ...] = (
    ("release", r"releas(?:e|es|ed|ing)|unclaim(?:s|ed)?|abandon(?:s|ed)?|giv(?:e|es|ing) back"),
    ("claim", r"claim(?:s|ed|ing)?|tak(?:e|es|en|ing)|start(?:s|ed|ing)?|wip"),
    ("done", r"done|complet(?:e|es|ed)|finish(?:es|ed)?|clos(?:e|es|ed)"),
)
#: what git may look for, so that only commits that may say something are read
MESSAGE_WORDS = "claim|releas|abandon|giv(e|es|ing) back|tak(e|es|en|ing)|start|wip|done|complet|finish|clos"
_NAME = r"[A-Za-z0-9][\w.@/+-]{0,63}"
_SAYS = re.compile(
    rf"(?:[-*+]\s+)?(?:\[?(?P<before>{_NAME})\]?(?:\([^()]*\))?(?::\s*|\s+(?=\w+(?:s|ed)\b)))?\[?(?:"
    + "|".join(f"(?P<{name}>{verb})" for name, verb in _VERBS)
    + r")\]?(?:\s+(?:task|tasks))?\s*(?P<colon>:?)\s+(?P<rest>\S.*)",
    re.IGNORECASE,
)
_WHO = re.compile(rf"\((?:by\s+|for\s+)?@?({_NAME})\)|\b(?:by|for|as)\s+@?({_NAME})|(?:^|\s)@({_NAME})", re.IGNORECASE)
_ID = re.compile(r"(?=.*[A-Za-z])(?:\S*[0-9_-]\S*)")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@#+-]*")
#: what stands before the colon of a commit that is tagged by its kind, and is nobody
_KINDS = (
    "chore", "board", "task", "tasks", "docs", "doc", "feat", "fix", "build", "ci", "style", "refactor", "test", "wip",
    "status", "update", "coord", "merge", "git", "revert",
)  # fmt: skip
_ECHO = re.compile(r"^(\S+) claimed by (\S+)$", re.MULTILINE)
_MIRRORED = re.compile(rf"^{TRAILER}:", re.MULTILINE)


class Version(NamedTuple):
    """A commit, and the page in it; `text` is None when it only says something."""

    commit: str
    author: str
    #: seconds since the epoch
    at: int
    message: str
    text: str | None = None


class Claim(NamedTuple):
    """Who took a task, when and by which commit."""

    by: str
    at: int
    commit: str
    author: str
    #: whether `by` was said, and is not just the commit's author
    named: bool
    #: the fabric's own word, written back by a mirror
    mirrored: bool


class Event(NamedTuple):
    """One thing that happened to a task."""

    what: What
    at: int
    commit: str
    by: str
    mirrored: bool = False


class Double(NamedTuple):
    """Two that had one task at once."""

    task: str
    first: Claim
    second: Claim


class Said(NamedTuple):
    """What a line of a commit's message says about tasks."""

    what: Literal["claim", "release", "done"]
    words: tuple[str, ...]
    who: str


@dataclass
class Story:
    """A task, as far as the history has been read."""

    status: Status = "open"
    holder: str = ""
    there: bool = False
    claim: Claim | None = None
    done: Event | None = None
    #: a message that says it is done, while the page does not
    said_done: Event | None = None
    events: list[Event] = field(default_factory=list)


def message_of(lines: list[str]) -> str:
    """The message of a commit that writes the fabric's word back: such lines as `P0.1 claimed by alice`."""
    subject = f"board: {'; '.join(lines)}"
    if len(subject) > SUBJECT_MAX:
        subject = f"board: {len(lines)} change(s)"
    return "\n".join([subject, "", *lines, "", f"{TRAILER}: what the fabric says", ""])


class History:
    """Takes versions, oldest first, and knows each task's story. `kind` is the board's format."""

    def __init__(self, kind: Literal["md", "yaml", "json"] = "md") -> None:
        self._kind = kind
        self._scanner = Scanner()
        self.stories: dict[str, Story] = {}
        self.doubles: list[Double] = []
        self.versions = 0
        self._last: str | None = None
        #: (task, session) as mirrors wrote them: whoever merges such a row has not claimed it
        self._echoes: set[tuple[str, str]] = set()

    def take(self, version: Version) -> None:
        """The next version, or a commit that only says something."""
        said: dict[str, Said] = {}
        mirrored = bool(_MIRRORED.search(version.message))
        if mirrored:
            self._echoes.update(_ECHO.findall(version.message))
        for line in () if mirrored else said_in(version.message):
            said |= dict.fromkeys(line.words, line)
        if version.text is not None:
            self.versions += 1
            if version.text != self._last:
                self._last = version.text
                self._page(version, said, mirrored=mirrored)
        for task, line in said.items():
            story = self.stories.get(task)
            if story is not None:
                self._told(task, story, line, version)

    def doubles_of(self, task: str) -> list[Double]:
        """Those of one task."""
        return [double for double in self.doubles if double.task == task]

    def _page(self, version: Version, said: Mapping[str, Said], *, mirrored: bool) -> None:
        assert version.text is not None, "it was looked at"
        seen: set[str] = set()
        for task, status, holder in states_of(version.text, self._kind, self._scanner):
            if task in seen:
                continue  # a page with a task twice is one that nobody should believe
            seen.add(task)
            story = self.stories.setdefault(task, Story())
            if not story.there:
                story.there = True
                _log(story, Event("created", version.at, version.commit, version.author, mirrored))
            if (status, holder) != (story.status, story.holder):
                self._changed(task, story, status, holder, version, said.get(task), mirrored=mirrored)
        for task, story in self.stories.items():
            if story.there and task not in seen:
                story.there, story.status, story.holder, story.claim = False, "open", "", None
                _log(story, Event("removed", version.at, version.commit, version.author, mirrored))

    def _changed(
        self,
        task: str,
        story: Story,
        status: Status,
        holder: str,
        version: Version,
        said: Said | None,
        *,
        mirrored: bool,
    ) -> None:
        before, story.status = story.status, status
        renamed, story.holder = holder != story.holder, holder
        who = holder or (said.who if said else "")
        if status == "started":
            catches_up = story.claim is not None and not who  # a page that follows a message says nothing new
            if (before != "started" or (renamed and holder)) and not catches_up:
                self._claimed(task, story, who, version, mirrored=mirrored)
        elif status == "done":
            if before != "done":
                by = who or (story.claim.by if story.claim else "") or version.author
                story.done = Event("done", version.at, version.commit, by, mirrored)
                story.claim = story.said_done = None
                _log(story, story.done)
        elif before in ("started", "done"):
            story.claim = story.done = story.said_done = None
            what: What = "released" if before == "started" else "reopened"
            _log(story, Event(what, version.at, version.commit, who or version.author, mirrored))

    def _claimed(self, task: str, story: Story, who: str, version: Version, *, mirrored: bool) -> None:
        mirrored = mirrored or (task, who) in self._echoes
        claim = Claim(
            who or version.author, version.at, version.commit, version.author, named=bool(who), mirrored=mirrored
        )
        held, story.claim = story.claim, claim
        story.done = None
        if held is None or held.by.casefold() == claim.by.casefold():
            # said again: it is as old as it was, unless it was ours and is now somebody's
            story.claim = (
                claim if held is None or held.mirrored != mirrored else held._replace(named=held.named or claim.named)
            )
        elif held.author == claim.author and not (held.named and claim.named):
            story.claim = claim._replace(at=held.at, commit=held.commit)
        elif len(self.doubles) < DOUBLES_MAX:
            self.doubles.append(Double(task, held, claim))
        if story.claim.commit == version.commit:
            _log(story, Event("claimed", version.at, version.commit, claim.by, mirrored))

    def _told(self, task: str, story: Story, said: Said, version: Version) -> None:
        if story.status == "done":
            return  # the page has said more
        if said.what == "claim":
            if story.claim is None or story.claim.commit != version.commit:
                self._claimed(task, story, said.who, version, mirrored=False)
        elif said.what == "done":
            story.said_done = Event("done", version.at, version.commit, said.who or version.author)
        elif story.claim is not None and story.status != "started":
            story.claim = None
            _log(story, Event("released", version.at, version.commit, said.who or version.author))


def _log(story: Story, event: Event) -> None:
    story.events.append(event)
    del story.events[:-EVENTS_MAX]


def said_in(message: str) -> Iterator[Said]:
    """What a commit's message says about tasks, line by line. Words are ids only if there are such tasks."""
    for line in message.splitlines()[:MESSAGE_LINES_MAX]:
        says = _SAYS.match(line[:MESSAGE_LINE_MAX].strip())
        if says is None:
            continue
        rest = says["rest"]
        who = _WHO.search(rest)
        before = says["before"] or ""
        named = next(filter(None, who.groups())) if who else "" if before.lower() in _KINDS else before
        what = next(name for name, _ in _VERBS if says[name])
        words = (word.rstrip(".:,") for word in _WORD.findall(rest[: who.start()] if who else rest))
        # "start the engine" is no claim of a task called engine, and "close 3 holes" none of task 3
        ids = tuple(word for word in words if says["colon"] or _ID.fullmatch(word))
        if ids:
            yield Said(what, ids, named.rstrip(".,"))


def states_of(text: str, kind: str, scanner: Scanner) -> Iterator[tuple[str, Status, str]]:
    """The id, state and holder of each task of a page. What cannot be read has none: the past is as it is."""
    if kind == "md":
        for _, place in scanner.scan(lines_of(text)):
            yield place.task, place.status, place.holder
        return
    for task in _documents(text, kind):
        keys = {str(key).lower().replace("_", " "): value for key, value in task.items()}
        name, word = keys.get("id"), str(keys.get("status") or "")
        holder = next((str(keys[key]) for key in HOLDERS if keys.get(key)), "").lstrip("@")[:64]
        done = str(keys.get("done")).lower() == "true"
        status = "done" if done else status_of(word) or "open"
        if status == "open" and holder and "status" not in keys:
            status = "started"
        if isinstance(name, str | int):
            yield str(name), status, holder


def _documents(text: str, kind: str) -> list[dict[Any, Any]]:
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # an id is what is written: 1.10 is not 1.1
    try:
        data = json.loads(text, parse_float=str) if kind == "json" else yaml.load(text, Loader=loader)  # noqa: S506  # strings only
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    if isinstance(data, dict):
        data = data.get("tasks")
    return [task for task in data if isinstance(task, dict)] if isinstance(data, list) else []
