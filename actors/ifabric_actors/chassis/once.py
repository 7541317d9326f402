"""A run with effects is carried out at most once for one request id.

What a guest sends out cannot be taken back, nor be in one transaction with anything of ours. So before such a run
begins, etcd is told that it does; when it is over, what came of it. A retry, on any daemon, finds the one or the
other: it waits for the answer as long as the daemon that runs it lives, and gets it. If that daemon died, nobody
knows how far the run came; the retry is told so and is not run.

A run without effects needs none of this: to run it twice is a waste, and no harm.
"""

from __future__ import annotations

import msgspec

from ifabric.actor.base import Context
from ifabric.actor.receipts import Leases, digest
from ifabric.errors import Conflict, FabricError, SandboxDied, TooLarge, Unavailable, from_body
from ifabric.store.base import Delete, Get, Got, Put, Txn, absent, record
from ifabric.wire import chassis as wire
from ifabric.wire.envelope import encode
from ifabric_actors.chassis import records

#: of an answer that is kept for a retry, in bytes
ANSWER_MAX = 256 * 1024
LOOK_S = 0.1
KEEP_TRYING_S = 20.0


class Repeats:
    """Keeps runs with effects, for one daemon."""

    def __init__(self, context: Context, daemon: str) -> None:
        self._store, self._clock, self._log = context.store, context.clock, context.log
        self._daemon = daemon
        self._leases = Leases(context.store, context.clock, keep_s=context.settings.coordinator.receipt_ttl_seconds)

    async def stop(self) -> None:
        await self._leases.stop()

    async def begin(self, message: wire.Run, session: str, run: str, *, patience_s: float) -> msgspec.Raw | None:
        """None: it is this run that is to be carried out. Else the first answer, or its refusal as an exception.

        patience_s: how long another daemon's answer is waited for; then `Unavailable`.
        """
        until = self._clock.monotonic() + patience_s
        key = records.once_key(session, message)
        entry = records.Once(digest=digest(message), daemon=self._daemon, run=run)
        put = Put(key, records.value(entry), await self._leases.current())
        result = await self._store.txn(Txn((absent(key),), (put, Get(key)), (Get(key),)))
        while True:
            found = result.answers[-1]
            assert isinstance(found, Got)
            if not found.kvs:  # forgotten meanwhile
                raise SandboxDied("the run was begun before, and its answer is not kept any more; it was not run again")
            first = record(records.once, found.kvs[0])
            if first.run == run:  # ours, also when the transaction's own reply was lost and etcd was asked again
                return None
            if first.digest != digest(message):
                raise Conflict("request id was used before, for another run", verb="run")
            if first.ended == "reply":
                return first.answer
            if first.ended == "error":
                raise from_body(msgspec.json.decode(first.answer))
            if await self._store.get(records.key(records.DAEMONS, first.daemon)) is None:
                raise SandboxDied(
                    f"the daemon died that carried out run {first.run}; how far it came is not known, and it was not "
                    "run again",
                    run=first.run,
                )
            if self._clock.monotonic() > until:
                raise Unavailable(f"run {first.run} is not over yet; ask again with the same id", what="run")
            await self._clock.sleep(LOOK_S)
            result = await self._store.txn(Txn((), (Get(key),)))

    async def forget(self, message: wire.Run, session: str) -> None:
        """It was not carried out after all: a retry may be."""
        try:
            await self._store.txn(Txn((), (Delete(records.once_key(session, message)),)))
        except FabricError as error:
            self._log.warning("a run that was not started is still kept as begun", why=str(error))

    async def finish(self, message: wire.Run, session: str, run: str, ended: wire.RunReply | FabricError) -> None:
        """Keeps what came of it. When etcd cannot be reached, it is tried for a while; then a retry will not be told."""
        told = encode(ended) if isinstance(ended, wire.RunReply) else encode(ended.to_body())
        if len(told) > ANSWER_MAX:
            large = TooLarge("the run was carried out; its answer was too large to be kept for a retry", run=run)
            ended, told = large, encode(large.to_body())
        entry = records.Once(
            digest=digest(message), daemon=self._daemon, run=run, answer=msgspec.Raw(told),
            ended="reply" if isinstance(ended, wire.RunReply) else "error",
        )  # fmt: skip
        until = self._clock.monotonic() + KEEP_TRYING_S
        while True:
            try:
                put = Put(records.once_key(session, message), records.value(entry), await self._leases.current())
                await self._store.txn(Txn((), (put,)))
            except FabricError as error:
                if self._clock.monotonic() > until:
                    self._log.warning("the answer of a run was not kept for a retry", run=run, why=str(error))
                    return
                await self._clock.sleep(self._clock.jitter(0.1, 0.5))
            else:
                return
