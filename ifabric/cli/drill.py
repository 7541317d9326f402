"""`ifabric drill`: a whole cluster is lost under load and comes back from its backup; what that cost, measured."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.options import Json
from ifabric.cli.output import check, err, out, plain, print_json, print_table, usd
from ifabric.errors import ConfigError

if TYPE_CHECKING:
    from ifabric.drill.drilling import Outcome, Plan, Tell
    from ifabric.drill.verdict import Facts, Verdict


def drill(
    *,
    tasks: Annotated[int, Parameter(validator=Number(gte=10, lte=1_000_000), help="Tasks on the board.")] = 100_000,
    agents: Annotated[int, Parameter(validator=Number(gte=1, lte=200), help="Agents at work.")] = 16,
    seconds: Annotated[
        float, Parameter(validator=Number(gte=1, lte=3600), help="They work for so long, half of it after the backup.")
    ] = 10.0,
    nodes: Annotated[int, Parameter(validator=Number(gte=1, lte=5), help="etcd members, and NATS servers.")] = 3,
    daemons: Annotated[int, Parameter(validator=Number(gte=1, lte=8), help="Daemons.")] = 2,
    everything: Annotated[
        bool, Parameter(help="Lose NATS and its streams too: then what was spent since the backup is lost.")
    ] = False,
    keep: Annotated[Path | None, Parameter(help="Keep all files there, a folder that is not there yet.")] = None,
    json: Json = False,
) -> int:
    """Lose a whole cluster, restore it, and measure it.

    It starts etcd, NATS and daemons in a scratch folder, fills the board, and lets
    agents claim, spend and complete. A backup is made meanwhile, encrypted, and read
    to its end. Then every etcd is killed and its data deleted. What follows is what
    an operator would do: `restore` under a new incarnation, the daemons, `reconcile`.
    At the end, what the agents were told is laid beside what the fabric knows.
    Exit 1 when a promise does not hold. Nothing outside of the folder is touched,
    and this machine's own daemon is not asked.

    For example:

        ifabric drill
        ifabric drill --tasks 2000 --seconds 5
        ifabric drill --everything --keep /tmp/drill
    """
    from ifabric.backup.etcdutl import find_etcdutl
    from ifabric.drill.drilling import Plan, perform
    from ifabric.drill.verdict import judge

    asyncio.run(find_etcdutl())  # before anything is started
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # so that nothing is left running
    logging.getLogger("ifabric").setLevel(logging.ERROR)  # agents that lose their claims are what this is about
    _forget_the_fabric_of_this_machine()
    plan = Plan(tasks, agents, seconds, nodes, daemons, everything)
    with _folder(keep) as folder, _telling(json=json) as tell:
        outcome = asyncio.run(perform(plan, folder, tell))
    verdict = judge(outcome.facts)
    if json:
        print_json(summary(plan, outcome, verdict))
    else:
        _show(plan, outcome, verdict)
        if keep is not None:
            out.print(f"  [dim]all files are in {plain(keep)}, with the daemons' logs and the backup's key[/]")
    return 0 if verdict.held else 1


def _interrupt(*_: Any) -> None:
    """Whoever handles Ctrl-C just now, the loop or Python itself, is to handle this the same."""
    signal.raise_signal(signal.SIGINT)


def _forget_the_fabric_of_this_machine() -> None:
    """No variable may lead the drill's agents to another fabric, or make them somebody."""
    from ifabric.drill.town import KEPT

    for name in [name for name in os.environ if name.startswith("IFABRIC") and name not in KEPT]:
        del os.environ[name]


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="ifabric-drill-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    try:
        keep.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise ConfigError(
            f"--keep {keep}: it is there already, and a drill deletes data; name another folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}") from None
    yield keep.absolute()


