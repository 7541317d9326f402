"""Modules: what is accepted, kept, and at hand.

A module is kept in the object store under its digest, and only once it was examined and compiled within its limits, so
that a run seldom finds out what `put` could have said. Without identities whoever may publish on the bus may write to
that store: what is read from it is a module because its digest is its name, and it is examined again before it is
compiled.

**A larger one comes in parts** (`uploads`), or, under a name that begins with `uploads/`, as a whole from this store: a
client of an earlier version puts it there itself, where there are no identities to keep it out.

**A retried put finds what the first did.** An upload that was kept goes on as a name for its module (here, an empty
object that says as which), so that any daemon can answer again; one that failed for another reason than its own stays
where it is. What nobody comes back for is deleted after an hour.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from ifabric.bus.base import Bus, ObjectDamaged, Objects, ObjectSpec
from ifabric.clock import Clock, rfc3339
from ifabric.errors import BadRequest, CallerError, FabricError, ModuleRefused, TooLarge, Unavailable, UnknownModule
from ifabric.wire import chassis as wire
from ifabric_actors.chassis import acceptance, wasm
from ifabric_actors.chassis.cache import MIB, Cache
from ifabric_actors.chassis.shelf import Code, Shelf
from ifabric_actors.chassis.uploads import Uploads

T = TypeVar("T")

#: larger modules are looked at on a thread
ON_LOOP_MAX_BYTES = 256 * 1024
#: whole uploads, and what interrupted puts have left, are deleted after so long; and how often they are looked for
UPLOAD_S = 3600.0
SWEEP_S = 3600.0
_KEPT_AS = re.compile(r"sha256:[0-9a-f]{64}")


class Modules:
    """The modules of one daemon."""

    def __init__(self, bus: Bus, clock: Clock, config: Any, cache: Cache, uploads: Uploads, log: Any) -> None:
        self._bus, self._clock, self._log = bus, clock, log
        self._uploads = uploads
        modules, runtime = config.modules, config.runtime
        self._max_bytes = modules.max_bytes
        self._rules = acceptance.Rules(
            max_functions=modules.max_functions,
            max_memory_bytes=runtime.max_memory_mb * MIB,
            max_tables=runtime.max_tables,
            max_table_elements=runtime.max_table_elements,
        )
        self._spec = ObjectSpec(
            wire.MODULES_BUCKET,
            max_bytes=modules.store_max_bytes,
            replicas=modules.replicas,
            description="WebAssembly modules of the chassis",
        )
        self._objects: Objects | None = None
        self._shelf = Shelf(cache, self._fetched, modules.loaded_max)

    async def start(self) -> None:
        """Makes the bucket. Without JetStream, what is compiled already can be run, and it is made later."""
        try:
            async with self._bucket():
                pass
        except FabricError as error:
            self._log.warning("modules cannot be kept or read now", why=error.message)

    async def stop(self) -> None:
        """Ends what is being loaded; whoever waits for it is told so. Twice is harmless."""
        await self._shelf.stop()

    # -- the verbs -----------------------------------------------------------------------------------------------------

    async def put(self, message: wire.Put, session: str) -> wire.PutReply:
        """Keeps a module. Raises `NotWasm`, `ModuleRefused{why}`, `TooLarge`, `StoreFull`, `Unavailable`; for an upload
        `BadRequest` when it is not whole, and `Overloaded`.
        """
        _one_of(message, "wasm", "upload")
        if message.upload is None:
            return await self._keep(self._decoded(message.wasm or ""))
        async with self._uploads.place(session):
            data = await self._brought(message.upload, session)
            if isinstance(data, str):
                return _reply(await self._examined(await self.get(data)), again=True)
            try:
                reply = await self._keep(data)
            except CallerError:
                await self._settle(message.upload, session, None)
                raise
            await self._settle(message.upload, session, reply.module)
            return reply

    async def inspect(self, message: wire.Inspect, session: str) -> wire.InspectReply:
        """What is in a module. Raises `NotWasm`, `UnknownModule`, `TooLarge`, `Unavailable`, and as `put` for an upload."""
        _one_of(message, "wasm", "upload", "module")
        if message.module is not None:
            return await self._facts(await self.get(message.module))
        if message.upload is None:
            return await self._facts(self._decoded(message.wasm or ""))
        async with self._uploads.place(session):
            data = await self._brought(message.upload, session)
            if isinstance(data, str):
                return await self._facts(await self.get(data))
            await self._settle(message.upload, session, None)
            return await self._facts(data)

    async def _facts(self, data: bytes) -> wire.InspectReply:
        module = await self._examined(data)
        return acceptance.facts(module, acceptance.why_refused(module, self._rules))

    async def page(self, message: wire.Modules) -> wire.ModulesReply:
        """Modules in the order of their names."""
        async with self._bucket() as objects:
            # a colon is the first sign after the prefix, so that nothing else is between
            found = await objects.page(prefix="sha256:", after=message.after or "", limit=message.limit + 1)
        lines = [
            wire.ModuleLine(module=info.name, size=info.size, at=rfc3339(info.modified_ms))
            for info in found[: message.limit]
        ]
        more = len(found) > message.limit
        return wire.ModulesReply(modules=tuple(lines), after=lines[-1].module if more else None)

    async def get(self, module: str) -> bytes:
        """The module itself. Raises `UnknownModule`, `TooLarge`, `Unavailable`."""
        data, damage = await self._stored(module)
        if data is not None:
            return data
        if damage:
            raise UnknownModule(
                f"what is kept as {module} is damaged and is not used; put the module again", module=module
            )
        raise UnknownModule(module=module)

    @contextlib.asynccontextmanager
    async def open(self, module: str) -> AsyncIterator[Code]:
        """A module ready to be run; its descriptor stays open for as long as the block lasts.

        Raises `UnknownModule`, `ModuleRefused`, `Unavailable`.
        """
        yield await self._shelf.code(module)

    async def sweep(self) -> None:
        """Never returns: deletes what nobody came back for, now and then."""
        while True:
            await self._clock.sleep(self._clock.jitter(SWEEP_S / 2, SWEEP_S))
            try:
                await self.sweep_once()
            except FabricError as error:
                self._log.info("old uploads are deleted another time", why=error.message)

    async def sweep_once(self) -> int:
        """How many uploads, and remains of interrupted ones, were deleted."""
        before_ms = self._clock.wall_ms() - int(UPLOAD_S * 1000)
        async with self._bucket() as objects:
            old = [info for info in await objects.page(prefix=wire.UPLOADS) if info.modified_ms < before_ms]
            for info in old:
                await objects.delete(info.name)
            swept = len(old) + await objects.sweep(before_ms)
        if swept:
            self._log.info("old uploads were deleted", count=swept)
        return swept

    # -- accepting -----------------------------------------------------------------------------------------------------

    def _decoded(self, text: str) -> bytes:
        if len(text) > (self._max_bytes + 2) // 3 * 4:
            raise self._too_large(len(text) * 3 // 4)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"wasm is not base64: {error}; nothing was done") from None
        if len(data) > self._max_bytes:
            raise self._too_large(len(data))
        return data

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(
            f"the module has {size} bytes, and {self._max_bytes} are allowed; nothing was kept",
            size=size,
            max=self._max_bytes,
        )

    async def _examined(self, data: bytes) -> wasm.Module:
        return await _aside(data, wasm.examine)

    async def _accepted(self, data: bytes) -> wasm.Module:
        """What is in it, or `ModuleRefused`."""
        module = await self._examined(data)
        why = acceptance.why_refused(module, self._rules)
        if why:
            more = f", and {len(why) - 1} more reasons" if len(why) > 1 else ""
            raise ModuleRefused(f"no sandbox here runs this module: {why[0]}{more}; nothing was kept", why=list(why))
        return module

    async def _fetched(self, module: str) -> bytes:
        """A module that is kept, and is to be compiled."""
        data = await self.get(module)
        await self._accepted(data)
        return data

    async def _keep(self, data: bytes) -> wire.PutReply:
        module = await self._accepted(data)
        kept, _ = await self._stored(module.id)
        if kept is None:
            await self._shelf.code(module.id, data)
            async with self._bucket() as objects:
                await objects.put(module.id, data)
            self._log.info("a module is kept", module=module.id, size=module.size)
        return _reply(module, again=kept is not None)

    # -- the object store ----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _bucket(self) -> AsyncIterator[Objects]:
        if self._objects is None:
            self._objects = await self._bus.objects(self._spec)
        try:
            yield self._objects
        except Unavailable:
            self._objects = None  # should it have gone, it is made again
            raise

    async def _stored(self, module: str) -> tuple[bytes | None, bool]:
        """The module, if it is there and is what its name says; and whether something else is there."""
        async with self._bucket() as objects:
            try:
                data = await objects.get(module, max_bytes=self._max_bytes)
            except ObjectDamaged as error:
                self._log.error("a module that is kept is damaged", module=module, why=error.message)
                return None, True
        if data is not None and await _aside(data, wasm.module_id) != module:
            self._log.error("what is kept as a module is another", module=module)
            return None, True
        return data, False

    # -- uploads -------------------------------------------------------------------------------------------------------

    async def _brought(self, upload: str, session: str) -> bytes | str:
        """What an upload has brought, or the id of the module that it was kept as by an earlier put."""
        if not upload.startswith(wire.UPLOADS):
            return await self._uploads.whole(session, upload)
        return await self._kept_as(upload) or await self._put_there(upload)

    async def _kept_as(self, upload: str) -> str | None:
        async with self._bucket() as objects:
            with contextlib.suppress(ObjectDamaged):
                info = await objects.info(upload)
                if info is not None and not info.size and _KEPT_AS.fullmatch(info.description):
                    return info.description
        return None

    async def _put_there(self, name: str) -> bytes:
        """Raises `BadRequest` when nothing was put there, `TooLarge` without reading what was."""
        why = "was put there"
        try:
            async with self._bucket() as objects:
                data = await objects.get(name, max_bytes=self._max_bytes)
        except ObjectDamaged:
            data, why = None, "arrived whole there"
        except TooLarge as error:
            await self._settle(name, "", None)
            raise self._too_large(int(error.facts["size"])) from None
        if data is None:
            raise BadRequest(
                f"nothing {why} as {name} in the object store {wire.MODULES_BUCKET}; send the module in parts, with "
                "`upload`",
                upload=name,
            )
        return data

    async def _settle(self, upload: str, session: str, module: str | None) -> None:
        """Deletes an upload; of one that was kept, its name goes on to stand for the module."""
        if not upload.startswith(wire.UPLOADS):
            await self._uploads.settle(session, upload, module)
            return
        try:
            async with self._bucket() as objects:
                if module is None:
                    await objects.delete(upload)
                else:
                    await objects.put(upload, b"", module)
        except FabricError as error:
            self._log.info("an upload is deleted another time", upload=upload, why=error.message)


def _one_of(message: wire.Put | wire.Inspect, *names: str) -> None:
    given = [name for name in names if getattr(message, name) is not None]
    if len(given) != 1:
        raise BadRequest(f"set one of {', '.join(names)}, and not {' and '.join(given) or 'none'}; nothing was done")


def _reply(module: wasm.Module, *, again: bool) -> wire.PutReply:
    return wire.PutReply(
        module=module.id,
        size=module.size,
        imports=acceptance.imports_shown(module),
        exports=acceptance.exports_shown(module),
        again=again,
    )


async def _aside(data: bytes, function: Callable[[bytes], T]) -> T:
    """What the function makes of the bytes; on a thread when they are many."""
    return function(data) if len(data) <= ON_LOOP_MAX_BYTES else await asyncio.to_thread(function, data)
