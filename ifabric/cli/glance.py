"""What `ifabric top` draws: from what the daemon's page is told, in the space that there is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

#: what is kept, and what is narrow
POINTS_MAX, NEWS_MAX, NARROW = 3600, 100, 110
BARS = "▁▂▃▄▅▆▇█"
STATES = ("pending", "claimed", "blocked", "done", "dead", "cancelled")
STATE_STYLE = {
    "pending": "cyan", "claimed": "yellow", "done": "green", "dead": "red", "blocked": "bright_black", "cancelled": "magenta",
}  # fmt: skip
WELL = {"healthy": "green", "degraded": "yellow"}
BAR = 14


@dataclass
class Picture:
    """What is known so far. `trouble`: why nothing new comes; `came`: when the last `now` did, on a monotonic clock."""

    now: dict[str, Any] = field(default_factory=dict)
    points: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=POINTS_MAX))
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=NEWS_MAX))
    refusals: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=NEWS_MAX))
    seen: set[str] = field(default_factory=set)
    trouble: str = ""
    came: float = 0.0

    def take(self, event: str, data: Any, at: float) -> None:
        """One event of the stream. One of a newer daemon is left alone."""
        self.seen.add(event)
        if event == "now" and isinstance(data, dict):
            self.now, self.came, self.trouble = data, at, ""
        elif event == "point" and isinstance(data, dict):
            self.points.append(data)
        elif event == "history" and isinstance(data, dict):
            self.points.clear()
            self.points.extend(point for point in data.get("points") or () if isinstance(point, dict))
        elif event in ("events", "refusals") and isinstance(data, list):
            kept = self.events if event == "events" else self.refusals
            kept.extend(one for one in data if isinstance(one, dict))


def draw(picture: Picture, width: int, height: int, monotonic: float) -> RenderableType:
    """The picture for a terminal of that size; `height` 0: as high as it gets."""
    head = _head(picture, monotonic)
    room = max(4, height - len(head) - 1) if height else 0
    left = [_claims(picture, (width if width < NARROW else width // 2) - 14), _board(picture), _money(picture)]
    left += [_breakers(picture, monotonic), _sandboxes(picture)]
    right = [_actors(picture), _refusals(picture), _events(picture)]
    if width < NARROW:
        return Group(*head, *fitted([*left, *right], room))
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row(Group(*fitted(left, room)), Group(*fitted(right, room)))
    return Group(*head, grid)


def fitted(sections: Iterable[Sequence[Text]], room: int) -> list[Text]:
    """The sections one below the other, in so many lines (0: any number): long ones are cut until all fit."""
    kept = [list(section) for section in sections if len(section) > 1]
    while room and sum(map(len, kept)) + len(kept) > room:
        longest = max(kept, key=len)
        if len(longest) <= 2:
            break
        longest.pop()
    lines = [line for section in kept for line in (*section, Text(""))]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines[:room] if room else lines


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values, the highest within each place; as wide as there are values, at most `width`."""
    if not values or width < 1:
        return ""
    step = -(-len(values) // width)
    heights = [max(values[at : at + step]) for at in range(0, len(values), step)]
    top = max(heights)
    return "".join(BARS[min(7, int(value / top * 7.999)) if top > 0 else 0] for value in heights)


def shown(text: object, most: int = 200) -> str:
    """Somebody else's text on one line: what a terminal would obey is shown and not obeyed."""
    cut = str(text)[:most]
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else f"\\x{ord(c):02x}" for c in cut)


# -- the parts -------------------------------------------------------------------------------------------------------


