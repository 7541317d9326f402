"""The gate of NATS: says who a connection is when a server asks, and ends those that are nobody any more.

The servers ask whichever daemon is there (a queue group), before a client can say a word. Every answer is read from
etcd, so a revocation holds from its commit on. **A connection that is there already** is ended by name; but one that
was let in just before the commit may reach its server just after the search for it. So the search is repeated a moment
later, and every `sweep_seconds` all connections are held against the records: that also finds what was revoked while
no daemon could reach NATS.

**Whoever is not let in costs little.** Anybody who reaches a server's port makes it ask, with or without a key. Few
questions are answered at once, so that a flood of them takes turns with the daemon's other work; one that has waited
longer than the server does is thrown away; and the log and the audit tell of some refusals and count the rest: else
whoever has no key could fill the audit, which then takes nothing from anybody.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ifabric.actor.base import Context
from ifabric.bus.base import Bus, Incoming, Subscription
from ifabric.cancellation import cancel_and_wait
from ifabric.errors import BadRequest, FabricError, Forbidden, Internal, Overloaded
from ifabric.handling import Handling
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
#: questions answered at once, and those that may wait for it
AT_ONCE, WAITING_MAX = 8, 4096
#: a server waits for no longer: it does not hear who it asks about, and takes three missed pings for a dead connection
LATE_S = 3.0
#: so many refusals in a row are logged, and after that one in so many seconds
LOGGED, LOGGED_EVERY_S = 20, 1.0
QUEUE = "identity"
#: of what calls itself a key, for the log
KEY_MAX = 60
_CONNECTIONS = "$SYS.REQ.SERVER.PING.CONNZ"


class Connect(msgspec.Struct, frozen=True):
    """What a witness is told that a connection has asked for."""

    #: where it comes from
    subject: str
    #: itself, and those like it before that nobody was told of; None: it is the only one
    count: int | None = None


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
        self._subscription: Subscription | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._answering: set[asyncio.Task[None]] = set()
        self._to_log, self._logged_at, self._unlogged = float(LOGGED), context.clock.monotonic(), 0
        metrics = context.metrics
        self._let_in = metrics.counter("if_identity_admitted_total")
        self._ended = metrics.counter("if_identity_ended_total")
        self._refusals = {why: metrics.counter("if_identity_refused_total", why=why) for why in REFUSALS}

    async def open(self) -> None:
        """Answers from now on."""
        self._subscription = await self._bus.subscribe(callout.SUBJECT, self._take, queue=QUEUE)

    async def close(self) -> None:
        """Answers no more. Twice is harmless."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        await cancel_and_wait(*self._answering)

    def _take(self, incoming: Incoming) -> None:
        if len(self._answering) >= WAITING_MAX:
            self._overloaded(incoming, self._context.clock.monotonic())
            return
        task = asyncio.create_task(self._in_turn(incoming, self._context.clock.monotonic()), name="auth callout")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _in_turn(self, incoming: Incoming, arrived: float) -> None:
        async with self._turns:
            if self._context.clock.monotonic() - arrived > LATE_S:
                self._overloaded(incoming, arrived)
                return
            await self._answer(incoming, arrived)

    def _overloaded(self, incoming: Incoming, arrived: float) -> None:
        """It is not even read: that is how little it may cost."""
        self._refusals["overloaded"].inc()
        self._tell("too many want in at once", arrived, Overloaded(what="identity"))
        incoming.drop()

    async def _answer(self, incoming: Incoming, arrived: float) -> None:
        try:
            asked = callout.read(incoming.data)
        except BadRequest as error:
            self._tell("an auth callout cannot be read", arrived, error, why=error.message)
            incoming.drop()
            return
        now_ms = self._context.clock.wall_ms()
        try:
            found = await self._badge(asked, now_ms)
        except (
            FabricError
        ) as error:  # not now is no no: without an answer, whoever waits is told nothing, and comes again
            self._refusals["unavailable"].inc()
            key = asked.public_key[:KEY_MAX]
            self._tell("nobody can say who it is", arrived, error, why=error.message, key=key, host=asked.host)
            incoming.drop()
            return
        if isinstance(found, Badge):
            self._let_in.inc()
            self._witness(found.name, arrived, asked.host)
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
            self._refusals[found.partition(":")[0]].inc()
            key = asked.public_key[:KEY_MAX]
            self._tell("not let in", arrived, Forbidden(found), why=found, key=key, host=asked.host, name=asked.name)
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

    def _witness(
        self, session: str, arrived: float, host: str, error: FabricError | None = None, count: int | None = None
    ) -> None:
        handling = Handling("identity", "connect", session, arrived)
        handling.message = Connect(host[:KEY_MAX], count)
        handling.ended = self._context.clock.monotonic()
        if error is not None:
            handling.outcome, handling.error = "refused", error
        self._context.tell(handling)

    def _tell(self, what: str, arrived: float, error: FabricError, **about: str) -> None:
        """Logs it and tells the witnesses, unless there was enough of that a moment ago."""
        now = self._context.clock.monotonic()
        self._to_log = min(LOGGED, self._to_log + (now - self._logged_at) / LOGGED_EVERY_S)
        self._logged_at = now
        if self._to_log < 1:
            self._unlogged += 1
            return
        before, self._unlogged = self._unlogged, 0
        self._to_log -= 1
        more = {"not_logged_before": before} if before else {}
        self._context.log.warning(what, **about, **more)
        self._witness("", arrived, about.get("host", ""), error, before + 1 if before else None)

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
        there = [(server, one, rules.name_of(one.authorized_user)) for server, one in await self._connections()]
        # without a name: a daemon, or a static user: the servers' own business
        names = {name for _, _, name in there if name is not None}
        good: dict[str, frozenset[str]] = {}
        for called, agent in {**dict.fromkeys(names), **await self._register.several(names)}.items():
            if isinstance(agent, Internal):
                self._context.log.error("who is connected cannot be checked", agent=called, why=agent.message)
            else:
                good[called] = rules.users_of(called, agent, operators, now_ms)
        ended = 0
        for server, one, name in there:
            if name is not None and name in good and one.authorized_user not in good[name]:
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
REFUSALS = ("no key", "not proven", "unknown", "unavailable", "overloaded")
