"""Carries out `replay` and `restored`: after a restore, what was spent since the backup is charged again.

Every entry is a posting of its own, so a request that ends in the middle leaves whole entries behind; the request is
sent again, and what was done is `again`. What tells that is the hold's record, which is kept for
`ended_hold_ttl_seconds`: a replay that began longer ago is refused, for it could charge a second time.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from msgspec.structs import replace

from ifabric.actor.base import Caller
from ifabric.clock import rfc3339
from ifabric.errors import BadRequest, Conflict, Overloaded
from ifabric.store.base import KV, Put, TxnRefused, unchanged
from ifabric.store.commit import Committer, Request
from ifabric.wire import replay as wire
from ifabric.wire.governor import path_of
from ifabric_actors.governor import ledger, records, replay
from ifabric_actors.governor.books import TASK, Books
from ifabric_actors.governor.office import TRIES_MAX, Office
from ifabric_actors.governor.records import Account, Hold
from ifabric_actors.governor.replay import Places, Replayed, ms_of
from ifabric_actors.governor.teller import Draft, Posting

OWNER = " replay"


class Restoration:
    """The clerk for what a restore has lost."""

    def __init__(self, office: Office, committer: Committer) -> None:
        self._office, self._teller, self._clock = office, office.teller, office.clock
        self._committer = committer

    async def restored(self, message: wire.Restored, caller: Caller) -> wire.RestoredReply:
        mark, began = await self._office.read((records.RESTORED_KEY, records.RECONCILED_KEY), OWNER)
        restore = self._restore(mark)
        reconciled = records.reconciled(began) if began is not None else None
        if reconciled is not None and reconciled.incarnation != self._committer.incarnation:
            reconciled = None
        return wire.RestoredReply(
            restored=restore,
            began_revision=mark.mod_revision if mark is not None and restore is not None else 0,
            reconciled=reconciled,
            repeatable_until=rfc3339(self._until(reconciled)) if reconciled is not None else "",
        )

    async def replay(self, message: wire.Replay, caller: Caller) -> wire.ReplayReply:
        self._office.refuse_without_budgets()
        for entry in message.entries:
            if not replay.fits(entry):
                raise BadRequest(
                    f"the windows of {entry.session}/{entry.hold} do not fit its account; nothing was charged"
                )
        await self._begin(message, caller)
        limits = [await self._limit(limit, dry_run=message.dry_run) for limit in message.limits]
        done = await asyncio.gather(
            *(self._entry(entry, dry_run=message.dry_run) for entry in message.entries), return_exceptions=True
        )
        entries = []
        for one in done:  # all have ended: what failed is tried again with the whole request
            if isinstance(one, BaseException):
                raise one
            entries.append(one)
        if message.finished is not None and not message.dry_run:
            await self._finish(message, message.finished, caller)
        return wire.ReplayReply(entries=tuple(entries), limits=tuple(limits))

    # -- entries and limits -------------------------------------------------------------------------------------------

    async def _entry(self, entry: wire.ReplayEntry, *, dry_run: bool) -> wire.ReplayedEntry:
        key = records.hold_key(entry.session, entry.hold)
        for _ in range(TRIES_MAX):
            (kv,) = await self._office.read((key,), OWNER)
            hold, revision = (records.hold(kv), kv.mod_revision) if kv is not None else (None, 0)
            act = replay.act_of(entry, hold)
            if act == "again" or dry_run:
                return _told(entry, act, replay.missing(entry, hold))
            on = hold.on if hold is not None else await self._places(entry)
            lease = await self._office.ended.current()

            def make(
                books: Books,
                hold: Hold | None = hold,
                revision: int = revision,
                on: Places = on,
                lease: int = lease,
            ) -> Draft:
                done = replay.replayed(entry, hold, on, books.at(on))
                books.put(done.path)
                put = Put(key, records.encode(done.hold), lease)
                return Draft(Request((unchanged(key, revision),), (put,)), done)

            accounts = tuple(name for name, _ in on if not name.startswith(TASK))
            try:
                posted = await self._teller.post(Posting(accounts, on, (key,), make, OWNER))
            except TxnRefused:
                self._office.retire()
                continue
            if posted.outcome.succeeded:
                made: Replayed = posted.answer
                self._office.holds.committed(key, made.hold, posted.outcome.revision)
                return _told(entry, made.done, made.charged, made.overdraft)
        raise Overloaded(f"{entry.session}/{entry.hold} lost {TRIES_MAX} races; it was not replayed", what="contention")

    async def _places(self, entry: wire.ReplayEntry) -> Places:
        names = path_of(entry.account)
        if entry.windows is None:
            await self._teller.fresh(names, owner=OWNER)
        return replay.places_of(entry, {name: self._teller.memory.limit(name).window for name in names})

    async def _limit(self, limit: wire.ReplayLimit, *, dry_run: bool) -> wire.ReplayedLimit:
        name, memory = limit.account, self._teller.memory
        for _ in range(TRIES_MAX):
            now_ms = await self._teller.fresh(path_of(name), owner=OWNER)
            if not replay.is_newer(limit, memory.limit(name)):
                return wire.ReplayedLimit(account=name, again=True)
            if dry_run:
                return wire.ReplayedLimit(account=name)

            def make(books: Books) -> Draft:
                if replay.is_newer(limit, memory.limit(name)):
                    account = Account(limit=limit.limit_micro_usd, window=limit.window, by=limit.by, at=ms_of(limit.at))
                    books.found(name, account)
                return Draft(Request((), ()))

            windows = dict.fromkeys(ledger.window_of(kind, now_ms) for kind in ("total", "day", "month"))
            places = tuple((name, window) for window in windows)
            posted = await self._teller.post(Posting(path_of(name), places, (records.account_key(name),), make, OWNER))
            if posted.outcome.succeeded:
                self._office.log.info(
                    "account limit set again after a restore",
                    account=name,
                    limit_micro_usd=limit.limit_micro_usd,
                    window=limit.window,
                    by=limit.by,
                )
                return wire.ReplayedLimit(account=name)
        raise Overloaded(f"the limit of {name} lost {TRIES_MAX} races; it was not set", what="contention")

    # -- what is remembered of it -------------------------------------------------------------------------------------

    def _until(self, began: wire.Reconciled) -> int:
        """Until when (ms since the epoch) every record that this replay wrote is there."""
        kept_s: int = self._office.config.ended_hold_ttl_seconds
        return ms_of(datetime.fromisoformat(began.began_at)) + kept_s * 1000

    def _restore(self, mark: KV | None) -> wire.Restore | None:
        """The restore that this incarnation came of; an older one's mark is in the backups that were made since."""
        restore = records.restore(mark) if mark is not None else None
        return restore if restore is not None and restore.incarnation == self._committer.incarnation else None

    def _is_this(self, known: wire.Reconciled, message: wire.Replay, restore: wire.Restore | None) -> bool:
        """Whether that was this very replay: of one restore there is one, whatever part of it is asked for."""
        same = restore is not None or known.since_revision == message.since_revision
        return same and known.incarnation == self._committer.incarnation

    async def _begin(self, message: wire.Replay, caller: Caller) -> None:
        """Remembers when it began. Refuses what could charge twice."""
        for _ in range(TRIES_MAX):
            mark, kv = await self._office.read((records.RESTORED_KEY, records.RECONCILED_KEY), OWNER)
            restore = self._restore(mark)
            if restore is not None and message.since_revision < restore.revision:
                raise BadRequest(
                    f"the backup knows all up to revision {restore.revision}: a replay since revision "
                    f"{message.since_revision} could charge again what it knows; nothing was charged",
                    revision=restore.revision,
                )
            known = records.reconciled(kv) if kv is not None else None
            if known is not None and self._is_this(known, message, restore):
                if self._clock.wall_ms() > self._until(known):
                    raise Conflict(
                        f"this replay began at {known.began_at}, and what tells what it has charged is not kept any "
                        "longer: to repeat it could charge twice. Nothing was charged.",
                        began_at=known.began_at,
                        finished_at=known.finished_at,
                    )
                return
            if message.dry_run:
                return
            begun = wire.Reconciled(
                since_revision=message.since_revision,
                incarnation=self._committer.incarnation,
                by=caller.session,
                began_at=rfc3339(self._clock.wall_ms()),
            )
            if await self._remember(begun, kv.mod_revision if kv is not None else 0):
                self._office.log.warning(
                    "what was spent after a backup is charged again",
                    since_revision=message.since_revision,
                    by=caller.session,
                )
                return
        raise Overloaded(f"replay lost {TRIES_MAX} races; nothing was charged", what="contention")

    async def _finish(self, message: wire.Replay, summary: wire.ReplaySummary, caller: Caller) -> None:
        """Remembers that it is done."""
        for _ in range(TRIES_MAX):
            mark, kv = await self._office.read((records.RESTORED_KEY, records.RECONCILED_KEY), OWNER)
            known = records.reconciled(kv) if kv is not None else None
            if kv is None or known is None or not self._is_this(known, message, self._restore(mark)):
                raise Conflict("another replay has begun meanwhile; this one is not remembered as the last")
            if known.finished_at and known.complete >= summary.complete and known.entries >= summary.entries:
                return
            done = replace(
                known,
                by=caller.session,
                finished_at=rfc3339(self._clock.wall_ms()),
                entries=summary.entries,
                charged_micro_usd=summary.charged_micro_usd,
                complete=summary.complete,
            )
            if await self._remember(done, kv.mod_revision):
                return
        raise Overloaded(f"replay lost {TRIES_MAX} races; its end is not remembered", what="contention")

    async def _remember(self, what: wire.Reconciled, revision: int) -> bool:
        put = Put(records.RECONCILED_KEY, records.encode(what))
        request = Request((unchanged(records.RECONCILED_KEY, revision),), (put,), (), OWNER, witness=put)
        return (await self._committer.commit(request)).succeeded


def _told(entry: wire.ReplayEntry, act: wire.Act, charged: int, overdraft: int = 0) -> wire.ReplayedEntry:
    return wire.ReplayedEntry(
        session=entry.session, hold=entry.hold, done=act, charged=charged, overdraft=overdraft, again=act == "again"
    )
