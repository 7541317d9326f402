"""The story of an account: its limit, who spent it, what is held, who was refused."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from ifabric.explaining.happenings import of_budgets
from ifabric.explaining.merging import merged, refusals
from ifabric.explaining.story import LINES_MAX, Sources, Story, ago, many, some, span, told, usd
from ifabric.wire.governor import BalanceReply, HoldLine, Line

#: of a limit, from which on it is called nearly spent
NEARLY = 0.8


class AccountFacts(Struct, frozen=True, kw_only=True):
    """What was found of an account. `balance` None: there is none any more, only what the journal tells of it."""

    account: str
    now: str
    balance: BalanceReply | None = None
    sources: Sources = Sources()


def account_story(facts: AccountFacts, *, most: int = LINES_MAX) -> Story:
    """The story."""
    sources = facts.sources
    lines = merged(of_budgets(sources.budgets), sources.audit)
    balance = facts.balance
    if balance is None or not balance.path:
        now = ["There is no such account: nothing was limited or spent below it, or it was idle for too long."]
        return told("account", facts.account, lines, now=now, unread=sources.unread, most=most)
    own = balance.path[-1]
    now = [_is(own), *_above(balance), *_spenders(facts, balance), *_holds(balance, facts.now), *_refused(facts)]
    return told("account", facts.account, lines, now=now, do=_do(balance), unread=sources.unread, most=most)


def _is(own: Line) -> str:
    per = {"total": "", "day": " today", "month": " this month"}[own.window]
    spent = f"{usd(own.spent)} spent{per}, {usd(own.held)} held"
    if own.limit is None or own.available is None:
        return f"{spent}, without a limit of its own."
    over = f"; {usd(own.overdraft)} were charged that were not available" if own.overdraft else ""
    return f"{spent}, of {usd(own.limit)}: {usd(own.available)} available{over}."


def _above(balance: BalanceReply) -> list[str]:
    return [
        f"{line.account}, above it, has {usd(line.available)} available of {usd(line.limit)}."
        for line in balance.path[:-1]
        if line.limit is not None and line.available is not None
    ]


def _spenders(facts: AccountFacts, balance: BalanceReply) -> list[str]:
    """Who spent the most: by the accounts below it, or else by what the journal tells."""
    own = balance.path[-1]
    right_below = [
        line for line in balance.below if line.account.count("/") == own.account.count("/") + 1 and line.spent
    ]
    if right_below:
        most = sorted(right_below, key=lambda line: -line.spent)[:3]
        return [f"Spent the most below it: {', '.join(f'{line.account} {usd(line.spent)}' for line in most)}."]
    by: Counter[str] = Counter()
    for one in facts.sources.budgets:
        if one.event == "commit":
            by[one.session] += one.charged
    said = ", ".join(f"{session} {usd(charged)}" for session, charged in by.most_common(3) if charged)
    return [f"Spent the most, as far as the journal tells: {said}."] if said else []


def _holds(balance: BalanceReply, now: str) -> list[str]:
    held = balance.holds
    if not held:
        return ["No hold is open on it."]
    by: Counter[str] = Counter()
    for hold in held:
        by[hold.session] += hold.amount
    whom = ", ".join(f"{session} {usd(amount)}" for session, amount in by.most_common(3))
    more = " at least" if balance.more else ""
    return [f"{many(len(held), 'hold')}{more} are open: {whom}. The oldest, {_hold(_oldest(held), now)}."]


def _oldest(held: tuple[HoldLine, ...]) -> HoldLine:
    return min(held, key=lambda hold: hold.at)


def _hold(hold: HoldLine, now: str) -> str:
    task = f" for {hold.task}" if hold.task else ""
    end = f", ends in {span(hold.expires_in_s)}" if hold.expires_in_s is not None else ", ends with its claim"
    return f"{hold.hold} of {hold.session}{task}, was placed {ago(hold.at, now)}{end}"


def _short(facts: AccountFacts) -> list[str]:
    """The sessions that were refused for want of money, once for each time."""
    return [entry.session for entry in refusals(facts.sources.audit) if entry.code == "budget_short"]


def _refused(facts: AccountFacts) -> list[str]:
    who = _short(facts)
    if not who:
        return []
    return [f"Refused for want of money: {many(len(who), 'request')} of {some(dict.fromkeys(who))}."]


def _do(balance: BalanceReply) -> list[str]:
    shorts = [line for line in balance.path if line.available is not None and line.available <= 0]
    do = []
    for line in shorts:
        window = "" if line.window == "total" else f" --window {line.window}"
        free = "" if not line.held else f"; or wait: {usd(line.held)} are held, and what is not spent of it comes back"
        do.append(
            f"ifabric budget set {line.account} AMOUNT{window}, with more than {usd(line.spent + line.held)}{free}"
        )
    own = balance.path[-1]
    nearly = own.limit and own.available is not None and own.spent + own.held >= NEARLY * own.limit
    if do or nearly:
        do.append(f"see what it went to: ifabric budget statement {own.account}")
    if balance.holds and shorts:
        do.append(f"see who holds it: ifabric budget holds {own.account}")
    return do
