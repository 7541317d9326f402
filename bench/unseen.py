"""`python -m bench.unseen run ...`: the daemon as it would be if nobody wanted to see anything. Only for comparison.

No event is published, and nothing is counted: the calls that count are taken out of the code as it is loaded. To count
into a metric that does nothing would cost nearly what counting costs, and make it look free.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.machinery
import sys
from typing import Any

#: what counts; a gauge's `set` is told from an event's by what it is called on
COUNTS = ("inc", "observe", "raise_to")
GAUGES = ("_in_flight_gauge", "_depth", "_lag")


class _Blind(ast.NodeTransformer):
    """Takes out the statements that do nothing but count."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        if not isinstance(called, ast.Attribute):
            return node
        on = called.value.attr if isinstance(called.value, ast.Attribute) else ""
        if called.attr in COUNTS or (called.attr == "set" and on in GAUGES):
            return ast.copy_location(ast.Pass(), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return compile(_Blind().visit(ast.parse(self.get_data(path), path)), path, "exec")


class _Finder:
    """Finds the fabric's own modules, and the residents."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in ("ifabric", "ifabric_actors") or name == "ifabric.metrics":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


async def _nothing(*_: Any) -> None:
    await asyncio.get_running_loop().create_future()


def main() -> int:
    """Runs the daemon."""
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    from ifabric.actor.publisher import Publisher  # noqa: PLC0415  through the finder
    from ifabric.cli import main as ifabric  # noqa: PLC0415

    Publisher.run = _nothing  # type: ignore[method-assign]
    code: int = ifabric()
    return code


if __name__ == "__main__":
    sys.exit(main())
