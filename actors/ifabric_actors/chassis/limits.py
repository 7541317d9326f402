"""What one run may take, and what it costs. Pure.

The configuration says how much at most; a caller may tighten each limit and loosen none. A run that asks for more than
is allowed is refused and not quietly given less: its caller counts on what it asked for.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import Any, NamedTuple

from ifabric.errors import LimitReached
from ifabric.wire.chassis import Limits

MIB = 1 << 20
MICRO = Decimal(1_000_000)


class Granted(NamedTuple):
    """The limits of one run. Sizes in bytes, times in seconds."""

    wall_s: float
    #: of one core, 0 to 100
    cpu_percent: float
    memory_bytes: int
    fuel: int
    output_bytes: int
    tables: int
    table_elements: int


def granted(runtime: Any, asked: Limits) -> Granted:
    """The tighter of both, each. `runtime` and, below, `price` are sections of the configuration.

    `LimitReached` when more is asked for than is configured.
    """
    allowed: dict[str, Any] = {
        "wall_s": runtime.max_execution_time_seconds,
        "cpu_percent": runtime.max_cpu_percent,
        "memory_bytes": runtime.max_memory_mb * MIB,
        "fuel": runtime.max_fuel,
        "output_bytes": runtime.max_output_bytes,
    }
    given: dict[str, Any] = {}
    for which, most in allowed.items():
        wanted = getattr(asked, which)
        if wanted is not None and wanted > most:
            raise LimitReached(
                f"the run asks for {which}={wanted:g}, and {most:g} is the most that is allowed; it was not started",
                which=which,
                allowed=most,
            )
        given[which] = most if wanted is None else wanted
    return Granted(**given, tables=runtime.max_tables, table_elements=runtime.max_table_elements)


def cost_micro_usd(price: Any, *, fuel: int, memory_bytes: int, wall_s: float, egress_bytes: int) -> int:
    """What a run costs in whole micro-USD, rounded up: fuel by the billion, memory by the gigabyte (10^9 bytes) and
    second, egress by the megabyte (10^6 bytes, both directions).
    """
    usd = (
        price.per_billion_fuel_usd * fuel / 10**9
        + price.per_gb_second_usd * memory_bytes * round(wall_s * 10**6) / 10**15
        + price.per_egress_mb_usd * egress_bytes / 10**6
    )
    return int((usd * MICRO).to_integral_value(ROUND_CEILING))
