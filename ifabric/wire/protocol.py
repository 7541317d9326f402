"""All of protocol 1: every component's messages."""

from __future__ import annotations

from msgspec import Struct

from ifabric.wire import chassis, coordinator, governor, identity, overview, replay
from ifabric.wire.envelope import Reply, Request

REPLIES: dict[type[Request], type[Reply]] = {
    **coordinator.REPLIES,
    **governor.REPLIES,
    **replay.REPLIES,
    **chassis.REPLIES,
    **identity.REPLIES,
    **overview.REPLIES,
}
REQUESTS: tuple[type[Request], ...] = tuple(REPLIES)

#: every event: (what it is about, what happened) -> its message
EVENTS: dict[tuple[str, str], type[Struct]] = {
    **{("task", what): coordinator.TaskEvent for what in (*coordinator.EVENTS, *coordinator.FURTHER_EVENTS)},
    **{("budget", what): governor.BudgetEvent for what in (*governor.BUDGET_EVENTS, "resync")},
    **{("breaker", what): governor.BreakerEvent for what in governor.BREAKER_EVENTS},
    **{("match", what): governor.MatchEvent for what in governor.MATCH_EVENTS},
    **{("chassis", what): event for what, event in chassis.EVENTS.items()},
}
