"""Whether the audit is as it was written: the stream's messages against themselves, and against what etcd was told. Pure.

**What is shown.** A record that was changed, left out, put in, moved or stored under another subject, within the reach
of a chain; a chain cut off before its head; a chain rewritten with all its hashes, up to its head; messages deleted from
the stream; a stream that no longer forbids that.

**What is not.** What a daemon wrote after it last told etcd, if it is cut off. Somebody who can write to etcd too. That
the oldest records were dropped by age and not by a hand that began the stream anew: this is believed where it can be
true, which is when the stream is older than it keeps messages, and has dropped at least as many as are missing.

**Memory** grows with the number of chains (lives of daemons), some hundred bytes each, not with that of records.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from ifabric.audit import stored as stored_records
from ifabric.audit.chaining import Chain, Place
from ifabric.audit.finding import DO, Finding, Note, Report
from ifabric.audit.stored import Stored, StreamFacts, Unreadable, ms_of
from ifabric.clock import rfc3339
from ifabric.wire.audit import DROPPED, AuditRecord, Head, message_id
from ifabric.wire.subjects import AUDIT
from ifabric.wire.subjects import audit as subject_of

#: findings, and notes, that are told; the others are counted
TOLD_MAX = 100
#: chains whose last hashes are kept: daemons that write at the same time are few
WINDOWS = 32
#: a daemon of which something was heard so long ago is taken to run
HEARD_MS = 180_000
#: what a clock may be off, and a server late with dropping what is old
SLACK_MS = 3_600_000


class Examination:
    """Takes the stream's messages in order, then says what was found.

    `heads`: by chain; None when nobody could say. `whole`: the stream is read from its first message.
    """

    def __init__(self, stream: StreamFacts, heads: Mapping[str, Head] | None, *, whole: bool = True) -> None:
        self._stream = stream
        self._heads = heads
        self._whole = whole
        self._chains: dict[str, Chain] = {}
        self._windows: OrderedDict[str, None] = OrderedDict()
        self._findings: list[Finding] = []
        self._notes: list[Note] = []
        self._untold = 0
        self._messages = self._records = self._again = 0
        #: 0 before the first one: what was dropped is never in the middle
        self._next_seq = 0
        self._first_seq = self._last_seq = 0
        self._since = self._until = ""

    # -- message by message ------------------------------------------------------------------------------------------

    def add(self, stored: Stored) -> None:
        """The stream's next message."""
        self._messages += 1
        if self._next_seq and stored.seq > self._next_seq:
            self._deleted(self._next_seq, stored.seq - 1)
        self._next_seq, self._last_seq = stored.seq + 1, stored.seq
        self._first_seq = self._first_seq or stored.seq
        record = stored_records.read(stored)
        if isinstance(record, Unreadable):
            shown = stored_records.beginning(stored.data)
            at = rfc3339(stored.stored_ms)
            self._find("unreadable", f"{record.why}. It begins: {shown}", seq=stored.seq, at=at)
            return
        self._records += 1
        self._since, self._until = self._since or record.at, record.at
        chain = self._chained(record, stored)
        where = Place(record.n, stored.seq, record.at, record.session, f"{record.component}.{record.verb}")
        if stored.subject != subject_of(record.component, record.verb):
            chain.find("subject", where, f"it was stored under {stored.subject}, which is not what it says of itself")
        if stored.message_id != message_id(record.chain, record.n):
            chain.find(
                "message_id", where, f"its message id is {stored.message_id[:100] or 'missing'}, not chain and number"
            )
        if (record.component, record.verb) == ("fabric", DROPPED):
            many = "some" if record.count is None else str(record.count)
            what = f"{many} record(s) were dropped by {record.daemon or 'a daemon'}, which had no room for them: {record.why}"
            self._note("dropped", what, record.chain, record.at)

    def _chained(self, record: AuditRecord, stored: Stored) -> Chain:
        chain = self._chains.get(record.chain)
        if chain is None:
            head = (self._heads or {}).get(record.chain)
            chain = self._chains[record.chain] = Chain(record, stored, head)
        elif chain.add(record, stored) == "again":
            self._again += 1
        self._windows[chain.name] = None
        self._windows.move_to_end(chain.name)
        if len(self._windows) > WINDOWS:
            oldest, _ = self._windows.popitem(last=False)
            self._chains[oldest].window = None
        return chain

    def _deleted(self, first: int, last: int) -> None:
        which = f"message {first} was" if first == last else f"{last - first + 1} messages, {first} to {last}, were"
        self._find("deleted", f"{which} taken out of the stream", seq=first)

    # -- at the end --------------------------------------------------------------------------------------------------

    def ends_missing(self) -> list[str]:
        """Chains that etcd says go on: what is still under way may come yet."""
        return [name for name, chain in self._chains.items() if chain.head is not None and chain.head.n > chain.last.n]

    def goes_on(self, stream: StreamFacts) -> None:
        """The stream has grown since; it is read on."""
        self._stream = stream

    def unreadable_head(self, name: str) -> None:
        """What is in etcd for this chain is no head."""
        self._find("head", f"what etcd has for the end of the chain {name[:100]} is no head of it", chain=name[:100])

    def report(self, now_ms: int, *, max_age_s: float, heads_why: str = "") -> Report:
        """What was found. `max_age_s`: what the stream should keep at least. `heads_why`: why there are none."""
        if self._next_seq and self._next_seq <= self._stream.last_seq:
            self._deleted(self._next_seq, self._stream.last_seq)
        for chain in self._chains.values():
            chain.close()
        self._beginnings(now_ms)
        self._ends(now_ms, heads_why)
        for what in flaws(self._stream, max_age_s):
            self._find("stream", what)
        chains = self._chains.values()
        firsts = [replace(chain.broken, more=chain.more) for chain in chains if chain.broken is not None]
        found = sorted([*firsts, *self._findings], key=lambda one: (one.kind == "stream", one.seq or _never, one.at))
        self._untold += max(0, len(found) - TOLD_MAX)
        return Report(
            broken=bool(found),
            messages=self._messages,
            records=self._records,
            chains=len(self._chains),
            duplicates=self._again,
            first_seq=self._first_seq,
            last_seq=self._last_seq,
            since=self._since,
            until=self._until,
            heads=None if self._heads is None else len(self._heads),
            findings=tuple(found[:TOLD_MAX]),
            notes=tuple(self._notes),
            untold=self._untold,
        )

    def _beginnings(self, now_ms: int) -> None:
        """Chains that begin in the middle: dropped by age, if that can be."""
        if not self._whole:
            return
        late = [chain for chain in self._chains.values() if chain.first.n > 1]
        if not late:
            return
        missing = sum(chain.first.n - 1 for chain in late)
        why = _not_by_age(self._stream, missing, now_ms)
        for chain in late:
            n = chain.first.n
            if why:
                if chain.broken is not None:  # this comes before whatever else is wrong with it
                    chain.more, chain.broken = chain.more + 1, None
                chain.find(
                    "beginning", chain.first, f"the {n - 1} record(s) before it are missing, and not by age: {why}"
                )
            else:
                self._note(
                    "begins", f"begins at record {n}: older ones have been dropped by age", chain.name, chain.first.at
                )

    def _ends(self, now_ms: int, heads_why: str) -> None:
        if self._heads is None:
            self._note("heads", f"the ends of the chains were not checked: {heads_why}")
        for head in (self._heads or {}).values():
            chain = self._chains.get(head.chain)
            if chain is None:
                self._absent(head, now_ms)
            elif head.n > chain.last.n:
                lost = f"it is the last, and its daemon has told etcd at {head.at} that there are {head.n}"
                chain.find("end", chain.last, lost)
        for chain in self._chains.values():
            if not chain.ended and not _heard_of(chain, now_ms):
                who = chain.daemon or "its daemon"
                killed = chain.head is not None and chain.head.ended
                how = "was killed" if killed else "is idle, or was killed, or is cut off"
                self._note(
                    "no_end",
                    f"{who} has told of no end after record {chain.last.n}: it {how}",
                    chain.name,
                    chain.last.at,
                )

    def _absent(self, head: Head, now_ms: int) -> None:
        """A head whose chain is not in the stream, or not in the part that was read."""
        if head.n < 1 or not self._whole:
            return
        oldest = ms_of(self._since) if self._since else now_ms
        try:
            told = ms_of(head.at)
        except ValueError:
            told = now_ms
        if told < oldest and not _not_by_age(self._stream, head.n, now_ms):
            return
        what = f"no record of it is there, and its daemon ({head.daemon}) has told etcd at {head.at} that there are {head.n}"
        self._find("chain_missing", what, chain=head.chain, n=1, at=head.at)

    def _find(self, kind: str, what: str, *, chain: str = "", n: int = 0, seq: int = 0, at: str = "") -> None:
        if len(self._findings) >= TOLD_MAX:
            self._untold += 1
        else:
            self._findings.append(Finding(kind=kind, what=what, do=DO[kind], chain=chain, n=n, seq=seq, at=at))

    def _note(self, kind: str, what: str, chain: str = "", at: str = "") -> None:
        if len(self._notes) >= TOLD_MAX:
            self._untold += 1
        else:
            self._notes.append(Note(kind=kind, what=what, chain=chain, at=at))


