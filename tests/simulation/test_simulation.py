"""Seeded runs: first everything fails that can fail and nothing wrong may happen, then all must settle.

A run that fails prints its seed; `IFABRIC_SEED=n` repeats that run, to the letter.
"""

from __future__ import annotations

import pytest

from tests.simulation.swarm import seeds, simulate


@pytest.mark.parametrize("seed", seeds(1, 30))
async def test_nothing_wrong_happens_and_everything_settles(seed: int) -> None:
    verdict = await simulate(seed)
    assert not verdict.wrong, verdict


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(1, 9))
async def test_nothing_wrong_happens_in_hundreds_of_runs(hundred: int) -> None:
    requests = commits = 0
    for seed in seeds(100 * hundred, 100):
        verdict = await simulate(seed)
        assert not verdict.wrong, verdict
        requests += verdict.requests
        commits += verdict.commits
    print(f"{requests} requests, {commits} commits")


async def test_a_seed_is_a_run() -> None:
    one, two = await simulate(77), await simulate(77)
    assert one.digest == two.digest
    assert one.requests > 100
    assert (await simulate(78)).digest != one.digest
