"""Modules on their way: the parts that a session uploads, until a `put` or an `inspect` makes one of them.

Parts of one upload come to whichever daemon the queue group picks. The bytes of each go into an object store of their
own, `IF_UPLOADS`, that no agent can reach; then one record a session, in etcd, names them. The record is what is
believed: it is changed by compare-and-swap, so two daemons never take two parts for one place or too much together. A
daemon that dies in between leaves an object that no record names, and `sweep` finds it.

**Whose upload it is** is said by the subject that it came on. The session is part of the record's key, so that nobody
can name another's upload.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from ifabric.actor.receipts import Leases
from ifabric.bus.base import Bus, ObjectDamaged, Objects, ObjectSpec
from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import BadRequest, FabricError, Overloaded, TooLarge, Unavailable
from ifabric.store.base import KV, Delete, Get, Got, Put, Store, Txn, TxnRefused, prefix_end, record, unchanged
from ifabric.wire import chassis as wire
from ifabric_actors.chassis import parts, records
from ifabric_actors.chassis.records import Part, Upload

#: the store has room for so many modules of the largest size
ROOM = 8
#: parts of one session that one daemon has in hand, and its uploads that are being made into modules; and of all
PARTS_AT_ONCE, WHOLE_AT_ONCE, WHOLE_OF_ALL = 8, 2, 4
#: parts that are read at once
WINDOW = 4
#: smaller parts are decoded on the loop
ON_LOOP_MAX_CHARS = 64 * 1024
SWEEP_S = 300.0
#: how often a record is tried to be changed while others change it
TRIES = 100


class Uploads:
    """One daemon's part in the uploads of all sessions."""

    def __init__(self, bus: Bus, store: Store, clock: Clock, config: Any, log: Any) -> None:
        self._bus, self._store, self._clock, self._log = bus, store, clock, log
        self._max_bytes = config.modules.max_bytes
        self._spec = ObjectSpec(
            wire.UPLOADS_BUCKET,
            max_bytes=ROOM * self._max_bytes,
            replicas=config.modules.replicas,
            description="parts of modules that are being uploaded to the chassis",
        )
        self._objects: Objects | None = None
        self._leases = Leases(store, clock, keep_s=parts.KEPT_MS // 1000)
        self._in_hand: Counter[tuple[str, str]] = Counter()
        self._whole = asyncio.Semaphore(WHOLE_OF_ALL)
        self._freeing: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """What is being deleted is left to a sweep. Twice is harmless."""
        await cancel_and_wait(*self._freeing)
        await self._leases.stop()

    # -- parts ---------------------------------------------------------------------------------------------------------

    async def add(self, message: wire.Upload, session: str) -> wire.UploadReply:
        """Keeps a part. Raises `BadRequest`, `Conflict`, `TooLarge`, `Overloaded`, `StoreFull`, `Unavailable`."""
        if len(message.data) > (self._max_bytes + 2) // 3 * 4:
            raise TooLarge(
                f"part {message.part} alone is larger than a module may be, {self._max_bytes} bytes; it was not kept",
                max=self._max_bytes,
            )
        with self._one_more(session, "parts", PARTS_AT_ONCE):
            data, digest = await _decoded(message.data)
            part = Part(len(data), digest, f"{session}/{message.upload}/{message.part}-{self._clock.token()}")

            def decide(before: records.Uploads) -> parts.Added:
                return parts.added(before, message, part, self._clock.wall_ms(), max_bytes=self._max_bytes)

            before, _ = await self._read(session)
            sooner = decide(before)
            if sooner.uploads is before:
                return sooner.reply
            await self._kept(part, data)
            return await self._entered(session, message.upload, part, decide)

    async def _kept(self, part: Part, data: bytes) -> None:
        async with self._bucket() as objects:
            await objects.put(part.object, data)

    async def _entered(
        self, session: str, name: str, part: Part, decide: Callable[[records.Uploads], parts.Added]
    ) -> wire.UploadReply:
        """Names a part that was stored. What the record does not name is deleted again."""
        made: list[parts.Added] = []

        def change(before: records.Uploads) -> records.Uploads:
            made.append(decide(before))
            return made[-1].uploads

        try:
            after = await self._change(session, change)
        except Unavailable:
            raise  # the record may name it; if not, a sweep finds it
        except FabricError:
            self._free((part,))
            raise
        entered = after.uploads[name].parts.values()
        if all(one.object != part.object for one in entered):  # the same data came twice at once
            self._free((part,))
        for dropped in made[-1].dropped:
            self._free(dropped.parts.values())
        return made[-1].reply

    # -- what they make ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def place(self, session: str) -> AsyncIterator[None]:
        """For one module in memory: few at once, and of one session fewer. `Overloaded`."""
        with self._one_more(session, "whole", WHOLE_AT_ONCE):
            async with self._whole:
                yield

    async def whole(self, session: str, name: str) -> bytes | str:
        """The module that an upload has brought, or the id of the one that it was kept as.

        Raises `BadRequest` when parts are missing, or make another module than was announced.
        """
        uploads, _ = await self._read(session)
        upload = uploads.uploads.get(name)
        if upload is not None and upload.module:
            return upload.module
        wanted = parts.whole(name, upload)
        assert upload is not None, "else its parts would be missing"
        found, lost = await self._gathered(wanted)
        if lost:
            await self._change(session, lambda before: parts.without(before, name, lost))
            return await self.whole(session, name)  # it was kept meanwhile, or they are missing now
        data = b"".join(found)
        if upload.sha256 and await asyncio.to_thread(_sha256, data) != upload.sha256:
            await self.settle(session, name, None)
            raise BadRequest(
                f"the parts of upload {name} make another module than was announced, sha256:{upload.sha256}; "
                "nothing was kept: upload it again",
                upload=name,
            )
        return data

    async def _gathered(self, wanted: Sequence[Part]) -> tuple[list[bytes], list[Part]]:
        """The bytes of parts, and those that were lost."""
        found: list[bytes] = []
        lost: list[Part] = []
        async with self._bucket() as objects:

            async def read(part: Part) -> bytes | None:
                with contextlib.suppress(ObjectDamaged, TooLarge):
                    return await objects.get(part.object, max_bytes=part.size)
                return None

            for at in range(0, len(wanted), WINDOW):
                window = wanted[at : at + WINDOW]
                for part, data in zip(window, await asyncio.gather(*map(read, window)), strict=True):
                    if data is None or len(data) != part.size:
                        lost.append(part)
                    else:
                        found.append(data)
        return found, lost

    async def settle(self, session: str, name: str, module: str | None) -> None:
        """Forgets an upload; of one that was kept, its name goes on to stand for the module."""
        over: list[Upload] = []

        def change(before: records.Uploads) -> records.Uploads:
            over[:] = [one for key, one in before.uploads.items() if key == name]
            return parts.settled(before, name, module, self._clock.wall_ms())

        try:
            await self._change(session, change)
        except FabricError as error:
            self._log.info("an upload is forgotten another time", session=session, upload=name, why=error.message)
            return
        for upload in over:
            self._free(upload.parts.values())

    # -- what nobody came back for -----------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Never returns: deletes it now and then."""
        while True:
            await self._clock.sleep(self._clock.jitter(SWEEP_S / 2, SWEEP_S))
            try:
                await self.sweep_once()
            except FabricError as error:
                self._log.info("old uploads are deleted another time", why=error.message)

    async def sweep_once(self) -> int:
        """How many parts, and remains of interrupted ones, were deleted."""
        before_ms = self._clock.wall_ms() - parts.IDLE_MS
        async with self._bucket() as objects:
            # objects before records: what is stored later is not yet among them
            old = {info.name for info in await objects.page() if info.modified_ms < before_ms}
            old -= await self._named()
            for name in old:
                await objects.delete(name)
            swept = len(old) + await objects.sweep(before_ms)
        if swept:
            self._log.info("parts of old uploads were deleted", count=swept)
        return swept

    async def _named(self) -> set[str]:
        """The objects that are named by the records, when those have forgotten what is old."""
        found: set[str] = set()
        got, _ = await self._store.range(records.UPLOADS, prefix_end(records.UPLOADS))
        for kv in got.kvs:
            session = kv.key.removeprefix(records.UPLOADS).decode()
            after = await self._change(session, lambda before: parts.swept(before, self._clock.wall_ms()), kv)
            found |= {part.object for upload in after.uploads.values() for part in upload.parts.values()}
        return found

    # -- where they are ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _one_more(self, session: str, what: str, most: int) -> Any:
        key = (session, what)
        if self._in_hand[key] >= most:
            raise Overloaded(
                f"this session has {most} {'uploads that become modules' if what == 'whole' else 'parts'} on their way "
                "here, and no more at once; nothing was done: try again when one is answered",
                what="uploads",
                max=most,
            )
        self._in_hand[key] += 1
        try:
            yield
        finally:
            self._in_hand[key] -= 1
            if not self._in_hand[key]:
                del self._in_hand[key]

    @contextlib.asynccontextmanager
    async def _bucket(self) -> AsyncIterator[Objects]:
        """Made when it is first needed, and again when it has gone."""
        if self._objects is None:
            self._objects = await self._bus.objects(self._spec)
        try:
            yield self._objects
        except Unavailable:
            self._objects = None
            raise

    def _free(self, what: Iterable[Part]) -> None:
        """Has the bytes of parts deleted that no record names any more. Nobody waits for it: it takes as long as reading
        them, and what is not deleted is swept.
        """
        freeing = asyncio.create_task(self._freed(tuple(what)), name="chassis free")
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)

    async def _freed(self, what: Iterable[Part]) -> None:
        try:
            async with self._bucket() as objects:
                for part in what:
                    await objects.delete(part.object)
        except FabricError as error:
            self._log.info("parts of an upload are deleted another time", why=error.message)

    async def _read(self, session: str) -> tuple[records.Uploads, KV | None]:
        kv = await self._store.get(records.key(records.UPLOADS, session))
        return _uploads(kv), kv

    async def _change(
        self, session: str, change: Callable[[records.Uploads], records.Uploads], kv: KV | None = None
    ) -> records.Uploads:
        """A session's record as it is afterwards. `change` may be asked again, and raises what stands against it."""
        key = records.key(records.UPLOADS, session)
        if kv is None:
            kv = await self._store.get(key)
        for _ in range(TRIES):
            before = _uploads(kv)
            after = change(before)
            if after == before:
                return after
            put = Put(key, records.value(after), await self._leases.current()) if after.uploads else Delete(key)
            compare = unchanged(key, kv.mod_revision if kv is not None else 0)
            try:
                result = await self._store.txn(Txn((compare,), (put,), (Get(key),)))
            except TxnRefused as error:  # the lease is gone
                self._leases.retire()
                raise Unavailable(f"etcd did not take the record of an upload: {error.message}", what="etcd") from None
            if result.succeeded:
                return after
            found = result.answers[-1]
            assert isinstance(found, Got)
            kv = found.kvs[0] if found.kvs else None
        raise Overloaded("too many parts of this session come at once; the part was not kept", what="uploads")


def _uploads(kv: KV | None) -> records.Uploads:
    return records.Uploads() if kv is None else record(records.uploads, kv)


async def _decoded(text: str) -> tuple[bytes, str]:
    """The bytes of a part and their digest; on a thread when they are many. `BadRequest`."""
    return _decode(text) if len(text) <= ON_LOOP_MAX_CHARS else await asyncio.to_thread(_decode, text)


def _decode(text: str) -> tuple[bytes, str]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"data is not base64: {error}; the part was not kept") from None
    if not data:
        raise BadRequest("data is empty: a part has at least one byte; it was not kept")
    return data, _sha256(data)[:32]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
