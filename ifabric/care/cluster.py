"""The members of an etcd cluster, each asked for itself: how they are, and what is done to them one at a time."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from typing import Any, Self

import grpc
from aetcd import rpc
from msgspec.structs import replace

from ifabric.care import probes, scraped
from ifabric.care.facts import Etcd, Member, Offset
from ifabric.care.probes import ASK_S
from ifabric.clock import Clock
from ifabric.errors import ConfigError, FabricError, Forbidden, Unavailable, Unreachable
from ifabric.store.channel import Channel, EtcdSettings, open_channel

#: a defragmentation copies the whole file: etcd's own client waits as long as it takes, and we for this long
DEFRAGMENT_S = 600.0
#: a compaction returns when the keys are gone from the index and from the disk
COMPACT_S = 120.0
NOSPACE, CORRUPT = "NOSPACE", "CORRUPT"
_NAMES = {0: "NONE", 1: NOSPACE, 2: CORRUPT}
#: in gRPC's details, and what it means
_SIGNS = {
    "connection refused": "connection refused",
    "no route to host": "no route to host",
    "certificate_verify_failed": "its certificate is not accepted: expired, for another host, or of another authority",
    "certificate required": "it demands a client certificate",
    "handshake read failed": "it takes connections and does not finish the TLS handshake: frozen, or refusing our certificate",
}
#: the error of a member that is there, and tells its status to root alone
DENIED = "it tells its status to root alone, and its metrics to nobody"
_DENIED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


def _is_denied(error: grpc.aio.AioRpcError) -> bool:
    details = error.details() or ""
    return error.code() in _DENIED or "permission denied" in details or "user name is empty" in details


def translate(error: grpc.aio.AioRpcError, what: str) -> FabricError:
    """A refusal of a question or an act, as ours."""
    details = (error.details() or "")[:300]
    if _is_denied(error):
        return Forbidden(
            f"etcd does not allow this certificate to {what}; with authentication on, that is the administrator's: "
            "give --cert-file and --key-file of root",
            what="etcd",
        )
    return Unavailable(f"etcd did not {what}: {error.code().name.lower()}, {details}", what="etcd")


class Cluster:
    """Channels to the members that are configured, and to those that they tell of. Use as `async with`."""

    def __init__(self, settings: EtcdSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._channels: dict[str, Channel] = {}
        self._closing = AsyncExitStack()
        self._tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._closing.aclose()

    def channel(self, url: str) -> Channel:
        """To one member."""
        if url not in self._channels:
            self._channels[url] = channel = open_channel(url, self._settings)
            self._closing.push_async_callback(channel.close)
        return self._channels[url]

    # -- looking -----------------------------------------------------------------------------------------------------

    async def look(self) -> Etcd:
        """Every member, asked at once. Only a configuration that cannot be used is an error."""
        urls = self._settings.endpoints
        listed, list_error = await self._members()
        known = listed or [Member(url=url) for url in urls]
        alarms = await self._alarms()
        members = await asyncio.gather(*(self._ask(member) for member in known))
        raised = [
            replace(member, alarms=tuple(sorted({*member.alarms, *alarms.get(member.id, ())})))
            for member in scraped.with_leader(members)
        ]
        return Etcd(
            members=tuple(raised), list_error=list_error, read_error=await self._read_error(), configured=len(urls)
        )

    async def _first(self, method: str, request: Any, what: str) -> Any:
        """The first answer of any endpoint; all are asked at once, so only what changes nothing."""
        asked = [
            asyncio.ensure_future(getattr(self.channel(url), method)(request, timeout=ASK_S))
            for url in self._settings.endpoints
        ]
        failed: FabricError = Unreachable("no etcd is configured")
        try:
            for done in asyncio.as_completed(asked):
                try:
                    return await done
                except grpc.aio.AioRpcError as error:
                    failed = translate(error, what)
            raise failed
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _members(self) -> tuple[list[Member], str]:
        """As they list each other; and why not, when they do not."""
        for linearizable in (True, False):  # without a quorum, as the one that is asked remembers it
            try:
                answer = await self._first(
                    "members", rpc.MemberListRequest(linearizable=linearizable), "list its members"
                )
            except (Forbidden, Unavailable, Unreachable) as error:
                why = error.message
                continue
            return [
                Member(
                    url=found.clientURLs[0] if found.clientURLs else "",
                    id=found.ID,
                    name=found.name,
                    peer_urls=tuple(found.peerURLs),
                    learner=found.isLearner,
                )
                for found in answer.members
            ], ""
        return [], why

    async def _alarms(self) -> dict[int, set[str]]:
        """By member; empty when they cannot be asked for: each member's status tells them, too."""
        try:
            answer = await self._first("alarm", rpc.AlarmRequest(), "tell its alarms")
        except (Forbidden, Unavailable, Unreachable):
            return {}
        found: dict[int, set[str]] = {}
        for one in answer.alarms:
            found.setdefault(one.memberID, set()).add(_NAMES.get(one.alarm, str(one.alarm)))
        return found

    async def _read_error(self) -> str:
        """Why a linearizable read was not answered; empty: it was, or it was refused, which takes a quorum as well."""
        try:
            await self._first("range", rpc.RangeRequest(key=b"fabric/", count_only=True), "answer a read")
        except Forbidden:
            return ""
        except (Unavailable, Unreachable) as error:
            return error.message
        return ""

    async def status(self, member: Member) -> Member:
        """The member as it says it is; with an `error` when it does not answer."""
        if not member.url:
            return replace(member, error="it has not started: it tells no client URL")
        began = self._clock.monotonic()
        try:
            said = await self.channel(member.url).status(rpc.StatusRequest(), timeout=ASK_S)
        except grpc.aio.AioRpcError as error:
            return replace(member, error=_why(error))
        return replace(
            member,
            id=said.header.member_id,
            version=said.version,
            leader=said.leader,
            learner=said.isLearner,
            term=said.raftTerm,
            index=said.raftIndex,
            applied=said.raftAppliedIndex,
            revision=said.header.revision,
            size_bytes=said.dbSize,
            used_bytes=said.dbSizeInUse,
            alarms=tuple(sorted({name for text in said.errors for name in re.findall(r"\balarm:(\w+)", text)})),
            took_s=self._clock.monotonic() - began,
        )

    async def _ask(self, member: Member) -> Member:
        found = await self.status(member)
        if found.error not in ("", DENIED):
            return found
        began = self._clock.monotonic()
        text, clock = await self._metrics(member.url)
        if found.error and text:
            found = replace(scraped.status(member, text), took_s=self._clock.monotonic() - began)
        return replace(scraped.told(found, text), clock=clock)

    def _trust(self) -> ssl.SSLContext:
        if self._tls is None:
            given = self._settings
            self._tls = probes.trusting(given.ca_cert, given.cert_file, given.key_file)
        return self._tls

    async def _metrics(self, url: str) -> tuple[str, Offset | None]:
        """From the HTTP side of the client port; "" where it has none. And its clock."""
        try:
            tls = self._trust() if url.startswith("https") else None
            answer = await probes.get(f"{url}/metrics", self._clock, timeout_s=ASK_S, tls=tls)
        except (OSError, ValueError, ConfigError):  # a TimeoutError is an OSError
            return "", None
        return answer.body.decode("utf-8", "replace"), answer.clock

    # -- acting ------------------------------------------------------------------------------------------------------

    async def compact(self, through: Member, revision: int) -> None:
        """Forgets every revision before this one, and frees their pages. Harmless when that is done already.

        On the others the figure of what is in use lags until the next writes; their pages are free all the same.
        """
        request = rpc.CompactionRequest(revision=revision, physical=True)
        try:
            await self._told(self.channel(through.url).compact(request, timeout=COMPACT_S), "compact")
        except Unavailable as error:
            if "has been compacted" not in error.message:
                raise

    async def defragment(self, member: Member) -> float:
        """Writes the member's file anew, without its free pages; it answers nothing meanwhile. The seconds it took."""
        began = self._clock.monotonic()
        await self._told(
            self.channel(member.url).defragment(rpc.DefragmentRequest(), timeout=DEFRAGMENT_S), "defragment"
        )
        return self._clock.monotonic() - began

    async def move_leader(self, leader: Member, to: Member) -> None:
        """Hands the leadership over."""
        request = rpc.MoveLeaderRequest(targetID=to.id)
        await self._told(self.channel(leader.url).move_leader(request, timeout=ASK_S * 5), "move its leader")

    async def disarm(self, through: Member) -> int:
        """Takes the NOSPACE alarms away; how many."""
        ask = self.channel(through.url).alarm
        found = await self._told(ask(rpc.AlarmRequest(), timeout=ASK_S), "tell its alarms")
        full = [one for one in found.alarms if _NAMES.get(one.alarm) == NOSPACE]
        for one in full:
            request = rpc.AlarmRequest(action=2, memberID=one.memberID, alarm=one.alarm)  # 2: deactivate
            await self._told(ask(request, timeout=ASK_S * 5), "disarm")
        return len(full)

    @staticmethod
    async def _told(call: Awaitable[Any], what: str) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise translate(error, what) from None


def _why(error: grpc.aio.AioRpcError) -> str:
    """In a few words: gRPC's own are many."""
    details = error.details() or ""
    if _is_denied(error):
        return DENIED
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ASK_S:g} s"
    for sign, says in _SIGNS.items():
        if sign in details.lower():
            return says
    return f"{error.code().name.lower()}: {details[:120]}"
