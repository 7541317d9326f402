"""What `ifabric explain` reads: the record by the verbs that look, the journal of events, and the audit.

Not everybody may read all of it. What could not be read is named, with whoever could, and the story is told without.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ifabric.bus.base import Bus
from ifabric.bus.nats import Nats
from ifabric.calling import address_of
from ifabric.cli.options import Where
from ifabric.client import Client
from ifabric.clock import SystemClock
from ifabric.connecting import credential_of, session_of, settings_for
from ifabric.errors import ConfigError, FabricError, Forbidden, Unavailable, UnknownAccount, UnknownTask
from ifabric.explaining import Sources
from ifabric.explaining.merging import is_look
from ifabric.explaining.story import Kind
from ifabric.wire import coordinator, governor, overview, subjects
from ifabric.wire.audit import AuditRecord, records
from ifabric.wire.protocol import EVENTS

T = TypeVar("T")
#: of each stream, at most
READ_S = 20.0
KEPT_MAX = 50_000
PAGES_MAX = 20
NEAR_MAX = 5
_DECODERS = {event: msgspec.json.Decoder(kind) for event, kind in EVENTS.items()}
EVENTS_UNREAD = "the journal of events could not be read ({why}): an operator may, with --credentials"
AUDIT_UNREAD = (
    "the audit could not be read ({why}): an auditor may (`ifabric agent create NAME --role auditor`), "
    "with --audit-credentials"
)


@dataclass
class Found:
    """What the verbs say of a name."""

    task: coordinator.GetReply | None = None
    session: overview.SessionLine | None = None
    account: governor.BalanceReply | None = None
    breaker: governor.BreakerLine | None = None
    sessions_read: bool = True
    open_breakers: tuple[str, ...] = ()
    unread: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """As what it is known."""
        kinds: tuple[Kind, ...] = ("task", "session", "account", "breaker")
        return tuple(kind for kind in kinds if getattr(self, kind) is not None)


@dataclass
class Reader:
    """Connected to the fabric: a client, and the streams."""

    client: Client
    bus: Bus
    #: where the audit is read
    audit_bus: Bus

    async def look(self, name: str, kinds: Iterable[Kind]) -> Found:
        """Asks what there is of that name. Raises what the first verb was refused with when none answered."""
        found, failures = Found(), []
        asked = {
            "task": self._task,
            "session": self._session,
            "account": self._account,
            "breaker": self._breaker,
        }

        async def ask(kind: Kind) -> None:
            try:
                await asked[kind](name, found)
            except (ConfigError, UnknownTask, UnknownAccount, msgspec.ValidationError):
                return
            except FabricError as error:
                failures.append(error)
                found.sessions_read = found.sessions_read and kind != "session"
                found.unread.append(f"whether it is {_a(kind)} could not be read: {error.message}")

        wanted = tuple(kinds)
        await asyncio.gather(*(ask(kind) for kind in wanted))
        if len(failures) == len(wanted) and not isinstance(failures[0], Forbidden):
            raise failures[0]
        return found

    async def _task(self, name: str, found: Found) -> None:
        # by the list, which refuses nothing: what is asked here is on the page and in the audit, too
        if not _is(name, coordinator.Get, "task"):
            return
        page = await self.client.call(coordinator.List(match=name, limit=coordinator.LIST_MAX_TASKS))
        if page.after is not None or any(line.task == name for line in page.tasks):
            found.task = await self.client.get(name)

    async def _session(self, name: str, found: Found) -> None:
        found.session = await self.session(name)

    async def _account(self, name: str, found: Found) -> None:
        if not _is(name, governor.Balance, "account"):
            return
        if "/" not in name and not await quietly(self._is_on_top(name), True):
            return
        found.account = await self.client.balance(name, tree=True)

    async def _is_on_top(self, name: str) -> bool:
        """Whether there is a top account of that name. An operator's question."""
        after: str | None = None
        for _ in range(PAGES_MAX):
            asked = overview.Accounts(limit=overview.PAGE_MAX, after=after)
            page: overview.AccountsReply = await self.client.call(asked)
            if page.after is None or any(line.account == name for line in page.accounts):
                return any(line.account == name for line in page.accounts)
            after = page.after
        return True

    async def _breaker(self, name: str, found: Found) -> None:
        lines = await self.client.breakers()
        found.breaker = next((line for line in lines if line.breaker == name), None)

    async def session(self, name: str) -> overview.SessionLine | None:
        """The live session of that name, or None. An operator's question."""
        if not subjects.SESSION.fullmatch(name):
            return None
        after: str | None = None
        for _ in range(PAGES_MAX):
            asked = overview.Sessions(match=name, limit=overview.PAGE_MAX, after=after)
            page: overview.SessionsReply = await self.client.call(asked)
            for line in page.sessions:
                if line.session == name:
                    return line
            if page.after is None:
                return None
            after = page.after
        return None

    async def near(self, name: str, kinds: Iterable[Kind]) -> list[str]:
        """Names that are like this one."""
        import difflib

        known: list[str] = []
        with contextlib.suppress(FabricError):
            if "task" in kinds:
                for match in (name[:3], None):
                    page = await self.client.call(coordinator.List(limit=coordinator.LIST_MAX_TASKS, match=match))
                    known += [line.task for line in page.tasks]
        with contextlib.suppress(FabricError):
            if "account" in kinds:
                known += [line.account for line in (await self.client.balance(tree=True)).below]
        with contextlib.suppress(FabricError):
            if "breaker" in kinds:
                known += [line.breaker for line in await self.client.breakers()]
        with contextlib.suppress(FabricError):
            if "session" in kinds:
                page = await self.client.call(overview.Sessions(limit=overview.PAGE_MAX))
                known += [line.session for line in page.sessions]
        return difflib.get_close_matches(name, dict.fromkeys(known), n=NEAR_MAX, cutoff=0.5)

    # -- the streams -------------------------------------------------------------------------------------------------

    async def sources(self, name: str, most: int) -> Sources:
        """All that the last `most` entries of the journal and of the audit have with that name in them."""
        (events, why_events), (audit, why_audit) = await asyncio.gather(
            _mentions(self.bus, subjects.EVENT_STREAM, name, most),
            _mentions(self.audit_bus, subjects.AUDIT_STREAM, name, most),
        )
        unread = []
        if why_events:
            unread.append(EVENTS_UNREAD.format(why=why_events))
        if why_audit:
            unread.append(AUDIT_UNREAD.format(why=why_audit))
        told: dict[str, list[Any]] = {"task": [], "budget": [], "breaker": [], "match": []}
        prefix = subjects.EVENTS.removesuffix(">")
        for subject, data in events:
            about, _, what = subject.removeprefix(prefix).partition(".")
            decoder = _DECODERS.get((about, what))
            if decoder is not None and about in told:
                with contextlib.suppress(msgspec.MsgspecError):
                    told[about].append(decoder.decode(data))
        commands = []
        for _, data in audit:
            with contextlib.suppress(msgspec.MsgspecError):
                commands.append(records.decode(data))
        commands = [entry for entry in commands if not is_look(entry)]
        return Sources(
            tasks=tuple(told["task"]),
            budgets=tuple(told["budget"]),
            breakers=tuple(told["breaker"]),
            matches=tuple(told["match"]),
            audit=tuple(commands),
            unread=tuple(unread),
            events_read=not why_events,
            audit_read=not why_audit,
        )