@contextlib.contextmanager
def _telling(*, json: bool) -> Iterator[Tell]:
    """A bar for each step on a terminal, a line for each elsewhere, on stderr; nothing with --json."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=json or not err.is_terminal) as progress:
        now = ""
        bar = progress.add_task("", total=None)

        def tell(what: str, done: float, of: float) -> None:
            nonlocal now, bar
            if what != now:
                if now:
                    progress.update(bar, total=1, completed=1)
                    bar = progress.add_task("", total=None)
                now = what
                if not json and not err.is_terminal:
                    err.print(f"  {plain(what)} ...")
            progress.update(bar, description=plain(what), completed=done, total=of or None)

        yield tell
        progress.update(bar, total=1, completed=1)


# -- the report ------------------------------------------------------------------------------------------------------


def summary(plan: Plan, outcome: Outcome, verdict: Verdict) -> dict[str, Any]:
    """What `--json` prints: figures in seconds, bytes and micro-USD."""
    from ifabric.drill.verdict import lost_micro_usd

    facts = outcome.facts
    return {
        "held": verdict.held,
        "plan": plan._asdict(),
        "rto_s": facts.rto_s,
        "phases": [{"phase": name, "seconds": round(seconds, 3)} for name, seconds in facts.phases],
        "rpo_s": round(facts.backup_age_s, 3),
        "backup": {"seconds": facts.backup_s, "bytes": outcome.backup_bytes, "keys": outcome.backup_keys},
        "submitted": facts.submitted._asdict(),
        "completed": facts.completed._asdict(),
        "spend": {
            "lost_micro_usd": lost_micro_usd(facts),
            "charges": facts.charges._asdict(),
            "accounts": [
                {**account._asdict(), "lost": account.lost, "twice": account.twice} for account in facts.accounts
            ],
        },
        "reconciled": facts.reconciled._asdict() if facts.reconciled is not None else None,
        "limits": [limit._asdict() for limit in facts.limits],
        "incarnations": facts.incarnations,
        "stale": [one._asdict() for one in facts.stale],
        "claims": {"before": outcome.claims[0], "after": outcome.claims[1]},
        "errors": outcome.errors,
        "load_seconds": round(outcome.load_s, 3),
        "promises": [promise._asdict() for promise in verdict.promises],
    }


def _show(plan: Plan, outcome: Outcome, verdict: Verdict) -> None:
    facts = outcome.facts
    lost = f"{plan.nodes} etcd" + (f" and {plan.nodes} NATS" if plan.everything else "")
    out.print(
        f"{plan.tasks} tasks, {plan.agents} agents, {plan.daemons} daemons on {plan.nodes} etcd and {plan.nodes} NATS; "
        f"{lost} lost\n"
    )
    marks = {True: "[green]✔[/]", False: "[red]✘[/]", None: "·"}
    from rich.text import Text

    print_table(
        ("", "WHAT", "MEASURED", "GOAL"),
        ((Text.from_markup(marks[one.held]), one.what, one.measured, one.goal) for one in verdict.promises),
    )
    out.print()
    print_table(("PHASE", "SECONDS"), ((name, f"{seconds:.1f}") for name, seconds in facts.phases))
    out.print()
    _show_money(facts)
    took = f"{outcome.backup_bytes / 1e6:.1f} MB, {outcome.backup_keys} keys, made in {facts.backup_s:.1f} s"
    out.print(f"  the backup: {took}; it was {facts.backup_age_s:.1f} s old at the loss")
    out.print(
        f"  {plan.tasks} tasks loaded in {outcome.load_s:.1f} s; {outcome.claims[0]} claims before the loss, "
        f"{outcome.claims[1]} from then on"
    )
    check(verdict.held, "every promise held" if verdict.held else "a promise did not hold")


def _show_money(facts: Facts) -> None:
    charges = facts.charges
    rows = [
        (one.name, usd(one.acknowledged), usd(one.unknown), usd(one.spent), f"{one.lost} micro-USD")
        for one in facts.accounts
        if "@" not in one.name
    ]
    agents = [one for one in facts.accounts if "@" in one.name]
    rows.append(
        (
            f"{len(agents)} agents' own",
            usd(sum(one.acknowledged for one in agents)),
            usd(sum(one.unknown for one in agents)),
            usd(sum(one.spent for one in agents)),
            f"{sum(one.lost for one in agents)} micro-USD",
        )
    )
    print_table(("ACCOUNT", "ACKNOWLEDGED", "NO ANSWER", "IN THE LEDGER", "LOST"), rows)
    out.print(
        f"  {charges.number} charges acknowledged until the loss, {charges.since} of them since the backup; the journal "
        f"did not know {charges.untold} of these ({charges.untold_micro_usd} micro-USD)"
    )
    if facts.reconciled is not None:
        out.print(f"  reconcile charged {usd(facts.reconciled.charged_micro_usd)} again")
