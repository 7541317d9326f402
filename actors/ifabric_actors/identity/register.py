"""Where a decision about an agent meets etcd: its record and whose key it is, in one transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable

import msgspec

from ifabric.actor.base import Caller, Context
from ifabric.actor.receipts import Receipts, receipt_key, replayed
from ifabric.errors import Conflict, Internal, Overloaded, UnknownAgent
from ifabric.store.base import Compare, Delete, Get, Got, Put, Store, Txn, TxnRefused, absent, prefix_end, unchanged
from ifabric.store.commit import Request
from ifabric.wire import identity as wire
from ifabric_actors.identity import records
from ifabric_actors.identity.records import Agent

#: decisions for one command before it is told that the fabric is overloaded
TRIES_MAX = 16
#: records read in one transaction
READ_MAX = 100

Message = wire.CreateAgent | wire.RotateAgent | wire.RevokeAgent


class Register:
    """The agents that etcd knows."""

    def __init__(self, context: Context, receipts: Receipts) -> None:
        self._store, self._committer, self._receipts = context.store, context.committer, receipts
        self._operators: Collection[str] = context.settings.identity.operators
        #: the record of a name, now
        self.get = agents_of(context.store, self._operators)

    async def owner_of(self, public_key: str) -> str | None:
        """The name that a key belongs to, or belonged to last."""
        kv = await self._store.get(records.owner_key(public_key))
        return None if kv is None else kv.value.decode(errors="replace")

    async def several(self, names: Iterable[str]) -> dict[str, Agent | Internal | None]:
        """As `get`, of many; a record that is damaged is its error, and keeps nobody from the others'."""
        found: dict[str, Agent | Internal | None] = {}
        asked = [name for name in names if name not in self._operators]
        for at in range(0, len(asked), READ_MAX):
            some = asked[at : at + READ_MAX]
            outcome = await self._store.txn(Txn((), tuple(Get(records.agent_key(name)) for name in some)))
            for name, got in zip(some, outcome.answers, strict=True):
                try:
                    found[name] = records.agent(got.kvs[0]) if isinstance(got, Got) and got.kvs else None
                except Internal as error:
                    found[name] = error
        return found

    async def page(self, after: str, limit: int) -> list[tuple[str, Agent]]:
        """Up to `limit` agents whose names come after that one."""
        start = records.agent_key(after) + b"\0" if after else records.AGENTS
        got, _ = await self._store.range(start, prefix_end(records.AGENTS), limit=limit)
        return [(kv.key[len(records.AGENTS) :].decode(), records.agent(kv)) for kv in got.kvs]

    async def change(
        self,
        message: Message,
        caller: Caller,
        decide: Callable[[Agent | None], Agent],
        reply_of: Callable[[Agent], wire.AgentReply],
    ) -> tuple[Agent | None, wire.AgentReply | msgspec.Raw]:
        """Decides and commits until it goes through: the record before, and the answer (of a repetition: the first one).

        Raises what `decide` raises, `Conflict` when the key is somebody else's, and what `Committer.commit` raises.
        """
        key = records.agent_key(message.agent)
        for _ in range(TRIES_MAX):
            kv = await self._store.get(key)
            there = None if kv is None else records.agent(kv)
            after = decide(there)
            compares, writes, reads = [unchanged(key, 0 if kv is None else kv.mod_revision)], [], []
            if after != there:
                compares.append(await self._still_free(after.public_key, message.agent))
                writes = [Put(key, records.encode(after)), *self._keys(message.agent, there, after)]
            reply = reply_of(after)
            if message.request_id is not None:
                receipt = self._receipts.put(caller.session, message, reply, await self._receipts.current())
                compares.append(absent(receipt.key))
                reads.append(Get(receipt_key(caller.session, message.request_id)))
                writes.append(receipt)
            if not writes:
                return there, reply
            done = await self._commit(tuple(compares), tuple(writes), tuple(reads), caller.session)
            if done is None:
                return there, reply
            if done and done[0].kvs:
                return there, replayed(done[0].kvs[0], message)
        raise Overloaded(f"{message.agent} lost {TRIES_MAX} races; nothing was done", what="contention")

    async def _commit(
        self, compares: tuple[Compare, ...], writes: tuple[Put | Delete, ...], reads: tuple[Get, ...], owner: str
    ) -> list[Got] | None:
        """None: it was committed. Else what was read, because something had changed."""
        witness = next((write for write in reversed(writes) if isinstance(write, Put)), None)
        try:
            outcome = await self._committer.commit(Request(compares, writes, reads, owner, witness=witness))
        except TxnRefused:
            self._receipts.retire()  # the lease under the receipt has gone, which only a frozen daemon sees
            return []
        return None if outcome.succeeded else [got for got in outcome.answers if got is not None]

    async def _still_free(self, public_key: str, name: str) -> Compare:
        """That nobody else has the key, and gets it until the commit. `Conflict` when somebody has."""
        kv = await self._store.get(records.owner_key(public_key))
        if kv is None:
            return absent(records.owner_key(public_key))
        owner = kv.value.decode(errors="replace")
        if owner != name:
            raise Conflict(f"this key is {owner}'s; nothing was changed. Make a new one.", agent=owner)
        return unchanged(kv.key, kv.mod_revision)

    @staticmethod
    def _keys(name: str, there: Agent | None, after: Agent) -> list[Put | Delete]:
        """Whose the keys are from now on. Those that are let in no more are forgotten."""
        good = {key for key in (after.public_key, after.former_key) if key and not after.revoked_at}
        before = {key for key in (there.public_key, there.former_key) if key} if there is not None else set()
        puts: list[Put | Delete] = [Put(records.owner_key(key), name.encode()) for key in sorted(good)]
        return puts + [Delete(records.owner_key(key)) for key in sorted(before - good)]


def agents_of(store: Store, operators: Collection[str]) -> Callable[[str], Awaitable[Agent | None]]:
    """Looks agents up. An operator of the configuration has no record, whatever there was before it named him."""

    async def get(name: str) -> Agent | None:
        kv = None if name in operators else await store.get(records.agent_key(name))
        return None if kv is None else records.agent(kv)

    return get


def there_is(name: str, there: Agent | None) -> Agent:
    """The record. `UnknownAgent` when there is none."""
    if there is None:
        raise UnknownAgent(f"there is no agent {name}; nothing was changed", agent=name)
    return there
