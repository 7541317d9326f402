"""Who may do what in etcd: users by the common names of their certificates, and roles as ranges of keys.

`PREFIXES` is the one table of what the fabric keeps in etcd, and where; a test holds it against a real run.

**ifabric** is a daemon. It may write all of the prefixes and nothing else. One with a coordinator or a governor needs
nearly all: a claim with a hold writes the money and the task in one transaction, and the governor ends holds with
their claims.

**ifabric-chassis** is a daemon that runs guests and nothing else. Should one of them ever break out of everything, its
host can forge no task, no claim, no money and no agent: it reads claims, and writes about its own runs, and how far its
audit is. That last prefix is all daemons' alike: it could put another's back, and delete nothing from the stream itself.

**observer** is a person who looks. It reads no payload, no result, no receipt (they hold what was answered to agents),
and not what permits are sealed with: who can read that can forge them.

**backup** has the role root, because etcd's `Snapshot` asks for it and no lesser grant allows it. Its certificate is as
good as root's: keep it only where backups are made.

**root** is for `ifabric bootstrap etcd`, for maintenance and for members. No daemon needs it.

A certificate of the same authority whose name is no user (the members' own, Prometheus's) reads and writes no key. etcd
lets it list members, alarms and the numbers of leases, grant leases, and read `/metrics` and `/health`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

#: what the fabric keeps in etcd
PREFIXES: dict[bytes, str] = {
    b"fabric/": "the incarnation, and who publishes events",
    b"tasks/": "the records of tasks",
    b"payloads/": "what was submitted with them",
    b"results/": "what came of them",
    b"sessions/": "the sessions that live",
    b"deadlines/": "claims with a time limit of their own",
    b"receipts/": "first answers to requests, for retries",
    b"governor/": "accounts, tallies, holds, breakers",
    b"posted/": "how a lost reply about money is recognised",
    b"chassis/": "runs of guests",
    b"identity/": "agents and their public keys",
    b"audit/": "how far each daemon's audit is",
}
#: read by a person who looks; not all of it is everybody's business
OBSERVED = (
    b"fabric/",
    b"tasks/",
    b"sessions/",
    b"deadlines/",
    b"governor/accounts/",
    b"governor/tallies/",
    b"governor/holds/",
    b"governor/breakers/",
    b"chassis/daemons/",
    b"chassis/runs/",
    b"chassis/kills/",
    b"identity/",
    b"audit/",
)
#: what no role but root may touch, for a check to try
FOREIGN = b"elsewhere/"
#: what only a daemon may read, for the same
SECRET = b"governor/secrets/"
ROOT = "root"


class Grant(NamedTuple):
    """All keys below a prefix, to be read, or also written."""

    prefix: bytes
    write: bool


class User(NamedTuple):
    """Somebody by the common name of a certificate, without a password."""

    name: str
    role: str
    what: str


#: role -> what it may. `root` is etcd's own and may everything.
ROLES: dict[str, tuple[Grant, ...]] = {
    "ifabric": tuple(Grant(prefix, write=True) for prefix in PREFIXES),
    "ifabric-chassis": (
        Grant(b"chassis/", write=True),
        Grant(b"audit/", write=True),
        *(Grant(prefix, write=False) for prefix in (b"fabric/", b"tasks/", b"sessions/")),
    ),
    "observer": tuple(Grant(prefix, write=False) for prefix in OBSERVED),
}
USERS = (
    User(ROOT, ROOT, "bootstrap, maintenance, members"),
    User("ifabric", "ifabric", "a daemon"),
    User("ifabric-chassis", "ifabric-chassis", "a daemon that only runs guests"),
    User("backup", ROOT, "backups: etcd gives a snapshot to nobody less than root"),
    User("observer", "observer", "a person who looks"),
)


def may(role: str, prefix: bytes, *, write: bool) -> bool:
    """Whether a role may read, or write, everything below a prefix."""
    if role == ROOT:
        return True
    return any(prefix.startswith(grant.prefix) and (grant.write or not write) for grant in ROLES.get(role, ()))


# -- what is there, and what it takes to have it as it is stated ------------------------------------------------------


class Found(NamedTuple):
    """What etcd has: who is there with which roles, and which roles with which grants."""

    enabled: bool
    users: Mapping[str, frozenset[str]]
    #: a role's permissions, as (kind, key, end): see `kind_of`
    roles: Mapping[str, frozenset[tuple[int, bytes, bytes]]]


class Step(NamedTuple):
    """One call of etcd's `Auth`: the method's name and the fields of its request, and in words what it does."""

    method: str
    fields: Mapping[str, Any]
    words: str


#: etcd's kinds of permission
READ, READWRITE = 0, 2


def kind_of(grant: Grant) -> int:
    """What etcd calls it."""
    return READWRITE if grant.write else READ


def end_of(prefix: bytes) -> bytes:
    """The end of the range of all keys below a prefix."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def plan(found: Found) -> list[Step]:
    """The steps to users and roles as they are stated above. None when they are. Other users and roles are let be."""
    steps: list[Step] = []
    for role in (ROOT, *ROLES):
        if role not in found.roles:
            steps.append(Step("RoleAdd", {"name": role}, f"role {role}"))
        if role != ROOT:
            steps += _grants(role, found.roles.get(role, frozenset()))
    for user in USERS:
        has = found.users.get(user.name)
        if has is None:
            steps.append(
                Step("UserAdd", {"name": user.name, "options": {"no_password": True}}, f"user {user.name}: {user.what}")
            )
        if user.role not in (has or ()):
            fields = {"user": user.name, "role": user.role}
            steps.append(Step("UserGrantRole", fields, f"user {user.name} gets the role {user.role}"))
        for role in sorted((has or frozenset()) - {user.role}):
            fields = {"name": user.name, "role": role}
            steps.append(Step("UserRevokeRole", fields, f"user {user.name} loses the role {role}"))
    return steps


