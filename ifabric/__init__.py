"""InfraFabric: the coordination fabric for swarms of agents.

    async with ifabric.Client.connect(capabilities=["python"]) as client:
        async for claim in client.tasks():
            async with claim:
                await claim.complete(work_on(claim.spec))

Importing this package imports nothing heavy; the names below are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifabric import errors
    from ifabric.blocking import SyncClient
    from ifabric.breaking import Breaker
    from ifabric.claims import Claim
    from ifabric.client import Client
    from ifabric.sandboxing import ExitStatus, Result, output_of
    from ifabric.spending import Hold, micro_usd
    from ifabric.sync import Coordinator, EventBus
    from ifabric.wire.chassis import ChassisEvent, Limits
    from ifabric.wire.coordinator import TaskEvent, TaskSpec
    from ifabric.wire.envelope import Usage
    from ifabric.wire.governor import BreakerEvent, BudgetEvent

__version__ = "0.1.0"
__all__ = [
    "Breaker",
    "BreakerEvent",
    "BudgetEvent",
    "ChassisEvent",
    "Claim",
    "Client",
    "Coordinator",
    "EventBus",
    "ExitStatus",
    "Hold",
    "Limits",
    "Result",
    "SyncClient",
    "TaskEvent",
    "TaskSpec",
    "Usage",
    "__version__",
    "errors",
    "micro_usd",
    "output_of",
]

_HOMES = {
    "Breaker": "ifabric.breaking",
    "BreakerEvent": "ifabric.wire.governor",
    "BudgetEvent": "ifabric.wire.governor",
    "ChassisEvent": "ifabric.wire.chassis",
    "Claim": "ifabric.claims",
    "Client": "ifabric.client",
    "Coordinator": "ifabric.sync",
    "EventBus": "ifabric.sync",
    "ExitStatus": "ifabric.sandboxing",
    "Hold": "ifabric.spending",
    "Limits": "ifabric.wire.chassis",
    "Result": "ifabric.sandboxing",
    "SyncClient": "ifabric.blocking",
    "TaskEvent": "ifabric.wire.coordinator",
    "TaskSpec": "ifabric.wire.coordinator",
    "Usage": "ifabric.wire.envelope",
    "micro_usd": "ifabric.spending",
    "output_of": "ifabric.sandboxing",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("ifabric.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ifabric' has no attribute {name!r}")
