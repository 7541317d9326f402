"""`ifabric explain` and `ifabric playbook`: processes' worth of command line, against a real daemon with its audit."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.cli import main
from ifabric.cli.gathering import _mentions, about, names
from ifabric.client import Client
from ifabric.clock import SystemClock, monotonic
from ifabric.errors import BreakerOpen, BudgetShort, CapabilityMissing, Forbidden, Unavailable
from ifabric.explaining import Sources
from ifabric.wire import coordinator, governor, subjects
from ifabric.wire.audit import AuditRecord
from tests.conftest import needed
from tests.system.town import Town, town

from .test_cli import Cli, Ran, folder, in_process  # noqa: F401  fixtures

CLOCK = SystemClock()
WAIT_S = 20.0


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str]) -> Cli:  # noqa: F811
    """A command that finds the daemon: in a thread of this process, where it has a loop of its own."""

    def ask(*words: str, stdin: str | None = None) -> Ran:
        with ThreadPoolExecutor(1) as thread, pytest.MonkeyPatch.context() as patch:
            if stdin is not None:
                patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            capsys.readouterr()
            code = thread.submit(main, [*words, "--state-dir", str(folder)]).result()
        return Ran(code, *capsys.readouterr())

    return ask


def told(cli: Cli, *words: str, until: str, times: int = 1) -> dict[str, Any]:
    """A story, once it has that in it, so many times: events and audit follow what was done, each at its own pace."""
    end = monotonic() + WAIT_S
    while True:
        done = cli("explain", *words, "--json")
        assert done.code == 0, done.err
        if done.out.count(until) >= times or monotonic() > end:
            assert done.out.count(until) >= times, done.out
            return done.json


def do(folder: Path, session: str, act: Callable[[Client], Any], **options: Any) -> None:  # noqa: F811
    """As an agent would; what it holds outlives it."""

    async def run() -> None:
        async with Client.connect(state_dir=folder, session=session, **options) as client:
            client.leave_on_exit = False
            await act(client)

    asyncio.run(run())


# -- stories ---------------------------------------------------------------------------------------------------------


def test_the_story_of_a_task_has_each_thing_once_with_who_when_and_which_request(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "story.1", "title": "write it", "max_attempts": 2}])
        for error in ("first", "second"):
            claim = await client.claim("story.1", hold_micro_usd=20_000)
            await client.fail("story.1", claim.fence, error, cost_micro_usd=10_000)

    do(folder, "writer", act, account="story")
    told(cli, "story.1", until='"audit"', times=5)
    # the last event of money comes after all others
    story = told(cli, "story.1", until="It has cost 0.02 USD")
    assert (story["kind"], story["name"], story["title"]) == ("task", "story.1", "write it")
    what = [(line["what"], line["who"]) for line in story["lines"] if "USD" not in line["what"]]
    assert [re.sub(r" under.*| \(.*|:.*", "", text) for text, _ in what] == [
        "submitted", "claimed", "failed", "claimed", "failed", "dead",
    ]  # fmt: skip
    assert {who for _, who in what} == {"writer"}
    whole = [line for line in story["lines"] if line.get("sources") == ["record", "event", "audit"]]
    assert len(whole) >= 5 and all(line["request_id"] and line["took_ms"] > 0 for line in whole)
    assert "It failed with: first" in story["now"] and "It failed with: second" in story["now"]
    assert "ifabric task requeue story.1" in story["do"][-1]
    shown = cli("explain", "story.1")
    assert shown.code == 0 and "What to do" in shown.out and "record+event+audit" in shown.out


def test_a_task_that_nobody_can_take_is_explained_with_who_was_refused(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "gpu.1", "needs": ["gpu"]}, {"id": "gpu.2", "depends_on": ["gpu.1"]}])
        for _ in range(3):
            with pytest.raises(CapabilityMissing):
                await client.claim("gpu.1")

    do(folder, "cpu", act, capabilities=["cpu"])
    story = told(cli, "gpu.1", until="capability_missing")
    assert next(line for line in story["lines"] if "capability_missing" in line["what"])["times"] == 3
    assert any("start an agent with the capabilities gpu" in one for one in story["do"])
    blocked = cli("explain", "gpu.2", "--task", "--json").json
    assert "gpu.1 is pending." in blocked["now"] and blocked["do"] == ["ifabric explain gpu.1 --task"]


def test_a_session_s_story_has_what_it_holds_and_what_it_was_refused(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "hold.1"}])
        await client.claim("hold.1", hold_micro_usd=1_000)
        with pytest.raises(BudgetShort):
            await client.spend(900_000_000)

    do(folder, "holder", act)
    story = told(cli, "holder", until="budget_short")
    assert story["kind"] == "session"
    assert "It holds 1 task: hold.1." in story["now"]
    assert any(line["what"].startswith("hold.1: claimed under fence") for line in story["lines"])
    assert "ifabric explain @holder --account" in story["do"]
    held = told(cli, "hold.1", until="are held for it")
    assert any("holder renews its session" in one for one in held["now"])


def test_an_account_s_story_names_who_spent_and_who_was_short(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def spend(client: Client) -> None:
        await client.set_account("purse", 1_000_000)
        await client.spend(1_000_000)
        with pytest.raises(BudgetShort):
            await client.spend(1)

    do(folder, "spender", spend, account="purse/team")
    story = told(cli, "purse", until="Refused for want of money")
    assert story["kind"] == "account"
    assert "Spent the most below it: purse/team 1.00 USD." in story["now"]
    assert any("1 request of spender" in one for one in story["now"])
    assert any(one.startswith("ifabric budget set purse AMOUNT") for one in story["do"])


def test_a_breaker_s_story_says_why_it_opened_who_reported_and_who_is_refused(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        for _ in range(5):
            admitted = await client.call(governor.Admit(breaker="shop/api"))
            await client.call(governor.Report(breaker="shop/api", permit=admitted.permit, outcome="failure"))
        with pytest.raises(BreakerOpen):
            await client.call(governor.Admit(breaker="shop/api"))

    do(folder, "caller", act)
    story = told(cli, "shop/api", until="Refused because of it")
    assert story["kind"] == "breaker"
    assert "It is open for" in story["now"][0] and "The next probe" in story["now"][0]
    assert any("caller 5x" in one for one in story["now"])
    assert any("opened" in line["what"] for line in story["lines"])
    assert not any("report" in line["what"] for line in story["lines"]), "they are counted, not told one by one"
    assert cli("breaker", "close", "shop/api").code == 0


# -- finding out what a name is --------------------------------------------------------------------------------------


def test_a_name_that_is_two_things_asks_which(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "twin"}])
        await client.hello()

    do(folder, "twin", act)
    done = cli("explain", "twin")
    assert done.code == 2
    assert "ifabric explain twin --task" in done.err and "ifabric explain twin --session" in done.err
    assert cli("explain", "twin", "--task", "--json").json["kind"] == "task"
    assert cli("explain", "twin", "--session", "--json").json["kind"] == "session"


def test_an_unknown_name_is_told_with_those_that_are_near(cli: Cli, folder: Path) -> None:  # noqa: F811
    do(folder, "near", lambda client: client.submit([{"id": "nearby.task.1"}]))
    done = cli("explain", "nearby.tsak.1")
    assert done.code == 1 and "nearby.task.1" in done.err
    assert cli("explain", "nearby.task.1", "--session").code == 1
    assert "there is no breaker" in cli("explain", "nearby.task.1", "--breaker").err


@pytest.mark.parametrize("name", ["", "x" * 2000, "a b", "..", "$JS.API", "T\n", "\x1b[31m"])
def test_a_strange_name_is_refused_and_nothing_breaks(cli: Cli, name: str) -> None:
    done = cli("explain", name)
    assert done.code in (1, 2) and "a bug" not in done.err and "\x1b" not in done.err


def test_what_is_gone_is_told_from_the_journal(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "gone.1"}])
        await client.operate(coordinator.Cancel, "gone.1")
        await client.operate(coordinator.Purge, "gone.1")
        await client.call(coordinator.Bye())

    do(folder, "goer", act)
    story = told_of_the_gone(cli)
    assert "It is not on the board any more" in story["now"][0]
    assert any(line["what"] == "deleted" for line in story["lines"])


def told_of_the_gone(cli: Cli) -> dict[str, Any]:
    end = monotonic() + WAIT_S
    while True:
        done = cli("explain", "gone.1", "--json")
        if done.code == 0 and "deleted" in done.out:
            return done.json
        assert monotonic() < end, done


def test_looking_leaves_no_refusal_behind(cli: Cli, folder: Path) -> None:  # noqa: F811
    """Who is on call sees the refusals of agents on the page, and not what `explain` has tried."""
    do(folder, "quiet", lambda client: client.submit([{"id": "quiet1"}]))
    assert cli("explain", "quiet1").code == 0
    seen = cli("top", "--once")
    assert "Latest refusals" in seen.out
    assert not [line for line in seen.out.splitlines() if "explain-" in line and "quiet1" in line]


def test_what_an_agent_says_is_shown_and_not_obeyed(cli: Cli, folder: Path) -> None:  # noqa: F811
    async def act(client: Client) -> None:
        await client.submit([{"id": "evil.1", "title": "\x1b]0;owned\x07[bold]x[/bold]", "max_attempts": 1}])
        claim = await client.claim("evil.1")
        await client.fail("evil.1", claim.fence, "\x1b[2J[red]gone[/red]\n\n  → rm -rf /")

    do(folder, "evil", act)
    shown = cli("explain", "evil.1")
    assert shown.code == 0 and "\x1b" not in shown.out
    assert "[bold]x[/bold]" in shown.out and "[red]gone[/red]" in shown.out
    assert not any(line.strip().startswith("→ rm") for line in shown.out.splitlines())


def test_nobody_there_is_unreachable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "explain", "T", "--state-dir", str(tmp_path)).code == 3


# -- who may read what -----------------------------------------------------------------------------------------------


class Closed:
    """A bus whose streams are not for us."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def journal(self, stream: str) -> Any:
        raise self._error


