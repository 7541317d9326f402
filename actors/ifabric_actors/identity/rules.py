"""What the identity component believes: who is let in, as whom, and how that changes. Nothing here waits.

A *name* is a session for ever: what alice has claimed and spent is alice's, so a name that was revoked is not given to
somebody else by a slip. `create` refuses it, and `rotate`, which says "alice, with a new key", brings it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec.structs import replace

from ifabric.errors import Conflict, Forbidden
from ifabric.wire import identity as wire
from ifabric.wire.permissions import Role
from ifabric.wire.subjects import RESERVED_SESSIONS
from ifabric_actors.identity.records import Agent

#: characters of a public key that tell it from every other of one name
KEY_SHOWN = 16


class Badge(NamedTuple):
    """Who a connection is."""

    name: str
    role: Role
    public_key: str

    @property
    def user(self) -> str:
        """What NATS calls it, in its logs and lists: the name, and enough of the key to tell it from another."""
        return f"{self.name}@{self.public_key[:KEY_SHOWN]}"


def badge(name: str, agent: Agent | None, public_key: str, now_ms: int) -> Badge | None:
    """The badge of a proven key; None when it is let in no more."""
    if agent is None or agent.revoked_at or name in RESERVED_SESSIONS:
        return None
    former = bool(agent.former_key) and public_key == agent.former_key and now_ms < agent.former_until
    return Badge(name, agent.role, public_key) if public_key == agent.public_key or former else None


def operator_of(public_key: str, operators: Mapping[str, str]) -> Badge | None:
    """The badge of an operator whom the configuration names."""
    found = next((name for name, key in operators.items() if key == public_key), None)
    return None if found is None or found in RESERVED_SESSIONS else Badge(found, "operator", public_key)


def refuse_configured(name: str, operators: Mapping[str, str]) -> None:
    """`Conflict` for a name that the configuration has: a record would say something else about it."""
    if name in operators:
        raise Conflict(f"{name} is an operator of the configuration (identity.operators); change it there", agent=name)


def name_of(user: str) -> str | None:
    """The name in what NATS calls a connection; None when it is not one that was let in by a badge."""
    name, at, _ = user.rpartition("@")
    return name if at else None


def users_of(name: str, agent: Agent | None, operators: Mapping[str, str], now_ms: int) -> frozenset[str]:
    """What NATS may call the connections of this name now: one for each key that is let in."""
    if name in operators:
        return frozenset((Badge(name, "operator", operators[name]).user,))
    keys = () if agent is None else (agent.public_key, agent.former_key)
    return frozenset(found.user for key in keys if key and (found := badge(name, agent, key, now_ms)))


def created(message: wire.CreateAgent, there: Agent | None, by: str, now_ms: int) -> Agent:
    """The record of a new one. `Conflict` when the name is taken, `Forbidden` when it is the fabric's own."""
    if message.agent in RESERVED_SESSIONS:
        raise Forbidden(f"{message.agent} is a name of the fabric itself; nothing was changed", agent=message.agent)
    made = Agent(
        role=message.role,
        public_key=message.public_key,
        account=message.account,
        capabilities=message.capabilities,
        note=message.note,
        by=by,
        at=now_ms,
    )
    if there is None:
        return made
    if there.revoked_at:
        raise Conflict(
            f"{message.agent} was revoked, and a name is one agent's for ever; nothing was changed. "
            f"To bring it back: `ifabric agent rotate {message.agent}`",
            agent=message.agent,
        )
    if replace(there, by=by, at=now_ms) == made:
        return there
    raise Conflict(
        f"there is a {there.role} {message.agent} already, with another key or account; nothing was changed. "
        f"For a new key: `ifabric agent rotate {message.agent}`",
        agent=message.agent,
    )


def rotated(message: wire.RotateAgent, there: Agent, by: str, now_ms: int) -> Agent:
    """With the new key. The former one lives on only if it was still good."""
    if there.public_key == message.public_key and not there.revoked_at:
        return there
    grace = message.grace_s if not there.revoked_at else 0
    return replace(
        there,
        public_key=message.public_key,
        former_key=there.public_key if grace else "",
        former_until=now_ms + 1000 * grace if grace else 0,
        revoked_at=0,
        by=by,
        at=now_ms,
    )


def revoked(message: wire.RevokeAgent, there: Agent, by: str, now_ms: int) -> Agent:
    """Let in no more."""
    if there.revoked_at:
        return there
    return replace(
        there, revoked_at=now_ms, former_key="", former_until=0, by=by, at=now_ms, note=message.why or there.note
    )


def account_for(session: str, asked: str | None, agent: Agent | None) -> str | None:
    """The account that a session's money comes from: its agent's own, or one below that.

    `Forbidden` when it names another. An operator may name any.
    """
    if agent is None or agent.role == "operator":
        return asked
    if asked is None or asked == agent.account:
        return agent.account
    if agent.account is not None and asked.startswith(f"{agent.account}/"):
        return asked
    own = f"spends from {agent.account}" if agent.account else "has no account"
    raise Forbidden(
        f"{session} {own}, and may not spend from {asked}; nothing was done. An operator may change that: "
        f"`ifabric agent create ... --account`",
        account=asked,
        own=agent.account,
    )


def capabilities_for(session: str, asked: tuple[str, ...], agent: Agent | None) -> tuple[str, ...]:
    """What a session may call its capabilities. `Forbidden` names what its agent was not given."""
    if agent is None or agent.capabilities is None:
        return asked
    more = sorted(set(asked) - set(agent.capabilities))
    if more:
        raise Forbidden(
            f"{session} was not given {', '.join(more)}; nothing was done", missing=more, own=list(agent.capabilities)
        )
    return asked or agent.capabilities
