"""A strict reader of ArcSight's Common Event Format, after its specification (version 25), for the tests of what is written."""

from __future__ import annotations

import re

_KEY = re.compile(r"[A-Za-z0-9_.\-]+")
#: keys of the dictionary that are used, with the most characters (or the kind) that each may have
DICTIONARY: dict[str, int | str] = {
    "rt": "ms",
    "externalId": 40,
    "act": 63,
    "outcome": 63,
    "suser": 1023,
    "reason": 1023,
    "msg": 1023,
    "deviceExternalId": 255,
    "spriv": 1023,
    "cnt": "int",
    **{f"cs{n}": 4000 for n in range(1, 7)},
    **{f"cs{n}Label": 1023 for n in range(1, 7)},
    **{f"cn{n}": "int" for n in range(1, 4)},
    **{f"cn{n}Label": 1023 for n in range(1, 4)},
    "cfp1": "float",
    "cfp1Label": 1023,
    **{f"flexString{n}": 1023 for n in (1, 2)},
    **{f"flexString{n}Label": 128 for n in (1, 2)},
}


def parse(line: str) -> tuple[list[str], dict[str, str]]:
    """The header's fields after the version, and the extension. `AssertionError` for what the specification does not allow."""
    assert line.startswith("CEF:0|")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", line), "one line, and no control characters"
    fields, rest = _header(line[len("CEF:0|") :])
    assert re.fullmatch(r"[0-9]|10", fields[5]), "a severity"
    return fields, _extension(rest)


def _header(text: str) -> tuple[list[str], str]:
    fields, field, at = [], "", 0
    while len(fields) < 6:
        assert at < len(text), "six fields, each ended by a pipe"
        char = text[at]
        if char == "\\":
            assert text[at + 1] in "\\|", "in the header only a backslash and a pipe are escaped"
            field, at = field + text[at + 1], at + 2
        elif char == "|":
            fields.append(field)
            field, at = "", at + 1
        else:
            field, at = field + char, at + 1
    return fields, text[at:]


def _extension(text: str) -> dict[str, str]:
    equals = [match.start() for match in re.finditer("=", text) if not _is_escaped(text, match.start())]
    found: dict[str, str] = {}
    for number, at in enumerate(equals):
        start = text.rfind(" ", 0, at) + 1
        key = text[start:at]
        assert _KEY.fullmatch(key), f"a key: {key!r}"
        end = len(text) if number + 1 == len(equals) else text.rfind(" ", 0, equals[number + 1])
        value = _value(text[at + 1 : end])
        assert key not in found, f"{key} is there once"
        kind = DICTIONARY[key]
        if isinstance(kind, int):
            assert len(value) <= kind, f"{key} is too long"
        elif kind == "float":
            float(value)
        else:
            assert re.fullmatch(r"-?\d+", value), f"{key} is a number"
        found[key] = value
    for key in found:
        if re.fullmatch(r"(cs|cn|cfp|flexString)\d", key):
            assert f"{key}Label" in found, f"{key} has a label"
    return found


def _is_escaped(text: str, at: int) -> bool:
    before = len(text[:at]) - len(text[:at].rstrip("\\"))
    return before % 2 == 1


def _value(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        assert match[1] in ("\\", "=", "n", "r"), f"an escape that is none: {match[0]!r}"
        return {"n": "\n", "r": "\r"}.get(match[1], match[1])

    return re.sub(r"\\(.?)", plain, text, flags=re.DOTALL)
