"""Records on this machine's disk, from when they are made until the stream has them.

A record is written before its sender is told, so a daemon that is killed loses none: what a process has written is the
kernel's, and outlives it. It is not flushed to the disk each time, which would cost every answer some milliseconds: a
*machine* that dies takes the records of its last seconds along that the stream had not got yet.

The records of one life are a row of files, `<chain>.<number>.spool`, each record a line, as the stream gets it. They are
written at the end and read from the beginning, and a file is deleted when all of it was read and stored. How far the
stream has them stands in `<chain>.stored`; it may be a little behind, and then some are sent twice, which the stream sees.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from ifabric.audit.chain import RECORD_MAX_BYTES, key_of
from ifabric.wire.audit import NONE_BEFORE

#: of one file, unless the whole spool is to be smaller than some of these
SEGMENT_BYTES: Final = 4 << 20
_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.(?:([0-9]{6})\.spool|stored)")


class Mark(msgspec.Struct):
    """How far the stream has a chain."""

    n: int = 0
    hash: str = NONE_BEFORE
    #: whose chain it is
    daemon: str = ""


_marks = msgspec.json.Decoder(Mark)


class Row:
    """The files of one chain."""

    def __init__(
        self, folder: Path, chain: str, numbers: Sequence[int] = (), *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.chain = chain
        self._folder = folder
        self._segment_bytes = segment_bytes
        #: the files there are, by number, with their lengths; the last one is written to, if any is
        self._lengths = dict.fromkeys(sorted(numbers), 0)
        for number in list(self._lengths):
            with contextlib.suppress(OSError):  # one that went away meanwhile is found to be empty
                self._lengths[number] = self._path(number).stat().st_size
        self._next = max(self._lengths, default=0) + 1
        self._writing: int | None = None
        self._torn = False
        self._reading: tuple[int, int] | None = None
        self._at = 0
        self.mark = Mark()
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # without one, all of it is sent again
            self.mark = _marks.decode(self._marked.read_bytes())

    @property
    def size(self) -> int:
        """On disk."""
        return sum(self._lengths.values())

    @property
    def _marked(self) -> Path:
        return self._folder / f"{self.chain}.stored"

    def _path(self, number: int) -> Path:
        return self._folder / f"{self.chain}.{number:06d}.spool"

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, lines: bytes) -> None:
        """Writes whole lines, all or none. Raises `OSError`."""
        number = max(self._lengths, default=0)
        if self._writing is None or (
            self._lengths[number] and self._lengths[number] + len(lines) > self._segment_bytes
        ):
            number = self._begin()
        file, length = self._writing, self._lengths[number]
        assert file is not None
        if self._torn:
            os.ftruncate(file, length)
            self._torn = False
        at = 0
        try:
            while at < len(lines):
                at += os.write(file, lines[at:] if at else lines)
        except OSError:
            self._torn = at > 0
            with contextlib.suppress(OSError):  # else before the next one
                os.ftruncate(file, length)
                self._torn = False
            raise
        self._lengths[number] = length + len(lines)

    def _begin(self) -> int:
        """The next file."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        number = self._next
        file = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._writing is not None:
            os.close(self._writing)
        self._writing, self._torn = file, False
        self._lengths[number] = 0
        self._next += 1
        return number

    # -- reading -----------------------------------------------------------------------------------------------------

    def ahead(self, most_bytes: int) -> list[bytes]:
        """The next lines, without their ends: at least one when there is one. Raises `OSError`.

        What is at a file's end and is no line was being written when the machine died; it is passed over.
        """
        while self._lengths:
            number = min(self._lengths)
            chunk = self._read(number, max(most_bytes, RECORD_MAX_BYTES))
            whole = chunk.rfind(b"\n") + 1
            if whole:
                return chunk[: whole - 1].split(b"\n")
            if number == max(self._lengths) and self._writing is not None:
                return []
            self._delete(number)
        return []

    def _read(self, number: int, most_bytes: int) -> bytes:
        if self._reading is None or self._reading[0] != number:
            self._close_reading()
            try:
                self._reading = (number, os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:
                return b""  # somebody deleted it; the chain will tell
        return os.pread(self._reading[1], most_bytes, self._at)

    def pass_over(self, length: int) -> None:
        """So many bytes of what was read are done with."""
        self._at += length

    def note(self, mark: Mark) -> None:
        """The stream has all up to there. Raises `OSError`."""
        self.mark = mark
        fresh = self._marked.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(mark))
        fresh.replace(self._marked)

    def sweep(self) -> None:
        """Deletes what was read to its end, but not what is written to."""
        while self._lengths:
            number = min(self._lengths)
            if (number == max(self._lengths) and self._writing is not None) or self._at < self._lengths[number]:
                return
            self._delete(number)

    def _delete(self, number: int) -> None:
        self._close_reading()
        with contextlib.suppress(FileNotFoundError):
            self._path(number).unlink()
        del self._lengths[number]
        self._at = 0

    def _close_reading(self) -> None:
        if self._reading is not None:
            os.close(self._reading[1])
            self._reading = None

    # -- its end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Writes and reads no more; the files stay. Twice is harmless."""
        self._close_reading()
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None

    def remove(self) -> None:
        """All of it is stored and told: nothing of it stays."""
        self.close()
        for number in list(self._lengths):
            self._delete(number)
        self._marked.unlink(missing_ok=True)

    def newest(self) -> tuple[int, str]:
        """Of what is on disk: the number of the newest record, and when the oldest was made; (0, "") when there is none."""
        first = last = None
        for number in self._lengths:
            with contextlib.suppress(OSError), self._path(number).open("rb") as file:
                first = first or key_of(file.readline())
                file.seek(max(0, self._lengths[number] - 2 * RECORD_MAX_BYTES))
                lines = file.read().rpartition(b"\n")[0].split(b"\n")
                last = key_of(lines[-1]) or last
        return (last.n if last else 0), (first.at if first else "")


def left_behind(folder: Path) -> list[Row]:
    """The rows of earlier lives, the oldest first. Raises `OSError`."""
    numbers: dict[str, list[int]] = {}
    ages: dict[str, float] = {}
    if not folder.exists():
        return []
    for entry in os.scandir(folder):
        if found := _NAME.fullmatch(entry.name):
            numbers.setdefault(found[1], [])
            if found[2]:
                numbers[found[1]].append(int(found[2]))
            ages[found[1]] = max(ages.get(found[1], 0.0), entry.stat().st_mtime)
    return [Row(folder, chain, numbers[chain]) for chain in sorted(numbers, key=lambda chain: ages[chain])]
