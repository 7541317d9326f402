"""The audit on the command line: what is shown, found, handed on and verified, over a real nats-server."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ifabric.cli import main
from ifabric.cli import output as shown_by
from ifabric.clock import SystemClock, rfc3339
from ifabric.store.base import Delete, Put, Txn
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.servers import RealServer, nats_server
from ifabric.wire import subjects
from ifabric.wire.audit import ENDED, hash_of
from ifabric.wire.envelope import encode
from tests.chains import Entry, Life, altered, fill, put
from tests.conftest import needed
from tests.rules.cef import parse

CLOCK = SystemClock()
HOUR_MS = 3_600_000


class Ran:
    """What a verb came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[RealServer]:
    """One nats-server for the module: the audit's stream has one name."""
    with needed("nats-server"):
        async with nats_server() as real:
            yield real


@pytest.fixture
def cli(server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `ifabric audit ...` here, as somebody on a machine without a daemon."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("IFABRIC_CREDENTIALS", "IFABRIC_SESSION", "IFABRIC_NATS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, nats: str = server.url) -> Ran:
        capsys.readouterr()
        code = main(("audit", *words, "--nats", nats))
        return Ran(code, *capsys.readouterr())

    return run


def day() -> tuple[Life, list[Entry]]:
    """A life with something of everything: it began two hours ago."""
    life = Life("c1", CLOCK.wall_ms() - 2 * HOUR_MS)
    entries = [life.next("fabric", "begun")]
    entries += [life.next(session=f"agent-{n % 3}", task=f"P0.{n}", request_id=f"r-{n}", fence=n + 1) for n in range(6)]
    life.at_ms = CLOCK.wall_ms() - 60_000
    entries.append(
        life.next(
            "governor", "spend", session="agent-0", account="acme/research", amount_micro_usd=2_500_000, outcome="refused",
            code="budget_short", why="acme has 1.00 USD", trace="00-aaaabbbb-cccc-01",
        )
    )  # fmt: skip
    entries.append(life.next("identity", "create", session="ann", admin=True, subject="alice"))
    return life, entries


def filled(server: RealServer, entries: list[Entry], **config: Any) -> None:
    asyncio.run(fill(server.url, entries, **config))


# -- tail and search -------------------------------------------------------------------------------------------------


def test_the_newest_records_are_shown_a_line_each(cli: Cli, server: RealServer) -> None:
    _, entries = day()
    filled(server, entries)
    ran = cli("tail", "-n", "3")
    assert ran.code == 0
    last, spend, admin = ran.out.splitlines()
    assert "agent-2" in last and "coordinator.claim" in last and "P0.5 fence 6" in last and "r-5" in last
    assert "acme/research 2.50 USD" in spend and "refused" in spend and "budget_short" in spend
    assert "admin identity.create" in admin and "ann" in admin and "alice" in admin
    assert len(cli("tail").out.splitlines()) == 9
    assert cli("tail", "-n", "0").out == ""
    assert [one["n"] for one in cli("tail", "-n", "2", "--json").lines] == [8, 9]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (("--session", "agent-1"), [3, 6]),
        (("--component", "governor"), [8]),
        (("--verb", "claim"), [2, 3, 4, 5, 6, 7]),
        (("--component", "coordinator", "--verb", "claim", "--session", "agent-0"), [2, 5]),
        (("--outcome", "refused"), [8]),
        (("--task", "P0.3"), [5]),
        (("--account", "acme/research"), [8]),
    ],
)
def test_tail_and_search_show_what_was_asked_for(
    cli: Cli, server: RealServer, words: tuple[str, ...], numbers: list[int]
) -> None:
    _, entries = day()
    filled(server, entries)
    assert [one["n"] for one in cli("tail", *words, "--json").lines] == numbers
    assert [one["n"] for one in cli("search", *words, "--json").json["records"]] == numbers


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (("--since", "1h"), [8, 9]),
        (("--until", "1h"), [1, 2, 3, 4, 5, 6, 7]),
        (("--request-id", "r-2"), [4]),
        (("--trace", "aaaabbbb"), [8]),
        (("--text", "1.00 usd"), [8]),
        (("--after-seq", "7"), [8, 9]),
        (("--since", "1h", "--verb", "create"), [9]),
        (("--since", "1m", "--until", "2000-01-01"), []),
    ],
)
def test_search_finds_by_time_request_trace_and_text(
    cli: Cli, server: RealServer, words: tuple[str, ...], numbers: list[int]
) -> None:
    _, entries = day()
    filled(server, entries)
    ran = cli("search", *words, "--json")
    assert ([one["n"] for one in ran.json["records"]], ran.json["more"]) == (numbers, False)


