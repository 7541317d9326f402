"""Reading the binary format of WebAssembly: numbers, names, kinds, types and limits, each within its bounds.

Whatever is not there, too large, or no such thing is `NotWasm` with the offset. No call takes longer than the bytes
that it reads, but for a name, which is as long as it says and at most `NAME_MAX_BYTES`.
"""

from __future__ import annotations

from typing import NamedTuple

from ifabric.errors import NotWasm

#: of anything in one module: what engines take, too
ITEMS_MAX = 1_000_000
NAME_MAX_BYTES = 100_000
KINDS = ("function", "table", "memory", "global", "tag")
#: types that are one byte, numbers and references; 0x63 and 0x64 are references that a heap type follows
_TYPES = frozenset((*range(0x68, 0x76), *range(0x7B, 0x80)))
_LONG_TYPES = (0x63, 0x64)


class Limits(NamedTuple):
    """How large a memory (in bytes) or a table (in elements) is at first and at most."""

    min: int
    max: int | None
    shared: bool
    is64: bool


class Reader:
    """A part of a module."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def wrong(self, what: str, at: int | None = None) -> NotWasm:
        """The error to raise."""
        at = self.at if at is None else at
        return NotWasm(f"byte {at}: {what}; nothing was kept", offset=at)

    def peek(self) -> int:
        """The next byte, which stays; -1 at the end."""
        return self.data[self.at] if self.at < self.end else -1

    def byte(self, what: str) -> int:
        """One byte."""
        if self.at >= self.end:
            raise self.wrong(f"it ends where {what} should be")
        self.at += 1
        return self.data[self.at - 1]

    def u32(self, what: str) -> int:
        """An unsigned number of at most 32 bits, in LEB128."""
        return self._leb(what, 32)

    def _leb(self, what: str, bits: int) -> int:
        at, shift, value = self.at, 0, 0
        while True:
            if at >= self.end:
                raise self.wrong(f"it ends within {what}")
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift >= bits:
                raise self.wrong(f"{what} has more than {bits} bits")
        if value >> bits:
            raise self.wrong(f"{what} has more than {bits} bits")
        self.at = at
        return value

    def count(self, what: str, least: int) -> int:
        """How many items follow, each of which has at least so many bytes."""
        count = self.u32(f"the number of {what}")
        if count * least > self.end - self.at:
            raise self.wrong(f"{count} {what} do not fit into the {self.end - self.at} bytes that are left")
        if count > ITEMS_MAX:
            raise self.wrong(f"{count} {what}, and no engine takes more than {ITEMS_MAX}")
        return count

    def part(self, size: int, what: str) -> Reader:
        """A reader of the next `size` bytes, which are passed over here."""
        if size > self.end - self.at:
            raise self.wrong(f"{what} has {size} bytes, and {self.end - self.at} are left")
        self.at += size
        return Reader(self.data, self.at - size, self.at)

    def over(self, what: str) -> None:
        """Nothing may be left of the section."""
        if self.at != self.end:
            raise self.wrong(f"{self.end - self.at} bytes too many in the {what} section")

    def name(self, what: str) -> str:
        """A length and so much UTF-8."""
        began = self.at
        size = self.u32(f"the length of {what}")
        if size > NAME_MAX_BYTES or size > self.end - self.at:
            raise self.wrong(f"{what} has {size} bytes, and {self.end - self.at} are left")
        self.at += size
        try:
            return self.data[self.at - size : self.at].decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8", began) from None

    def kind(self, what: str) -> str:
        """What is imported or exported."""
        number = self.byte(f"the kind of {what}")
        if number >= len(KINDS):
            raise self.wrong(f"{what} is of no kind ({number})", self.at - 1)
        return KINDS[number]

    def type(self) -> None:
        """Passes over the type of a value."""
        byte = self.byte("a type")
        if byte in _LONG_TYPES:
            self._leb("a heap type", 35)
        elif byte not in _TYPES:
            raise self.wrong(f"{byte:#04x} is no type", self.at - 1)

    def limits(self, unit: int) -> Limits:
        """How large a table or memory is, in units of so many (a memory's may be another)."""
        flags = self.byte("limits")
        if flags > 0x0F:
            raise self.wrong(f"limits with the unknown flags {flags:#04x}", self.at - 1)
        bits = 64 if flags & 4 else 32
        least = self._leb("the least of a limit", bits)
        most = self._leb("the most of a limit", bits) if flags & 1 else None
        if flags & 8:
            power = self.u32("the size of a page")
            if power > 16:
                raise self.wrong(f"a page of 2^{power} bytes")
            unit = 1 << power
        return Limits(least * unit, None if most is None else most * unit, bool(flags & 2), bool(flags & 4))
