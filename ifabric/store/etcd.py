"""etcd, behind the seam of `ifabric.store.base`.

Built on the message types and stubs that aetcd exports; the connection is ours, because aetcd's knows neither TLS nor
a second endpoint. One channel for each endpoint, one of them in use; a failure moves on to the next. Every attempt
has a deadline of its own, well below the total: an etcd whose leader died answers nobody for a second or two, and a
frozen one for ever.

Reads are tried again until the total has passed. A transaction is sent once: whether a lost one happened is for the
caller to find out (`ifabric.store.commit` does it by a witness). Only one that surely was not sent is tried
elsewhere.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from aetcd import rpc

from ifabric.clock import Clock
from ifabric.errors import FabricError, Forbidden, StoreFull, Unavailable, Unreachable
from ifabric.store.base import (
    KV,
    Batch,
    Deleted,
    Done,
    Get,
    Got,
    Health,
    Put,
    Txn,
    TxnRefused,
    TxnResult,
)
from ifabric.store.channel import Channel, EtcdSettings, open_channel
from ifabric.store.encoding import encode_txn
from ifabric.store.keepalive import KeepAlives
from ifabric.store.watch import Watch

__all__ = ["Etcd", "EtcdSettings"]

_REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
}
#: what etcd's gRPC says of a request that it does not even read; above 1.5 MiB and below this, etcd itself refuses it
_TOO_LARGE = "grpc: received message larger than max"
#: an alarm in a status: "memberID:1234 alarm:NOSPACE "
_ALARM = re.compile(r"\balarm:(\w+)")
_FORBIDDEN = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
#: what gRPC says when it never had a connection to send on
_NOT_SENT = ("failed to connect", "connection refused", "name resolution", "no route to host")


def translate(error: grpc.aio.AioRpcError) -> FabricError:
    """The one table from gRPC's errors to ours."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in details:
        return StoreFull(what="etcd", details=details)
    if code in _REFUSED or (code is grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith(_TOO_LARGE)):
        return TxnRefused(f"etcd refused the request: {details}")
    if code in _FORBIDDEN:
        return Forbidden(f"etcd does not allow this to the daemon's certificate: {details}", what="etcd")
    not_sent = code is grpc.StatusCode.UNAVAILABLE and any(sign in details.lower() for sign in _NOT_SENT)
    return Unavailable(
        f"etcd does not answer ({code.name.lower()}: {details[:200]})", what="etcd", maybe_done=not not_sent
    )


