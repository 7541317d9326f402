"""One git repository, through the git program: the history of a file, its text, and commits that change nothing else.

**What is not trusted.** Names of files and branches, messages and authors come from anybody who may push. git is given
arguments, never a shell's line; paths come after `--`, as they are (`--literal-pathspecs`). No hook runs, no filter,
no external diff, no signature check, no system-wide configuration, and reading cannot reach the network, which a partial
clone otherwise does by itself. `push` and `fetch` are the user's own transport, with all of his configuration but the
hooks, and without a terminal to ask for a password.

**Nobody's checkout is touched.** A commit is made of objects: the new page as a blob, a tree that differs from the
parent's in that one entry (in an index of its own, in a folder that is thrown away), the commit; and then the branch
moves, if it is still where it was. That is less than a worktree: nothing is checked out, so no filter and no line end
conversion can change what was read.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from ifabric.errors import ConfigError, FabricError, StartupError

#: a page larger than this is not read
BYTES_MAX = 64 * 1024 * 1024
GIT_S = 600.0
#: our reference to what was fetched
FETCHED = "refs/ifabric/fetched"
MIRROR = ("ifabric mirror", "mirror@ifabric.invalid")
_QUIET = (
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "gc.auto=0",
    "-c",
    "maintenance.auto=false",
)
_PLAIN = (
    *("-c", "log.showSignature=false", "-c", "log.mailmap=false", "-c", "log.diffMerges=separate"),
    *("-c", "i18n.logOutputEncoding=UTF-8", "-c", "i18n.commitEncoding=UTF-8", "-c", "commit.gpgSign=false"),
    *("-c", "core.quotePath=false", "-c", "core.splitIndex=false", "-c", "core.alternateRefsCommand="),
)
#: of git's own variables, these are the user's ways to the network and to what he trusts; the others name other
#: repositories and other programs
_KEPT = ("GIT_SSH", "GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_CONFIG_GLOBAL", "GIT_EXEC_PATH", "GIT_SSL_CAINFO")
_FIELDS = "%H%x00%an%x00%at%x00%ct%x00%B%x00"


class GitError(FabricError):
    """git could not do it; nothing was changed."""


class Moved(GitError):
    """The branch has moved meanwhile; nothing was written."""


class Commit(NamedTuple):
    """A commit, and the file in it. `blob` is empty where the file was deleted, or not looked for."""

    commit: str
    author: str
    #: seconds since the epoch: the later of its two dates
    at: int
    message: str
    path: str = ""
    blob: str = ""
    mode: str = ""


class Repository:
    """A repository on this machine. `ConfigError` says why it is none that can be read."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("git")
        if program is None:
            raise StartupError(
                "there is no git on this machine; install git 2.30 or newer, or put it on PATH. Nothing was read."
            )
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder; give a repository on this machine (clone it first)")
        self._git = program
        self.folder = folder.absolute()
        try:
            said = self.read("rev-parse", "--absolute-git-dir", "--is-bare-repository", "--is-shallow-repository")
        except GitError as error:
            raise ConfigError(f"{folder}: not a git repository that can be read: {error.message}") from None
        lines = said.decode(errors="surrogateescape").split("\n")
        self.shallow = lines[-2] == "true"
        bare = lines[-3] == "true"
        self._prefix = "" if bare else self.read("rev-parse", "--show-prefix").decode(errors="surrogateescape")[:-1]

    # -- what there is -----------------------------------------------------------------------------------------------

    def branch(self, name: str | None) -> tuple[str, str]:
        """A branch's name and commit: the one that is checked out, unless another is named. `ConfigError`."""
        if name is not None and (name.startswith("-") or not name or "\0" in name):
            raise ConfigError(f"--branch {name!r} is no name of a branch")
        if name is None:
            head = self._one("symbolic-ref", "--quiet", "HEAD")
            name = head.removeprefix("refs/heads/") if head else "HEAD"
        for full in (f"refs/heads/{name}", f"refs/remotes/origin/{name}", name):
            commit = self.resolve(full)
            if commit:
                return name, commit
        if not self._one("rev-list", "--all", "--max-count=1"):
            raise ConfigError(f"{self.folder}: there are no commits here; nothing was read")
        heads = self.read("for-each-ref", "--format=%(refname:short)", "--count=20", "refs/heads", "refs/remotes")
        there = ", ".join(heads.decode(errors="replace").split())
        raise ConfigError(f"{self.folder}: there is no branch {name!r}; there are: {there}")

    def heads(self) -> bytes:
        """Where every branch is: what differs when anything has happened."""
        return self.read("for-each-ref", "--format=%(objectname) %(refname)", "refs/heads", "refs/remotes")

    def resolve(self, name: str) -> str:
        """The commit that a name stands for; "" for none."""
        return self._one("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")

    def path_of(self, board: str) -> str:
        """A file as git calls it: from the top of the repository. `ConfigError` when it is outside."""
        given = Path(board)
        if given.is_absolute():
            try:
                board = str(given.resolve().relative_to(self.folder.resolve()))
            except ValueError:
                raise ConfigError(f"--board {board}: not in {self.folder}") from None
        path = posixpath.normpath(self._prefix + board)
        if path.startswith("../") or path in ("..", "."):
            raise ConfigError(f"--board {board}: not a file in {self.folder}")
        return path

    def files(self, commit: str) -> list[tuple[str, str, str]]:
        """(path, blob, mode) of every file of a commit; links and submodules have modes of their own."""
        found = []
        for line in self.read("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0"):
            head, tab, path = line.partition(b"\t")
            if tab:
                mode, _, blob = head.decode().split(" ")
                found.append((os.fsdecode(path), blob, mode))
        return found

    def file(self, commit: str, path: str) -> tuple[str, str]:
        """(blob, mode) of one file of a commit; ("", "") when it is not there."""
        line, _, _ = self.read("ls-tree", "-z", "--full-tree", commit, "--", path).partition(b"\0")
        head, tab, found = line.partition(b"\t")
        if not tab or os.fsdecode(found) != path:
            return "", ""
        mode, _, blob = head.decode().split(" ")
        return blob, mode

    def is_ancestor(self, old: str, new: str) -> bool:
        """Whether the one is in the other's past."""
        return self._run(("merge-base", "--is-ancestor", old, new), check=False).returncode == 0

    def renamed(self, old: str, new: str, path: str) -> str:
        """What a file is called after the changes from one commit to another; "" when it is gone."""
        said = self.read(
            "diff-tree", "-r", "-M", "-z", "--no-ext-diff", "--diff-filter=R", "--name-status", old, new, "--"
        )
        words = [os.fsdecode(word) for word in said.split(b"\0")]
        return next((words[at + 1] for at in range(1, len(words) - 1, 3) if words[at] == path), "")

    def versions(self, commit: str, path: str, since: str = "") -> list[Commit]:
        """The commits that changed a file, oldest first, along first parents and through renames."""
        span = f"{since}..{commit}" if since else commit
        words = ("log", "--first-parent", "-m", "--follow", "-M", "--raw", "--no-abbrev", "-z", "--no-color")
        data = self.read(*words, "--no-ext-diff", "--no-textconv", f"--format={_FIELDS}", span, "--", path)
        found = []
        tokens = data.split(b"\0")
        at = 0
        while at + 5 < len(tokens):
            made, at = _commit(tokens[at : at + 5]), at + 6
            raw = tokens[at].strip() if at < len(tokens) else b""
            if not raw.startswith(b":"):
                continue
            _, mode, _, blob, what = raw[1:].decode().split(" ")
            at += 3 if what[0] in "RC" else 2
            found.append(made._replace(path=os.fsdecode(tokens[at - 1]), blob=blob.strip("0") and blob, mode=mode))
        return found[::-1]

    def says(self, commit: str, words: str) -> list[Commit]:
        """The commits of every branch, and before this one, whose message has one of the words; oldest first.

        `words` is an extended regular expression. Merges say only what others said before.
        """
        grep = ("log", "-E", "-i", "--no-merges", "--no-color", f"--grep={words}", f"--format=tformat:{_FIELDS}", "-z")
        tokens = self.read(*grep, commit, "--branches", "--remotes", "--").split(b"\0")
        found = [_commit(tokens[at : at + 5]) for at in range(0, len(tokens) - 5, 6)]
        found.reverse()
        return sorted(found, key=lambda one: one.at)

    def checkouts(self, branch: str) -> list[str]:
        """The folders where a branch is checked out."""
        found, folder = [], ""
        for line in self.read("worktree", "list", "--porcelain", "-z").split(b"\0"):
            if line.startswith(b"worktree "):
                folder = os.fsdecode(line[9:])
            elif line == b"branch refs/heads/" + os.fsencode(branch):
                found.append(folder)
        return found

    def blobs(self) -> Blobs:
        """Reads many contents through one process; a context manager."""
        return Blobs(self._command(("cat-file", "--batch"), _PLAIN), self._environment(offline=True))

    # -- what is written ---------------------------------------------------------------------------------------------

    def commit(self, parent: str, path: str, mode: str, data: bytes, message: str, author: tuple[str, str]) -> str:
        """A commit on `parent` that replaces one file; no branch has it yet."""
        with tempfile.TemporaryDirectory(prefix="ifabric-git-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            blob = self._one("hash-object", "-w", "--no-filters", "--stdin", data=data)
            self.read("read-tree", parent, more=index)
            entry = os.fsencode(f"{mode} {blob}\t{path}") + b"\0"
            self.read("update-index", "-z", "--index-info", data=entry, more=index)
            tree = self._one("write-tree", more=index)
        names = {f"GIT_{role}_{what}": value for role, who in (("AUTHOR", author), ("COMMITTER", MIRROR))
                 for what, value in zip(("NAME", "EMAIL"), who, strict=True)}  # fmt: skip
        return self._one("commit-tree", tree, "-p", parent, data=message.encode(), more=names)

    def move(self, branch: str, new: str, old: str) -> None:
        """Moves a branch, if it is where it was. `Moved` when it is not."""
        try:
            self.read("update-ref", "-m", "ifabric mirror", f"refs/heads/{branch}", new, old)
        except GitError as error:
            raise Moved(f"branch {branch} has moved: {error.message}") from None

    def fetch(self, remote: str, branch: str) -> str:
        """The commit at which a branch of another repository is. `GitError`."""
        words = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", "--refmap=")
        self._talk(*words, "--", remote, f"+refs/heads/{branch}:{FETCHED}")
        return self.resolve(FETCHED)

    def push(self, remote: str, branch: str, new: str) -> None:
        """Moves a branch of another repository forward. `Moved` when it is not in the new commit's past."""
        try:
            self._talk("push", "--quiet", "--no-verify", "--no-follow-tags", "--", remote, f"{new}:refs/heads/{branch}")
        except GitError as error:
            if any(
                word in error.message for word in ("non-fast-forward", "fetch first", "[rejected]", "cannot lock ref")
            ):
                raise Moved(f"{remote} has moved: {error.message}") from None
            raise

    # -- the program -------------------------------------------------------------------------------------------------

    def read(self, *words: str, data: bytes = b"", more: Mapping[str, str] | None = None) -> bytes:
        """What git says, without the network."""
        return self._run(words, data=data, more=more).stdout

    def _one(self, *words: str, data: bytes = b"", more: Mapping[str, str] | None = None) -> str:
        """The first line of it; "" when git fails quietly, as `--quiet` asks it to."""
        done = self._run(words, data=data, more=more, check="--quiet" not in words)
        return done.stdout.decode(errors="surrogateescape").partition("\n")[0]

    def _talk(self, *words: str) -> None:
        self._run(words, offline=False)

    def _run(
        self,
        words: tuple[str, ...],
        *,
        data: bytes = b"",
        more: Mapping[str, str] | None = None,
        check: bool = True,
        offline: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        command = self._command(words, _PLAIN if offline else ())
        environment = self._environment(offline=offline) | dict(more or {})
        try:
            done = subprocess.run(
                command,
                input=data,
                capture_output=True,
                env=environment,
                timeout=GIT_S,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise GitError(f"git {words[0]} has not ended within {GIT_S:.0f} s") from None
        except (OSError, ValueError) as error:
            raise GitError(f"git {words[0]} could not be run: {error}") from None
        if check and done.returncode != 0:
            why = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
            raise GitError(f"git {words[0]}: {why[:1000]}")
        return done

    def _command(self, words: tuple[str, ...], config: tuple[str, ...]) -> list[str]:
        return [self._git, "--literal-pathspecs", "--no-pager", "-C", str(self.folder), *_QUIET, *config, *words]

    @staticmethod
    def _environment(*, offline: bool) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _KEPT}
        kept |= {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}
        if offline:
            kept |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
        return kept


class Blobs:
    """One `git cat-file --batch`: a question, an answer."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(self._environment),
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None, "it was entered"
        with self._process as process:  # closes its pipes, and waits
            process.terminate()

    def get(self, blob: str) -> bytes | None:
        """The content; None when it is not there (a partial clone), is no file, or is larger than `BYTES_MAX`."""
        assert self._process is not None, "it was entered"
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None and answer is not None, "they are pipes"
        try:
            ask.write(blob.encode() + b"\n")
            ask.flush()
            words = answer.readline().split()
            if len(words) != 3:
                return None
            size = int(words[2])
            data = b"".join(_read(answer, size + 1))[:-1] if size <= BYTES_MAX else None
            if data is None:
                for _ in _read(answer, size + 1):
                    pass  # what follows is the next answer
        except (OSError, ValueError) as error:
            raise GitError(f"git cat-file has ended: {error}") from None
        return data if words[1] == b"blob" else None


def _read(pipe: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        part = pipe.read(min(size, 1 << 20))
        if not part:
            raise ValueError("its answer is too short")
        size -= len(part)
        yield part


def _commit(fields: list[bytes]) -> Commit:
    name, author, written, committed, message = (field.decode(errors="replace") for field in fields)
    dates = [int(date) for date in (written, committed) if date.strip().isdigit()]
    return Commit(name.strip(), author.strip() or "somebody", max(dates, default=0), message)
