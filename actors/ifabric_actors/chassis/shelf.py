"""Compiled modules at hand: each in a sealed memfd, whose descriptor a worker is given.

What several ask for at once is loaded once, for all of them, and their going away does not stop it. A descriptor is
closed with the last one who refers to its `Code`: leaving the shelf closes nothing under a run.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from ifabric.cancellation import cancel_and_wait
from ifabric.errors import Unavailable, UnknownModule
from ifabric_actors.chassis.cache import Cache, Sealed

#: of all compiled modules at hand together
AT_HAND_MAX_BYTES = 1 << 30


class Code:
    """A compiled module at hand. `number` is its own in this process."""

    __slots__ = ("_sealed", "fd", "module", "number", "size")

    def __init__(self, module: str, number: int, sealed: Sealed) -> None:
        self.module, self.number = module, number
        #: closed when nobody refers to this any more
        self._sealed = sealed
        self.fd, self.size = sealed.fd, sealed.size


class Shelf:
    """The modules that were used last. `fetch` brings a module that has to be compiled; raises `UnknownModule`..."""

    def __init__(self, cache: Cache, fetch: Callable[[str], Awaitable[bytes]], at_hand_max: int) -> None:
        self._cache, self._fetch, self._at_hand_max = cache, fetch, at_hand_max
        self._numbers = itertools.count(1)
        #: the one used last is last
        self._at_hand: OrderedDict[str, Code] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Code]] = {}
        self._stopping = False

    async def stop(self) -> None:
        """Ends what is being loaded; whoever waits for it is told so. Twice is harmless."""
        self._stopping = True
        await cancel_and_wait(*self._loading.values())
        self._at_hand.clear()

    async def code(self, module: str, data: bytes | None = None) -> Code:
        """The compiled form of a module, which is `data` when that is given.

        Raises what `fetch` and the compiler raise; `Unavailable` when the chassis stops.
        """
        while True:
            if module in self._at_hand:
                self._at_hand.move_to_end(module)
                self._cache.count("memory")
                return self._at_hand[module]
            loading = self._loading.get(module) or self._begin(module, data)
            await asyncio.wait({loading})
            if loading.cancelled():
                raise _stops()
            try:
                return loading.result()
            except UnknownModule:
                if data is None:
                    raise  # else it was begun for somebody who did not have the module

    def _begin(self, module: str, data: bytes | None) -> asyncio.Task[Code]:
        if self._stopping:
            raise _stops()
        task = self._loading[module] = asyncio.create_task(self._load(module, data), name="load a module")
        task.add_done_callback(lambda ended: self._loaded(module, ended))
        return task

    def _loaded(self, module: str, task: asyncio.Task[Code]) -> None:
        del self._loading[module]
        if not task.cancelled():
            task.exception()  # all who asked may have gone: then nobody is told

    async def _load(self, module: str, data: bytes | None) -> Code:
        sealed = await self._cache.load(module)
        if sealed is None:
            sealed = await self._cache.compile(module, await self._fetch(module) if data is None else data)
        code = self._at_hand[module] = Code(module, next(self._numbers), sealed)
        while self._has_too_much():
            self._at_hand.popitem(last=False)
        return code

    def _has_too_much(self) -> bool:
        if len(self._at_hand) > self._at_hand_max:
            return True
        return len(self._at_hand) > 1 and sum(code.size for code in self._at_hand.values()) > AT_HAND_MAX_BYTES


def _stops() -> Unavailable:
    return Unavailable("the chassis stops; the module was not loaded", what="chassis")
