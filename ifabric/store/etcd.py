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

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import FabricError, Forbidden, StoreFull, Unavailable, Unreachable
from ifabric.store import told
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
from ifabric.store.channel import OLD_ROLES, Channel, EtcdSettings, explain, forbidden, open_channel
from ifabric.store.encoding import encode_txn
from ifabric.store.keepalive import KeepAlives
from ifabric.store.watch import Watch
from ifabric.tls.diagnosis import ETCD, Trouble, diagnose

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
#: how etcd says that it does not know who asks, or not well enough, where the status does not say it
_NOBODY = ("user name not found", "user not found", "user name is empty", "auth: permission denied")
#: channels of before are closed after so many seconds: a stream of theirs finds out by itself, in less, that its
#: endpoint is frozen
RETIRE_S = 10.0
#: what gRPC says of a server whose certificate is for another host, with the status of a refusal
OTHER_HOST = "does not match SSL server name"
#: what gRPC says when it never had a connection to send on
_NOT_SENT = ("failed to connect", "connection refused", "name resolution", "no route to host")


def translate(error: grpc.aio.AioRpcError, user: str = "") -> FabricError:
    """The one table from gRPC's errors to ours. `user` is whom etcd takes us for."""
    code, details = error.code(), error.details() or ""
    if OLD_ROLES in details:
        return Unavailable(f"etcd's roles are changing: {details}", what="etcd", maybe_done=False)
    if (code in _FORBIDDEN and OTHER_HOST not in details) or any(sign in details for sign in _NOBODY):
        return forbidden(user, details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in details:
        return StoreFull(what="etcd", details=details)
    if code in _REFUSED or (code is grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith(_TOO_LARGE)):
        return TxnRefused(f"etcd refused the request: {details}")
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
        #: one at a time makes channels
        self._opening = asyncio.Lock()
        #: channels of before, until what is under way on them has ended
        self._retiring: set[asyncio.Task[None]] = set()
        #: whether etcd's `Status` answers us, which with access control it does to root alone
        self._is_root = True
        self.attempts_failed = 0
        self.rotations = 0

    # -- life --------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        async with self._opening:
            self._closed = False
            self._channels = self._open()
            until = self._clock.monotonic() + self._settings.timeout_s
            try:
                while isinstance(found := await self._first_answer(self._channels), list):
                    if self._clock.monotonic() >= until or all(trouble.certain for trouble in found):
                        raise _nobody_answers(found)
                    await self._clock.sleep(self._clock.jitter(0.1, 0.3))
            except FabricError:
                await self.close()
                raise
            self._at, self._is_root = found
            self._answered = True

    def _open(self) -> list[Channel]:
        return [open_channel(endpoint, self._settings) for endpoint in self._settings.endpoints]

    async def _first_answer(self, channels: list[Channel], first: int = 0) -> tuple[int, bool] | list[Trouble]:
        """The first endpoint that answers, and whether we are root there; when none does, why not, of each."""
        why = []
        # half of it to ask, half to find out why there is no answer
        share_s = self._settings.timeout_s / len(channels) / 2
        for at in (*range(first, len(channels)), *range(first)):
            channel = channels[at]
            try:
                await channel.status(rpc.StatusRequest(), timeout=share_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.PERMISSION_DENIED:  # that is an answer
                    return at, False
                if isinstance(nobody := translate(error, channel.user), Forbidden):
                    raise nobody from None
                why.append(await explain(channel.endpoint, self._settings, error, timeout_s=share_s))
            else:
                return at, True
        return why

    async def examine(self, timeout_s: float = 1.0) -> list[str]:
        """What is wrong with the certificates of endpoints that are not in use yet: a sentence each."""
        files, secured = self._settings.files, [e for e in self._settings.endpoints if e.startswith("https://")]
        found = await asyncio.gather(*(diagnose(e, files, ETCD, timeout_s=timeout_s) for e in secured))
        return [f"etcd {e}: {one.sentence}" for e, one in zip(secured, found, strict=True) if one and one.certain]

    async def reload(self) -> None:
        """New channels with the certificates as they are now; what is under way ends on the old ones.

        Raises `ConfigError` and `Unreachable` when no endpoint answers with them, and then nothing has changed. While
        there is no connection nothing needs to be done: whoever connects reads the files.
        """
        async with self._opening:
            if self._closed or not self._channels:
                return
            fresh = self._open()
            try:
                found = await self._first_answer(fresh, self._at)
                if isinstance(found, list):
                    raise _nobody_answers(found)
                await self._may_read(fresh[found[0]])
                if self._closed:
                    raise Unavailable("The connection to etcd is closed.", what="etcd", maybe_done=False)
            except BaseException:
                await _close_all(fresh)
                raise
            old, self._channels = self._channels, fresh
            self._at, self._is_root = found
        self._keep_alives.move()
        retiring = asyncio.create_task(self._retire(old), name="etcd channels of before")
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def _may_read(self, channel: Channel) -> None:
        """Raises `Forbidden` when etcd does not know who we are by now."""
        try:
            await channel.range(rpc.RangeRequest(key=b"fabric/", count_only=True), timeout=self._settings.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise translate(error, channel.user) from None

    async def _retire(self, old: list[Channel]) -> None:
        """Moves the watches, and closes the channels when what is under way on them has surely ended."""
        moving = [asyncio.create_task(watch.move(), name="etcd watch moves") for watch in self._watches]
        try:
            await self._clock.sleep(max(RETIRE_S, 2 * self._settings.attempt_timeout_s))
        finally:
            await _close_all(old)
            await cancel_and_wait(*moving)

    async def close(self) -> None:
        self._closed = True
        self._answered = False
        self._keep_alives.close()
        for watch in list(self._watches):
            watch.close()
        channels, self._channels = self._channels, []
        await _close_all(channels)
        await cancel_and_wait(*self._retiring)

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
        """Moves on to the next endpoint, unless somebody has done so since: a channel of before tells nothing about the one
        in use, and one that was exchanged ends when it retires.
        """
        self.attempts_failed += 1
        if not self._channels or self._channels[self._at] is not failed:
            return
        self._answered = False
        if len(self._channels) > 1:
            self._at = (self._at + 1) % len(self._channels)
            self.rotations += 1

    # -- calling -----------------------------------------------------------------------------------------------------

    async def _once(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """One attempt on the endpoint in use; more only when etcd asks for it, for then none was carried out."""
        until = self._clock.monotonic() + self._settings.timeout_s
        while True:
            channel = self.channel
            try:
                answer = await getattr(channel, method)(request, timeout=timeout_s or self._settings.attempt_timeout_s)
            except grpc.aio.AioRpcError as error:
                changing = OLD_ROLES in (error.details() or "")
                if not (changing and self._clock.monotonic() < until):
                    found = translate(error, channel.user)
                    if isinstance(found, Unavailable) and not changing:
                        self.rotate(channel)
                    raise found from None
            else:
                self._answered = True
                return answer
            await self._clock.sleep(self._clock.jitter(0.005, 0.02))

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
        # a member answers the status by itself; this read only with a quorum. (Asking for the alarms would be a raft
        # proposal and an fsync, and the status has them.)
        read = await self._once("range", rpc.RangeRequest(key=b"fabric/", count_only=True))
        if self._is_root:
            try:
                status = await self._once("status", rpc.StatusRequest())
            except Forbidden:  # access control was turned on meanwhile
                self._is_root = False
            else:
                names = tuple(sorted({name for said in status.errors for name in _ALARM.findall(said)}))
                return Health(status.version, status.header.revision, status.leader, status.dbSize, names)
        endpoint, settings = self.channel.endpoint, self._settings
        version, alarms = await asyncio.gather(told.version(endpoint, settings), told.alarms(endpoint, settings))
        return Health(version, read.header.revision, 0, 0, alarms)


async def _close_all(channels: list[Channel]) -> None:
    await asyncio.gather(*(channel.close() for channel in channels))


def _nobody_answers(why: list[Trouble]) -> Unreachable:
    return Unreachable(f"no etcd answers: {'; '.join(trouble.sentence for trouble in why)}")


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
