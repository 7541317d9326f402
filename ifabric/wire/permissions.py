"""Who may say what on NATS: allow-lists, from which both the auth callout and a static nats.conf are made.

Nothing is denied by name, because deny rules have failed before (a queue subscription went past them, and
`allow_responses` overrides them): what is not listed is not allowed. An agent's subjects are listed component by
component, since `if.v1.*.*.<name>` would also match `if.v1.event.task.claimed` for an agent named "claimed".

Answers go to `_INBOX.<session>.>`, which only that session may subscribe to. The daemon may publish there and to events,
the few commands that a chassis gives the governor for a session, and what the live page asks in a name of its own: no
reply subject can make it say another one.

**A right to ask JetStream is a right to publish.** The server lets JetStream answer to any reply subject and deliver to
any subject, whoever asked: among the events, for instance. (Commands are safe from it: `ifabric.bus.nats`.) So an
observer has none, and the roles that do are trusted not to forge events: an operator and an auditor read streams, and a
backup puts any content in the place of a stream that is not there. What is stored in the audit that way is no record, or
a copy of one: `ifabric audit verify` tells it from what daemons have written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ifabric.wire.subjects import AUDIT, AUDIT_STREAM, DAEMON_INBOX, EVENT_STREAM, INBOX, PAGE_SESSION, ROOT

Role = Literal["agent", "operator", "observer", "auditor", "backup"]
ROLES: dict[Role, str] = {
    "agent": "works on tasks: every verb of the components, as itself; events of tasks, matches, breakers and the fabric",
    "operator": "an agent that may also use the admin verbs, hear every event, and discover services",
    "observer": "looks and changes nothing: the reading verbs, every event from now on, services",
    "auditor": "reads the audit, which is closed to operators, and the events; says and changes nothing",
    "backup": "takes the streams out, and puts them back into an empty cluster",
}
#: what an agent may hear about; budgets and the chassis are the operators' business
PUBLIC_EVENTS = ("task", "match", "breaker", "fabric")
READING = {
    "coordinator": ("get", "list"),
    "governor": ("balance", "breakers", "match"),
    "chassis": ("modules", "runs"),
    "identity": ("whoami",),
}
#: admin verbs that change nothing
READING_ADMIN = {"coordinator": ("sessions",), "governor": ("accounts",)}
#: the same, each as (component, verb, admin)
LOOKS = frozenset(
    (component, verb, admin)
    for admin, verbs in ((False, READING), (True, READING_ADMIN))
    for component in verbs
    for verb in verbs[component]
)
#: what an operator may do from the live page: the daemon says it in the operator's name
PAGE_ACTIONS = {"coordinator": ("cancel", "requeue"), "governor": ("account", "breaker"), "chassis": ("kill",)}
#: subscriptions of one connection
SUBSCRIPTIONS_MAX = 1000


class Permissions(NamedTuple):
    """The subjects that a connection may publish to and subscribe to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox_prefix(session: str) -> str:
    """Below this a session's answers come."""
    return f"{INBOX}{session}"


def permissions(role: Role, name: str, components: Iterable[str]) -> Permissions:
    """Of an agent or a person."""
    inbox = f"{inbox_prefix(name)}.>"
    own = tuple(f"{ROOT}.{component}.*.{name}" for component in components)
    whoami = f"{ROOT}.identity.whoami.{name}"
    public = tuple(f"{ROOT}.event.{about}.>" for about in PUBLIC_EVENTS)
    if role == "agent":
        return Permissions((*own, whoami), (inbox, *public))
    if role == "operator":
        return Permissions(
            (*own, whoami, f"{ROOT}.admin.*.*.{name}", *DISCOVERY, *_reading(EVENT_STREAM)),
            (inbox, f"{ROOT}.event.>"),
        )
    if role == "observer":
        return Permissions((*_looking(name), *DISCOVERY), (inbox, f"{ROOT}.event.>"))
    if role == "auditor":
        return Permissions(
            (whoami, *_reading(AUDIT_STREAM), *_reading(EVENT_STREAM)), (inbox, AUDIT, f"{ROOT}.event.>")
        )
    return Permissions(BACKUP, (inbox,))


#: discovery of micro services (ADR-32)
DISCOVERY = tuple(f"$SRV.{what}{whom}" for what in ("PING", "INFO", "STATS") for whom in ("", ".*", ".*.*"))
#: what is backed up, as far as it is there: events, the audit, the modules
STREAMS = (EVENT_STREAM, "IF_AUDIT", "OBJ_IF_MODULES")
#: to take streams out and put them back
BACKUP = (
    *(f"$JS.API.STREAM.{verb}" for verb in ("LIST", "NAMES")),
    *(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("INFO", "SNAPSHOT", "RESTORE") for stream in STREAMS),
    "$JS.SNAPSHOT.>",
)
#: what a chassis asks the governor, wherever that runs, in the name of a session whose guest it runs
FOR_SESSIONS = tuple(f"{ROOT}.governor.{verb}.*" for verb in ("balance", "commit", "admit", "report"))


def daemon(page_operators: Iterable[str] = ()) -> Permissions:
    """Of the daemon's user in the account that it shares with the agents. It carries out what these operators do from
    the live page, and nothing in the name of anybody else.
    """
    return Permissions(
        (
            f"{INBOX}*.>",
            f"{DAEMON_INBOX}.>",
            *FOR_SESSIONS,
            *_looking(PAGE_SESSION),
            *(
                f"{ROOT}.admin.{component}.{verb}.{operator}"
                for operator in page_operators
                for component, verbs in PAGE_ACTIONS.items()
                for verb in verbs
            ),
            f"{ROOT}.event.>",
            f"{ROOT}.audit.>",
            "$JS.API.>",
            "$JS.ACK.>",
            "$JS.FC.>",
            "$O.>",
        ),
        (f"{ROOT}.*.*.*", f"{ROOT}.admin.*.*.*", "$SRV.>", f"{DAEMON_INBOX}.>"),
    )


#: the daemon's user in the system account: it answers the auth callout, finds connections and ends them
SYSTEM = Permissions(
    ("$SYS._INBOX.>", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.*.KICK"),
    ("$SYS.REQ.USER.AUTH", f"{DAEMON_INBOX}.>"),
)


def _looking(name: str) -> tuple[str, ...]:
    """Every verb that changes nothing."""
    return (
        *(f"{ROOT}.{component}.{verb}.{name}" for component, verbs in READING.items() for verb in verbs),
        *(f"{ROOT}.admin.{component}.{verb}.{name}" for component, verbs in READING_ADMIN.items() for verb in verbs),
    )


def _reading(stream: str) -> tuple[str, ...]:
    """To read a stream, with consumers of one's own."""
    api = "$JS.API"
    return (
        f"{api}.STREAM.INFO.{stream}",
        f"{api}.STREAM.MSG.GET.{stream}",
        f"{api}.CONSUMER.CREATE.{stream}",
        f"{api}.CONSUMER.CREATE.{stream}.>",
        f"{api}.CONSUMER.INFO.{stream}.*",
        f"{api}.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    )
