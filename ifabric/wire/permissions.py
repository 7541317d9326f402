"""Who may say what on NATS: allow-lists, from which both the auth callout and a static nats.conf are made.

Nothing is denied by name, because deny rules have failed before (a queue subscription went past them, and
`allow_responses` overrides them): what is not listed is not allowed. An agent's subjects are listed component by
component, since `if.v1.*.*.<name>` would also match `if.v1.event.task.claimed` for an agent named "claimed".

Answers go to `_INBOX.<session>.>`, which only that session may subscribe to. The daemon may publish there and to events,
and the few commands that a chassis gives the governor for a session: no reply subject can make it say another one.

**A right to ask JetStream is a right to publish.** The server lets JetStream answer to any reply subject and deliver to
any subject, whoever asked: among the events, for instance. (Commands are safe from it: `ifabric.bus.nats`.) So an
observer has none, and the two roles that do are trusted not to forge events: an operator reads the stream, and a backup
puts any content in the place of a stream that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ifabric.wire.subjects import DAEMON_INBOX, EVENT_STREAM, INBOX, ROOT

Role = Literal["agent", "operator", "observer", "backup"]
ROLES: dict[Role, str] = {
    "agent": "works on tasks: every verb of the components, as itself; events of tasks, matches, breakers and the fabric",
    "operator": "an agent that may also use the admin verbs, hear every event, and discover services",
    "observer": "looks and changes nothing: the reading verbs, every event from now on, services",
    "backup": "takes the streams out, and puts them back into an empty cluster",
}
#: what an agent may hear about; budgets and the chassis are the operators' business
PUBLIC_EVENTS = ("task", "match", "breaker", "fabric")
READING = {
    "coordinator": ("get", "list"),
    "governor": ("balance", "breakers", "match"),
    "chassis": ("modules", "ps", "status"),
    "identity": ("whoami",),
}
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
        read = tuple(f"{ROOT}.{component}.{verb}.{name}" for component in READING for verb in READING[component])
        return Permissions((*read, *DISCOVERY), (inbox, f"{ROOT}.event.>"))
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
#: the daemon's user in the account that it shares with the agents
DAEMON = Permissions(
    (
        f"{INBOX}*.>",
        f"{DAEMON_INBOX}.>",
        *FOR_SESSIONS,
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
