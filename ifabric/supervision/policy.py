"""What to do when a child has ended. A function of values: nothing is started or stopped here.

**Why a budget.** A crash that comes from a moment's bad luck is cured by starting again from what is stored. A crash
that comes back at once is not, and starting again for ever only hides it. So every branch bears some restarts within
some time; the next one is its parent's matter, whose own restart takes more of the world down with it and so cures
more. At the root there is nobody left: the process ends with the reason, and whoever runs it (systemd, a person)
decides.

**Why the first restart is at once and the later ones are not.** The first is usually the cure, and callers are
waiting. When it was not, the cause is outside (a server that is down), and asking it a thousand times a second helps
nobody. The delay doubles with every restart that is still within the window, up to `DELAY_MAX_S`.

**Why a failed restart is an end like any other.** It is counted, delayed and escalated by the same rule, and while it
waits the branch can be told to stop: nothing is ever retried in place.

After OTP's supervisor (`add_restart`, `try_again_restart`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ifabric.supervision.spec import Branch, Restart, Strategy

DELAY_FIRST_S = 0.1
DELAY_MAX_S = 5.0


@dataclass(frozen=True)
class Forget:
    """Leave it ended."""


@dataclass(frozen=True)
class Again:
    """Stop these (in reverse) and start them again (in order), after the delay."""

    names: tuple[str, ...]
    delay_s: float


@dataclass(frozen=True)
class Escalate:
    """The branch has failed."""

    reason: str


Decision = Forget | Again | Escalate


def after_exit(branch: Branch, child: str, reason: str, history: Sequence[float], now: float) -> Decision:
    """What to do now that `child` has ended with `reason`.

    `history` holds the times of the branch's restarts so far, those that still wait for their delay included, on the
    clock of `now`, in seconds.
    """
    names = [one.name for one in branch.children]
    spec = branch.children[names.index(child)]
    if getattr(spec, "restart", Restart.PERMANENT) is Restart.TEMPORARY:
        return Forget()
    recent = within(branch, history, now)
    if len(recent) >= branch.budget.restarts:
        return Escalate(
            f"{branch.name}: {child} ended ({reason}); "
            f"{len(recent)} restarts within {branch.budget.within_s:g} s are all that is borne"
        )
    delay_s = min(DELAY_MAX_S, DELAY_FIRST_S * 2 ** (len(recent) - 1)) if recent else 0.0
    return Again(affected(branch.strategy, names, child), delay_s)


def within(branch: Branch, history: Sequence[float], now: float) -> list[float]:
    """The restarts that still count."""
    return [then for then in history if now - then < branch.budget.within_s]


def affected(strategy: Strategy, names: Sequence[str], child: str) -> tuple[str, ...]:
    """The children that start again together with `child`."""
    match strategy:
        case Strategy.ONE_FOR_ONE:
            return (child,)
        case Strategy.REST_FOR_ONE:
            return tuple(names[names.index(child) :])
        case Strategy.ONE_FOR_ALL:
            return tuple(names)