class Etcd:
    """A connection to an etcd cluster."""

    def __init__(self, settings: EtcdSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._channels: list[Channel] = []
        self._at = 0
        self._answered = False
        self._closed = False
        self._watches: set[Watch] = set()
        self._keep_alives = KeepAlives(self, clock)
        self.attempts_failed = 0
        self.rotations = 0

    # -- life --------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        self._closed = False
        self._channels = [open_channel(endpoint, self._settings) for endpoint in self._settings.endpoints]
        until = self._clock.monotonic() + self._settings.timeout_s
        while (why := await self._first_answer()) is not None:
            if self._clock.monotonic() >= until:
                await self.close()
                raise Unreachable(f"no etcd answers: {why}")
            await self._clock.sleep(self._clock.jitter(0.1, 0.3))

    async def _first_answer(self) -> str | None:
        """Settles on the first endpoint that answers; when none does, why not, of each."""
        why = []
        share_s = self._settings.timeout_s / len(self._channels)
        for at, channel in enumerate(self._channels):
            try:
                await channel.status(rpc.StatusRequest(), timeout=share_s)
            except grpc.aio.AioRpcError as error:
                why.append(f"{channel.endpoint}: {error.code().name.lower()}, {(error.details() or '')[:300]}")
                continue
            self._at, self._answered = at, True
            return None
        return "; ".join(why)

    async def close(self) -> None:
        self._closed = True
        self._answered = False
        self._keep_alives.close()
        for watch in list(self._watches):
            watch.close()
        channels, self._channels = self._channels, []
        await asyncio.gather(*(channel.close() for channel in channels))

    @property
    def connected(self) -> bool:
        return self._answered

    @property
    def channel(self) -> Channel:
        """The channel in use."""
        if not self._channels:
            raise Unavailable("The connection to etcd is closed.", what="etcd", maybe_done=False)
        return self._channels[self._at]

    def rotate(self, failed: Channel) -> None:
        """Moves on to the next endpoint, unless somebody has done so since."""
        self.attempts_failed += 1
        self._answered = False
        if self._channels and self._channels[self._at] is failed and len(self._channels) > 1:
            self._at = (self._at + 1) % len(self._channels)
            self.rotations += 1

    # -- calling -----------------------------------------------------------------------------------------------------

    async def _once(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """One attempt on the endpoint in use."""
        channel = self.channel
        try:
            answer = await getattr(channel, method)(request, timeout=timeout_s or self._settings.attempt_timeout_s)
        except grpc.aio.AioRpcError as error:
            found = translate(error)
            if isinstance(found, Unavailable):
                self.rotate(channel)
            raise found from None
        self._answered = True
        return answer

    async def _until_answered(self, method: str, request: Any, *, only_unsent: bool = False) -> Any:
        """Attempts on one endpoint after the other until the total has passed."""
        until = self._clock.monotonic() + self._settings.timeout_s
        while True:
            try:
                return await self._once(method, request)
            except Unavailable as error:
                if self._clock.monotonic() >= until or (only_unsent and error.facts.get("maybe_done", True)):
                    raise
            await self._clock.sleep(self._clock.jitter(0.01, 0.05))

    # -- keys --------------------------------------------------------------------------------------------------------

    async def get(self, key: bytes) -> KV | None:
        answer = await self._until_answered("range", rpc.RangeRequest(key=key))
        return _kv(answer.kvs[0]) if answer.kvs else None

    async def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int = 0) -> tuple[Got, int]:
        request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
        answer = await self._until_answered("range", request)
        return Got(tuple(map(_kv, answer.kvs)), answer.count), answer.header.revision

    async def txn(self, txn: Txn) -> TxnResult:
        answer = await self._once("txn", encode_txn(txn))
        return _result(txn, answer, answer.header.revision)

    # -- leases ------------------------------------------------------------------------------------------------------

    async def grant(self, ttl_s: int) -> int:
        answer = await self._until_answered("grant", rpc.LeaseGrantRequest(TTL=ttl_s), only_unsent=True)
        return int(answer.ID)

    async def revoke(self, lease: int) -> None:
        try:
            await self._until_answered("revoke", rpc.LeaseRevokeRequest(ID=lease))
        except TxnRefused:
            return  # it is gone already, which is what was asked for

    async def keep_alive(self, lease: int) -> float:
        return await self._keep_alives.renew(lease, self._settings.timeout_s)

    async def left(self, lease: int) -> float:
        answer = await self._until_answered("left", rpc.LeaseTimeToLiveRequest(ID=lease))
        return float(max(0, answer.TTL))

    # -- watching ----------------------------------------------------------------------------------------------------

    async def watch(self, prefixes: Sequence[bytes], *, after_revision: int) -> AsyncIterator[Batch]:
        watch = Watch(self, self._clock, tuple(prefixes), after_revision)
        self._watches.add(watch)
        try:
            async for batch in watch.batches():
                yield batch
        finally:
            self._watches.discard(watch)
            watch.close()

    async def progress(self) -> None:
        for watch in list(self._watches):
            await watch.ask_progress()

    async def health(self) -> Health:
        status = await self._once("status", rpc.StatusRequest())
        # a member answers the status by itself; this read only with a quorum. (Asking for the alarms would be a raft
        # proposal and an fsync, and the status has them.)
        await self._once("range", rpc.RangeRequest(key=b"fabric/", count_only=True))
        names = tuple(sorted({name for said in status.errors for name in _ALARM.findall(said)}))
        return Health(status.version, status.header.revision, status.leader, status.dbSize, names)


# -- from etcd's messages: the hot path ------------------------------------------------------------------------


def _result(txn: Txn, answer: Any, revision: int) -> TxnResult:
    """The answers are read by what was asked, which is cheaper than asking each what it is."""
    succeeded = answer.succeeded
    asked = txn.then if succeeded else txn.otherwise
    answers: list[Got | Deleted | Done | TxnResult] = []
    for op, response in zip(asked, answer.responses, strict=True):
        kind = type(op)
        if kind is Put:
            answers.append(_DONE)
        elif kind is Txn:
            answers.append(_result(op, response.response_txn, revision))  # type: ignore[arg-type]
        elif kind is Get:
            got = response.response_range
            answers.append(Got(tuple(map(_kv, got.kvs)), got.count))
        else:
            answers.append(Deleted(response.response_delete_range.deleted))
    return TxnResult(succeeded, revision, tuple(answers))


_DONE = Done()


def _kv(kv: Any) -> KV:
    return KV(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)
