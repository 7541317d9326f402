"""The story of one thing: what happened to it in order, how it is now, and what to do. Pure: facts in, a story out.

Three witnesses tell of the same things. The *record* knows how it stands and the last of how it came to that; the
*events* have all that was committed, for as long as the journal keeps it; the *audit* has every command, also those
that were refused. `happenings` reads each of them, `merging` makes one line of what they tell of one thing, and a module
a noun says what it comes to.
"""

from __future__ import annotations

from ifabric.explaining.accounts import AccountFacts, account_story
from ifabric.explaining.breakers import BreakerFacts, breaker_story
from ifabric.explaining.sessions import SessionFacts, session_story
from ifabric.explaining.story import Line, Sources, Story
from ifabric.explaining.tasks import Dependency, TaskFacts, task_story

__all__ = [
    "AccountFacts",
    "BreakerFacts",
    "Dependency",
    "Line",
    "SessionFacts",
    "Sources",
    "Story",
    "TaskFacts",
    "account_story",
    "breaker_story",
    "session_story",
    "task_story",
]
