"""`ifabric budget show|set|holds`: what accounts may spend, have spent and hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where, amount
from ifabric.cli.output import money, out, plain, print_json, print_table, usd
from ifabric.wire import governor as wire

#: characters of a bar, and what it is drawn with: spent, held, available
BAR = 16
SPENT, HELD, FREE = "█", "▒", "·"
Account = Annotated[
    str, Parameter(help="Names from the root down, as acme/research/@agent-7; @ marks a session's own.")
]
AnyAccount = Annotated[str | None, Parameter(help="With all above and below it. Default: every account.")]


def show(account: AnyAccount = None, *, json: Json = False, where: Where | None = None) -> int:
    """Show accounts: their limits, and what of it is spent, held and available.

    For example:

        ifabric budget show
        ifabric budget show acme/research
        ifabric budget show --json | jq '.below[] | select(.available < 1000000)'
    """
    found = with_client(where, None, lambda c: c.balance(account, tree=True))
    if json:
        print_json(found)
        return 0
    lines = (*found.path, *found.below)
    _table(lines)
    if not lines:
        out.print("[dim]no account is limited or was charged yet: ifabric budget set acme 100[/]")
    if found.holds:
        which = f" {plain(account)}" if account else ""
        out.print(f"[dim]{len(found.holds)}{'+' if found.more else ''} open hold(s): ifabric budget holds{which}[/]")
    return 0


def set_(
    account: Account,
    limit: Annotated[str, Parameter(help="USD, to the millionth: 100 or 0.25; or none.")],
    *,
    window: Annotated[wire.Window, Parameter(help="For ever, for each day or for each month (UTC).")] = "total",
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Limit what an account and all below it may spend. A limit below what is spent
    and held already lets nothing more through.

    For example:

        ifabric budget set acme 100
        ifabric budget set acme/research 2.50 --window day
        ifabric budget set acme/research none
    """
    micro_usd = amount(None if limit == "none" else limit, "LIMIT")
    reply = with_client(where, None, lambda c: c.set_account(account, micro_usd, window=window))
    if json:
        print_json(reply)
        return 0
    said = "has no limit" if micro_usd is None else f"may spend {usd(micro_usd)}{_per(window)}"
    out.print(f"[green]✔[/] {plain(account)} {said}")
    _table(reply.path)
    return 0


def holds(account: AnyAccount = None, *, json: Json = False, where: Where | None = None) -> int:
    """Show the holds that are open: what was set aside, by whom, for which task, and
    for how long.

    For example:

        ifabric budget holds acme
    """
    asked = with_client(where, None, lambda c: c.balance(account, tree=account is None))
    found, more = asked.holds, asked.more
    if json:
        print_json({"holds": found, "more": more})
        return 0
    rows = [
        (
            line.hold,
            line.session,
            line.account,
            money(line.amount),
            line.at,
            f"{line.task} fence {line.fence}" if line.task else "",
            f"in {line.expires_in_s:.0f} s" if line.expires_in_s is not None else "with its claim",
        )
        for line in found
    ]
    print_table(("HOLD", "SESSION", "ACCOUNT", "AMOUNT", "SINCE", "FOR", "EXPIRES"), rows)
    out.print(f"{len(found)} open hold(s), {usd(sum(line.amount for line in found))} in all")
    if more:
        out.print(f"[yellow]![/] there are more than {len(found)}: ask about an account below")
    return 0


# -- inside ----------------------------------------------------------------------------------------------------------


def _table(lines: Sequence[wire.Line]) -> None:
    rows: list[tuple[Any, ...]] = []
    for line in lines:
        parent, slash, name = line.account.rpartition("/")
        label = Text(f"{parent}{slash}", style="dim") + Text(name, style="bold")
        limit = Text("none" if line.limit is None else usd(line.limit) + _per(line.window), justify="right")
        free = "" if line.available is None else money(line.available, "red" if line.available < 0 else "")
        rows.append((label, limit, money(line.spent), money(line.held), free, _bar(line)))
    if rows:
        print_table(("ACCOUNT", "LIMIT", "SPENT", "HELD", "AVAILABLE", "USED"), rows)
    for line in lines:
        if line.overdraft:
            out.print(f"[yellow]![/] {plain(line.account)}: {usd(line.overdraft)} were charged that were not available")


def _per(window: wire.Window) -> str:
    return "" if window == "total" else f" a {window}"


def _bar(line: wire.Line) -> Text:
    """How much of a limit is gone, drawn and in whole percent, rounded down."""
    if line.limit is None:
        return Text("")
    used = line.spent + line.held
    percent = used * 100 // line.limit if line.limit else 100
    spent = min(BAR, line.spent * BAR // line.limit) if line.limit else BAR
    held = min(BAR - spent, -(-line.held * BAR // line.limit)) if line.limit else 0
    style = "red" if percent >= 100 else "yellow" if percent >= 80 else "green"
    drawn = Text(SPENT * spent + HELD * held, style=style) + Text(FREE * (BAR - spent - held), style="dim")
    return drawn + Text(f" {percent:>3}%")
