"""The chassis: untrusted WebAssembly in sandboxes that it cannot leave, overrun or outlive."""

from __future__ import annotations

from ifabric.actor.base import Actor


class Chassis(Actor):
    """Modules and their runs."""

    component = "chassis"
    description = "Runs untrusted WebAssembly in sandboxes."
