r"""The audit as others take it in: lines of JSON, and ArcSight's Common Event Format for a SIEM. Pure.

**JSON lines**: one object a message, `{"seq", "stored", "subject", "id", "sha256", "record"}`, where `record` is what is
stored, byte for byte, so that `sha256`, which the next record of the chain has as `prev`, can be checked. What is no
JSON on one line is in `data_b64` instead.

**CEF:0** ("Implementing ArcSight Common Event Format (CEF)", version 25): `CEF:0|vendor|product|version|class|name|severity|`
and then `key=value` pairs. In the header a backslash and a pipe are escaped with a backslash, and a line does not end;
in the values a backslash and an equals sign are, and line ends are written as `\n` and `\r`. Lengths are the
dictionary's. Other control characters are taken out: some collectors end a line there.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import msgspec

from ifabric.audit.stored import Stored, beginning, ms_of, read
from ifabric.clock import rfc3339
from ifabric.wire.audit import AuditRecord, hash_of

#: how bad an event is, 0 to 10: by outcome, and for what operators do
SEVERITY = {("ok", False): 1, ("ok", True): 4, ("refused", False): 5, ("refused", True): 7, ("error", False): 8,
            ("error", True): 8}  # fmt: skip
#: who tried what they may not, or are not
DENIED, DENIED_SEVERITY = ("forbidden", "unauthorized"), 8
UNREADABLE_SEVERITY = 10
_CONTROL = re.compile("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")


# -- JSON lines ------------------------------------------------------------------------------------------------------


class _Line(msgspec.Struct, omit_defaults=True):
    seq: int
    stored: str
    subject: str
    id: str
    sha256: str
    record: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data_b64: str | msgspec.UnsetType = msgspec.UNSET


def json_line(stored: Stored) -> bytes:
    """One line, without its end."""
    line = _Line(
        seq=stored.seq,
        stored=rfc3339(stored.stored_ms),
        subject=stored.subject,
        id=stored.message_id,
        sha256=hash_of(stored.data),
    )
    if _is_one_line_of_json(stored.data):
        line.record = msgspec.Raw(stored.data)
    else:
        line.data_b64 = base64.b64encode(stored.data).decode()
    return msgspec.json.encode(line)


def _is_one_line_of_json(data: bytes) -> bool:
    if b"\n" in data or b"\r" in data:
        return False
    try:
        return isinstance(msgspec.json.decode(data), dict)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


# -- CEF ---------------------------------------------------------------------------------------------------------------


def cef_line(stored: Stored, version: str) -> bytes:
    """One line, without its end."""
    record = read(stored)
    if isinstance(record, AuditRecord):
        return _cef(
            version,
            f"{record.component}.{record.verb}",
            f"{'admin ' if record.admin else ''}{record.component} {record.verb} {record.outcome}",
            severity(record),
            _extension(record, stored),
        )
    pairs = (
        ("rt", str(stored.stored_ms)),
        ("outcome", "unreadable"),
        ("externalId", str(stored.seq)),
        ("reason", record.why[:1023]),
        ("msg", beginning(stored.data)),
        ("cn2", str(stored.seq)),
        ("cn2Label", "streamSequence"),
    )
    return _cef(
        version, "audit.unreadable", "a message in the audit that is no record", UNREADABLE_SEVERITY, iter(pairs)
    )


def severity(record: AuditRecord) -> int:
    """From 0 to 10."""
    if record.code in DENIED:
        return DENIED_SEVERITY
    return SEVERITY[record.outcome, record.admin]


def _cef(version: str, kind: str, name: str, level: int, extension: Iterator[tuple[str, str]]) -> bytes:
    header = "|".join(map(_header, ("InfraFabric", "ifabric", version, kind[:1023], name[:512], str(level))))
    pairs = " ".join(f"{key}={_value(value)}" for key, value in extension)
    return f"CEF:0|{header}|{pairs}".encode("utf-8", "replace")


def _extension(record: AuditRecord, stored: Stored) -> Iterator[tuple[str, str]]:
    """What is known; keys of ArcSight's dictionary, each at most as long as it says there."""
    yield "rt", str(ms_of(record.at))
    yield "externalId", f"{record.chain}.{record.n}"[-40:]
    yield "act", f"{record.component}.{record.verb}"[:63]
    yield "outcome", record.outcome
    plain = (
        ("suser", record.session, 1023),
        ("reason", record.code, 1023),
        ("msg", record.why, 1023),
        ("deviceExternalId", record.daemon, 255),
    )
    for key, value, longest in plain:
        if value:
            yield key, value[:longest]
    yield "spriv", "Administrator" if record.admin else "User"
    labelled = (
        ("cs1", "requestId", record.request_id),
        ("cs2", "task", record.task),
        ("cs3", "account", record.account),
        ("cs4", "subject", record.subject or record.module or record.breaker or record.hold),
        ("cs5", "trace", record.trace),
        ("cs6", "sha256", hash_of(stored.data)),
        ("cn1", "fence", str(record.fence) if record.fence else ""),
        ("cn2", "streamSequence", str(stored.seq)),
        ("cn3", "amountMicroUsd", "" if record.amount_micro_usd is None else str(record.amount_micro_usd)),
        ("cfp1", "tookMs", f"{record.took_ms:.3f}"),
        ("flexString1", "hold", record.hold),
        ("flexString2", "breaker", record.breaker),
    )
    for key, label, value in labelled:
        if value:
            yield key, value[:1023]
            yield f"{key}Label", label
    if record.count is not None:
        yield "cnt", str(record.count)


def _header(text: str) -> str:
    spaced = " ".join(_CONTROL.sub(" ", text).splitlines())
    return spaced.replace("\\", "\\\\").replace("|", "\\|")


def _value(text: str) -> str:
    cleaned = _CONTROL.sub(" ", text).replace("\\", "\\\\").replace("=", "\\=")
    return cleaned.replace("\r", "\\r").replace("\n", "\\n")
