"""Messages of the identity component: who there is, and what they may do.

A private key never travels: whoever makes a credential keeps the seed and tells the public key.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from ifabric.wire.coordinator import Account
from ifabric.wire.envelope import Capabilities, Mutation, Reply, Request, SessionId
from ifabric.wire.permissions import Role

PublicKey = Annotated[str, Meta(pattern=r"^U[A-Z2-7]{55}$(?!\n)", description="an nkey's public half")]
Note = Annotated[str, Meta(max_length=256)]


class AgentReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """An agent, an operator, or another role."""

    agent: str
    role: Role
    public_key: str
    account: str | None = None
    #: what it may call its capabilities; None: anything
    capabilities: tuple[str, ...] | None = None
    state: Literal["active", "revoked"] = "active"
    by: str = ""
    #: RFC 3339
    at: str = ""
    note: str = ""
    #: RFC 3339: until then its former key is let in as well
    former_until: str | None = None


class Whoami(Request, frozen=True, kw_only=True, omit_defaults=True):
    """What the fabric knows of the caller."""

    component: ClassVar = "identity"
    verb: ClassVar = "whoami"


class CreateAgent(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Lets somebody in from now on: as this name, in this role, with this key."""

    component: ClassVar = "identity"
    verb: ClassVar = "create"
    admin: ClassVar = True
    agent: SessionId
    public_key: PublicKey
    role: Role = "agent"
    account: Account | None = None
    capabilities: Capabilities | None = None
    note: Note = ""


class RotateAgent(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Gives a new key; the former one is let in for `grace_s` more. A revoked agent is let in again."""

    component: ClassVar = "identity"
    verb: ClassVar = "rotate"
    admin: ClassVar = True
    agent: SessionId
    public_key: PublicKey
    grace_s: Annotated[int, Meta(ge=0, le=7 * 86_400)] = 0


class RevokeAgent(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Lets an agent in no more, and ends its connections."""

    component: ClassVar = "identity"
    verb: ClassVar = "revoke"
    admin: ClassVar = True
    agent: SessionId
    why: Note = ""


class AgentsReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """Those there are, by name."""

    agents: tuple[AgentReply, ...]
    #: more come after this name
    after: str | None = None


class ListAgents(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Lists them, a page at a time."""

    component: ClassVar = "identity"
    verb: ClassVar = "list"
    admin: ClassVar = True
    limit: Annotated[int, Meta(ge=1, le=1000)] = 200
    after: str = ""


REPLIES: dict[type[Request], type[Reply]] = {
    Whoami: AgentReply,
    CreateAgent: AgentReply,
    RotateAgent: AgentReply,
    RevokeAgent: AgentReply,
    ListAgents: AgentsReply,
}

for _request, _reply in REPLIES.items():
    _request.reply = _reply
