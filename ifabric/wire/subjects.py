"""The one place where NATS subjects are built and parsed.

if.v1.<component>.<verb>.<session>          a request; the server's permissions prove the session
if.v1.admin.<component>.<verb>.<session>    an operator's request; out of reach of ``if.v1.*.*.<session>``
if.v1.event.<component>.<what>              something was committed
if.v1.audit.<component>.<verb>              a command and its fate
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT = "if.v1"
EVENTS = f"{ROOT}.event.>"
EVENT_STREAM = "IF_EVENTS"
AUDIT = f"{ROOT}.audit.>"
AUDIT_STREAM = "IF_AUDIT"
#: requests are answered on reply subjects below this, and nowhere else (NATS does not check who owns a reply subject)
INBOX = "_INBOX."
#: a daemon's own answers come here: no agent's name can make an inbox of it
DAEMON_INBOX = "_IFABRIC"
#: a daemon asks under this name for its live page: nobody else's, and what it reads every second is not audited
PAGE_SESSION = "_page"
#: names that no agent may have
RESERVED_SESSIONS = frozenset({PAGE_SESSION})
#: every event, told in the way that a daemon may subscribe to: all of them have this form
EVERY_EVENT = f"{ROOT}.event.*.*"

SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: Task ids may contain dots, slashes and the like: they live in payloads and never in subjects. The last word of each
#: pattern is for Python, whose `$` also matches before a newline at the end.
TASK_ID = r"^[A-Za-z0-9][A-Za-z0-9._:/@#+-]{0,127}$(?!\n)"
SESSION_ID = r"^[A-Za-z0-9_-]{1,64}$(?!\n)"


class Address(NamedTuple):
    """What a request subject says."""

    component: str
    verb: str
    session: str
    admin: bool


def request(component: str, verb: str, session: str, *, admin: bool = False) -> str:
    """The subject to send a request on. `ValueError` when the session id is not `SESSION_ID`."""
    if not SESSION.fullmatch(session):
        raise ValueError(f"session id {session!r} must match {SESSION.pattern}")
    return f"{ROOT}.admin.{component}.{verb}.{session}" if admin else f"{ROOT}.{component}.{verb}.{session}"


def endpoint(component: str, verb: str, *, admin: bool = False) -> str:
    """The pattern that a daemon subscribes to: every session's requests of one verb."""
    return f"{ROOT}.admin.{component}.{verb}.*" if admin else f"{ROOT}.{component}.{verb}.*"


def parse(subject: str) -> Address | None:
    """The address in a request subject; None when it is not one or the session id is not well formed."""
    parts = subject.split(".")
    if len(parts) == 5 and parts[0] == "if" and parts[1] == "v1":
        _, _, component, verb, session = parts
        admin = False
    elif len(parts) == 6 and parts[:3] == ["if", "v1", "admin"]:
        _, _, _, component, verb, session = parts
        admin = True
    else:
        return None
    return Address(component, verb, session, admin) if SESSION.fullmatch(session) else None


def event(component: str, what: str) -> str:
    """The subject of an event, for example ``if.v1.event.task.claimed``."""
    return f"{ROOT}.event.{component}.{what}"


def audit(component: str, verb: str) -> str:
    """The subject of an audit record, for example ``if.v1.audit.coordinator.claim``."""
    return f"{ROOT}.audit.{component}.{verb}"


def is_own_inbox(reply: str, subject: str) -> bool:
    """Whether a request wants its answer in its own session's inbox, ``_INBOX.<session>.`` and more, or in a daemon's:
    one that asks for a session. To send somebody else's answer there does nothing: what nobody waits for is dropped.
    """
    return reply.startswith((f"{INBOX}{subject.rpartition('.')[2]}.", f"{DAEMON_INBOX}."))


def may_answer(reply: str) -> bool:
    """Whether a reply subject is one that the daemon publishes to: an inbox, without wildcards or odd characters."""
    prefix = next((one for one in (INBOX, f"{DAEMON_INBOX}.") if reply.startswith(one)), "")
    return (
        len(reply) > len(prefix) > 0
        and "*" not in reply
        and ">" not in reply
        and reply.isascii()
        and reply.isprintable()
    )