def _grants(role: str, there: frozenset[tuple[int, bytes, bytes]]) -> list[Step]:
    """Of one role: what is missing first, so that a daemon at work is never without."""
    wanted = {(kind_of(grant), grant.prefix, end_of(grant.prefix)): grant for grant in ROLES[role]}
    steps = []
    for (kind, key, end), grant in wanted.items():
        if (kind, key, end) not in there:
            fields: dict[str, Any] = {"name": role, "perm": {"permType": kind, "key": key, "range_end": end}}
            how = "reads and writes" if grant.write else "reads"
            steps.append(Step("RoleGrantPermission", fields, f"role {role} {how} {key.decode()}"))
    ranges = {(key, end) for _, key, end in wanted}
    for _, key, end in sorted(there):
        if (key, end) not in ranges:  # one of another kind on the same range is replaced by its grant
            fields = {"role": role, "key": key, "range_end": end}
            words = f"role {role} loses {key.decode(errors='replace')}"
            steps.append(Step("RoleRevokePermission", fields, words))
    return steps


# -- what is tried afterwards -----------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """Something that a user tries, and whether it is to be allowed. `kind`: read, write, nested, admin, snapshot."""

    kind: str
    prefix: bytes
    allowed: bool


def attempts(user: User) -> list[Attempt]:
    """What is tried as a user, after the roles are there. None of it changes anything."""
    tried = []
    for prefix in (*PREFIXES, SECRET, FOREIGN):
        tried.append(Attempt("read", prefix, may(user.role, prefix, write=False)))
        tried.append(Attempt("write", prefix, may(user.role, prefix, write=True)))
    tried.append(Attempt("nested", FOREIGN, user.role == ROOT))
    tried.append(Attempt("admin", b"", user.role == ROOT))
    tried.append(Attempt("snapshot", b"", user.role == ROOT))
    return tried
