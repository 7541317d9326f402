"""What an examination of the audit says: findings, which mean that it is broken, and notes, which do not."""

from __future__ import annotations

from msgspec import Struct

_KEEP = (
    "Leave the stream and NATS's store as they are, and take a copy of both. Compare with the last `ifabric audit export` "
    "and the last backup that has IF_AUDIT: what stands there is what was. "
)
_WHO = "Find out who could reach NATS's store on disk, its system account, or $JS.API.STREAM since then."
_RESTORED = "If IF_AUDIT was put back from a backup since then, this is what was recorded after that backup: only an export has it. "
_DISK = "The server's log says if it was its disk (it drops what its own checksums refuse); if not, it was somebody. "
#: what to do about each kind of finding
DO = {
    "unreadable": "Only daemons may publish there, and they write no such thing. See who else may, and who may ask JetStream: "
    "its answers go to any subject.",
    "subject": _KEEP + _WHO,
    "message_id": _KEEP + _WHO,
    "changed": _KEEP + _WHO,
    "twice": _KEEP + _WHO,
    "missing": _KEEP + _DISK + _WHO,
    "order": _KEEP + _WHO,
    "beginning": _KEEP + _WHO,
    "deleted": _KEEP + _DISK + _WHO,
    "end": "If that daemon runs, or has died while NATS was away, its last records may wait in the spool below its state "
    "directory: start it, and verify again. If that gives them not back: " + _RESTORED + _KEEP + _WHO,
    "rewritten": _KEEP + "The chain fits together, so every record of it may be another's work. " + _WHO,
    "chain_missing": _RESTORED + _KEEP + _WHO,
    "head": "Only daemons write below audit/ in etcd. See who else may: `ifabric bootstrap etcd` gives each user their part.",
    "stream": "A daemon with `audit.enabled` puts its stream right when it starts, if NATS lets it. Until then somebody could "
    "take records out, or they go by themselves.",
}


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is broken, and the first place where it is. 0 and "": not known, or it does not apply."""

    kind: str
    what: str
    do: str
    chain: str = ""
    n: int = 0
    seq: int = 0
    at: str = ""
    who: str = ""
    #: the verb, as component.verb
    verb: str = ""
    #: what else is wrong in the same chain, after this
    more: int = 0


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a reader should know, and what breaks nothing."""

    kind: str
    what: str
    chain: str = ""
    at: str = ""


class Report(Struct, frozen=True, kw_only=True):
    """What was examined, and what was found."""

    broken: bool
    messages: int
    records: int
    chains: int
    duplicates: int
    first_seq: int
    last_seq: int
    #: of the first and the last record
    since: str
    until: str
    #: how many ends were held against etcd; None: none could be
    heads: int | None
    findings: tuple[Finding, ...]
    notes: tuple[Note, ...]
    #: findings and notes that are too many to be told
    untold: int = 0
