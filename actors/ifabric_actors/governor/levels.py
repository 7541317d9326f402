"""The accounts right below one, of all that there are, and how many are below each. Pure.

An account is where its name says: `acme` is there when `acme/research` is, whether anybody has set its limit or not.
"""

from __future__ import annotations

from collections.abc import Iterable

from ifabric_actors.governor.books import TASK


class Level:
    """The children of `parent` (None: the top accounts), told by the names of all accounts in any order."""

    def __init__(self, parent: str | None) -> None:
        self._prefix = f"{parent}/" if parent else ""
        #: the full name of each child -> the words that come after it in longer names
        self.children: dict[str, set[str] | None] = {}

    def add(self, names: Iterable[str]) -> None:
        """These accounts are there."""
        prefix, start = self._prefix, len(self._prefix)
        for name in names:
            if not name.startswith(prefix) or name.startswith(TASK):
                continue
            word, _, rest = name[start:].partition("/")
            child = prefix + word
            below = self.children.setdefault(child, None)
            if rest:
                if below is None:
                    below = self.children[child] = set()
                below.add(rest.partition("/")[0])

    def below(self, child: str) -> int:
        """How many accounts are right below that one."""
        return len(self.children.get(child) or ())
