"""Money in the simulation: what agents do with it, and what may never be true of it at any revision."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ifabric.testing.memory_store import MemoryEtcd
from ifabric_actors.coordinator import records as board
from ifabric_actors.governor import records
from ifabric_actors.governor.books import kind_of, place_of
from ifabric_actors.governor.ledger import TRANSITIONS
from ifabric_actors.governor.records import Account, Hold, Tally

if TYPE_CHECKING:
    from tests.simulation.agents import Agent, Attempt, Call

#: micro-USD: so little that agents are refused, and so much that they get on
LIMIT, SESSION_LIMIT = 400, 160
ORG = "org"


class Purse:
    """What one agent does with money, besides its claims."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._holds: list[str] = []
        self._made = 0

    def hold_for_claim(self, chance: Any) -> dict[str, int]:
        """Every third claim carries a hold."""
        return {"hold_micro_usd": chance.choice([0, 10, 60, 300])} if chance.random() < 0.35 else {}

    def cost(self, chance: Any) -> dict[str, int]:
        """Every other ending tells a cost."""
        return {"cost_micro_usd": chance.choice([0, 3, 25])} if chance.random() < 0.5 else {}

    async def step(self, chance: Any) -> None:
        """One thing with money; now and then, what an operator does."""
        drawn, ask = chance.random(), self._agent.ask
        if chance.random() < 0.08:
            limit = chance.choice([None, 100, LIMIT, 3 * LIMIT])
            window = chance.choice(["total", "total", "day", "month"])
            await ask("account", component="governor", account=ORG, limit_micro_usd=limit, window=window)
            return
        if drawn < 0.45:
            self._made += 1
            name = f"h{self._made}"
            body: dict[str, Any] = {"hold": name, "amount_micro_usd": chance.choice([1, 20, 150])}
            if chance.random() < 0.5:
                body["ttl_s"] = 1
            claim = self._agent.a_claim()
            if claim is not None and chance.random() < 0.5:
                body |= {"task": claim[0], "fence": claim[1]}
            if (await ask("reserve", component="governor", **body)).code == "ok":
                self._holds.append(name)
        elif drawn < 0.6:
            self._made += 1
            await ask("spend", component="governor", entry=f"e{self._made}", amount_micro_usd=chance.choice([1, 9]))
        elif self._holds:
            name = chance.choice(self._holds[-3:])
            if drawn < 0.85:
                amount = chance.choice([0, 4, 30])
                answer: Attempt = await ask("commit", component="governor", hold=name, amount_micro_usd=amount)
            else:
                answer = await ask("void", component="governor", hold=name)
            if answer.code == "ok" and chance.random() < 0.3 and name in self._holds:
                self._holds.remove(name)


class _Standing:
    """The accounts and holds at one revision."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.holds: dict[bytes, Hold] = {}
        self.held: Counter[tuple[str, str]] = Counter()
        self.spent: Counter[tuple[str, str]] = Counter()
        #: by how much an operator has set a limit below what was used already
        self.below: dict[tuple[str, str], int] = {}

    def over(self, place: tuple[str, str]) -> int:
        """By how much the limit of now is exceeded, other than by a recorded overdraft."""
        account, tally = self.accounts.get(place[0], Account()), self.tallies.get(place, Tally())
        if account.limit is None or kind_of(place[1]) != account.window:
            return 0
        return max(0, tally.spent + tally.held - account.limit - tally.overdraft)


def broken_promises(calls: Sequence[Call], etcd: MemoryEtcd) -> Iterator[str]:
    """Every promise about money that was broken, as a sentence."""
    now = _Standing()
    everything: dict[bytes, list[Hold]] = defaultdict(list)
    for revision, events in etcd.history:
        touched: set[tuple[str, str]] = set()
        changed: set[str] = set()
        for event in events:
            key = event.kv.key
            if key.startswith(records.ACCOUNTS) and not event.deleted:
                changed.add(key[len(records.ACCOUNTS) :].decode())
                now.accounts[key[len(records.ACCOUNTS) :].decode()] = records.account(event.kv)
            elif key.startswith(records.TALLIES) and not event.deleted:
                now.tallies[place_of(key)] = records.tally(event.kv)
                touched.add(place_of(key))
            elif key.startswith(records.HOLDS) and not event.deleted:
                hold = records.hold(event.kv)
                yield from _moves(now, key, hold, revision)
                everything[key].append(hold)
                touched |= set(hold.on)
        for place in [place for place in now.tallies if place[0] in changed]:
            now.below[place] = now.over(place)
        for place in touched:
            yield from _adds_up(now, place, revision)
    yield from _acknowledged(calls, everything)


def _moves(now: _Standing, key: bytes, hold: Hold, revision: int) -> Iterator[str]:
    before = now.holds.get(key)
    where = f"revision {revision}: hold {key.decode()}"
    if before is not None and hold.state not in TRANSITIONS[before.state].values():
        yield f"{where} went from {before.state} to {hold.state}"
    if before is not None and (before.amount, before.on) != (hold.amount, hold.on):
        yield f"{where} became another hold"
    for place in hold.on:
        if before is not None and before.state == "open":
            now.held[place] -= before.amount
        if hold.state == "open":
            now.held[place] += hold.amount
        now.spent[place] += hold.charged - (before.charged if before is not None else 0)
    now.holds[key] = hold


def _adds_up(now: _Standing, place: tuple[str, str], revision: int) -> Iterator[str]:
    tally = now.tallies.get(place, Tally())
    where = f"revision {revision}: account {place[0]}"
    if (tally.held, tally.spent) != (now.held[place], now.spent[place]):
        yield f"{where} says {tally.held} held and {tally.spent} spent; it is {now.held[place]} and {now.spent[place]}"
    below = now.below.get(place, 0)
    if now.over(place) > below:
        yield f"{where} is overspent: {tally.spent} spent and {tally.held} held under {now.accounts[place[0]]}"
    now.below[place] = min(below, now.over(place))


def _acknowledged(calls: Sequence[Call], everything: dict[bytes, list[Hold]]) -> Iterator[str]:
    ends = {"commit": ("committed", "late"), "void": ("voided", "expired"), "spend": ("committed",)}
    for call in calls:
        if (
            call.component != "governor"
            or call.verb == "account"
            or not any(attempt.code == "ok" for attempt in call.attempts)
        ):
            continue
        name = call.body.get("hold", call.body.get("entry", ""))
        lives = everything[records.hold_key(call.session, name)]
        wanted = ends.get(call.verb, ("open",))
        charged = call.body["amount_micro_usd"] if call.verb in ("commit", "spend") else None
        if not any(life.state in wanted and charged in (None, life.charged) for life in lives):
            yield f"{call.verb} {call.request_id} was acknowledged, and etcd never knew"


def unsettled(etcd: MemoryEtcd) -> dict[str, str]:
    """Open holds whose owner has gone, and what they are for."""
    found = {}
    for key, kv in etcd.keys.items():
        if not key.startswith(records.HOLDS) or (hold := records.hold(kv)).state != "open":
            continue
        session = etcd.keys.get(board.session_key(hold.session))
        task = etcd.keys.get(board.task_key(hold.task)) if hold.task else None
        claim = board.stored(task).task if task is not None else None
        lost = hold.task and (claim is None or (claim.state, claim.fence) != ("claimed", hold.fence))
        if session is None or session.lease != hold.lease or lost:
            found[key.decode()] = f"open, for {hold.task or hold.session}"
    return found
