"""`ifabric playbook`: what to do when something is wrong, a page an incident."""

from __future__ import annotations

import re
import sys
from typing import Annotated

from cyclopts import Parameter

from ifabric.cli.options import Json
from ifabric.cli.output import out, print_json, print_table

_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\)")


def playbook(
    name: Annotated[str | None, Parameter(help="A page, or the name of an alert. Default: list them.")] = None,
    *,
    json: Json = False,
) -> int:
    """Show what to do when something is wrong: what it means, who is affected, where to
    look, what to do, and how you know that it is over.

    The same pages are on a daemon's HTTP port, under /playbooks/.

    For example:

        ifabric playbook
        ifabric playbook breaker
        ifabric playbook CoordinatorHighLatency
    """
    from ifabric import playbooks

    if name is None:
        pages = [playbooks.page(one) for one in playbooks.names()]
        if json:
            print_json([{"name": one.name, "title": one.title, "alerts": one.alerts} for one in pages])
        else:
            print_table(("PLAYBOOK", "WHAT IT IS ABOUT"), [(one.name, one.title) for one in pages])
            out.print("[dim]read one: ifabric playbook NAME[/]")
        return 0
    found = playbooks.find(name)
    if json:
        print_json(found._asdict())
        return 0
    text = _LINK.sub(_named, found.text)
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        out.print(Markdown(text, hyperlinks=False), soft_wrap=False)
    else:
        out.print(text.rstrip(), markup=False)  # as it is: for `less` and `grep`
    return 0


def _named(link: re.Match[str]) -> str:
    """A link, for where there is nothing to click."""
    return f"`{link[2]}`" if link[1] == link[2] else f"{link[1]} (`ifabric playbook {link[2]}`)"