async def _mentions(bus: Bus, stream: str, name: str, most: int) -> tuple[list[tuple[str, bytes]], str]:
    """Entries with that name anywhere in them: subject and data; and why they could not be read, or ""."""
    needle, found = name.encode(), deque[tuple[str, bytes]](maxlen=KEPT_MAX)
    try:
        async with asyncio.timeout(READ_S):
            journal = await bus.journal(stream)
            last = await journal.last()
            if last is None:
                return [], ""
            reading: Any = journal.read(after_seq=max(0, last.seq - most))
            async with contextlib.aclosing(reading) as entries:
                async for entry in entries:
                    if needle in entry.data:
                        found.append((entry.subject, entry.data))
                    if entry.seq >= last.seq:
                        break
    except (Forbidden, Unavailable) as error:
        return list(found), error.message.partition(": this session may not")[0]
    except TimeoutError:
        return list(found), f"not all of it within {READ_S:.0f} s: --last reads less"
    return list(found), ""


def about(sources: Sources, kind: Kind, name: str) -> Sources:
    """Of what mentions a name, that which is about it."""
    tests: dict[Kind, tuple[Callable[[Any], bool], Callable[[AuditRecord], bool]]] = {
        "task": (
            lambda e: name in (getattr(e, "task", ""), getattr(e, "example", "")),
            lambda a: a.task == name,
        ),
        "session": (
            lambda e: name in (getattr(e, "session", ""), getattr(e, "by", "")),
            lambda a: a.session == name,
        ),
        "account": (
            lambda e: f"{getattr(e, 'account', '')}/".startswith(f"{name}/"),
            lambda a: f"{a.account}/".startswith(f"{name}/") or (a.code == "budget_short" and names(a.why, name)),
        ),
        "breaker": (
            lambda e: getattr(e, "breaker", "") == name,
            lambda a: a.breaker == name or (a.code == "breaker_open" and names(a.why, name)),
        ),
    }
    of_event, of_audit = tests[kind]
    return msgspec.structs.replace(
        sources,
        tasks=tuple(filter(of_event, sources.tasks)),
        budgets=tuple(filter(of_event, sources.budgets)),
        breakers=tuple(filter(of_event, sources.breakers)),
        matches=tuple(filter(of_event, sources.matches)),
        audit=tuple(filter(of_audit, sources.audit)),
    )


