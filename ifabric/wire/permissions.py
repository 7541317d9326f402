"""Who may say what on NATS: allow-lists, from which both the auth callout and a static nats.conf are made.

Nothing is denied by name, because deny rules have failed before (a queue subscription went past them, and
`allow_responses` overrides them): what is not listed is not allowed. An agent's subjects are listed component by
component, since `if.v1.*.*.<name>` would also match `if.v1.event.task.claimed` for an agent named "claimed".

Answers go to `_INBOX.<session>.>`, which only that session may subscribe to, and the daemon may publish there and to
events and nowhere else, so that no reply subject can make it say a command in somebody's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ifabric.wire.subjects import EVENT_STREAM, INBOX, ROOT

Role = Literal["agent", "operator", "observer", "backup"]
ROLES: dict[Role, str] = {
    "agent": "works on tasks: every verb of the components, as itself; events of tasks, matches, breakers and the fabric",
    "operator": "an agent that may also use the admin verbs, hear every event, and discover services",
    "observer": "looks and changes nothing: the reading verbs, every event, services",
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
#: the daemon's own answers come here: no agent's name can make an inbox of it
DAEMON_INBOX = "_IFABRIC"
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
        return Permissions((*read, *DISCOVERY, *_reading(EVENT_STREAM)), (inbox, f"{ROOT}.event.>"))
    return Permissions(BACKUP, (inbox,))


#: discovery of micro services (ADR-32)
DISCOVERY = tuple(f"$SRV.{what}{whom}" for what in ("PING", "INFO", "STATS") for whom in ("", ".*", ".*.*"))
#: to take streams out and put them back
BACKUP = (
    *(f"$JS.API.STREAM.{verb}" for verb in ("LIST", "NAMES", "INFO.*", "SNAPSHOT.*", "RESTORE.*")),
    "$JS.SNAPSHOT.>",
)
#: the daemon's user in the account that it shares with the agents
DAEMON = Permissions(
    (f"{INBOX}*.>", f"{ROOT}.event.>", f"{ROOT}.audit.>", "$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$O.>"),
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
        f"{api}.DIRECT.GET.{stream}",
        f"{api}.DIRECT.GET.{stream}.>",
        f"{api}.CONSUMER.CREATE.{stream}",
        f"{api}.CONSUMER.CREATE.{stream}.>",
        f"{api}.CONSUMER.INFO.{stream}.*",
        f"{api}.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    )