_never = 1 << 63


def examine(
    messages: Iterable[Stored], stream: StreamFacts, heads: Mapping[str, Head] | None, now_ms: int, *, max_age_s: float
) -> Report:
    """All at once."""
    examination = Examination(stream, heads)
    for message in messages:
        examination.add(message)
    return examination.report(now_ms, max_age_s=max_age_s)


def no_stream(heads: Mapping[str, Head]) -> tuple[Finding, ...]:
    """When there is no stream: what etcd knows of the chains that it had."""
    what = "the stream is gone, and with it the {} record(s) that its daemon ({}) has told etcd of"
    return tuple(
        Finding(
            kind="chain_missing",
            what=what.format(head.n, head.daemon),
            do=DO["chain_missing"],
            chain=head.chain,
            n=1,
            at=head.at,
        )
        for head in heads.values()
        if head.n > 0
    )[:TOLD_MAX]


def flaws(stream: StreamFacts, max_age_s: float) -> list[str]:
    """What in a stream's configuration lets records go, or lets in what is none."""
    found = []
    if stream.subjects != (AUDIT,) or stream.foreign:
        found.append("the stream takes in other things than what daemons publish below audit")
    if not stream.deny_delete:
        found.append("the stream lets messages be deleted (deny_delete is off)")
    if not stream.deny_purge:
        found.append("the stream lets itself be purged (deny_purge is off)")
    if 0 < stream.max_age_s < max_age_s:
        found.append(f"the stream keeps records for {_days(stream.max_age_s)}, and should for {_days(max_age_s)}")
    if stream.max_msgs > 0 or stream.max_msgs_per_subject > 0:
        found.append("the stream drops records when there are many")
    if stream.retention != "limits":
        found.append(f"the stream drops records when they were read (retention {stream.retention})")
    if stream.storage != "file":
        found.append(f"the stream is not on disk (storage {stream.storage})")
    return found