def mentioned(sources: Sources, kind: Kind, name: str) -> bool:
    """Whether the streams tell of a thing of that kind and name."""
    mine = about(sources, kind, name)
    return bool(mine.tasks or mine.budgets or mine.breakers or mine.matches or mine.audit)


def names(sentence: str, name: str) -> bool:
    """Whether a sentence has that name in it, and not as a part of another."""
    edges = "._:/@#+-"
    words = (word.strip("(),;'\"").rstrip(".:") for word in sentence.split())
    return any(word == name or word.strip(edges) == name for word in words)


def _is(name: str, request: type[Any], key: str) -> bool:
    """Whether a request would take that name."""
    try:
        msgspec.convert({key: name}, request)
    except msgspec.ValidationError:
        return False
    return True


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


@contextlib.asynccontextmanager
async def reader(where: Where | None, audit_credentials: Path | None) -> AsyncIterator[Reader]:
    """A connection as `where` says, and one more for the audit when that has a credential of its own."""
    at, clock = where or Where(), SystemClock()
    urls = address_of(at.nats, at.state_dir)
    credential = credential_of(at.credentials)
    name = session_of(None, credential) or f"explain-{clock.token()[:8]}"
    bus = Nats(settings_for(urls, name, credential, at.ca, at.timeout), clock)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(bus, clock, session=name, timeout_s=at.timeout, where=urls))
        client.leave_on_exit = False
        audit_bus: Bus = bus
        if audit_credentials is not None:
            auditor = credential_of(audit_credentials)
            whose = session_of(None, auditor) or name
            audit_bus = Nats(settings_for(urls, whose, auditor, at.ca, at.timeout), clock)
            await audit_bus.connect()
            stack.push_async_callback(audit_bus.close)
        yield Reader(client, bus, audit_bus)


async def quietly(asked: Awaitable[T], otherwise: T) -> T:
    """The answer, or something else when it is refused: a story is told without it."""
    try:
        return await asked
    except FabricError:
        return otherwise
