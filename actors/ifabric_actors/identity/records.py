"""What the identity component stores in etcd.

    identity/agents/<name>          who it is: role, keys, account
    identity/keys/<public key>      whose key it is: a connection proves a key, and the key leads to the name

Values are JSON, for `etcdctl get` to show. There is no secret among them.
"""

from __future__ import annotations

import msgspec

from ifabric.store.base import KV, record
from ifabric.wire.permissions import Role

IDENTITY = b"identity/"
AGENTS, KEYS = b"identity/agents/", b"identity/keys/"


class Agent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Somebody who may connect."""

    role: Role
    public_key: str
    #: the key before, let in until then (ms since the epoch); 0: no more
    former_key: str = ""
    former_until: int = 0
    account: str | None = None
    capabilities: tuple[str, ...] | None = None
    note: str = ""
    #: who made it so, and when (ms since the epoch)
    by: str = ""
    at: int = 0
    #: ms since the epoch; 0: it was not
    revoked_at: int = 0


encode = msgspec.json.Encoder().encode
_agents = msgspec.json.Decoder(Agent)


def agent(kv: KV) -> Agent:
    return record(_agents, kv)


def agent_key(name: str) -> bytes:
    return AGENTS + name.encode()


def owner_key(public_key: str) -> bytes:
    return KEYS + public_key.encode()
