"""Where lines go: stderr, stdout, or a file that may be moved away at any time.

**A file.** A line is one `write` at the end of the file, so that lines of several writers are never mixed. The file is
opened again when asked (SIGHUP), and by itself when its name leads to another file or to none, which is looked at once
a second at most: `logrotate` needs neither `copytruncate` nor a signal. Until then lines go to the file that was moved
away, so none is lost. When it cannot be opened again, the old one stays in use and the reason is told.

**The journal.** When stderr is journald's, each line begins with its priority, `<4>`, for `journalctl -p warning`
(sd-daemon(3)); the priority of systemd's own is a default for the whole unit.

**Nothing here fails.** A full disk or a closed pipe takes the log away, not the daemon; what could not be written is
counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from ifabric.clock import monotonic
from ifabric.errors import ConfigError

#: how often it is looked at whether the file was moved away
LOOK_S = 1.0
#: who may read a log beside its owner: its group
MODE = 0o640
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "warn": 4, "error": 3, "exception": 3, "critical": 2}


class Output(Protocol):
    """What lines are written to. `lost` counts those that were not, `trouble` is why they go elsewhere than they should."""

    lost: int
    trouble: str | None

    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...

    def reopen(self) -> str | None: ...

    def isatty(self) -> bool: ...


class Stream:
    """stderr or stdout."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = 0
        self.trouble: str | None = None

    def write(self, text: str) -> None:
        """Writes, if it can be done."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # ValueError: closed, or not to be encoded
            self.lost += 1

    def flush(self) -> None:
        """Flushes, if it can be done."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def reopen(self) -> str | None:
        """There is nothing to open."""
        return None

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._stream.isatty()


class LogFile:
    """A file that lines are appended to. `ConfigError` when it cannot be opened at first."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._looked_at = monotonic()
        #: the last write was cut off in the middle of a line: the next one begins another
        self._torn = False
        self.lost = 0
        #: why it could not be opened again; None when it could
        self.trouble: str | None = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._opened()
        except OSError as error:
            raise ConfigError(f"logging.output: cannot write {path}: {error.strerror}") from None

    def write(self, text: str) -> None:
        """Appends, if it can be done."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._fd < 0:
                self.lost += 1
                return
            now = monotonic()
            if now - self._looked_at >= LOOK_S:
                self._looked_at = now
                if self._moved():
                    self._renew()
            if self._torn:
                data = b"\n" + data
            try:
                written = os.write(self._fd, data)
            except OSError:
                written = 0
                self.lost += 1
            else:
                self.lost += written < len(data)
            self._torn = self._torn if written == 0 else not data[:written].endswith(b"\n")

    def flush(self) -> None:
        """Nothing waits here."""

    def reopen(self) -> str | None:
        """Opens the file that has the name now. What is said is why it could not be done."""
        with self._lock:
            return self._renew() if self._fd >= 0 else None

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return os.isatty(self._fd)

    def close(self) -> None:
        """Closes it, for good: what is still written to it is lost. Twice is harmless."""
        with self._lock, contextlib.suppress(OSError):
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)

    def _moved(self) -> bool:
        try:
            mine, now = os.fstat(self._fd), Path(self._path).stat()
        except OSError:
            return True
        return (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino)

    def _renew(self) -> str | None:
        try:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            opened = self._opened()
        except OSError as error:
            self.trouble = f"{self._path} cannot be opened again: {error.strerror}"
        else:
            self.trouble, old, self._fd = None, self._fd, opened
            self._torn = False
            with contextlib.suppress(OSError):
                os.close(old)
        return self.trouble


def open_output(output: str, stream: TextIO | None) -> Output:
    """`stderr` and `stdout` are given as the stream; else a file of that name. `ConfigError` when it cannot be."""
    return LogFile(output) if stream is None else Stream(stream)


def is_journal(stream: TextIO | None, environ: Mapping[str, str]) -> bool:
    """Whether the stream leads to journald, and not just this process's first stderr: `$JOURNAL_STREAM`, systemd.exec(5)."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    if stream is None or not (device.isdecimal() and inode.isdecimal()):
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or in memory
        return False
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


def prefixed(text: str, level: str) -> str:
    """The entry's lines, each with its priority."""
    mark = f"<{_PRIORITIES.get(level, 6)}>"
    return mark + text.replace("\n", "\n" + mark)
