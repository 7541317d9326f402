"""`ifabric drill` itself, small, as a process; and drills in which something is done wrong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.drill.drilling import Plan, perform
from ifabric.drill.verdict import Promise, judge
from tests.conftest import needed

#: clusters of etcd and NATS, daemons, four verbs as processes: half a minute each on an idle machine
pytestmark = pytest.mark.slow

SMALL = ("--tasks", "300", "--agents", "4", "--seconds", "3")
#: a broken promise is found by the words that name it; a shared machine may be slow, and that is not what is tested
SLOW = "RTO"


async def drill(*words: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """The verb as a process; its exit code, what it said, and its stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ifabric", "drill", *SMALL, *words, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    return process.returncode or 0, msgspec.json.decode(out), err.decode()


def broken(promises: list[dict[str, Any]] | tuple[Promise, ...]) -> list[str]:
    told = [one._asdict() if isinstance(one, Promise) else one for one in promises]
    return [one["what"] for one in told if one["held"] is False and SLOW not in one["what"]]


async def test_a_cluster_that_is_lost_under_load_comes_back_with_every_promise_kept(tmp_path: Path) -> None:
    """And neither this machine's fabric nor its identity is used: the variables that name them lead nowhere."""
    with needed("etcd, etcdutl and nats-server"):
        kept = tmp_path / "kept"
        elsewhere = {"IFABRIC_NATS": "nats://127.0.0.1:9", "IFABRIC_CREDENTIALS": str(tmp_path / "nobody.nk")}
        code, said, _ = await drill("--keep", str(kept), **elsewhere, XDG_STATE_HOME=str(tmp_path / "state"))
    assert broken(said["promises"]) == []
    assert code == (0 if said["held"] else 1)
    assert said["rto_s"] > 0
    assert said["spend"]["lost_micro_usd"] == 0
    assert said["spend"]["charges"]["since"] > 0, "money was spent since the backup"
    assert said["reconciled"]["charged_micro_usd"] > 0, "and the restored ledger had forgotten it"
    assert said["completed"]["lost"], "work was done since the backup, and is lost"
    assert said["claims"]["before"] and said["claims"]["after"]
    assert [one["code"] for one in said["stale"]] == ["claim_lost"] * 3
    assert said["incarnations"] == [1, 2]
    assert {one["account"] for one in said["limits"]} >= {"drill", "drill/team-0"}
    assert not (tmp_path / "state").exists(), "nothing of this user's was touched"
    assert list((kept / "backups").glob("*.age")), "--keep keeps it"


async def test_with_nats_lost_too_what_was_spent_since_the_backup_is_told_as_lost() -> None:
    with needed("etcd, etcdutl and nats-server"):
        code, said, _ = await drill("--everything")
    assert broken(said["promises"]) == []
    assert code == (0 if said["held"] else 1)
    charges = said["spend"]["charges"]
    assert 0 < said["spend"]["lost_micro_usd"] <= charges["since_micro_usd"]
    assert charges["untold"] > 0, "there is no journal of it"


async def test_a_drill_without_its_reconciliation_is_found_out(tmp_path: Path) -> None:
    plan = Plan(tasks=100, agents=4, seconds=2.0, nodes=1, daemons=1, leave_out="reconcile")
    with needed("etcd, etcdutl and nats-server"):
        outcome = await perform(plan, tmp_path / "drill", lambda *_: None)
    verdict = judge(outcome.facts)
    assert not verdict.held
    assert broken(verdict.promises) == ["spend lost", "the journal tells of the whole time"]


async def test_a_folder_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    code, said, _ = await drill("--keep", str(tmp_path))
    assert code == 2
    assert "it is there already" in said["error"]["message"]
    assert (tmp_path / "mine").read_text() == "mine"
