"""Tells the service manager how the daemon is: ready, reloading, stopping, and that its loop still turns (sd_notify).

The protocol is a datagram of `NAME=value` lines to the socket in `$NOTIFY_SOCKET`; without one, nothing is said. The
socket is for this process alone: a child that inherited its name could speak in our place, so it is taken out of the
environment before there is any child. A word that cannot be sent is dropped, since nothing is worse for it than a
daemon that fails because of it.

`WATCHDOG=1` is the one word that keeps the daemon from being killed and started again. It is sent by the event loop
itself, at half of `$WATCHDOG_USEC`, while the supervision tree has not failed: a loop that hangs, or a process that was
stopped, says nothing.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, MutableMapping

from ifabric.clock import Clock

#: how often the state is looked at when no watchdog asks
LOOK_S = 5.0
#: of a state: more is cut
STATUS_MAX = 300


class Notifier:
    """The words of one daemon to its service manager."""

    def __init__(self, address: str, watchdog_s: float | None, clock: Clock) -> None:
        self._clock = clock
        self._watchdog_s = watchdog_s
        self._status = ""
        self._socket: socket.socket | None = None
        # "@" stands for the zero byte with which abstract names begin
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def of(cls, environ: MutableMapping[str, str], clock: Clock) -> Notifier:
        """The one that the environment names; its variables are taken out, so that no child inherits them."""
        address = environ.pop("NOTIFY_SOCKET", "")
        period, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        meant = period.isdecimal() and int(period) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(period) / 1e6 if meant else None, clock)

    def ready(self, status: str = "") -> None:
        """It serves, for the first time or after `reloading`."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """It reads its configuration again; `ready` follows."""
        self._send("RELOADING=1", "reloading", f"MONOTONIC_USEC={int(self._clock.monotonic() * 1e6)}")

    def stopping(self, status: str = "draining") -> None:
        """It ends."""
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """A line for people. Said only when it is another than before."""
        if status != self._status:
            self._send("", status)

    def close(self) -> None:
        """Nothing is said any more. Twice is harmless."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def beat(self, alive: Callable[[], bool], status: Callable[[], str]) -> None:
        """Until it is cancelled: that the loop turns, while it does and `alive` says so; and how things are."""
        if self._socket is None:
            return
        every = LOOK_S if self._watchdog_s is None else min(LOOK_S, self._watchdog_s / 2)
        while True:
            if self._watchdog_s is not None and alive():
                self._send("WATCHDOG=1")
            self.status(status())
            await self._clock.sleep(every)

    def _send(self, word: str, status: str = "", *more: str) -> None:
        if self._socket is None:
            return
        if status:
            self._status = status
            more = (*more, "STATUS=" + " ".join(status.split())[:STATUS_MAX])
        text = "\n".join(filter(None, (word, *more)))
        with contextlib.suppress(OSError):  # nobody listens any more, or does not keep up
            self._socket.sendto(text.encode(errors="replace"), self._address)