def _head(picture: Picture, monotonic: float) -> list[Text]:
    now, health = picture.now, _dict(picture.now.get("health"))
    status = str(health.get("status", "?"))
    line = Text.assemble(
        ("● ", WELL.get(status, "red")),
        (shown(status), f"bold {WELL.get(status, 'red')}"),
        f"  {shown(now.get('daemon', ''))}  ifabric {shown(health.get('version', '?'))}",
        f"  up {span(_float(health.get('uptime_s')))}  etcd {shown(health.get('etcd', '?'))}",
        f"  NATS {shown(health.get('nats', '?'))}  loop lag {_float(health.get('loop_lag_s')) * 1000:.1f} ms",
        (f"  {shown(now.get('at', ''))}", "dim"),
    )
    lines = [line]
    if picture.trouble:
        since = f", the picture is {monotonic - picture.came:.0f} s old" if picture.came else ""
        lines.append(Text(f"✘ connection lost{since}: {shown(picture.trouble)}; trying again", style="bold red"))
    reasons = (*_list(health.get("not_ready")), *_list(health.get("warnings")))
    lines += [Text(f"  ! {shown(sentence)}", style="yellow") for sentence in reasons]
    for made in lines:
        made.no_wrap, made.overflow = True, "ellipsis"
    return [*lines, Text("")]


def _claims(picture: Picture, width: int) -> list[Text]:
    points = list(picture.points)
    last = points[-1] if points else {}
    lines = [_title("Claims")]
    rates = [_float(point.get("claims_per_s")) for point in points]
    lines.append(_row("claims/s", f"{rates[-1] if rates else 0:.0f}", sparkline(rates, width), "green"))
    slow = [_float(point.get("p95_ms")) for point in points]
    lines.append(_row("p95", _ms(last.get("p95_ms")), sparkline(slow, width), "yellow"))
    refused = [_float(point.get("refused_per_s")) for point in points]
    lines.append(_row("refused/s", f"{refused[-1] if refused else 0:.1f}", sparkline(refused, width), "red"))
    more = f"p50 {_ms(last.get('p50_ms'))}  p99 {_ms(last.get('p99_ms'))}  handled/s {_float(last.get('handled_per_s')):.0f}"
    return [*lines, Text(more, style="dim")]


def _row(name: str, value: str, line: str, style: str) -> Text:
    return Text.assemble(f"{name:<10}", (f"{value:>9} ", "bold"), (line, style))


def _board(picture: Picture) -> list[Text]:
    now, counts = picture.now, _dict(picture.now.get("counts"))
    board = Text("  ").join(Text(f"{name} {_int(counts.get(name))}", style=STATE_STYLE[name]) for name in STATES)
    people = f"{_int(now.get('sessions'))} sessions, {_int(now.get('waiters'))} waiting for a task"
    lines = [_title("Board"), board, Text(people)]
    if unmatched := _int(now.get("unmatched")):
        lines.append(Text(f"{unmatched} pending task(s) that nobody can take: ifabric playbook unmatched", style="red"))
    return lines


def _money(picture: Picture) -> list[Text]:
    now = picture.now
    fullest = sorted(_dict(now.get("budget_fullest")).items(), key=lambda pair: -_float(pair[1]))
    lines = [
        _title("Money"),
        Text(f"{_int(now.get('holds'))} holds open, overhead {_float(now.get('overhead_percent')):.1f} %"),
    ]
    for account, used in fullest:
        share = _float(used)
        style = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
        full = min(BAR, max(0, round(share * BAR)))
        lines.append(
            Text.assemble(("█" * full, style), ("·" * (BAR - full), "dim"), f" {share * 100:>4.0f} % ", shown(account))
        )
    return lines


def _breakers(picture: Picture, monotonic: float) -> list[Text]:
    lines = [_title("Breakers")]
    for one in _dicts(picture.now.get("breakers")):
        state = str(one.get("state", "?"))
        style = {"closed": "green", "half_open": "yellow"}.get(state, "red")
        probe = one.get("probe_in_s")
        left = max(0.0, _float(probe) - (monotonic - picture.came)) if probe is not None else None
        wait = "" if left is None else "  probe now" if left <= 0 else f"  probe in {left:.0f} s"
        failed = f"  {_int(one.get('failures'))} failures"
        lines.append(
            Text.assemble((f"{shown(state).replace('_', ' '):<10}", style), shown(one.get("breaker", "")), failed, wait)
        )
    return lines if len(lines) > 1 else [lines[0], Text("none is open", style="dim")]