@pytest.mark.parametrize(
    "error", [Forbidden("not for you: this session may not use the stream X"), Unavailable("JetStream is away")]
)
async def test_a_stream_that_cannot_be_read_is_named_with_the_reason(error: Exception) -> None:
    found, why = await _mentions(Closed(error), subjects.AUDIT_STREAM, "T", 10)  # type: ignore[arg-type]
    assert (found, why) == ([], str(error).partition(":")[0])


@pytest.fixture(scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Town]:
    """A town where everybody is somebody."""
    with needed("etcd and nats-server"):
        opening = town(tmp_path_factory.mktemp("town"))
        made = await opening.__aenter__()
    yield made
    await opening.__aexit__(None, None, None)


@pytest.mark.slow
async def test_each_role_is_told_what_it_may_read_and_how_to_get_the_rest(
    there: Town, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alice, auditor = await there.create("alice"), await there.create("eve", role="auditor")
    observer = await there.create("olga", role="observer")
    files = {"alice": alice, "eve": auditor, "olga": observer, "ann": there.operator}
    for name, credential in files.items():
        credential.write(tmp_path / name)
    async with there.client(alice) as client:
        await client.submit([{"id": "seen"}])
        claim = await client.claim("seen")
        await client.complete("seen", claim.fence)

    async def explain(who: str, *more: str) -> dict[str, Any]:
        words = ("explain", "seen", "--json", "--nats", there.urls, "--credentials", str(tmp_path / who), *more)
        code = await asyncio.to_thread(main, words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return msgspec.json.decode(out, type=dict)

    of_alice = await explain("alice")
    assert [line["sources"] for line in of_alice["lines"]] == [["record"]] * 3, "her own record, and no more"
    assert len(of_alice["unread"]) == 2 and "--credentials" in of_alice["unread"][0]
    assert "--role auditor" in of_alice["unread"][1] and "--audit-credentials" in of_alice["unread"][1]
    assert (await explain("olga"))["now"][0].startswith("It is done, by alice")
    of_ann = await explain("ann")
    assert len(of_ann["unread"]) == 1 and "the audit" in of_ann["unread"][0]
    assert {tuple(line["sources"]) for line in of_ann["lines"]} == {("record", "event")}
    with_both = await explain("ann", "--audit-credentials", str(tmp_path / "eve"))
    assert with_both["unread"] == []
    submitted, *commands = with_both["lines"]
    assert submitted["sources"] == ["record", "event"], "the audit has how many were submitted, and not which"
    assert [line["sources"] for line in commands] == [["record", "event", "audit"]] * 2


# -- what is about a name --------------------------------------------------------------------------------------------


def record(**changes: Any) -> AuditRecord:
    return AuditRecord(at="", chain="c", n=1, prev="", component="governor", verb="spend", **changes)


def test_only_what_is_about_the_thing_is_told_of_it() -> None:
    audit = (
        record(task="T"), record(session="T"), record(account="T/x"), record(account="Tx"), record(breaker="T"),
        record(code="budget_short", why="account T has 0.00"), record(code="budget_short", why="account T/y has 0.00"),
    )  # fmt: skip
    sources = Sources(audit=audit)
    assert [about(sources, kind, "T").audit for kind in ("task", "session", "breaker")] == [  # type: ignore[arg-type]
        (audit[0],), (audit[1],), (audit[4],),
    ]  # fmt: skip
    assert about(sources, "account", "T").audit == (audit[2], audit[5])


@pytest.mark.parametrize(
    ("sentence", "name", "has"),
    [
        ("account acme has 1", "acme", True), ("account acme/x has 1", "acme", False), ("by acme.", "acme", True), ("acmex", "acme", False),
        ("", "acme", False), ("(acme)", "acme", True),
    ],
)  # fmt: skip
def test_a_name_in_a_sentence_is_a_word_of_its_own(sentence: str, name: str, has: bool) -> None:
    assert names(sentence, name) is has


# -- playbooks -------------------------------------------------------------------------------------------------------


def test_playbooks_are_listed_and_shown_by_name_and_by_alert(capsys: pytest.CaptureFixture[str]) -> None:
    listed = in_process(capsys, "playbook")
    assert listed.code == 0 and "breaker-flapping" in listed.out
    assert {"name", "title", "alerts"} <= set(in_process(capsys, "playbook", "--json").json[0])
    shown = in_process(capsys, "playbook", "breaker")
    assert shown.out.startswith("# A breaker is open") and "`breaker-flapping`" in shown.out and "](" not in shown.out
    assert in_process(capsys, "playbook", "GovernorCircuitBreakerOpen").out == shown.out
    missing = in_process(capsys, "playbook", "braeker")
    assert missing.code == 1 and "breaker" in missing.err


def test_playbooks_are_served_by_the_daemon_under_a_strict_policy(folder: Path) -> None:  # noqa: F811
    import urllib.error
    import urllib.request

    from ifabric import endpoints

    found = endpoints.read(folder)
    assert found is not None
    for path, kind, words in (
        ("/playbooks/", "text/html", "All playbooks"),
        ("/playbooks/outage", "text/html", "Nothing works"),
        ("/playbooks.css", "text/css", "color"),
    ):
        with urllib.request.urlopen(found.http + path) as answer:
            assert answer.headers["Content-Type"].startswith(kind) and words in answer.read().decode()
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self'")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(found.http + "/playbooks/nonsense")
    assert caught.value.code == 404
    caught.value.close()
