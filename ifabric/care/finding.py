"""One finding, and how figures are said in it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Severity = Literal["ok", "warning", "critical"]


class Finding(Struct, frozen=True, kw_only=True):
    """What is so, in a sentence; the figure behind it; what to do, commands within it to be copied; where more is said."""

    severity: Severity
    part: str
    what: str
    figure: str = ""
    do: str = ""
    #: the page about it: `ifabric playbook NAME`; "" when there is none
    playbook: str = ""


def ok(part: str, what: str, *, figure: str = "", do: str = "", playbook: str = "") -> Finding:
    """It is as it should be."""
    return Finding(severity="ok", part=part, what=what, figure=figure, do=do, playbook=playbook)


def warning(part: str, what: str, *, figure: str = "", do: str = "", playbook: str = "") -> Finding:
    """It works, and will not for ever."""
    return Finding(severity="warning", part=part, what=what, figure=figure, do=do, playbook=playbook)


def critical(part: str, what: str, *, figure: str = "", do: str = "", playbook: str = "") -> Finding:
    """It does not work, or may stop at any moment."""
    return Finding(severity="critical", part=part, what=what, figure=figure, do=do, playbook=playbook)


def size(number: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


def span(seconds: float) -> str:
    """A length of time, in the unit that fits."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def days(number: float) -> str:
    """Days, or hours when there are few."""
    return f"{number:.0f} days" if number >= 2 else f"{number * 24:.0f} hours"


def percent(share: float) -> str:
    """Of one."""
    return f"{share * 100:.0f} %"