def _sandboxes(picture: Picture) -> list[Text]:
    workers = _dict(picture.now.get("workers"))
    busy, idle = _int(workers.get("busy")), _int(workers.get("idle"))
    runs = _float(picture.points[-1].get("runs_per_s")) if picture.points else 0.0
    text = f"{busy} running, {_int(picture.now.get('queue'))} waiting, {idle} workers idle, {runs:.1f} runs/s"
    return [_title("Sandboxes"), Text(text)]


def _actors(picture: Picture) -> list[Text]:
    lines = [_title("Actors")]
    for one in _dicts(picture.now.get("actors")):
        state, restarts = str(one.get("state", "?")), _int(one.get("restarts"))
        lines.append(
            Text.assemble(
                ("✔ ", "green") if state == "running" else ("✘ ", "red"),
                f"{shown(one.get('actor', '')):<12}",
                (f" started again {restarts}x", "red") if restarts else "",
                f" {_int(one.get('handled')):>9} handled",
                f" {_int(one.get('in_flight')):>4} in flight",
                f" {_int(one.get('mailbox')):>4} waiting",
                (f" {_int(one.get('refused'))} refused", "dim"),
                (f" {_int(one.get('errors'))} errors", "red" if one.get("errors") else "dim"),
            )
        )
    audit = _dict(picture.now.get("audit"))
    if audit:
        dropped = _int(audit.get("dropped"))
        text = f"audit: {_int(audit.get('stored'))} stored, {_int(audit.get('waiting'))} waiting, {dropped} dropped"
        lines.append(Text(text, style="red" if dropped else "dim"))
    return lines


def _refusals(picture: Picture) -> list[Text]:
    lines = [_title("Latest refusals")]
    for one in reversed(picture.refusals):
        asked = f"{shown(one.get('component', ''))} {shown(one.get('verb', ''))}"
        lines.append(
            Text.assemble(
                (f"{_clock(one)} ", "dim"), (f"{shown(one.get('session', '')):<12} ", "bold"), f"{asked} ",
                (shown(one.get("code", "")), "red"), f" {shown(one.get('why', ''))}",
            )
        )  # fmt: skip
    return lines if len(lines) > 1 else [lines[0], Text("none", style="dim")]


def _events(picture: Picture) -> list[Text]:
    lines = [_title("Latest events")]
    for one in reversed(picture.events):
        if one.get("dropped"):
            lines.append(Text(f"... {_int(one['dropped'])} more that are not shown", style="dim"))
            continue
        about = (
            one.get("task") or one.get("account") or one.get("breaker") or one.get("run") or one.get("example") or ""
        )
        who = one.get("session") or one.get("by") or ""
        note = one.get("note") or one.get("why") or ""
        lines.append(
            Text.assemble(
                (f"{_clock(one)} ", "dim"), f"{shown(one.get('event', '')):<10} ", (shown(about), "bold"),
                f" {shown(who)}", (f" {shown(note)}", "dim"),
            )
        )  # fmt: skip
    return lines if len(lines) > 1 else [lines[0], Text("none yet", style="dim")]


def _title(text: str) -> Text:
    return Text(text, style="bold underline")


def _clock(one: Mapping[str, Any]) -> str:
    """The time of day of an event."""
    return shown(one.get("at", ""))[11:19]


def _ms(value: Any) -> str:
    return "-" if value is None else f"{_float(value):.1f} ms"


def span(seconds: float) -> str:
    """A length of time, in the unit that fits."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# -- what a daemon says is not believed to be of the right kind ------------------------------------------------------


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _int(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0
