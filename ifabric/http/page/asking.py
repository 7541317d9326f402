"""How the page asks: over the bus like anybody else, so that it does not matter where a component runs.

It looks as `_page`, a name that is nobody's, and acts in the name of the operator whose token it was shown.
"""

from __future__ import annotations

from typing import Any

from ifabric.bus.base import Bus
from ifabric.calling import Line
from ifabric.clock import Clock
from ifabric.errors import Forbidden, Unavailable, Unreachable
from ifabric.handling import Handling, Witness
from ifabric.wire.envelope import Request
from ifabric.wire.permissions import LOOKS
from ifabric.wire.subjects import PAGE_SESSION

#: how long somebody who has asked for something waits for it
PATIENCE_S = 4.0
#: how long an action may take, with all its tries
ACTION_S = 6.0


class Asker:
    """Asks in one name."""

    def __init__(self, bus: Bus, clock: Clock, session: str = PAGE_SESSION, timeout_s: float = PATIENCE_S) -> None:
        self._bus = bus
        self._line = Line(bus, clock, session=session, timeout_s=timeout_s, where="NATS")

    async def ask(self, message: Request, *, attempt_s: float | None = None) -> Any:
        """The reply's struct, after some tries if need be (`attempt_s`: how long one may take, when that is longer than
        usual). Raises the refusal; `Unavailable` when nobody answers.
        """
        return await self._asked(message, attempt_s=attempt_s, again=True)

    async def glance(self, message: Request, within_s: float) -> Any:
        """The same, tried once."""
        return await self._asked(message, attempt_s=within_s, again=False)

    async def _asked(self, message: Request, *, attempt_s: float | None, again: bool) -> Any:
        if not self._bus.connected:  # the page is up before the bus is
            raise Unavailable(
                "This daemon is not connected to NATS; nothing was done.", what="nats", reason="disconnected"
            )
        try:
            return await self._line.call(message, attempt_s=attempt_s, again=again)
        except Unreachable:
            raise Unavailable(
                f"No {message.component} answers: no daemon that is connected runs one.",
                what=message.component,
                reason="no_responders",
            ) from None
        except Forbidden as error:
            if error.facts.get("what") != "nats":
                raise
            raise Forbidden(
                f"NATS does not let this daemon say {message.verb} as {self._line.session}; nothing was done. Its user "
                "needs the permissions that `ifabric bootstrap nats --page-operator NAME` writes.",
                what="nats",
            ) from None


def unless_looking(witness: Witness) -> Witness:
    """The same, but not told of what the page reads for its viewers, several times a second: it changes nothing, and
    where names are proven, nobody else can read under that name. Who acts from the page does so in their own.
    """

    def told(handling: Handling) -> None:
        if handling.session == PAGE_SESSION and (handling.component, handling.verb, handling.admin) in LOOKS:
            return
        witness(handling)

    return told
