"""The playbooks are true to the product: each command in them exists, each metric is counted, each link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from starlette.applications import Starlette
from starlette.routing import Match

from ifabric import playbooks
from ifabric.cli.app import VERBS, build
from ifabric.config import Config
from ifabric.errors import FabricError
from ifabric.http.playbooks import HEADERS, routes
from ifabric.metrics import METRICS

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "config/deploy/monitoring/rules").glob("*.yml"))
#: what alerts and findings may lead to
WANTED = [
    "outage", "latency", "degraded", "etcd-down", "etcd-no-quorum", "etcd-slow", "etcd-full", "nats-down", "slow-consumer", "loop-lag",
    "actor-restarts", "low-success", "budget", "breaker", "breaker-flapping", "hold-leak", "unmatched", "sandbox-violation",
    "sandbox-memory", "slo", "event-lag", "audit", "backup-age", "certificates", "target-down", "security", "troubleshooting", "incident",
]  # fmt: skip
#: of etcd 3.5, as its /metrics has them
ETCD = {
    "etcd_disk_backend_commit_duration_seconds",
    "etcd_disk_wal_fsync_duration_seconds",
    "etcd_mvcc_db_total_size_in_bytes",
    "etcd_network_peer_round_trip_time_seconds",
    "etcd_server_has_leader",
    "etcd_server_leader_changes_seen_total",
    "etcd_server_quota_backend_bytes",
}
#: sections of a page about an incident
SECTIONS = ("## Look", "## Likely causes, in order", "## What to do", "## It is over when", "## Related")
LINK = re.compile(r"\]\(([^)]*)\)")
METRIC = re.compile(r"\b(?:if[_:][a-z0-9_:]+|process_[a-z_]+|etcd_[a-z_]+)\b")
EACH = pytest.mark.parametrize("name", playbooks.names())


def commands(text: str) -> Iterator[str]:
    """Every command of ours: in blocks, and between backticks."""
    for line in text.splitlines():
        if line.startswith("    ") and line.strip().startswith("ifabric "):
            yield line.strip()
    yield from re.findall(r"`(ifabric [^`]*)`", text)


ALL = [(name, command) for name in playbooks.names() for command in commands(playbooks.page(name).text)]


def parse(command: str) -> None:
    """As a shell and the command line would; raises when there is no such verb or option."""
    words = shlex.split(command, comments=True)
    given = words[1 : words.index("|")] if "|" in words else words[1:]
    build(given).parse_args(given, exit_on_error=False, print_error=False)


def recorded() -> set[str]:
    """The names that the recording rules make."""
    return {
        rule["record"]
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def alerts() -> list[tuple[str, str]]:
    """Each alert, and the page to which it leads."""
    return [
        (rule["alert"], rule.get("annotations", {}).get("runbook_url", "").rpartition("/playbooks/")[2])
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]


# -- true to the product -----------------------------------------------------------------------------------------------


def test_every_page_that_something_leads_to_is_there() -> None:
    assert set(playbooks.names()) == set(WANTED)


@pytest.mark.parametrize(("name", "command"), ALL, ids=lambda value: str(value)[:60])
def test_every_command_of_a_page_exists_with_its_options(name: str, command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    "command",
    [
        "ifabric nonsense",
        "ifabric doctor --nonsense",
        "ifabric task requeue",
        "ifabric breaker open x --why",
        "ifabric task list --state odd",
    ],
)
def test_a_command_that_does_not_exist_would_be_seen(command: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        parse(command)


def test_there_are_commands_to_be_tried() -> None:
    used = {command.split()[1] for _, command in ALL}
    assert len(ALL) > 100 and used >= {
        "doctor",
        "status",
        "top",
        "explain",
        "breaker",
        "audit",
        "backup",
        "restore",
        "agent",
    }
    assert used <= {verb.split()[0] for verb, *_ in VERBS}


@EACH
def test_every_metric_of_a_page_is_counted_or_recorded(name: str) -> None:
    known = {metric.name for metric in METRICS} | recorded() | ETCD
    named = {found.rstrip(":") for found in METRIC.findall(playbooks.page(name).text)}
    assert named <= known, f"{name} names {named - known}"


@EACH
def test_every_link_of_a_page_leads_to_a_page(name: str) -> None:
    for target in LINK.findall(playbooks.page(name).text):
        assert target in playbooks.names(), f"{name} links to {target}"


@EACH
def test_a_page_has_all_that_is_needed_at_night_and_is_short(name: str) -> None:
    text = playbooks.page(name).text
    assert text.startswith("# ") and len(text.splitlines()) <= 80
    if name in ("troubleshooting", "incident"):
        return
    wanted = [one for one in SECTIONS if name != "security" or one not in (SECTIONS[1], SECTIONS[2])]
    places = [text.index(one) for one in wanted]
    assert places == sorted(places), "in this order"
    assert "**Who is affected.**" in text and "**Alerts.**" in text


def test_every_alert_leads_to_a_page_that_names_it() -> None:
    assert alerts(), "there are rules"
    for alert, name in alerts():
        assert name in playbooks.names(), f"{alert} leads to {name!r}, which is no page"
        assert alert in playbooks.page(name).alerts, f"{alert} leads to {name}, which does not name it"


def test_a_page_names_no_alert_that_there_is_not() -> None:
    there = {alert for alert, _ in alerts()}
    for name in playbooks.names():
        assert set(playbooks.page(name).alerts) <= there, name


@EACH
def test_every_key_of_the_configuration_that_a_page_names_exists(name: str) -> None:
    sections = set(Config.__struct_fields__)
    for path in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)`", playbooks.page(name).text):
        head, *rest = path.split(".")
        at = Config()
        if head not in sections:
            continue
        for key in (head, *rest):
            assert key in at.__struct_fields__, f"{name} names {path}: there is no {key}"
            at = getattr(at, key)


def test_every_error_code_of_the_table_exists() -> None:
    from ifabric.errors import all_codes

    rows = [line for line in playbooks.page("troubleshooting").text.splitlines() if line.startswith("| ")]
    named = {
        word
        for row in rows[2:]
        for word in re.findall(r"`([a-z]+_[a-z_]+|overloaded|unavailable|forbidden|limit)`", row.split("|")[1])
    }
    assert len(named) >= 8 and named <= set(all_codes())


# -- the loader --------------------------------------------------------------------------------------------------------


def test_an_alert_finds_its_page_whatever_its_case() -> None:
    assert playbooks.find("coordinatorHIGHlatency").name == "latency"
    assert playbooks.find("breaker").title == "A breaker is open"


@pytest.mark.parametrize("name", ["breakr", "../breaker", "", "/etc/passwd", "breaker.md", "incident\x00"])
def test_what_is_no_page_is_refused_with_what_is_near(name: str) -> None:
    with pytest.raises(FabricError, match="no playbook"):
        playbooks.find(name)
    with pytest.raises(KeyError):
        playbooks.page(name)


def test_a_name_that_is_nearly_right_is_corrected() -> None:
    with pytest.raises(FabricError) as caught:
        playbooks.find("CoordinatorHighLatncy")
    assert caught.value.facts["near"][0] == "CoordinatorHighLatency"


# -- as HTML -----------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags that are open and must be closed; what is linked, and what is loaded from elsewhere."""

    EMPTY = ("meta", "link", "br", "hr", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}>"


