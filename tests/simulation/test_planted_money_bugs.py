"""The proof that the simulation can fail where money is concerned: bugs that a governor might have, each planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from ifabric_actors.coordinator import money as claims_money
from ifabric_actors.governor import books, holds, ledger, money, office, teller
from ifabric_actors.governor.ledger import Settled
from tests.simulation.swarm import simulate
from tests.simulation.test_planted_bugs import always

pytestmark = pytest.mark.slow

Plant = Callable[[pytest.MonkeyPatch], None]
#: a planted bug is found by one of so many runs: the rarest, a lost receipt, shows in one of forty
RUNS_MAX = 400


def tallies_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(books.Books, "compares", lambda self: [])


def short_accounts_not_refused(patch: pytest.MonkeyPatch) -> None:
    """The ledger's own assertion would crash the daemon first: it is taken away too, so that the audit has to find it."""
    patch.setattr(ledger, "_refuse_short", lambda path, amount: None)
    patch.setattr(ledger, "placed", lambda path, amount: ledger._moved(path, held=amount))


def hold_not_compared_at_its_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(money, "unchanged", always)
    patch.setattr(ledger, "BehindError", AssertionError)


def hold_may_be_there_already(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(money, "absent", always)
    patch.setattr(office, "absent", always)


def expiry_without_looking_at_the_hold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(holds, "unchanged", always)


def holds_of_the_dead_are_left(patch: pytest.MonkeyPatch) -> None:
    async def idle(self: Any, key: bytes) -> None:
        return

    patch.setattr(holds.Sweeper, "_expire", idle)


def hold_outlives_its_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(claims_money.Purse, "ending", lambda self, *seen, **more: None)
    holds_of_the_dead_are_left(patch)


def late_commit_dropped(patch: pytest.MonkeyPatch) -> None:
    committed = ledger.committed

    def forgetful(hold: Any, path: Any, cost: int, **more: Any) -> Settled:
        return Settled(hold, path, again=True) if hold.state == "expired" else committed(hold, path, cost, **more)

    patch.setattr(ledger, "committed", forgetful)


def late_commit_frees_again(patch: pytest.MonkeyPatch) -> None:
    committed = ledger.committed

    def generous(hold: Any, path: Any, cost: int, **more: Any) -> Settled:
        settled = committed(hold, path, cost, **more)
        if hold.state != "expired" or not path or path[0].tally.held < hold.amount:
            return settled
        return settled._replace(path=ledger.freed(settled.path, hold.amount))

    patch.setattr(ledger, "committed", generous)


def answers_that_change_nothing_leave_no_receipt(patch: pytest.MonkeyPatch) -> None:
    async def careless(self: Any, *seen: Any) -> bool:
        return True

    patch.setattr(office.Office, "keep", careless)


def the_last_of_a_batch_decides_for_all(patch: pytest.MonkeyPatch) -> None:
    """Each posting is decided on the accounts as they were before the batch."""
    line = books.Books._line

    def fresh(self: Any, place: Any, account: Any) -> Any:
        self._lines.pop(place, None)
        return line(self, place, account)

    patch.setattr(books.Books, "_line", fresh)


def own_conditions_not_compared(patch: pytest.MonkeyPatch) -> None:
    request = teller.Teller._request

    def careless(self: Any, attempt: Any, slot: int) -> Any:
        drafts = [(w, d._replace(request=d.request._replace(compares=()))) for w, d in attempt.drafts]
        return request(self, attempt._replace(drafts=drafts), slot)

    patch.setattr(teller.Teller, "_request", careless)


def overdraft_not_recorded(patch: pytest.MonkeyPatch) -> None:
    charged = ledger.charged

    def silent(path: Any, cost: int, *, held: int) -> Any:
        after, _ = charged(path, cost, held=held)
        return tuple(
            line._replace(tally=replace(line.tally, overdraft=before.tally.overdraft))
            for line, before in zip(after, path, strict=True)
        ), 0

    patch.setattr(ledger, "charged", silent)


def a_limit_known_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A daemon that knows an account's limit never hears of another one."""
    learn = books.Memory.learn_limit

    def deaf(self: Any, name: str, account: Any, mod_revision: int) -> None:
        if name not in self._limits or self._limits[name].account is None:
            learn(self, name, account, mod_revision)

    patch.setattr(books.Memory, "learn_limit", deaf)


BUGS: list[tuple[Plant, str]] = [
    (tallies_not_compared, "says"),
    (short_accounts_not_refused, "is overspent"),
    (hold_not_compared_at_its_end, "went from|says|crashed"),
    (hold_may_be_there_already, "went from|became another|says|carried out|answered"),
    (expiry_without_looking_at_the_hold, "went from|says"),
    (holds_of_the_dead_are_left, "not settled"),
    (hold_outlives_its_claim, "not settled"),
    (late_commit_dropped, "never knew"),
    (late_commit_frees_again, "says"),
    (answers_that_change_nothing_leave_no_receipt, "then refused|answered"),
    (the_last_of_a_batch_decides_for_all, "says|is overspent"),
    (own_conditions_not_compared, "went from|says|granted|carried out|became another"),
    (overdraft_not_recorded, "is overspent"),
    (a_limit_known_for_ever, "is overspent"),
]


@pytest.mark.parametrize(("plant", "finding"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
async def test_the_simulation_finds_planted_bugs(plant: Plant, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(1, RUNS_MAX + 1):
        verdict = await simulate(seed)
        if any(part in wrong for wrong in verdict.wrong for part in finding.split("|")):
            print(f"found by seed {seed}")
            return
    pytest.fail(f"{RUNS_MAX} runs did not find it: {verdict}")