def _days(seconds: float) -> str:
    return f"{seconds / 86_400:.3g} days"


def _not_by_age(stream: StreamFacts, missing: int, now_ms: int) -> str:
    """Why so many records cannot have been dropped for their age, or for want of room; "" when they can."""
    dropped = stream.first_seq - 1
    if dropped < missing:
        return f"the stream has dropped {dropped} message(s) since it was made, and {missing} are missing"
    if stream.discard == "old" and stream.max_bytes > 0:
        return ""
    if stream.max_age_s <= 0:
        return "the stream drops nothing"
    restored = 0 < stream.first_ms < stream.created_ms
    if stream.created_ms and not restored and now_ms - stream.created_ms + SLACK_MS < stream.max_age_s * 1000:
        return f"the stream was made {rfc3339(stream.created_ms)}, and keeps for {_days(stream.max_age_s)}"
    return ""


def _heard_of(chain: Chain, now_ms: int) -> bool:
    """Whether something was heard of its daemon not long ago. One that has nothing to record says nothing."""
    if chain.head is not None and chain.head.ended:
        return False
    heard = [chain.last.at] if chain.head is None else [chain.last.at, chain.head.at]
    for at in heard:
        try:
            if now_ms - ms_of(at) < HEARD_MS:
                return True
        except ValueError:
            continue
    return False
