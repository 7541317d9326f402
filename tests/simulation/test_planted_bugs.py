"""The proof that the simulation can fail: bugs that a coordinator might have, each planted for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from ifabric.actor import receipts
from ifabric.store import commit
from ifabric.store.base import Compare, Op, Put, Target
from ifabric.store.commit import Outcome
from ifabric_actors.coordinator import claims, desk, endings, records, rules, sweeper
from tests.simulation.swarm import simulate

pytestmark = pytest.mark.slow

Plant = Callable[[pytest.MonkeyPatch], None]
#: a planted bug is found by one of so many runs
RUNS_MAX = 40


def always(key: bytes, *_: Any) -> Compare:
    """A condition that holds."""
    return Compare(key, Target.VERSION, Op.GREATER, -1)


def fence_not_checked(patch: pytest.MonkeyPatch) -> None:
    check = rules.check_holder

    def careless(task: Any, session: str, fence: int, **seen: Any) -> None:
        check(task, session, task.fence, **seen)

    patch.setattr(rules, "check_holder", careless)


def session_not_checked(patch: pytest.MonkeyPatch) -> None:
    def careless(task: Any, session: str, fence: int, *, seat: Any, incarnation: int) -> None:
        if task.state != "claimed" or seat is None:
            raise rules.ClaimLost

    patch.setattr(rules, "check_holder", careless)


def receipts_not_written(patch: pytest.MonkeyPatch) -> None:
    request = desk.Desk._request

    def forgetful(self: Any, caller: Any, message: Any, plan: Any, lease: int) -> Any:
        return request(self, caller, replace(message, request_id=None), plan, lease)

    patch.setattr(desk.Desk, "_request", forgetful)


def receipts_forgotten_soon(patch: pytest.MonkeyPatch) -> None:
    grant = receipts.Receipts._grant

    async def brief(self: Any) -> int:
        self._keep_s = 1
        return await grant(self)

    patch.setattr(receipts.Receipts, "_grant", brief)


def receipt_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(desk, "absent", always)


def task_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(desk, "unchanged", always)


def session_lease_not_compared_at_a_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(claims, "leased", always)


def session_lease_not_compared_at_an_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(endings, "leased", always)


def witness_believed_unseen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "_witnessed", lambda seen, witness: Outcome(True, 1, ()))


def unknown_taken_for_done(patch: pytest.MonkeyPatch) -> None:
    def hopeful(waiting: Any, error: Exception) -> None:
        if not waiting.future.done():
            waiting.future.set_result(Outcome(True, 1, ()))

    patch.setattr(commit, "_fail", hopeful)


def lost_reply_sent_again_without_compares(patch: pytest.MonkeyPatch) -> None:
    txn = commit.Committer._txn

    def careless(self: Any, batch: Any) -> Any:
        for waiting in batch:
            if waiting.doubt:
                waiting.request = waiting.request._replace(compares=())
        return txn(self, batch)

    patch.setattr(commit.Committer, "_txn", careless)


def expiry_without_looking_at_the_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweeper, "Compare", always)


def fence_given_out_again(patch: pytest.MonkeyPatch) -> None:
    claimed = rules.claimed

    def stuck(task: Any, *args: Any, **named: Any) -> Any:
        after = claimed(task, *args, **named)
        if task.generation == 0:
            return after
        last = replace(after.history[-1], fence=task.fence)
        return replace(after, fence=task.fence, generation=task.generation, history=(*after.history[:-1], last))

    patch.setattr(rules, "claimed", stuck)


def nothing_expires(patch: pytest.MonkeyPatch) -> None:
    async def idle(self: Any, task_id: str) -> None:
        return

    patch.setattr(sweeper.Sweeper, "_expire_one", idle)


def nothing_is_unblocked(patch: pytest.MonkeyPatch) -> None:
    async def idle(self: Any, task_id: str) -> None:
        return

    patch.setattr(sweeper.Sweeper, "_unblock_one", idle)
    patch.setattr(endings, "UNBLOCK_MAX", 0)


def completion_lost(patch: pytest.MonkeyPatch) -> None:
    """Half of the completions are acknowledged and not committed."""
    request = desk.Desk._request

    def lossy(self: Any, caller: Any, message: Any, plan: Any, lease: int) -> Any:
        made = request(self, caller, message, plan, lease)
        if message.verb == "complete" and int(message.request_id[-1]) % 2:
            made = made._replace(then=tuple(op for op in made.then if not _is_a_task(op)))
        return made

    patch.setattr(desk.Desk, "_request", lossy)


def _is_a_task(op: Any) -> bool:
    return isinstance(op, Put) and op.key.startswith(records.TASKS)


BUGS: list[tuple[Plant, str]] = [
    (fence_not_checked, "acknowledged"),
    (session_not_checked, "acknowledged|was completed by|was released by|was failed by"),
    (receipts_not_written, "carried out|then refused|answered"),
    (receipts_forgotten_soon, "carried out|then refused|answered"),
    (receipt_not_compared, "carried out|answered|granted 2 tasks"),
    (task_not_compared, "went from|was granted under"),
    (session_lease_not_compared_at_a_claim, "whose session had ended"),
    (session_lease_not_compared_at_an_end, "whose claim had ended"),
    (witness_believed_unseen, "never knew|not there"),
    (unknown_taken_for_done, "never knew|not there"),
    (lost_reply_sent_again_without_compares, "went from|carried out|was granted under"),
    (expiry_without_looking_at_the_lease, "which was alive"),
    (fence_given_out_again, "was granted under"),
    (nothing_expires, "not settled"),
    (nothing_is_unblocked, "not settled"),
    (completion_lost, "never knew"),
]


@pytest.mark.parametrize(("plant", "finding"), BUGS, ids=[plant.__name__ for plant, _ in BUGS])
async def test_the_simulation_finds_planted_bugs(plant: Plant, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(1, RUNS_MAX + 1):
        verdict = await simulate(seed)
        if any(part in wrong for wrong in verdict.wrong for part in finding.split("|")):
            return
    pytest.fail(f"{RUNS_MAX} runs did not find it: {verdict}")
