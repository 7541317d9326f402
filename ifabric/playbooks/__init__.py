"""What to do when something is wrong: short pages, in the terminal (`ifabric playbook`) and under /playbooks/.

They are Markdown files beside this one. Alerts lead to them by name, `doctor` names them, and they link to each other by
name. A test holds them to the product: every command in them exists, every metric is counted, every link leads somewhere.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from markdown_it import MarkdownIt

from ifabric.errors import FabricError

__all__ = ["CSS", "Page", "find", "html", "index_html", "missing_html", "names", "page"]

#: told first in the list
FIRST = ("troubleshooting", "incident", "outage", "latency", "degraded", "security")
_ALERTS = re.compile(r"^\*\*Alerts\.\*\*(.*)$", re.MULTILINE)


class Page(NamedTuple):
    """One page. `text` is its Markdown, `says` its first sentence, `alerts` the names of those that lead to it."""

    name: str
    title: str
    says: str
    text: str
    alerts: tuple[str, ...]


@cache
def names() -> tuple[str, ...]:
    """All of them, in the order of a list."""
    found = sorted(file.name.removesuffix(".md") for file in files(__name__).iterdir() if file.name.endswith(".md"))
    return (*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST))


@cache
def page(name: str) -> Page:
    """The page of that name. `KeyError` when there is none: any text may be asked for."""
    if name not in names():
        raise KeyError(name)
    text = (files(__name__) / f"{name}.md").read_text(encoding="utf-8")
    head, *rest = text.split("\n\n")
    alerts = _ALERTS.search(text)
    return Page(
        name,
        head.removeprefix("# ").strip(),
        re.split(r"(?<=\.) ", rest[0])[0].strip(),
        text,
        tuple(re.findall(r"`([A-Za-z]+)`", alerts[1])) if alerts else (),
    )


def find(name: str) -> Page:
    """The page of that name, or the one to which an alert of that name leads. `FabricError` with what is near."""
    if name in names():
        return page(name)
    every = [page(one) for one in names()]
    for one in every:
        if name.lower() in (alert.lower() for alert in one.alerts):
            return one
    known = [*names(), *(alert for one in every for alert in one.alerts)]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    raise FabricError(
        f"there is no playbook {name!r}: `ifabric playbook` lists them", **({"near": near} if near else {})
    )


# -- as HTML -----------------------------------------------------------------------------------------------------------

CSS = """\
:root { color-scheme: light dark; --back: #fff; --ink: #1c2127; --dim: #5f6b7a; --line: #d8dee6; --code: #f3f5f8; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161b; --ink: #e3e8ee; --dim: #97a3b2; --line: #2c343d; --code: #1b2129; --link: #79b8ff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 48rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
nav { display: flex; gap: 1rem; padding-bottom: .5rem; border-bottom: 1px solid var(--line); font-size: .9rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2rem; font-size: 1.15rem; }
a { color: var(--link); }
a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: .875em; background: var(--code); border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .75rem; overflow-x: auto; border: 1px solid var(--line); }
pre code { padding: 0; background: none; }
li { margin: .3rem 0; }
li a { display: inline-block; padding: .15rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
@media (max-width: 40rem) {
  table { min-width: 0; }
  thead { display: none; }
  tr, td { display: block; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  td { padding: .1rem 0; border: 0; }
  td:first-child { font-weight: 600; }
}
dt { margin-top: .9rem; font-weight: 600; }
dd { margin: 0; color: var(--dim); }
"""
_FRAME = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="/playbooks.css">
</head>
<body>
<nav><a href="/">The fabric</a><a href="/playbooks/">All playbooks</a></nav>
<main>
{body}
</main>
</body>
</html>
"""


@cache
def html(name: str) -> str:
    """A page as a whole HTML document. `KeyError` when there is none."""
    found = page(name)
    body = _markdown().render(found.text).replace("<table>", '<div class="wide"><table>')
    return _FRAME.format(title=_escaped(found.title), body=body.replace("</table>", "</table></div>"))


@cache
def index_html() -> str:
    """The list of all pages."""
    lines = ["<h1>Playbooks</h1>", "<dl>"]
    for found in map(page, names()):
        lines.append(f'<dt><a href="/playbooks/{found.name}">{_escaped(found.title)}</a></dt>')
        lines.append(f"<dd>{_markdown().renderInline(found.says)}</dd>")
    return _FRAME.format(title="Playbooks", body="\n".join([*lines, "</dl>"]))


def missing_html() -> str:
    """What is said of a page that is not there: nothing of what was asked for is repeated."""
    return _FRAME.format(title="No such playbook", body="<h1>There is no such playbook</h1>")


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables, and without HTML in it. Links lead to other pages by their names."""
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
