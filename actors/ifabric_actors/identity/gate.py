"""The gate of NATS: says who a connection is when a server asks, and ends those that are nobody any more.

The servers ask whichever daemon is there (a queue group), before a client can say a word. Every answer is read from
etcd, so a revocation holds from its commit on. **A connection that is there already** is ended by name; but one that
was let in just before the commit may reach its server just after the search for it. So the search is repeated a moment
later, and every `sweep_seconds` all connections are held against the records: that also finds what was revoked while
no daemon could reach NATS.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ifabric.actor.base import Context
from ifabric.bus.base import Bus, Incoming
from ifabric.errors import BadRequest, FabricError
from ifabric.wire import callout
from ifabric.wire.envelope import encode
from ifabric.wire.permissions import permissions
from ifabric_actors.identity import rules
from ifabric_actors.identity.records import Agent
from ifabric_actors.identity.register import Register
from ifabric_actors.identity.rules import Badge

#: how long servers are waited for: nobody knows how many there are
GATHER_S = 0.3
#: after a revocation it is looked again, so long after
AGAIN_S = 1.0
PAGE = 1024
QUEUE = "identity"
_CONNECTIONS = "$SYS.REQ.SERVER.PING.CONNZ"


class _Connection(msgspec.Struct):
    cid: int
    authorized_user: str = ""
    account: str = ""


class _Server(msgspec.Struct):
    id: str


class _Page(msgspec.Struct):
    total: int = 0
    connections: list[_Connection] = []


class _Answer(msgspec.Struct):
    server: _Server
    data: _Page


_pages = msgspec.json.Decoder(_Answer)


class Gate:
    """One daemon's part in it."""

    def __init__(self, context: Context, bus: Bus, register: Register, issuer: str) -> None:
        self._context, self._bus, self._register, self._issuer = context, bus, register, issuer
        self._config = context.config
        metrics = context.metrics
        self._let_in = metrics.counter("if_identity_admitted_total")
        self._ended = metrics.counter("if_identity_ended_total")
        self._refusals = {why: metrics.counter("if_identity_refused_total", why=why) for why in REFUSALS}

    async def open(self) -> None:
        """Answers from now on."""
        await self._bus.subscribe(callout.SUBJECT, self._answer, queue=QUEUE)

    async def _answer(self, incoming: Incoming) -> None:
        try:
            asked = callout.read(incoming.data)
        except BadRequest as error:
            self._context.log.warning("an auth callout cannot be read", why=error.message)
            incoming.drop()
            return
        now_ms = self._context.clock.wall_ms()
        why = ""
        try:
            found = await self._badge(asked, now_ms)
        except FabricError as error:
            found, why = f"unavailable: {error.message}", "unavailable"
        if isinstance(found, Badge):
            self._let_in.inc()
            self._context.log.debug("let in", agent=found.name, role=found.role, host=asked.host)
            body = callout.granted(
                asked,
                name=found.user,
                may=permissions(found.role, found.name, self._config.components),
                account=self._config.account,
                issuer=self._issuer,
                now_s=now_ms // 1000,
            )
        else:
            self._refusals[why or found.partition(":")[0]].inc()
            self._context.log.warning("not let in", why=found, key=asked.public_key, host=asked.host, name=asked.name)
            body = callout.refused(asked, found, issuer=self._issuer, now_s=now_ms // 1000)
        try:
            await incoming.respond(body)
        except FabricError as error:
            self._context.log.warning("an auth callout was not answered", why=error.message)

    async def _badge(self, asked: callout.Asked, now_ms: int) -> Badge | str:
        """Who it is, or why it is not let in."""
        if not asked.public_key:
            return "no key: connect with an nkey (`ifabric agent create` makes one)"
        if not callout.is_proven(asked):
            return "not proven: the signature is not by the key that was named"
        operator = rules.operator_of(asked.public_key, self._config.operators)
        if operator is not None:
            return operator
        name = await self._register.owner_of(asked.public_key)
        agent = None if name is None else await self._register.get(name)
        found = None if name is None else rules.badge(name, agent, asked.public_key, now_ms)
        return found or "unknown: nobody has this key, or its owner was revoked"

    # -- those that are there ----------------------------------------------------------------------------------------

    async def end(self, name: str, before: Agent) -> int:
        """Ends the connections that were let in as `before`, and would not be now; how many.

        Raises `Unavailable` when NATS cannot be asked.
        """
        operators, now_ms = self._config.operators, self._context.clock.wall_ms()
        good = rules.users_of(name, await self._register.get(name), operators, now_ms)
        ended = 0
        for user in rules.users_of(name, before, operators, now_ms) - good:
            for server, one in await self._connections(user):
                ended += await self._end(server, one)
        return ended

    async def sweep(self) -> int:
        """Ends every connection that would not be let in as the same again; how many."""
        operators, now_ms = self._config.operators, self._context.clock.wall_ms()
        ended = 0
        good: dict[str, frozenset[str]] = {}
        for server, one in await self._connections():
            name = rules.name_of(one.authorized_user)
            if name is None:
                continue  # a daemon, or a static user: the servers' own business
            if name not in good:
                good[name] = rules.users_of(name, await self._register.get(name), operators, now_ms)
            if one.authorized_user not in good[name]:
                ended += await self._end(server, one)
        return ended

    async def _connections(self, user: str | None = None) -> list[tuple[str, _Connection]]:
        found: list[tuple[str, _Connection]] = []
        offset, most = 0, 1
        while offset < most:
            asked: dict[str, Any] = {"auth": True, "acc": self._config.account, "offset": offset, "limit": PAGE}
            if user is not None:
                asked["user"] = user
            most = 0
            for answer in await self._bus.ask_all(_CONNECTIONS, encode(asked), within_s=GATHER_S):
                try:
                    page = _pages.decode(answer.data)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    self._context.log.warning("a NATS server's list of connections cannot be read", why=str(error))
                    continue
                found += ((page.server.id, one) for one in page.data.connections)
                most = max(most, page.data.total)
            offset += PAGE
        return [(server, one) for server, one in found if user is None or one.authorized_user == user]

    async def _end(self, server: str, one: _Connection) -> int:
        try:
            await self._bus.request(f"$SYS.REQ.SERVER.{server}.KICK", encode({"cid": one.cid}), timeout_s=2.0)
        except FabricError as error:
            self._context.log.warning(
                "a connection was not ended", agent=one.authorized_user, cid=one.cid, why=error.message
            )
            return 0
        self._ended.inc()
        self._context.log.info("a connection was ended", agent=one.authorized_user, cid=one.cid)
        return 1


#: the first words of why somebody is not let in
REFUSALS = ("no key", "not proven", "unknown", "unavailable")
