"""The header `traceparent` of W3C Trace Context (Level 1, section 3.2), read and written."""

from __future__ import annotations

import re
from typing import NamedTuple

SAMPLED = 0x01
#: version, trace id, parent id, flags; a later version may say more behind them
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]{0,400})?")


class Traceparent(NamedTuple):
    """Whose trace it is, and which span of it asks."""

    trace_id: int
    span_id: int
    sampled: bool


def parse(header: str) -> Traceparent | None:
    """None for what is not one: it is then as if there were none."""
    found = _FORM.fullmatch(header)
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if version == "ff" or (version == "00" and more is not None) or not trace_id or not span_id:
        return None
    return Traceparent(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def spell(trace_id: int, span_id: int, *, sampled: bool) -> str:
    """The header, in the version that everybody reads."""
    return f"00-{trace_id:032x}-{span_id:016x}-{SAMPLED if sampled else 0:02x}"
