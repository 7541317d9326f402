"""Breakers over three real daemons: exactly so many probes, whoever asks whom, and whoever dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest

from ifabric.errors import BreakerOpen, FabricError, Unavailable, UnknownPermit, from_body
from ifabric.wire import subjects
from ifabric_actors.governor import records
from ifabric_actors.governor.breakers import Breakers
from ifabric_actors.governor.circuit import Circuit
from tests.system.conftest import CLOCK, Cluster, eventually

NAME = "openai/gpt-x"
PROBES = 3
CALLERS = 200


def config(**more: Any) -> dict[str, Any]:
    breaker = {"failure_threshold": 3, "minimum_calls": 3, "half_open_probes": PROBES, **more}
    return {"governor": {"circuit_breaker": breaker}}


async def ask(cluster: Cluster, verb: str, session: str, *, timeout_s: float = 5.0, **body: Any) -> dict[str, Any]:
    subject = subjects.request("governor", verb, session)
    answer = await cluster.bus.request(subject, msgspec.json.encode({"breaker": NAME, **body}), timeout_s=timeout_s)
    reply: dict[str, Any] = msgspec.json.decode(answer.data)
    if "Nats-Service-Error-Code" in answer.headers:
        raise from_body(reply)
    return reply


async def record(cluster: Cluster) -> Circuit:
    kv = await cluster.store.get(records.breaker_key(NAME))
    assert kv is not None
    return Breakers.read(kv)


async def open_it(cluster: Cluster, daemons: int) -> None:
    """Calls fail until it opens: after no more than the daemons can count without knowing of each other."""
    for failures in range(1, daemons * 2 + 2):
        permit = (await ask(cluster, "admit", "s"))["permit"]
        if (await ask(cluster, "report", "s", permit=permit, outcome="failure"))["state"] == "open":
            assert failures >= 3
            return
    raise AssertionError("it did not open")


async def due(cluster: Cluster) -> None:
    """Returns when a probe may go."""
    until = (await record(cluster)).until

    async def over() -> bool:
        return CLOCK.wall_ms() > until

    await eventually(over)


async def try_to(cluster: Cluster, session: str) -> str | None:
    """A permit, or None when the breaker is open."""
    try:
        answer = await ask(cluster, "admit", session, timeout_s=20.0)
    except BreakerOpen:
        return None
    assert answer["state"] == "half_open"
    return str(answer["permit"])


async def test_of_200_callers_at_three_daemons_exactly_so_many_probe(cluster: Cluster) -> None:
    daemons = await asyncio.gather(
        *(cluster.daemon(config=config(reset_timeout=0.3, reset_timeout_max=0.3)) for _ in range(3))
    )
    await open_it(cluster, 3)
    for verdict in ("failure", "failure", "failure", "success"):
        await due(cluster)
        asked = await asyncio.gather(*(try_to(cluster, f"s{n}") for n in range(CALLERS)))
        permits = {f"s{n}": permit for n, permit in enumerate(asked) if permit is not None}
        assert len(permits) == PROBES, permits
        found = await record(cluster)
        assert (found.state, len(found.probes)) == ("half_open", PROBES)
        states = [
            (await ask(cluster, "report", session, permit=permit, outcome=verdict))["state"]
            for session, permit in permits.items()
        ]
        assert states == (["half_open"] * (PROBES - 1) + ["closed"] if verdict == "success" else ["open"] * PROBES)
    assert (await record(cluster)).trips == 4
    served = [await daemon.metric("if_governor_admits_total", outcome="refused") for daemon in daemons]
    assert sum(served) == 4 * (CALLERS - PROBES)
    assert min(served) > 0  # each had its part in it
    made = [await daemon.metric("if_governor_breaker_transitions_total", to="half_open") for daemon in daemons]
    assert sum(made) == 4


async def test_probes_that_never_report_free_their_permits_over_three_daemons(cluster: Cluster) -> None:
    terms = config(reset_timeout=0.1, reset_timeout_max=0.1, probe_timeout_seconds=1.0)
    await asyncio.gather(*(cluster.daemon(config=terms) for _ in range(3)))
    await open_it(cluster, 3)
    await due(cluster)
    lost = [permit for n in range(PROBES) if (permit := await try_to(cluster, f"lost{n}")) is not None]
    assert len(lost) == PROBES
    freed_at = min(end for _, end in (await record(cluster)).probes)
    waits: list[float] = []

    async def another() -> str | None:
        try:
            return str((await ask(cluster, "admit", "next"))["permit"])
        except BreakerOpen as refused:
            waits.append(refused.facts["probe_in_s"])
            return None

    await eventually(another)
    assert freed_at <= CLOCK.wall_ms()
    assert waits
    assert all(0 <= wait_s <= 1.0 for wait_s in waits)
    with pytest.raises(UnknownPermit):
        await ask(cluster, "report", "lost0", permit=lost[0], outcome="success")


async def test_the_report_of_a_killed_daemons_probe_is_taken_by_another(cluster: Cluster) -> None:
    terms = config(reset_timeout=0.1, reset_timeout_max=0.1, half_open_probes=1)
    first = await cluster.daemon(config=terms)
    before = (await ask(cluster, "admit", "s"))["permit"]
    await open_it(cluster, 1)
    await due(cluster)
    permit = await try_to(cluster, "s")
    await first.kill()
    await cluster.daemon(config=terms)

    async def refused() -> FabricError | None:
        try:
            await ask(cluster, "admit", "s", timeout_s=1.0)
        except Unavailable:
            return None  # the server may still count on the dead one
        except FabricError as error:
            return error
        raise AssertionError("it was forgotten that it is half open")

    assert (await eventually(refused)).code == "breaker_open"
    assert (await ask(cluster, "report", "s", permit=before, outcome="failure"))["state"] == "half_open"
    assert (await ask(cluster, "report", "s", permit=permit, outcome="success"))["state"] == "closed"


async def test_callers_that_never_stop_asking_reach_the_resource_no_more_often_than_they_may(cluster: Cluster) -> None:
    """A resource that has failed, behind three daemons: one of them dies, and from some moment on it works again."""
    terms = config(reset_timeout=0.2, reset_timeout_max=0.2, probe_timeout_seconds=5.0)
    daemons = await asyncio.gather(*(cluster.daemon(config=terms) for _ in range(3)))
    calls: Counter[str] = Counter()
    works = False

    async def caller(number: int) -> None:
        session = f"s{number}"
        while calls["closed again"] < CALLERS:
            try:
                answer = await ask(cluster, "admit", session, timeout_s=1.0)
                state = answer["state"]
                calls[f"{state} while it {'works' if works else 'fails'}"] += 1
                outcome = "success" if works else "failure"
                calls["closed again"] += works and state == "closed"
                await ask(cluster, "report", session, permit=answer["permit"], outcome=outcome, timeout_s=1.0)
            except BreakerOpen as refused:
                await asyncio.sleep(min(0.05, refused.facts["probe_in_s"]))
            except Unavailable:
                calls["unavailable"] += 1  # it was the dead one that was asked

    callers = [asyncio.create_task(caller(n)) for n in range(40)]
    transitions = "if_governor_breaker_transitions_total"

    async def probed() -> bool:
        return calls["half_open while it fails"] >= 4

    await eventually(probed, 30.0)
    await daemons[0].kill()
    works = True
    async with asyncio.timeout(60):
        await asyncio.gather(*callers)
    found = await record(cluster)
    assert found.state == "closed"
    # what three daemons count without each other, and who was under way before each of them knew
    assert calls["closed while it fails"] <= 3 * 2 + 2 * 40, calls
    assert calls["half_open while it fails"] <= PROBES * (found.trips + 1), calls
    left = [await daemon.metric(transitions, to="closed") for daemon in daemons[1:]]
    assert sum(left) == 1
    print(f"\n1 of 3 killed while 40 callers probed: {dict(calls)}, {found.trips} trips")
