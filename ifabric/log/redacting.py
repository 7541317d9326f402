"""What looks like a secret is not written down: by the name that it goes by, or by its form.

**By name.** The value of a key whose last word is one of `NAMES` (`token`, `vault_token`, `apiKey`, `X-Vault-Token`) is
not shown, whatever it is; numbers and booleans are, for `max_tokens: 500` is none. `token_file` and `tokenizer` end in
other words.

**By form.** In every text, also the event's own, a traceback, a key of a map: seeds of NATS keys and of age, tokens of
Vault and of well-known services, JSON web tokens, private keys in PEM, `Bearer ...`, a password in a URL, and what is
assigned to one of the names (`password=...`, `"token": "..."`).

**What it cannot find** is a secret of no form under a harmless name. So this is the second line: the first is not to
hand secrets to a log at all.

**Why the needles.** One pattern for all of it costs 150 ns a character. A form is looked for only where a text has the
letters that the form cannot be without, and finding those costs a tenth of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

REDACTED = "[redacted]"
#: of one text; what is beyond is cut off
TEXT_MAX = 8192
#: of a traceback
TRACEBACK_MAX = 32_768
#: a secret that begins before the cut is looked for so much beyond it, and so is found whole
BEYOND = 4096
DEPTH_MAX = 8
ITEMS_MAX = 200

NAMES = frozenset(
    {
        *(
            "token",
            "secret",
            "password",
            "passwd",
            "passphrase",
            "authorization",
            "seed",
            "credential",
            "cookie",
            "jwt",
        ),
        *("api key", "apikey", "private key", "access key", "secret key", "signing key", "encryption key", "secret id"),
    }
)
_ASSIGNED = r"(?:token|secret|password|passwd|passphrase|authorization|api[_-]?key|(?:private|access|secret)[_-]key|secret[_-]id)"

#: letters that a form has in it whatever its case, the form, and what is put in its place
FORMS: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = (
    (
        ("-----BEGIN",),
        re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)", re.DOTALL),
        REDACTED,
    ),
    (
        ("SU", "SA", "SO", "SN", "SC", "SX"),
        re.compile(r"(?<![A-Za-z0-9])S[UAONCX][A-Z2-7]{56}(?![A-Za-z0-9])"),
        REDACTED,
    ),
    (("AGE-SECRET", "age-secret"), re.compile(r"AGE-SECRET-KEY-[0-9A-Z-]+", re.IGNORECASE), REDACTED),
    (("hvs.", "hvb.", "hvr."), re.compile(r"(?<![A-Za-z0-9])hv[sbr]\.[\w-]{4,}"), REDACTED),
    (("s.",), re.compile(r"(?<![A-Za-z0-9])s\.[A-Za-z0-9]{24,}"), REDACTED),
    (("sk-",), re.compile(r"(?<![A-Za-z0-9])sk-[\w-]{10,}"), REDACTED),
    (
        ("gh", "xox"),
        re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,})"),
        REDACTED,
    ),
    # each run of letters is looked at once, from its beginning, however often it says eyJ
    (("eyJ",), re.compile(r"(?<![\w-])(?=(?:[\w-]*[_-])?eyJ[\w-]{8})[\w-]++\.[\w-]{8,}+\.[\w-]*"), REDACTED),
    # `bearer of bad news` is no token
    (("earer ", "EARER "), re.compile(r"(Bearer +|(?i:bearer +(?=[\w.~+/=-]{8,})))[\w.~+/=-]+"), rf"\1{REDACTED}"),
    (
        ("://",),
        re.compile(r"(://)(?:([^\s/@:\"'?#]*:)[^\s/@\"'?#]*|[^\s/@:\"'?#]+)@"),
        rf"\1\2{REDACTED}@",
    ),
    (
        ("=",),
        re.compile(rf"(?i)({_ASSIGNED}[\"']?=[\"']?)(?!\[redacted\])[^\s\"'&,;]+"),
        rf"\1{REDACTED}",
    ),
    (
        ("': ", '": ', '":'),
        re.compile(rf"(?i)({_ASSIGNED}\\?[\"']\s*:\s*b?(\\?[\"']))(?!\[redacted\])(?:(?!\2)(?:\\.|[^\\]))*"),
        rf"\1{REDACTED}",
    ),
    (
        (": ",),
        re.compile(r"(?i)((?:authorization|x-vault-token|x-api-key|cookie): +(?:(?:basic|bearer|token) +)?)[^\s\"',]+"),
        rf"\1{REDACTED}",
    ),
)


def redact(text: str, most: int = TEXT_MAX) -> str:
    """The text without what looks like a secret, and at most so long."""
    return _without(text, _suspected(text), most)


_NEEDLES = tuple((needle, number) for number, (needles, _, _) in enumerate(FORMS) for needle in needles)


def _suspected(text: str) -> list[tuple[re.Pattern[str], str]]:
    """The forms that it may have something of, in their order."""
    found = {number: FORMS[number] for needle, number in _NEEDLES if needle in text}
    return [(form, instead) for _, form, instead in found.values()]


def _without(text: str, forms: list[tuple[re.Pattern[str], str]], most: int) -> str:
    whole = len(text)
    if whole > most:
        text = text[: most + BEYOND]
    for form, instead in forms:
        text = form.sub(instead, text)
    return text if whole <= most else f"{text[:most]}... ({whole} characters)"


@lru_cache(maxsize=2048)
def is_secret(name: str) -> bool:
    """Whether what goes by this name is a secret."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", name[-100:])
    if not words:
        return False
    last, pair = words[-1].lower(), " ".join(words[-2:]).lower()
    return bool({last, last.removesuffix("s"), pair, pair.removesuffix("s")} & NAMES)


def clean(event: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as plain data, without secrets. Never raises."""
    texts = [value for value in event.values() if type(value) is str]
    forms = _suspected("\n".join(texts))  # once for all of them: most entries have nothing to look for
    found: dict[str, Any] = {}
    for key, value in event.items():
        if type(value) is not str:
            found[redact(str(key))] = _named(key, value, 0)
        elif is_secret(key):
            found[key] = REDACTED
        else:
            found[key] = _without(value, forms, TRACEBACK_MAX if key in ("exception", "stack") else TEXT_MAX)
    return found


def _named(key: Any, value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(key, bytes):
        key = key.decode("latin-1")
    return REDACTED if isinstance(key, str) and is_secret(key) else _cleaned(value, depth)


def _cleaned(value: Any, depth: int) -> Any:
    """A value of any kind as plain data: strings, numbers, lists and maps."""
    if isinstance(value, str):
        return redact(str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes | bytearray):
        return redact(bytes(value[: 2 * TEXT_MAX]).decode("utf-8", "backslashreplace"))
    if depth >= DEPTH_MAX:
        return "..."
    if isinstance(value, dict):
        items = list(value.items())[:ITEMS_MAX]
        return {redact(_worded(key)): _named(key, one, depth + 1) for key, one in items}
    if isinstance(value, list | tuple | set | frozenset):
        if len(value) == 2 and isinstance(value, list | tuple) and isinstance(value[0], str | bytes):
            return [_cleaned(value[0], depth + 1), _named(value[0], value[1], depth + 1)]  # as headers are written
        return [_cleaned(one, depth + 1) for one in list(value)[:ITEMS_MAX]]
    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name, None) for name in value.__struct_fields__}
        return _cleaned(fields, depth)
    return redact(_worded(value))


def _worded(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a `__str__` that raises: whose fault it is, is not the log's matter
        return f"<{type(value).__name__}>"
