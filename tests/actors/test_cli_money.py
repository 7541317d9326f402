"""`ifabric budget|breaker|match`, and money on the verbs for tasks: processes against a real daemon."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ifabric import endpoints
from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cli import main
from ifabric.cli.match import advise
from ifabric.cli.output import usd
from ifabric.cli.statement import _events, _made, _moment
from ifabric.client import Client
from ifabric.clock import SystemClock, rfc3339
from ifabric.errors import ConfigError
from ifabric.wire import coordinator
from ifabric.wire import governor as wire

from .test_cli import Cli, Ran, folder, in_process, tasks  # noqa: F401  fixtures

NOW = rfc3339(SystemClock().wall_ms())


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


def spending(folder: Path, session: str, account: str, *amounts: int, task: str = "") -> None:  # noqa: F811
    """Spends as an agent would, entry after entry."""

    async def spend() -> None:
        async with Client.connect(state_dir=folder, session=session, account=account) as c:
            for number, amount in enumerate(amounts):
                await c.spend(amount, entry=f"e-{number}")

    asyncio.run(spend())


# -- without a daemon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["0.1234567", "-1", "1e3", "nan", "inf", "", "1,5", "$5", "12345678901", "None"])
def test_a_limit_that_is_no_exact_amount_is_a_usage_error(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, "budget", "set", "acme", f"--limit={limit}", "--state-dir", "/nonexistent")
    assert done.code == 2
    assert not done.out and "Traceback" not in done.err


@pytest.mark.parametrize(
    "words",
    [
        ["budget", "set", "acme", "1", "--window", "week"],
        ["budget", "statement"],
        ["budget", "statement", "acme", "--limit", "0"],
        ["budget", "statement", "acme", "--since", "yesterday"],
        ["task", "claim", "T", "--session", "x", "--hold", "0.0000001"],
        ["task", "complete", "T", "--session", "x", "--cost", "a lot"],
        ["breaker", "open"],
    ],
)
def test_usage_errors_are_2_and_ask_nobody(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = in_process(capsys, *words, "--state-dir", "/nonexistent")
    assert done.code == 2
    assert done.err.strip() and not done.out


def test_help_of_the_new_nouns_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words, example in (
        (("budget", "show"), "ifabric budget show acme/research"),
        (("budget", "set"), "ifabric budget set acme/research 2.50 --window day"),
        (("budget", "holds"), "ifabric budget holds acme"),
        (("budget", "statement"), "--since 2026-11-01 --csv > november.csv"),
        (("breaker", "list"), "ifabric breaker list --json"),
        (("breaker", "open"), "--why"),
        (("breaker", "close"), "ifabric breaker close openai/gpt-x"),
        (("match", "explain"), "ifabric match explain P0.1.5"),
    ):
        assert example in in_process(capsys, *words, "--help").out


@pytest.mark.parametrize(
    ("micro_usd", "said"), [(-1, "-0.000001 USD"), (-1_500_000, "-1.50 USD"), (2**53 - 1, "9007199254.740991 USD")]
)
def test_money_is_shown_exactly_also_below_zero(micro_usd: int, said: str) -> None:
    assert usd(micro_usd) == said


def commit(revision: int, charged: int, at: str = NOW, account: str = "acme/@me", **more: Any) -> wire.BudgetEvent:
    return wire.BudgetEvent(
        event="commit",
        at=at,
        revision=revision,
        account=account,
        hold=f"h{revision}",
        session="me",
        charged=charged,
        **more,
    )


def line_of(spent: int, window: wire.Window = "total") -> wire.Line:
    return wire.Line(account="acme", limit=None, spent=spent, held=0, available=None, window=window)


def test_a_statement_always_adds_up_to_what_is_spent() -> None:
    events = [commit(n, n * 10, late=n == 3, overdraft=5 if n == 3 else 0) for n in range(1, 6)]
    for spent, since, limit in ((150, None, 100), (900, None, 100), (150, None, 2), (150, "9999-01-01", 100)):
        made = _made(line_of(spent), events, since, limit)
        assert made.carried + sum(entry.charged for entry in made.entries) == made.spent == spent
        assert [entry.balance for entry in made.entries][-1:] in ([], [spent])
    assert _made(line_of(150), events, None, 100).carried == 0
    assert [entry.charged for entry in _made(line_of(150), events, None, 2).entries] == [40, 50]
    assert _made(line_of(150), events, "9999-01-01", 100) == ("acme", "total", 150, (), 150, False)


def test_a_statement_of_a_window_begins_with_it() -> None:
    events = [commit(1, 7, at="2001-01-01T00:00:00.000Z"), commit(2, 5)]
    today = _made(line_of(5, "day"), events, None, 100)
    assert (today.window, today.carried, [entry.charged for entry in today.entries]) == (NOW[:10], 0, [5])
    month = _made(line_of(5, "month"), events, None, 100)
    assert (month.window, month.carried) == (NOW[:7], 0)
    assert _made(line_of(12), events, None, 100).carried == 0


def test_since_is_a_date_or_a_moment_in_any_zone() -> None:
    assert _moment("2026-11-25") == "2026-11-25T00:00:00.000Z"
    assert _moment("2026-11-25T09:30:00") == "2026-11-25T09:30:00.000Z"
    assert _moment("2026-11-25T09:30:00+02:00") == "2026-11-25T07:30:00.000Z"
    for bad in ("", "yesterday", "2026-13-01", "0001-01-01T00:00:00+23:00"):
        with pytest.raises(ConfigError):
            _moment(bad)


async def test_a_charge_that_is_told_twice_is_one_entry_and_a_sibling_is_none() -> None:
    class Journal:
        async def events(self, about: str, *, after_seq: int, until_seq: int) -> Any:
            for event in (
                commit(2, 5),
                commit(1, 3),
                commit(2, 5),
                commit(4, 9, account="acme-2"),
                commit(5, 8, account="acmes/x"),
                commit(6, 1, account="acme"),
                wire.BudgetEvent(event="overdraft", at=NOW, revision=2, account="acme", charged=5),
            ):
                yield event

    found = await _events(Journal(), "acme", 7)  # type: ignore[arg-type]
    assert [event.charged for event in found] == [3, 5, 1]


def reply_of(state: str = "pending", **spec: Any) -> coordinator.GetReply:
    return coordinator.GetReply(
        task="T", state=state, attempt=0, session="bob", fence=7, waiting_for=("S",), spec=coordinator.TaskSpec(id="T", **spec), history=(), revision=1
    )  # fmt: skip


def matched(*ranked: wire.Candidate, sessions: int | None = None) -> wire.MatchReply:
    return wire.MatchReply(ranked=ranked, min_score=0.7, sessions=len(ranked) if sessions is None else sessions)


def candidate(session: str, score: float, missing: tuple[str, ...] = (), *, matches: bool = False) -> wire.Candidate:
    return wire.Candidate(session=session, score=score, missing=missing, reason="Because.", matches=matches)


def test_the_advice_says_what_to_do() -> None:
    able, far, near = candidate("a", 0.9, matches=True), candidate("b", 0, ("x", "y")), candidate("c", 0, ("y",))
    for found, answer, said in (
        (reply_of("blocked"), matched(able), "waits for S"),
        (reply_of("claimed"), matched(able), "bob is at work on it, under fence 7"),
        (reply_of("done"), matched(), "done"),
        (reply_of("dead"), matched(), "`ifabric task requeue T`"),
        (reply_of(), matched(able, far), "1 of 2 sessions can take it: a before others"),
        (reply_of(needs=("x", "y"), labels=("draft",)), matched(), "start an agent with x, y that accepts draft"),
        (reply_of(needs=("x", "y")), matched(far, near), "c is nearest and lacks y. Start an agent with x, y."),
        (
            reply_of(wants=("z",)),
            matched(candidate("d", 0.5)),
            "d is nearest, with 0.50 where 0.70 are asked for (Because)",
        ),
    ):
        assert said in advise(found, answer)
        assert advise(found, answer).endswith(".")


# -- against a daemon -----------------------------------------------------------------------------------------------------


def test_a_limit_is_set_shown_and_kept(cli: Cli, folder: Path) -> None:  # noqa: F811
    done = cli("budget", "set", "shop", "0.50")
    assert (done.code, done.out.splitlines()[0]) == (0, "✔ shop may spend 0.50 USD")
    assert cli("budget", "set", "shop/day", "2.5", "--window", "day", "--json").json["path"][-1]["window"] == "day"
    spending(folder, "clerk", "shop", 100_000, 300_001)
    shown = cli("budget", "show", "shop")
    assert shown.code == 0
    rows = {line.split()[0]: line for line in shown.out.splitlines()}
    assert re.search(r"0\.50 USD\s+0\.400001 USD\s+0\.00 USD\s+0\.099999 USD\s+█{12}·{4}  80%", rows["shop"])
    assert "2.50 USD a day" in rows["shop/day"]
    assert "40.00 USD" in rows["shop/@clerk"]
    found = cli("budget", "show", "--json").json
    assert {line["account"] for line in found["below"]} >= {"shop", "shop/day", "shop/@clerk"}
    assert "shop/@clerk" in cli("budget", "show").out
    short = cli("budget", "set", "shop", "0.3")
    assert "-0.100001 USD" in short.out and "133%" in short.out
    none = cli("budget", "set", "shop", "none")
    assert "shop has no limit" in none.out
    unknown = cli("budget", "show", "nobody", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (1, "unknown_account")


@pytest.mark.parametrize("name", ["a b", "../x", "a//b", "[red]x", "\x1b[31mx", "a" * 65, "a/" * 9 + "a", "*", ">"])
def test_an_account_that_is_none_is_refused_with_its_pattern(cli: Cli, name: str) -> None:
    for words in (("budget", "set", name, "1"), ("budget", "show", name), ("budget", "statement", name)):
        done = cli(*words, "--json")
        assert (done.code, done.json["error"]["code"]) == (1, "bad_request")
        assert "\x1b" not in done.err


def test_a_statement_ends_with_what_etcd_says_is_spent_and_adds_up(cli: Cli, folder: Path) -> None:  # noqa: F811
    spending(folder, "s-1", "mill/a", 100, 2_000_001)
    spending(folder, "s-2", "mill", 7)
    spending(folder, "s-3", "mills", 999)
    known = cli("budget", "show", "mill", "--json").json["path"][-1]["spent"]
    assert known == 2_000_108
    done = cli("budget", "statement", "mill", "--csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert rows[0] == {
        **dict.fromkeys(rows[0], ""),
        "account": "mill",
        "hold": "carried forward",
        "balance_micro_usd": "0",
    }
    charges = [int(row["charged_micro_usd"]) for row in rows[1:]]
    assert charges == [100, 2_000_001, 7]
    assert [int(row["balance_micro_usd"]) for row in rows] == [0, 100, 2_000_101, 2_000_108]
    assert [row["session"] for row in rows[1:]] == ["s-1", "s-1", "s-2"]
    assert int(rows[0]["balance_micro_usd"]) + sum(charges) == known == int(rows[-1]["balance_micro_usd"])
    found = cli("budget", "statement", "mill", "--json", "--limit", "1").json
    assert (found["carried"], found["spent"], found["moving"]) == (2_000_101, known, False)
    assert [entry["charged"] for entry in found["entries"]] == [7]
    shown = cli("budget", "statement", "mill/a").out.splitlines()
    assert shown[-1] == "mill/a has spent 2.000101 USD; 2 entries"
    assert "carried forward" in shown[1] and shown[-2].split()[-2:] == ["2.000101", "USD"]
    later = cli("budget", "statement", "mill", "--since", "2999-01-01", "--json").json
    assert (later["carried"], later["entries"]) == (known, [])
    assert cli("budget", "statement", "mill/zzz", "--json").json["error"]["code"] == "unknown_account"


async def test_what_others_publish_does_not_break_a_statement(cli: Cli, folder: Path) -> None:  # noqa: F811
    def work(*words: str) -> Any:
        return cli(*words)

    await asyncio.to_thread(spending, folder, "n-1", "noisy", 5)
    found = endpoints.read(folder)
    assert found is not None
    bus = Nats(NatsSettings(servers=(found.nats,)), SystemClock())
    await bus.connect()
    for data in (b"\xff", b"{", b'{"event": 7}', b"[" * 5000):
        await bus.publish("if.v1.event.budget.commit", data)
    await bus.close()
    done = await asyncio.to_thread(work, "budget", "statement", "noisy", "--csv")
    assert done.code == 0
    assert [row["charged_micro_usd"] for row in csv.DictReader(io.StringIO(done.out))] == ["", "5"]


def test_tasks_are_taken_with_money_and_ended_with_their_cost(cli: Cli, tasks: Callable[..., list[str]]) -> None:  # noqa: F811
    one, two, _ = tasks("first", "second", "third")
    taken = cli("task", "claim", one, "--session", "buyer", "--hold", "0.25")
    assert taken.code == 0 and "money is held for it" in taken.out
    (held,) = cli("budget", "holds", "@buyer", "--json").json["holds"]
    assert (held["task"], held["amount"]) == (one, 250_000)
    listed = cli("budget", "holds")
    assert re.search(rf"buyer\s+@buyer\s+0\.25 USD .*{re.escape(one)} fence \d+", listed.out)
    assert re.search(r"\d+ open hold\(s\), \d+\.\d+ USD in all", listed.out)
    done = cli("task", "complete", one, "--session", "buyer", "--cost", "0.300001")
    assert done.out == f"✔ {one} is done; charged 0.300001 USD\n"
    assert cli("budget", "show", "@buyer", "--json").json["path"][-1]["spent"] == 300_001
    short = cli("task", "claim", two, "--session", "buyer", "--hold", "50", "--json")
    assert (short.code, short.json["error"]["code"], short.json["error"]["need"]) == (1, "budget_short", 50_000_000)
    assert "39.699999" in short.err
    assert cli("task", "show", two, "--json").json["state"] == "pending"
    taken = cli("task", "next", "--session", "buyer", "--hold", "0.000001", "--json").json
    assert taken["hold_id"]
    failed = cli("task", "fail", taken["task"], "no luck", "--session", "buyer", "--cost", "0.000002")
    assert failed.code == 0
    assert cli("budget", "show", "@buyer", "--json").json["path"][-1]["spent"] == 300_003


def test_a_breaker_is_opened_listed_and_closed(cli: Cli) -> None:
    why = "ask Ann [red]now[/red]\x1b[31m"
    done = cli("breaker", "open", "openai/gpt-x", "--why", why)
    assert done.code == 0
    assert "openai/gpt-x is open: nothing is called until somebody closes it" in done.out
    assert "ifabric breaker close openai/gpt-x --state-dir /" in done.out
    listed = cli("breaker", "list")
    (row,) = (line for line in listed.out.splitlines() if line.startswith("openai/gpt-x"))
    assert "open" in row and "when it is closed" in row
    assert "ask Ann [red]now[/red]\\x1b[31m" in row  # shown, and not obeyed
    (line,) = (line for line in cli("breaker", "list", "--json").json if line["breaker"] == "openai/gpt-x")
    assert (line["state"], line["why"]) == ("open", why)
    assert re.search(r"breakers  \d+ open", cli("status").out)
    assert cli("breaker", "close", "openai/gpt-x").out == "✔ openai/gpt-x is closed\n"
    bad = cli("breaker", "open", "no spaces", "--json")
    assert (bad.code, bad.json["error"]["code"]) == (1, "bad_request")


def test_why_nobody_takes_a_task_is_explained(cli: Cli, tasks: Callable[..., list[str]]) -> None:  # noqa: F811
    one, free = tasks("weave {needs: loom-x}", "anybody")
    assert cli("task", "claim", free, "--session", "idler", "--capabilities", "spade-x").code == 0
    done = cli("match", "explain", one)
    assert done.code == 0
    assert f"{one} pending  weave" in done.out and "needs   loom-x" in done.out
    assert re.search(r"✘ idler 0\.\d\d  .*loom-x", done.out)
    assert "Start an agent with loom-x." in done.out.splitlines()[-1]
    assert cli("task", "claim", one, "--session", "weaver", "--capabilities", "loom-x").code == 0
    assert cli("task", "release", one, "--session", "weaver").code == 0
    found = cli("match", "explain", one, "--json").json
    (weaver,) = (each for each in found["match"]["ranked"] if each["session"] == "weaver")
    assert weaver["matches"] and "weaver before others" in found["advice"]
    assert cli("match", "explain", "nosuch", "--json").json["error"]["code"] == "unknown_task"


def test_watch_tells_of_money_and_breakers_in_words(cli: Cli, folder: Path) -> None:  # noqa: F811
    spending(folder, "seen", "seen", 250_000)
    assert cli("breaker", "open", "seen/x", "--why", "tests").code == 0
    words = [sys.executable, "-m", "ifabric", "watch", "--since-start", "--state-dir", str(folder)]
    wanted = {
        "all": [r"commit +seen/@seen 0\.25 USD of 0\.25 USD held by seen, e-0", r"opened +seen/x .*\(tests\)"],
        "budget": [r"account +seen/@seen limit 40\.00 USD"],
    }
    for about, patterns in wanted.items():
        with subprocess.Popen([*words, "--about", about], stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            missing = list(patterns)
            for line in watching.stdout:
                missing = [pattern for pattern in missing if not re.search(pattern, line)]
                if not missing:
                    break
            watching.terminate()
        assert not missing
    with subprocess.Popen([*words, "--about", "breaker", "--json"], stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["event"] == "opened"
        watching.terminate()
