"""The auditor finds what is planted, and nothing where nothing is: a proof that cannot fail would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest

from ifabric.wire.coordinator import TaskSpec
from ifabric_actors.coordinator import records as board
from ifabric_actors.coordinator.records import Task, TaskHold
from ifabric_actors.governor import records
from ifabric_actors.governor.records import Account, Hold, Tally
from tests.system.auditor import Auditor, Change, Said

PATH = ("org", "org/@s")
ON = tuple((name, "total") for name in PATH)
LIMIT = 100


def account(name: str = "org", limit: int | None = LIMIT) -> Change:
    return Change(records.account_key(name), records.encode(Account(limit=limit)))


def tallies(spent: int = 0, held: int = 0, overdraft: int = 0, *, names: tuple[str, ...] = PATH) -> list[Change]:
    tally = records.encode(Tally(spent=spent, held=held, overdraft=overdraft))
    return [Change(records.tally_key(name, "total"), tally) for name in names]


def hold(state: Any = "open", amount: int = 60, name: str = "h", **more: Any) -> Change:
    made = Hold(state=state, session="s", account="org/@s", amount=amount, at=1, **{"on": ON, **more})
    return Change(records.hold_key("s", name), records.encode(made))


def claimed(state: Any = "claimed", amount: int = 60) -> Change:
    own = TaskHold("claim-1", "org/@s", amount, ON, 1)
    task = Task(spec=TaskSpec(id="t"), state=state, body="", session="s" if state == "claimed" else "", fence=1,
                hold=own if state == "claimed" else None)  # fmt: skip
    return Change(board.task_key("t"), board.encode(task))


def claims_hold(state: Any = "open", **more: Any) -> Change:
    return hold(state, name="claim-1", **{"task": "t", "fence": 1, "body": "claim", **more})


def audited(*revisions: list[Change], told: tuple[Said, ...] | None = None, rest: bool = False) -> list[str]:
    auditor = Auditor(default_session_micro_usd=1_000)
    for number, changes in enumerate(([account()], *revisions), 1):
        auditor.take(number, changes)
    if told is not None:
        auditor.compare(told)
    if rest:
        auditor.at_rest()
    return auditor.found


RESERVED = [hold(), *tallies(held=60)]
COMMITTED = [hold("committed", charged=50), *tallies(spent=50)]
OVERDRAWN = [hold("committed", charged=130, overdraft=30), *tallies(130, 0, 30, names=("org",)), *tallies(130, 0, 0, names=("org/@s",))]  # fmt: skip


@pytest.mark.parametrize(
    "revisions",
    [
        [RESERVED, COMMITTED],
        [RESERVED, [hold("voided"), *tallies()]],
        [RESERVED, [hold("expired"), *tallies()], [hold("late", charged=60), *tallies(spent=60)]],
        [[hold("committed", amount=100, charged=100), *tallies(spent=100)]],
        [RESERVED, OVERDRAWN],
        [RESERVED, [account(limit=10), *tallies(held=60)], COMMITTED],
        [
            [claimed(), claims_hold(), *tallies(held=60)],
            [claimed("done"), claims_hold("committed", charged=1), *tallies(1)],
        ],
        [
            [claimed(), claims_hold(), *tallies(held=60)],
            [claims_hold("committed", charged=1), *tallies(1)],
            [claimed("done")],
        ],
    ],
)
def test_nothing_is_found_in_what_is_sound(revisions: list[list[Change]]) -> None:
    assert audited(*revisions, rest=True) == []


PLANTED: dict[str, tuple[str, list[list[Change]]]] = {
    "two holds get past the limit": ("OVERSPENT", [RESERVED, [hold(name="g"), *tallies(held=120)]]),
    "a spend gets past the limit": ("OVERSPENT", [[hold("committed", 101, charged=101), *tallies(spent=101)]]),
    "past the default limit of a session": (
        "OVERSPENT", [[account(limit=None)], [hold("committed", 1_001, charged=1_001), *tallies(spent=1_001)]],
    ),
    "an overdraft that is not recorded": (
        "OVERSPENT", [RESERVED, [hold("committed", charged=130, overdraft=30), *tallies(spent=130)]],
    ),
    "one more micro-USD than the overdraft": (
        "OVERSPENT",
        [RESERVED, [hold("committed", charged=131, overdraft=30), *tallies(131, 0, 30, names=("org",)), *tallies(131, names=("org/@s",))]],
    ),
    "an overdraft in reserve": (
        "explain 0", [[hold(), *tallies(held=60, overdraft=40, names=("org",)), *tallies(held=60, names=("org/@s",))]],
    ),
    "an overdraft of what was held": (
        "of 0 that was not held", [RESERVED, [hold("committed", charged=60, overdraft=1), *tallies(60, 0, 1)]],
    ),
    "an old overdraft used as room": (
        "OVERSPENT",
        [
            RESERVED, OVERDRAWN, [account(limit=200)],
            [hold(name="g", amount=71), *tallies(130, 71, 30, names=("org",)), *tallies(130, 71, names=("org/@s",))],
        ],
    ),
    "held without a hold": ("its holds make 0", [tallies(held=1)]),
    "spent without an entry": ("its holds make 0", [tallies(spent=1)]),
    "a hold on one account of two": ("says 0 held", [[hold(), *tallies(held=60, names=("org",))]]),
    "an expiry that frees nothing": ("its holds make 0", [RESERVED, [hold("expired")]]),
    "a commit that frees nothing": (
        "its holds make 0", [RESERVED, [hold("committed", charged=1), *tallies(spent=1, held=60)]],
    ),
    "a charge that is lost": ("make 0 and 50", [RESERVED, [hold("committed", charged=50), *tallies()]]),
    "a charge that is doubled": ("make 0 and 50", [RESERVED, [hold("committed", charged=50), *tallies(spent=100)]]),
    "committed twice": (
        "from committed to committed", [RESERVED, COMMITTED, [hold("committed", charged=60), *tallies(spent=60)]],
    ),
    "voided after its commit": ("from committed to voided", [RESERVED, COMMITTED, [hold("voided"), *tallies()]]),
    "late without an expiry": ("from open to late", [RESERVED, [hold("late", charged=5), *tallies(spent=5)]]),
    "opened again": ("from expired to open", [RESERVED, [hold("expired"), *tallies()], RESERVED]),
    "a void that charges": ("is voided and charged", [RESERVED, [hold("voided", charged=5), *tallies(spent=5)]]),
    "another amount": ("became another", [RESERVED, [hold("voided", amount=61), *tallies()]]),
    "another session's lease": ("became another", [RESERVED, [hold("voided", lease=7), *tallies()]]),
    "not on its whole path": ("stands on", [[hold(on=ON[:1]), *tallies(held=60, names=("org",))]]),
    "deleted while open": ("while it was open", [RESERVED, [Change(records.hold_key("s", "h"), None), *tallies()]]),
    "a tally deleted": ("was deleted", [RESERVED, COMMITTED, [Change(records.tally_key("org", "total"), None)]]),
    "an account deleted": ("was deleted", [[Change(records.account_key("org"), None)]]),
    "below zero": ("below zero", [tallies(held=-1)]),
    "a refund": ("forgot what was spent", [RESERVED, COMMITTED, tallies(spent=40)]),
    "a claim without its hold": ("which there is not", [[claimed()]]),
    "a claim with another amount": ("its hold is", [[claimed(amount=5), claims_hold(), *tallies(held=60)]]),
    "a hold that outlives its claim": (
        "is open for a claim", [[claimed(), claims_hold(), *tallies(held=60)], [claimed("pending")]],
    ),
    "a hold of a claim that never was": ("is open for a claim", [[claimed("pending"), claims_hold(), *tallies(held=60)]]),
    "a revision out of turn": ("came after", [RESERVED]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_fault_is_found(name: str) -> None:
    expected, revisions = PLANTED[name]
    if name == "a revision out of turn":
        auditor = Auditor(default_session_micro_usd=1_000)
        auditor.take(2, [account()])
        auditor.take(2, revisions[0])
        found = auditor.found
    else:
        found = audited(*revisions)
    assert any(expected in sentence for sentence in found), found


TOLD = (
    Said("reserve", "s", "h", 60, "ok"),
    Said("commit", "s", "h", 50, "ok", charged=50),
)


def test_what_was_told_and_kept_agrees() -> None:
    assert audited(RESERVED, COMMITTED, told=TOLD) == []
    assert audited(RESERVED, [hold("voided"), *tallies()], told=(TOLD[0], Said("void", "s", "h", 0, "ok"))) == []
    assert audited(told=(Said("reserve", "s", "h", 60, "budget_short"), Said("spend", "s", "e", 6, "unknown"))) == []
    claim = [claimed(), claims_hold(), *tallies(held=60)]
    assert audited(claim, told=(Said("claim", "s", "", 60, "unknown"),)) == []


@pytest.mark.parametrize(
    ("expected", "revisions", "told"),
    [
        ("acknowledged and lost", [], TOLD),
        ("acknowledged Said", [RESERVED], TOLD),
        ("acknowledged Said", [RESERVED, [hold("expired"), *tallies()]], TOLD),
        ("acknowledged Said", [RESERVED, [hold("committed", charged=49), *tallies(49)]], TOLD),
        ("were charged", [RESERVED, COMMITTED], (TOLD[0], Said("commit", "s", "h", 50, "ok", charged=51))),
        ("acknowledged Said", [RESERVED, COMMITTED], (TOLD[0], Said("void", "s", "h", 0, "ok"))),
        ("kept with 60", [RESERVED, COMMITTED], (Said("reserve", "s", "h", 61, "ok"),)),
        ("and yet there is", [RESERVED], (Said("reserve", "s", "h", 60, "budget_short"),)),
        ("nobody asked", [RESERVED], ()),
        ("nobody asked", [[claimed(), claims_hold(), *tallies(held=60)]], (Said("claim", "x", "", 60, "unknown"),)),
        ("acknowledged Said", [RESERVED], (Said("spend", "s", "h", 60, "ok"),)),
    ],
)  # fmt: skip
def test_what_was_told_and_is_not_so_is_found(
    expected: str, revisions: list[list[Change]], told: tuple[Said, ...]
) -> None:
    found = audited(*revisions, told=told)
    assert any(expected in sentence for sentence in found), found


def test_a_leak_is_found_at_rest() -> None:
    found = audited(RESERVED, rest=True)
    assert any("holds leaked" in sentence for sentence in found), found
    assert any("are still held" in sentence for sentence in found), found
