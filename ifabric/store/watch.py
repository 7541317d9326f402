"""The watch: what happened, in order, without a gap.

etcd's watch resumes from a revision, so the loop keeps the one it has seen and starts again from the next whenever
the stream ends, on the next endpoint. When that revision has been compacted away there is no way to know what
happened in between: the present is listed instead, and the batch says `resync`.

One stream carries a watcher for each prefix. etcd sends a watcher's events in order, but one watcher may lag behind
another, so a batch's `revision` is the least of theirs. A quiet prefix would hold it back for ever: asked for
progress, etcd answers for the whole stream once every watcher has caught up. The same question, asked when nothing
was heard for a while, finds out that a server is frozen.

etcd never splits a revision over two answers of a watcher (fragments are not asked for), so a batch holds whole
revisions. The header's revision is *not* what a watcher has seen: while it catches up, the header is ahead of its
events.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from aetcd import rpc

from ifabric.clock import Clock
from ifabric.errors import Unavailable
from ifabric.store.base import KV, Batch, Event, prefix_end
from ifabric.store.channel import OLD_ROLES, Connection, forbidden

#: nothing heard for this long: ask; no answer for as long again: the endpoint is in trouble
QUIET_S = 3.0
BACKOFF_S = (0.05, 0.3)
PAGE = 1_000


class CompactedError(Exception):
    """The revision to resume from is gone."""


class RolesChangedError(Exception):
    """etcd's users or roles changed while it looked at the request."""


class Watch:
    """One watch over some prefixes."""

    def __init__(self, etcd: Connection, clock: Clock, prefixes: tuple[bytes, ...], after_revision: int) -> None:
        self._etcd = etcd
        self._clock = clock
        self._prefixes = prefixes
        #: for each prefix, the newest revision whose events were handed out
        self._seen = dict.fromkeys(range(len(prefixes)), after_revision)
        self._call: Any = None
        self._writing = asyncio.Lock()
        self._closed = False
        self._moved = False
        self.reconnects = 0

    def ended(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Ends `batches`. Twice is harmless."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def move(self) -> None:
        """Goes on over the channel that is in use by now, with the next event.

        Its present stream is closed on our side only: what etcd has sent already arrives before the end of it. (To
        cancel it would look to the reader as if it were cancelled itself.)
        """
        call = self._call
        if call is not None:
            self._moved = True
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it ends by itself
                async with self._writing:
                    await call.done_writing()

    async def ask_progress(self) -> None:
        """Sends etcd's progress request, when there is a stream to send it on."""
        call = self._call
        if call is None:
            return
        try:
            async with self._writing:
                await call.write(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is ending: the reader sees it too, and the next one says how far it is

    async def batches(self) -> AsyncIterator[Batch]:
        """Batches until `close`."""
        while not self.ended():
            try:
                channel = self._etcd.channel
            except Unavailable:
                return
            try:
                async for batch in self._stream(channel.watch):
                    yield batch
            except CompactedError:
                yield await self._relist()
                continue
            except RolesChangedError:
                await self._clock.sleep(self._clock.jitter(*BACKOFF_S))
                continue
            except TimeoutError:
                self._etcd.rotate(channel)
            except grpc.aio.AioRpcError as error:
                if self.ended():
                    return
                if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
                    raise forbidden(channel.user, error.details() or "") from None
                self._etcd.rotate(channel)
            except asyncio.CancelledError:
                if self.ended():  # our own close cancelled the call, and with it whoever was reading
                    return
                task = asyncio.current_task()
                if not self._moved or task is None or task.cancelling():
                    raise
            except asyncio.InvalidStateError:  # the stream ended before all was asked for
                if not self._moved:
                    self._etcd.rotate(channel)
            if self._moved:
                self._moved = False
                continue
            self.reconnects += 1
            await self._clock.sleep(self._clock.jitter(*BACKOFF_S))

    async def _stream(self, open_call: Any) -> AsyncIterator[Batch]:
        call = open_call()
        self._call = call
        try:
            for watch_id, prefix in enumerate(self._prefixes):
                create = rpc.WatchCreateRequest(
                    key=prefix,
                    range_end=prefix_end(prefix),
                    start_revision=self._seen[watch_id] + 1,
                    progress_notify=True,
                    watch_id=watch_id + 1,
                )
                async with self._writing:
                    await call.write(rpc.WatchRequest(create_request=create))
            while True:
                response = await self._next(call)
                if response is grpc.aio.EOF:
                    return
                batch = self._batch(response)
                if batch is not None:
                    yield batch
        finally:
            self._call = None
            call.cancel()

    async def _next(self, call: Any) -> Any:
        reading = asyncio.ensure_future(call.read())
        try:
            for _ in range(2):
                done, _ = await asyncio.wait({reading}, timeout=QUIET_S)
                if done:
                    return reading.result()
                await self.ask_progress()
        finally:
            if not reading.done():
                reading.cancel()
        raise TimeoutError("the watch is silent")

    def _batch(self, response: Any) -> Batch | None:
        if response.canceled or response.compact_revision:
            if response.compact_revision:
                raise CompactedError
            if OLD_ROLES in response.cancel_reason:
                raise RolesChangedError
            raise forbidden(self._etcd.channel.user, response.cancel_reason or "it ended the watch")
        if response.created:
            return None
        if not response.events:
            self._progress(response)
            return Batch(min(self._seen.values()), ())
        events = tuple(map(_event, response.events))
        at = response.watch_id - 1
        self._seen[at] = max(self._seen[at], events[-1].kv.mod_revision)
        return Batch(min(self._seen.values()), events)

    def _progress(self, response: Any) -> None:
        """A progress answer; for the whole stream when it names no watcher."""
        revision = response.header.revision
        about = range(len(self._prefixes)) if response.watch_id <= 0 else (response.watch_id - 1,)
        for at in about:
            self._seen[at] = max(self._seen[at], revision)

    async def _relist(self) -> Batch:
        """The present of every prefix, as of one revision."""
        revision = 0
        events: list[Event] = []
        for prefix in self._prefixes:
            start, end = prefix, prefix_end(prefix)
            while True:
                got, at = await self._etcd.range(start, end, limit=PAGE, revision=revision)
                revision = revision or at
                events += (Event(kv, deleted=False, created=kv.version == 1) for kv in got.kvs)
                if len(got.kvs) >= got.total:
                    break
                start = got.kvs[-1].key + b"\x00"
        self._seen = dict.fromkeys(self._seen, revision)
        return Batch(revision, tuple(events), resync=True)


def _event(event: Any) -> Event:
    kv = event.kv
    deleted = event.type == rpc.Event.DELETE
    return Event(
        KV(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease), deleted, kv.version == 1
    )
