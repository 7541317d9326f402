"""A board that lives in git: its page now, and its history so far; read again as the branch grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ifabric.board import Board, Format, format_of, read_board
from ifabric.board.githistory import MESSAGE_WORDS, History, Version, message_of
from ifabric.board.places import Change, Scanner, lines_of, rewrite, without_marks
from ifabric.board.repository import Blobs, Commit, GitError, Repository
from ifabric.board.rows import HOLDERS
from ifabric.errors import BadRequest, ConfigError

#: a page whose name says that it is a board
_NAMED = re.compile(r"task|board|todo|backlog|roadmap", re.IGNORECASE)
#: of pages whose names do not, so many are looked at
LOOKED_AT_MAX = 500
_READ_HERE = re.compile(rf"in progress on the board|the columns (?:{'|'.join(HOLDERS)}) of its table", re.IGNORECASE)
_FILES = ("100644", "100755")

#: told how many of how many versions have been read
Tick = Callable[[int, int], None]


class GitBoard:
    """One board file on one branch, of this repository or, with `remote`, of that one as it is fetched each time.

    `ConfigError` when there is no such file, or several that could be meant.
    """

    def __init__(self, repository: Repository, *, branch: str | None, board: str | None, remote: str | None) -> None:
        self.repository = repository
        self.remote = remote
        self.branch, tip = repository.branch(branch)
        if remote is not None:
            tip = repository.fetch(remote, self.branch)
        self.path = repository.path_of(board) if board is not None else _only_one(repository, tip, self.branch)
        self.kind: Format = format_of(Path(self.path)) or "md"
        self.history = History(self.kind)
        #: the commit that has been read; "" before the first
        self.tip = ""
        self.mode, self._data, self._heads = "", b"", b""
        self._board: Board | None = None
        #: commits that only said something, and were heard
        self._heard: set[str] = set()
        #: versions that could not be read: too large, or not there
        self.skipped = 0
        self.first: Version | None = None
        self.last: Version | None = None

    @property
    def text(self) -> str:
        """The page, with `U+FFFD` where it is not UTF-8."""
        return self._data.decode(errors="replace").removeprefix("\ufeff")

    def board(self) -> Board:
        """The tasks of the page. `BadRequest` names every bad row."""
        if self._board is None:
            text = without_marks(self.text) if self.kind == "md" else self.text
            board = read_board(text, format=self.kind, filename=self.path)
            # who has what is read here, by `history`
            notes = (note for note in board.notes if not _READ_HERE.search(note))
            self._board = board._replace(notes=tuple(notes))
        return self._board

    def update(self, tick: Tick | None = None) -> bool:
        """Reads what is new, and says whether anything was."""
        repository = self.repository
        if self.remote is not None:
            tip = repository.fetch(self.remote, self.branch)
        else:
            self.branch, tip = repository.branch(self.branch)
        heads = repository.heads()
        if (tip, heads) == (self.tip, self._heads):
            return False
        since = self.tip if self.tip and repository.is_ancestor(self.tip, tip) else ""
        blob, mode = repository.file(tip, self.path)
        if not blob and since:
            self.path = repository.renamed(since, tip, self.path) or self.path
            blob, mode = repository.file(tip, self.path)
        if not blob:
            raise ConfigError(f"{self.path}: there is no such file on {self.branch} at {tip[:10]}{_near(self, tip)}")
        if mode not in _FILES:
            raise ConfigError(f"{self.path}: a link or a submodule, and no file, on {self.branch} at {tip[:10]}")
        with repository.blobs() as blobs:
            data = blobs.get(blob)
            if data is None:
                raise ConfigError(f"{self.path}: its content is not in this clone, or is too large; nothing was read")
            if not since:
                self.history, self.skipped, self.first, self._heard = History(self.kind), 0, None, set()
            self._board = None
            self.tip = ""  # if this is interrupted, all is read again
            self._read(tip, since, blobs, tick)
        self.tip, self.mode, self._data, self._heads = tip, mode, data, heads
        return True

    def _read(self, tip: str, since: str, blobs: Blobs, tick: Tick | None) -> None:
        versions = self.repository.versions(tip, self.path, since)
        known = {one.commit for one in versions} | self._heard
        says = [one for one in self.repository.says(tip, MESSAGE_WORDS) if one.commit not in known]
        self._heard |= known | {one.commit for one in says}
        says.reverse()
        for number, one in enumerate(versions):
            while says and says[-1].at <= one.at:
                self.history.take(_version(says.pop()))
            data = b"" if not one.blob else blobs.get(one.blob) if one.mode in _FILES else None
            if data is None:
                self.skipped += 1
            version = _version(one, None if data is None else data.decode(errors="replace").removeprefix("\ufeff"))
            self.history.take(version)
            self.first, self.last = self.first or version, version
            if tick is not None:
                tick(number + 1, len(versions))
        for one in reversed(says):
            self.history.take(_version(one))

    def rewritten(self, changes: Iterable[Change]) -> tuple[bytes, dict[str, str]]:
        """The page with these changes, byte for byte as it was elsewhere, and why some were not made."""
        text, refused = rewrite(self._data.decode(errors="surrogateescape"), changes)
        return text.encode(errors="surrogateescape"), refused

    def differs(self, data: bytes) -> bool:
        """Whether a page is another than the one that is there."""
        return data != self._data

    def commit(self, data: bytes, lines: list[str], author: str) -> str:
        """Puts the page on the branch, here or at the remote. Raises `Moved` when somebody was faster, and `GitError`
        when the branch has been checked out here since.
        """
        if self.remote is None and (out_at := self.repository.checkouts(self.branch)):
            raise GitError(f"branch {self.branch} is checked out in {out_at[0]} by now; the rows were not written")
        who = (author, f"{author}@ifabric.invalid")
        new = self.repository.commit(self.tip, self.path, self.mode, data, message_of(lines), who)
        if self.remote is not None:
            self.repository.push(self.remote, self.branch, new)
        else:
            self.repository.move(self.branch, new, self.tip)
        return new


def _version(one: Commit, text: str | None = None) -> Version:
    return Version(one.commit, one.author, one.at, one.message, text)


def _only_one(repository: Repository, tip: str, branch: str) -> str:
    """The one file that is a board: of those that are called so, else of all Markdown pages."""
    files = [
        (path, blob)
        for path, blob, mode in repository.files(tip)
        if mode in _FILES and format_of(Path(path)) is not None
    ]
    named = [(path, blob) for path, blob in files if _NAMED.search(Path(path).name)]
    others = [(path, blob) for path, blob in files if format_of(Path(path)) == "md"][:LOOKED_AT_MAX]
    with repository.blobs() as blobs:
        for among in (named, others):
            boards = [path for path, blob in among if _is_board(path, blobs.get(blob))]
            if len(boards) == 1:
                return boards[0]
            if boards:
                shown = ", ".join(boards[:10]) + (f" and {len(boards) - 10} more" if len(boards) > 10 else "")
                raise ConfigError(f"there are {len(boards)} boards on {branch}; say --board with one of: {shown}")
    raise ConfigError(f"there is no task board on {branch}; say where it is with --board")


def _is_board(path: str, data: bytes | None) -> bool:
    if not data:
        return False
    text = data.decode(errors="replace").removeprefix("\ufeff")
    kind = format_of(Path(path))
    if kind == "md":
        return next(Scanner().scan(lines_of(text)), None) is not None
    try:
        return bool(read_board(text, format=kind or "md").tasks)
    except BadRequest:
        return False


def _near(board: GitBoard, tip: str) -> str:
    """Where the file may be."""
    name = Path(board.path).name
    found = [path for path, _, _ in board.repository.files(tip) if Path(path).name.lower() == name.lower()]
    return f"; did you mean {found[0]}?" if found else ""
