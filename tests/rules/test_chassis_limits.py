"""What a run may take, and what it costs."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.config_chassis import Price, Runtime
from ifabric.errors import LimitReached
from ifabric.wire.chassis import Limits
from ifabric_actors.chassis.limits import MIB, cost_micro_usd, granted

RUNTIME = Runtime()
FULL: dict[str, Any] = {
    "wall_s": 300.0,
    "cpu_percent": 50.0,
    "memory_bytes": 512 * MIB,
    "fuel": 10**12,
    "output_bytes": 256 * 1024,
}


def test_a_run_that_asks_for_nothing_gets_what_is_configured() -> None:
    assert granted(RUNTIME, Limits())._asdict() == {**FULL, "tables": 4, "table_elements": 20_000}


@pytest.mark.parametrize("which", FULL)
def test_each_limit_can_be_tightened_alone(which: str) -> None:
    tight = granted(RUNTIME, Limits(**{which: FULL[which] / 4 if which == "wall_s" else int(FULL[which] // 4)}))
    assert getattr(tight, which) == FULL[which] // 4
    assert {k: v for k, v in tight._asdict().items() if k in FULL and k != which} == {
        k: v for k, v in FULL.items() if k != which
    }


@pytest.mark.parametrize("which", FULL)
def test_no_limit_can_be_loosened(which: str) -> None:
    assert granted(RUNTIME, Limits(**{which: FULL[which]})) == granted(RUNTIME, Limits())
    with pytest.raises(LimitReached, match=f"{which}=.*the most that is allowed; it was not started") as refused:
        granted(RUNTIME, Limits(**{which: FULL[which] + 1}))
    assert refused.value.facts == {"which": which, "allowed": FULL[which]}


PRICE = Price(
    per_billion_fuel_usd=Decimal("0.02"), per_gb_second_usd=Decimal("0.0000166667"), per_egress_mb_usd=Decimal("0.09")
)


@pytest.mark.parametrize(
    ("used", "micro_usd"),
    [
        ({}, 0),
        ({"fuel": 10**9}, 20_000),
        ({"fuel": 1}, 1),  # rounded up, once
        ({"memory_bytes": 10**9, "wall_s": 1.0}, 17),
        ({"memory_bytes": 10**9, "wall_s": 60.0}, 1001),
        ({"egress_bytes": 10**6}, 90_000),
        ({"fuel": 50, "memory_bytes": 0, "wall_s": 10.0, "egress_bytes": 0}, 1),
    ],
)
def test_the_cost_is_whole_micro_usd_rounded_up(used: dict[str, Any], micro_usd: int) -> None:
    usage = {"fuel": 0, "memory_bytes": 0, "wall_s": 0.0, "egress_bytes": 0} | used
    assert cost_micro_usd(PRICE, **usage) == micro_usd


@given(st.integers(0, 2**53), st.integers(0, 2**40), st.floats(0, 86_400), st.integers(0, 2**40))
def test_more_never_costs_less_and_nothing_costs_nothing_without_a_price(f: int, m: int, w: float, e: int) -> None:
    usage = {"fuel": f, "memory_bytes": m, "wall_s": w, "egress_bytes": e}
    assert cost_micro_usd(Price(), **usage) == 0
    assert 0 <= cost_micro_usd(PRICE, **usage) <= cost_micro_usd(PRICE, **(usage | {"fuel": f + 10**6}))
