"""The command line. Each noun is a file; nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ifabric import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; the exit code: 0 done, 1 failed, 2 usage or config, 3 unreachable."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):  # the commonest question, answered before anything is imported
        print(f"ifabric {__version__}")
        return 0
    from ifabric.cli.app import run_app

    return run_app(arguments)
