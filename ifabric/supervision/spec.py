"""What is supervised, and how: data, checked when it is made.

A `Branch` starts its children in order and stops them in reverse. When one ends, its strategy says which are started
again, and its budget how often that may happen before the branch itself has failed and its parent decides. The whole
tree is a literal in `ifabric.fabric`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable


class Running(Protocol):
    """Anything that can be supervised. The lifecycle contract:

    `start` returns when it is ready, or raises and leaves nothing behind. `stop` returns when nothing is left; it
    tolerates being called twice, before `start`, and after `start` was cancelled. After `stop`, `start` begins a new
    life of the same object. `lost` belongs to the life that `start` began, and is done, with the reason, when that
    life ended by itself. `ifabric.testing.lifecycle` holds a thing to all this.
    """

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    @property
    def lost(self) -> asyncio.Future[str] | None: ...


@runtime_checkable
class Resumable(Running, Protocol):
    """A thing of which something outlives the end of one life, for the next to take over.

    When its life ended by itself, `clear` comes before the next `start`, instead of `stop`: it ends what cannot go on.
    `stop` may still come after it, and ends all.
    """

    async def clear(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """Makes a supervised thing of three functions."""

    start: Callable[[], Coroutine[Any, Any, None]]
    stop: Callable[[], Coroutine[Any, Any, None]]
    of_lost: Callable[[], asyncio.Future[str] | None] = lambda: None

    @property
    def lost(self) -> asyncio.Future[str] | None:
        """Done when the present life has ended by itself; None when that cannot happen."""
        return self.of_lost()


class Strategy(Enum):
    """Which children start again when one has ended."""

    #: only that one
    ONE_FOR_ONE = "one_for_one"
    #: that one and those after it in the list: they depend on it
    REST_FOR_ONE = "rest_for_one"
    #: all of them
    ONE_FOR_ALL = "one_for_all"


class Restart(Enum):
    """Whether a child that ended by itself is started again."""

    PERMANENT = "permanent"
    #: never: its end is not the branch's business
    TEMPORARY = "temporary"


@dataclass(frozen=True)
class Budget:
    """So many restarts within so many seconds are borne; one more is a failure of the branch."""

    restarts: int
    within_s: float

    def __post_init__(self) -> None:
        if self.restarts < 0 or self.within_s <= 0:
            raise ValueError("a budget is some restarts (0 or more) within some seconds (more than 0)")


@dataclass(frozen=True)
class Child:
    """A leaf of the tree."""

    name: str
    running: Running
    restart: Restart = Restart.PERMANENT
    #: how long its `stop` may take before it is abandoned
    shutdown_s: float = 15.0

    def __post_init__(self) -> None:
        if not self.name or self.shutdown_s <= 0:
            raise ValueError("a child has a name, and some time to stop")


@dataclass(frozen=True)
class Branch:
    """A node of the tree: children with a strategy and a budget of their own."""

    name: str
    strategy: Strategy
    budget: Budget
    children: tuple[Child | Branch, ...] = field(default=())

    @property
    def shutdown_s(self) -> float:
        """How long its children may take, one after another, and a second more."""
        return sum(child.shutdown_s for child in self.children) + 1.0

    def __post_init__(self) -> None:
        names = [child.name for child in self.children]
        if not self.name or len(set(names)) != len(names):
            raise ValueError(f"a branch has a name, and its children have different ones: {names}")
