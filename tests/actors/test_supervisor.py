"""The supervisor carries out what the policy decides, and can be stopped at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from ifabric.errors import Unreachable
from ifabric.supervision.spec import Branch, Budget, Child, Restart, Strategy
from ifabric.supervision.supervisor import Supervisor
from ifabric.testing.clock import VirtualClock

MANY = Budget(100, 1_000.0)


class Thing:
    """Can be supervised, and does what the test says. It writes what happens to it into `told`."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told
        self.up = False
        self.lost: asyncio.Future[str] | None = None
        self.fail_starts = 0
        self.fail_stop: BaseException | None = None
        #: awaited in `start` and in `stop`
        self.start_gate: asyncio.Event | None = None
        self.stop_gate: asyncio.Event | None = None

    async def start(self) -> None:
        if self.start_gate is not None:
            self.told.append(f"{self.name}?")
            await self.start_gate.wait()
        if self.fail_starts:
            self.fail_starts -= 1
            self.told.append(f"{self.name}!")
            raise Unreachable(f"{self.name} is not there")
        self.lost = asyncio.get_running_loop().create_future()
        self.up = True
        self.told.append(f"+{self.name}")

    async def stop(self) -> None:
        if self.stop_gate is not None:
            await self.stop_gate.wait()
        if self.fail_stop is not None:
            raise self.fail_stop
        if self.up:
            self.told.append(f"-{self.name}")
        self.up = False

    def end(self, reason: str = "bad luck") -> None:
        assert self.lost is not None
        self.lost.set_result(reason)


class Keeping(Thing):
    """Something of it outlives the end of a life."""

    async def clear(self) -> None:
        self.told.append(f"~{self.name}")


