"""How what residents depend on is, beside etcd and NATS: they report it, and the daemon's health tells it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The last word on one. Times on the clock's monotonic scale."""

    #: why it cannot be had; None while it can
    trouble: str | None
    #: since when it is so
    since: float
    #: when it was last heard of
    heard: float


class Dependencies:
    """The reports of one process's residents; one of `Context.parts`."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}

    def report(self, name: str, trouble: str | None, now: float) -> None:
        """Says that it can be had, or why not."""
        before = self.reports.get(name)
        same = before is not None and (before.trouble is None) == (trouble is None)
        self.reports[name] = Report(trouble, before.since if same and before is not None else now, now)

    def forget(self, name: str) -> None:
        """Nobody asks it any more."""
        self.reports.pop(name, None)