def test_a_search_that_found_enough_says_how_to_go_on(cli: Cli, server: RealServer) -> None:
    _, entries = day()
    filled(server, entries)
    first = cli("search", "--limit", "4")
    assert "there are more" in first.err and "--after-seq 4" in first.err
    assert "coordinator.claim" in first.out
    whole = cli("search", "--limit", "0", "--json").json
    assert (len(whole["records"]), whole["more"]) == (9, False)
    assert "nothing of that kind" in cli("search", "--session", "nobody").out


def test_the_newest_of_a_rare_kind_are_found_far_back(cli: Cli, server: RealServer) -> None:
    life = Life("c1")
    entries = [life.next("identity", "create", session="ann")]
    entries += [life.next(session="busy") for _ in range(1500)]
    filled(server, entries)
    assert [one["seq"] for one in cli("tail", "-n", "1", "--session", "ann", "--json").lines] == [1]
    assert [one["seq"] for one in cli("tail", "-n", "3", "--session", "busy", "--json").lines] == [1499, 1500, 1501]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("tail", "--component", "a.b"), "--component a.b"),
        (("tail", "--verb", ">"), "--verb >"),
        (("search", "--verb", "*"), "--verb *"),
        (("search", "--since", "yesterday"), "--since yesterday"),
        (("search", "--since", "9999999d"), "--since"),
        (("export", "--format", "jsonl", "--until", "25:00"), "--until 25:00"),
        (("export", "--format", "jsonl", "--follow", "--output", "x"), "--follow"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_asked(cli: Cli, words: tuple[str, ...], why: str) -> None:
    ran = cli(*words, nats="nats://127.0.0.1:1")
    assert ran.code == 2
    assert why in ran.err


def test_nobody_there_and_no_audit_there_are_told_apart(cli: Cli, server: RealServer) -> None:
    away = cli("tail", "--timeout", "1", nats="nats://127.0.0.1:1")
    assert away.code == 3
    asyncio.run(_no_stream(server.url))
    for words in (("tail",), ("search",), ("verify",), ("export", "--format", "cef")):
        ran = cli(*words)
        assert ran.code == 1
        assert "there is no audit" in ran.err


async def _no_stream(url: str) -> None:
    await fill(url, [])
    import nats

    client = await nats.connect(url)
    await client.jetstream().delete_stream(subjects.AUDIT_STREAM)
    await client.close()


def test_tail_follows_what_comes_and_only_what_is_meant(server: RealServer) -> None:
    life, entries = day()
    filled(server, entries)
    words = ("audit", "tail", "-n", "1", "--follow", "--json", "--outcome", "refused", "--nats", server.url)
    with subprocess.Popen(
        [sys.executable, "-m", "ifabric", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["n"] == 8
        more = [life.next(session="x"), life.next(session="y", outcome="refused", code="forbidden")]
        asyncio.run(put(server.url, more))
        assert json.loads(process.stdout.readline())["session"] == "y"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


# -- hostile ---------------------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\x1b[2J[red]gone[/red]\r\nok\u202e"


def test_what_strangers_wrote_is_shown_and_obeyed_nowhere(
    cli: Cli, server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life("c1", CLOCK.wall_ms() - 1000)
    entries = [
        life.next(session=ESCAPE, task=ESCAPE, why=ESCAPE, code=ESCAPE, request_id=ESCAPE, outcome="refused"),
        (subjects.audit("x", "y"), "", b"\x1b[2J[link=http://x]not json[/link]\xff\n"),
        (subjects.audit("x", "z"), "", b'{"at": 7}'),
    ]
    filled(server, entries)
    terminal = io.StringIO()
    monkeypatch.setattr(shown_by.out, "_file", None)
    colours = Console(file=terminal, force_terminal=True, highlight=False, soft_wrap=True, width=400)
    for module in ("ifabric.cli.audit", "ifabric.cli.output", "ifabric.cli.examining"):
        monkeypatch.setattr(f"{module}.out", colours)
    for words in (("tail",), ("search",), ("verify",)):
        cli(*words)
    said = terminal.getvalue()
    assert "\x1b]0" not in said and "\x1b[2J" not in said and "\x07" not in said and "\u202e" not in said
    assert "[red]gone[/red]" in said
    assert "[link=http://x]not json[/link]" in said
    assert "no record" in said
    for one in cli("tail", "--json").lines[1:]:
        assert one["unreadable"]
    for ran in (cli("export", "--format", "cef"), cli("export", "--format", "jsonl")):
        assert len(ran.out.splitlines()) == 3
        assert "\x1b" not in ran.out


# -- export ----------------------------------------------------------------------------------------------------------


def test_an_export_goes_on_where_the_last_one_ended(cli: Cli, server: RealServer, tmp_path: Path) -> None:
    life, entries = day()
    filled(server, entries)
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    ran = cli("export", "--format", "jsonl", "--output", str(first), "--json")
    assert ran.json == {"file": str(first), "records": 9, "last_seq": 9}
    assert first.stat().st_mode & 0o777 == 0o600
    asyncio.run(put(server.url, [life.next() for _ in range(3)]))
    ran = cli("export", "--format", "jsonl", "--output", str(second), "--after-seq", "9")
    assert "--after-seq 12" in ran.err
    lines = [json.loads(line) for path in (first, second) for line in path.read_text().splitlines()]
    assert [one["seq"] for one in lines] == list(range(1, 13))
    for one, after in itertools.pairwise(lines):
        assert after["record"]["prev"] == one["sha256"]
    nothing = cli("export", "--format", "jsonl", "--after-seq", "12", "--json")
    assert nothing.out == ""
    assert json.loads(nothing.err) == {"records": 0, "last_seq": 12}


def test_an_export_to_a_file_that_is_there_or_cannot_be_writes_nothing(
    cli: Cli, server: RealServer, tmp_path: Path
) -> None:
    filled(server, day()[1])
    there = tmp_path / "there"
    there.write_text("mine")
    for path, why in ((there, "is there already"), (tmp_path / "no" / "folder", "cannot write")):
        ran = cli("export", "--format", "cef", "--output", str(path))
        assert ran.code == 2
        assert why in ran.err
    assert there.read_text() == "mine"
    gone = cli(
        "export", "--format", "cef", "--output", str(tmp_path / "x"), "--timeout", "1", nats="nats://127.0.0.1:1"
    )
    assert gone.code == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["there"], "no part of a file is left"


def test_a_siem_gets_events_that_a_strict_parser_reads(cli: Cli, server: RealServer) -> None:
    _, entries = day()
    filled(server, entries)
    events = [parse(line) for line in cli("export", "--format", "cef").out.splitlines()]
    assert [header[3] for header, _ in events][-2:] == ["governor.spend", "identity.create"]
    assert [header[5] for header, _ in events][-2:] == ["5", "4"]
    assert events[-2][1]["reason"] == "budget_short"
    only = cli("export", "--format", "cef", "--outcome", "refused", "--since", "1h").out.splitlines()
    assert len(only) == 1


def test_a_forwarder_gets_new_ones_as_they_come(server: RealServer) -> None:
    life, entries = day()
    filled(server, entries)
    words = ("audit", "export", "--format", "cef", "--follow", "--after-seq", "8", "--nats", server.url)
    with subprocess.Popen(
        [sys.executable, "-m", "ifabric", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert parse(process.stdout.readline().rstrip("\n"))[1]["act"] == "identity.create"
        asyncio.run(put(server.url, [life.next(session="late")]))
        assert parse(process.stdout.readline().rstrip("\n"))[1]["suser"] == "late"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "--after-seq 10" in err


# -- verify ----------------------------------------------------------------------------------------------------------


async def heads_in(url: str, *lives: Life, **junk: bytes) -> None:
    """What etcd was told, and nothing else."""
    store = Etcd(EtcdSettings(endpoints=(url,)), CLOCK)
    await store.connect()
    await store.txn(Txn((), (Delete(b"audit/", b"audit0"),)))
    puts = [Put(f"audit/{life.chain}".encode(), encode(life.head())) for life in lives]
    puts += [Put(f"audit/{name}".encode(), data) for name, data in junk.items()]
    if puts:
        await store.txn(Txn((), tuple(puts)))
    await store.close()


@pytest.fixture
def told(etcd: RealServer, server: RealServer, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Tells etcd where chains end; the configuration that leads there."""

    def tell(*lives: Life, **junk: bytes) -> str:
        asyncio.run(heads_in(etcd.url, *lives, **junk))
        path = tmp_path / "fabric.yaml"
        config = {"coordinator": {"etcd": {"endpoints": [etcd.url]}}, "nats": {"servers": [server.url]}}
        path.write_text(json.dumps(config))
        return str(path)

    yield tell
    asyncio.run(heads_in(etcd.url))


def test_a_whole_audit_verifies_and_without_etcd_it_says_what_was_not_checked(
    cli: Cli, server: RealServer, told: Callable[..., str]
) -> None:
    life, entries = day()
    entries.append(life.next("fabric", ENDED))
    filled(server, entries)
    alone = cli("verify")
    assert alone.code == 0
    assert "the ends of the chains were not checked" in alone.out
    ran = cli("verify", "--config", told(life))
    assert ran.code == 0, ran.out
    assert "10 record(s) in 1 chain(s)" in ran.out
    assert "1 end(s) are as etcd knows them" in ran.out
    said = cli("verify", "--config", told(life), "--json").json
    assert (said["exit"], said["broken"], said["heads"], said["ends"]) == (0, False, 1, "checked")


def test_the_first_broken_record_is_named_with_who_when_and_what_to_do(
    cli: Cli, server: RealServer, told: Callable[..., str]
) -> None:
    life, entries = day()
    config = told(life)
    entries[3] = altered(entries[3], session="mallory")
    filled(server, entries)
    ran = cli("verify", "--config", config)
    assert ran.code == 1
    at = json.loads(entries[3][2])["at"]
    assert f"chain c1, record 4, sequence 4, {at}, mallory coordinator.claim" in ran.out
    assert "Compare with the last `ifabric audit export`" in ran.out
    (found,) = cli("verify", "--config", config, "--json").json["findings"]
    assert (found["kind"], found["n"], found["seq"]) == ("changed", 4, 4)


def test_an_end_that_comes_late_is_waited_for(cli: Cli, server: RealServer, told: Callable[..., str]) -> None:
    """A record may be on its way while its head is in etcd already."""
    life, entries = day()
    late = life.next(session="late")
    filled(server, entries)
    config = told(life)
    words = [server.url, late[0], late[1], late[2].decode()]
    code = """import asyncio, sys, time
from tests.chains import put
time.sleep(1.5)
asyncio.run(put(sys.argv[1], [(sys.argv[2], sys.argv[3], sys.argv[4].encode())]))"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    sender = subprocess.Popen([sys.executable, "-c", code, *words], env=environment)
    ran = cli("verify", "--config", config)
    assert sender.wait(20) == 0
    assert ran.code == 0, ran.out
    assert "10 record(s)" in ran.out


def test_a_stream_that_is_gone_is_broken_when_etcd_knows_of_it(
    cli: Cli, server: RealServer, told: Callable[..., str]
) -> None:
    life, _ = day()
    asyncio.run(_no_stream(server.url))
    ran = cli("verify", "--config", told(life), "--json")
    assert ran.code == 1
    assert [(one["kind"], one["chain"]) for one in ran.json["findings"]] == [("chain_missing", "c1")]


def test_junk_among_the_heads_is_a_finding(cli: Cli, server: RealServer, told: Callable[..., str]) -> None:
    life, entries = day()
    filled(server, entries)
    other = encode(Life("other").head())
    ran = cli("verify", "--config", told(life, c9=b"{junk", c8=other), "--json")
    assert ran.code == 1
    assert sorted(one["chain"] for one in ran.json["findings"] if one["kind"] == "head") == ["c8", "c9"]


def test_etcd_that_does_not_answer_is_no_reason_to_call_the_ends_checked(
    cli: Cli, server: RealServer, tmp_path: Path
) -> None:
    filled(server, day()[1])
    path = tmp_path / "away.yaml"
    etcd = {"endpoints": ["http://127.0.0.1:1"], "timeout_seconds": 1.0}
    path.write_text(json.dumps({"coordinator": {"etcd": etcd}, "nats": {"servers": [server.url]}}))
    ran = cli("verify", "--config", str(path))
    assert ran.code == 3
    assert "etcd was not heard" in ran.out


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"deny_delete": False}, "deny_delete"),
        ({"deny_purge": False}, "deny_purge"),
        ({"max_age": 7 * 86_400}, "7 days"),
        ({"storage": "memory"}, "not on disk"),
    ],
)
def test_a_stream_that_lets_records_go_is_broken(
    cli: Cli, server: RealServer, config: dict[str, Any], why: str
) -> None:
    filled(server, day()[1], **config)
    ran = cli("verify")
    assert ran.code == 1
    assert why in ran.out


def test_from_some_time_on_is_verified_without_what_was_before(cli: Cli, server: RealServer) -> None:
    life, entries = day()
    entries[1] = altered(entries[1], session="mallory")
    filled(server, entries)
    assert cli("verify", "--since", rfc3339(CLOCK.wall_ms() + 2 * HOUR_MS)).code == 0, "nothing is from then"
    assert cli("verify", "--since", "1h").code == 1, "all of it was stored just now"
    assert hash_of(entries[-1][2]) == life.prev


def test_thousands_of_records_are_read_in_order_and_with_flow_control(cli: Cli, server: RealServer) -> None:
    life = Life("c1", CLOCK.wall_ms() - HOUR_MS)
    filled(server, [], max_bytes=512 << 20)
    asyncio.run(_many(server.url, [life.next(session="s", why="x" * 150) for _ in range(30_000)]))
    began = CLOCK.monotonic()
    ran = cli("verify", "--json")
    took = CLOCK.monotonic() - began
    assert (ran.code, ran.json["records"]) == (0, 30_000)
    print(f"30,000 records verified in {took:.2f} s")


async def _many(url: str, entries: list[Entry]) -> None:
    import nats

    client = await nats.connect(url)
    context = client.jetstream(publish_async_max_pending=5000)
    for subject, name, data in entries:
        await context.publish_async(subject, data, headers={"Nats-Msg-Id": name}, wait_stall=10)
    await context.publish_async_completed()
    await client.close()
