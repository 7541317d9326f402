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
    from ifabric.claims import Claim
    from ifabric.client import Client
    from ifabric.sync import Coordinator, EventBus, SyncClient
    from ifabric.wire.coordinator import TaskEvent, TaskSpec

__version__ = "0.1.0"
__all__ = [
    "Claim",
    "Client",
    "Coordinator",
    "EventBus",
    "SyncClient",
    "TaskEvent",
    "TaskSpec",
    "__version__",
    "errors",
]

_HOMES = {
    "Claim": "ifabric.claims",
    "Client": "ifabric.client",
    "Coordinator": "ifabric.sync",
    "EventBus": "ifabric.sync",
    "SyncClient": "ifabric.sync",
    "TaskEvent": "ifabric.wire.coordinator",
    "TaskSpec": "ifabric.wire.coordinator",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("ifabric.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ifabric' has no attribute {name!r}")
