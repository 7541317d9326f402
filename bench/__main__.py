"""`python -m bench [QUESTION ...]`: one file a question; without names, all of them."""

from __future__ import annotations

import importlib
import sys

import uvloop

QUESTIONS = ("claims", "sessions", "idle", "budgets", "breakers", "matching", "sandbox", "secured", "observing", "page")


def main() -> None:
    """Runs what was asked."""
    asked = sys.argv[1:] or list(QUESTIONS)
    for name in asked:
        if name not in QUESTIONS:
            raise SystemExit(f"no benchmark {name!r}; there are {', '.join(QUESTIONS)}")
        print(f"== {name}")
        uvloop.run(importlib.import_module(f"bench.{name}").main())


main()