class Tree:
    """A tree of things, one branch deep or nested, on a virtual clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.told: list[str] = []
        self.things: dict[str, Any] = {}
        self.restarts: list[tuple[str, str, str]] = []
        self.root: Any = None

    def child(self, name: str, kind: type[Thing] = Thing, **options: Any) -> Child:
        self.things[name] = kind(name, self.told)
        return Child(name, self.things[name], **options)

    async def start(self, branch: Branch) -> Supervisor:
        self.root = Supervisor(branch, self.clock, lambda *about: self.restarts.append(about))
        await self.root.start()
        return self.root

    def take(self) -> str:
        """What was told since the last time."""
        text = " ".join(self.told)
        self.told.clear()
        return text

    def state(self, name: str) -> dict[str, Any]:
        def find(about: dict[str, Any]) -> dict[str, Any] | None:
            for one in about["children"]:
                found = one if one["name"] == name else find(one) if "children" in one else None
                if found is not None:
                    return found
            return None

        found = find(self.root.describe())
        assert found is not None, name
        return found


@pytest.fixture
async def tree() -> AsyncIterator[Tree]:
    made = Tree()
    yield made
    if made.root is not None:
        await made.root.stop()
    assert not any(thing.up for thing in made.things.values())


@pytest.fixture
def loop_errors() -> Any:
    """What nobody awaited and the loop was told of."""
    loop = asyncio.get_event_loop_policy().get_event_loop()
    found: list[str] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, about: found.append(about["message"]))
    yield found
    loop.set_exception_handler(before)


def branch(tree: Tree, strategy: Strategy, budget: Budget = MANY, names: str = "abc", **kinds: type[Thing]) -> Branch:
    return Branch("tree", strategy, budget, tuple(tree.child(name, kinds.get(name, Thing)) for name in names))


async def reason_of(supervisor: Supervisor) -> str:
    assert supervisor.lost is not None
    async with asyncio.timeout(5):
        return await supervisor.lost


# -- starting and stopping --------------------------------------------------------------------------------------------


async def test_children_start_in_order_and_stop_in_reverse(tree: Tree) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE))
    assert tree.take() == "+a +b +c"
    await root.stop()
    assert tree.take() == "-c -b -a"


async def test_a_first_start_that_fails_takes_down_what_was_up_and_raises(tree: Tree) -> None:
    spec = branch(tree, Strategy.ONE_FOR_ONE)
    tree.things["c"].fail_starts = 1
    with pytest.raises(Unreachable, match="c is not there"):
        await tree.start(spec)
    assert tree.take() == "+a +b c! -b -a"


async def test_a_start_that_is_cancelled_takes_down_what_was_up(tree: Tree) -> None:
    spec = branch(tree, Strategy.ONE_FOR_ONE)
    tree.things["b"].start_gate = asyncio.Event()
    starting = asyncio.create_task(tree.start(spec))
    await tree.clock.settle()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert tree.take() == "+a b? -a"


async def test_a_child_that_does_not_stop_is_abandoned_and_the_others_are_stopped(tree: Tree) -> None:
    children = (tree.child("a"), tree.child("b", shutdown_s=0.01), tree.child("c"))
    root = await tree.start(Branch("tree", Strategy.ONE_FOR_ONE, MANY, children))
    tree.things["b"].stop_gate = asyncio.Event()
    await root.stop()
    assert "abandoned" in tree.state("b")["reason"]
    assert tree.take() == "+a +b +c -c -a"
    tree.things["b"].up = False


async def test_a_child_whose_stop_fails_keeps_nobody_up_and_is_reported(tree: Tree, loop_errors: list[str]) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE))
    tree.things["b"].fail_stop = OSError("a bug")
    await root.stop()
    assert tree.take() == "+a +b +c -c -a"
    assert "a bug" in tree.state("b")["reason"]
    assert ["b could not be stopped" in one for one in loop_errors] == [True]
    tree.things["b"].up, tree.things["b"].fail_stop = False, None


# -- restarting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (Strategy.ONE_FOR_ONE, "-b +b"),
        (Strategy.REST_FOR_ONE, "-c -b +b +c"),
        (Strategy.ONE_FOR_ALL, "-c -b -a +a +b +c"),
    ],
)
async def test_the_strategy_is_carried_out_in_order(tree: Tree, strategy: Strategy, told: str) -> None:
    await tree.start(branch(tree, strategy))
    tree.take()
    tree.things["b"].end()
    await tree.clock.settle()
    assert tree.take() == told
    assert tree.restarts == [("tree", "b", "bad luck")]
    assert (tree.state("b")["state"], tree.state("b")["restarts"], tree.state("b")["reason"]) == (
        "running",
        1,
        "bad luck",
    )


async def test_a_second_restart_waits_and_the_others_are_looked_after_meanwhile(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.ONE_FOR_ONE, Budget(100, 60.0)))
    for _ in range(5):
        tree.things["a"].end()
        await tree.clock.advance(2.0)
    tree.take()
    tree.things["a"].end()
    await tree.clock.settle()
    assert tree.take() == "-a"
    assert tree.state("a")["state"] == "waiting"
    tree.things["c"].end("another one")
    await tree.clock.advance(1.5)
    assert tree.take() == "-c"
    await tree.clock.advance(0.2)
    assert tree.take() == "+a"  # after 1.6 s
    await tree.clock.advance(2.0)
    assert tree.take() == "+c"  # after 3.2 s


async def test_an_end_is_handled_while_another_child_waits_for_its_next_try(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.REST_FOR_ONE))
    tree.things["c"].end()
    await tree.clock.settle()
    tree.things["c"].end()
    await tree.clock.settle()
    tree.take()
    tree.things["a"].end()  # takes in the try of c, which is not made a second time
    await tree.clock.advance(10.0)
    assert tree.take() == "-b -a +a +b +c"


async def test_a_restart_that_fails_is_tried_again_after_a_delay_that_grows(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.ONE_FOR_ONE))
    tree.things["a"].fail_starts = 3
    tree.take()
    tree.things["a"].end()
    await tree.clock.settle()
    assert tree.take() == "-a a!"
    assert "a is not there" in tree.state("a")["reason"]
    await tree.clock.advance(0.1)
    assert tree.take() == "a!"
    await tree.clock.advance(0.2)
    assert tree.take() == "a!"
    await tree.clock.advance(0.4)
    assert tree.take() == "+a"
    assert tree.state("a")["restarts"] == 4


async def test_those_after_one_that_cannot_start_wait_for_its_next_try(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.REST_FOR_ONE))
    tree.things["b"].fail_starts = 1
    tree.take()
    tree.things["a"].end()
    await tree.clock.settle()
    assert tree.take() == "-c -b -a +a b!"
    await tree.clock.advance(0.1)
    assert tree.take() == "+b +c"


async def test_a_temporary_child_is_forgotten(tree: Tree) -> None:
    children = (tree.child("a", restart=Restart.TEMPORARY), tree.child("b"))
    await tree.start(Branch("tree", Strategy.ONE_FOR_ALL, Budget(0, 1.0), children))
    tree.things["a"].end("its work is done")
    await tree.clock.advance(10.0)
    assert tree.take() == "+a +b -a"
    assert tree.state("a")["reason"] == "its work is done"


async def test_a_late_word_about_a_life_that_is_over_ends_nothing(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.ONE_FOR_ALL))
    tree.take()
    for name in "abc":
        tree.things[
            name
        ].end()  # all at once: the first word restarts all three, the others are about lives that are over
    await tree.clock.advance(10.0)
    assert tree.take() == "-c -b -a +a +b +c"
    assert len(tree.restarts) == 1


async def test_what_outlives_a_crash_is_cleared_and_not_stopped_by_a_restart(tree: Tree) -> None:
    await tree.start(branch(tree, Strategy.REST_FOR_ONE, a=Keeping, b=Keeping))
    tree.take()
    tree.things["b"].end()
    await tree.clock.settle()
    assert tree.take() == "-c ~b +b +c"
    tree.things["a"].end()
    await tree.clock.advance(1.0)
    assert tree.take() == "-c -b ~a +a +b +c"  # b had not ended itself: it is stopped


# -- giving up --------------------------------------------------------------------------------------------------------


async def test_a_branch_whose_budget_is_spent_fails_with_the_reason(tree: Tree) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE, Budget(2, 10.0)))
    for number in range(3):
        tree.things["a"].end(f"end {number}")
        await tree.clock.advance(1.0)
    assert "end 2" in await reason_of(root)
    assert tree.take() == "+a +b +c -a +a -a +a"
    await root.stop()
    assert tree.take() == "-c -b -a"


async def test_restarts_that_lie_far_enough_apart_are_borne_for_ever(tree: Tree) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE, Budget(2, 10.0)))
    for _ in range(50):
        tree.things["a"].end()
        await tree.clock.advance(5.0)
    assert root.lost is not None
    assert not root.lost.done()
    assert tree.state("a")["restarts"] == 50


async def test_a_failing_branch_is_restarted_by_its_parent_and_takes_the_rest_with_it(tree: Tree) -> None:
    inner = Branch("inner", Strategy.ONE_FOR_ONE, Budget(1, 10.0), (tree.child("x"), tree.child("y")))
    await tree.start(Branch("outer", Strategy.REST_FOR_ONE, MANY, (tree.child("a"), inner, tree.child("z"))))
    tree.take()
    tree.things["y"].end()
    await tree.clock.settle()
    assert tree.take() == "-y +y"
    tree.things["y"].end()
    await tree.clock.settle()
    assert tree.take() == "-z -y -x +x +y +z"
    assert [about[:2] for about in tree.restarts] == [("inner", "y"), ("outer", "inner")]
    tree.things["y"].end()  # the new life of the branch has a budget of its own
    await tree.clock.settle()
    assert tree.take() == "-y +y"


async def test_a_failure_that_does_not_go_away_climbs_to_the_root(tree: Tree) -> None:
    inner = Branch("inner", Strategy.ONE_FOR_ONE, Budget(2, 10.0), (tree.child("x"),))
    root = await tree.start(Branch("root", Strategy.ONE_FOR_ONE, Budget(1, 60.0), (inner, tree.child("a"))))
    tree.things["x"].fail_starts = 100
    tree.things["x"].end("the disk is full")
    await tree.clock.run(asyncio.shield(root.lost))
    reason = await reason_of(root)
    assert reason.startswith("root: inner ended (could not start again: x is not there)")
    assert tree.things["a"].up
    await root.stop()


async def test_a_bug_in_the_supervisor_itself_fails_the_branch_and_is_reported(
    tree: Tree, loop_errors: list[str]
) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE))

    def fail(*_: str) -> None:
        raise KeyError("a bug")

    root._on_restart = fail
    tree.things["a"].end()
    assert "its supervisor failed" in await reason_of(root)
    assert loop_errors == ["tree: its supervisor failed"]


# -- being interrupted ------------------------------------------------------------------------------------------------


async def _while_waiting(tree: Tree) -> None:
    tree.things["a"].fail_starts = 100
    tree.things["a"].end()
    await tree.clock.advance(1.0)
    assert tree.state("a")["state"] == "waiting"


async def _while_starting(tree: Tree) -> None:
    tree.things["a"].start_gate = asyncio.Event()
    tree.things["a"].end()
    await tree.clock.settle()
    assert tree.state("a")["state"] == "starting"


@pytest.mark.parametrize("moment", [_while_waiting, _while_starting])
async def test_stop_interrupts_a_restart(tree: Tree, moment: Callable[[Tree], Awaitable[None]]) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE))
    await moment(tree)
    tree.take()
    async with asyncio.timeout(5):
        await root.stop()
    await tree.clock.advance(100.0)
    assert tree.take() == "-c -b"
    assert tree.clock.sleepers == 0


async def test_what_outlives_a_crash_is_stopped_when_the_branch_is_stopped_meanwhile(tree: Tree) -> None:
    root = await tree.start(branch(tree, Strategy.ONE_FOR_ONE, a=Keeping))
    await _while_waiting(tree)
    tree.take()
    await root.stop()
    assert tree.take() == "-c -b -a"


async def test_the_tree_can_be_described_at_any_time(tree: Tree) -> None:
    inner = Branch("inner", Strategy.ONE_FOR_ALL, MANY, (tree.child("x"),))
    await tree.start(Branch("root", Strategy.REST_FOR_ONE, MANY, (tree.child("a"), inner)))
    await tree.clock.advance(7.0)
    assert tree.root.describe() == {
        "name": "root",
        "strategy": "rest_for_one",
        "children": [
            {"name": "a", "state": "running", "restarts": 0, "for_s": 7.0},
            {
                "name": "inner",
                "strategy": "one_for_all",
                "children": [{"name": "x", "state": "running", "restarts": 0, "for_s": 7.0}],
                "state": "running",
                "restarts": 0,
                "for_s": 7.0,
            },
        ],
    }
