"""What seed 415 found: two daemons carry out one request, and each believes that the receipt is its own."""

from __future__ import annotations

from typing import Any

from ifabric.actor.base import Caller
from ifabric.errors import Unavailable
from ifabric.store.base import Txn, TxnResult
from ifabric.testing.clock import VirtualClock
from ifabric.testing.harness import Daemon
from ifabric.testing.memory_bus import MemoryBus, MemoryHub
from ifabric.testing.memory_store import MemoryEtcd
from ifabric.wire import coordinator as wire
from ifabric_actors.coordinator import records
from ifabric_actors.coordinator.actor import Coordinator
from tests.simulation.network import SimulatedStore, Weather


async def test_another_daemons_receipt_is_not_taken_for_the_own() -> None:
    """It took the other's commit for its own, and then what it had wanted to write for what is written: a lease that had
    ended, so that it robbed a live session of its claim.
    """
    clock, hub = VirtualClock(), MemoryHub()
    etcd = MemoryEtcd(clock)

    async def daemon() -> Any:
        store, bus = SimulatedStore(Weather(1, clock, faulty=False), etcd), MemoryBus(hub)
        await store.connect()
        await bus.connect()
        return await Daemon(Coordinator, store, bus, clock).start()

    one, other = await daemon(), await daemon()
    caller, claim = Caller("a"), wire.Claim(task="T", request_id="r")
    await clock.run(one.actor.submit(wire.Submit(tasks=(wire.TaskSpec(id="T"),)), caller))
    await clock.run(one.actor.hello(wire.Hello(), caller))
    one.store.behind_s = 60.0  # its watch would tell it the truth in time
    send = one.store.txn

    async def lost_while_the_other_is_asked(txn: Txn) -> TxnResult:
        if b"receipts/" not in repr(txn).encode():
            return await send(txn)
        one.store.txn = send
        await clock.sleep(1.0)
        await other.actor.claim(claim, caller)
        raise Unavailable("the request was lost", what="etcd", maybe_done=True)

    one.store.txn = lost_while_the_other_is_asked
    reply = await clock.run(one.actor.claim(claim, caller))
    there = records.stored(etcd.keys[records.task_key("T")])
    assert reply.fence == there.task.fence
    assert one.actor.board.tasks["T"] == there
    for ended in (one, other):
        await clock.run(ended.stop())
        await ended.store.close()
        await ended.bus.close()
