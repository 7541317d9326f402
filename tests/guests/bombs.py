"""All bombs, in one table."""

from __future__ import annotations

from tests.guests import bombs_calls, bombs_ends, bombs_modules, bombs_space, bombs_time
from tests.guests.bomb import Bomb

BOMBS: tuple[Bomb, ...] = (
    *bombs_time.BOMBS,
    *bombs_space.BOMBS,
    *bombs_calls.BOMBS,
    *bombs_modules.BOMBS,
    *bombs_ends.BOMBS,
)
assert len({bomb.name for bomb in BOMBS}) == len(BOMBS), "two bombs of one name"
