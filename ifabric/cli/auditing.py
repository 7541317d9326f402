"""What the verbs of the audit share: a line to it, which records are meant, and how one is shown."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.audit.reading import Wanted
from ifabric.audit.stored import Stored, beginning, ms_of, read
from ifabric.cli.options import Where
from ifabric.cli.output import err, plain, usd
from ifabric.clock import SystemClock, rfc3339
from ifabric.errors import ConfigError
from ifabric.wire.audit import AuditRecord

if TYPE_CHECKING:
    from ifabric.bus.nats import Nats, NatsSettings

CLOCK = SystemClock()
STYLE = {"ok": "green", "refused": "yellow", "error": "bold red"}
#: what is read without a progress bar
SHORT = 5000
_AGE = re.compile(r"(\d{1,6})\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")

Since = Annotated[str | None, Parameter(help="From when on: 2h (ago), or 2026-11-28T10:00Z.")]
Until = Annotated[str | None, Parameter(help="To when, not including it.")]
AfterSeq = Annotated[
    int, Parameter(help="Only what the stream holds after this sequence number.", validator=Number(gte=0))
]


@Parameter(name="*")
@dataclass(frozen=True)
class Filters:
    """Which records."""

    session: Annotated[str, Parameter(name=["--session", "-s"], help="Of this session: who asked.")] = ""
    component: Annotated[
        str, Parameter(help="Of this component: coordinator, governor, chassis, identity, fabric.")
    ] = ""
    verb: Annotated[str, Parameter(help="Of this verb: claim, spend, cancel.")] = ""
    outcome: Annotated[
        Literal["", "ok", "refused", "error"],
        Parameter(help="Carried out, refused, or failed by a bug.", show_choices=False),
    ] = ""
    task: Annotated[str, Parameter(help="About this task.")] = ""
    account: Annotated[str, Parameter(help="About this account.")] = ""

    def wanted(self, **more: Any) -> Wanted:
        """As the reading takes it. `ConfigError`."""
        for name in ("component", "verb"):
            value = getattr(self, name)
            if value and not _WORD.fullmatch(value):
                raise ConfigError(f"--{name} {value}: it is one word, as `claim`")
        return Wanted(
            component=self.component,
            verb=self.verb,
            session=self.session,
            outcome=self.outcome,
            task=self.task,
            account=self.account,
            **more,
        )


def moment(text: str | None, name: str) -> int:
    """Ms since the epoch of a moment, or of so long ago; 0 for None. A moment without a zone is in UTC. `ConfigError`."""
    if text is None:
        return 0
    ago = _AGE.fullmatch(text.strip())
    if ago is not None:
        return CLOCK.wall_ms() - int(ago[1]) * _SECONDS[ago[2]] * 1000
    for zone in ("", "Z", "T00:00Z"):
        with contextlib.suppress(ValueError, OverflowError):
            return max(1, ms_of(text.strip() + zone))
    raise ConfigError(f"--{name} {text}: it is neither a time ago (90s, 15m, 2h, 7d) nor a moment (2026-11-28T10:00Z)")


# -- the line ------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def line(where: Where | None, settings: NatsSettings | None = None) -> AsyncIterator[Nats]:
    """A connection of an auditor's, or with `settings` of whoever they say. `Unreachable`, `Forbidden`."""
    from ifabric.bus.nats import Nats

    bus = Nats(settings or _settings(where or Where()), CLOCK)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


def _settings(at: Where) -> NatsSettings:
    from ifabric.calling import address_of
    from ifabric.connecting import credential_of, session_of, settings_for

    credential = credential_of(at.credentials)
    name = session_of(None, credential) or f"auditor-{CLOCK.token()[:12]}"
    if not _WORD.fullmatch(name):
        raise ConfigError(f"the session {name!r} is none: it must match {_WORD.pattern}")
    return settings_for(address_of(at.nats, at.state_dir), name, credential, at.ca, at.timeout)


@contextlib.contextmanager
def progress(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, when there is much to read: told how much is done, and of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bars:
        bar = bars.add_task(what, total=None, visible=False)

        def told(done: int, total: int) -> None:
            if total > SHORT and (done % 512 == 0 or done == total):
                bars.update(bar, completed=done, total=total, visible=True)

        yield told


# -- how it is shown -----------------------------------------------------------------------------------------------------


def said(stored: Stored) -> dict[str, Any]:
    """For machines: the record with its sequence number; of what is none, why, and its bytes."""
    record = read(stored)
    if isinstance(record, AuditRecord):
        return {"seq": stored.seq, **msgspec.to_builtins(record)}
    return {
        "seq": stored.seq,
        "at": rfc3339(stored.stored_ms),
        "subject": stored.subject,
        "unreadable": record.why,
        "data": stored.data,  # in base64
    }


def cells(stored: Stored) -> tuple[str, ...]:
    """For people, as markup: when, who, verb, on what, outcome, code, request id."""
    record = read(stored)
    if not isinstance(record, AuditRecord):
        at = rfc3339(stored.stored_ms)
        shown = f"{record.why}: {beginning(stored.data)}"
        return (_time(at), "", plain(stored.subject), plain(shown), "[bold red]no record[/]", "", f"seq {stored.seq}")
    verb = f"{record.component}.{record.verb}"
    who = f"[bold]{plain(record.session)}[/]" if record.session else "[dim]-[/]"
    return (
        _time(record.at),
        who,
        f"[magenta]admin[/] {plain(verb)}" if record.admin else plain(verb),
        plain(on_what(record)),
        f"[{STYLE[record.outcome]}]{record.outcome}[/]",
        plain(record.code),
        f"[dim]{plain(record.request_id)}[/]" if record.request_id else "",
    )


def _time(at: str) -> str:
    return f"[dim]{plain(at[:23].replace('T', ' '))}[/]"


def on_what(record: AuditRecord) -> str:
    """What a command was about, in a few words."""
    words = [record.task]
    if record.fence:
        words.append(f"fence {record.fence}")
    words += [record.account, record.hold, record.breaker]
    if record.module:
        words.append(record.module[:19])
    words.append(record.subject)
    if record.amount_micro_usd is not None:
        words.append(usd(record.amount_micro_usd))
    if record.count is not None:
        words.append(f"{record.count} of them")
    if record.why and not record.code:
        words.append(record.why)
    return " ".join(word for word in words if word)