def seen(document: str) -> Seen:
    made = Seen()
    made.feed(document)
    assert not made.open
    return made


@EACH
def test_a_page_is_html_that_needs_nothing_but_its_style(name: str) -> None:
    made = seen(playbooks.html(name))
    assert not made.tags & {"script", "style", "img", "iframe", "form"}
    assert not {one for one in made.attributes if one == "style" or one.startswith("on")}
    for link in made.links:
        assert link in ("/", "/playbooks/", "/playbooks.css") or link in playbooks.names(), link
    assert "width=device-width" in playbooks.html(name)
    assert playbooks.html(name).count("<table>") == playbooks.html(name).count('<div class="wide"><table>')


def test_the_list_leads_to_every_page() -> None:
    made = seen(playbooks.index_html())
    assert {f"/playbooks/{name}" for name in playbooks.names()} <= set(made.links)


def test_html_within_a_page_would_be_shown_and_not_obeyed() -> None:
    assert "&lt;script&gt;" in playbooks._markdown().render("a <script>alert(1)</script> [x](javascript:alert(1))")
    assert "javascript" not in re.findall(r'href="([^"]*)"', playbooks._markdown().render("[x](javascript:alert(1))"))


def test_the_routes_are_those_of_the_pages_and_say_what_may_be_loaded() -> None:
    app = Starlette(routes=routes())
    found = [
        path
        for path in ("/playbooks/", "/playbooks/breaker", "/playbooks.css", "/playbooks/a/b", "/breaker")
        if any(route.matches({"type": "http", "path": path, "method": "GET"})[0] is Match.FULL for route in app.routes)
    ]
    assert found == ["/playbooks/", "/playbooks/breaker", "/playbooks.css"]
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'self';") and "unsafe" not in policy


async def test_a_page_a_list_a_style_and_a_miss_are_answered_over_http() -> None:
    import httpx

    transport = httpx.ASGITransport(app=Starlette(routes=routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as browser:
        for path, status, kind, words in (
            ("/playbooks/breaker", 200, "text/html", "A breaker is open"),
            ("/playbooks/", 200, "text/html", "Playbooks"),
            ("/playbooks.css", 200, "text/css", "color-scheme"),
            ("/playbooks/%3Cscript%3E", 404, "text/html", "There is no such playbook"),
        ):
            answer = await browser.get(path)
            assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (status, kind), path
            assert words in answer.text and "<script" not in answer.text
            assert "default-src 'none'" in answer.headers["content-security-policy"]
